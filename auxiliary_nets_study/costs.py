"""What each module and its auxiliary network cost, beside backprop and activation checkpointing; without training.

One training step on the meta device, which has shapes but no values: parameters, FLOPs of convolutions and matrix
products (torch.utils.flop_counter), and activations: the tensors that autograd keeps for the backward pass
(torch.autograd.graph.saved_tensors_hooks), each storage once, in float32.
"""

import argparse

import torch
from torch.utils.flop_counter import FlopCounterMode

import resnet


def keep(model, function, *inputs):
    """Call the function: what it returns, and {key: storage} of what autograd keeps, weights excepted."""
    weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # which lives as long as it is here, so that no other one gets its key
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return function(*inputs), kept


def size(kept):
    """Bytes of the storages."""
    return sum(storage.nbytes() for storage in kept.values())


def parameters(part):
    return sum(p.numel() for p in part.parameters())


def count_flops(function, *inputs):
    """Call the function: what it returns, and its FLOPs."""
    with FlopCounterMode(display=False) as counter:
        return function(*inputs), counter.get_total_flops()


def local_loss(net, h, images, labels):
    return net.loss(*net(h), images, labels)


def measure(args, Network):
    """The costs of a step of args.method on args.batch_size images.

    Returns:
        a dict for each module: its last layer, parameters and forward FLOPs of an image of block and auxiliary network,
        bytes of activations kept; and a dict for the whole: parameters, FLOPs of an image forward and backward, bytes
        of activations at the peak, one module after the other.
    """
    B, checkpointed = args.batch_size, args.method == "checkpoint"
    with torch.device("meta"):
        model = Network(10, args).train()
        images, labels = torch.empty(B, 3, 32, 32), torch.empty(B, dtype=torch.long)
    rows, x, inputs, peak, flops = [], images, {}, 0, 0
    segments = model.blocks[0].segments if checkpointed else model.blocks
    nets = [None] * (len(segments) - len(model.auxiliary_nets)) + [*model.auxiliary_nets]
    for end, segment, net in zip(model.ends[-len(segments) :], segments, nets):
        (h, kept), count = count_flops(keep, model, segment, x)
        row = {"end": end, "parameters": parameters(segment), "flops": count / B, "net": 0, "net_flops": 0}
        if net:
            (loss, more), count = count_flops(keep, model, local_loss, net, h, images, labels)
            kept |= more
            row |= {"net": parameters(net), "net_flops": count / B}
            if not checkpointed:
                flops += row["flops"] + row["net_flops"] + count_flops(loss.backward)[1] / B
        rows.append(row | {"kept": size(kept)})
        peak = max(peak, size(inputs | kept))
        if checkpointed and x is not images:  # segments' inputs wait for the backward pass
            inputs[x.untyped_storage()._cdata] = x.untyped_storage()
        x = h.detach()
    if checkpointed:  # the segments above had no graph to the one before
        flops = count_flops(lambda: local_loss(net, model.blocks[0](images), images, labels).backward())[1] / B
    return rows, {"parameters": parameters(model), "flops": flops, "peak": peak}


def print_table(args, Network):
    """The costs of each module with args.method, and of the whole beside backprop and checkpointing."""
    rows, _ = measure(args, Network)
    print(f"ResNet-{args.depth}, batches of {args.batch_size} images, float32\n")
    head = (
        "module | ends after | block: parameters | MFLOPs | auxiliary network: parameters | MFLOPs | activations, MiB"
    )
    print(f"| {head} |")
    print("|---|---|---|---|---|---|---|")
    for n, row in enumerate(rows, start=1):
        net = f"{row['net']:,}{' (classifier)' * (n == len(rows))} | {row['net_flops'] / 1e6:.1f}"
        block = f"{resnet.name(row['end'], args.depth)} | {row['parameters']:,} | {row['flops'] / 1e6:.1f}"
        print(f"| {n} | {block} | {net if row['net'] else ' | '} | {row['kept'] / 2**20:.1f} |")
    print("\n| | K | parameters | MFLOPs of a training step, per image | activations at the peak, MiB |")
    print("|---|---|---|---|---|")
    for method in dict.fromkeys(["backprop", "checkpoint", args.method]):
        other = {"num_modules": 1, "balance": "blocks"} if method == "backprop" else {}
        if method == "checkpoint" and args.method == "backprop":
            other = {"num_modules": 4}
        whole_args = argparse.Namespace(**vars(args) | {"method": method} | other)
        K, (_, whole) = whole_args.num_modules, measure(whole_args, Network)
        flops, peak = f"{whole['flops'] / 1e6:.1f}", f"{whole['peak'] / 2**20:.1f}"
        print(f"| {method} | {K} | {whole['parameters']:,} | {flops} | {peak} |")
