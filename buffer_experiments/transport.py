"""What the ranks of a training job tell each other, over torch.distributed with Gloo: batches, and news to rank 0.

Nobody waits for another rank's training, as threads always have receives posted. How a job ends early: each second,
every rank adds to a number in torchrun's store. The first rank that fails says why and notes it there, and the others
end in silence. If a rank is killed, connections to it break; if a machine is gone, its numbers stand still.
"""

import collections
import contextlib
import datetime
import ipaddress
import itertools
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
import uuid

import utils

import torch
import torch.distributed as dist

FOREVER = datetime.timedelta(days=365)  # may pass between two messages: a module may be slow
SILENCE = 30  # seconds
GONE = f"for {SILENCE} s: that machine has gone, or the network between has; --resume goes on from the last checkpoint"
BATCH = 1  # tag of a batch; that of news is 0
LOCAL_RANK = int(os.environ.get("LOCAL_RANK") or 0)


def join_job():
    """(rank, address of each rank's machine, two connections to the job's store), from torchrun.

    Without it, this process is alone.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
    if not any(os.environ.get(name) for name in names[:2]):
        return 0, [""], dist.HashStore(), dist.HashStore()
    *numbers, host = (os.environ.get(name, "") for name in names)
    rank, size, port = (int(number) if number.isdecimal() else -1 for number in numbers)
    if not 0 <= rank < size or not 0 <= port < 2**16 or not host:
        given = " ".join(f"{name}={os.environ.get(name, '')}" for name in names)
        utils.fail(f"the environment says only in part who takes part in this job ({given}): start with torchrun")
    servers = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True", False
    try:
        stores = [dist.TCPStore(host, port, is_master=server, wait_for_workers=False) for server in servers]
        prefix = meet(stores[0], rank, size)
        stores = [dist.PrefixStore(prefix, store) for store in stores]
        addresses = choose_interface(stores[0], rank, size, host)
    except (dist.DistError, OSError) as error:
        reason = str(error).splitlines()[0]
        utils.fail(
            f"no connection to the job at {host}:{port}, or it has ended ({reason}): does --master-addr lead there?"
        )
    return rank, addresses, *stores


def meet(store, rank, size):
    """A prefix for this start of the job: torchrun's store may still hold what an earlier one has written.

    Each rank asks under a name that no earlier process had, and rank 0 answers until all have the prefix.
    """
    name = uuid.uuid4().hex
    if rank:
        store.set(f"question {rank}", name)
        prefix = store.get(f"answer {name}").decode()
        store.add(f"{prefix} arrived", 1)
        return prefix
    while store.add(f"{name} arrived", 0) < size - 1:
        for question in [f"question {other}" for other in range(1, size)]:
            if store.check([question]):  # perhaps an earlier process's: the answer does no harm
                store.set(f"answer {store.get(question).decode()}", name)
        time.sleep(0.05)
    return name


def choose_interface(store, rank, size, master):
    """Let Gloo use the network interface that leads to the other machines, unless GLOO_SOCKET_IFNAME names one.

    Gloo would take the address that the host's name has: on a stock Debian or Ubuntu, the loopback. Returns the address
    of each rank's machine.
    """
    import psutil  # only needed here

    own = address_towards(master)
    store.set(f"address {rank}", own)
    addresses = [store.get(f"address {other}").decode() for other in range(size)]
    if (others := {*addresses} - {own}) and ipaddress.ip_address(
        own
    ).is_loopback:  # the master is a name, and this is its machine
        own = address_towards(min(others))
    for interface, found in psutil.net_if_addrs().items():
        if own in {item.address.split("%")[0] for item in found}:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return addresses


def address_towards(host):
    """This machine's address in the network that leads to a host."""
    family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # sends nothing, only asks for the way
        return probe.getsockname()[0].split("%")[0]


