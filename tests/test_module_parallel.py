"""Module-parallel DGL: equal to one process, asynchronous, and ended by any fault. Ranks are real processes."""

import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import ROOT, load, run
from PIL import Image

load("imagenet_dgl", "imagenet_dgl")
data, ranks, training, module_parallel = (sys.modules[n] for n in ("data", "ranks", "training", "module_parallel"))
schedule = load("imagenet_dgl", "schedule")

SCRIPT = "imagenet_dgl/imagenet_dgl.py"
# Four whole batches and one of three images; a network with dropout
SMALL = ["-j", 0, "-b", 6, "--image-size", 32, "--lr", 0.01, "--threads", 1, "--arch", "squeezenet1_1", "-p", 0]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """27 training and 10 validation images of 2 classes, one light, one dark."""
    root = tmp_path_factory.mktemp("tree")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 27), ("val", 10)):
        for i in range(count):
            folder = root / split / f"class{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(128, (5, 5, 3), generator=generator) + 120 * (i % 2)
            Image.fromarray(pixels.byte().numpy()).resize((36, 36)).save(folder / f"{i:02}.png")
    return root


def start(count, work):
    """`work(rank)` in `count` processes, which find each other as under torchrun: their exit statuses."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    def begin(rank):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        ranks.RANK, ranks.COUNT = rank, count
        sys.exit(work(rank))

    processes = [multiprocessing.get_context("fork").Process(target=begin, args=(n,)) for n in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    return [process.exitcode for process in processes]


def train(count, tree, *flags, cwd):
    """A run of the script on `count` ranks that must succeed."""
    cwd.mkdir(exist_ok=True)

    def work(_):
        status, out, err = run(SCRIPT, tree, *SMALL, *flags, cwd=cwd)
        print(out, err)
        return status

    statuses = [work(0)] if count == 1 else start(count, work)
    assert statuses == [0] * count


def flat(state):
    """All tensors and numbers of a nested state, by the path to them."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else None
    if items is None:
        return {(): state}
    return {(key, *path): leaf for key, value in items for path, leaf in flat(value).items()}


def checkpoint(folder):
    return torch.load(folder / "imagenet_dgl.pt", weights_only=True)


def lines(folder):
    (log,) = folder.glob("*.log")
    return re.findall(r"^n: .*", log.read_text(), flags=re.MULTILINE)


def assert_equal(folder, other):
    """Equal to the bit: all that a checkpoint holds of model, optimizers and scalers, random numbers, and the log."""
    assert lines(folder) == lines(other) != []
    a, b = checkpoint(folder), checkpoint(other)
    assert torch.equal(a["rng"], b["rng"])
    assert torch.equal(a["generator"], b["generator"])
    a, b = flat(a["parts"]), flat(b["parts"])
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key], key


# Equal to one process


@pytest.mark.parametrize(
    ("num_modules", "flags"),
    [(2, []), (3, ["--precision", "fp16", "--dynamic-loss-scale"]), (4, ["--epochdecay", 2])],
)
def test_equals_one_process_to_the_bit(num_modules, flags, tree, tmp_path):
    """After 20 steps, a quarter of them on incomplete batches, with tests in between."""
    flags = "--nepochs", 4, "--num-modules", num_modules, *flags
    train(1, tree, *flags, cwd=tmp_path / "one")
    train(num_modules, tree, *flags, "--module-parallel", cwd=tmp_path / "parallel")
    assert_equal(tmp_path / "one", tmp_path / "parallel")


def test_a_checkpoint_goes_from_one_process_to_several_and_back(tree, tmp_path):
    flags = "--num-modules", 2, "--epochdecay", 2
    train(1, tree, *flags, "--nepochs", 3, cwd=tmp_path / "whole")
    moving = tmp_path / "moving"
    train(1, tree, *flags, "--nepochs", 1, cwd=moving)
    train(2, tree, *flags, "--nepochs", 2, "--module-parallel", "--resume", "auto", cwd=moving)
    train(1, tree, *flags, "--nepochs", 3, "--resume", "auto", cwd=moving)
    assert_equal(tmp_path / "whole", moving)


def test_replicas_equal_data_parallel_ranks(tree, tmp_path, monkeypatch):
    """Two modules with two replicas each, against two ranks with both modules; BatchNorm and dropout included."""
    normalise, prepare = data.Batches.normalise, training.prepare
    monkeypatch.setattr(data.Batches, "normalise", lambda *a: normalise(*a).double())
    monkeypatch.setattr(training, "prepare", lambda *a: prepare(*a).double())
    flags = "--num-modules", 2, "--nepochs", 2, "--sync-bn"
    train(2, tree, *flags, cwd=tmp_path / "data")
    train(4, tree, *flags, "--module-parallel", cwd=tmp_path / "both")
    a, b = (flat(checkpoint(tmp_path / name)["parts"]) for name in ("data", "both"))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-9, atol=1e-9)
    assert lines(tmp_path / "data") == lines(tmp_path / "both") != []


