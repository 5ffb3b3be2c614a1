"""Shared by the tests: the scripts, loaded from their folders or run as a user runs them."""

import contextlib
import importlib
import io
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).parent.parent
COMMON_NAMES = ("dni", "models", "utils")  # modules that several folders have under one name


def pytest_configure():
    torch.set_num_threads(1)  # as the runs that are compared to the bit


def load(folder, name):
    """Import ROOT/folder/name.py with that folder's own modules, whatever was imported from other folders before."""
    for module in [m for m in sys.modules if m.split(".")[0] in {*COMMON_NAMES, name}]:
        del sys.modules[module]
    sys.path.insert(0, str(ROOT / folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / folder))


def run(script, *flags, cwd):
    """Run a script's `main` in the folder cwd, as if by `python script flags`: (exit status, stdout, stderr)."""
    main, status, before = load(*script.removesuffix(".py").split("/")).main, 0, os.getcwd()
    os.chdir(cwd)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main([str(flag) for flag in flags])
        except SystemExit as stop:
            status = stop.code
            if isinstance(status, str):  # as the interpreter does
                print(status, file=sys.stderr)
                status = 1
        finally:
            os.chdir(before)
            sys.excepthook = sys.__excepthook__
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """20 training and 10 test images of 2 classes, JPEG and PNG: scikit-learn's digits 0 and 1, 32x32 pixels."""
    root = tmp_path_factory.mktemp("image_folder")
    digits = load_digits(n_class=2)
    for i, (pixels, label) in enumerate(zip(digits.images[:30], digits.target)):
        folder = root / ("train" if i < 20 else "test") / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * 15).astype("uint8")).resize((32, 32)).convert("RGB")
        image.save(folder / f"{i:02}.{'png' if i % 2 else 'jpg'}")
    return root
