"""What every script needs around its algorithm: flags, data, device, meters, log and checkpoint.

Every folder has its own copy of this file, so that a folder runs when it is copied away alone. The copies are identical
to the byte: change one and spread it with `make utils FROM=<folder>`.
"""

import argparse
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import time
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # of the CIFAR-10 training images
SIDE, PADDING = 32, 4  # pixels
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)

# Flags and mistakes


def fail(message):
    """End the program because of a user's mistake: one line on stderr, exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).splitlines())}", file=sys.stderr)
    raise SystemExit(2)


def at_least(minimum):
    """An argparse type: a whole number not below `minimum`."""

    def whole_number(text):
        if not text.isdecimal() or not minimum <= int(text) < 2**31:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")
        return int(text)

    return whole_number


def part_of_file_name(text):
    if Path(text).name != text:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be part of a file name; --save_folder chooses the folder")
    return text


class ArgumentParser(argparse.ArgumentParser):
    """argparse with the flags of all scripts; `file` and `doc` are the script's `__file__` and `__doc__`.

    `data=False`: without --data and --train-size, for a script that has its own way to name its data.
    """

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            hidden = action.default in (None, "") or action.default is False  # 0 is shown
            return action.help if hidden else super()._get_help_string(action)

    def __init__(self, file, doc, data=True):
        super().__init__(prog=Path(file).name, description=doc, formatter_class=self.Formatter)
        self.set_defaults(script=Path(file).stem)
        add = self.add_argument_group("flags of all scripts").add_argument
        if data:
            add("--data", default="./data", help="CIFAR-10 (downloaded if missing), an image-folder tree, or: digits")
            add("--train-size", type=at_least(2), help="train on so many images, as many of each class")
        add("--name", type=part_of_file_name, default="", help="becomes part of the names of log and checkpoint")
        add("--save_folder", help="for log and checkpoint (default: the current or the resumed checkpoint's)")
        add("--resume", metavar="CHECKPOINT", help="go on from it; auto: from the last one, if there is one")
        add("--no-cuda", action="store_true", help="use the CPU even if there is a GPU")
        add("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="of forward passes (torch.autocast)")
        add("--compile", action="store_true", help="torch.compile the network (needs a C++ compiler)")
        add("--threads", type=at_least(1), help="CPU threads (default: torch's choice)")

    def error(self, message):
        fail(f"{message} (see --help)")


def say_at_interrupt(message):
    """Let Ctrl-C end the program with this line instead of a traceback; the exit status stays that of the signal."""

    def hook(kind, error, traceback):
        if issubclass(kind, KeyboardInterrupt):
            print(f"\n{message}", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, traceback)

    sys.excepthook = hook


# Device


def setup(args):
    """Seed torch, set its number of threads, and return the device to train on."""
    say_at_interrupt("Interrupted before this run finished an epoch.")
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    if platform.libc_ver()[0] == "glibc":
        # Keep freed memory: glibc gives large tensors back at once, and new ones cost a page fault for every 4 KiB.
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
    return torch.device("cuda" if torch.cuda.is_available() and not args.no_cuda else "cpu")


def prepare(model, args, device):
    """Move the model to the device in channels_last; with --compile, compile its parts (a ModuleList's one by one)."""
    if args.compile:
        if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
            fail("--compile needs a C++ compiler, and g++ is not there: install it, or name another one in CXX")
        torch._dynamo.config.recompile_limit = 64  # of one nn.Sequential.forward, which all parts share
        for child in model.children():
            for part in child if isinstance(child, nn.ModuleList) else [child]:
                part.compile()
    return model.to(device, memory_format=torch.channels_last)


def autocast(args, device):
    """The context for a forward pass in --precision."""
    dtype = torch.float16 if args.precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=args.precision != "fp32")


