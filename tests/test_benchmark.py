"""imagenet_dgl/benchmark.py, the ways that it compares, its slow links, and the schedule that predicts them."""

import argparse
import itertools
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, load, python, refused, run
from forked_ranks import fork_ranks
from torch import nn

benchmark = load("imagenet_dgl", "benchmark")
links, ranks, schedule, ways = (sys.modules[name] for name in ("links", "ranks", "schedule", "ways"))
module_parallel = sys.modules["module_parallel"]

# The computed schedule


@pytest.mark.parametrize(
    ("forward", "backward", "transfer", "overhead", "expected"),
    [
        ([1, 1, 1], [2, 2, 2], [0, 0], None, 3),
        ([1, 2, 1], [2, 5, 2], [1, 1], None, 7),  # the heaviest module bounds it
        ([1, 1, 1], [2, 2, 2], [1, 8], None, 8),  # the link does
        ([1, 1, 1], [2, 2, 2], [1, 1], [1, 2, 1], 5),  # the middle module's core both receives and sends
        ([4], [5], [], None, 9),
    ],
)
def test_schedule_of_module_parallel_dgl(forward, backward, transfer, overhead, expected):
    assert schedule.module_parallel(forward, backward, transfer, overhead) == pytest.approx(expected)


def test_the_pipeline_fills_first():
    """By hand: module 1 has the first batch at 1 + 4, and is done with it at 5 + 3, with the second at 9 + 3."""
    assert schedule.module_parallel([1, 1], [2, 2], [4], batches=1) == pytest.approx(8)
    assert schedule.module_parallel([1, 1], [2, 2], [4], batches=2) == pytest.approx(12 / 2)


@pytest.mark.parametrize("order", [schedule.gpipe, schedule.one_f_one_b])
def test_schedules_of_backprop(order):
    """Equal stages without transfer: (m + K - 1) / m of a stage's time; one stage: no bubble."""
    assert schedule.pipeline(order, [1] * 4, [2] * 4, [0] * 3, 8) == pytest.approx(3 * (8 + 4 - 1) / 8)
    assert schedule.pipeline(order, [1], [2], [], 8) == pytest.approx(3)
    # By hand: of two microbatches stage 1 has the last output at 1.5 and the last gradient at 4, stage 0 that at 4.5
    assert schedule.pipeline(order, [1, 1], [2, 2], [1], 2) == pytest.approx(5.5)


def test_a_module_sends_fewer_bytes_in_a_lower_precision():
    pairs = [(block, nn.Sequential(nn.Flatten(), nn.Linear(256, 5))) for block in (nn.Conv2d(3, 4, 3), nn.Identity())]
    images, labels = torch.randn(6, 3, 10, 10), torch.arange(6) % 5
    sent = {
        precision: schedule.measure(pairs, images, labels, 1, precision)["sent"]
        for precision in module_parallel.PRECISIONS
    }
    values, labels = 6 * 4 * 8 * 8, 8 * 6
    assert sent == {"fp32": [4 * values + labels], "bf16": [2 * values + labels], "int8": [values + 8 * 6 + labels]}


# The ways


def plain_network(args):
    """Without BatchNorm, so that shares and microbatches of a batch change nothing. Five layers with parameters."""
    torch.manual_seed(0)
    widths = [3, 4, 6, 6, 8]
    layers = [[nn.Conv2d(*pair, 3, padding=1), nn.ReLU(inplace=True)] for pair in itertools.pairwise(widths)]
    return nn.Sequential(*itertools.chain(*layers), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))


def arguments():
    args = argparse.Namespace(arch="cnn4", batch_size=8, image_size=16, cuda=False)
    vars(args).update(balance=["flops"], send_precision=["fp32"])
    return args


def on_ranks(function, count=2):
    """function(Rank) on each of `count` ranks."""

    def begin(rank):
        dist.init_process_group("gloo")
        function(ways.Rank(arguments(), count, rank))
        dist.destroy_process_group()

    assert fork_ranks(count, begin, ranks) == [0] * count


def is_pipeline(way):
    return any(name in way for name in ("GPipe", "1F1B", "zero bubble"))


def test_all_ways_of_backprop_end_with_the_same_weights(monkeypatch):
    """Two steps; the gradients of the second one have gone through all stages with the new weights."""
    monkeypatch.setattr(ways, "make_network", plain_network)

    def work(here):
        if here.rank == 0:
            train, network = here.backprop()
            train(2)
            expected = [p.detach() for p in network.parameters()]
        compared = 0
        for way, make in ways.all_ways(here.args).items():
            if not way.startswith("backprop"):
                continue
            train, network = make(here, microbatches=4) if is_pipeline(way) else make(here)
            if train:
                train(2)
            parts = network if is_pipeline(way) else {"0": network} if train else {}
            found = {
                int(n): [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in part.parameters()]
                for n, part in parts.items()
            }
            everyones = [None] * here.num_modules
            dist.all_gather_object(everyones, found)
            if here.rank == 0:
                if "DDP" not in way and "FSDP" not in way:
                    everyones = [dict(sorted(itertools.chain(*(f.items() for f in everyones))))]
                for found in everyones:
                    values = [*itertools.chain(*found.values())]
                    assert len(values) == len(expected), way
                    for value, right in zip(values, expected):
                        torch.testing.assert_close(value, right, atol=1e-6, rtol=1e-5)
                    compared += 1
        assert here.rank or compared == 10  # eight ways, two of them with all weights on both ranks

    on_ranks(work)


