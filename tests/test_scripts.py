"""What every script of the repository promises: its log, resume to the bit, one line for a mistake.

A new script is a new line in SCRIPTS.
"""

import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_same_run, checkpoint_of, forked, load, log_of, python, refused, run
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

# Each script with flags for a run of several quick epochs on a few digits, of three batches, whether or not the script
# trains on incomplete ones: 39 images, and the last is alone.
SCRATCH = tempfile.TemporaryDirectory()
QUICK = ["--data", SCRATCH.name, "--train-size", 40, "--batch-size", 13, "--threads", 1, "--epochs", 3]
SCRIPTS = {
    "auxiliary_nets_study/cifar_dgl.py": [*QUICK, "--feature_size", 4, "--block_size", 2],
    "auxiliary_nets_study/cifar_resnet.py": [*QUICK, "--method", "man", "--depth", 8, "--num-modules", 3],
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
    "learning_curves/cifar_sequential_greedy.py": [*QUICK, "--epochs", 1],  # of each layer
}
EPOCH_LINE = re.compile(
    r"n: (\d+), epoch (\d+),(?: loss: |epochtrue )(\S+), train (?:top1:)?(\S+?),? test (?:top1:)?(\S+?)(?:,ense \S+)?"
)
DIGITS = load_digits()
for label in range(10):  # 4 training and 2 test images of each
    for i, pixels in enumerate(DIGITS.images[DIGITS.target == label][:6]):
        file = Path(SCRATCH.name, "train" if i < 4 else "test", f"{label}", f"{i}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype("uint8")).resize((32, 32)).save(file)
every_script = pytest.mark.parametrize("script", SCRIPTS)


def test_the_log_names_the_commit(tmp_path, monkeypatch):
    """Of the checkout in which Python looks first, the script's."""
    folder = tmp_path / "it's here"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)

    def git(*command):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.check_output(["git", *identity, *command], cwd=folder, text=True).strip()

    def logged(name):
        status, _, errors = run("learning_curves/cifar_dgl.py", *QUICK, "--epochs", 1, "--name", name, cwd=tmp_path)
        assert status == 0, errors
        (log,) = tmp_path.glob(f"*-{name}.log")
        return re.search(", commit ([^,]*), ", log.read_text().splitlines()[1])[1]

    assert logged("no-checkout") == "none"
    git("init")
    (folder / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "1")
    commit = git("rev-parse", "--short", "HEAD")
    assert logged("clean") == commit
    (folder / "file").write_text("2")
    assert logged("changed") == f"{commit}-dirty"


def stopped(number, update, script, *flags, cwd):
    """Run a script in a process that gets the signal at a certain update of a meter; what it wrote to stderr."""

    def main():
        module, count = load(*script.removesuffix(".py").split("/")), []
        meter_update = module.cifar.Meter.update

        def counted(*arguments):
            count.append(1)
            if len(count) == update:
                os.kill(os.getpid(), number)
            meter_update(*arguments)

        module.cifar.Meter.update = counted
        os.chdir(cwd)
        module.main([str(flag) for flag in (*SCRIPTS[script], *flags)])

    errors = cwd / "errors.txt"
    assert forked(main, errors=errors) == -number, errors.read_text()
    return errors.read_text()


def updates_of(folder):
    """How often a run updated a meter: three batches for each line of its log."""
    return 3 * len([line for line in log_of(folder)[1:] if EPOCH_LINE.fullmatch(line)])


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A script's output folder after an undisturbed run of a copy of its folder alone; made once a script."""
    outputs = {}

    def output_of(script):
        if script not in outputs:
            folder, root = script.split("/")[0], tmp_path_factory.mktemp("alone")
            shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("logs", "__pycache__"))
            outputs[script] = tmp_path_factory.mktemp("whole_run")
            status, _, errors = run(script, *SCRIPTS[script], cwd=outputs[script], root=root)
            assert status == 0, errors
            assert errors == ""  # no bar, no warning
        return outputs[script]

    return output_of


