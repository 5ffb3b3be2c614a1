"""Speed and memory of every script's training step, against this machine's own peak.

    python tests/benchmark.py            # all rows; a CPU may need half an hour
    python tests/benchmark.py --rows DGL "auxiliary_nets_study: ResNet" --threads 1
    python tests/benchmark.py --precision bf16    # on a GPU, with CUDA graphs; --no-cuda-graph: without
    python tests/benchmark.py --rows DGL --profile             # and which kernels the time goes into

A row is the median over passes of the script's own train_epoch, data preparation included, at batch 128. GFLOP/s counts
convolutions and matrix products (torch.utils.flop_counter); its share is of the largest rate at which this machine
multiplies matrices in this precision, measured before and after every row. Peak memory is the most that a
training pass has allocated at a time beyond network, optimizer and data, without CUDA graphs (on a CPU as
torch.profiler counts it).

A new script adds its rows to `rows`.
"""

import argparse
import contextlib
import itertools
import statistics
import sys
import time
import traceback

import torch
import torch.nn.functional as F
import torchvision.transforms as T
from conftest import load
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

BATCH, PASSES = 128, 5
STEPS = []  # the scripts' steps that a CUDA graph can replay, or None


class Context:
    """What the scripts' mains make, for one script: device, network, optimizers, random images."""

    def __init__(self, folder, script, args, flags=()):
        self.script = load(folder, script)
        self.cifar, self.utils = sys.modules["cifar"], sys.modules["utils"]
        if args.layout == "contiguous":
            self.use_default_layout()
        STEPS.extend(getattr(self.script, name, None) for name in ("train_step", "test_step"))
        flags = ["--batch-size", str(BATCH), "--precision", args.precision, *flags]
        flags += ["--no-cuda"] if args.no_cuda else []
        self.args = self.script.parse_args(flags)
        self.device = self.utils.setup(self.args)
        self.autocast = self.utils.autocast(self.args, self.device)
        size = BATCH * args.batches
        images, labels = torch.randint(256, (size, 32, 32, 3), dtype=torch.uint8), torch.arange(size) % 10
        self.train = self.cifar.Batches(images, labels, BATCH, self.device, torch.Generator())
        self.test = self.cifar.Batches(images, labels, 256, self.device)

    def use_default_layout(self):
        """Images and network as torch makes them, not in channels_last."""
        to_device, batches = self.utils.to_device, self.cifar.Batches.__iter__

        def contiguous_network(model, *arguments):
            return to_device(model, *arguments).to(memory_format=torch.contiguous_format)

        def contiguous_images(self):
            for images, labels in batches(self):
                yield images.contiguous(), labels

        self.utils.to_device, self.cifar.Batches.__iter__ = contiguous_network, contiguous_images

    def network(self, model):
        """Put the network on the device and make an optimizer, a scaler and a meter for each module."""
        self.model = self.utils.to_device(model, self.args, self.device)
        self.optimizers = [self.cifar.sgd(parts, 0.01, 5e-4) for parts in zip(model.blocks, model.auxiliary_nets)]
        self.scalers = [self.cifar.grad_scaler(self.args, self.device) for _ in self.optimizers]
        self.meters = [self.cifar.Meter(self.device) for _ in self.optimizers]


class PILImages(Dataset):
    """The same images as PIL images with torchvision's transforms, one at a time: the usual input pipeline."""

    def __init__(self, images):
        self.images = [Image.fromarray(image.numpy()) for image in images]
        self.transform = T.Compose(
            [
                T.RandomCrop(32, padding=4),
                T.RandomHorizontalFlip(),
                T.ToTensor(),
                T.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
            ]
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), i % 10


