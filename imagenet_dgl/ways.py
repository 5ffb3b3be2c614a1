"""The ways to train one network that benchmark.py compares: DGL's, and what one would use instead of it.

A way is a method of `Rank` that returns (train, network): train(steps) trains for a number of steps, with the
train_epoch of imagenet_dgl.py or imagenet.py where there is one, and network is what this rank trains. Both are None on
a rank that takes no part. Without BatchNorm, one step of any way of backprop ends with the same weights.
"""

import contextlib
import functools
import itertools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)
from torch.utils.checkpoint import checkpoint

import imagenet
import imagenet_dgl
import models
import ranks
import training
from module_parallel import ModuleParallel

CLASSES = 10
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}


def make_network(args):
    torch.manual_seed(0)
    if args.arch != "cnn4":
        return models.build_plain(args.arch, CLASSES, args.image_size)
    layers, widths = [], [3, 64, 128, 128, 256]
    for n, (channels, out) in enumerate(itertools.pairwise(widths)):
        pool = [nn.MaxPool2d(2)] if n in (1, 2) else []
        layers += [*pool, nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * widths[-1], CLASSES))


class Nothing:
    """A meter that measures nothing."""

    def update(self, *_):
        pass


class Rank:
    """What all ways share on a rank: the batch, and how the network is cut.

    Args:
        args: benchmark.py's.
        num_modules: K, the number of ranks.
    """

    def __init__(self, args, num_modules, rank):
        self.args, self.num_modules, self.rank = args, num_modules, rank
        self.device = torch.device("cuda", rank) if args.cuda else torch.device("cpu")
        generator = torch.Generator().manual_seed(0)
        size = args.batch_size, 3, args.image_size, args.image_size
        self.images = self.put(torch.randn(size, generator=generator))
        self.labels = (torch.arange(args.batch_size) % CLASSES).to(self.device)
        self.share = slice(rank, None, num_modules)  # of the batch, where the ranks share it
        self.autocast = contextlib.nullcontext()
        self.scaler = torch.amp.GradScaler(enabled=False)
        self.cuts = {}

    def put(self, thing):
        return thing.to(self.device, memory_format=torch.channels_last)

    def batches(self, steps, share=slice(None)):
        images = self.images[share].contiguous(memory_format=torch.channels_last)
        return itertools.repeat((images, self.labels[share]), steps)

    def cut(self, num_modules, balance, **nets):
        """The network as a DGLNet. Call it on all ranks: they get the same cut, also by time."""
        what = make_network(self.args), num_modules, CLASSES, self.args.image_size, balance
        if balance != "time":
            return models.decouple(*what, **nets)
        key = num_modules, *nets.items()
        if key not in self.cuts:
            models.decouple(*what[:-1], **nets)  # if there are too few places, on all ranks
            timer = models.Timer(self.device, self.args.batch_size)
            cuts = [None if self.rank else models.decouple(*what, **nets, timer=timer).cuts]
            dist.broadcast_object_list(cuts, device=torch.device("cpu"))
            self.cuts[key] = cuts[0]
        return models.decouple(*what, **nets, cuts=self.cuts[key])

    def modules(self, balance):
        model = self.cut(self.num_modules, balance)
        return [imagenet_dgl.Module(*parts, n) for n, parts in enumerate(zip(model.blocks, model.auxiliary_nets))]

    def segments(self, count):
        """Parts of the network for backprop, as equal as DGL's modules but without auxiliary networks."""
        model = self.cut(count, "time" if "time" in self.args.balance else "flops", nlin=0, mlp=0)
        *blocks, last = model.blocks
        return [*blocks, nn.Sequential(last, model.auxiliary_nets[-1])]

    # DGL

    def train_modules(self, modules, pipeline=None):
        optimizers = [training.sgd(self.put(module).parameters(), **SGD) for module in modules]
        extra = [self.scaler] * len(modules), self.autocast
        meters = [Nothing()] * len(modules)

        def train(steps):
            batches = pipeline.receive(steps) if pipeline and not pipeline.is_first else self.batches(steps)
            imagenet_dgl.train_epoch(modules, optimizers, *extra, batches, meters, pipeline)
            if pipeline:
                pipeline.end_pass(steps)

        return train, nn.ModuleList(modules)

    def dgl(self, balance):
        modules = self.modules(balance)
        return (None, None) if self.rank else self.train_modules(modules)

    def module_parallel(self, balance, precision):
        pipeline = ModuleParallel(self.num_modules, self.device, self.args.batch_size, send_precision=precision)
        train, network = self.train_modules([self.modules(balance)[pipeline.n]], pipeline)
        train.pipeline, train.balance, train.precision = pipeline, balance, precision
        return train, network

    # Backprop

    def train_network(self, network, optimizer=None, share=slice(None)):
        optimizer = optimizer or training.sgd(network.parameters(), **SGD)

        def train(steps):
            batches = self.batches(steps, share)
            imagenet.train_epoch(network, optimizer, self.scaler, self.autocast, batches, Nothing())

        return train, network

    def backprop(self):
        return (None, None) if self.rank else self.train_network(self.put(make_network(self.args)))

    def checkpointed(self):
        network = Checkpointed(*self.segments(self.num_modules))
        return (None, None) if self.rank else self.train_network(self.put(network))

    def ddp(self):
        network = ranks.data_parallel(self.put(make_network(self.args)), dist.group.WORLD)
        return self.train_network(network, share=self.share)

    def fsdp(self):
        """Fully sharded; each segment's parameters are gathered before its passes, and freed after them."""
        mesh = init_device_mesh(self.device.type, (self.num_modules,))
        # Weights in channels_last are refused
        network = nn.Sequential(*self.segments(self.num_modules)).to(self.device)
        for part in [*network, network]:
            fully_shard(part, mesh=mesh)
        # There is no fused step of sharded parameters
        return self.train_network(network, torch.optim.SGD(network.parameters(), **SGD), self.share)

    def pipelined(self, kind, microbatches=None):
        train = Pipeline(self, kind)
        if microbatches:
            train.use(microbatches)
        return train, train.network


