"""A run's log, checkpoints and lines on the screen, and loading a network to evaluate it."""

import argparse
import contextlib
import os
import sys
import time
import warnings
from pathlib import Path

import utils

import torch
from tqdm import tqdm

import ranks
from data import image_size
from training import progress_bar, random_seed


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


class Classes:
    """The names of the classes, on a rank that reads images: a checkpoint of others ends the program."""

    def __init__(self, names, folder):
        self.names, self.folder = names, folder

    def state_dict(self):
        return {"names": self.names}

    def load_state_dict(self, state):
        was, now = state["names"], self.names
        if was and now and was != now:
            missing, unknown = sorted({*was}.difference(now))[:5], sorted({*now}.difference(was))[:5]
            utils.fail(
                f"the checkpoint was trained on {len(was)} classes, {self.folder} has {len(now)}; "
                f"missing there: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
            )


def load_network(model, args, images):
    """Give the model the weights of the checkpoint --resume, for --evaluate."""
    state = utils.load_checkpoint(args.resume, args.script)
    Classes(images.classes, args.data).load_state_dict(state["parts"]["classes"])
    saved, flags = state["parts"]["model"], state["arguments"]
    compare_network(args, flags)
    if shapes(saved) != shapes(model.state_dict()):
        was, now = (image_size(argparse.Namespace(**given)) for given in (flags, vars(args)))
        utils.fail(
            f"for images of {was} pixels the checkpoint's network is not the same as for {now}: evaluate it with "
            f"--image-size {was}"
            if was != now
            else f"{args.resume} is a checkpoint of another network"
        )
    with quiet_meta():
        model.load_state_dict(saved)


def compare_network(args, flags):
    """End the program unless the flags of the checkpoint --resume are of the same network."""
    for flag in ("arch", "aux_size", "balance", "block_size", "mlp", "nlin", "num_modules", "send_precision"):
        if flags.get(flag) != (now := getattr(args, flag, None)):
            utils.fail(f"{args.resume} was made with {flag} {flags.get(flag)!r}, not {now!r}")


def saved_cuts(args):
    """Where --balance time had cut the network of the checkpoint --resume: measured again, it might be elsewhere."""
    flags = utils.load_checkpoint(args.resume, args.script)["arguments"]
    compare_network(args, flags)
    return flags["cuts"]


def shapes(state):
    return {name: tensor.shape for name, tensor in state.items()}


