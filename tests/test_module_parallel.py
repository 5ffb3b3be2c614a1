"""Module-parallel DGL: equal to one process, asynchronous, and ended by any fault. Ranks are real processes."""

import contextlib
import functools
import itertools
import re
import sys
import time

import conftest
import pytest
import torch
from conftest import ROOT, assert_same, checkpoint_of, copy_tree, epoch_lines, load, run
from forked_ranks import fork_ranks, run_ranks

load("imagenet_dgl", "imagenet_dgl")
data, ranks, training, module_parallel = (sys.modules[n] for n in ("data", "ranks", "training", "module_parallel"))

SCRIPT = "imagenet_dgl/imagenet_dgl.py"
# Four whole batches and one of three images; a network with dropout
SMALL = ["-j", 0, "-b", 6, "--image-size", 32, "--lr", 0.01, "--threads", 1, "--arch", "squeezenet1_1", "-p", 0]


def train(count, tree, *flags, cwd):
    """A run of the script on `count` ranks that must succeed."""
    cwd.mkdir(exist_ok=True)
    if count == 1:
        status, out, err = run(SCRIPT, tree, *SMALL, *flags, cwd=cwd)
        print(out, err)
        assert status == 0
    else:
        assert run_ranks(count, ranks, SCRIPT, tree, *SMALL, *flags, folders=[cwd]) == [0] * count


def assert_equal(folder, other):
    """Equal to the bit: all that a checkpoint holds, and the log."""
    assert epoch_lines(folder) == epoch_lines(other) != []
    a, b = checkpoint_of(folder), checkpoint_of(other)
    for key in ("epoch", "data", "generator", "parts"):
        assert_same(a[key], b[key])


@pytest.fixture(scope="module")
def whole(tree, tmp_path_factory):
    """A function: the folder of an undisturbed run of one process with these flags."""

    @functools.cache
    def run_once(*flags):
        folder = tmp_path_factory.mktemp("whole")
        train(1, tree, *flags, cwd=folder)
        return folder

    return run_once


# Equal to one process


@pytest.mark.parametrize(
    ("num_modules", "flags"),
    [
        (1, []),
        (3, ["--precision", "fp16", "--dynamic-loss-scale", "--send-precision", "int8"]),
        (4, ["--epochdecay", 1, "--send-precision", "bf16"]),
        pytest.param(2, ["--arch", "resnet18", "--image-size", 64, "--aux-size", "published"], marks=pytest.mark.slow),
    ],
)
def test_equals_one_process_to_the_bit(num_modules, flags, whole, tree, tmp_path):
    """After 10 steps, some of them on incomplete batches, with tests in between."""
    flags = "--nepochs", 2, "--num-modules", num_modules, *flags
    train(num_modules, tree, *flags, "--module-parallel", cwd=tmp_path)
    assert_equal(whole(*flags), tmp_path)


def test_a_checkpoint_goes_from_one_process_to_several_and_back(whole, tree, tmp_path):
    """Also where the learning rate drops."""
    flags = "--num-modules", 2, "--epochdecay", 2, "--nepochs"
    train(1, tree, *flags, 1, cwd=tmp_path)
    train(2, tree, *flags, 3, "--module-parallel", "--resume", "auto", cwd=tmp_path)
    train(1, tree, *flags, 4, "--resume", "auto", cwd=tmp_path)
    assert_equal(whole(*flags, 4), tmp_path)


