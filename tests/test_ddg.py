"""ResNet-110, DGL and the two delayed methods of ddg_comparisons, DDG and FR."""

import copy
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES, ROOT, assert_same_run, checkpoint_of, equal, load, log_of, run, state
from torch import nn

backprop = load("ddg_comparisons", "cifar_backprop")
cifar, utils, models = backprop.cifar, backprop.utils, sys.modules["models"]
METHODS = {"backprop": backprop}
for name in ("dgl", "ddg", "features_replay"):
    METHODS[name] = load("ddg_comparisons", f"cifar_{name}")
DELAYED = ["ddg", "features_replay"]
methods = pytest.mark.parametrize("method", METHODS)
delayed = pytest.mark.parametrize("method", DELAYED)


def random_batches(device, batch_size=16, size=40):
    """The last batch is incomplete, and the next pass begins with a complete one again."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (size, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return cifar.Batches(images, torch.arange(size) % 10, batch_size, device, generator)


class Training:
    """What a script's main makes, for a small network."""

    def __init__(self, method, depth=8, num_splits=2, device="cpu", flags=(), model=None):
        self.script, self.device, script = METHODS[method], torch.device(device), METHODS[method]
        self.args = script.parse_args(["--depth", str(depth), "--num_splits", str(num_splits), *flags])
        torch.manual_seed(0)
        network = script.DGLNet if method == "dgl" else script.ResNet
        model = model or network(10, depth, num_splits)
        self.model = utils.to_device(model, self.args, self.device)
        self.autocast = utils.autocast(self.args, self.device)
        if method == "backprop":
            self.optimizers, self.scalers = script.make_optimizer(self.model), cifar.grad_scaler(self.args, self.device)
            self.meters = cifar.Meter(device)
        else:
            self.optimizers = script.make_optimizers(self.model)
            self.scalers = [cifar.grad_scaler(self.args, self.device) for _ in self.optimizers]
            self.meters = [cifar.Meter(device) for _ in self.optimizers] if method == "dgl" else cifar.Meter(device)
        delays = {"ddg": lambda: script.Delays(self.model, self.autocast), "features_replay": self.delays_of_fr}
        self.delays = [delays[method]()] if method in delays else []

    def delays_of_fr(self):
        return self.script.Delays(self.model)

    def epoch(self, batches):
        parts = self.model, self.optimizers, self.scalers, self.autocast, batches, self.meters, *self.delays
        self.script.train_epoch(*parts)
        return self


# The network


def test_resnet_110_is_the_published_one():
    model = models.ResNet(10)
    stages = [2 * 18 * (9 * c * c + 2 * c) for c in (16, 32, 64)]
    stages[1] -= 9 * 16 * 32  # the first convolution has fewer input channels
    stages[2] -= 9 * 32 * 64
    assert sum(p.numel() for p in model.parameters()) == 9 * 3 * 16 + 2 * 16 + sum(stages) + 650 == 1_727_962
    first, second = model.blocks
    assert (len(first), len(second)) == (29, 29 + 2)  # the flat list's 58 entries; flatten, Linear
    x = first(torch.randn(2, 3, 32, 32))
    assert x.shape == (2, 32, 16, 16)
    assert second[:-3](x).shape == (2, 64, 8, 8)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 109
    assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Conv2d))


def test_auxiliary_networks_have_the_true_size_of_the_features():
    for num_splits, shapes in [
        (1, [(64, 1, 1)]),
        (2, [(32, 16, 16), (64, 1, 1)]),
        (4, [(16, 32, 32), (32, 16, 16), (64, 8, 8), (64, 1, 1)]),
    ]:
        model = models.DGLNet(10, 110, num_splits).eval()
        x = torch.randn(2, 3, 32, 32)
        for n, shape in enumerate(shapes):
            logits, x = model(x, n)
            assert x.shape == (2, *shape)
            assert logits.shape == (2, 10)
        assert [net[0].output_size for net in model.auxiliary_nets[:-1]] == [s // 4 for _, s, _ in shapes[:-1]]
        assert [type(layer) for layer in model.auxiliary_nets[-1]] == [nn.Flatten, nn.Linear]


def test_every_parameter_of_dgl_is_used():
    model = models.DGLNet(10, 14, 3)
    sum(model(torch.randn(2, 3, 32, 32), n, upto=True)[0].sum() for n in range(3)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_all_methods_and_cuts_start_from_the_same_weights():
    def values(*modules):
        return [p for module in modules for p in module.parameters()]

    results = []
    for num_splits in (1, 2, 3):
        torch.manual_seed(0)
        results.append(values(models.ResNet(10, 14, num_splits)))
        torch.manual_seed(0)
        model = models.DGLNet(10, 14, num_splits)
        results.append(values(model.blocks, model.auxiliary_nets[-1]))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_initialisation():
    model = models.ResNet(10)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            expected = (2 / (9 * module.out_channels)) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.15)
            assert abs(module.weight.mean().item()) < 0.2 * expected
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    linear = model.blocks[-1][-1]
    for values in (linear.weight, linear.bias):  # torch's default: from U(-b, b) with b = 1 / sqrt(64)
        assert values.abs().max().item() < 1 / 8
    assert linear.weight.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)


