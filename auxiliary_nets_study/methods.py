"""Local losses: what a method makes of a block's output, so that the module can learn without the later ones.

A method is a subclass of LocalLoss with a name, which `cifar_resnet.py --method` finds. README, "Your own method".
"""

import copy
import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cifar_dgl import convolutions, mlp, similarity
from resnet import BasicBlock, classifier, convolution

# Of the training images, as published by InfoPro; cifar.py's deviations are those of DGL's authors
MEAN, STD = (125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)
METHODS = {}


@dataclasses.dataclass
class Place:
    """Where in the network a module ends, and what follows."""

    k: int  # this module, from 0
    num_modules: int  # K; the last one has the network's classifier in place of a method
    layer: int  # the last of this module, from 0
    widths: list  # channels of each of the network's L layers
    next_block: nn.Module  # the next module's first
    num_classes: int

    @property
    def channels(self):
        return self.widths[self.layer]

    @property
    def side(self):
        return 32 * 16 // self.channels

    @property
    def progress(self):
        """0 in the first module, 1 in the last but one, which is the last with a local loss."""
        return self.k / max(self.num_modules - 2, 1)


class LocalLoss(nn.Module):
    """The auxiliary network of a module, and its loss. It is made from a Place and the script's flags."""

    flags = ()  # names of those that it reads and some other method does not, which refuses them
    reads = ""  # what it takes from other modules' parameters: nothing. If anything, modules train one after the other
    views = 1  # how often it may run its own BatchNorms on a batch, for the audit

    def __init_subclass__(cls, name=None):
        if name:
            METHODS[name] = cls

    @staticmethod
    def add_flags(add):
        """Add flags of one's own, with argparse's add_argument."""

    def forward(self, h):
        """Block's output (B, C, s, s), in --precision -> (logits (B, num_classes) or None, what else `loss` needs)."""
        raise NotImplementedError

    def loss(self, logits, more, images, labels):
        """Scalar, from what `forward` returned, in float32, images (B, 3, 32, 32) and labels (B,)."""
        return F.cross_entropy(logits, labels)

    def after_step(self):
        """Called after each step of the module's optimizer."""


class Classifier(LocalLoss):
    """The network's own, of the last module: cross-entropy."""

    def __init__(self, channels, num_classes):
        super().__init__()
        self.net = classifier(channels, num_classes)

    def forward(self, h):
        return self.net(h), None


class DGL(LocalLoss, name="dgl"):
    """Cross-entropy of mlp-sr (arXiv 1901.08164, Section 5.2), with --dgl-hidden layers of 4C units.

    Two, as AugLocal's authors (arXiv 2402.17318) compare with it; published by DGL's: three.
    """

    flags = ("dgl_hidden",)

    def __init__(self, place, args):
        super().__init__()
        channels = place.channels
        shrink = nn.AdaptiveAvgPool2d(math.ceil(place.side / 4))
        head = [*mlp(channels, args.dgl_hidden), nn.Linear(4 * channels, place.num_classes)]
        self.net = nn.Sequential(shrink, *convolutions(channels, 1, 3), *head)

    def forward(self, h):
        return self.net(h), None


