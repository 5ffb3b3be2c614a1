"""imagenet_dgl: both scripts with small networks on small images, their data, ranks, log and checkpoints."""

import contextlib
import ctypes
import datetime
import errno
import itertools
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import weakref

import conftest
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT, assert_same, checkpoint_of, copy_tree, forked, load, make_tree, run, torchrun
from forked_ranks import fork_ranks, run_ranks
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

dgl = load("imagenet_dgl", "imagenet_dgl")
imagenet = load("imagenet_dgl", "imagenet")
data, ranks, runs, training, models = (sys.modules[name] for name in ("data", "ranks", "runs", "training", "models"))
utils = training.utils

SCRIPTS = {"dgl": "imagenet_dgl/imagenet_dgl.py", "backprop": "imagenet_dgl/imagenet.py"}
NETWORK = ["-j", 0, "--image-size", 32, "--threads", 1, "--arch", "squeezenet1_1"]  # has dropout
SMALL = [*NETWORK, "-b", 6, "--nepochs", 3, "--epochdecay", 2, "--lr", 0.01]
NUMBER = r"(\d+\.\d{3})"
TESTED = rf"test top1:{NUMBER} \(top5:{NUMBER}\)"
TRAINED = rf"train top1:{NUMBER}\(top5:{NUMBER}\)"
LINES = {
    "dgl": re.compile(rf"n: (\d), epoch (\d), {TRAINED}, {TESTED}, top1ens:{NUMBER} top5ens:{NUMBER}"),
    "backprop": re.compile(rf"lr: (\S+), epoch (\d), {TRAINED}, {TESTED}"),
}
both = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """14 training and 5 validation images of 2 classes, one light, one dark; 40x44 pixels."""
    return make_tree(tmp_path_factory.mktemp("tree"), {"train": 14, "val": 5}, (40, 44), "jpg")


def call(script, *flags, cwd):
    """A run that must succeed: what it printed."""
    status, out, err = run(SCRIPTS[script], *flags, cwd=cwd)
    assert status == 0, err
    return out


def refused(script, *flags, cwd):
    """The one line on stderr with which the script refuses the flags."""
    result = run(SCRIPTS[script], *flags, cwd=cwd)
    conftest.refused(result)
    return result[2]


def log_of(folder):
    """The lines of the one log in a folder, but for its arguments."""
    return conftest.log_of(folder)[1:]


def best_of(folder):
    (path,) = folder.glob("*_best.pt")
    return path


