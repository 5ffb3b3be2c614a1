"""utils.py: the copies, the data, the meters and the checkpoint file."""

import argparse
import contextlib
import errno
import filecmp
import os
import pickle
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from conftest import ROOT, copy_tree, load
from PIL import Image
from torch import nn
from torchvision.datasets import CIFAR10

cifar = load("learning_curves", "cifar")
utils = cifar.utils


def arguments(*flags):
    return load("learning_curves", "cifar_dgl").parse_args([*map(str, flags)])


def load_data(*flags):
    return cifar.load_data(arguments(*flags), torch.device("cpu"))


def refused(capsys, *flags):
    """The one line on stderr with which load_data refuses the flags."""
    with pytest.raises(SystemExit) as stop:
        load_data(*flags)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize(("name", "number"), [("utils.py", 6), ("cifar.py", 5), ("machines.py", 3), ("links.py", 2)])
def test_all_copies_are_the_same(name, number):
    copies = sorted(ROOT.glob(f"*/{name}"))
    assert len(copies) == number
    assert all(filecmp.cmp(copies[0], copy, shallow=False) for copy in copies)


def test_both_image_loaders_are_the_same():
    files = ROOT / "learning_curves" / "cifar.py", ROOT / "imagenet_dgl" / "data.py"
    one, other = (re.search(r"class ImageTree.*?\n\n\n", file.read_text(), re.DOTALL)[0] for file in files)
    assert one == other


# Batches


def random_set(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (size, 32, 32, 3), dtype=torch.uint8, generator=generator), torch.arange(size)


