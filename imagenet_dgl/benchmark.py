"""Module-parallel DGL against one process, data-parallel and pipelined backprop: images/s and peak memory.

    python benchmark.py                                              # a small network, K = 2, on two CPU cores
    python benchmark.py --arch resnet50 --image-size 224 -b 256 --num-modules 2 4    # as many GPUs are needed

Starts K ranks for each K. They train the same network on the same batch in all ways in turn, --rounds times; a figure
is the median. The ways are imagenet_dgl.py's and imagenet.py's own train_epoch, and torch.distributed.pipelining's
GPipe and 1F1B, whose stages are DGL's blocks without auxiliary networks. Prints a table and writes a picture.
"heaviest module" is what an ideal pipeline would reach: the rate of its slowest rank, alone on the machine. "predicted"
is what schedule.py computes from the modules' times and the speed of the link.
"""

import argparse
import contextlib
import itertools
import statistics
import tempfile
import time

import utils

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

import imagenet
import imagenet_dgl
import models
import schedule
import training
from module_parallel import ModuleParallel

CLASSES, WARM_UP = 10, 3  # classes; steps that are not measured


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: utils.fail(f"{message} (see --help)")
    add = parser.add_argument
    add("-a", "--arch", default="cnn4", help="cnn4: four convolutions; or any of torchvision's")
    add("--num-modules", type=utils.at_least(2), nargs="+", default=[2], metavar="K", help="modules, and ranks: 2")
    add("-b", "--batch-size", type=utils.at_least(2), default=128, help="images in a batch, of all ranks: 128")
    add("--image-size", type=utils.at_least(16), default=32, metavar="PIXELS", help="32")
    add("--microbatches", type=utils.at_least(1), default=8, help="of GPipe and 1F1B: 8")
    add("--steps", type=utils.at_least(1), default=20, help="measured in a round: 20")
    add("--rounds", type=utils.at_least(1), default=3, help="3")
    add("--threads", type=utils.at_least(1), default=1, help="of a rank on a CPU: 1")
    add("--no-cuda", action="store_true", help="use the CPU even if there are GPUs")
    add("--picture", default="benchmark.png", help="benchmark.png")
    parser.set_defaults(seed=0, precision="fp32")
    args = parser.parse_args(argv)
    args.cuda = torch.cuda.is_available() and not args.no_cuda
    if args.cuda and torch.cuda.device_count() < max(args.num_modules):
        parser.error(f"{max(args.num_modules)} modules need as many GPUs; this machine has {torch.cuda.device_count()}")
    if args.batch_size % args.microbatches or any(args.batch_size % K for K in args.num_modules):
        parser.error(f"--batch-size {args.batch_size} cannot be shared out to ranks or microbatches evenly")
    return args


def make_network(args):
    torch.manual_seed(0)
    if args.arch != "cnn4":
        return models.build_plain(args.arch, CLASSES, args.image_size)
    layers, widths = [], [3, 64, 128, 128, 256]
    for n, (channels, out) in enumerate(itertools.pairwise(widths)):
        pool = [nn.MaxPool2d(2)] if n in (1, 2) else []
        layers += [*pool, nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * widths[-1], CLASSES))


class Nothing:
    """A meter that measures nothing."""

    def update(self, *_):
        pass