def flat(state):
    """All tensors of a nested state, by the path to them."""
    if isinstance(state, torch.Tensor):
        return {(): state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {(key, *path): tensor for key, value in items for path, tensor in flat(value).items()}


@pytest.fixture(scope="module")
def whole_run(tree, tmp_path_factory):
    """(folder, screen) of an undisturbed run of each script; the training of one image is written twice over."""
    folders = {script: tmp_path_factory.mktemp(script) for script in SCRIPTS}
    return {script: (f, call(script, tree, *SMALL, "-p", 2, cwd=f)) for script, f in folders.items()}


def arguments(script, *flags):
    return {"dgl": dgl, "backprop": imagenet}[script].parse_args([*map(str, flags)])


# Commands


PUBLISHED = [
    ("dgl", "vgg13", "--block_size 1", 10),
    ("dgl", "vgg13", "--block_size 3", 4),
    ("dgl", "vgg19", "--block_size 4", 4),
    ("dgl", "vgg19", "--block_size 8", 2),
    ("dgl", "resnet152", "", 2),
    ("backprop", "resnet152", "", None),
    ("backprop", "vgg13_bn", "", None),
    ("backprop", "vgg19_bn", "", None),
]


@pytest.mark.parametrize(("script", "arch", "flags", "num_modules"), PUBLISHED)
def test_published_commands(script, arch, flags, num_modules, capsys):
    """As printed in docstring and README: they parse, also without a GPU, and build the published network."""
    name = SCRIPTS[script].split("/")[1]
    pattern = rf"^ *python {name} IMAGENET_DIR -j THREADS {flags}.*--arch {arch} --half --dynamic-loss-scale$"
    texts = (ROOT / SCRIPTS[script]).read_text(), (ROOT / "imagenet_dgl" / "README.md").read_text()
    (command,), (in_readme,) = (re.findall(pattern, text, re.MULTILINE) for text in texts)
    assert command.split() == in_readme.split()
    args = arguments(script, *shlex.split(command.replace("THREADS", "2"))[2:])
    expected = (256, 0.1, 0.9, 1e-4, 50, 10)
    assert (args.batch_size, args.lr, args.momentum, args.weight_decay, args.epochs, args.epochdecay) == expected
    if torch.cuda.is_available():
        assert args.precision == "fp16"
    else:
        assert args.precision == "fp32"
        assert "float32" in capsys.readouterr().err
    with torch.device("meta"):
        model = {"dgl": dgl, "backprop": imagenet}[script].make_model(args, 1000)
    assert len(getattr(model, "blocks", [])) == (num_modules or 0)


@both
def test_log_and_screen(script, whole_run, tree):
    folder, screen = whole_run[script]
    environment, described, model, *lines = log_of(folder)
    assert environment.startswith("environment: Python 3.")
    assert described == "data: image folder, 14 training and 5 validation images of 2 classes"
    assert model.startswith("model, ")
    lines = lines[lines.index("ranks: 1") + 1 :]
    matches = [LINES[script].fullmatch(line).groups() for line in lines]
    if script == "dgl":
        assert [match[:2] for match in matches] == [(n, epoch) for epoch in "012" for n in "01"]
        assert all(match[6:] == match[4:6] for match in matches if match[0] == "0")  # the ensemble of one
    else:
        assert [match[:2] for match in matches] == [("0.01", "0"), ("0.001", "1"), ("0.001", "2")]
    assert all(float(match[3]) == float(match[5]) == 100 for match in matches)  # top-5 of two classes
    assert all(float(match[4]) % 20 == 0 for match in matches)
    which = r"n: \d\t" if script == "dgl" else ""
    times, loss = r"Time .{6} \(.{6}\)\tData .{6} \(.{6}\)\t", r"Loss \d\.\d{4}e...? \(\d\.\d{4}e...?\)\t"
    line = rf"Epoch: \[\d\]\[([02])/3\]\t{which}{times}{loss}Acc@1 .{{6}} \(.{{6}}\)\tAcc@5 .{{6}} \(.{{6}}\)"
    printed = [match[1] for match in re.finditer(line, screen)]
    assert printed == [i for _ in range(3) for i in "02" for _ in range(1 + (script == "dgl"))]
    assert len(re.findall(r"^\d+\.\d training images/s$", screen, re.MULTILINE)) == 3


@both
def test_help(script, tmp_path):
    text = " ".join(call(script, "--help", cwd=tmp_path).split())
    assert "IMAGENET_DIR" in text
    assert "(default: 256)" in text
    assert ("(default: resnet18)" if script == "dgl" else "(default: vgg19_bn)") in text
    assert "(default: None)" not in text
    assert "ncnn" not in text


@both
def test_flags_that_have_no_effect_any_more(script, capsys):
    """Before and after the folder, with and without a value."""
    before, after = "--resume_epoch 3 --ncnn 4 DIR --half", "DIR --half --feature_size=128 --ds-type x --resume_feat"
    expected = vars(arguments(script, "DIR", "--half"))
    for command in (before, after):
        capsys.readouterr()
        assert vars(arguments(script, *command.split())) == expected
        flags = re.findall("--[a-z]+[_-]?[a-z]*", command.replace("--half", ""))
        said = capsys.readouterr().err.splitlines()
        assert [line for line in said if "--half" not in line] == [f"{flag} has no effect any more" for flag in flags]


def test_ensemble_has_no_effect_end_to_end(capsys):
    assert vars(arguments("backprop", "DIR", "--ensemble", "1")) == vars(arguments("backprop", "DIR"))
    assert capsys.readouterr().err == "--ensemble has no effect any more\n"


@both
def test_mistakes(script, tree, tmp_path):
    small = [tree, *SMALL]
    for flags, part in [
        ([], "--dummy"),
        ([tmp_path / "nowhere"], "train/<class>/ and val/<class>/"),
        ([*small, "--arch", "resnet19"], "resnet18"),
        ([*small, "--start_epoch", 3], "0 to 2"),
        ([*small, "--evaluate"], "--resume"),
        ([*small, "--evaluate", "--resume", "auto"], "there is no imagenet_dgl-"),
        ([*small, "--resume", "missing.pt"], "no checkpoint 'missing.pt'"),
        ([*small, "--static-loss-scale", 2], "--half"),
        ([*small, "--half", "--precision", "bf16"], "--precision bf16"),
        ([*small, "--lr", "nan"], "--lr"),
        ([*small, "--name", "a/b"], "--save_folder"),
        ([*small, "--name", "a_best"], "best checkpoints"),
        ([*small, "--sync-bn", "--no-cuda"], "--sync-bn needs GPUs"),
        ([*small, "--arch", "alexnet"], "alexnet: AlexNet fails on 32-pixel images"),
        (
            ["--flops", "--image-size", 32, "--arch", "inception_v3"],
            "Inception3 fails on 32-pixel images",
        ),
    ]:
        assert part in refused(script, *flags, cwd=tmp_path)
    assert not [*tmp_path.iterdir()]


def test_the_flag_for_cutting_belongs_to_the_network(tree, tmp_path):
    for flags, part in [
        (["--arch", "vgg11", "--num-modules", 2], "block_size"),
        (["--arch", "resnet18", "--block_size", 2], "num_modules"),
        (["--arch", "resnet18", "--num-modules", 100], "modules"),
    ]:
        assert part in refused("dgl", tree, *SMALL, *flags, cwd=tmp_path)


def test_folders_that_do_not_fit(tree, tmp_path):
    copy = copy_tree(tree, tmp_path / "tree")
    (copy / "val/class1").rename(copy / "val/other")
    assert "['class1', 'other']" in refused("dgl", copy, *SMALL, cwd=tmp_path)
    shutil.rmtree(copy / "val/other")
    assert "val has 1 class folders; at least two are needed" in refused("dgl", copy, *SMALL, cwd=tmp_path)
    (copy / "val/class1").symlink_to(tmp_path / "unmounted")
    assert "val/class1 is a link to nowhere" in refused("dgl", copy, *SMALL, cwd=tmp_path)


# Input


def load_data(tree, *flags):
    return data.load_data(arguments("dgl", tree, *SMALL, *flags), torch.device("cpu"))


def test_hidden_files_and_folders_are_no_images(tree, tmp_path):
    copy = copy_tree(tree, tmp_path / "tree")
    for place in (".ipynb_checkpoints", "class0/.ipynb_checkpoints", "class0"):
        folder = copy / "train" / place
        folder.mkdir(exist_ok=True)
        (folder / ".hidden.jpg").write_bytes(b"")
        (folder / ("visible.jpg" if ".ipynb" in place else ".other.jpg")).write_bytes(b"")
    assert load_data(copy).description == load_data(tree).description


def test_a_link_to_nowhere_is_an_image_that_cannot_be_read(tree, tmp_path):
    (copy_tree(tree, tmp_path / "tree") / "train/class0/x.jpg").symlink_to(tmp_path / "annex")
    message = refused("backprop", tmp_path / "tree", *SMALL, cwd=tmp_path)
    assert f"cannot read the image {tmp_path}/tree/train/class0/x.jpg: a link to nowhere" in message


@pytest.mark.parametrize("name", ["grey16.png", "float.tif"])
def test_images_of_more_than_8_bits_are_not_read(name, tree, tmp_path):
    path = copy_tree(tree, tmp_path / "tree") / "val/class1" / name
    pixels = torch.arange(40 * 40).reshape(40, 40) * 20
    Image.fromarray(pixels.numpy().astype("uint16") if name.endswith("png") else pixels.float().numpy()).save(path)
    with pytest.raises(ValueError, match="more than 8 bits"):
        data.ImageTree.load(path)
    images = load_data(tmp_path / "tree", "--skip-corrupt")
    assert sum(len(labels) for _, labels in images.test) == 5
    assert images.test.skipped == 1


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_8_bit_images_become_rgb(mode, tmp_path):
    path = tmp_path / f"x.{'tif' if mode == 'CMYK' else 'png'}"
    Image.new("RGB", (4, 4), "white").convert(mode).save(path)
    image = data.ImageTree.load(path)
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_batches(tree):
    images = load_data(tree)
    batches = [*images.train]
    assert [x.shape for x, _ in batches] == [(6, 3, 32, 32), (6, 3, 32, 32), (2, 3, 32, 32)]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in batches)
    assert torch.cat([labels for _, labels in batches]).bincount().tolist() == [7, 7]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (data.MEAN, data.STD))
    pixels = torch.cat([x for x, _ in batches]) * std + mean
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    again = [*images.train]
    assert not torch.equal(batches[0][0], again[0][0])  # the next pass
    assert [len(labels) for _, labels in images.test] == [5]


