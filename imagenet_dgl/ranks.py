"""Training under torchrun: what a rank is, and what the ranks do together.

Without torchrun there is one rank, and everything here does nothing.
"""

import contextlib
import inspect
import ipaddress
import os
import signal
import socket
import sys
import threading
import time
import uuid
import zipfile
import zlib

import utils

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

PATIENCE = 10  # seconds in which torchrun ends this rank when another one has failed
CONNECT = 60  # seconds in which rank 0 must have been reached
SILENCE = 30  # seconds without a sign of another machine's life after which it has gone
OVER = threading.Event()  # the job is: from now on, nobody has to be heard


def place():
    """(rank, number of ranks), from torchrun's environment variables."""
    texts = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if texts == (None, None):
        return 0, 1
    try:
        rank, count = map(int, texts)
        if not 0 <= rank < count:
            raise ValueError
    except (TypeError, ValueError):
        os.environ.pop("RANK", None)  # there is no other rank to speak first
        utils.fail(
            "the environment variables RANK and WORLD_SIZE ({!r} and {!r}) do not say which rank this is: unset them, "
            "or start with torchrun, which sets them".format(*texts)
        )
    return rank, count


RANK, COUNT = place()


def here():
    """Where something happened, for a message; empty if there is one rank."""
    return f" on rank {RANK}" if COUNT > 1 else ""


def share(pipeline=None):
    """(which share of each batch is this rank's, number of shares)."""
    return (pipeline.replica, pipeline.replicas) if pipeline else (RANK, COUNT)


@contextlib.contextmanager
def one_message():
    """Let only the rank that fails speak: torchrun ends those that fail because it has gone. No traceback of faults
    outside the program."""
    try:
        with without_traceback():
            yield
    except KeyboardInterrupt:  # perhaps while a rank that has lost another one waits
        if RANK:
            raise SystemExit(1) from None
        raise


@contextlib.contextmanager
def without_traceback():
    try:
        yield
    except RuntimeError as error:
        lines = str(error).strip().splitlines()
        if "shared memory" in str(error) or "DataLoader worker (pid" in str(error):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise again at the exit
            raise SystemExit(
                f"A process that loads images has failed{here()}: {lines[-1].strip()} (less memory is needed with "
                "fewer workers, -j, or a smaller -b; --resume goes on from the last checkpoint)"
            ) from None
        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        if COUNT == 1 or not lost:
            raise
        time.sleep(PATIENCE)
        raise SystemExit(f"Rank {RANK} has lost the connection to another rank: {lines[0]}") from None


def setup(args):
    """utils.setup; under torchrun, a GPU or a CPU thread for each rank, of which rank 0 alone prints."""
    device = utils.setup(args)
    if COUNT == 1:
        return device
    if missing := [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        utils.fail(f"WORLD_SIZE is {COUNT}, but {' and '.join(missing)} are not set: start with torchrun")
    if device.type == "cuda":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            utils.fail(f"this machine has {gpus} GPUs, too few for rank {local} (from 0); start fewer, or --no-cuda")
        torch.cuda.set_device(local)
    elif not args.threads and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    if RANK:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    store = meet()
    watch(store, RANK, choose_interface(store, RANK, COUNT))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=RANK, world_size=COUNT)
    except RuntimeError as error:
        utils.fail(
            f"Gloo cannot connect the ranks ({str(error).splitlines()[0]}): set GLOO_SOCKET_IFNAME on every machine to "
            "its interface in the network of the others"
        )
    compare_checkpoints(args.resume)
    return device


def connect():
    """The store in which the ranks find each other: torchrun's, or without torchrun, rank 0's."""
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not port.isdecimal() or int(port) >= 2**16:
        utils.fail(f"MASTER_PORT is {port!r}, not the number of a port: start with torchrun, which sets it")
    is_master = RANK == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    deadline = time.monotonic() + CONNECT
    while not is_master:
        try:
            socket.create_connection((host, port), CONNECT).close()  # TCPStore's own message has 30 lines
            break
        except OSError as error:
            if time.monotonic() > deadline:
                utils.fail(
                    f"no connection to rank 0 at {host}, port {port} ({error}): start torchrun with an address of the "
                    "first machine that leads there from all others, --master-addr"
                )
            time.sleep(1)
    return dist.TCPStore(host, int(port), is_master=is_master, multi_tenant=True, wait_for_workers=False)


def meet():
    """The store in which the ranks find each other, with a prefix for this start of the job.

    After --max-restarts the store still has the addresses of the last start
    (https://github.com/pytorch/pytorch/issues/135712), and its count of restarts differs between machines. So each rank
    asks under a name that no earlier process had, and rank 0 answers until all have the prefix.
    """
    store = connect()
    if RANK:
        question = uuid.uuid4().hex
        store.set(f"question {RANK}", question)
        prefix = store.get(f"answer {question}").decode()
        store.add(f"{prefix} arrived", 1)
    else:
        prefix, begin = uuid.uuid4().hex, time.monotonic()
        while (missing := COUNT - 1 - store.add(f"{prefix} arrived", 0)) > 0:
            for rank in range(1, COUNT):
                if store.check([f"question {rank}"]):  # perhaps an earlier process's: the answer does no harm
                    store.set(f"answer {store.get(f'question {rank}').decode()}", prefix)
            time.sleep(0.05)
            if begin and time.monotonic() > begin + SILENCE:
                print(f"Waiting for {missing} of the {COUNT} ranks", file=sys.stderr)
                begin = None
    return dist.PrefixStore(prefix, store)


