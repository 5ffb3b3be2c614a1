"""Training under torchrun: what a rank is, and what the ranks do together.

Without torchrun there is one rank, and everything here does nothing.
"""

import contextlib
import functools
import inspect
import os
import signal
import sys
import zipfile
import zlib

import utils

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import machines

RANK, COUNT = machines.place()


def here():
    """Where something happened, for a message; empty if there is one rank."""
    return f" on rank {RANK}" if COUNT > 1 else ""


def share(pipeline=None):
    """(which share of each batch is this rank's, number of shares)."""
    return (pipeline.replica, pipeline.replicas) if pipeline else (RANK, COUNT)


def one_message(main):
    """Let only the rank that fails speak: torchrun ends those that fail because it has gone. No traceback of faults
    outside the program."""

    @functools.wraps(main)
    def quiet(*args, **kwargs):
        try:  # around the context manager: Ctrl-C may come when another rank is lost, before its __exit__ has begun
            with without_traceback():
                return main(*args, **kwargs)
        except KeyboardInterrupt:
            if RANK:
                raise SystemExit(1) from None
            raise

    return quiet


@contextlib.contextmanager
def without_traceback():
    try:
        yield
    except RuntimeError as error:
        if "shared memory" in str(error) or "DataLoader worker (pid" in str(error):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise again at the exit
            *_, last = map(str.strip, str(error).strip().splitlines())
            raise SystemExit(
                f"A process that loads images has failed{here()}: {last} (less memory is needed with "
                "fewer workers, -j, or a smaller -b; --resume goes on from the last checkpoint)"
            ) from None
        machines.lost(error)
        raise


def setup(args):
    """utils.setup; under torchrun, a GPU or a CPU thread for each rank, of which rank 0 alone prints."""
    device = utils.setup(args)
    if COUNT == 1:
        return device
    if device.type == "cuda":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            utils.fail(f"this machine has {gpus} GPUs, too few for rank {local} (from 0); start fewer, or --no-cuda")
        torch.cuda.set_device(local)
    elif not args.threads and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    if RANK:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    machines.join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    compare_checkpoints(args.resume)
    return device


def compare_checkpoints(path):
    """End the program unless all ranks resume the same checkpoint, or none does.

    On machines that do not share a folder, some ranks would go on and the others would start from scratch.
    """
    seen = [None] * COUNT
    dist.all_gather_object(seen, checksum(path))
    for rank, other in enumerate(seen):
        if other != seen[0]:
            has, lacks = (0, rank) if seen[0] else (rank, 0)
            what = "another checkpoint than" if seen[0] and other else "no checkpoint, unlike"
            utils.fail(
                f"--resume: rank {lacks} has {what} rank {has}: put the same one into the --save_folder of every "
                "machine, or share that folder"
            )


def checksum(path):
    """Of a checkpoint's contents, from the table of its zip archive; None if there is no checkpoint."""
    if path is None:
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            return zlib.crc32(repr([(entry.filename, entry.CRC) for entry in archive.infolist()]).encode())
    except (OSError, zipfile.BadZipFile):
        return "damaged"  # whoever loads it says so


def end():
    """The last thing that every rank does."""
    if dist.is_initialized():
        machines.leave()


def size(group=None):
    """The number of ranks, of all or of a process group."""
    return group.size() if group else COUNT


def all_reduce(tensor, group=None):
    """The sum over all ranks (of a process group), in place."""
    if size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def data_parallel(module, group=None):
    """The module, its gradients averaged over the ranks (of a process group)."""
    # Running statistics are averaged once an epoch instead of being sent with every batch
    new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    keep_buffers = {"forward_sync_buffers" if new else "broadcast_buffers": False}
    return DistributedDataParallel(module, process_group=group, **keep_buffers) if size(group) > 1 else module


@torch.no_grad()
def average_buffers(model, group=None):
    """Give all ranks (of a process group) the mean of their running statistics, to evaluate and save one network."""
    if size(group) > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                all_reduce(buffer, group).div_(size(group))
