"""Messages between the processes of a training job: batches from each rank to the next, and news to rank 0.

They go over TCP sockets, which the processes find through torchrun's store. Each pair of processes that talk has a
socket of its own, so a thread that blocks on one disturbs no other. When a process dies, the operating system closes
its sockets at once, and its neighbours know who died. Rank 0 decides when the job ends, and says why: the other
processes report to it and obey. Nothing is encrypted, as everywhere in torch.distributed. Only processes that know the
job's token, which is in the store, are let in.

A message is JSON and the raw bytes of tensors. Only torch.load with weights_only=True unpickles anything.
"""

import contextlib
import io
import json
import os
import queue
import secrets
import signal
import socket
import struct
import sys
import threading
import time
import traceback

import torch

LENGTH = struct.Struct("!I")
PATIENCE = 300  # seconds that all processes have to connect
REASONS = 1  # second that rank 0 waits for the cause of a failure, after its first effect
EXPLAINED, DIED, LOST = 2, 1, 0  # how good a reason is: the process's own, its silence, or a neighbour's

# Messages


def memory(tensor):
    """The bytes of a dense CPU tensor, in memory order."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()


def send(connection, content, tensors=()):
    """Send JSON-compatible content, and tensors on any device. Returns the number of bytes sent."""
    dense = [t if t.is_contiguous(memory_format=torch.channels_last) else t.contiguous() for t in tensors]
    dense = [t.detach().cpu() for t in dense]  # keeps strides, so that the receiver's results are the same to the bit
    kinds = [(str(t.dtype).removeprefix("torch."), t.shape, t.stride()) for t in dense]
    header = json.dumps([content, kinds]).encode()
    connection.sendall(LENGTH.pack(len(header)) + header)
    for tensor in dense:
        connection.sendall(memory(tensor))
    return LENGTH.size + len(header) + sum(t.nbytes for t in dense)


def receive(connection):
    """(content, tensors) of the next message. Raises an OSError if the other process has gone."""
    header = bytearray(LENGTH.unpack(receive_into(connection, bytearray(LENGTH.size)))[0])
    content, kinds = json.loads(receive_into(connection, header))
    tensors = [torch.empty_strided(shape, stride, dtype=getattr(torch, dtype)) for dtype, shape, stride in kinds]
    for tensor in tensors:
        receive_into(connection, memory(tensor))
    return content, tensors


def receive_into(connection, target):
    view = memoryview(target)
    while view:
        count = connection.recv_into(view)
        if count == 0:
            raise ConnectionError("the other process has gone")
        view = view[count:]
    return target


def pack(state):
    """A state dict as a tensor of bytes."""
    file = io.BytesIO()
    torch.save(state, file)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8)


def unpack(packed):
    """The state dict, on the CPU."""
    return torch.load(io.BytesIO(packed.numpy()), map_location="cpu", weights_only=True)


# Processes


def ask(store, rank):
    """Rank 0's `meeting`: how to find it, and what it has to tell everybody.

    The store may still hold questions and answers of an earlier attempt.
    """
    question = secrets.token_hex(16)
    store.set(f"question {rank}", question)
    while not store.check([f"answer {question}"]):  # rank 0 may be downloading the data
        time.sleep(0.1)
    return json.loads(store.get(f"answer {question}"))


def answer(store, ranks, answered, meeting):
    """Answer these ranks' questions, if they are not in `answered`."""
    for rank in ranks:
        if store.check([f"question {rank}"]) and (question := store.get(f"question {rank}").decode()) not in answered:
            answered.add(question)
            store.set(f"answer {question}", json.dumps(meeting))


