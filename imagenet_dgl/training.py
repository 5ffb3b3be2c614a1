"""What imagenet_dgl.py and imagenet.py share beside data and ranks: flags, optimizers, meters, log and checkpoints."""

import argparse
import contextlib
import importlib
import math
import os
import sys
import time

import torch
from tqdm import tqdm

import ranks
import utils
from data import image_size

# Flags


def number(text):
    """An argparse type: a finite number, not negative."""
    try:
        if 0 <= float(text) < math.inf:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")


def positive(text):
    if number(text) == 0:
        raise argparse.ArgumentTypeError("0 is not a positive number")
    return float(text)


def make_parser(file, doc):
    """A parser with the flags of both scripts; `check` what it has parsed."""
    parser = utils.ArgumentParser(file, doc, data=False)
    parser.error = lambda message: ranks.fail(f"{message} (see --help)")
    add = parser.add_argument
    add("data", metavar="DIR", nargs="?", help="images in train/<class>/ and val/<class>/")
    add("-a", "--arch", default="resnet18", help="network: vgg11, vgg13, vgg16, vgg19, or any of torchvision's")
    workers = min(4, os.cpu_count() or 1)  # torch warns of more than there are cores
    add("-j", "--workers", type=utils.at_least(0), default=workers, help="processes that load images: 4, or one a core")
    add("-b", "--batch-size", type=utils.at_least(2), default=256, help="images in a batch, of all ranks together")
    add("--nepochs", "--epochs", dest="epochs", type=utils.at_least(1), default=50, help="passes over the training set")
    add(
        "--epochdecay", type=utils.at_least(1), default=10, help="epochs after which the learning rate is divided by 10"
    )
    add("--lr", "--learning-rate", type=positive, default=0.1, help="learning rate")
    add("--momentum", type=number, default=0.9, help="of SGD")
    add("--wd", "--weight-decay", dest="weight_decay", type=number, default=1e-4, help="weight decay")
    add("--half", action="store_true", help="16-bit training with loss scaling (--precision fp16); needs a GPU")
    add("--dynamic-loss-scale", action="store_true", help="with --half: a loss scale that adapts itself")
    add("--static-loss-scale", type=positive, help="with --half: a fixed loss scale (default: 1), if not dynamic")
    add("--apex", action="store_true", help="the FusedSGD of NVIDIA's apex instead of torch's")
    add("--sync-bn", action="store_true", help="BatchNorm over the images of all ranks")
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
    return parser


def check(parser, args):
    """End the program at flags that do not go together; --half becomes a --precision."""
    if not args.data and not args.dummy and not args.flops:
        parser.error("name the folder DIR with train/ and val/, or measure the speed with --dummy")
    if args.start_epoch >= args.epochs:
        parser.error(f"--start_epoch {args.start_epoch}: the epochs are 0 to {args.epochs - 1}")
    if args.evaluate and not args.resume:
        parser.error("--evaluate needs --resume CHECKPOINT")
    if f"_{args.name}".endswith("_best"):
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
    """The table of models.costs, a line a module."""
    if ranks.RANK:
        return
    print("| n | parameters | MFLOPs an image | auxiliary network: parameters | MFLOPs | kept for backward, MiB |")
    print("|---|---|---|---|---|---|")
    for n, row in enumerate(rows):
        block = f"{row['parameters']:,} | {row['flops'] / 1e6:.1f}"
        net = f"{row['auxiliary_parameters']:,} | {row['auxiliary_flops'] / 1e6:.1f}"
        print(f"| {n} | {block} | {net} | {row['activations'] / 2**20:.1f} |")


# Model and optimizers


def prepare(model, args, device, group=None):
    """utils.prepare; with --sync-bn, BatchNorm over all ranks (of a process group)."""
    return utils.prepare(ranks.sync_batch_norm(model, device, group) if args.sync_bn else model, args, device)


