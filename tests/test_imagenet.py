"""imagenet_dgl: both scripts with small networks on small images, their data, ranks, log and checkpoints."""

import itertools
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, load, run
from PIL import Image
from torch import nn

dgl = load("imagenet_dgl", "imagenet_dgl")
imagenet = load("imagenet_dgl", "imagenet")
data, ranks, training, models = (sys.modules[name] for name in ("data", "ranks", "training", "models"))
utils = training.utils

SCRIPTS = {"dgl": "imagenet_dgl/imagenet_dgl.py", "backprop": "imagenet_dgl/imagenet.py"}
SMALL = ["-j", 0, "-b", 6, "--image-size", 32, "--nepochs", 3, "--epochdecay", 2, "--lr", 0.01, "--threads", 1]
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
    root = tmp_path_factory.mktemp("tree")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 14), ("val", 5)):
        for i in range(count):
            folder = root / split / f"class{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(128, (5, 5, 3), generator=generator) + 120 * (i % 2)
            image = Image.fromarray(pixels.byte().numpy()).resize((40, 44))
            image.save(folder / f"{i:02}.jpg")
    return root


def call(script, *flags, cwd):
    """A run that must succeed: what it printed."""
    status, out, err = run(SCRIPTS[script], *flags, cwd=cwd)
    assert status == 0, err
    return out


def refused(script, *flags, cwd):
    """The one line on stderr with which the script refuses the flags."""
    status, _, err = run(SCRIPTS[script], *flags, cwd=cwd)
    assert status == 2, err
    assert err.count("\n") == 1
    assert "error: " in err
    return err


def log_of(folder):
    """The lines of the one log in a folder, but for its arguments."""
    (log,) = folder.glob("*.log")
    return log.read_text().splitlines()[1:]


def checkpoint_of(folder, name="imagenet*.pt"):
    (checkpoint,) = (path for path in folder.glob(name) if "best" in name or "best" not in path.name)
    return torch.load(checkpoint, weights_only=True)


