"""Asynchronous DGL on CIFAR-10, on parallel processes (Algorithm 2, arXiv 1901.08164, Section 5.3).

Each module is trained by a process of its own. In each process, a thread fills a ring buffer with what the previous
module sends, and the module trains on samples from it. It waits only while the buffer is empty. So a slow module gives
its successors fewer new batches and misses some of its predecessor's, but slows down nobody. cifar_buffer.py simulates
this in one process.

    torchrun --standalone --nproc_per_node=6 cifar_async.py --buffer 30 --seed 0
    torchrun --standalone --nproc_per_node=6 cifar_async.py --buffer 30 --slow-layer 3 --slowdown 1.5 --seed 0
    torchrun --standalone --nproc_per_node=3 cifar_async.py --buffer 30 --block_size 2 --seed 0    # 2 layers a module
    torchrun --standalone --nproc_per_node=6 cifar_async.py --buffer 30 --quantize 8,256 --seed 0  # sends indices
    torchrun --standalone --nproc_per_node=6 cifar_async.py --buffer 30 --sync --seed 0            # each batch once
    torchrun --standalone --nproc_per_node=6 --max-restarts=3 cifar_async.py --buffer 30 --seed 0 --resume auto

The first process writes a log with one line per module and epoch, and a checkpoint to --resume from. The
buffers are not in the checkpoint: they fill again.
"""

import argparse
import collections
import contextlib
import copy
import datetime
import math
import os
import queue
import signal
import sys
import threading
import time

import utils

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import cifar
import transport
from buffer import PRIORITIES, SAMPLINGS, Buffer, ProductQuantizer, available_memory, groups_and_codewords
from models import add_network_flags, check_network_flags, make_network

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # --precision; otherwise float32


def parse_args(argv=None):
    parser = utils.ArgumentParser(__file__, __doc__)
    cifar.add_data_flags(parser)
    add = parser.add_argument
    add("--buffer", type=utils.at_least(0), default=0, help="M, batches in a buffer; 0: one batch")
    add("--block_size", type=utils.at_least(1), default=1, help="layers of a module")
    add("--slow-layer", type=utils.at_least(0), default=0, help="slow down the module with this layer, from 0")
    add(
        "--slowdown",
        type=utils.at_least(1, float),
        default=1.0,
        help="how many times: it sleeps after each step",
    )
    add(
        "--pace",
        type=utils.at_least(0, float),
        default=0.0,
        metavar="SECONDS",
        help="shortest step, x --slowdown",
    )
    add("--sync", action="store_true", help="synchronous DGL as a pipeline: each batch once, in order, waited for")
    add("--idle", action="store_true", help="to measure the transport: steps only sleep for --pace")
    add("--buffer-sampling", choices=SAMPLINGS, default="priority_lifo", help=PRIORITIES)
    add("--max-buffer-reuse", type=utils.at_least(1), help="how often a batch is used at most (default: no limit)")
    add("--quantize", type=groups_and_codewords, metavar="G,V", help="send indices: G groups of channels, V codewords")
    add("--nepochs", "--epochs", dest="epochs", type=utils.at_least(1), default=50, help="epochs of each module")
    add("--lr", type=utils.at_least(0, float, above=True), default=0.1, help="learning rate")
    add("--epochdecay", type=utils.at_least(1), default=15, help="epochs of a module after which it is divided by 5")
    add("--batch_size", "--batch-size", type=utils.at_least(2), default=128, help="images in a training batch")
    add("--test-batch-size", type=utils.at_least(1), default=256, help="images in a test batch")
    add("--ensemble", type=int, choices=[0, 1], default=1, help="test the ensembles of modules 0 to n too")
    add("--seed", type=utils.at_least(0), help="of the weights and of the data's order")
    add_network_flags(parser)
    parser.ignore("-j")
    args = parser.parse_args(argv)
    if args.seed is None:  # a resumed run has the checkpoint's
        parser.error("--seed is required")
    check_network_flags(parser, args)
    if args.slow_layer >= args.ncnn:
        parser.error(f"--slow-layer {args.slow_layer}: the {args.ncnn} layers are 0 to {args.ncnn - 1}")
    if args.idle and not args.pace:
        parser.error("--idle needs --pace SECONDS: how long a step sleeps")
    if args.quantize and args.feature_size % args.quantize[0]:
        parser.error(f"--quantize: {args.feature_size} channels cannot be cut into {args.quantize[0]} groups")
    return args


