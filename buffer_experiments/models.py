"""What cifar_buffer.py and cifar_async.py share: the network of Section 5.3 (arXiv 1901.08164), its buffers, flags.

Shapes are (B, C, H, W); C is a layer's number of channels and s the side of its output in pixels.
"""

import argparse
import json

import utils

import torch
from torch import nn

import cifar
from buffer import PRIORITIES, SAMPLINGS, Buffer, ProductQuantizer, available_memory, groups_and_codewords
from cifar import SIDE

DOWNSAMPLINGS = ["maxpool", "avgpool", "stride", "psi"]


def convolution(in_channels, channels, stride=1, bn=True):
    """3x3 convolution, BatchNorm or a bias, ReLU: (B, in_channels, s, s) -> (B, channels, s / stride, s / stride)."""
    norm = [nn.BatchNorm2d(channels)] if bn else []
    return [nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=not bn), *norm, nn.ReLU(inplace=True)]


def layer(in_channels, channels, downsample=None, bn=True):
    """[Downsampling and] a convolution: (B, in_channels, s, s) -> (B, channels, s [/ 2], s [/ 2])."""
    if downsample == "stride":
        return convolution(in_channels, channels, 2, bn)
    if downsample == "psi":  # space to depth, invertible, as in i-RevNet (arXiv 1802.07088)
        return [nn.PixelUnshuffle(2), *convolution(4 * in_channels, channels, bn=bn)]
    pool = {"maxpool": [nn.MaxPool2d(2)], "avgpool": [nn.AvgPool2d(2)], None: []}[downsample]
    return [*pool, *convolution(in_channels, channels, bn=bn)]


def mlp(channels, num_classes, num_hidden=3, bn=True):
    """Auxiliary network `mlp`: (B, C, s, s), averaged to 2x2 and flattened to 4C, -> logits (B, num_classes).

    Without hidden layers, a BatchNorm (if `bn`) comes between the average and the last Linear.
    """
    width = 4 * channels
    net = [nn.AdaptiveAvgPool2d(2), *([nn.BatchNorm2d(channels)] if bn and not num_hidden else []), nn.Flatten()]
    for _ in range(num_hidden):
        net += [nn.Linear(width, width), *([nn.BatchNorm1d(width)] if bn else []), nn.ReLU(inplace=True)]
    return [*net, nn.Linear(width, num_classes)]


class BufferNet(nn.Module):
    """`ncnn` layers in modules of `block_size`, each with its own auxiliary network; the last one's is the classifier.

    By default, the layers have 128, 128, 256, 256, 512, 512 channels at sides 32, 32, 16, 16, 8, 8. After each layer in
    `down`, counted from 0, the network downsamples by 2 (by `ds_type`) and doubles its channels. An auxiliary network
    is `nlin` 3x3 convolutions of `width_aux` channels, doubled at each downsampling, and then an `mlp` with
    `mlp_layers` hidden layers. `shapes` holds (C, s, s) of each block's output. Layers left over at the end form a
    smaller last module.
    """

    def __init__(
        self,
        num_classes,
        ncnn=6,
        feature_size=128,
        down=(1, 3),
        ds_type="maxpool",
        bn=True,
        mlp_layers=3,
        nlin=0,
        width_aux=256,
        block_size=1,
        side=SIDE,
    ):
        super().__init__()
        self.blocks, self.auxiliary_nets, self.shapes = nn.ModuleList(), nn.ModuleList(), []
        in_channels, channels, block = 3, feature_size, []
        for n in range(ncnn):
            downsample = ds_type if n - 1 in down else None
            if downsample:
                channels, width_aux, side = 2 * channels, 2 * width_aux, side // 2
            block += layer(in_channels, channels, downsample, bn)
            in_channels = channels
            if (n + 1) % block_size == 0 or n == ncnn - 1:
                self.blocks.append(nn.Sequential(*block))
                self.shapes.append((channels, side, side))
                block, net, width = [], [], channels
                for _ in range(nlin):
                    net += convolution(width, width_aux, bn=bn)
                    width = width_aux
                self.auxiliary_nets.append(nn.Sequential(*net, *mlp(width, num_classes, mlp_layers, bn)))

    def forward(self, x, n, upto=False):
        """Module n on its input x. With `upto`, x is images: blocks 0 to n-1 come first.

        Returns:
            (logits of auxiliary net n (B, num_classes), output of block n (B, C, s, s)).
        """
        if upto:
            for block in self.blocks[:n]:
                x = block(x)
        representation = self.blocks[n](x)
        return self.auxiliary_nets[n](representation), representation


# Flags, the same in both scripts


def list_of_layers(text):
    """An argparse type: '[1,3]' -> [1, 3], in order."""
    try:
        layers = json.loads(text)
    except ValueError:
        layers = None
    if not isinstance(layers, list) or any(type(n) is not int or n < 0 for n in layers) or len({*layers}) < len(layers):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different layers such as '[1,3]'")
    return sorted(layers)


