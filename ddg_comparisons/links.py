"""Ranks of one machine as if on machines of their own, joined by slow links: for Linux, as root, with `ip` and `tc`.

Each rank gets a network namespace. Rank 0's has the switch that all are plugged into, and each limits what it sends.
Nothing is left to clean up: the kernel removes a namespace with its process, however that ends.
"""

import argparse
import ctypes
import os
import re
import shlex
import subprocess

DEVICE = "dgl0"  # the name, in each namespace, of the rank's way out


def rate(text):
    """An argparse type: a rate as `tc` takes it, such as 1gbit."""
    if not re.fullmatch(r"[1-9]\d*[kmg]bit", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate such as 10gbit, 1gbit or 100mbit")
    return text


def why_not():
    """Why this machine permits no shaped links, in a few words; None if it does."""
    needed = "ip link add v0 type veth peer name v1; ip link add b0 type bridge; tc qdisc add dev v0 " + shape("1gbit")
    needed += "; tc qdisc replace dev v0 root noqueue"
    try:
        tried = subprocess.run(["unshare", "--net", "sh", "-ec", needed], capture_output=True, text=True)
    except FileNotFoundError:
        return "there is no command unshare"
    return (tried.stderr.strip().splitlines() or ["not permitted"])[-1] if tried.returncode else None


def shape(rate):
    # The bucket holds more than the largest piece (64 KiB) that the kernel hands over; the queue does not overflow
    return f"root tbf rate {rate} burst 128kb limit 16mb"


def limit(rate):
    """From now on, this rank sends at this rate; with None, as fast as it can. After `join`."""
    do(f"tc qdisc replace dev {DEVICE} {shape(rate) if rate else 'root noqueue'}")


def join(store, rank, count):
    """Move this process into a namespace of its own, on the network of all `count` ranks.

    To be called on every rank, before the process group is made. `store`: one that needs no network.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x40000000):  # CLONE_NEWNET
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if rank == 0:
        do(f"ip link add {DEVICE} type bridge")
        for other in range(1, count):
            pid = store.get(f"pid {other}").decode()
            do(f"ip link add port{other} type veth peer name {DEVICE} netns {pid}")
            do(f"ip link set port{other} master {DEVICE} up")
        store.set("plugged in", "")
    else:
        store.set(f"pid {rank}", str(os.getpid()))
        store.get("plugged in")
    do(f"ip address add 10.0.{rank // 250}.{rank % 250 + 1}/16 dev {DEVICE}")
    do(f"ip link set {DEVICE} up")
    do("ip link set lo up")
    # Also on GPUs, all goes through the link
    os.environ.update(GLOO_SOCKET_IFNAME=DEVICE, NCCL_SOCKET_IFNAME=DEVICE, NCCL_NET="Socket")
    os.environ.update(NCCL_P2P_DISABLE="1", NCCL_SHM_DISABLE="1")


def do(command):
    subprocess.run(shlex.split(command), check=True)