def learning_rate(args, epoch):
    """Divided by 10 after every --epochdecay epochs; epochs count from 0."""
    return args.lr / 10 ** (epoch // args.epochdecay)


def sgd(module, args, device, epoch):
    """SGD for a module with the learning rate of the epoch."""
    options = {"lr": learning_rate(args, epoch), "momentum": args.momentum, "weight_decay": args.weight_decay}
    if not args.apex:
        return utils.sgd([module], **options)
    try:
        from apex.optimizers import FusedSGD
    except ImportError:
        ranks.fail(
            "--apex: NVIDIA's apex is not installed (build it from https://github.com/NVIDIA/apex; the package called "
            "apex on the package index is something else); without --apex, torch's own fused SGD is used"
        )
    if device.type != "cuda":
        ranks.fail("--apex needs a GPU")
    try:
        return FusedSGD(module.parameters(), **options)
    except RuntimeError as error:  # built without its CUDA extensions
        ranks.fail(f"--apex: {error}")


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
    return utils.grad_scaler(args, device)


# Meters


def hits(logits, labels):
    """How many labels (B,) are the first, and how many among the first five, of the logits (B, num_classes): (2,)."""
    hit = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return torch.stack((hit[:, 0].sum(), hit.sum()))


def percent(hits, count):
    """Hits in % of a count, both as tensors, over all ranks, as a list."""
    count = ranks.add_up(count)
    if not count:
        ranks.fail("no validation image can be read")
    return (100 * ranks.add_up(hits) / count).tolist()


class Meter:
    """Mean loss, top-1 and top-5 in % since the last `read`, added up on the device."""

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

    def read(self):
        """(loss, top-1, top-5) of all ranks, and start anew."""
        means = self.means(ranks.add_up(self.sums).tolist())
        self.sums.zero_()
        return means

    @staticmethod
    def means(sums):
        loss, top1, top5, count = sums
        return loss / count, 100 * top1 / count, 100 * top5 / count


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


# Log and checkpoints


def progress_bar(batches, what):
    """The batches, with a bar on rank 0 if it has a terminal."""
    return tqdm(batches, what, disable=True if ranks.RANK else None, leave=False)


class Best:
    """The best test top-1 of the whole network so far."""

    top1, is_last = -1.0, False

    def update(self, top1):
        self.is_last = top1 > self.top1
        self.top1 = max(top1, self.top1)

    def state_dict(self):
        return {"top1": self.top1}

    def load_state_dict(self, state):
        self.top1 = state["top1"]


class Run(utils.Run):
    """utils.Run with epochs from 0, the best checkpoint kept as `<checkpoint>_best.pt`, and rank 0 alone writing."""

    fail = staticmethod(ranks.fail)
    may_differ = utils.MAY_DIFFER | {
        *["module_parallel", "print_freq", "profile", "skip_corrupt", "start_epoch", "tensorboard", "workers"],
    }
    network = ("arch", "balance", "block_size", "mlp", "nlin", "num_modules", "script")

    def __init__(self, args, data, pipeline=None, **parts):
        self.best, self.writer, self.pipeline = Best(), None, pipeline
        if args.evaluate:  # the network alone matters, not how and on what it was trained
            self.may_differ = {*vars(args), *self.may_differ}.difference(self.network)
            super().__init__(args, data, model=parts["model"])
        else:
            super().__init__(args, data, best=self.best, **parts)
        if args.tensorboard and not args.evaluate and not ranks.RANK:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(self.checkpoint.with_suffix(".tensorboard"), purge_step=self.epoch)

    def begin(self):
        if self.args.evaluate:
            self.fail(f"there is no checkpoint {self.checkpoint} to evaluate")
        super().begin()
        self.log(f"ranks: {ranks.COUNT}")
        self.epoch = self.args.start_epoch

    def same_data(self, state):
        """The same classes and images; to be evaluated, other images, if their size does not make another network."""
        was, now = state.get("classes"), self.data.classes  # None: not read, or a checkpoint of an earlier version
        if was and now and was != now:
            missing, unknown = sorted({*was}.difference(now))[:5], sorted({*now}.difference(was))[:5]
            self.fail(
                f"the checkpoint was trained on {len(was)} classes, {self.args.data} has {len(now)}; "
                f"missing there: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
            )
        if self.args.evaluate:
            was, now = (image_size(argparse.Namespace(**flags)) for flags in (state["arguments"], vars(self.args)))
            if was != now:
                networks = state["parts"]["model"], self.parts["model"].state_dict()
                shapes = [{name: tensor.shape for name, tensor in (network or {}).items()} for network in networks]
                if shapes[1] and shapes[0] != shapes[1]:  # in a pipeline rank 0 alone has all shapes
                    differs = f"the checkpoint's network is not the same as for {now}"
                    self.fail(f"for images of {was} pixels {differs}: evaluate it with --image-size {was}")
            # The last words: as many classes
            return state["data"].split()[-2:] == self.data.description.split()[-2:]
        return super().same_data(state)

    def open_log(self, log):
        return open(os.devnull, "w") if ranks.RANK or self.args.evaluate else super().open_log(log)

    def save(self, state):
        state["classes"] = self.data.classes
        if ranks.RANK == 0:
            if self.best.is_last:
                utils.write(self.checkpoint.with_stem(f"{self.checkpoint.stem}_best"), state)
            super().save(state)

    def epochs(self, last):
        """The epochs still to do, counted from 0."""
        for epoch in super().epochs(last):
            torch.manual_seed(random_seed(self.args, epoch - 1, ranks.RANK))  # anew: --resume need not restore it
            yield epoch - 1

    def show(self, line):
        if ranks.RANK and sys.stdout and sys.stdout.isatty():
            line = f"\r\033[K{line}"  # over rank 0's progress bar
        super().show(line)

    def read(self, meter, n, epoch):
        try:
            return super().read(meter, n, epoch)
        except SystemExit:  # on all ranks
            if ranks.RANK:
                raise SystemExit(1) from None
            raise

    def check(self, loss, n, epoch):
        if self.args.dummy:  # at any learning rate: it is the speed that is measured
            return
        if self.pipeline:
            first, replicas = n * self.pipeline.replicas, self.pipeline.replicas
            n = f"{n} on rank {first}" if replicas == 1 else f"{n} on ranks {first} to {first + replicas - 1}"
        super().check(loss, n, epoch)

    def watch(self, batches, meters, epoch):
        """The training batches, with a bar on a terminal and every --print-freq batches a line a module.

        In a pipeline, each rank has its own module's meter to show.
        """
        shown, sharers, screen = dict(enumerate(meters)), ranks.COUNT, sys.stdout
        if pipeline := self.pipeline:
            shown, sharers = {pipeline.n: meters[pipeline.n]}, pipeline.replicas
            screen = screen if pipeline.replica else sys.__stdout__
            pipeline.waited = dict.fromkeys(pipeline.waited, 0.0)
        times, sizes, begin = {"Time": [], "Data": []}, [], time.perf_counter()
        for i, batch in enumerate(progress_bar(batches, "training")):
            times["Data"].append(time.perf_counter() - begin)
            yield batch
            due = self.args.print_freq and i % self.args.print_freq == 0
            results = {n: meter.look() for n, meter in shown.items()} if due else {}  # waits for the device
            times["Time"].append(time.perf_counter() - begin)
            begin += times["Time"][-1]
            sizes.append(len(batch[1]) * sharers)
            place = f"Epoch: [{epoch}][{i:{len(str(len(batches)))}}/{len(batches)}]"
            for n, ((loss, top1, top5), (mean, mean1, mean5)) in results.items():
                self.check(loss, n, epoch)
                which = [f"n: {n}"] if len(meters) > 1 else []
                spent = [f"{name} {t[-1]:6.3f} ({sum(t) / len(t):6.3f})" for name, t in times.items()]
                tops = f"Acc@1 {top1:6.2f} ({mean1:6.2f})", f"Acc@5 {top5:6.2f} ({mean5:6.2f})"
                with tqdm.external_write_mode(), contextlib.redirect_stdout(screen):
                    self.show("\t".join([place, *which, *spent, f"Loss {loss:.4e} ({mean:.4e})", *tops]))
        which = f"n: {pipeline.n}, " if pipeline else ""
        with contextlib.redirect_stdout(screen):
            self.show(which + self.speed(times["Time"], sizes, batches.device))

    def speed(self, times, sizes, device):
        """Images a second of all ranks that share a batch, but for the first batches, and peak memory, as text."""
        first = min(len(times) // 2, 10)  # they find the fastest kernels, start workers, ...
        begin = time.perf_counter()
        memory = ""
        if device.type == "cuda":
            torch.cuda.synchronize()
            memory = f", peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB a rank"
        seconds = sum(times[first:]) + time.perf_counter() - begin
        return f"{sum(sizes[first:]) / seconds:.1f} training images/s{memory}"

    def show_profile(self, seconds):
        """On the screen: what each rank of the pipeline has spent the `seconds` of a training pass on."""
        spent = torch.zeros(ranks.COUNT, 3, dtype=torch.float64, device=self.pipeline.device)
        spent[ranks.RANK] = torch.tensor([seconds, *self.pipeline.waited.values()])
        for rank, (total, for_input, for_send) in enumerate(ranks.add_up(spent).tolist()):
            waits = f"waiting for input {for_input:.2f} s, for sends {for_send:.2f} s"
            self.show(f"rank {rank}: {total:.2f} s, computing {total - for_input - for_send:.2f} s, {waits}")

    def end_epoch(self, epoch, top1):
        """Log how many images could not be read; keep the checkpoint if top1, the network's, is the best."""
        self.best.update(top1)
        self.log_skipped(f"epoch {epoch}, ")

    def log_skipped(self, when=""):
        """Log how many images could not be read, of all ranks."""
        for kind, batches in (("training", self.data.train), ("validation", self.data.test)):
            skipped = int(ranks.add_up(torch.tensor(batches.skipped, device=batches.device)))
            batches.skipped = 0
            if skipped:
                self.log(f"{when}skipped: {skipped} {kind} images that cannot be read")

    def scalars(self, epoch, n, **values):
        """What --tensorboard shows of module n."""
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(f"{name}/{n}", value, epoch)
            self.writer.flush()
