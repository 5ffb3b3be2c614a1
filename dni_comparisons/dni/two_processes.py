"""Complete unlock across two processes: each trains its own part of a network, and waits for no message or gradient.

    torchrun --standalone --nproc_per_node=2 -m dni.two_processes    # in the folder above; --help shows the flags

Process 0 has part A (images -> message), and process 1 has part B (message -> logits). Both have a copy of the
interface. Process 0 trains its forward synthesizer on real messages, and process 1 its backward synthesizer on real
gradients. No step waits for a message; every `--every` steps they meet to exchange synthesizer weights. The network
classifies scikit-learn's 8x8 digits. Process 1 prints the test accuracy on real messages.
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import dni

WIDTH = 64  # features of the message
PART_A, PART_B = 0, 1  # ranks


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000, help="training steps of each process (default: %(default)s)")
    parser.add_argument("--every", type=int, default=10, help="steps between exchanges (default: %(default)s)")
    args = parser.parse_args(argv)
    if os.environ.get("WORLD_SIZE") != "2":
        parser.error("it needs two processes: start with torchrun --standalone --nproc_per_node=2 -m dni.two_processes")
    return args


def synchronise(interface):
    """Copy each synthesizer's weights from the process that trains it to the other one."""
    for part, source in ((interface.forward_interface, PART_A), (interface.backward_interface, PART_B)):
        for parameter in part.parameters():
            dist.broadcast(parameter.data, source)


def train_a(part, interface, optimizer, x):
    """One step of part A on its own: no activation leaves the process, and no gradient comes in."""
    optimizer.zero_grad()
    interface.send(part(x), x)
    optimizer.step()


def train_b(part, interface, optimizer, x, labels):
    """One step of part B on its own, on synthetic messages."""
    optimizer.zero_grad()
    F.cross_entropy(part(interface.receive(x)), labels, reduction="sum").backward()
    optimizer.step()


@torch.no_grad()
def evaluate(part, rank, x, labels):
    """Part A sends its real messages; part B classifies them and prints its accuracy."""
    message = part(x) if rank == PART_A else torch.empty(len(x), WIDTH)
    dist.broadcast(message, PART_A)
    if rank == PART_B:
        top1 = (part(message).argmax(1) == labels).float().mean().item()
        print(f"test top1: {100 * top1:.2f}")


def main(argv=None):
    args = parse_args(argv)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    digits = load_digits()
    images, labels = torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target)
    torch.manual_seed(0)
    part_a = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU())
    part_b = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
    interface = dni.BidirectionalInterface(
        dni.BasicSynthesizer(WIDTH, n_hidden=1, hidden_dim=128, trigger_dim=64),
        dni.BasicSynthesizer(WIDTH, n_hidden=1, hidden_dim=128, context_dim=10),
    )
    synchronise(interface)
    part = part_a if rank == PART_A else part_b
    mine = interface.forward_interface if rank == PART_A else interface.backward_interface
    optimizer = torch.optim.Adam([*part.parameters(), *mine.parameters()], lr=2e-3)
    for step in range(args.steps):
        index = torch.randint(1500, (64,))
        x, y = images[index], labels[index]
        with dni.synthesizer_context(F.one_hot(y, 10).float()):  # the forward synthesizer does not use it
            train_a(part, interface, optimizer, x) if rank == PART_A else train_b(part, interface, optimizer, x, y)
        if (step + 1) % args.every == 0:
            synchronise(interface)
    evaluate(part, rank, images[1500:], labels[1500:])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
