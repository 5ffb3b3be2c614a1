"""Flags, screen, device, log and checkpoint. Every folder has a copy; after changing one: make utils FROM=<folder>."""

import argparse
import contextlib
import ctypes
import errno
import fcntl
import functools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path

on_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback during the imports, which take seconds
import torch
import torchvision

signal.signal(signal.SIGINT, on_ctrl_c)

# Flags of this start alone, which --resume does not take from the checkpoint; and all that may differ from its own
HERE = {"compile", "cuda_graph", "no_cuda", "resume", "save_folder", "script", "threads"}
MAY_DIFFER = HERE | {"epochs", "log_interval", "test_batch_size"}


def fail(message):
    """End the program because of a user's mistake: one line on stderr, exit status 2."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(10)  # most mistakes are found by all ranks: rank 0 reports them, and torchrun ends the others
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def at_least(minimum, kind=int, above=False, below=2**31):
    """An argparse type: an int or a float of at least `minimum`, or `above` it, and below `below`."""

    def number(text):
        with contextlib.suppress(ValueError):
            if minimum <= kind(text) < below and not (above and kind(text) == minimum):
                return kind(text)
        noun, bound = "whole number" if kind is int else "number", "above" if above else "of at least"
        raise argparse.ArgumentTypeError(f"{text!r} is not a {noun} {bound} {minimum} and below {below}")

    return number


class ArgumentParser(argparse.ArgumentParser):
    """argparse with the flags of all scripts; `file` and `doc` are the script's `__file__` and `__doc__`."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            return action.help if str(action.default) in ("None", "False", "") else super()._get_help_string(action)

    def __init__(self, file, doc):
        super().__init__(Path(file).name, description=doc, formatter_class=self.Formatter, allow_abbrev=False)
        self.set_defaults(script="/".join(Path(file).resolve().with_suffix("").parts[-2:]))
        add = self.add_argument_group("flags of all scripts").add_argument
        add("--name", default="", help="added to the names of log and checkpoint")
        add("--save_folder", default=".", help="folder for log and checkpoint")
        add("--resume", metavar="CHECKPOINT", help="continue from it; auto: from this run's last one, if there is one")
        add("--no-cuda", action="store_true", help="use the CPU even if there is a GPU")
        add("--precision", choices=["fp32", "tf32", "bf16", "fp16"], default="fp32", help="of the forward passes")
        add("--compile", action="store_true", help="torch.compile the network (needs a C++ compiler)")
        add("--threads", type=at_least(1), help="CPU threads (default: torch's choice)")

    def parse_args(self, argv=None):
        """With `--resume CHECKPOINT`, flags that are not given have the checkpoint's values."""
        sys.stdout, sys.stderr = (s if isinstance(s, Screen) else Screen(s) for s in (sys.stdout, sys.stderr))
        on_interrupt("Interrupted before this run finished an epoch.")
        args = super().parse_args(argv)
        if args.resume == "auto":
            args.resume = str(checkpoint_path(args)) if checkpoint_path(args).exists() else None
        elif args.resume is not None:
            saved = load_checkpoint(args.resume, args.script)["arguments"].items()
            self.set_defaults(**{k: v for k, v in saved if k not in HERE}, save_folder=str(Path(args.resume).parent))
            args = super().parse_args(argv)
        if "/" in args.name:
            self.error(f"--name {args.name} cannot be part of a file name; --save_folder chooses the folder")
        vars(args).pop("ignored", None)
        return args

    def ignore(self, *flags):
        """Accept flags of the published scripts that have no effect any more, with or without a value."""
        for flag in flags:
            say = functools.cache(lambda value, flag=flag: print(f"{flag} has no effect any more", file=sys.stderr))
            self.add_argument(flag, nargs="?", const="", type=say, dest="ignored", help=argparse.SUPPRESS)

    def error(self, message):
        fail(f"{message} (see --help)")


