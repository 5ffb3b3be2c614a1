"""DGL with ResNet-110 on CIFAR-10 (Section 5.3, "Decoupled Greedy Learning of CNNs", arXiv 1901.08164).

The network is cut into a few modules. Each has its own auxiliary network and loss, and all train at the same time
(synchronous DGL, Algorithm 1). cifar_backprop.py, cifar_ddg.py and cifar_features_replay.py train the same network on
the same batches.

    python cifar_dgl.py                              # CIFAR-10, downloaded to ./data if missing; 300 epochs
    python cifar_dgl.py --num_splits 4               # four modules
    python cifar_dgl.py --data digits --depth 20     # a small network, handwritten digits, no download

Writes a log with one line per module and epoch, and a checkpoint to --resume from.
"""

import utils

import torch
import torch.nn.functional as F
from tqdm import tqdm

import cifar
from models import DGLNet, add_flags, check_cut


def parse_args(argv=None):
    parser = utils.ArgumentParser(__file__, __doc__)
    cifar.add_data_flags(parser)
    cifar.add_cuda_graph_flag(parser)
    cifar.add_bn_init_flag(parser)  # for the auxiliary networks: the published ResNet's own weights began as 1
    add = add_flags(parser)
    add("--log-interval", type=utils.at_least(0), default=0, help="print the loss every N batches (0: never)")
    return check_cut(parser, parser.parse_args(argv))


def make_optimizers(model):
    """One per module, without Nesterov momentum, as published."""
    return [cifar.sgd(parts, lr=0.01, weight_decay=5e-4) for parts in zip(model.blocks, model.auxiliary_nets)]


def set_learning_rate(optimizers, epoch, drops=(150, 225)):
    """0.01, divided by 10 when each epoch of `drops` begins, with momentum from zero. Epochs count from 1."""
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = 0.01 * 0.1 ** sum(epoch >= drop for drop in drops)
        if epoch in drops:  # the published code makes a new SGD
            for state in optimizer.state.values():
                state["momentum_buffer"].zero_()


@cifar.CudaGraph
def train_step(images, labels, model, optimizers, scalers, autocast, meters):
    """Synchronous DGL on a batch (Algorithm 1): as if each module updated before the next one sees the batch.

    Returns the last module's loss.
    """
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
    return loss.detach()


def train_epoch(model, optimizers, scalers, autocast, batches, meters, log_interval=0):
    """One epoch of synchronous DGL."""
    model.train()
    for i, (images, labels) in enumerate(tqdm(batches, disable=None, leave=False), start=1):
        loss = train_step(images, labels, model, optimizers, scalers, autocast, meters)
        if log_interval and i % log_interval == 0:
            print(f"batch {i} of {len(batches)}, loss: {loss.item():.5f}")


@torch.no_grad()
def evaluate(model, autocast, batches):
    """Top-1 accuracy in % of every module, in one pass over the batches."""
    model.eval()
    correct = torch.zeros(len(model.blocks), device=batches.device)
    for images, labels in batches:
        x = images
        for n in range(len(model.blocks)):
            with autocast:
                logits, x = model(x, n)
            correct[n] += (logits.argmax(1) == labels).sum()
    return (100 * correct / len(batches.labels)).tolist()


def main(argv=None):
    args = parse_args(argv)
    device = utils.setup(args)
    data = cifar.load_data(args, device)
    network = DGLNet(data.num_classes, args.depth, args.num_splits)
    cifar.init_batch_norm(network.auxiliary_nets, args.bn_init)
    model = utils.to_device(network, args, device)
    optimizers = make_optimizers(model)
    scalers = [cifar.grad_scaler(args, device) for _ in optimizers]
    autocast = utils.autocast(args, device)
    meters = [cifar.Meter(device) for _ in optimizers]
    train_step.enabled = args.cuda_graph
    run = utils.Run(args, data, model=model, optimizers=optimizers, scalers=scalers)
    for epoch in run.epochs(args.epochs):
        set_learning_rate(optimizers, epoch, args.drops)
        train_epoch(model, optimizers, scalers, autocast, data.train, meters, args.log_interval)
        for n, (meter, top1) in enumerate(zip(meters, evaluate(model, autocast, data.test)), start=1):
            cifar.log_epoch(run, n, epoch, meter, top1)


if __name__ == "__main__":
    main()
