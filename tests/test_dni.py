"""dni_comparisons: the dni package, its examples, the networks and the training steps of the four methods."""

import csv
import os
import re
import shutil
import subprocess
import sys
import threading

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES, ROOT, load, notebook, run
from torch import nn

FOLDER = ROOT / "dni_comparisons"
dgl = load("dni_comparisons", "cifar_dgl")
cnn = load("dni_comparisons", "cifar_cnn_dni")
cifar, dni, models, utils = cnn.cifar, cnn.dni, sys.modules["models"], cnn.utils


def error(synthetic, true):
    """What a synthesizer minimises."""
    return ((synthetic - true) ** 2).sum() / len(true)


class Two(nn.Module):
    """Part A, a backward interface with a linear synthesizer, part B; a fixed batch of 5."""

    def __init__(self, synthesizer=None):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.x, self.labels = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
        self.interface = dni.BackwardInterface(synthesizer or Linear())

    def loss(self, trigger):
        return F.cross_entropy(self.b(trigger), self.labels)

    def true(self):
        """Gradients of A, B and the trigger by backprop."""
        trigger = self.a(self.x)
        loss = self.loss(trigger)
        wanted = [*self.a.parameters(), *self.b.parameters(), trigger]
        *gradients, at_trigger = torch.autograd.grad(loss, wanted)
        return gradients[:2], gradients[2:], at_trigger


class Linear(nn.Linear):
    """A synthesizer that is not zero."""

    def __init__(self, inputs=4, outputs=4):
        super().__init__(inputs, outputs)

    def forward(self, trigger, context=None):
        return super().forward(trigger)


def gradients(module):
    return [p.grad for p in module.parameters()]


def assert_equal(a, b):
    assert len(a) == len(b) > 0
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_a_step_computed_by_hand():
    net = Two()
    _, true_b, true = net.true()
    trigger = net.a(net.x)
    loss = net.loss(net.interface(trigger))
    synthetic = trigger.detach() @ net.interface.synthesizer.weight.T + net.interface.synthesizer.bias
    torch.testing.assert_close(net.a.weight.grad, (synthetic.T @ net.x).detach())  # at once: update unlocking
    torch.testing.assert_close(net.a.bias.grad, synthetic.sum(0).detach())
    assert gradients(net.b) == gradients(net.interface) == [None, None]
    before = [g.clone() for g in gradients(net.a)]
    loss.backward()
    assert_equal(before, gradients(net.a))  # nothing crosses the interface
    assert_equal(true_b, gradients(net.b))
    difference = (synthetic - true).detach()
    torch.testing.assert_close(net.interface.synthesizer.weight.grad, 2 / 5 * difference.T @ trigger.detach())
    torch.testing.assert_close(net.interface.synthesizer.bias.grad, 2 / 5 * difference.sum(0))
    expected = torch.autograd.grad(error(net.interface.synthesizer(trigger.detach()), true), net.interface.parameters())
    torch.testing.assert_close(gradients(net.interface), list(expected))


def test_backward_and_make_trigger_do_together_what_forward_does():
    whole, halves = Two(), Two()
    whole.loss(whole.interface(whole.a(whole.x))).backward()
    trigger = halves.a(halves.x)
    halves.interface.backward(trigger)
    halves.loss(halves.interface.make_trigger(trigger.detach())).backward()
    assert_equal(gradients(whole), gradients(halves))
    halves.zero_grad()
    halves.interface.backward(halves.a(halves.x), factor=0.5)
    assert_equal([0.5 * g for g in gradients(whole.a)], gradients(halves.a))


