"""The networks and the two training algorithms of learning_curves, and its notebook."""

import os

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES, ROOT, equal, load, notebook, python, state
from torch.utils._python_dispatch import TorchDispatchMode

dgl = load("learning_curves", "cifar_dgl")
sequential = load("learning_curves", "cifar_sequential_greedy")
cifar, utils = dgl.cifar, dgl.utils


def make(device="cpu", seed=0, flags=()):
    """A network, its optimizers, scalers and autocast as the scripts make them, and 40 random images in 3 batches."""
    args = dgl.parse_args(["--seed", str(seed), *flags])
    torch.manual_seed(seed)
    device = torch.device(device)
    model = utils.to_device(dgl.DGLNet(10), args, device)
    optimizers = [cifar.sgd(parts, lr=0.1, weight_decay=5e-4) for parts in zip(model.blocks, model.auxiliary_nets)]
    scalers = [cifar.grad_scaler(args, device) for _ in optimizers]
    images = torch.randint(256, (40, 32, 32, 3), dtype=torch.uint8)
    batches = cifar.Batches(images, torch.arange(40) % 10, 16, device, torch.Generator().manual_seed(seed))
    return model, optimizers, scalers, utils.autocast(args, device), batches


def module_state(model, n):
    return {**state(model.blocks[n]), **{f"net.{k}": v for k, v in state(model.auxiliary_nets[n]).items()}}


def test_shapes_are_those_of_the_paper():
    model = dgl.DGLNet(10)
    x = torch.randn(2, 3, 32, 32)
    shapes = []
    for n in range(4):
        logits, x = model(x, n)
        assert logits.shape == (2, 10)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(64, 32, 32), (128, 16, 16), (128, 16, 16), (256, 8, 8)]
    assert [sum(isinstance(m, torch.nn.Linear) for m in net) for net in model.auxiliary_nets] == [4, 4, 4, 3]
    assert [net[0].output_size for net in model.auxiliary_nets] == [8, 4, 4, 2]


def test_every_parameter_is_used():
    model = dgl.DGLNet(10)
    x = torch.randn(2, 3, 32, 32)
    sum(model(x, n, upto=True)[0].sum() for n in range(4)).backward()
    assert all(p.grad is not None for p in model.parameters())


def watch(model, n, optimizer):
    """Compare, at each step of module n's optimizer, all modules before and after; the list of the steps."""
    step, steps = optimizer.step, []
    others = [m for m in range(4) if m != n]

    def watched_step(*args, **kwargs):
        for m in others:
            parameters = [*model.blocks[m].parameters(), *model.auxiliary_nets[m].parameters()]
            assert all(p.grad is None for p in parameters), f"loss {n} reaches module {m}"
        before = [module_state(model, m) for m in range(4)]
        step(*args, **kwargs)
        assert [m for m in range(4) if not equal(before[m], module_state(model, m))] == [n]
        model.zero_grad()
        steps.append(n)

    optimizer.step = watched_step
    return steps


def watched_epoch(device="cpu", flags=()):
    model, optimizers, scalers, autocast, batches = make(device, flags=flags)
    if scalers[0].is_enabled():  # on a GPU, a step at torch's first scale might be skipped
        scalers = [torch.amp.GradScaler(device, init_scale=2.0**12) for _ in scalers]
    steps = [watch(model, n, optimizer) for n, optimizer in enumerate(optimizers)]
    meters = [cifar.Meter(batches.device) for _ in optimizers]
    dgl.train_epoch(model, optimizers, scalers, autocast, batches, meters)
    assert steps == [[n] * 3 for n in range(4)]
    return [meter.pop()[0] for meter in meters]


@pytest.mark.parametrize("device", DEVICES)
def test_a_module_updates_only_itself(device):
    assert max(watched_epoch(device)) < 10


def test_without_detach_the_test_above_fails(monkeypatch):
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "detach", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: backward(self, retain_graph=True))

    def step(optimizer):
        for p in optimizer.param_groups[0]["params"]:
            p.data.add_(0.01)  # unseen by autograd, which would refuse the second backward pass

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    with pytest.raises(AssertionError, match="loss 1 reaches module 0"):
        watched_epoch()


