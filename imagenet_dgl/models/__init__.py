"""ImageNet networks: the paper's VGGs and ResNets, cut as published, and any other network, cut by `decouple`."""

import difflib

import torchvision

from . import published
from .costs import costs, meta_images, on_meta, one_line_error
from .decouple import decouple
from .dgl_net import DGLNet
from .published import VGGS
from .timing import Timer

__all__ = ["ARCHITECTURES", "VGGS", "DGLNet", "Timer", "build_dgl", "build_plain", "costs", "count_modules"]
__all__ += ["decouple", "register"]

ARCHITECTURES = torchvision.models.list_models(module=torchvision.models)
OWN = {}  # those that `register` has added


def register(name, build):
    """Let `name` be an architecture: build(num_classes, image_size) returns an image classifier with new weights.

    Raises ValueError if torchvision has one of that name.
    """
    if name in ARCHITECTURES:
        raise ValueError(f"{name} is torchvision's: choose another name")
    OWN[name] = build


def build_dgl(
    arch,
    num_classes,
    image_size,
    block_size=None,
    num_modules=None,
    balance="flops",
    nlin=3,
    mlp=3,
    aux_size="true",
    cuts=None,
    timer=None,
):
    """The network `arch` as a DGLNet on images (B, 3, image_size, image_size).

    Args:
        arch: vgg11, vgg13, vgg16, vgg19 and resnet18 to resnet152 are the paper's networks, cut as published. Any
            other name is torchvision's network, cut by `decouple`; so is a ResNet with another balance than "flops".
        block_size: for the published VGGs, the number of convolutions in a module (1).
        num_modules: for all others, K (2).
        balance, cuts, timer: see `decouple`.
        nlin, mlp: 1x1 convolutions and hidden layers of the auxiliary networks.
        aux_size: "published", for the ResNets cut as published: auxiliary networks for half of the true height and
            width, as `published.resnet` says.

    Raises:
        ValueError: there is no such architecture, it cannot be cut like this, or it does not fit images of this size.
    """
    check_name(arch)
    is_published_resnet = arch in published.RESNETS and balance == "flops"
    if aux_size == "published" and not is_published_resnet:
        raise ValueError(f"{arch}: aux_size published is for resnet18 to resnet152, with balance flops")
    if arch in VGGS:
        if num_modules is not None or balance != "flops":
            wrong = "num_modules" if num_modules is not None else "balance"
            raise ValueError(f"{arch} is cut by block_size; {wrong} is for the other networks, {arch}_bn included")
        return published.vgg(arch, num_classes, image_size, 1 if block_size is None else block_size, nlin, mlp)
    if block_size is not None:
        vggs = ", ".join(VGGS)
        raise ValueError(f"{arch} is cut by num_modules; block_size is for the paper's VGGs: {vggs}")
    num_modules = 2 if num_modules is None else num_modules
    if is_published_resnet:
        return published.resnet(arch, num_classes, image_size, num_modules, nlin, mlp, aux_size)
    try:
        model = torchvisions(arch, num_classes, image_size)
        return decouple(model, num_modules, num_classes, image_size, balance, nlin, mlp, cuts, timer)
    except ValueError as error:
        raise ValueError(f"{arch}: {error}") from None


def count_modules(arch, block_size=None, num_modules=None):
    """The number of modules that `build_dgl` would make; ValueError if there is no such architecture."""
    check_name(arch)
    return published.count_modules(arch, block_size or 1) if arch in VGGS else num_modules or 2


def build_plain(arch, num_classes, image_size):
    """Torchvision's network `arch`, with new weights: images (B, 3, image_size, image_size) -> logits.

    googlenet and inception_v3 come without their auxiliary classifiers.

    Raises:
        ValueError: there is no such architecture, or it does not fit images of this size.
    """
    check_name(arch)
    try:
        model = torchvisions(arch, num_classes, image_size)
        with one_line_error(model, image_size):
            on_meta(model)(meta_images(model, image_size))
    except ValueError as error:
        raise ValueError(f"{arch}: {error}") from None
    return model


def torchvisions(arch, num_classes, image_size):
    if arch in OWN:
        return OWN[arch](num_classes, image_size)
    options = {}
    if arch in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    elif arch.startswith("vit_"):
        options = {"image_size": image_size}
    elif arch.startswith("maxvit_"):
        options = {"input_size": (image_size, image_size)}
    try:
        return torchvision.models.get_model(arch, weights=None, num_classes=num_classes, **options)
    except (AssertionError, ValueError) as error:  # from transformers whose patches must fill the image
        reason = str(error).split("\n")[0]
        raise ValueError(f"it cannot be built for {image_size}-pixel images: {reason}") from None


def check_name(arch):
    if arch not in ARCHITECTURES and arch not in OWN:
        near = difflib.get_close_matches(arch, [*ARCHITECTURES, *OWN], 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "any classification model of torchvision is one"
        raise ValueError(f"no architecture {arch!r}: {hint}")