def test_a_training_batch_equals_torchvision_image_by_image():
    images, labels = random_set(20)
    batches = cifar.Batches(images, labels, 8, "cpu", torch.Generator().manual_seed(1))
    draws = torch.cat(cifar.Batches(images, labels, 8, "cpu", torch.Generator().manual_seed(1)).draw(), dim=1)
    assert {*draws[3].tolist()} == {0, 1}
    result, order = (torch.cat(parts) for parts in zip(*batches))
    for image, index, top, left, flip in zip(result, *draws.tolist()):
        expected = TF.pad(Image.fromarray(images[index].numpy()), 4)
        expected = TF.crop(expected, top, left, 32, 32)
        expected = TF.hflip(expected) if flip else expected
        expected = TF.normalize(TF.to_tensor(expected), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
        assert torch.equal(image, expected)
    assert order.tolist() == draws[0].tolist()


def test_a_test_batch_is_only_normalised_and_in_order():
    images, labels = random_set(10)
    result, order = (torch.cat(parts) for parts in zip(*cifar.Batches(images, labels, 4, "cpu")))
    assert order.tolist() == list(range(10))
    for image, expected in zip(result, images.numpy()):
        expected = TF.normalize(TF.to_tensor(expected), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
        assert torch.equal(image, expected)


def test_batches_are_channels_last():
    for generator in (None, torch.Generator()):
        for images, _ in cifar.Batches(*random_set(5), 4, "cpu", generator):
            assert images.is_contiguous(memory_format=torch.channels_last)


def test_draws_are_uniform_and_new_in_each_pass():
    batches = cifar.Batches(*random_set(9000), 100, "cpu", torch.Generator().manual_seed(0))
    first, second = (torch.cat(batches.draw(), dim=1) for _ in range(2))
    assert first[0].sort().values.tolist() == list(range(9000))
    assert not torch.equal(first, second)
    for row in first[1:3]:  # 9 offsets, 1000 of each expected, standard deviation 30
        assert row.bincount().tolist() == pytest.approx([1000] * 9, abs=150)
    assert first[3].bincount().tolist() == pytest.approx([4500] * 2, abs=240)
    assert abs(torch.corrcoef(first[1:].float()).triu(1)).max() < 0.05


@pytest.mark.parametrize(
    ("size", "training", "sizes"), [(9, True, [4, 4]), (9, False, [4, 4, 1]), (10, True, [4, 4, 2])]
)
def test_a_last_training_batch_of_one_image_is_left_out(size, training, sizes):
    batches = cifar.Batches(*random_set(size), 4, "cpu", torch.Generator() if training else None)
    assert [len(labels) for _, labels in batches] == sizes
    assert len(batches) == len(sizes)


# Data sets


def test_drop_last_leaves_an_incomplete_training_batch_out(capsys):
    batches = cifar.Batches(*random_set(11), 4, "cpu", torch.Generator(), drop_last=True)
    assert [len(labels) for _, labels in batches] == [4, 4]
    assert len(batches) == 2
    args = arguments("--data", "digits", "--train-size", 10, "--batch-size", 16)
    with pytest.raises(SystemExit):
        cifar.load_data(args, torch.device("cpu"), drop_last=True)
    assert "--batch-size 16" in capsys.readouterr().err


def test_digits():
    data = load_data("--data", "digits")
    assert (len(data.train.labels), len(data.test.labels), data.num_classes) == (1500, 297, 10)
    small = F.avg_pool2d(data.test.images.permute(0, 3, 1, 2).float(), 4)
    from sklearn.datasets import load_digits

    expected = torch.from_numpy(load_digits().images[1500:]).float() / 16 * 255
    for image, original in zip(small.mean(1), expected):  # enlarged and reduced again: the same but for smoothing
        assert torch.corrcoef(torch.stack((image.flatten(), original.flatten())))[0, 1] > 0.95


def test_train_size_is_balanced(capsys):
    data = load_data("--data", "digits", "--train-size", 105)
    counts = data.train.labels.bincount().tolist()
    assert sum(counts) == 105
    assert {*counts} == {10, 11}
    assert "146 images" in refused(capsys, "--data", "digits", "--train-size", 1500)
    assert "10 classes" in refused(capsys, "--data", "digits", "--train-size", 9)


def test_image_folder(image_folder):
    data = load_data("--data", image_folder)
    files = sorted((image_folder / "train").glob("*/*"))
    assert (len(data.train.labels), len(data.test.labels), data.num_classes) == (20, 10, 2)
    for i, file in enumerate(files):
        assert np.array_equal(data.train.images[i, 4:36, 4:36], np.asarray(Image.open(file)))
        assert data.train.labels[i] == int(file.parent.name == "class1")


def test_images_are_decoded_once_and_again_when_one_changes(image_folder, tmp_path, monkeypatch):
    root = copy_tree(image_folder, tmp_path)
    decoded = []
    convert = cifar.pil_to_tensor
    monkeypatch.setattr(cifar, "pil_to_tensor", lambda image: decoded.append(1) or convert(image))
    first = load_data("--data", root)
    assert len(decoded) == 30
    second = load_data("--data", root)
    assert len(decoded) == 30
    assert torch.equal(first.train.images, second.train.images)
    os.utime(next((root / "train").glob("*/*")), ns=(time.time_ns(), time.time_ns() + 10**9))
    load_data("--data", root)
    assert len(decoded) == 50
    (root / "test.decoded.pt").write_bytes(b"damaged")
    load_data("--data", root)
    assert len(decoded) == 60


def test_a_cache_that_cannot_be_written_leaves_nothing(image_folder, tmp_path):
    root = copy_tree(image_folder, tmp_path)
    for split in ("train", "test"):
        (root / f"{split}.decoded.pt").mkdir()
    assert len(load_data("--data", root).train.labels) == 20
    assert sorted(path.name for path in root.iterdir()) == ["test", "test.decoded.pt", "train", "train.decoded.pt"]


def test_parsing_again_adds_no_screen_to_the_screen():
    """A sweep parses the flags of each of its runs."""
    script = load("learning_curves", "cifar_dgl")
    for _ in range(2):
        script.parse_args([])
        for stream in (sys.stdout, sys.stderr):
            assert isinstance(stream, script.utils.Screen)
            assert not isinstance(stream.stream, script.utils.Screen)


@pytest.mark.parametrize("name", ["00.jpg", "01.png"])
def test_a_truncated_image_is_named(image_folder, tmp_path, capsys, name):
    file = next(copy_tree(image_folder, tmp_path).glob(f"train/*/{name}"))
    file.write_bytes(file.read_bytes()[:-60])
    assert str(file) in refused(capsys, "--data", tmp_path)
    file.write_bytes(b"")
    assert str(file) in refused(capsys, "--data", tmp_path)


def test_folders_that_do_not_fit_are_refused(image_folder, tmp_path, capsys):
    root = copy_tree(image_folder, tmp_path)
    Image.new("RGB", (48, 40)).save(root / "test" / "class0" / "large.png")
    assert "large.png has 48x40 pixels" in refused(capsys, "--data", root)
    (root / "test" / "class0" / "large.png").unlink()
    (root / "train" / "class1").rename(root / "train" / "other")
    assert "['class1', 'other']" in refused(capsys, "--data", root)
    (root / "test").rename(root / "validation")
    assert f"{root}/test" in refused(capsys, "--data", root)
    (root / "test").mkdir()
    assert f"{root}/test" in refused(capsys, "--data", root)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_an_image_of_more_than_8_bits_is_refused(image_folder, tmp_path, capsys, mode):
    file = copy_tree(image_folder, tmp_path) / "train" / "class0" / "deep.tiff"
    Image.new(mode, (32, 32), 20_000).save(file)
    message = refused(capsys, "--data", tmp_path)
    assert f"{file}: its channels have more than 8 bits" in message


def test_a_decoded_folder_does_not_outlive_its_decoder(image_folder, tmp_path, monkeypatch):
    root = copy_tree(image_folder, tmp_path)
    load_data("--data", root)
    monkeypatch.setattr(cifar.PIL, "__version__", "0.0")
    decoded = []
    convert = cifar.pil_to_tensor
    monkeypatch.setattr(cifar, "pil_to_tensor", lambda image: decoded.append(1) or convert(image))
    load_data("--data", root)
    assert len(decoded) == 30


def test_what_is_hidden_is_not_data(image_folder, tmp_path):
    root = copy_tree(image_folder, tmp_path)
    image = next((root / "train" / "class0").iterdir())
    for hidden in (".ipynb_checkpoints/copy", "class0/.ipynb_checkpoints/copy", "class0/._copy"):
        copy = root / "train" / f"{hidden}{image.suffix}"
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(image.read_bytes())
    data = load_data("--data", root)
    assert (len(data.train.labels), data.num_classes) == (20, 2)
    (root / "test" / ".#notes").symlink_to("nowhere")  # as an editor leaves it
    assert load_data("--data", root).num_classes == 2
    hidden_parent = tmp_path / ".hidden"
    copy_tree(image_folder, hidden_parent)
    assert len(load_data("--data", hidden_parent).train.labels) == 20


def test_links_to_nowhere_are_named(image_folder, tmp_path, capsys):
    root = copy_tree(image_folder, tmp_path)
    link = root / "train" / "class0" / "link.png"
    link.symlink_to(tmp_path / "annex")
    assert f"cannot read the image {link}" in refused(capsys, "--data", root)
    link.unlink()
    link = root / "train" / "class0" / "folder"  # of images
    link.symlink_to(tmp_path / "share")
    assert f"{link} is a link to nowhere" in refused(capsys, "--data", root)
    link.unlink()
    link = root / "test" / "class2"
    link.symlink_to(tmp_path / "share")
    assert f"{link} is a link to nowhere" in refused(capsys, "--data", root)
    unmounted = tmp_path / "unmounted"
    unmounted.mkdir()
    for split in ("train", "test"):
        (unmounted / split).symlink_to(tmp_path / "share")
    assert f"no complete image folder in {unmounted}" in refused(capsys, "--data", unmounted)  # and no download


def test_one_class_is_refused(image_folder, tmp_path, capsys):
    root = copy_tree(image_folder, tmp_path)
    for split in ("train", "test"):
        shutil.rmtree(root / split / "class1")
    assert "at least two are needed" in refused(capsys, "--data", root)


def test_cifar10_in_torchvisions_format(tmp_path, monkeypatch):
    """Batches made here in the published layout (rows of 1024 red, 1024 green, 1024 blue values), checksums aside."""
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rows = np.random.default_rng(0).integers(256, size=(6, 2, 3072), dtype=np.uint8)
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    for name, part in zip(names, rows):
        (folder / name).write_bytes(pickle.dumps({"data": part, "labels": [3, 7]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{i}" for i in range(10)]}))
    data = load_data("--data", tmp_path)
    assert data.description == "CIFAR-10, 10 training and 2 test images of 10 classes"
    assert data.train.labels.tolist() == [3, 7] * 5
    assert data.test.labels.tolist() == [3, 7]
    channels = rows.reshape(6, 2, 3, 32, 32).transpose(0, 1, 3, 4, 2)
    assert np.array_equal(data.train.images[:, 4:36, 4:36], channels[:5].reshape(10, 32, 32, 3))
    assert np.array_equal(data.test.images, channels[5])


def test_a_failed_download_names_the_way_out(tmp_path, capsys, monkeypatch):
    def no_network(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", no_network)
    message = refused(capsys, "--data", tmp_path / "data")
    assert "Name or service not known" in message
    assert "--data digits" in message


# Meter and checkpoint


def test_meter_equals_the_direct_mean():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 10, generator=generator), torch.randint(10, (50,), generator=generator)
    meter = cifar.Meter("cpu")
    for _ in range(2):  # the second time: `pop` has set it back
        for x, y in zip(logits.split(16), labels.split(16)):
            meter.update(F.cross_entropy(x, y), x, y)
        loss, top1 = meter.pop()
        assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
        assert top1 == pytest.approx(100 * (logits.argmax(1) == labels).sum().item() / 50)


def test_an_interrupted_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    utils.save({"epoch": 1}, path)

    def half_a_save(state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half_a_save)
    with pytest.raises(KeyboardInterrupt):
        utils.save({"epoch": 2}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("number", [1, 5, 20])
def test_ctrl_c_in_torchs_writer_is_ctrl_c(number, tmp_path, monkeypatch):
    """torch turns what happens in a file's write into an error of its own."""
    path, open_file = tmp_path / "checkpoint.pt", Path.open

    def open_interrupting(*arguments):
        file, count = open_file(*arguments, buffering=0), []

        class Interrupting:
            def write(self, data):
                count.append(1)
                if len(count) == number:
                    os.kill(os.getpid(), signal.SIGINT)
                return file.write(data)

            def flush(self):
                pass

            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

        return Interrupting()

    monkeypatch.setattr(Path, "open", open_interrupting)
    with pytest.raises(KeyboardInterrupt):
        utils.save({f"{i}": torch.randn(100) for i in range(50)}, path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("number", "refused"), [(errno.ENOSYS, False), (errno.ENOLCK, False), (errno.EIO, True)])
def test_a_file_system_without_locks(number, refused, tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.lockf", lockf)
    run = object.__new__(utils.Run)
    run.checkpoint = tmp_path / "runs" / "x.pt"
    with pytest.raises(SystemExit) if refused else contextlib.nullcontext():
        run.lock()
    assert ("cannot write to --save_folder" in capsys.readouterr().err) == refused


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", "", str(2**31)])
def test_at_least_refuses(text, capsys):
    with pytest.raises(SystemExit) as stop:
        arguments("--epochs", text)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_every_part_of_a_network_of_many_is_compiled_for_its_own_size(monkeypatch):
    """All parts share one cache, which torch limits, and what it has learned of the sizes of images."""
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")
    compile_part, graphs = nn.Module.compile, []
    count = lambda graph, inputs: graphs.append(graph) or graph.forward  # noqa: E731
    monkeypatch.setattr(nn.Module, "compile", lambda part, **shapes: compile_part(part, backend=count, **shapes))
    torch._dynamo.reset()
    parts = [nn.Sequential(nn.Conv1d(1, 1, 1)) for _ in range(70)]
    utils.to_device(nn.Sequential(nn.ModuleList(parts)), argparse.Namespace(compile=True), torch.device("cpu"))
    for width, part in enumerate(parts, start=2):  # a width of 1 is never a variable
        part(torch.zeros(1, 1, width))
    assert len(graphs) == len(parts)
    torch._dynamo.reset()