def test_the_shortcut_is_every_second_pixel_and_zeros():
    block = models.BasicBlock(2, 4).eval()
    nn.init.zeros_(block.residual[3].weight)
    x = torch.arange(32.0).reshape(1, 2, 4, 4)
    expected = np.zeros((1, 4, 2, 2))
    expected[0, 0] = [[0, 2], [8, 10]]
    expected[0, 1] = [[16, 18], [24, 26]]
    assert np.array_equal(block(x).detach(), expected)
    same = models.BasicBlock(2, 2).eval()
    nn.init.zeros_(same.residual[3].weight)
    assert torch.equal(same(x), x)
    assert torch.equal(same(-x), torch.zeros_like(x))  # ReLU after the sum


def test_a_block_equals_the_formula_and_leaves_its_input():
    block = models.BasicBlock(2, 4)
    first, bn1, _, second, bn2 = block.residual
    x = torch.randn(3, 2, 4, 4)
    before, copied = x.clone(), copy.deepcopy((bn1, bn2))
    y = second(copied[0](first(x)).relu())
    shortcut = torch.cat([x[:, :, ::2, ::2], torch.zeros(3, 2, 2, 2)], 1)
    assert torch.equal(block(x), (copied[1](y) + shortcut).relu())
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("depth", "num_splits", "expected"),
    [
        (110, 1, [(0, 58)]),
        (110, 2, [(0, 29), (29, 58)]),
        (110, 4, [(0, 15), (15, 30), (30, 45), (45, 58)]),
        (14, 3, [(0, 4), (4, 8), (8, 10)]),
    ],
)
def test_cut(depth, num_splits, expected):
    assert models.cut(depth, num_splits) == expected


