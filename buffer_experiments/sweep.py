"""Runs of cifar_buffer.py over a grid of settings, several at a time: what BufferCurves.ipynb draws.

    python sweep.py --buffer 50 --layer_noise 0 3 --noise 0 0.1 0.3 0.5 --seeds 0 1 2 --save_folder logs
    python sweep.py --buffer 1 5 50 --quantize none 8,256 --jobs 2 -- --data digits --feature_size 16 --nepochs 10

What stands behind -- are flags for every run. A run whose log is complete is skipped, one that was interrupted is
resumed: the same command, run again, goes on. A run that fails is reported, and the others go on. A run's checkpoint is
removed when the run is complete: it holds all buffers, and may have gigabytes.
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

import cifar_buffer
import utils
from buffer import groups_and_codewords


class ArgumentParser(argparse.ArgumentParser):
    def error(self, message):
        utils.fail(f"{message} (see --help)")


def quantization(text):
    """An argparse type: none, or G,V."""
    return text if text == "none" else ",".join(map(str, groups_and_codewords(text)))


def parse_args(argv=None):
    """The sweep's arguments, and the flags of all runs, which stand behind --."""
    argv = [*(sys.argv[1:] if argv is None else argv)]
    end = argv.index("--") if "--" in argv else len(argv)
    parser = ArgumentParser(
        Path(__file__).name, description=__doc__, formatter_class=utils.ArgumentParser.Formatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--buffer", type=utils.at_least(0), nargs="+", default=[30], help="values of cifar_buffer.py's flag")
    add("--noise", type=cifar_buffer.share, nargs="+", default=[0.0], help="likewise")
    add(
        "--layer_noise", type=utils.at_least(0), nargs="+", default=[0], help="likewise; without noise, one run for all"
    )
    add("--quantize", type=quantization, nargs="+", default=["none"], metavar="G,V", help="likewise; none: off")
    add("--seeds", type=utils.at_least(0), nargs="+", default=[0], help="likewise")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("--jobs", type=utils.at_least(1), default=cores, help="runs at a time, each on one thread")
    add("--save_folder", default=".", help="for logs and checkpoints")
    args = parser.parse_args(argv[:end])
    return args, argv[end + 1 :]


def grid(args, common):
    """{name: flags} of all runs; runs that would be the same are one."""
    runs = {}
    for noise, layer, size, quantize, seed in itertools.product(
        args.noise, args.layer_noise, args.buffer, args.quantize, args.seeds
    ):
        flags, name = ["--buffer", size, "--seed", seed, "--noise", noise], f"buffer{size}"
        if noise:
            flags += ["--layer_noise", layer]
            name += f"_layer{layer}_noise{noise:g}"
        if quantize != "none":
            flags += ["--quantize", quantize]
            name += f"_quantize{quantize.replace(',', 'x')}"
        name += f"_seed{seed}"
        flags = ["--threads", 1, *common, *flags, "--name", name, "--save_folder", args.save_folder, "--resume", "auto"]
        runs[name] = [str(flag) for flag in flags]
        cifar_buffer.parse_args(runs[name])  # a mistake ends the sweep here, before any run
    return runs


def is_complete(folder, name, flags):
    """Whether a log of the run, with the same flags, has its last line."""
    wanted = json.loads(json.dumps(vars(cifar_buffer.parse_args(flags))))
    last, epochs = wanted["ncnn"] - 1, wanted["epochs"]
    end = f"epoch {epochs}, relative MSE" if wanted["quantize"] else f"n: {last}, epoch {epochs},"
    decisive = wanted.keys() - (utils.MAY_DIFFER - {"data", "epochs"})
    for log in folder.glob(f"*_cifar_buffer_{name}.log"):
        *lines, rest = log.read_text().split("\n")
        if lines and not rest and lines[0].startswith("arguments: ") and lines[-1].startswith(end):
            arguments = json.loads(lines[0].removeprefix("arguments: "))
            if all(arguments.get(flag) == wanted[flag] for flag in decisive):
                return True
    return False


def run_all(runs, jobs):
    """Run {name: flags}, `jobs` at a time; yields (name, exit status, its stderr) of each that has ended."""
    script, environment = Path(__file__).with_name("cifar_buffer.py"), {**os.environ, "OMP_NUM_THREADS": "1"}
    waiting, running = [*runs.items()], {}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    name, flags = waiting.pop(0)
                    with Path(scratch, name).open("w") as errors:
                        running[name] = subprocess.Popen(
                            [sys.executable, script, *flags],
                            stdout=subprocess.DEVNULL,
                            stderr=errors,
                            env=environment,
                            start_new_session=True,  # Ctrl-C is for the sweep
                        )
                time.sleep(0.05)
                for name in [name for name, process in running.items() if process.poll() is not None]:
                    yield name, running.pop(name).returncode, Path(scratch, name).read_text()
        finally:  # Ctrl-C, or the sweep is ended
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()


def main(argv=None):
    args, common = parse_args(argv)
    if misplaced := {"--name", "--save_folder", "--resume"}.intersection(flag.split("=")[0] for flag in common):
        utils.fail(f"{misplaced.pop()} is the sweep's to give to its runs")
    runs, folder, failed = grid(args, common), Path(args.save_folder), []
    todo = {name: flags for name, flags in runs.items() if not is_complete(folder, name, flags)}
    for name in runs.keys() - todo.keys():  # if the sweep was ended between a run's last line and this
        (folder / f"cifar_buffer_{name}.pt").unlink(missing_ok=True)
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them complete already")
    utils.say_at_interrupt("Interrupted; the same command goes on from here.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the runs are ended
    with tqdm(total=len(runs), initial=len(runs) - len(todo), unit="run", disable=None) as bar:
        for name, status, errors in run_all(todo, args.jobs):
            bar.update()
            if status == 0:
                (folder / f"cifar_buffer_{name}.pt").unlink(missing_ok=True)
                tqdm.write(f"{name}: done")
            else:
                failed.append(name)
                tqdm.write(f"{name}: failed with status {status}: {errors.strip()}", file=sys.stderr)
    if failed:
        sys.exit(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