def test_validation_images_are_resized_and_cropped_as_torchvision_does(tree):
    from torchvision.transforms import functional as TF

    ((batch, _),) = load_data(tree).test
    files = sorted((tree / "val").glob("*/*"))
    for image, file in zip(batch, files):
        expected = TF.center_crop(TF.resize(Image.open(file), 37), 32)  # 32 * 256 / 224
        assert torch.equal(image, TF.normalize(TF.to_tensor(expected), data.MEAN, data.STD))


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [([], (224, 256)), (["--large_size_images", 0], (112, 128)), (["--image-size", 64], (64, 73))],
)
def test_image_sizes(tree, flags, sizes):
    args = arguments("dgl", tree, "-j", 0, *flags)
    images = data.load_data(args, torch.device("cpu"))
    resize, crop, _ = images.test.loader.dataset.transform.transforms
    assert (crop.size[0], resize.size[0]) == sizes
    assert images.train.loader.dataset.transform.transforms[0].size == (sizes[0], sizes[0])


def test_workers_and_the_global_generator_do_not_change_the_images(tree):
    alone, torch_state = [*load_data(tree).train], torch.get_rng_state()
    torch.manual_seed(5)
    images = load_data(tree, "-j", 2)
    with_workers = [*images.train]
    for (a, b), (c, d) in zip(alone, with_workers, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)
    assert torch.get_rng_state().equal(torch.manual_seed(5).get_state())  # nothing was drawn from it
    torch.set_rng_state(torch_state)


@pytest.mark.parametrize("size", [7, 8, 9, 10, 11, 12])
def test_ranks_share_the_batches_of_one_rank(size, monkeypatch):
    def order(rank, count, training):
        monkeypatch.setattr(ranks, "RANK", rank)
        monkeypatch.setattr(ranks, "COUNT", count)
        batches = data.Order(size, 4, torch.Generator().manual_seed(3) if training else None)
        shares = [*batches]
        assert len(shares) == len(batches)
        return shares

    whole, shares = order(0, 1, True), [order(rank, 2, True) for rank in (0, 1)]
    for i, pair in enumerate(zip(*shares, strict=True)):
        assert len(pair[0]) == len(pair[1]) >= 2
        assert all(image in whole[i] for share in pair for image in share)
    left_out = sum(map(len, whole)) - sum(len(share) for rank in shares for share in rank)
    assert left_out == (0 if size % 4 == 1 else size % 4)  # one rank leaves out a single image, too
    tested = [image for rank in (0, 1) for share in order(rank, 2, False) for image, _ in share]
    assert sorted(tested) == [*range(size)]


def damage(tree, target):
    """A copy of the tree in which one training and one validation image are cut short, and their paths."""
    copy_tree(tree, target)
    files = [sorted((target / split).glob("*/*"))[1] for split in ("train", "val")]
    for file in files:
        file.write_bytes(file.read_bytes()[:-200])
    return files


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named(workers, tree, tmp_path):
    bad, _ = damage(tree, tmp_path / "tree")
    message = refused("backprop", tmp_path / "tree", *SMALL, "-j", workers, cwd=tmp_path)
    assert f"cannot read the image {bad}" in message
    assert "--skip-corrupt" in message


def test_skip_corrupt(tree, tmp_path):
    files = damage(tree, tmp_path / "tree")
    flags = tmp_path / "tree", *SMALL, "--skip-corrupt", "--nepochs", 2
    status, out, err = run(SCRIPTS["dgl"], *flags, cwd=tmp_path)
    assert status == 0
    assert [line.split()[4] for line in err.splitlines()] == [f"{file}:" for file in files]  # each once
    for epoch in (0, 1):
        for kind in ("training", "validation"):
            assert f"epoch {epoch}, skipped: 1 {kind} images that cannot be read" in out
    top1 = [float(match[5]) for match in map(LINES["dgl"].fullmatch, log_of(tmp_path)) if match]
    assert all(x % 25 == 0 for x in top1)  # of four images
    out = call("dgl", *flags, "--resume", "auto", "--evaluate", cwd=tmp_path)
    assert out.endswith("\nskipped: 1 validation images that cannot be read\n")
    for file in (tmp_path / "tree/val").glob("*/*"):
        file.write_bytes(b"damaged")
    status, _, err = run(SCRIPTS["dgl"], *flags, "--resume", "auto", "--evaluate", cwd=tmp_path)
    assert status == 2
    assert err.endswith("error: no validation image can be read\n")