def test_the_largest_number_of_modules():
    """Against counting, for every K: ceil(N / K) entries a module, each with a block."""
    for depth in (8, 20, 56, 110):
        blocks = (depth - 2) // 2
        entries = [*"cbr", *"B" * blocks, "p"]
        possible = []
        for number in range(1, blocks + 4):
            size = -(-len(entries) // number)
            modules = [entries[n * size : (n + 1) * size] for n in range(number)]
            if all("B" in module for module in modules):
                possible.append(number)
                assert [entries[b:e] for b, e in models.cut(depth, number)] == modules
            else:
                with pytest.raises(ValueError, match="without a residual block"):
                    models.cut(depth, number)
        with pytest.raises(ValueError, match=f"largest possible is {possible[-1]} "):
            models.cut(depth, 2**31 - 1)


@methods
def test_a_wrong_depth_or_cut_is_refused(method, tmp_path):
    for flags, message in [
        (["--depth", 21], "--depth 21 is not 6n+2"),
        (["--depth", 7], "at least 8"),
        (["--num_splits", 0], "at least 1"),
        (["--num_splits", 16], "the largest possible is 15"),
        (["--depth", 8, "--num_splits", 3], "the largest possible is 2"),
    ]:
        status, _, error = run(f"ddg_comparisons/cifar_{method}.py", *flags, cwd=tmp_path)
        assert status == 2
        assert error.count("\n") == 1
        assert message in error
    assert not list(tmp_path.iterdir())


@methods
def test_only_dgls_momentum_starts_again_when_the_rate_drops(method):
    training = Training(method)
    optimizers = training.optimizers if isinstance(training.optimizers, list) else [training.optimizers]
    momentum = [state["momentum_buffer"] for optimizer in optimizers for state in optimizer.state.values()]
    assert len(momentum) == len(list(training.model.parameters()))
    for epoch in (1, 149, 150, 151, 224, 225, 226, 300):
        for m in momentum:
            m.fill_(2)
        training.script.set_learning_rate(training.optimizers, epoch)
        assert {m.unique().item() for m in momentum} == {0 if method == "dgl" and epoch in (150, 225) else 2}


@pytest.mark.parametrize("device", DEVICES)
@methods
def test_evaluate_is_one_pass_and_equals_the_forward_passes(method, device):
    training = Training(method, device=device)
    batches = random_batches(device)
    for _ in range(3):  # so that not all images get the same class
        training.epoch(batches)
    test = cifar.Batches(batches.images[:, 4:36, 4:36].cpu(), batches.labels.cpu(), 16, training.device)
    model, runs = training.model, []
    hook = model.blocks[0].register_forward_hook(lambda *_: runs.append(1))
    top1 = training.script.evaluate(model, training.autocast, test)
    hook.remove()
    model.eval()
    assert len(runs) == len(test) == 3
    top1 = top1 if isinstance(top1, list) else [top1]
    with torch.no_grad():
        for n, value in enumerate(top1):
            correct = 0
            for x, y in test:
                logits = model(x, n, upto=True)[0] if method == "dgl" else model(x)
                correct += (logits.argmax(1) == y).sum().item()
            assert value == pytest.approx(100 * correct / 40)
    assert len(top1) == (2 if method == "dgl" else 1)


# DGL


def test_dgls_first_module_never_sees_the_seconds_loss():
    one, other = Training("dgl"), Training("dgl")
    with torch.no_grad():
        other.model.auxiliary_nets[1][1].weight.mul_(-3)  # another second loss
    for training in (one, other):
        training.epoch(random_batches("cpu"))
    for parts in ("blocks", "auxiliary_nets"):
        first, second = (state(getattr(t.model, parts)[0]) for t in (one, other))
        assert equal(first, second)
    assert not equal(state(one.model.blocks[1]), state(other.model.blocks[1]))
    model, x = one.model, torch.randn(4, 3, 32, 32)
    for n in range(2):
        model.zero_grad()
        with torch.no_grad():
            x_n = x if n == 0 else model.blocks[0](x)
        F.cross_entropy(model(x_n, n)[0], torch.arange(4)).backward()
        others = [*model.blocks[1 - n].parameters(), *model.auxiliary_nets[1 - n].parameters()]
        assert all(p.grad is None for p in others)


def test_what_follows_the_drop_equals_a_new_sgd_to_the_bit():
    whole = Training("dgl").epoch(random_batches("cpu"))
    new = Training("dgl", model=copy.deepcopy(whole.model))
    for n, parts in enumerate(zip(new.model.blocks, new.model.auxiliary_nets)):
        parameters = [p for part in parts for p in part.parameters()]
        new.optimizers[n] = torch.optim.SGD(parameters, lr=0.001, momentum=0.9, weight_decay=5e-4, fused=True)
    for epoch in (150, 151):  # in the second, momentum is kept
        whole.script.set_learning_rate(whole.optimizers, epoch)
        for training in (whole, new):
            training.epoch(random_batches("cpu"))
    assert equal(state(whole.model), state(new.model))


@pytest.mark.parametrize("stop", [149, 150])
def test_a_run_resumed_at_the_drop_equals_an_unbroken_one(stop, image_folder, tmp_path):
    """From a checkpoint of one epoch that is said to be of epoch 148, to epoch 151."""
    script, name = "ddg_comparisons/cifar_dgl.py", "ddg_comparisons-cifar_dgl.pt"
    flags = ["--data", image_folder, "--depth", 8, "--batch-size", 8, "--threads", 1, "--resume", "auto"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder, ends in ((whole, [151]), (parts, [stop, 151])):
        folder.mkdir()
        assert run(script, *flags, "--epochs", 1, cwd=folder)[0] == 0
        torch.save(checkpoint_of(folder) | {"epoch": 148}, folder / name)
        for end in ends:
            assert run(script, *flags, "--epochs", end, cwd=folder)[0] == 0
    assert [line.split(",")[1] for line in log_of(whole)[-6::2]] == [" epoch 149", " epoch 150", " epoch 151"]
    assert_same_run(parts, whole)


def test_bn_init_is_for_the_auxiliary_networks_alone(image_folder, tmp_path, monkeypatch):
    script, found = METHODS["dgl"], {}
    monkeypatch.setattr(script, "train_epoch", lambda model, *_: found.update(state(model)))
    monkeypatch.setattr(script, "evaluate", lambda *_: [])
    starts = []
    for kind in ("ones", "uniform"):
        flags = ["--data", image_folder, "--bn-init", kind, "--epochs", 1, "--depth", 8, "--save_folder", tmp_path]
        script.main([str(flag) for flag in flags])
        starts.append(dict(found))
    ones, uniform = starts
    changed = {name for name in ones if not torch.equal(ones[name], uniform[name])}
    assert changed == {f"auxiliary_nets.0.{layer}.weight" for layer in (2, 5, 8, 13, 16, 19)}
    values = torch.cat([uniform[name] for name in changed])
    assert 0 <= values.min() < 0.1 < 0.9 < values.max() < 1


# DDG and FR


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@delayed
def test_one_module_equals_backprop_to_the_bit(method, precision):
    expected, training = (Training(m, num_splits=1, flags=["--precision", precision]) for m in ("backprop", method))
    for t in (expected, training):
        batches = random_batches("cpu")
        t.epoch(batches).epoch(batches)
    assert equal(state(training.model), state(expected.model))
    assert training.meters.pop() == expected.meters.pop()


class Linears(nn.Module):
    """Three linear modules, 4 -> 5 -> 6 -> 3."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(i, o) for i, o in ((4, 5), (5, 6), (6, 3)))


def by_numpy(weights, batches, stale, momentum=0.9, lr=0.01, decay=5e-4):
    """DDG (stale weights) or FR (current weights) on linear modules, as the definition says; weights after each step.

    At iteration t (from 0) module k (from 0, of 3) takes batch s = t - (2 - k), if there is one. The gradient
    with respect to its output on batch s comes from module k+1, which took that batch one iteration ago.
    """
    weights, history = [(w.copy(), b.copy()) for w, b in weights], []
    velocity = [(np.zeros_like(w), np.zeros_like(b)) for w, b in weights]
    inputs, of_that_time, passed = {}, {}, {}
    for t, (x, labels) in enumerate(batches):
        for k, (w, b) in enumerate(weights):
            inputs[k, t], of_that_time[k, t] = x, w.copy()
            x = x @ w.T + b
        p = np.exp(x - x.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        passed[2, t] = (p - np.eye(3)[labels]) / len(labels)
        updates = {}
        for k in range(3):
            s = t - (2 - k)
            if s >= 0:
                g = passed[k, s]
                updates[k] = g.T @ inputs[k, s], g.sum(0)
                passed[k - 1, s] = g @ (of_that_time[k, s] if stale else weights[k][0])
        for k, gradients in updates.items():
            for value, v, g in zip(weights[k], velocity[k], gradients):
                g += decay * value
                v *= momentum
                v += g
                value -= lr * (g + momentum * v if momentum else v)
        history.append([(w.copy(), b.copy()) for w, b in weights])
    return history


class OneByOne:
    """Batches, with a call of `after` after each iteration."""

    def __init__(self, batches, after=lambda: None, device="cpu"):
        self.batches, self.after, self.device = batches, after, torch.device(device)

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches:
            yield batch
            self.after()


def linear_run(method, lr, plain=False):
    """6 iterations of a script's train_epoch on Linears, in two epochs: (weights after each, at the start, batches)."""
    torch.manual_seed(0)
    model = Linears()
    training = Training(method, model=model)
    for optimizer in training.optimizers:
        group = optimizer.param_groups[0]
        group["lr"] = lr
        if plain:
            group.update(momentum=0, weight_decay=0, nesterov=False)
    batches = [(torch.randn(size, 4), torch.randint(3, (size,))) for size in (7, 3, 7, 7, 7, 2)]

    def values():
        return [tuple(p.detach().double().numpy() for p in (b.weight, b.bias)) for b in model.blocks]

    start, steps = values(), []
    for part in (batches[:2], batches[2:]):  # the delays run on across epochs, whose last batches are incomplete
        training.epoch(OneByOne(part, lambda: steps.append(values())))
    return steps, start, [(x.double().numpy(), y.numpy()) for x, y in batches]


def distance(steps, expected):
    return max(abs(a - b).max() for s, e in zip(steps, expected) for x, y in zip(s, e) for a, b in zip(x, y))


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "nesterov"])
@delayed
def test_three_modules_equal_the_definition_in_numpy(method, plain):
    """The learning rate is large, so that stale weights differ from current ones."""
    steps, start, batches = linear_run(method, lr=0.5, plain=plain)
    settings = {"lr": 0.5, "momentum": 0, "decay": 0} if plain else {"lr": 0.5}
    expected = by_numpy(start, batches, stale=method == "ddg", **settings)
    assert len(steps) == len(expected) == 6
    assert distance(steps, expected) < 1e-5
    other = by_numpy(start, batches, stale=method != "ddg", **settings)
    assert distance(steps, other) > 1e-3  # the weights of the other time would be noticed
    for t, step in enumerate(steps):  # module k, from 0, begins at iteration 2-k, weight decay included
        before = steps[t - 1] if t else start
        assert [not np.array_equal(a[0], b[0]) for a, b in zip(step, before)] == [t >= 2, t >= 1, True]