def sgd(modules, lr, weight_decay, nesterov=False, momentum=0.9):
    """SGD with momentum over the parameters of the modules, fused."""
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.SGD(parameters, lr, momentum, weight_decay=weight_decay, nesterov=nesterov, fused=True)
    for p in parameters:  # torch leaves it uninitialised if fp16's loss scaling skips the first step
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def grad_scaler(args, device):
    """Loss scaling, one for each loss with an optimizer of its own; does nothing unless --precision is fp16."""
    return torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")


# Data: whole sets on the device as uint8 (N, H, W, 3), so that a batch of crops is one indexing operation


def crop_and_flip(images, index, top, left, flip):
    """Image index[i] of (N, H, W, 3), cropped to 32x32 at (top[i], left[i]), mirrored where flip[i]: (B, 32, 32, 3)."""
    span = torch.arange(SIDE, device=images.device)
    rows = top[:, None] + span
    columns = left[:, None] + torch.where(flip[:, None] == 1, span.flip(0), span)
    return images[index[:, None, None], rows[:, :, None], columns[:, None, :]]


class Batches:
    """A whole set as batches of normalised images (B, 3, 32, 32), in channels_last, and labels (B,) on the device.

    With a generator, for training: in a new random order in each pass, each image padded by 4 zero pixels, cropped
    and flipped at random. The generator is the CPU's, so that all devices see the same batches. A last training
    batch of one image is left out (BatchNorm needs two); with drop_last, any incomplete one is.
    """

    def __init__(self, images, labels, batch_size, device, generator=None, drop_last=False):
        self.batch_size, self.device, self.generator, self.drop_last = batch_size, device, generator, drop_last
        self.images, self.labels = images.to(device), labels.to(device)
        if generator:
            self.images = F.pad(self.images, (0, 0, PADDING, PADDING, PADDING, PADDING))
        self.mean, self.std = torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)

    def __len__(self):
        complete, rest = divmod(len(self.labels), self.batch_size)
        return complete + (0 if self.drop_last else rest > 1 if self.generator else rest > 0)

    def __iter__(self):
        for index, *crop in self.draw()[: len(self)]:
            images = crop_and_flip(self.images, index, *crop) if crop else self.images[index]
            # torchvision's ToTensor and Normalize, operation by operation: equal to the bit
            images = images.float().div_(255).sub_(self.mean).div_(self.std)
            yield images.permute(0, 3, 1, 2), self.labels[index]

    def draw(self):
        """One pass's (index,) of each batch or, in training, (index, top, left, flip), each (B,)."""
        size = len(self.labels)
        if self.generator:
            order = torch.randperm(size, generator=self.generator)
            corner = torch.randint(2 * PADDING + 1, (2, size), generator=self.generator)
            flip = torch.randint(2, (size,), generator=self.generator)
            draws = torch.stack((order, *corner, flip))
        else:
            draws = torch.arange(size)[None]
        return draws.to(self.device).split(self.batch_size, dim=1)


@dataclasses.dataclass
class Data:
    train: Batches
    test: Batches
    num_classes: int
    description: str


def load_data(args, device, drop_last=False):
    """What --data names, on the device; the training set reduced to --train-size; drop_last: of training batches."""
    root = Path(args.data)
    if args.data == "digits":
        name, (train, test, num_classes) = "digits", read_digits()
    elif (root / "train").is_dir() or (root / "test").is_dir():
        name, (train, test, num_classes) = "image folder", read_folder(root)
    else:
        name, (train, test, num_classes) = "CIFAR-10", read_cifar10(root)
    if args.train_size:
        train = balanced(*train, args.train_size, num_classes)
    if len(train[1]) < 2:
        fail(f"{root} has one training image; at least two are needed")
    if drop_last and len(train[1]) < args.batch_size:
        fail(f"--batch-size {args.batch_size} is more than the {len(train[1])} training images")
    batches = Batches(*train, args.batch_size, device, torch.Generator().manual_seed(args.seed), drop_last)
    description = f"{name}, {len(train[1])} training and {len(test[1])} test images of {num_classes} classes"
    return Data(batches, Batches(*test, args.test_batch_size, device), num_classes, description)