def test_make_trigger_passes_the_real_gradient_on():
    """Computed by hand; backprop goes on as if the interface were not there."""
    net, other = Two(), Two()
    true_a, true_b, true = net.true()
    trigger = net.a(net.x)
    copy = net.interface.make_trigger(trigger)
    assert copy is not trigger
    assert torch.equal(copy, trigger)
    assert gradients(net.a) == gradients(net.interface) == [None, None]
    net.loss(copy).backward()
    assert_equal(true_a, gradients(net.a))
    torch.testing.assert_close(net.a.weight.grad, true.T @ net.x)
    assert_equal(true_b, gradients(net.b))
    difference = (net.interface.synthesizer(trigger.detach()) - true).detach()
    torch.testing.assert_close(net.interface.synthesizer.weight.grad, 2 / 5 * difference.T @ trigger.detach())
    torch.testing.assert_close(net.interface.synthesizer.bias.grad, 2 / 5 * difference.sum(0))
    other.interface.send(true, trigger)  # the same gradient, sent as a message
    assert_equal(gradients(net.interface), gradients(other.interface))


def test_make_trigger_and_a_synthesizer_without_parameters():
    interface = dni.BackwardInterface(lambda trigger, context: trigger)
    leaf, constant = torch.ones(2, requires_grad=True), torch.ones(2)
    (3 * interface.make_trigger(leaf)).sum().backward()
    assert leaf.grad.tolist() == [3, 3]
    (3 * interface.make_trigger(constant)).sum().backward()
    assert not constant.requires_grad


