"""Backprop with ResNet-110 on CIFAR-10 (Section 5.3, "Decoupled Greedy Learning of CNNs", arXiv 1901.08164).

The end-to-end baseline for cifar_dgl.py, cifar_ddg.py and cifar_features_replay.py: same network, same batches.

    python cifar_backprop.py                              # CIFAR-10, downloaded to ./data if missing; 300 epochs
    python cifar_backprop.py --data digits --depth 20     # a small network, handwritten digits, no download

Writes a log with one line per epoch, and a checkpoint to --resume from.
"""

import utils

import torch
import torch.nn.functional as F
from tqdm import tqdm

import cifar
from models import ResNet, add_flags, check_cut


def parse_args(argv=None):
    parser = utils.ArgumentParser(__file__, __doc__)
    cifar.add_data_flags(parser)
    cifar.add_cuda_graph_flag(parser)
    add = add_flags(parser, "K in the other methods; here only the n in the log")
    add("--log-interval", type=utils.at_least(0), default=0, help="print the loss every N batches (0: never)")
    return check_cut(parser, parser.parse_args(argv))


def make_optimizer(model):
    return cifar.sgd([model], lr=0.01, weight_decay=5e-4, nesterov=True)


def set_learning_rate(optimizer, epoch, drops=(150, 225)):
    """0.01, divided by 10 when each epoch of `drops` begins. Epochs count from 1."""
    optimizer.param_groups[0]["lr"] = 0.01 * 0.1 ** sum(epoch >= drop for drop in drops)


@cifar.CudaGraph
def train_step(images, labels, model, optimizer, scaler, autocast, meter):
    """Backprop on a batch. Returns the loss."""
    with autocast:
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    meter.update(loss, logits, labels)
    return loss.detach()


def train_epoch(model, optimizer, scaler, autocast, batches, meter, log_interval=0):
    """One epoch of backprop."""
    model.train()
    for i, (images, labels) in enumerate(tqdm(batches, disable=None, leave=False), start=1):
        loss = train_step(images, labels, model, optimizer, scaler, autocast, meter)
        if log_interval and i % log_interval == 0:
            print(f"batch {i} of {len(batches)}, loss: {loss.item():.5f}")


@torch.no_grad()
def evaluate(model, autocast, batches):
    """Top-1 accuracy in %."""
    model.eval()
    correct = torch.zeros((), device=batches.device)
    for images, labels in batches:
        with autocast:
            logits = model(images)
        correct += (logits.argmax(1) == labels).sum()
    return (100 * correct / len(batches.labels)).item()


def main(argv=None):
    args = parse_args(argv)
    device = utils.setup(args)
    data = cifar.load_data(args, device)
    model = utils.to_device(ResNet(data.num_classes, args.depth, args.num_splits), args, device)
    optimizer = make_optimizer(model)
    scaler = cifar.grad_scaler(args, device)
    autocast = utils.autocast(args, device)
    meter = cifar.Meter(device)
    train_step.enabled = args.cuda_graph
    run = utils.Run(args, data, model=model, optimizer=optimizer, scaler=scaler)
    for epoch in run.epochs(args.epochs):
        set_learning_rate(optimizer, epoch, args.drops)
        train_epoch(model, optimizer, scaler, autocast, data.train, meter, args.log_interval)
        cifar.log_epoch(run, args.num_splits, epoch, meter, evaluate(model, autocast, data.test))


if __name__ == "__main__":
    main()
