"""auxiliary_nets_study/cifar_resnet.py: networks, losses and costs against computations by hand; cheats are found."""

import copy
import inspect
import itertools
import math
import re
import runpy
import shutil
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_same, assert_same_run, forked, load, log_of, refused, run
from torch import nn

SCRIPT = "auxiliary_nets_study/cifar_resnet.py"
peak_memory = load("tests", "benchmark").peak_memory  # imagenet_dgl has a module of this name, too
script = load("auxiliary_nets_study", "cifar_resnet")
audit, cifar, costs, methods, resnet = script.audit, script.cifar, script.costs, script.methods, script.resnet
CPU, slow = torch.device("cpu"), pytest.mark.slow
CASES = {  # every method, and the variants that are other networks
    **{name: ["--method", name] for name in ("dgl", "predsim", "infopro", "auglocal", "man", "man-bias")},
    "dgl, 3 hidden": ["--method", "dgl", "--dgl-hidden", 3],
    "infopro contrast": ["--method", "infopro", "--infopro-loss", "contrast"],
}
ALL = {"backprop": ["--method", "backprop"], "checkpoint": ["--method", "checkpoint"], **CASES}
MEAN, STD = (np.array(values).reshape(3, 1, 1) / 255 for values in ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)))


def parse(*flags):
    return script.parse_args([str(flag) for flag in flags])


def make(*flags):
    """(network, optimizers, scalers, autocast, meters) of the flags; the same first weights each time."""
    torch.manual_seed(0)
    return script.make_parts(parse(*flags), 10, CPU)


def batch(size=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 3, 32, 32, generator=generator), torch.randint(10, (size,), generator=generator)


def place(layer, k=0, num_modules=4, depth=32):
    """The place behind a layer of a ResNet."""
    return methods.Place(k, num_modules, layer, resnet.widths(depth), resnet.layers(depth)[layer + 1], 10)


def flat(modules):
    return [tensor for module in modules for tensor in module.state_dict().values()]


# Network


def test_resnet_32_and_110_have_the_published_sizes():
    """By hand: BatchNorm 2C, classifier 64 * 10 + 10; the first blocks of stages 2 and 3 have a 1x1 convolution."""

    def stage(channels, n):
        return 2 * n * 9 * channels**2 + n * 4 * channels

    def growth(channels):  # what a first block, of twice the channels, has beyond or less than the others of its stage
        return -9 * 2 * channels**2 + 2 * channels**2 + 4 * channels

    for depth, published in ((32, 466_906), (110, None)):
        n = (depth - 2) // 6
        by_hand = 9 * 3 * 16 + 32 + stage(16, n) + stage(32, n) + stage(64, n) + growth(16) + growth(32) + 650
        with torch.device("meta"):
            network = script.Network(10, parse("--method", "backprop", "--depth", depth))
        assert costs.parameters(network) == by_hand
        assert published in (None, by_hand)


def test_layers_have_these_shapes():
    x, shapes = batch(2)[0], []
    for layer in resnet.layers(14):
        x = layer(x)
        shapes.append(tuple(x.shape))
    assert shapes == [(2, 16, 32, 32)] * 3 + [(2, 32, 16, 16)] * 2 + [(2, 64, 8, 8)] * 2
    assert resnet.widths(14) == [channels for _, channels, *_ in shapes]
    for layer, (_, channels, side, _) in enumerate(shapes[:-1]):
        assert (place(layer, depth=14).channels, place(layer, depth=14).side) == (channels, side)
    assert [resnet.name(layer, 14) for layer in range(7)] == [
        *("stem", "(1, 0)", "(1, 1)", "(2, 0)", "(2, 1)", "(3, 0)", "(3, 1)"),
    ]


def test_a_block_is_two_convolutions_and_a_shortcut():
    for channels, stride in ((16, 1), (32, 2)):
        block, x = resnet.BasicBlock(16, channels, stride).eval(), torch.randn(2, 16, 8, 8)
        first, norm1, _, second, norm2 = block.residual
        y = norm2(F.conv2d(F.relu(norm1(F.conv2d(x, first.weight, None, stride, 1))), second.weight, None, 1, 1))
        if stride == 2:
            conv, norm = block.shortcut
            assert conv.weight.shape == (32, 16, 1, 1)
            expected = F.relu(y + norm(F.conv2d(x, conv.weight, None, 2)))
        else:
            assert len(block.shortcut) == 0
            expected = F.relu(y + x)
        torch.testing.assert_close(block(x.clone()), expected)


def test_first_weights():
    convolutions = [part for part in nn.ModuleList(resnet.layers(32)).modules() if isinstance(part, nn.Conv2d)]
    assert len(convolutions) == 31 + 2
    for conv in convolutions:
        assert conv.bias is None
        std = math.sqrt(2 / (conv.kernel_size[0] ** 2 * conv.out_channels))
        assert conv.weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * conv.weight.numel()))


PUBLISHED = [
    (32, 2, "blocks", [(2, 1)]),
    (32, 4, "blocks", [(1, 2), (2, 1), (3, 0)]),
    (32, 8, "blocks", [(1, 0), (1, 2), (1, 4), (2, 1), (2, 3), (3, 0), (3, 2)]),
    (110, 2, "blocks", [(2, 8)]),
    (110, 4, "blocks", [(1, 11), (2, 7), (3, 3)]),
    (110, 8, "blocks", [(1, 4), (1, 11), (2, 0), (2, 7), (2, 14), (3, 3), (3, 10)]),
    (
        *(110, 16, "blocks"),
        [
            *((1, 1), (1, 4), (1, 7), (1, 10), (1, 13), (1, 16), (2, 1), (2, 4)),
            *((2, 7), (2, 11), (2, 15), (3, 1), (3, 5), (3, 9), (3, 13)),
        ],
    ),
    (110, 2, "memory", [(1, 14)]),
    (110, 3, "memory", [(1, 9), (2, 2)]),
    (110, 4, "memory", [(1, 6), (1, 14), (2, 8)]),
]


@pytest.mark.parametrize(("depth", "modules", "balance", "ends"), PUBLISHED)
def test_published_cuts(depth, modules, balance, ends):
    n = (depth - 2) // 6
    layers = [(stage - 1) * n + block + 1 for stage, block in ends]
    assert resnet.cut(depth, modules, balance) == [*layers, 3 * n]
    assert [resnet.name(layer, depth) for layer in layers] == [str(end) for end in ends]


def test_as_many_modules_as_layers():
    assert resnet.cut(32, 16) == [*range(16)]
    assert resnet.cut(110, 55) == [*range(55)]


@pytest.mark.parametrize("depth", [8, 14, 32, 56, 110])
def test_other_cuts_are_equal_runs(depth):
    layers = (depth - 2) // 2 + 1
    for K in range(1, layers + 1):
        ends = resnet.cut(depth, K)
        sizes = [b - a for a, b in itertools.pairwise([-1, *ends])]
        assert (len(sizes), sum(sizes)) == (K, layers)
        assert max(sizes) - min(sizes) <= (2 if (depth, K) == (110, 2) else 1)


