"""DGL with the DNI paper's CNN (Section 5.1, "Decoupled Greedy Learning of CNNs", arXiv 1901.08164).

Each block of cifar_cnn_dni.py's network is a module with its own auxiliary network and loss, and all train at the same
time (synchronous DGL, Algorithm 1). analyze_dni_compare.ipynb compares DGL with backprop and DNI.

    python cifar_dgl.py                  # CIFAR-10, downloaded to ./data if missing; 1500 epochs
    python cifar_dgl.py --data digits    # handwritten digits, no download

Writes a log with one line per epoch (for the last module, i.e. the network), and a checkpoint to --resume from.
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
    add = parser.add_argument
    add("--batch-size", type=utils.at_least(2), default=256, help="images in a training batch")
    add("--test-batch-size", type=utils.at_least(1), default=256, help="images in a test batch")
    add("--epochs", type=utils.at_least(1), default=1500, help="passes over the training set")
    add("--seed", type=utils.at_least(0), default=1, help="seeds the initial weights and the order of the data")
    add("--log-interval", type=utils.at_least(0), default=0, help="print the loss every N batches (0: never)")
    parser.ignore("--lr", "--context")
    return parser.parse_args(argv)


def make_optimizer(block, net):
    """The optimizer of one module."""
    return torch.optim.Adam([*block.parameters(), *net.parameters()], lr=3e-5, fused=True)


@cifar.CudaGraph
def train_step(images, labels, model, optimizers, scalers, autocast, meter):
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
    meter.update(loss, logits, labels)  # the last module's
    return loss.detach()


def train_epoch(model, optimizers, scalers, autocast, batches, meter, log_interval=0):
    """One epoch of synchronous DGL."""
    model.train()
    for i, (images, labels) in enumerate(tqdm(batches, disable=None, leave=False), start=1):
        loss = train_step(images, labels, model, optimizers, scalers, autocast, meter)
        if log_interval and i % log_interval == 0:
            print(f"batch {i} of {len(batches)}, loss: {loss.item():.5f}")


@torch.no_grad()
def evaluate(model, autocast, batches):
    """Top-1 accuracy in % of the last module, i.e. of the whole network."""
    model.eval()
    correct = torch.zeros((), device=batches.device)
    for images, labels in batches:
        with autocast:
            logits, _ = model(images, len(model.blocks) - 1, upto=True)
        correct += (logits.argmax(1) == labels).sum()
    return (100 * correct / len(batches.labels)).item()


def main(argv=None):
    args = parse_args(argv)
    device = utils.setup(args)
    data = cifar.load_data(args, device)
    network = cifar.init_batch_norm(DGLNet(data.num_classes), args.bn_init)
    model = utils.to_device(network, args, device)
    optimizers = [make_optimizer(*module) for module in zip(model.blocks, model.auxiliary_nets)]
    scalers = [cifar.grad_scaler(args, device) for _ in optimizers]
    autocast = utils.autocast(args, device)
    meter = cifar.Meter(device)
    train_step.enabled = args.cuda_graph
    run = utils.Run(args, data, model=model, optimizers=optimizers, scalers=scalers)
    for epoch in run.epochs(args.epochs):
        train_epoch(model, optimizers, scalers, autocast, data.train, meter, args.log_interval)
        cifar.log_epoch(run, len(model.blocks), epoch, meter, evaluate(model, autocast, data.test))


if __name__ == "__main__":
    main()