def test_a_command_as_a_user_types_it(whole_run, tmp_path):
    script = "learning_curves/cifar_dgl.py"
    done = python(ROOT / script, *SCRIPTS[script], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert_same_run(tmp_path, whole_run(script))
    assert done.stdout.splitlines()[-1] == log_of(tmp_path)[-1]


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
    assert data == "data: image folder, 40 training and 20 test images of 10 classes"
    assert re.match(r"model, [\d,]+ parameters: \w+", model)
    epochs = [[float(x) for x in match.groups()] for line in lines[1:] if (match := EPOCH_LINE.fullmatch(line))]
    assert {epoch for _, epoch, *_ in epochs} == {*range(1, arguments["epochs"] + 1)}
    assert len(epochs) % arguments["epochs"] == 0
    assert all(0 < loss < 10 and 0 <= train <= 100 and 0 <= test <= 100 for _, _, loss, train, test in epochs)
    assert lines[-len(epochs) :] == [line for line in lines[1:] if EPOCH_LINE.fullmatch(line)]


@every_script
def test_another_seed_gives_another_run(script, whole_run, tmp_path):
    """That the same seed gives the same run is what the tests of resuming show."""
    flags = ["--epochs", 1, "--seed", 2, "--precision", "tf32"]  # on a CPU, float32
    assert run(script, *SCRIPTS[script], *flags, cwd=tmp_path)[0] == 0
    lines = [
        [line for line in log_of(folder)[1:] if EPOCH_LINE.fullmatch(line)] for folder in (tmp_path, whole_run(script))
    ]
    assert lines[0][0] != lines[1][0]


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script.startswith(("ddg", "dni"))])
def test_log_interval(script, tmp_path):
    status, text, _ = run(script, *SCRIPTS[script], "--epochs", 1, "--log-interval", 2, cwd=tmp_path)
    assert status == 0
    assert re.findall(r"batch (\d) of (\d), loss: \d", text) == [("2", "3")]


