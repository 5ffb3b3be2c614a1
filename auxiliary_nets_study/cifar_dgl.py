"""Which auxiliary network? (Section 5.2, "Decoupled Greedy Learning of CNNs", arXiv 1901.08164).

A VGG-like network of six 3x3 convolutions is cut into modules of --block_size layers, which all train at the same time
(synchronous DGL, Algorithm 1). The auxiliary networks are mlp-sr (1x1 convolutions at a quarter of the resolution,
then an MLP), mlp, or cnn (3x3 convolutions at full resolution).

    python cifar_dgl.py                    # mlp-sr; CIFAR-10, downloaded to ./data if missing; 50 epochs
    python cifar_dgl.py --type_aux cnn
    python cifar_dgl.py --flops            # parameters and FLOPs of each module, without training
    python cifar_dgl.py --loss predsim     # beyond the paper: local losses with similarity matching
    python cifar_dgl.py --data digits      # handwritten digits, no download

Writes a log with one line per module and epoch, and a checkpoint to --resume from. AuxiliaryNets.ipynb draws the logs.
"""

import math

import utils

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import cifar


def parse_args(argv=None):
    parser = utils.ArgumentParser(__file__, __doc__)
    cifar.add_data_flags(parser)
    cifar.add_bn_init_flag(parser)
    cifar.add_cuda_graph_flag(parser)
    parser.add_argument("--type_aux", choices=["mlp-sr", "mlp", "cnn"], default="mlp-sr", help="auxiliary network")
    parser.add_argument("--block_size", type=utils.at_least(1), default=1, help="layers in a module")
    parser.add_argument("--depth", type=utils.at_least(1), default=6, help="layers of the network")
    parser.add_argument("--feature_size", type=utils.at_least(1), default=128, help="channels of the first layer")
    parser.add_argument("--flops", action="store_true", help="print parameters and FLOPs of each module, and exit")
    parser.add_argument("--loss", choices=["pred", "predsim"], default="pred", help="loss of all modules but the last")
    parser.add_argument(
        "--beta", type=utils.at_least(0, float), default=0.99, help="weight of the similarity loss in predsim"
    )
    parser.add_argument("--batch-size", type=utils.at_least(2), default=128, help="images in a training batch")
    parser.add_argument("--test-batch-size", type=utils.at_least(1), default=256, help="images in a test batch")
    parser.add_argument("--epochs", type=utils.at_least(1), default=50, help="passes over the training set")
    parser.add_argument("--seed", type=utils.at_least(0), default=1, help="seeds the initial weights and data order")
    args = parser.parse_args(argv)
    if args.beta > 1:
        parser.error(f"--beta {args.beta} is not a number from 0 to 1")
    if args.beta != parser.get_default("beta") and args.loss != "predsim":
        parser.error("--beta has no effect without --loss predsim")
    if args.block_size > args.depth:
        parser.error(f"--block_size {args.block_size} is more than the network's {args.depth} layers")
    return args


# The network. Shapes are (B, C, H, W), where C is a layer's number of channels and s its output's side in pixels.


def layer(in_channels, channels, downsample):
    """List: [2x2 max-pool,] 3x3 convolution, BatchNorm, ReLU; (B, in_channels, s, s) -> (B, channels, s', s')."""
    pool = [nn.MaxPool2d(2)] if downsample else []
    convolution = nn.Conv2d(in_channels, channels, 3, padding=1)
    return [*pool, convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


def convolutions(channels, kernel_size, number):
    """List: `number` convolutions without bias, each with BatchNorm and ReLU; (B, C, s, s) -> (B, C, s, s)."""
    net = []
    for _ in range(number):
        net += [nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, bias=False)]
        net += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    return net


