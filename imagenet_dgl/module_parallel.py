"""Module-parallel DGL under torchrun: each rank trains one module, and nothing ever comes back from the next one.

A rank receives representations and labels from the rank of the module before (or, the first one, loads images), and
sends its own representations on while it goes on with its backward pass. Transfers are asynchronous and
double-buffered: modules work on different batches at the same time and, since none ever waits for a gradient, there is
no bubble but the one in which the pipeline fills (update unlocking, Algorithm 1 of arXiv 1901.08164). With K x D ranks
the K modules have D replicas each, which share every batch; module n is on ranks n * D to n * D + D - 1.

Needs torch alone, to be taken into other projects. On every rank:

    pipeline = ModuleParallel(num_modules, device, batch_size)
    for x, labels in images if pipeline.n == 0 else pipeline.receive(num_batches):
        logits, representation = module(x)
        pipeline.send(representation.detach(), labels)
        ...  # loss, backward pass and step of this module
    pipeline.end_pass(num_batches)
"""

import collections
import io
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

SLOTS = 2  # batches on their way at a time: one is computed while another one comes, or goes
CPU = torch.device("cpu")


class ModuleParallel:
    """A rank's place in the pipeline of modules, and its ways to the ranks before and behind it.

    Args:
        num_modules: K; the number of ranks must be a multiple of it.
        device: where this rank computes. The process group has a backend for it, and one for CPU tensors.
        batch_size: images of a whole batch on this rank; every message has room for so many.
        profile: measure on a GPU, too, how long the transfers are waited for; costs speed there.

    Attributes:
        n, replica, replicas: this rank has module n, and share `replica` of `replicas` of every batch.
        group: the process group of the module's replicas.
        waited: seconds spent on waiting for "input" and "send" so far.

    Raises:
        ValueError: the number of ranks is not a multiple of K.
        RuntimeError: from any method, when another rank has gone.
    """

    def __init__(self, num_modules, device, batch_size, profile=False):
        count, rank = dist.get_world_size(), dist.get_rank()
        if count % num_modules:
            raise ValueError(f"{num_modules} modules need {num_modules} ranks, or a multiple of it, not {count}")
        self.num_modules, self.device, self.batch_size, self.profile = num_modules, device, batch_size, profile
        self.replicas = count // num_modules
        mesh = init_device_mesh(device.type, (num_modules, self.replicas), mesh_dim_names=("module", "replica"))
        (self.n, self.replica), self.group = mesh.get_coordinate(), mesh.get_group("replica")
        self.column = mesh.get_group("module")
        self.before, self.behind = rank - self.replicas, rank + self.replicas
        self.is_first, self.is_last = self.n == 0, self.n == num_modules - 1
        self.layouts, self.announced = {}, set()  # by kind of pass: of the tensors of a message
        self.slots = [{} for _ in range(SLOTS)]  # buffers to receive in, made once and used again and again
        self.sending, self.sent = collections.deque(), 0  # in this pass
        self.waited = {"input": 0.0, "send": 0.0}

    # To the next module

    def send(self, representation, *others, kind="train"):
        """Start to send a batch, and return at once unless SLOTS earlier ones have not been received yet.

        Does nothing on the last module.

        Args:
            representation: (B, ...) with B up to batch_size, detached; it must not be changed any more.
            others: (B, ...) each, such as labels.
            kind: of the pass: all its messages have the same tensors.
        """
        if self.is_last:
            return
        channels_last = representation.dim() == 4 and representation.is_contiguous(memory_format=torch.channels_last)
        if channels_last:
            representation = representation.permute(0, 2, 3, 1)  # contiguous so: sent from where it is
        # The others may be what was received, in memory that is received in again
        tensors = [representation.contiguous(), *(t.clone() for t in others)]
        if kind not in self.announced:
            self.announced.add(kind)
            layouts = [(tuple(t.shape[1:]), t.dtype) for t in tensors]
            dist.send_object_list([channels_last, layouts], self.behind, device=CPU)
        count, missing = len(representation), self.batch_size - len(representation)
        if missing:  # the last batch of a pass
            tensors = [torch.cat((t, t.new_zeros(missing, *t.shape[1:]))) for t in tensors]
        self.post(count, tensors)

    def post(self, count, tensors):
        if len(self.sending) == SLOTS:
            self.wait(self.sending.popleft()[0], "send")
        tensors = [torch.tensor([count]), *tensors]  # the first one stays on the CPU: it is read at once
        works = [dist.isend(tensor, self.behind, tag=tag) for tag, tensor in enumerate(tensors)]
        self.sending.append((works, tensors))  # the memory must stay as it is till it has been sent
        self.sent += 1

    def end_pass(self, num_batches):
        """Behind the last batch of a pass: wait until all has been sent.

        Fewer batches than num_batches may have come, as a batch in which no image can be read does not.
        """
        if not self.is_last:
            for _ in range(num_batches - self.sent):
                self.post(0, self.sending[-1][1][1:])
        while self.sending:
            self.wait(self.sending.popleft()[0], "send")
        self.sent = 0

    # From the module before

    def receive(self, num_batches, kind="train"):
        """Yield the tensors of each message of a pass, as they were given to `send`; they are valid till the next one.

        Args:
            num_batches, kind: of the pass, as for `end_pass` and `send`.
        """
        posted = collections.deque()
        for i in range(num_batches):
            while len(posted) < min(SLOTS, num_batches - i):
                posted.append(self.post_receive(self.slots[(i + len(posted)) % SLOTS], kind))
            works, (count, *tensors) = posted.popleft()
            self.wait(works, "input")
            if count.item():
                x, *others = (tensor[: count.item()] for tensor in tensors)
                channels_last, _ = self.layouts[kind]
                yield x.permute(0, 3, 1, 2) if channels_last else x, *others

    def post_receive(self, slot, kind):
        """Start to receive a message into the buffers of a slot."""
        if kind not in self.layouts:
            self.layouts[kind] = [None, None]
            dist.recv_object_list(self.layouts[kind], self.before, device=CPU)
        tensors = [torch.empty(1, dtype=torch.long)]
        for key in enumerate(self.layouts[kind][1]):
            if key not in slot:
                _, (shape, dtype) = key
                slot[key] = torch.empty(self.batch_size, *shape, dtype=dtype, device=self.device)
            tensors.append(slot[key])
        return [dist.irecv(tensor, self.before, tag=tag) for tag, tensor in enumerate(tensors)], tensors

    def wait(self, works, what):
        """Till the transfers are done; on a GPU this rank goes on, and what it computes next waits."""
        self.synchronize()
        begin = time.perf_counter()
        for work in works:
            work.wait()
        self.synchronize()
        self.waited[what] += time.perf_counter() - begin

    def synchronize(self):
        if self.profile and self.device.type == "cuda":
            torch.cuda.synchronize()

    # For what all modules must know, and for checkpoints

    def broadcast(self, thing):
        """The first module's `thing`, on all modules of the replica."""
        things = [thing]
        dist.broadcast_object_list(things, group_src=0, group=self.column, device=CPU)
        return things[0]

    def gather(self, state):
        """The `state` of every module, in order, on rank 0; None on all others."""
        if self.replica:
            return None
        if self.n:
            file = io.BytesIO()
            torch.save(state, file)
            dist.send_object_list([file.getvalue()], 0, device=CPU)
            return None
        states = [state]
        for n in range(1, self.num_modules):
            packed = [None]
            dist.recv_object_list(packed, n * self.replicas, device=CPU)
            states.append(torch.load(io.BytesIO(packed[0]), map_location=CPU, weights_only=True))
        return states
