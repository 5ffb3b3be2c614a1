"""parallel.py of ddg_comparisons: equal to the one-process scripts, at the same time, and ended by any fault."""

import datetime
import re
import types

import conftest
import pytest
import torch
from conftest import ROOT, assert_same, checkpoint_of, epoch_lines, load, python, refused, run
from forked_ranks import fork_ranks, run_ranks

parallel = load("ddg_comparisons", "parallel")
dist = torch.distributed
SCRIPT = "ddg_comparisons/parallel.py"
ONE_PROCESS = {"dgl": "cifar_dgl", "ddg": "cifar_ddg", "fr": "cifar_features_replay", "backprop": "cifar_backprop"}
# 20 images: three whole batches and one of two
SMALL = ["--depth", 14, "--batch-size", 6, "--threads", 1, "--drops", 2]


def train(method, num_splits, *flags, cwd):
    flags = *SMALL, "--method", method, "--num_splits", num_splits, *flags
    ranks = types.SimpleNamespace()
    assert run_ranks(num_splits, ranks, SCRIPT, *flags, folders=[cwd]) == [0] * num_splits


def assert_equals_one_process(folder, method, num_splits, *flags):
    one = folder / "one"
    script = f"ddg_comparisons/{ONE_PROCESS[method]}.py"
    status, _, errors = run(script, *SMALL, "--num_splits", num_splits, *flags, "--save_folder", one, cwd=folder)
    assert status == 0, errors
    assert epoch_lines(folder) == epoch_lines(one) != []
    a, b = checkpoint_of(folder), checkpoint_of(one)
    for key in ("epoch", "data", "generator"):
        assert_same(a[key], b[key])
    assert_same(a["parts"]["model"], b["parts"]["model"])


@pytest.mark.parametrize(
    ("method", "num_splits", "precision"),
    [
        ("dgl", 2, "bf16"),
        ("ddg", 3, "fp32"),
        ("fr", 3, "fp32"),
        ("backprop", 2, "fp32"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("dgl", 3, "fp16"),
                ("ddg", 2, "fp16"),
                ("fr", 2, "fp16"),
                ("fr", 3, "bf16"),
                ("backprop", 3, "bf16"),
                ("dgl", 1, "fp32"),
                ("ddg", 1, "fp32"),
                ("backprop", 1, "fp32"),
            ]
        ),
    ],
)
def test_equals_one_process_to_the_bit(method, num_splits, precision, image_folder, tmp_path):
    """From the first iteration, resumed after an epoch, beyond a lower learning rate; the next epoch is not resumed."""
    flags = "--data", image_folder, "--precision", precision
    for epochs in (1, 3):
        train(method, num_splits, *flags, "--epochs", epochs, "--resume", "auto", cwd=tmp_path)
    assert_equals_one_process(tmp_path, method, num_splits, *flags, "--epochs", 3)


@pytest.mark.parametrize("method", ["ddg", pytest.param("fr", marks=pytest.mark.slow)])
def test_resumed_before_the_first_gradient(method, image_folder, tmp_path):
    """A pass has one batch, and the first module is two iterations late."""
    flags = "--data", image_folder, "--train-size", 6
    for epochs in (1, 4):
        train(method, 3, *flags, "--epochs", epochs, "--resume", "auto", cwd=tmp_path)
    assert_equals_one_process(tmp_path, method, 3, *flags, "--epochs", 4)


def join(method, num_splits):
    """This rank's module, connected to its neighbours'."""
    args = parallel.argparse.Namespace(method=method, num_splits=num_splits, depth=20, precision="fp32")
    args.bn_init, args.compile = "ones", False
    parallel.machines.join()
    return parallel.Module(args, parallel.make_network(args, 10, torch.device("cpu")), torch.device("cpu"))


