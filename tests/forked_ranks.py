"""Ranks as under torchrun, in copies of the test's process, as importing torch again takes seconds."""

import multiprocessing
import os
import socket
import sys

from conftest import run


def fork_ranks(count, work, ranks):
    """`work(rank)` in `count` processes that find each other: the exit statuses they return (None is 0).

    Args:
        ranks: imagenet_dgl's module of that name.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    def begin(rank):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        ranks.RANK, ranks.COUNT = rank, count
        sys.exit(work(rank))

    processes = [multiprocessing.get_context("fork").Process(target=begin, args=(n,)) for n in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    for process in processes:
        process.kill()  # if it hangs
        process.join()
    return [process.exitcode for process in processes]


def run_ranks(count, ranks, script, *flags, folders):
    """A script on `count` ranks, each in its folder; what they say goes to the file descriptors 1 and 2."""

    def work(rank):
        status, out, err = run(script, *flags, cwd=folders[rank % len(folders)])
        print(out, file=sys.__stdout__, flush=True)
        print(err, file=sys.__stderr__, flush=True)
        return status

    return fork_ranks(count, work, ranks)