def test_ddg_uses_the_weights_of_that_time_and_plain_pytorch_would_not_let_it():
    """The stored pass survives changes of the block's weights; one on the block's own parameters raises."""
    Graph = METHODS["ddg"].Graph
    block = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    x = torch.randn(4, 3, requires_grad=True)
    own = block(x)
    graph = Graph(block, x, block.named_parameters())
    expected = torch.autograd.grad(own.sum(), [x, *block.parameters()], retain_graph=True)
    with torch.no_grad():
        for p in block.parameters():
            p.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        own.sum().backward()
    x.grad = None
    graph.backward(torch.ones(4, 2))
    assert all(torch.equal(g, e) for g, e in zip([x.grad, *(p.grad for p in block.parameters())], expected))


@delayed
def test_what_waits(method):
    """Module k, from 1 to K = 3: K-k graphs or inputs; a gradient as soon as module k+1 has had one."""
    training = Training(method, depth=14, num_splits=3)
    (delays,), batches = training.delays, random_batches("cpu")
    waiting = []

    def look():
        kept = delays.graphs if method == "ddg" else delays.inputs
        waiting.append(([len(k) for k in kept], [g is not None for g in delays.gradients]))

    for _ in range(2):  # of three batches
        training.epoch(OneByOne(list(batches), look))
    assert waiting == [([1, 1], [False, True]), *[([2, 1], [True, True])] * 5]


