"""Decoupled parallel backprop with ResNet-110 on CIFAR-10, for comparison with DGL (Section 5.3, arXiv 1901.08164).

DDG (Huo et al. 2018, arXiv 1804.10574) cuts the network into K modules. Module k (from 1) backpropagates K-k iterations
late, so it need not wait for the modules above. Until then it keeps its graphs and the weights they were built with.
Simulated in one process. cifar_features_replay.py keeps only the inputs, and cifar_dgl.py keeps nothing.

    python cifar_ddg.py                              # CIFAR-10, downloaded to ./data if missing; 300 epochs
    python cifar_ddg.py --num_splits 4               # four modules
    python cifar_ddg.py --data digits --depth 20     # a small network, handwritten digits, no download

Writes a log with one line per epoch, and a checkpoint to --resume from.
"""

import utils

import torch
import torch.nn.functional as F
from torch.func import functional_call
from tqdm import tqdm

import cifar
from cifar_backprop import evaluate
from models import ResNet, add_flags, check_cut


def parse_args(argv=None):
    parser = utils.ArgumentParser(__file__, __doc__)
    cifar.add_data_flags(parser)
    add = add_flags(parser)
    add("--log-interval", type=utils.at_least(0), default=0, help="print the loss every N batches (0: never)")
    return check_cut(parser, parser.parse_args(argv))


class Graph:
    """A block's forward pass on x, kept for its backward pass with copies of the weights that it used.

    It needs copies because the optimizer updates the block's own parameters in place before the backward pass.
    BatchNorm updates the running statistics in `buffers` or, without them, the block's own.
    """

    def __init__(self, block, x, weights, buffers=None):
        self.block, self.x = block, x
        self.weights = {name: w.detach().clone().requires_grad_() for name, w in weights}
        self.output = functional_call(block, {**self.weights, **(buffers or {})}, (x,))

    def backward(self, gradient):
        """Set the gradients of the block's parameters and of x, given the loss gradient with respect to the output."""
        self.output.backward(gradient.to(self.output.dtype))
        for p, w in zip(self.block.parameters(), self.weights.values()):
            p.grad = w.grad


class Delays:
    """What each module but the last keeps between iterations.

    graphs: forward passes that have had no backward pass yet, oldest first; K-k for module k.
    gradients: of the loss with respect to the oldest graph's output; None in a module's first K-k iterations.
    """

    def __init__(self, model, autocast):
        self.blocks, self.autocast = model.blocks[:-1], autocast
        self.graphs, self.gradients = [[] for _ in self.blocks], [None for _ in self.blocks]

    def state_dict(self):
        inputs = [[graph.x.detach() for graph in graphs] for graphs in self.graphs]
        weights = [[{k: w.detach() for k, w in g.weights.items()} for g in graphs] for graphs in self.graphs]
        return {"inputs": inputs, "weights": weights, "gradients": self.gradients}

    def load_state_dict(self, state):
        """Rebuild the graphs from inputs and weights. On a CPU they are bit-identical to the originals."""
        for n, (block, gradient) in enumerate(zip(self.blocks, state["gradients"], strict=True)):
            device, self.graphs[n] = next(block.parameters()).device, []
            self.gradients[n] = gradient if gradient is None else gradient.to(device)
            for x, weights in zip(state["inputs"][n], state["weights"][n], strict=True):
                weights = {name: w.to(device) for name, w in weights.items()}
                buffers = {name: b.clone() for name, b in block.named_buffers()}  # BatchNorm has already counted x
                with self.autocast:
                    graph = Graph(block.train(), x.to(device).requires_grad_(n > 0), weights.items(), buffers)
                self.graphs[n].append(graph)


def make_optimizers(model):
    """One per module, because modules take their first step at different iterations."""
    return [cifar.sgd([block], lr=0.01, weight_decay=5e-4, nesterov=True) for block in model.blocks]


def set_learning_rate(optimizers, epoch, drops=(150, 225)):
    """0.01, divided by 10 when each epoch of `drops` begins. Epochs count from 1."""
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = 0.01 * 0.1 ** sum(epoch >= drop for drop in drops)


def train_epoch(model, optimizers, scalers, autocast, batches, meter, delays, log_interval=0):
    """One epoch of DDG (Algorithm 1 of its paper). Module n, counted from 0, is K-1-n iterations late."""
    model.train()
    last, one = len(model.blocks) - 1, torch.ones((), device=batches.device)
    for i, (images, labels) in enumerate(tqdm(batches, disable=None, leave=False), start=1):
        # Forward: all modules on this batch, with their current weights.
        x = images
        for block, graphs in zip(model.blocks[:last], delays.graphs):
            with autocast:
                graphs.append(Graph(block, x, block.named_parameters()))
            x = graphs[-1].output.detach().requires_grad_()
        with autocast:
            logits = model.blocks[last](x)
            loss = F.cross_entropy(logits, labels)
        # Backward: the last module uses this batch. Module n uses an older one, with the gradient that module n+1
        # computed one iteration ago. No module reads another's new weights, so the order does not matter.
        given, delays.gradients = delays.gradients, [None] * last
        for n in reversed(range(last + 1)):
            scale = scalers[n].scale(one)  # 1 except in fp16. Each module has its own, so gradients are passed unscaled
            optimizers[n].zero_grad()
            if n == last:
                (loss * scale).backward()
            elif given[n] is None:
                break  # in the first K-1-n iterations, this module and those below have no gradient yet
            else:
                graph = delays.graphs[n].pop(0)
                graph.backward(given[n] * scale)
                x = graph.x
            scalers[n].step(optimizers[n])
            scalers[n].update()
            if n > 0:
                delays.gradients[n - 1] = x.grad.float() / scale
        meter.update(loss, logits, labels)
        if log_interval and i % log_interval == 0:
            print(f"batch {i} of {len(batches)}, loss: {loss.item():.5f}")


def main(argv=None):
    args = parse_args(argv)
    device = utils.setup(args)
    data = cifar.load_data(args, device)
    model = utils.to_device(ResNet(data.num_classes, args.depth, args.num_splits), args, device)
    optimizers = make_optimizers(model)
    scalers = [cifar.grad_scaler(args, device) for _ in optimizers]
    autocast = utils.autocast(args, device)
    meter = cifar.Meter(device)
    delays = Delays(model, autocast)  # kept across epochs
    run = utils.Run(args, data, model=model, optimizers=optimizers, scalers=scalers, delays=delays)
    for epoch in run.epochs(args.epochs):
        set_learning_rate(optimizers, epoch, args.drops)
        train_epoch(model, optimizers, scalers, autocast, data.train, meter, delays, args.log_interval)
        cifar.log_epoch(run, args.num_splits, epoch, meter, evaluate(model, autocast, data.test))


if __name__ == "__main__":
    main()