class Team:
    """What this process, one of the job's ranks, has to do with the others.

    Attributes:
        news: on rank 0, a queue of (rank, content) from all ranks' `report`, in order of arrival.
        done: on rank 0, an event to be set at the end of the job.
    """

    def __init__(self):
        self.rank, self.addresses, self.store, self.store_of_gloo = join_job()
        self.size = len(self.addresses)
        self.news, self.threads, self.over, self.speaking = queue.SimpleQueue(), [], None, threading.Lock()
        self.done, self.closing, self.heard = threading.Event(), threading.Event(), threading.Event()
        self.store.set("checkpoint", "none yet")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.size > 1:
            signal.signal(signal.SIGTERM, self.terminated)
        self.thread(self.beat)
        self.thread(self.watch)

    def thread(self, function, *arguments):
        def guarded():
            with self.guard():
                function(*arguments)

        self.threads.append(threading.Thread(target=guarded, daemon=True))
        self.threads[-1].start()

    def scatter(self, contents):
        """Connect all ranks, waiting for the last one. Returns this rank's item of the contents, rank 0's list."""
        try:
            dist.init_process_group("gloo", None, FOREVER, self.size, self.rank, self.store_of_gloo)
        except RuntimeError as error:
            interface, reason = os.environ.get("GLOO_SOCKET_IFNAME"), str(error).splitlines()[0]
            advice = "set GLOO_SOCKET_IFNAME on each machine to the one that leads to the others"
            self.end(f"Rank {self.rank} cannot connect over the network interface {interface} ({reason}): {advice}")
        received = [None]
        with self.blame("A rank", 3):
            dist.scatter_object_list(received, contents)
        return received[0]

    def report(self, content):
        """Send rank 0 news."""
        if self.rank == 0:
            return self.news.put((0, content))
        with self.blame("Rank 0"):
            dist.send_object_list([content], 0)

    def hear(self, other, count):
        """On rank 0, a thread: so many news from `other`."""
        for _ in range(count):
            received = [None]
            with self.blame(f"Rank {other}"):
                dist.recv_object_list(received, other)
            self.news.put((other, *received))

    def send(self, message):
        with self.blame(f"Rank {self.rank + 1}"):
            dist.send(message.memory, self.rank + 1, tag=BATCH)

    def batches(self, messages, may_receive=lambda: None):
        """The tensors of each message from the previous rank, valid until the next one is asked for.

        Args:
            messages: all but one of them have a receive posted while the batch is used.
            may_receive: called before a receive is posted.
        """
        posted = collections.deque()
        for message in itertools.cycle(messages):
            may_receive()
            with self.blame(f"Rank {self.rank - 1}"):
                posted.append((dist.irecv(message.memory, self.rank - 1, tag=BATCH), message))
                if len(posted) < len(messages):
                    continue
                work, received = posted.popleft()
                work.wait()
            if received.number < 0:
                return
            yield received.tensors

    def finished(self):
        """Whether rank 0 has set `done`, and all others have called this. It does not wait."""
        if self.over is None and (self.rank or self.done.is_set()):
            self.over = dist.barrier(async_op=True)
        if self.over is None or not self.over.is_completed():
            return False
        with self.blame("A rank", 3):
            self.over.wait()
        return True

    def close(self):
        """End all threads, when the job is over."""
        self.closing.set()
        for thread in self.threads:
            thread.join()
        dist.barrier()  # the store may be rank 0's
        dist.destroy_process_group()

    # A job that ends early

    @contextlib.contextmanager
    def guard(self):
        """Whatever goes wrong inside ends the job."""
        try:
            yield
        except KeyboardInterrupt:
            self.interrupted()
        except SystemExit as stop:
            if isinstance(stop.code, str):
                self.end(stop.code)
            self.closing.set()
            self.last_words()  # this process has said everything
            if self.size > 1:
                os._exit(stop.code)
            raise
        except BaseException as error:
            traceback.print_exc()
            self.end(f"Rank {self.rank} failed: {type(error).__name__}: {error}")

    @contextlib.contextmanager
    def blame(self, who, patience=1):
        """A connection that breaks inside is somebody's death, unless they give a better reason in so many seconds."""
        try:
            yield
        except RuntimeError:
            time.sleep(patience)
            self.end(f"{who} died")

    def end(self, reason):
        """End this process, and so the job. Only the first rank that does it gives its reason."""
        with self.speaking:
            if words := self.last_words():
                line = f"{reason}; {words}\n".replace("checkpoint; the last checkpoint", "checkpoint")
                print(line, end="", file=sys.stderr, flush=True)  # in one piece, as other processes write there too
            os._exit(1)

    def last_words(self):
        """What to add to the reason, if this is the first rank that ends; otherwise None."""
        try:
            if self.store.add("ended", 1) == 1:
                return f"the last checkpoint: {self.store.get('checkpoint').decode()}"
        except RuntimeError:
            return None if LOCAL_RANK else "and torchrun's store is gone"

    def interrupted(self):
        """Ctrl-C: rank 0 says how to go on, if there is no other reason. The exit status is that of the signal."""
        if self.rank:
            time.sleep(1)
            self.end(f"Rank {self.rank} was interrupted")
        with self.speaking:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if self.last_words():
                sys.excepthook(KeyboardInterrupt)
            os.kill(os.getpid(), signal.SIGINT)

    def terminated(self, *_):
        """SIGTERM, which torchrun sends when a rank has failed: that one says so meanwhile, and ends this process."""
        timer = threading.Timer(5, os.kill, (os.getpid(), signal.SIGINT))
        timer.daemon = True
        timer.start()

    def beat(self):
        """A thread: a sign of life each second. It ends this process if another rank has ended, or is silent."""
        beats = silent = [0] * self.size
        with contextlib.suppress(RuntimeError):  # the store is gone: `watch` says so
            while not self.closing.wait(1):
                before = beats
                beats = [self.store.add(f"beat {rank}", int(rank == self.rank)) for rank in range(self.size)]
                silent = [seconds + 1 if old == new else 0 for seconds, old, new in zip(silent, before, beats)]
                self.heard.set()
                if gone := {rank for rank, seconds in enumerate(silent) if seconds >= SILENCE}:
                    machines = {self.addresses[rank] for rank in gone} - {self.addresses[self.rank]}
                    who = ", ".join(sorted(machines)) or f"rank {min(gone)}"
                    self.end(f"Nothing has been heard from {who} {GONE}")
                if self.store.add("ended", 0) and not self.closing.wait(1):  # torchrun names who ends first
                    with self.speaking:
                        os._exit(1)

    def watch(self):
        """A thread that ends this process if `beat` waits for the store forever: its connection may just be silent."""
        silent = 0
        while not self.closing.is_set():
            silent = 0 if self.heard.wait(1) else silent + 1
            self.heard.clear()
            if silent >= SILENCE:
                if LOCAL_RANK == 0:  # speaks for this machine
                    line = f"Nothing has been heard from {os.environ['MASTER_ADDR']} {GONE}\n"
                    print(line, end="", file=sys.stderr, flush=True)
                time.sleep(1)
                os._exit(1)


