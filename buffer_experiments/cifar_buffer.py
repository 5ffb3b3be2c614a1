"""Asynchronous DGL on CIFAR-10, simulated (Section 5.3, "Decoupled Greedy Learning of CNNs", arXiv 1901.08164).

Each layer writes its outputs into a ring buffer, and reads its inputs from the buffer of the layer before it
(Algorithm 2). So no layer waits for another. Here, everything runs in one process: at each step, one random layer is
trained. A slower layer is one that is drawn less often. cifar_async.py does the same on parallel processes. sweep.py
runs grids of settings, and BufferCurves.ipynb draws them.

    python cifar_buffer.py --buffer 30 --noise 0.1 --layer_noise 3 --seed 0    # layer 3 (of 0 to 5) 1.11 times slower
    python cifar_buffer.py --seed 0                      # the layers take turns: synchronous DGL
    python cifar_buffer.py --buffer 30 --seed 0 --quantize 8,256               # compressed buffers
    python cifar_buffer.py --buffer 30 --seed 0 --data digits                  # handwritten digits, no download

Writes a log with one line per layer and epoch, and a checkpoint with all buffers to --resume from.
"""

import math

import utils

import torch
import torch.nn.functional as F
from tqdm import tqdm

import cifar
from models import add_flags, check_flags, check_memory, log_start, make_buffer, make_network

share = utils.at_least(0, float, below=1)


def parse_args(argv=None):
    parser = utils.ArgumentParser(__file__, __doc__)
    add_flags(parser, "layer")
    cifar.add_cuda_graph_flag(parser)
    add = parser.add_argument
    add("--buffer", type=utils.at_least(0), default=0, help="M, batches in a buffer; 0: one, and layers take turns")
    add("--noise", type=share, default=0.0, help="slow one layer down by 1 / (1 - noise) in random draws")
    add("--layer_noise", type=utils.at_least(0), default=0, help="which layer, from 0")
    add("--layer-sequence", choices=["random", "sequential"], default="random", help="sequential: layers take turns")
    parser.ignore("-j", "--workers", "--debug", "--debug_parameters", "--decay", "-r", "--avg_size", "--prog")
    args = parser.parse_args(argv)
    check_flags(parser, args)
    if args.layer_noise >= args.ncnn:
        parser.error(f"--layer_noise {args.layer_noise}: the {args.ncnn} layers are 0 to {args.ncnn - 1}")
    return args


def make_buffers(args, shapes, device):
    """A buffer after each layer but the last. A run that would not fit in memory ends here."""
    step = 6 * 4 * args.batch_size * max(math.prod(shape) for shape in shapes)  # an estimate: six outputs
    check_memory(args, [make_buffer(args, shape, "meta") for shape in shapes[:-1]], device, step)
    return [make_buffer(args, shape, device) for shape in shapes[:-1]]


class Stream:
    """An endless stream of training batches, whose state can be saved in the middle of a pass."""

    def __init__(self, batches):
        self.batches, self.position = batches, len(batches)

    def __next__(self):
        if self.position == len(self.batches):
            self.position, self.start, self.iterator = 0, self.batches.generator.get_state(), iter(self.batches)
        self.position += 1
        return next(self.iterator)

    def state_dict(self):
        return {"start": self.start, "position": self.position}

    def load_state_dict(self, state):
        """Draw the current pass again, and skip the batches that have been used."""
        self.start, self.position = state["start"], state["position"]
        self.batches.generator.set_state(self.start)
        self.iterator = iter(self.batches)
        for _ in range(self.position):
            next(self.iterator)