class PredSim(LocalLoss, name="predsim"):
    """0.01 cross-entropy + 0.99 similarity matching (Nøkland and Eidnes, arXiv 1901.06656).

    The similarities of a batch's features, the deviations of each channel of a 3x3 convolution over its pixels, should
    match those of its one-hot labels. The classifier reads the output, averaged to the largest square with a power of
    two as its side and at most 1024 numbers.
    """

    def __init__(self, place, args):
        super().__init__()
        channels, side = place.channels, 2 ** (int(math.log2(1024 / place.channels)) // 2)  # at most 1024 numbers
        pool = nn.AdaptiveAvgPool2d(min(side, place.side)), nn.Flatten()
        self.predict = nn.Sequential(*pool, nn.Linear(channels * min(side, place.side) ** 2, place.num_classes))
        self.match = convolution(channels, channels)

    def forward(self, h):
        return self.predict(h), self.match(h)

    def loss(self, logits, features, images, labels):
        target = similarity(F.one_hot(labels, logits.shape[1]))
        match = F.mse_loss(similarity(features.flatten(2).std(2)), target)
        return 0.01 * F.cross_entropy(logits, labels) + 0.99 * match


class InfoPro(LocalLoss, name="infopro"):
    """l1 * reconstruction error + l2 * cross-entropy, or supervised contrastive loss (Wang et al., arXiv 2101.10832).

    The decoder must restore the image, so that a module keeps what later ones may need. Its convolutions keep
    torch's initialization. The weights go linearly from the first to the last but one module; see `loss_weights`.
    """

    flags = ("infopro_loss", "lambdas")

    def __init__(self, place, args, channels=None):
        super().__init__()
        C = channels or place.channels
        width, side, self.contrast = min(2 * C, 64), 32 * 16 // C, args.infopro_loss == "contrast"
        self.head = nn.Sequential(
            *(convolution(C, width, stride=width // C), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 128), nn.ReLU(inplace=True)),
            nn.Linear(128, 128 if self.contrast else place.num_classes),
        )
        self.decoder = nn.Sequential(  # to the sigmoid's argument: 16 bits would round the sigmoid to 1
            *([nn.Upsample(32, mode="bilinear", align_corners=True)] if side < 32 else []),
            *(nn.Conv2d(C, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True)),
            nn.Conv2d(12, 3, 3, padding=1),
        )
        first, last = loss_weights(args)
        self.weights = [a + place.progress * (b - a) for a, b in zip(first, last)]
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, h):
        if self.contrast and not self.training:
            return None, None
        output, decoded = self.head(h), self.decoder(h) if self.training else None
        return None if self.contrast else output, (output, decoded)

    def loss(self, logits, more, images, labels):
        output, decoded = more
        originals = (images * self.std + self.mean).clamp(0, 1)  # rounding may step outside
        reconstruction = F.binary_cross_entropy_with_logits(decoded, originals)
        prediction = contrastive_loss(output, labels) if self.contrast else F.cross_entropy(output, labels)
        return self.weights[0] * reconstruction + self.weights[1] * prediction


def contrastive_loss(z, labels, temperature=0.07):
    """Supervised contrastive loss (Khosla et al., arXiv 2004.11362) of vectors z (B, D), one view of each image.

    With normalised z, for image i: minus the mean, over the others p of its class, of
    log(exp(z_i.z_p / temperature) / sum over a != i of exp(z_i.z_a / temperature)); 0 if there are none.
    """
    z = F.normalize(z, dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    similarities = (z @ z.T / temperature).masked_fill(itself, -math.inf)
    log_shares = similarities - similarities.logsumexp(1, keepdim=True)
    partners = (labels[:, None] == labels) & ~itself
    return -(log_shares.where(partners, 0).sum(1) / partners.sum(1).clamp(min=1)).mean()


def loss_weights(args):
    """InfoPro's ((l1, l2) of the first module, (l1, l2) of the last but one): --lambdas, or those published.

    Published for ResNet-110 with the contrastive loss, and for ResNet-32, K = 16, softmax. The others' are here those
    of ResNet-110 with as many modules, or the next fewer published.
    """
    if args.lambdas:
        return args.lambdas[:2], args.lambdas[2:]
    if (args.depth, args.num_modules) == (32, 16) and args.infopro_loss == "softmax":
        return (5, 0.05), (0.2, 0.5)
    if args.balance == "memory":
        return ((5, 0.1), (5, 0.1)) if args.num_modules == 2 else ((5, 0), (5, 0.1))
    published = {2: ((5, 0.5), (5, 0.5)), 4: ((1, 0), (0, 1)), 8: ((5, 0), (0, 1)), 16: ((5, 0), (0.5, 1))}
    return published[max(K for K in published if K == 2 or args.num_modules >= K)]


class AugLocal(LocalLoss, name="auglocal"):
    """Cross-entropy of an auxiliary network of blocks with the widths of later layers (Ma et al., arXiv 2402.17318).

    There, every layer is a module. With larger ones, the depth is that of the k-th of K modules, and the widths are
    those after the module's last layer. Halves are rounded to even. With one block, a BatchNorm1d precedes
    the linear layer, also where only one layer is left.
    """

    flags = ("auglocal_depth",)

    def __init__(self, place, args):
        super().__init__()
        channels, halvings, net = place.channels, 0, []
        depth = auglocal_depth(place.k, place.num_modules, args.auglocal_depth)
        for layer in auglocal_layers(place.layer, len(place.widths), depth):
            width = place.widths[layer]
            halvings += int(math.log2(width / channels))  # 2 if it grows fourfold: one for the next block
            net.append(BasicBlock(channels, width, 2 if halvings else 1))
            channels, halvings = width, max(halvings - 1, 0)
        pool, linear = [nn.AdaptiveAvgPool2d(1), nn.Flatten()], nn.Linear(channels, place.num_classes)
        norm = [nn.BatchNorm1d(channels)] if len(net) == 1 else []
        self.net = nn.Sequential(*net, *pool, *norm, linear)

    def forward(self, h):
        return self.net(h), None


def auglocal_depth(k, num_modules, depth, shrinkage=0.5):
    """Blocks in the auxiliary network of module k, from 0: `depth`, and linearly fewer in later modules."""
    share = shrinkage * k / max(num_modules - 2, 1)
    return max(1, round(depth * (1 - share) + share))


def auglocal_layers(layer, num_layers, depth):
    """The later layers whose widths a module's auxiliary blocks have: `depth` at equal distances, or all there are."""
    rest = num_layers - 1 - layer
    number = min(depth, rest)
    return [round(layer + rest / number * i) for i in range(1, number + 1)]


class MAN(InfoPro, name="man"):
    """InfoPro, softmax, that reads copy(h) + ema(h) (momentum auxiliary network; Su et al., arXiv 2407.05623).

    Both start as copies of the next module's first block. `copy` learns with the module; `ema` is the moving average of
    that block's weights, which module-parallel training would have to send now and then.
    """

    flags = ("lambdas",)
    reads = "next block's weights, into a moving average"

    def __init__(self, place, args):
        super().__init__(place, args, channels=place.next_block.channels)
        self.next_block = [place.next_block]  # in a list: it is not a part of this network
        self.ema = copy.deepcopy(place.next_block).requires_grad_(False)
        self.add_correction(place.next_block)
        self.average = get_ema_multi_avg_fn(0.995)

    def add_correction(self, block):
        self.copy = copy.deepcopy(block)

    def corrected(self, h):
        return self.ema(h) + self.copy(h)

    def forward(self, h):
        return super().forward(self.corrected(h))

    def after_step(self):
        self.average([*self.ema.parameters()], [*self.next_block[0].parameters()], None)


class MANBias(MAN, name="man-bias"):
    """MAN as its paper describes it: ema(h) + bias, one for each channel, that learns with the module."""

    def add_correction(self, block):
        self.bias = nn.Parameter(torch.zeros(block.channels, 1, 1))

    def corrected(self, h):
        return self.ema(h) + self.bias
