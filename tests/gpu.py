"""All that this repository wants from a machine with an NVIDIA GPU, in as many minutes as there are.

    python tests/gpu.py --list                                            # what would run, with its expected minutes
    python tests/gpu.py --minutes 4 --archive back/1.tar.gz --stage tests commands
    python tests/gpu.py --minutes 7 --archive back/2.tar.gz --stage tables runs --data cifar10-jpeg.tar.xz
    python tests/gpu.py --rehearse --out out/rehearsal                    # the same on a CPU, with everything tiny

tests: `pytest -m cuda`. commands: every published command for a few steps, in all precisions. tables: speed and memory,
one after the other. runs: full-length runs on --data, most wanted first; none that would not end in time, or whose log
is committed already. A stage has its share of the time, and what it leaves is the next ones'. What fails stops nothing
else. Leaves report.md, logs, and both in an archive, renewed whenever something ends. Needs what the tests need.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import gc
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from pathlib import Path

import psutil

ROOT, ME = Path(__file__).resolve().parent.parent, str(Path(__file__).resolve())
LEARNING, AUXILIARY, DNI = "learning_curves/cifar", "auxiliary_nets_study/cifar_dgl.py", "dni_comparisons/cifar"
DDG, BUFFER, IMAGENET = "ddg_comparisons/cifar", "buffer_experiments/cifar", "imagenet_dgl/imagenet"
RESNET = "auxiliary_nets_study/cifar_resnet.py"
SHARES = {"tests": 0.4, "commands": 0.2, "tables": 0.18, "runs": 0.22}  # of the time, by stage
PATIENCE = 15  # seconds in which a job that is told to end must have ended

CIFAR_COMMANDS = [  # the READMEs' published commands
    *(f"{LEARNING}_{script}.py" for script in ("dgl", "sequential_greedy")),
    *(f"{AUXILIARY} --type_aux {kind}" for kind in ("mlp-sr", "mlp", "cnn")),
    *(f"{DNI}_cnn_dni.py{flags}" for flags in ("", " --dni", " --dni --context")),
    f"{DNI}_dgl.py",
    *(f"{DDG}_{method}.py" for method in ("backprop", "dgl", "ddg", "features_replay")),
    *(f"{BUFFER}_buffer.py --seed 0{flags}" for flags in (" --buffer 30 --quantize 8,256", "")),
    f"{BUFFER}_buffer.py --seed 0 --buffer 30 --noise 0.1 --layer_noise 3",
    *(f"{RESNET} --method {m}" for m in ("dgl", "infopro --infopro-loss contrast", "checkpoint", "man")),
]
TORCHRUN = "-m torch.distributed.run --standalone --local-addr 127.0.0.1"  # the host's name may have no address
SIX_PROCESSES = f"{TORCHRUN} --nproc_per_node=6 {BUFFER}_async.py --buffer 30 --seed 0"
IMAGENET_COMMANDS = [
    *(f"{IMAGENET}{script}.py --arch resnet152" for script in ("_dgl", "")),
    *(f"{IMAGENET}_dgl.py --arch vgg{n} --block_size {size}" for n, size in ((13, 1), (13, 3), (19, 4), (19, 8))),
    *(f"{IMAGENET}.py --arch vgg{n}_bn" for n in (13, 19)),
]
PRECISIONS = {  # the flags of each; what a script refuses is said in the table
    "fp32": "",
    "fp16": "--precision fp16",
    "half": "--half --dynamic-loss-scale",
    "bf16": "--precision bf16",
    "eager": "--precision bf16 --no-cuda-graph",
    "compile": "--precision bf16 --compile",
}
LAYOUTS = [f"--precision {p} --layout {layout}" for p in ("tf32", "bf16") for layout in ("channels_last", "contiguous")]
VGG = "'auxiliary_nets_study: mlp' 'auxiliary_nets_study: cnn'"
TABLES = {  # most wanted first, and the minutes that each is expected to take
    "tests/benchmark.py --profile --precision bf16 --rows DGL 'auxiliary_nets_study: mlp-sr'": 0.4,
    "ddg_comparisons/memory.py": 0.4,
    "tests/benchmark.py --precision bf16": 3,
    "tests/benchmark.py": 3,
    f"{ME} worker largest_batches 16": 1.2,  # GiB, as the published GPU had
    "tests/benchmark.py --precision bf16 --no-cuda-graph": 3,
    **{f"tests/benchmark.py --rows {VGG} {flags}": 0.3 for flags in LAYOUTS},
    f"{ME} worker largest_batches 0": 1.5,  # the whole GPU
}
EPOCHS = 200  # of dni_comparisons: as many as fit
SLOW = {"1.11": 0.1, "1.25": 0.2, "1.5": 0.3333, "2": 0.5}  # slowdown: --noise
BUFFERS = f"{BUFFER}_buffer.py --nepochs 50 --precision bf16 --seed 0 --buffer"
LOCAL = {  # method: GFLOP of an image in ResNet-32 with K modules, as `--costs` prints them
    "dgl": {2: 0.41, 4: 0.40, 8: 0.39, 16: 0.36},
    "infopro --infopro-loss contrast": {2: 0.44, 4: 0.51, 8: 0.63, 16: 0.87},
    "auglocal": {2: 0.63, 4: 0.95, 8: 1.58, 16: 2.85},
    "man": {2: 0.49, 4: 0.65, 8: 0.95, 16: 1.58},
    "infopro": {2: 0.44, 4: 0.51, 8: 0.62, 16: 0.85},
    "predsim": {2: 0.42, 4: 0.44, 8: 0.48, 16: 0.56},
    "checkpoint": {2: 0.48, 4: 0.51, 8: 0.53, 16: 0.54},
    "man-bias": {2: 0.46, 4: 0.57, 8: 0.76, 16: 1.17},
}


def local_run(gflop, method, depth, modules):
    """A line of RUNS. The rate is a guess."""
    name = method.replace(" --infopro-loss ", "-")
    flags = f"--epochs 40 --precision bf16 --depth {depth}" + f" --num-modules {modules}" * (modules > 1)
    return 40, 16 / gflop, f"{RESNET} {flags} --method {method} --name gpu-{depth}-{name}_k{modules}"


RUNS = [  # most wanted first: passes over CIFAR-10, thousand images/s on an H200 (without a log: a guess), command
    (50, 90, f"{LEARNING}_dgl.py --epochs 50 --precision bf16 --test-batch-size 2000 --name gpu-bf16"),
    (50, 42, f"{AUXILIARY} --epochs 50 --precision bf16 --type_aux mlp-sr --name gpu-mlp-sr"),
    (50, 27, f"{AUXILIARY} --epochs 50 --precision bf16 --type_aux cnn --name gpu-cnn"),
    (50, 48, f"{AUXILIARY} --epochs 50 --precision bf16 --type_aux mlp --name gpu-mlp"),
    *(
        (EPOCHS, rate, f"{DNI}_{script} --epochs {EPOCHS} --precision bf16 --name gpu-{name}{EPOCHS}")
        for rate, script, name in (
            (58, "cnn_dni.py --dni", "dni"),
            (56, "cnn_dni.py --dni --context", "cdni"),
            (81, "dgl.py", "dgl"),
            (102, "cnn_dni.py", "backprop"),
        )
    ),
    *((50, 47, f"{LEARNING}_dgl.py --epochs 50 --seed {s} --name gpu-seed{s}") for s in (1, 2, 3)),
    (200, 80, f"{LEARNING}_sequential_greedy.py --epochs 50 --seed 1 --name gpu-seed1"),
    (50, 20, f"{BUFFERS} 50 --name gpu-m50"),
    *((50, 20, f"{BUFFERS} 50 --layer_noise 3 --noise {n} --name gpu-slow{times}") for times, n in SLOW.items()),
    (50, 20, f"{BUFFERS} 1 --name gpu-m1"),
    *((50, rate, f"{BUFFERS} 50 --quantize {G},256 --name gpu-quantize{G}x256") for G, rate in ((8, 10), (32, 5))),
    *(
        (40, rate, f"{DDG}_{m}.py --epochs 40 --drops 20 30 --name gpu-k2")
        for m, rate in (("backprop", 8), ("dgl", 8), ("ddg", 4), ("features_replay", 3))
    ),
    *(
        (40, rate, f"{DDG}_{m}.py --epochs 40 --drops 20 30 --num_splits 4 --name gpu-k4")
        for m, rate in (("dgl", 8), ("ddg", 4), ("features_replay", 3))
    ),
    *((200, 80, f"{LEARNING}_sequential_greedy.py --epochs 50 --seed {s} --name gpu-seed{s}") for s in (2, 3)),
    (50, 13, f"{AUXILIARY} --epochs 50 --name gpu-mlp-sr-fp32"),
    local_run(0.41, "backprop", 32, 1),
    *(local_run(gflops[K], method, 32, K) for K in (4, 16, 2, 8) for method, gflops in LOCAL.items()),
    local_run(1.52, "backprop", 110, 1),
    *(
        local_run(gflop, method, 110, K)
        for K in (2, 4)
        for method, gflop in (("dgl", 1.51), ("infopro --infopro-loss contrast", 1.6), ("checkpoint", 1.8))
    ),
]


@dataclasses.dataclass
class Job:
    """A command in a process of its own. `status` is its exit status, or why it has none."""

    stage: str
    name: str
    command: list  # of the interpreter
    minutes: float = 0.2  # expected
    status: object = "not started: too little time"
    seconds: float = 0.0

    def log(self, out):
        return out / self.stage / f"{re.sub('[^A-Za-z0-9_.=,-]+', '_', self.name)[:120]}.txt"

    def rows(self, out):
        """What `measure` has printed for the table."""
        lines = self.log(out).read_text(errors="replace").splitlines() if self.log(out).exists() else []
        return [json.loads(line.removeprefix("row: ")) for line in lines if line.startswith("row: ")]

    def problem(self, out):
        """What went wrong, or an empty text."""
        if self.status:
            return f"exit status {self.status}" if isinstance(self.status, int) else self.status
        return "; ".join(f"{r['precision']}: {r['status']}" for r in self.rows(out) if r["status"].startswith("failed"))


def execute(job, out, end):
    """Run a job that is expected to end by `end` (of time.monotonic). At the latest then, it is told to end."""
    begin = time.monotonic()
    if begin + 60 * job.minutes > end:
        return job
    job.log(out).parent.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "2", "PYTHONUNBUFFERED": "1"}
    cwd = out if job.stage == "runs" else ROOT  # so that the runs' logs have no folder of this machine
    with job.log(out).open("w") as log:
        print(shlex.join(["python", *job.command]), file=log, flush=True)
        options = {"env": os.environ | environment, "stdout": log, "stderr": log, "stdin": subprocess.DEVNULL}
        process = subprocess.Popen([sys.executable, *job.command], cwd=cwd, start_new_session=True, **options)
        children = []
        patience = 180 * job.minutes + 75 if job.minutes else end - begin  # one that hangs may not keep the others
        try:
            job.status = process.wait(min(end - begin, patience))
        except subprocess.TimeoutExpired:
            job.status = "stopped: took too long" if time.monotonic() < end else "stopped: no time left"
            children = psutil.Process(process.pid).children(recursive=True)  # torchrun's have sessions of their own
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it, or what it has left
        kill(children)
        process.wait()
    job.seconds = time.monotonic() - begin
    return job


def kill(processes):
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def side_by_side(jobs, size, args, end):
    """Run jobs in order, `size` at a time. Yields each when it has ended, or has not been started."""
    with concurrent.futures.ThreadPoolExecutor(size) as pool:
        try:
            for done in concurrent.futures.as_completed([pool.submit(execute, job, args.out, end) for job in jobs]):
                pack(args.out, args.archive)
                yield done.result()
        except BaseException:  # Ctrl-C
            pool.shutdown(wait=False, cancel_futures=True)
            kill(psutil.Process().children(recursive=True))
            raise


def pack(out, archive):
    """All logs and the report in one file, without data and checkpoints."""
    files = [path for stage in SHARES for kind in ("txt", "log") for path in (out / stage).glob(f"*.{kind}")]
    archive.parent.mkdir(parents=True, exist_ok=True)
    temporary = archive.with_name(f"{archive.name}.tmp")
    with tarfile.open(temporary, "w:gz") as tar:
        for path in sorted([*files, *out.glob("*.md")]):
            tar.add(path, path.relative_to(out))
    temporary.replace(archive)


# Stages: the jobs of each in groups, and how many of a group are side by side


def tests(args):
    flags = [] if args.rehearse else ["--numprocesses", "8", "--dist", "worksteal"]
    command = ["-m", "pytest", "-v", "-rfE", "--tb=short", "-m", "cuda", "--durations=10", *flags]
    graphs = "tests/test_cuda_graph.py"  # in processes of their own: a capture that fails may spoil what comes after it
    files = ["tests/test_learning_curves.py"] if args.rehearse else ["tests", f"--ignore={graphs}"]
    captures = [] if args.rehearse else [Job("tests", f"pytest -m cuda {graphs}", [*command, graphs], 0.5)]
    yield 2, [*captures, Job("tests", "pytest -m cuda", [*command, *files], 1)]


def commands(args):
    small, large = CIFAR_COMMANDS[:: 4 if args.rehearse else 1], IMAGENET_COMMANDS[: 1 if args.rehearse else None]
    first, more = (["bf16"], []) if args.rehearse else (["fp32", "fp16", "bf16", "eager"], ["compile"])
    flags = [*few_steps(args, SIX_PROCESSES), "--save_folder", str(args.out / "commands")]
    sixfold = Job("commands", SIX_PROCESSES, [*shlex.split(SIX_PROCESSES), *flags], 0.5)
    large_soon = [f"{IMAGENET}{way}.py --arch resnet152 -b 64" for way in ("", "_dgl")]
    soon = [] if args.rehearse else [sixfold, *measured(args, "commands", large_soon, ["half"])]
    compiled = [] if args.rehearse else [f"{LEARNING}_dgl.py"]
    yield args.jobs, [*soon, *measured(args, "commands", small, first), *measured(args, "commands", compiled, more)]
    yield 1, [*measured(args, "commands", large, ["bf16"])]
    yield 1, [*measured(args, "commands", large, ["fp32"])]
    yield args.jobs, [*measured(args, "commands", [c for c in small if c not in compiled], more)]


def measured(args, stage, commands, precisions, steps=4):
    """A job for each command that measures it in all precisions, one after the other."""
    for command in commands if precisions else []:
        steps = 1 if args.rehearse else steps
        worker = [ME, "worker", "measure", ",".join(precisions), f"{steps}", *shlex.split(command)]
        minutes = 1 if precisions == ["compile"] else 0.5 if IMAGENET in command else 0.05 + 0.06 * len(precisions)
        name = f"{command} {','.join(precisions)}"
        yield Job(stage, name, [*worker, *few_steps(args, command)], minutes)


def few_steps(args, command):
    """Flags for a few steps of the whole network; in a rehearsal of a small one, on a CPU."""
    if IMAGENET in command:
        tiny, flags = "-b 4 --image-size 32 --nepochs 1 --arch resnet18", "--dummy --debug 1 --nepochs 2 -p 0"
    else:
        flags = "--data digits --train-size 1280 --epochs 3"  # in the first: cuDNN's benchmark, warm-up and capture
        flags += " --batch-size 128" * (RESNET in command)  # of 1024, digits have too few
        tiny = "--train-size 40 --batch-size 16"
        tiny += " --depth 8" * (RESNET in command) + " --num-modules 3" * ("--num-modules" in command)
        tiny += " --depth 26" * (DDG in command) + " --feature_size 32" * (BUFFER in command or AUXILIARY in command)
    return f"{flags} --no-cuda --threads 1 {tiny}".split() if args.rehearse else flags.split()


def tables(args):
    tiny = {
        "benchmark.py": "--rows forward --batches 1 --no-cuda --profile",
        "memory.py": "--depth 14 --num_splits 2 --no-cuda",
        "batches 16": "resnet18 32 --no-cuda",
    }
    jobs = []
    for command, minutes in TABLES.items():
        flags = next((flags for name, flags in tiny.items() if args.rehearse and command.endswith(name)), "")
        if flags or not args.rehearse:
            jobs.append(Job("tables", command.replace(ME, ""), [*shlex.split(command), *flags.split()], minutes))
    published = [*measured(args, "tables", IMAGENET_COMMANDS[: 1 if args.rehearse else None], ["half"], 12)]
    yield 1, [*jobs[:2], *published[:2], *jobs[2:3], *published[2:], *jobs[3:]]


def runs(args):
    """Full-length runs, three at a time: alone, each keeps half of an H200 busy or more."""
    jobs, size = [], min(3, args.jobs)
    for passes, rate, command in [RUNS[0], RUNS[4], RUNS[-1]] if args.rehearse else RUNS:
        minutes = (20 + 1.1 * passes * 50 / rate * max(1, size / 1.5)) / 60  # 20 s to begin; a tenth to evaluate
        flags = few_steps(args, command) if args.rehearse else ["--data", f"{args.tree}"]
        worker = [ME, "worker", "train", *shlex.split(command), *flags, "--save_folder", "runs"]
        if args.rehearse or not committed(command):
            jobs.append(Job("runs", command, worker, minutes))
    yield size, jobs


def matching(jobs, args):
    return [job for job in jobs if re.search(args.match, job.name)]


def committed(command):
    """Whether the script's logs have one of this --name, whichever way it is called."""
    folder, script = command.split(".py")[0].split("/")
    name = re.search(r"--name (\S+)", command)[1]
    return any((ROOT / folder / "logs").glob(f"*{script}[-_]{name}.log"))


