"""Learning curves of parallel DGL (Section 5.2, "Decoupled Greedy Learning of CNNs", arXiv 1901.08164).

Each of four layers is a module with its own auxiliary network and loss, and all train at the same time (synchronous
DGL, Algorithm 1). cifar_sequential_greedy.py trains the same network one layer after the other. LearningCurves.ipynb
compares the two.

    python cifar_dgl.py                  # CIFAR-10, downloaded to ./data if missing; 50 epochs
    python cifar_dgl.py --data digits    # handwritten digits, no download

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
    parser.add_argument("--epochs", type=utils.at_least(1), default=50, help="passes over the training set")
    parser.add_argument("--lr", type=utils.at_least(0, float, above=True), default=0.1, help="initial learning rate")
    parser.add_argument("--seed", type=utils.at_least(0), default=1, help="seeds the initial weights and data order")
    return parser.parse_args(argv)


def set_learning_rate(optimizers, lr, epoch):
    """Multiply the learning rate by 0.2 after every 15 epochs. Epochs count from 1."""
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = lr * 0.2 ** ((epoch - 1) // 15)


@cifar.CudaGraph
def train_step(images, labels, model, optimizers, scalers, autocast, meters):
    """Synchronous DGL on a batch (Algorithm 1): as if each module updated before the next one sees the batch."""
    x = images
    for n, optimizer, scaler in zip(train_step.branches(len(optimizers)), optimizers, scalers):
        with autocast:
            representation = model.blocks[n](x)
            x = train_step.hand_over(representation)
            logits = model.auxiliary_nets[n](representation)
            loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()  # frees its activations: without a graph, before the next module makes its own
        scaler.step(optimizer)
        scaler.update()
        meters[n].update(loss, logits, labels)


def train_epoch(model, optimizers, scalers, autocast, batches, meters):
    """One epoch of synchronous DGL."""
    model.train()
    for images, labels in tqdm(batches, disable=None, leave=False):
        train_step(images, labels, model, optimizers, scalers, autocast, meters)


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
    device = utils.setup(args)
    data = cifar.load_data(args, device)
    network = cifar.init_batch_norm(DGLNet(data.num_classes), args.bn_init)
    model = utils.to_device(network, args, device)
    optimizers = [cifar.sgd(parts, args.lr, weight_decay=5e-4) for parts in zip(model.blocks, model.auxiliary_nets)]
    scalers = [cifar.grad_scaler(args, device) for _ in optimizers]
    autocast = utils.autocast(args, device)
    meters = [cifar.Meter(device) for _ in optimizers]
    train_step.enabled = test_step.enabled = args.cuda_graph
    run = utils.Run(args, data, model=model, optimizers=optimizers, scalers=scalers)
    for epoch in run.epochs(args.epochs):
        set_learning_rate(optimizers, args.lr, epoch)
        train_epoch(model, optimizers, scalers, autocast, data.train, meters)
        for n, (meter, top1) in enumerate(zip(meters, evaluate(model, autocast, data.test)), start=1):
            cifar.log_epoch(run, n, epoch, meter, top1)


if __name__ == "__main__":
    main()
