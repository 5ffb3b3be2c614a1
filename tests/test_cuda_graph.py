"""cifar.CudaGraph: a run with replayed training steps is the eager run.

Without a GPU, to the bit, with a stand-in for torch.cuda's graphs: at each replay it runs the captured step again, on
the tensors of the capture and with its learning rates. On a GPU, the real graphs: to the bit where its kernels repeat
themselves to the bit, and otherwise as closely as they do.
"""

import contextlib
import copy
import functools
import gc
import types
import weakref
from collections import Counter

import pytest
import torch
from conftest import assert_same_run, load
from test_scripts import QUICK

FLAGS = [*QUICK, "--train-size", 20, "--batch-size", 6, "--epochs", 6]  # three batches of 6, and one of 2
FLAGS += ["--test-batch-size", 8]  # two batches of 8, and one of 4
# Per script: flags, captures, replays. Of 18 full batches and 6 small ones, the first 3 are eager. In all scripts but
# dni's, the second half has another learning rate: one eager step, and another capture.
BUFFER = ["--seed", 1, "--buffer", 2, "--ncnn", 3, "--down", "[0]", "--feature_size", 4, "--epochdecay", 3]
SCRIPTS = {
    "auxiliary_nets_study/cifar_dgl.py": (["--feature_size", 4, "--loss", "predsim"], 3, 16),
    "auxiliary_nets_study/cifar_resnet.py": (["--method", "man", "--depth", 8, "--num-modules", 3], 3, 16),
    "buffer_experiments/cifar_buffer.py": (BUFFER, 6, 42),
    "ddg_comparisons/cifar_backprop.py": (["--depth", 8], 3, 16),
    "ddg_comparisons/cifar_dgl.py": (["--depth", 8], 3, 16),
    "dni_comparisons/cifar_cnn_dni.py": (["--dni", "--context"], 2, 18),
    "dni_comparisons/cifar_dgl.py": ([], 2, 18),
    "learning_curves/cifar_dgl.py": ([], 3, 16),
    "learning_curves/cifar_sequential_greedy.py": ([], 12, 64),
}
STEPS = "train_step", "test_step"
EVALUATED = {
    "auxiliary_nets_study/cifar_dgl.py",
    "auxiliary_nets_study/cifar_resnet.py",
    "learning_curves/cifar_dgl.py",
}
SLOW = {*SCRIPTS} - {"learning_curves/cifar_dgl.py"}


def train(script, folder, *flags, before=lambda module: None):
    module = load(*script.removesuffix(".py").split("/"))
    before(module)
    module.main([str(flag) for flag in (*FLAGS, *SCRIPTS[script][0], "--save_folder", folder, *flags)])


def drop_the_rate_at_epoch_4(module):
    def set_learning_rate(optimizers, *others):
        (epoch,) = (other for other in others if isinstance(other, int))
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.param_groups[0]["lr"] = 0.01 if epoch < 4 else 0.001

    if hasattr(module, "set_learning_rate"):
        module.set_learning_rate = set_learning_rate


class Stream:
    """In place of torch.cuda.Stream. `past`: all that has run before what it runs next."""

    current = None

    def __init__(self):
        self.past = set()

    def wait_stream(self, other):
        self.past |= other.past

    def record_event(self):
        return set(self.past)

    def wait_event(self, event):
        self.past |= event

    @classmethod
    @contextlib.contextmanager
    def use(cls, stream):
        before, cls.current = cls.current, stream
        try:
            yield
        finally:
            cls.current = before

    @classmethod
    def patch(cls, monkeypatch):
        cls.current = cls()
        monkeypatch.setattr(torch.cuda, "Stream", cls)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: cls.current)
        monkeypatch.setattr(torch.cuda, "stream", cls.use)


