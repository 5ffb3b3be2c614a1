"""A rank of parallel.py: the module that it trains, and its wires to the ranks of its neighbours."""

import utils

import torch
import torch.distributed as dist

import cifar
import cifar_ddg
import cifar_dgl
import cifar_features_replay
import models
from wires import SLOTS, Wire

# Those with a method's optimizers and test. SGD treats each weight alone: backprop may have K optimizers, as DDG has.
SCRIPTS = {"dgl": cifar_dgl, "ddg": cifar_ddg, "fr": cifar_features_replay, "backprop": cifar_ddg}


class Module:
    """What this rank trains: one module of the network, and its wires to the ranks of its neighbours.

    Attributes:
        late: by how many iterations DDG and FR delay its backward pass, K-1-n.
        ahead: the inputs for which it waits at a time, that of the current batch included.
        delays: as in the one-process script. Of it, this rank uses its own module's share.
        inputs, outputs: wires from module n-1 and to module n+1; gradients, back: the opposite ones. None if missing.
    """

    def __init__(self, args, model, device):
        script = SCRIPTS[args.method]
        self.n, self.device, last = dist.get_rank(), device, args.num_splits - 1
        self.is_last, self.late = self.n == last, last - self.n
        self.ahead = 1 if args.method == "backprop" else SLOTS
        self.parts = parts(model, self.n)
        self.block, self.auxiliary_net = self.parts[0], self.parts[-1]
        self.optimizer, self.scaler = script.make_optimizers(model)[self.n], cifar.grad_scaler(args, device)
        self.autocast, self.meter = utils.autocast(args, device), cifar.Meter(device)
        self.one, self.delays = torch.ones((), device=device), None
        if args.method == "ddg":
            self.delays = cifar_ddg.Delays(model, self.autocast)
        elif args.method == "fr":
            self.delays = cifar_features_replay.Delays(model)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision, torch.float32)
        _, shapes = models.blocks(args.depth, args.num_splits)
        up, down = [], []
        for n, shape in enumerate(shapes[:-1]):
            up.append(Wire(n, n + 1, shape, dtype, device))
            down.append(Wire(n + 1, n, shape, torch.float32, device) if args.method != "dgl" else None)
        self.inputs, self.outputs = [None, *up][self.n], [*up, None][self.n]
        self.gradients, self.back = [*down, None][self.n], [None, *down][self.n]

    def receive(self, labels):
        """Yield (input, labels) of each batch of a pass, given the labels of all. Not on rank 0."""
        for i, own in enumerate(labels):
            for later in labels[i + len(self.inputs.coming) : i + self.ahead]:
                self.inputs.expect(len(later))
            yield self.inputs.receive().requires_grad_(self.back is not None), own.to(self.device)

    def end_pass(self):
        """Wait until nothing is under way. A gradient that has come is for the next pass."""
        for wire in filter(None, (self.outputs, self.back)):
            wire.flush()
        if self.gradients:
            self.gradients.look()

    def scale(self):
        """Of the loss: 1 except in fp16. Each module has its own, so gradients are passed unscaled."""
        return self.scaler.scale(self.one)

    def send_back(self, x, scale):
        """Send the previous module the gradient with respect to its output."""
        if self.back:
            self.back.send(x.grad.float() / scale)

    def step(self):
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def state_dict(self):
        """After an epoch; the meter starts again from zero."""
        state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        if self.delays:
            if self.gradients:
                self.delays.gradients[self.n] = self.gradients.look()
            state["delays"] = self.delays.state_dict()
        state["weights"], state["meter"] = [part.state_dict() for part in self.parts], self.meter.sums.clone()
        self.meter.sums.zero_()
        return state

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.delays:
            self.delays.load_state_dict(state["delays"])
            if self.gradients and self.delays.gradients[self.n] is not None:
                self.gradients.put_back(self.delays.gradients[self.n])


def parts(model, n):
    """Module n's block and, in DGL, auxiliary network."""
    return [getattr(model, name)[n] for name in ("blocks", "auxiliary_nets") if hasattr(model, name)]