class Message:
    """A batch as it is sent: one piece of CPU memory, pinned for a GPU, with a number and tensors like these in it."""

    def __init__(self, tensors, device):
        sizes = [8, *(tensor.nbytes for tensor in tensors)]
        self.memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
        number, *parts = self.memory.split(sizes)
        self.number = number.view(torch.int64)  # of the batch; -1: there are no more
        self.tensors = [part.view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, tensors)]


class Copies:
    """Copies between a GPU and the CPU, on a stream of their own, so that they wait for nothing but their tensors.

    On a CPU, torch's streams and events do nothing.
    """

    def __init__(self, device):
        self.device, self.api = device, torch.get_device_module(device)
        self.stream = self.api.Stream(device)

    def event(self):
        """All that the current stream has been given so far."""
        event = self.api.Event()
        event.record()
        return event

    def to_cpu(self, sources, targets, computed):
        with self.api.stream(self.stream):
            computed.wait()
            for source, target in zip(sources, targets):
                target.copy_(source, non_blocking=True)
            copied = self.event()
        copied.synchronize()

    def to_device(self, sources):
        with self.api.stream(self.stream):
            tensors = [source.to(self.device, non_blocking=True) for source in sources]
            copied = self.event()
        copied.synchronize()
        for tensor in tensors if self.device.type == "cuda" else []:  # its memory is free when this stream has read it
            tensor.record_stream(self.api.current_stream(self.device))
        return tensors