def test_replicas_equal_data_parallel_ranks(tree, tmp_path, monkeypatch):
    """Two modules with two replicas each, against two ranks with both modules; dropout included."""
    normalise, to_device = data.Batches.normalise, training.to_device
    monkeypatch.setattr(data.Batches, "normalise", lambda *a: normalise(*a).double())
    monkeypatch.setattr(training, "to_device", lambda *a: to_device(*a).double())
    flags = "--num-modules", 2, "--nepochs", 1
    train(2, tree, *flags, cwd=tmp_path / "data")
    train(4, tree, *flags, "--module-parallel", cwd=tmp_path / "both")
    assert epoch_lines(tmp_path / "data") == epoch_lines(tmp_path / "both") != []
    a, b = (checkpoint_of(tmp_path / name)["parts"]["model"] for name in ("data", "both"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-9, atol=1e-9)


def test_evaluate_and_images_that_cannot_be_read(tree, tmp_path, capfd):
    """A whole batch of the validation images is missing."""
    copy = copy_tree(tree, tmp_path / "tree")
    for path in copy.glob("val/class0/*"):
        path.write_bytes(b"")
    flags = "--num-modules", 2, "--nepochs", 1, "--skip-corrupt", "-b", 5
    train(1, copy, *flags, cwd=tmp_path / "one")
    capfd.readouterr()
    train(2, copy, *flags, "--module-parallel", "--profile", cwd=tmp_path / "parallel")
    assert_equal(tmp_path / "one", tmp_path / "parallel")
    spent = r"^rank {}: \d+\.\d\d s, computing \d+\.\d\d s, waiting for input \d+\.\d\d s, for sends \d+\.\d\d s$"
    screen = capfd.readouterr().out
    assert all(re.search(spent.format(rank), screen, re.MULTILINE) for rank in (0, 1))
    train(2, copy, *flags, "--module-parallel", "--evaluate", "--resume", "auto", cwd=tmp_path / "parallel")
    tested = [line.partition(" train ")[2].partition(", ")[2] for line in epoch_lines(tmp_path / "parallel")]
    assert [f"n: {n}, {line}" for n, line in enumerate(tested)] == re.findall("^n: .*", capfd.readouterr().out, re.M)


def test_no_validation_image_can_be_read(tree, tmp_path, capfd, monkeypatch):
    for path in copy_tree(tree, tmp_path / "tree").glob("val/*/*"):
        path.write_bytes(b"")
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.3)))
    flags = tmp_path / "tree", *SMALL, "--num-modules", 3, "--nepochs", 1, "--skip-corrupt", "--module-parallel"
    assert run_ranks(3, ranks, SCRIPT, *flags, folders=[tmp_path]) == [2, 2, 2]
    err = capfd.readouterr().err
    assert "error: no validation image can be read\n" in err
    assert "IndexError" not in err


def test_a_screen_that_fails_does_not_end_the_run(tree, tmp_path):
    flags = tree, *SMALL, "--nepochs", 1, "-p", 1, "--num-modules", 2, "--module-parallel"

    def work(_):
        sys.__stdout__ = open("/dev/full", "w", buffering=1)  # noqa: SIM115
        return run(SCRIPT, *flags, cwd=tmp_path)[0]

    assert fork_ranks(2, work, ranks) == [0, 0]
    assert len(epoch_lines(tmp_path)) == 2


def test_balanced_by_time(tree, tmp_path, monkeypatch, capfd):
    """Rank 0 measures, all ranks cut alike; the checkpoint has the cut, whatever a later measurement would find."""
    load("imagenet_dgl", "imagenet_dgl")
    monkeypatch.setattr(conftest, "COMMON_NAMES", ())  # so that the script has these models
    timer = sys.modules["models.timing"].Timer

    def slow_part(name):
        """Times in which all but what has this part is free."""

        def measure(self, part, x, needs_gradient):
            assert ranks.RANK == 0, "another rank measures, too"
            parameters = {".".join(key.split(".")[:2]) for key in part.state_dict()}
            return (1.0 if name in parameters else 0.01), part(x).detach()

        monkeypatch.setattr(timer, "__call__", measure)

    flags = "--num-modules", 2, "--balance", "time", "--nepochs"
    slow_part("features.3")
    train(2, tree, *flags, 1, "--module-parallel", cwd=tmp_path)
    cuts = checkpoint_of(tmp_path)["arguments"]["cuts"]
    assert conftest.log_of(tmp_path)[0]["cuts"] == cuts and len(cuts) == 1
    slow_part("features.12")
    train(1, tree, *flags, 1, cwd=tmp_path / "other")
    assert checkpoint_of(tmp_path / "other")["arguments"]["cuts"] != cuts
    train(1, tree, *flags, 2, "--resume", "auto", cwd=tmp_path)
    train(2, tree, *flags, 3, "--module-parallel", "--resume", "auto", cwd=tmp_path)
    assert checkpoint_of(tmp_path)["arguments"]["cuts"] == cuts
    checkpoint = tmp_path / "imagenet_dgl-imagenet_dgl.pt"
    capfd.readouterr()
    train(2, tree, "--module-parallel", "--evaluate", "--resume", checkpoint, cwd=tmp_path)
    tested = [line.partition(" train ")[2].partition(", ")[2] for line in epoch_lines(tmp_path)[-2:]]
    assert [f"n: {n}, {line}" for n, line in enumerate(tested)] == re.findall("^n: .*", capfd.readouterr().out, re.M)
    for wrong in (["--num-modules", 3], ["--balance", "flops"], ["--send-precision", "int8"]):
        status, _, err = run(SCRIPT, tree, *SMALL, "--resume", checkpoint, *wrong, cwd=tmp_path)
        assert status == 2 and f"was made with {wrong[0][2:].replace('-', '_')}" in err