def test_an_oracle_makes_dni_equal_to_backprop_to_the_bit():
    """The synthesizer, without parameters, computes the true gradient itself."""
    oracle = nn.Module()
    net, twin = Two(oracle), Two()

    def forward(trigger, context):
        with torch.enable_grad():
            trigger = trigger.detach().requires_grad_()
            return torch.autograd.grad(net.loss(trigger), trigger)[0]

    oracle.forward = forward
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    twin_optimizer = torch.optim.Adam([*twin.a.parameters(), *twin.b.parameters()], lr=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        net.loss(net.interface(net.a(net.x))).backward()
        optimizer.step()
        twin_optimizer.zero_grad()
        twin.loss(twin.a(twin.x)).backward()
        twin_optimizer.step()
    assert_equal(list(net.a.parameters()), list(twin.a.parameters()))
    assert_equal(list(net.b.parameters()), list(twin.b.parameters()))


def test_eval_mode_is_a_pass_through():
    net = Two().eval()
    trigger = net.a(net.x)
    assert net.interface(trigger) is net.interface.make_trigger(trigger) is trigger
    net.interface.backward(trigger)
    assert gradients(net.a) == [None, None]
    message, bidirectional = trigger, dni.BidirectionalInterface(Linear(3), Linear()).eval()
    assert bidirectional(message, net.x) is message
    assert dni.ForwardInterface(Linear(3)).eval()(message, net.x) is message
    net.train()
    with torch.no_grad():
        trigger = net.a(net.x)
        assert net.interface(trigger) is trigger
        net.interface.backward(trigger)


@pytest.mark.parametrize("kind", [dni.UnidirectionalInterface, dni.ForwardInterface, dni.BackwardInterface])
@pytest.mark.parametrize("mode", [True, False])
def test_unidirectional_interface(kind, mode):
    """`send` and `receive` act in every mode."""
    net = Two()
    interface = kind(Linear(4, 3)).train(mode)
    assert isinstance(interface, dni.UnidirectionalInterface)
    trigger, message = net.a(net.x), net.x.clone().requires_grad_()
    received = interface.receive(trigger)
    assert not received.requires_grad
    assert torch.equal(received, interface.synthesizer(trigger))
    interface.send(message, trigger)
    expected = torch.autograd.grad(error(interface.synthesizer(trigger.detach()), net.x), interface.parameters())
    torch.testing.assert_close(gradients(interface), list(expected))
    assert message.grad is None
    assert gradients(net.a) == [None, None]
    dni.UnidirectionalInterface(lambda trigger, context: trigger + 1).send(trigger, trigger)  # nothing to train


def test_forward_interface_sends_and_receives():
    net, interface = Two(), dni.ForwardInterface(Linear(3))
    message = net.a(net.x)
    assert torch.equal(interface(message, net.x), interface.receive(net.x))
    assert interface.synthesizer.weight.grad is not None
    assert gradients(net.a) == [None, None]


def test_bidirectional_interface():
    net, interface = Two(), dni.BidirectionalInterface(Linear(3), Linear())
    forwards, backwards = interface.forward_interface.synthesizer, interface.backward_interface.synthesizer
    message = net.a(net.x)
    received = interface(message, net.x)
    assert torch.equal(received, forwards(net.x))
    synthetic = backwards(message).detach()
    torch.testing.assert_close(net.a.weight.grad, synthetic.T @ net.x)
    before = [g.clone() for g in [*gradients(net.a), *gradients(forwards)]]
    assert gradients(backwards) == [None, None]
    net.loss(received).backward()
    assert_equal(before, [*gradients(net.a), *gradients(forwards)])
    leaf = received.detach().requires_grad_()
    (true,) = torch.autograd.grad(net.loss(leaf), leaf)
    expected = torch.autograd.grad(error(backwards(leaf.detach()), true), backwards.parameters())
    torch.testing.assert_close(gradients(backwards), list(expected))


def context_now():
    """What a synthesizer is given."""
    seen = []
    dni.UnidirectionalInterface(lambda trigger, context: seen.append(context) or trigger).receive(torch.zeros(1))
    return seen[0]


def test_contexts_nest_end_with_exceptions_and_are_a_threads_own():
    seen = []
    assert context_now() is None
    with dni.synthesizer_context(1):
        with dni.synthesizer_context(2):
            assert context_now() == 2
        with pytest.raises(KeyError), dni.synthesizer_context(3):
            raise KeyError
        assert context_now() == 1
        with dni.defer_backward():
            thread = threading.Thread(target=lambda: seen.append((context_now(), dni.defer_backward().__enter__())))
            thread.start()
            thread.join()
    assert context_now() is None
    assert seen == [(None, None)]


def test_defer_backward():
    x = torch.ones(3, requires_grad=True)
    shared = x * x  # whose graph one backward pass frees
    with dni.defer_backward():
        dni.backward(shared.sum())
        dni.backward(shared, torch.tensor([1.0, 2.0, 3.0]))
        assert x.grad is None
    assert x.grad.tolist() == [4, 6, 8]
    dni.backward(x * 2)
    assert x.grad.tolist() == [6, 8, 10]
    with pytest.raises(RuntimeError, match="nested"), dni.defer_backward(), dni.defer_backward():
        pass
    with pytest.raises(KeyError), dni.defer_backward():
        dni.backward(x.sum())
        raise KeyError
    with dni.defer_backward():
        pass
    assert x.grad.tolist() == [6, 8, 10]


def test_basic_synthesizer():
    plain, deep = dni.BasicSynthesizer(4), dni.BasicSynthesizer(4, 2, 5, trigger_dim=3, context_dim=10)
    assert [tuple(p.shape) for p in plain.parameters()] == [(4, 4), (4,)]
    shapes = [(5, 3), (5,), (5, 5), (5,), (4, 5), (4,), (5, 10), (5,)]
    assert [tuple(p.shape) for p in deep.parameters()] == shapes
    for synthesizer, x in ((plain, torch.randn(6, 4)), (deep, torch.randn(6, 3))):
        last = synthesizer.layers[-1]
        assert not last.weight.any()
        assert torch.equal(synthesizer(x, torch.randn(6, 10)), last.bias.expand(6, 4))
    nn.init.ones_(deep.layers[-1].weight)
    one, other = deep(x, torch.zeros(6, 10)), deep(x, torch.ones(6, 10))
    assert not torch.equal(one, other)
    with pytest.raises(ValueError, match="synthesizer_context"):
        deep(x)
    linear = dni.BasicSynthesizer(4, context_dim=10)
    expected = linear.layers[0].bias + linear.context.bias
    assert torch.equal(linear(torch.randn(6, 4), torch.randn(6, 10)), expected.expand(6, 4))
    assert linear.context.bias.all()
    trigger, context = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])
    by_hand = dni.BasicSynthesizer(1, 1, 2, trigger_dim=2, context_dim=1)
    values = [[[1, 1], [0, 1]], [1, -1], [[2, 5]], [3], [[1], [-2]], [0.5, 4]]  # layers, then context
    for parameter, value in zip(by_hand.parameters(), values):
        parameter.data = torch.tensor(value, dtype=torch.float)
    output = by_hand(trigger, context)  # 2 relu(3 + 1 + 3 + 0.5) + 5 relu(2 - 1 - 6 + 4) + 3
    assert output.item() == 18
    output.backward()
    assert by_hand.context.bias.grad.tolist() == by_hand.layers[0].bias.grad.tolist() == [2, 0]
    assert by_hand.context.weight.grad.tolist() == [[6], [0]]