def learning_curves(args):
    c = Context("learning_curves", "cifar_dgl", args)
    c.network(c.script.DGLNet(10))
    everything = c.cifar.sgd([*c.model.blocks, c.model.auxiliary_nets[-1]], 0.01, 5e-4)
    sequential = load("learning_curves", "cifar_sequential_greedy")
    STEPS.append(getattr(sequential, "train_step", None))
    last = len(c.optimizers) - 1

    def dgl(batches=c.train):
        c.script.train_epoch(c.model, c.optimizers, c.scalers, c.autocast, batches, c.meters)

    def greedy(n):
        sequential.train_epoch(c.model, n, c.optimizers[n], c.scalers[n], c.autocast, c.train, c.meters[n])

    yield "DGL", dgl, lambda: c.script.evaluate(c.model, c.autocast, c.test)
    for n in range(last + 1):
        yield (
            f"sequential greedy, layer {n + 1}",
            lambda n=n: greedy(n),
            lambda n=n: sequential.evaluate(c.model, n, c.autocast, c.test),
        )

    def step(optimizer, logits, labels):
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()

    def backprop():
        c.model.train()
        for images, labels in c.train:
            with c.autocast:
                logits, _ = c.model(images, last, upto=True)
            step(everything, logits, labels)

    yield (
        "backprop, last auxiliary network only",
        backprop,
        lambda: sequential.evaluate(c.model, last, c.autocast, c.test),
    )

    def parts_of_layer_4():
        for images, labels in c.train:
            with torch.no_grad(), c.autocast:
                x = images
                for block in c.model.eval().blocks[:last]:
                    x = block(x)
            with c.autocast:
                logits, _ = c.model.train()(x, last)
            step(c.optimizers[last], logits, labels)

    yield "forward of layers 1-3 + DGL's step of layer 4", parts_of_layer_4, None
    # Last, because it changes the memory format. A graph's would stay as it was.
    if c.device.type == "cuda" and not args.no_cuda_graph:
        return
    c.use_default_layout()
    c.network(c.model)
    pil = PILImages(c.test.images.cpu())
    loader = DataLoader(pil, BATCH, shuffle=True, num_workers=4, persistent_workers=True)

    def usual():
        dgl((x.to(c.device), y.to(c.device)) for x, y in loader)

    yield "DGL, default layout, DataLoader with 4 workers and PIL", usual, None


def dni_comparisons(args):
    for name, flags in (("backprop", []), ("DNI", ["--dni"]), ("cDNI", ["--dni", "--context"])):
        c = Context("dni_comparisons", "cifar_cnn_dni", args, flags)
        c.model = c.utils.to_device(c.script.CNN(10, c.args.dni, c.args.context), c.args, c.device)
        parts = c.script.make_optimizer(c.model, c.args.sgd), c.cifar.grad_scaler(c.args, c.device), c.autocast
        meter, context_dim = c.cifar.Meter(c.device), 10 if c.args.context else None
        yield (
            f"dni_comparisons: {name}",
            lambda c=c, parts=parts, meter=meter, n=context_dim: c.script.train_epoch(
                c.model, *parts, c.train, meter, n
            ),
            lambda c=c: c.script.evaluate(c.model, c.autocast, c.test),
        )
    c = Context("dni_comparisons", "cifar_dgl", args)
    c.model = c.utils.to_device(c.script.DGLNet(10), c.args, c.device)
    modules = list(zip(c.model.blocks, c.model.auxiliary_nets))
    optimizers = [c.script.make_optimizer(*module) for module in modules]
    scalers, meter = [c.cifar.grad_scaler(c.args, c.device) for _ in modules], c.cifar.Meter(c.device)
    yield (
        "dni_comparisons: DGL",
        lambda: c.script.train_epoch(c.model, optimizers, scalers, c.autocast, c.train, meter),
        lambda: c.script.evaluate(c.model, c.autocast, c.test),
    )


def auxiliary_nets_study(args):
    for type_aux in ("mlp-sr", "mlp", "cnn"):
        c = Context("auxiliary_nets_study", "cifar_dgl", args)
        c.network(c.script.DGLNet(10, type_aux))
        yield (
            f"auxiliary_nets_study: {type_aux}",
            lambda c=c: c.script.train_epoch(c.model, c.optimizers, c.scalers, c.autocast, c.train, c.meters),
            lambda c=c: c.script.evaluate(c.model, c.autocast, c.test),
        )
    methods = ["checkpoint", "dgl", "predsim", "infopro", "infopro contrast", "auglocal", "man", "man-bias"]
    for name, modules in [("backprop", 1), *((method, K) for K in (4, 16) for method in methods)]:
        method, _, contrast = name.partition(" ")
        flags = ["--method", method, "--num-modules", f"{modules}", *(["--infopro-loss", contrast] if contrast else [])]
        c = Context("auxiliary_nets_study", "cifar_resnet", args, flags)
        c.model, *parts, meters = c.script.make_parts(c.args, 10, c.device)
        yield (
            f"auxiliary_nets_study: ResNet-32, {name}, K = {modules}",
            lambda c=c, parts=parts, meters=meters: c.script.train_epoch(c.model, *parts, c.train, meters),
            lambda c=c, parts=parts: c.script.evaluate(c.model, parts[-1], c.test),
        )


