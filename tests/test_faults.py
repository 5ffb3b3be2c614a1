"""What goes wrong around a run: its screen, its disk, a second run, signals; the log and the checkpoint survive it."""

import os
import pty
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, checkpoint_of, forked, load, log_of, refused, run, start

SCRIPT = "ddg_comparisons/cifar_backprop.py"
FLAGS = [*["--data", "digits", "--train-size", 20, "--batch-size", 10, "--depth", 8, "--threads", 1, "--epochs", 3]]
FLAGS += ["--log-interval", 1]


def script_in(folder, *flags, at=None, arrange=None):
    """A function that runs the script in a folder; `at` (n, function): to be called before the n-th batch."""

    def main():
        module, count = load(*SCRIPT.removesuffix(".py").split("/")), []
        update = module.cifar.Meter.update

        def counted(*arguments):
            count.append(1)
            if at and len(count) == at[0]:
                at[1]()
            update(*arguments)

        module.cifar.Meter.update = counted
        os.chdir(folder)
        if arrange:
            arrange()
        module.main([str(flag) for flag in (*FLAGS, *flags)])

    return main


def complete(folder):
    return log_of(folder)[-1].startswith("n: 2, epoch 3,") and checkpoint_of(folder)["epoch"] == 3


# The screen


def full_disk():
    sys.stdout = open("/dev/full", "w")  # noqa: SIM115


def nobody_reads():
    reader, writer = os.pipe()
    os.close(reader)
    sys.stdout = os.fdopen(writer, "w")


def ascii_only():
    sys.stdout = open("ascii.txt", "w", encoding="ascii")  # noqa: SIM115


def closed():
    sys.stdout = sys.stderr = None  # as Python has them for 1>&- and 2>&-


def terminal_gone():
    master, terminal = pty.openpty()
    sys.stdout, sys.stderr = os.fdopen(os.dup(terminal), "w"), os.fdopen(terminal, "w")
    os.close(master)


@pytest.mark.parametrize("arrange", [full_disk, nobody_reads, ascii_only, closed, terminal_gone])
def test_a_screen_that_fails_does_not_end_a_run(arrange, tmp_path):
    assert forked(script_in(tmp_path, "--name", "ü", arrange=arrange), errors=tmp_path / "errors.txt") == 0
    assert (tmp_path / "errors.txt").read_text() == ""
    assert complete(tmp_path)


