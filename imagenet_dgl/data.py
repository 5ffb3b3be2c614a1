"""ImageNet, or any folder of its form: DIR/train/<class>/* and DIR/val/<class>/*.

Worker processes decode, crop and flip. Images travel as bytes and are normalised on the device. One generator in the
main process draws the order of the images and a seed for the crop and flip of each, so the images of an epoch depend
neither on the number of workers nor on the number of ranks.
"""

import dataclasses
import functools
import itertools
import os
import shutil
import signal
import sys
from pathlib import Path

import utils

import PIL.Image
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension
from torchvision.transforms import v2

import ranks

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the ImageNet training images
DEBUG_STEPS = 50
PREFETCH = 2  # batches that each worker prepares in advance: DataLoader's default


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


class Images(Dataset):
    """An ImageTree's (uint8 image (3, s, s), label), or (None, what is wrong with its file); the index is a pair.

    Args:
        transform: of a PIL image, with random draws from torch's generator, which the pair's second number seeds.
    """

    def __init__(self, tree, transform):
        self.tree, self.transform = tree, transform

    def __len__(self):
        return len(self.tree)

    def __getitem__(self, index_and_seed):
        index, seed = index_and_seed
        path, label = self.tree.samples[index]
        try:
            image = self.tree.loader(path)
        except Exception as error:  # PIL's decoders raise all kinds
            nowhere = os.path.islink(path) and not os.path.exists(path)
            return None, f"{path}: {'a link to nowhere' if nowhere else error}"
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.transform(image), label