@pytest.mark.parametrize("name", ALL)
def test_all_methods_start_with_the_same_blocks_and_classifier(name):
    reference = make("--method", "backprop", "--depth", 14)[0]
    for K in [1] if name == "backprop" else [1, 3, 7]:
        model = make(*ALL[name], "--depth", 14, "--num-modules", K)[0]
        assert len(model.auxiliary_nets) == (1 if name in ("backprop", "checkpoint") else K)
        assert_same(flat(model.blocks), flat(reference.blocks))
        assert_same(flat([model.auxiliary_nets[-1]]), flat([reference.auxiliary_nets[-1]]))


# Local losses


def classes(*labels):
    return torch.tensor(labels)


@pytest.mark.parametrize(
    "labels",
    [
        classes(0, 1, 1, 2, 3, 3, 3, 4),  # three of which have one image only
        classes(5, 5, 5, 5, 5, 5),
        classes(0, 1, 2, 3),
        classes(7, 7),
        classes(7, 8),
    ],
    ids=str,
)
def test_supervised_contrastive_loss(labels):
    z = torch.randn(len(labels), 5, dtype=torch.float64, requires_grad=True)
    rows, total = [row / math.sqrt(sum(row**2)) for row in z.detach().numpy()], 0
    for i, label in enumerate(labels):
        others = [a for a in range(len(labels)) if a != i]
        partners = [p for p in others if labels[p] == label]
        log_sum = math.log(sum(math.exp(rows[i] @ rows[a] / 0.07) for a in others))
        for p in partners:
            total -= (rows[i] @ rows[p] / 0.07 - log_sum) / len(partners)
    loss = methods.contrastive_loss(z, labels)
    assert loss.item() == pytest.approx(total / len(labels), rel=1e-12, abs=1e-12)
    loss.backward()
    assert z.grad.isfinite().all()
    assert bool(z.grad.any()) == (total != 0 and len(labels) > 2)  # of two images, one is all that there is to choose


@pytest.mark.parametrize(("layer", "hidden"), [(0, 2), (6, 2), (11, 3)])
def test_dgl(layer, hidden):
    """mlp-sr: 1x1 convolutions at a quarter of the resolution, then an mlp on 2x2 pixels."""
    where = place(layer)
    net, C = methods.DGL(where, parse("--dgl-hidden", hidden)).net, where.channels
    h, shapes = torch.randn(3, C, where.side, where.side), []
    for part in net:
        h = part(h)
        shapes.append((type(part).__name__, *h.shape[1:]))
    small, wide = where.side // 4, 4 * C
    assert shapes == [
        ("AdaptiveAvgPool2d", C, small, small),
        *[(kind, C, small, small) for kind in ("Conv2d", "BatchNorm2d", "ReLU")] * 3,
        *(("AdaptiveAvgPool2d", C, 2, 2), ("Flatten", wide)),
        *[(kind, wide) for kind in ("Linear", "BatchNorm1d", "ReLU")] * hidden,
        ("Linear", 10),
    ]
    assert {part.kernel_size for part in net if isinstance(part, nn.Conv2d)} == {(1, 1)}


@pytest.mark.parametrize(("layer", "side"), [(0, 8), (6, 4), (11, 4)])
def test_predsim(layer, side):
    where = place(layer)
    net, labels = methods.PredSim(where, parse("--method", "predsim")), classes(3, 1, 3, 0, 9)
    h = torch.randn(5, where.channels, where.side, where.side)
    logits, features = net(h)
    step = where.side // side
    pooled = h.numpy().reshape(5, where.channels, side, step, side, step).mean((3, 5)).reshape(5, -1)
    assert pooled.shape[1] <= 1024
    linear = net.predict[-1]
    by_hand = pooled @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()
    np.testing.assert_allclose(logits.detach().numpy(), by_hand, atol=1e-5)
    (weight,) = net.match.parameters()
    assert weight.shape == (where.channels, where.channels, 3, 3)
    torch.testing.assert_close(features, F.conv2d(h, weight, padding=1))

    def similarities(rows):
        rows = rows - rows.mean(1, keepdims=True)
        rows = rows / np.sqrt((rows**2).sum(1, keepdims=True))
        return rows @ rows.T

    deviations = features.detach().double().numpy().std((2, 3))
    match = ((similarities(deviations) - similarities(np.eye(10)[labels])) ** 2).mean()
    shares = np.exp(by_hand) / np.exp(by_hand).sum(1, keepdims=True)
    cross_entropy = -np.log(shares[range(5), labels]).mean()
    expected = 0.01 * cross_entropy + 0.99 * match
    assert net.loss(logits, features, None, labels).item() == pytest.approx(expected, rel=1e-4)


def infopro(layer, *flags, k=0, num_modules=4, depth=32):
    args = parse("--method", "infopro", "--depth", depth, "--num-modules", num_modules, *flags)
    return methods.InfoPro(place(layer, k, num_modules, depth), args)


@pytest.mark.parametrize(("layer", "head"), [(0, (32, 16)), (6, (64, 8)), (11, (64, 8))])
def test_infopro_s_head_and_decoder(layer, head):
    where, net = place(layer), infopro(layer)
    h = torch.randn(4, where.channels, where.side, where.side)
    assert net.head[0].bias is None
    assert net.head[0](h).shape[1:] == (*head[:1], *head[1:] * 2)
    assert [type(part).__name__ for part in net.head] == [
        *("Conv2d", "BatchNorm2d", "ReLU", "AdaptiveAvgPool2d", "Flatten", "Linear", "ReLU", "Linear"),
    ]
    upsample = ["Upsample"] * (where.side < 32)
    assert [type(part).__name__ for part in net.decoder] == [*upsample, "Conv2d", "BatchNorm2d", "ReLU", "Conv2d"]
    if upsample:
        ramp = torch.linspace(0, 1, where.side).expand(1, 1, where.side, where.side)
        expected = torch.linspace(0, 1, 32).expand(1, 1, 32, 32)
        torch.testing.assert_close(net.decoder[0](ramp), expected)  # corners aligned
    logits, (output, decoded) = net(h)
    assert (logits.shape, decoded.shape) == ((4, 10), (4, 3, 32, 32))
    assert output is logits
    logits, (embedding, decoded) = infopro(layer, "--infopro-loss", "contrast")(h)
    assert (logits, embedding.shape, decoded.shape) == (None, (4, 128), (4, 3, 32, 32))


@pytest.mark.parametrize("contrast", [False, True])
def test_infopro_s_loss(contrast):
    """The decoder is to restore the image in [0, 1], and not the normalised one."""
    raw, labels = np.random.default_rng(0).integers(256, size=(4, 3, 32, 32)) / 255, classes(2, 5, 5, 0)
    images = torch.tensor((raw - MEAN) / STD, dtype=torch.float32)
    net = infopro(0, *["--infopro-loss", "contrast"][: 2 * contrast], "--lambdas", 2, 0.25, 0, 0)
    logits, more = net(torch.randn(4, 16, 32, 32))
    decoded = 1 / (1 + np.exp(-more[1].detach().double().numpy()))
    reconstruction = -(raw * np.log(decoded) + (1 - raw) * np.log(1 - decoded)).mean()
    prediction = methods.contrastive_loss(more[0], labels) if contrast else F.cross_entropy(logits, labels)
    expected = 2 * reconstruction + 0.25 * prediction.item()
    assert net.loss(logits, more, images, labels).item() == pytest.approx(expected, rel=1e-5)


