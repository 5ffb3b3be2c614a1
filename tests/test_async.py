"""cifar_async.py on real processes: what it logs, what it computes, and what happens when a process fails."""

import argparse
import json
import re
import statistics
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_same, checkpoint_of, load, log_of, refused, run, torchrun

FOLDER = ROOT / "buffer_experiments"
SCRIPT = "buffer_experiments/cifar_async.py"
CHECKPOINT = "buffer_experiments-cifar_async.pt"
NETWORK = ["--ncnn", 3, "--feature_size", 4, "--down", "[1]", "--mlp", 1]
QUICK = ["--data", "digits", "--train-size", 40, "--batch_size", 10, *NETWORK, "--seed", 0]
LINE = re.compile(r"n: (\d+), epoch (\d+),epochtrue (\d+), train (\S+), test (\S+),ense (\S+)")
WORKER = re.compile(r"worker (\d+), (all epochs|epoch \d+), steps/s: ([\d.]+)(.*)")

# Lets a rank (or, with `all`, every rank) fail at an update of its meter, once this checkpoint is there. If it is rank
# 0, the others are late: they have not begun when it happens.
FAULTY = """
import os, resource, threading, time
import transport, cifar
def arrange(rank, number, what, checkpoint):
    update, scatter, here, count = cifar.Meter.update, transport.Team.scatter, int(os.environ["RANK"]), 0
    def faulty(meter, loss, *arguments):
        nonlocal count
        count += 1
        if rank in (here, "all") and count == number:
            while not os.path.exists(checkpoint):
                time.sleep(0.01)
            time.sleep(0.1)  # until rank 0 knows that it is there
            with open(os.environ.get("FAULT", "fault") + ".time", "w") as file:
                file.write(str(time.time()))
            if what == "nan":
                loss = loss * float("nan")
            elif what == "error":
                raise ValueError("no such pixel")
            elif what == "interrupt torchrun":
                os.kill(os.getppid(), 2)
            elif what == "full disk":  # from now on, no file may be larger than this: a checkpoint is, a log is not
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            elif what == "interrupt twice":
                threading.Timer(0.3, os.kill, (os.getpid(), 2)).start()
                os.kill(os.getpid(), 2)
            else:
                os.kill(os.getpid(), what)
        update(meter, loss, *arguments)
    def late(team, contents):
        received = scatter(team, contents)
        if rank == 0 != here:
            time.sleep(1)
        return received
    cifar.Meter.update, transport.Team.scatter, transport.machines.PATIENCE = faulty, late, 1
"""

