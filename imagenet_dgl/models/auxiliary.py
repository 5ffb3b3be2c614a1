"""Auxiliary networks: from the output of a block to logits (B, num_classes)."""

import math

from torch import nn
from torchvision.ops import Permute


def mlp(width, num_classes, num_hidden=3):
    """(B, width) -> `num_hidden` hidden layers of the same width -> logits (B, num_classes)."""
    net = []
    for _ in range(num_hidden):
        net += [nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*net, nn.Linear(width, num_classes))


def mlp_sr(channels, height, width, num_classes, nlin=3, num_hidden=3):
    """(B, C, H, W) -> `nlin` 1x1 convolutions at a quarter of the resolution, 2x2 pixels, mlp of width 4C -> logits."""
    net = [nn.AdaptiveAvgPool2d((math.ceil(height / 4), math.ceil(width / 4)))] if nlin else []
    for _ in range(nlin):
        net += [nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*net, nn.AdaptiveAvgPool2d(2), nn.Flatten(), *mlp(4 * channels, num_classes, num_hidden))


def auxiliary_net(shape, num_classes, nlin=3, num_hidden=3, channels_last=False):
    """The auxiliary network for a block's output of this shape.

    - (B, C, H, W): mlp-sr, at the true feature size; (B, H, W, C) with `channels_last`: the same after a permutation.
    - (B, N, D), tokens: an mlp of width D on the mean token.
    - (B, D): an mlp of width D.
    """
    if len(shape) == 2:
        return mlp(shape[1], num_classes, num_hidden)
    if len(shape) == 3:
        mean_token = [Permute([0, 2, 1]), nn.AdaptiveAvgPool1d(1), nn.Flatten()]
        return nn.Sequential(*mean_token, *mlp(shape[2], num_classes, num_hidden))
    if channels_last:
        net = auxiliary_net([shape[0], shape[3], *shape[1:3]], num_classes, nlin, num_hidden)
        return nn.Sequential(Permute([0, 3, 1, 2]), *net)
    return mlp_sr(*shape[1:], num_classes, nlin, num_hidden)