def test_infopro_without_reconstruction_is_the_head_s_cross_entropy():
    net, h, (images, labels) = infopro(0, "--lambdas", 0, 1, 0, 1), torch.randn(6, 16, 32, 32), batch()
    alone = copy.deepcopy(net.head)
    loss = net.loss(*net(h), images, labels)
    loss.backward()
    expected = F.cross_entropy(alone(h), labels)
    expected.backward()
    assert torch.equal(loss, expected)
    assert_same([p.grad for p in net.head.parameters()], [p.grad for p in alone.parameters()])
    assert not any(p.grad.any() for p in net.decoder.parameters())


CONTRAST = ["--method", "infopro", "--infopro-loss", "contrast"]


@pytest.mark.parametrize(
    ("flags", "first", "last"),
    [
        ([*CONTRAST, "--depth", 110, "--num-modules", 2], (5, 0.5), (5, 0.5)),
        ([*CONTRAST, "--depth", 110, "--num-modules", 4], (1, 0), (0, 1)),
        ([*CONTRAST, "--depth", 110, "--num-modules", 8], (5, 0), (0, 1)),
        ([*CONTRAST, "--depth", 110, "--num-modules", 16], (5, 0), (0.5, 1)),
        ([*CONTRAST, "--depth", 110, "--balance", "memory", "--num-modules", 2], (5, 0.1), (5, 0.1)),
        ([*CONTRAST, "--depth", 110, "--balance", "memory", "--num-modules", 3], (5, 0), (5, 0.1)),
        ([*CONTRAST, "--depth", 110, "--balance", "memory", "--num-modules", 4], (5, 0), (5, 0.1)),
        (["--method", "infopro", "--num-modules", 16], (5, 0.05), (0.2, 0.5)),
        (["--method", "man", "--num-modules", 16], (5, 0.05), (0.2, 0.5)),
        ([*CONTRAST, "--num-modules", 16], (5, 0), (0.5, 1)),  # not published: ResNet-110's
        (["--method", "infopro", "--num-modules", 3], (5, 0.5), (5, 0.5)),  # nor this: of the next fewer modules
        (["--method", "infopro", "--num-modules", 7], (1, 0), (0, 1)),
        (["--method", "infopro", "--depth", 110, "--num-modules", 55], (5, 0), (0.5, 1)),
        (["--method", "infopro", "--num-modules", 16, "--lambdas", 1, 2, 3, 4], (1, 2), (3, 4)),
    ],
)
def test_infopro_s_weights_go_linearly_from_the_first_to_the_last_but_one(flags, first, last):
    args = parse(*flags)
    assert [tuple(pair) for pair in methods.loss_weights(args)] == [first, last]
    with torch.device("meta"):
        *nets, classifier = script.Network(10, args).auxiliary_nets
    assert isinstance(classifier, methods.Classifier)
    assert len(nets) == args.num_modules - 1
    for weights, *by_hand in zip((net.weights for net in nets), *map(np.linspace, first, last, [len(nets)] * 2)):
        assert weights == pytest.approx(by_hand)


# AugLocal, by hand: its depths fall linearly from d to (d + 1) / 2


@pytest.mark.parametrize(
    ("layers", "depth", "expected"),
    [
        (16, 9, {**dict(enumerate([9, 9, 8, 8, 8, 8, 7, 7, 7, 6, 6, 6, 6, 5, 5]))}),
        (16, 5, {**dict(enumerate([5, 5, 5, 5, 4, 4, 4, 4, 4, 4, 4, 3, 3, 3, 3]))}),
        (16, 2, dict.fromkeys(range(15), 2)),
        (16, 1, dict.fromkeys(range(15), 1)),
        (55, 9, {0: 9, 6: 9, 7: 8, 19: 8, 20: 7, 26: 7, 46: 6, 47: 5, 53: 5}),
        (55, 6, {0: 6, 10: 6, 11: 5, 31: 5, 32: 4, 53: 4}),
    ],
)
def test_auglocal_s_depths(layers, depth, expected):
    assert {k: methods.auglocal_depth(k, layers, depth) for k in expected} == expected


@pytest.mark.parametrize(
    ("layer", "layers", "depth", "expected"),
    [
        (0, 16, 9, [2, 3, 5, 7, 8, 10, 12, 13, 15]),
        (0, 16, 1, [15]),
        (0, 16, 2, [8, 15]),  # 7.5
        (5, 16, 8, [6, 8, 9, 10, 11, 12, 14, 15]),  # 6.25, 7.5, 8.75, ..., 12.5, 13.75
        (10, 16, 6, [11, 12, 13, 14, 15]),
        (13, 16, 5, [14, 15]),
        (14, 16, 5, [15]),
        (0, 55, 9, [6, 12, 18, 24, 30, 36, 42, 48, 54]),
        (20, 55, 7, [25, 30, 35, 39, 44, 49, 54]),
        (26, 55, 7, [30, 34, 38, 42, 46, 50, 54]),
        (53, 55, 5, [54]),
    ],
)
def test_auglocal_s_layers(layer, layers, depth, expected):
    assert methods.auglocal_layers(layer, layers, depth) == expected


def auglocal(where, depth):
    """An auxiliary network's blocks as (channels, stride), and what follows them."""
    net = methods.AugLocal(where, parse("--method", "auglocal", "--auglocal-depth", depth))
    h = torch.randn(2, where.channels, where.side, where.side)
    logits, more = net(h)
    assert (logits.shape, more) == ((2, 10), None)
    blocks = [block for block in net.net if isinstance(block, resnet.BasicBlock)]
    for block, wide in itertools.pairwise(blocks):
        assert wide.residual[0].in_channels == block.channels
    rest = [type(part).__name__ for part in net.net[len(blocks) :]]
    return [(block.channels, block.residual[0].stride[0]) for block in blocks], rest


def test_auglocal_s_blocks():
    end = ["AdaptiveAvgPool2d", "Flatten", "Linear"]
    nine = [(16, 1), (16, 1), (16, 1), (32, 2), (32, 1), (32, 1), (64, 2), (64, 1), (64, 1)]
    assert auglocal(place(0, 0, 16), 9) == (nine, end)
    assert auglocal(place(13, 13, 16), 9) == ([(64, 1), (64, 1)], end)
    single = [*end[:2], "BatchNorm1d", end[2]]
    assert auglocal(place(14, 14, 16), 9) == ([(64, 1)], single)
    assert auglocal(place(5, 5, 16), 1) == ([(64, 2)], single)  # fourfold, and no next block
    assert auglocal(place(0, 0, 16), 2) == ([(32, 2), (64, 2)], end)
    fourfold = methods.Place(0, 3, 0, [16, 64, 64, 64], None, 10)
    assert auglocal(fourfold, 3) == ([(64, 2), (64, 2), (64, 1)], end)


# MAN


