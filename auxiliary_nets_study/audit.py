"""Is local learning local? Every method and number of modules, training steps of each module on random data.

- A module's step changes no parameter, buffer or gradient outside the module, and hands no graph to the next one.
- Its loss and gradients do not depend on the later modules' parameters or buffers. Nor do those of its next step, after
  one of the next module, unless the method says that it reads them (LocalLoss.reads), as MAN's moving average does.
- Each BatchNorm counts the batch once. One that a second forward pass (checkpointing) updates again counts it twice.
  A method that runs its auxiliary network on several views says how many (LocalLoss.views).

A step must repeat to the bit: what changes from step to step, and is not in a buffer, looks like something read.
"""

import argparse
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
    """Names of tensors that are new or have changed."""
    return [name for name, tensor in after.items() if name not in before or not same(before[name], tensor)]


def same(a, b):
    """Equality to the bit; nan is equal to nan."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def steps(n, x, images, labels, train_module, parts):
    """Steps of module n, of the next one on its output, and of n again: n's loss and gradients in its two steps."""
    model, *_, meters = parts
    output = None
    for m in [n, n + 1, n] if n + 1 < len(meters) else [n, n]:
        output = train_module(m, x if m == n else output.detach(), images, labels, *parts)
        loss, _ = meters[m].pop()
        if m == n:
            gradients = [
                p.grad.clone() for name, p in model.named_parameters() if owner(name) == n and p.grad is not None
            ]
            yield [torch.tensor(loss), *gradients]


def wrong_steps(n, x, images, labels, train_module, parts):
    """What is wrong in module n's steps: they depend on later modules, or are not finite. A text; empty if neither."""
    model, optimizers, *_ = parts
    stateful = [model, *optimizers]
    saved = copy.deepcopy([part.state_dict() for part in stateful])

    def two_steps(noise):
        for name, tensor in model.state_dict().items():
            if owner(name) > n and tensor.is_floating_point():
                tensor.add_(noise * torch.rand_like(tensor))  # of one sign: variances stay positive
        torch.manual_seed(0)  # a method's dropout is the same in both
        results = [*steps(n, x, images, labels, train_module, parts)]
        for part, state in zip(stateful, copy.deepcopy(saved)):  # an optimizer goes on in the tensors that it loads
            part.load_state_dict(state)
        model.zero_grad()
        return results

    def differences(results, others):
        return [not all(map(torch.equal, *pair)) for pair in zip(results, others)]

    results = two_steps(0)
    if not all(tensor.isfinite().all() for result in results for tensor in result):
        return "has a loss or gradients that are not finite"
    first, second = differences(results, two_steps(1))
    if not first and (not second or model.auxiliary_nets[n].reads):
        return ""
    own = any(differences(results, two_steps(0))) * ", or has a counter or random generator of its own"
    return f"reads later modules' parameters {'for its loss' if first else 'after a step'}{own}"


def audit(train_module, parts):
    """What is not local in a step of each module: a list of texts. `parts` is what make_parts returns."""
    model, found = parts[0].train(), []
    images, labels = torch.randn(IMAGES, 3, 32, 32), torch.arange(IMAGES) % 4
    x = images
    for n in range(len(model.blocks)):
        if text := wrong_steps(n, x, images, labels, train_module, parts):
            found.append(f"module {n + 1} {text}")
        before = state(model)
        x = train_module(n, x, images, labels, *parts)
        found += [f"module {n + 1} changes {name}" for name in changed(before, state(model)) if owner(name) != n]
        if x.requires_grad:
            return [*found, f"module {n + 1} hands a graph to the next one"]
    for name, count in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            views = model.auxiliary_nets[owner(name)].views if name.startswith("auxiliary_nets") else 1
            if not 1 <= int(count) <= views:
                found.append(f"{name} is {count} after one batch")
    return found


def main(args, make_parts, train_module):
    """Print a row for each method and number of modules; SystemExit if one is not as it should be."""
    numbers, failed = [K for K in (2, 4, 8, 16, 55) if len(resnet.widths(args.depth)) >= K], 0
    print(f"ResNet-{args.depth}, {IMAGES} random images\n\n| method | K | local? | reads |\n|---|---|---|---|")
    for method in ("backprop", "checkpoint", *methods.METHODS, "infopro contrast"):
        for K in [1] if method == "backprop" else numbers:
            name, _, loss = method.partition(" ")
            flags = {"method": name, "infopro_loss": loss or "softmax", "num_modules": K, "balance": "blocks"}
            flags |= {"precision": "fp32", "lr": 0.01}  # a loss scaler skips steps
            parts = make_parts(argparse.Namespace(**vars(args) | flags), 10, torch.device("cpu"))  # the same each time
            found = audit(train_module, parts)
            failed += bool(found)
            reads = {local_loss.reads for local_loss in parts[0].auxiliary_nets} - {""}
            verdict = "yes" if len(parts[0].blocks) > 1 else "one module"
            if found:
                verdict = f"no: {found[0]}" + f" (and {len(found) - 1} more)" * (len(found) > 1)
            print(f"| {method} | {K} | {verdict} | {', '.join(reads) or 'nothing'} |", flush=True)
    if failed:
        raise SystemExit(f"{failed} of these failed")
