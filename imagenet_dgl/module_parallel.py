"""Module-parallel DGL under torchrun: each rank trains one module, and nothing ever comes back from the next one.

A rank receives representations and labels from the rank of the previous module (the first one loads images), and sends
its own representations on while it goes on with its backward pass. Transfers are asynchronous and double-buffered, so
the modules work on different batches at the same time. None ever waits for a gradient: the only bubble is the one in
which the pipeline fills (update unlocking, Algorithm 1 of arXiv 1901.08164). With K x D ranks, each of the K modules
has D replicas, which share every batch; module n is on ranks n * D to n * D + D - 1.

Needs torch alone, so that other projects can take it. On every rank:

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
    """A rank's place in the pipeline of modules, and its ways to the previous and the next one.

    Args:
        num_modules: K; the number of ranks must be a multiple of it.
        device: where this rank computes. The process group has a backend for it, and one for CPU tensors.
        batch_size: images of a whole batch on this rank; every message has room for that many.
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
        self.previous, self.next = rank - self.replicas, rank + self.replicas  # the ranks of those modules
        self.is_first, self.is_last = self.n == 0, self.n == num_modules - 1
        # By kind of pass, what a message is: whether x is in channels_last, and (shape, dtype) of all its tensors
        self.sent_layouts, self.received_layouts = {}, {}
        self.slots = [{} for _ in range(SLOTS)]  # buffers to receive in, made once and used again and again
        self.sending, self.sent = collections.deque(), 0  # in this pass
        self.waited = {"input": 0.0, "send": 0.0}

    # To the next module

    def send(self, representation, *others, kind="train"):
        """Start to send a batch; return at once unless SLOTS earlier ones have not been received yet.

        Does nothing on the last module.

        Args:
            representation: (B, ...) with B up to batch_size, detached. It must not be changed any more.
            others: (B, ...) each, such as labels.
            kind: of the pass. The first message of a kind fixes its memory layout for all later ones.

        Raises:
            ValueError: shapes or dtypes are not those of the first message of this kind, or B is too large.
        """
        if self.is_last:
            return
        tensors = [representation, *others]
        shapes = [(tuple(t.shape[1:]), t.dtype) for t in tensors]
        if kind not in self.sent_layouts:
            is_4d = representation.dim() == 4
            layout = is_4d and representation.is_contiguous(memory_format=torch.channels_last), shapes
            self.sent_layouts[kind] = layout
            self.announce(layout)
        channels_last, expected = self.sent_layouts[kind]
        if shapes != expected:
            raise ValueError(f"a {kind} message of {shapes}; the first one was of {expected}")
        count, missing = len(representation), self.batch_size - len(representation)
        if missing < 0:
            raise ValueError(f"a {kind} message of {count} images; batch_size is {self.batch_size}")
        if channels_last:
            representation = representation.permute(0, 2, 3, 1)  # contiguous in this order: sent from where it is
        # The others may be what was received, in memory that is received in again
        tensors = [representation.contiguous(), *(t.clone() for t in others)]
        if missing:  # the last batch of a pass
            tensors = [torch.cat((t, t.new_zeros(missing, *t.shape[1:]))) for t in tensors]
        self.post(count, tensors)

    def announce(self, layout):
        """Tell the next module what the messages of a pass are."""
        dist.send_object_list([layout], self.next, device=CPU)

    def post(self, count, tensors):
        if len(self.sending) == SLOTS:
            self.wait(self.sending.popleft()[0], "send")
        tensors = [torch.tensor([count]), *tensors]  # the first one stays on the CPU: it is read at once
        works = [dist.isend(tensor, self.next, tag=tag) for tag, tensor in enumerate(tensors)]
        self.sending.append((works, tensors))  # the memory must stay as it is until it has been sent
        self.sent += 1

    def end_pass(self, num_batches, kind="train"):
        """Call after a pass's last batch.

        Pads with empty messages if batches were skipped because no image could be read, then waits until everything is
        sent.
        """
        if not self.is_last:
            if kind not in self.sent_layouts and num_batches:  # not one batch
                self.announce((False, []))
            for _ in range(num_batches - self.sent):
                self.post(0, self.sending[-1][1][1:] if self.sending else self.empty_message(kind))
        while self.sending:
            self.wait(self.sending.popleft()[0], "send")
        self.sent = 0

    def empty_message(self, kind):
        layout = self.sent_layouts.get(kind, (False, []))
        return [torch.empty(self.batch_size, *shape, dtype=dtype, device=self.device) for shape, dtype in wire(*layout)]

    # From the previous module

    def receive(self, num_batches, kind="train"):
        """Yield the tensors of each message of a pass, as they were given to `send`; they are valid until the next one.

        Args:
            num_batches, kind: of the pass, as for `end_pass` and `send`.
        """
        if kind not in self.received_layouts and num_batches:
            layout = [None]
            dist.recv_object_list(layout, self.previous, device=CPU)
            (self.received_layouts[kind],) = layout
        channels_last, shapes = self.received_layouts.get(kind, (False, []))
        posted = collections.deque()
        for i in range(num_batches):
            while len(posted) < min(SLOTS, num_batches - i):
                posted.append(self.post_receive(self.slots[(i + len(posted)) % SLOTS], channels_last, shapes))
            works, (count, *tensors) = posted.popleft()
            self.wait(works, "input")
            if count.item():
                x, *others = (tensor[: count.item()] for tensor in tensors)
                yield x.permute(0, 3, 1, 2) if channels_last else x, *others
        if not shapes:  # there was not one batch: the next pass of this kind announces its own
            self.received_layouts.pop(kind, None)

    def post_receive(self, slot, channels_last, shapes):
        """Start to receive a message into the buffers of a slot."""
        tensors = [torch.empty(1, dtype=torch.long)]
        for key in enumerate(wire(channels_last, shapes)):
            if key not in slot:
                _, (shape, dtype) = key
                slot[key] = torch.empty(self.batch_size, *shape, dtype=dtype, device=self.device)
            tensors.append(slot[key])
        return [dist.irecv(tensor, self.previous, tag=tag) for tag, tensor in enumerate(tensors)], tensors

    def wait(self, works, what):
        """Until the transfers are done. On a GPU this rank goes on, and what it computes next waits."""
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


def wire(channels_last, shapes):
    """The (shape, dtype) of a message's tensors as they travel: a first one in channels_last as (H, W, C)."""
    if not channels_last:
        return shapes
    (shape, dtype), *others = shapes
    return [((*shape[1:], shape[0]), dtype), *others]
