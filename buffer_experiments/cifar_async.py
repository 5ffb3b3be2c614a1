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

import collections
import contextlib
import copy
import io
import itertools
import math
import os
import queue
import sys
import threading
import time

import utils

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import cifar
import transport
from buffer import ProductQuantizer
from cifar_buffer import evaluate
from models import add_flags, check_flags, check_memory, log_start, make_buffer, make_network


def parse_args(argv=None):
    parser = utils.ArgumentParser(__file__, __doc__)
    add_flags(parser, "module")
    add = parser.add_argument
    add("--buffer", type=utils.at_least(0), default=0, help="M, batches in a buffer; 0: one batch")
    add("--block_size", type=utils.at_least(1), default=1, help="layers of a module")
    add("--slow-layer", type=utils.at_least(0), default=0, help="slow down the module with this layer, from 0")
    add("--slowdown", type=utils.at_least(1, float), default=1.0, help="how many times: it sleeps after each step")
    add("--pace", type=utils.at_least(0, float), default=0.0, metavar="S", help="least time of a step; x --slowdown")
    add("--sync", action="store_true", help="synchronous DGL as a pipeline: each batch once, in order, waited for")
    add("--idle", action="store_true", help="to measure the transport: steps only sleep for --pace")
    parser.ignore("-j")
    args = parser.parse_args(argv)
    check_flags(parser, args)
    if args.slow_layer >= args.ncnn:
        parser.error(f"--slow-layer {args.slow_layer}: the {args.ncnn} layers are 0 to {args.ncnn - 1}")
    if args.idle and not args.pace:
        parser.error("--idle needs --pace SECONDS: how long a step sleeps")
    return args


# The algorithm


