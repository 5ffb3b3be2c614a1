"""Shared by imagenet_dgl.py and imagenet.py: flags, optimizers, meters, random numbers."""

import importlib
import math
import os
import sys

import utils

import torch
from torch import nn
from tqdm import tqdm

import ranks

# Flags

utils.HERE |= {"evaluate", "module_parallel", "profile", "workers"}
utils.MAY_DIFFER |= {*utils.HERE, "print_freq", "skip_corrupt", "start_epoch", "tensorboard"}


def make_parser(file, doc):
    """A parser with the flags of both scripts; `check_flags` checks what it has parsed."""
    parser = utils.ArgumentParser(file, doc)
    add = parser.add_argument
    count, not_negative = utils.at_least(1), utils.at_least(0, float, below=math.inf)
    positive = utils.at_least(0, float, above=True, below=math.inf)
    add("data", metavar="DIR", nargs="?", help="images in train/<class>/ and val/<class>/")
    add("-a", "--arch", default="resnet18", help="any of torchvision's; imagenet_dgl.py's vgg11 to 19 have BatchNorm")
    workers = min(4, os.cpu_count() or 1)  # torch warns of more than there are cores
    add("-j", "--workers", type=utils.at_least(0), default=workers, help="loading processes: 4, or one per core")
    add("-b", "--batch-size", type=utils.at_least(2), default=256, help="images in a batch, of all ranks together")
    add("--nepochs", "--epochs", dest="epochs", type=count, default=50, help="passes over the training set")
    add("--epochdecay", type=count, default=10, help="the learning rate is divided by 10 every so many epochs")
    add("--lr", "--learning-rate", type=positive, default=0.1, help="learning rate")
    add("--momentum", type=not_negative, default=0.9, help="of SGD")
    add("--wd", "--weight-decay", dest="weight_decay", type=not_negative, default=1e-4, help="weight decay")
    add("--half", action="store_true", help="16-bit training with loss scaling (--precision fp16); needs a GPU")
    add("--dynamic-loss-scale", action="store_true", help="with --half: a loss scale that adapts itself")
    add("--static-loss-scale", type=positive, help="with --half: a fixed loss scale (default: 1), if not dynamic")
    add("--sync-bn", action="store_true", help="BatchNorm over the images of all ranks; needs GPUs")
    add("-p", "--print-freq", type=utils.at_least(0), default=10, help="batches between lines on the screen; 0: none")
    add("--start_epoch", type=utils.at_least(0), default=0, help="epoch to begin with (from 0), in a new run")
    add("--evaluate", action="store_true", help="test the checkpoint --resume on DIR/val, and end")
    add("--debug", type=int, choices=[0, 1], default=0, help="1: only 50 batches of training and validation images")
    add("--large_size_images", type=int, choices=[0, 1], default=1, help="0: 112 pixels instead of 224")
    add("--image-size", type=utils.at_least(16), metavar="PIXELS", help="another size of the images, at least 16")
    add("--skip-corrupt", action="store_true", help="go on without images that cannot be read")
    add("--dummy", action="store_true", help="synthetic images, to measure the speed; without DIR")
    add("--tensorboard", action="store_true", help="write scalars for it, too")
    add("--flops", action="store_true", help="print parameters and FLOPs, and end; 1000 classes")
    add("--seed", type=utils.at_least(0), default=1, help="of the weights and of the data's order")
    parser.ignore("--resume_epoch", "--resume_feat", "--ncnn", "--feature_size", "--ds-type")
    return parser


def check_flags(parser, args):
    """End the program at flags that do not go together; --half becomes a --precision."""
    if not args.data and not args.dummy and not args.flops:
        parser.error("name the folder DIR with train/ and val/, or measure the speed with --dummy")
    if args.start_epoch >= args.epochs:
        parser.error(f"--start_epoch {args.start_epoch}: the epochs are 0 to {args.epochs - 1}")
    if args.evaluate and not args.resume:
        parser.error(f"there is no {utils.checkpoint_path(args)} to evaluate: name one with --resume CHECKPOINT")
    if args.name.endswith("_best"):
        parser.error(f"--name {args.name}: names of best checkpoints end like this")
    if (args.dynamic_loss_scale or args.static_loss_scale) and not (args.half or args.precision == "fp16"):
        parser.error("a loss scale is for --half or --precision fp16")
    if args.half and args.precision == "bf16":
        parser.error("--half is fp16: choose it or --precision bf16")
    if args.tensorboard:
        try:
            importlib.import_module("torch.utils.tensorboard")
        except ImportError:
            parser.error("--tensorboard needs the package tensorboard: pip install tensorboard")
    if args.half and torch.cuda.is_available() and not args.no_cuda:
        args.precision = "fp16"
    elif args.half:
        args.precision = "fp32"
        if ranks.RANK == 0:
            print(f"{parser.prog}: warning: no GPU, so --half is float32", file=sys.stderr)
    return args


