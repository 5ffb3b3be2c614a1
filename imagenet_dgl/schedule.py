"""How far module-parallel DGL scales: its schedule computed from measured times of the modules, without the machines.

    python schedule.py                                        # efficientnet_v2_l cut into 1 to 64 modules, on a CPU
    python schedule.py --arch resnet152 --image-size 224 -b 256 --num-modules 1 2 4 8 16 --links 100

Measures the forward pass, and the backward pass with the step, of every module on this machine. From these it computes
what K such machines, joined by links of a given speed, would reach: with module-parallel DGL, as in module_parallel.py,
and with backprop in the pipelines GPipe and 1F1B, whose stages are the same blocks without auxiliary networks. Prints a
table and writes a picture. benchmark.py compares the computation with a real run.
"""

import argparse
import statistics
import time
from pathlib import Path

import utils

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import models
import training
from module_parallel import PRECISIONS, SLOTS, encode

BATCHES = 200  # computed for the long run
WARM_UP = 2  # steps that are not measured


def module_parallel(forward, backward, transfer, overhead=None, batches=None):
    """Seconds a batch of module-parallel DGL: in the long run, or of `batches` until all have been trained on.

    Args:
        forward, backward: seconds of each of the K modules, (K,) each; the step belongs to backward.
        transfer: seconds that the output of each module but the last one travels, (K - 1,).
        overhead: seconds in which each module cannot compute because of the transfers, (K,); none by default.
    """
    if batches is None:  # without the time in which the pipeline fills
        half, whole = (n * module_parallel(forward, backward, transfer, overhead, n) for n in (BATCHES // 2, BATCHES))
        return (whole - half) / (BATCHES - BATCHES // 2)
    last = len(forward) - 1
    arrived = [[0.0] * (last + 1) for _ in range(SLOTS)]  # of the latest SLOTS batches, at each module
    done = [[0.0] * (last + 1) for _ in range(SLOTS)]
    for _ in range(batches):
        now_arrived, now_done = [0.0] * (last + 1), [0.0] * (last + 1)
        for k in range(last + 1):
            end = max(done[-1][k], now_arrived[k]) + forward[k]
            if k < last:
                end = max(end, arrived[0][k + 1])  # SLOTS batches at most are being sent
                # The receiver has a free slot once it is done with an older batch; the link takes one at a time
                now_arrived[k + 1] = max(end, done[0][k + 1], arrived[-1][k + 1]) + transfer[k]
            now_done[k] = end + backward[k] + (overhead[k] if overhead else 0)
        arrived, done = [*arrived[1:], now_arrived], [*done[1:], now_done]
    return now_done[last] / batches


def pipeline(order, forward, backward, transfer, microbatches):
    """Seconds a batch of backprop in a pipeline that is empty between batches.

    Args:
        order: (stage, stages, microbatches) -> the stage's work as a list of ("F" or "B", microbatch); see GPIPE.
        forward, backward, transfer: as in `module_parallel`, of a whole batch; gradients take as long as outputs.
    """
    stages = len(forward)
    work = [list(reversed(order(k, stages, microbatches))) for k in range(stages)]
    end, free = {}, [0.0] * stages
    while any(work):
        for k in range(stages):
            while work[k]:
                kind, i = work[k][-1]
                before = k - 1 if kind == "F" else k + 1
                if 0 <= before < stages:
                    if (kind, i, before) not in end:
                        break
                    ready = end[kind, i, before] + transfer[min(k, before)] / microbatches
                else:
                    ready = end.get(("F", i, k), 0.0)
                work[k].pop()
                free[k] = max(free[k], ready) + (forward if kind == "F" else backward)[k] / microbatches
                end[kind, i, k] = free[k]
    return max(free)


def gpipe(stage, stages, microbatches):
    """All forward passes, then all backward passes (Huang et al. 2019, arXiv 1811.06965)."""
    return [("F", i) for i in range(microbatches)] + [("B", i) for i in range(microbatches)]


def one_f_one_b(stage, stages, microbatches):
    """Both passes in turn once the pipeline is full (Narayanan et al. 2019, arXiv 1806.03377)."""
    ahead = min(stages - 1 - stage, microbatches)
    work = [("F", i) for i in range(ahead)]
    for i in range(microbatches):
        work += [("F", i + ahead)] if i + ahead < microbatches else []
        work.append(("B", i))
    return work


def seconds(parts, x, labels, steps, before=lambda: None):
    """Of a module's forward pass, and of its backward pass and step: medians over `steps`.

    Args:
        parts: (block, auxiliary network), or (block,) in a backprop pipeline, which gets a gradient for its output.
        x: (B, ...), which gets a gradient if it requires one.
        before: called before each step.

    Returns:
        (forward, backward), output of the block
    """
    optimizer, spent = training.sgd([p for part in parts for p in part.parameters()], 0.01, 0.9, 1e-4), []
    for _ in range(WARM_UP + steps):
        before()
        begin = clock(x.device)
        representation = parts[0](x)
        if len(parts) == 2:
            root, gradient = F.cross_entropy(parts[1](representation), labels), None
        else:
            root, gradient = representation, representation.detach()
        middle = clock(x.device)
        optimizer.zero_grad()
        root.backward(gradient)
        optimizer.step()
        spent.append((middle - begin, clock(x.device) - middle))
    return [statistics.median(column) for column in zip(*spent[WARM_UP:])], representation.detach()


def clock(device):
    """Seconds, once the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def message_bytes(x, labels, precision):
    """Of what one module sends another one for a batch."""
    return sum(tensor.nbytes for tensor in [*encode(x, precision), labels])


def measure(modules, images, labels, steps, precision="fp32"):
    """Seconds and bytes a batch of every module: its block alone in a backprop pipeline, and with auxiliary network.

    Args:
        modules: K pairs (block, auxiliary network); they are trained.
        images, labels: (B, 3, s, s) and (B,), on the modules' device.
        precision: of what DGL's modules send.

    Returns:
        {"DGL": (forward, backward), "backprop": (forward, backward), and the bytes of all outputs but the last:
        "sent" by DGL, and as "outputs" in float32}
    """
    found, x = {"DGL": [], "backprop": [], "sent": [], "outputs": []}, images
    for n, parts in enumerate(modules):
        is_last = n == len(modules) - 1
        stage = x.detach().requires_grad_(n > 0)
        found["backprop"].append(seconds(parts if is_last else parts[:1], stage, labels, steps)[0])
        times, x = seconds(parts, x, labels, steps)
        found["DGL"].append(times)
        if not is_last:
            found["sent"].append(message_bytes(x, labels, precision))
            found["outputs"].append(x.nbytes)
    return found | {way: [list(column) for column in zip(*found[way])] for way in ("DGL", "backprop")}


def rates(measured, bytes_per_second, microbatches):
    """Batches a second in each way, from what `measure` returned."""
    sent, outputs = ([size / bytes_per_second for size in measured[what]] for what in ("sent", "outputs"))
    forward, backward = measured["DGL"]
    stages = [*measured["backprop"], outputs, microbatches]
    return {
        "DGL, heaviest module": 1 / max(f + b for f, b in zip(forward, backward)),
        "DGL, module-parallel": 1 / module_parallel(forward, backward, sent),
        "backprop, GPipe": 1 / pipeline(gpipe, *stages),
        "backprop, 1F1B": 1 / pipeline(one_f_one_b, *stages),
    }


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: utils.fail(f"{message} (see --help)")
    add, gigabits = parser.add_argument, utils.at_least(0, float, above=True)
    add("-a", "--arch", default="efficientnet_v2_l", help="efficientnet_v2_l, or another of torchvision's")
    counts = {"nargs": "+", "default": [1, 2, 4, 8, 16, 32, 64], "metavar": "K"}
    add("--num-modules", type=utils.at_least(1), **counts, help="modules, and machines: 1 2 4 8 16 32 64")
    add("-b", "--batch-size", type=utils.at_least(2), default=32, help="images in a batch: 32")
    add("--image-size", type=utils.at_least(16), default=64, metavar="PIXELS", help="side of the images: 64")
    add("--links", type=gigabits, nargs="+", default=[1, 10, 100], metavar="GBIT", help="Gbit/s of a link: 1 10 100")
    add("--send-precision", choices=PRECISIONS, default="fp32", help="of what DGL's modules send: fp32")
    add("--microbatches", type=utils.at_least(1), default=8, help="of GPipe and 1F1B: 8")
    add("--steps", type=utils.at_least(1), default=5, help="measured of each module: 5")
    add("--threads", type=utils.at_least(1), default=1, help="on a CPU: 1")
    add("--no-cuda", action="store_true", help="use the CPU even if there is a GPU")
    add("--picture", default="schedule.png", help="to write: schedule.png")
    args = parser.parse_args(argv)
    if not Path(args.picture).absolute().parent.is_dir():
        parser.error(f"--picture {args.picture}: there is no such folder")
    return args


def main(argv=None):
    args = parse_args(argv)
    args.seed, args.precision = 1, "fp32"
    device = utils.setup(args)
    size = args.batch_size, 3, args.image_size, args.image_size
    images = torch.randn(size).to(device, memory_format=torch.channels_last)
    labels = (torch.arange(args.batch_size) % 1000).to(device)
    ways = ("DGL, module-parallel", "backprop, GPipe", "backprop, 1F1B")
    print(f"{args.arch}, {args.batch_size} images of {args.image_size} pixels, {device.type}; images/s")
    print(f"| K | link, Gbit/s | heaviest module, ms | heaviest transfer, ms | bound | {' | '.join(ways)} |")
    print(f"|{'---|' * (5 + len(ways))}")
    table = {}
    for K in args.num_modules:
        try:
            model = models.decouple(models.build_plain(args.arch, 1000, args.image_size), K, 1000, args.image_size)
        except ValueError as error:
            utils.fail(error)
        model.to(device, memory_format=torch.channels_last)
        measured = measure([*zip(model.blocks, model.auxiliary_nets)], images, labels, args.steps, args.send_precision)
        for link in args.links:
            found = rates(measured, link * 1e9 / 8, args.microbatches)
            heaviest = 1e3 / found["DGL, heaviest module"]
            transfer = 1e3 * max(measured["sent"], default=0) / (link * 1e9 / 8)
            table[K, link] = {way: args.batch_size * rate for way, rate in found.items()}
            bound = "link" if transfer > heaviest else "module"
            figures = " | ".join(f"{table[K, link][way]:.1f}" for way in ways)
            print(f"| {K} | {link:g} | {heaviest:.1f} | {transfer:.1f} | {bound} | {figures} |", flush=True)
    draw(args, ways, table)


def draw(args, ways, table):
    figure, panels = plt.subplots(1, len(args.links), figsize=(4 * len(args.links), 4), sharey=True, squeeze=False)
    for panel, link in zip(panels[0], args.links):
        for way in ways:
            panel.plot(args.num_modules, [table[K, link][way] for K in args.num_modules], marker="o", label=way)
        panel.set(title=f"links of {link:g} Gbit/s", xlabel="modules (K)", xscale="log", yscale="log")
        panel.set_xticks(args.num_modules, [str(K) for K in args.num_modules], minor=False)
        panel.grid(True)
    panels[0][0].set(ylabel="images/s, computed")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(args.picture, dpi=100)
    print(f"picture: {args.picture}")


if __name__ == "__main__":
    main()
