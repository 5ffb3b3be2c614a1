"""ResNet-(6n+2) for CIFAR-10 with 1x1 shortcuts, as the local-learning papers after DGL use it, and its cuts.

Shapes are (B, C, H, W). A network of depth 6n+2 has L = 3n+1 layers: the stem, and three stages of n basic blocks with
C = 16, 32, 64 channels at sides s = 32, 16, 8. ddg_comparisons has another ResNet, with parameter-free shortcuts.
"""

import contextlib
import itertools
import math

import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# Layers after which a module ends, as (stage, block from 0), where equal runs of layers are not the published cut
PUBLISHED = {("blocks", 110, 2): [(2, 8)]}
PUBLISHED |= {  # InfoPro*, arXiv 2101.10832: balanced for memory
    ("memory", 110, 2): [(1, 14)],
    ("memory", 110, 3): [(1, 9), (2, 2)],
    ("memory", 110, 4): [(1, 6), (1, 14), (2, 8)],
}


def widths(depth):
    """Channels of each of the L layers. Raises ValueError if the depth is not 6n+2."""
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"--depth {depth} is not 6n+2 (for example 32 or 110)")
    n = (depth - 2) // 6
    return [16] * (1 + n) + [32] * n + [64] * n


def name(layer, depth):
    """A layer, counted from 0, as text: the stem, or (stage, block)."""
    stage, block = divmod(layer - 1, (depth - 2) // 6)
    return f"({stage + 1}, {block})" if layer else "stem"


def cut(depth, num_modules, balance="blocks"):
    """The last layer of each module: the published cuts, or else equal runs of layers; the last ones may have one more.

    Raises:
        ValueError: the network cannot be cut into so many modules, or, with balance "memory", nobody has published it.
    """
    L, n = len(widths(depth)), (depth - 2) // 6
    if not 1 <= num_modules <= L:
        raise ValueError(f"--num-modules {num_modules}: a ResNet-{depth} has {L} layers, and so 1 to {L} modules")
    if ends := PUBLISHED.get((balance, depth, num_modules)):
        return [*((stage - 1) * n + block + 1 for stage, block in ends), L - 1]
    if balance == "memory":
        raise ValueError(
            f"--balance memory has cuts for depth 110 and 2 to 4 modules, not for {depth} and {num_modules}"
        )
    size, rest = divmod(L, num_modules)  # the last `rest` modules have a layer more
    return [(k + 1) * size + max(0, k + 1 - num_modules + rest) - 1 for k in range(num_modules)]


def convolution(in_channels, channels, kernel_size=3, stride=1):
    conv = nn.Conv2d(in_channels, channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
    nn.init.normal_(conv.weight, std=math.sqrt(2 / (kernel_size**2 * channels)))
    return conv


def stem():
    """Images (B, 3, 32, 32) -> (B, 16, 32, 32)."""
    return nn.Sequential(convolution(3, 16), nn.BatchNorm2d(16), nn.ReLU(inplace=True))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, in_channels, s, s) -> (B, channels, s / stride, s / stride)."""

    def __init__(self, in_channels, channels, stride=1):
        super().__init__()
        self.channels, self.shortcut = channels, nn.Sequential()
        self.residual = nn.Sequential(
            convolution(in_channels, channels, stride=stride),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            convolution(channels, channels),
            nn.BatchNorm2d(channels),
        )
        if stride > 1 or channels != in_channels:
            self.shortcut.extend([convolution(in_channels, channels, 1, stride), nn.BatchNorm2d(channels)])

    def forward(self, x):
        return F.relu_(self.residual(x).add_(self.shortcut(x)))


def layers(depth):
    """List of the L layers; together (B, 3, 32, 32) -> (B, 64, 8, 8)."""
    channels = widths(depth)
    return [stem(), *(BasicBlock(c, d, d // c) for c, d in itertools.pairwise(channels))]


def classifier(channels, num_classes):
    """(B, channels, s, s) -> logits (B, num_classes)."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


class Checkpointed(nn.Module):
    """Segments, one after the other, whose inner activations are recomputed in the backward pass.

    Chen et al., arXiv 1604.06174; as torch's checkpoint_sequential, it keeps those of the last segment, which the
    backward pass needs first.
    """

    def __init__(self, segments):
        super().__init__()
        self.segments = nn.ModuleList(segments)

    def forward(self, x):
        *segments, last = self.segments
        for segment in segments:
            contexts = contextlib.nullcontext(), without_statistics(segment)
            x = checkpoint(segment, x, use_reentrant=False, preserve_rng_state=False, context_fn=lambda c=contexts: c)
        return last(x)

    def compile(self, *arguments, **options):
        for segment in self.segments:
            segment.compile(*arguments, **options)


@contextlib.contextmanager
def without_statistics(part):
    """The part's BatchNorms see a batch for the second time: their running statistics stay as they are."""
    norms = [norm for norm in part.modules() if isinstance(norm, nn.BatchNorm2d)]
    saved = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, saved):
            norm.momentum, norm.num_batches_tracked = momentum, count