class StandIn:
    """What cifar.CudaGraph uses of torch.cuda, on the CPU. `calls`: the captures and replays of each step."""

    def __init__(self, module, monkeypatch):
        self.capturing, self.calls = None, []
        for name in STEPS:
            if graph := getattr(module, name, None):
                graph.step, graph.DEVICE = functools.partial(self.run, name, graph.step), "cpu"
        Stream.patch(monkeypatch)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", types.SimpleNamespace)
        monkeypatch.setattr(torch.cuda, "graph", self.capture)

    @contextlib.contextmanager
    def capture(self, graph, stream):
        assert not gc.isenabled(), "a graph that is destroyed now would spoil the capture"
        self.capturing = graph
        with Stream.use(stream):
            yield
        self.capturing = None

    def run(self, name, step, *arguments):
        if not self.capturing:
            return step(*arguments)
        flat = [part for item in arguments for part in (item if isinstance(item, list) else [item])]
        groups = [group for part in flat if isinstance(part, torch.optim.Optimizer) for group in part.param_groups]
        assert all(group.get("capturable", True) for group in groups), "torch refuses to capture this optimizer"
        rates = [group["lr"] for group in groups]

        def replay():
            self.calls.append((name, "replay"))
            wanted = [group["lr"] for group in groups]
            for group, rate in zip(groups, rates):
                group["lr"] = rate
            result = step(*arguments)
            if result is not None:
                outputs.copy_(result)
            for group, rate in zip(groups, wanted):
                group["lr"] = rate

        self.calls.append((name, "capture"))
        self.capturing.replay = replay
        outputs = step(*copy.deepcopy(arguments))  # a capture computes nothing
        return outputs


@pytest.mark.parametrize("script", [pytest.param(s, marks=pytest.mark.slow if s in SLOW else ()) for s in SCRIPTS])
def test_replayed_steps_are_the_eager_ones(script, tmp_path, monkeypatch):
    stand_ins = []

    def with_stand_in(module):
        drop_the_rate_at_epoch_4(module)
        stand_ins.append(StandIn(module, monkeypatch))

    train(script, tmp_path / "eager", before=drop_the_rate_at_epoch_4)
    train(script, tmp_path / "graph", "--cuda-graph", before=with_stand_in)
    assert_same_run(tmp_path / "eager", tmp_path / "graph")
    calls = Counter(stand_ins[0].calls)
    assert (calls["train_step", "capture"], calls["train_step", "replay"]) == SCRIPTS[script][1:]
    tests = calls["test_step", "capture"], calls["test_step", "replay"]  # of 12 full batches and 6 small ones
    assert tests == ((2, 12) if script in EVALUATED else (0, 0))


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("auxiliary_nets_study/cifar_dgl.py", []),
        ("auxiliary_nets_study/cifar_resnet.py", ["--method", "infopro"]),
        ("auxiliary_nets_study/cifar_resnet.py", []),  # MAN
        ("ddg_comparisons/cifar_dgl.py", []),
        ("dni_comparisons/cifar_dgl.py", []),
        ("learning_curves/cifar_dgl.py", []),
    ],
)
def test_modules_are_branches_that_begin_when_the_block_before_has_run(script, flags, tmp_path, monkeypatch):
    ran = {}  # what: all that had run before it, for each time that it ran

    def run(what):
        ran.setdefault(what, []).append(set(Stream.current.past))
        Stream.current.past.add((what, len(ran[what])))

    def with_stand_in(module):
        StandIn(module, monkeypatch)
        iterate, step = module.cifar.Batches.__iter__, module.train_step.step

        def watched_batches(batches):
            for batch in iterate(batches):
                if batches.generator:
                    run("batch 0")
                yield batch

        def watched_step(images, labels, model, *parts):
            *_, optimizers = (part for part in parts if isinstance(part, list) and hasattr(part[0], "param_groups"))
            hooks = []
            for n, (block, net, optimizer) in enumerate(zip(model.blocks, model.auxiliary_nets, optimizers)):
                hooks.append(block.register_forward_hook(lambda *_, n=n: run(f"block {n}")))
                hooks.append(net.register_forward_hook(lambda *_, n=n: run(f"auxiliary net {n}")))
                hooks.append(optimizer.register_step_post_hook(lambda *_, n=n: run(f"update {n}")))
            result = step(images, labels, model, *parts)
            for hook in hooks:
                hook.remove()
            return result

        monkeypatch.setattr(module.cifar.Batches, "__iter__", watched_batches)
        module.train_step.step = watched_step
        module.train_step.WARM_UP = 10**9

    train(script, tmp_path, *flags, "--cuda-graph", "--epochs", 1, before=with_stand_in)
    in_turn = "resnet" in script and not flags  # MAN reads the next block's weights
    modules, steps = 1 + max(int(what[-1]) for what in ran), len(ran["block 0"])
    assert modules >= 2 and steps == 4
    for step in range(1, steps + 1):
        assert ("batch 0", step) in ran["block 0"][step - 1]
        for n in range(1, modules):
            before = ran[f"block {n}"][step - 1]
            assert (f"block {n - 1}", step) in before
            assert ((f"auxiliary net {n - 1}", step) in before) is in_turn
            assert ((f"update {n - 1}", step) in before) is in_turn
            assert (f"update {n}", step) not in before
            everything = {(what, i) for what in ran for i in range(1, step)}
            assert everything <= before, "the next step begins before this one has ended"
    assert Stream.current.past == {(what, i) for what in ran for i in range(1, steps + 1)}


