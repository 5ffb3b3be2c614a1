"""What every script of the repository promises: its log, resume to the bit, one line for a mistake.

A new script is a new line in SCRIPTS.
"""

import json
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, load, run
from torch import nn

# Each script with flags for a run of several quick epochs on the digits, of three batches, whether or not the script
# trains on incomplete ones: 39 images, and the last is alone.
QUICK = ["--data", "digits", "--train-size", 40, "--batch-size", 13, "--threads", 1, "--epochs", 3]
SCRIPTS = {
    "auxiliary_nets_study/cifar_dgl.py": [*QUICK, "--feature_size", 4, "--block_size", 2],
    "buffer_experiments/cifar_buffer.py": [
        *[*QUICK, "--seed", 1, "--buffer", 3, "--layer-sequence", "sequential"],  # random turns: test_buffer.py
        *["--ncnn", 3, "--down", "[0]", "--feature_size", 4],
    ],
    "ddg_comparisons/cifar_backprop.py": [*QUICK, "--depth", 8],
    "ddg_comparisons/cifar_ddg.py": [*QUICK, "--depth", 14, "--num_splits", 3],
    "ddg_comparisons/cifar_dgl.py": [*QUICK, "--depth", 8],
    "ddg_comparisons/cifar_features_replay.py": [*QUICK, "--depth", 14, "--num_splits", 3],
    "dni_comparisons/cifar_cnn_dni.py": [*QUICK, "--dni", "--context"],
    "dni_comparisons/cifar_dgl.py": QUICK,
    "learning_curves/cifar_dgl.py": QUICK,
    "learning_curves/cifar_sequential_greedy.py": QUICK,
}
EPOCH_LINE = re.compile(
    r"n: (\d+), epoch (\d+),(?: loss: |epochtrue )(\S+), train (?:top1:)?(\S+?),? test (?:top1:)?(\S+?)(?:,ense \S+)?"
)
every_script = pytest.mark.parametrize("script", SCRIPTS)

# Runs a script and sends its process a signal at a certain update of a meter.
SIGNAL_AT_UPDATE = """
import os, runpy, signal, sys
number, count, script = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
sys.argv = sys.argv[3:]
sys.path.insert(0, os.path.dirname(script))
import utils
update = utils.Meter.update
def counted(*arguments):
    global count
    count -= 1
    if count == 0:
        os.kill(os.getpid(), number)
    update(*arguments)
utils.Meter.update = counted
runpy.run_path(script, run_name="__main__")
"""


def run_until(number, update, script, *flags, cwd):
    """Run a script in a process of its own that gets the signal at the update; the ended process."""
    command = [sys.executable, "-c", SIGNAL_AT_UPDATE, int(number), update, ROOT / script, *SCRIPTS[script], *flags]
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == -number, done.stderr
    return done


def log_of(folder):
    """The lines of the one log in a folder; of its arguments, those that decide the result."""
    (log,) = folder.glob("*.log")
    first, *rest = log.read_text().splitlines()
    arguments = json.loads(first.removeprefix("arguments: "))
    return [{k: v for k, v in arguments.items() if k not in ("resume", "save_folder")}, *rest]


def updates_of(folder):
    """How often a run updated a meter: three batches for each line of its log."""
    return 3 * len([line for line in log_of(folder)[1:] if EPOCH_LINE.fullmatch(line)])


