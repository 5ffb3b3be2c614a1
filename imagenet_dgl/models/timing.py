"""How long a part of a network takes to train on a batch, on the device at hand."""

import contextlib
import copy
import time

import torch

REPEATS = 3


class Timer:
    """Trains copies of parts of a network and takes the time: see `__call__`.

    Args:
        device: to train on.
        batch_size: images in a batch.
        autocast: the context of forward passes.
    """

    def __init__(self, device, batch_size=32, autocast=None):
        self.device, self.batch_size = torch.device(device), batch_size
        self.autocast = autocast or contextlib.nullcontext()

    def images(self, image_size, dtype):
        """Random ones (B, 3, image_size, image_size), in channels_last as in training."""
        shape = self.batch_size, 3, image_size, image_size
        return torch.randn(shape, device=self.device, dtype=dtype).contiguous(memory_format=torch.channels_last)

    def __call__(self, part, x, needs_gradient):
        """Seconds of the part's forward pass, backward pass and step (SGD with momentum): the fastest of a few.

        Args:
            part: a module, which stays as it is.
            x: its input (B, ...).
            needs_gradient: whether the backward pass goes on before the part, so that x needs a gradient.

        Returns:
            (seconds, what the part makes of x)
        """
        part = copy.deepcopy(part).to(self.device, memory_format=torch.channels_last).train()
        parameters, seconds = [*part.parameters()], []
        # At a rate of 0 the step costs as much, and whatever the gradients are, values stay small
        optimizer = torch.optim.SGD(parameters, 0.0, 0.9, weight_decay=1e-4, fused=True) if parameters else None
        for _ in range(1 + REPEATS):  # the first one finds kernels and gets memory
            given = x.detach().requires_grad_(needs_gradient)
            begin = self.now()
            with self.autocast:
                output = part(given)
            if output.requires_grad:
                output.backward(torch.ones_like(output))
                if optimizer:
                    optimizer.step()
                    optimizer.zero_grad()
            seconds.append(self.now() - begin)
        part.to("meta")  # frees the copy, which its own references to itself keep alive
        return min(seconds[1:]), output.detach()

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