def test_evaluate_and_images_that_cannot_be_read(tree, tmp_path, capfd):
    """A whole batch of the validation images is missing."""
    copy = tmp_path / "tree"
    for path in tree.glob("*/*/*"):
        new = copy / path.relative_to(tree)
        new.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(b"" if path.parts[-3] == "val" and path.parts[-2] == "class0" else path.read_bytes())
    flags = "--num-modules", 2, "--nepochs", 1, "--skip-corrupt", "-b", 5
    train(1, copy, *flags, cwd=tmp_path / "one")
    capfd.readouterr()
    train(2, copy, *flags, "--module-parallel", "--profile", cwd=tmp_path / "parallel")
    assert_equal(tmp_path / "one", tmp_path / "parallel")
    spent = r"^rank {}: \d+\.\d\d s, computing \d+\.\d\d s, waiting for input \d+\.\d\d s, for sends \d+\.\d\d s$"
    screen = capfd.readouterr().out
    assert all(re.search(spent.format(rank), screen, re.MULTILINE) for rank in (0, 1))
    train(2, copy, *flags, "--module-parallel", "--evaluate", "--resume", "auto", cwd=tmp_path / "parallel")
    tested = [line.partition(" train ")[2].partition(", ")[2] for line in lines(tmp_path / "parallel")]
    assert [f"n: {n}, {line}" for n, line in enumerate(tested)] == re.findall("^n: .*", capfd.readouterr().out, re.M)


def test_mistakes(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ranks, "COUNT", 3)
    args = sys.modules["imagenet_dgl"].parse_args(["x", "--arch", "vgg13", "--block_size", "3", "--module-parallel"])
    with pytest.raises(SystemExit) as stop:
        sys.modules["imagenet_dgl"].make_pipeline(args, torch.device("cpu"))
    assert stop.value.code == 2
    assert "--nproc_per_node=4" in capsys.readouterr().err


# The pipeline itself


def in_pipeline(count, work):
    """`work(pipeline)` on `count` ranks, with batches of two images."""

    def begin(_):
        torch.distributed.init_process_group("gloo")
        pipeline = module_parallel.ModuleParallel(count, torch.device("cpu"), batch_size=2)
        work(pipeline)
        torch.distributed.destroy_process_group()

    assert start(count, begin) == [0] * count


def test_a_sender_runs_ahead_but_not_far():
    """It does not wait for the receiver's work, has at most SLOTS batches under way, and sends without a copy."""

    def work(pipeline):
        total, labels = 12, torch.tensor([0, 1])
        if pipeline.is_first:
            begin = time.monotonic()
            for i in range(total):
                x = torch.full((2, 3, 4, 4), float(i)).to(memory_format=torch.channels_last)
                pipeline.send(x, labels)
                if i == 1 + module_parallel.SLOTS:  # the receiver has not finished its first batch
                    assert time.monotonic() - begin < 0.5
                assert len(pipeline.sending) <= module_parallel.SLOTS
                assert pipeline.sending[-1][1][1].data_ptr() == x.data_ptr()
            assert time.monotonic() - begin > 0.5 * (total - 2 * module_parallel.SLOTS - 1)
            pipeline.end_pass(total)
        else:
            addresses = set()
            for i, (x, received) in enumerate(pipeline.receive(total)):
                time.sleep(0.5)
                assert torch.equal(x, torch.full((2, 3, 4, 4), float(i)))
                assert x.is_contiguous(memory_format=torch.channels_last)
                assert torch.equal(received, labels)
                addresses.add(x.data_ptr())
            assert len(addresses) == module_parallel.SLOTS
            pipeline.end_pass(total)

    in_pipeline(2, work)


def test_what_is_sent_on_is_not_overwritten_by_what_comes():
    """Labels come through three ranks; the last one is slow, so that they wait while others are received."""

    def work(pipeline):
        total = 10
        own = ((torch.full((2, 5), float(i)), torch.tensor([i, i + 1])) for i in range(total))
        for i, (x, labels) in enumerate(own if pipeline.is_first else pipeline.receive(total)):
            if pipeline.is_last:
                time.sleep(0.05)
            assert labels.tolist() == [i, i + 1]
            assert x.mean() == i + pipeline.n
            pipeline.send(x + 1, labels)
        pipeline.end_pass(total)

    in_pipeline(3, work)


# The computed schedule, and the benchmark


@pytest.mark.parametrize(
    ("forward", "backward", "transfer", "busy", "expected"),
    [
        ([1, 1, 1], [2, 2, 2], [0, 0], 0, 3),
        ([1, 2, 1], [2, 5, 2], [1, 1], 0, 7),  # the heaviest module bounds it
        ([1, 1, 1], [2, 2, 2], [1, 8], 0, 8),  # the link does
        ([1, 1, 1], [2, 2, 2], [1, 1], 1, 5),  # the middle module's core both receives and sends
        ([4], [5], [], 0, 9),
    ],
)
def test_schedule_of_module_parallel_dgl(forward, backward, transfer, busy, expected):
    assert schedule.module_parallel(forward, backward, transfer, busy) == pytest.approx(expected)