# The two ends of a buffer


class Images:
    """The input of the first module: an endless stream of training batches."""

    waited = False

    def __init__(self, batches):
        self.generator, self.figures = batches.generator, {}
        self.endless = (batch for _ in iter(int, 1) for batch in tqdm(batches, disable=None, leave=False))

    def sample(self):
        return next(self.endless)


class Received:
    """The ring buffer before a module. A thread puts received batches into it, and the module samples from it.

    With --sync it is a queue: each batch is returned once, in order, and the sender is at most M batches ahead.
    `waited` says whether the last call of `sample` had to wait.
    """

    def __init__(self, args, shape, device, team):
        size, sampling = max(args.buffer, 1), (args.buffer_sampling, args.max_buffer_reuse, args.seed)
        quantizer = args.quantize and ProductQuantizer(shape[0], *args.quantize).to(device)  # only to decode
        dtype = DTYPES.get(args.precision, torch.float32)
        ring = 1 if args.sync else size
        self.buffer = Buffer(ring, args.batch_size, shape, device, dtype, quantizer, *sampling)
        self.queue = queue.SimpleQueue() if args.sync else None
        self.team, self.changed = team, threading.Condition()
        self.figures = {"fresh": 0, "age": 0, "unused": 0}

    def receive(self):
        """The thread."""
        while True:
            _, tensors = transport.receive(self.team.previous)
            if self.queue is not None:
                self.queue.put(tensors)
            else:
                with self.changed:
                    self.put(*tensors)
                    self.changed.notify()

    def put(self, stored, labels, codebook=None):
        buffer = self.buffer
        self.figures["unused"] += buffer.uses.get(buffer.count - len(buffer.labels)) == 0  # and about to be overwritten
        if codebook is None:
            buffer.put(stored, labels)
        else:
            buffer.quantizer.codebook.copy_(codebook)
            buffer.put_stored(stored, labels)

    def sample(self):
        """(representation, labels) of a batch that `--buffer-sampling` chooses. None if the job is over."""
        self.waited = self.queue is not None and self.queue.empty()
        if self.queue is not None:
            self.put(*self.queue.get())
            with contextlib.suppress(OSError):  # the receiving thread notices too
                self.team.previous.sendall(b"!")
        with self.changed:
            while (batch := self.buffer.sample()) is None:  # nothing yet, or all used --max-buffer-reuse times
                if self.team.over.is_set():
                    return None
                self.waited = True
                self.changed.wait(0.1)
            self.figures["age"] += self.buffer.count - 1 - self.buffer.sampled
            self.figures["fresh"] += self.buffer.uses[self.buffer.sampled] == 1
            return tuple(tensor.clone() for tensor in batch)  # the thread may overwrite the ring at any time


class Sending:
    """Sends batches to the next module, in a thread. A batch that still waits is replaced by a newer one.

    With --sync, `put` waits instead. With --quantize, indices and the codebook are sent.
    """

    def __init__(self, args, shape, device, team):
        self.outbox = transport.Outbox(team, window=max(args.buffer, 1) if args.sync else 0)
        self.quantizer = args.quantize and ProductQuantizer(shape[0], *args.quantize, seed=args.seed).to(device)
        self.plain_bytes = args.batch_size * (4 * math.prod(shape) + 8)  # a batch in float32, and its labels

    def put(self, representation, labels):
        if self.quantizer:
            self.quantizer.update(representation)
            codebook = self.quantizer.codebook.clone()  # it may change before it is sent
            self.outbox.put(self.quantizer.encode(representation), labels, codebook)
        else:
            self.outbox.put(representation, labels)

    @property
    def figures(self):
        with self.outbox.changed:
            sent, dropped, size = self.outbox.sent, self.outbox.dropped, self.outbox.bytes
        return {"sent": sent, "dropped": dropped, "bytes": size, "plain_bytes": sent * self.plain_bytes}