def read_digits():
    """scikit-learn's 1,797 handwritten digits, enlarged from 8x8 pixels; the first 1,500 are for training."""
    from sklearn.datasets import load_digits  # here, because it is slow

    digits = load_digits()
    grey = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    images = F.interpolate(grey, size=SIDE, mode="bilinear").round().byte().permute(0, 2, 3, 1).repeat(1, 1, 1, 3)
    labels = torch.from_numpy(digits.target).long()
    return (images[:1500], labels[:1500]), (images[1500:], labels[1500:]), 10


def read_cifar10(root):
    try:
        train, test = (CIFAR10(root, train=train, download=True) for train in (True, False))
    except Exception as error:  # no network, no space, a damaged archive, ...: each has its own
        fail(
            f"no CIFAR-10 in {root}, and the download failed ({error}): put cifar-10-batches-py there, or images into "
            "train/<class>/ and test/<class>/, or use --data digits, which needs no download"
        )
    sets = ((torch.from_numpy(split.data), torch.tensor(split.targets)) for split in (train, test))
    return *sets, len(train.classes)


def read_folder(root):
    try:
        train, test = ImageFolder(root / "train"), ImageFolder(root / "test")
    except OSError as error:
        fail(f"no complete image folder in {root}: {error}")
    if train.classes != test.classes:
        fail(f"the classes in {root}/train and {root}/test differ: {sorted({*train.classes} ^ {*test.classes})}")
    return decode(train), decode(test), len(train.classes)


def decode(folder):
    """Images (N, 32, 32, 3) and labels (N,) of an ImageFolder, decoded once and kept in a file beside it."""
    stats = [(path, label, os.stat(path)) for path, label in folder.samples]
    files = [(os.path.relpath(path, folder.root), label, stat.st_size, stat.st_mtime_ns) for path, label, stat in stats]
    key = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    cache = Path(f"{folder.root}.decoded.pt")
    try:
        cached = read(cache)
        if cached["key"] == key:
            return cached["images"], cached["labels"]
    except Exception:  # not there, or damaged: made anew
        pass
    images = torch.empty(len(files), SIDE, SIDE, 3, dtype=torch.uint8)
    for i, (path, _) in enumerate(tqdm(folder.samples, f"decoding {folder.root}", disable=None, leave=False)):
        try:
            image = pil_to_tensor(folder.loader(path))
        except Exception as error:  # PIL's decoders raise all kinds
            fail(f"cannot read the image {path}: {error}")
        if image.shape[1:] != (SIDE, SIDE):
            fail(f"{path} has {image.shape[2]}x{image.shape[1]} pixels, not {SIDE}x{SIDE}")
        images[i] = image.permute(1, 2, 0)
    labels = torch.tensor(folder.targets)
    try:
        write(cache, {"key": key, "images": images, "labels": labels})
    except (OSError, RuntimeError):  # a folder that cannot be written to: decoded in every run
        pass
    return images, labels


