"""ResNet-(6n+2) for CIFAR-10 (He et al. 2016, arXiv 1512.03385), cut into modules for backprop, DGL, DDG and FR.

Shapes are (B, C, H, W). The three stages have C = 16, 32, 64 channels and sides s = 32, 16, 8.
"""

import math

import utils

import torch.nn.functional as F
from torch import nn

STEM = 3  # entries of the flat list before the first residual block: convolution, BatchNorm, ReLU


def cut(depth, num_splits):
    """The (begin, end) of each of num_splits modules in the flat list of stem, residual blocks and pool.

    ResNet-110 has 58 entries; cut in two, it gives [(0, 29), (29, 58)]. Raises ValueError if the depth is not 6n+2, or
    if a module would have no residual block.
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"--depth {depth} is not 6n+2 (for example 20, 56 or 110)")
    pool = STEM + (depth - 2) // 2

    def modules(number):
        size = math.ceil((pool + 1) / number)
        return [(begin, min(begin + size, pool + 1)) for begin in range(0, number * size, size)]

    def possible(number):
        return number < pool and all(max(begin, STEM) < min(end, pool) for begin, end in modules(number))

    if not possible(num_splits):
        numbers = [number for number in range(1, pool) if possible(number)]
        raise ValueError(
            f"--num_splits {num_splits} leaves a module of --depth {depth} without a residual block; the largest "
            f"possible is {numbers[-1]} (allowed: {', '.join(map(str, numbers))})"
        )
    return modules(num_splits)


def conv3x3(in_channels, channels, stride=1):
    convolution = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
    nn.init.normal_(convolution.weight, std=math.sqrt(2 / (9 * channels)))
    return convolution


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, in_channels, s, s) -> (B, channels, s, s); s / 2 if channels double."""

    def __init__(self, in_channels, channels):
        super().__init__()
        self.stride, self.new_channels = channels // in_channels, channels - in_channels
        self.residual = nn.Sequential(
            conv3x3(in_channels, channels, self.stride),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            conv3x3(channels, channels),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x):
        residual = self.residual(x)
        if self.new_channels:  # parameter-free shortcut: every second pixel, zeros in the new channels
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return F.relu_(residual.add_(x))


def blocks(depth, num_splits):
    """The modules (nn.ModuleList of nn.Sequential), and the channels and side of each one's last residual block."""
    n = (depth - 2) // 6
    channels = [16 * 2**stage for stage in range(3) for _ in range(n)]
    entries = [conv3x3(3, 16), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    entries += [BasicBlock(*pair) for pair in zip([16, *channels], channels)]
    entries.append(nn.AvgPool2d(8))
    modules = cut(depth, num_splits)
    last_blocks = [channels[min(end - STEM, 3 * n) - 1] for _, end in modules]
    return nn.ModuleList(nn.Sequential(*entries[b:e]) for b, e in modules), [(c, 32 * 16 // c) for c in last_blocks]


def classifier(num_classes):
    """(B, 64, 1, 1) -> logits (B, num_classes)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))


def mlp_sr(channels, side, num_classes):
    """Auxiliary network `mlp-sr`: (B, C, s, s) -> logits (B, num_classes), at a quarter of the resolution."""
    net = [nn.AdaptiveAvgPool2d(math.ceil(side / 4))]
    for _ in range(3):
        net += [nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    width = 4 * channels
    net += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    for _ in range(3):
        net += [nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*net, nn.Linear(width, num_classes))


class ResNet(nn.Module):
    """The network for backprop, DDG and FR. `blocks` are its modules, and the last one ends with the classifier."""

    def __init__(self, num_classes, depth=110, num_splits=2):
        super().__init__()
        self.blocks, _ = blocks(depth, num_splits)
        self.blocks[-1].extend(classifier(num_classes))

    def forward(self, x):
        """Images (B, 3, 32, 32) -> logits (B, num_classes)."""
        for block in self.blocks:
            x = block(x)
        return x


class DGLNet(nn.Module):
    """The same network with an auxiliary network per module. The last module's is the classifier.

    With the same seed, blocks and classifier start with the same weights as in ResNet.
    """

    def __init__(self, num_classes, depth=110, num_splits=2):
        super().__init__()
        self.blocks, shapes = blocks(depth, num_splits)
        last = classifier(num_classes)  # created first, so that its initial weights match ResNet's
        self.auxiliary_nets = nn.ModuleList([*(mlp_sr(c, s, num_classes) for c, s in shapes[:-1]), last])

    def forward(self, x, n, upto=False):
        """Run module n on its input x. With `upto`, x is the images, and blocks 0 to n-1 run first.

        Returns:
            (logits of auxiliary net n (B, num_classes), output of block n (B, C, s, s)).
        """
        if upto:
            for block in self.blocks[:n]:
                x = block(x)
        representation = self.blocks[n](x)
        return self.auxiliary_nets[n](representation), representation


# Flags, the same in all scripts


def add_flags(parser, num_splits="number of modules (K)"):
    """Returns the parser's add_argument, for further ones. `num_splits` is that flag's help."""
    add = parser.add_argument
    add("--num_splits", type=utils.at_least(1), default=2, help=num_splits)
    add("--depth", type=utils.at_least(8), default=110, help="layers of the ResNet, 6n+2")
    add("--batch-size", type=utils.at_least(2), default=128, help="images in a training batch")
    add("--test-batch-size", type=utils.at_least(1), default=256, help="images in a test batch")
    add("--epochs", type=utils.at_least(1), default=300, help="passes over the training set")
    drops = {"type": utils.at_least(1), "nargs": "*", "default": [150, 225], "metavar": "EPOCH"}
    add("--drops", **drops, help="when these epochs begin, the learning rate is divided by 10")
    add("--seed", type=utils.at_least(0), default=1, help="seeds the initial weights and the order of the data")
    return add


def check_cut(parser, args):
    try:
        cut(args.depth, args.num_splits)
    except ValueError as error:
        parser.error(error)
    return args