def checkpoint_of(folder):
    (checkpoint,) = folder.glob("*.pt")
    return torch.load(checkpoint, weights_only=True)


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
    assert log_of(folder) == log_of(other)
    a, b = checkpoint_of(folder), checkpoint_of(other)
    for key in ("epoch", "parts", "rng", "generator"):
        assert_same(a[key], b[key])


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A script's output folder after an undisturbed run, by command, of a copy of its folder; made once a script."""
    outputs = {}

    def output_of(script):
        if script not in outputs:
            folder, name = script.split("/")
            copy = shutil.copytree(ROOT / folder, tmp_path_factory.mktemp("alone") / "renamed")
            outputs[script] = tmp_path_factory.mktemp("whole_run")
            command = [sys.executable, copy / name, *SCRIPTS[script]]
            done = subprocess.run(
                [*map(str, command)], cwd=outputs[script], capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stderr
            assert done.stderr == ""  # no bar, no warning
        return outputs[script]

    return output_of


@every_script
def test_help_shows_the_command_and_the_defaults(script, tmp_path):
    status, text, _ = run(script, "--help", cwd=tmp_path)
    assert status == 0
    assert f"python {script.split('/')[1]}" in text
    assert "(default: ./data)" in text
    assert "(default: None)" not in text
    assert not list(tmp_path.iterdir())


@every_script
def test_log(script, whole_run):
    arguments, environment, data, model, *_ = lines = log_of(whole_run(script))
    assert arguments["train_size"] == 40
    assert environment.startswith("environment: Python 3.")
    assert data == "data: digits, 40 training and 297 test images of 10 classes"
    assert re.match(r"model, [\d,]+ parameters: \w+", model)
    epochs = [[float(x) for x in match.groups()] for line in lines[1:] if (match := EPOCH_LINE.fullmatch(line))]
    assert {epoch for _, epoch, *_ in epochs} == {1, 2, 3}
    assert len(epochs) % 3 == 0
    assert all(0 < loss < 10 and 0 <= train <= 100 and 0 <= test <= 100 for _, _, loss, train, test in epochs)
    assert lines[-len(epochs) :] == [line for line in lines[1:] if EPOCH_LINE.fullmatch(line)]


@every_script
def test_the_same_seed_gives_the_same_run_and_another_seed_another(script, whole_run, tmp_path):
    for folder, seed in (("same", 1), ("other", 2)):
        (tmp_path / folder).mkdir()
        assert run(script, *SCRIPTS[script], "--seed", seed, cwd=tmp_path / folder)[0] == 0
    assert_same_run(tmp_path / "same", whole_run(script))
    assert log_of(tmp_path / "other")[-1] != log_of(whole_run(script))[-1]


@every_script
def test_interrupted_killed_and_resumed_equals_never_stopped(script, whole_run, tmp_path):
    updates = updates_of(whole_run(script))
    stopped = run_until(signal.SIGINT, updates // 2 + 1, script, "--resume", "auto", cwd=tmp_path)  # Ctrl-C
    assert "Traceback" not in stopped.stderr
    (checkpoint,) = tmp_path.glob("*.pt")
    assert f"--resume {checkpoint.name}" in stopped.stderr
    next(tmp_path.glob("*.log")).open("a").write("n: 1, ep")  # as if in the middle of a line
    epoch = checkpoint_of(tmp_path)["epoch"]
    run_until(signal.SIGKILL, updates // 3 + 1, script, "--resume", "auto", cwd=tmp_path)
    assert 0 < epoch < checkpoint_of(tmp_path)["epoch"] < checkpoint_of(whole_run(script))["epoch"]
    (log,) = tmp_path.glob("*.log")
    log.write_text(log.read_text()[:100])  # killed while it was being restored
    assert run(script, *SCRIPTS[script], "--resume", "auto", cwd=tmp_path)[0] == 0
    assert_same_run(tmp_path, whole_run(script))
    assert "nothing to do" in run(script, *SCRIPTS[script], "--resume", "auto", cwd=tmp_path)[1]
    assert_same_run(tmp_path, whole_run(script))


@every_script
def test_resume_of_a_file_goes_on_in_its_folder_and_brings_the_log_back(script, whole_run, tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    update, nan_at = updates_of(whole_run(script)) // 2 + 1, []

    def not_finite(meter, loss, logits, labels):
        nan_at.append(1)
        meter_update(meter, loss * float("nan") if len(nan_at) == update else loss, logits, labels)

    utils = load(script.split("/")[0], "utils")
    meter_update = utils.Meter.update
    with monkeypatch.context() as patch:
        patch.setattr(utils.Meter, "update", not_finite)
        patch.setattr("conftest.COMMON_NAMES", ())  # so that the script gets this utils
        status, _, message = run(script, *SCRIPTS[script], "--save_folder", runs, cwd=tmp_path)
    (checkpoint,) = runs.glob("*.pt")
    assert status == 1
    assert re.fullmatch(rf"Epoch \d, module \d: the loss is nan; the last checkpoint: {checkpoint}\n", message)
    next(runs.glob("*.log")).unlink()
    assert run(script, *SCRIPTS[script], "--resume", checkpoint, cwd=tmp_path)[0] == 0
    assert_same_run(runs, whole_run(script))


def test_a_run_can_be_made_longer(whole_run, tmp_path):
    script = "learning_curves/cifar_dgl.py"
    run(script, *SCRIPTS[script], "--epochs", 1, cwd=tmp_path)
    run(script, *SCRIPTS[script], "--resume", "auto", cwd=tmp_path)
    assert log_of(tmp_path)[1:] == log_of(whole_run(script))[1:]
    sequential = "learning_curves/cifar_sequential_greedy.py"  # here the number of epochs decides when layers begin
    checkpoint = next(whole_run(sequential).glob("*.pt"))
    refused(run(sequential, *SCRIPTS[sequential], "--epochs", 4, "--resume", checkpoint, cwd=tmp_path), "epochs 3")


def refused(result, *parts):
    """Expect status 2 and one line on stderr that holds the parts."""
    status, _, message = result
    assert status == 2, message
    assert message.count("\n") == 1
    assert "error: " in message
    assert all(str(part) in message for part in parts), message


@every_script
def test_mistakes_in_the_flags(script, tmp_path):
    (tmp_path / "file").touch()
    for flags, parts in [
        (["--epochs", "0"], ["--epochs", "at least 1"]),
        (["--batch-size", "many"], ["--batch-size", "many"]),
        (["--precision", "fp8"], ["fp8", "bf16"]),
        (["--depht", "3"], ["--depht", "--help"]),
        (["--name", "a/b"], ["--save_folder"]),
        (["--save_folder", "file"], ["--save_folder", "file"]),
        (["--resume", "missing.pt"], ["no checkpoint missing.pt"]),
    ]:
        refused(run(script, *SCRIPTS[script], *flags, cwd=tmp_path), *parts)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@every_script
def test_a_checkpoint_that_does_not_fit_is_refused_and_left_as_it_was(script, whole_run, tmp_path):
    good = next(whole_run(script).glob("*.pt"))
    content = good.read_bytes()
    other, network = (torch.load(good, weights_only=True) for _ in range(2))
    other["arguments"]["script"] = "another"
    model = network["parts"]["model"]
    name = next(iter(model))
    model[name] = model[name][:1]
    middle = len(content) // 2
    for case, state, flags, message in [
        ("truncated", content[:middle], [], "damaged"),
        ("flipped", content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :], [], "damaged"),
        ("empty", b"", [], "damaged"),
        ("text", b"n: 1, epoch 1", [], "damaged"),
        ("foreign", {"state_dict": model}, [], "not a checkpoint of these scripts"),
        ("half", {k: v for k, v in network.items() if k != "generator"}, [], "not a checkpoint of these scripts"),
        ("parts", {**network, "parts": {"model": [1]}}, [], "another network"),
        ("tensor", torch.zeros(3), [], "not a checkpoint of these scripts"),
        ("other", other, [], "a checkpoint of another.py"),
        ("network", network, [], "another network"),
        ("digest", {**network, "data": "other images"}, [], "trained on other images"),
        ("flags", content, ["--batch-size", 20], "--batch-size 13"),
        ("data", content, ["--data", "digits", "--train-size", 50], "--train-size 40"),
    ]:
        path = tmp_path / f"{case}.pt"
        path.write_bytes(state) if isinstance(state, bytes) else torch.save(state, path)
        before = path.read_bytes()
        refused(run(script, *SCRIPTS[script], *flags, "--resume", path, cwd=tmp_path), path, message)
        assert path.read_bytes() == before
    assert {file.suffix for file in tmp_path.iterdir()} == {".pt"}


@every_script
def test_a_changed_log_is_not_overwritten(script, whole_run, tmp_path):
    folder = shutil.copytree(whole_run(script), tmp_path / "copy")
    (log,) = folder.glob("*.log")
    log.write_text("notes\n" + log.read_text())
    before = log.read_text()
    refused(run(script, *SCRIPTS[script], "--resume", "auto", cwd=folder), log.name)
    assert log.read_text() == before


def test_two_runs_of_one_name_at_once_do_not_share_a_log(tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda *_: "20260101-000000")
    script = "learning_curves/cifar_dgl.py"
    log = tmp_path / "20260101-000000_cifar_dgl.log"
    log.write_text("another run's")
    refused(run(script, *SCRIPTS[script], cwd=tmp_path), log.name)
    assert log.read_text() == "another run's"


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compile(backend, tmp_path, monkeypatch):
    """Compiled or not, the first epoch's losses agree to rounding; the small one really is compiled to machine code."""
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")
    script, depth = "auxiliary_nets_study/cifar_dgl.py", 1
    if backend == "eager":
        compile_part, depth = nn.Module.compile, 6
        monkeypatch.setattr(nn.Module, "compile", lambda part: compile_part(part, backend="eager"))
    flags = [*QUICK, "--feature_size", 4, "--depth", depth, "--epochs", 1]
    losses = []
    for name in ("plain", "compiled"):
        folder = tmp_path / name
        folder.mkdir()
        status, _, warnings = run(script, *flags, *(["--compile"] * (name == "compiled")), cwd=folder)
        assert status == 0
        assert "recompile" not in warnings  # a part beyond the limit of recompilations would run as it is
        losses.append([float(match[3]) for match in map(EPOCH_LINE.fullmatch, log_of(folder)[1:]) if match])
    assert losses[0] == pytest.approx(losses[1], abs=0.05)
    assert len(losses[0]) == depth
