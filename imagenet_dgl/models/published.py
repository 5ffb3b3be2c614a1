"""The paper's networks, cut as published: VGGs with BatchNorm, and ResNets. Shapes are (B, C, H, W)."""

import itertools
import math

import torchvision
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

from .auxiliary import auxiliary_net
from .costs import meta_images, on_meta
from .dgl_net import DGLNet

VGGS = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def count_modules(arch, block_size):
    """The number of modules of a VGG, before it is built."""
    convolutions = sum(channels != "M" for channels in cfgs[VGGS[arch]])
    return math.ceil(convolutions / block_size)


def vgg(arch, num_classes, image_size, block_size=1, nlin=3, mlp=3):
    """A module is `block_size` convolutions with BatchNorm and ReLU; what is left over is a last, smaller module.

    A max-pool belongs to the convolution after it, so the last one belongs to the classifier.
    """
    layers = [[]]  # of each convolution: [max-pool,] convolution, BatchNorm, ReLU
    for part in make_layers(cfgs[VGGS[arch]], batch_norm=True):
        layers[-1].append(part)
        if isinstance(part, nn.ReLU):
            layers.append([])
    last_pool = layers.pop()
    if not 1 <= block_size <= len(layers):
        raise ValueError(f"{arch} has {len(layers)} convolutions: block_size must be 1 to {len(layers)}")
    if image_size < 32:
        raise ValueError(f"{arch} needs images of 32 pixels or more, not {image_size}")
    blocks = [nn.Sequential(*itertools.chain(*run)) for run in runs(layers, block_size)]
    hidden = [nn.Linear(512 * 7 * 7, 4096), nn.ReLU(inplace=True), nn.Linear(4096, 4096), nn.ReLU(inplace=True)]
    pool = [*last_pool, nn.AdaptiveAvgPool2d(7), nn.Flatten()]
    classifier = nn.Sequential(*pool, *hidden, nn.Linear(4096, num_classes))
    nets = [*auxiliary_nets(blocks[:-1], num_classes, image_size, nlin, mlp), classifier]
    for part in [*blocks, *nets]:
        initialise(part)
        for linear in (m for m in part.modules() if isinstance(m, nn.Linear)):
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)
    return DGLNet(blocks, nets)


def resnet(arch, num_classes, image_size, num_modules=2, nlin=3, mlp=3, aux_size="true"):
    """The list (stem with its max-pool, residual blocks) is cut into K = num_modules runs of ceil(length / K).

    With aux_size "published", auxiliary networks are made for half of the true height and width, as in the published
    code, which halved the size once too often: of 14x14 pixels they pool to 2x2, not 4x4.
    """
    net = torchvision.models.get_model(arch, weights=None, num_classes=num_classes)
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    parts = [stem, *net.layer1, *net.layer2, *net.layer3, *net.layer4]
    possible = [K for K in range(1, len(parts) + 1) if len(runs(parts, math.ceil(len(parts) / K))) == K]
    if num_modules not in possible:
        near = sorted(sorted(possible, key=lambda K: abs(K - num_modules))[:2])
        reason = f"its {len(parts)} parts cannot be cut into {num_modules} equal runs, the last one smaller"
        hint = f"possible are {near[0]} and {near[1]} modules, at most {len(parts)}"
        if 1 <= num_modules <= len(parts):
            hint += "; balance='memory' cuts elsewhere"
        raise ValueError(f"{arch}: {reason}; {hint}")
    blocks = [nn.Sequential(*run) for run in runs(parts, math.ceil(len(parts) / num_modules))]
    nets = auxiliary_nets(blocks[:-1], num_classes, image_size, nlin, mlp, 2 if aux_size == "published" else 1)
    for part in nets:
        initialise(part)  # torchvision has initialised the blocks like this already
    return DGLNet(blocks, [*nets, nn.Sequential(net.avgpool, nn.Flatten(), net.fc)])


def runs(parts, length):
    return [parts[i : i + length] for i in range(0, len(parts), length)]


def auxiliary_nets(blocks, num_classes, image_size, nlin, mlp, divisor=1):
    """mlp-sr networks for consecutive blocks, for their outputs' true height and width, divided by `divisor`."""
    nets, x = [], None
    for block in map(on_meta, blocks):
        x = block(meta_images(block, image_size) if x is None else x)
        shape = *x.shape[:2], *(math.ceil(side / divisor) for side in x.shape[2:])
        nets.append(auxiliary_net(shape, num_classes, nlin, mlp))
    return nets


def initialise(part):
    """Convolutions: Kaiming normal, fan-out, biases 0; BatchNorm: 1 and 0, as it comes."""
    for convolution in (m for m in part.modules() if isinstance(m, nn.Conv2d)):
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        if convolution.bias is not None:
            nn.init.zeros_(convolution.bias)