class Rank:
    """What all ways of training share on a rank."""

    def __init__(self, args, num_modules, rank):
        self.args, self.num_modules, self.rank = args, num_modules, rank
        self.device = torch.device("cuda", rank) if args.cuda else torch.device("cpu")
        generator = torch.Generator().manual_seed(0)
        size = args.batch_size, 3, args.image_size, args.image_size
        self.images = self.put(torch.randn(size, generator=generator))
        self.labels = (torch.arange(args.batch_size) % CLASSES).to(self.device)
        self.autocast = contextlib.nullcontext()
        self.scaler = torch.amp.GradScaler(enabled=False)

    def put(self, thing):
        return thing.to(self.device, memory_format=torch.channels_last)

    def batches(self, steps, share=slice(None)):
        return itertools.repeat((self.images[share], self.labels[share]), steps)

    def sgd(self, module):
        return training.sgd(module.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def modules(self):
        model = models.decouple(make_network(self.args), self.num_modules, CLASSES, self.args.image_size)
        return [
            self.put(imagenet_dgl.Module(*parts, n)) for n, parts in enumerate(zip(model.blocks, model.auxiliary_nets))
        ]

    def train_modules(self, modules, pipeline=None):
        """A function that trains the modules for a number of steps."""
        optimizers = [self.sgd(module) for module in modules]
        extra = [self.scaler] * len(modules), self.autocast
        meters = [Nothing()] * len(modules)

        def train(steps):
            batches = pipeline.receive(steps) if pipeline and not pipeline.is_first else self.batches(steps)
            imagenet_dgl.train_epoch(modules, optimizers, *extra, batches, meters, pipeline)
            if pipeline:
                pipeline.end_pass(steps)

        return train

    def train_network(self, network, share=slice(None)):
        optimizer = self.sgd(network)

        def train(steps):
            batches = self.batches(steps, share)
            imagenet.train_epoch(network, optimizer, self.scaler, self.autocast, batches, Nothing())

        return train

    # The ways: each returns a function that trains for a number of steps, or None on a rank that does not take part

    def dgl_in_one_process(self):
        return None if self.rank else self.train_modules(self.modules())

    def backprop_in_one_process(self):
        return None if self.rank else self.train_network(self.put(make_network(self.args)))

    def dgl_module_parallel(self):
        pipeline = ModuleParallel(self.num_modules, self.device, self.args.batch_size)
        return self.train_modules([self.modules()[pipeline.n]], pipeline)

    def backprop_ddp(self):
        network = nn.parallel.DistributedDataParallel(self.put(make_network(self.args)))
        return self.train_network(network, slice(self.rank, None, self.num_modules))

    def backprop_gpipe(self):
        return self.pipelined(ScheduleGPipe)

    def backprop_1f1b(self):
        return self.pipelined(Schedule1F1B)

    def pipelined(self, kind):
        """torch.distributed.pipelining; its stages exchange contiguous tensors, and compute in channels_last inside."""
        block, is_last = self.modules()[self.rank], self.rank == self.num_modules - 1
        layers = [block.block, block.auxiliary_net] if is_last else [block.block]
        network = self.put(Stage(layers))
        stage = PipelineStage(network, self.rank, self.num_modules, self.device)
        runner = kind(stage, self.args.microbatches, loss_fn=F.cross_entropy)
        optimizer = self.sgd(network)

        def train(steps):
            network.train()
            for _ in range(steps):
                optimizer.zero_grad()
                if self.rank == 0:
                    runner.step(self.images.contiguous())
                elif is_last:
                    runner.step(target=self.labels)
                else:
                    runner.step()
                optimizer.step()

        return train

    # Measurements

    def bytes_per_second(self, size):
        """Of a message of `size` bytes from rank 0 to rank 1."""
        message, seconds = torch.zeros(size, dtype=torch.uint8, device=self.device), []
        for _ in range(WARM_UP + 5):
            dist.barrier()
            begin = self.clock()
            if self.rank < 2:
                (dist.recv if self.rank else dist.send)(message, 1 - self.rank)
            seconds.append(self.clock() - begin)
        return size / statistics.median(seconds[WARM_UP:])

    def clock(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def images_per_second(self, train):
        dist.barrier()
        begin = self.clock()
        if train:
            train(self.args.steps)
        self.clock()
        dist.barrier()
        return self.args.steps * self.args.batch_size / (self.clock() - begin)

    def peak_memory(self, train):
        """The most bytes that training has allocated at a time, beyond network and optimizer."""
        if not train:
            return 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            train(WARM_UP)
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            train(WARM_UP)
        events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
        sizes = (size for _, size in sorted((e.start_ns(), e.nbytes()) for e in events))  # negative: freed
        return max(itertools.accumulate(sizes), default=0)


WAYS = {
    "DGL, one process": Rank.dgl_in_one_process,
    "DGL, module-parallel": Rank.dgl_module_parallel,
    "backprop, one process": Rank.backprop_in_one_process,
    "backprop, DDP": Rank.backprop_ddp,
    "backprop, GPipe": Rank.backprop_gpipe,
    "backprop, 1F1B": Rank.backprop_1f1b,
}


class Stage(nn.Sequential):
    """Layers between contiguous tensors and gradients, as torch.distributed.pipelining sends them."""

    def __init__(self, layers):
        super().__init__(*layers)

    def forward(self, x):
        if x.requires_grad:
            x.register_hook(torch.Tensor.contiguous)
        return super().forward(x.contiguous(memory_format=torch.channels_last)).contiguous()


def work(rank, args, num_modules, store, results):
    """A rank of one K: all ways in turn. Rank 0 puts the figures into `results`."""
    utils.setup(args)
    if args.cuda:
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if args.cuda else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=num_modules)
    here = Rank(args, num_modules, rank)
    trainers = {way: make(here) for way, make in WAYS.items()}
    for train in filter(None, trainers.values()):
        train(WARM_UP)
    rates, measured = {way: [] for way in WAYS}, []
    for _ in range(args.rounds):
        for way, train in trainers.items():
            rates[way].append(here.images_per_second(train))
        if rank == 0:  # alone on the machine, but close in time
            pairs = [(module.block, module.auxiliary_net) for module in here.modules()]
            measured.append(schedule.measure(pairs, here.images, here.labels, args.steps))
    size = [max(measured[0]["bytes"]) if rank == 0 else None]
    dist.broadcast_object_list(size)
    link = here.bytes_per_second(size[0])
    memory = {}
    for way, train in trainers.items():
        memory[way] = [None] * num_modules
        dist.all_gather_object(memory[way], here.peak_memory(train))
    dist.destroy_process_group()
    if rank == 0:
        busy = 0.0 if args.cuda else 1.0  # a CPU's transfers run on the cores that compute
        computed = [schedule.rates(m, link, busy, args.microbatches) for m in measured]
        modules = [[sum(times) for times in zip(*m["DGL"])] for m in measured]
        results.put((rates, memory, computed, modules, size[0] / link, link))


def main(argv=None):
    args = parse_args(argv)
    print(
        f"{args.arch}, {args.batch_size} images of {args.image_size} pixels, {args.threads} threads a rank, "
        f"{'CUDA' if args.cuda else 'CPU'}, torch {torch.__version__}"
    )
    print("| K | | images/s | lowest to highest | against DGL in one process | peak MiB by rank |")
    print("|---|---|---|---|---|---|")
    table = {}
    for num_modules in args.num_modules:
        context = mp.get_context("spawn")
        results = context.SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            ranks = mp.spawn(work, (args, num_modules, f"{folder}/store", results), num_modules, join=False)
            while not ranks.join():
                pass
        rates, memory, computed, modules, transfer, link = results.get()
        for way in ("DGL, heaviest module", "DGL, module-parallel"):
            name = "DGL, module-parallel, predicted" if "parallel" in way else way
            rates[name] = [args.batch_size * found[way] for found in computed]
        base = statistics.median(rates["DGL, one process"])
        for way, values in rates.items():
            table[num_modules, way] = rate = statistics.median(values)
            spread = f"{min(values):.0f} to {max(values):.0f}"
            peaks = ", ".join(f"{peak / 2**20:.0f}" for peak in memory.get(way, []) if peak)
            print(f"| {num_modules} | {way} | {rate:.0f} | {spread} | {rate / base:.2f} | {peaks} |", flush=True)
        times = ", ".join(f"{1e3 * statistics.median(seconds):.1f}" for seconds in zip(*modules))
        print(f"\nModules, alone on the machine: {times} ms a batch")
        print(f"Link: {link / 1e9:.2f} GB/s; the largest representation takes {1e3 * transfer:.1f} ms\n")
    draw(args, table)


def draw(args, table):
    ways = list(dict.fromkeys(way for _, way in table))
    figure, panels = plt.subplots(1, len(args.num_modules), figsize=(6 * len(args.num_modules), 4), squeeze=False)
    for panel, K in zip(panels[0], args.num_modules):
        panel.barh(ways, [table[K, way] for way in ways])
        panel.invert_yaxis()
        panel.set(title=f"{args.arch}, K = {K}", xlabel="images/s")
    figure.tight_layout()
    figure.savefig(args.picture, dpi=100)
    print(f"picture: {args.picture}")


if __name__ == "__main__":
    main()
