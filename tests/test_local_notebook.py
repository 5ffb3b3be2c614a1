"""auxiliary_nets_study/LocalMethods.ipynb, on tiny runs of cifar_resnet.py."""

import contextlib
import re
import sys

import pandas
import pytest
from conftest import ROOT, load, notebook, run

SCRIPT = "auxiliary_nets_study/cifar_resnet.py"
NOTEBOOK = ROOT / "auxiliary_nets_study" / "LocalMethods.ipynb"
QUICK = ["--data", "digits", "--train-size", 20, "--batch-size", 10, "--epochs", 2, "--depth", 8]
RUNS = {
    "backprop": [],
    "checkpoint": ["--num-modules", 2],
    "dgl": ["--num-modules", 2],
    "infopro contrast": ["--num-modules", 3],
}
BENCHMARK = """
| | training images/s | test images/s | MFLOP/image | GFLOP/s | of torch.mm | of 1x1 conv | peak MiB |
|---|---|---|---|---|---|---|---|
| auxiliary_nets_study: ResNet-8, backprop, K = 1 | 300 | 900 | 90 | 27 | 50 % | 60 % | 20 |
| auxiliary_nets_study: ResNet-8, dgl, K = 2 | 200 | 900 | 90 | 27 | 50 % | 60 % | 20 |
| auxiliary_nets_study: ResNet-8, infopro contrast, K = 3 | 120 | 900 | 90 | 27 | 50 % | 60 % | 20 |
"""


def flags(method):
    name, *contrast = method.split()
    return ["--method", name, *RUNS[method], *(["--infopro-loss", "contrast"] if contrast else [])]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """The log of each run, by method."""
    folder = tmp_path_factory.mktemp("runs")
    for method in RUNS:
        assert run(SCRIPT, *QUICK, *flags(method), "--name", method, cwd=folder)[0] == 0
    return {method: next(folder.glob(f"*-{method}.log")).read_text() for method in RUNS}


def write(texts, folder):
    for method, text in texts.items():
        (folder / f"1_auxiliary_nets_study-cifar_resnet-{method}.log").write_text(text)


def draw(folder, monkeypatch):
    """(The notebook's error or None, all its points: runs, and what is published)."""
    concat, points = pandas.concat, []
    monkeypatch.setattr(pandas, "concat", lambda *args, **kwargs: points.append(concat(*args, **kwargs)) or points[-1])
    error = notebook(NOTEBOOK, monkeypatch, LOGS=folder, PICTURE=folder / "picture.png")
    return error, next(iter(points), None)


