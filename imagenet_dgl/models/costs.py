"""What a network costs, without computing it: everything runs on the meta device, where tensors have no data."""

import contextlib
import copy
import itertools

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .dgl_net import DGLNet

BATCH = 2  # BatchNorm refuses to train on one value per channel


def on_meta(module):
    """A copy of the module, in training mode and without the data of its parameters and buffers."""
    memo = {}  # deepcopy uses what it finds here instead of copying
    for tensor in {*module.parameters(), *module.buffers()}:
        shape = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(shape, tensor.requires_grad) if is_parameter else shape
    return copy.deepcopy(module, memo).train()


def meta_images(module, image_size):
    """Images (2, 3, image_size, image_size) on the meta device, in the data type of the module's parameters."""
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    return torch.empty(BATCH, 3, image_size, image_size, device="meta", dtype=dtype)


@contextlib.contextmanager
def one_line_error(model, image_size):
    """ValueError in one line if the model fails on images of this size."""
    try:
        yield
    except Exception as error:  # the model's own code runs here
        fails = f"{type(model).__name__} fails on {image_size}-pixel images; larger ones may be needed"
        raise ValueError(f"{fails}: {str(error).strip().splitlines()[0]}") from None


class Meter(TorchDispatchMode):
    """Counts the FLOPs of a `with` block, and the bytes that autograd saves in it for the backward pass.

    The FLOPs are torch.utils.flop_counter's, whose own mode is far slower with BatchNorm.

    Args:
        module: its parameters and buffers exist anyway, so they do not count as saved.
    """

    def __init__(self, module):
        super().__init__()
        self.flops = 0
        self.saved = {}  # bytes by storage: what is saved twice counts once
        self.present = {key(tensor) for tensor in itertools.chain(module.parameters(), module.buffers())}
        self.keep = []  # a new storage could get the key of a freed one
        self.hooks = saved_tensors_hooks(self.pack, lambda _: None)

    def pack(self, tensor):
        if key(tensor) not in self.present:
            self.saved[key(tensor)] = tensor.untyped_storage().nbytes()
            self.keep.append(tensor.untyped_storage())

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if count := flop_registry.get(getattr(operation, "overloadpacket", None)):
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result

    def __enter__(self):
        self.hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.hooks.__exit__(*error)


def key(tensor):
    return tensor.untyped_storage()._cdata


def costs(model, image_size):
    """What each module costs, without computing it.

    Args:
        model: a DGLNet, or any network (B, 3, image_size, image_size) -> logits, which is then one module.

    Returns:
        a dict for each module, with `parameters` and `auxiliary_parameters`; `flops` and `auxiliary_flops`, of the
        forward pass per image (convolutions and matrix products; a multiply-add counts as two); and `activations`, the
        bytes per image that block and auxiliary network keep for their backward pass, input included. A module frees
        them before the next one runs, so DGL's peak is the largest of them.
    """
    model = on_meta(model)
    x = meta_images(model, image_size)
    pairs = zip(model.blocks, model.auxiliary_nets) if isinstance(model, DGLNet) else [(model, nn.Identity())]
    rows = []
    for block, auxiliary_net in pairs:
        with Meter(model) as meter:
            x = block(x)
            flops = meter.flops
            auxiliary_net(x)
        rows.append(
            {
                "parameters": sum(p.numel() for p in block.parameters()),
                "auxiliary_parameters": sum(p.numel() for p in auxiliary_net.parameters()),
                "flops": flops // BATCH,
                "auxiliary_flops": (meter.flops - flops) // BATCH,
                "activations": sum(meter.saved.values()) // BATCH,
            }
        )
        x = x.detach()
    return rows