class Screen:
    """A standard stream that may fail (closed, terminal gone, disk full): the log file is what counts."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115
        getattr(self.stream, "reconfigure", dict)(errors="backslashreplace")  # a --name that it cannot show

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:  # discard all further output
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def on_interrupt(message):
    """Let Ctrl-C, SIGTERM and a terminal that is closed end the program with this line instead of a traceback."""

    def hook(kind, *error):
        print(f"\n{message}", file=sys.stderr) if kind is KeyboardInterrupt else sys.__excepthook__(kind, *error)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores the second
            signal.signal(number, signal.default_int_handler)
    sys.excepthook = hook


def setup(args):
    """Seed torch, set its threads and float32 precision, and return the device to train on."""
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    if platform.libc_ver()[0] == "glibc":  # keep freed memory: getting it again costs a tenth of the running time
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.precision == "tf32"
    return torch.device("cuda" if torch.cuda.is_available() and not args.no_cuda else "cpu")


def to_device(model, args, device):
    """Move the model to the device in channels_last; with --compile, compile its parts (a ModuleList's one by one)."""
    if args.compile:
        if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
            fail("--compile needs a C++ compiler, and g++ is not there: install it, or name another one in CXX")
        torch._dynamo.config.wrap_top_frame = True  # without it, torch 2.11 leaves an nn.Sequential as it is
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000  # for all parts
        for child in model.children():
            for part in child if isinstance(child, torch.nn.ModuleList) else [child]:
                part.compile(dynamic=False)  # for each size; else sizes that differ between parts are variables
    return model.to(device, memory_format=torch.channels_last)


def autocast(args, device):
    """The context for a forward pass in --precision."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def checkpoint_path(args):
    """<save_folder>/<folder>-<script>[-<name>].pt, unique to this script and --name."""
    return Path(args.save_folder, "-".join(filter(None, [*Path(args.script).parts, args.name])) + ".pt")


def save(state, path):
    """torch.save that never leaves part of a file: interrupted, it leaves the old file or the whole new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
        temporary.replace(path)
    except RuntimeError as error:  # torch's own, which hides its cause: a full disk, Ctrl-C
        raise error.__context__ or error from None
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path, script):
    """A Run's checkpoint, on the CPU; one that is missing, damaged or another script's ends the program."""
    try:
        damaged = zipfile.ZipFile(path).testzip()  # torch.load does not compare the checksums
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
        made_by, _ = state["arguments"]["script"], state["log"]  # which a Run has
    except FileNotFoundError:
        fail(f"there is no checkpoint {str(path)!r}")
    except Exception as error:
        fail(f"{path} is damaged, or not a checkpoint of these scripts ({type(error).__name__})")
    if made_by != script:
        fail(f"{path} is a checkpoint of {made_by}.py, not of {script}.py (has its folder been renamed?)")
    return state