# Runs cifar_async.py several times in the same processes, as if it was restarted. Only rank 0 has the flags, as only it
# sees the checkpoint. A run may lose messages between modules, or delay them. One with a fault has processes of its
# own, which nobody but they themselves ends, and whose stdout cannot be written to.
SEVERAL = """
import json, os, random, sys, threading, time
folder, runs, rank = sys.argv[1], json.loads(sys.argv[2]), os.environ["RANK"]
sys.path.insert(0, folder)
import cifar_async, faulty, transport
if rank == "0":
    import sklearn.datasets  # once for all copies of this process
send, stdout, stderr = transport.Team.send, sys.stdout, sys.stderr
for number, (flags, lose, delay, name, fault) in enumerate(runs):
    def unreliable(team, message):
        if message[0] >= 0:  # not the end
            if random.random() < lose:
                return
            time.sleep(delay * random.random())
        send(team, message)
    transport.Team.send, sys.stdout, sys.stderr = unreliable, stdout, stderr
    if rank != "0":
        flags = ["--resume", "only/rank/0/sees/it"]
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
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        if number % 2:
            sys.stdout = None
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


def attempts(faults, *flags, cwd, restarts=0):
    """`torchrun` of cifar_async.py, with a fault in each of the first attempts."""
    (cwd / "faulty.py").write_text(FAULTY)
    (cwd / "attempts.py").write_text(ATTEMPTS)
    command = ["attempts.py", json.dumps(faults), FOLDER / "cifar_async.py", *QUICK, *flags]
    return torchrun(*command, cwd=cwd, size=3, restarts=restarts)


def matches(pattern, folder):
    return [match.groups() for match in map(pattern.fullmatch, log_of(folder)[1:]) if match]


def rates(folder):
    """Steps per second of each worker, in its median epoch: a stall of the machine is in one of them."""
    epochs = {}
    for worker, when, rate, _ in matches(WORKER, folder):
        if when != "all epochs":
            epochs.setdefault(worker, []).append(float(rate))
    return [statistics.median(rates) for _, rates in sorted(epochs.items())]


def one_process(*flags):
    """The weights after synchronous DGL (Algorithm 1) in one process."""
    script = load("buffer_experiments", "cifar_async")
    cifar, utils, args = script.cifar, script.utils, script.parse_args([str(flag) for flag in (*QUICK, *flags)])
    device = utils.setup(args)
    data = cifar.load_data(args, device, drop_last=True)
    model = utils.to_device(script.make_network(args, data.num_classes, args.block_size), args, device)
    modules = [*zip(model.blocks, model.auxiliary_nets)]
    for epoch in range(args.epochs):
        if epoch % args.epochdecay == 0:
            optimizers = [cifar.sgd(parts, args.lr / 5 ** (epoch // args.epochdecay), 5e-4) for parts in modules]
        for x, labels in data.train:
            for n, optimizer in enumerate(optimizers):
                logits, representation = model(x, n)
                optimizer.zero_grad()
                F.cross_entropy(logits, labels).backward()
                optimizer.step()
                x = representation.detach()
    return model.state_dict()


SYNC = ["--sync", "--nepochs", 4, "--epochdecay", 3]
BLOCKS = ["--ncnn", 5, "--block_size", 2]  # two layers a module, and one in the last
SLEEP = ["--idle", "--pace", 0.05, "--train-size", 200, "--nepochs", 3]  # 60 steps
SLOW = ["--slow-layer", 1, "--slowdown", 2]
RUNS = {  # name: (flags, share of messages lost, seconds by which they are delayed)
    "async": (["--buffer", 5, "--nepochs", 3], 0, 0),
    "quantize": (["--buffer", 5, "--nepochs", 3, "--quantize", "2,16", "--max-buffer-reuse", 2], 0, 0),
    "unreliable": (["--buffer", 3, "--nepochs", 8], 0.5, 0.5),
    "learn": (
        [
            *["--buffer", 5, "--max-buffer-reuse", 1, "--train-size", 1000, "--feature_size", 8],
            *["--lr", 0.05, "--nepochs", 4, "--epochdecay", 3],
        ],
        0,
        0,
    ),
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
KILL, INTERRUPT, TERMINATE = 9, 2, 15
FAULTS = [(2, 5, KILL), (1, 3, "nan"), (2, 3, "error"), (0, 3, KILL), (1, 3, KILL)]  # one after the other
ENDED = {f"killed{rank}": (rank, 5, KILL) for rank in range(3)}  # asynchronous; update 5 is in epoch 2
ENDED |= {"interrupted": ("all", 5, "interrupt twice"), "terminated": ("all", 5, TERMINATE)}
ENDED |= {"early": ("all", 1, INTERRUPT), "full": (0, 5, "full disk"), "diverged": (0, 5, "nan")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs' output, each in the folder of its name."""
    folder = tmp_path_factory.mktemp("async")
    resumed = [*SYNC, "--buffer", 2, "--resume", "auto", "--save_folder", "faults"]
    runs = [(resumed, 0, 0, f"fault{i}", (*fault, f"faults/{CHECKPOINT}")) for i, fault in enumerate(FAULTS)]
    for name, fault in ENDED.items():
        fault = *fault, "." if name == "early" else f"{name}/{CHECKPOINT}"
        flags = ["--buffer", 5, "--nepochs", 1000, "--pace", 0.02, "--save_folder", name]
        runs.append((flags, 0, 0, name, fault))
    runs += [([*flags, "--save_folder", name], *chances, None, None) for name, (flags, *chances) in RUNS.items()]
    runs = [([str(flag) for flag in (*QUICK, *flags)], *rest) for flags, *rest in runs]
    runs.append((["--resume", f"faults/{CHECKPOINT}", "--threads", "1"], 0, 0, None, None))
    (folder / "faulty.py").write_text(FAULTY)
    (folder / "several.py").write_text(SEVERAL)
    done = torchrun("several.py", FOLDER, json.dumps(runs), cwd=folder, size=3)
    assert done.returncode == 0, done.stderr[:6000]
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


