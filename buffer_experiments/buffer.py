"""The buffer between two modules in asynchronous DGL (Algorithm 2, arXiv 1901.08164), and its compression.

Representations are (B, C, s, s). They are stored as (B, s, s, C), which is what channels_last convolutions read, or
quantised, as the indices of codewords (B, s, s, G).
"""

import argparse
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

SAMPLINGS = ["priority_lifo", "published", "random"]
PRIORITIES = "newest of the least used, the same with the published off-by-one, or any"


class Buffer:
    """A ring of the last `size` batches. Its storage is allocated once. Not thread-safe.

    Args:
        size: M, in batches.
        batch_size, shape: B and (C, s, s) of a representation.
        quantizer: a ProductQuantizer(C, ...) that encodes what is stored and learns from it.
        sampling: `priority_lifo` takes the newest of the least used batches, `random` takes any. `published` is
            priority_lifo with the published code's off-by-one: of the least used batches, the one that `put` will
            overwrite next comes first, and then the newest.
        max_reuse: how often a batch may be used; None: no limit.
        seed: for `random`.

    Attributes:
        count: batches put so far; batch number i is in slot i % size.
        uses: how often each batch in the ring has been used, by its number, oldest first.
        sampled: number of the batch that `sample` returned last.
    """

    def __init__(
        self,
        size,
        batch_size,
        shape,
        device="cpu",
        dtype=torch.float32,
        quantizer=None,
        sampling="priority_lifo",
        max_reuse=None,
        seed=0,
    ):
        channels, *sides = self.shape = shape
        depth, dtype = (quantizer.groups, quantizer.dtype) if quantizer else (channels, dtype)
        self.stored = torch.empty(size, batch_size, *sides, depth, dtype=dtype, device=device)
        self.labels = torch.empty(size, batch_size, dtype=torch.long, device=device)
        self.quantizer, self.sampling, self.max_reuse = quantizer, sampling, max_reuse
        self.count, self.uses, self.sampled = 0, {}, None
        self.generator = torch.Generator().manual_seed(seed)

    def put(self, representation, labels):
        """Store a batch, (B, C, s, s) and (B,), in place of the oldest one if the ring is full."""
        if self.quantizer:
            self.quantizer.update(representation)
            self.put_stored(self.quantizer.encode(representation), labels)
        else:
            self.put_stored(representation.permute(0, 2, 3, 1), labels)

    def put_stored(self, stored, labels):
        """`put` for a batch as it is stored: (B, s, s, C), or indices (B, s, s, G)."""
        slot = self.count % len(self.labels)
        self.stored[slot].copy_(stored)
        self.labels[slot].copy_(labels)
        self.uses.pop(self.count - len(self.labels), None)
        self.uses[self.count] = 0
        self.count += 1

    def sample(self):
        """(representation, labels), or None if every batch has been used up.

        Both are views of the ring, which a later `put` overwrites; a quantised representation is a new tensor. Indices
        are decoded with the current codebook, so old codebooks need not be stored. Codewords follow the layer's output
        as it changes, so an old index stands for what the layer would output now. (The exception: a codeword that has
        been revived since then. Those are rare.)
        """
        usable = [i for i, uses in self.uses.items() if self.max_reuse is None or uses < self.max_reuse]
        if not usable:
            return None
        if self.sampling == "random":
            self.sampled = usable[int(torch.randint(len(usable), (), generator=self.generator))]
        else:
            first = self.count - len(self.labels) if self.sampling == "published" else None  # the oldest, if it is full
            self.sampled = min(usable, key=lambda i: (self.uses[i], i != first, -i))
        self.uses[self.sampled] += 1
        slot = self.sampled % len(self.labels)
        stored = self.stored[slot]
        return self.quantizer.decode(stored) if self.quantizer else stored.permute(0, 3, 1, 2), self.labels[slot]

    def num_bytes(self):
        """The size of all tensors of the buffer, codebook included."""
        return self.stored.nbytes + self.labels.nbytes + (self.quantizer.num_bytes() if self.quantizer else 0)

    def uncompressed_bytes(self):
        """What `num_bytes` would be with float32 and no quantizer."""
        return 4 * len(self.labels) * self.labels.shape[1] * math.prod(self.shape) + self.labels.nbytes

    def state_dict(self):
        filled = len(self.uses)
        return {
            "stored": self.stored[:filled],
            "labels": self.labels[:filled],
            "count": self.count,
            "uses": self.uses,
            "generator": self.generator.get_state(),
            "quantizer": self.quantizer.state_dict() if self.quantizer else None,
        }

    def load_state_dict(self, state):
        self.count, self.uses = state["count"], dict(state["uses"])
        self.stored[: len(self.uses)].copy_(state["stored"])
        self.labels[: len(self.uses)].copy_(state["labels"])
        self.generator.set_state(state["generator"])
        if self.quantizer:
            self.quantizer.load_state_dict(state["quantizer"])