def test_it_learns_the_true_gradient():
    """A linear synthesizer of a quadratic loss can be exact, and becomes so."""
    interface = dni.BackwardInterface(dni.BasicSynthesizer(4))
    optimizer = torch.optim.Adam(interface.parameters(), lr=0.02)
    torch.manual_seed(0)
    for _ in range(500):
        optimizer.zero_grad()
        trigger = interface.make_trigger(torch.randn(32, 4))
        (trigger**2).sum().backward()
        optimizer.step()
    torch.testing.assert_close(interface.synthesizer.layers[0].weight.data, 2 * torch.eye(4), atol=0.01, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device):
    results = []
    for enabled in (True, False):
        torch.manual_seed(0)
        a, b = nn.Linear(6, 16).to(device), nn.Linear(16, 3).to(device)
        interface = dni.BackwardInterface(Linear(16, 16)).to(device)
        x = torch.randn(8, 6).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            loss = b(interface(a(x).relu())).float().square().mean()
        loss.backward()
        results.append([g for part in (a, b, interface) for g in gradients(part)])
    assert all(g.dtype == torch.float32 for g in results[0])
    assert not torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(*results, rtol=0.05, atol=0.02)


def test_autocast_trains_a_synthesizer_that_was_called_before():
    """Autocast keeps casted weights until it ends; those of a call without a graph must not serve in one with it."""
    net = Two()
    with torch.autocast("cpu", torch.bfloat16):
        trigger = net.a(net.x)
        net.interface.backward(trigger)
        loss = net.loss(net.interface.make_trigger(trigger.detach()))
    loss.backward()
    assert all(g is not None and g.any() for g in gradients(net.interface))


@pytest.mark.slow
def test_compiled():
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")
    plain, compiled = Two(), Two()
    step = torch.compile(lambda x: compiled.loss(compiled.interface(compiled.a(x))))
    for _ in range(2):
        plain.zero_grad()
        compiled.zero_grad()
        plain.loss(plain.interface(plain.a(plain.x))).backward()
        step(compiled.x).backward()
        torch.testing.assert_close(gradients(plain), gradients(compiled))


# The networks and scripts


def make(script, flags=(), device="cpu"):
    """The arguments of a script's train_epoch, as its main makes them: 40 random images in 3 batches."""
    args = script.parse_args(["--batch-size", "16", *flags])
    torch.manual_seed(0)
    device = torch.device(device)
    images = torch.randint(256, (40, 32, 32, 3), dtype=torch.uint8)
    batches = cifar.Batches(images, torch.arange(40) % 10, 16, device, torch.Generator().manual_seed(0))
    if script is dgl:
        model = utils.to_device(models.DGLNet(10), args, device)
        optimizers = [dgl.make_optimizer(*module) for module in zip(model.blocks, model.auxiliary_nets)]
        scalers = [cifar.grad_scaler(args, device) for _ in optimizers]
    else:
        model = utils.to_device(models.CNN(10, args.dni, args.context), args, device)
        optimizers, scalers = cnn.make_optimizer(model, args.sgd), cifar.grad_scaler(args, device)
    return model, optimizers, scalers, utils.autocast(args, device), batches, cifar.Meter(device)