class Checkpointed(nn.Sequential):
    """Segments, of which all but the last keep their input alone, and run again in the backward pass.

    Chen et al. 2016, arXiv 1604.06174.
    """

    def forward(self, x):
        *segments, last = self
        for segment in segments:
            contexts = functools.partial(self.contexts, segment)
            x = checkpoint(segment, x, use_reentrant=False, context_fn=contexts)
        return last(x)

    @staticmethod
    def contexts(segment):
        """Of the first run, and of the second, in which BatchNorm must not count the batch again."""
        return contextlib.nullcontext(), untracked(segment)


@contextlib.contextmanager
def untracked(part):
    """BatchNorm normalises by the batch as before, but its running statistics stay as they are."""
    norms = [m for m in part.modules() if getattr(m, "running_mean", None) is not None]
    before = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:  # the second run is broken off by an exception, once nothing more of it is needed
        for norm, momentum, count in before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


class Pipeline:
    """Backprop in one of torch.distributed.pipelining's schedules: pipeline(steps) trains, after `use`.

    Attributes:
        network: this rank's stages by number, as an nn.ModuleDict.
    """

    def __init__(self, here, kind):
        self.here, self.kind = here, kind
        ranks, rank = here.num_modules, here.rank
        stages = {  # each rank's, from rank 0 to the last and, with two, once more or back again
            ScheduleInterleaved1F1B: [rank, ranks + rank],
            ScheduleZBVZeroBubble: [rank, 2 * ranks - 1 - rank],
        }.get(kind, [rank])
        self.count = ranks * len(stages)
        segments = here.segments(self.count)
        self.network = nn.ModuleDict({str(n): here.put(Stage(segments[n])) for n in stages})
        for stage in self.network.values():  # zero bubble detaches outputs in place, which a view does not permit
            stage.copies = kind is ScheduleZBVZeroBubble
        self.optimizer = training.sgd(self.network.parameters(), **SGD)

    def use(self, microbatches):
        """Split the batch into so many from now on. ValueError: the schedule cannot."""
        stages = [PipelineStageOnGloo(s, int(n), self.count, self.here.device) for n, s in self.network.items()]
        single = stages[0] if self.count == self.here.num_modules else stages
        self.runner = self.kind(single, microbatches, loss_fn=F.cross_entropy)

    def __call__(self, steps):
        self.network.train()
        inputs = [self.here.images.permute(0, 2, 3, 1)] if "0" in self.network else []
        target = {"target": self.here.labels} if str(self.count - 1) in self.network else {}
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.runner.step(*inputs, **target)
            self.optimizer.step()


class PipelineStageOnGloo(PipelineStage):
    def _get_init_p2p_neighbors_ops(self):
        """The first messages, none from a rank to itself: torch 2.11 has them in zero bubble, but Gloo cannot."""
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.peer != dist.get_rank()]


class Stage(nn.Sequential):
    """Exchanges (B, H, W, C), the order in memory of channels_last: torch.distributed.pipelining wants no other one."""

    copies = False

    def forward(self, x):
        if x.requires_grad:
            x.register_hook(torch.Tensor.contiguous)
        x = super().forward(x.permute(0, 3, 1, 2) if x.dim() == 4 else x)
        x = x.permute(0, 2, 3, 1) if x.dim() == 4 else x
        return x.clone(memory_format=torch.contiguous_format) if self.copies else x.contiguous()


def all_ways(args):
    """{name: function of a `Rank`} of all that benchmark.py compares."""
    parallel = {}
    for balance, precision in itertools.product(args.balance, args.send_precision):
        name = "DGL, module-parallel" + f", {balance}" * (len(args.balance) > 1) + f", {precision}"
        way = functools.partial(Rank.module_parallel, balance=balance, precision=precision)
        parallel[name.removesuffix(", fp32")] = way
    schedules = {
        "GPipe": ScheduleGPipe,
        "1F1B": Schedule1F1B,
        "interleaved 1F1B": ScheduleInterleaved1F1B,
        "zero bubble": ScheduleZBVZeroBubble,
    }
    return {
        "DGL, one process": functools.partial(Rank.dgl, balance=args.balance[0]),
        "DGL, one process, balanced for memory": functools.partial(Rank.dgl, balance="memory"),
        "backprop, one process": Rank.backprop,
        "backprop, one process, checkpointed": Rank.checkpointed,
        **parallel,
        "backprop, DDP": Rank.ddp,
        "backprop, FSDP": Rank.fsdp,
        **{f"backprop, {name}": functools.partial(Rank.pipelined, kind=kind) for name, kind in schedules.items()},
    }
