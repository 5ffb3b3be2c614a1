"""Runs of cifar_buffer.py over a grid of settings, several at a time, for BufferCurves.ipynb to draw.

    python sweep.py --buffer 50 --layer_noise 0 3 --noise 0 0.1 0.3 0.5 --seeds 0 1 2 --save_folder logs
    python sweep.py --buffer 1 5 50 --quantize none 8,256 --jobs 2 -- --data digits --feature_size 16 --nepochs 10

Flags after -- are for every run. A run whose log is complete is skipped, and one that was interrupted is resumed: the
same command, run again, goes on. A run that fails is reported, and the others go on. However the sweep ends, its runs
end with it. A run's checkpoint, which may take gigabytes as it holds all buffers, is removed when the run is complete.
"""

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import utils

import torch
from tqdm import tqdm

import cifar_buffer
from buffer import SAMPLINGS, available_memory, groups_and_codewords
from models import make_buffer, make_network

REST = {"cpu": 10**9, "cuda": 3 * 10**9}  # bytes that a run may take beside its buffers
# Flags that the sweep gives to its runs
GIVEN = {"--name", "--save_folder", "--resume", "--seed", "--buffer", "--noise", "--layer_noise", "--quantize"}
GIVEN |= {"--buffer-sampling"}
PATIENCE = 10  # seconds in which a run that is told to end must have ended
# The program of a run
RUN = "import sys; sys.path.insert(0, sys.argv[1]); import sweep; sweep.run_one(*sys.argv[2:])"


class ArgumentParser(argparse.ArgumentParser):
    def error(self, message):
        utils.fail(f"{message} (see --help)")


def quantization(text):
    """An argparse type: none, or G,V."""
    return text if text == "none" else ",".join(map(str, groups_and_codewords(text)))