def unpack(args):
    """The data as a folder in args.out, decoded once for all runs; args.tree: its path there."""
    if args.data and "runs" in args.stage:
        folder = args.out / "data" / args.data.name.split(".")[0]
        folder.parent.mkdir(exist_ok=True)
        if args.data.is_file():
            with tarfile.open(args.data) as archive:
                archive.extractall(folder, filter="data")
            folder = next(folder.rglob("train"), folder / "train").parent
        elif not folder.exists():
            folder.symlink_to(args.data)
        subprocess.run([sys.executable, ME, "worker", "decode", folder], check=True, stderr=subprocess.PIPE, text=True)
        args.tree = folder.relative_to(args.out)


# Workers: what runs in a process of its own, beside the commands themselves


def script_module(script):
    folder, name = script.removesuffix(".py").split("/")
    sys.path.insert(0, str(ROOT / folder))
    sys.argv[0] = str(ROOT / script)
    return importlib.import_module(name)


def hardware():
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{name}, torch {torch.__version__}, {len(os.sched_getaffinity(0))} CPU cores, {time.strftime('%Y-%m-%d')}")


def decode(tree):
    script_module("learning_curves/cifar.py").read_folder(Path(tree))


def measure(precisions, steps, script, *flags):
    """Run a script in each precision, and print a row: images/s of the last training pass, peak memory."""
    module = script_module(script)
    import torch

    cuda, passes = torch.cuda.is_available() and "--no-cuda" not in flags, []
    if "imagenet" in script:
        sys.modules["data"].DEBUG_STEPS = int(steps)
    batches = sys.modules["data"].DummyBatches if "imagenet" in script else sys.modules["cifar"].Batches
    iterate, train_epoch = batches.__iter__, module.train_epoch

    def counting(self):
        for batch in iterate(self):
            passes[-1][0] += len(batch[1]) * (self.generator is not None)  # a training batch
            yield batch

    def timed(*arguments, **options):
        if cuda:
            torch.cuda.reset_peak_memory_stats()  # the search for the fastest kernels, in the first pass, needs more
        begin = time.perf_counter()
        passes.append([0, 0.0])
        train_epoch(*arguments, **options)
        if cuda:
            torch.cuda.synchronize()
        passes[-1][1] = time.perf_counter() - begin

    batches.__iter__, module.train_epoch = counting, timed
    if RESNET in script:  # another learning rate in each pass would be another capture in each
        module.set_learning_rate = lambda *_: None
    module.utils.Run.save = lambda run: None  # buffers may be gigabytes
    for precision in precisions.split(","):
        passes[:], status = [[0, 0.0]], "ok"
        for name in ("train_step", "test_step"):
            getattr(getattr(module, name, None), "captures", {}).clear()  # they keep their networks
        if cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            with tempfile.TemporaryDirectory() as folder:
                module.main([*flags, *PRECISIONS[precision].split(), "--save_folder", folder])
        except SystemExit as stop:
            status = "refused" if stop.code == 2 else f"failed: {stop.code}" if stop.code else "ok"
        except Exception as error:
            traceback.print_exc()
            while error.__context__:  # a capture that fails ends with another error
                error = error.__context__
            status = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}"
        replayed = getattr(getattr(module, "train_step", None), "enabled", False)  # a replay allocates nothing
        memory = torch.cuda.max_memory_allocated() / 2**20 if cuda and not replayed else 0
        images, seconds = passes[-1]
        row = {"precision": precision, "status": status, "images/s": round(images / seconds) if seconds else 0}
        print("row:", json.dumps(row | {"peak MiB": round(memory)}), flush=True)


