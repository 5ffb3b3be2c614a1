"""What the ranks of a training job tell each other, over torch.distributed with Gloo: batches, and news to rank 0.

Nobody waits for another rank's training, as threads always have receives posted. How a job ends early: the first rank
that fails says why and notes it in the job's store, and the others end in silence. If a rank is killed, connections to
it break.
"""

import contextlib
import datetime
import os
import queue
import signal
import sys
import threading
import time
import traceback

import torch.distributed as dist

import machines

FOREVER = datetime.timedelta(days=365)  # may pass between two messages: a module may be slow
LOCAL_RANK = int(os.environ.get("LOCAL_RANK") or 0)


class Team:
    """What this process, one of the job's ranks, has to do with the others.

    Attributes:
        news: on rank 0, a queue of (rank, content) from all ranks' `report`, in order of arrival.
        done: on rank 0, an event to be set at the end of the job.
    """

    def __init__(self):
        if machines.place()[0]:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # until all have met, rank 0 alone says that it was Ctrl-C
        self.rank, self.size, self.store, self.silence = machines.join("gloo", FOREVER)
        self.news, self.threads, self.over, self.speaking = queue.SimpleQueue(), [], None, threading.Lock()
        self.done, self.closing = threading.Event(), threading.Event()
        self.store.set("checkpoint", "none yet")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.size > 1:
            signal.signal(signal.SIGTERM, self.terminated)
        self.thread(self.follow)

    def thread(self, function, *arguments):
        def guarded():
            with self.guard():
                function(*arguments)

        self.threads.append(threading.Thread(target=guarded, daemon=True))
        self.threads[-1].start()

    def scatter(self, contents):
        """This rank's item of the contents, rank 0's list."""
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
            for tag, tensor in enumerate(message, start=1):  # 0 is the tag of news
                dist.send(tensor, self.rank + 1, tag=tag)

    def receive(self, message):
        with self.blame(f"Rank {self.rank - 1}"):
            for tag, tensor in enumerate(message, start=1):
                dist.recv(tensor, self.rank - 1, tag=tag)

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
        with self.blame("A rank"):
            machines.leave()

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
                self.end(stop.code.partition("; the last checkpoint: ")[0])  # which utils.Run.stop adds, too
            self.closing.set()
            self.last_words()  # this process has said everything
            if self.size > 1:
                os._exit(stop.code)
            dist.destroy_process_group()
            raise
        except BaseException as error:
            traceback.print_exc()
            self.end(f"Rank {self.rank} failed: {type(error).__name__}: {error}")

    @contextlib.contextmanager
    def blame(self, who, patience=1):
        """A connection that breaks inside means that a rank has died, unless a rank gives another reason within
        `patience` seconds."""
        try:
            yield
        except RuntimeError:
            time.sleep(patience)
            while max(self.silence.values(), default=0) > 5:  # a machine may be gone: then machines.watch says so
                time.sleep(1)
            self.end(f"{who} died")

    def end(self, reason):
        """End this process, and so the job. Only the first rank that does it gives its reason."""
        with self.speaking:
            if words := self.last_words():
                # In one piece, as other processes write there too
                print(f"{reason}; {words}\n", end="", file=sys.stderr, flush=True)
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
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # pressed again
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

    def follow(self):
        """A thread that ends this process after another one, which this one might not notice or wait for forever."""
        with self.blame("torchrun", 3):  # which has the store
            while not self.closing.wait(1):
                if self.store.add("ended", 0) and not self.closing.wait(1):  # torchrun names who ends first
                    with self.speaking:
                        os._exit(1)