def mlp(channels, num_hidden=3):
    """List: an MLP on (B, C, s, s), averaged to 2x2 and flattened to 4C; -> features (B, 4C)."""
    net = [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    for _ in range(num_hidden):
        net += [nn.Linear(4 * channels, 4 * channels), nn.BatchNorm1d(4 * channels), nn.ReLU(inplace=True)]
    return net


class AuxiliaryNet(nn.Sequential):
    """(B, C, s, s) -> logits (B, num_classes), and the features (B, 4C) that its last, linear layer reads."""

    def __init__(self, type_aux, channels, side, num_classes, last=False):
        if last:  # the network's classifier
            net = mlp(channels, num_hidden=2)
        elif type_aux == "mlp-sr":
            net = [nn.AdaptiveAvgPool2d(math.ceil(side / 4)), *convolutions(channels, 1, 3), *mlp(channels)]
        elif type_aux == "mlp":
            net = mlp(channels)
        elif type_aux == "cnn":
            pool = [nn.AdaptiveAvgPool2d(2), nn.BatchNorm2d(channels), nn.Flatten()]
            net = [*convolutions(channels, 3, 2), *pool]
        else:
            raise ValueError(f"there is no auxiliary network {type_aux!r}")
        super().__init__(*net, nn.Linear(4 * channels, num_classes))

    def forward(self, features):
        *layers, classifier = self
        for part in layers:
            features = part(features)
        return classifier(features), features


class DGLNet(nn.Module):
    """`depth` layers in modules of `block_size`, each with an auxiliary network. The last module may be smaller.

    The default widths are 128, 256, 256, 512, 512, 512 at sides 32, 16, 16, 8, 8, 8. Layers 1 and 3, counted from 0,
    begin with a 2x2 max-pool and double the channels. The last auxiliary network is the classifier.
    """

    def __init__(self, num_classes, type_aux="mlp-sr", block_size=1, depth=6, channels=128, side=32):
        super().__init__()
        self.blocks, self.auxiliary_nets = nn.ModuleList(), nn.ModuleList()
        self.layers = [range(depth)[i : i + block_size] for i in range(0, depth, block_size)]  # of each module
        in_channels = 3
        for layers in self.layers:
            block = []
            for n in layers:
                downsample = n in (1, 3)
                if downsample:
                    channels, side = 2 * channels, side // 2
                block += layer(in_channels, channels, downsample)
                in_channels = channels
            self.blocks.append(nn.Sequential(*block))
            last = layers == self.layers[-1]
            self.auxiliary_nets.append(AuxiliaryNet(type_aux, channels, side, num_classes, last))

    def forward(self, x, n, upto=False):
        """Run module n on its input x. With `upto`, x is the images, and blocks 0 to n-1 run first.

        Returns:
            (logits of auxiliary net n (B, num_classes), output of block n (B, C, s, s)).
        """
        if upto:
            for block in self.blocks[:n]:
                x = block(x)
        representation = self.blocks[n](x)
        logits, _ = self.auxiliary_nets[n](representation)
        return logits, representation


def costs(model):
    """Parameters and forward FLOPs per image (convolutions and matrix products), without computing anything.

    Args:
        model: a DGLNet on the meta device, in eval mode.

    Returns:
        a list of (block's parameters, block's FLOPs, auxiliary network's parameters, auxiliary network's FLOPs).
    """

    def cost(part, x):
        with FlopCounterMode(display=False) as counter:
            y = part(x)
        return sum(p.numel() for p in part.parameters()), counter.get_total_flops(), y

    x, rows = torch.empty(1, 3, 32, 32, device="meta"), []
    for block, auxiliary_net in zip(model.blocks, model.auxiliary_nets):
        *of_block, x = cost(block, x)
        *of_net, _ = cost(auxiliary_net, x)
        rows.append((*of_block, *of_net))
    return rows


def auxiliary_share(rows):
    """FLOPs of the auxiliary networks in % of the network's. The classifier counts as part of the network."""
    classifier = rows[-1][3]
    return 100 * sum(row[3] for row in rows[:-1]) / (sum(row[1] for row in rows) + classifier)


def print_flops(model):
    print("| module | layers | block: parameters | MFLOPs | auxiliary network: parameters | MFLOPs |")
    print("|---|---|---|---|---|---|")
    rows = costs(model)
    for n, (layers, (parameters, flops, aux_parameters, aux_flops)) in enumerate(zip(model.layers, rows), start=1):
        block = f"{n} | {span(layers)} | {parameters:,} | {flops / 1e6:.1f}"
        print(f"| {block} | {aux_parameters:,}{' (classifier)' * (n == len(rows))} | {aux_flops / 1e6:.1f} |")
    print(f"\nFLOPs of the auxiliary networks: {auxiliary_share(rows):.1f} % of the network's, classifier included")


def span(layers):
    """A module's layers as text, counted from 1."""
    return f"{layers[0] + 1}-{layers[-1] + 1}" if len(layers) > 1 else f"{layers[0] + 1}"


# Training


def similarity(x):
    """Cosine similarities (B, B) between the rows of x (B, D), after each row's mean is subtracted."""
    x = x.float()
    x = F.normalize(x - x.mean(1, keepdim=True), dim=1)
    return x @ x.T


def local_loss(logits, features, labels, beta=0.0):
    """Cross-entropy mixed with similarity matching: "predsim" (Nøkland and Eidnes, arXiv 1901.06656).

    (1 - beta) * cross-entropy + beta * ||S(features) - S(one-hot labels)||^2 / B^2, with S as in `similarity`, for
    logits (B, num_classes), features (B, D), labels (B,).
    """
    loss = F.cross_entropy(logits, labels)
    if beta:
        target = similarity(F.one_hot(labels, logits.shape[1]))
        loss = (1 - beta) * loss + beta * F.mse_loss(similarity(features), target)
    return loss


def set_learning_rate(optimizers, epoch):
    """0.1, multiplied by 0.2 after every 15 epochs. Epochs count from 1."""
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = 0.1 * 0.2 ** ((epoch - 1) // 15)


@cifar.CudaGraph
def train_step(images, labels, model, optimizers, scalers, autocast, meters, beta):
    """Synchronous DGL on a batch (Algorithm 1): as if each module updated before the next one sees the batch."""
    x = images
    for n, optimizer, scaler in zip(train_step.branches(len(optimizers)), optimizers, scalers):
        with autocast:
            representation = model.blocks[n](x)
            x = train_step.hand_over(representation)
            logits, features = model.auxiliary_nets[n](representation)
        last = n == len(optimizers) - 1
        loss = local_loss(logits.float(), features, labels, 0.0 if last else beta)
        optimizer.zero_grad()
        scaler.scale(loss).backward()  # frees its activations: without a graph, before the next module makes its own
        scaler.step(optimizer)
        scaler.update()
        meters[n].update(loss, logits, labels)


def train_epoch(model, optimizers, scalers, autocast, batches, meters, beta=0.0):
    """One epoch of synchronous DGL."""
    model.train()
    for images, labels in tqdm(batches, disable=None, leave=False):
        train_step(images, labels, model, optimizers, scalers, autocast, meters, beta)


@cifar.CudaGraph
def test_step(images, labels, model, autocast):
    """How many images of a batch each module gets right: (modules,)."""
    x, correct = images, []
    for n in range(len(model.blocks)):
        with autocast:
            logits, x = model(x, n)
        correct.append((logits.argmax(1) == labels).sum())
    return torch.stack(correct)


@torch.no_grad()
def evaluate(model, autocast, batches):
    """Top-1 accuracy in % of every module, in one pass over the batches."""
    model.eval()
    correct = sum(test_step(images, labels, model, autocast) for images, labels in batches)
    return (100 * correct / len(batches.labels)).tolist()


def main(argv=None):
    args = parse_args(argv)
    shape = args.type_aux, args.block_size, args.depth, args.feature_size
    if args.flops:
        with torch.device("meta"):
            return print_flops(DGLNet(10, *shape).eval())
    device = utils.setup(args)
    data = cifar.load_data(args, device)
    network = cifar.init_batch_norm(DGLNet(data.num_classes, *shape), args.bn_init)
    model = utils.to_device(network, args, device)
    optimizers = [cifar.sgd(parts, lr=0.1, weight_decay=5e-4) for parts in zip(model.blocks, model.auxiliary_nets)]
    scalers = [cifar.grad_scaler(args, device) for _ in optimizers]
    autocast = utils.autocast(args, device)
    meters = [cifar.Meter(device) for _ in optimizers]
    train_step.enabled = test_step.enabled = args.cuda_graph
    run = utils.Run(args, data, model=model, optimizers=optimizers, scalers=scalers)
    if not run.epoch:
        groups = (f"{n}: {span(layers)}" for n, layers in enumerate(model.layers, start=1))
        run.log(f"layers of the modules, {', '.join(groups)}")
    beta = args.beta if args.loss == "predsim" else 0
    for epoch in run.epochs(args.epochs):
        set_learning_rate(optimizers, epoch)
        train_epoch(model, optimizers, scalers, autocast, data.train, meters, beta)
        for n, (meter, top1) in enumerate(zip(meters, evaluate(model, autocast, data.test)), start=1):
            cifar.log_epoch(run, n, epoch, meter, top1)


if __name__ == "__main__":
    main()