def ddg_comparisons(args):
    """ResNet-110. DDG's graphs that wait from pass to pass are not in its peak memory: see memory.py there."""
    scripts = {"DGL": "cifar_dgl", "DDG": "cifar_ddg", "FR": "cifar_features_replay"}
    rows = [("backprop", "cifar_backprop", 2), *((*item, K) for K in (2, 4) for item in scripts.items())]
    for name, script, modules in rows:
        c = Context("ddg_comparisons", script, args, ["--num_splits", f"{modules}"])
        network = c.script.DGLNet if name == "DGL" else c.script.ResNet
        c.model = c.utils.to_device(network(10, c.args.depth, modules), c.args, c.device)
        scalers = [c.cifar.grad_scaler(c.args, c.device) for _ in range(modules)]
        meters = [c.cifar.Meter(c.device) for _ in range(modules)]
        if name == "backprop":
            parts = [c.script.make_optimizer(c.model), scalers[0]]
        else:
            parts = [c.script.make_optimizers(c.model), scalers]
        delays = {
            "DDG": lambda c=c: [c.script.Delays(c.model, c.autocast)],
            "FR": lambda c=c: [c.script.Delays(c.model)],
        }
        parts += [c.autocast, c.train, meters if name == "DGL" else meters[0], *delays.get(name, list)()]
        yield (
            f"ddg_comparisons: {name}" + f", K = {modules}" * (name != "backprop"),
            lambda c=c, parts=parts: c.script.train_epoch(c.model, *parts),
            lambda c=c: c.script.evaluate(c.model, c.autocast, c.test),
        )


def buffer_experiments(args):
    """A row of 128 images is a step of each of the six layers. The buffers' own cost is a row of its own."""
    endless = ["--seed", "0", "--buffer", "2", "--layer-sequence", "sequential", "--nepochs", "999"]
    for name, flags in (("", []), (", --quantize 8,256", ["--quantize", "8,256"])):
        c = Context("buffer_experiments", "cifar_buffer", args, [*endless, "--epochdecay", "999", *flags])
        c.model = c.utils.to_device(c.script.make_network(c.args, 10), c.args, c.device)
        simulation, epochs = c.script.Simulation(c.args, c.model, c.train, c.device), itertools.count(1)
        outputs = [torch.randn(BATCH, *shape, device=c.device) for shape in c.model.shapes[:-1]]
        outputs = [x.to(memory_format=torch.channels_last) for x in outputs]
        labels = torch.zeros(BATCH, dtype=torch.long, device=c.device)

        def turns(c=c, simulation=simulation, epochs=epochs):
            c.script.train_epoch(simulation, next(epochs))

        def buffers(c=c, simulation=simulation, outputs=outputs, labels=labels):
            for _ in range(len(c.train)):
                for buffer, output in zip(simulation.buffers, outputs):
                    buffer.put(output, labels)
                    buffer.sample()

        yield (
            f"buffer_experiments: simulation{name}",
            turns,
            lambda c=c: c.script.evaluate(c.model, c.autocast, c.test),
        )
        yield f"buffer_experiments: the buffers of it alone{name}", buffers, None


def rows(args):
    """(name, one training pass, one evaluation pass or None) of each of --rows, over --batches batches."""
    for folder in (learning_curves, dni_comparisons, auxiliary_nets_study, ddg_comparisons, buffer_experiments):
        prefix = "" if folder is learning_curves else f"{folder.__name__}: "
        if any(prefix.startswith(name) or name.startswith(prefix) for name in args.rows):
            yield from (row for row in folder(args) if row[0].startswith(tuple(args.rows)))


def seconds(work, device, passes=PASSES):
    """Median time of `work`, after one call to warm up; with no passes, that call's."""
    times = []
    for _ in range(passes + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times)


def switch_graphs(on):
    """Switch the replay of steps on or off, and free what has been captured."""
    for step in filter(None, STEPS):
        step.enabled = on
        step.captures.clear()