# The algorithm


class Worker:
    """Trains module n, in a process of its own. It never waits for another module's step.

    `outputs` is None for the last module. `disturbed()` says whether this process is doing something else right now,
    which makes a step's duration meaningless.
    """

    def __init__(self, args, n, parts, shape, epoch_steps, device, inputs, outputs, disturbed):
        self.args, self.n, self.epoch_steps, self.device = args, n, epoch_steps, device
        self.parts, self.inputs, self.outputs, self.disturbed = parts, inputs, outputs, disturbed
        self.block, self.auxiliary_net = parts
        self.epochs = 0
        self.optimizer, self.scaler = self.new_optimizer(), cifar.grad_scaler(args, device)
        self.autocast, self.meter = utils.autocast(args, device), cifar.Meter(device)
        self.step = self.idle_step if args.idle else self.train_step
        self.silence = torch.zeros(args.batch_size, *shape, device=device)  # what an idle worker sends
        self.slowdown = args.slowdown if n == args.slow_layer // args.block_size else 1
        self.pace, self.due = self.slowdown * args.pace, time.monotonic()  # due: when the last step should end
        self.counts = {"samples": 0, "steps": 0, "seconds": 0.0}  # steps, seconds: measured ones only
        self.before, self.reported = None, collections.Counter()

    def new_optimizer(self):
        """After every --epochdecay epochs of the module: a 5 times smaller learning rate, and momentum from zero."""
        return cifar.sgd(self.parts, self.args.lr / 5 ** (self.epochs // self.args.epochdecay), weight_decay=5e-4)

    def send(self, representation, labels):
        if self.outputs:
            self.outputs.put(representation, labels)

    def train_epoch(self):
        """One epoch of module n (Algorithm 2)."""
        self.parts.train()
        for _ in range(self.epoch_steps):
            x, labels = self.inputs.sample()  # waits only while the buffer is empty
            with self.timed():
                self.step(x, labels)
        self.epochs += 1

    def train_step(self, x, labels):
        with self.autocast:
            representation = self.block(x)
            logits = self.auxiliary_net(representation)
            loss = F.cross_entropy(logits, labels)
        self.send(representation.detach(), labels)  # on its way during the backward pass
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.meter.update(loss, logits, labels)

    def idle_step(self, x, labels):
        self.send(self.silence, labels)

    @torch.no_grad()
    def feed(self, over):
        """After the last epoch: go on feeding the next module, in eval mode, as fast as in training."""
        self.parts.eval()
        pace = self.counts["seconds"] / max(self.counts["steps"], 1)
        while not over.is_set() and (batch := self.inputs.sample()):
            x, labels = batch
            start = time.monotonic()
            with self.autocast:
                self.send(self.silence if self.args.idle else self.block(x), labels)
            over.wait(max(0, pace - (time.monotonic() - start)))

    @contextlib.contextmanager
    def timed(self):
        """Stretch a step as --slowdown and --pace demand, and measure it, including the wait before it.

        With --pace, later steps make up for a delay of up to a step, so that other load on the machine does not decide
        the workers' rates.
        """
        start, disturbed = time.monotonic(), self.disturbed()
        yield
        if self.pace or self.slowdown > 1:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            now, begin = time.monotonic(), start if self.inputs.waited else max(self.due, start - self.pace)
            self.due = max(begin + self.pace, now + (self.slowdown - 1) * (now - start))
            time.sleep(self.due - now)
        now = time.monotonic()
        if not (disturbed or self.disturbed()):
            self.counts["steps"] += 1
            self.counts["seconds"] += now - (self.before or start)
        self.counts["samples"] += 1
        self.before = now

    def run(self, team):
        """Train all epochs. After each, send rank 0 the weights and the figures."""
        while self.epochs < self.args.epochs:
            self.train_epoch()
            news = {"figures": self.pop_figures()}
            if not self.args.idle:
                loss, news["top1"] = self.meter.pop()
                if not math.isfinite(loss):
                    raise SystemExit(f"Epoch {self.epochs}, module {self.n} on rank {self.n}: the loss is {loss}")
            if self.epochs < self.args.epochs and self.epochs % self.args.epochdecay == 0:
                self.optimizer = self.new_optimizer()
            team.report(news, [transport.pack(self.state_dict())])
            self.before = None  # this time belongs to no step
        if self.outputs and not self.args.sync:
            self.feed(team.over)
        team.over.wait()

    def pop_figures(self):
        """What has been counted since the last call."""
        counted = collections.Counter(self.counts)
        for end in filter(None, (self.inputs, self.outputs)):
            counted.update(end.figures)
        figures = {name: counted[name] - self.reported[name] for name in counted}
        self.reported = counted
        if self.outputs and self.outputs.quantizer:
            figures["errors"] = self.outputs.quantizer.pop_error()
        return figures

    def state_dict(self):
        quantizer = self.outputs.quantizer if self.outputs else None
        return {
            "block": self.block.state_dict(),
            "auxiliary_net": self.auxiliary_net.state_dict(),
            "epochs": self.epochs,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "quantizer": quantizer.state_dict() if quantizer else None,
            "generator": self.inputs.generator.get_state() if self.n == 0 else None,  # of the data's order
        }

    def load_state_dict(self, state):
        for name in ("block", "auxiliary_net", "optimizer", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        self.epochs = state["epochs"]
        if state["quantizer"] and self.outputs:
            self.outputs.quantizer.load_state_dict(state["quantizer"])
        if self.n == 0:
            self.inputs.generator.set_state(state["generator"])


# Rank 0's other job, in a thread of its own: test, log and checkpoint


class Member:
    """What rank 0 knows of module n as of its last finished epoch. The weights are in the network that is tested."""

    def __init__(self, network, n):
        self.block, self.auxiliary_net = network.blocks[n], network.auxiliary_nets[n]
        self.epochs, self.state, self.top1, self.recent = 0, None, 0.0, []
        self.figures, self.total = collections.Counter(), collections.Counter()

    def take(self, news, packed):
        self.state = transport.unpack(packed)
        self.block.load_state_dict(self.state.pop("block"))
        self.auxiliary_net.load_state_dict(self.state.pop("auxiliary_net"))
        self.epochs = self.state["epochs"]
        self.recent.append(news.get("top1", 0.0))  # idle workers have none
        self.figures.update({**news["figures"], "epochs": 1})

    def pop(self):
        """(train accuracy, figures) since the last call."""
        if self.recent:  # otherwise the module was done before
            self.top1 = sum(self.recent) / len(self.recent)
        self.total.update(self.figures)
        figures, self.recent, self.figures = self.figures, [], collections.Counter()
        return self.top1, figures

    def start(self):
        """The state for the worker to go on from."""
        return {"block": self.block.state_dict(), "auxiliary_net": self.auxiliary_net.state_dict(), **self.state}

    def state_dict(self):
        return {"state": self.state, "top1": self.top1, "total": dict(self.total)}

    def load_state_dict(self, state):
        self.state, self.top1, self.total = state["state"], state["top1"], collections.Counter(state["total"])
        self.epochs = self.state["epochs"]


@torch.no_grad()
def evaluate(model, autocast, batches):
    """Top-1 accuracy in % of every module, and of every ensemble of modules 0 to n, in one pass over the batches.

    An ensemble averages its modules' logits with weights 2^i / sum.
    """
    model.eval()
    correct = torch.zeros(2, len(model.blocks), device=batches.device)
    for images, labels in batches:
        x, total = images, 0
        for n in range(len(model.blocks)):
            with autocast:
                logits, x = model(x, n)
            total = total + 2**n * logits.float()  # the division by the sum changes no prediction
            correct[0, n] += (logits.argmax(1) == labels).sum()
            correct[1, n] += (total.argmax(1) == labels).sum()
    return (100 * correct / len(batches.labels)).tolist()


def collect(args, team, run, network, members, test, testing):
    """Log and checkpoint an epoch as soon as every module has finished it. No module waits for this.

    Every module is tested as it was after its last finished epoch, `epochtrue`. With --sync, that is this one.
    """
    autocast, waiting = utils.autocast(args, test.device), [collections.deque() for _ in members]
    for epoch in run.epochs(args.epochs):
        while True:
            for member, news in zip(members, waiting):
                while news and (not args.sync or member.epochs < epoch):
                    member.take(*news.popleft())
            if min(member.epochs for member in members) >= epoch:
                break
            rank, content, (packed,) = team.news.get()
            waiting[rank].append((content, packed))
        testing.set()
        tested = None if args.idle else evaluate(network, autocast, test)
        testing.clear()
        figures = []
        for n, member in enumerate(members):
            train, counted = member.pop()
            figures.append(counted)
            if tested:
                test_top1, ensemble = tested[0][n], f",ense {tested[1][n]:.2f}" if args.ensemble else ""
                epochs = f"epoch {epoch},epochtrue {member.epochs}"
                run.log(f"n: {n}, {epochs}, train {train:.2f}, test {test_top1:.2f}{ensemble}")
        log_figures(run, f"epoch {epoch}", figures)
        if epoch == args.epochs:
            log_figures(run, "all epochs", [member.total for member in members])
    team.finish()


def log_figures(run, when, figures):
    """Log one line per worker, from its counts."""
    for n, count in enumerate(figures):
        if not count["steps"]:
            continue
        line = f"worker {n}, {when}, steps/s: {count['steps'] / count['seconds']:.3f}"
        if count["fresh"]:
            reuse, staleness = count["samples"] / count["fresh"], count["age"] / count["samples"]
            line += f", reuse: {reuse:.3f}, staleness: {staleness:.3f}, never used: {count['unused']}"
        if count["sent"]:
            line += f", sent: {count['sent']}, dropped: {count['dropped']}, compression: "
            line += f"{count['plain_bytes'] / count['bytes']:.2f} ({count['bytes']:,} bytes)"
        if "errors" in count:
            line += f", relative MSE: {count['errors'] / count['epochs']:.4f}"
        run.log(line)


# Start


class Run(utils.Run):
    """A Run that tells the Team what to say at Ctrl-C, since the Team ends the whole job."""

    def interruption(self):
        if not self.last_checkpoint:
            return "Interrupted before this run finished an epoch."
        return f"Interrupted; go on from the last finished epoch with --resume {self.last_checkpoint}"


def join():
    """(store, rank, number of processes), from torchrun; without it, this process is alone."""
    names = ("RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
    if not any(os.environ.get(name) for name in names[:2]):
        return None, 0, 1
    *numbers, host = (os.environ.get(name, "") for name in names)
    rank, size, port = (int(number) if number.isdecimal() else -1 for number in numbers)
    if not 0 <= rank < size or port < 0 or not host:
        given = " ".join(f"{name}={os.environ.get(name, '')}" for name in names)
        utils.fail(f"the environment says only in part who takes part in this job ({given}): start with torchrun")
    try:
        store, rank, size = next(dist.rendezvous("env://"))
    except Exception as error:  # torch raises all kinds
        utils.fail(f"no connection to the job at {host}:{port}: {error}")
    store.set_timeout(datetime.timedelta(seconds=transport.PATIENCE))
    return store, rank, size


def set_up_device(args, size):
    """Seed torch and return the device of this process."""
    if size > 1 and not args.threads:
        args.threads = 1
    device = utils.setup(args)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device


def plan_buffers(args, shapes, size, device):
    """The buffers, on the meta device. Ends a run that does not fit its processes or its memory."""
    if len(shapes) != size:
        needs = f"{args.ncnn} layers in modules of {args.block_size} need {len(shapes)} processes, not {size}"
        command = f"torchrun --standalone --nproc_per_node={len(shapes)} cifar_async.py"
        utils.fail(f"{needs}: start with `{command} ...`, or change --block_size")
    rings = argparse.Namespace(**{**vars(args), "sync": False})  # a queue of --sync holds as many batches
    buffers = [Received(rings, shape, "meta", None).buffer for shape in shapes[:-1]]
    here = [*range(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))]  # ranks that share rank 0's memory
    if device.type == "cuda":
        here = [rank for rank in here if rank % torch.cuda.device_count() == 0]
    needed, free = sum(buffers[rank - 1].num_bytes() for rank in here), available_memory(device)
    if needed > free:
        utils.fail(
            f"{len(here)} buffers of {max(args.buffer, 1)} batches need {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB "
            "are free: choose a smaller --buffer or --feature_size, or --quantize"
        )
    return buffers


def lead(argv, size):
    """What rank 0 does before the others begin. Every mistake of the user ends the job here."""
    args = parse_args(argv)
    device = set_up_device(args, size)
    data = cifar.load_data(args, device, drop_last=True)
    network = make_network(args, data.num_classes, args.block_size)
    buffers = plan_buffers(args, network.shapes, size, device)
    tested = copy.deepcopy(network).to(device, memory_format=torch.channels_last)
    members = [Member(tested, n) for n in range(size)]
    run = Run(args, data, fixed=["epochs"], model=tested, members=members)
    if run.epoch == 0:
        run.log(f"slowdown: {args.slowdown:.3f} of layer {args.slow_layer}")
        stored = sum(buffer.num_bytes() for buffer in buffers)
        plain = sum(buffer.uncompressed_bytes() for buffer in buffers)
        factor = f", {plain / stored:.2f} times fewer than uncompressed float32" if buffers else ""
        run.log(f"buffers: {len(buffers)} of {max(args.buffer, 1)} batches, {stored:,} bytes{factor}")
    return args, device, data, network, tested, members, run


def main(argv=None):
    store, rank, size = join()
    if rank == 0:
        args, device, data, network, tested, members, run = lead(argv, size)
        meeting = {"arguments": vars(args), "num_classes": data.num_classes, "epoch_steps": len(data.train)}
    else:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # rank 0 says what there is to say
        if {"-h", "--help"} & {*(sys.argv if argv is None else argv)}:
            return
        meeting = transport.ask(store, rank)  # answered when rank 0 has found no mistake in the flags
        args = argparse.Namespace(**meeting["arguments"])  # rank 0's: only it may see the checkpoint to resume
        device = set_up_device(args, size)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        network = make_network(args, meeting["num_classes"], args.block_size)
    parts = utils.to_device(nn.ModuleList([network.blocks[rank], network.auxiliary_nets[rank]]), args, device)
    team = transport.Team(store, rank, size, meeting)
    with team.guard():
        testing = threading.Event()
        shapes, last = network.shapes, rank == size - 1
        inputs = Received(args, shapes[rank - 1], device, team) if rank else Images(data.train)
        outputs = None if last else Sending(args, shapes[rank], device, team)
        worker = Worker(
            args, rank, parts, shapes[rank], meeting["epoch_steps"], device, inputs, outputs, testing.is_set
        )
        if rank == 0:
            team.last_words = lambda: f"the last checkpoint: {run.last_checkpoint or 'none yet'}"
            team.interruption = run.interruption
            start, *others = [transport.pack(member.start() if run.epoch else {}) for member in members]
            for other, packed in enumerate(others, start=1):
                team.order(other, [packed])
            team.thread(collect, args, team, run, tested, members, data.test, testing)
        else:
            (start,) = team.orders.get()
        if state := transport.unpack(start):  # of a checkpoint
            worker.load_state_dict(state)
        if rank:
            team.thread(inputs.receive, peer=rank - 1)
        worker.run(team)
        team.close()


if __name__ == "__main__":
    main()
