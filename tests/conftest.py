"""Shared by the tests: the scripts, loaded from their folders or run as a user runs them, and what they leave."""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib
import psutil
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).parent.parent
# Modules of several folders, and those that import them
COMMON_NAMES = (
    "audit",
    "cifar",
    "cifar_dgl",
    "cifar_resnet",
    "costs",
    "dni",
    "machines",
    "methods",
    "models",
    "resnet",
    "utils",
)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def pytest_configure():
    matplotlib.use("Agg")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, the scripts would ignore it
    torch.set_num_threads(1)  # as the runs that are compared to the bit


def pytest_collection_modifyitems(items):
    """Without a GPU, skip the tests marked `cuda`; `pytest -m cuda` runs exactly those."""
    for item in items if not torch.cuda.is_available() else []:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


# Running scripts


@contextlib.contextmanager
def own_modules(folder, *names):
    """Inside, imports are of that folder's own modules, whatever was imported from other folders before."""
    for module in [m for m in sys.modules if m.split(".")[0] in {*COMMON_NAMES, *names}]:
        del sys.modules[module]
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def load(folder, name, root=ROOT):
    """Import root/folder/name.py with that folder's own modules."""
    with own_modules(root / folder, name):
        return importlib.import_module(name)


def run(script, *flags, cwd, root=ROOT):
    """Run a script's `main` in the folder cwd, as if by `python script flags`: (exit status, stdout, stderr)."""
    main, status, before = load(*script.removesuffix(".py").split("/"), root).main, 0, os.getcwd()
    os.chdir(cwd)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main([str(flag) for flag in flags])
        except SystemExit as stop:
            status = stop.code
            if isinstance(status, str):  # as the interpreter does
                print(status, file=sys.stderr)
                status = 1
        finally:
            os.chdir(before)
            sys.excepthook = sys.__excepthook__
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
    return status, out.getvalue(), err.getvalue()


def python(*command, cwd, **options):
    """Run a command in an interpreter of its own; the ended process, with its output as text."""
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, **options)


def forked(function, *arguments, errors):
    """Call a function in a copy of this process, without importing torch again: exit status, or -signal.

    What it writes to stderr goes to the file `errors`, as from an interpreter: an uncaught error's traceback or line.
    """
    process = start(function, *arguments, errors=errors)
    process.join(300)
    process.kill()  # if it hangs
    process.join()
    return process.exitcode


def start(function, *arguments, errors):
    """The process of `forked`, started and not waited for."""

    def child():
        sys.stderr = Path(errors).open("w", buffering=1)  # noqa: SIM115
        try:
            function(*arguments)
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            os._exit(1 if isinstance(stop.code, str) else stop.code or 0)
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
            sys.stderr.flush()
            if isinstance(error, KeyboardInterrupt):
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
            os._exit(1)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def torchrun(*command, cwd, size=2, restarts=0, timeout=300, **environment):
    """Run a script and its flags on `size` processes, none of which may be left; the ended torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
    process = subprocess.Popen(
        [*launcher, f"--max-restarts={restarts}", *map(str, command)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in environment.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        left = [p for p in psutil.process_iter(["cwd"]) if p.info["cwd"] == str(cwd) and p.pid != process.pid]
        for straggler in left:
            straggler.kill()
        process.kill()
    assert not left, err
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def notebook(path, monkeypatch, **environment):
    """Run the code of a notebook here, without a kernel; its error, or None."""
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(path.parent)
    names = {"__name__": "__main__"}
    with own_modules(path.parent), matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # plt.show() without a screen
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "code":
                try:
                    exec("".join(cell["source"]), names)
                except Exception as error:
                    return error
    return None


# What a run leaves, and what it says


def log_of(folder):
    """The lines of the one log in a folder; of its arguments, those that decide the result."""
    (log,) = Path(folder).glob("*.log")
    first, *rest = log.read_text().splitlines()
    arguments = json.loads(first.removeprefix("arguments: "))
    return [{k: v for k, v in arguments.items() if k not in ("cuda_graph", "resume", "save_folder")}, *rest]


def epoch_lines(folder):
    """The log's lines of modules and epochs."""
    return [line for line in log_of(folder)[1:] if line.startswith("n: ")]


def checkpoint_of(folder):
    """The one checkpoint in a folder, but for a best one."""
    (checkpoint,) = (path for path in Path(folder).glob("*.pt") if not path.stem.endswith("_best"))
    return torch.load(checkpoint, weights_only=True)


def state(module):
    """Copies of a module's parameters and buffers."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(a, b):
    """Whether two such are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_same(a, b):
    """Equality to the bit of nested states."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


def assert_same_run(folder, other):
    """Two runs with the same log lines and, to the bit, the same state."""
    assert log_of(folder) == log_of(other)
    a, b = checkpoint_of(folder), checkpoint_of(other)
    for key in ("epoch", "parts", "generator"):
        assert_same(a[key], b[key])


def refused(result, *parts):
    """Expect status 2 and one line on stderr that holds the parts."""
    status, _, message = result
    assert status == 2, message
    assert message.count("\n") == 1
    assert "error: " in message
    assert all(str(part) in message for part in parts), message


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """20 training and 10 test images of 2 classes, JPEG and PNG: scikit-learn's digits 0 and 1, 32x32 pixels."""
    root = tmp_path_factory.mktemp("image_folder")
    digits = load_digits(n_class=2)
    for i, (pixels, label) in enumerate(zip(digits.images[:30], digits.target)):
        folder = root / ("train" if i < 20 else "test") / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * 15).astype("uint8")).resize((32, 32)).convert("RGB")
        image.save(folder / f"{i:02}.{'png' if i % 2 else 'jpg'}")
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """For imagenet_dgl: 27 training and 10 validation images of 2 classes, 36x36 pixels."""
    return make_tree(tmp_path_factory.mktemp("tree"), {"train": 27, "val": 10}, (36, 36), "png")


def make_tree(root, counts, size, suffix):
    """An image folder of noise in 2 classes, one light, one dark; `counts` images in each part."""
    generator = torch.Generator().manual_seed(0)
    for part, count in counts.items():
        for i in range(count):
            folder = root / part / f"class{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(128, (5, 5, 3), generator=generator) + 120 * (i % 2)
            Image.fromarray(pixels.byte().numpy()).resize(size).save(folder / f"{i:02}.{suffix}")
    return root


def copy_tree(tree, target):
    """Copy an image folder, to change the copy."""
    for file in tree.glob("*/*/*"):
        copy = target / file.relative_to(tree)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    return target