def test_errors_memory_and_flops(texts, tmp_path, monkeypatch):
    write(texts, tmp_path)
    error, points = draw(tmp_path, monkeypatch)
    assert error is None
    assert (tmp_path / "picture.png").stat().st_size > 20_000
    here = points[points["from"] == "here"].set_index(["method", "K"])
    numbers = {(method, [1, *RUNS[method]][-1]) for method in RUNS}
    assert {*here.index} == {*numbers, ("checkpoint", 3)}  # which has no log
    for (method, K), row in here.iterrows():
        last = texts["backprop" if method == "checkpoint" else method].splitlines()[-1]
        assert row.error == pytest.approx(100 - float(last.rpartition("top1:")[2]))
        assert (row.depth, row.data, row.epochs) == (8, "digits, 20 training", 2)
        text = run(SCRIPT, *QUICK, *flags(method), "--num-modules", K, "--costs", cwd=tmp_path)[1]
        rows = re.findall(r"^\| ([a-z]+) \| \d \| [\d,]+ \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
        (_, backprop, _), (_, flops, mebibytes) = rows[0], next(row for row in rows if row[0] == method.split()[0])
        assert row.MiB == pytest.approx(float(mebibytes), abs=0.06)
        assert row.FLOPs == pytest.approx(float(flops) / float(backprop), rel=0.01)


def test_time_is_the_benchmarks_where_it_has_the_row(texts, tmp_path, monkeypatch):
    batches = {name: re.sub(r'"batch_size": \d+', '"batch_size": 128', text) for name, text in texts.items()}
    batches = {name: re.sub(r'"lr": [\d.]+', '"lr": 0.1', text) for name, text in batches.items()}
    write(batches, tmp_path)
    (tmp_path / "20261126_benchmark.log").write_text(BENCHMARK.replace("200", "100"))
    (tmp_path / "20261127_benchmark.log").write_text(BENCHMARK)  # the newer one counts
    error, points = draw(tmp_path, monkeypatch)
    assert error is None
    times = points[points["from"] == "here"].set_index("method").time.to_dict()
    assert times == pytest.approx(
        {"backprop": 1, "dgl": 1.5, "infopro contrast": 2.5, "checkpoint": float("nan")}, nan_ok=True
    )


def test_published_errors_are_points_of_their_own(texts, tmp_path, monkeypatch):
    """And two seeds are one point, at their mean."""
    for seed, top1 in ((1, "40.00"), (2, "50.00")):
        text = texts["dgl"].replace('"depth": 8', '"depth": 32').replace('"seed": 1', f'"seed": {seed}')
        text = re.sub(r"\S+\n\Z", f"top1:{top1}\n", text)
        write({f"dgl_seed{seed}": text}, tmp_path)
    error, points = draw(tmp_path, monkeypatch)
    assert error is None
    points = points[(points.depth == 32) & (points.method == "dgl") & (points.K == 2)]
    assert points.groupby("from").error.agg(list).to_dict() == {"here": [55.0], "published, 160 epochs": [8.69]}


def test_only_runs_that_differ_in_the_seed_alone_are_one_point(texts, tmp_path, monkeypatch):
    """A renamed copy of the folder has written the logs."""
    for name, (old, new) in {
        "1": ("", ""),
        "2": ('"seed": 1', '"seed": 2'),
        "3": ('"precision": "fp32"', '"precision": "bf16"'),
        "4": (re.search('"lr": [0-9.]+', texts["dgl"])[0], '"lr": 0.5'),
        "5": ('"lambdas": null', '"lambdas": [5, 0, 0, 1]'),
    }.items():
        (tmp_path / f"1_mine-cifar_resnet-{name}.log").write_text(texts["dgl"].replace(old, new))
    error, points = draw(tmp_path, monkeypatch)
    assert error is None
    names = ["dgl", "dgl, lambdas [5, 0, 0, 1]", "dgl, lr 0.5", "dgl, precision bf16"]
    assert sorted(points[points["from"] == "here"].method) == names


def test_a_method_of_ones_own_with_a_flag(texts, tmp_path, monkeypatch):
    """As README.md describes it: the first cell imports it."""
    script = load("auxiliary_nets_study", "cifar_resnet")

    class Mine(sys.modules["methods"].DGL, name="mine"):
        flags = ("smoothing", "dgl_hidden")
        add_flags = staticmethod(lambda add: add("--smoothing", type=float, default=0.1))

        def __init__(self, place, args):
            super().__init__(place, args)
            self.smoothing = args.smoothing

    monkeypatch.setattr("conftest.own_modules", lambda *_: contextlib.nullcontext())  # which has `Mine`
    monkeypatch.syspath_prepend(NOTEBOOK.parent)
    monkeypatch.setattr("conftest.load", lambda *_: script)
    for smoothing in (0.1, 0.3):
        flags = ["--method", "mine", "--num-modules", 2, "--smoothing", smoothing, "--name", smoothing]
        assert run(SCRIPT, *QUICK, *flags, cwd=tmp_path)[0] == 0
    error, points = draw(tmp_path, monkeypatch)
    assert error is None
    assert sorted(points[points["from"] == "here"].method) == ["mine", "mine, smoothing 0.3"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: "", "it is empty, cut off, or not a log"),
        (lambda text: text[:-1], "cut off"),
        (lambda text: text.replace("arguments: {", "arguments: "), "JSONDecodeError"),
        (lambda text: text.replace('"depth": 8', '"deep": 8'), "depth"),
        (lambda text: text.replace('"epochs": 2', '"epochs": 3'), "ends with module 2 in epoch 2, not with 2 in 3"),
        (lambda text: text[: text.rindex("n: 2")], "ends with module 1 in epoch 2"),
    ],
)
def test_it_names_a_log_that_it_cannot_read(change, reason, texts, tmp_path, monkeypatch):
    write(texts | {"wrong": change(texts["dgl"])}, tmp_path)
    error, _ = draw(tmp_path, monkeypatch)
    assert str(error).startswith(f"{tmp_path}/1_auxiliary_nets_study-cifar_resnet-wrong.log cannot be read: ")
    assert reason in str(error)


def test_without_logs(tmp_path, monkeypatch):
    error, _ = draw(tmp_path, monkeypatch)
    assert str(error) == f"no log of cifar_resnet.py in {tmp_path}"