def own_host():
    """This machine's address in the network that connects torchrun's nodes."""
    master = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    family, kind, _, _, address = socket.getaddrinfo(*master, socket.AF_INET, socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing, only chooses the interface
        return probe.getsockname()[0]


def call(meeting, rank, address):
    """Connect to the process at the meeting's address, and tell it this one's rank and address."""
    connection = keep_alive(socket.create_connection(tuple(meeting["address"]), PATIENCE))
    connection.sendall(meeting["token"].encode())
    send(connection, [rank, address])
    return connection


class Team:
    """This process's connections to the previous and the next rank, and to rank 0 (on rank 0: to all others).

    Attributes:
        news: on rank 0, a queue of (rank, content, tensors) from all ranks' `report`, in order of arrival.
        over: set once rank 0 has called `finish`. From then on, nothing counts as a failure.
        previous, next: connections to the ranks before and after this one, or None.
        last_words: on rank 0, a function that returns what to add to the message about a failure.
        interruption: on rank 0, a function that returns the message about Ctrl-C.
    """

    def __init__(self, store, rank, size, meeting):
        self.rank, self.size, self.threads = rank, size, []
        self.news, self.orders, self.over = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event()
        self.lock, self.ending, self.reasons, self.last_words = threading.Lock(), threading.Lock(), [], str
        self.interruption = lambda: "Interrupted before this run finished an epoch."
        self.staff = {}  # rank -> connection for news and orders: on rank 0 to all others, on these to rank 0
        self.previous = self.next = None
        if size > 1:
            self.connect(store, meeting)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def connect(self, store, meeting):
        with socket.create_server((own_host(), 0), backlog=self.size) as server:
            address = server.getsockname()
            if self.rank == 0:
                addresses = self.gather(store, server, meeting)
                for other in self.staff:
                    self.tell(other, addresses[other + 1 : other + 2])
                following = addresses[1:2]
            else:
                self.staff[0] = call(meeting, self.rank, address)
                following, _ = receive(self.staff[0])
            signal.signal(signal.SIGTERM, self.terminated)
            for other in self.staff:  # now, because rank 0 may train and fail before this rank gets there
                self.thread(self.listen, other)
            if following:
                self.next = call({**meeting, "address": following[0]}, self.rank, address)
            if self.rank:
                server.settimeout(PATIENCE)
                self.previous = self.accept(server, meeting)[0]

    def gather(self, store, server, meeting):
        """On rank 0: wait until all others have connected. Returns their addresses, by rank."""
        meeting.update(address=server.getsockname(), token=secrets.token_hex(16))
        addresses, answered, patience = [None] * self.size, set(), time.monotonic() + PATIENCE
        server.settimeout(0.1)
        while missing := [*{*range(1, self.size)} - self.staff.keys()]:
            if time.monotonic() > patience:
                raise SystemExit(f"There is no connection from ranks {missing} after {PATIENCE} seconds")
            answer(store, missing, answered, meeting)
            with contextlib.suppress(TimeoutError):
                connection, other, addresses[other] = self.accept(server, meeting)
                self.staff[other] = connection
        return addresses

    def accept(self, server, meeting):
        """(connection, rank, address) of the next process that knows the token."""
        while True:
            connection = server.accept()[0]
            with contextlib.suppress(OSError):  # a stranger that has gone again
                connection.settimeout(PATIENCE)
                token = receive_into(connection, bytearray(len(meeting["token"])))
                if secrets.compare_digest(bytes(token), meeting["token"].encode()):
                    (other, address), _ = receive(connection)
                    return keep_alive(connection), other, address
            connection.close()

    def thread(self, function, *arguments, peer=None):
        """Start a thread. An OSError in it is blamed on the peer that it talks to."""

        def guarded():
            with self.guard(peer):
                function(*arguments)

        self.threads.append(threading.Thread(target=guarded, daemon=True))
        self.threads[-1].start()

    def tell(self, other, content, tensors=()):
        with self.lock, contextlib.suppress(OSError):  # if the other has gone, `listen` says so
            send(self.staff[other], content, tensors)

    def report(self, content, tensors=()):
        """Send rank 0 news."""
        if self.rank:
            self.tell(0, {"news": content}, tensors)
        else:
            self.news.put((0, content, tensors))

    def order(self, other, tensors):
        """On rank 0: put tensors into the `orders` of `other`."""
        self.tell(other, {"order": True}, tensors)

    def listen(self, other):
        """The thread that handles what `other` sends."""
        while True:
            try:
                content, tensors = receive(self.staff[other])
            except OSError:
                if self.rank == 0:
                    return self.end(f"Rank {other} died", DIED)
                if not self.over.is_set():
                    complain(f"Rank 0 died: rank {self.rank} ends too")
                    os._exit(1)
                return None
            if "news" in content:
                self.news.put((other, content["news"], tensors))
            elif "order" in content:
                self.orders.put(tensors)
            elif "reason" in content:
                self.end(content["reason"], content["quality"])
            elif "finish" in content:
                self.over.set()
            else:
                os._exit(1)

    def finish(self):
        """On rank 0: tell everybody that the job is done."""
        with self.ending:
            self.over.set()
        for other in self.staff:
            self.tell(other, {"finish": True})

    def close(self):
        """Call when the job is over: ends all threads. Rank 0 waits until all others have left."""
        for connection in filter(None, (self.previous, self.next, *(self.staff.values() if self.rank else ()))):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(PATIENCE)

    # Failures

    @contextlib.contextmanager
    def guard(self, peer=None):
        """Whatever goes wrong inside ends the job."""
        try:
            yield
        except KeyboardInterrupt:
            self.interrupted()
        except BaseException as error:
            if peer is not None and isinstance(error, OSError):
                return self.end(f"Rank {self.rank} lost its connection to rank {peer}", LOST)
            if not isinstance(error, SystemExit):
                traceback.print_exc()
                error = f"Rank {self.rank} failed: {type(error).__name__}: {error}"
            self.end(str(error))
            time.sleep(10 * REASONS)  # in which rank 0 ends this process
            os._exit(1)

    def end(self, reason, quality=EXPLAINED):
        """End the job. Rank 0 waits a moment first: a better reason than the first one may arrive."""
        if self.over.is_set():
            return
        if self.rank:
            return self.tell(0, {"reason": reason, "quality": quality})
        with self.ending:
            self.reasons.append((quality, reason))
            if len(self.reasons) == 1:
                threading.Thread(target=self.end_all, daemon=True).start()

    def end_all(self):
        time.sleep(REASONS)
        with self.ending:
            if not self.over.is_set():
                best = max(quality for quality, _ in self.reasons)
                reasons = "; ".join(dict.fromkeys(reason for quality, reason in self.reasons if quality == best))
                words = self.last_words()
                complain(reasons if words in reasons else f"{reasons}; {words}")
                self.dismiss()
                os._exit(1)

    def interrupted(self):
        """Ctrl-C: rank 0 prints a line about it. The exit status is that of the signal."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.rank:
            self.end(f"Rank {self.rank} was interrupted")
        else:
            self.ending.acquire()  # for good, so that no other message follows
            complain(f"\n{self.interruption()}")
            self.dismiss()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)

    def terminated(self, *_):
        """SIGTERM: torchrun sends it when a process has failed. Rank 0 says so meanwhile, and ends this process."""
        timer = threading.Timer(5 * REASONS, os.kill, (os.getpid(), signal.SIGINT))
        timer.daemon = True
        timer.start()

    def dismiss(self):
        """On rank 0: end all other processes, whatever their main threads are doing."""
        self.lock.acquire(timeout=REASONS)
        for connection in self.staff.values():
            with contextlib.suppress(OSError):
                connection.settimeout(REASONS)
                send(connection, {"end": True})


def complain(line):
    """Write a line to stderr in one piece, because other processes write there too."""
    print(f"{line}\n", end="", file=sys.stderr, flush=True)


def keep_alive(connection):
    """Let the connection notice a machine that is switched off, by probing it after 10 seconds of silence."""
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):  # not on all systems
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return connection


class Outbox:
    """A thread that sends messages to the next rank. `put` never waits: it replaces a message that has not left yet.

    With a `window`, `put` waits instead, and no message is lost. At most `window` messages are under way that the next
    rank has not acknowledged with a byte. `sent` and `dropped` count messages; `bytes` counts what was sent.
    """

    def __init__(self, team, window=0):
        self.team, self.window, self.waiting, self.changed = team, window, None, threading.Condition()
        self.sent = self.dropped = self.bytes = 0
        team.thread(self.run, peer=team.rank + 1)

    def put(self, *tensors):
        with self.changed:
            while self.window and self.waiting:
                self.changed.wait()
            self.dropped += self.waiting is not None
            self.waiting = tensors
            self.changed.notify_all()

    def run(self):
        while True:
            with self.changed:
                while self.waiting is None:
                    self.changed.wait(0.1)
                    if self.team.over.is_set():
                        return
                tensors, self.waiting = self.waiting, None
                self.changed.notify_all()
            size = send(self.team.next, None, tensors)
            with self.changed:
                self.sent, self.bytes = self.sent + 1, self.bytes + size
            if self.window and self.sent >= self.window:
                receive_into(self.team.next, bytearray(1))