def test_shared_memory_is_found_too_small_before_training(tree, tmp_path, monkeypatch):
    batch = 6 * 3 * 32 * 32  # bytes; two that each worker prepares, and the one that is trained on
    monkeypatch.setattr(data, "free_shared_memory", lambda: 3 * batch)
    load_data(tree, "-j", 1)
    load_data(tree, "-j", 0)
    message = refused("dgl", tree, *SMALL, "-j", 2, cwd=tmp_path)
    assert "use -j 1, or a smaller -b, or enlarge it (docker run --shm-size" in message
    monkeypatch.setattr(data, "free_shared_memory", lambda: 3 * batch - 1)
    assert "use -j 0," in refused("dgl", tree, *SMALL, "-j", 1, cwd=tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # ranks on one machine share it
    monkeypatch.setattr(data, "free_shared_memory", lambda: 4 * batch - 1)
    monkeypatch.setattr(ranks, "COUNT", 2)
    load_data(tree, "-j", 1, "-b", 12)  # one batch in a pass, half of it here
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        load_data(tree, "-j", 1, "-b", 12)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small /dev/shm")
def test_a_full_shared_memory_ends_in_one_line(tree, tmp_path):
    """What a process beside this one has taken is not known before training."""

    def train():
        if ctypes.CDLL(None).unshare(0x00020000):  # CLONE_NEWNS: nobody else sees the mounts
            os._exit(77)
        for command in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", "size=64k", "tmpfs", "/dev/shm"]):
            if subprocess.run(["mount", *command], capture_output=True).returncode:
                os._exit(77)
        data.free_shared_memory = lambda: None
        with contextlib.redirect_stdout(None):
            imagenet.main([*map(str, [tree, *SMALL, "-j", 1, "--save_folder", tmp_path, "--image-size", 128])])

    begin = time.monotonic()
    status = forked(train, errors=tmp_path / "errors")
    if status == 77:
        pytest.skip("mounting is not permitted")
    assert status == 1
    assert time.monotonic() - begin < 60
    (message,) = (tmp_path / "errors").read_text().splitlines()
    assert message.startswith("A process that loads images has failed: ")
    old = torch.__version__.startswith("2.11.")
    assert ("unable to allocate shared memory" if old else "No space left on device") in message
    assert "fewer workers, -j" in message


def test_a_worker_that_dies_ends_the_run_in_one_line(tree, tmp_path, monkeypatch):
    """As of a bus error, or for want of memory."""
    monkeypatch.setattr(data.Images, "__getitem__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    status, _, err = run(SCRIPTS["dgl"], tree, *SMALL, "-j", 1, cwd=tmp_path)
    assert status == 1
    assert err.count("\n") == 1
    assert "A process that loads images has failed: DataLoader worker (pid" in err


def test_a_batch_keeps_its_size_when_an_image_cannot_be_read():
    good = [(torch.full((3, 2, 2), i, dtype=torch.uint8), i) for i in range(2)]
    images, labels, bad = data.collate([good[0], (None, "x.jpg: no"), good[1], (None, "y.jpg: no")], fill=True)
    assert labels.tolist() == [0, 1, 0, 1]
    assert images[:, 0, 0, 0].tolist() == [0, 1, 0, 1]
    assert bad == ["x.jpg: no", "y.jpg: no"]
    assert [len(part) for part in data.collate([(None, "x.jpg: no")], fill=True)] == [0, 0, 1]


def test_dummy_and_debug(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DEBUG_STEPS", 2)
    flags = "--dummy", "--debug", 1, *SMALL, "--nepochs", 1, "-p", 1
    out = call("dgl", *flags, cwd=tmp_path)
    assert "[1/2]" in out
    assert "training images/s" in out
    assert "n: 1, epoch 0" in call("dgl", *flags, "--lr", 1e30, "--name", "diverges", cwd=tmp_path)
    monkeypatch.undo()
    args = arguments("dgl", "--dummy", "-b", 256, "--debug", 1)
    assert len(data.Order(1000 * args.batch_size, args.batch_size, None, data.DEBUG_STEPS)) == 50


# Training


class Training:
    """What imagenet_dgl.py's main makes, for a given network."""

    def __init__(self, model, *flags):
        self.args, device = arguments("dgl", "--dummy", *flags), torch.device("cpu")
        self.model = model
        self.modules = [dgl.Module(*parts, n) for n, parts in enumerate(zip(model.blocks, model.auxiliary_nets))]
        self.optimizers, self.scalers = training.make_optimizers(self.modules, self.args, device, 0)
        self.meters = [training.Meter(device) for _ in self.modules]
        self.autocast = utils.autocast(self.args, device)

    def epoch(self, batches):
        dgl.train_epoch(self.modules, self.optimizers, self.scalers, self.autocast, batches, self.meters)
        return self


def random_batches(number=3, size=8, side=8, classes=6):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 3, side, side, generator=generator), torch.arange(size) % classes) for _ in range(number)
    ]


def small_net(classes=6):
    torch.manual_seed(0)
    widths = [3, 4, 5, 6]
    blocks = [
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())
        for a, b in itertools.pairwise(widths)
    ]
    nets = [nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * b, classes)) for b in widths[1:]]
    return models.DGLNet(blocks, nets)


def test_modules_learn_as_if_alone():
    """Module n's weights are those of training it on the outputs of the modules before it, one step each."""
    model, reference = small_net(), small_net()
    batches = random_batches()
    Training(model).epoch(batches)
    parts = [*zip(reference.blocks, reference.auxiliary_nets)]
    optimizers = [
        torch.optim.SGD([*b.parameters(), *a.parameters()], 0.1, momentum=0.9, weight_decay=1e-4) for b, a in parts
    ]
    for x, labels in batches:
        for (block, net), optimizer in zip(parts, optimizers):
            optimizer.zero_grad()
            x = block(x.detach())
            F.cross_entropy(net(x), labels).backward()
            optimizer.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_activations_of_a_module_are_freed_before_the_next_one_runs():
    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor.detach()  # else an output would keep its own graph alive

    model, alive, counts = small_net(), weakref.WeakSet(), []

    def pack(tensor):
        alive.add(saved := Saved(tensor))
        return saved

    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: counts.append(len(alive)))
    steps = Training(model)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        with torch.enable_grad():
            model.blocks[0](random_batches()[0][0])
        assert not alive  # the output was not kept
        kept = model.blocks[0](random_batches()[0][0])
        assert alive  # so that the test can fail
        del kept
        steps.epoch(random_batches())
    assert counts == [0] * 11


def test_evaluate_equals_the_definition():
    model, batches = small_net(), random_batches(3, 7)
    model(batches[0][0], 0)  # running statistics other than 0 and 1

    class Batches(list):
        device = "cpu"

    result = dgl.evaluate(Training(model).modules, torch.autocast("cpu", enabled=False), Batches(batches))
    images, labels = (torch.cat(parts) for parts in zip(*batches))
    with torch.no_grad():
        softmax = [model(images, n, upto=True)[0].softmax(1) for n in range(3)]
    for n in range(3):
        ensemble = sum(2**i * softmax[i] for i in range(n + 1)) / (2 ** (n + 1) - 1)
        for scores, (top1, top5) in zip((softmax[n], ensemble), result[n]):
            order = scores.argsort(1, descending=True)
            assert top1 == pytest.approx(100 * (order[:, 0] == labels).float().mean().item())
            assert top5 == pytest.approx(100 * (order[:, :5] == labels[:, None]).any(1).float().mean().item())


def test_meter():
    meter = training.Meter("cpu")
    for logits, labels in [(torch.eye(8), torch.arange(8)), (torch.eye(8)[:4], torch.tensor([7, 1, 6, 3]))]:
        meter.update(F.cross_entropy(logits, labels), logits, labels)
    last, mean = meter.look()
    assert last[1] == 50
    assert mean == pytest.approx(meter.pop())
    assert mean[1] == pytest.approx(100 * 10 / 12)
    right, wrong = (-torch.eye(8)[0].log_softmax(0))[:2].tolist()
    assert mean[0] == pytest.approx((10 * right + 2 * wrong) / 12)
    meter.update(torch.tensor(1.0), torch.eye(8), torch.arange(8))
    assert meter.pop() == (1, 100, 100)


def test_one_module_equals_backprop_to_the_bit(tree, tmp_path):
    """Whose schedule is one epoch ahead."""
    folders = tmp_path / "dgl", tmp_path / "backprop"
    for folder, flags in zip(folders, (["--num-modules", 1], ["--epochdecay", 3])):
        folder.mkdir()
        call(folder.name, tree, *SMALL, *flags, cwd=folder)
    a, b = ([*checkpoint_of(folder)["parts"]["model"].values()] for folder in folders)
    assert len(a) == len(b) > 10
    assert all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.fixture
