"""Module-parallel DGL and what one would use instead of it: images/s and peak memory, on one machine.

    python benchmark.py                                              # a small network, K = 2, on two CPU cores
    python benchmark.py --arch resnet50 --image-size 224 -b 256 --num-modules 2 4    # as many GPUs are needed
    python benchmark.py --link 1gbit 100mbit --send-precision fp32 int8    # as root: over slow links, too

Starts K ranks for each K. They train the same network on the same batches in all the ways of ways.py in turn, --rounds
times; a figure is the median. Peak memory has parameters and optimizer in it. A pipeline's microbatches are the fastest
of --microbatches. With --link, the ranks then train in network namespaces joined by links of that rate: module-parallel
DGL, DDP and 1F1B. "heaviest module" is what an ideal pipeline would reach: the rate of its slowest rank, measured while
all compute. "predicted" is what schedule.py computes from the modules' times and the speed of the link, with the median
of its errors in the rounds. Prints a table and writes a picture.
"""

import argparse
import contextlib
import functools
import gc
import itertools
import json
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path

import utils

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist

import links
import models
import schedule
import ways
from module_parallel import PRECISIONS

OVER_LINKS = ("DGL, module-parallel", "backprop, DDP", "backprop, 1F1B")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: utils.fail(f"{message} (see --help)")
    add = parser.add_argument
    add("-a", "--arch", default="cnn4", help="cnn4: four convolutions; or any of torchvision's")
    add("--num-modules", type=utils.at_least(2), nargs="+", default=[2], metavar="K", help="modules, and ranks: 2")
    add("-b", "--batch-size", type=utils.at_least(2), default=128, help="images in a batch, of all ranks: 128")
    add("--image-size", type=utils.at_least(16), default=32, metavar="PIXELS", help="side of the images: 32")
    add(
        "--balance",
        choices=["flops", "memory", "time"],
        nargs="+",
        default=["flops"],
        help="what is equal in modules; one or more: flops",
    )
    add(
        "--send-precision",
        choices=PRECISIONS,
        nargs="+",
        default=["fp32"],
        help="of what modules send; one or more: fp32",
    )
    add("--link", type=links.rate, nargs="+", default=[], metavar="RATE", help="such as 10gbit 1gbit 100mbit; as root")
    add("--ways", nargs="+", metavar="TEXT", help="only those with one of these in their name, such as DDP")
    add("--microbatches", type=utils.at_least(1), nargs="+", default=[2, 4, 8, 16], help="to search: 2 4 8 16")
    add(
        "--steps",
        type=utils.at_least(1),
        default=20,
        help="of module-parallel DGL in a round: 20; the others do a third",
    )
    add("--seconds", type=utils.at_least(0, float), default=10, help="a round of one way: 10, then fewer steps")
    add("--rounds", type=utils.at_least(1), default=5, help="of which the median counts: 5")
    add("--threads", type=utils.at_least(1), default=1, help="of a rank on a CPU: 1")
    add("--no-cuda", action="store_true", help="use the CPU even if there are GPUs")
    add("--picture", default="benchmark.png", help="to write: benchmark.png")
    parser.set_defaults(seed=0, precision="fp32")
    args = parser.parse_args(argv)
    args.cuda = torch.cuda.is_available() and not args.no_cuda
    if args.cuda and torch.cuda.device_count() < max(args.num_modules):
        parser.error(f"{max(args.num_modules)} modules need as many GPUs; this machine has {torch.cuda.device_count()}")
    args.microbatches = [count for count in args.microbatches if args.batch_size % count == 0]
    if not args.microbatches or any(args.batch_size % K for K in args.num_modules):
        parser.error(f"--batch-size {args.batch_size} cannot be shared out evenly")
    if not Path(args.picture).absolute().parent.is_dir():
        parser.error(f"--picture {args.picture}: there is no such folder")
    if not any(map(functools.partial(is_wanted, args), ways.all_ways(args))):
        parser.error(f"no way has any of {args.ways} in its name; they are: {', '.join(ways.all_ways(args))}")
    try:
        for num_modules in args.num_modules:
            network = ways.make_network(args)
            models.decouple(network, num_modules, ways.CLASSES, args.image_size)
    except ValueError as error:
        utils.fail(error)
    return args