def choose_interface(store, rank, count):
    """Let Gloo use the network interface that leads to the other machines, unless GLOO_SOCKET_IFNAME names one.

    Gloo would take the address that the host's name has: on a stock Debian or Ubuntu, the loopback. NCCL prefers other
    interfaces to that one, and is left to itself.

    Args:
        store: new in this start of the job; all ranks use it to tell their addresses.

    Returns:
        The address of each rank's machine: different machines have different ones.
    """
    own = address_towards(os.environ["MASTER_ADDR"])
    store.set(f"address {rank}", own)
    addresses = [store.get(f"address {other}").decode() for other in range(count)]
    others = [address for address in addresses if address != own]
    if others and "GLOO_SOCKET_IFNAME" not in os.environ:
        if is_loopback(own):  # MASTER_ADDR is a name, this is its machine
            own = address_towards(others[0])
        import psutil  # only needed here

        interfaces = psutil.net_if_addrs().items()
        os.environ["GLOO_SOCKET_IFNAME"] = next(n for n, found in interfaces if own in {a.address for a in found})
    return addresses


def address_towards(host):
    """This machine's address in the network that leads to a host."""
    family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # sends nothing, only asks for the way
        return probe.getsockname()[0]


def is_loopback(address):
    return ipaddress.ip_address(address).is_loopback


def watch(store, rank, addresses):
    """From now on, end this process, with one line, when a machine has not been heard of for SILENCE seconds.

    When a machine loses its power, or the network is cut, TCP (and so Gloo) notices only after a quarter of an hour.

    Args:
        store: as for choose_interface.
        addresses: of each rank's machine.
    """
    own, store = addresses[rank], store.clone()  # a connection of its own: calls may hang
    is_first = addresses.index(own) == rank  # on this machine: it speaks for all
    heard, silence = {}, {address: 0 for address in addresses if address != own}

    def listen():
        with contextlib.suppress(RuntimeError):  # the store has gone, and all machines are silent from now on
            while not OVER.wait(1):
                if is_first:
                    store.add(f"heartbeats of {own}", 1)
                for address in silence:
                    if heard.get(address) != (count := store.add(f"heartbeats of {address}", 0)):
                        heard[address], silence[address] = count, 0

    def judge():
        while not OVER.wait(1):
            for address in silence:
                silence[address] += 1  # not read from a clock: this process may have been stopped for a while
            if silent := [address for address, seconds in silence.items() if seconds > SILENCE]:
                machines = " and ".join(os.environ["MASTER_ADDR"] if is_loopback(a) else a for a in silent)
                message = (
                    f"Nothing has been heard from {machines} for {SILENCE} s: that machine has gone, or the network "
                    "between has; --resume goes on from the last checkpoint"
                )
                print(message, file=sys.stderr) if is_first else time.sleep(1)
                os._exit(1)

    for work in (listen, judge) if silence else ():
        threading.Thread(target=work, daemon=True).start()


def compare_checkpoints(path):
    """End the program unless all ranks resume the same checkpoint, or none does.

    On machines that do not share a folder, some ranks would go on and the others would start from scratch.
    """
    seen = [None] * COUNT
    dist.all_gather_object(seen, checksum(path))
    for rank, other in enumerate(seen):
        if other != seen[0]:
            has, lacks = (0, rank) if seen[0] else (rank, 0)
            what = "another checkpoint than" if seen[0] and other else "no checkpoint, unlike"
            utils.fail(
                f"--resume: rank {lacks} has {what} rank {has}: put the same one into the --save_folder of every "
                "machine, or share that folder"
            )


def checksum(path):
    """Of a checkpoint's contents, from the table of its zip archive; None if there is no checkpoint."""
    if path is None:
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            return zlib.crc32(repr([(entry.filename, entry.CRC) for entry in archive.infolist()]).encode())
    except (OSError, zipfile.BadZipFile):
        return "damaged"  # whoever loads it says so


def end():
    """The last thing that every rank does."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))  # wait until all are here
        OVER.set()
        dist.destroy_process_group()


def size(group=None):
    """The number of ranks, of all or of a process group."""
    return group.size() if group else COUNT


def all_reduce(tensor, group=None):
    """The sum over all ranks (of a process group), in place."""
    if size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def data_parallel(module, group=None):
    """The module, its gradients averaged over the ranks (of a process group)."""
    # Running statistics are averaged once an epoch instead of being sent with every batch
    new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    keep_buffers = {"forward_sync_buffers" if new else "broadcast_buffers": False}
    return DistributedDataParallel(module, process_group=group, **keep_buffers) if size(group) > 1 else module


@torch.no_grad()
def average_buffers(model, group=None):
    """Give all ranks (of a process group) the mean of their running statistics, to evaluate and save one network."""
    if size(group) > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                all_reduce(buffer, group).div_(size(group))