def matrix_product_rates(device, dtype):
    """FLOP/s of the product of two large matrices, best of 10 (GPU: 3): by torch.mm, and by a 1x1 convolution.

    The first is the BLAS's rate, the second, the convolutions' library's, may be twice that (MKL on AMD processors).
    """
    size, best_of = (8192, 3) if device.type == "cuda" else (2048, 10)
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    image = matrix.view(1, size, size // 32, 32).to(memory_format=torch.channels_last)
    weight = matrix.view(size, size, 1, 1).to(memory_format=torch.channels_last)
    works = (lambda: torch.mm(matrix, matrix)), (lambda: F.conv2d(image, weight))
    return [2 * size**3 / min(seconds(work, device, 1) for _ in range(best_of)) for work in works]


def peak_memory(work, device):
    """The most that `work` has allocated at a time, in MiB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    sizes = (size for _, size in sorted((e.start_ns(), e.nbytes()) for e in events))  # negative: freed
    return max(itertools.accumulate(sizes), default=0) / 2**20


def print_profile(name, work, device):
    """Print which kernels (on a CPU: operations) the time of a pass goes into. In the rest, the GPU waits."""
    cuda, pass_seconds = device.type == "cuda", seconds(work, device)
    with torch.profiler.profile() as profiler:
        seconds(work, device, passes=0)
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    events = [e for e in profiler.key_averages() if e.device_type == kind and not e.is_user_annotation]
    spent = [(e.self_device_time_total if cuda else e.self_cpu_time_total, e.count, e.key) for e in events]
    everything = sum(time for time, *_ in spent), sum(count for _, count, _ in spent), "all"
    print(f"\n| {name} | calls | of the time |\n|---|---|---|")
    for microseconds, count, kernel in [everything, *sorted(spent, reverse=True)[:10]]:
        print(f"| {kernel[:100]} | {count} | {microseconds / pass_seconds / 1e4:.1f} % |")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=[""], help="only the rows whose name begins with one of these")
    parser.add_argument("--batches", type=int, default=8, help="in a pass")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--no-cuda", action="store_true")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16", "fp16"], default="fp32", help="as the scripts'")
    parser.add_argument("--layout", choices=["channels_last", "contiguous"], default="channels_last")
    parser.add_argument("--no-cuda-graph", action="store_true", help="on a GPU, launch each kernel by itself")
    parser.add_argument("--profile", action="store_true", help="print a table of the kernels of each row, too")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.no_cuda else "cpu")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision, torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    peaks, table, failed, images = [matrix_product_rates(device, dtype)], [], 0, BATCH * args.batches
    with contextlib.suppress(KeyboardInterrupt):  # the table then has the rows up to here
        for name, train, evaluate in rows(args):
            try:
                switch_graphs(False)  # a replay shows neither its FLOPs nor its memory
                with FlopCounterMode(display=False) as counter:
                    train()
                memory = peak_memory(train, device)
                switch_graphs(not args.no_cuda_graph)
                rate = images / seconds(train, device)
                if args.profile:
                    print_profile(name, train, device)
                test_rate = f"{images / seconds(evaluate, device):.0f}" if evaluate else "-"
            except Exception:  # of one row: the others are measured
                traceback.print_exc()
                failed += 1
                continue
            peaks.append(matrix_product_rates(device, dtype))
            table.append((name, rate, test_rate, counter.get_total_flops() / images, memory))
            print(f"{name}: {rate:.0f} images/s", file=sys.stderr)
    mm, conv = (max(rates) for rates in zip(*peaks))
    chip = torch.cuda.get_device_name() if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    machine = f"{device.type} ({chip}), {torch.get_num_threads()} threads"
    print(f"\ntorch {torch.__version__}, {machine}; {args.precision} peak: ")
    print(f"torch.mm {mm / 1e9:.0f} GFLOP/s, 1x1 convolution {conv / 1e9:.0f} GFLOP/s\n")
    print("| | training images/s | test images/s | MFLOP/image | GFLOP/s | of torch.mm | of 1x1 conv | peak MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, rate, test_rate, flops, memory in table:
        speed = rate * flops
        shares = f"{speed / 1e9:.0f} | {100 * speed / mm:.0f} % | {100 * speed / conv:.0f} %"
        print(f"| {name} | {rate:.0f} | {test_rate} | {flops / 1e6:.0f} | {shares} | {memory:.0f} |")
    return f"{failed} rows have failed" if failed else None


if __name__ == "__main__":
    sys.exit(main())