def optimizers_of(monkeypatch, tmp_path):
    """A function: by epoch, the optimizers and scalers with which a script's main, so called, would train."""

    def run_without_training(script, *flags):
        module, used = {"dgl": dgl, "backprop": imagenet}[script], []
        monkeypatch.setattr(
            module, "train_epoch", lambda model, optimizer, scaler, *rest: used.append((optimizer, scaler))
        )
        tested = [[[0, 0], [0, 0]]] * 2 if script == "dgl" else [0, 0]
        monkeypatch.setattr(module, "evaluate", lambda *_: tested)
        monkeypatch.setattr(runs.Run, "watch", lambda *_: ())
        monkeypatch.setattr(runs.Run, "write", lambda *_: None)
        monkeypatch.setattr(training.Meter, "pop", lambda _: (0, 0, 0))
        with contextlib.redirect_stdout(None):
            module.main([*map(str, ["--dummy", *NETWORK, "-b", 2, "--save_folder", tmp_path, *flags])])
        return used if script == "dgl" else [([optimizer], [scaler]) for optimizer, scaler in used]

    return run_without_training


@both
def test_the_published_optimizer(script, optimizers_of):
    """SGD as in the paper; a new one, and a new scaler, when the learning rate drops: after 10 epochs, or after 9."""
    used, ahead = optimizers_of(script), script == "backprop"
    assert len(used) == 50
    for epoch, (optimizers, scalers) in enumerate(used):
        assert len(optimizers) == len(scalers) == (2 if script == "dgl" else 1)
        for i, optimizer in enumerate(optimizers):
            assert type(optimizer) is torch.optim.SGD
            (group,) = optimizer.param_groups
            expected = {"momentum": 0.9, "weight_decay": 1e-4, "nesterov": False, "dampening": 0, "maximize": False}
            assert {key: group[key] for key in expected} == expected
            assert group["lr"] == pytest.approx([0.1, 0.01, 0.001, 1e-4, 1e-5, 1e-6][(epoch + ahead) // 10])
            if epoch:
                assert (optimizer is not used[epoch - 1][0][i]) == ((epoch + ahead) % 10 == 0)
                assert (scalers[i] is not used[epoch - 1][1][i]) == ((epoch + ahead) % 10 == 0)


@pytest.mark.parametrize(("script", "rates"), [("dgl", [1e-3, 1e-4, 1e-4]), ("backprop", [1e-4, 1e-4, 1e-5])])
def test_the_learning_rate_of_a_run_that_begins_later(script, rates, optimizers_of):
    used = optimizers_of(script, "--nepochs", 6, "--start_epoch", 3, "--epochdecay", 2, "--lr", 0.01)
    assert [optimizers[0].param_groups[0]["lr"] for optimizers, _ in used] == pytest.approx(rates)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """100 training and 50 validation images of scikit-learn's digits 0 and 1, 32x32 pixels."""
    root, samples = tmp_path_factory.mktemp("digits"), load_digits(n_class=2)
    for i, (pixels, label) in enumerate(zip(samples.images[:150], samples.target)):
        folder = root / ("train" if i < 100 else "val") / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype("uint8")).resize((32, 32)).save(folder / f"{i:03}.png")
    return root


@pytest.mark.parametrize(("script", "floor"), [("dgl", 70), ("backprop", 85)])
def test_what_the_published_hyper_parameters_reach(script, floor, digits, tmp_path, monkeypatch):
    """A thousand times the learning rate, or the weight decay, or a thousandth of the rate, stay below."""
    module, net = {"dgl": (dgl, small_net(2)), "backprop": (imagenet, small_net(2))}[script]
    if script == "backprop":
        net = nn.Sequential(*net.blocks, net.auxiliary_nets[-1])
    monkeypatch.setattr(module, "make_model", lambda *_: net)
    flags = digits, *NETWORK, "-b", 10, "--nepochs", 9, "--epochdecay", 6, "-p", 0, "--save_folder", tmp_path
    with contextlib.redirect_stdout(None):
        module.main([*map(str, flags)])
    last = LINES[script].fullmatch(log_of(tmp_path)[-1])
    assert float(last[5]) >= floor


@pytest.mark.parametrize(
    ("flags", "scales"),
    [
        (["--half"], [1, 1]),
        (["--half", "--static-loss-scale", 128], [128, 128]),
        (["--half", "--dynamic-loss-scale"], [65536, 32768]),
        (["--half", "--dynamic-loss-scale", "--static-loss-scale", 128], [65536, 32768]),
        (["--precision", "fp16"], [65536, 32768]),
        (["--precision", "bf16"], [1, 1]),
    ],
)
def test_loss_scales(flags, scales, monkeypatch):
    """Before and after a gradient that is not finite, whose step is left out; a scaler for each module."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # --half needs a GPU; the scalers do not
    steps = Training(small_net(), *flags)
    monkeypatch.undo()
    assert len({*map(id, steps.scalers)}) == 3
    steps.epoch(random_batches(1))
    assert [scaler.get_scale() for scaler in steps.scalers] == scales[:1] * 3
    before = [p.clone() for p in steps.model.parameters()]
    (images, labels) = random_batches(1)[0]
    images[0, 0, 0, 0] = torch.inf
    if "bf16" not in flags:
        steps.epoch([(images, labels)])
        assert [scaler.get_scale() for scaler in steps.scalers] == scales[1:] * 3
        assert all(torch.equal(a, b) for a, b in zip(steps.model.parameters(), before))


def test_half_without_a_gpu_is_float32_as_it_says(capsys):
    assert arguments("dgl", "x", "--half", "--precision", "fp16", "--no-cuda").precision == "fp32"
    assert "--half is float32" in capsys.readouterr().err


def test_tensorboard(tree, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "pip install tensorboard" in refused("dgl", tree, *SMALL, "--tensorboard", cwd=tmp_path)
    assert not [*tmp_path.iterdir()]
    written = []
    fake = types.SimpleNamespace(add_scalar=lambda *a: written.append(a), flush=lambda: None)
    module = types.SimpleNamespace(
        SummaryWriter=lambda folder, purge_step: written.append((folder, purge_step)) or fake
    )
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    flags = tree, *SMALL, "--tensorboard", "--nepochs", 1, "--name", "tb"
    call("dgl", *flags, cwd=tmp_path)
    call("dgl", *flags, "--evaluate", "--resume", "auto", cwd=tmp_path)  # writes nothing
    folder, *scalars = written
    assert (str(folder[0]), folder[1]) == ("imagenet_dgl-imagenet_dgl-tb.tensorboard", 0)
    kinds = "loss", "train_top1", "test_top1", "ensemble_top1"
    assert [scalar[0] for scalar in scalars] == [f"{kind}/{n}" for n in (0, 1) for kind in kinds]


@pytest.mark.parametrize("what", ["tensorboard", "best", "log"])
def test_a_full_disk_ends_in_one_line(what, tree, tmp_path, monkeypatch):
    """In the second epoch; the first one's checkpoint and log stay, and no temporary file."""
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*_):
        raise full

    class Writer:
        log_dir = "tb"

        def __init__(self, *_, **__):
            self.flushed = 0

        def add_scalar(self, *_):
            pass

        def flush(self):
            self.flushed += 1
            if self.flushed > 2:
                fail()

    flags = [tree, *SMALL]
    if what == "tensorboard":
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
        flags += ["--tensorboard"]
    saves, save = [], utils.save
    if what == "best":
        monkeypatch.setattr(runs.Best, "update", lambda best, _: setattr(best, "is_last", True))
        monkeypatch.setattr(utils, "save", lambda *a: fail() if len(saves) == 2 else saves.append(save(*a)))
    if what == "log":
        log = utils.Path.open
        monkeypatch.setattr(
            utils.Path, "open", lambda path, mode="r", *a: fail() if mode == "ab" and saves else log(path, mode, *a)
        )
        monkeypatch.setattr(utils, "save", lambda *a: saves.append(save(*a)))
    status, _, err = run(SCRIPTS["dgl"], *flags, cwd=tmp_path)
    assert status == 1
    assert err.count("\n") == 1
    name = "imagenet_dgl-imagenet_dgl"
    file = {"tensorboard": "tb", "best": f"{name}_best.pt", "log": rf"[0-9-]+_{name}\.log"}[what]
    assert re.match(rf"Cannot write {file}: .*No space left on device; the last checkpoint: {name}\.pt$", err)
    monkeypatch.undo()
    assert checkpoint_of(tmp_path)["epoch"] == 1
    assert not [*tmp_path.glob("*.tmp")]