@delayed
def test_running_statistics_count_every_batch_once(method):
    """As in plain forward passes with the same weights: here they never change."""
    training, batches = Training(method, depth=14, num_splits=3), random_batches("cpu")
    training.script.set_learning_rate(training.optimizers, 1)
    for optimizer in training.optimizers:
        optimizer.param_groups[0]["lr"] = 0.0
    expected = copy.deepcopy(training.model).train()
    passes = [*batches, *batches]
    training.epoch(OneByOne(passes))
    with torch.no_grad():
        for x, _ in passes:
            expected(x)
    assert equal(state(training.model), state(expected))
    assert expected.blocks[0][1].num_batches_tracked == 6


def through_a_file(part, path):
    torch.save(part.state_dict(), path)
    return torch.load(path, map_location="cpu", weights_only=True)


def parts_of(training):
    return [training.model, *training.optimizers, *training.scalers, *training.delays]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", pytest.param("fp16", marks=pytest.mark.slow)])
@delayed
def test_resume_in_the_middle_of_the_delays(method, precision, device, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    batches = [*random_batches(device, 4, 10), *random_batches(device, 4, 16)]  # 4, 4, 2; the last one waits
    make = {"depth": 14, "num_splits": 3, "device": device, "flags": ["--precision", precision]}
    whole, first, second = (Training(method, **make) for _ in range(3))
    first.epoch(OneByOne(batches[:3], device=device))
    for part, same_part in zip(parts_of(first), parts_of(second)):
        same_part.load_state_dict(through_a_file(part, tmp_path / "part"))
    assert equal(state(second.model), state(first.model))  # rebuilding graphs left the running statistics alone
    second.epoch(OneByOne(batches[3:], device=device))
    whole.epoch(OneByOne(batches[:3], device=device)).epoch(OneByOne(batches[3:], device=device))
    a, b = state(whole.model), state(second.model)
    if device == "cpu":
        assert equal(a, b)
        saved = [through_a_file(t.delays[0], tmp_path / "delays") for t in (whole, second)]
        assert torch.equal(saved[0]["gradients"][0], saved[1]["gradients"][0])
    else:
        assert all(torch.allclose(a[k].float(), b[k].float(), atol=1e-2) for k in a)
        assert second.delays[0].gradients[0].device.type == device


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
@methods
def test_half_precision(method, precision, device):
    losses = []
    for flags in ([], ["--precision", precision]):
        training = Training(method, device=device, flags=flags).epoch(random_batches(device, size=64))
        meter = training.meters[-1] if method == "dgl" else training.meters
        losses.append(meter.pop()[0])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.2)


