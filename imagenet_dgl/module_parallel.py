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
PRECISIONS = ("fp32", "bf16", "int8")
CPU = torch.device("cpu")


class ModuleParallel:
    """A rank's place in the pipeline of modules, and its ways to the previous and the next one.

    Args:
        num_modules: K; the number of ranks must be a multiple of it.
        device: where this rank computes. The process group has a backend for it, and one for CPU tensors.
        batch_size: images of a whole batch on this rank; every message has room for that many.
        profile: measure on a GPU, too, how long the transfers are waited for.
        send_precision: of the representations that travel; see `encode`.

    Attributes:
        n, replica, replicas: this rank has module n, and share `replica` of `replicas` of every batch.
        group: the process group of the module's replicas.
        waited: seconds spent on waiting for "input" and "send", in the passes that have ended.

    Raises:
        ValueError: the number of ranks is not a multiple of K, or there is no such precision.
        RuntimeError: from any method, when another rank has gone.
    """

    def __init__(self, num_modules, device, batch_size, profile=False, send_precision="fp32"):
        count, rank = dist.get_world_size(), dist.get_rank()
        if count % num_modules:
            raise ValueError(f"{num_modules} modules need {num_modules} ranks, or a multiple of it, not {count}")
        if send_precision not in PRECISIONS:
            raise ValueError(f"send_precision is one of {', '.join(PRECISIONS)}, not {send_precision!r}")
        self.num_modules, self.device, self.batch_size = num_modules, device, batch_size
        self.send_precision, self.with_events = send_precision, profile and device.type == "cuda"
        self.replicas = count // num_modules
        mesh = init_device_mesh(device.type, (num_modules, self.replicas), mesh_dim_names=("module", "replica"))
        (self.n, self.replica), self.group = mesh.get_coordinate(), mesh.get_group("replica")
        self.column = mesh.get_group("module")
        self.previous, self.next = rank - self.replicas, rank + self.replicas  # the ranks of those modules
        self.is_first, self.is_last = self.n == 0, self.n == num_modules - 1
        # Each link has a group, so a communicator of its own: on a shared one, NCCL would serve transfers in the order
        # in which they were posted, and the receive of batch t + 1 comes before the send of batch t
        self.links = {n: dist.new_group([n, n + self.replicas]) for n in range(count - self.replicas)}
        # By kind of pass, what a message is: whether x is in channels_last, (shape, dtype) of all tensors, precision
        self.sent_layouts, self.received_layouts = {}, {}
        self.slots = [{} for _ in range(SLOTS)]  # buffers to receive in, made once and used again and again
        self.sending, self.sent = collections.deque(), 0  # in this pass
        self.waited, self.waits = {"input": 0.0, "send": 0.0}, []

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
            channels_last = is_4d and representation.is_contiguous(memory_format=torch.channels_last)
            self.sent_layouts[kind] = channels_last, shapes, self.send_precision
            self.announce(self.sent_layouts[kind])
        channels_last, expected, _ = self.sent_layouts[kind]
        if shapes != expected:
            raise ValueError(f"a {kind} message of {shapes}; the first one was of {expected}")
        count, missing = len(representation), self.batch_size - len(representation)
        if missing < 0:
            raise ValueError(f"a {kind} message of {count} images; batch_size is {self.batch_size}")
        if channels_last:
            representation = representation.permute(0, 2, 3, 1)  # contiguous in this order: sent from where it is
        # The others may be what was received, in memory that is received in again
        tensors = [*encode(representation.contiguous(), self.send_precision), *(t.clone() for t in others)]
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
        link = self.links[self.next - self.replicas]
        works = [dist.isend(tensor, self.next, link, tag) for tag, tensor in enumerate(tensors)]
        self.sending.append((works, tensors))  # the memory must stay as it is until it has been sent
        self.sent += 1

    def end_pass(self, num_batches, kind="train"):
        """Call after a pass's last batch.

        Pads with empty messages if batches were skipped because no image could be read, then waits until everything is
        sent.
        """
        if not self.is_last:
            if kind not in self.sent_layouts and num_batches:  # not one batch
                self.announce(NOTHING)
            for _ in range(num_batches - self.sent):
                self.post(0, self.sending[-1][1][1:] if self.sending else self.empty_message(kind))
        while self.sending:
            self.wait(self.sending.popleft()[0], "send")
        self.sent = 0
        for what, begin, end in self.waits:
            self.waited[what] += seconds_between(begin, end)
        self.waits.clear()

    def empty_message(self, kind):
        layout = self.sent_layouts.get(kind, NOTHING)
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
        channels_last, shapes, _ = layout = self.received_layouts.get(kind, NOTHING)
        posted, expected = collections.deque(), wire(*layout)
        for i in range(num_batches):
            while len(posted) < min(SLOTS, num_batches - i):
                posted.append(self.post_receive(self.slots[(i + len(posted)) % SLOTS], expected))
            works, (count, *tensors) = posted.popleft()
            self.wait(works, "input")
            if count.item():
                tensors = [tensor[: count.item()] for tensor in tensors]
                first_other = 1 + len(tensors) - len(shapes)
                x = decode(tensors[:first_other], shapes[0][1])
                yield x.permute(0, 3, 1, 2) if channels_last else x, *tensors[first_other:]
        if not shapes:  # there was not one batch: the next pass of this kind announces its own
            self.received_layouts.pop(kind, None)

    def post_receive(self, slot, expected):
        """Start to receive a message into the buffers of a slot."""
        tensors = [torch.empty(1, dtype=torch.long)]
        for key in enumerate(expected):
            if key not in slot:
                _, (shape, dtype) = key
                slot[key] = torch.empty(self.batch_size, *shape, dtype=dtype, device=self.device)
            tensors.append(slot[key])
        link = self.links[self.previous]
        return [dist.irecv(tensor, self.previous, link, tag) for tag, tensor in enumerate(tensors)], tensors

    def wait(self, works, what):
        """Until the transfers are done. On a GPU this rank goes on, and what it computes next waits."""
        begin = self.now()
        for work in works:
            work.wait()
        self.waits.append((what, begin, self.now()))

    def now(self):
        """A time; with `profile` on a GPU, an event: when it has done what it was given before."""
        if not self.with_events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

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


