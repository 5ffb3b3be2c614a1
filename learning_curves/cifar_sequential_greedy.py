"""Learning curves of sequential greedy training (Section 5.2, "Decoupled Greedy Learning of CNNs", arXiv 1901.08164).

Trains the network of cifar_dgl.py one layer after the other: layer 1 for all epochs, then layer 2 on top of the frozen
layer 1, and so on. LearningCurves.ipynb compares the two.

    python cifar_sequential_greedy.py                  # CIFAR-10, downloaded to ./data if missing; 4 x 50 epochs
    python cifar_sequential_greedy.py --data digits    # handwritten digits, no download

Writes a log with one line per layer and epoch, and a checkpoint to --resume from.
"""

import utils

import torch
import torch.nn.functional as F
from tqdm import tqdm

import cifar
from models import DGLNet


def parse_args(argv=None):
    parser = utils.ArgumentParser(__file__, __doc__)
    cifar.add_data_flags(parser)
    cifar.add_bn_init_flag(parser)
    cifar.add_cuda_graph_flag(parser)
    parser.add_argument("--batch-size", type=utils.at_least(2), default=128, help="images in a training batch")
    parser.add_argument("--test-batch-size", type=utils.at_least(1), default=256, help="images in a test batch")
    parser.add_argument("--epochs", type=utils.at_least(1), default=50, help="passes over the training set per layer")
    parser.add_argument("--lr", type=utils.at_least(0, float, above=True), default=0.1, help="initial learning rate")
    parser.add_argument("--seed", type=utils.at_least(0), default=1, help="seeds the initial weights and data order")
    return parser.parse_args(argv)


def set_learning_rate(optimizer, lr, epoch):
    """Multiply the learning rate by 0.2 after every 15 epochs. Each layer counts its epochs from 1."""
    optimizer.param_groups[0]["lr"] = lr * 0.2 ** ((epoch - 1) // 15)


@cifar.CudaGraph
def train_step(images, labels, model, n, optimizer, scaler, autocast, meter):
    """Train layer n (from 0) on a batch, as the layers below represent it."""
    x = images
    with torch.no_grad(), autocast:
        for block in model.blocks[:n]:
            x = block(x)
    with autocast:
        logits, _ = model(x, n)
        loss = F.cross_entropy(logits, labels)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    meter.update(loss, logits, labels)


def train_epoch(model, n, optimizer, scaler, autocast, batches, meter):
    """One epoch of layer n (from 0). The layers below are frozen, including their BatchNorm statistics."""
    model.eval()
    model.blocks[n].train()
    model.auxiliary_nets[n].train()
    for images, labels in tqdm(batches, disable=None, leave=False):
        train_step(images, labels, model, n, optimizer, scaler, autocast, meter)


@torch.no_grad()
def evaluate(model, n, autocast, batches):
    """Top-1 accuracy in % of layer n (from 0)."""
    model.eval()
    correct = torch.zeros((), device=batches.device)
    for images, labels in batches:
        with autocast:
            logits, _ = model(images, n, upto=True)
        correct += (logits.argmax(1) == labels).sum()
    return (100 * correct / len(batches.labels)).item()


def main(argv=None):
    args = parse_args(argv)
    device = utils.setup(args)
    data = cifar.load_data(args, device)
    network = cifar.init_batch_norm(DGLNet(data.num_classes), args.bn_init)
    model = utils.to_device(network, args, device)
    optimizers = [cifar.sgd(parts, args.lr, weight_decay=5e-4) for parts in zip(model.blocks, model.auxiliary_nets)]
    scalers = [cifar.grad_scaler(args, device) for _ in optimizers]
    autocast = utils.autocast(args, device)
    meter = cifar.Meter(device)
    train_step.enabled = args.cuda_graph
    run = utils.Run(args, data, fixed=["epochs"], model=model, optimizers=optimizers, scalers=scalers)
    for step in run.epochs(len(optimizers) * args.epochs):
        n, epoch = (step - 1) // args.epochs, (step - 1) % args.epochs + 1
        set_learning_rate(optimizers[n], args.lr, epoch)
        train_epoch(model, n, optimizers[n], scalers[n], autocast, data.train, meter)
        cifar.log_epoch(run, n + 1, epoch, meter, evaluate(model, n, autocast, data.test))


if __name__ == "__main__":
    main()