def state(*parts):
    return [value.clone() for part in parts for value in part.state_dict().values()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


def test_networks():
    model, x = models.CNN(10), torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 10)
    shapes = [tuple(x.shape[1:]) for net in model.blocks if (x := net(x)) is not None]
    assert shapes == [(128, 10, 10), (128, 3, 3), (128, 1, 1)]
    assert [type(net[-1]) for net in model.blocks] == [nn.MaxPool2d, nn.AvgPool2d, nn.AvgPool2d]
    decoupled = models.DGLNet(10)
    model.load_state_dict(
        {
            **{k: v for k, v in decoupled.state_dict().items() if k.startswith("blocks")},
            "classifier.1.weight": decoupled.auxiliary_nets[2][1].weight,
            "classifier.1.bias": decoupled.auxiliary_nets[2][1].bias,
        }
    )
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(x), decoupled.eval()(x, 2, upto=True)[0])


@pytest.mark.parametrize("side", [10, 3, 1])
def test_synthesizer(side):
    x, context = torch.randn(2, 128, side, side), F.one_hot(torch.tensor([3, 4]), 10).float()
    plain, conditional = models.Synthesizer(), models.Synthesizer(10)
    for synthesizer in (plain, conditional):
        convolutions = [m for m in synthesizer.modules() if isinstance(m, nn.Conv2d)]
        assert [tuple(c.weight.shape) for c in convolutions] == [(128, 128, 5, 5)] * 3
        assert [not c.weight.any() for c in convolutions] == [False, False, True]
        assert all(c.bias.all() for c in convolutions)
        assert torch.equal(synthesizer(x, context), convolutions[2].bias[:, None, None].expand_as(x))
        nn.init.normal_(convolutions[2].weight)
    assert torch.equal(plain(x, context), plain(x, None))
    assert not torch.equal(conditional(x, context), conditional(x, context.roll(1, 1)))