def train(script, *flags):
    """Run a script without checkpoints, from which nothing here goes on."""
    module = script_module(script)
    module.utils.Run.save = lambda run: None
    module.main(flags)


def largest_batches(gib, arch="resnet152", pixels="224", *flags):
    """The largest batch of a ResNet in so many GiB (0: all that the GPU has), within 2 %."""
    import torch

    cuda = not flags  # in a rehearsal, an image is said to need 128 MiB
    free, total = torch.cuda.mem_get_info() if cuda else (2**34, 2**34)
    limit = int(gib) * 2**30 or free - 2**30  # kernels need some that torch does not count
    if cuda:
        torch.cuda.set_per_process_memory_fraction(limit / total)
    print(f"{arch}, {pixels} pixels, fp16, {limit / 2**30:.1f} GiB, without cuDNN's benchmark\n")
    print("| | images | peak GiB | more images |\n|---|---|---|---|")
    half = f"--dummy --debug 1 --arch {arch} --image-size {pixels} --half --dynamic-loss-scale"
    flags = [*half.split(), *flags]
    for way in ("backprop", "backprop, activation checkpointing", "DGL, K = 2", "DGL, K = 2, --balance memory"):
        peak = peak_of(way, flags, cuda, limit)
        few, more = peak(16), peak(48)
        size = int((limit - few) / (more - few) * 32 + 16) // 8 * 8
        step = max(8, size // 50)
        while size > step and not peak(size):
            size -= step
        while peak(size + step):
            size += step
        end = peak.end  # of the search
        print(f"| {way} | {size} | {(peak(size) or 0) / 2**30:.1f} | {end} |", flush=True)


def peak_of(way, flags, cuda, limit):
    """A function: size of a batch -> bytes that two steps allocate at most, or None if they do not fit."""
    dgl = "DGL" in way
    script = script_module(f"{IMAGENET}_dgl.py" if dgl else f"{IMAGENET}.py")
    import torch
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
    from torchvision.models.resnet import BasicBlock, Bottleneck

    args = script.parse_args([*flags, *(["--balance", "memory"] if "memory" in way else [])])
    device = script.utils.setup(args)
    torch.backends.cudnn.benchmark = False  # which would begin anew with every size of the batch
    autocast = script.utils.autocast(args, device)
    model = script.training.to_device(script.make_model(args, 1000), args, device)
    if "checkpointing" in way:
        apply_activation_checkpointing(model, check_fn=lambda layer: isinstance(layer, (BasicBlock, Bottleneck)))
    pairs = zip(model.blocks, model.auxiliary_nets) if dgl else []
    modules = [script.Module(*pair, n) for n, pair in enumerate(pairs)] or [model]
    meters = [script.training.Meter(device) for _ in modules]
    optimizers, _ = script.training.make_optimizers(modules, args, device, 0)
    script.data.DEBUG_STEPS = 2

    def peak(size):
        scalers = [script.training.grad_scaler(args, device) for _ in modules]  # one that was stopped cannot go on
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        args.batch_size = size
        try:
            pixels = script.data.image_size(args)
            batches = script.data.DummyBatches(args, pixels, 2 * size, 1000, device, torch.Generator())
            if dgl:
                script.train_epoch(modules, optimizers, scalers, autocast, batches, meters)
            else:
                script.train_epoch(model, optimizers[0], scalers[0], autocast, batches, meters[0])
        except RuntimeError as error:  # torch.OutOfMemoryError, or a library that found no memory for its kernels
            peak.end = f"{type(error).__name__}: {str(error)[:80]}".replace("\n", " ").replace("|", "/")
            model.zero_grad()
            return None
        peak.end = "too large"
        used = torch.cuda.max_memory_allocated() if cuda else size * 2**27
        return used if used <= limit else None

    return peak


def report(stage, jobs, out):
    """A stage's table, and the tables that its commands have printed, as Markdown."""
    note = " (images/s: side by side on one GPU, but for imagenet_dgl's of 256 images)" * (stage == "commands")
    lines, printed = [f"\n## {stage}{note}\n"], []
    lines += ["| command | minutes | status | images/s | peak MiB |", "|---|---|---|---|---|"]
    for job in jobs:
        text = job.log(out).read_text(errors="replace").splitlines() if job.log(out).exists() else []
        if stage == "runs":
            script, name = job.name.split(".py")[0].replace("/", "-"), re.search(r"--name (\S+)", job.name)[1]
            log = max((out / "runs").glob(f"*_{script}-{name}.log"), default=None)  # of several, the newest
            text = log.read_text().splitlines() if log else []
        elif table := [line for line in text if line.startswith(("|", "torch", "resnet"))]:
            printed, text = [*printed, f"\n{job.name}\n", *table], []
        for row in job.rows(out) or [{"precision": job.problem(out) or "ok", "status": (text or ["-"])[-1].strip()}]:
            cells = job.name, f"{job.seconds / 60:.1f}", f"{row['precision']}: {row['status']}"
            lines.append("| {} | {} | {} | {} | {} |".format(*cells, row.get("images/s", ""), row.get("peak MiB", "")))
    return [*lines, *printed]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0))
    add = parser.add_argument
    add("--minutes", type=float, default=9, help="for everything: 9")
    add("--out", type=Path, default=Path("out/gpu"), help="folder for logs and report.md: out/gpu")
    add("--archive", type=Path, help="of logs and report.md: logs.tar.gz in --out")
    add("--data", type=Path, help="CIFAR-10 for the runs: a folder with train/ and test/, or an archive of it")
    add("--stage", nargs="+", choices=SHARES, default=list(SHARES), help="only these")
    add("--jobs", type=int, default=max(1, min(6, cores // 2)), help="commands side by side: 6 on 12 cores")
    add("--match", default="", help="only the jobs whose name, in --list, has this regular expression")
    add("--list", action="store_true", help="show what would run")
    add("--rehearse", action="store_true", help="on a CPU, with everything tiny")
    args = parser.parse_args(argv)
    args.out, args.data, args.tree = args.out.resolve(), args.data and args.data.resolve(), args.data
    args.archive = (args.archive or args.out / "logs.tar.gz").resolve()
    if args.data and not args.data.exists():
        parser.error(f"--data {args.data}: no such file or folder")
    if "runs" in args.stage and not (args.data or args.list or args.rehearse):
        parser.error("the runs need --data CIFAR10; without it, name the other stages with --stage")
    return args


def main(argv=None):
    begin, args = time.monotonic(), parse_args(argv)
    stages = {stage: globals()[stage] for stage in SHARES if stage in args.stage}
    if args.list:
        for stage, function in stages.items():
            for size, jobs in function(args):
                for job in matching(jobs, args):
                    print(f"{stage}, {size} at a time, {job.minutes:.1f} minutes: {job.name}")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    machine = subprocess.run([sys.executable, ME, "worker", "hardware"], capture_output=True, text=True).stdout
    if machine.startswith("no GPU") and not args.rehearse:
        sys.exit("no GPU: --rehearse does the same on a CPU, with everything tiny")
    last, left = begin + 60 * args.minutes - PATIENCE - 10, sum(SHARES[stage] for stage in stages)  # 10: for the report
    lines, problems = [f"# {machine}"], []
    unpacking = concurrent.futures.ThreadPoolExecutor(1).submit(unpack, args)
    for stage, function in stages.items():
        now, done = time.monotonic(), []
        end, left = now + (last - now) * SHARES[stage] / left, left - SHARES[stage]
        groups = function(args)
        if stage == "runs":
            try:
                unpacking.result()
            except Exception as error:
                groups, problem = [], f"runs: no data: {getattr(error, 'stderr', None) or repr(error)}".strip()
                print(problem, flush=True)
                problems.append(f"- {problem}")
        for size, jobs in groups:
            for job in jobs if args.rehearse else []:
                job.minutes = 0
            for job in side_by_side(matching(jobs, args), size, args, end):
                problem = job.problem(args.out)
                print(f"{job.seconds:5.0f} s  {stage}: {job.name}: {problem or 'ok'}", flush=True)
                problems += [f"- {stage}: {job.name}: {problem}: {job.log(args.out)}"] if problem else []
                done.append(job)
        lines += report(stage, done, args.out)
        text = "\n".join([*lines, "\n## Failed, or not run\n", *problems, ""])
        (args.out / "report.md").write_text(text)
        pack(args.out, args.archive)
    print(text)
    return 1 if problems else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, it and all jobs would ignore it
    if sys.argv[1:2] == ["worker"]:
        sys.exit(globals()[sys.argv[2]](*sys.argv[3:]))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