@every_script
def test_interrupted_killed_and_resumed_equals_never_stopped(script, whole_run, tmp_path):
    updates = updates_of(whole_run(script))
    message = stopped(signal.SIGINT, updates // 2 + 1, script, "--resume", "auto", cwd=tmp_path)  # Ctrl-C
    (checkpoint,) = tmp_path.glob("*.pt")
    assert message == f"\nInterrupted; go on from the last finished epoch with --resume {checkpoint.name}\n"
    next(tmp_path.glob("*.log")).open("a").write("n: 1, ep")  # as if in the middle of a line
    epoch = checkpoint_of(tmp_path)["epoch"]
    stopped(signal.SIGKILL, updates // 3 + 1, script, "--resume", "auto", cwd=tmp_path)
    assert 0 < epoch < checkpoint_of(tmp_path)["epoch"] < checkpoint_of(whole_run(script))["epoch"]
    assert run(script, *SCRIPTS[script], "--resume", "auto", cwd=tmp_path)[0] == 0
    assert_same_run(tmp_path, whole_run(script))
    assert "nothing to do" in run(script, *SCRIPTS[script], "--resume", "auto", cwd=tmp_path)[1]
    assert_same_run(tmp_path, whole_run(script))


@pytest.mark.parametrize("script", ["learning_curves/cifar_sequential_greedy.py", "buffer_experiments/cifar_buffer.py"])
def test_resume_of_a_file_goes_on_in_its_folder_with_its_flags(script, whole_run, tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    update, nan_at = updates_of(whole_run(script)) // 2 + 1, []

    def not_finite(meter, loss, logits, labels):
        nan_at.append(1)
        meter_update(meter, loss * float("nan") if len(nan_at) == update else loss, logits, labels)

    cifar = load(script.split("/")[0], "cifar")
    meter_update = cifar.Meter.update
    with monkeypatch.context() as patch:
        patch.setattr(cifar.Meter, "update", not_finite)
        patch.setattr("conftest.COMMON_NAMES", ())  # so that the script gets this cifar
        status, _, message = run(script, *SCRIPTS[script], "--name", "a", "--save_folder", runs, cwd=tmp_path)
    (checkpoint,) = runs.glob("*.pt")
    assert status == 1
    assert re.fullmatch(rf"Epoch \d, module \d: the loss is nan; the last checkpoint: {checkpoint}\n", message)
    status, _, errors = run(script, "--threads", 1, "--resume", checkpoint, cwd=tmp_path)
    assert status == 0, errors
    a, b = log_of(runs), log_of(whole_run(script))
    assert a[0] == {**b[0], "name": "a"}
    assert a[1:] == b[1:]


def test_a_run_can_be_made_longer(whole_run, tmp_path):
    script = "learning_curves/cifar_dgl.py"
    run(script, *SCRIPTS[script], "--epochs", 1, cwd=tmp_path)
    run(script, *SCRIPTS[script], "--resume", "auto", cwd=tmp_path)
    assert log_of(tmp_path)[1:] == log_of(whole_run(script))[1:]
    sequential = "learning_curves/cifar_sequential_greedy.py"  # here the number of epochs decides when layers begin
    checkpoint = next(whole_run(sequential).glob("*.pt"))
    refused(run(sequential, *SCRIPTS[sequential], "--epochs", 2, "--resume", checkpoint, cwd=tmp_path), "epochs 1")


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
        (["--seed", 2**32], ["--seed", "whole number of at least 0 and below 2147483648"]),
        (["--resume", "missing.pt"], ["no checkpoint 'missing.pt'"]),
        (["--resume", ""], ["no checkpoint ''"]),
    ]:
        refused(run(script, *SCRIPTS[script], *flags, cwd=tmp_path), *parts)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # of a tensor instead of a dict
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
        ("half", {k: v for k, v in network.items() if k != "log"}, [], "not a checkpoint of these scripts"),
        ("parts", {**network, "parts": {"model": [1]}}, [], "another network"),
        ("tensor", torch.zeros(3), [], "not a checkpoint of these scripts"),
        ("other", other, [], "a checkpoint of another.py"),
        ("network", network, [], "another network"),
        ("description", {**network, "data": "other images"}, [], "data 'other images'"),
        ("flags", content, ["--batch-size", 20], "batch_size 13"),
        ("data", content, ["--data", "digits", "--train-size", 50], "data 'image folder, 40 training"),
    ]:
        if case not in ("parts", "network") and script != "learning_curves/cifar_dgl.py":
            continue  # utils.py's, which is the same in all folders
        path = tmp_path / f"{case}.pt"
        path.write_bytes(state) if isinstance(state, bytes) else torch.save(state, path)
        before = path.read_bytes()
        refused(run(script, *SCRIPTS[script], *flags, "--resume", path, cwd=tmp_path), path, message)
        assert path.read_bytes() == before
    assert {file.suffix for file in tmp_path.iterdir() if not file.name.startswith(".")} == {".pt"}


def test_a_changed_log_is_not_overwritten_and_a_missing_one_is_begun_again(whole_run, tmp_path):
    script = "learning_curves/cifar_dgl.py"
    folder = shutil.copytree(whole_run(script), tmp_path / "copy")
    (log,) = folder.glob("*.log")
    text = log.read_text()
    for changed in ("notes\n" + text, text[:-10], ""):
        log.write_text(changed)
        refused(run(script, *SCRIPTS[script], "--resume", "auto", cwd=folder), log.name)
        assert log.read_text() == changed
    log.unlink()
    assert run(script, *SCRIPTS[script], "--epochs", 4, "--resume", "auto", cwd=folder)[0] == 0
    lines = log.read_text().splitlines()
    assert lines[0].startswith("arguments: ")
    assert [line for line in lines if line.startswith("n: ")] == lines[-4:]
    assert lines[-1].startswith("n: 4, epoch 4,")


def test_checkpoints_of_different_scripts_never_have_the_same_name(tmp_path):
    names = set()
    for script in [*SCRIPTS, "imagenet_dgl/imagenet.py", "imagenet_dgl/imagenet_dgl.py"]:
        utils = load(script.split("/")[0], "utils")
        for name in ("", "dgl"):
            names.add(utils.checkpoint_path(utils.ArgumentParser(ROOT / script, "").parse_args(["--name", name])))
    assert len(names) == 2 * (len(SCRIPTS) + 2)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(backend, tmp_path, monkeypatch):
    """Compiled or not, the first epoch's losses agree to rounding; the small one really is compiled to machine code."""
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")
    script, depth = "auxiliary_nets_study/cifar_dgl.py", 1
    if backend == "eager":
        compile_part, depth = nn.Module.compile, 2
        monkeypatch.setattr(nn.Module, "compile", lambda part, **shapes: compile_part(part, backend="eager", **shapes))
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