def print_costs(rows):
    """The table of models.costs, one line per module."""
    if ranks.RANK:
        return
    print("| n | parameters | MFLOPs an image | auxiliary network: parameters | MFLOPs | kept for backward, MiB |")
    print("|---|---|---|---|---|---|")
    for n, row in enumerate(rows):
        block = f"{row['parameters']:,} | {row['flops'] / 1e6:.1f}"
        net = f"{row['auxiliary_parameters']:,} | {row['auxiliary_flops'] / 1e6:.1f}"
        print(f"| {n} | {block} | {net} | {row['activations'] / 2**20:.1f} |")


# Model and optimizers


def to_device(model, args, device, group=None):
    """utils.to_device; with --sync-bn, BatchNorm is computed over all ranks (of a process group)."""
    if args.sync_bn and device.type == "cpu":
        utils.fail("--sync-bn needs GPUs: leave it out, and each rank normalises over its own images")
    if args.sync_bn and ranks.size(group) > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model, group)
    return utils.to_device(model, args, device)


def make_optimizers(modules, args, device, epoch):
    """For each module a new loss scaler, and a new SGD: --lr, divided by 10 at every multiple of --epochdecay above 0.

    Epochs count from 0, in imagenet.py from 1.
    """
    lr = args.lr / 10 ** (epoch // args.epochdecay)
    optimizers = [sgd(module.parameters(), lr, args.momentum, args.weight_decay) for module in modules]
    return optimizers, [grad_scaler(args, device) for _ in modules]


def sgd(parameters, lr, momentum, weight_decay):
    """SGD with momentum, fused."""
    parameters = list(parameters)
    optimizer = torch.optim.SGD(parameters, lr, momentum, weight_decay=weight_decay, fused=True)
    # torch leaves the buffers uninitialised if fp16's loss scaling skips the first step
    for p in parameters if momentum else []:
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


class StaticGradScaler(torch.amp.GradScaler):
    """A constant loss scale; a step with a gradient that is not finite is left out."""

    def __init__(self, device, scale):
        super().__init__(device, init_scale=scale)

    def update(self, new_scale=None):
        super().update(float(self._init_scale))


def grad_scaler(args, device):
    """A module's loss scaler; does nothing unless training is in fp16."""
    if args.precision == "fp16" and (args.static_loss_scale or args.half) and not args.dynamic_loss_scale:
        return StaticGradScaler(device.type, args.static_loss_scale or 1.0)
    return torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")


# Meters


def hits(logits, labels):
    """How many labels (B,) are the first, and how many among the first five, of the logits (B, num_classes): (2,)."""
    hit = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return torch.stack((hit[:, 0].sum(), hit.sum()))


def percent(hits, count):
    """Hits in % of a count, both tensors, over all ranks, as a list."""
    count = ranks.all_reduce(count)
    if not count:
        utils.fail("no validation image can be read")
    return (100 * ranks.all_reduce(hits) / count).tolist()


class Meter:
    """Mean loss, top-1 and top-5 in % since the last `pop`, added up on the device."""

    def __init__(self, device):
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # the last: number of images

    def update(self, loss, logits, labels):
        """Add a batch: its mean loss, logits (B, num_classes), labels (B,)."""
        count = torch.full((), len(labels), device=loss.device)
        self.batch = torch.stack((loss.detach() * count, *hits(logits, labels), count))
        self.sums += self.batch

    def look(self):
        """(loss, top-1, top-5) of the last batch, and the means so far, of this rank alone."""
        return [self.means(sums) for sums in torch.stack((self.batch.double(), self.sums)).tolist()]

    def pop(self):
        """(loss, top-1, top-5) of all ranks; the meter starts again from zero."""
        means = self.means(ranks.all_reduce(self.sums).tolist())
        self.sums.zero_()
        return means

    @staticmethod
    def means(sums):
        loss, top1, top5, count = sums
        return loss / count, 100 * top1 / count, 100 * top5 / count


def progress_bar(batches, what):
    """The batches, with a bar on rank 0 if it has a terminal."""
    return tqdm(batches, what, disable=True if ranks.RANK else None, leave=False)


# Random numbers


class RandomStream:
    """In a `with` block torch's random numbers, such as dropout's, are a stream of their own; outside nothing changes.

    Each module draws from its own, so that it does not matter which other modules its process trains.
    """

    def __init__(self, seed, device):
        self.device = device
        outside = self.get()
        torch.manual_seed(seed)
        self.inside = self.get()
        self.set(outside)

    def get(self):
        return torch.get_rng_state(), torch.cuda.get_rng_state() if self.device.type == "cuda" else None

    def set(self, state):
        torch.set_rng_state(state[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state[1])

    def __enter__(self):
        self.outside = self.get()
        self.set(self.inside)

    def __exit__(self, *error):
        self.inside = self.get()
        self.set(self.outside)


def random_seed(args, epoch, place):
    """For dropout: another one for each epoch and each place, the number of a rank or of a module's replica."""
    return (args.seed * 10_000 + epoch) * 10_000 + place