@both
def test_flops(script, tmp_path):
    """Without data and without training; ResNet-18's FLOPs are known: 1.81 G multiply-adds."""
    out = call(script, "--flops", "--arch", "resnet18", cwd=tmp_path)
    rows = [[cell.replace(",", "") for cell in line.split("|")[1:-1]] for line in out.splitlines()[2:]]
    assert len(rows) == 1 + (script == "dgl")
    assert sum(float(row[2]) for row in rows) == pytest.approx(2 * 1814, rel=0.01)
    assert not [*tmp_path.iterdir()]


# Checkpoints


def run_until_killed(script, update, flags, cwd):
    """Run a script in a process of its own that is killed at a certain update of a meter."""

    def killed():
        count, original = [0], training.Meter.update

        def counted(*arguments):
            count[0] += 1
            if count[0] == update:
                os.kill(os.getpid(), signal.SIGKILL)
            original(*arguments)

        training.Meter.update = counted
        run(SCRIPTS[script], *flags, cwd=cwd)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL


@both
def test_killed_and_resumed_equals_never_stopped(script, whole_run, tree, tmp_path):
    """In the last epoch and in the one before; one of them has a new learning rate."""
    modules = 1 + (script == "dgl")
    flags = tree, *SMALL, "--resume", "auto"
    run_until_killed(script, (3 + 2) * modules, flags, tmp_path)
    assert checkpoint_of(tmp_path)["epoch"] == 1
    run_until_killed(script, (3 + 2) * modules, flags, tmp_path)
    assert checkpoint_of(tmp_path)["epoch"] == 2
    call(script, *flags, "-j", 1, cwd=tmp_path)
    assert log_of(tmp_path) == log_of(whole_run[script][0])
    a, b = checkpoint_of(tmp_path), checkpoint_of(whole_run[script][0])
    assert_same([a["parts"], a["generator"]], [b["parts"], b["generator"]])
    assert "nothing to do" in call(script, *flags, cwd=tmp_path)


@both
def test_best_checkpoint_and_evaluate(script, whole_run, tree, tmp_path):
    """The best is the checkpoint of the best epoch; --evaluate prints that epoch's figures, and writes nothing."""
    folder, _ = whole_run[script]
    path = best_of(folder)
    best = torch.load(path, weights_only=True)
    matches = [match.groups() for match in map(LINES[script].fullmatch, log_of(folder)) if match]
    top1 = [float(match[4]) for match in matches if script == "backprop" or match[0] == "1"]
    assert best["epoch"] == 1 + top1.index(max(top1))
    assert best["parts"]["best"] == {"top1": max(top1)}
    assert checkpoint_of(folder)["parts"]["best"] == {"top1": max(top1)}
    before = sorted(folder.iterdir())
    out = call(script, "-j", 1, "-b", 4, "--resume", path, "--evaluate", cwd=tmp_path)  # the rest as in the checkpoint
    tested = [f"test top1:{match[4]} (top5:{match[5]})" for match in matches if int(match[1]) == best["epoch"] - 1]
    assert re.findall(TESTED.replace("(\\d", "(?:\\d"), out) == tested
    assert "ranks: 1" not in out
    assert sorted(folder.iterdir()) == before
    assert not [*tmp_path.iterdir()]


@both
def test_evaluate_on_other_images_in_another_precision(script, whole_run, tree, tmp_path):
    """Of a run in float32: in fp16, on images that are there twice over, without training images."""
    path = next(path for path in whole_run[script][0].glob("*.pt") if "best" not in path.name)
    for file in tree.glob("val/*/*"):
        for name in ("a", "b"):
            copy = tmp_path / "tree/val" / file.parent.name / f"{name}{file.name}"
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    flags = "--resume", path, "--evaluate", "--precision", "fp16"
    once, twice = (re.findall(TESTED, call(script, t, *flags, cwd=tmp_path)) for t in (tree, tmp_path / "tree"))
    assert len(once) == 1 + (script == "dgl")
    assert once == twice
    (tmp_path / "tree/val/class2").mkdir()
    (tmp_path / "tree/val/class2/c.jpg").write_bytes(file.read_bytes())
    message = refused(script, tmp_path / "tree", *flags, cwd=tmp_path)
    assert "trained on 2 classes, " in message
    assert " has 3; missing there: none; unknown: class2\n" in message


@pytest.mark.parametrize(("arch", "flag", "value"), [("resnet18", "--num-modules", 2), ("vgg11", "--block_size", 1)])
def test_a_default_may_be_given_at_resume(arch, flag, value):
    flags = "dgl", "x", "--arch", arch
    assert arguments(*flags) == arguments(*flags, flag, value) != arguments(*flags, flag, value + 1)