def test_an_epoch_without_a_codebook_has_no_error():
    script, errors = load("buffer_experiments", "cifar_async"), iter([float("nan"), 0.25, 0.75])
    worker = argparse.Namespace(counts=Counter(), reported=Counter(), quantizer=argparse.Namespace())
    worker.quantizer.pop_error = lambda: next(errors)
    first, *others = (script.Worker.pop_figures(worker) for _ in range(3))
    assert first == {}
    lines = []
    script.log_figures(argparse.Namespace(log=lines.append), "all epochs", [sum(others, Counter(steps=1, seconds=2))])
    assert lines == ["worker 0, all epochs, steps/s: 0.500, relative MSE: 0.5000"]


def test_compression_is_counted_from_the_bytes_sent_and_stored(folder):
    lines = log_of(folder / "quantize")[1:]
    (stored,) = (line for line in lines if line.startswith("buffers: "))
    pixels = 10 * 32 * 32  # of a batch; each in 2 bytes instead of 16
    assert stored.startswith("buffers: 2 of 5 batches, ")
    assert 6 < float(re.search(r"([\d.]+) times fewer", stored)[1]) < 8
    checked = set()
    for n, when, _, rest in matches(WORKER, folder / "quantize"):
        if n != "2" and "sent" in rest:  # on a busy machine, nothing may have left in an epoch of four steps
            checked.add((n, when))
            sent, factor, size = re.search(r"sent: (\d+), .*compression: (\S+) \((\S+) bytes\)", rest).groups()
            message = int(size.replace(",", "")) / int(sent)
            assert 0 < message - pixels * 2 - 10 * 8 - 4 * 2 * 16 * 2 < 300  # indices, labels, codebook, header
            assert float(factor) == pytest.approx((pixels * 16 + 80) / message, rel=0.01)
            assert 0 < float(re.search(r"relative MSE: (\S+)", rest)[1]) < 1
    assert checked >= {("0", "all epochs"), ("1", "all epochs")}


def said(folder, name, fault):
    """What each process of a run with a fault has said, after a check that all have ended as they should.

    Nobody but they themselves ends them here: those that are left say that they have lost a rank. torchrun would end
    them first.
    """
    ends = [json.loads((folder / f"{name}_{rank}.json").read_text()) for rank in range(3)]
    assert all(status for status, _ in ends), ends
    assert max(end for _, end in ends) - float((folder / f"{name}.time").read_text()) < 60
    texts = [(folder / f"{name}_{rank}.err").read_text() for rank in range(3)]
    for rank, text in enumerate(texts):
        if rank != (0 if fault[0] == "all" else fault[0]):
            assert re.fullmatch(rf"(Rank {rank} has lost the connection to another rank: .*\n)?", text), texts
    return texts


def test_every_fault_ends_the_job_with_its_reason_and_the_next_attempt_goes_on(folder):
    """Killed, failed, not finite: five times; the sixth attempt's weights are those of a run without faults."""
    for i, (rank, number, what) in enumerate(FAULTS):
        texts = said(folder, f"fault{i}", (rank, number, what))
        assert "".join(texts[:rank] + texts[rank + 1 :])
        last = f"rank 0's last checkpoint, if any: faults/{CHECKPOINT}"
        reason = {"nan": rf"Epoch \d, module 1 on rank 1: the loss is nan; {last}\n", KILL: ""}
        reason["error"] = r"Traceback (.*\n)+ValueError: no such pixel\n"
        assert re.fullmatch(reason[what], texts[rank])
    assert_same(checkpoint_of(folder / "faults")["parts"]["model"], one_process(*SYNC))
    assert len(matches(LINE, folder / "faults")) == 12


