"""The auxiliary networks, the grouping of layers, the FLOPs table and the local losses of auxiliary_nets_study."""

import math
import re

import pandas
import pytest
import seaborn
import torch
import torch.nn.functional as F
from conftest import DEVICES, ROOT, load, notebook, run
from torch import nn

SCRIPT = "auxiliary_nets_study/cifar_dgl.py"
TYPES = ["mlp-sr", "mlp", "cnn"]
dgl = load("auxiliary_nets_study", "cifar_dgl")
cifar, utils = dgl.cifar, dgl.utils


def make(*shape, device="cpu", flags=(), channels=8):
    """A narrow network, its optimizers, scalers and autocast as the script makes them, and 40 images in 3 batches."""
    args = dgl.parse_args(flags)
    torch.manual_seed(0)
    device = torch.device(device)
    model = utils.to_device(dgl.DGLNet(10, *shape, channels=channels), args, device)
    optimizers = [cifar.sgd(parts, lr=0.1, weight_decay=5e-4) for parts in zip(model.blocks, model.auxiliary_nets)]
    scalers = [cifar.grad_scaler(args, device) for _ in optimizers]
    images = torch.randint(256, (40, 32, 32, 3), dtype=torch.uint8)
    batches = cifar.Batches(images, torch.arange(40) % 10, 16, device, torch.Generator().manual_seed(0))
    return model, optimizers, scalers, utils.autocast(args, device), batches


def train(parts, **options):
    meters = [cifar.Meter(parts[-1].device) for _ in parts[1]]
    dgl.train_epoch(*parts, meters, **options)
    return [meter.pop()[0] for meter in meters]


def kinds(net):
    """What an auxiliary network is made of, as text: C3 a 3x3 convolution, L a linear layer, P4 a pooling to 4x4."""

    def kind(part):
        if isinstance(part, nn.Conv2d):
            return f"C{part.kernel_size[0]}"
        if isinstance(part, nn.AdaptiveAvgPool2d):
            return f"P{part.output_size}"
        return {"Linear": "L", "BatchNorm2d": "B", "BatchNorm1d": "B", "ReLU": "R", "Flatten": ""}[type(part).__name__]

    return "".join(kind(part) for part in net)


@pytest.mark.parametrize(
    ("type_aux", "first"),
    [
        ("mlp-sr", "P8" + 3 * "C1BR" + "P2" + 3 * "LBR" + "L"),
        ("mlp", "P2" + 3 * "LBR" + "L"),
        ("cnn", 2 * "C3BR" + "P2BL"),
    ],
)
def test_networks_are_those_of_the_paper(type_aux, first):
    model = dgl.DGLNet(10, type_aux)
    x, shapes = torch.randn(2, 3, 32, 32), []
    for n in range(6):
        logits, x = model(x, n)
        assert logits.shape == (2, 10)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(128, 32, 32), (256, 16, 16), (256, 16, 16), (512, 8, 8), (512, 8, 8), (512, 8, 8)]
    assert kinds(model.auxiliary_nets[0]) == first
    assert kinds(model.auxiliary_nets[3]) == first.replace("P8", "P2")
    assert kinds(model.auxiliary_nets[5]) == "P2" + 2 * "LBR" + "L"
    convolutions = [part for net in model.auxiliary_nets for part in net if isinstance(part, nn.Conv2d)]
    assert all(part.bias is None for part in convolutions)
    sum(model(torch.randn(2, 3, 32, 32), n, upto=True)[0].sum() for n in range(6)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_layers_are_grouped_and_the_last_module_is_smaller():
    model, alone = dgl.DGLNet(10, "mlp", 4, 7, 8).eval(), dgl.DGLNet(10, "mlp", 1, 7, 8).eval()
    assert [dgl.span(layers) for layers in model.layers] == ["1-4", "5-7"]
    assert len(model.blocks) == len(model.auxiliary_nets) == 2
    assert model.auxiliary_nets[0][-1].in_features == 4 * 32
    parts = zip([p for block in model.blocks for p in block], [p for block in alone.blocks for p in block], strict=True)
    for part, other in parts:
        other.load_state_dict(part.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x, 1, upto=True)[1], alone(x, 6, upto=True)[1])


@pytest.mark.parametrize("beta", [0.0, 0.99])
@pytest.mark.parametrize("device", DEVICES)
def test_a_module_updates_only_itself(device, beta):
    parts = model, optimizers, *_ = make("cnn", 2, device=device)
    steps = []

    def watch(n, optimizer):
        step = optimizer.step

        def watched_step():
            for m, module in enumerate(zip(model.blocks, model.auxiliary_nets)):
                gradients = [p.grad is not None for part in module for p in part.parameters()]
                assert all(gradients) if m == n else not any(gradients), f"loss {n}, module {m}"
            step()
            model.zero_grad()
            steps.append(n)

        optimizer.step = watched_step

    for n, optimizer in enumerate(optimizers):
        watch(n, optimizer)
    train(parts, beta=beta)
    assert steps == [0, 1, 2] * 3


