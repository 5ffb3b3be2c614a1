"""cifar_async.py on real processes: what it logs, what it computes, and what happens when a process fails."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, load, run

FOLDER = ROOT / "buffer_experiments"
NETWORK = ["--ncnn", 3, "--feature_size", 4, "--down", "[1]", "--mlp", 1]
QUICK = ["--data", "digits", "--train-size", 40, "--batch_size", 10, *NETWORK, "--seed", 0]
LINE = re.compile(r"n: (\d+), epoch (\d+),epochtrue (\d+), train (\S+), test (\S+),ense (\S+)")
WORKER = re.compile(r"worker (\d+), (all epochs|epoch \d+), steps/s: ([\d.]+)(.*)")

# Lets a rank fail at an update of its meter: the one of this number or, if `when` is a checkpoint, the fifth (of epoch
# 2), once the checkpoint is there. If it is rank 0, the others are late: they have not accepted all their connections
# when it happens.
FAULTY = """
import os, time
import transport, utils
def arrange(rank, when, what):
    update, accept, here, count = utils.Meter.update, transport.Team.accept, int(os.environ["RANK"]), 0
    def faulty(meter, loss, *arguments):
        nonlocal count
        count += 1
        if rank == here and count == (when if isinstance(when, int) else 5):
            while isinstance(when, str) and not os.path.exists(when):
                time.sleep(0.01)
            with open(os.environ.get("FAULT", "fault") + ".time", "w") as file:
                file.write(str(time.time()))
            if what == "nan":
                loss = loss * float("nan")
            elif what == "error":
                raise ValueError("no such pixel")
            elif what == "interrupt":
                os.kill(os.getppid(), 2)
            else:
                os.kill(os.getpid(), 9)
        update(meter, loss, *arguments)
    utils.Meter.update = faulty
    if rank == 0 != here:
        transport.Team.accept = lambda *arguments: time.sleep(1) or accept(*arguments)
"""

# Runs cifar_async.py several times in the same processes, as if it was restarted. A run may lose messages
# between modules, or delay them. One with a fault has processes of its own, and nobody ends them but they themselves.
SEVERAL = """
import json, os, random, sys, threading, time
folder, runs, rank = sys.argv[1], json.loads(sys.argv[2]), os.environ["RANK"]
sys.path.insert(0, folder)
import cifar_async, faulty, transport
send = transport.send
for flags, lose, delay, name, fault in runs:
    def unreliable(connection, content, tensors=()):
        if content is None:
            if random.random() < lose:
                return 1
            time.sleep(delay * random.random())
        return send(connection, content, tensors)
    transport.send = unreliable
    if not fault:
        cifar_async.main(flags)
        names = {thread.name for thread in threading.enumerate()}
        assert names <= {"MainThread", "tqdm_monitor"}, names
    elif child := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        open(f"{name}_{rank}.json", "w").write(json.dumps([status, time.time()]))
    else:
        os.environ["FAULT"] = name
        os.dup2(os.open(f"{name}_{rank}.err", os.O_CREAT | os.O_WRONLY), 2)
        faulty.arrange(*fault)
        cifar_async.main(flags)
        os._exit(0)
"""

# Runs cifar_async.py; the n-th attempt of torchrun has the fault faults[n].
ATTEMPTS = """
import json, os, runpy, sys
faults, script, attempt = json.loads(sys.argv[1]), sys.argv[2], int(os.environ["TORCHELASTIC_RESTART_COUNT"])
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(script))
import faulty
if attempt < len(faults):
    faulty.arrange(*faults[attempt])