def test_a_screen_that_fails_later_does_not_end_a_run(tmp_path):
    """As `| head -1`: an interpreter of its own, whose end is silent too."""
    command = [sys.executable, "-u", ROOT / SCRIPT, *FLAGS]
    with subprocess.Popen(
        [*map(str, command)], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(100) == 0
    assert complete(tmp_path)


# The disk


def limit_files():
    """From now on no file of this process may be larger than 100,000 bytes: a checkpoint is, a log is not."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


@pytest.mark.parametrize(("update", "last"), [(1, "none yet"), (3, "ddg_comparisons-cifar_backprop.pt")])
def test_a_checkpoint_that_cannot_be_written(update, last, tmp_path):
    errors = tmp_path / "errors.txt"
    assert forked(script_in(tmp_path, at=(update, limit_files)), errors=errors) == 1
    name = "ddg_comparisons-cifar_backprop.pt"
    assert errors.read_text() == f"Cannot write {name}: [Errno 27] File too large; the last checkpoint: {last}\n"
    assert not list(tmp_path.glob("*.tmp"))
    assert log_of(tmp_path)[-1].startswith("n: 2, epoch ")  # of the epoch whose checkpoint failed
    if update > 1:
        assert checkpoint_of(tmp_path)["epoch"] == 1
        assert run(SCRIPT, *FLAGS, "--resume", "auto", cwd=tmp_path)[0] == 0
        assert complete(tmp_path)


def test_a_log_that_cannot_be_written(tmp_path):
    def limit():
        (log,) = tmp_path.glob("*.log")
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size + 10,) * 2)

    errors = tmp_path / "errors.txt"
    assert forked(script_in(tmp_path, at=(3, limit)), errors=errors) == 1
    (log,) = tmp_path.glob("*.log")
    last = "the last checkpoint: ddg_comparisons-cifar_backprop.pt"
    assert errors.read_text() == f"Cannot write {log.name}: File too large; {last}\n"
    assert run(SCRIPT, *FLAGS, "--resume", "auto", cwd=tmp_path)[0] == 0  # the part of a line is cut off
    assert complete(tmp_path)
    assert len([line for line in log_of(tmp_path)[1:] if line.startswith("n: ")]) == 3


# Two runs, and signals


def test_a_second_run_of_one_name_is_refused_while_the_first_is_alive(tmp_path):
    waiting, _ = os.pipe()
    process = start(script_in(tmp_path, at=(3, lambda: os.read(waiting, 1))), errors=tmp_path / "errors.txt")
    try:
        while not list(tmp_path.glob("*.pt")):  # in its second epoch
            assert process.is_alive()
            time.sleep(0.02)
        name = "ddg_comparisons-cifar_backprop.pt"
        before = (tmp_path / name).read_bytes()
        for flags in (["--seed", 2], ["--resume", "auto"], ["--resume", name]):
            refused(run(SCRIPT, *FLAGS, *flags, cwd=tmp_path), name, "is alive", "--name")
        assert run(SCRIPT, *FLAGS, "--name", "other", "--epochs", 1, cwd=tmp_path)[0] == 0
        assert (tmp_path / name).read_bytes() == before
    finally:
        process.kill()
        process.join()
    for path in tmp_path.glob("*other*"):
        path.unlink()
    assert run(SCRIPT, *FLAGS, "--resume", "auto", cwd=tmp_path)[0] == 0  # after a kill -9
    assert complete(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_training_says_how_to_go_on(number, tmp_path):
    errors = tmp_path / "errors.txt"
    status = forked(script_in(tmp_path, at=(3, lambda: os.kill(os.getpid(), number))), errors=errors)
    assert status == -signal.SIGINT
    checkpoint = "ddg_comparisons-cifar_backprop.pt"
    assert errors.read_text().strip() == f"Interrupted; go on from the last finished epoch with --resume {checkpoint}"


def test_a_signal_before_the_first_checkpoint(tmp_path):
    errors = tmp_path / "errors.txt"
    forked(script_in(tmp_path, at=(1, lambda: os.kill(os.getpid(), signal.SIGTERM))), errors=errors)
    assert errors.read_text().strip() == "Interrupted before this run finished an epoch."


@pytest.mark.parametrize("script", ["learning_curves/cifar_dgl.py", "imagenet_dgl/imagenet.py"])
def test_ctrl_c_during_the_imports_prints_nothing(script, tmp_path):
    command = [sys.executable, "-X", "importtime", ROOT / script]  # to know when it is importing torch
    process = subprocess.Popen([*map(str, command)], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "| torch" in line or "|   torch" in line or "torch." in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait(100) == -signal.SIGINT
    assert "Traceback" not in "".join(lines) + rest


# What a run may depend on


def test_random_numbers_are_the_same_in_a_resumed_run(tmp_path):
    """A user's dropout, say: torch is seeded again in each epoch."""
    draws = {}
    for name, last in (("whole", [2]), ("resumed", [1, 2])):
        for epochs in last:
            module = load(*SCRIPT.removesuffix(".py").split("/"))
            drawn = draws.setdefault(name, [])

            def train_epoch(*_, drawn=drawn):
                drawn.append(torch.rand(2))

            module.train_epoch, module.evaluate, module.cifar.log_epoch = train_epoch, lambda *_: 0, lambda *_: None
            flags = [*FLAGS, "--epochs", epochs, "--save_folder", tmp_path / name, "--resume", "auto"]
            module.main([str(flag) for flag in flags])
    assert torch.equal(torch.stack(draws["whole"]), torch.stack(draws["resumed"]))
    assert not torch.equal(*draws["whole"])


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_float32_is_what_the_log_says(precision, tmp_path):
    assert run(SCRIPT, *FLAGS, "--epochs", 1, "--precision", precision, cwd=tmp_path)[0] == 0
    expected = precision == "tf32"
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == expected
    assert log_of(tmp_path)[1].endswith(f", TF32 {expected}")
