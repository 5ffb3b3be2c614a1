"""How the ranks of a torchrun job find each other, on one machine or several, and how a lost machine ends the job.

Without torchrun there is one rank, and nothing to find.
"""

import contextlib
import ipaddress
import os
import socket
import sys
import threading
import time
import uuid

import utils

import torch
import torch.distributed as dist

CONNECT = 60  # seconds in which rank 0 must have been reached
SILENCE = 30  # seconds without a sign of another machine's life after which it has gone
OVER = threading.Event()  # the job is: from now on, nobody has to be heard


def place():
    """(rank, number of ranks), from torchrun's environment variables. Ends the program if they are there in part."""
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
            "the environment variables RANK and WORLD_SIZE ({!r} and {!r}) do not say which rank of a job this is: "
            "unset them, or start with torchrun, which sets them".format(*texts)
        )
    missing = [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if count > 1 and missing:
        utils.fail(f"WORLD_SIZE is {count}, but {' and '.join(missing)} are not set: start the job with torchrun")
    return rank, count


def join(backend="gloo", timeout=None):
    """Connect this rank to all others, and watch their machines.

    Args:
        backend, timeout: as for init_process_group.

    Returns:
        rank, number of ranks, a store that is new in this start of the job, and what `watch` returns.
    """
    rank, count = place()
    try:
        store = meet(connect(rank), rank, count) if count > 1 else dist.HashStore()
        addresses = choose_interface(store, rank, count) if count > 1 else [""]
    except dist.DistError as error:  # the job has ended meanwhile, or the port is in use
        utils.fail(f"the ranks of the job have not found each other: {str(error).splitlines()[0]}")
    silence = watch(store, rank, addresses)
    try:
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=count)
    except RuntimeError as error:
        utils.fail(
            f"Gloo cannot connect the ranks ({str(error).splitlines()[0]}): set GLOO_SOCKET_IFNAME on every machine to "
            "its interface in the network of the others"
        )
    return rank, count, store, silence


def connect(rank):
    """The store in which the ranks find each other: torchrun's, or without torchrun, rank 0's."""
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not port.isdecimal() or int(port) >= 2**16:
        utils.fail(f"MASTER_PORT is {port!r}, not the number of a port: start the job with torchrun, which sets it")
    is_master = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
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


def meet(store, rank, count):
    """The store with a prefix for this start of the job.

    After --max-restarts the store still has the addresses of the last start
    (https://github.com/pytorch/pytorch/issues/135712), and its count of restarts differs between machines. So each rank
    asks under a name that no earlier process had, and rank 0 answers until all have the prefix.
    """
    if rank:
        question = uuid.uuid4().hex
        store.set(f"question {rank}", question)
        prefix = store.get(f"answer {question}").decode()
        store.add(f"{prefix} arrived", 1)
    else:
        prefix, begin = uuid.uuid4().hex, time.monotonic()
        while (missing := count - 1 - store.add(f"{prefix} arrived", 0)) > 0:
            for other in range(1, count):
                if store.check([f"question {other}"]):  # perhaps an earlier process's: the answer does no harm
                    store.set(f"answer {store.get(f'question {other}').decode()}", prefix)
            time.sleep(0.05)
            if begin and time.monotonic() > begin + SILENCE:
                print(f"Waiting for {missing} of the {count} ranks", file=sys.stderr)
                begin = None
    return dist.PrefixStore(prefix, store)


def choose_interface(store, rank, count):
    """Let Gloo use the network interface that leads to the other machines, unless GLOO_SOCKET_IFNAME names one.

    Gloo would take the address that the host's name has: on a stock Debian or Ubuntu, the loopback. NCCL prefers other
    interfaces to that one, and is left to itself. Returns the address of each rank's machine.
    """
    own = address_towards(os.environ["MASTER_ADDR"])
    store.set(f"address {rank}", own)
    addresses = [store.get(f"address {other}").decode() for other in range(count)]
    others = [address for address in addresses if address != own]
    if others and "GLOO_SOCKET_IFNAME" not in os.environ:
        if is_loopback(own):  # MASTER_ADDR is a name, this is its machine
            own = address_towards(others[0])
        import psutil  # only needed here

        for interface, found in psutil.net_if_addrs().items():
            if own in {item.address.split("%")[0] for item in found}:
                os.environ["GLOO_SOCKET_IFNAME"] = interface
    return addresses


def address_towards(host):
    """This machine's address in the network that leads to a host."""
    family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # sends nothing, only asks for the way
        return probe.getsockname()[0].split("%")[0]


def is_loopback(address):
    return ipaddress.ip_address(address).is_loopback


def watch(store, rank, addresses):
    """From now on, end this process, with one line, when a machine has not been heard of for SILENCE seconds.

    When a machine loses its power, or the network is cut, TCP (and so Gloo) notices only after a quarter of an hour.

    Args:
        store: new in this start of the job.
        addresses: of each rank's machine.

    Returns:
        The seconds since each other machine was heard of, a dictionary that changes.
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
    return silence


def leave():
    """The last thing that every rank does: wait until all are here."""
    dist.all_reduce(torch.zeros(1))
    OVER.set()
    dist.destroy_process_group()
