"""What the ranks of a training job tell each other, over torch.distributed with Gloo: batches, and news to rank 0.

Nobody waits for another rank's training, as threads always have receives posted. A rank that fails says why and ends
its process. torchrun ends the others on its machine, and the broken connections those on other machines.
"""

import contextlib
import datetime
import os
import queue
import signal
import sys
import threading
import traceback

import torch.distributed as dist

import machines

FOREVER = datetime.timedelta(days=365)  # may pass between two messages: a module may be slow


class Team:
    """What this process, one of the job's ranks, has to do with the others.

    Attributes:
        news: on rank 0, a queue of (rank, content) from all ranks' `report`, in order of arrival.
        done: on rank 0, an event to be set at the end of the job.
    """

    def __init__(self):
        if machines.place()[0]:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # rank 0 alone says that it was Ctrl-C
        self.rank, self.size = machines.join("gloo", FOREVER)
        self.news, self.threads, self.over, self.done = queue.SimpleQueue(), [], None, threading.Event()
        self.ending = threading.Lock()

    def thread(self, function, *arguments):
        def guarded():
            with self.guard():
                function(*arguments)

        self.threads.append(threading.Thread(target=guarded, daemon=True))
        self.threads[-1].start()

    @contextlib.contextmanager
    def guard(self):
        """Whatever goes wrong inside ends this process at once, whatever its other threads do."""
        try:
            try:
                yield
            except RuntimeError as error:
                machines.lost(error)
                raise
        except KeyboardInterrupt:
            for number in (signal.SIGINT, signal.SIGTERM):  # pressed again, or torchrun's
                signal.signal(number, signal.SIG_IGN)
            sys.excepthook(KeyboardInterrupt)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        except SystemExit as stop:
            if self.size == 1 and threading.current_thread() is threading.main_thread():
                dist.destroy_process_group()
                raise
            self.ending.acquire()  # and keep it: one thread speaks
            if isinstance(stop.code, str):
                print(f"{stop.code}\n", end="", file=sys.stderr, flush=True)  # in one piece: others write there, too
            os._exit(1 if isinstance(stop.code, str) else stop.code)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def scatter(self, contents):
        """This rank's item of the contents, rank 0's list."""
        received = [None]
        dist.scatter_object_list(received, contents)
        return received[0]

    def report(self, content):
        """Send rank 0 news."""
        if self.rank == 0:
            return self.news.put((0, content))
        dist.send_object_list([content], 0)

    def hear(self, other, count):
        """On rank 0, a thread: so many news from `other`."""
        for _ in range(count):
            received = [None]
            dist.recv_object_list(received, other)
            self.news.put((other, *received))

    def send(self, message):
        for tag, tensor in enumerate(message, start=1):  # 0 is the tag of news
            dist.send(tensor, self.rank + 1, tag=tag)

    def receive(self, message):
        for tag, tensor in enumerate(message, start=1):
            dist.recv(tensor, self.rank - 1, tag=tag)

    def finished(self):
        """Whether rank 0 has set `done`, and all others have called this. It does not wait."""
        if self.over is None and (self.rank or self.done.is_set()):
            self.over = dist.barrier(async_op=True)
        if self.over is None or not self.over.is_completed():
            return False
        self.over.wait()
        return True

    def close(self):
        """End all threads, when the job is over."""
        for thread in self.threads:
            thread.join()
        machines.leave()
