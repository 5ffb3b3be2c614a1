"""Is local learning local? Every method and number of modules, a training step of each module on random data.

- A module's step changes no parameter, buffer or gradient outside the module, and hands no graph to the next one.
- Its loss does not depend on the later modules' parameters or buffers. Nor does that of its next step on the same
  input, unless the method says that it reads them (LocalLoss.reads), as MAN's moving average does.
- Each BatchNorm counts the batch once. One that a second forward pass (checkpointing) updates again counts it twice.
"""

import copy

import torch

import methods
import resnet

IMAGES = 8


def state(model):
    """Copies of all parameters, buffers and gradients, by name."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    tensors |= {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def owner(name):
    """The module to which blocks.<n>.* and auxiliary_nets.<n>.* belong."""
    return int(name.split(".")[1])


def changed(before, after):
    """Names of what is new or another value."""
    return [name for name, tensor in after.items() if name not in before or not torch.equal(before[name], tensor)]


def two_losses(n, x, images, labels, train_module, parts):
    """The losses of two steps of module n on the same input."""
    meters = parts[-1]
    return [(train_module(n, x, images, labels, *parts), meters[n].pop()[0])[1] for _ in range(2)]


def reads_later(n, x, images, labels, train_module, parts):
    """Whether the losses of two steps of module n change with the later modules' state: [first, second]."""
    model, optimizers, *_ = parts
    saved, pairs = copy.deepcopy((model.state_dict(), optimizers[n].state_dict())), []
    for noise in (0, 1):
        for name, tensor in model.state_dict().items():
            if owner(name) > n and tensor.is_floating_point():
                tensor.add_(noise * torch.randn_like(tensor))
        torch.manual_seed(0)  # a method's dropout is the same in both
        pairs.append(two_losses(n, x, images, labels, train_module, parts))
        model.load_state_dict(saved[0])
        optimizers[n].load_state_dict(saved[1])
        model.zero_grad()
    return [a != b for a, b in zip(*pairs)]


def audit(train_module, parts):
    """What is not local in a step of each module: a list of texts. `parts` is what make_parts returns."""
    model, found = parts[0].train(), []
    device = next(model.parameters()).device
    images, labels = torch.randn(IMAGES, 3, 32, 32, device=device), torch.arange(IMAGES, device=device) % 4
    x = images
    for n, local_loss in enumerate(model.auxiliary_nets):
        first, second = reads_later(n, x, images, labels, train_module, parts)
        if first or (second and not local_loss.reads):
            found.append(
                f"module {n + 1} reads later modules' parameters {'for its loss' if first else 'after a step'}"
            )
        before = state(model)
        x = train_module(n, x, images, labels, *parts)
        found += [f"module {n + 1} changes {name}" for name in changed(before, state(model)) if owner(name) != n]
        if x.requires_grad:
            return [*found, f"module {n + 1} hands a graph to the next one"]
    counts = {name: int(count) for name, count in model.named_buffers() if name.endswith("num_batches_tracked")}
    return [*found, *(f"{name} is {count} after one batch" for name, count in counts.items() if count != 1)]


def main(args, make_parts, train_module):
    """Print a row for each method and number of modules; SystemExit if one is not as it should be."""
    numbers, failed = [K for K in (2, 4, 8, 16, 55) if len(resnet.widths(args.depth)) >= K], 0
    names = ["backprop", "checkpoint", *methods.METHODS]
    cases = [
        (name, loss) for name in names for loss in ("softmax", "contrast") if loss == "softmax" or name == "infopro"
    ]
    print(f"ResNet-{args.depth}, {IMAGES} random images\n\n| method | K | local? | reads |\n|---|---|---|---|")
    for args.method, args.infopro_loss in cases:
        for args.num_modules in [1] if args.method == "backprop" else numbers:  # noqa: B020
            args.balance = "blocks"
            parts = make_parts(args, 10, torch.device("cpu"))  # which repeats a step to the bit
            found = audit(train_module, parts)
            failed += bool(found)
            reads = {local_loss.reads for local_loss in parts[0].auxiliary_nets} - {""}
            verdict = f"no: {found[0]}" + f" (and {len(found) - 1} more)" * (len(found) > 1) if found else "yes"
            method = args.method + " contrast" * (args.infopro_loss == "contrast")
            print(f"| {method} | {args.num_modules} | {verdict} | {', '.join(reads) or 'nothing'} |", flush=True)
    if failed:
        raise SystemExit(f"{failed} of these are not local")