class Run:
    """Log and checkpoint of a training run, or, with --resume, of its continuation."""

    def __init__(self, args, data, fixed=(), **parts):  # fixed: further flags that may not differ
        # parts: all that training changes, by name (the network: `model`); objects with a state_dict, or lists of them
        self.args, self.data, self.epoch, self.last_checkpoint, self.parts = args, data, 0, None, {}
        for name, part in parts.items():
            self.parts |= {f"{name}.{i}": p for i, p in enumerate(part)} if isinstance(part, list) else {name: part}
        self.checkpoint, self.fixed, self.log_length = checkpoint_path(args), fixed, 0
        self.log_file = self.checkpoint.with_name(f"{time.strftime('%Y%m%d-%H%M%S')}_{self.checkpoint.stem}.log")
        self.lock()
        self.load(args.resume) if args.resume else self.begin()
        print(f"log: {self.log_file}\ncheckpoint: {self.checkpoint}")

    def lock(self):
        """Refuse to start while another run of this name is alive; the system frees the lock of one that has died."""
        try:
            self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            self.lock_file = self.checkpoint.with_name(f".{self.checkpoint.stem}.lock").open("w")
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"a run that writes {self.checkpoint} is alive: wait for it, or choose another --name")
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # a file system without locks
                fail(f"cannot write to --save_folder: {error}")

    def begin(self):
        device, model = self.data.train.device, self.parts["model"]
        chip = torch.cuda.get_device_name() if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
        python = f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}"
        machine = f"{platform.system()} {platform.machine()}, {device.type} ({chip}), {torch.get_num_threads()} threads"
        self.log(f"arguments: {json.dumps(vars(self.args))}")
        commit = os.popen(f"git -C {shlex.quote(sys.path[0])} describe --always --dirty 2> /dev/null").read().strip()
        self.log(f"environment: {python}, {machine}, commit {commit or 'none'}, TF32 {torch.backends.cudnn.allow_tf32}")
        self.log(f"data: {self.data.description}")
        self.log(f"model, {sum(p.numel() for p in model.parameters()):,} parameters: {model}")

    def log(self, line):
        try:
            with self.log_file.open("ab") as file:
                file.write(f"{line}\n".encode())
                self.log_length = file.tell()
        except OSError as error:
            self.stop(f"Cannot write {self.log_file}: {error.strerror}")
        print(line)

    def check_finite(self, loss, n, epoch):
        if not math.isfinite(loss):
            self.stop(f"Epoch {epoch}, module {n}: the loss is {loss}")

    def stop(self, reason):
        raise SystemExit(f"{reason}; the last checkpoint: {self.last_checkpoint or 'none yet'}")

    def epochs(self, last):
        """The epochs still to do, counted from 1; after each, the checkpoint is written."""
        if self.epoch >= last:
            print(f"{self.last_checkpoint} is at the end of the last epoch: nothing to do")
        for epoch in range(self.epoch + 1, last + 1):
            torch.manual_seed(10_000 * self.args.seed + epoch)  # so that a resumed run draws the same, on any device
            yield epoch
            self.epoch = epoch
            self.save()

    def save(self):
        state = {
            "arguments": vars(self.args),
            "data": self.data.description,
            "epoch": self.epoch,
            "log": [self.log_file.name, self.log_length],
            "generator": self.data.train.generator.get_state(),
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }
        self.write(state, self.checkpoint)
        self.go_on_from(self.checkpoint)

    def write(self, state, path):
        try:
            save(state, path)
        except (OSError, RuntimeError) as error:
            self.stop(f"Cannot write {path}: {error}")

    def load(self, path):
        """Set everything to the state of a checkpoint, and cut the log to its length at the time."""
        state = load_checkpoint(path, self.args.script)
        was, now = state["arguments"] | {"data": state["data"]}, vars(self.args) | {"data": self.data.description}
        for flag in sorted(now.keys() - MAY_DIFFER.difference(self.fixed)):
            if was.get(flag) != now[flag]:
                fail(f"{path} was made with {flag} {was.get(flag)!r}; in this run it is {now[flag]!r}")
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state["parts"][name])
            self.data.train.generator.set_state(state["generator"])
        except Exception as error:  # torch's checks raise all kinds
            fail(f"{path} is a checkpoint of another network or optimizer: {str(error)[:300]}")
        self.epoch, (name, self.log_length) = state["epoch"], state["log"]
        self.log_file = self.log_file.with_name(name)
        self.go_on_from(path)
        if not self.log_file.exists():
            return self.begin()
        with self.log_file.open("rb+") as file:
            file.seek(self.log_length - 1)
            if file.read(1) != b"\n":
                fail(f"{self.log_file} is not the log of {path} any more: move it away, then resume")
            file.truncate(self.log_length)

    def go_on_from(self, checkpoint):
        self.last_checkpoint = checkpoint
        on_interrupt(f"Interrupted; go on from the last finished epoch with --resume {checkpoint}")
