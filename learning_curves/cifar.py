"""What the CIFAR-10 scripts share beside utils.py: images on the device, optimizer, meters and published log line.

Every CIFAR-10 folder has a copy of it. Change one, and `make utils FROM=<folder>`.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import hashlib
import inspect
import os
import types
from pathlib import Path

import utils

import PIL.Image
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # of the CIFAR-10 training images
SIDE, PADDING = 32, 4  # pixels


class Batches:
    """A whole set as batches of normalised images (B, 3, 32, 32), in channels_last, and labels (B,) on the device.

    The set is kept as uint8 (N, H, W, 3), so that a batch of crops is one indexing operation. With a generator, for
    training: each pass in a new random order, each image padded by 4 zero pixels, cropped and flipped at random. The
    generator is the CPU's, so that all devices see the same batches. A last training batch of one image is left out
    (BatchNorm needs two); with drop_last, any incomplete one is.
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
            images = self.crop_and_flip(index, *crop) if crop else self.images[index]
            # torchvision's ToTensor and Normalize, operation by operation: equal to the bit
            images = images.float().div_(255).sub_(self.mean).div_(self.std)
            yield images.permute(0, 3, 1, 2), self.labels[index]

    def draw(self):
        """One pass's (index,) of each batch or, in training, (index, top, left, flip), each (B,)."""
        size = len(self.labels)
        draws = torch.arange(size)[None]
        if self.generator:
            order = torch.randperm(size, generator=self.generator)
            corner = torch.randint(2 * PADDING + 1, (2, size), generator=self.generator)
            draws = torch.stack((order, *corner, torch.randint(2, (size,), generator=self.generator)))
        return draws.to(self.device).split(self.batch_size, dim=1)

    def crop_and_flip(self, index, top, left, flip):
        """Image index[i], cropped to 32x32 at (top[i], left[i]), mirrored where flip[i]: (B, 32, 32, 3)."""
        span = torch.arange(SIDE, device=self.device)
        columns = left[:, None] + torch.where(flip[:, None] == 1, span.flip(0), span)
        return self.images[index[:, None, None], (top[:, None] + span)[:, :, None], columns[:, None, :]]


@dataclasses.dataclass
class Data:
    train: Batches
    test: Batches
    num_classes: int
    description: str


def add_data_flags(parser):
    add = parser.add_argument_group("data").add_argument
    add("--data", default="./data", help="CIFAR-10 (downloaded if missing), an image-folder tree, or: digits")
    add("--train-size", type=utils.at_least(2), help="train on so many images, as many of each class (default: all)")


def load_data(args, device, drop_last=False):
    """The sets that --data names, on the device. With drop_last, training leaves an incomplete batch out."""
    root = Path(args.data)
    if args.data == "digits":
        kind, train, test, num_classes = "digits", *read_digits()
    elif os.path.lexists(root / "train") or os.path.lexists(root / "test"):
        kind, train, test, num_classes = "image folder", *read_folder(root)
    else:
        kind, train, test, num_classes = "CIFAR-10", *read_cifar10(root)
    if args.train_size:
        train = balanced(*train, args.train_size, num_classes)
    if drop_last and len(train[1]) < args.batch_size:
        utils.fail(f"--batch-size {args.batch_size} is more than the {len(train[1])} training images")
    batches = Batches(*train, args.batch_size, device, torch.Generator().manual_seed(args.seed), drop_last)
    description = f"{kind}, {len(train[1])} training and {len(test[1])} test images of {num_classes} classes"
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
        utils.fail(
            f"no CIFAR-10 in {root}, and the download failed ({error}): put cifar-10-batches-py there, or images into "
            "train/<class>/ and test/<class>/, or use --data digits, which needs no download"
        )
    return *((torch.from_numpy(split.data), torch.tensor(split.targets)) for split in (train, test)), 10


def read_folder(root):
    try:
        train, test = ImageTree(root / "train"), ImageTree(root / "test")
    except OSError as error:
        utils.fail(f"no complete image folder in {root}: {error}")
    if train.classes != test.classes:
        utils.fail(f"the classes in {root}/train and {root}/test differ: {sorted({*train.classes} ^ {*test.classes})}")
    return *((decode(split), torch.tensor(split.targets)) for split in (train, test)), len(train.classes)


