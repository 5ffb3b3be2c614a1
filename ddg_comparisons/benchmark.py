"""Images/s and peak memory of parallel.py's four methods, one module a process (Section 5.3, arXiv 1901.08164).

    python benchmark.py                                   # ResNet-110, K = 2, on two CPU cores
    python benchmark.py --num_splits 4                    # on as many GPUs, or CPU cores
    python benchmark.py --link none 1gbit 100mbit         # also with slow links between the ranks: Linux, as root

Starts K ranks, which train the same network on the same random batch by all methods in turn, --rounds times. A figure
is the median. A round's speed is that of the last rank, without the first steps, in which the pipeline fills, and over
a multiple of K steps, as DDG's durations repeat after K at most. With --link, each rank has a network namespace, as if
on a machine of its own, and `tc` limits what it sends. Prints a table and writes a picture.
"""

import argparse
import contextlib
import itertools
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
import torch.multiprocessing as mp
from tqdm import tqdm

import links
import models
import parallel

os.environ["KINETO_LOG_LEVEL"] = "99"  # of the profiler, which measures memory


def link(text):
    return None if text == "none" else links.rate(text)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: utils.fail(f"{message} (see --help)")
    add = parser.add_argument
    add("--methods", nargs="+", choices=parallel.METHODS, default=[*parallel.METHODS], help="all four")
    add("--num_splits", type=utils.at_least(2), default=2, metavar="K", help="modules, and ranks: 2")
    add("--depth", type=utils.at_least(8), default=110, help="layers of the ResNet, 6n+2: 110")
    add("--batch-size", type=utils.at_least(2), default=128, help="images in a batch: 128")
    add("--steps", type=utils.at_least(1), default=8, help="measured in a round, then a multiple of K: 8")
    add("--rounds", type=utils.at_least(1), default=5, help="of which the median counts: 5")
    add("--threads", type=utils.at_least(1), default=1, help="of a rank on a CPU: 1")
    add("--link", nargs="+", type=link, default=[], metavar="RATE", help="none, or such as 1gbit 100mbit; as root")
    add("--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help="of the forward passes: fp32")
    add("--no-cuda", action="store_true", help="use the CPU even if there are GPUs")
    add("--picture", default="benchmark.png", help="to write: benchmark.png")
    parser.set_defaults(seed=0, compile=False, bn_init="ones")
    args = parser.parse_args(argv)
    if not Path(args.picture).absolute().parent.is_dir():
        parser.error(f"--picture {args.picture}: there is no such folder")
    try:
        models.cut(args.depth, args.num_splits)
    except ValueError as error:
        parser.error(error)
    args.cuda = torch.cuda.is_available() and not args.no_cuda
    if args.cuda and torch.cuda.device_count() < args.num_splits:
        parser.error(f"--num_splits {args.num_splits}: this machine has {torch.cuda.device_count()} GPUs; or --no-cuda")
    if args.link and (reason := links.why_not()):
        parser.error(f"--link needs Linux, root, and the commands ip, tc and unshare: {reason}")
    return args


class Rank:
    """What all methods share on a rank."""

    def __init__(self, args, rank):
        self.args, self.rank, self.last = args, rank, args.num_splits - 1
        self.device = torch.device("cuda", rank) if args.cuda else torch.device("cpu")
        images = torch.randn(args.batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        self.images = images.to(self.device, memory_format=torch.channels_last)
        self.labels = (torch.arange(args.batch_size) % 10).to(self.device)

    def module(self, method):
        args = argparse.Namespace(**{**vars(self.args), "method": method})
        torch.manual_seed(0)
        return parallel.Module(args, parallel.make_network(args, 10, self.device), self.device)

    def images_per_second(self, method, module):
        K = self.args.num_splits
        first, measured, marks = max(3, K), -(-self.args.steps // K) * K, []

        def marked(batches):
            for i, batch in enumerate(batches, start=1):
                yield batch
                if i in (first, first + measured):
                    marks.append(self.clock())

        dist.barrier()
        parallel.train_epoch(method, module, marked(self.batches(module, first + measured)))
        dist.barrier()
        return measured * self.args.batch_size / (marks[1] - marks[0])

    def batches(self, module, steps):
        if self.rank:
            return module.receive([self.labels] * steps)
        return ((self.images.clone(), self.labels) for _ in range(steps))

    def clock(self):
        if self.args.cuda:
            torch.cuda.current_stream().synchronize()  # not the streams that wait for the next batch's transfers
        return time.perf_counter()

    def peak_memory(self, method, module):
        """The most bytes that a new module has allocated at a time, beyond the network."""
        steps = self.args.num_splits + 1  # the delays are full then
        if self.args.cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            parallel.train_epoch(method, module, self.batches(module, steps))
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            parallel.train_epoch(method, module, self.batches(module, steps))
        events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
        sizes = (size for _, size in sorted((e.start_ns(), e.nbytes()) for e in events))  # negative: freed
        return max(itertools.accumulate(sizes))


def work(rank, args, folder, results):
    """A rank: all methods in turn, on each link. The last one puts the figures into `results`."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # also while waiting for another rank
    if not multiprocessing.parent_process().is_alive():  # whose end is not signalled to a rank that still imports
        return
    utils.setup(args)
    if args.link:
        links.join(dist.FileStore(f"{folder}/network"), rank, args.num_splits)
    if args.cuda:
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if args.cuda else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=args.num_splits)
    here, modules, memory, rates = Rank(args, rank), {}, {}, {}
    for method in args.methods:
        modules[method], memory[method] = here.module(method), [None] * args.num_splits
        dist.all_gather_object(memory[method], here.peak_memory(method, modules[method]))
    for rate in args.link or [None]:
        if args.link:
            links.limit(rate)
        turns = [*itertools.product(range(args.rounds), args.methods)]
        for _, method in tqdm(turns, f"link {rate or 'none'}", disable=True if rank else None, leave=False):
            rates.setdefault((rate, method), []).append(here.images_per_second(method, modules[method]))
    dist.destroy_process_group()
    if rank == here.last:
        results.put((rates, memory))


def main(argv=None):
    args = parse_args(argv)
    utils.on_interrupt("Interrupted.")
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")  # of a rank's end: tqdm's lock
    chip = torch.cuda.get_device_name() if args.cuda else f"CPU, {args.threads} threads a rank"
    print(f"ResNet-{args.depth}, K = {args.num_splits}, {args.batch_size} images, {chip}, torch {torch.__version__}")
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = mp.spawn(work, (args, folder, results), args.num_splits, join=False)
        try:
            while not ranks.join():
                pass
        finally:
            for process in ranks.processes:
                process.kill()
    rates, memory = results.get()
    print("| link | | images/s | lowest to highest | against DDG | peak MiB by rank |\n|---|---|---|---|---|---|")
    for (rate, method), values in rates.items():
        ratio = ""
        with contextlib.suppress(KeyError):
            ratio = f"{statistics.median(a / b for a, b in zip(values, rates[rate, 'ddg'])):.2f}"
        peaks = ", ".join(f"{peak / 2**20:.0f}" for peak in memory[method])
        spread = f"{min(values):.1f} to {max(values):.1f}"
        print(f"| {rate or 'none'} | {method} | {statistics.median(values):.1f} | {spread} | {ratio} | {peaks} |")
    draw(args, rates, memory)


def draw(args, rates, memory):
    figure, (speed, peak) = plt.subplots(1, 2, figsize=(10, 3.5), width_ratios=[2, 1], layout="constrained")
    limits, width = list(dict.fromkeys(rate for rate, _ in rates)), 0.8 / len(args.methods)
    for i, method in enumerate(args.methods):
        values = [rates[rate, method] for rate in limits]
        medians = [statistics.median(v) for v in values]
        errors = [[m - min(v) for m, v in zip(medians, values)], [max(v) - m for m, v in zip(medians, values)]]
        speed.bar([n + i * width for n in range(len(limits))], medians, width, yerr=errors, label=method)
        peak.bar([n + i * width for n in range(args.num_splits)], [b / 2**20 for b in memory[method]], width)
    middle = 0.4 - width / 2
    speed.set_xticks([n + middle for n in range(len(limits))], [rate or "no limit" for rate in limits])
    speed.set(title=f"ResNet-{args.depth}, K = {args.num_splits}", xlabel="link", ylabel="images/s")
    peak.set_xticks([n + middle for n in range(args.num_splits)], range(1, args.num_splits + 1))
    peak.set(xlabel="module", ylabel="peak MiB")
    figure.legend(*speed.get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(args.picture, dpi=100)
    print(f"picture: {args.picture}")


if __name__ == "__main__":
    main()
