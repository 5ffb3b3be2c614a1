"""Data-parallel training under torchrun: what a rank is, and what the ranks do together.

Without torchrun there is one rank, and everything here does nothing.
"""

import inspect
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import utils

RANK, COUNT = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


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
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def end():
    """The last thing that every rank does."""
    if dist.is_initialized():
        dist.destroy_process_group()


def add_up(tensor):
    """The sum over all ranks, in place."""
    if COUNT > 1:
        dist.all_reduce(tensor)
    return tensor


def data_parallel(module):
    """The module, its gradients averaged over the ranks."""
    # Running statistics are averaged once an epoch instead of being sent with every batch
    new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    keep_buffers = {"forward_sync_buffers" if new else "broadcast_buffers": False}
    return DistributedDataParallel(module, **keep_buffers) if COUNT > 1 else module


def sync_batch_norm(model, device):
    """The model with BatchNorm over the images of all ranks instead of a rank's own."""
    convert = nn.SyncBatchNorm if device.type == "cuda" else SyncBatchNorm
    return convert.convert_sync_batchnorm(model) if COUNT > 1 else model


@torch.no_grad()
def average_buffers(model):
    """Give all ranks the mean of their running statistics, so that they evaluate, and save, the same network."""
    if COUNT > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                add_up(buffer).div_(COUNT)


class AddUp(torch.autograd.Function):
    """The sum of a tensor over all ranks; so is its gradient."""

    @staticmethod
    def forward(ctx, x):
        return add_up(x.clone())

    @staticmethod
    def backward(ctx, gradient):
        return add_up(gradient.contiguous().clone())


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """nn.SyncBatchNorm for CPUs, which torch does not have; every rank has as many images."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        dims, shape = [d for d in range(x.dim()) if d != 1], [-1 if d == 1 else 1 for d in range(x.dim())]
        count = COUNT * x.numel() // x.shape[1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = AddUp.apply(wide.mean(dims)) / COUNT
        centred = wide - mean.view(shape)
        variance = AddUp.apply(centred.square().mean(dims)) / COUNT
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)

    @classmethod
    def convert_sync_batchnorm(cls, module):
        """The module with every BatchNorm replaced, parameters and buffers kept."""
        for name, child in module.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                sync = cls(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
                sync.__dict__.update({key: child.__dict__[key] for key in ("_parameters", "_buffers")})
                setattr(module, name, sync)
            else:
                cls.convert_sync_batchnorm(child)
        return module