@pytest.mark.parametrize("method", ["man", "man-bias"])
def test_man_s_moving_average_follows_the_next_block_and_its_correction_learns(method):
    parts = model, *_ = make("--method", method, "--depth", 8, "--num-modules", 2, "--lr", 0.5)
    net, block, (images, labels) = model.auxiliary_nets[0], model.blocks[1][0], batch()
    assert block.channels == 32  # of another form than the module's own
    names = [name for name, _ in block.named_parameters()]
    average = {name: p.numpy().astype(float) for name, p in net.ema.state_dict().items() if name in names}
    first = {name: p.clone() for name, p in net.state_dict().items()}
    assert_same([*net.ema.state_dict().values()], [*block.state_dict().values()])
    for _ in range(3):
        seen = {name: p.detach().numpy().astype(float) for name, p in block.named_parameters()}
        x = script.train_module(0, images, images, labels, *parts)
        for name in names:
            average[name] = 0.995 * average[name] + 0.005 * seen[name]
            now = net.ema.get_parameter(name).detach().numpy()
            np.testing.assert_allclose(now, average[name], rtol=1e-6, atol=1e-7)
        assert all(p.grad is None and not p.requires_grad for p in net.ema.parameters())
        script.train_module(1, x, images, labels, *parts)  # now the block is another one
        assert any((p.detach().numpy() != seen[name]).any() for name, p in block.named_parameters())
    assert any((net.ema.get_parameter(name) != first[f"ema.{name}"]).any() for name in names)
    learning = [name for name in net.state_dict() if re.match(r"copy\..*(weight|bias)|bias", name)]
    assert len(learning) == (9 if method == "man" else 1)
    for name in learning:
        assert (net.get_parameter(name) != first[name]).any(), name
    if method == "man":
        assert (first["copy.residual.0.weight"] == first["ema.residual.0.weight"]).all()
    else:
        assert net.bias.shape == (32, 1, 1)
        assert not first["bias"].any()


@pytest.mark.parametrize("method", ["man", "man-bias"])
def test_man_s_head_and_decoder_read_the_corrected_output(method):
    net = make("--method", method, "--depth", 8, "--num-modules", 3)[0].auxiliary_nets[0]
    if method == "man":
        other = net.copy
        nn.init.normal_(other.residual[4].weight)
    else:
        nn.init.normal_(net.bias)
        other = lambda _: net.bias  # noqa: E731
    for training in (True, False):
        net.train(training)
        h = torch.randn(4, 16, 32, 32)
        logits, (_, decoded) = net(h)
        y = copy.deepcopy(net).ema(h) + other(h)
        torch.testing.assert_close(logits, net.head(y))
        if training:
            torch.testing.assert_close(decoded, net.decoder(y))


# Parameters of the auxiliary networks, by hand


def conv(a, b, kernel_size=3):
    return kernel_size**2 * a * b


def block_size(a, b, strided=False):
    return conv(a, b) + conv(b, b) + 4 * b + (conv(a, b, 1) + 2 * b if strided or a != b else 0)


def dgl_size(C, hidden):
    return 3 * (C * C + 2 * C) + hidden * (16 * C * C + 4 * C + 8 * C) + 4 * C * 10 + 10


def predsim_size(C):
    return conv(C, C) + 10 * {16: 16 * 64, 32: 32 * 16, 64: 64 * 16}[C] + 10


def infopro_size(C, outputs=10):
    width = {16: 32, 32: 64, 64: 64}[C]
    head = conv(C, width) + 2 * width + width * 128 + 128 + 128 * outputs + outputs
    return head + conv(C, 12) + 12 + 24 + conv(12, 3) + 3


def auglocal_size(k, K, layer, widths, d=9):
    share = Fraction(k, 2 * max(K - 2, 1))
    depth, rest = max(1, round(d * (1 - share) + share)), len(widths) - 1 - layer
    if depth >= rest:
        layers = range(layer + 1, len(widths))
    else:
        layers = [round(layer + Fraction(rest, depth) * i) for i in range(1, depth + 1)]
    channels = [widths[layer], *(widths[i] for i in layers)]
    total = sum(block_size(a, b) for a, b in itertools.pairwise(channels))
    return total + (2 * 64 if len(layers) == 1 else 0) + 650


def size_by_hand(name, k, K, end, widths):
    C, after = widths[end], widths[end + 1]
    return {
        "dgl": lambda: dgl_size(C, 2),
        "dgl, 3 hidden": lambda: dgl_size(C, 3),
        "predsim": lambda: predsim_size(C),
        "infopro": lambda: infopro_size(C),
        "infopro contrast": lambda: infopro_size(C, 128),
        "auglocal": lambda: auglocal_size(k, K, end, widths),
        "man": lambda: infopro_size(after) + 2 * block_size(C, after),
        "man-bias": lambda: infopro_size(after) + block_size(C, after) + after,
    }[name]()


@pytest.mark.parametrize(
    ("depth", "K"),
    [(32, 4), (32, 16), (110, 4), *(pytest.param(*case, marks=slow) for case in ((32, 2), (110, 16), (110, 55)))],
)
@pytest.mark.parametrize("name", CASES)
def test_parameters_of_the_auxiliary_networks(name, depth, K):
    n = (depth - 2) // 6
    widths = [16] * (n + 1) + [32] * n + [64] * n
    with torch.device("meta"):
        model = script.Network(10, parse(*CASES[name], "--depth", depth, "--num-modules", K))
    *nets, classifier = model.auxiliary_nets
    assert costs.parameters(classifier) == 650
    for k, (net, end) in enumerate(zip(nets, model.ends)):
        assert costs.parameters(net) == size_by_hand(name, k, K, end, widths), k


# Training


@pytest.mark.parametrize(
    ("flags", "rates"),
    [
        (
            [],
            {1: 0.01, 2: 0.0889691614, 10: 0.714082700945163, 11: 0.790706352528349, 80: 0.4, 160: 0},
        ),
        (["--batch-size", 128], {1: 0.00125, 10: 0.0892603376, 11: 0.0988382941, 80: 0.05, 160: 0}),
        (["--warmup", 0], {1: 0.7999228936, 10: 0.7923141122, 80: 0.4}),
        (["--lr", 2, "--warmup", 2, "--epochs", 4], {1: 0.025, 2: 0.5125, 3: 0.2928932188, 4: 0}),
    ],
)
def test_learning_rate(flags, rates):
    args, optimizers = parse(*flags), [torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1) for _ in range(2)]
    for epoch, rate in rates.items():
        script.set_learning_rate(optimizers, epoch, args)
        for optimizer in optimizers:
            assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-8, abs=1e-12)


def test_optimizers():
    _, optimizers, *_ = make("--depth", 8, "--num-modules", 2)
    for optimizer in optimizers:
        (group,) = optimizer.param_groups
        assert (group["momentum"], group["nesterov"], group["weight_decay"], group["lr"]) == (0.9, True, 1e-4, 0.8)


class Stop(Exception):
    pass


def test_images_are_normalised_with_the_published_numbers(tmp_path, monkeypatch):
    def check(model, optimizers, scalers, autocast, batches, meters):
        for images, _ in batches:
            pixels = 255 * (images.double().numpy() * STD + MEAN)
            np.testing.assert_allclose(pixels, pixels.round(), atol=1e-3)
            assert (pixels.min().round(), pixels.max().round()) == (0, 255)
        raise Stop

    monkeypatch.setattr(script, "train_epoch", check)
    flags = ["--data", "digits", "--train-size", 20, "--depth", 8, "--save_folder", tmp_path]
    with pytest.raises(Stop):
        script.main([str(flag) for flag in flags])


def train(parts, steps=3):
    """Some steps on different batches, in one epoch."""
    model, optimizers, scalers, autocast, meters = parts
    images, labels = batch(6 * steps)
    script.train_epoch(model, optimizers, scalers, autocast, [*zip(images.split(6), labels.split(6))], meters)
    return [meter.pop()[0] for meter in meters]