def test_dgl_equals_training_each_module_on_the_stored_outputs_of_the_one_below():
    """Module n trained alone, on what module n-1 gave out at the time, gets the same weights: to the bit."""
    model, optimizers, scalers, autocast, batches = make()
    alone, alone_optimizers, *_ = make()
    assert equal(state(model), state(alone))
    meters = [cifar.Meter("cpu") for _ in optimizers]
    outputs = [[] for _ in optimizers]
    hooks = [
        b.register_forward_hook(lambda _, x, y, n=n: outputs[n].append(y.detach().clone()))
        for n, b in enumerate(model.blocks)
    ]
    generator = batches.generator.get_state()
    dgl.train_epoch(model, optimizers, scalers, autocast, batches, meters)
    for hook in hooks:
        hook.remove()
    batches.generator.set_state(generator)
    inputs = list(batches)
    labels = [y for _, y in inputs]
    alone.train()
    for n, optimizer in enumerate(alone_optimizers):
        for x, y in zip([x for x, _ in inputs] if n == 0 else outputs[n - 1], labels):
            optimizer.zero_grad()
            F.cross_entropy(alone(x, n)[0], y).backward()
            optimizer.step()
    assert equal(state(model), state(alone))


class NoItem(TorchDispatchMode):
    """Fails on .item(), bool(tensor) and the like."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read in the training loop"
        return func(*args, **(kwargs or {}))


def test_no_value_is_read_in_the_training_loop(monkeypatch):
    model, optimizers, scalers, autocast, batches = make()
    meters = [cifar.Meter("cpu") for _ in optimizers]
    with NoItem(), monkeypatch.context() as patch:
        for name in ("tolist", "numpy", "cpu"):
            patch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a tensor is read in the training loop"))
        dgl.train_epoch(model, optimizers, scalers, autocast, batches, meters)
        sequential.train_epoch(model, 2, optimizers[2], scalers[2], autocast, batches, meters[2])
    with NoItem(), pytest.raises(AssertionError, match="is read"):
        meters[0].sums[0].item()


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_cpu_never_waits_for_the_gpu_in_the_training_loop(precision):
    model, optimizers, scalers, autocast, batches = make("cuda", flags=["--precision", precision])
    meters = [cifar.Meter("cuda") for _ in optimizers]
    dgl.train_epoch(model, optimizers, scalers, autocast, batches, meters)  # cuDNN chooses its kernels
    batches = list(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        dgl.train_epoch(model, optimizers, scalers, autocast, batches, meters)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", range(4))
def test_sequential_trains_layer_n_and_nothing_else(n, device):
    model, optimizers, scalers, autocast, batches = make(device)
    before = [module_state(model, m) for m in range(4)]
    calls = []
    for m in range(4):
        model.blocks[m].register_forward_hook(lambda _, x, y, m=m: calls.append((m, y.requires_grad)))
        model.auxiliary_nets[m].register_forward_hook(lambda *_, m=m: calls.append(("auxiliary", m)))
    sequential.train_epoch(model, n, optimizers[n], scalers[n], autocast, batches, cifar.Meter(batches.device))
    for m in range(4):
        assert equal(before[m], module_state(model, m)) == (m != n)  # BatchNorm's running statistics included
    assert calls == 3 * [*((m, False) for m in range(n)), (n, True), ("auxiliary", n)]


def test_layer_1_is_the_same_in_both_methods():
    first, second = make(), make()
    dgl.train_epoch(*first, [cifar.Meter("cpu") for _ in range(4)])
    model, optimizers, scalers, autocast, batches = second
    sequential.train_epoch(model, 0, optimizers[0], scalers[0], autocast, batches, cifar.Meter("cpu"))
    assert equal(module_state(first[0], 0), module_state(model, 0))


@pytest.mark.parametrize("device", DEVICES)
def test_evaluate_equals_forward_upto_n_and_runs_every_block_once(device):
    model, _, _, autocast, train = make(device)
    colours = torch.randint(256, (30, 1, 1, 3), dtype=torch.uint8).expand(-1, 32, 32, -1)
    batches = cifar.Batches(colours, torch.arange(30) % 3, 8, train.device)
    for net in model.auxiliary_nets:  # untrained ones would give all images the same class
        torch.nn.init.normal_(net[-1].weight, std=10)
    runs = []
    hook = model.blocks[0].register_forward_hook(lambda *_: runs.append(1))
    one_pass = dgl.evaluate(model, autocast, batches)
    assert len(runs) == len(batches) == 4
    hook.remove()
    with torch.no_grad():
        for n in range(4):
            correct = sum((model(x, n, upto=True)[0].argmax(1) == y).sum().item() for x, y in batches)
            assert one_pass[n] == pytest.approx(100 * correct / 30)
            assert sequential.evaluate(model, n, autocast, batches) == pytest.approx(100 * correct / 30)
    assert len(set(one_pass)) > 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_half_precision(device, precision):
    losses, exact = watched_epoch(device, ["--precision", precision]), watched_epoch(device)
    assert losses != exact
    assert losses == pytest.approx(exact, rel=0.2)


@pytest.mark.parametrize("device", DEVICES)
def test_a_skipped_first_step_leaves_no_trace(device, monkeypatch):
    """With loss scaling, the first step may overflow: the weights after the second are as if it had not been there."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    results = []
    for overflow in (False, True):
        model, optimizers, *_ = make(device)
        optimizer, scaler = optimizers[0], torch.amp.GradScaler(device, init_scale=1.0)
        x, y = torch.ones(4, 3, 32, 32, device=device), torch.arange(4, device=device)
        model.eval()  # BatchNorm would remember the first step
        for factor in (float("inf"), 1.0)[not overflow :]:
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x, 0)[0], y) * factor).backward()
            scaler.step(optimizer)
            scaler.update(1.0)
        results.append(state(model))
    assert equal(*results)


