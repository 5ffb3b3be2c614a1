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

Writes a log with a line a module and epoch, and a checkpoint to --resume from.
"""

import torch
import torch.nn.functional as F
from torch import nn

import data
import models
import ranks
import training
import utils


def parse_args(argv=None):
    parser = training.make_parser(__file__, __doc__)
    add = parser.add_argument
    add(
        "--block_size",
        "--block-size",
        type=utils.at_least(1),
        help="vgg11 to vgg19: convolutions a module (default: 1)",
    )
    add("--num-modules", "--num_modules", type=utils.at_least(1), help="other networks: K (default: 2)")
    add("--balance", choices=["flops", "memory"], default="flops", help="what cuts other networks into equal parts")
    add("--nlin", type=utils.at_least(0), default=3, help="1x1 convolutions in an auxiliary network")
    add("--mlp", type=utils.at_least(0), default=3, help="hidden layers in an auxiliary network")
    add("--ensemble", type=int, choices=[0, 1], default=1, help="test the ensembles of modules 0 to n too")
    return training.check(parser, parser.parse_args(argv))


def make_model(args, num_classes):
    cut = args.block_size, args.num_modules, args.balance
    try:
        return models.build_dgl(args.arch, num_classes, data.image_size(args), *cut, args.nlin, args.mlp)
    except ValueError as error:
        utils.fail(error)


class Module(nn.Module):
    """A block with its auxiliary network: what has an optimizer of its own, and what the ranks train together."""

    def __init__(self, block, auxiliary_net):
        super().__init__()
        self.block, self.auxiliary_net = block, auxiliary_net

    def forward(self, x):
        representation = self.block(x)
        return self.auxiliary_net(representation), representation


def train_epoch(modules, optimizers, scalers, autocast, batches, meters):
    """One epoch of synchronous DGL (Algorithm 1): a module updates before the next one sees the batch."""
    for module in modules:
        module.train()
    for images, labels in batches:
        x = images
        for module, optimizer, scaler, meter in zip(modules, optimizers, scalers, meters):
            with autocast:
                logits, representation = module(x)
                loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()  # frees the module's activations before the next module makes its own
            scaler.step(optimizer)
            scaler.update()
            meter.update(loss, logits, labels)
            x = representation.detach()  # update unlocking: nothing flows back across modules


@torch.no_grad()
def evaluate(model, autocast, batches):
    """[module's, ensemble's] [top-1, top-5] in % for every module, in one pass over the images of all ranks.

    The ensemble is that of modules 0 to n: softmax outputs averaged with weights 2^i / sum.
    """
    model.eval()
    correct = torch.zeros(len(model.blocks), 2, 2, dtype=torch.float64, device=batches.device)
    count = torch.zeros((), device=batches.device)
    for images, labels in batches:
        x, total = images, 0
        for n in range(len(model.blocks)):
            with autocast:
                logits, x = model(x, n)
            total = total + 2**n * logits.float().softmax(1)  # the division by the sum changes no prediction
            correct[n, 0] += training.hits(logits, labels)
            correct[n, 1] += training.hits(total, labels)
        count += len(labels)
    return (100 * ranks.add_up(correct) / ranks.add_up(count)).tolist()


def tested_text(args, module, ensemble):
    text = "test top1:{:.3f} (top5:{:.3f})".format(*module)
    return text + ", top1ens:{:.3f} top5ens:{:.3f}".format(*ensemble) if args.ensemble else text


def main(argv=None):
    args = parse_args(argv)
    if args.flops:
        return training.print_costs(models.costs(make_model(args, 1000), data.image_size(args)))
    device = ranks.setup(args)
    images = data.load_data(args, device)
    model = training.prepare(make_model(args, images.num_classes), args, device)
    modules = [ranks.data_parallel(Module(*parts)) for parts in zip(model.blocks, model.auxiliary_nets)]
    optimizers = [training.sgd(module, args, device, args.start_epoch) for module in modules]
    scalers = [training.grad_scaler(args, device) for _ in modules]
    autocast = utils.autocast(args, device)
    meters = [training.Meter(device) for _ in modules]
    run = training.Run(args, images, model=model, optimizers=optimizers, scalers=scalers)
    if args.evaluate:
        for n, tested in enumerate(evaluate(model, autocast, images.test)):
            run.log(f"n: {n}, {tested_text(args, *tested)}")
        return ranks.end()
    for epoch in run.epochs(args.epochs):
        if epoch % args.epochdecay == 0:  # with the new learning rate, momentum and loss scale start anew
            optimizers = [training.sgd(module, args, device, epoch) for module in modules]
            scalers = [training.grad_scaler(args, device) for _ in modules]
            run.parts.update(optimizers=optimizers, scalers=scalers)
        batches = run.watch(images.train, meters, epoch)
        train_epoch(modules, optimizers, scalers, autocast, batches, meters)
        ranks.average_buffers(model)
        for n, tested in enumerate(evaluate(model, autocast, images.test)):
            loss, top1, top5 = run.read(meters[n], n, epoch)
            train = f"train top1:{top1:.3f}(top5:{top5:.3f})"
            run.log(f"n: {n}, epoch {epoch}, {train}, {tested_text(args, *tested)}")
            run.scalars(epoch, n, loss=loss, train_top1=top1, test_top1=tested[0][0], ensemble_top1=tested[1][0])
        run.end_epoch(epoch, tested[0][0])
    ranks.end()


if __name__ == "__main__":
    main()