@pytest.mark.parametrize(("depth", "K"), [(8, 2), (8, 3), (14, 2), (14, 3)])
def test_checkpointing_is_backprop_to_the_bit(depth, K):
    parts = make("--method", "checkpoint", "--depth", depth, "--num-modules", K)
    others = make("--method", "backprop", "--depth", depth)
    first = copy.deepcopy(flat([parts[0]]))
    assert train(parts) == train(others)
    assert_same(flat([parts[0]]), flat([others[0]]))  # BatchNorm's running statistics and counts, too
    assert not any(map(torch.equal, first, flat([parts[0]])))
    assert_same(*([*optimizer.state_dict()["state"].values()] for (_, (optimizer,), *_) in (parts, others)))


def test_one_module_is_backprop_to_the_bit():
    parts, others = (make("--method", method, "--depth", 8, "--num-modules", 1) for method in ("dgl", "backprop"))
    assert train(parts) == train(others)
    assert_same(flat([parts[0]]), flat([others[0]]))


def test_a_module_learns_from_its_own_loss_alone():
    """With K = 2, the last one learns as a network on fixed inputs would; the first as if there were no second."""
    parts = model, *_ = make("--depth", 8, "--num-modules", 2)
    other, (optimizer, last), *_ = make("--depth", 8, "--num-modules", 2)
    train(parts)
    images, labels = batch(18)
    inputs = []
    for x, y in zip(images.split(6), labels.split(6)):
        optimizer.zero_grad()
        representation = other.blocks[0](x)
        inputs.append((representation.detach(), y))
        F.cross_entropy(other.auxiliary_nets[0].net(representation), y).backward()
        optimizer.step()
    for x, y in inputs:
        last.zero_grad()
        F.cross_entropy(other.auxiliary_nets[1].net(other.blocks[1](x)), y).backward()
        last.step()
    assert_same(flat([model]), flat([other]))


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=slow)])
@pytest.mark.parametrize("name", ALL)
def test_16_bits(name, precision):
    flags = [*ALL[name], "--depth", 8, "--num-modules", 1 if name == "backprop" else 3, "--lr", 0.01]
    losses = {p: train(make(*flags, "--precision", p), steps=1) for p in ("fp32", precision)}
    assert losses[precision] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses[precision] != losses["fp32"]


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=slow)])
def test_a_decoder_that_is_sure_in_16_bits(precision):
    """Near 1, 16 bits would round the sigmoid, and with it the reconstruction loss and its gradient."""
    losses, (images, labels) = [], batch()
    for flags in ([], ["--precision", precision]):
        parts = model, *_, meters = make("--method", "infopro", "--depth", 8, "--num-modules", 2, *flags)
        nn.init.constant_(model.auxiliary_nets[0].decoder[-1].bias, 9)
        script.train_module(0, images, images, labels, *parts)
        losses.append(meters[0].pop()[0])
        assert model.auxiliary_nets[0].decoder[-1].bias.grad.abs().min() > 0
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


@slow
@pytest.mark.parametrize("name", ALL)
def test_compiled(name, monkeypatch):
    compile_part = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda part, **shapes: compile_part(part, backend="eager", **shapes))
    monkeypatch.syspath_prepend(ROOT / "auxiliary_nets_study")  # torch imports the modules of what it compiles
    flags = [*ALL[name], "--depth", 8, "--num-modules", 1 if name == "backprop" else 3, "--lr", 0.01]
    losses = [train(make(*flags, *compiled)) for compiled in ([], ["--compile"])]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


