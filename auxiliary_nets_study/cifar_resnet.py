"""DGL and the local losses that came after it, on one network, one cut, one loop (beyond the paper).

A ResNet for CIFAR-10 is cut into --num-modules modules. Each but the last learns from the local loss of --method (see
methods.py), the last one from cross-entropy; no gradient crosses between modules. For comparison: backprop, and
backprop with activation checkpointing over the same modules.

    python cifar_resnet.py --method infopro --depth 110 --num-modules 4    # CIFAR-10, downloaded if missing; 160 epochs
    python cifar_resnet.py --method checkpoint --num-modules 4 --costs     # parameters, FLOPs, activations; no training
    python cifar_resnet.py --audit                                         # is every method local? on random data
    python cifar_resnet.py --data digits --batch-size 100 --epochs 10      # handwritten digits, no download

Writes a log with one line per module and epoch, and a checkpoint to --resume from. LocalMethods.ipynb draws the logs.
"""

import math

import utils

import torch
from torch import nn
from tqdm import tqdm

import audit
import cifar
import costs
import methods
import resnet


def parse_args(argv=None):
    parser = utils.ArgumentParser(__file__, __doc__)
    cifar.add_data_flags(parser)
    cifar.add_cuda_graph_flag(parser)
    add, choices = parser.add_argument, ["backprop", "checkpoint", *methods.METHODS]
    add("--method", choices=choices, default="dgl", help="local loss, or backprop without or with checkpointing")
    add("--depth", type=utils.at_least(8), default=32, help="layers of the ResNet: 6n+2; published: 32, 110")
    help = "modules to cut the network into (default: with auglocal all layers, with backprop 1, else 4)"
    add("--num-modules", type=utils.at_least(1), metavar="K", help=help)
    add("--balance", choices=["blocks", "memory"], default="blocks", help="memory: ResNet-110, 2 to 4 modules")
    add("--dgl-hidden", type=int, choices=[2, 3], default=2, help="dgl: hidden layers of the auxiliary network's mlp")
    add("--infopro-loss", choices=["softmax", "contrast"], default="softmax", help="infopro: what the head learns from")
    weight = utils.at_least(0, float)
    help = "infopro, man: weights of reconstruction and prediction in the first and the last but one module"
    add("--lambdas", type=weight, nargs=4, metavar=("L1", "L2", "L1", "L2"), help=f"{help} (default: as published)")
    add("--auglocal-depth", type=utils.at_least(1), default=9, help="auglocal: blocks in the first auxiliary network")
    add("--costs", action="store_true", help="print what each module costs, beside backprop, and exit")
    add("--audit", action="store_true", help="check that all methods are local, with 2 to 55 modules, and exit")
    add("--batch-size", type=utils.at_least(2), default=1024, help="images in a training batch")
    add(
        "--lr",
        type=utils.at_least(0, float, above=True),
        help="the highest learning rate (default: 0.8 for batches of 1024, and in proportion)",
    )
    add("--warmup", type=utils.at_least(0), help="epochs in which the learning rate rises (default: a 16th, 10 of 160)")
    add("--test-batch-size", type=utils.at_least(1), default=256, help="images in a test batch")
    add(
        "--epochs",
        type=utils.at_least(1),
        default=160,
        help="passes over the training set; in the last, the learning rate is 0",
    )
    add("--seed", type=utils.at_least(0), default=1, help="seeds the initial weights and data order")
    for add_flags in dict.fromkeys(method.add_flags for method in methods.METHODS.values()):  # a subclass has the same
        add_flags(add)
    args = parser.parse_args(argv)
    if args.method not in choices:  # from a checkpoint
        parser.error(f"--method {args.method} is not defined here: resume with the script that has it")
    others = {flag for method in methods.METHODS.values() for flag in method.flags}
    for flag in others.difference(getattr(methods.METHODS.get(args.method), "flags", [])):
        if getattr(args, flag) != parser.get_default(flag) and not args.audit:
            parser.error(f"--{flag.replace('_', '-')} has no effect on --method {args.method}")
    args.lr = args.lr or 0.8 * args.batch_size / 1024
    args.warmup = args.epochs // 16 if args.warmup is None else args.warmup
    if args.warmup >= args.epochs:
        parser.error(f"--warmup {args.warmup} must be below --epochs {args.epochs}")
    try:
        defaults = {"auglocal": len(resnet.widths(args.depth)), "backprop": 1}
        args.num_modules = args.num_modules or defaults.get(args.method, 4)
        resnet.cut(args.depth, args.num_modules, args.balance)
    except ValueError as error:
        parser.error(error)
    if args.lambdas and args.num_modules == 2 and args.lambdas[:2] != args.lambdas[2:]:
        parser.error("--lambdas: of two modules, the first is the last but one, so it needs the same pair twice")
    if args.method == "backprop" and args.num_modules > 1:
        parser.error(f"--num-modules {args.num_modules}: backprop has one module; checkpoint may have more")
    return args