@pytest.mark.parametrize("order", [schedule.gpipe, schedule.one_f_one_b])
def test_schedules_of_backprop(order):
    """Equal stages without transfer: (m + K - 1) / m of a stage's time; one stage: no bubble."""
    assert schedule.pipeline(order, [1] * 4, [2] * 4, [0] * 3, 8) == pytest.approx(3 * (8 + 4 - 1) / 8)
    assert schedule.pipeline(order, [1], [2], [], 8) == pytest.approx(3)
    # By hand: of two microbatches stage 1 has the last output at 1.5 and the last gradient at 4, stage 0 that at 4.5
    assert schedule.pipeline(order, [1, 1], [2, 2], [1], 2) == pytest.approx(5.5)


def test_benchmark(tmp_path):
    flags = ["-b", "16", "--steps", "1", "--rounds", "1", "--microbatches", "2"]
    command = [sys.executable, ROOT / "imagenet_dgl/benchmark.py", *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for way in [
        *["DGL, one process", "DGL, module-parallel", "backprop, one process", "backprop, DDP", "backprop, GPipe"],
        *["backprop, 1F1B", "DGL, heaviest module", "DGL, module-parallel, predicted"],
    ]:
        assert re.search(rf"^\| 2 \| {way} \| \d+ \| \d+ to \d+ \| \d+\.\d\d \|", done.stdout, re.MULTILINE)
    assert (tmp_path / "benchmark.png").stat().st_size > 5000


# Faults


INJECT = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
faults = sys.argv.pop(1).split()  # for each start of the job KIND@RANK
import imagenet_dgl, training
kind, _, rank = faults[int(os.environ["TORCHELASTIC_RESTART_COUNT"])].partition("@")
update, updates = training.Meter.update, 0

def disturbed(meter, loss, *args):
    global updates
    updates += 1
    if updates == 8 and os.environ["RANK"] == rank:  # in the middle of the second epoch after a start
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "raise":
            raise ValueError("a mistake in the code")
        if kind == "interrupt":
            os.kill(os.getppid(), signal.SIGINT)
        loss = loss * float("nan") if kind == "nan" else loss
    update(meter, loss, *args)

training.Meter.update = disturbed
imagenet_dgl.main()
"""


def torchrun(faults, tree, *flags, cwd, restarts=0):
    """(exit status, stderr, seconds) of a job of two ranks that leaves no process behind."""
    (cwd / "disturbed.py").write_text(INJECT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [f"--max-restarts={restarts}", "disturbed.py", ROOT / "imagenet_dgl", faults, tree, *SMALL, *flags]
    command += ["--num-modules", 2, "--module-parallel"]
    environment = {**os.environ, "MARK": str(cwd), "OMP_NUM_THREADS": "1"}
    begin = time.monotonic()
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)
    seconds = time.monotonic() - begin
    left = [p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get("MARK") == str(cwd)]
    psutil.wait_procs(left, timeout=10)
    assert not [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not [*cwd.glob("*.tmp")]
    return done.returncode, done.stderr, seconds


def test_a_killed_rank_ends_the_job(tree, tmp_path):
    status, err, seconds = torchrun("kill@1", tree, "--nepochs", 9, cwd=tmp_path)
    assert status != 0
    assert seconds < 60
    assert re.search(r"Root Cause.*rank *: 1 .*Signal 9", err, re.DOTALL)
    assert "lost the connection" not in err
    assert checkpoint(tmp_path)["epoch"] == 1


def test_restarts_end_with_the_weights_of_an_undisturbed_run(tree, tmp_path):
    for name in ("one", "disturbed"):
        (tmp_path / name).mkdir()
    flags = "--nepochs", 5, "--num-modules", 2
    train(1, tree, *flags, cwd=tmp_path / "one")
    faults = "raise@0 nan@1 kill@0 none"
    status, err, _ = torchrun(faults, tree, *flags, "-p", 1, "--resume", "auto", cwd=tmp_path / "disturbed", restarts=3)
    assert status == 0, err
    assert err.count("ValueError: a mistake in the code") == 1
    assert (
        len(re.findall(r"Epoch \d, module 1 on rank 1: the loss is nan; the last checkpoint: imagenet_dgl.pt", err))
        == 1
    )
    assert "lost the connection" not in err
    assert_equal(tmp_path / "one", tmp_path / "disturbed")


def test_ctrl_c_ends_the_job(tree, tmp_path):
    status, err, seconds = torchrun("interrupt@0", tree, "--nepochs", 9, cwd=tmp_path)
    assert status != 0
    assert seconds < 60
    assert "Interrupted; go on from the last finished epoch with --resume imagenet_dgl.pt" in err
    assert checkpoint(tmp_path)["epoch"] >= 1


def test_a_corrupt_image_ends_the_job(tree, tmp_path):
    for path in tree.glob("*/*/*"):
        new = tmp_path / "tree" / path.relative_to(tree)
        new.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(path.read_bytes())
    new.write_bytes(b"")
    status, err, seconds = torchrun("none", tmp_path / "tree", "--nepochs", 2, "-j", 1, cwd=tmp_path)
    assert status != 0
    assert seconds < 60
    assert err.count("error: cannot read the image") == 1
    assert re.search(r"cannot read the image .* on rank 0 ", err)
    assert "lost the connection" not in err