def is_wanted(args, way):
    return not args.ways or any(text in way for text in args.ways)


class Bench:
    """What is measured with one K over one kind of link. Every rank has one; its methods are called on all at once.

    Args:
        link: the rate of the links, or None: the machine itself.

    Attributes:
        trainers: {way: its function that trains, or None on a rank that takes no part}
        memory: {way: bytes of each rank}
        notes: lines to print below the table
    """

    def __init__(self, args, num_modules, rank, link):
        self.args, self.link, self.here = args, link, ways.Rank(args, num_modules, rank)
        self.trainers, self.memory, self.notes = {}, {}, []
        for way, make in ways.all_ways(args).items():
            if is_wanted(args, way) and (link is None or way.startswith(OVER_LINKS)):
                self.add(way, make)

    def add(self, way, make):
        """Build a way, with the best number of microbatches, and measure its memory."""
        try:
            train = make(self.here)[0]
            if isinstance(train, ways.Pipeline):
                make = functools.partial(make, microbatches=self.fastest(train))
                way += f" ({make.keywords['microbatches']} microbatches)"
            del train
            self.trainers[way], peak = self.built(make)
        except ValueError as error:
            self.notes.append(f"{way}: left out, since {error}")
        else:
            self.memory[way] = self.gathered(peak)

    def fastest(self, pipeline):
        """The number of microbatches with which a pipeline trains fastest: the median of three short rounds."""
        found = {}
        for microbatches in 3 * self.args.microbatches:
            with contextlib.suppress(ValueError):  # a number that the schedule does not take
                pipeline.use(microbatches)
                pipeline(1)
                found.setdefault(microbatches, []).append(self.images_per_second(pipeline, 1))
        if not found:
            raise ValueError(f"it takes none of --microbatches {self.args.microbatches}")
        return self.from_rank_0(max(found, key=lambda n: statistics.median(found[n])))

    def run(self):
        """{way: images/s of each round}, and the same as predicted, for the module-parallel ways."""
        steps = {way: self.steps(train) for way, train in self.trainers.items()}
        parallel = {way: train for way, train in self.trainers.items() if hasattr(train, "pipeline")}
        places = {balance: self.place(balance) for balance in {train.balance: 0 for train in parallel.values()}}
        rates, computed = {way: [] for way in self.trainers}, {way: [] for way in parallel}
        for _ in range(self.args.rounds):
            for way, train in self.trainers.items():
                rates[way].append(self.images_per_second(train, steps[way]))
                if way in parallel:  # close in time
                    place = places[train.balance]
                    times = schedule.seconds(*place, self.here.labels, steps[way] // 2 + 1, dist.barrier)[0]
                    computed[way].append(self.gathered(times))
        predicted, rounds = {}, {balance: [] for balance in places}
        for way, train in parallel.items():
            rounds[train.balance] += computed[way]
            transfer, overhead = self.transfers(way, train, *places[train.balance])
            predicted[way] = [
                self.args.batch_size / schedule.module_parallel(*zip(*times), transfer, overhead, steps[way])
                for times in computed[way]
            ]
        for balance, measured in rounds.items():
            name = "DGL, heaviest module" + f", {balance}" * (len(rounds) > 1)
            rates[name] = [self.args.batch_size / max(map(sum, times)) for times in measured]
            modules = ", ".join(f"{1e3 * statistics.median(map(sum, module)):.1f}" for module in zip(*measured))
            self.notes.append(f"Modules balanced by {balance}: {modules} ms a batch, while all compute")
        return rates, predicted

    def steps(self, train):
        """Of a round: as many as --seconds permit, and --steps at most; a third of it without a pipeline that fills."""
        possible = self.args.seconds * self.images_per_second(train, 2) / self.args.batch_size
        most = self.args.steps if hasattr(train, "pipeline") else -(-self.args.steps // 3)
        return self.from_rank_0(max(1, min(most, round(possible))))

    def images_per_second(self, train, steps):
        dist.barrier()
        begin = schedule.clock(self.here.device)
        if train:
            train(steps)
        schedule.clock(self.here.device)
        dist.barrier()
        return steps * self.args.batch_size / (schedule.clock(self.here.device) - begin)

    @torch.no_grad()
    def place(self, balance):
        """This rank's module as (block, auxiliary network), and its input."""
        modules, x = [self.here.put(module) for module in self.here.modules(balance)], self.here.images
        for module in modules[: self.here.rank]:
            x = module.block(x)
        return (modules[self.here.rank].block, modules[self.here.rank].auxiliary_net), x

    def transfers(self, way, train, parts, x):
        """Seconds that each module's output travels (K - 1,), and in which each rank cannot compute for it (K,)."""
        with torch.no_grad():
            representation = parts[0](x)
        sizes = self.gathered(schedule.message_bytes(representation, self.here.labels, train.precision))[:-1]
        speed = self.bytes_per_second(max(sizes))
        transfer = [size / speed for size in sizes]
        overhead = self.gathered(self.overhead(train.pipeline, representation))
        self.notes.append(
            f"{way}: link of {8 * speed / 1e9:.3g} Gbit/s, {', '.join(f'{size / 2**20:.2f}' for size in sizes)} MiB "
            f"a batch take {', '.join(f'{1e3 * t:.1f}' for t in transfer)} ms, and keep the ranks busy for "
            f"{', '.join(f'{1e3 * t:.1f}' for t in overhead)} ms"
        )
        return transfer, overhead

    def bytes_per_second(self, size):
        """Of a message of `size` bytes from rank 0 to rank 1."""
        message, seconds = torch.zeros(size, dtype=torch.uint8, device=self.here.device), []
        for _ in range(7):
            dist.barrier()
            begin = schedule.clock(self.here.device)
            if self.here.rank < 2:
                (dist.recv if self.here.rank else dist.send)(message, 1 - self.here.rank)
            dist.barrier()  # a sender is done when the system has taken the message
            seconds.append(schedule.clock(self.here.device) - begin)
        return size / statistics.median(seconds[2:])

    def overhead(self, pipeline, representation, steps=5):
        """CPU seconds of this rank for what it receives and sends of a batch; on a GPU, others do it."""
        begin = time.process_time()
        for _, labels in self.here.batches(steps) if pipeline.is_first else pipeline.receive(steps):
            pipeline.send(representation, labels)
        pipeline.end_pass(steps)
        return 0.0 if self.args.cuda else (time.process_time() - begin) / steps

    def built(self, make):
        """A way's function that trains, and the most bytes that it has allocated at a time, network and all."""
        gc.collect()
        with contextlib.ExitStack() as stack:
            if self.args.cuda:
                unit = torch.ones(8, 8, device=self.here.device, requires_grad=True)
                (unit @ unit).sum().backward()  # cuBLAS's workspaces stay, and belong to no way
                before = torch.cuda.memory_allocated()
            else:
                cpu = [torch.profiler.ProfilerActivity.CPU]
                profiler = stack.enter_context(torch.profiler.profile(activities=cpu, profile_memory=True))
            train = make(self.here)[0]
            if not train:
                return None, 0
            train(1)  # so that there are gradients and momentum
            gc.collect()
            if self.args.cuda:
                torch.cuda.reset_peak_memory_stats()
            with torch.profiler.record_function("measured"):
                train(2)
        if self.args.cuda:
            return train, torch.cuda.max_memory_allocated() - before
        events = profiler.profiler.kineto_results.events()
        begin = next(e.start_ns() for e in events if e.name() == "measured")
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")  # negative: freed
        totals = itertools.accumulate(nbytes for _, nbytes in changes)
        return train, max(total for (when, _), total in zip(changes, totals) if when > begin)

    def gathered(self, thing):
        things = [None] * self.here.num_modules
        dist.all_gather_object(things, thing)
        return things

    def from_rank_0(self, thing):
        return self.gathered(thing)[0]


def work(rank, args, num_modules, link, folder):
    """A rank of one K and one link. Rank 0 writes what was found into the folder."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # also while waiting for another rank
    if not multiprocessing.parent_process().is_alive():  # whose end is not signalled to a rank that still imports
        return
    utils.setup(args)
    if args.cuda:
        torch.cuda.set_device(rank)
    store = dist.FileStore(f"{folder}/store", num_modules)
    if link:
        links.join(store, rank, num_modules)
        links.limit(link)
    backend = "cpu:gloo,cuda:nccl" if args.cuda else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=num_modules)
    bench = Bench(args, num_modules, rank, link)
    found = [*bench.run(), bench.memory, bench.notes]
    del bench  # torch 2.11 may hang if DDP outlives its process group
    dist.destroy_process_group()
    if rank == 0:
        Path(folder, "found").write_text(json.dumps(found))


def in_ranks(args, num_modules, link):
    """Start the ranks, and return what rank 0 found."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = torch.multiprocessing.spawn(work, (args, num_modules, link, folder), num_modules, join=False)
        try:
            while not ranks.join():
                pass
        finally:
            for process in ranks.processes:
                process.kill()
        return json.loads(Path(folder, "found").read_text())


def main(argv=None):
    args = parse_args(argv)
    utils.on_interrupt("Interrupted.")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is not to tell of its starts,
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")  # nor a rank's end of tqdm's lock
    if args.link and (reason := links.why_not()):
        print(f"--link: skipped, since this machine does not permit it ({reason})")
        args.link = []
    print(
        f"{args.arch}, {args.batch_size} images of {args.image_size} pixels, {args.threads} threads a rank, "
        f"{'CUDA' if args.cuda else 'CPU'}, torch {torch.__version__}"
    )
    print("| K | link | | images/s | lowest to highest | against DGL in one process | predicted | peak MiB by rank |")
    print(f"|{8 * '---|'}")
    table = {}
    for num_modules in args.num_modules:
        base, all_notes = 0, []
        for link in [None, *args.link]:
            rates, predicted, memory, notes = in_ranks(args, num_modules, link)
            base = base or statistics.median(rates.get("DGL, one process", [0]))
            table[num_modules, link] = {way: statistics.median(values) for way, values in rates.items()}
            for way, rate in table[num_modules, link].items():
                spread = f"{min(rates[way]):.3g} to {max(rates[way]):.3g}"
                computed = ""
                if way in predicted:
                    errors = [100 * (p / m - 1) for p, m in zip(predicted[way], rates[way])]
                    computed = f"{statistics.median(predicted[way]):.3g} ({statistics.median(errors):+.1f} %: "
                    computed += f"{min(errors):+.1f} to {max(errors):+.1f})"
                peaks = ", ".join(f"{peak / 2**20:.0f}" for peak in memory.get(way, []) if peak)
                against = f"{rate / base:.2f}" if base else ""
                row = num_modules, link or "", way, f"{rate:.3g}", spread, against, computed, peaks
                print(f"| {' | '.join(map(str, row))} |", flush=True)
            all_notes += [f"{link}: {note}" if link else note for note in notes]
        print("", *all_notes, "", sep="\n")
    draw(args, table)


def draw(args, table):
    figure, panels = plt.subplots(1, len(table), figsize=(6 * len(table), 4), squeeze=False)
    for panel, ((K, link), rates) in zip(panels[0], table.items()):
        panel.barh([*rates], [*rates.values()])
        panel.invert_yaxis()
        panel.set(title=f"{args.arch}, K = {K}" + (f", {link} links" if link else ""), xlabel="images/s")
    figure.tight_layout()
    figure.savefig(args.picture, dpi=100)
    print(f"picture: {args.picture}")


if __name__ == "__main__":
    main()
