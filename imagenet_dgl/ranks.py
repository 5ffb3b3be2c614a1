"""Training under torchrun: what a rank is, and what the ranks do together.

Without torchrun there is one rank, and everything here does nothing.
"""

import contextlib
import inspect
import os
import sys
import time
import uuid

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import utils

RANK, COUNT = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
PATIENCE = 10  # seconds in which torchrun ends this rank when another one has failed


def here():
    """Where something happened, for a message: nothing to say if there is one rank."""
    return f" on rank {RANK}" if COUNT > 1 else ""


def fail(message):
    """utils.fail with a mistake that as a rule all ranks find: rank 0 says it, another one only if rank 0 has not."""
    if RANK:
        time.sleep(PATIENCE)
    utils.fail(message)


@contextlib.contextmanager
def one_message():
    """Let the rank that fails speak, and not those that fail because it has gone: torchrun ends them in a moment."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        if COUNT == 1 or not lost:
            raise
        time.sleep(PATIENCE)
        reason = str(error).strip().splitlines()[0]
        raise SystemExit(f"Rank {RANK} has lost the connection to another rank: {reason}") from None
    except KeyboardInterrupt:
        if RANK:
            raise SystemExit(1) from None
        raise


def setup(args):
    """utils.setup; under torchrun, a GPU or a CPU thread for each rank, and what rank 0 alone prints."""
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
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        dist.init_process_group(backend, store=meet(), rank=RANK, world_size=COUNT)
    else:  # not started by torchrun
        dist.init_process_group(backend)
    return device


def meet():
    """torchrun's store, with a prefix for this start of the job: after --max-restarts the addresses of the last one
    are still in it (https://github.com/pytorch/pytorch/issues/135712), and its count of restarts is a machine's own.

    Each rank asks under a name of its own that no earlier process had; rank 0 answers till all have the prefix.
    """
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    if RANK:
        question = uuid.uuid4().hex
        store.set(f"question {RANK}", question)
        prefix = store.get(f"answer {question}").decode()
        store.add(f"{prefix} arrived", 1)
    else:
        prefix = uuid.uuid4().hex
        while store.add(f"{prefix} arrived", 0) < COUNT - 1:
            for rank in range(1, COUNT):
                if store.check([f"question {rank}"]):  # an earlier process's, perhaps: it is answered in vain
                    store.set(f"answer {store.get(f'question {rank}').decode()}", prefix)
            time.sleep(0.05)
    return dist.PrefixStore(prefix, store)


def end():
    """The last thing that every rank does."""
    if dist.is_initialized():
        dist.destroy_process_group()


def size(group=None):
    """The number of ranks, of all or of a process group."""
    return group.size() if group else COUNT


def add_up(tensor, group=None):
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


def sync_batch_norm(model, device, group=None):
    """The model with BatchNorm over the images of all ranks (of a process group) instead of a rank's own."""
    convert = nn.SyncBatchNorm if device.type == "cuda" else SyncBatchNorm
    return convert.convert_sync_batchnorm(model, group) if size(group) > 1 else model


@torch.no_grad()
def average_buffers(model, group=None):
    """Give all ranks (of a process group) the mean of their running statistics, to evaluate and save one network."""
    if size(group) > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                add_up(buffer, group).div_(size(group))


class AddUp(torch.autograd.Function):
    """The sum of a tensor over the ranks of a process group; so is its gradient."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return add_up(x.clone(), group)

    @staticmethod
    def backward(ctx, gradient):
        return add_up(gradient.contiguous().clone(), ctx.group), None


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """nn.SyncBatchNorm for CPUs, which torch does not have; every rank (of the process group) has as many images."""

    group = None

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        dims, shape = [d for d in range(x.dim()) if d != 1], [-1 if d == 1 else 1 for d in range(x.dim())]
        ranks = size(self.group)
        count = ranks * x.numel() // x.shape[1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = AddUp.apply(wide.mean(dims), self.group) / ranks
        centred = wide - mean.view(shape)
        variance = AddUp.apply(centred.square().mean(dims), self.group) / ranks
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)

    @classmethod
    def convert_sync_batchnorm(cls, module, group=None):
        """The module with every BatchNorm replaced, parameters and buffers kept."""
        for name, child in module.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                sync = cls(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
                sync.__dict__.update({key: child.__dict__[key] for key in ("_parameters", "_buffers")})
                sync.group = group
                setattr(module, name, sync)
            else:
                cls.convert_sync_batchnorm(child, group)
        return module