class Turns:
    """Whose turn it is: layers 0, 1, 2, ... again and again, or layers drawn at random with `weights`.

    Random draws start with 0, 0, 1, 1, 2, 2, ... to fill the buffers. `warm_up` repeats that.
    """

    BLOCK = 1000  # draws at a time

    def __init__(self, weights, sequential, seed):
        self.weights, self.sequential = torch.tensor(weights), sequential
        # --seed is below 2**31, so this generator differs from that of the data's order
        self.generator = torch.Generator().manual_seed(2**31 + seed)
        self.first, self.drawn = [], []
        self.warm_up()

    def warm_up(self):
        if not self.sequential:
            self.first = [n for n in range(len(self.weights)) for _ in range(2)]

    def __next__(self):
        if self.first:
            return self.first.pop(0)
        if not self.drawn:
            if self.sequential:
                self.drawn = [*range(len(self.weights))]
            else:
                self.drawn = torch.multinomial(self.weights, self.BLOCK, True, generator=self.generator).tolist()
        return self.drawn.pop(0)

    def state_dict(self):
        return {"generator": self.generator.get_state(), "first": self.first, "drawn": self.drawn}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])
        self.first, self.drawn = [*state["first"]], [*state["drawn"]]


class Simulation:
    """The network, and everything that trains it.

    `steps` counts the training steps of each layer. An epoch of a layer has as many steps as there are training
    batches. A layer is `done` after its last epoch: then it only feeds the next one.
    """

    def __init__(self, args, model, batches, device):
        self.args, self.model, self.epoch_steps = args, model, len(batches)
        self.modules = [*zip(model.blocks, model.auxiliary_nets)]
        self.optimizers = [cifar.sgd(parts, lr=args.lr, weight_decay=5e-4) for parts in self.modules]
        self.scalers = [cifar.grad_scaler(args, device) for _ in self.modules]
        self.autocast = utils.autocast(args, device)
        self.meters = [cifar.Meter(device) for _ in self.modules]
        self.buffers = make_buffers(args, model.shapes, device)
        self.stream = Stream(batches)
        weights = [1 - args.noise if n == args.layer_noise else 1.0 for n in range(len(self.modules))]
        self.turns = Turns(weights, args.buffer == 0 or args.layer_sequence == "sequential", args.seed)
        self.steps = [0] * len(self.modules)
        self.train_top1 = [0.0] * len(self.modules)

    def parts(self, n):
        """What a training step of layer n changes or needs."""
        return *self.modules[n], self.optimizers[n], self.scalers[n], self.autocast, self.meters[n]

    def done(self, n):
        return self.steps[n] == self.args.epochs * self.epoch_steps

    def state_dict(self):
        return {"steps": self.steps, "train_top1": self.train_top1}

    def load_state_dict(self, state):
        self.steps, self.train_top1 = [*state["steps"]], [*state["train_top1"]]


def train_epoch(simulation, epoch):
    """Asynchronous DGL (Algorithm 2), until every layer has done its epoch `epoch`, from 1. Others may be ahead."""
    steps, buffers, goal = simulation.steps, simulation.buffers, epoch * simulation.epoch_steps
    simulation.model.train()
    with tqdm(total=sum(max(0, goal - done) for done in steps), disable=None, leave=False) as bar:
        while min(steps) < goal:
            n = next(simulation.turns)
            if n == len(buffers) and simulation.done(n):
                continue
            batch = next(simulation.stream) if n == 0 else buffers[n - 1].sample()
            if batch is None:  # each has been used --max-buffer-reuse times: the layer skips its turn
                continue
            x, labels = batch
            trains = not simulation.done(n)
            representation = train_step(x, labels, *simulation.parts(n)) if trains else feed_step(simulation, n, x)
            if n < len(buffers):
                buffers[n].put(representation, labels)
            if trains:
                steps[n] += 1
                bar.update(steps[n] <= goal)
                if steps[n] % simulation.epoch_steps == 0:
                    end_epoch(simulation, n)


@cifar.CudaGraph
def train_step(x, labels, block, auxiliary_net, optimizer, scaler, autocast, meter):
    """Update a layer and its auxiliary network on a batch. Returns the layer's output."""
    with autocast:
        representation = block(x)
        logits = auxiliary_net(representation)
        loss = F.cross_entropy(logits, labels)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    meter.update(loss, logits, labels)
    return representation.detach()