def wait_like_cudnn(m):
    """Let module m's first passes on batches of a size wait until all its transfers have arrived. On a GPU, cuDNN's
    search for kernels does, and a transfer occupies the GPU until the other rank takes part in it."""
    searched = set()

    def synchronize(kind, size):
        if (kind, size) not in searched:
            searched.add((kind, size))
            for wire in filter(None, (m.inputs, m.outputs, m.gradients, m.back)):
                wire.flush()
                wire.coming.extend([(None, wire.receive()) for _ in range(len(wire.coming))])

    def after_forward(block, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: synchronize("backward", len(gradient)))

    m.block.register_forward_pre_hook(lambda block, inputs: synchronize("forward", len(inputs[0])))
    m.block.register_forward_hook(after_forward)


@pytest.mark.parametrize("num_splits", [2, 3])
@pytest.mark.parametrize("method", parallel.METHODS)
def test_ranks_that_search_for_kernels_do_not_wait_for_each_other(method, num_splits):
    def work(rank):
        module = join(method, num_splits)
        wait_like_cudnn(module)
        labels = [torch.arange(size) for size in (4, 4, 4, 2)]
        for _ in range(2):
            images = ((torch.randn(len(y), 3, 32, 32), y) for y in labels)
            parallel.train_epoch(method, module, module.receive(labels) if rank else images)
        dist.barrier()

    assert fork_ranks(num_splits, work, types.SimpleNamespace()) == [0] * num_splits


@pytest.mark.parametrize("method", ["dgl", "ddg", "fr"])
def test_all_modules_work_at_the_same_time(method):
    """The first module begins a third batch while nobody receives its outputs. Later, the last module waits, in each
    iteration, until the first one has begun K-1 iterations further."""
    num_splits, steps, patience = 3, 6, datetime.timedelta(seconds=30)

    def work(rank):
        module = join(method, num_splits)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if rank == 0 else None
        ports = [store and store.port]
        dist.broadcast_object_list(ports)
        store = store or dist.TCPStore("127.0.0.1", ports[0])
        labels = [torch.arange(4)] * steps

        def batches():
            if rank:
                store.wait(["begun 2"], patience)
            images = ((torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last), y) for y in labels)
            for i, batch in enumerate(module.receive(labels) if rank else images):
                if rank == 0:
                    store.set(f"begun {i}", "")
                if module.n == num_splits - 1:
                    further = min(i + num_splits - 1, steps - 1)
                    store.wait([f"begun {further}"], patience)
                yield batch

        parallel.train_epoch(method, module, batches())
        dist.barrier()

    assert fork_ranks(num_splits, work, types.SimpleNamespace()) == [0] * num_splits


def test_mistakes(tmp_path, monkeypatch):
    needs = "3 processes: start with torchrun --standalone --nproc_per_node=3 parallel.py"
    for size in (None, 2, 4):
        if size:
            monkeypatch.setenv("RANK", "0")
            monkeypatch.setenv("WORLD_SIZE", str(size))
        refused(run(SCRIPT, "--num_splits", 3, cwd=tmp_path), needs)
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(run(SCRIPT, "--depth", 21, cwd=tmp_path), "--depth 21 is not 6n+2")
    refused(run(SCRIPT, "--num_splits", 40, cwd=tmp_path), "the largest possible is")
    refused(run(SCRIPT, "--method", "backprop", "--precision", "fp16", cwd=tmp_path), "bf16")
    refused(run(SCRIPT, "--method", "ddg", "--bn-init", "uniform", cwd=tmp_path), "--bn-init has no effect")
    refused(run(SCRIPT, "--method", "dni", cwd=tmp_path), "dni")
    assert not list(tmp_path.iterdir())


def test_help(tmp_path, monkeypatch):
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        status, text, _ = run(SCRIPT, "--help", cwd=tmp_path)
        assert (status, "--nproc_per_node=2" in text) == (0, rank == 0)


# Faults, under torchrun

INJECT = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
faults = sys.argv.pop(1).split()  # for each start of the job KIND@RANK
import parallel
kind, _, rank = faults[int(os.environ["TORCHELASTIC_RESTART_COUNT"])].partition("@")
train_epoch, passes = parallel.train_epoch, 0