class Order(Sampler):
    """This rank's share of each batch, as a list of (index, seed); with a generator, each pass in a new order.

    Every rank gets the same number of images of a training batch, at least two (BatchNorm needs them). What remains at
    the end of a pass is left out. Of a validation batch no image is left out. In a pipeline, the replicas of the first
    module share the batch.
    """

    def __init__(self, size, batch_size, generator=None, max_batches=None, pipeline=None):
        self.size, self.batch_size, self.generator, self.max_batches = size, batch_size, generator, max_batches
        self.share, self.shares = ranks.share(pipeline)

    def __len__(self):
        complete, rest = divmod(self.size, self.batch_size)
        batches = complete + (rest // self.shares > 1 if self.generator else rest > self.share)
        return min(batches, self.max_batches or batches)

    def __iter__(self):
        order, seeds = torch.arange(self.size), torch.zeros(self.size, dtype=torch.long)
        if self.generator:
            order = torch.randperm(self.size, generator=self.generator)
            seeds = torch.randint(2**62, (self.size,), generator=self.generator)
        for batch in torch.stack((order, seeds), dim=1).split(self.batch_size)[: len(self)]:
            keep = len(batch) // self.shares * self.shares if self.generator else len(batch)
            yield batch[:keep][self.share :: self.shares].tolist()


def collate(items, fill=False):
    """(images (B, 3, s, s), labels (B,), the files that could not be read) of the items of a batch.

    With `fill`, for training, other images of the batch take the places of those that could not be read.
    """
    good, bad = [item for item in items if item[0] is not None], [what for image, what in items if image is None]
    if not good:
        return torch.empty(0, 3, 1, 1), torch.empty(0), bad
    images, labels = zip(*itertools.islice(itertools.cycle(good), len(items) if fill else len(good)))
    batch, labels = torch.empty(len(images), *images[0].shape, dtype=images[0].dtype), torch.tensor(labels)
    if get_worker_info():  # otherwise the queue's thread does it, and if it fails the main process waits for ever
        batch.share_memory_()
        labels.share_memory_()
    return torch.stack(images, out=batch), labels, bad


def set_signals(_):
    """In a worker: Ctrl-C is for the main process, which ends its workers."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Batches:
    """Batches of normalised images (B, 3, s, s), in channels_last, and labels (B,) on the device: this rank's share.

    A file that cannot be read ends the program. With --skip-corrupt, it is named once and counted in `skipped`.
    """

    def __init__(self, args, images, device, generator=None, pipeline=None):
        self.device, self.generator, self.skip_corrupt = device, generator, args.skip_corrupt
        self.skipped, self.named = 0, set()
        max_batches = DEBUG_STEPS if args.debug else None
        self.loader = DataLoader(
            images,
            batch_sampler=Order(len(images), args.batch_size, generator, max_batches, pipeline),
            num_workers=args.workers,
            collate_fn=functools.partial(collate, fill=generator is not None),
            pin_memory=device.type == "cuda",
            persistent_workers=args.workers > 0,
            worker_init_fn=set_signals,
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
        shape = args.batch_size // self.order.shares, 3, size, size
        self.images = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(num_classes, shape[:1], device=device)

    def __len__(self):
        return len(self.order)

    def __iter__(self):
        for _ in range(len(self)):
            yield self.images, self.labels


class ReceivedBatches:
    """What the previous module sends: (representations, labels), in evaluation with the ensemble's sum."""

    def __init__(self, pipeline, num_batches, kind):
        self.pipeline, self.num_batches, self.kind = pipeline, num_batches, kind
        self.device, self.generator, self.skipped = pipeline.device, torch.Generator(), 0

    def __len__(self):
        return self.num_batches

    def __iter__(self):
        return self.pipeline.receive(len(self), self.kind)


@dataclasses.dataclass
class Data:
    """Both sets; `classes` are the classes' names, on a rank that reads images."""

    train: Batches
    test: Batches
    num_classes: int
    description: str
    classes: list | None = None


def image_size(args):
    """Pixels of an image's side."""
    return args.image_size or (224 if args.large_size_images else 112)


def load_data(args, device, pipeline=None):
    """Training and validation batches of DIR, or with --dummy of a set of ImageNet's size.

    In a pipeline, only the ranks of the first module load images, and tell the others what they need to know.
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
    _, shares = ranks.share(pipeline)
    if args.batch_size % shares or args.batch_size < 2 * shares:
        utils.fail(f"--batch-size {args.batch_size} cannot be shared out to {shares} ranks, two images each or more")
    size, generator = image_size(args), torch.Generator().manual_seed(args.seed)
    if args.dummy:
        train = DummyBatches(args, size, 1_281_167, 1000, device, generator, pipeline)
        val = DummyBatches(args, size, 50_000, 1000, device, pipeline=pipeline)
        return Data(train, val, 1000, "random numbers, 1000 classes")
    root = Path(args.data)
    try:
        val = ImageTree(root / "val")
        train = val if args.evaluate else ImageTree(root / "train")  # not needed, so it need not be there
    except OSError as error:
        fail_at(root, error)
    if train.classes != val.classes:
        different = sorted({*train.classes} ^ {*val.classes})[:10]
        utils.fail(f"the classes in {root}/train and {root}/val differ: {different}")
    if len(train) < 2 * shares and not args.evaluate:
        fail_at(root, f"{len(train)} training images; two for each of the ranks ({shares}) are needed")
    crop = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    centre = v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size), v2.PILToTensor()])
    counts = f"{len(val)} validation images of {len(train.classes)} classes"
    if not args.evaluate:
        counts = f"{len(train)} training and {counts}"
    train_batches = Batches(args, Images(train, crop), device, generator, pipeline)
    val_batches = Batches(args, Images(val, centre), device, pipeline=pipeline)
    longest = max(len(train_batches), len(val_batches))
    check_shared_memory(args.workers, args.batch_size // shares * 3 * size**2, longest, shares)
    return Data(train_batches, val_batches, len(train.classes), f"image folder, {counts}", train.classes)


def fail_at(root, error):
    utils.fail(f"{root} must have images in train/<class>/ and val/<class>/: {error}")


def check_shared_memory(workers, batch, num_batches, shares):
    """End the program if the batches that workers prepare do not fit into the machine's shared memory.

    Args:
        batch: bytes of this rank's share of a batch.
        num_batches: of the longest pass.
        shares: the number of ranks that load images.
    """
    free, here = free_shared_memory(), min(shares, int(os.environ.get("LOCAL_WORLD_SIZE", shares)))

    def needed(workers):
        return (min(PREFETCH * workers, num_batches) + 1) * batch * here  # and the one that is trained on

    if workers and free is not None and needed(workers) > free:
        fits = next((j for j in range(workers - 1, 0, -1) if needed(j) <= free), 0)
        utils.fail(
            f"/dev/shm has {free / 1e6:.0f} MB free, and the batches of -j {workers} need {needed(workers) / 1e6:.0f} "
            f"MB: use -j {fits}, or a smaller -b, or enlarge it (docker run --shm-size, or --ipc=host)"
        )


def free_shared_memory():
    """Bytes; None where there is no /dev/shm."""
    return shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None
