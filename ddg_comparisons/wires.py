"""What the ranks of parallel.py exchange under torchrun: tensors between neighbours, objects with rank 0."""

import collections
import io
import os

import utils

import torch
import torch.distributed as dist

SLOTS = 2  # messages under way on a wire


class Wire:
    """Tensors (B, C, H, W), in channels_last, on their way from one rank to another.

    It has a process group of its own. On a GPU that is a communicator and a stream, so that no transfer waits for one
    on another wire. All ranks make all wires, in the same order.

    Args:
        source, target: the ranks.
        shape: (C, side) of all tensors.
    """

    def __init__(self, source, target, shape, dtype, device):
        self.source, self.target, self.shape, self.dtype, self.device = source, target, shape, dtype, device
        self.group = dist.new_group([source, target])
        self.going, self.coming = collections.deque(), collections.deque()
        token = torch.zeros(1, device=device)  # NCCL connects at the first message
        if dist.get_rank() == source:
            dist.send(token, target, self.group)
        elif dist.get_rank() == target:
            dist.recv(token, source, self.group)

    def send(self, x):
        """Start to send x, which must not change any more. Waits only if SLOTS earlier ones have not arrived yet."""
        self.flush(SLOTS - 1)
        x = x.permute(0, 2, 3, 1).contiguous()  # no copy
        self.going.append((dist.isend(x, self.target, self.group), x))

    def flush(self, left=0):
        """Wait until no more than `left` messages are under way."""
        while len(self.going) > left:
            self.going.popleft()[0].wait()

    def expect(self, count):
        """Start to receive a message of `count` images."""
        channels, side = self.shape
        x = torch.empty(count, side, side, channels, dtype=self.dtype, device=self.device)
        self.coming.append((dist.irecv(x, self.source, self.group), x.permute(0, 3, 1, 2)))

    def receive(self):
        """The oldest message that is expected."""
        work, x = self.coming.popleft()
        if work:
            work.wait()
        return x

    def look(self):
        """What `receive` will return, or None."""
        if self.coming:
            self.put_back(self.receive())
        return self.coming[0][1] if self.coming else None

    def put_back(self, x):
        """Let the next `receive` return x."""
        self.coming.appendleft((None, x))


def set_up(args):
    """utils.setup, with a GPU for each rank of a machine."""
    device = utils.setup(args)
    if device.type == "cuda":
        ranks, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if ranks > gpus:
            utils.fail(f"this machine has {gpus} GPUs for {ranks} modules: choose another --num_splits, or --no-cuda")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def broadcast(state):
    """Rank 0's state, on all."""
    states = [packed(state)]
    dist.broadcast_object_list(states)
    return unpacked(states[0])


def gather(state):
    """The states of all ranks, on rank 0; on the others, nothing."""
    states = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(packed(state), states)
    return [unpacked(state) for state in states or ()]


def packed(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def unpacked(state):
    """The state, with its tensors on the CPU."""
    return torch.load(io.BytesIO(state), map_location="cpu", weights_only=True)