@delayed
def test_loss_scales_that_differ_in_time_and_between_modules_leave_no_trace(method):
    """Powers of two, in float32: gradients are scaled and unscaled exactly."""
    plain, scaled = (Training(method, depth=14, num_splits=3) for _ in range(2))
    scaled.scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**n, growth_interval=1) for n in (3, 7, 10)]
    for training in (plain, scaled):
        training.epoch(random_batches("cpu")).epoch(random_batches("cpu"))
    assert scaled.scalers[0].get_scale() != 2.0**3
    for a, b in zip(state(plain.model).values(), state(scaled.model).values()):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@methods
def test_the_cpu_never_waits_for_the_gpu_in_the_training_loop(method, precision):
    training = Training(method, device="cuda", flags=["--precision", precision])
    training.epoch(random_batches("cuda"))  # cuDNN chooses its kernels
    batches = OneByOne(list(random_batches("cuda")), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.epoch(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# memory.py


@pytest.fixture
def memory(monkeypatch):
    """memory.py, with the scripts of its own folder: it imports them by name when it measures them."""
    for name in METHODS:
        monkeypatch.delitem(sys.modules, f"cifar_{name}", raising=False)
    monkeypatch.syspath_prepend(ROOT / "ddg_comparisons")
    return load("ddg_comparisons", "memory")


def test_memory_equals_counting_by_hand(memory):
    """Depth 8 in float32, batch 4, K = 2: a stem and a block of 16 channels, two blocks of 32 and 64 channels."""
    results = {m: memory.measure(m, 8, 2, 4, torch.device("cpu")) for m in memory.SCRIPTS}
    stage = 4 * 4 * 16 * 32 * 32  # bytes of a feature map of the first stage; 1/2 and 1/4 of it in the others
    images = 4 * 4 * 3 * 32 * 32
    # The stem keeps its input, its convolution's output and, in place, BatchNorm's; a block, both convolutions' outputs
    # and BatchNorms'. Per channel, BatchNorm keeps mean and deviation.
    lower = images + 2 * stage + 4 * stage + 3 * 2 * 4 * 16
    upper = 4 * stage // 2 + 4 * stage // 4 + 2 * 2 * 4 * (32 + 64)
    head = 4 * 4 * (64 + 10 + 10 + 1) + 4 * 8  # pooled features, logits, their softmax, the loss, labels
    peak = {method: result[0] for method, result in results.items()}
    assert peak["backprop"] == pytest.approx(lower + upper, abs=2 * head)
    assert peak["DDG"] == pytest.approx(2 * lower + upper, abs=2 * head)
    assert peak["FR"] == pytest.approx(images + lower, abs=2 * head)
    assert lower < peak["DGL"] < 1.1 * lower  # and the auxiliary network's
    block = METHODS["ddg"].ResNet(10, 8, 2).blocks[0]
    weights = 4 * sum(p.numel() for p in block.parameters())
    assert results["backprop"][1:] == results["DGL"][1:] == [0, 0, 0]
    assert results["DDG"][1:] == [lower, stage, weights]
    assert results["FR"][1:] == [images, stage, 0]


def test_memory_prints_a_table_and_refuses_a_wrong_cut(memory, tmp_path):
    flags = ["--depth", 8, "--batch-size", 4]
    status, table, _ = run("ddg_comparisons/memory.py", *flags, "--num_splits", 1, 2, cwd=tmp_path)
    assert status == 0
    head, rule, *rows = table.splitlines()
    assert len({line.count("|") for line in (head, rule, *rows)}) == 1
    assert [row.split(" | ")[:2] for row in rows] == [
        [f"| {m}", k] for k in "12" for m in ("backprop", "DGL", "DDG", "FR")
    ]
    status, _, error = run("ddg_comparisons/memory.py", *flags, "--num_splits", 2, 3, cwd=tmp_path)
    assert status == 2
    assert error.count("\n") == 1
    assert "--num_splits 3" in error
