"""DGL on ImageNet (Section 5.4, "Decoupled Greedy Learning of CNNs", arXiv 1901.08164).

A deep network is cut into K modules, each with an auxiliary network and a loss of its own, and all are trained at the
same time: synchronous DGL, Algorithm 1. imagenet.py trains the same networks end to end. The published runs, which
without a GPU train in float32:

  python imagenet_dgl.py IMAGENET_DIR -j THREADS --block_size 1 --name vgg13 --arch vgg13 --half --dynamic-loss-scale
  python imagenet_dgl.py IMAGENET_DIR -j THREADS --block_size 3 --name vgg13_k4 --arch vgg13 --half --dynamic-loss-scale
  python imagenet_dgl.py IMAGENET_DIR -j THREADS --block_size 4 --name vgg19_k4 --arch vgg19 --half --dynamic-loss-scale
  python imagenet_dgl.py IMAGENET_DIR -j THREADS --block_size 8 --name vgg19_k2 --arch vgg19 --half --dynamic-loss-scale
  python imagenet_dgl.py IMAGENET_DIR -j THREADS --name resnet152_k2 --arch resnet152 --half --dynamic-loss-scale

Any other torchvision network, and several GPUs, or CPUs, that share each batch:

  python imagenet_dgl.py IMAGENET_DIR --arch convnext_tiny --num-modules 3
  torchrun --nproc_per_node=4 imagenet_dgl.py IMAGENET_DIR --arch vgg19 --block_size 4

A module on each GPU, or CPU, so that all train at the same time, with the same result (module_parallel.py):

  torchrun --nproc_per_node=4 imagenet_dgl.py IMAGENET_DIR --arch vgg19 --block_size 4 --module-parallel

Writes a log with one line per module and epoch, and a checkpoint to --resume from.
"""

import contextlib
import time

import utils

import torch
import torch.nn.functional as F
from torch import nn

import data
import models
import ranks
import runs
import training
from module_parallel import PRECISIONS, ModuleParallel, rounded


def parse_args(argv=None):
    parser = training.make_parser(__file__, __doc__)
    add = parser.add_argument
    add(
        "--block_size",
        "--block-size",
        type=utils.at_least(1),
        help="vgg11 to vgg19: convolutions per module (default: 1)",
    )
    add("--num-modules", "--num_modules", type=utils.at_least(1), help="other networks: K (default: 2)")
    add(
        "--balance",
        choices=["flops", "memory", "time"],
        default="flops",
        help="what cuts other networks into equal parts; time: measured here, when a new run begins",
    )
    add("--nlin", type=utils.at_least(0), default=3, help="1x1 convolutions in an auxiliary network")
    add("--mlp", type=utils.at_least(0), default=3, help="hidden layers in an auxiliary network")
    add(
        "--aux-size",
        choices=["true", "published"],
        default="true",
        help="of resnet18 to resnet152: published: auxiliary networks for half of the true height and width",
    )
    add("--ensemble", type=int, choices=[0, 1], default=1, help="test the ensembles of modules 0 to n too")
    add("--module-parallel", action="store_true", help="with torchrun: each rank trains one module")
    add("--send-precision", choices=PRECISIONS, default="fp32", help="of what a module hands on to the next one")
    add("--profile", action="store_true", help="with --module-parallel: print what each rank's time is spent on")
    parser.set_defaults(cuts=None)  # where --balance time has cut: in the log and the checkpoint, as if it were a flag
    args = training.check_flags(parser, parser.parse_args(argv))
    if args.arch in models.VGGS:
        args.block_size = args.block_size or 1
    else:
        args.num_modules = args.num_modules or 2
    if args.profile and not args.module_parallel:
        parser.error("--profile is for --module-parallel")
    if args.flops and args.balance == "time" and not args.cuts:
        parser.error("--flops counts without computing, which --balance time cannot")
    return args