def test_mistakes(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ranks, "COUNT", 3)
    args = sys.modules["imagenet_dgl"].parse_args(["x", "--arch", "vgg13", "--block_size", "3", "--module-parallel"])
    with pytest.raises(SystemExit) as stop:
        sys.modules["imagenet_dgl"].make_pipeline(args, torch.device("cpu"))
    assert stop.value.code == 2
    assert "--nproc_per_node=4" in capsys.readouterr().err


# The pipeline itself


def in_pipeline(count, work, num_modules=None, **options):
    """`work(pipeline)` on `count` ranks, with batches of two images."""

    def begin(_):
        torch.distributed.init_process_group("gloo")
        pipeline = module_parallel.ModuleParallel(num_modules or count, torch.device("cpu"), batch_size=2, **options)
        work(pipeline)
        torch.distributed.destroy_process_group()

    assert fork_ranks(count, begin, ranks) == [0] * count


def test_all_messages_have_the_layout_of_the_first():
    """Another memory layout arrives with the same values; another shape or dtype is refused."""
    first = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    labels = torch.tensor([0, 1])

    def work(pipeline):
        for kind, layouts in {
            "train": (torch.channels_last, torch.contiguous_format),
            "test": (torch.contiguous_format, torch.channels_last),
        }.items():
            if pipeline.is_first:
                for i, layout in enumerate(layouts):
                    pipeline.send((first + i).contiguous(memory_format=layout), labels, kind=kind)
                for wrong in [
                    (first.double(), labels),
                    (first[:, :2], labels),
                    (first.flatten(1), labels),
                    (first, labels.float()),
                    (first,),
                    (first.repeat(2, 1, 1, 1), labels),
                ]:
                    with pytest.raises(ValueError, match=f"a {kind} message of"):
                        pipeline.send(*wrong, kind=kind)
            else:
                for i, (x, received) in enumerate(pipeline.receive(2, kind)):
                    assert torch.equal(x, first + i)
                    assert x.is_contiguous(memory_format=layouts[0])
                    assert torch.equal(received, labels)
            pipeline.end_pass(2, kind)

    in_pipeline(2, work)


def test_a_pass_without_a_batch_between_others():
    def work(pipeline):
        for count in (0, 2, 0, 1):
            if pipeline.is_first:
                for i in range(count):
                    pipeline.send(torch.full((2, 5), float(i)), torch.tensor([i, i]))
            else:
                assert [x[0, 0].item() for x, _ in pipeline.receive(2)] == [0, 1][:count]
            pipeline.end_pass(2)

    in_pipeline(2, work)


def test_a_sender_runs_ahead_but_not_far():
    """It does not wait for the receiver's work, has at most SLOTS batches under way, and sends without a copy."""

    def work(pipeline):
        total, labels = 10, torch.tensor([0, 1])
        if pipeline.is_first:
            begin = time.monotonic()
            for i in range(total):
                x = torch.full((2, 3, 4, 4), float(i)).to(memory_format=torch.channels_last)
                pipeline.send(x, labels)
                if i == 1 + module_parallel.SLOTS:  # the receiver has not finished its first batch
                    assert time.monotonic() - begin < 0.2
                assert len(pipeline.sending) <= module_parallel.SLOTS
                assert pipeline.sending[-1][1][1].data_ptr() == x.data_ptr()
            assert time.monotonic() - begin > 0.2 * (total - 2 * module_parallel.SLOTS - 1)
            pipeline.end_pass(total)
        else:
            addresses = set()
            for i, (x, received) in enumerate(pipeline.receive(total)):
                time.sleep(0.2)
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


def test_each_link_has_a_group_of_its_own():
    """Of three modules with two replicas: every rank knows all four, made in the same order, and sends on its own."""

    def work(pipeline):
        assert [*pipeline.links] == [0, 1, 2, 3]
        rank = torch.distributed.get_rank()
        for n, link in pipeline.links.items():
            member = rank in (n, n + 2)
            assert member == (link is not torch.distributed.GroupMember.NON_GROUP_MEMBER)
            assert not member or torch.distributed.get_process_group_ranks(link) == [n, n + 2]
        own = ((torch.full((2, 5), float(rank)), torch.tensor([i, i])) for i in range(3))
        for i, (x, labels) in enumerate(own if pipeline.is_first else pipeline.receive(3)):
            assert x.mean() == pipeline.replica and labels.tolist() == [i, i]
            pipeline.send(x, labels)
        pipeline.end_pass(3)

    in_pipeline(6, work, num_modules=3)