def add_flags(parser, unit):
    """`unit`: what trains by itself, a layer or a module."""
    cifar.add_data_flags(parser)
    add = parser.add_argument
    add("--buffer-sampling", choices=SAMPLINGS, default="priority_lifo", help=PRIORITIES)
    add("--max-buffer-reuse", type=utils.at_least(1), help="how often a batch is used at most (default: no limit)")
    add("--quantize", type=groups_and_codewords, metavar="G,V", help="store indices: G groups of channels, V codewords")
    add("--nepochs", "--epochs", dest="epochs", type=utils.at_least(1), default=50, help=f"epochs of each {unit}")
    add("--lr", type=utils.at_least(0, float, above=True), default=0.1, help="learning rate")
    add("--epochdecay", type=utils.at_least(1), default=15, help=f"epochs of a {unit} after which it is divided by 5")
    add("--batch_size", "--batch-size", type=utils.at_least(2), default=128, help="images in a training batch")
    add("--test-batch-size", type=utils.at_least(1), default=256, help="images in a test batch")
    add("--ensemble", type=int, choices=[0, 1], default=1, help=f"test the ensembles of {unit}s 0 to n too")
    add("--seed", type=utils.at_least(0), help="of the weights and of all that is drawn")
    add = parser.add_argument_group("the network").add_argument
    add("--ncnn", type=utils.at_least(1), default=6, help="layers")
    add("--feature_size", type=utils.at_least(1), default=128, help="channels of the first layer")
    add("--down", type=list_of_layers, help="layers after which sides halve and channels double (default: [1,3])")
    add("--ds-type", choices=DOWNSAMPLINGS, default="maxpool", help="how: pooling, stride 2, or space to depth (psi)")
    add("--mlp", type=utils.at_least(0), default=3, help="hidden layers of an auxiliary network")
    add("--nlin", type=utils.at_least(0), default=0, help="3x3 convolutions before them")
    add("--width_aux", type=utils.at_least(1), default=256, help="their channels, doubled at each downsampling")
    cifar.add_bn_init_flag(parser)
    add("--bn", type=int, choices=[0, 1], default=1, help="BatchNorm everywhere (1), or convolutions with bias (0)")


def check_flags(parser, args):
    """Refuse what is impossible: one line, exit status 2. The default of --down depends on --ncnn."""
    if args.seed is None:  # a resumed run has the checkpoint's
        parser.error("--seed is required")
    if args.down is None:
        args.down = [n for n in (1, 3) if n < args.ncnn - 1]
    if args.down and args.down[-1] > args.ncnn - 2:
        last = f"the last one possible is {args.ncnn - 2}" if args.ncnn > 1 else "use --down '[]'"
        parser.error(f"--down {args.down}: no layer follows layer {args.down[-1]} of {args.ncnn}; {last}")
    if SIDE >> len(args.down) < 1:
        parser.error(f"--down {args.down} halves {SIDE} pixels {len(args.down)} times; at most 5 are possible")
    if args.quantize and args.feature_size % args.quantize[0]:
        parser.error(f"--quantize: {args.feature_size} channels cannot be cut into {args.quantize[0]} groups")


def make_network(args, num_classes, block_size=1):
    """The BufferNet that the flags describe."""
    network = BufferNet(
        num_classes,
        args.ncnn,
        args.feature_size,
        args.down,
        args.ds_type,
        bool(args.bn),
        args.mlp,
        args.nlin,
        args.width_aux,
        block_size,
    )
    return cifar.init_batch_norm(network, args.bn_init)


def make_buffer(args, shape, device, size=None):
    """A buffer after a layer of shape (C, s, s), of --buffer batches or of another size."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision, torch.float32)
    quantizer = args.quantize and ProductQuantizer(shape[0], *args.quantize, seed=args.seed).to(device)
    sampling = args.buffer_sampling, args.max_buffer_reuse, args.seed
    return Buffer(size or max(args.buffer, 1), args.batch_size, shape, device, dtype, quantizer, *sampling)


def check_memory(args, buffers, device, step=0):
    """End a run whose buffers, and the bytes of a step, do not fit into the free memory."""
    needed, free = sum(buffer.num_bytes() for buffer in buffers), available_memory(device)
    if needed + step > free:
        utils.fail(
            f"{len(buffers)} buffers of {max(args.buffer, 1)} batches need {needed / 1e9:.2f} GB"
            + f", a step {step / 1e9:.2f} GB" * (step > 0)
            + f", and {free / 1e9:.2f} GB are free: choose a smaller --buffer or --feature_size, or --quantize"
        )


def log_start(run, args, buffers, slowdown):
    """Log the slowdown, and how much memory the buffers take."""
    run.log(f"slowdown: {slowdown}")
    stored, plain = (sum(sizes) for sizes in zip((0, 0), *((b.num_bytes(), b.uncompressed_bytes()) for b in buffers)))
    factor = f", {plain / stored:.2f} times fewer than uncompressed float32" if buffers else ""
    run.log(f"buffers: {len(buffers)} of {max(args.buffer, 1)} batches, {stored:,} bytes{factor}")