@torch.no_grad()
def feed_step(simulation, n, x):
    """The output of layer n, which is done, for the next layer to train on."""
    block, _ = simulation.modules[n]
    block.eval()
    with simulation.autocast:
        return block(x)


def end_epoch(simulation, n):
    """After every --epochdecay epochs of layer n: a 5 times smaller learning rate, no momentum, first turns anew."""
    args, epochs_done = simulation.args, simulation.steps[n] // simulation.epoch_steps
    if not simulation.done(n) and epochs_done % args.epochdecay == 0:
        optimizer = simulation.optimizers[n]
        optimizer.param_groups[0]["lr"] = args.lr / 5 ** (epochs_done // args.epochdecay)
        for state in optimizer.state.values():
            state["momentum_buffer"].zero_()
        simulation.turns.warm_up()


@torch.no_grad()
def evaluate(model, autocast, batches, quantizers=None):
    """Top-1 accuracy in % of every layer, and of every ensemble of layers 0 to n, in one pass over the batches.

    An ensemble averages its layers' logits with weights 2^i / sum. With quantizers, one for each layer but the last, a
    layer's input is what it was trained on: the quantised output of the layer before.
    """
    model.eval()
    correct = torch.zeros(2, len(model.blocks), device=batches.device)
    for images, labels in batches:
        x, total = images, 0
        for n in range(len(model.blocks)):
            with autocast:
                logits, x = model(x, n)
            total = total + 2**n * logits.float()  # the division by the sum changes no prediction
            correct[0, n] += (logits.argmax(1) == labels).sum()
            correct[1, n] += (total.argmax(1) == labels).sum()
            if quantizers and n < len(quantizers):
                x = quantizers[n].decode(quantizers[n].encode(x))
    return (100 * correct / len(batches.labels)).tolist()


def slowdown(args):
    if args.noise and (args.buffer == 0 or args.layer_sequence == "sequential"):
        return "none; --noise has no effect while the layers take turns"
    return f"{1 / (1 - args.noise):.3f} of layer {args.layer_noise}"


def main(argv=None):
    args = parse_args(argv)
    device = utils.setup(args)
    data = cifar.load_data(args, device, drop_last=True)
    model = utils.to_device(make_network(args, data.num_classes), args, device)
    simulation = Simulation(args, model, data.train, device)
    parts = {name: getattr(simulation, name) for name in ("optimizers", "scalers", "buffers", "stream", "turns")}
    train_step.enabled = args.cuda_graph
    run = utils.Run(args, data, fixed=["epochs"], model=model, simulation=simulation, **parts)
    if run.epoch == 0:
        log_start(run, args, simulation.buffers, slowdown(args))
    for epoch in run.epochs(args.epochs):
        train_epoch(simulation, epoch)
        tested = evaluate(model, simulation.autocast, data.test)
        for n, (meter, top1, ensemble) in enumerate(zip(simulation.meters, *tested)):
            if meter.count:  # otherwise the layer was done before the last such line
                loss, simulation.train_top1[n] = meter.pop()
                run.check_finite(loss, n, epoch)
            epochtrue, train = simulation.steps[n] // simulation.epoch_steps, simulation.train_top1[n]
            ensemble = f",ense {ensemble:.2f}" if args.ensemble else ""
            run.log(f"n: {n}, epoch {epoch},epochtrue {epochtrue}, train {train:.2f}, test {top1:.2f}{ensemble}")
        if args.quantize:
            quantizers = [buffer.quantizer for buffer in simulation.buffers]
            top1, _ = evaluate(model, simulation.autocast, data.test, quantizers)
            run.log(f"epoch {epoch}, test on quantised inputs: {', '.join(f'{percent:.2f}' for percent in top1)}")
            errors = ", ".join(f"{quantizer.pop_error():.4f}" for quantizer in quantizers)
            run.log(f"epoch {epoch}, relative MSE of the quantised outputs: {errors}")


if __name__ == "__main__":
    main()
