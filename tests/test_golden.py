"""Golden logs: two epochs of every script give the lines kept in tests/golden, so that a change of the code that should
not change results is seen not to. After one that should, write them anew, and read the difference:

    GOLDEN=write .venv/bin/python -m pytest tests/test_golden.py

The scripts run in float64. In float32, BatchNorm over few images makes rounding large: with the kernels of another
processor (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, MKL_CBWR and MKL_ENABLE_INSTRUCTIONS, for SSE, AVX2 and AVX-512),
losses differ by up to 0.2. In float64, all of these give every line to its last digit; so do two threads, and the
default layout. The tolerance is ten units of a loss's last digit, and none for accuracies. A weight decay of 4e-4
instead of 5e-4 changes a loss by 24 times that.
"""

import os
import re
from pathlib import Path

import pytest
import torch
import torchvision  # noqa: F401 (here, or each copy of this process imports it anew)
from conftest import forked, load, log_of
from PIL import Image
from test_scripts import DIGITS, SCRATCH, SCRIPTS

GOLDEN = Path(__file__).parent / "golden"
IMAGES = Path(SCRATCH.name, "golden")  # 3 training images and 1 test image of each class, enlarged without rounding
for label in range(10):
    for i, pixels in enumerate(DIGITS.images[DIGITS.target == label][:4]):
        file = IMAGES / ("train" if i < 3 else "test") / f"{label}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype("uint8").repeat(4, 0).repeat(4, 1)).save(file)
(IMAGES / "val").symlink_to("test")
# 30 images are two batches of 12 and one of 6. Where the learning rate drops, it does so between the two epochs.
DATA = ["--data", IMAGES, "--train-size", 30, "--batch-size", 12, "--epochs", 2]
FLAGS = {script: [*flags, *DATA] for script, flags in SCRIPTS.items()}
FLAGS["auxiliary_nets_study/cifar_resnet.py"] += ["--lr", 1, "--warmup", 2, "--epochs", 4]  # in the last, 0
FLAGS["buffer_experiments/cifar_buffer.py"] += ["--layer-sequence", "random", "--epochdecay", 1]
FLAGS["learning_curves/cifar_dgl.py"] += ["--lr", 0.01]
FLAGS["learning_curves/cifar_sequential_greedy.py"] += ["--lr", 0.01, "--epochs", 1]  # of each layer
IMAGENET = [IMAGES, "--arch", "resnet18", "--image-size", 32, "-b", 12, "--lr", 0.01, "--nepochs", 2]
IMAGENET += ["-j", 0, "-p", 0, "--threads", 1]
FLAGS["imagenet_dgl/imagenet.py"] = [*IMAGENET, "--epochdecay", 2]  # counts epochs from 1
FLAGS["imagenet_dgl/imagenet_dgl.py"] = [*IMAGENET, "--epochdecay", 1]
LAST = {script: 150 for script in FLAGS if "ddg" in script}
LAST |= {"auxiliary_nets_study/cifar_dgl.py": 16, "learning_curves/cifar_dgl.py": 16}


def lines_of(script, folder):
    """The epoch lines of a script's two epochs, in float64. Losses are added where the lines have none."""

    def main():
        module = load(*script.removesuffix(".py").split("/"))
        Run = getattr(module, "runs", module.utils).Run
        begin, check_finite = Run.begin, Run.check_finite

        def begin_late(run):
            begin(run)
            run.epoch = LAST[script] - 2

        def log_loss(run, loss, n, epoch):
            check_finite(run, loss, n, epoch)
            run.log(f"n: {n}, epoch {epoch}, loss: {loss:.5f}")

        torch.set_default_dtype(torch.float64)
        torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double
        flags = [*FLAGS[script], "--no-cuda"]
        if script in LAST:
            Run.begin = begin_late
            flags += ["--epochs", LAST[script]]
        if "buffer" in script or "imagenet" in script:
            Run.check_finite = log_loss
        os.chdir(folder)
        module.main([str(flag) for flag in flags])

    assert forked(main, errors=folder / "errors.txt") == 0, (folder / "errors.txt").read_text()
    return [line for line in log_of(folder)[1:] if re.match(r"(n|lr): \S+, epoch ", line)]


@pytest.mark.parametrize("script", FLAGS)
def test_the_lines_are_the_golden_ones(script, tmp_path):
    lines = lines_of(script, tmp_path)
    golden = GOLDEN / f"{script.removesuffix('.py').replace('/', '-')}.txt"
    if os.environ.get("GOLDEN") == "write":
        GOLDEN.mkdir(exist_ok=True)
        golden.write_text("".join(f"{line}\n" for line in lines))
    number = re.compile(r"(loss: |)(\d+\.\d+)")
    expected = golden.read_text().splitlines()
    assert [number.sub("", line) for line in lines] == [number.sub("", line) for line in expected]
    for line, other in zip(lines, expected):
        for (kind, a), (_, b) in zip(number.findall(line), number.findall(other)):
            assert float(a) == pytest.approx(float(b), abs=1e-4 if kind else 0), line