@pytest.mark.parametrize("flags", [[], ["--dni"], ["--dni", "--context"], ["--sgd"]], ids=" ".join)
@pytest.mark.parametrize("device", DEVICES)
def test_every_parameter_is_trained(flags, device):
    model, optimizer, *others = make(cnn, flags, device)
    before = [p.clone() for p in model.parameters()]
    for _ in range(2):  # weights of zero pass no gradient on in the first step
        cnn.train_epoch(model, optimizer, *others, 10 if "--context" in flags else None)
    assert all(p.grad is not None for p in model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_blocks_of_dni_get_synthetic_gradients_only():
    model, *_, batches, _ = make(cnn, ["--dni"])
    model.train()
    images, labels = next(iter(batches))
    seen = []
    for net in model.blocks:
        net.register_forward_hook(lambda _, inputs, output: output.register_hook(seen.append) and None)
    logits = model(images)
    assert len(seen) == 3  # before there is a loss
    for gradient, interface in zip(seen, model.interfaces):
        assert torch.equal(gradient, interface.synthesizer.net[-1].bias[:, None, None].expand_as(gradient))
    before = [p.grad.clone() for p in model.blocks.parameters()]
    F.cross_entropy(logits, labels).backward()
    assert len(seen) == 3
    assert_equal(before, [p.grad for p in model.blocks.parameters()])


@pytest.mark.parametrize("device", DEVICES)
def test_a_dgl_module_updates_only_itself(device):
    model, optimizers, *others = make(dgl, device=device)
    modules = list(zip(model.blocks, model.auxiliary_nets))
    steps = []

    def watch(n, step):
        def watched(*args, **kwargs):
            for m, module in enumerate(modules):
                assert m == n or all(p.grad is None for part in module for p in part.parameters())
            before = [state(*module) for module in modules]
            step(*args, **kwargs)
            assert [m for m in range(3) if not same(before[m], state(*modules[m]))] == [n]
            model.zero_grad()
            steps.append(n)

        return watched

    for n, optimizer in enumerate(optimizers):
        optimizer.step = watch(n, optimizer.step)
    dgl.train_epoch(model, optimizers, *others)
    assert steps == [0, 1, 2] * 3


@pytest.mark.parametrize("script, flags", [(cnn, []), (cnn, ["--dni"]), (dgl, [])], ids=["backprop", "dni", "dgl"])
def test_bf16_is_near_fp32(script, flags):
    losses = []
    for precision in ("bf16", "fp32"):
        *others, meter = make(script, [*flags, "--precision", precision])
        script.train_epoch(*others, meter)
        losses.append(meter.pop()[0])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_mistakes_and_flags_without_effect(tmp_path):
    script = "dni_comparisons/cifar_cnn_dni.py"
    for flags, part in [(["--context"], "needs --dni"), (["--dni", "--precision", "fp16"], "bf16")]:
        status, _, message = run(script, "--data", "digits", *flags, cwd=tmp_path)
        assert status == 2
        assert message.count("\n") == 1
        assert part in message
    quick = ["--data", "digits", "--train-size", 40, "--batch-size", 8, "--epochs", 1]
    status, _, message = run("dni_comparisons/cifar_dgl.py", *quick, "--lr", 0.1, "--context", cwd=tmp_path)
    assert status == 0
    assert message == "--lr has no effect any more\n--context has no effect any more\n"


# What a user reads


def examples():
    return re.findall(r"```python\n(.*?)```", (FOLDER / "dni/README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(4))
def test_the_worked_examples_learn(number, monkeypatch):
    assert len(examples()) == 4
    monkeypatch.syspath_prepend(FOLDER)
    names = {}
    torch.manual_seed(0)
    exec(examples()[number], names)
    first, last = (sum(part) / len(part) for part in (names["losses"][:20], names["losses"][-20:]))
    assert last < 0.7 * first


@pytest.mark.slow
def test_two_processes(tmp_path):
    """The fifth example, as its README starts it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    shutil.copytree(FOLDER / "dni", tmp_path / "dni")
    command += ["-m", "dni.two_processes"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"test top1: (\S+)", done.stdout)[1]) > 80


PUBLISHED = """Files already downloaded and verified
n: 3, epoch 1, loss: 1.99395, train top1:0 test top1:42.07
n: 3, epoch 2, loss: 1.76039, train top1:0 test top1:46.36000061035156
"""
PUBLISHED_DGL = """n: 3, epoch 0, loss: 2.05954, train top1:28.276 test top1:39.11
n: 3, epoch 1, loss: 1.8665, train top1:39.926 test top1:44.48
""".replace("\n", " \n")


NOTEBOOK = FOLDER / "analyze_dni_compare.ipynb"


@pytest.mark.parametrize("logs", ["committed", "published"])
def test_the_notebook_runs(logs, tmp_path, monkeypatch):
    environment = {"PICTURE": tmp_path / "picture.png"}
    if logs == "published":
        for variable in ("BACKPROP_LOG", "DNI_LOG", "CDNI_LOG", "DGL_LOG"):
            environment[variable] = tmp_path / variable
            (tmp_path / variable).write_text(PUBLISHED_DGL if variable == "DGL_LOG" else PUBLISHED)
    assert notebook(NOTEBOOK, monkeypatch, **environment) is None
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    drawn = [list(zip(*map(list, line.get_data()))) for line in plt.gcf().axes[0].lines]
    plt.close()
    if logs == "published":  # DGL's log counts from 0
        assert [(1, 39.11), (2, 44.48)] in drawn
        assert drawn.count([(1, 42.07), (2, 46.36000061035156)]) == 3
    with (FOLDER / "published.csv").open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    for method in ("backprop", "DNI", "cDNI", "DGL"):
        assert [(int(r["epoch"]), float(r["test"])) for r in rows if r["method"] == method] in drawn


@pytest.mark.parametrize("text", ["", PUBLISHED[:-3]], ids=["empty", "cut"])
def test_the_notebook_names_a_log_that_is_not_whole(text, tmp_path, monkeypatch):
    log = tmp_path / "the.log"
    log.write_text(text)
    error = notebook(NOTEBOOK, monkeypatch, PICTURE=tmp_path / "picture.png", DGL_LOG=log)
    assert str(error).startswith(str(log))