def seconds_between(begin, end):
    """Of what `ModuleParallel.now` returned."""
    if isinstance(end, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1000


NOTHING = False, [], "fp32"  # the layout of a pass in which no message comes


def wire(channels_last, shapes, precision):
    """The (shape, dtype) of a message's tensors as they travel: the representation encoded, its channels last."""
    if not shapes:
        return []
    (shape, dtype), *others = shapes
    shape = (*shape[1:], shape[0]) if channels_last else shape
    encoded = encode(torch.empty(1, *shape, dtype=dtype, device="meta"), precision)
    return [*((tuple(t.shape[1:]), t.dtype) for t in encoded), *others]


def encode(x, precision):
    """What travels instead of x (B, ...), as a list of tensors (B, ...): "fp32": x as it is.

    - "bf16": x in bfloat16; as it is, if it has 16 bits anyway.
    - "int8": (x - low) / scale as unsigned bytes, and each image's own (scale, low) in float32. Its smallest value,
      low, is 0 and its largest 255. So after a ReLU no byte stands for negative values, and zeros stay zeros. An image
      does not depend on which others are in the batch. The error is at most half of a scale.
    """
    if precision == "bf16" and x.element_size() > 2:
        return [x.bfloat16()]
    if precision != "int8":
        return [x]
    x = x.float()
    rest = tuple(range(1, x.dim()))
    low, high = x.amin(rest, keepdim=True), x.amax(rest, keepdim=True)
    scale = (high - low).div_(255).clamp_(min=torch.finfo().tiny)  # an image of one value has none
    quantized = (x - low).div_(scale).round_().to(torch.uint8)
    return [quantized, torch.stack((scale.flatten(), low.flatten()), 1)]


def decode(tensors, dtype):
    """The x that `encode` was given, rounded."""
    x, *scales = tensors
    if scales:
        scale, low = scales[0].view(-1, 2, *[1] * (x.dim() - 1)).unbind(1)
        x = x.float().mul_(scale).add_(low)
    return x.to(dtype)


def rounded(x, precision):
    """x as a module that it is sent to receives it."""
    return decode(encode(x, precision), x.dtype)