PUBLISHED = """Files already downloaded and verified
DataParallel(
n: 1, epoch 1, loss: 1.67285, train top1:38.198 test top1:39.36000061035156
n: 2, epoch 1, loss: 1.63183, train top1:39.862 test top1:43.16
n: 1, epoch 2, loss: 1.43744, train top1:47.358 test top1:45.49
n: 2, epoch 2, loss: 1.33937, train top1:50.970 test top1:52.03
"""


NOTEBOOK = ROOT / "learning_curves" / "LearningCurves.ipynb"


@pytest.mark.parametrize("logs", ["committed", "published"])
def test_the_notebook_runs(logs, tmp_path, monkeypatch):
    environment = {"PICTURE": tmp_path / "picture.png"}
    if logs == "published":
        for variable in ("PARALLEL_LOG", "SEQUENTIAL_LOG"):
            environment[variable] = tmp_path / variable
            (tmp_path / variable).write_text(PUBLISHED)
    assert notebook(NOTEBOOK, monkeypatch, **environment) is None
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.parametrize("text", ["", "arguments: {}", PUBLISHED[:-3]], ids=["empty", "begun", "cut"])
def test_the_notebook_names_a_log_that_is_not_whole(text, tmp_path, monkeypatch):
    log = tmp_path / "the.log"
    log.write_text(text)
    error = notebook(NOTEBOOK, monkeypatch, PICTURE=tmp_path / "picture.png", SEQUENTIAL_LOG=log)
    assert str(error).startswith(str(log))


@pytest.mark.slow
def test_the_notebook_runs_in_a_kernel(tmp_path):
    command = ["-m", "nbconvert", "--to", "notebook", "--execute", "--output-dir", tmp_path, NOTEBOOK]
    done = python(*command, cwd=tmp_path, env={**os.environ, "PICTURE": str(tmp_path / "picture.png")})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "picture.png").stat().st_size > 10_000