def test_on_a_gpu_waits_are_measured_by_events(monkeypatch):
    """Between marks in its stream, read at the end of the pass: the device never waits for anything but the message."""
    clock = itertools.count(0, 250)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.milliseconds = next(clock)

        def synchronize(self):
            self.synchronized = True

        def elapsed_time(self, end):
            assert end.synchronized
            return end.milliseconds - self.milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)

    def work(pipeline):
        pipeline.with_events = True
        for _ in [pipeline.send(torch.ones(2, 5)) for _ in range(3)] if pipeline.is_first else pipeline.receive(3):
            assert pipeline.waited == {"input": 0, "send": 0}
        pipeline.end_pass(3)
        assert pipeline.waited == ({"input": 0, "send": 0.75} if pipeline.is_first else {"input": 0.75, "send": 0})
        assert not pipeline.waits

    in_pipeline(2, work)


# What is sent in fewer bits


@pytest.mark.parametrize("shape", [(4, 3, 5, 7), (4, 9, 6), (4, 11)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_rounding(shape, dtype):
    """At most half of an image's scale for int8; zeros stay, and other images do not matter."""
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    x[1].relu_()
    x[2] = 3
    x[3] = 1e-30 * x[3] - 7  # narrow, far from zero
    assert module_parallel.rounded(x, "fp32") is x
    half, byte = (module_parallel.rounded(x, precision) for precision in ("bf16", "int8"))
    assert half.dtype == byte.dtype == dtype
    assert torch.equal(half, x.bfloat16().to(dtype) if x.element_size() > 2 else x)
    own = torch.finfo(dtype).eps if dtype in (torch.float16, torch.bfloat16) else 1e-6
    for image, rounded in zip(x.double(), byte.double()):
        bound = 0.5 * (image.max() - image.min()) / 255 + own * image.abs().max()
        assert (image - rounded).abs().max() <= bound
    assert (byte[1][x[1] == 0] == 0).all()
    assert torch.equal(byte[2], x[2])
    assert torch.equal(module_parallel.rounded(x[:1], "int8"), byte[:1])
    if len(shape) == 4:
        other = module_parallel.rounded(x.to(memory_format=torch.channels_last), "int8")
        assert torch.equal(other, byte) and other.is_contiguous(memory_format=torch.channels_last)


def test_one_process_trains_and_tests_on_what_is_rounded():
    script, seen = sys.modules["imagenet_dgl"], []

    class Seeing(torch.nn.Linear):
        def forward(self, x):
            seen.append(x.detach().clone())
            return super().forward(x)

    class Batches(list):
        device = torch.device("cpu")

    torch.manual_seed(0)
    modules = [script.Module(Seeing(9, 9), torch.nn.Linear(9, 5), n) for n in range(2)]
    x, labels = torch.randn(4, 9), torch.arange(4)
    batches, nothing = Batches([(x, labels)]), contextlib.nullcontext()
    expected = module_parallel.rounded(modules[0].block(x).detach(), "int8")
    seen.clear()
    script.evaluate(modules, nothing, batches, send_precision="int8")
    optimizers, meters = [torch.optim.SGD(m.parameters()) for m in modules], [training.Meter(batches.device)] * 2
    scalers = [torch.amp.GradScaler(enabled=False)] * 2
    script.train_epoch(modules, optimizers, scalers, nothing, batches, meters, send_precision="int8")
    assert all(torch.equal(a, b) for a, b in zip(seen, [x, expected] * 2, strict=True))


def test_what_is_not_finite_stays_so():
    for bad in (float("nan"), float("inf")):
        x = torch.ones(2, 3, 4, 4)
        x[0, 1, 2, 3] = bad
        assert all(not module_parallel.rounded(x, p)[0].isfinite().all() for p in module_parallel.PRECISIONS)
        assert torch.equal(module_parallel.rounded(x, "int8")[1], x[1])


@pytest.mark.parametrize(("precision", "of_the_image"), [("fp32", 4 * 96), ("bf16", 2 * 96), ("int8", 96 + 8)])
def test_bytes_on_the_wire(precision, of_the_image, monkeypatch):
    """Of two images (6, 4, 4), with incomplete and missing batches, the labels and a message's own count of images."""
    x = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    sizes, isend = [], torch.distributed.isend

    def counted(tensor, to, link, tag):
        assert torch.distributed.get_process_group_ranks(link) == [0, 1] and link is not torch.distributed.group.WORLD
        sizes.append(tensor.nbytes)
        return isend(tensor, to, link, tag)

    monkeypatch.setattr(torch.distributed, "isend", counted)

    def work(pipeline):
        for kind in ("train", "test"):
            if pipeline.is_first:
                sizes.clear()
                pipeline.send(x, torch.tensor([1, 2]), kind=kind)
                pipeline.send(x[:1], torch.tensor([3]), kind=kind)
            else:
                expected = module_parallel.rounded(x, precision)
                for (received, labels), count in zip(pipeline.receive(3, kind), (2, 1)):
                    assert torch.equal(received, expected[:count])
                    assert received.is_contiguous(memory_format=torch.channels_last)
                    assert labels.tolist() == ([1, 2] if count == 2 else [3])
            pipeline.end_pass(3, kind)
            assert sum(sizes) == (3 * (2 * of_the_image + 2 * 8 + 8) if pipeline.is_first else 0)

    in_pipeline(2, work, send_precision=precision)


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


def disturbed(faults, tree, *flags, cwd, restarts=0):
    """(exit status, stderr, seconds) of a job of two ranks."""
    (cwd / "disturbed.py").write_text(INJECT)
    command = ["disturbed.py", ROOT / "imagenet_dgl", faults, tree, *SMALL, *flags]
    begin = time.monotonic()
    done = conftest.torchrun(*command, "--num-modules", 2, "--module-parallel", cwd=cwd, restarts=restarts)
    assert not [*cwd.glob("*.tmp")]
    return done.returncode, done.stderr, time.monotonic() - begin


@pytest.mark.slow
def test_restarts_end_with_the_weights_of_an_undisturbed_run(whole, tree, tmp_path):
    """A rank that is killed is named; the job goes on from the last checkpoint by itself."""
    flags = "--nepochs", 4, "--num-modules", 2, "--epochdecay", 2
    faults = "kill@1 none"
    status, err, _ = disturbed(faults, tree, *flags, "--resume", "auto", cwd=tmp_path, restarts=1)
    assert status == 0, err
    assert "lost the connection" not in err
    assert_equal(whole("--num-modules", 2, "--epochdecay", 2, "--nepochs", 4), tmp_path)


@pytest.mark.slow
def test_a_killed_rank_ends_the_job(tree, tmp_path):
    status, err, seconds = disturbed("kill@1", tree, "--nepochs", 9, cwd=tmp_path)
    assert status != 0
    assert seconds < 60
    assert re.search(r"Root Cause.*rank *: 1 .*Signal 9", err, re.DOTALL)
    assert "lost the connection" not in err
    assert checkpoint_of(tmp_path)["epoch"] == 1


@pytest.mark.slow
def test_all_kinds_of_faults_and_restarts(whole, tree, tmp_path):
    flags = "--nepochs", 5, "--num-modules", 2
    faults = "raise@0 nan@1 kill@0 none"
    status, err, _ = disturbed(faults, tree, *flags, "-p", 1, "--resume", "auto", cwd=tmp_path, restarts=3)
    assert status == 0, err
    assert err.count("ValueError: a mistake in the code") == 1
    said = r"Epoch \d, module 1 on rank 1: the loss is nan; the last checkpoint: imagenet_dgl-imagenet_dgl.pt"
    assert len(re.findall(said, err)) == 1
    assert "lost the connection" not in err
    assert_equal(whole(*flags), tmp_path)


@pytest.mark.slow
def test_ctrl_c_ends_the_job(tree, tmp_path):
    status, err, seconds = disturbed("interrupt@0", tree, "--nepochs", 9, cwd=tmp_path)
    assert status != 0
    assert seconds < 60
    said = "Interrupted; go on from the last finished epoch with --resume imagenet_dgl-imagenet_dgl.pt"
    assert err.count(said) == err.count("Interrupted") == 1  # rank 0 alone says so
    assert checkpoint_of(tmp_path)["epoch"] >= 1


@pytest.mark.slow
def test_a_corrupt_image_ends_the_job(tree, tmp_path):
    copy = copy_tree(tree, tmp_path / "tree")
    max(copy.glob("*/*/*")).write_bytes(b"")
    status, err, seconds = disturbed("none", tmp_path / "tree", "--nepochs", 2, "-j", 1, cwd=tmp_path)
    assert status != 0
    assert seconds < 60
    assert err.count("error: cannot read the image") == 1
    assert re.search(r"cannot read the image .* on rank 0 ", err)
    assert "lost the connection" not in err