def make_pipeline(args, device):
    """This rank's place among the modules, with --module-parallel."""
    if not args.module_parallel:
        return None
    try:
        num_modules = models.count_modules(args.arch, args.block_size, args.num_modules)
        if ranks.COUNT % num_modules:
            raise ValueError(
                f"--module-parallel with {num_modules} modules needs torchrun --nproc_per_node={num_modules}, or a "
                f"multiple of it for replicas that share each batch; the number of ranks is {ranks.COUNT}"
            )
    except ValueError as error:
        utils.fail(error)
    if ranks.COUNT == 1:
        return None  # one module: there is nobody to send to
    batch_size = args.batch_size * num_modules // ranks.COUNT
    return ModuleParallel(num_modules, device, batch_size, args.profile, args.send_precision)


def make_model(args, num_classes, device=None, pipeline=None):
    """The network. With --balance time, it is cut as in the checkpoint or, in a new run, as rank 0 finds best."""
    measures, timer = args.balance == "time" and not args.resume, None
    if measures:
        timer = models.Timer(device, args.batch_size // ranks.share(pipeline)[1], utils.autocast(args, device))
        args.cuts = of_rank_0(None) if ranks.RANK else None
    elif args.balance == "time":
        args.cuts = runs.saved_cuts(args)
    cut, nets = (args.block_size, args.num_modules, args.balance), (args.nlin, args.mlp, args.aux_size)
    try:
        model = models.build_dgl(args.arch, num_classes, data.image_size(args), *cut, *nets, args.cuts, timer)
    except ValueError as error:
        utils.fail(error)
    if measures and ranks.RANK == 0:
        args.cuts = of_rank_0(model.cuts)
    return model


def of_rank_0(thing):
    """Rank 0's `thing`, on all ranks."""
    things = [thing]
    if ranks.COUNT > 1:
        torch.distributed.broadcast_object_list(things, device=torch.device("cpu"))
    return things[0]


class Module(nn.Module):
    """Block n with its auxiliary network; it has its own optimizer, and its own stream of random numbers."""

    def __init__(self, block, auxiliary_net, n):
        super().__init__()
        self.block, self.auxiliary_net, self.n, self.stream = block, auxiliary_net, n, contextlib.nullcontext()

    def forward(self, x):
        with self.stream:
            representation = self.block(x)
            return self.auxiliary_net(representation), representation


def train_epoch(modules, optimizers, scalers, autocast, batches, meters, pipeline=None, send_precision="fp32"):
    """One epoch of synchronous DGL (Algorithm 1): a module updates before the next one sees the batch.

    In a pipeline there is one module on each rank: x is what the previous one has sent, rounded by the pipeline.
    """
    for module in modules:
        module.train()
    for x, labels in batches:
        for module, optimizer, scaler, meter in zip(modules, optimizers, scalers, meters):
            with autocast:
                logits, representation = module(x)
                loss = F.cross_entropy(logits, labels)
            x = representation.detach()  # update unlocking: nothing flows back across modules
            if pipeline:
                pipeline.send(x, labels)  # on its way during the backward pass
            elif module is not modules[-1]:
                x = rounded(x, send_precision)
            optimizer.zero_grad()
            scaler.scale(loss).backward()  # frees the module's activations before the next module makes its own
            scaler.step(optimizer)
            scaler.update()
            meter.update(loss, logits, labels)


@torch.no_grad()
def evaluate(modules, autocast, batches, pipeline=None, send_precision="fp32"):
    """[module's, ensemble's] [top-1, top-5] in % for every module, in one pass over the images of all ranks.

    The ensemble is that of modules 0 to n: softmax outputs averaged with weights 2^i / sum. In a pipeline, the sum up
    to the previous module comes with the batch. What a module hands on is rounded as in training.
    """
    for module in modules:
        module.eval()
    num_modules, is_first = (pipeline.num_modules, pipeline.is_first) if pipeline else (len(modules), True)
    correct = torch.zeros(num_modules, 2, 2, dtype=torch.float64, device=batches.device)
    count = torch.zeros((), device=batches.device)
    for x, labels, *total in training.progress_bar(batches, "validation"):
        total = total[0] if total else 0
        for module in modules:
            with autocast:
                logits, x = module(x)
            if not pipeline and module is not modules[-1]:
                x = rounded(x, send_precision)
            total = total + 2**module.n * logits.float().softmax(1)  # the division by the sum changes no prediction
            correct[module.n, 0] += training.hits(logits, labels)
            correct[module.n, 1] += training.hits(total, labels)
        if pipeline:
            pipeline.send(x, labels, total, kind="test")
        count += len(labels) * is_first
    if pipeline:
        pipeline.end_pass(len(batches), kind="test")
    return training.percent(correct, count)


def tested_text(args, module, ensemble):
    text = "test top1:{:.3f} (top5:{:.3f})".format(*module)
    return text + ", top1ens:{:.3f} top5ens:{:.3f}".format(*ensemble) if args.ensemble else text


def make_modules(model, args, device, pipeline):
    """The modules that this rank trains: all, or in a pipeline its own. There the others give up their data."""
    modules = [Module(*parts, n) for n, parts in enumerate(zip(model.blocks, model.auxiliary_nets))]
    if not pipeline:
        return [training.to_device(module, args, device) for module in modules]
    for module in modules:
        if module.n != pipeline.n:
            module.to("meta")
    return [training.to_device(modules[pipeline.n], args, device, pipeline.group)]


@ranks.one_message
def main(argv=None):
    args = parse_args(argv)
    if args.flops:
        return training.print_costs(models.costs(make_model(args, 1000), data.image_size(args)))
    device = ranks.setup(args)
    pipeline = make_pipeline(args, device)
    images = data.load_data(args, device, pipeline)
    model = make_model(args, images.num_classes, device, pipeline)
    modules = make_modules(model, args, device, pipeline)
    autocast = utils.autocast(args, device)
    if args.evaluate:
        runs.load_network(model, args, images)
        for n, tested in enumerate(evaluate(modules, autocast, images.test, pipeline, args.send_precision)):
            print(f"n: {n}, {tested_text(args, *tested)}")
        for text in runs.skipped(images):
            print(text)
        return ranks.end()
    group, (share, shares) = pipeline and pipeline.group, ranks.share(pipeline)
    parallel = [ranks.data_parallel(module, group) for module in modules]
    meters = [training.Meter(device) for _ in model.blocks]  # of all modules, for the log
    optimizers, scalers = training.make_optimizers(modules, args, device, args.start_epoch)
    run = runs.Run(args, images, pipeline, model=model, optimizers=optimizers, scalers=scalers)
    for epoch in run.epochs(args.epochs):
        if epoch % args.epochdecay == 0:  # with the new learning rate, momentum and loss scale start again
            optimizers, scalers = training.make_optimizers(modules, args, device, epoch)
            run.replace_parts(optimizers=optimizers, scalers=scalers)
        for module in modules:
            module.stream = training.RandomStream(training.random_seed(args, epoch, module.n * shares + share), device)
        begin, batches = time.perf_counter(), run.watch(images.train, meters, epoch)
        train_epoch(
            parallel,
            optimizers,
            scalers,
            autocast,
            batches,
            [meters[m.n] for m in modules],
            pipeline,
            args.send_precision,
        )
        if pipeline:
            pipeline.end_pass(len(images.train))
        if args.profile and pipeline:
            run.show_profile(time.perf_counter() - begin)
        for module in modules:
            ranks.average_buffers(module, group)
        for n, tested in enumerate(evaluate(modules, autocast, images.test, pipeline, args.send_precision)):
            loss, top1, top5 = meters[n].pop()
            run.check_finite(loss, n, epoch)
            train = f"train top1:{top1:.3f}(top5:{top5:.3f})"
            run.log(f"n: {n}, epoch {epoch}, {train}, {tested_text(args, *tested)}")
            run.scalars(epoch, n, loss=loss, train_top1=top1, test_top1=tested[0][0], ensemble_top1=tested[1][0])
        run.end_epoch(epoch, tested[0][0])
    del parallel  # torch 2.11 may hang if it outlives its process group
    ranks.end()


if __name__ == "__main__":
    main()