def disturbed(method, module, batches):
    global passes
    passes += 1
    def some():
        for i, (x, labels) in enumerate(batches):
            if i == 2 and passes == 2 and os.environ["RANK"] == rank:
                if kind == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if kind == "interrupt":
                    os.kill(os.getppid(), signal.SIGINT)
                x = x.detach() * float("nan")
            yield x.requires_grad_(module.back is not None), labels
    train_epoch(method, module, some())

parallel.train_epoch = disturbed
parallel.main()
"""


def disturbed(faults, method, *flags, cwd, restarts=0):
    (cwd / "disturbed.py").write_text(INJECT)
    command = ["disturbed.py", ROOT / "ddg_comparisons", faults, *SMALL, "--method", method, *flags]
    return conftest.torchrun(*command, cwd=cwd, restarts=restarts, timeout=120)


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_restarts_go_on(image_folder, tmp_path):
    flags = "--data", image_folder, "--epochs", 3
    done = disturbed("kill@1", "ddg", *flags, cwd=tmp_path)
    assert done.returncode != 0
    assert re.search(r"Root Cause.*rank *: 1 .*Signal 9", done.stderr, re.DOTALL)
    assert "lost the connection" not in done.stderr
    assert checkpoint_of(tmp_path)["epoch"] == 1
    done = disturbed("kill@0 none", "ddg", *flags, "--resume", "auto", cwd=tmp_path, restarts=1)
    assert done.returncode == 0, done.stderr
    assert_equals_one_process(tmp_path, "ddg", 2, *flags)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "n"), [("dgl", 1), ("fr", 2)])
def test_not_a_number_is_said_once(method, n, image_folder, tmp_path):
    done = disturbed("nan@0", method, "--data", image_folder, "--epochs", 3, cwd=tmp_path)
    assert done.returncode != 0
    said = f"Epoch 2, module {n}: the loss is nan; the last checkpoint: ddg_comparisons-parallel.pt"
    assert done.stderr.count(said) == done.stderr.count("the loss is") == 1
    assert "lost the connection" not in done.stderr


@pytest.mark.slow
def test_ctrl_c_ends_the_job(image_folder, tmp_path):
    done = disturbed("interrupt@0", "ddg", "--data", image_folder, "--epochs", 9, cwd=tmp_path)
    assert done.returncode != 0
    said = "Interrupted; go on from the last finished epoch with --resume ddg_comparisons-parallel.pt"
    assert done.stderr.count(said) == done.stderr.count("Interrupted") == 1


@pytest.mark.slow
def test_a_wrong_number_of_processes_is_said_once(tmp_path):
    done = conftest.torchrun(ROOT / SCRIPT, cwd=tmp_path, size=3)
    assert done.stderr.count("error: --num_splits 2") == 1
    assert re.search(r"rank *: 0 .*\n *exitcode *: 2 ", done.stderr)


# benchmark.py


@pytest.mark.slow
def test_benchmark(tmp_path):
    tiny = ["--depth", 8, "--batch-size", 4, "--steps", 2, "--rounds", 2, "--no-cuda"]
    table = r"^\| {} \| {} \| \d+\.\d \| \d+\.\d to \d+\.\d \| \d+\.\d\d \| \d+, \d+ \|$"
    links = [] if load("ddg_comparisons", "links").why_not() else ["none", "100mbit"]
    done = python(ROOT / "ddg_comparisons/benchmark.py", *tiny, *(["--link", *links] * bool(links)), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000
    for link in links or ["none"]:
        for method in ONE_PROCESS:
            assert len(re.findall(table.format(link, method), done.stdout, re.MULTILINE)) == 1
    for flags, message in [
        (["--depth", 9], "--depth 9 is not 6n+2"),
        (["--link", "fast"], "'fast' is not a rate"),
        (["--picture", "nowhere/x.png"], "there is no such folder"),
    ]:
        done = python(ROOT / "ddg_comparisons/benchmark.py", *tiny, *flags, cwd=tmp_path)
        refused((done.returncode, done.stdout, done.stderr), message)