@pytest.mark.parametrize("name", ["backprop", "checkpoint", "infopro", "infopro contrast", "man"])
def test_one_pass_evaluation_equals_each_module_by_itself(name):
    parts = model, *_, autocast, _ = make(*ALL[name], "--depth", 8, "--num-modules", 1 if name == "backprop" else 3)
    train(parts)
    images = torch.randint(256, (100, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ((x, _),) = cifar.Batches(images, torch.zeros(100), 100, CPU)
    with torch.no_grad():
        labels = model.auxiliary_nets[-1].net(nn.Sequential(*model.blocks).eval()(x)).argmax(1)
    model.train()
    top1 = script.evaluate(model, autocast, cifar.Batches(images, labels, 16, CPU))
    assert not model.training
    for n, (block, net) in enumerate(zip(model.blocks, model.auxiliary_nets)):
        with torch.no_grad():
            x = block(x)
            if name == "infopro contrast" and n < 2:
                assert math.isnan(top1[n])
                continue
            y = net.corrected(x) if name == "man" and n < 2 else x
            logits = (net.head if hasattr(net, "head") else net.net)(y)
        assert top1[n] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert len(top1) == len(model.blocks)
    assert top1[-1] == 100


QUICK = ["--data", "digits", "--train-size", 20, "--batch-size", 10, "--depth", 8, "--threads", 1]


def test_a_module_that_does_not_classify_has_nan_in_the_log_and_resumes(tmp_path, monkeypatch):
    flags = [str(flag) for flag in (*QUICK, *CONTRAST, "--num-modules", 3, "--epochs", 2, "--save_folder")]
    whole, resumed = str(tmp_path / "whole"), str(tmp_path / "resumed")
    script.main([*flags, whole])
    lines = [line for line in log_of(whole)[1:] if line.startswith("n: ")]
    pattern = r"n: {}, epoch {}, loss: \d+\.\d{{5}}, train top1:{} test top1:{}"
    for line, (epoch, n) in zip(lines, itertools.product((1, 2), (1, 2, 3)), strict=True):
        top1 = [r"\d+\.\d+"] * 2 if n == 3 else ["nan"] * 2
        assert re.fullmatch(pattern.format(n, epoch, *top1), line)
    assert "modules end after stem, (1, 0), (3, 0)" in log_of(whole)

    def stop_in_the_second(model, optimizers, *others):
        if not optimizers[0].param_groups[0]["lr"] == rates[0]:
            raise Stop
        train_epoch(model, optimizers, *others)

    train_epoch, args = script.train_epoch, parse(*flags, resumed)
    probe = [torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1)]
    rates = [(script.set_learning_rate(probe, epoch, args), probe[0].param_groups[0]["lr"])[1] for epoch in (1, 2)]
    monkeypatch.setattr(script, "train_epoch", stop_in_the_second)
    with pytest.raises(Stop):
        script.main([*flags, resumed])
    monkeypatch.setattr(script, "train_epoch", train_epoch)
    script.main([*flags, resumed, "--resume", "auto"])
    assert_same_run(whole, resumed)


# Costs


def measured(*flags):
    return costs.measure(parse(*flags), script.Network)


def conv_flops(depth):
    """Of an image, forward, by hand: (the stem's, all convolutions')."""
    n, total = (depth - 2) // 6, 0
    for channels, side in ((16, 32), (32, 16), (64, 8)):
        area, half = side**2, channels // 2
        total += 2 * area * conv(channels, channels) * 2 * n
        if channels > 16:  # the first one's input has half as many channels; a 1x1 convolution
            total += 2 * area * (conv(half, channels) - conv(channels, channels) + conv(half, channels, 1))
    stem = 2 * 1024 * conv(3, 16)
    return stem, stem + total


@pytest.mark.parametrize("depth", [8, 32, 110])
def test_backprop_s_costs(depth):
    stem, convolutions = conv_flops(depth)
    (row,), whole = measured("--method", "backprop", "--depth", depth, "--batch-size", 8)
    assert (row["flops"], row["net_flops"], row["net"]) == (convolutions, 2 * 640, 650)
    assert row["parameters"] + row["net"] == whole["parameters"]
    assert whole["flops"] == 3 * (convolutions + 2 * 640) - stem  # images need no gradient
    n = (depth - 2) // 6
    maps = 16 * 1024 * (2 + 4 * n) + 32 * 256 * (4 * n + 1) + 64 * 64 * (4 * n + 1)
    small = 8 * (16 * (1 + 2 * n) + 32 * (2 * n + 1) + 64 * (2 * n + 1))  # BatchNorms' means and deviations
    small += 8 * (4 * 64 + 4 * 10 + 8)  # pooled, log-softmax, labels
    assert whole["peak"] == row["kept"] == pytest.approx(4 * 8 * (3 * 1024 + maps) + small, abs=64)


@pytest.mark.parametrize("widths", [[16, 32, 64], [16, 16, 16, 32, 32, 64, 64]], ids=["K=4", "K=8"])
def test_checkpointing_s_costs(widths):
    """Forward twice, but for the last segment; kept at the peak: inputs of segments up to one, and what that keeps."""
    stem, convolutions = conv_flops(32)
    rows, whole = measured("--method", "checkpoint", "--num-modules", len(widths) + 1, "--batch-size", 8)
    again = sum(row["flops"] for row in rows[:-1])
    assert sum(row["flops"] for row in rows) == convolutions
    assert whole["flops"] == 3 * (convolutions + 2 * 640) - stem + again
    before = [
        0,
        0,
        *itertools.accumulate(8 * 4 * 16 * 1024 * 16 // width for width in widths[:-1]),
    ]  # images wait anyway
    by_hand = [inputs + row["kept"] for inputs, row in zip(before, rows, strict=True)]
    assert whole["peak"] == max(by_hand)
    assert by_hand.index(max(by_hand)) == (0 if len(rows) == 4 else 2)
    assert whole["parameters"] == 466_906


@pytest.mark.parametrize("name", CASES)
def test_a_local_method_keeps_what_its_largest_module_does(name):
    rows, whole = measured(*CASES[name], "--depth", 14, "--num-modules", 4, "--batch-size", 8)
    assert whole["peak"] == max(row["kept"] for row in rows)
    assert whole["parameters"] == sum(row["parameters"] + row["net"] for row in rows)
    assert sum(row["flops"] for row in rows) == conv_flops(14)[1]
    assert whole["flops"] > 2 * sum(row["flops"] + row["net_flops"] for row in rows)


@pytest.mark.parametrize("name", ["backprop", *CASES])
def test_kept_activations_are_those_of_a_real_step(name):
    flags = [*ALL[name], "--depth", 8, "--num-modules", 1 if name == "backprop" else 3, "--batch-size", 6]
    rows, _ = measured(*flags)
    model, *_ = make(*flags)
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    x, labels = images, _ = batch()
    for row, block, net in zip(rows, model.blocks, model.auxiliary_nets):
        kept = {}

        def pack(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            representation = block(x)
            net.loss(*net(representation), images, labels)
        real = sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in weights)
        assert row["kept"] == pytest.approx(real, rel=0.001)
        x = representation.detach()


def peak(*flags, size=64):
    """(measured on this CPU, predicted) peak memory of a training step, in MiB."""
    args = [*flags, "--batch-size", size]
    parts = make(*args)
    images, labels = batch(size)
    script.train_step(images, labels, *parts)
    return peak_memory(lambda: script.train_step(images, labels, *parts), CPU), measured(*args)[1]["peak"] / 2**20


@pytest.mark.parametrize(
    ("depth", "names"), [(14, ["checkpoint"]), pytest.param(32, ["checkpoint", *CASES], marks=slow)]
)
def test_peak_memory(depth, names):
    """What costs.py predicts is what a step needs, but for up to three gradients that it has at a time."""
    K = ["--depth", depth, "--num-modules", 4]
    flags = {"backprop": ["--method", "backprop", "--depth", depth]}
    flags |= {name: [*ALL[name], *K] for name in names}
    peaks = {name: peak(*flag) for name, flag in flags.items()}
    gradient = 64 * 16 * 32 * 32 * 4 / 2**20  # of a block's output in the first stage
    for real, predicted in peaks.values():
        assert predicted < real < predicted + 3 * gradient
    assert all(peaks[name][0] < peaks["backprop"][0] for name in names)


def test_the_table_of_costs(tmp_path):
    flags = ["--method", "infopro", "--depth", 14, "--num-modules", 3, "--batch-size", 8]
    status, text, _ = run(SCRIPT, "--costs", *flags, cwd=tmp_path)
    assert status == 0
    assert not list(tmp_path.iterdir())  # neither log nor checkpoint
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    _, *modules, _, backprop, checkpoint, local = rows
    assert [row[:2] for row in modules] == [["1", "(1, 0)"], ["2", "(2, 0)"], ["3", "(3, 1)"]]
    assert [row[4] for row in modules] == [f"{infopro_size(16):,}", f"{infopro_size(32):,}", "650 (classifier)"]
    assert [row[:2] for row in rows[-3:]] == [["backprop", "1"], ["checkpoint", "3"], ["infopro", "3"]]
    assert backprop[2] == checkpoint[2]
    for row, method in ((backprop, ["--depth", 14, "--batch-size", 8, "--method", "backprop"]), (local, flags)):
        _, whole = measured(*method)
        expected = whole["parameters"], whole["flops"] / 1e6, whole["peak"] / 2**20
        assert [float(cell.replace(",", "")) for cell in row[2:]] == pytest.approx(expected, abs=0.06)
    assert float(backprop[3]) < float(checkpoint[3])
    assert float(backprop[4]) > float(checkpoint[4])


@slow
def test_the_table_of_costs_of_modules_balanced_for_memory(tmp_path):
    """They are more equal than modules of equally many layers."""
    kept = {}
    for balance in ("memory", "blocks"):
        flags = ["--depth", 110, "--num-modules", 4, "--batch-size", 8, "--balance", balance]
        status, text, _ = run(SCRIPT, "--costs", *flags, cwd=tmp_path)
        assert status == 0
        kept[balance] = [float(line.split("|")[-2]) for line in text.splitlines() if re.match(r"\| \d", line)]
        assert len(kept[balance]) == 4
    assert max(kept["memory"]) < 0.8 * max(kept["blocks"])


@pytest.mark.parametrize("name", ALL)
def test_forward_upto_a_module_runs_the_blocks_before_it(name):
    model = make(*ALL[name], "--depth", 8, "--num-modules", 1 if name == "backprop" else 3)[0].eval()
    x = images = batch()[0]
    for n in range(len(model.blocks)):
        logits, representation = model(x, n)
        whole = model(images, n, upto=True)
        assert torch.equal(representation, whole[1])
        assert representation.equal(model.blocks[n](x))
        assert logits is whole[0] is None or torch.equal(logits, whole[0])
        x = representation


# The audit, and methods that cheat


def findings(*flags, train_module=script.train_module):
    return audit.audit(train_module, make("--depth", 8, *flags))


def cheat(monkeypatch, method):
    """What the audit finds in a method, with three modules."""
    monkeypatch.setitem(methods.METHODS, "cheat", method)
    return findings("--method", "cheat", "--num-modules", 3)


class Honest(methods.LocalLoss):
    def __init__(self, place, args):
        super().__init__()
        self.net, self.next_block = resnet.classifier(place.channels, 10), [place.next_block]

    def forward(self, h):
        return self.net(h), None


def test_a_method_with_dropout_is_local(monkeypatch):
    class Dropout(Honest):
        def forward(self, h):
            return self.net(F.dropout(h)), None

    assert cheat(monkeypatch, Honest) == []
    assert cheat(monkeypatch, Dropout) == []


@pytest.mark.parametrize("name", ["dgl", "infopro contrast", "man"])
def test_the_audit_finds_a_graph_that_is_not_cut(name):
    source = inspect.getsource(script.train_module)
    cut = "train_step.hand_over(representation)"
    assert source.count(cut) == 1
    names = {}
    exec(source.replace(cut, "representation"), vars(script) | {}, names)
    found = findings(*CASES[name], "--num-modules", 3, train_module=names["train_module"])
    assert found[-1] == "module 1 hands a graph to the next one"


def test_the_audit_finds_a_gradient_and_a_count_in_the_next_block(monkeypatch):
    class RunsNextBlock(Honest):
        def __init__(self, place, args):
            super().__init__(place, args)
            self.net = resnet.classifier(place.next_block.channels, 10)

        def forward(self, h):
            return self.net(self.next_block[0](h)), None

    found = cheat(monkeypatch, RunsNextBlock)
    assert "module 1 reads later modules' parameters for its loss" in found
    assert "module 1 changes blocks.1.0.residual.0.weight.grad" in found
    assert "module 1 changes blocks.1.0.residual.1.running_mean" in found
    assert "blocks.1.0.residual.1.num_batches_tracked is 2 after one batch" in found
    assert "module 2 changes blocks.2.0.residual.0.weight.grad" in found


def test_the_audit_finds_a_step_of_another_module_s_weights(monkeypatch):
    class Writes(Honest):
        def after_step(self):
            self.next_block[0].residual[0].weight.data.mul_(0.9)

    assert "module 1 changes blocks.1.0.residual.0.weight" in cheat(monkeypatch, Writes)


def test_the_audit_finds_a_second_forward_pass(monkeypatch):
    class Twice(Honest):
        def __init__(self, place, args):
            super().__init__(place, args)
            self.norm = nn.BatchNorm2d(place.channels)

        def forward(self, h):
            return self.net(self.norm(self.norm(h))), None

    assert cheat(monkeypatch, Twice) == [
        f"auxiliary_nets.{n}.norm.num_batches_tracked is 2 after one batch" for n in (0, 1)
    ]


def test_a_method_may_say_that_it_has_several_views_of_a_batch(monkeypatch):
    class TwoViews(Honest):
        views = 2

        def __init__(self, place, args):
            super().__init__(place, args)
            self.norm, self.other = nn.BatchNorm2d(place.channels), nn.BatchNorm2d(place.channels)

        def forward(self, h):
            return self.net(self.other(self.norm(h) + self.norm(F.dropout(h)))), None

    class Thrice(TwoViews):
        def forward(self, h):
            return super().forward(self.norm(h))

    assert cheat(monkeypatch, TwoViews) == []
    assert cheat(monkeypatch, Thrice) == [
        f"auxiliary_nets.{n}.norm.num_batches_tracked is 3 after one batch" for n in (0, 1)
    ]


@pytest.mark.parametrize("declared", ["", "weights of the next block"])
def test_the_audit_tells_a_step_that_does_not_repeat(declared, monkeypatch):
    class Counts(Honest):
        reads, count = declared, 1

        def loss(self, logits, more, images, labels):
            self.count += 1
            return super().loss(logits, more, images, labels) * self.count

    text = "reads later modules' parameters for its loss, or has a counter or random generator of its own"
    assert cheat(monkeypatch, Counts) == [f"module {n} {text}" for n in (1, 2)]


def test_the_audit_tells_a_loss_that_is_not_finite(monkeypatch):
    class Divides(Honest):
        def loss(self, logits, more, images, labels):
            return super().loss(logits, more, images, labels) / 0

    assert cheat(monkeypatch, Divides) == [f"module {n} has a loss or gradients that are not finite" for n in (1, 2)]


@pytest.mark.parametrize("declared", ["", "weights of the next block"])  # which is for after a step
def test_the_audit_finds_weights_read_without_a_gradient(declared, monkeypatch):
    class Peeks(Honest):
        reads = declared

        def loss(self, logits, more, images, labels):
            weight = self.next_block[0].residual[0].weight.detach()
            return super().loss(logits, more, images, labels) + 1e-3 * weight.square().mean()

    assert cheat(monkeypatch, Peeks) == [f"module {n} reads later modules' parameters for its loss" for n in (1, 2)]


def test_the_audit_finds_a_gradient_through_weights_that_are_declared(monkeypatch):
    class Through(Honest):
        reads = "weights of the next block"

        def loss(self, logits, more, images, labels):
            frozen = {name: p.detach() for name, p in self.next_block[0].named_parameters()}
            further = torch.func.functional_call(copy.deepcopy(self.next_block[0]), frozen, more).square().mean()
            return super().loss(logits, None, images, labels) + further - further.detach()

        def forward(self, h):
            return self.net(h), h

    assert cheat(monkeypatch, Through) == [f"module {n} reads later modules' parameters for its loss" for n in (1, 2)]


def test_the_audit_finds_a_later_module_s_loss(monkeypatch):
    class Feedback(Honest):
        last = 1.0

        def loss(self, logits, more, images, labels):
            loss = super().loss(logits, more, images, labels)
            scale, Feedback.last = Feedback.last, loss.item()
            return loss * scale

    assert cheat(monkeypatch, Feedback)[0].startswith("module 1 reads later modules' parameters")


def test_the_audit_finds_a_moving_average_that_is_not_declared(monkeypatch):
    assert findings("--method", "man", "--num-modules", 3) == []
    monkeypatch.setattr(methods.MAN, "reads", "")
    for method in ("man", "man-bias"):
        found = findings("--method", method, "--num-modules", 3)
        assert found == [f"module {n} reads later modules' parameters after a step" for n in (1, 2)]


def test_the_audit_finds_checkpointing_that_counts_twice(monkeypatch):
    monkeypatch.setattr(resnet, "without_statistics", lambda part: script.utils.contextlib.nullcontext())
    found = findings("--method", "checkpoint", "--num-modules", 2)
    assert "blocks.0.segments.0.0.1.num_batches_tracked is 2 after one batch" in found
    assert not any("segments.1" in text for text in found)  # which is not checkpointed


@pytest.mark.parametrize(
    "flags",
    [["--depth", 8], pytest.param(["--depth", 32], marks=slow)],
    ids=str,
)
def test_audit_of_all(flags, tmp_path):
    status, text, errors = run(SCRIPT, "--audit", *flags, cwd=tmp_path)
    assert (status, errors) == (0, "")
    assert not list(tmp_path.iterdir())
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")][1:]
    modules = ["2", "4"] if flags[1] == 8 else ["2", "4", "8", "16"]
    local = ["dgl", "predsim", "infopro", "auglocal", "man", "man-bias", "infopro contrast"]
    assert [row[:2] for row in rows] == [["backprop", "1"], *([m, K] for m in ["checkpoint", *local] for K in modules)]
    assert [row[2] for row in rows] == ["one module" if row[0] in ("backprop", "checkpoint") else "yes" for row in rows]
    average = "next block's weights, into a moving average"
    assert [row[3] for row in rows] == [average if row[0].startswith("man") else "nothing" for row in rows]


def test_a_failed_audit_ends_with_status_1(monkeypatch, capsys):
    class Peeks(Honest):
        def loss(self, logits, more, images, labels):
            return super().loss(logits, more, images, labels) + self.next_block[0].residual[0].weight.detach().mean()

    monkeypatch.setattr(methods, "METHODS", {"dgl": methods.DGL, "infopro": methods.InfoPro, "peeks": Peeks})
    with pytest.raises(SystemExit) as stop:
        script.main(["--audit", "--depth", "8"])
    assert stop.value.code == "2 of these failed"  # a text: status 1
    out = capsys.readouterr().out
    assert "| dgl | 4 | yes | nothing |" in out
    assert "| peeks | 2 | no: module 1 reads later modules' parameters for its loss | nothing |" in out
    assert "| peeks | 4 | no: module 1 reads later modules' parameters for its loss (and 2 more) | nothing |" in out


# Flags


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--num-modules", 99], ["--num-modules 99", "ResNet-32", "1 to 16"]),
        (["--depth", 33], ["--depth 33", "6n+2"]),
        (["--depth", 2], ["--depth", "at least 8"]),
        (["--balance", "memory"], ["--balance memory", "110", "32"]),
        (["--balance", "memory", "--depth", 110, "--num-modules", 5], ["--balance memory", "2 to 4"]),
        (["--method", "hebb"], ["hebb", "infopro"]),
        (["--method", "backprop", "--num-modules", 2], ["backprop", "--num-modules 2"]),
        (["--lambdas", 1, 2], ["--lambdas"]),
        (["--lambdas", 1, 2, 3, -1], ["--lambdas", "at least 0"]),
        (["--lr", 0], ["--lr", "above 0"]),
        (["--dgl-hidden", 4], ["--dgl-hidden", "2"]),
        (["--method", "man", "--infopro-loss", "contrast"], ["--infopro-loss has no effect on --method man"]),
        (["--lambdas", 1, 2, 3, 4], ["--lambdas has no effect on --method dgl"]),
        (["--method", "man", "--num-modules", 2, "--lambdas", 1, 2, 3, 4], ["--lambdas", "the same pair twice"]),
        (["--method", "checkpoint", "--dgl-hidden", 3], ["--dgl-hidden has no effect on --method checkpoint"]),
        (["--method", "backprop", "--auglocal-depth", 1], ["--auglocal-depth has no effect on --method backprop"]),
        (["--epochs", 5, "--warmup", 5], ["--warmup 5 must be below --epochs 5"]),
    ],
    ids=str,
)
def test_mistakes(flags, parts, tmp_path):
    refused(run(SCRIPT, *flags, cwd=tmp_path), *parts)
    assert not list(tmp_path.iterdir())