class Network(nn.Module):
    """A ResNet cut into modules: `blocks`, and their local losses, `auxiliary_nets`; the last is the classifier's.

    With backprop, there is one module. With the same seed, all methods start with the same blocks and classifier.
    """

    def __init__(self, num_classes, args):
        super().__init__()
        layers, widths = resnet.layers(args.depth), resnet.widths(args.depth)
        last = methods.Classifier(widths[-1], num_classes)
        self.ends = resnet.cut(args.depth, args.num_modules, args.balance)
        begins = [0, *(end + 1 for end in self.ends[:-1])]
        segments = [nn.Sequential(*layers[begin : end + 1]) for begin, end in zip(begins, self.ends)]
        local_losses = []
        if args.method == "backprop":
            segments = [nn.Sequential(*layers)]
        elif args.method == "checkpoint":
            segments = [resnet.Checkpointed(segments)]
        else:
            for k, end in enumerate(self.ends[:-1]):
                place = methods.Place(k, args.num_modules, end, widths, layers[end + 1], num_classes)
                local_losses.append(methods.METHODS[args.method](place, args))
        self.blocks, self.auxiliary_nets = nn.ModuleList(segments), nn.ModuleList([*local_losses, last])

    def forward(self, x, n, upto=False):
        """Run module n on its input x. With `upto`, x is the images, and blocks 0 to n-1 run first.

        Returns:
            (logits of auxiliary net n (B, num_classes), or None, output of block n (B, C, s, s)).
        """
        if upto:
            for block in self.blocks[:n]:
                x = block(x)
        representation = self.blocks[n](x)
        logits, _ = self.auxiliary_nets[n](representation)
        return logits, representation


def set_learning_rate(optimizers, epoch, args):
    """A cosine from --lr to 0, and in the first --warmup epochs a linear rise from an 80th. Epochs count from 1."""
    lr, e = args.lr / 2 * (1 + math.cos(math.pi * epoch / args.epochs)), epoch - 1
    if e < args.warmup:
        lr = (lr * e + args.lr / 80 * (args.warmup - e)) / args.warmup
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = lr


def train_module(n, x, images, labels, model, optimizers, scalers, autocast, meters):
    """One step of module n on its input x, the previous one's output; returns its own output (B, C, s, s)."""
    block, local_loss = model.blocks[n], model.auxiliary_nets[n]
    with autocast:
        representation = block(x)
        output = train_step.hand_over(representation)
        logits, more = local_loss(representation)
    loss = local_loss.loss(*to_float((logits, more)), images, labels)
    optimizers[n].zero_grad()
    scalers[n].scale(loss).backward()  # frees its activations: without a graph, before the next module makes its own
    scalers[n].step(optimizers[n])
    scalers[n].update()
    local_loss.after_step()
    meters[n].update(loss, logits, labels)
    return output


def to_float(outputs):
    """Tensors, None, or tuples of them, in float32: losses are not computed in 16 bits."""
    if isinstance(outputs, tuple):
        return tuple(map(to_float, outputs))
    return outputs if outputs is None else outputs.float()


@cifar.CudaGraph
def train_step(images, labels, model, *parts):
    """A batch (DGL's Algorithm 1): as if each module updated before the next one sees the batch."""
    x, number = images, len(model.blocks)
    in_turn = any(net.reads for net in model.auxiliary_nets)
    for n in range(number) if in_turn else train_step.branches(number):
        x = train_module(n, x, images, labels, model, *parts)


def train_epoch(model, optimizers, scalers, autocast, batches, meters):
    """One epoch of synchronous local learning."""
    model.train()
    for images, labels in tqdm(batches, disable=None, leave=False):
        train_step(images, labels, model, optimizers, scalers, autocast, meters)


@cifar.CudaGraph
def test_step(images, labels, model, autocast):
    """How many images of a batch each module gets right: (modules,); nan for one that does not classify."""
    x, correct = images, torch.zeros(len(model.blocks), device=images.device)
    for n in range(len(model.blocks)):
        with autocast:
            logits, x = model(x, n)
        correct[n] = math.nan if logits is None else (logits.argmax(1) == labels).sum()
    return correct


@torch.no_grad()
def evaluate(model, autocast, batches):
    """Top-1 accuracy in % of every module, in one pass over the batches; nan for one that does not classify."""
    model.eval()
    correct = sum(test_step(images, labels, model, autocast) for images, labels in batches)
    return (100 * correct / len(batches.labels)).tolist()


def make_parts(args, num_classes, device):
    """(network, optimizers, scalers, autocast, meters): an optimizer, a scaler and a meter for each module."""
    model = utils.to_device(Network(num_classes, args), args, device)
    modules = zip(model.blocks, model.auxiliary_nets)
    optimizers = [cifar.sgd(module, lr=args.lr, weight_decay=1e-4, nesterov=True) for module in modules]
    scalers = [cifar.grad_scaler(args, device) for _ in optimizers]
    return model, optimizers, scalers, utils.autocast(args, device), [cifar.Meter(device) for _ in optimizers]


def main(argv=None):
    args = parse_args(argv)
    if args.costs:
        return costs.print_table(args, Network)
    device = utils.setup(args)
    if args.audit:
        return audit.main(args, make_parts, train_module)
    data = cifar.load_data(args, device)
    for batches in (data.train, data.test):
        batches.mean, batches.std = (torch.tensor(values, device=device) for values in (methods.MEAN, methods.STD))
    model, optimizers, scalers, autocast, meters = make_parts(args, data.num_classes, device)
    train_step.enabled = test_step.enabled = args.cuda_graph
    run = utils.Run(args, data, fixed=("epochs",), model=model, optimizers=optimizers, scalers=scalers)
    if not run.epoch:
        run.log(f"modules end after {', '.join(resnet.name(end, args.depth) for end in model.ends)}")
    for epoch in run.epochs(args.epochs):
        set_learning_rate(optimizers, epoch, args)
        train_epoch(model, optimizers, scalers, autocast, data.train, meters)
        for n, (meter, top1) in enumerate(zip(meters, evaluate(model, autocast, data.test)), start=1):
            cifar.log_epoch(run, n, epoch, meter, top1)


if __name__ == "__main__":
    main()