def flat(state):
    """All tensors of a nested state, by the path to them."""
    if isinstance(state, torch.Tensor):
        return {(): state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {(key, *path): tensor for key, value in items for path, tensor in flat(value).items()}


def assert_same_run(folder, other):
    assert log_of(folder) == log_of(other)
    a, b = (flat(checkpoint_of(f)["parts"]) for f in (folder, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


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
        assert [match[:2] for match in matches] == [("0.01", "0"), ("0.01", "1"), ("0.001", "2")]
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
    assert "(default: None)" not in text


@both
def test_mistakes(script, tree, tmp_path):
    small = [tree, *SMALL]
    for flags, part in [
        ([], "--dummy"),
        ([tmp_path / "nowhere"], "train/<class>/ and val/<class>/"),
        ([*small, "--arch", "resnet19"], "resnet18"),
        ([*small, "--start_epoch", 3], "0 to 2"),
        ([*small, "--evaluate"], "--resume"),
        ([*small, "--evaluate", "--resume", "auto"], "to evaluate"),
        ([*small, "--resume", "missing.pt"], "no checkpoint missing.pt"),
        ([*small, "--static-loss-scale", 2], "--half"),
        ([*small, "--half", "--precision", "bf16"], "--precision bf16"),
        ([*small, "--lr", "nan"], "--lr"),
        ([*small, "--apex"], "the package called apex on the package index is something else"),
        ([*small, "--name", "a/b"], "--save_folder"),
        ([*small, "--name", "a_best"], "best checkpoints"),
        ([*small, "--name", "best"], "best checkpoints"),
        ([*small, "--arch", "alexnet"], "alexnet: AlexNet fails on 32-pixel images"),
        (
            ["--flops", "--image-size", 32, "--arch", "inception_v3"],
            "Inception3 fails on 32-pixel images",
        ),
    ]:
        assert part in refused(script, *flags, cwd=tmp_path)
    assert not run(SCRIPTS[script], *small, "--evaluate", "--resume", "auto", cwd=tmp_path)[1]
    assert not [*tmp_path.iterdir()]


def test_the_flag_for_cutting_belongs_to_the_network(tree, tmp_path):
    for flags, part in [
        (["--arch", "vgg11", "--num-modules", 2], "block_size"),
        (["--arch", "resnet18", "--block_size", 2], "num_modules"),
        (["--arch", "resnet18", "--num-modules", 100], "modules"),
    ]:
        assert part in refused("dgl", tree, *SMALL, *flags, cwd=tmp_path)


def test_folders_that_do_not_fit(tree, tmp_path):
    copy_tree(tree, tmp_path / "tree")
    (tmp_path / "tree/val/class1").rename(tmp_path / "tree/val/other")
    assert "['class1', 'other']" in refused("dgl", tmp_path / "tree", *SMALL, cwd=tmp_path)


# Input


def copy_tree(tree, target):
    for file in tree.glob("*/*/*"):
        copy = target / file.relative_to(tree)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    return target


def load_data(tree, *flags):
    return data.load_data(arguments("dgl", tree, *SMALL, *flags), torch.device("cpu"))


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


def test_a_batch_keeps_its_size_when_an_image_cannot_be_read():
    good = [(torch.full((3, 2, 2), i, dtype=torch.uint8), i) for i in range(2)]
    images, labels, bad = data.fill_up([good[0], (None, "x.jpg: no"), good[1], (None, "y.jpg: no")])
    assert labels.tolist() == [0, 1, 0, 1]
    assert images[:, 0, 0, 0].tolist() == [0, 1, 0, 1]
    assert bad == ["x.jpg: no", "y.jpg: no"]
    assert [len(part) for part in data.fill_up([(None, "x.jpg: no")])] == [0, 0, 1]


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

    def __init__(self, model, *flags, optimizers=True):
        self.args, device = arguments("dgl", "--dummy", *flags), torch.device("cpu")
        self.model = model
        self.modules = [dgl.Module(*parts) for parts in zip(model.blocks, model.auxiliary_nets)]
        self.optimizers = [training.sgd(module, self.args, device, 0) for module in self.modules]
        self.scalers = [training.grad_scaler(self.args, device) for _ in self.modules]
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
    assert mean == pytest.approx(meter.read())
    assert mean[1] == pytest.approx(100 * 10 / 12)
    right, wrong = (-torch.eye(8)[0].log_softmax(0))[:2].tolist()
    assert mean[0] == pytest.approx((10 * right + 2 * wrong) / 12)
    meter.update(torch.tensor(1.0), torch.eye(8), torch.arange(8))
    assert meter.read() == (1, 100, 100)


def test_one_module_equals_backprop_to_the_bit(tree, tmp_path):
    """A network with dropout, too."""
    flags = tree, *SMALL, "--arch", "squeezenet1_1"
    call("dgl", *flags, "--num-modules", 1, "--name", "dgl", cwd=tmp_path)
    call("backprop", *flags, "--name", "backprop", cwd=tmp_path)
    a, b = ([*checkpoint_of(tmp_path, f"*_{name}.pt")["parts"]["model"].values()] for name in ("dgl", "backprop"))
    assert len(a) == len(b) > 10
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_learning_rate_and_new_optimizers(tree, tmp_path, monkeypatch):
    """Divided by 10 every --epochdecay epochs, with momentum that starts anew, also when begun at --start_epoch."""
    made = []
    sgd = training.sgd
    monkeypatch.setattr(training, "sgd", lambda *a: made.append(a[3]) or sgd(*a))
    args = arguments("dgl", "x")
    rates = [training.learning_rate(args, epoch) for epoch in (0, 9, 10, 19, 20, 49)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 1e-5])
    out = call("backprop", tree, *SMALL, "--nepochs", 5, "--start_epoch", 3, cwd=tmp_path)
    assert made == [3, 4]
    assert re.findall(r"^lr: (\S+), epoch (\d)", out, re.MULTILINE) == [("0.001", "3"), ("0.0001", "4")]


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


def test_apex(monkeypatch):
    made = []
    fake = types.SimpleNamespace(FusedSGD=lambda parameters, **options: made.append(options))
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", fake)
    training.sgd(small_net(), arguments("dgl", "x", "--apex"), torch.device("cuda"), 10)
    assert made == [{"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}]


def test_apex_without_its_cuda_extensions(monkeypatch, capsys):
    def refuse(parameters, **options):
        raise RuntimeError("apex.optimizers.FusedSGD requires cuda extensions")

    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", types.SimpleNamespace(FusedSGD=refuse))
    with pytest.raises(SystemExit):
        training.sgd(small_net(), arguments("dgl", "x", "--apex"), torch.device("cuda"), 0)
    assert capsys.readouterr().err.endswith("error: --apex: apex.optimizers.FusedSGD requires cuda extensions\n")


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
    assert (str(folder[0]), folder[1]) == ("imagenet_dgl_tb.tensorboard", 0)
    kinds = "loss", "train_top1", "test_top1", "ensemble_top1"
    assert [scalar[0] for scalar in scalars] == [f"{kind}/{n}" for n in (0, 1) for kind in kinds]


@both
def test_flops(script, tmp_path):
    """Without data and without training; ResNet-18's FLOPs are known: 1.81 G multiply-adds."""
    out = call(script, "--flops", cwd=tmp_path)
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
    """In the last epoch, which has a new learning rate, and in the one before."""
    modules = 1 + (script == "dgl")
    flags = tree, *SMALL, "--resume", "auto"
    run_until_killed(script, (3 + 2) * modules, flags, tmp_path)
    assert checkpoint_of(tmp_path)["epoch"] == 1
    run_until_killed(script, (3 + 2) * modules, flags, tmp_path)
    assert checkpoint_of(tmp_path)["epoch"] == 2
    call(script, *flags, "-j", 1, cwd=tmp_path)
    assert_same_run(tmp_path, whole_run[script][0])
    assert "nothing to do" in call(script, *flags, cwd=tmp_path)


@both
def test_best_checkpoint_and_evaluate(script, whole_run, tree, tmp_path):
    """The best is the checkpoint of the best epoch; --evaluate prints that epoch's figures, and writes nothing."""
    folder, _ = whole_run[script]
    best = checkpoint_of(folder, "*_best.pt")
    matches = [match.groups() for match in map(LINES[script].fullmatch, log_of(folder)) if match]
    top1 = [float(match[4]) for match in matches if script == "backprop" or match[0] == "1"]
    assert best["epoch"] == 1 + top1.index(max(top1))
    assert best["parts"]["best"] == {"top1": max(top1)}
    assert checkpoint_of(folder)["parts"]["best"] == {"top1": max(top1)}
    before = sorted(folder.iterdir())
    path = next(folder.glob("*_best.pt"))
    out = call(script, tree, "-j", 0, "-b", 4, "--image-size", 32, "--resume", path, "--evaluate", cwd=tmp_path)
    tested = [f"test top1:{match[4]} (top5:{match[5]})" for match in matches if int(match[1]) == best["epoch"] - 1]
    assert re.findall(TESTED.replace("(\\d", "(?:\\d"), out) == tested
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
    flags = "-j", 0, "--image-size", 32, "--resume", path, "--evaluate"
    flags += "--precision", "fp16"
    once, twice = (re.findall(TESTED, call(script, t, *flags, cwd=tmp_path)) for t in (tree, tmp_path / "tree"))
    assert len(once) == 1 + (script == "dgl")
    assert once == twice
    (tmp_path / "tree/val/class2").mkdir()
    (tmp_path / "tree/val/class2/c.jpg").write_bytes(file.read_bytes())
    message = refused(script, tmp_path / "tree", *flags, cwd=tmp_path)
    assert "trained on 2 classes, " in message
    assert " has 3; missing there: none; unknown: class2\n" in message


@pytest.mark.parametrize(("arch", "flag", "value"), [("resnet18", "--num-modules", 2), ("vgg11", "--block_size", 1)])
def test_a_default_may_be_given_at_resume(arch, flag, value, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DEBUG_STEPS", 1)
    flags = "--dummy", "--debug", 1, *SMALL, "--arch", arch, "--nlin", 0, "--mlp", 0
    call("dgl", *flags, "--nepochs", 1, cwd=tmp_path)
    assert "epoch 1" in call("dgl", *flags, "--nepochs", 2, "--resume", "auto", flag, value, cwd=tmp_path)


def test_a_checkpoint_that_does_not_fit(whole_run, tree, tmp_path):
    path = next(whole_run["dgl"][0].glob("*dgl.pt"))
    for script, flags, part in [
        ("backprop", [], "imagenet_dgl.py"),
        ("dgl", ["--arch", "resnet34"], "--arch 'resnet18'"),
        ("dgl", ["--image-size", 48], "--image-size 32"),
        ("dgl", ["--evaluate", "--num-modules", 1], "--num-modules 2"),
    ]:
        assert part in refused(script, tree, *SMALL, "--resume", path, *flags, cwd=tmp_path)


def test_a_checkpoint_of_other_classes(whole_run, tree, tmp_path):
    """As many, but in another order: accuracies would be wrong."""
    (tmp_path / "tree").mkdir()
    for split in ("train", "val"):
        for old, new in (("class0", "z"), ("class1", "class1")):
            shutil.copytree(tree / split / old, tmp_path / "tree" / split / new)
    path = next(whole_run["dgl"][0].glob("*dgl.pt"))
    for flags in [], ["--evaluate"]:
        message = refused("dgl", tmp_path / "tree", *SMALL, "--resume", path, *flags, cwd=tmp_path)
        assert " has 2; missing there: class0; unknown: z\n" in message
    state = utils.read(path)
    del state["classes"]  # of an earlier version
    utils.write(tmp_path / "old.pt", state)
    flags = *SMALL, "--resume", tmp_path / "old.pt", "--evaluate"
    assert "top1" in call("dgl", tmp_path / "tree", *flags, cwd=tmp_path)
    shutil.copytree(tree / "val/class0", tmp_path / "tree/val/zz")
    message = refused("dgl", tmp_path / "tree", *flags, cwd=tmp_path)
    assert "5 validation images of 2 classes; " in message
    assert "this run's data: image folder, 8 validation images of 3 classes" in message


def test_evaluate_with_images_of_another_size(tree, tmp_path):
    """Possible where the cut is the same, as the published one is."""
    small = "-j", 0, "-b", 4, "--nepochs", 1, "--nlin", 0, "--mlp", 0, "--arch"
    for arch, size in (("resnet18", 16), ("efficientnet_b0", 32)):
        flags = *small, arch, "--num-modules", 3
        (tmp_path / arch).mkdir()
        call("dgl", tree, *flags, "--image-size", size, cwd=tmp_path / arch)
        flags += "--image-size", 224, "--resume", "auto", "--evaluate"
        if arch == "resnet18":
            assert "n: 2, test top1" in call("dgl", tree, *flags, cwd=tmp_path / arch)
        else:
            message = refused("dgl", tree, *flags, cwd=tmp_path / arch)
            assert "for images of 32 pixels the checkpoint's network is not the same as for 224: " in message
            assert message.endswith(": evaluate it with --image-size 32\n")


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


SHARED = ["-j", 0, "-b", 8, "--image-size", 64, "--nepochs", 1, "-p", 0, "--no-cuda"]

# Trains in float64, in which rounding does not hide anything.
DOUBLE = """
import sys
sys.path.insert(0, sys.argv[1])
import data, imagenet_dgl, training
normalise, prepare = data.Batches.normalise, training.prepare
data.Batches.normalise = lambda *a: normalise(*a).double()
training.prepare = lambda *a: prepare(*a).double()
imagenet_dgl.main(sys.argv[2:])
"""


@pytest.fixture
def double(monkeypatch):
    normalise, prepare = data.Batches.normalise, training.prepare
    monkeypatch.setattr(data.Batches, "normalise", lambda *a: normalise(*a).double())
    monkeypatch.setattr(training, "prepare", lambda *a: prepare(*a).double())


def torchrun(script, *flags, cwd):
    """A job of two ranks, as a user starts it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, *flags]
    return subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=200)


def fork_ranks(script, *flags, cwd):
    """The same without torchrun and without importing torch again."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    def rank(n):
        os.environ.update(
            RANK=f"{n}", LOCAL_RANK=f"{n}", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}"
        )
        ranks.RANK, ranks.COUNT = n, 2
        sys.exit(run(SCRIPTS[script], *flags, cwd=cwd)[0])

    processes = [multiprocessing.get_context("fork").Process(target=rank, args=(n,)) for n in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    return [process.exitcode for process in processes]


@both
def test_two_ranks_equal_one(script, tree, tmp_path, double):
    """Weights, running statistics, momentum and log lines."""
    flags = tree, *SHARED, "--sync-bn", "--name"
    if script == "dgl":
        (tmp_path / "double.py").write_text(DOUBLE)
        done = torchrun("double.py", ROOT / "imagenet_dgl", *flags, "two", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("ranks: 2") == 1  # rank 0 alone speaks
    else:
        assert fork_ranks(script, *flags, "two", cwd=tmp_path) == [0, 0]
    call(script, *flags, "one", cwd=tmp_path)
    a, b = (flat(checkpoint_of(tmp_path, f"*_{name}.pt")["parts"]) for name in ("two", "one"))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-9, atol=1e-9)
    logs = [path.read_text().splitlines() for path in sorted(tmp_path.glob("*.log"))]
    lines = [[line for line in log if LINES[script].fullmatch(line)] for log in logs]
    assert lines[0] == lines[1] != []


def test_a_failing_rank_ends_the_job(tree, tmp_path):
    """Rank 1 finds the corrupt validation image while rank 0 waits for its figures."""
    copy_tree(tree, tmp_path / "tree")
    bad = sorted((tmp_path / "tree/val").glob("*/*"))[1]
    bad.write_bytes(b"")
    done = torchrun(ROOT / SCRIPTS["dgl"], tmp_path / "tree", *SHARED, cwd=tmp_path)
    assert done.returncode != 0
    assert f"cannot read the image {bad}" in done.stderr
    assert not [*tmp_path.glob("*.pt")]


def test_a_mistake_of_all_ranks_is_said_once(tree, tmp_path):
    done = torchrun(ROOT / SCRIPTS["dgl"], tree, *SHARED, "--resume", "missing.pt", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("error: there is no checkpoint missing.pt") == 1


def test_what_another_rank_than_0_prints(monkeypatch, capsys):
    """No table of costs; on a terminal, a line takes the place of rank 0's progress bar."""
    monkeypatch.setattr(ranks, "RANK", 1)
    training.print_costs([])
    assert not capsys.readouterr().out
    for is_terminal in (True, False):
        monkeypatch.setattr(sys.stdout, "isatty", lambda is_terminal=is_terminal: is_terminal)
        training.Run.__new__(training.Run).show("line")
        assert capsys.readouterr().out == "\r\033[Kline\n"[0 if is_terminal else 4 :]


def test_a_mistake_that_rank_0_does_not_find_is_said(monkeypatch, capsys):
    """Such as a file that another machine does not have."""
    waited = []
    monkeypatch.setattr(ranks, "RANK", 3)
    monkeypatch.setattr(ranks.time, "sleep", waited.append)
    with pytest.raises(SystemExit) as stop:
        ranks.fail("no such file")
    assert stop.value.code == 2
    assert waited == [ranks.PATIENCE]
    assert "no such file" in capsys.readouterr().err


def test_batch_size_and_ranks(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "COUNT", 4)
    args = arguments("dgl", tree, "-b", 6)
    with pytest.raises(SystemExit) as stop:
        data.load_data(args, torch.device("cpu"))
    assert stop.value.code == 2


def test_more_ranks_than_gpus(monkeypatch, capsys):
    monkeypatch.setattr(ranks, "COUNT", 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(utils, "setup", lambda _: torch.device("cuda"))
    with pytest.raises(SystemExit) as stop:
        ranks.setup(arguments("dgl", "x"))
    assert stop.value.code == 2
    assert "1 GPUs" in capsys.readouterr().err


@pytest.mark.parametrize(("norm", "shape"), [(nn.BatchNorm2d, (4, 5, 3, 3)), (nn.BatchNorm1d, (6, 5))])
def test_sync_batch_norm_of_one_rank_is_batch_norm(norm, shape):
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Identity(), norm(5)), 3 * torch.randn(shape) + 2
    nn.init.normal_(plain[1].weight)
    sync = ranks.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Identity(), norm(5)))
    sync.load_state_dict(plain.state_dict())
    outputs = []
    for net in (plain, sync):
        inputs = x.clone().requires_grad_()
        y = net(inputs)
        y.pow(3).sum().backward()
        outputs.append([y, inputs.grad, net[1].weight.grad, net[1].bias.grad, *net.state_dict().values()])
        outputs[-1].append(net.eval()(x))
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
