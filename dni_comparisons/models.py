"""The DNI paper's CNN for CIFAR-10 (arXiv 1608.05343), for backprop, DNI and DGL.

Shapes are (B, C, H, W). The blocks' outputs have 128 channels and sides 10, 3, 1.
"""

import torch
import torch.nn.functional as F
from torch import nn

import dni

CHANNELS = 128


def block(in_channels, pool):
    """5x5 convolution, BatchNorm, ReLU, 3x3 pooling: (B, in_channels, s, s) -> (B, 128, s // 3, s // 3)."""
    convolution = nn.Conv2d(in_channels, CHANNELS, 5, padding=2)
    return nn.Sequential(convolution, nn.BatchNorm2d(CHANNELS), nn.ReLU(inplace=True), pool)


def blocks():
    """The three blocks in all four methods: (B, 3, 32, 32) -> (B, 128, 10, 10) -> (B, 128, 3, 3) -> (B, 128, 1, 1)."""
    return nn.ModuleList([block(3, nn.MaxPool2d(3)), *(block(CHANNELS, nn.AvgPool2d(3)) for _ in range(2))])


def convolutions():
    """Three 5x5 convolutions with BatchNorm and ReLU in between. Keeps the shape; the last weights start at zero."""
    net = []
    for _ in range(2):
        net += [nn.Conv2d(CHANNELS, CHANNELS, 5, padding=2), nn.BatchNorm2d(CHANNELS), nn.ReLU(inplace=True)]
    net.append(nn.Conv2d(CHANNELS, CHANNELS, 5, padding=2))
    nn.init.zeros_(net[-1].weight)
    return nn.Sequential(*net)


class Synthesizer(nn.Module):
    """Synthetic gradient from a block's output (B, 128, s, s) and, with `context_dim`, from one-hot labels."""

    def __init__(self, context_dim=None):
        super().__init__()
        self.net = convolutions()
        self.context = nn.Linear(context_dim, CHANNELS) if context_dim else None

    def forward(self, trigger, context):
        first, *others = self.net
        x = first(trigger)
        if self.context:
            x = x + self.context(context)[:, :, None, None]
        for layer in others:
            x = layer(x)
        return x


class CNN(nn.Module):
    """The network for backprop or, with `interfaces`, for DNI, which has an interface after each of the three blocks.

    With `context`, the synthesizers need one-hot labels (B, num_classes): see `dni.synthesizer_context`.
    """

    def __init__(self, num_classes, interfaces=False, context=False):
        super().__init__()
        self.blocks = blocks()
        self.interfaces = nn.ModuleList(
            dni.BackwardInterface(Synthesizer(num_classes if context else None)) if interfaces else nn.Identity()
            for _ in self.blocks
        )
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS, num_classes))

    def forward(self, x):
        """Images -> logits (B, num_classes). In training, each interface backpropagates into its block at once."""
        for net, interface in zip(self.blocks, self.interfaces):
            x = interface(net(x))
        return self.classifier(x)


def one_hot(labels, num_classes):
    return F.one_hot(labels, num_classes).to(torch.get_default_dtype())


def auxiliary_net(num_classes):
    """A synthesizer's convolutions, global average pool, Linear: (B, 128, s, s) -> logits (B, num_classes)."""
    return nn.Sequential(*convolutions(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, num_classes))


class DGLNet(nn.Module):
    """The three blocks, each a module with its own auxiliary network. The last module's is the classifier."""

    def __init__(self, num_classes):
        super().__init__()
        self.blocks = blocks()
        classifier = nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS, num_classes))
        self.auxiliary_nets = nn.ModuleList([*(auxiliary_net(num_classes) for _ in range(2)), classifier])

    def forward(self, x, n, upto=False):
        """Run module n on its input x. With `upto`, x is the images, and blocks 0 to n-1 run first.

        Returns:
            (logits of auxiliary net n (B, num_classes), output of block n (B, 128, s, s)).
        """
        if upto:
            for net in self.blocks[:n]:
                x = net(x)
        representation = self.blocks[n](x)
        return self.auxiliary_nets[n](representation), representation
