"""Memory that backprop, DGL, DDG and FR hold for later backward passes (Section 5.3, arXiv 1901.08164).

    python memory.py                                      # ResNet-110, K = 2 and 4; a few minutes on a CPU
    python memory.py --depth 20 --num_splits 3 --no-cuda

Runs each script's train_epoch on random images until the delays are full, measures the next iteration, and prints a
Markdown table in MiB. Activations are what autograd saves (torch.autograd.graph.saved_tensors_hooks) and the inputs
that FR stores. Each storage counts once. Weights and running statistics do not count.
"""

import argparse
import importlib
import weakref

import utils

import torch
from torch.func import functional_call

import cifar
from models import DGLNet, ResNet, cut

SCRIPTS = {"backprop": "cifar_backprop", "DGL": "cifar_dgl", "DDG": "cifar_ddg", "FR": "cifar_features_replay"}
COLUMNS = ["activations, peak", "activations kept", "gradients kept", "copies of weights kept"]


def sizes(tensors):
    """{address: bytes} of the tensors' storages."""
    storages = [t.untyped_storage() for t in tensors if t is not None]
    return {s.data_ptr(): s.nbytes() for s in storages}


class Held:
    """A tensor that autograd saves. The object lives for as long as autograd needs it."""

    def __init__(self, tensor):
        self.tensor = tensor


class Activations:
    """Counts what autograd saves, with `pack` and `unpack` as saved_tensors_hooks, and what `waiting()` returns."""

    def __init__(self, waiting):
        self.waiting, self.weights, self.peak = waiting, set(), 0
        self.sizes, self.users = {}, {}

    def ignore(self, tensors):
        """Do not count these weights or running statistics for as long as they live."""
        for tensor in tensors:
            pointer = tensor.untyped_storage().data_ptr()
            self.weights.add(pointer)
            weakref.finalize(tensor, self.weights.discard, pointer)

    def pack(self, tensor):
        held = Held(tensor)
        ((pointer, size),) = sizes([tensor]).items()
        if pointer not in self.weights:
            self.sizes[pointer] = size
            self.users[pointer] = self.users.get(pointer, 0) + 1
            weakref.finalize(held, self.free, pointer)
            self.peak = max(self.peak, self.now())
        return held

    def unpack(self, held):
        return held.tensor

    def free(self, pointer):
        self.users[pointer] -= 1
        if not self.users[pointer]:
            del self.users[pointer], self.sizes[pointer]

    def now(self):
        return sum({**sizes(self.waiting()), **self.sizes}.values())


class RandomBatches:
    """`number` batches of the same random images. Calls `before` before each iteration and `after` after it."""

    def __init__(self, number, size, device, before, after):
        self.number, self.device, self.before, self.after = number, device, before, after
        self.images = torch.randn(size, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
        self.labels = torch.arange(size, device=device) % 10

    def __len__(self):
        return self.number

    def __iter__(self):
        for _ in range(self.number):
            self.before()
            yield self.images.clone(), self.labels  # a copy, because in training each batch has its own memory
            self.after()


def measure(method, depth, num_splits, batch_size, device):
    """Bytes in an iteration with full delays: COLUMNS; on a GPU also the peak allocation beyond the network."""
    script = importlib.import_module(SCRIPTS[method])
    model = (DGLNet if method == "DGL" else ResNet)(10, depth, num_splits)
    model.to(device, memory_format=torch.channels_last)
    autocast, scaler = torch.autocast(device.type, enabled=False), torch.amp.GradScaler(device.type, enabled=False)
    if method == "backprop":
        parts = [script.make_optimizer(model), scaler]
    else:
        parts = [script.make_optimizers(model), [scaler] * num_splits]
    meter = [cifar.Meter(device) for _ in range(num_splits)] if method == "DGL" else cifar.Meter(device)
    delays = {"DDG": lambda: script.Delays(model, autocast), "FR": lambda: script.Delays(model)}
    delays = [delays[method]()] if method in delays else []
    activations = Activations(lambda: [x for d in delays for inputs in getattr(d, "inputs", []) for x in inputs])
    activations.ignore([*model.parameters(), *model.buffers()])
    result = []

    def call(block, tensors, inputs):
        activations.ignore(tensors.values())  # copies of weights or of running statistics
        return functional_call(block, tensors, inputs)

    def before():
        activations.peak = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def after():
        gradients = [gradient for d in delays for gradient in d.gradients]
        graphs = [graph for d in delays for graphs in getattr(d, "graphs", []) for graph in graphs]
        copies = sizes(w for graph in graphs for w in graph.weights.values())
        kept = activations.now(), sum(sizes(gradients).values()), sum(copies.values())
        result[:] = [activations.peak, *kept]
        if device.type == "cuda":
            result.append(torch.cuda.max_memory_allocated() - start)

    start = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    batches = RandomBatches(num_splits + 1, batch_size, device, before, after)
    script.functional_call = call
    with torch.autograd.graph.saved_tensors_hooks(activations.pack, activations.unpack):
        script.train_epoch(model, *parts, autocast, batches, meter, *delays)
    script.functional_call = functional_call
    return result


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: utils.fail(f"{message} (see --help)")
    parser.add_argument("--num_splits", type=utils.at_least(1), nargs="+", default=[2, 4], help="modules (default 2 4)")
    parser.add_argument("--depth", type=utils.at_least(8), default=110, help="layers of the ResNet (default 110)")
    parser.add_argument("--batch-size", type=utils.at_least(2), default=128, help="images in a batch (default 128)")
    parser.add_argument("--no-cuda", action="store_true", help="use the CPU even if there is a GPU")
    args = parser.parse_args(argv)
    try:
        for num_splits in args.num_splits:
            cut(args.depth, num_splits)
    except ValueError as error:
        parser.error(error)
    return args


def main(argv=None):
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.no_cuda else "cpu")
    if device.type == "cuda":  # so that cuBLAS's workspaces are not the first row's
        torch.nn.Linear(8, 8, device=device)(torch.ones(8, 8, device=device)).sum().backward()
    columns = [*COLUMNS, *(["allocated, peak"] if device.type == "cuda" else [])]
    print(f"| MiB | K | {' | '.join(columns)} |\n|{'---|' * (2 + len(columns))}")
    for num_splits in args.num_splits:
        for method in SCRIPTS:
            row = measure(method, args.depth, num_splits, args.batch_size, device)
            print(f"| {method} | {num_splits} | {' | '.join(f'{size / 2**20:.1f}' for size in row)} |", flush=True)


if __name__ == "__main__":
    main()