@pytest.mark.parametrize("rank", range(3))
def test_a_killed_worker_ends_the_job(folder, rank):
    assert said(folder, f"killed{rank}", ENDED[f"killed{rank}"])[rank] == ""
    assert checkpoint_of(folder / f"killed{rank}")["epoch"] > 0


@pytest.mark.parametrize("name", ["early", "interrupted", "terminated"])
def test_ctrl_c_and_sigterm_end_the_job_with_one_line(folder, name):
    line = f"Interrupted; go on from the last finished epoch with --resume {name}/{CHECKPOINT}"
    line = "Interrupted before this run finished an epoch." if name == "early" else line
    assert said(folder, name, ENDED[name])[0].strip() == line


def test_what_rank_0_cannot_go_on_from_ends_the_job_with_one_line(folder):
    checkpoint = f"full/{CHECKPOINT}"
    line = f"Cannot write {checkpoint}: [Errno 27] File too large; the last checkpoint: {checkpoint}\n"
    assert said(folder, "full", ENDED["full"])[0] == line
    line = f"Epoch 2, module 0 on rank 0: the loss is nan; the last checkpoint: diverged/{CHECKPOINT}\n"
    assert said(folder, "diverged", ENDED["diverged"])[0] == line


def test_it_learns(folder):
    """A floor that a broken method does not reach: chance is 10 %."""
    assert float(matches(LINE, folder / "learn")[-1][5]) > 40  # the ensemble


@pytest.mark.slow
def test_torchrun_goes_on_by_itself(tmp_path):
    flags = ["--buffer", 5, "--nepochs", 20, "--resume", "auto"]
    done = attempts([(1, 5, KILL, CHECKPOINT)], *flags, cwd=tmp_path, restarts=1)
    assert done.returncode == 0, done.stderr
    assert re.search(r"failed \(exitcode: -9\) local_rank: 1 ", done.stderr), done.stderr
    assert "lost the connection" not in done.stderr
    assert [int(epoch) for n, epoch, *_ in matches(LINE, tmp_path) if n == "2"] == [*range(1, 21)]


@pytest.mark.slow
def test_ctrl_c_under_torchrun_ends_the_job_with_one_line(tmp_path):
    fault = 2, 5, "interrupt torchrun", CHECKPOINT
    done = attempts([fault], "--buffer", 5, "--nepochs", 1000, cwd=tmp_path)
    assert done.returncode
    assert len(re.findall(r"^Interrupted.*", done.stderr, re.M)) == 1, done.stderr
    assert "lost the connection" not in done.stderr
    assert "failed:" not in done.stderr
    checkpoint_of(tmp_path)


@pytest.mark.slow
def test_under_torchrun_a_mistake_is_said_once_and_its_status_is_2(tmp_path):
    done = torchrun(FOLDER / "cifar_async.py", *QUICK, cwd=tmp_path)
    assert done.returncode
    lines = [line for line in done.stderr.splitlines() if line.startswith("cifar_async.py: error: ")]
    assert len(lines) == 1
    assert "3 layers in modules of 1 need 3 processes, not 2: start with `torchrun --standalone --nproc" in lines[0]
    assert re.search(r"rank +: 0 .*\n +exitcode +: 2 ", done.stderr)
    assert not [*tmp_path.iterdir()]


def test_mistakes(tmp_path):
    for flags, part in [
        ([], "need 3 processes, not 1: start with `torchrun --standalone --nproc_per_node=3 cifar_async.py ...`"),
        (["--slow-layer", 3], "--slow-layer 3"),
        (["--slowdown", 0.5], "at least 1"),
        (["--pace", -1], "at least 0"),
        (["--lr", 0], "above 0"),
        (["--idle"], "--pace"),
        (["--quantize", "3,4"], "cannot be cut into 3 groups"),
        (["--seed", 2**32], "below 2147483648"),
    ]:
        refused(run(SCRIPT, *QUICK, *flags, cwd=tmp_path), part)
    refused(run(SCRIPT, *QUICK[:-2], cwd=tmp_path), "--seed is required")
    assert run(SCRIPT, "--help", cwd=tmp_path)[0] == 0