class Worker:
    """Trains module n, in a process of its own. It never waits for another module's step.

    Args:
        parts: the block and the auxiliary network.
        shape: of a representation, (C, s, s).
        counts: what `inputs` and `outputs` count too. `outputs` is None for the last module.
        disturbed: whether rank 0 is testing, so that the duration of a step in this process means nothing.
    """

    def __init__(self, args, n, parts, shape, epoch_steps, device, inputs, outputs, counts, disturbed):
        self.args, self.n, self.parts, self.epoch_steps, self.device = args, n, parts, epoch_steps, device
        self.inputs, self.outputs, self.counts, self.disturbed = inputs, outputs, counts, disturbed
        self.block, self.auxiliary_net = parts
        self.quantizer = outputs and outputs.quantizer
        self.epochs, self.scaler, self.meter = 0, cifar.grad_scaler(args, device), cifar.Meter(device)
        self.optimizer, self.autocast = self.new_optimizer(), utils.autocast(args, device)
        self.zeros = torch.zeros(args.batch_size, *shape, device=device) if args.idle else None  # what it then sends
        self.slowdown = args.slowdown if n == args.slow_layer // args.block_size else 1
        self.pace, self.due = self.slowdown * args.pace, time.monotonic()  # due: when the last step should end
        self.before, self.reported = None, collections.Counter()

    def train_epoch(self):
        """One epoch of module n (Algorithm 2)."""
        self.parts.train()
        for _ in range(self.epoch_steps):
            x, labels = self.inputs.sample()  # waits only while the buffer is empty
            with self.timed():
                self.send(self.zeros, labels) if self.args.idle else self.train_step(x, labels)
        self.epochs += 1

    def train_step(self, x, labels):
        with self.autocast:
            representation = self.block(x)
            logits = self.auxiliary_net(representation)
            loss = F.cross_entropy(logits, labels)
        self.send(representation.detach(), labels)  # on a CPU, on its way during the backward pass
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.meter.update(loss, logits, labels)

    def send(self, representation, labels):
        if self.outputs:
            self.outputs.put(representation, labels)

    @torch.no_grad()
    def feed(self, finished):
        """After the last epoch: go on feeding the next module, in eval mode, as fast as in training."""
        self.parts.eval()
        pace = self.counts["seconds"] / max(self.counts["steps"], 1)
        while not finished() and (batch := self.inputs.sample()):
            x, labels = batch
            start = time.monotonic()
            with self.autocast:
                self.send(self.zeros if self.args.idle else self.block(x), labels)
            self.synchronize()
            time.sleep(max(0, pace - (time.monotonic() - start)))

    def new_optimizer(self):
        """After every --epochdecay epochs of the module: a 5 times smaller learning rate, and momentum from zero."""
        return cifar.sgd(self.parts, self.args.lr / 5 ** (self.epochs // self.args.epochdecay), weight_decay=5e-4)

    def run(self, team):
        """Train all epochs. After each, send rank 0 the weights and the figures."""
        while self.epochs < self.args.epochs:
            self.train_epoch()
            news = {"figures": self.pop_figures()}
            if not self.args.idle:
                loss, news["top1"] = self.meter.pop()
                if not math.isfinite(loss):
                    self.stop(f"Epoch {self.epochs}, module {self.n} on rank {self.n}: the loss is {loss}")
            if self.epochs < self.args.epochs and self.epochs % self.args.epochdecay == 0:
                self.optimizer = self.new_optimizer()
            state = io.BytesIO()
            torch.save(self.state_dict(), state)
            team.report({**news, "state": state.getvalue()})
            self.before = None  # this time belongs to no step
        if self.outputs and not self.args.sync:
            self.feed(team.finished)
        while not team.finished():
            time.sleep(0.05)
        if self.outputs:
            self.outputs.replace(())

    def stop(self, reason):  # on rank 0, utils.Run's instead, which knows whether there is a checkpoint
        raise SystemExit(f"{reason}; rank 0's last checkpoint, if any: {utils.checkpoint_path(self.args)}")

    @contextlib.contextmanager
    def timed(self):
        """Stretch a step as --slowdown and --pace demand, and measure it, including the wait before it.

        With --pace, later steps make up for a delay of up to a step, so that other load on the machine does not decide
        the workers' rates.
        """
        start, disturbed, stretched = time.monotonic(), self.disturbed(), self.pace or self.slowdown > 1
        yield
        self.synchronize()
        if stretched:
            now, begin = time.monotonic(), start if self.inputs.waited else max(self.due, start - self.pace)
            self.due = max(begin + self.pace, now + (self.slowdown - 1) * (now - start))
            time.sleep(self.due - now)
        now = time.monotonic()
        if not (disturbed or self.disturbed()):
            self.counts["steps"] += 1
            self.counts["seconds"] += now - (self.before or start)
        self.counts["samples"] += 1
        self.before = now

    def synchronize(self):
        """On a GPU, wait until the step is finished: only finished ones are counted."""
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def pop_figures(self):
        """What has been counted since the last call. Steps and seconds: measured ones only."""
        counted = self.counts.copy()
        figures, self.reported = counted - self.reported, counted
        if self.quantizer and not math.isnan(error := self.quantizer.pop_error()):  # before there was a codebook
            figures.update(mse=error, mse_epochs=1)
        return figures

    def saved(self):
        parts = {"parts": self.parts, "optimizer": self.optimizer, "scaler": self.scaler}
        return parts | ({"quantizer": self.quantizer} if self.quantizer else {})

    def state_dict(self):
        generator = self.inputs.generator.get_state() if self.n == 0 else None  # of the data's order
        parts = {name: part.state_dict() for name, part in self.saved().items()}
        return {"epochs": self.epochs, "generator": generator, "counts": dict(self.counts), **parts}

    def load_state_dict(self, state):
        self.epochs = state["epochs"]
        self.counts.update(state["counts"])
        self.reported = self.counts.copy()
        for name, part in self.saved().items():
            part.load_state_dict(state[name])
        if self.n == 0:
            self.inputs.generator.set_state(state["generator"])


# The two ends of a buffer


class Images:
    """The input of the first module: an endless stream of training batches."""

    waited = False

    def __init__(self, batches):
        self.generator = batches.generator
        self.endless = (batch for _ in itertools.count() for batch in tqdm(batches, disable=None, leave=False))

    def sample(self):
        return next(self.endless)


class Received:
    """The ring buffer before a module. A thread puts received batches into it, and the module samples from it.

    With --sync it is a queue: each batch is returned once, in order, and M batches at most are asked for ahead.
    `waited` says whether the last call of `sample` had to wait.
    """

    def __init__(self, args, shape, device, team, counts):
        size, self.queue = max(args.buffer, 1), queue.SimpleQueue() if args.sync else None
        self.buffer = make_buffer(args, shape, device, 1 if args.sync else None)
        self.message = make_message(self.buffer, device)
        self.free, self.changed, self.ended = threading.Semaphore(size), threading.Condition(), False
        self.team, self.counts = team, counts

    def receive(self):
        """The thread."""
        while True:
            if self.queue:
                self.free.acquire()
            self.team.receive(self.message)
            number, *tensors = self.message
            if number < 0:
                break
            if self.queue:
                self.queue.put([tensor.clone() for tensor in tensors])
                continue
            with self.changed:
                self.put(*tensors)
                self.changed.notify()
        with self.changed:
            self.ended = True
            self.changed.notify()

    def put(self, labels, *stored):
        buffer = self.buffer
        self.counts["unused"] += buffer.uses.get(buffer.count - len(buffer.labels)) == 0  # and about to be overwritten
        if buffer.quantizer:
            codebook, *stored = stored
            buffer.quantizer.codebook.copy_(codebook)
        buffer.put_stored(*stored, labels)

    def sample(self):
        """(representation, labels) of a batch that `--buffer-sampling` chooses. None if the job is over."""
        self.waited = self.queue is not None and self.queue.empty()
        if self.queue:
            self.put(*self.queue.get())
            self.free.release()
        with self.changed:
            while (batch := self.buffer.sample()) is None:  # nothing yet, or all used --max-buffer-reuse times
                if self.ended:
                    return None
                self.waited = True
                self.changed.wait()
            self.counts["age"] += self.buffer.count - 1 - self.buffer.sampled
            self.counts["fresh"] += self.buffer.uses[self.buffer.sampled] == 1
            return tuple(tensor.clone() for tensor in batch)  # the thread may overwrite the ring at any time


class Sending:
    """Sends batches to the next module, in a thread. A batch that still waits is replaced by a newer one.

    With --sync, `put` waits instead until the last batch has left. With --quantize, indices and the codebook are sent.
    """

    def __init__(self, args, shape, device, team, counts):
        self.quantizer = args.quantize and ProductQuantizer(shape[0], *args.quantize, seed=args.seed).to(device)
        buffer = make_buffer(args, shape, "meta", 1)
        self.message, self.plain_bytes = make_message(buffer, device), buffer.uncompressed_bytes()
        self.team, self.counts, self.sync = team, counts, args.sync
        self.changed, self.waiting, self.busy = threading.Condition(), None, False
        team.thread(self.run)

    def put(self, representation, labels):
        if self.quantizer:
            self.quantizer.update(representation)
            codebook = self.quantizer.codebook.clone()  # it may change before it is sent
            batch = labels, codebook, self.quantizer.encode(representation)
        else:
            batch = labels, representation.permute(0, 2, 3, 1)
        self.replace(batch)

    def replace(self, batch):
        """Let the batch wait. An empty one: there are no more."""
        with self.changed:
            while self.sync and (self.waiting is not None or self.busy):
                self.changed.wait()
            self.counts["dropped"] += self.waiting is not None
            self.waiting = batch
            self.changed.notify_all()

    def run(self):
        """The thread."""
        batch, (number, *tensors) = True, self.message
        while batch:
            with self.changed:
                while self.waiting is None:
                    self.changed.wait()
                batch, self.waiting, self.busy = self.waiting, None, True
            number.fill_(self.counts["sent"] if batch else -1)
            for tensor, source in zip(tensors, batch):
                tensor.copy_(source)
            self.team.send(self.message)
            size = sum(tensor.nbytes for tensor in self.message)
            self.counts.update(sent=1, bytes=size, plain_bytes=self.plain_bytes)
            with self.changed:
                self.busy = False
                self.changed.notify_all()


def make_message(buffer, device):
    """On the CPU: a batch's number (-1: there are no more), labels, codebook if there is one, and what is stored."""
    codebook = [buffer.quantizer.codebook] if buffer.quantizer else []
    parts, pin = [buffer.labels[0], *codebook, buffer.stored[0]], device.type == "cuda"
    return [torch.zeros(1).long(), *(torch.empty(t.shape, dtype=t.dtype, pin_memory=pin) for t in parts)]


# Rank 0's other job, in a thread of its own: test, log and checkpoint


class Member:
    """What rank 0 knows of module n as of its last finished epoch. The network that is tested has its weights, too."""

    def __init__(self, network, n):
        self.parts = nn.ModuleList([network.blocks[n], network.auxiliary_nets[n]])
        self.state, self.top1, self.recent = {"epochs": 0}, 0.0, []
        self.figures, self.total = collections.Counter(), collections.Counter()

    def take(self, news):
        self.state = torch.load(io.BytesIO(news["state"]), map_location="cpu", weights_only=True)
        self.parts.load_state_dict(self.state["parts"])
        self.recent.append(news.get("top1", 0.0))  # idle workers have none
        self.figures.update(news["figures"])

    def pop(self):
        """(train accuracy, figures) since the last call."""
        if self.recent:  # otherwise the module was done before
            self.top1 = sum(self.recent) / len(self.recent)
        self.total.update(self.figures)
        figures, self.recent, self.figures = self.figures, [], collections.Counter()
        return self.top1, figures

    def state_dict(self):
        return {"state": self.state, "top1": self.top1, "total": dict(self.total)}

    def load_state_dict(self, state):
        self.state, self.top1, self.total = state["state"], state["top1"], collections.Counter(state["total"])
        self.parts.load_state_dict(self.state["parts"])


def collect(args, team, run, network, members, test, testing):
    """Log and checkpoint an epoch as soon as every module has finished it. No module waits for this.

    Every module is tested as it was after its last finished epoch, `epochtrue`. With --sync, that is this one.
    """
    autocast, waiting = utils.autocast(args, test.device), [collections.deque() for _ in members]
    if test.device.type == "cuda":  # a stream of this thread's own: rank 0 trains on the other one
        torch.cuda.set_stream(torch.cuda.Stream(test.device))
    for epoch in run.epochs(args.epochs):
        while True:
            for member, news in zip(members, waiting):
                while news and (not args.sync or member.state["epochs"] < epoch):
                    member.take(news.popleft())
            if min(member.state["epochs"] for member in members) >= epoch:
                break
            rank, news = team.news.get()
            waiting[rank].append(news)
        testing.set()
        tested = None if args.idle else evaluate(network, autocast, test)
        testing.clear()
        figures = []
        for n, member in enumerate(members):
            train, counted = member.pop()
            figures.append(counted)
            if tested:
                test_top1, ensemble = tested[0][n], f",ense {tested[1][n]:.2f}" if args.ensemble else ""
                epochs = f"epoch {epoch},epochtrue {member.state['epochs']}"
                run.log(f"n: {n}, {epochs}, train {train:.2f}, test {test_top1:.2f}{ensemble}")
        log_figures(run, f"epoch {epoch}", figures)
        if epoch == args.epochs:
            log_figures(run, "all epochs", [member.total for member in members])
    team.done.set()


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
        if count["mse_epochs"]:
            line += f", relative MSE: {count['mse'] / count['mse_epochs']:.4f}"
        run.log(line)


# Start


def set_up_device(args, size):
    """Seed torch and return the device of this process."""
    if size > 1 and not args.threads:
        args.threads = 1
    device = utils.setup(args)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device


def plan_buffers(args, shapes, size, device):
    """The buffers, on the meta device. Ends a run that does not fit its processes or its memory."""
    if len(shapes) != size:
        needs = f"{args.ncnn} layers in modules of {args.block_size} need {len(shapes)} processes, not {size}"
        command = f"torchrun --standalone --nproc_per_node={len(shapes)} cifar_async.py"
        utils.fail(f"{needs}: start with `{command} ...`, or change --block_size")
    buffers = [make_buffer(args, shape, "meta") for shape in shapes[:-1]]
    here = [*range(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))]  # ranks that share rank 0's memory
    if device.type == "cuda":
        here = [rank for rank in here if rank % torch.cuda.device_count() == 0]
    check_memory(args, [buffers[rank - 1] for rank in here], device)
    return buffers


def main(argv=None):
    if os.environ.get("RANK", "0") in ("0", ""):
        args = parse_args(argv)
    elif {"-h", "--help"} & {*(sys.argv if argv is None else argv)}:
        return  # rank 0 shows it
    team = transport.Team()
    with team.guard():
        rank, size, testing, jobs = team.rank, team.size, threading.Event(), None
        if rank == 0:  # every mistake of the user ends the job here, before the others begin
            device = set_up_device(args, size)
            data = cifar.load_data(args, device, drop_last=True)
            network = make_network(args, data.num_classes, args.block_size)
            buffers = plan_buffers(args, network.shapes, size, device)
            tested = copy.deepcopy(network).to(device, memory_format=torch.channels_last)
            members = [Member(tested, n) for n in range(size)]
            run = utils.Run(args, data, fixed=["epochs"], model=tested, members=members)
            if run.epoch == 0:
                log_start(run, args, buffers, f"{args.slowdown:.3f} of layer {args.slow_layer}")
            jobs = [(args, data.num_classes, len(data.train), member.state) for member in members]
        args, num_classes, epoch_steps, state = team.scatter(jobs)  # only rank 0 may see the checkpoint to resume
        if rank:
            device = set_up_device(args, size)
            network = make_network(args, num_classes, args.block_size)
        parts = utils.to_device(nn.ModuleList([network.blocks[rank], network.auxiliary_nets[rank]]), args, device)
        shapes, counts = network.shapes, collections.Counter()
        inputs = Received(args, shapes[rank - 1], device, team, counts) if rank else Images(data.train)
        outputs = Sending(args, shapes[rank], device, team, counts) if rank < size - 1 else None
        ends = inputs, outputs, counts
        worker = Worker(args, rank, parts, shapes[rank], epoch_steps, device, *ends, testing.is_set)
        if state["epochs"]:
            worker.load_state_dict(state)
        if rank:
            team.thread(inputs.receive)
        else:
            worker.stop = run.stop
            for other in range(1, size):
                team.thread(team.hear, other, args.epochs - members[other].state["epochs"])
            team.thread(collect, args, team, run, tested, members, data.test, testing)
        worker.run(team)
        team.close()


if __name__ == "__main__":
    main()