class ProductQuantizer(nn.Module):
    """Product quantisation, learned online: the C channels of a pixel are cut into G groups, each stored as one index.

    Every group has a codebook, which is learned as in VQ-VAE (van den Oord et al., arXiv 1711.00937, appendix A.1): a
    codeword is the mean of the vectors nearest to it, as an exponential moving average over batches. A codeword that
    is hardly used is revived: it becomes a random vector of the batch. Compressed buffers: arXiv 2106.06401.

    Args:
        channels, groups, codewords: C, G (a divisor of C) and V, the codewords in a group (at most 32,768).
        decay: of the moving averages, per batch.
        dead: a codeword is revived if it gets less than this fraction of its fair share (one in V) of the vectors.
        pixels: how many random pixels of a batch `update` learns from.
        seed: for the random draws.
    """

    CHUNK, CPU_CHUNK = 2**22, 2**18  # scores computed at a time: 16 MiB, or 1 MiB, which fits a core's cache

    def __init__(self, channels, groups, codewords, decay=0.9, dead=0.01, pixels=2**14, seed=0):
        super().__init__()
        self.groups, self.codewords, self.decay, self.dead, self.pixels = groups, codewords, decay, dead, pixels
        self.dtype = torch.uint8 if codewords <= 256 else torch.int16
        self.generator = torch.Generator().manual_seed(seed)
        self.register_buffer("codebook", torch.zeros(groups, codewords, channels // groups))
        # moving averages, for each codeword: the sum of the vectors nearest to it, and their number
        self.register_buffer("sums", torch.zeros_like(self.codebook))
        self.register_buffer("counts", torch.zeros(groups, codewords))
        self.register_buffer("errors", torch.zeros(2, dtype=torch.float64))  # squared errors, squared values

    def vectors(self, x):
        """(B, C, s, s) -> (pixels, G, C/G), a view if x is in channels_last."""
        return x.permute(0, 2, 3, 1).reshape(-1, *self.codebook[:, 0].shape)

    def offsets(self):
        """(G,): where each group's codewords begin in the concatenated codebooks."""
        return torch.arange(self.groups, device=self.codebook.device) * self.codewords

    def nearest(self, vectors):
        """Vectors (N, G, C/G) -> indices of the nearest codewords (N, G), in the smallest integer type."""
        indices = torch.empty(vectors.shape[:2], dtype=self.dtype, device=vectors.device)
        bias = -0.5 * self.codebook.square().sum(2)[:, None]  # argmin |x - e|^2 = argmax x.e - |e|^2 / 2
        scores = self.CPU_CHUNK if vectors.device.type == "cpu" else self.CHUNK
        size = max(1, scores // (self.groups * self.codewords))
        for out, chunk in zip(indices.split(size), vectors.split(size)):
            scores = torch.baddbmm(bias, chunk.transpose(0, 1).float(), self.codebook.mT)
            out.copy_(scores.argmax(2).T)
        return indices

    @torch.no_grad()
    def encode(self, x):
        """(B, C, s, s) -> indices (B, s, s, G)."""
        batch_size, _, height, width = x.shape
        with torch.autocast(x.device.type, enabled=False):
            return self.nearest(self.vectors(x)).view(batch_size, height, width, self.groups)

    @torch.no_grad()
    def decode(self, indices):
        """Indices (B, s, s, G) -> (B, C, s, s) in channels_last."""
        return F.embedding(indices + self.offsets(), self.codebook.flatten(0, 1)).flatten(3).permute(0, 3, 1, 2)

    @torch.no_grad()
    def update(self, x):
        """Learn from a batch (B, C, s, s)."""
        vectors = self.vectors(x)
        drawn = torch.randint(len(vectors), (self.pixels + self.codewords,), generator=self.generator)
        drawn = vectors[drawn.to(x.device, non_blocking=True)].float()
        sample, spare = drawn[: self.pixels], drawn[self.pixels :].transpose(0, 1)  # spare: (G, V, C/G)
        with torch.autocast(x.device.type, enabled=False):
            indices = self.nearest(sample) + self.offsets()  # (N, G)
        flat = self.codebook.flatten(0, 1)
        seen = self.counts.any()  # there is no codebook yet when the first batch comes
        self.errors += seen * torch.stack(((sample - flat[indices]).square().sum(), sample.square().sum()))
        sums = torch.zeros_like(flat).index_add_(0, indices.flatten(), sample.flatten(0, 1))
        ones = torch.ones(indices.numel(), device=x.device)
        counts = torch.zeros_like(flat[:, 0]).index_add_(0, indices.flatten(), ones)
        self.sums.lerp_(sums.view_as(self.sums), 1 - self.decay)
        self.counts.lerp_(counts.view_as(self.counts), 1 - self.decay)
        fair = self.counts.sum(1, keepdim=True) / self.codewords
        dead = self.counts <= self.dead * fair  # at the first batch, all but one
        self.counts.copy_(torch.where(dead, fair, self.counts))
        self.sums.copy_(torch.where(dead[..., None], fair[..., None] * spare, self.sums))
        self.codebook.copy_(self.sums / self.counts[..., None])

    def pop_error(self):
        """Relative mean squared error on what `update` has seen since the last call, before learning from it."""
        error, total = self.errors.tolist()
        self.errors.zero_()
        return error / total if total else math.nan

    def num_bytes(self):
        """The size of the codebooks and of the averages that they are computed from."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def get_extra_state(self):
        return self.generator.get_state()

    def set_extra_state(self, state):
        self.generator.set_state(state)


def groups_and_codewords(text):
    """An argparse type: 'G,V' -> [G, V]."""
    numbers = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if len(numbers) != 2 or numbers[0] < 1 or not 2 <= numbers[1] <= 2**15:
        raise argparse.ArgumentTypeError(f"{text!r} is not G,V with G of at least 1 and V from 2 to {2**15}")
    return numbers


def available_memory(device):
    """Bytes that can still be allocated on the device, as far as the system knows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = []
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(1024 * int(fields["MemAvailable"].split()[0]))
        group = Path("/sys/fs/cgroup")
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
        limits.append(int((group / "memory.max").read_text()) - used)
    except (OSError, ValueError, KeyError):  # not Linux, or no limit
        pass
    return min(limits) if limits else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