def balanced(images, labels, size, num_classes):
    """The first images of each class, `size` in all; the classes' numbers differ by at most one."""
    classes = [(labels == c).nonzero()[:, 0] for c in range(num_classes)]
    if size < num_classes:
        fail(f"--train-size {size} is less than one image for each of the {num_classes} classes")
    counts = [size // num_classes + (c < size % num_classes) for c in range(num_classes)]
    if any(len(index) < count for index, count in zip(classes, counts)):
        fail(f"--train-size {size}: the smallest of the {num_classes} classes has only {min(map(len, classes))} images")
    index = torch.cat([index[:count] for index, count in zip(classes, counts)])
    return images[index], labels[index]


# Meters, log and checkpoint


class Meter:
    """Mean loss and top-1 in % since the last `read`, added up on the device."""

    def __init__(self, device):
        self.sums, self.count = torch.zeros(2, dtype=torch.float64, device=device), 0

    def update(self, loss, logits, labels):
        """Add a batch: its mean loss, logits (B, num_classes), labels (B,)."""
        self.sums += torch.stack((loss.detach() * len(labels), (logits.argmax(1) == labels).sum()))
        self.count += len(labels)

    def read(self):
        """(mean loss, top-1), and start anew."""
        loss, top1 = (self.sums / self.count).tolist()
        self.sums.zero_()
        self.count = 0
        return loss, 100 * top1


def write(path, state):
    """torch.save that, interrupted at any moment, leaves the old file or the whole new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def read(path):
    """What `write` wrote, on the CPU; an exception of some kind if it is damaged."""
    with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} in {path} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def state_of(part):
    return [state_of(p) for p in part] if isinstance(part, list) else part.state_dict()


def load_state(part, state):
    if isinstance(part, list):
        for p, s in zip(part, state, strict=True):
            load_state(p, s)
    else:
        part.load_state_dict(state)


# Flags that may differ between a checkpoint and the run that resumes it.
MAY_DIFFER = {
    "compile",
    "data",
    "epochs",
    "log_interval",
    "no_cuda",
    "resume",
    "save_folder",
    "test_batch_size",
    "threads",
}


class Run:
    """Log and checkpoint of a training run, or, with --resume, of its continuation.

    The log is `<save_folder>/<time>_<script>[_<name>].log`. The checkpoint, `<save_folder>/<script>[_<name>].pt`, is
    written after every epoch and holds all state and the log up to then: on a CPU with the same number of threads, a
    run that was stopped at any moment and resumed ends with the log and the weights of one that was not.

    Args:
        args, data: the flags, and what `load_data` returned.
        fixed: flags that this script's checkpoints depend on, although other scripts' do not.
        parts: all that training changes, by name (the network as `model`): objects with a state_dict, or lists of them.
    """

    may_differ = MAY_DIFFER
    fail = staticmethod(fail)

    def __init__(self, args, data, fixed=(), **parts):
        self.args, self.data, self.parts, self.epoch, self.text = args, data, parts, 0, ""
        self.last_checkpoint = None
        self.may_differ = self.may_differ.difference(fixed)
        auto = args.resume == "auto"
        folder = Path(args.save_folder or ("." if auto or not args.resume else Path(args.resume).parent))
        stem = "_".join(filter(None, (args.script, args.name)))
        self.checkpoint = folder / f"{stem}.pt"
        log = folder / f"{time.strftime('%Y%m%d-%H%M%S')}_{stem}.log"
        if args.resume and not (auto and not self.checkpoint.exists()):
            log = folder / self.load(self.checkpoint if auto else Path(args.resume))
            begin, old = self.text.encode(), log.read_bytes() if log.exists() else b""
            if not old.startswith(begin) and not begin.startswith(old):
                self.fail(f"{log} is not the log of the checkpoint any more: move it away, then resume")
        self.file = self.open_log(log)
        self.file.write(self.text)
        self.file.flush()
        if not self.epoch:
            self.begin()

    def begin(self):
        """Describe a new run in the log."""
        device, model = self.data.train.device, self.parts["model"]
        chip = torch.cuda.get_device_name() if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
        versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
        system = f"Python {platform.python_version()}, {versions}, {platform.system()} {platform.machine()}"
        self.log(f"arguments: {json.dumps(vars(self.args))}")
        self.log(f"environment: {system}, {device.type} ({chip}), {torch.get_num_threads()} threads")
        self.log(f"data: {self.data.description}")
        self.log(f"model, {sum(p.numel() for p in model.parameters()):,} parameters: {model}")

    def open_log(self, log):
        """The log as a file to write: a new one or, if a checkpoint was loaded, the old one, emptied."""
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            file = log.open("w" if self.epoch else "x")
        except OSError as error:
            self.fail(f"cannot write the log to --save_folder: {error}")
        replaces = " (instead of an earlier run's)" if not self.epoch and self.checkpoint.exists() else ""
        self.show(f"log: {log}\ncheckpoint: {self.checkpoint}{replaces}")
        return file

    def log(self, line):
        """Write a line to the log, at once, and to standard output."""
        self.text += f"{line}\n"
        self.file.write(f"{line}\n")
        self.file.flush()
        self.show(line)

    def show(self, line):
        """Write a line to standard output."""
        try:
            print(line, flush=True)
        except BrokenPipeError:  # whoever read the output has gone; the log goes on
            sys.stdout = None

    def read(self, meter, n, epoch):
        """What module n's meter reads, (mean loss, top-1), and it is emptied; the loss must be finite."""
        loss, *top = meter.read()
        self.check(loss, n, epoch)
        return loss, *top

    def check(self, loss, n, epoch):
        """A loss of module n that is not finite ends the program."""
        if not math.isfinite(loss):
            last = self.last_checkpoint or "none yet"
            raise SystemExit(f"Epoch {epoch}, module {n}: the loss is {loss}; the last checkpoint: {last}")

    def log_epoch(self, n, epoch, meter, test_top1):
        """Log the published line of module n, and empty its meter."""
        loss, top1 = self.read(meter, n, epoch)
        self.log(f"n: {n}, epoch {epoch}, loss: {loss:.5f}, train top1:{top1:.3f} test top1:{test_top1:.2f}")

    def epochs(self, last):
        """The epochs still to do, counted from 1; after each, the checkpoint is written."""
        if self.epoch >= last:
            print(f"{self.last_checkpoint} is at the end of the last epoch: nothing to do")
        for epoch in range(self.epoch + 1, last + 1):
            yield epoch
            self.epoch = epoch
            state = {
                "arguments": vars(self.args),
                "data": self.data.description,
                "epoch": epoch,
                "log": self.text,
                "log_name": Path(self.file.name).name,
                "rng": torch.get_rng_state(),
                "generator": self.data.train.generator.get_state(),
                "parts": {name: state_of(part) for name, part in self.parts.items()},
            }
            self.save(state)
            self.last_checkpoint = self.checkpoint
            say_at_interrupt(f"Interrupted; go on from the last finished epoch with --resume {self.checkpoint}")

    def save(self, state):
        write(self.checkpoint, state)

    def same_data(self, state):
        """Whether the data that a checkpoint was trained on are this run's."""
        return state["data"] == self.data.description

    def load(self, path):
        """Set everything to a checkpoint's state and return its log's name; one of another run ends the program."""
        try:
            state = dict(read(path))
            was, now = dict(state["arguments"]), vars(self.args)
            script, description, parts, generator = was["script"], state["data"], state["parts"], state["generator"]
            rng, self.epoch, self.text, log_name = state["rng"], state["epoch"], state["log"], state["log_name"]
        except FileNotFoundError:
            self.fail(f"there is no checkpoint {path}")
        except Exception as error:
            self.fail(f"{path} is damaged, or not a checkpoint of these scripts ({type(error).__name__})")
        if script != now["script"]:
            self.fail(f"{path} is a checkpoint of {script}.py")
        for flag in sorted((was.keys() | now.keys()) - self.may_differ):
            if was.get(flag) != now.get(flag):
                name = f"--{flag.replace('_', '-')}"
                self.fail(f"{path} was made with {name} {was.get(flag)!r}; in this run it is {now.get(flag)!r}")
        if not self.same_data(state):
            self.fail(f"{path} was trained on {description}; this run's data: {self.data.description}")
        try:
            for name, part in self.parts.items():
                load_state(part, parts[name])
            self.data.train.generator.set_state(generator)
            torch.set_rng_state(rng)
        except Exception as error:  # torch's checks raise all kinds
            self.fail(f"{path} is a checkpoint of another network: {' '.join(str(error).split())[:300]}")
        self.last_checkpoint = path
        say_at_interrupt(f"Interrupted; go on from the last finished epoch with --resume {path}")
        return log_name