def test_one_module_is_backprop_to_the_bit():
    parts = model, *_ = make("mlp-sr", 6)
    other, (optimizer,), *_, batches = make("mlp-sr", 6)
    assert len(model.blocks) == 1
    train(parts)
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(other.auxiliary_nets[0](other.blocks[0](images))[0], labels).backward()
        optimizer.step()
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("batch_size", [7, 20])
def test_one_pass_evaluation_equals_each_module_by_itself(batch_size):
    parts = model, *_, autocast, batches = make("mlp-sr", 2)
    train(parts)
    batches = cifar.Batches(batches.images[:, 4:36, 4:36], batches.labels, batch_size, batches.device)
    top1 = dgl.evaluate(model, autocast, batches)
    assert not model.training
    for n in range(3):
        correct = sum((model(x, n, upto=True)[0].argmax(1) == y).sum().item() for x, y in batches)
        assert top1[n] == pytest.approx(100 * correct / 40)


def table(tmp_path, *flags):
    status, text, _ = run(SCRIPT, "--flops", *flags, cwd=tmp_path)
    assert status == 0
    assert not list(tmp_path.iterdir())  # neither log nor checkpoint
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if re.match(r"\| \d", line)]
    return rows, float(re.search(r"([\d.]+) % of the", text)[1])


def test_flops(tmp_path):
    shares = {}
    for type_aux in TYPES:
        rows, shares[type_aux] = table(tmp_path, "--type_aux", type_aux)
        assert [float(row[3]) for row in rows[:2]] == [7.1, 151.0]  # 2*9*3*128*32*32, 2*9*128*256*16*16
        assert rows[1][2] == f"{9 * 128 * 256 + 3 * 256:,}"
        assert len(rows) == 6
    assert rows[0][5] == "604.0"  # 2 convolutions, 2*9*128*128*32*32 each
    assert shares["cnn"] > 100
    assert shares["mlp"] < shares["mlp-sr"] < 10
    rows, share = table(tmp_path, "--block_size", 4)
    assert [row[1] for row in rows] == ["1-4", "5-6"]
    assert share < shares["mlp-sr"]
    assert table(tmp_path, "--block_size", 6)[1] == 0


def test_predsim_against_a_direct_computation():
    logits, features, labels = torch.randn(5, 4), torch.randn(5, 6), torch.tensor([0, 2, 2, 1, 3])

    def matrix(rows):
        centred = [[x - sum(row) / len(row) for x in row] for row in rows.tolist()]
        return [
            [
                sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
                for b in centred
            ]
            for a in centred
        ]

    rows = zip(matrix(features), matrix(F.one_hot(labels, 4)))
    squares = sum((a - b) ** 2 for pair in rows for a, b in zip(*pair)) / 25
    for beta in (0.3, 1):
        expected = (1 - beta) * F.cross_entropy(logits, labels).item() + beta * squares
        assert dgl.local_loss(logits, features, labels, beta).item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(dgl.local_loss(logits, features, labels), F.cross_entropy(logits, labels))
    assert dgl.local_loss(logits, F.one_hot(labels, 4) * 3.0, labels, 1).item() == pytest.approx(0, abs=1e-10)


def test_predsim_compares_the_last_layer_s_input_and_spares_the_last_module():
    model, *_ = parts = make("mlp-sr", 3)
    x = torch.randn(4, 3, 32, 32)
    representation = model.blocks[0](x)
    logits, features = model.auxiliary_nets[0](representation)
    assert torch.equal(logits, model.auxiliary_nets[0][-1](features))
    assert features.shape == (4, 4 * representation.shape[1])
    first, last = train(parts, beta=1.0)
    assert 0 < first < 1 < last < 10  # similarities' mean squared error; cross-entropy


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_predsim_in_16_bits(precision):
    losses = {p: train(make("mlp-sr", 3, flags=["--precision", p]), beta=0.5) for p in ("fp32", precision)}
    assert losses[precision] == pytest.approx(losses["fp32"], rel=0.1)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--type_aux", "vgg"], ["vgg", "mlp-sr"]),
        (["--block_size", 7], ["--block_size 7", "6 layers"]),
        (["--beta", "1.5"], ["--beta", "from 0 to 1"]),
        (["--beta", "much"], ["--beta", "a number of at least 0"]),
        (["--beta", 0.5], ["--beta has no effect without --loss predsim"]),
    ],
)
def test_mistakes(flags, parts, tmp_path):
    status, _, message = run(SCRIPT, *flags, cwd=tmp_path)
    assert status == 2
    assert message.count("\n") == 1
    assert all(part in message for part in parts)


def test_the_log_says_how_layers_are_grouped(tmp_path):
    flags = ["--data", "digits", "--train-size", 20, "--epochs", 1, "--feature_size", 2, "--block_size", 4]
    assert run(SCRIPT, *flags, cwd=tmp_path)[0] == 0
    assert "layers of the modules, 1: 1-4, 2: 5-6\n" in next(tmp_path.glob("*.log")).read_text()