def test_a_checkpoint_that_does_not_fit(whole_run, tree, tmp_path):
    path = whole_run["dgl"][0] / "imagenet_dgl-imagenet_dgl.pt"
    for script, flags, part in [
        ("backprop", [], "imagenet_dgl.py"),
        ("dgl", ["--arch", "squeezenet1_0"], "arch 'squeezenet1_1'"),
        ("dgl", ["--image-size", 48], "image_size 32"),
        ("dgl", ["--evaluate", "--num-modules", 1], "num_modules 2"),
    ]:
        assert part in refused(script, tree, *SMALL, "--resume", path, *flags, cwd=tmp_path)


def test_the_size_of_auxiliary_networks_belongs_to_the_checkpoint(tree, tmp_path):
    """Weights have the same shapes for each."""
    flags = tree, *SMALL, "--arch", "resnet18", "--image-size", 64, "--nepochs"
    call("dgl", *flags, 1, "--aux-size", "published", cwd=tmp_path)
    (path,) = (path for path in tmp_path.glob("*.pt") if "best" not in path.name)
    assert LINES["dgl"].fullmatch(log_of(tmp_path)[-2])[4] in call("dgl", "--resume", path, "--evaluate", cwd=tmp_path)
    for more in ([2], [1, "--evaluate"]):
        message = refused("dgl", *flags, *more, "--resume", path, "--aux-size", "true", cwd=tmp_path)
        assert "was made with aux_size 'published'" in message


def test_a_checkpoint_of_other_classes(whole_run, tree, tmp_path):
    """As many, but in another order: accuracies would be wrong."""
    (tmp_path / "tree").mkdir()
    for split in ("train", "val"):
        for old, new in (("class0", "z"), ("class1", "class1")):
            shutil.copytree(tree / split / old, tmp_path / "tree" / split / new)
    path = whole_run["dgl"][0] / "imagenet_dgl-imagenet_dgl.pt"
    for flags in [], ["--evaluate"]:
        message = refused("dgl", tmp_path / "tree", *SMALL, "--resume", path, *flags, cwd=tmp_path)
        assert " has 2; missing there: class0; unknown: z\n" in message


def test_evaluate_with_images_of_another_size(whole_run, tree, tmp_path):
    """Possible where the cut is the same."""
    path = whole_run["dgl"][0] / "imagenet_dgl-imagenet_dgl.pt"
    flags = tree, "--resume", path, "--evaluate", "--image-size"
    assert "n: 1, test top1" in call("dgl", *flags, 48, cwd=tmp_path)
    message = refused("dgl", *flags, 224, cwd=tmp_path)
    assert "for images of 32 pixels the checkpoint's network is not the same as for 224: " in message
    assert message.endswith(": evaluate it with --image-size 32\n")


@pytest.mark.parametrize("print_freq", [0, 10])
def test_speed_of_a_gpu_that_is_batches_behind(print_freq, monkeypatch):
    """It computes 0.4 s on a batch, which the CPU launches in 0.05 s until four batches wait."""
    now, shown = types.SimpleNamespace(cpu=0.0, gpu=0.0), []

    def synchronize():
        now.cpu = max(now.cpu, now.gpu)

    monkeypatch.setattr(runs.time, "perf_counter", lambda: now.cpu)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(synchronize=synchronize))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    batches = type("Batches", (list,), {"device": torch.device("cuda")})([(None, range(256))] * 50)
    meter = types.SimpleNamespace(look=lambda: synchronize() or ((0, 0, 0), (0, 0, 0)))
    watcher = runs.Run.__new__(runs.Run)
    watcher.args = types.SimpleNamespace(print_freq=print_freq, dummy=True)
    watcher.pipeline, watcher.show = None, shown.append
    for _ in watcher.watch(batches, [meter], 0):
        now.cpu = max(now.cpu + 0.05, now.gpu - 4 * 0.4)
        now.gpu = max(now.cpu, now.gpu) + 0.4
    speed, memory = re.fullmatch(r"(\S+) training images/s, peak memory (\S+) GiB a rank", shown[-1]).groups()
    assert float(speed) == pytest.approx(256 / 0.4, rel=0.02)
    assert memory == "3.00"


def test_a_loss_that_is_not_finite_ends_the_run(tree, tmp_path):
    """At once where a line is printed, otherwise at the end of the epoch."""
    for print_freq in (1, 0):
        flags = [*SMALL, "--lr", 1e30, "-p", print_freq, "--name", f"p{print_freq}"]  # two logs, even within a second
        status, out, err = run(SCRIPTS["dgl"], tree, *flags, cwd=tmp_path)
        assert status == 1
        assert re.search(r"^Epoch 0, module \d: the loss is (nan|inf); the last checkpoint: none yet$", err, re.M)
        assert ("training images/s" in out) == (print_freq == 0)
        assert "epoch 1" not in out


# Ranks


@pytest.fixture
def exact(monkeypatch):
    """Float64, in which rounding hides nothing, and BatchNorm frozen, which a rank applies to its own images."""
    normalise, to_device = data.Batches.normalise, training.to_device
    monkeypatch.setattr(data.Batches, "normalise", lambda *a: normalise(*a).double())
    monkeypatch.setattr(training, "to_device", lambda *a: to_device(*a).double())
    frozen = nn.modules.batchnorm._BatchNorm
    monkeypatch.setattr(frozen, "train", lambda norm, mode=True: nn.Module.train(norm, False))


@both
def test_two_ranks_equal_one(script, tree, tmp_path, exact):
    """Weights, momentum and log lines."""
    shared = tree, *NETWORK, "-b", 8, "--nepochs", 1, "-p", 0
    folders = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        folder.mkdir()
    dropout = nn.Dropout.forward
    nn.Dropout.forward = lambda _, x: x  # two ranks draw other numbers than one
    try:
        assert run_ranks(2, ranks, SCRIPTS[script], *shared, folders=folders[1:]) == [0, 0]
        call(script, *shared, cwd=folders[0])
    finally:
        nn.Dropout.forward = dropout
    a, b = (flat(checkpoint_of(folder)["parts"]) for folder in folders)
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-9, atol=1e-9)
    one, two = ([line for line in log_of(folder) if LINES[script].fullmatch(line)] for folder in folders)
    assert one == two != []
    assert "ranks: 2" in log_of(folders[1])