class ImageTree(ImageFolder):
    """torchvision's ImageFolder without hidden files and folders (.ipynb_checkpoints). It has at least two classes."""

    def __init__(self, root):
        super().__init__(root, loader=self.load, is_valid_file=self.is_image)

    def find_classes(self, directory):
        visible = [entry for entry in os.scandir(directory) if not entry.name.startswith(".")]
        if broken := [entry.path for entry in visible if not os.path.exists(entry.path)]:
            raise FileNotFoundError(f"{broken[0]} is a link to nowhere")
        classes = sorted(entry.name for entry in visible if entry.is_dir())
        if len(classes) < 2:
            raise FileNotFoundError(f"{directory} has {len(classes)} class folders; at least two are needed")
        return classes, {name: label for label, name in enumerate(classes)}

    def is_image(self, path):
        if any(part.startswith(".") for part in Path(path).relative_to(self.root).parts):
            return False
        if not (image := has_file_allowed_extension(path, IMG_EXTENSIONS)) and not os.path.exists(path):
            raise FileNotFoundError(f"{path} is a link to nowhere")
        return image

    @staticmethod
    def load(path):
        """The image in 8-bit RGB. PIL would turn one with 16 bits or floating-point numbers white or black."""
        with PIL.Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"its channels have more than 8 bits (PIL's mode {image.mode}): convert it first")
            return image.convert("RGB")


def decode(tree):
    """Images (N, 32, 32, 3) of an ImageTree, decoded once and kept in a file beside it."""
    key, files = [PIL.__version__, inspect.getsource(ImageTree.load)], [path for path, _ in tree.samples]
    for path in files:
        try:
            stat = os.stat(path)
        except OSError as error:  # a link to nowhere
            utils.fail(f"cannot read the image {path}: {error.strerror}")
        key.append((os.path.relpath(path, tree.root), stat.st_size, stat.st_mtime_ns))
    key, cache = hashlib.sha256(repr(key).encode()).hexdigest(), Path(f"{tree.root}.decoded.pt")
    with contextlib.suppress(Exception):  # not there, or damaged: decoded again
        cached = torch.load(cache, weights_only=True)
        if cached["key"] == key:
            return cached["images"]
    images = torch.empty(len(files), SIDE, SIDE, 3, dtype=torch.uint8)
    for i, path in enumerate(tqdm(files, f"decoding {tree.root}", disable=None, leave=False)):
        try:
            image = pil_to_tensor(tree.loader(path))
        except Exception as error:  # PIL's decoders raise all kinds
            utils.fail(f"cannot read the image {path}: {error}")
        if image.shape[1:] != (SIDE, SIDE):
            utils.fail(f"{path} has {image.shape[2]}x{image.shape[1]} pixels, not {SIDE}x{SIDE}")
        images[i] = image.permute(1, 2, 0)
    own = Path(f"{cache}.{os.getpid()}")  # other runs may be decoding the same folder
    with contextlib.suppress(OSError, RuntimeError):  # a folder that cannot be written to: decoded in every run
        utils.save({"key": key, "images": images}, own)
        own.replace(cache)
    with contextlib.suppress(OSError):
        own.unlink()  # if it could not replace the cache
    return images


def balanced(images, labels, size, num_classes):
    """The first images of each class, `size` in all. The numbers of the classes differ by at most one."""
    smallest = labels.bincount(minlength=num_classes).min().item()
    if not num_classes <= size <= num_classes * smallest:
        utils.fail(
            f"--train-size {size} cannot be balanced over {num_classes} classes: choose {num_classes} to "
            f"{num_classes * smallest}, as the smallest class has {smallest} images"
        )
    place = F.one_hot(labels).cumsum(0).gather(1, labels[:, None])[:, 0]  # each image's place within its class
    chosen = (place * num_classes + labels).argsort()[:size]
    chosen = chosen[labels[chosen].argsort(stable=True)]
    return images[chosen], labels[chosen]


def add_bn_init_flag(parser):
    help = "first weights of BatchNorm: 1, or from U(0, 1) as in the published runs"
    parser.add_argument("--bn-init", choices=["ones", "uniform"], default="ones", help=help)


def init_batch_norm(model, bn_init):
    """With "uniform", draw all BatchNorm weights from U(0, 1): torch's default before 1.0 (its pull request 12325)."""
    for module in model.modules():
        if bn_init == "uniform" and isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight)
    return model


def sgd(modules, lr, weight_decay, nesterov=False):
    """SGD with momentum 0.9 over the parameters of the modules, fused."""
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.SGD(parameters, lr, 0.9, weight_decay=weight_decay, nesterov=nesterov, fused=True)
    for p in parameters:  # torch leaves it uninitialised if fp16's loss scaling skips the first step
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def grad_scaler(args, device):
    """A loss scaler, one for each loss with its own optimizer. It does nothing unless --precision is fp16."""
    return torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")


class Meter:
    """Mean loss and top-1 in % since the last `pop`, added up on the device."""

    def __init__(self, device):
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # of losses, correct predictions, images

    @property
    def count(self):
        return int(self.sums[2])

    def update(self, loss, logits, labels):
        """Add a batch: its mean loss, logits (B, num_classes) or None (then top-1 is nan), labels (B,)."""
        correct = torch.full_like(loss, float("nan")) if logits is None else (logits.argmax(1) == labels).sum()
        self.sums[:2] += torch.stack((loss.detach() * len(labels), correct))
        self.sums[2] += len(labels)

    def pop(self):
        """(mean loss, top-1); the meter starts again from zero."""
        loss, top1, _ = (self.sums / self.sums[2]).tolist()
        self.sums.zero_()
        return loss, 100 * top1