class Branches:
    """A training step with three modules, and what it uses of torch.cuda. Without `fail`, all is well."""

    def __init__(self, monkeypatch):
        self.graph, self.kept, self.fail = load("learning_curves", "cifar").CudaGraph(self.step), [], None
        self.graph.enabled, self.graph.DEVICE = True, "cpu"
        Stream.patch(monkeypatch)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=lambda: None))
        monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: Stream.use(stream))
        self.waits = []
        wait = Stream.wait_stream
        monkeypatch.setattr(Stream, "wait_stream", lambda s, other: (self.waits.append(self.alive()), wait(s, other)))

    def alive(self):
        return [x() is not None for x in self.kept]

    def step(self, images, labels):
        self.kept = []
        for n in self.graph.branches(3):
            Stream.current.past.add(n)
            representation = torch.zeros(2)
            self.kept.append(weakref.ref(representation))
            x = self.graph.hand_over(representation)
            del representation
            if n == self.fail:
                raise KeyboardInterrupt
        del x

    def __call__(self):
        self.waits.clear()
        self.graph(torch.zeros(2), torch.zeros(2))


def test_a_captured_step_has_branches_and_keeps_what_they_read_until_they_have_ended(monkeypatch):
    branches = Branches(monkeypatch)
    for _ in range(4):  # the last one is captured
        branches()
        assert [alive for alive in branches.waits if any(alive)] == [[True] * 3] * 3
        assert not branches.graph.handed_over and not any(branches.alive())
    assert next(iter(branches.graph.captures.values())).graph


@pytest.mark.parametrize("steps", [0, 3])  # before: the one that fails is eager, or captured
def test_branches_join_after_ctrl_c(steps, monkeypatch):
    branches = Branches(monkeypatch)
    for _ in range(steps):
        branches()
        branches.graph.stream.past.clear()
    branches.fail, before = 1, Stream.current
    with pytest.raises(KeyboardInterrupt):
        branches()
    assert Stream.current is before and gc.isenabled()
    assert {0, 1} <= branches.graph.stream.past
    branches.fail = None
    branches()
    assert not branches.graph.handed_over


GPU = [*((script, []) for script in SCRIPTS), ("auxiliary_nets_study/cifar_resnet.py", ["--method", "dgl"])]


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("script", "flags"), GPU)
def test_on_a_gpu(script, flags, precision, tmp_path, monkeypatch):
    if (script, precision) == ("dni_comparisons/cifar_cnn_dni.py", "fp16"):
        pytest.skip("--dni refuses fp16")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    losses, graphs = {"eager": [], "again": [], "graph": []}, []
    accuracies = {name: [] for name in losses}
    for name, found in losses.items():

        def record(module, found=found, tops=accuracies[name]):
            pop, setup, evaluate = module.cifar.Meter.pop, module.utils.setup, module.evaluate
            module.evaluate = lambda *parts: tops.append(evaluate(*parts)) or tops[-1]
            module.cifar.Meter.pop = lambda meter: found.append(pop(meter)) or found[-1]
            module.utils.setup = lambda args: (setup(args), setattr(torch.backends.cudnn, "benchmark", False))[0]
            drop_the_rate_at_epoch_4(module)
            graphs.append(module.train_step)

        switch = "--cuda-graph" if name == "graph" else "--no-cuda-graph"
        train(script, tmp_path / name, *flags, "--precision", precision, switch, before=record)
    losses = {name: torch.tensor([loss for loss, _ in found]) for name, found in losses.items()}
    assert len(losses["eager"])
    assert [any(capture.graph for capture in step.captures.values()) for step in graphs] == [False, False, True]
    bound = 3 * (losses["eager"] - losses["again"]).abs().max()
    if "resnet" in script:  # some of its kernels add in any order
        bound += 1e-4 if precision == "fp32" else 0.01
    assert (losses["eager"] - losses["graph"]).abs().max() <= bound, losses
    if bound == 0:
        assert accuracies["eager"] == accuracies["graph"]
