"""ImageNet, or any folder of its form: DIR/train/<class>/* and DIR/val/<class>/*.

Worker processes decode, crop and flip; images travel as bytes and are normalised on the device. The order of the images
and a seed for each image's crop and flip are drawn by one generator, in the main process. So the images of an epoch
depend neither on the number of workers nor on that of ranks.
"""

import dataclasses
import itertools
import signal
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import ranks
import utils

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the ImageNet training images
DEBUG_STEPS = 50


class Images(Dataset):
    """An ImageFolder's (uint8 image (3, s, s), label), or (None, what is wrong with its file); the index is a pair.

    Args:
        transform: of a PIL image, with random draws from torch's generator, which the pair's second number seeds.
    """

    def __init__(self, folder, transform):
        self.folder, self.transform = folder, transform

    def __len__(self):
        return len(self.folder)

    def __getitem__(self, index_and_seed):
        index, seed = index_and_seed
        path, label = self.folder.samples[index]
        try:
            image = self.folder.loader(path)
        except Exception as error:  # PIL's decoders raise all kinds
            return None, f"{path}: {error}"
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.transform(image), label


class Order(Sampler):
    """This rank's share of each batch, as a list of (index, seed); with a generator, each pass in a new order.

    A training batch has as many images on every rank, and two at least (BatchNorm needs them): what is over at the end
    of a pass is left out. Validation images are shared out evenly but for one. With a pipeline, the ranks in question
    are the replicas of the first module.
    """

    def __init__(self, size, batch_size, generator=None, max_batches=None, pipeline=None):
        self.size, self.batch_size, self.generator, self.max_batches = size, batch_size, generator, max_batches
        self.rank, self.ranks = (pipeline.replica, pipeline.replicas) if pipeline else (ranks.RANK, ranks.COUNT)

    def __len__(self):
        complete, rest = divmod(self.size, self.batch_size)
        batches = complete + (rest // self.ranks > 1 if self.generator else rest > self.rank)
        return min(batches, self.max_batches or batches)

    def __iter__(self):
        order, seeds = torch.arange(self.size), torch.zeros(self.size, dtype=torch.long)
        if self.generator:
            order = torch.randperm(self.size, generator=self.generator)
            seeds = torch.randint(2**62, (self.size,), generator=self.generator)
        for batch in torch.stack((order, seeds), dim=1).split(self.batch_size)[: len(self)]:
            keep = len(batch) // self.ranks * self.ranks if self.generator else len(batch)
            yield batch[:keep][self.rank :: self.ranks].tolist()


def collate(items):
    """(images (B, 3, s, s), labels (B,), the files that could not be read) of the items of a batch."""
    good, bad = [item for item in items if item[0] is not None], [what for image, what in items if image is None]
    if not good:
        return torch.empty(0, 3, 1, 1), torch.empty(0), bad
    images, labels = zip(*good)
    return torch.stack(images), torch.tensor(labels), bad


def fill_up(items):
    """`collate` for training: another image of the batch takes the place of one that cannot be read."""
    images, labels, bad = collate(items)
    index = torch.tensor([*itertools.islice(itertools.cycle(range(len(labels))), len(items))], dtype=torch.long)
    return images[index], labels[index], bad


def ignore_interrupt(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends its workers


class Batches:
    """Batches of normalised images (B, 3, s, s), in channels_last, and labels (B,) on the device: this rank's share.

    A file that cannot be read ends the program, or with --skip-corrupt is named once and counted in `skipped`.
    """

    def __init__(self, args, images, device, generator=None, pipeline=None):
        self.device, self.generator, self.skip_corrupt = device, generator, args.skip_corrupt
        self.skipped, self.named = 0, set()
        max_batches = DEBUG_STEPS if args.debug else None
        self.loader = DataLoader(
            images,
            batch_sampler=Order(len(images), args.batch_size, generator, max_batches, pipeline),
            num_workers=args.workers,
            collate_fn=fill_up if generator else collate,
            pin_memory=device.type == "cuda",
            persistent_workers=args.workers > 0,
            worker_init_fn=ignore_interrupt,
            generator=torch.Generator(),  # of seeds that nothing uses: without it, torch's own generator moves on
        )
        self.mean, self.std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (MEAN, STD))

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for images, labels, bad in self.loader:
            for what in bad:
                self.report(what)
            if len(labels):
                yield self.normalise(images), labels.to(self.device, non_blocking=True)
            elif self.generator:
                utils.fail(f"a training batch in which no image can be read{ranks.here()}")

    def normalise(self, images):
        images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        return images.float().div_(255).sub_(self.mean).div_(self.std)

    def report(self, what):
        if not self.skip_corrupt:
            utils.fail(f"cannot read the image {what}{ranks.here()} (--skip-corrupt goes on without it)")
        self.skipped += 1
        if what not in self.named:
            self.named.add(what)
            print(f"skipped, cannot be read: {what}", file=sys.stderr)


class DummyBatches:
    """The same random batch again and again, on the device: what training costs without reading images."""

    def __init__(self, args, size, num_images, num_classes, device, generator=None, pipeline=None):
        self.device, self.generator, self.skipped = device, generator, 0
        self.order = Order(num_images, args.batch_size, generator, DEBUG_STEPS if args.debug else None, pipeline)
        shape = args.batch_size // self.order.ranks, 3, size, size
        self.images = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(num_classes, shape[:1], device=device)

    def __len__(self):
        return len(self.order)

    def __iter__(self):
        for _ in range(len(self)):
            yield self.images, self.labels


class ReceivedBatches:
    """What the module before sends, (representations, labels), in evaluation with the ensemble's sum."""

    def __init__(self, pipeline, num_batches, kind):
        self.pipeline, self.num_batches, self.kind = pipeline, num_batches, kind
        self.device, self.generator, self.skipped = pipeline.device, torch.Generator(), 0

    def __len__(self):
        return self.num_batches

    def __iter__(self):
        return self.pipeline.receive(len(self), self.kind)


@dataclasses.dataclass
class Data(utils.Data):
    """utils.Data, and the classes' names on a rank that reads images."""

    classes: list | None = None


def image_size(args):
    """Pixels of an image's side."""
    return args.image_size or (224 if args.large_size_images else 112)


def load_data(args, device, pipeline=None):
    """Training and validation batches of DIR, or with --dummy of a set of ImageNet's size.

    With a pipeline, only the ranks of the first module load images, and tell the others what they need to know.
    """
    if pipeline and not pipeline.is_first:
        *lengths, num_classes, description = pipeline.broadcast(None)
        received = (ReceivedBatches(pipeline, *of_pass) for of_pass in zip(lengths, ("train", "test")))
        return Data(*received, num_classes, description)
    images = load_images(args, device, pipeline)
    if pipeline:
        pipeline.broadcast([len(images.train), len(images.test), images.num_classes, images.description])
    return images


def load_images(args, device, pipeline):
    sharers = pipeline.replicas if pipeline else ranks.COUNT
    if args.batch_size % sharers or args.batch_size < 2 * sharers:
        ranks.fail(f"--batch-size {args.batch_size} cannot be shared out to {sharers} ranks, two images each or more")
    size, generator = image_size(args), torch.Generator().manual_seed(args.seed)
    if args.dummy:
        train = DummyBatches(args, size, 1_281_167, 1000, device, generator, pipeline)
        val = DummyBatches(args, size, 50_000, 1000, device, pipeline=pipeline)
        return Data(train, val, 1000, "random numbers, 1000 classes")
    root = Path(args.data)
    try:
        val = ImageFolder(root / "val")
        train = val if args.evaluate else ImageFolder(root / "train")  # not needed, so it need not be there
    except OSError as error:
        fail_at(root, error)
    if train.classes != val.classes:
        different = sorted({*train.classes} ^ {*val.classes})[:10]
        ranks.fail(f"the classes in {root}/train and {root}/val differ: {different}")
    if len(train) < 2 * sharers and not args.evaluate:
        fail_at(root, f"{len(train)} training images; two for each of the ranks ({sharers}) are needed")
    crop = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    centre = v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size), v2.PILToTensor()])
    counts = f"{len(val)} validation images of {len(train.classes)} classes"
    if not args.evaluate:
        counts = f"{len(train)} training and {counts}"
    train_batches = Batches(args, Images(train, crop), device, generator, pipeline)
    val_batches = Batches(args, Images(val, centre), device, pipeline=pipeline)
    return Data(train_batches, val_batches, len(train.classes), f"image folder, {counts}", train.classes)


def fail_at(root, error):
    ranks.fail(f"{root} must have images in train/<class>/ and val/<class>/: {error}")