def test_buffers_are_averaged_and_sums_taken_over_all_ranks():
    def work(rank):
        torch.distributed.init_process_group("gloo")
        norm = nn.BatchNorm2d(2)
        norm.running_mean += rank
        ranks.average_buffers(norm)
        assert norm.running_mean.tolist() == [0.5, 0.5]
        assert ranks.all_reduce(torch.tensor(rank + 1)) == 3
        torch.distributed.destroy_process_group()

    assert fork_ranks(2, work, ranks) == [0, 0]


def test_ranks_that_do_not_resume_the_same_checkpoint(whole_run, tree, tmp_path, capfd, monkeypatch):
    """As on machines that share no folder: rank 0 says so before anything is trained."""
    name, sleep = "imagenet_dgl-imagenet_dgl.pt", time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.3)))
    folders = tmp_path / "0", tmp_path / "1"
    for folder in folders:
        folder.mkdir()
    shutil.copy(whole_run["dgl"][0] / name, folders[0])
    for flags, words in ([], "no checkpoint, unlike"), (["--module-parallel"], "another checkpoint than"):
        before = (folders[0] / name).read_bytes()
        flags = tree, *SMALL, "--nepochs", 4, "--resume", "auto", *flags
        assert run_ranks(2, ranks, SCRIPTS["dgl"], *flags, folders=folders) == [2, 2]
        first = capfd.readouterr().err.splitlines()[0]
        assert f"error: --resume: rank 1 has {words} rank 0: " in first
        assert (folders[0] / name).read_bytes() == before
        assert not [*tmp_path.glob("*/*.log")]
        state = torch.load(folders[0] / name, weights_only=True)
        state["parts"]["model"]["blocks.0.features.0.bias"] += 1
        torch.save(state, folders[1] / name)


@pytest.mark.slow
def test_a_failing_rank_ends_the_job(tree, tmp_path):
    """Rank 1 finds the corrupt validation image while rank 0 waits for its figures."""
    copy_tree(tree, tmp_path / "tree")
    bad = sorted((tmp_path / "tree/val").glob("*/*"))[1]
    bad.write_bytes(b"")
    done = torchrun(ROOT / SCRIPTS["dgl"], tmp_path / "tree", *SMALL, "--nepochs", 1, cwd=tmp_path)
    assert done.returncode != 0
    assert f"cannot read the image {bad}" in done.stderr
    assert not [*tmp_path.glob("*.pt")]


@pytest.mark.slow
def test_a_mistake_of_all_ranks_is_said_once(tree, tmp_path):
    done = torchrun(ROOT / SCRIPTS["dgl"], tree, *SMALL, "--resume", "missing.pt", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("error: there is no checkpoint 'missing.pt'") == 1


def test_a_mistake_of_all_ranks_is_said_by_rank_0_first(tree, tmp_path, monkeypatch, capfd):
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(seconds / 10))
    begin = time.monotonic()
    assert run_ranks(2, ranks, SCRIPTS["dgl"], tree, "--resume", "missing.pt", folders=[tmp_path]) == [2, 2]
    assert time.monotonic() - begin > 0.9  # as rank 1 gave torchrun time to end it
    assert "error: there is no checkpoint 'missing.pt'" in capfd.readouterr().err


def test_what_another_rank_than_0_prints(monkeypatch, capsys):
    """No table of costs; on a terminal, a line takes the place of rank 0's progress bar."""
    monkeypatch.setattr(ranks, "RANK", 1)
    training.print_costs([])
    assert not capsys.readouterr().out
    for is_terminal in (True, False):
        monkeypatch.setattr(sys.stdout, "isatty", lambda is_terminal=is_terminal: is_terminal)
        other = runs.Run.__new__(runs.Run)
        other.screen = sys.stdout
        other.show("line")
        assert capsys.readouterr().out == "\r\033[Kline\n"[0 if is_terminal else 4 :]


def test_another_rank_says_nothing_when_it_is_stopped(monkeypatch):
    """By torchrun, which sends SIGTERM: rank 0 says how to go on."""
    monkeypatch.setattr(ranks, "RANK", 1)
    monkeypatch.setattr(ranks, "COUNT", 2)

    def interrupt(_=0):
        raise KeyboardInterrupt

    def lose_a_rank():
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")

    def lose_a_rank_and_be_stopped_at_once():
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        dist.HashStore().wait(["nothing"], datetime.timedelta(seconds=0.3))  # raises, and then Python sees the signal

    monkeypatch.setattr(time, "sleep", interrupt)
    for happen in (interrupt, lose_a_rank, lose_a_rank_and_be_stopped_at_once):
        with pytest.raises(SystemExit) as stop:
            ranks.one_message(happen)()
        assert stop.value.code == 1
    monkeypatch.setattr(ranks, "RANK", 0)
    with pytest.raises(KeyboardInterrupt):
        ranks.one_message(interrupt)()


def test_another_rank_waits_before_it_says_that_a_loss_is_not_finite(monkeypatch):
    waited = []
    monkeypatch.setattr(ranks, "RANK", 1)
    monkeypatch.setattr(time, "sleep", waited.append)
    other = runs.Run.__new__(runs.Run)
    other.last_checkpoint = None
    with pytest.raises(SystemExit, match="Why; the last checkpoint: none yet"):
        other.stop("Why")
    assert waited == [ranks.machines.PATIENCE]


@pytest.mark.parametrize(
    ("rank", "count"), [("1", None), ("", None), (None, "2"), ("", "2"), ("one", "2"), ("2", "2"), ("-1", "2")]
)
def test_what_does_not_say_which_rank_this_is(rank, count, monkeypatch, capsys):
    for name, text in (("RANK", rank), ("WORLD_SIZE", count)):
        monkeypatch.delenv(name, raising=False)
        if text is not None:
            monkeypatch.setenv(name, text)
    with pytest.raises(SystemExit) as stop:
        ranks.machines.place()
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"RANK and WORLD_SIZE ({rank!r} and {count!r}) do not say which rank of a job this is" in message


def test_ranks_that_cannot_find_each_other(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit):
        ranks.machines.place()
    assert "LOCAL_RANK and MASTER_ADDR and MASTER_PORT are not set: start the job with torch" in capsys.readouterr().err


def test_batch_size_and_ranks(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "COUNT", 4)
    args = arguments("dgl", tree, "-b", 6)
    with pytest.raises(SystemExit) as stop:
        data.load_data(args, torch.device("cpu"))
    assert stop.value.code == 2


def test_more_ranks_than_gpus(monkeypatch, capsys):
    monkeypatch.setattr(ranks, "COUNT", 2)
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(utils, "setup", lambda _: torch.device("cuda"))
    with pytest.raises(SystemExit) as stop:
        ranks.setup(arguments("dgl", "x"))
    assert stop.value.code == 2
    assert "1 GPUs" in capsys.readouterr().err