def test_defaults():
    assert [parse("--method", method).num_modules for method in ("dgl", "checkpoint", "backprop")] == [4, 4, 1]
    assert parse("--method", "auglocal", "--depth", 110).num_modules == 55
    assert parse("--method", "auglocal", "--depth", 110, "--num-modules", 16).num_modules == 16
    assert (parse().depth, parse().epochs, parse().batch_size, parse().lr) == (32, 160, 1024, 0.8)
    assert [parse("--epochs", epochs).warmup for epochs in (160, 40, 15)] == [10, 2, 0]
    assert parse("--epochs", 160, "--warmup", 0).warmup == 0


def test_another_number_of_epochs_is_refused(tmp_path):
    """The learning rate of every epoch depends on it."""
    flags = [*QUICK, "--num-modules", 2]
    assert run(SCRIPT, *flags, "--epochs", 1, cwd=tmp_path)[0] == 0
    refused(run(SCRIPT, *flags, "--epochs", 2, "--resume", "auto", cwd=tmp_path), "epochs 1", "it is 2")


# A method of one's own


@pytest.fixture
def my_method(tmp_path):
    """The README's example in a copy of the folder: a function that runs it with flags, and the method's name."""
    section = (ROOT / "auxiliary_nets_study" / "README.md").read_text().partition("Your own method\n")[2]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code, 'auxiliary_nets_study/README.md has no Python block under "Your own method"'
    folder = tmp_path / "auxiliary_nets_study"
    shutil.copytree(ROOT / folder.name, folder, ignore=shutil.ignore_patterns("logs", "__pycache__"))
    (folder / "my_method.py").write_text(code[1])

    def run_it(*flags):
        def main():
            for file in folder.glob("*.py"):
                sys.modules.pop(file.stem, None)
            sys.path.insert(0, str(folder))
            sys.argv = ["my_method.py", *map(str, flags)]
            sys.stdout = (tmp_path / "out.txt").open("w")
            runpy.run_path(str(folder / "my_method.py"), run_name="__main__")

        assert forked(main, errors=tmp_path / "errors.txt") == 0, (tmp_path / "errors.txt").read_text()
        return (tmp_path / "out.txt").read_text()

    return run_it, re.search(r'name="([\w-]+)"', code[1])[1]