def test_checkpointing_changes_nothing():
    """To the bit, the running statistics of BatchNorm included, although each batch goes through it twice."""

    def work(here):
        ends = []
        for make in (here.backprop, here.checkpointed):
            train, network = make()
            if train:
                train(3)
                ends.append(list(network.state_dict().values()))
        if ends:
            assert len(ends[0]) == len(ends[1]) > 20
            assert all(torch.equal(a, b) for a, b in zip(*ends))

    on_ranks(work)


def test_all_ranks_cut_by_time_alike(monkeypatch):
    """Although each would find times of its own."""
    decouple, asked = ways.models.decouple, []

    def decouple_here(*args, timer=None, cuts=None, **nets):
        asked.append((timer is not None, cuts))
        model = decouple(*args[:4], **nets)
        model.cuts = ["rank 0's"]
        return model

    monkeypatch.setattr(ways.models, "decouple", decouple_here)

    def work(here):
        here.modules("time")
        here.modules("time")
        times = [(False, ["rank 0's"])] * 2
        assert asked == [(False, None), *([] if here.rank else [(True, None)]), *times]

    on_ranks(work)


# The benchmark


NAMES = [
    *["DGL, one process", "DGL, one process, balanced for memory", "backprop, one process"],
    *["backprop, one process, checkpointed", "DGL, module-parallel", "DGL, module-parallel, int8", "backprop, DDP"],
    *["backprop, FSDP", r"backprop, GPipe \(\d microbatches\)", r"backprop, 1F1B \(\d microbatches\)"],
    *[r"backprop, interleaved 1F1B \(\d microbatches\)", r"backprop, zero bubble \(\d microbatches\)"],
    "DGL, heaviest module",
]
SMALL = ["-b", 16, "--steps", 1, "--rounds", 1, "--microbatches", 2, 4]


@pytest.mark.slow
def test_benchmark(tmp_path):
    done = python(ROOT / "imagenet_dgl/benchmark.py", *SMALL, "--send-precision", "fp32", "int8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    number = r"\d+(\.\d+)?"
    for way in NAMES:
        row = rf"^\| 2 \|  \| {way} \| {number} \| {number} to {number} \| {number} \| (.*) \| ([\d, ]*) \|$"
        found = re.search(row, done.stdout, re.MULTILINE)
        assert found, (way, done.stdout)
        assert bool(re.search(r"[+-]\d+\.\d %", found[0])) == ("module-parallel" in way)
        ranks = 0 if "heaviest" in way else 1 if "one process" in way else 2
        assert len(re.findall(r"\d+", found[0].split("|")[-2])) == ranks
    assert (tmp_path / "benchmark.png").stat().st_size > 5000


def test_peak_memory_is_what_training_needs(monkeypatch):
    """Of a network that is mostly one weight of 16 MiB: that, its gradient and its momentum; not of building it."""
    monkeypatch.setattr(ways, "make_network", lambda args: nn.Sequential(nn.Flatten(), nn.Linear(768, 5461)))

    def make(here):
        torch.ones(2**26).sum()
        return here.backprop()

    def work(here):
        bench = benchmark.Bench.__new__(benchmark.Bench)
        bench.args, bench.here = here.args, here
        train, peak = bench.built(make)
        assert here.rank or 3 * 16 < peak / 2**20 < 3.2 * 16
        assert (train is None) == (peak == 0) == bool(here.rank)

    on_ranks(work)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--link", "fast"], "'fast' is not a rate such as 10gbit, 1gbit or 100mbit"),
        (["-b", 10, "--num-modules", 3], "--batch-size 10 cannot be shared out"),
        (["--ways", "DPP"], "no way has any of ['DPP'] in its name; they are: DGL, one process, "),
        (["--num-modules", 8], "can be cut into 1 to 4 modules, not 8"),
        (["--arch", "resnet19"], "no architecture 'resnet19': did you mean resnet"),
    ],
)
def test_benchmark_refuses(flags, said, tmp_path):
    refused(run("imagenet_dgl/benchmark.py", *flags, cwd=tmp_path), said)


# Slow links


needs_links = pytest.mark.skipif(links.why_not() is not None, reason=f"no shaped links here: {links.why_not()}")