def test_a_resumed_module_that_is_done_feeds_in_eval_mode_as_fast_as_it_trained(monkeypatch):
    script, batch = load("buffer_experiments", "cifar_async"), (torch.randn(10, 4, 32, 32), torch.zeros(10).long())
    args, sent, slept = script.parse_args([*map(str, QUICK)]), [], []
    network = script.make_network(args, 10)
    parts = torch.nn.ModuleList([network.blocks[1], network.auxiliary_nets[1]])

    def worker():
        ends = (
            argparse.Namespace(sample=lambda: batch),
            argparse.Namespace(put=lambda *x: sent.append(x), quantizer=None),
        )
        device = torch.device("cpu")
        return script.Worker(args, 1, parts, network.shapes[1], 4, device, *ends, Counter(), lambda: False)

    trained, resumed = worker(), worker()
    trained.counts.update(steps=2, seconds=1000.0)
    resumed.load_state_dict(trained.state_dict())
    monkeypatch.setattr("time.sleep", slept.append)
    resumed.feed(lambda: len(sent) == 2)
    assert slept == pytest.approx([500, 500], abs=100)
    with torch.no_grad():
        assert torch.equal(sent[1][0], network.blocks[1].eval()(batch[0]))
    assert not resumed.pop_figures()["steps"]


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": 1},
        {"RANK": 2, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 1},
    ],
)
def test_a_job_that_the_environment_describes_only_in_part(environment, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    refused(run(SCRIPT, *QUICK, cwd=tmp_path), "job")
    assert not [*tmp_path.iterdir()]


def test_the_published_optimizer(tmp_path, monkeypatch):
    """As `main` builds it, in each epoch, without the training between."""
    script = load("buffer_experiments", "cifar_async")
    seen, momentum = [], []

    def train_epoch(worker):
        optimizer = worker.optimizer
        (group,) = optimizer.param_groups
        complete = [id(p) for p in group["params"]] == [id(p) for p in worker.parts.parameters()]
        seen.append((complete, type(optimizer), {k: v for k, v in group.items() if k != "params"}))
        for state in optimizer.state.values():
            momentum.append(state["momentum_buffer"].any().item())
            state["momentum_buffer"] += 1  # not to be found in a new optimizer
        worker.meter.update(torch.tensor(1.0), torch.zeros(1, 10), torch.zeros(1, dtype=torch.long))
        worker.epochs += 1

    monkeypatch.setattr("conftest.load", lambda *_: script)
    monkeypatch.setattr(script.Worker, "train_epoch", train_epoch)
    monkeypatch.setattr(script, "evaluate", lambda *_: ([0], [0]))
    status, _, err = run(SCRIPT, *QUICK, "--block_size", 3, "--nepochs", 31, cwd=tmp_path)
    assert status == 0, err
    assert len(seen) == 31
    assert momentum == [epoch % 15 > 0 for epoch in range(31) for _ in range(len(momentum) // 31)]
    for (complete, kind, settings), lr in zip(seen, [0.1] * 15 + [0.1 / 5] * 15 + [0.1 / 25]):
        plain = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr, 0.9, weight_decay=5e-4, fused=True)
        assert complete and kind is torch.optim.SGD
        assert settings == {k: v for k, v in plain.param_groups[0].items() if k != "params"}


def test_one_process_trains_a_network_of_one_module(tmp_path):
    flags = ["--block_size", 3, "--nepochs", 2]
    status, _, err = run(SCRIPT, *QUICK, *flags, cwd=tmp_path)
    assert status == 0, err
    assert_same(checkpoint_of(tmp_path)["parts"]["model"], one_process(*flags))