def add_cuda_graph_flag(parser):
    help = "on a GPU, replay steps as CUDA graphs: faster, but DGL's modules then need memory at the same time"
    parser.add_argument("--cuda-graph", action=argparse.BooleanOptionalAction, default=True, help=help)


class CudaGraph:
    """Decorator for a step (images, labels, *parts): on a GPU, captured in a CUDA graph and replayed.

    A graph launches all kernels of a step at once; launched one by one, they keep these small networks' GPU waiting.
    For each size of batch and each network, WARM_UP steps run as they are written, and the next one is captured. When a
    learning rate changes, one step is eager, and the next one captured anew. With other optimizers, everything begins
    again. What a step returns is overwritten by the next replay.

    DGL's modules run side by side (`branches`), so the activations and workspaces of all are in memory at once.
    """

    DEVICE, WARM_UP = "cuda", 3

    def __init__(self, step):
        functools.update_wrapper(self, step)
        self.step, self.enabled, self.captures = step, False, {}
        self.stream, self.streams, self.branching = None, [], False  # of the capture, of its branches
        self.handed_over, self.ready = [], None

    def __call__(self, images, labels, *parts):
        if not self.enabled or images.device.type != self.DEVICE:
            return self.step(images, labels, *parts)
        flat = [part for item in parts for part in (item if isinstance(item, list) else [item])]
        groups = [group for part in flat if isinstance(part, torch.optim.Optimizer) for group in part.param_groups]
        key = images.shape, *(id(part) for part in flat if isinstance(part, int | nn.Module))
        fixed, rates = [*map(id, flat)], [group["lr"] for group in groups]
        if key not in self.captures or self.captures[key].fixed != fixed:  # keep the parts: no other one gets their ids
            self.captures[key] = types.SimpleNamespace(fixed=fixed, parts=flat, rates=None, eager=self.WARM_UP)
        capture = self.captures[key]
        if capture.rates != rates:  # a size of batch that comes once an epoch may never be worth a capture
            capture.rates, capture.graph, capture.eager = rates, None, max(1, capture.eager)
        if capture.eager:
            capture.eager -= 1
            return self.run_eagerly(images, labels, *parts)
        if not capture.graph:
            self.capture_step(capture, groups, images, labels, *parts)
        for static, new in zip(capture.inputs, (images, labels)):
            static.copy_(new)
        capture.graph.replay()
        return capture.outputs

    def run_eagerly(self, *arguments):
        """Run the step on the streams of the capture: autograd's nodes may keep the stream that they first ran on."""
        self.stream = self.stream or torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = self.run(*arguments)
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def capture_step(self, capture, groups, images, labels, *parts):
        graph, capture.inputs = torch.cuda.CUDAGraph(), (images.clone(), labels.clone())
        with_step_on_device = [group for group in groups if "capturable" in group]  # Adam's, if fused, as here
        for group in with_step_on_device:
            group["capturable"] = True
        gc.collect()
        gc.disable()  # an older graph that is destroyed during the capture would spoil it
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                capture.outputs = self.run(*capture.inputs, *parts)
        finally:
            gc.enable()
            for group in with_step_on_device:
                group["capturable"] = False
        capture.graph = graph

    def run(self, *arguments):
        self.branching = True
        try:
            return self.step(*arguments)
        finally:
            self.branching = False
            self.handed_over.clear()

    def branches(self, number):
        """The numbers of a network's modules, in order.

        In a graph, and in the steps before it, each is a branch that begins when the previous one has handed over its
        output (`hand_over`), so they run at the same time. Then a module may neither read nor change what is another's.
        """
        if not self.branching:
            yield from range(number)
            return
        main, begun = torch.cuda.current_stream(), []
        self.ready = main.record_event()
        self.streams += [torch.cuda.Stream() for _ in range(number - len(self.streams))]
        try:
            for n, stream in zip(range(number), self.streams):
                stream.wait_event(self.ready)
                begun.append(stream)
                with torch.cuda.stream(stream):
                    yield n
        finally:  # also after an error or Ctrl-C: no capture can end before its branches
            for stream in begun:
                main.wait_stream(stream)

    def hand_over(self, representation):
        """A block's output for the next module, detached: no gradient crosses between modules (update unlocking)."""
        if self.branching:
            self.ready = torch.cuda.current_stream().record_event()
            self.handed_over.append(representation)  # its memory is not free before all branches have ended
        return representation.detach()


def log_epoch(run, n, epoch, meter, test_top1):
    """Log the published line of module n, and empty its meter."""
    loss, top1 = meter.pop()
    run.check_finite(loss, n, epoch)
    run.log(f"n: {n}, epoch {epoch}, loss: {loss:.5f}, train top1:{top1:.3f} test top1:{test_top1:.2f}")