def test_a_method_of_one_s_own(my_method, tmp_path):
    run_it, name = my_method
    assert name not in methods.METHODS
    flags = ["--method", name, "--num-modules", 3, "--epochs", 1, "--save_folder", tmp_path]
    text = run_it(*QUICK, *flags)
    assert len(re.findall(r"^n: \d, epoch 1, loss: \d+\.\d+, train top1:\d+\.\d+ test top1:\d+\.\d+$", text, re.M)) == 3
    assert log_of(tmp_path)[0]["method"] == name
    (checkpoint,) = tmp_path.glob("*.pt")
    refused(run(SCRIPT, "--resume", checkpoint, cwd=tmp_path), f"--method {name}", "script that has it")


def test_a_method_with_a_flag_of_its_own(monkeypatch):
    class Smoothed(Honest):
        flags = ("smoothing",)

        @staticmethod
        def add_flags(add):
            add("--smoothing", type=float, default=0.1)

        def __init__(self, place, args):
            super().__init__(place, args)
            self.smoothing = args.smoothing

        def loss(self, logits, more, images, labels):
            return F.cross_entropy(logits, labels, label_smoothing=self.smoothing)

    class Variant(Smoothed):
        pass

    monkeypatch.setitem(methods.METHODS, "smoothed", Smoothed)
    monkeypatch.setitem(methods.METHODS, "variant", Variant)
    model, *_ = make("--method", "smoothed", "--smoothing", "0.3", "--depth", 8, "--num-modules", 3)
    assert [net.smoothing for net in model.auxiliary_nets[:-1]] == [0.3, 0.3]
    with pytest.raises(SystemExit):
        parse("--method", "dgl", "--smoothing", "0.3")


@slow
def test_the_audit_has_a_method_of_one_s_own(my_method):
    run_it, name = my_method
    text = run_it("--audit", "--depth", 8)
    assert f"| {name} | 2 | yes | nothing |" in text
    assert f"| {name} | 4 | yes | nothing |" in text
