"""The networks of imagenet_dgl: the published splits, and `decouple` on everything that torchvision has."""

import contextlib
import copy
import itertools
import re
import runpy
import sys
import time

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT, forked, load, refused
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.regnet import BlockParams

models = load("imagenet_dgl", "models")
auxiliary, decoupling, costing, timing = (
    sys.modules[f"models.{name}"] for name in ("auxiliary", "decouple", "costs", "timing")
)


@contextlib.contextmanager
def meta():
    """The meta device, with the regnets, which calculate their widths with tensors."""
    from_init_params = BlockParams.from_init_params

    def on_cpu(*args, **kwargs):
        with torch.device("cpu"):
            return from_init_params(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(BlockParams, "from_init_params", on_cpu)
        yield


def build_on_meta(*args, **kwargs):
    with meta():
        return models.build_dgl(*args, **kwargs)


def compose(model, x):
    for block in model.blocks:
        x = block(x)
    return model.auxiliary_nets[-1](x)


def count(module, kind):
    return sum(isinstance(m, kind) for m in module.modules())


def operations(graphs):
    return [(n.op, str(n.target)) for g in graphs for n in g.nodes if n.op not in ("placeholder", "output")]


# Every architecture


def slow(*arguments):
    return pytest.param(*arguments, marks=pytest.mark.slow)


# One of each kind; the others are `slow`
KINDS = {"convnext_tiny", "googlenet", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5"}
KINDS |= {"squeezenet1_1", "swin_v2_t", "vit_b_32"}


@pytest.mark.parametrize("arch", [arch if arch in KINDS else slow(arch) for arch in models.ARCHITECTURES])
def test_every_architecture_is_torchvisions_and_can_be_cut(arch):
    """At its published image size, on the meta device: the same operations on the same parameters, in two modules."""
    weights = torchvision.models.get_model_weights(arch).DEFAULT
    size = weights.transforms().crop_size[0]
    with meta():
        plain = models.build_plain(arch, 1000, size)
    expected = weights.meta["num_params"]
    if arch == "inception_v3":
        expected -= sum(p.numel() for p in torchvision.models.inception.InceptionAux(768, 1000).parameters())
    assert sum(p.numel() for p in plain.parameters()) == expected
    model = models.decouple(plain, 2, 1000, size)
    assert len(model.blocks) == len(model.auxiliary_nets) == 2
    parts = [*model.blocks, model.auxiliary_nets[1]]
    assert operations(part.graph for part in parts) == operations([decoupling.Tracer(deep=True).trace(plain)])
    of_parts = [p for part in parts for p in part.parameters()]
    assert len(of_parts) == len({*of_parts}) and {*of_parts} == {*plain.parameters()}
    assert all([*module.parameters()] for module in [*model.blocks, *model.auxiliary_nets])
    logits, _ = model(torch.empty(3, 3, size, size, device="meta"), 0)
    assert logits.shape == (3, 1000)


# One a family, with small images; the number of modules; whether training mode has random numbers
CHEAP = [
    slow("alexnet", 64, 3, True),
    slow("convnext_tiny", 32, 5, True),
    slow("densenet121", 32, 4, False),
    slow("efficientnet_b0", 32, 5, True),
    slow("efficientnet_v2_s", 32, 2, True),
    slow("googlenet", 32, 3, True),
    slow("inception_v3", 75, 2, True),
    slow("maxvit_t", 224, 4, True),
    slow("mnasnet0_5", 32, 3, True),
    slow("mobilenet_v2", 32, 2, True),
    slow("mobilenet_v3_small", 32, 6, True),
    slow("regnet_y_400mf", 32, 2, False),
    slow("resnext50_32x4d", 32, 3, False),
    ("shufflenet_v2_x0_5", 32, 4, False),
    ("squeezenet1_1", 32, 3, True),
    ("swin_t", 32, 4, True),
    slow("swin_v2_t", 32, 2, True),
    slow("vgg11_bn", 32, 5, True),
    slow("vit_b_32", 64, 3, False),
]


@pytest.mark.parametrize(("arch", "size", "num_modules", "random"), CHEAP)
def test_the_modules_composed_are_the_uncut_network(arch, size, num_modules, random):
    torch.manual_seed(0)
    plain = models.build_plain(arch, 10, size)
    model = models.decouple(plain, num_modules, 10, size)
    assert len(model.blocks) == num_modules
    x, outputs = torch.randn(1 if size == 224 else 3, 3, size, size), {}
    for mode in (True, False):
        plain.train(not mode)
        model.train(mode)
        torch.manual_seed(1)
        with torch.no_grad():
            composed = compose(model, x)
        plain.train(mode)
        for seed in (1, 2):
            torch.manual_seed(seed)
            with torch.no_grad():
                outputs[mode, seed] = plain(x)
        torch.testing.assert_close(composed, outputs[mode, 1])
    assert torch.equal(outputs[False, 1], outputs[False, 2])
    assert torch.equal(outputs[True, 1], outputs[True, 2]) != random  # dropout and stochastic depth


@pytest.mark.parametrize("arch", ["resnet18", slow("mobilenet_v3_small")])
def test_one_module_trains_to_the_weights_of_the_plain_network(arch):
    networks = []
    for build in (models.build_plain, lambda *args: models.build_dgl(*args, num_modules=1)):
        torch.manual_seed(0)
        network = build(arch, 10, 32)
        networks.append(network)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            x, labels = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
            logits = network(x, 0)[0] if network is not networks[0] else network(x)
            optimizer.zero_grad()
            F.cross_entropy(logits, labels).backward()
            optimizer.step()
    plain, dgl = networks
    assert len(dgl.blocks) == 1
    weights, of_dgl = [*plain.state_dict().values()], [*dgl.state_dict().values()]
    assert len(weights) == len(of_dgl)
    assert all(torch.equal(a, b) for a, b in zip(weights, of_dgl))


# The published networks

SPLITS = [("vgg13", 1, 10), ("vgg13", 3, 4), ("vgg19", 4, 4), ("vgg19", 8, 2)]


@pytest.mark.parametrize(("arch", "block_size", "num_modules"), SPLITS)
def test_published_vgg_splits(arch, block_size, num_modules):
    model = build_on_meta(arch, 1000, 224, block_size=block_size)
    sizes = [count(block, nn.Conv2d) for block in model.blocks]
    assert len(sizes) == num_modules == len(model.auxiliary_nets)
    assert sizes[:-1] == [block_size] * (num_modules - 1) and sum(sizes) == int(arch[3:]) - 3
    assert all(isinstance(block[0], (nn.Conv2d, nn.MaxPool2d)) for block in model.blocks)
    assert all(isinstance(block[-1], nn.ReLU) for block in model.blocks)
    x = torch.empty(2, 3, 224, 224, device="meta")
    for n in range(num_modules):
        logits, x = model(x, n)
        assert logits.shape == (2, 1000)
        if n < num_modules - 1:  # mlp-sr at a quarter of the true size
            assert model.auxiliary_nets[n][0].output_size == (-(-x.shape[2] // 4),) * 2
    assert x.shape == (2, 512, 14, 14)
    linear = [m for m in model.auxiliary_nets[-1] if isinstance(m, nn.Linear)]
    assert [m.in_features for m in linear] == [25088, 4096, 4096]
    assert not count(model, nn.Dropout)


def test_published_vgg_sides():
    model = build_on_meta("vgg13", 1000, 224)
    x, shapes = torch.empty(2, 3, 224, 224, device="meta"), []
    for block in model.blocks:
        x = block(x)
        shapes.append((x.shape[1], x.shape[2]))
    widths = [(64, 224)] * 2 + [(128, 112)] * 2 + [(256, 56)] * 2 + [(512, 28)] * 2 + [(512, 14)] * 2
    assert shapes == widths


@pytest.mark.slow
def test_the_published_vgg_is_torchvisions_with_other_hidden_layers():
    torch.manual_seed(0)
    model, plain = models.build_dgl("vgg11", 10, 32, block_size=3), torchvision.models.vgg11_bn(num_classes=10)
    trunk = [p for block in model.blocks for p in block.state_dict().values()]
    of_plain = [*plain.features.state_dict().values()]
    assert [p.shape for p in trunk] == [p.shape for p in of_plain]
    for ours, theirs in zip(trunk, of_plain):
        theirs.copy_(ours)
    linear = [m for m in model.auxiliary_nets[-1] if isinstance(m, nn.Linear)]
    for ours, theirs in zip(linear, plain.classifier[::3]):
        theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(compose(model.eval(), x), plain.eval()(x))


def test_published_resnet_152():
    model = build_on_meta("resnet152", 1000, 224)
    assert [len(block) for block in model.blocks] == [26, 25]
    x = torch.empty(2, 3, 224, 224, device="meta")
    logits, x = model(x, 0)
    assert logits.shape == (2, 1000) and x.shape == (2, 1024, 14, 14)
    logits, x = model(x, 1)
    assert logits.shape == (2, 1000) and x.shape == (2, 2048, 7, 7)
    pool, _, classifier = model.auxiliary_nets[1]
    assert pool.output_size == (1, 1) and classifier.in_features == 2048
    assert model.auxiliary_nets[0][0].output_size == (4, 4)
    with meta():
        plain = torchvision.models.resnet152()
    parts = [*model.blocks, classifier]
    assert sum(p.numel() for m in parts for p in m.parameters()) == sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize(
    ("arch", "num_modules", "true", "published"), [("resnet152", 2, [4], [2]), ("resnet18", 3, [14, 4], [7, 2])]
)
def test_published_size_of_auxiliary_networks(arch, num_modules, true, published):
    """Of 14x14 pixels: 2x2 instead of 4x4; of 56x56: 7x7 instead of 14x14. All else is the same."""
    networks = [build_on_meta(arch, 1000, 224, num_modules=num_modules, aux_size=s) for s in ("true", "published")]
    for model, sides in zip(networks, (true, published)):
        assert [net[0].output_size for net in model.auxiliary_nets[:-1]] == [(side, side) for side in sides]
        for net in model.auxiliary_nets[:-1]:
            net[0].output_size = None
    assert str(networks[0]) == str(networks[1])


def test_initialisation():
    torch.manual_seed(0)
    vgg, resnet = models.build_dgl("vgg11", 10, 32, block_size=4), models.build_dgl("resnet18", 10, 32, num_modules=3)
    for m in [*vgg.modules(), *resnet.modules()]:
        if isinstance(m, nn.Conv2d):
            fan_out = m.out_channels * m.kernel_size[0] * m.kernel_size[1]
            assert m.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
            assert m.weight.abs().max() > 3 * m.weight.std()  # normal, not uniform
            assert m.bias is None or not m.bias.any()
        elif isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert (m.weight == 1).all() and not m.bias.any()
    for m in (m for m in vgg.modules() if isinstance(m, nn.Linear)):
        assert m.weight.std().item() == pytest.approx(0.01, rel=0.05) and not m.bias.any()
    for m in (m for m in resnet.modules() if isinstance(m, nn.Linear)):  # the default is uniform
        assert m.weight.abs().max().item() == pytest.approx(m.in_features**-0.5, rel=0.05) and m.bias.any()


# Auxiliary networks


@pytest.mark.parametrize("shape", [(2, 8, 14, 14), (2, 8, 9, 3), (2, 8, 1, 1)])
def test_mlp_sr(shape):
    net = auxiliary.auxiliary_net(shape, 10)
    assert net[0].output_size == (-(-shape[2] // 4), -(-shape[3] // 4))
    linear = [m for m in net if isinstance(m, nn.Linear)]
    assert [m.out_features for m in linear] == [32, 32, 32, 10]
    convolutions = [m for m in net if isinstance(m, nn.Conv2d)]
    assert [(m.out_channels, m.kernel_size, m.bias) for m in convolutions] == [(8, (1, 1), None)] * 3
    net(torch.randn(shape)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    without = auxiliary.auxiliary_net(shape, 10, nlin=0, num_hidden=1)
    assert count(without, nn.Conv2d) == 0 and count(without, nn.Linear) == 2 and without[0].output_size == 2


def test_auxiliary_networks_for_other_shapes():
    torch.manual_seed(0)
    x = torch.randn(4, 5, 5, 8)
    first, last = (auxiliary.auxiliary_net(s, 10, channels_last=s[3] == 8) for s in ((4, 8, 5, 5), (4, 5, 5, 8)))
    first.load_state_dict({f"{int(k.split('.')[0]) - 1}.{k.split('.')[1]}": v for k, v in last.state_dict().items()})
    assert torch.equal(last(x), first(x.permute(0, 3, 1, 2)))
    tokens, vectors = auxiliary.auxiliary_net((4, 7, 8), 10), auxiliary.auxiliary_net((4, 8), 10)
    assert [m.in_features for m in tokens if isinstance(m, nn.Linear)] == [8] * 4
    vectors.load_state_dict(
        {f"{int(k.split('.')[0]) - 3}.{k.split('.')[1]}": v for k, v in tokens.state_dict().items()}
    )
    x = torch.randn(4, 7, 8)
    torch.testing.assert_close(tokens(x), vectors(x.mean(1)))


def test_what_kinds_of_representation_there_are():
    shapes = {}
    for arch in ("swin_t", "vit_b_16", "convnext_tiny"):
        with meta():
            model = models.decouple(models.build_plain(arch, 10, 224), 4, 10, 224)
            x = torch.empty(2, 3, 224, 224)
        for block in model.blocks[:-1]:
            x = block(x)
            shapes.setdefault(arch, []).append(tuple(x.shape[1:]))
    assert all(side == also and channels % 96 == 0 for side, also, channels in shapes["swin_t"])
    assert shapes["vit_b_16"] == [(197, 768)] * 3
    assert all(side == also != channels for channels, side, also in shapes["convnext_tiny"])


# decouple


def user_network():
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Dropout(0.5)]
    layers += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 24, 3), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(24, 5))


def test_a_users_sequential():
    torch.manual_seed(0)
    plain = user_network()
    before = copy.deepcopy(plain.state_dict())
    model = models.decouple(plain, 3, 5, 16)
    x = torch.randn(6, 3, 16, 16)
    torch.testing.assert_close(compose(model.eval(), x), plain.eval()(x))
    of_blocks = {name: p for block in model.blocks for name, p in block.named_parameters()}
    of_blocks |= dict(model.auxiliary_nets[-1].named_parameters())
    assert of_blocks.keys() == dict(plain.named_parameters()).keys()
    assert all(p is of_blocks[name] for name, p in plain.named_parameters())
    assert all(torch.equal(before[name], value) for name, value in plain.state_dict().items())
    assert [type(plain[int(name)]) for name, _ in model.auxiliary_nets[-1].named_children()] == [
        *(nn.AdaptiveAvgPool2d, nn.Flatten, nn.Dropout, nn.Linear)
    ]
    copy.deepcopy(model).load_state_dict(model.state_dict())


def test_a_module_learns_from_its_own_loss_only():
    torch.manual_seed(0)
    model = models.decouple(user_network(), 3, 5, 16)
    x = torch.randn(6, 3, 16, 16)
    for n in range(3):
        model.zero_grad()
        logits, representation = model(x, n)
        saved = representation.detach().clone()
        F.cross_entropy(logits, torch.arange(6) % 5).backward()
        for m, parts in enumerate(zip(model.blocks, model.auxiliary_nets)):
            assert all((p.grad is not None) == (m == n) for part in parts for p in part.parameters())
        x = representation.detach()
        if n < 2:  # the next block leaves its input as it is
            model(x, n + 1)
            assert torch.equal(x, saved)


def test_dgl_equals_training_each_module_by_itself():
    """What a block hands on shares memory with what the module has saved; its gradients are as if it did not."""
    torch.manual_seed(0)
    model = models.decouple(models.build_plain("mobilenet_v3_small", 5, 32), 3, 5, 32)
    other, x, labels = copy.deepcopy(model), torch.randn(6, 3, 32, 32), torch.arange(6) % 5
    xs = [x]
    torch.manual_seed(1)
    outputs = []
    for n in range(3):  # all forward passes first, as module-parallel workers may do
        logits, representation = model(xs[-1], n)
        outputs.append(logits)
        xs.append(representation.detach())
    sum(F.cross_entropy(logits, labels) for logits in outputs).backward()
    torch.manual_seed(1)
    for n in range(3):
        F.cross_entropy(other(xs[n].clone(), n)[0], labels).backward()
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(x + F.dropout(self.norm(self.conv(x)), 0.1, self.training))


@pytest.mark.parametrize(("num_modules", "balance"), [(2, "flops"), (3, "memory"), slow(3, "flops"), slow(2, "memory")])
def test_the_heaviest_module_is_as_light_as_possible(num_modules, balance):
    """Against all ways to cut, each of them measured."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), Residual(8), Residual(8), nn.Conv2d(8, 16, 1), nn.Tanh()]
    layers += [Residual(16), nn.AvgPool2d(2), nn.Conv2d(16, 32, 2), nn.BatchNorm2d(32), nn.ReLU(inplace=True)]
    plain = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))

    def heaviest(model):
        rows = models.costs(model, 16)
        return max(r["activations"] if balance == "memory" else r["flops"] + r["auxiliary_flops"] for r in rows)

    def make_net(shape, channels_last):
        return auxiliary.auxiliary_net(shape, 5, 3, 3, channels_last)

    network = decoupling.Network(plain, 16, make_net)
    all_ways = []
    for cuts in itertools.combinations(network.places, num_modules - 1):
        ends = [1, *cuts, network.head]
        blocks = [network.part(*pair) for pair in itertools.pairwise(ends)]
        if all([*block.parameters()] for block in blocks):
            nets = [make_net(*network.layout(cut)) for cut in cuts]
            model = models.DGLNet(blocks, [*nets, network.part(network.head, network.end)])
            all_ways.append(heaviest(model))
    assert len(all_ways) > 5 and min(all_ways) < max(all_ways)
    assert heaviest(models.decouple(plain, num_modules, 5, 16, balance)) == min(all_ways)


# Balanced by time


class Cost(nn.Conv2d):
    """A convolution said to take `forward` seconds, and `backward` seconds more if its input needs a gradient."""

    def __init__(self, forward, backward=0):
        super().__init__(3, 3, 1)
        self.seconds = forward, backward


def fake_timer(seen, net=1):
    """A Timer whose times are those of the `Cost`s in a part, or `net` for an auxiliary network."""

    def timer(part, x, needs_gradient):
        costs = [m.seconds for m in part.modules() if isinstance(m, Cost)]
        torch.rand(1)  # as dropout
        seen.append((len(costs), needs_gradient, max((p.numel() for p in part.parameters()), default=0)))
        first = 0 if needs_gradient else costs[0][1] if costs else 0
        return sum(map(sum, costs)) - first if costs else net, part(x)

    timer.device, timer.images = torch.device("cpu"), lambda size, dtype: torch.zeros(2, 3, size, size, dtype=dtype)
    return timer


def timed_network(costs):
    layers = [layer for cost in costs for layer in (Cost(*cost), nn.BatchNorm2d(3), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))


@pytest.mark.parametrize(
    ("costs", "num_modules", "net", "sizes"),
    [
        ([(50, 0), (10, 0), (10, 0), (10, 0), (11, 0), (10, 0)], 2, 1, [1, 5]),  # FLOPs would make it 3 and 3
        ([(10, 0)] * 8, 4, 0.1, [2, 2, 2, 2]),
        ([(10, 0), (1, 9), (12, 0)], 2, 0, [1, 2]),  # a layer's backward pass is cheaper where a module begins
        ([(10, 0)] * 4, 2, 21, [1, 3]),  # the auxiliary network counts
    ],
)
def test_balanced_by_time(costs, num_modules, net, sizes):
    """Modules within 5 % of each other where there is a place for it; every segment is timed twice at most."""
    torch.manual_seed(0)
    network, seen = timed_network(costs), []
    torch.manual_seed(1)
    expected = models.decouple(network, num_modules, 5, 8)
    torch.manual_seed(1)
    model = models.decouple(network, num_modules, 5, 8, "time", timer=fake_timer(seen, net))
    assert [count(block, Cost) for block in model.blocks] == sizes
    segments = [needs_gradient for costs, needs_gradient, _ in seen if costs]
    assert len(segments) == 2 * len(costs) - 1 and sum(segments) == len(costs) - 1
    assert len(seen) == len(segments) + 1  # all auxiliary networks are for one shape
    # Timing draws no random numbers of the run
    weights = [nets.auxiliary_nets[0].state_dict().values() for nets in (model, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*weights))
    again = models.decouple(network, num_modules, 5, 8, "time", cuts=model.cuts, timer=None)
    assert again.cuts == model.cuts and len(model.cuts) == num_modules - 1
    assert [count(block, Cost) for block in again.blocks] == sizes


def test_an_auxiliary_network_out_of_proportion_is_not_even_timed():
    """Of a flattened image: 3 x 3072^2 parameters."""
    layers = [nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 48, 3, padding=2), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten()]
    network, seen = nn.Sequential(*layers, nn.Linear(3072, 5), nn.ReLU(), nn.Linear(5, 5)), []
    models.decouple(network, 2, 5, 32, "time", timer=fake_timer(seen))
    assert max(largest for _, _, largest in seen) < 3072**2


def test_timer(monkeypatch):
    """The fastest of a few forward and backward passes and steps, of a copy; the clock is one second a look."""
    ticks = itertools.accumulate([0, 1, 1, 5, 1, 3, 1, 4])  # the first time does not count
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))
    part, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)), torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(part.state_dict())
    seconds, y = models.Timer("cpu")(part, x, True)
    assert seconds == 3
    assert y.shape == (2, 4, 6, 6) and not y.requires_grad and x.grad is None
    assert all(torch.equal(before[name], value) for name, value in part.state_dict().items())
    assert all(p.grad is None for p in part.parameters())
    images = models.Timer("cpu", 3).images(8, torch.float64)
    assert images.shape == (3, 3, 8, 8) and images.is_contiguous(memory_format=torch.channels_last)


class Slow(nn.Conv2d):
    def forward(self, x):
        time.sleep(0.02)
        return super().forward(x)


def test_balanced_by_real_time():
    """As the default Timer measures: the first convolution has the fewest FLOPs, and takes the longest."""
    layers = [Slow(3, 4, 1), *[nn.Conv2d(channels, 8, 3, padding=1) for channels in (4, 8, 8)]]
    layers = [part for layer in layers for part in (layer, nn.ReLU())]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(8, 5))
    cuts = [models.decouple(network, 2, 5, 16, balance, nlin=0, mlp=0).cuts for balance in ("flops", "time")]
    assert cuts == [["_5"], ["_1"]]


class Awkward(nn.Module):
    """Weights that are used twice, a change in place, a branch on a size, and a size that is needed at the end."""

    def __init__(self, keep_size):
        super().__init__()
        self.stem, self.shared, self.late = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.branch, self.classifier, self.keep_size = Branch(), nn.Linear(8, 5), keep_size

    def forward(self, x):
        x = self.stem(x)
        batch = x.shape[0] if self.keep_size else -1
        x = self.shared(self.branch(self.shared(x)))
        F.relu_(x)
        return self.classifier(self.late(x).mean((2, 3)).view(batch, 8))


class Branch(nn.Module):
    def forward(self, x):
        return x if x.shape[2] > 100 else 2 * x


@pytest.mark.parametrize(("keep_size", "places"), [(True, ["stem"]), (False, ["stem", "shared_1"])])
def test_an_awkward_network(keep_size, places):
    torch.manual_seed(0)
    plain, x = Awkward(keep_size), torch.randn(4, 3, 8, 8)
    network = decoupling.Network(plain, 8, lambda shape, last: auxiliary.auxiliary_net(shape, 5))
    assert [network.crossing[p].name for p in network.places] == places
    model = models.decouple(plain, len(places) + 1, 5, 8)
    torch.testing.assert_close(compose(model, x), plain(x))
    assert (
        keep_size or (model.blocks[1](model.blocks[0](x)) >= 0).all()
    )  # the change in place is in the block before the cut
    with pytest.raises(ValueError, match=f"Awkward can be cut into 1 to {len(places) + 1} modules, not 4"):
        models.decouple(plain, 4, 5, 8)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 5)

    def forward(self, x):
        return F.dropout(self.linear(x.flatten(1)), 0.5, self.training)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "num_modules", "message"),
    [
        (Functional(), 1, r"Functional.forward asks for self.training; do that in a submodule \(nn.Dropout\)"),
        (Branching(), 1, r"Branching cannot be traced; an nn.Sequential of its parts can \(.*control flow\)"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(9, 5)),
            1,
            "Sequential fails on 8-pixel images; larger ones may be needed: .*192",
        ),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 7)), 1, r"Sequential gives \(B, 7\) instead of logits \(B, 5\)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), 2, "Sequential can be cut into 1 module only, not 2"),
        (nn.Sequential(nn.Flatten(), nn.ReLU()), 1, "Sequential has no parameters to train"),
        (user_network(), 5, "Sequential can be cut into 1 to 4 modules, not 5"),
        (user_network(), 0, "Sequential can be cut into 1 to 4 modules, not 0"),
        (nn.Bilinear(3, 3, 5), 1, "Bilinear.forward must take one tensor, the images"),
    ],
)
def test_what_cannot_be_cut(model, num_modules, message):
    with pytest.raises(ValueError, match=message) as error:
        models.decouple(model, num_modules, 5, 8 if num_modules in (1, 2) else 16)
    assert "\n" not in str(error.value)


def test_one_linear_layer_is_one_module():
    model = models.decouple(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), 1, 5, 8)
    assert model(torch.randn(2, 3, 8, 8), 0)[0].shape == (2, 5)


def test_double_precision_and_evaluation_mode_stay():
    plain = user_network().double().eval()
    model = models.decouple(plain, 2, 5, 16)
    assert all(p.dtype == torch.double for p in model.parameters())
    assert not any(m.training for m in plain.modules())


# Costs


def test_costs_are_those_of_the_real_network():
    torch.manual_seed(0)
    model = models.decouple(user_network(), 2, 5, 16)
    rows = models.costs(model, 16)
    x = torch.randn(2, 3, 16, 16)
    for block, net, row in zip(model.blocks, model.auxiliary_nets, rows):
        assert row["parameters"] == sum(p.numel() for p in block.parameters())
        assert row["auxiliary_parameters"] == sum(p.numel() for p in net.parameters())
        with costing.Meter(model) as meter:
            y = block(x)
            net(y)
        with FlopCounterMode(display=False) as counter:
            block(x)
            flops = counter.get_total_flops()
            net(y)
        assert (row["flops"], row["auxiliary_flops"]) == (flops / 2, (counter.get_total_flops() - flops) / 2)
        x = y.detach()
        assert row["activations"] == pytest.approx(sum(meter.saved.values()) / 2, rel=0.02)  # the CPU's own kernels


def test_activations_by_hand():
    layers = [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(256, 5)]
    (row,) = models.costs(nn.Sequential(*layers), 8)
    images, relu = 3 * 64, 4 * 64  # the ReLU's output is also the Linear's input
    assert row["activations"] == 4 * (images + relu)
    assert row["flops"] == 2 * (3 * 9 * 4 * 64 + 256 * 5)


@pytest.mark.slow
def test_memory_of_resnet_152_against_backprop():
    """The paper's split fits 38 % more images on 16 GB; balanced for memory, more than 70 % more."""
    with meta():
        (backprop,) = models.costs(models.build_plain("resnet152", 1000, 224), 224)
    images = {}
    for balance in ("flops", "memory"):
        rows = models.costs(build_on_meta("resnet152", 1000, 224, balance=balance), 224)
        parameters = sum(row["parameters"] + row["auxiliary_parameters"] for row in rows)
        peak = max(row["activations"] for row in rows)
        images[balance] = (16e9 - 12 * parameters) / peak  # 4 bytes each for weight, gradient, momentum
        images[balance, "ratio"] = backprop["activations"] / peak
    of_backprop = (16e9 - 12 * backprop["parameters"]) / backprop["activations"]
    assert images["flops"] / of_backprop == pytest.approx(1.38, abs=0.06)
    assert images["memory", "ratio"] > 1.9 and images["memory"] / of_backprop > 1.7


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "resnet51"}, "no architecture 'resnet51': did you mean resnet50 or "),
        ({"arch": "???"}, "no architecture '\\?\\?\\?': any classification model of torchvision"),
        ({"arch": "vgg13", "num_modules": 2}, "vgg13 is cut by block_size; num_modules is for .* vgg13_bn"),
        ({"arch": "vgg13", "balance": "memory"}, "vgg13 is cut by block_size; balance is for .* vgg13_bn"),
        ({"arch": "vgg13", "aux_size": "published"}, "vgg13: aux_size published is for resnet18 to resnet152"),
        ({"arch": "alexnet", "aux_size": "published"}, "alexnet: aux_size published is for"),
        ({"arch": "resnet18", "aux_size": "published", "balance": "memory"}, "with balance flops"),
        ({"arch": "vgg13", "block_size": 11}, "vgg13 has 10 convolutions: block_size must be 1 to 10"),
        ({"arch": "vgg13", "block_size": 0}, "block_size must be 1 to 10"),
        ({"arch": "vgg13_bn", "block_size": 2}, "vgg13_bn is cut by num_modules; block_size is for the paper's VGGs"),
        ({"arch": "resnet152", "block_size": 2}, "resnet152 is cut by num_modules"),
        ({"arch": "resnet152", "num_modules": 20}, "possible are 17 and 26 modules, at most 51; balance='memory'"),
        ({"arch": "resnet152", "num_modules": 52}, "possible are 26 and 51 modules, at most 51$"),
        ({"arch": "resnet18", "num_modules": 0}, "possible are 1 and 2 modules, at most 9"),
        (
            {"arch": "squeezenet1_1", "num_modules": 99},
            "squeezenet1_1: SqueezeNet can be cut into 1 to 1. modules, not 99",
        ),
        ({"arch": "vit_b_16", "image_size": 100}, "vit_b_16: it cannot be built for 100-pixel images: .*indivisible"),
        ({"arch": "maxvit_t", "image_size": 112}, "maxvit_t: it cannot be built for 112-pixel images: .*not divisible"),
        (
            {"arch": "alexnet", "image_size": 32},
            "alexnet: AlexNet fails on 32-pixel images; larger ones may be needed: ",
        ),
        ({"arch": "vgg13", "image_size": 16}, "vgg13 needs images of 32 pixels or more, not 16"),
        ({"arch": "vgg13", "balance": "time"}, "vgg13 is cut by block_size; balance is for .* vgg13_bn"),
        ({"arch": "alexnet", "balance": "params"}, "alexnet: balance is 'flops', 'memory' or 'time', not 'params'"),
        ({"arch": "resnet18", "balance": "params"}, "balance is 'flops', 'memory' or 'time', not 'params'"),
        ({"arch": "resnet18", "balance": "time", "cuts": ["a"] * 2}, "resnet18: 2 modules have 1 cuts, not 2"),
        ({"arch": "resnet18", "balance": "time", "cuts": ["a"]}, "resnet18: ResNet cannot be cut after a$"),
    ],
)
def test_errors_say_what_to_do(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        build_on_meta(**{"num_classes": 10, "image_size": 224, **arguments})
    assert "\n" not in str(error.value)


def test_blocks_and_auxiliary_networks_are_as_many():
    with pytest.raises(ValueError, match="2 blocks need as many auxiliary networks, not 1"):
        models.DGLNet([nn.Identity(), nn.Identity()], [nn.Identity()])


def test_the_readmes_example_of_a_users_own_model(monkeypatch, capsys):
    """It runs, and `decouple` makes of ResNet-18 what is printed there."""
    readme = (ROOT / "imagenet_dgl/README.md").read_text()
    code, _ = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    monkeypatch.setitem(sys.modules, "models", models)
    exec(code.replace("range(10)", "range(2)"), {})
    printed = capsys.readouterr().out.splitlines()
    claimed = re.findall(r"^    (conv1 .*\n.*\n.*)\n", readme, re.MULTILINE)[0].split("\n    ")
    assert printed[:3] == claimed
    assert code.count("\n") == 30
    assert [line[0] for line in printed[3:]] == ["0", "1"] * 2


def test_a_registered_name_is_none_of_torchvisions():
    with pytest.raises(ValueError, match="resnet18 is torchvision's"):
        models.register("resnet18", None)


def test_the_readmes_example_of_a_registered_network(tree, tmp_path):
    _, code = re.findall(r"```python\n(.*?)```", (ROOT / "imagenet_dgl/README.md").read_text(), re.DOTALL)
    (tmp_path / "mynet.py").write_text(code)
    flags = [tree, "--arch", "mynet", "--num-modules", 3, "--image-size", 32, "-b", 4, "--lr", 0.01, "--nepochs", 1]
    flags += ["-j", 0, "--threads", 1, "--save_folder", tmp_path]

    def script(*flags):
        load("imagenet_dgl", "imagenet_dgl")
        sys.argv, sys.stdout = ["mynet.py", *map(str, flags)], (tmp_path / "out").open("w")
        runpy.run_path(str(tmp_path / "mynet.py"), run_name="__main__")

    errors = tmp_path / "errors"
    assert forked(script, *flags, errors=errors) == 0, errors.read_text()
    assert re.findall(r"^n: (\d), epoch 0, train", (tmp_path / "out").read_text(), re.MULTILINE) == ["0", "1", "2"]
    status = forked(script, tree, "--arch", "mynet2", errors=errors)
    refused((status, "", errors.read_text()), "no architecture 'mynet2'")