def test_links_that_are_not_permitted_are_named(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert links.why_not() == "there is no command unshare"


@needs_links
@pytest.mark.parametrize("count", [2, 3])
def test_a_link_has_its_rate(count, tmp_path):
    """In both directions at once, over a switch; and nothing is left of the namespaces."""
    before = subprocess.check_output(["ip", "link"])

    def begin(rank):
        store = dist.FileStore(str(tmp_path / "store"), count)
        links.join(store, rank, count)
        links.limit("200mbit")
        dist.init_process_group("gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=count)
        message, received = torch.zeros(2, 2_500_000, dtype=torch.uint8)
        seconds = []
        for _ in range(5):  # the first one opens connections; other work on the machine makes some slower
            dist.barrier()
            begin = time.perf_counter()
            # The receive first: on one connection, Gloo would tell of it behind the whole message
            works = dist.irecv(received, (rank - 1) % count), dist.isend(message, (rank + 1) % count)
            for work in works:
                work.wait()
            dist.barrier()
            seconds.append(time.perf_counter() - begin)
        assert 0.09 < min(seconds[1:]) < 0.15  # 20 Mbit, of which the bucket passes 1 at once
        dist.destroy_process_group()

    assert fork_ranks(count, begin, ranks) == [0] * count
    assert subprocess.check_output(["ip", "link"]) == before


@needs_links
@pytest.mark.parametrize(("rate", "precision"), [(50, "fp32"), (40, "fp32"), (40, "int8")])
def test_the_schedule_predicts_a_slow_link(rate, precision, tmp_path):
    """Modules that sleep instead of computing, so that other work on the machine disturbs little."""
    forward, backward, steps = [0.02, 0.03], [0.05, 0.04], 8
    representation, labels = torch.randn(4, 30_000).relu(), torch.arange(4)  # 0.48 MB: 77 and 96 ms

    def begin(rank):
        store = dist.FileStore(str(tmp_path / "store"), 2)
        links.join(store, rank, 2)
        links.limit(f"{rate}mbit")
        dist.init_process_group("gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=2)
        pipeline = module_parallel.ModuleParallel(2, torch.device("cpu"), 4, send_precision=precision)
        measured = []
        for _ in range(5):  # the first one opens connections
            dist.barrier()
            begin = time.perf_counter()
            batches = itertools.repeat((representation, labels), steps)
            for x, y in batches if rank == 0 else pipeline.receive(steps):
                time.sleep(forward[rank])
                pipeline.send(x, y)
                time.sleep(backward[rank])
            pipeline.end_pass(steps)
            dist.barrier()
            measured.append((time.perf_counter() - begin) / steps)
        transfer = schedule.message_bytes(representation, labels, precision) / (rate * 1e6 / 8)
        predicted = schedule.module_parallel(forward, backward, [transfer], batches=steps)
        assert predicted == pytest.approx(min(measured[1:]), rel=0.1)
        dist.destroy_process_group()

    assert fork_ranks(2, begin, ranks) == [0] * 2


@pytest.mark.slow
@needs_links
def test_benchmark_over_links(tmp_path):
    flags = ["--link", "50mbit", "--ways", "module-parallel", "DDP", "1F1B"]
    done = python(ROOT / "imagenet_dgl/benchmark.py", *SMALL, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| 2 \| 50mbit \| (.*?) \| .*", done.stdout, re.MULTILINE)
    assert [re.sub(" .. micro.*", "", row) for row in rows] == [
        *["DGL, module-parallel", "backprop, DDP", "backprop, 1F1B", "DGL, heaviest module"],
    ]
    (speed,) = re.findall(r"50mbit: DGL.*link of ([\d.]+) Gbit/s", done.stdout)
    assert float(speed) == pytest.approx(0.05, rel=0.1)


def test_mistakes_in_the_flags_of_the_schedule(tmp_path):
    for flags, message in [(["--links", 0], "above 0"), (["--picture", "nowhere/x.png"], "there is no such folder")]:
        refused(run("imagenet_dgl/schedule.py", *flags, cwd=tmp_path), flags[0], message)


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_no_rank_is_left(end, tmp_path):
    command = [sys.executable, ROOT / "imagenet_dgl/benchmark.py", "--ways", "parallel", "--picture", "none.png"]
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}  # torch 2.11's profiler warns
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True, env=quiet
    )
    time.sleep(20)
    assert process.poll() is None
    os.kill(process.pid, end)
    _, err = process.communicate(timeout=30)
    if end == signal.SIGINT:
        assert err == "\nInterrupted.\n"
        assert process.returncode == -signal.SIGINT
    deadline = time.monotonic() + 20
    while alive(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.5)


def alive(folder):
    import psutil

    return [p for p in psutil.process_iter(["cwd"]) if p.info["cwd"] == str(folder)]
