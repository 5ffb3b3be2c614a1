"""How the ranks of a torchrun job find each other, on one machine or several, and how a lost machine ends the job.

Without torchrun there is one rank, and nothing to find.
"""

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
PATIENCE = 10  # seconds in which torchrun ends this rank when another one has failed
OVER = threading.Event()  # set when the job is over: then silence is no fault
THREADS = []  # those of `watch`


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
        rank, number of ranks.
    """
    rank, count = place()
    try:
        store = meet(connect(rank), rank, count) if count > 1 else dist.HashStore()
        addresses = choose_interface(store, rank, count) if count > 1 else [""]
    except dist.DistError as error:  # the job has ended meanwhile, or the port is in use
        utils.fail(f"the ranks of the job have not found each other: {str(error).splitlines()[0]}")
    watch(store, rank, addresses)
    hook = sys.excepthook
    try:
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=count)
    except RuntimeError as error:
        # On one machine, there is nothing to set
        if len(set(addresses)) == 1 and not os.environ.get("GLOO_SOCKET_IFNAME"):
            lost(error)
        utils.fail(
            f"Gloo cannot connect the ranks ({str(error).splitlines()[0]}): set GLOO_SOCKET_IFNAME on every machine to "
            "its interface in the network of the others"
        )
    sys.excepthook = hook  # torch's puts "[rank0]: " before the line that follows Ctrl-C
    return rank, count


def connect(rank):
    """The store in which the ranks find each other: torchrun's, or without torchrun, rank 0's."""
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not port.isdecimal() or int(port) >= 2**16:
        utils.fail(f"MASTER_PORT is {port!r}, not the number of a port: start the job with torchrun, which sets it")
    is_master = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    deadline = time.monotonic() + CONNECT
    while not is_master:
        try:
            socket.create_connection((host, port), 5).close()  # TCPStore's own message has 30 lines
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
    asks for the prefix, again and again, under a name that no earlier process had. Rank 0 answers when all are asking:
    a machine that has gone is waited for, and what a dead process has asked counts for nothing.
    """
    own = uuid.uuid4().hex
    if rank:
        while not store.check([f"answer {own}"]):
            store.set(f"question {rank}", own)
            time.sleep(0.05)
        return dist.PrefixStore(store.get(f"answer {own}").decode(), store)
    questions, begin = [f"question {other}" for other in range(1, count)], time.monotonic()
    while not all_ask(store, questions):
        if begin and time.monotonic() > begin + SILENCE:
            missing = sum(not store.check([question]) for question in questions)
            print(f"Waiting for {missing} of the {count} ranks", file=sys.stderr)
            begin = None
    for question in questions:
        store.set(f"answer {store.get(question).decode()}", own)
    return dist.PrefixStore(own, store)


def all_ask(store, questions):
    """Whether all questions are asked within a second from now."""
    for question in questions:
        store.delete_key(question)
    for _ in range(50):
        time.sleep(0.02)
        if store.check(questions):
            return True
    return False


def choose_interface(store, rank, count):
    """Let Gloo use the network interface that leads to the other machines, unless GLOO_SOCKET_IFNAME names one.

    Gloo would take the address that the host's name has: on a stock Debian or Ubuntu, the loopback. NCCL prefers other
    interfaces to that one, and is left to itself. Returns the address of each rank's machine, or MASTER_ADDR.
    """
    own = address_towards(os.environ["MASTER_ADDR"])
    is_loopback = ipaddress.ip_address(own).is_loopback  # MASTER_ADDR is a name, this is its machine
    store.set(f"address {rank}", os.environ["MASTER_ADDR"] if is_loopback else own)
    addresses = [store.get(f"address {other}").decode() for other in range(count)]
    others = [address for address in addresses if address != addresses[rank]]
    if others and not os.environ.get("GLOO_SOCKET_IFNAME"):
        if is_loopback:
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


def watch(store, rank, addresses):
    """From now on, end this process, with one line, when a machine has not been heard of for SILENCE seconds.

    When a machine loses its power, or the network is cut, TCP (and so Gloo) notices only after a quarter of an hour.

    Args:
        store: new in this start of the job.
        addresses: of each rank's machine.
    """
    own, store = addresses[rank], store.clone()  # a connection of its own: calls may hang
    is_first = addresses.index(own) == rank  # on this machine: it speaks for all
    heard, silence = {}, {address: 0 for address in addresses if address != own}
    has_store = True

    def listen():
        nonlocal has_store
        try:
            while not OVER.wait(1):
                if is_first:
                    store.add(f"heartbeats of {own}", 1)
                for address in silence:
                    if heard.get(address) != (count := store.add(f"heartbeats of {address}", 0)):
                        heard[address], silence[address] = count, 0
        except RuntimeError:  # all machines are silent from now on
            has_store = False

    def judge():
        while not OVER.wait(1):
            for address in silence:
                silence[address] += 1  # not read from a clock: this process may have been stopped for a while
            if silent := [address for address, seconds in silence.items() if seconds > SILENCE]:
                reason = f"Nothing has been heard from {' and '.join(silent)} for {SILENCE} s: that machine has gone"
                if not has_store:
                    reason = f"The store of {os.environ['MASTER_ADDR']}'s torchrun cannot be reached: that has ended"
                message = f"{reason}, or the network between has; --resume goes on from the last checkpoint"
                print(message, file=sys.stderr) if is_first else time.sleep(1)
                os._exit(1)

    OVER.clear()
    THREADS[:] = [threading.Thread(target=work, daemon=True) for work in ((listen, judge) if silence else ())]
    for thread in THREADS:
        thread.start()


def lost(error):
    """If the error is the loss of another rank, end this one: torchrun does it, or after PATIENCE seconds, one line."""
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        time.sleep(PATIENCE)
        first, *_ = str(error).strip().splitlines()
        reason = f"Rank {place()[0]} has lost the connection to another rank: {first}"
        raise SystemExit(f"{reason}; --resume goes on from the last checkpoint")


def leave():
    """The last thing that every rank does: wait until all are here."""
    dist.all_reduce(torch.zeros(1))
    OVER.set()
    for thread in THREADS:  # one that is in the store's code when Python ends would abort the process
        thread.join(timeout=5)
    dist.destroy_process_group()
