"""Backprop, DNI and cDNI on CIFAR-10 (Section 5.1, "Decoupled Greedy Learning of CNNs", arXiv 1901.08164).

Trains the CNN of the DNI paper (Jaderberg et al. 2017, arXiv 1608.05343) end to end, or with a decoupled neural
interface after each of its three blocks. The synthetic gradients can be conditioned on the labels (cDNI).
cifar_dgl.py trains the same network with DGL, and analyze_dni_compare.ipynb compares all four methods.

    python cifar_cnn_dni.py                    # backprop on CIFAR-10, downloaded to ./data if missing; 2000 epochs
    python cifar_cnn_dni.py --dni              # synthetic gradients
    python cifar_cnn_dni.py --dni --context    # synthetic gradients conditioned on the labels
    python cifar_cnn_dni.py --data digits      # handwritten digits, no download

Writes a log with one line per epoch, and a checkpoint to --resume from.
"""

import utils

import torch
import torch.nn.functional as F
from tqdm import tqdm

import cifar
import dni
from models import CNN, one_hot


def parse_args(argv=None):
    parser = utils.ArgumentParser(__file__, __doc__)
    cifar.add_data_flags(parser)
    cifar.add_bn_init_flag(parser)
    cifar.add_cuda_graph_flag(parser)
    add = parser.add_argument
    add("--batch-size", type=utils.at_least(2), default=256, help="images in a training batch")
    add("--test-batch-size", type=utils.at_least(1), default=256, help="images in a test batch")
    add("--epochs", type=utils.at_least(1), default=2000, help="passes over the training set")
    add("--seed", type=utils.at_least(0), default=1, help="seeds the initial weights and the order of the data")
    add("--log-interval", type=utils.at_least(0), default=0, help="print the loss every N batches (0: never)")
    add("--dni", action="store_true", help="synthetic gradients, from an interface after each block")
    add("--context", action="store_true", help="with --dni, condition synthetic gradients on the labels (cDNI)")
    add("--sgd", action="store_true", help="SGD (0.01, momentum 0.9, weight decay 1e-5) instead of Adam (3e-5)")
    args = parser.parse_args(argv)
    if args.context and not args.dni:
        parser.error("--context needs --dni, because it conditions synthetic gradients")
    if args.dni and args.precision == "fp16":
        # The loss scale changes during training, and synthesizers would have to follow it.
        parser.error("--precision fp16 needs loss scaling, which synthetic gradients lack: use bf16 with --dni")
    return args


def make_optimizer(model, sgd):
    """One optimizer for everything, synthesizers included."""
    if sgd:
        return cifar.sgd([model], lr=0.01, weight_decay=1e-5)
    return torch.optim.Adam(model.parameters(), lr=3e-5, fused=True)


@cifar.CudaGraph
def train_step(images, labels, model, optimizer, scaler, autocast, meter, context_dim):
    """Backprop or, if the model has interfaces, DNI on a batch. For cDNI, `context_dim` is num_classes.

    Returns the loss.
    """
    optimizer.zero_grad()
    context = one_hot(labels, context_dim) if context_dim else None
    with autocast, dni.synthesizer_context(context):
        logits = model(images)  # each interface backpropagates as soon as its block is done
        loss = F.cross_entropy(logits, labels)
    scaler.scale(loss).backward()  # with interfaces, stops at the last one and trains its synthesizer
    scaler.step(optimizer)
    scaler.update()
    meter.update(loss, logits, labels)
    return loss.detach()


def train_epoch(model, optimizer, scaler, autocast, batches, meter, context_dim=None, log_interval=0):
    """One epoch of backprop or DNI."""
    model.train()
    for i, (images, labels) in enumerate(tqdm(batches, disable=None, leave=False), start=1):
        loss = train_step(images, labels, model, optimizer, scaler, autocast, meter, context_dim)
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
    network = cifar.init_batch_norm(CNN(data.num_classes, args.dni, args.context), args.bn_init)
    model = utils.to_device(network, args, device)
    optimizer = make_optimizer(model, args.sgd)
    scaler = cifar.grad_scaler(args, device)
    autocast = utils.autocast(args, device)
    meter = cifar.Meter(device)
    context_dim = data.num_classes if args.context else None
    train_step.enabled = args.cuda_graph
    run = utils.Run(args, data, model=model, optimizer=optimizer, scaler=scaler)
    for epoch in run.epochs(args.epochs):
        train_epoch(model, optimizer, scaler, autocast, data.train, meter, context_dim, args.log_interval)
        cifar.log_epoch(run, len(model.blocks), epoch, meter, evaluate(model, autocast, data.test))


if __name__ == "__main__":
    main()