@contextlib.contextmanager
def quiet_meta():
    """Without torch's warning that modules on the meta device, those of other ranks, take no data."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
        yield


class Run(utils.Run):
    """utils.Run with epochs from 0, which only rank 0 writes. The best checkpoint is kept as `<checkpoint>_best.pt`.

    A checkpoint holds what utils.Run says; its parts are the model, for each module an optimizer and a scaler, the best
    top-1 so far, and the classes' names. It is the same whether one process has trained all modules, or each rank of a
    pipeline its own: there each rank has its own module's parts, and rank 0 collects them to write.
    """

    def __init__(self, args, images, pipeline=None, **parts):
        self.pipeline, self.best, self.writer = pipeline, Best(), None
        self.screen = sys.stdout
        if pipeline and not pipeline.replica:  # each module has its lines on the screen
            self.screen = utils.Screen(sys.__stdout__)
        super().__init__(args, images, best=self.best, classes=Classes(images.classes, args.data), **self.named(parts))
        if not args.resume:
            self.epoch = args.start_epoch
        if ranks.RANK:
            self.log_file = Path(os.devnull)
        elif args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            folder = self.checkpoint.with_suffix(".tensorboard")
            try:
                self.writer = SummaryWriter(folder, purge_step=self.epoch)
            except OSError as error:
                self.stop(f"Cannot write {folder}: {error.strerror}")

    def named(self, parts):
        """Parts by their names in a checkpoint; lists have an entry for each module that this rank trains."""
        first, named = self.pipeline.n if self.pipeline else 0, {}
        for name, part in parts.items():
            named |= {f"{name}.{first + i}": p for i, p in enumerate(part)} if isinstance(part, list) else {name: part}
        return named

    def replace_parts(self, **parts):
        self.parts |= self.named(parts)

    # What only rank 0 does

    def lock(self):
        if ranks.RANK == 0:
            super().lock()
        else:
            self.log_file = Path(os.devnull)  # and so `load` finds no log to cut

    def begin(self):
        super().begin()
        self.log(f"ranks: {ranks.COUNT}")

    def log(self, line):
        if ranks.RANK == 0:
            super().log(line)

    def write(self, state, path):
        if self.pipeline:
            state["parts"] = whole(self.pipeline.gather(state["parts"]))
        if ranks.RANK == 0:
            if self.best.is_last:
                super().write(state, path.with_stem(f"{path.stem}_best"))
            super().write(state, path)

    def stop(self, reason):
        if ranks.RANK:
            time.sleep(ranks.machines.PATIENCE)  # if rank 0 has stopped, too, it has said why
        super().stop(reason)

    # On all ranks

    def load(self, path):
        with quiet_meta():
            super().load(path)

    def epochs(self, last):
        """The epochs still to do, counted from 0."""
        for epoch in super().epochs(last):
            torch.manual_seed(random_seed(self.args, epoch - 1, ranks.RANK))
            if self.pipeline:
                self.pipeline.waited = dict.fromkeys(self.pipeline.waited, 0.0)
            yield epoch - 1

    def check_finite(self, loss, n, epoch):
        if self.args.dummy:  # at any learning rate: it is the speed that is measured
            return
        if self.pipeline:
            first, replicas = n * self.pipeline.replicas, self.pipeline.replicas
            n = f"{n} on rank {first}" if replicas == 1 else f"{n} on ranks {first} to {first + replicas - 1}"
        super().check_finite(loss, n, epoch)

    def watch(self, batches, meters, epoch):
        """The training batches, with a bar on a terminal and every --print-freq batches one line per module.

        In a pipeline, each rank has a line for its own module.
        """
        shown = {self.pipeline.n: meters[self.pipeline.n]} if self.pipeline else dict(enumerate(meters))
        clock, sizes, shares = Clock(), [], ranks.share(self.pipeline)[1]
        for i, batch in enumerate(progress_bar(batches, "training")):
            clock.loaded()
            yield batch
            due = self.args.print_freq and i % self.args.print_freq == 0
            results = {n: meter.look() for n, meter in shown.items()} if due else {}  # waits for the device
            if i + 1 == clock.first(len(batches)) and batches.device.type == "cuda":
                torch.cuda.current_stream().synchronize()  # what is still to do for these batches does not count
                torch.cuda.reset_peak_memory_stats()  # nor the memory that the search for the fastest kernels needs
            clock.trained()
            sizes.append(len(batch[1]) * shares)
            for n, ((loss, top1, top5), (mean, mean1, mean5)) in results.items():
                self.check_finite(loss, n, epoch)
                place = f"Epoch: [{epoch}][{i:{len(str(len(batches)))}}/{len(batches)}]"
                which = [f"n: {n}"] if len(meters) > 1 else []
                tops = f"Acc@1 {top1:6.2f} ({mean1:6.2f})", f"Acc@5 {top5:6.2f} ({mean5:6.2f})"
                self.show("\t".join([place, *which, str(clock), f"Loss {loss:.4e} ({mean:.4e})", *tops]))
        which = f"n: {self.pipeline.n}, " if self.pipeline else ""
        self.show(which + clock.speed(sizes, batches.device))

    def show(self, line):
        """Print a line on the screen; on other ranks than 0, it takes the place of rank 0's progress bar."""
        with tqdm.external_write_mode():
            print(f"\r\033[K{line}" if ranks.RANK and self.screen.isatty() else line, file=self.screen)

    def show_profile(self, seconds):
        """Print what each rank of the pipeline has spent the `seconds` of a training pass on."""
        spent = torch.zeros(ranks.COUNT, 3, dtype=torch.float64, device=self.pipeline.device)
        spent[ranks.RANK] = torch.tensor([seconds, *self.pipeline.waited.values()])
        for rank, (total, for_input, for_send) in enumerate(ranks.all_reduce(spent).tolist()):
            waits = f"waiting for input {for_input:.2f} s, for sends {for_send:.2f} s"
            print(f"rank {rank}: {total:.2f} s, computing {total - for_input - for_send:.2f} s, {waits}")

    def end_epoch(self, epoch, top1):
        """Log how many images could not be read; keep the checkpoint if top1, the network's, is the best."""
        self.best.update(top1)
        for text in skipped(self.data):
            self.log(f"epoch {epoch}, {text}")

    def scalars(self, epoch, n, **values):
        """What --tensorboard shows of module n."""
        if self.writer:
            try:
                for name, value in values.items():
                    self.writer.add_scalar(f"{name}/{n}", value, epoch)
                self.writer.flush()
            except Exception as error:  # of the thread that writes
                self.stop(f"Cannot write {self.writer.log_dir}: {error}")


def whole(shares):
    """The parts of a whole checkpoint, from those of each module's rank; None where there are none.

    Of the model, a rank has the shapes of all tensors, but the data of its own module's only.
    """
    if not shares:
        return None
    parts = shares[0]
    for share in shares[1:]:
        own = {name: tensor for name, tensor in share["model"].items() if not tensor.is_meta}
        parts["model"].update(own)
        parts = {**share, **parts}
    return parts


def skipped(images):
    """For each set of images, of all ranks, how many could not be read since the last time, as text."""
    for kind, batches in (("training", images.train), ("validation", images.test)):
        count = int(ranks.all_reduce(torch.tensor(batches.skipped, device=batches.device)))
        batches.skipped = 0
        if count:
            yield f"skipped: {count} {kind} images that cannot be read"


class Clock:
    """Seconds of each batch of a training pass: in all, and until it was loaded."""

    def __init__(self):
        self.total, self.loading, self.begin = [], [], time.perf_counter()

    def loaded(self):
        self.loading.append(time.perf_counter() - self.begin)

    def trained(self):
        now = time.perf_counter()
        self.total.append(now - self.begin)
        self.begin = now

    def __str__(self):
        columns = {"Time": self.total, "Data": self.loading}
        return "\t".join(f"{name} {t[-1]:6.3f} ({sum(t) / len(t):6.3f})" for name, t in columns.items())

    @staticmethod
    def first(count):
        """The first of so many batches that counts: those before start workers, find the fastest kernels, and so on."""
        return min(count // 2, 10)

    def speed(self, sizes, device):
        """Images a second, from the sizes of the batches, and peak memory, as text."""
        first, memory = self.first(len(sizes)), ""
        if device.type == "cuda":
            torch.cuda.synchronize()
            memory = f", peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB a rank"
        seconds = sum(self.total[first:]) + time.perf_counter() - self.begin
        return f"{sum(sizes[first:]) / seconds:.1f} training images/s{memory}"
