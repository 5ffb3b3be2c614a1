"""The network of Section 5.2's learning curves (arXiv 1901.08164): a small VGG with one module per layer.

Shapes are (B, C, H, W). C is a layer's number of channels and s the side of its output in pixels.
"""

import math

from torch import nn


def layer(in_channels, channels, downsample):
    """[2x2 max-pool,] 3x3 convolution, BatchNorm, ReLU: (B, in_channels, s, s) -> (B, channels, s [/ 2], s [/ 2])."""
    pool = [nn.MaxPool2d(2)] if downsample else []
    convolution = nn.Conv2d(in_channels, channels, 3, padding=1)
    return nn.Sequential(*pool, convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def mlp(channels, num_classes, num_hidden=3):
    """Auxiliary network `mlp`: (B, C, s, s), averaged to 2x2 and flattened to 4C, -> logits (B, num_classes)."""
    width = 4 * channels
    net = [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    for _ in range(num_hidden):
        net += [nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*net, nn.Linear(width, num_classes))


def mlp_sr(channels, side, num_classes):
    """Auxiliary network `mlp-sr`: three 1x1 convolutions at a quarter of the resolution, then `mlp`."""
    net = [nn.AdaptiveAvgPool2d(math.ceil(side / 4))]
    for _ in range(3):
        net += [nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*net, *mlp(channels, num_classes))


class DGLNet(nn.Module):
    """`depth` layers, each a module with its own auxiliary network. The last auxiliary network is the classifier.

    The default widths are 64, 128, 128, 256 at sides 32, 16, 16, 8. Layers 1 and 3, counted from 0, begin with a
    2x2 max-pool and double the channels.
    """

    def __init__(self, num_classes, depth=4, channels=64, side=32):
        super().__init__()
        self.blocks, self.auxiliary_nets = nn.ModuleList(), nn.ModuleList()
        in_channels = 3
        for n in range(depth):
            downsample = n in (1, 3)
            if downsample:
                channels, side = 2 * channels, side // 2
            self.blocks.append(layer(in_channels, channels, downsample))
            last = n == depth - 1
            self.auxiliary_nets.append(mlp(channels, num_classes, 2) if last else mlp_sr(channels, side, num_classes))
            in_channels = channels

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