NOTEBOOK = ROOT / "auxiliary_nets_study" / "AuxiliaryNets.ipynb"
PUBLISHED = """Files already downloaded and verified
DataParallel(
n: 1, epoch 1, loss: 1.57285, train top1:42.198 test top1:45.36000061035156\x20
n: 2, epoch 1, loss: 1.43183, train top1:47.862 test top1:53.16\x20
n: 1, epoch 2, loss: 1.33744, train top1:52.358 test top1:50.49\x20
n: 2, epoch 2, loss: 1.13937, train top1:60.970 test top1:62.03\x20
"""


def test_notebook(tmp_path, monkeypatch):
    for type_aux in TYPES:
        flags = ["--data", "digits", "--train-size", 20, "--epochs", 1, "--feature_size", 2, "--block_size", 3]
        assert run(SCRIPT, *flags, "--type_aux", type_aux, "--name", type_aux, cwd=tmp_path)[0] == 0
    (tmp_path / "run_mlp-sr.log").write_text(PUBLISHED)
    concat, curves = pandas.concat, []
    monkeypatch.setattr(pandas, "concat", lambda *args, **kwargs: curves.append(concat(*args, **kwargs)) or curves[-1])
    scatterplot, drawn = seaborn.scatterplot, []
    monkeypatch.setattr(seaborn, "scatterplot", lambda data, **look: drawn.append(data) or scatterplot(data, **look))
    assert notebook(NOTEBOOK, monkeypatch, LOGS=tmp_path, PICTURE=tmp_path / "picture.png") is None
    assert [*drawn[0].epoch] == [1] * 4  # the longer run is compared at the last epoch of the others
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert curves[0].kind.value_counts().to_dict() == {"pred": 6, "published": 4}
    *_, row = curves[0][curves[0].kind == "published"].itertuples()
    assert (row.module, row.epoch, row.loss, row.train, row.test) == (2, 2, 1.13937, 60.97, 62.03)
    assert (row.type_aux, row.block_size) == ("mlp-sr", 3)
    (tmp_path / "flops").mkdir()
    assert row.share == pytest.approx(table(tmp_path / "flops", "--block_size", 3)[1], abs=0.05)


def test_the_notebook_averages_only_runs_that_differ_in_the_seed_alone(tmp_path, monkeypatch):
    """A renamed copy of the folder has written the logs."""
    flags = ["--data", "digits", "--train-size", 20, "--epochs", 1, "--feature_size", 2, "--block_size", 3]
    assert run(SCRIPT, *flags, "--type_aux", "mlp", "--name", "a", cwd=tmp_path)[0] == 0
    (log,) = tmp_path.glob("*.log")
    for name, (old, new) in {
        "seed": ('"seed": 1', '"seed": 2'),
        "precision": ('"precision": "fp32"', '"precision": "bf16"'),
        "images": ("20 training", "30 training"),
    }.items():
        (tmp_path / f"1_mine-cifar_dgl-{name}.log").write_text(log.read_text().replace(old, new))
    lineplot, drawn = seaborn.lineplot, []
    monkeypatch.setattr(seaborn, "lineplot", lambda data, **look: drawn.append(data) or lineplot(data, **look))
    assert notebook(NOTEBOOK, monkeypatch, LOGS=tmp_path, PICTURE=tmp_path / "picture.png") is None
    lines = [rows.seed.nunique() for _, rows in drawn[0].groupby("kind")]
    assert sorted(lines) == [1, 1, 2]
    assert {*drawn[0].kind} == {
        "pred, digits, 20 training",
        "pred, precision bf16, digits, 20 training",
        "pred, digits, 30 training",
    }


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("1_auxiliary_nets_study-cifar_dgl-a.log", ""),
        ("1_auxiliary_nets_study-cifar_dgl-a.log", "arguments: {}\n" + PUBLISHED),
        ("1_auxiliary_nets_study-cifar_dgl-a.log", "arguments: {\n" + PUBLISHED),
        ("1_cifar_dgl_unnamed.log", PUBLISHED),
        ("cnn.log", PUBLISHED[:-3]),
        ("cnn.log", PUBLISHED.replace("n: 2, epoch 2", "n: 1, epoch 3")),
        ("cnn.log", PUBLISHED.replace("n: 2, epoch", "n: 4, epoch")),
    ],
)
def test_the_notebook_names_a_log_that_it_cannot_read(name, text, tmp_path, monkeypatch):
    (tmp_path / "run_mlp-sr.log").write_text(PUBLISHED)
    (tmp_path / name).write_text(text)
    error = notebook(NOTEBOOK, monkeypatch, LOGS=tmp_path, PICTURE=tmp_path / "picture.png")
    assert str(error).startswith(f"{tmp_path / name} cannot be read: ")