runpy.run_path(script, run_name="__main__")
"""


def torchrun(size, *command, cwd, restarts=0):
    """(exit status, stdout, stderr) of a command of Python's on `size` processes, none of which is left behind."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
    command = [*launcher, f"--max-restarts={restarts}", *map(str, command)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TEST_ASYNC": str(cwd)}
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    try:
        out, err = process.communicate(timeout=300)
    finally:
        left = [pid for pid in processes_of(cwd) if pid != process.pid]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        process.kill()
    assert not left, err
    return process.returncode, out, err


def attempts(faults, *flags, cwd, restarts=0):
    """`torchrun` of cifar_async.py, with a fault in each of the first attempts."""
    (cwd / "faulty.py").write_text(FAULTY)
    (cwd / "attempts.py").write_text(ATTEMPTS)
    command = ["attempts.py", json.dumps(faults), FOLDER / "cifar_async.py", *QUICK, *flags]
    return torchrun(3, *command, cwd=cwd, restarts=restarts)


def processes_of(cwd):
    """The processes that `torchrun` has started for this folder and that are still there."""
    mark, found = f"TEST_ASYNC={cwd}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


def log_of(folder):
    (log,) = folder.glob("*.log")
    return log.read_text().splitlines()


def matches(pattern, folder):
    return [match.groups() for match in map(pattern.fullmatch, log_of(folder)) if match]


def rates(folder):
    """Steps per second of each worker in the whole run."""
    return [float(rate) for _, when, rate, _ in matches(WORKER, folder) if when == "all epochs"]


def checkpoint_of(folder):
    (checkpoint,) = folder.glob("*.pt")
    return torch.load(checkpoint, weights_only=True)


def one_process(*flags):
    """The weights after synchronous DGL (Algorithm 1) in one process."""
    script = load("buffer_experiments", "cifar_async")
    utils, args = script.utils, script.parse_args([str(flag) for flag in (*QUICK, *flags)])
    device = utils.setup(args)
    data = utils.load_data(args, device, drop_last=True)
    model = utils.prepare(script.make_network(args, data.num_classes, args.block_size), args, device)
    modules = [*zip(model.blocks, model.auxiliary_nets)]
    for epoch in range(args.epochs):
        if epoch % args.epochdecay == 0:
            optimizers = [utils.sgd(parts, args.lr / 5 ** (epoch // args.epochdecay), 5e-4) for parts in modules]
        for x, labels in data.train:
            for n, optimizer in enumerate(optimizers):
                logits, representation = model(x, n)
                optimizer.zero_grad()
                F.cross_entropy(logits, labels).backward()
                optimizer.step()
                x = representation.detach()
    return model.state_dict()


def assert_same(weights, others):
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


SYNC = ["--sync", "--nepochs", 4, "--epochdecay", 3]
BLOCKS = ["--ncnn", 5, "--block_size", 2]  # two layers a module, and one in the last
SLEEP = ["--idle", "--pace", 0.05, "--train-size", 200, "--nepochs", 2]  # 40 steps
SLOW = ["--slow-layer", 1, "--slowdown", 2]
RUNS = {  # name: (flags, share of messages lost, seconds by which they are delayed)
    "async": (["--buffer", 5, "--nepochs", 3], 0, 0),
    "quantize": (["--buffer", 5, "--nepochs", 3, "--quantize", "2,16", "--max-buffer-reuse", 2], 0, 0),
    "unreliable": (["--buffer", 3, "--nepochs", 8], 0.5, 0.5),
    "sync": ([*SYNC, "--buffer", 2], 0, 0.05),
    "blocks": (["--buffer", 5, "--nepochs", 3, *BLOCKS], 0, 0),
    "sync_blocks": ([*SYNC, "--buffer", 2, *BLOCKS], 0, 0),
    "paced": (["--buffer", 5, "--nepochs", 5, "--pace", 0.1, *SLOW], 0, 0),
    "even": (["--buffer", 5, *SLEEP], 0, 0),
    "slow": (["--buffer", 5, *SLEEP, *SLOW], 0, 0),
    "dragged": (["--sync", *SLEEP, *SLOW], 0, 0),
}
for i, size in enumerate((0, 1, 1, 1, 2, 3, 10, 100)):  # none may hang, whichever module is first or last to finish
    flags = ["--buffer", size, "--nepochs", 2, "--slow-layer", i % 3, "--slowdown", 1 + i % 4]
    RUNS[f"short{i}"] = ([*flags, *(["--max-buffer-reuse", 1] if i % 2 else []), *(["--sync"] if i > 5 else [])], 0, 0)
FAULTS = [(2, 7, "kill"), (1, 3, "nan"), (2, 3, "error"), (0, 3, "kill"), (1, 3, "kill")]  # one after the other
KILLED = [(rank, f"killed{rank}/cifar_async.pt", "kill") for rank in range(3)]  # asynchronous


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs' output, each in the folder of its name."""
    folder = tmp_path_factory.mktemp("async")
    resumed = [*SYNC, "--buffer", 2, "--resume", "auto", "--save_folder", "faults"]
    runs = [(resumed, 0, 0, f"fault{i}", fault) for i, fault in enumerate(FAULTS)]
    for i, fault in enumerate(KILLED):
        runs.append((["--buffer", 5, "--nepochs", 1000, "--save_folder", f"killed{i}"], 0, 0, f"killed{i}", fault))
    runs.append((resumed, 0, 0, None, None))
    runs += [([*flags, "--save_folder", name], *chances, None, None) for name, (flags, *chances) in RUNS.items()]
    runs = [([str(flag) for flag in (*QUICK, *flags)], *rest) for flags, *rest in runs]
    (folder / "faulty.py").write_text(FAULTY)
    (folder / "several.py").write_text(SEVERAL)
    status, _, err = torchrun(3, "several.py", FOLDER, json.dumps(runs), cwd=folder)
    assert status == 0, err[:6000]
    return folder


@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("even", "slow", "dragged")])
def test_every_module_is_logged_at_every_epoch(folder, name):
    flags = dict(zip(RUNS[name][0], RUNS[name][0][1:]))
    lines = matches(LINE, folder / name)
    epochs = range(1, flags["--nepochs"] + 1)
    assert [(int(n), int(epoch)) for n, epoch, *_ in lines] == [(n, epoch) for epoch in epochs for n in range(3)]
    assert all(int(epoch) <= int(true) <= len(epochs) for _, epoch, true, *_ in lines)
    assert all(0 <= float(top1) <= 100 for line in lines for top1 in line[3:])
    assert all(test == ense for n, *_, test, ense in lines if n == "0")
    assert {int(n) for n, when, *_ in matches(WORKER, folder / name) if when == "all epochs"} == {0, 1, 2}
    assert checkpoint_of(folder / name)["epoch"] == len(epochs)


@pytest.mark.parametrize(("name", "flags"), [("sync", SYNC), ("sync_blocks", [*SYNC, *BLOCKS])])
def test_sync_is_synchronous_dgl_to_the_bit(name, flags, folder):
    assert_same(checkpoint_of(folder / name)["parts"]["model"], one_process(*flags))
    lines = matches(WORKER, folder / name)
    assert all("reuse: 1.000, staleness: 0.000, never used: 0" in rest for n, _, _, rest in lines if n != "0")
    assert all("dropped: 0" in rest for n, _, _, rest in lines if n != "2")


def test_a_slow_worker_slows_nobody_down_unless_synchronous(folder):
    """Workers that sleep for 0.05 s a step, the second for 0.1 s."""
    even, slow = rates(folder / "even"), rates(folder / "slow")
    assert even == pytest.approx([20] * 3, rel=0.1)
    assert all(slow[n] >= 0.95 * even[n] for n in (0, 2))
    assert slow[1] == pytest.approx(10, rel=0.1)
    assert max(rates(folder / "dragged")) < 12


def test_a_pace_decides_how_fast_the_workers_are(folder):
    assert rates(folder / "paced") == pytest.approx([10, 5, 10], rel=0.15)


def test_compression_is_counted_from_the_bytes_sent_and_stored(folder):
    lines = log_of(folder / "quantize")
    (stored,) = (line for line in lines if line.startswith("buffers: "))
    pixels = 10 * 32 * 32  # of a batch; each in 2 bytes instead of 16
    assert stored.startswith("buffers: 2 of 5 batches, ")
    assert 6 < float(re.search(r"([\d.]+) times fewer", stored)[1]) < 8
    for n, _, _, rest in matches(WORKER, folder / "quantize"):
        if n != "2":
            sent, factor, size = re.search(r"sent: (\d+), .*compression: (\S+) \((\S+) bytes\)", rest).groups()
            message = int(size.replace(",", "")) / int(sent)
            assert 0 < message - pixels * 2 - 10 * 8 - 4 * 2 * 16 * 2 < 300  # indices, labels, codebook, header
            assert float(factor) == pytest.approx((pixels * 16 + 80) / message, rel=0.01)
            assert 0 < float(re.search(r"relative MSE: (\S+)", rest)[1]) < 1


def reasons(folder, name):
    """What the processes of a run with a fault said about it, after a check that it has ended as it should."""
    ends = [json.loads((folder / f"{name}_{rank}.json").read_text()) for rank in range(3)]
    assert all(status for status, _ in ends), ends
    assert max(end for _, end in ends) - float((folder / f"{name}.time").read_text()) < 60
    said = "".join((folder / f"{name}_{rank}.err").read_text() for rank in range(3))
    return re.findall(r"^(?:Rank|Epoch) .*", said, re.M), said


def test_every_fault_ends_the_job_with_its_reason_and_the_next_attempt_goes_on(folder):
    """Killed, failed, not finite: five times; the sixth attempt's weights are those of a run without faults."""
    last = "; the last checkpoint: faults/cifar_async.pt"
    for i, reason in enumerate(
        [
            rf"Rank 2 died{last}",
            rf"Epoch \d, module 1 on rank 1: the loss is nan{last}",
            rf"Rank 2 failed: ValueError: no such pixel{last}",
            r"Rank 0 died: rank 1 ends too\nRank 0 died: rank 2 ends too",
            rf"Rank 1 died{last}",
        ]
    ):
        lines, said = reasons(folder, f"fault{i}")
        assert re.fullmatch(reason, "\n".join(lines)), said
        assert ("Traceback" in said) == ("ValueError" in reason)
    assert_same(checkpoint_of(folder / "faults")["parts"]["model"], one_process(*SYNC))
    assert len(matches(LINE, folder / "faults")) == 12


@pytest.mark.parametrize("rank", range(3))
def test_a_killed_worker_ends_the_job(folder, rank):
    lines, said = reasons(folder, f"killed{rank}")
    assert "Traceback" not in said
    if rank:
        assert lines == [f"Rank {rank} died; the last checkpoint: killed{rank}/cifar_async.pt"]
    else:
        assert lines == ["Rank 0 died: rank 1 ends too", "Rank 0 died: rank 2 ends too"]
    assert checkpoint_of(folder / f"killed{rank}")["epoch"] > 0


def test_torchrun_goes_on_by_itself(tmp_path):
    flags = ["--buffer", 5, "--nepochs", 20, "--resume", "auto"]
    status, _, err = attempts([(1, "cifar_async.pt", "kill")], *flags, cwd=tmp_path, restarts=1)
    assert status == 0, err
    assert len(re.findall(r"^Rank 1 died; the last checkpoint: ", err, re.M)) == 1, err
    assert [int(epoch) for n, epoch, *_ in matches(LINE, tmp_path) if n == "2"] == [*range(1, 21)]


def test_ctrl_c_ends_the_job_with_one_line(tmp_path):
    fault = 2, "cifar_async.pt", "interrupt"
    status, _, err = attempts([fault], "--buffer", 5, "--nepochs", 1000, cwd=tmp_path)
    assert status
    assert len(re.findall(r"^Interrupted.*", err, re.M)) == 1, err
    assert "died" not in err
    assert "failed:" not in err
    checkpoint_of(tmp_path)


def test_a_mistake_is_said_once_and_its_status_is_2(tmp_path):
    status, _, err = torchrun(2, FOLDER / "cifar_async.py", *QUICK, cwd=tmp_path)
    assert status
    lines = [line for line in err.splitlines() if line.startswith("cifar_async.py: error: ")]
    assert len(lines) == 1
    assert "3 layers in modules of 1 need 3 processes, not 2: start with `torchrun --standalone --nproc" in lines[0]
    assert re.search(r"rank +: 0 .*\n +exitcode +: 2 ", err)
    assert not [*tmp_path.iterdir()]
    script = "buffer_experiments/cifar_async.py"
    for flags, part in [
        ([], "need 3 processes, not 1: start with `torchrun --standalone --nproc_per_node=3 cifar_async.py ...`"),
        (["--slow-layer", 3], "--slow-layer 3"),
        (["--slowdown", 0.5], "at least 1"),
        (["--pace", -1], "at least 0"),
        (["--idle"], "--pace"),
        (["--quantize", "3,4"], "cannot be cut into 3 groups"),
    ]:
        status, _, err = run(script, *QUICK, *flags, cwd=tmp_path)
        assert (status, err.count("\n")) == (2, 1)
        assert part in err
    assert run(script, "--help", cwd=tmp_path)[0] == 0


def test_one_process_trains_a_network_of_one_module(tmp_path):
    flags = ["--block_size", 3, "--nepochs", 2]
    status, _, err = run("buffer_experiments/cifar_async.py", *QUICK, *flags, cwd=tmp_path)
    assert status == 0, err
    assert_same(checkpoint_of(tmp_path)["parts"]["model"], one_process(*flags))
