"""Features replay with ResNet-110 on CIFAR-10, for comparison with DGL (Section 5.3, arXiv 1901.08164).

FR (Huo et al. 2018, arXiv 1807.04511) cuts the network into K modules. Module k (from 1) backpropagates K-k iterations
late, so it need not wait for the modules above. Until then it keeps its inputs. It then runs them forward again with
the weights that it has by then. Simulated in one process. cifar_ddg.py keeps whole graphs instead.

    python cifar_features_replay.py                              # CIFAR-10, downloaded to ./data if missing; 300 epochs
    python cifar_features_replay.py --num_splits 4               # four modules
    python cifar_features_replay.py --data digits --depth 20     # a small network, handwritten digits, no download

Writes a log with one line per epoch, and a checkpoint to --resume from.
"""

import utils

import torch
import torch.nn.functional as F
from torch.func import functional_call
from tqdm import tqdm

import cifar
from cifar_ddg import evaluate, make_optimizers, set_learning_rate
from models import ResNet, add_flags, check_cut


def parse_args(argv=None):
    parser = utils.ArgumentParser(__file__, __doc__)
    cifar.add_data_flags(parser)
    add = add_flags(parser)
    add("--log-interval", type=utils.at_least(0), default=0, help="print the loss every N batches (0: never)")
    return check_cut(parser, parser.parse_args(argv))


class Delays:
    """What each module but the last keeps between iterations.

    inputs: for batches that have had no backward pass yet, oldest first; K-k for module k.
    gradients: of the loss with respect to the oldest batch's output; None in a module's first K-k iterations.
    """

    def __init__(self, model):
        self.blocks = model.blocks[:-1]
        self.inputs, self.gradients = [[] for _ in self.blocks], [None for _ in self.blocks]

    def state_dict(self):
        return {"inputs": [[x.detach() for x in inputs] for inputs in self.inputs], "gradients": self.gradients}

    def load_state_dict(self, state):
        for n, (block, gradient) in enumerate(zip(self.blocks, state["gradients"], strict=True)):
            device = next(block.parameters()).device
            self.inputs[n] = [x.to(device).requires_grad_(n > 0) for x in state["inputs"][n]]
            self.gradients[n] = gradient if gradient is None else gradient.to(device)


def replay(block, x):
    """The block's output on x with its current weights. Leaves its running statistics alone: they include x already."""
    return functional_call(block, {name: b.clone() for name, b in block.named_buffers()}, (x,))


def train_epoch(model, optimizers, scalers, autocast, batches, meter, delays, log_interval=0):
    """One epoch of FR (Algorithm 1 of its paper). Module n, counted from 0, is K-1-n iterations late."""
    model.train()
    last, one = len(model.blocks) - 1, torch.ones((), device=batches.device)
    for i, (images, labels) in enumerate(tqdm(batches, disable=None, leave=False), start=1):
        # Play: all modules run on this batch with their current weights, and keep only their inputs.
        x = images
        for block, inputs in zip(model.blocks[:last], delays.inputs):
            inputs.append(x)
            with torch.no_grad(), autocast:
                x = block(x).requires_grad_()
        with autocast:  # the last module needs no replay, because its gradient is available at once
            logits = model.blocks[last](x)
            loss = F.cross_entropy(logits, labels)
        # Replay and backward: the last module uses this batch. Module n replays an older one with its current weights,
        # and uses the gradient that module n+1 computed one iteration ago. No module reads another's new weights, so
        # the order does not matter.
        given, delays.gradients = delays.gradients, [None] * last
        for n in reversed(range(last + 1)):
            scale = scalers[n].scale(one)  # 1 except in fp16. Each module has its own, so gradients are passed unscaled
            optimizers[n].zero_grad()
            if n == last:
                (loss * scale).backward()
            elif given[n] is None:
                break  # in the first K-1-n iterations, this module and those below have no gradient yet
            else:
                x = delays.inputs[n].pop(0)
                with autocast:
                    output = replay(model.blocks[n], x)
                output.backward((given[n] * scale).to(output.dtype))
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
    delays = Delays(model)  # kept across epochs
    run = utils.Run(args, data, model=model, optimizers=optimizers, scalers=scalers, delays=delays)
    for epoch in run.epochs(args.epochs):
        set_learning_rate(optimizers, epoch, args.drops)
        train_epoch(model, optimizers, scalers, autocast, data.train, meter, delays, args.log_interval)
        cifar.log_epoch(run, args.num_splits, epoch, meter, evaluate(model, autocast, data.test))


if __name__ == "__main__":
    main()