def parse_args(argv=None):
    """The sweep's arguments, and the flags after --, which are for all runs."""
    argv = [*(sys.argv[1:] if argv is None else argv)]
    end = argv.index("--") if "--" in argv else len(argv)
    parser = ArgumentParser(
        Path(__file__).name, description=__doc__, formatter_class=utils.ArgumentParser.Formatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--buffer", type=utils.at_least(0), nargs="+", default=[30], help="values of cifar_buffer.py's flag")
    add("--noise", type=cifar_buffer.share, nargs="+", default=[0.0], help="the same")
    add("--layer_noise", type=utils.at_least(0), nargs="+", default=[0], help="the same, for runs with noise")
    add("--buffer-sampling", choices=SAMPLINGS, nargs="+", default=["priority_lifo"], help="the same")
    add("--quantize", type=quantization, nargs="+", default=["none"], metavar="G,V", help="the same; none: off")
    add("--seeds", type=utils.at_least(0), nargs="+", default=[0], help="the same")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("--jobs", type=utils.at_least(1), default=cores, help="runs at a time, if they fit in memory; one thread each")
    add("--save_folder", default=".", help="for logs and checkpoints")
    args = parser.parse_args(argv[:end])
    return args, argv[end + 1 :]


def grid(args, common):
    """{name: flags} of all runs, without duplicates."""
    runs = {}
    for noise, layer, size, sampling, quantize, seed in itertools.product(
        args.noise, args.layer_noise, args.buffer, args.buffer_sampling, args.quantize, args.seeds
    ):
        flags, name = ["--buffer", size, "--seed", seed, "--noise", noise], f"buffer{size}"
        if sampling != "priority_lifo":
            flags += ["--buffer-sampling", sampling]
            name += f"_{sampling}"
        if noise:
            flags += ["--layer_noise", layer]
            name += f"_layer{layer}_noise{noise:g}"
        if quantize != "none":
            flags += ["--quantize", quantize]
            name += f"_quantize{quantize.replace(',', 'x')}"
        name += f"_seed{seed}"
        flags = ["--threads", 1, *common, *flags, "--name", name, "--save_folder", args.save_folder, "--resume", "auto"]
        runs[name] = [str(flag) for flag in flags]
        cifar_buffer.parse_args(runs[name])  # a mistake ends the sweep here, before any run starts
    return runs


def is_complete(folder, name, flags):
    """Whether the folder has a log of this run, with the same flags, to its last line."""
    wanted = json.loads(json.dumps(vars(cifar_buffer.parse_args(flags))))
    last, epochs = wanted["ncnn"] - 1, wanted["epochs"]
    end = f"epoch {epochs}, relative MSE" if wanted["quantize"] else f"n: {last}, epoch {epochs},"
    decisive = wanted.keys() - (utils.MAY_DIFFER - {"epochs"})
    for log in folder.glob(f"*[_-]cifar_buffer[_-]{name}.log"):  # older ones are called *_cifar_buffer_<name>.log
        *lines, rest = log.read_text().split("\n")
        if lines and not rest and lines[0].startswith("arguments: ") and lines[-1].startswith(end):
            arguments = {"bn_init": "ones", **json.loads(lines[0].removeprefix("arguments: "))}  # older logs lack it
            if all(arguments.get(flag) == wanted[flag] for flag in decisive):
                return True
    return False


def jobs_that_fit(runs):
    """How many runs {name: flags} can be in memory together, at least one (which may refuse to start)."""
    buffers = [0]
    for flags in runs.values():
        args = cifar_buffer.parse_args(flags)
        with torch.device("meta"):
            shapes = make_network(args, num_classes=10).shapes
        buffers.append(sum(make_buffer(args, shape, "meta").num_bytes() for shape in shapes[:-1]))
    device = torch.device("cuda" if runs and torch.cuda.is_available() and not args.no_cuda else "cpu")
    return max(1, int(available_memory(device) // (max(buffers) + REST[device.type])))


def checkpoint(flags):
    return utils.checkpoint_path(cifar_buffer.parse_args(flags))


def run_one(*flags):
    """A run, in a process of its own. It ends with the sweep, which holds the other end of its standard input open."""

    def watch():
        os.read(0, 1)  # until the sweep has gone
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE)
        os._exit(1)  # the signal came at a moment when it was lost

    threading.Thread(target=watch, daemon=True).start()
    sys.argv[0] = cifar_buffer.__file__
    cifar_buffer.main(flags)


def run_all(runs, jobs):
    """Run {name: flags}, `jobs` at a time. Yields (name, exit status, its stderr) of each run that has ended."""
    command = [sys.executable, "-c", RUN, str(Path(__file__).resolve().parent)]
    waiting, running = [*runs.items()], {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name, flags = waiting.pop(0)
                errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
                process = subprocess.Popen(
                    [*command, *flags],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    start_new_session=True,  # Ctrl-C is for the sweep
                )
                running[name] = process, errors
            time.sleep(0.05)
            for name, (process, errors) in [*running.items()]:
                if process.poll() is not None:
                    del running[name]
                    errors.seek(0)
                    yield name, process.returncode, errors.read()
    finally:  # on Ctrl-C too
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            process.kill()


def main(argv=None):
    args, common = parse_args(argv)
    sys.stdout, sys.stderr = utils.Screen(sys.stdout), utils.Screen(sys.stderr)
    if misplaced := GIVEN.intersection(flag.split("=")[0] for flag in common):
        utils.fail(f"{min(misplaced)} after --: the sweep gives its runs this flag")
    runs, folder, failed = grid(args, common), Path(args.save_folder), []
    todo = {name: flags for name, flags in runs.items() if not is_complete(folder, name, flags)}
    for name in runs.keys() - todo.keys():  # if the sweep was ended after a run's last line, but before this
        checkpoint(runs[name]).unlink(missing_ok=True)
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them complete already")
    if (jobs := min(args.jobs, jobs_that_fit(todo))) < min(args.jobs, len(todo)):
        print(f"{jobs} at a time: more may not fit in memory")
    utils.on_interrupt("Interrupted; the same command goes on from here.")
    try:
        with tqdm(total=len(runs), initial=len(runs) - len(todo), unit="run", disable=None) as bar:
            for name, status, errors in run_all(todo, jobs):
                bar.update()
                if status == 0:
                    checkpoint(runs[name]).unlink(missing_ok=True)
                    tqdm.write(f"{name}: done")
                else:
                    failed.append(name)
                    tqdm.write(f"{name}: failed with status {status}: {errors.strip()}", file=sys.stderr)
    except OSError as error:  # no space for a temporary file, no more processes, ...
        sys.exit(f"The sweep cannot go on: {error}; the same command goes on from here.")
    if failed:
        sys.exit(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
