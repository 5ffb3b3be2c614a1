"""Every script on a pretended GPU, on any machine: a CPU tensor that meets a GPU tensor ends the run.

torch's FakeTensorMode gives tensors a device, a shape and a dtype, but no values. The scripts' mains run in it as they
are: data, forward passes, losses, meters, evaluation, and resuming from a checkpoint that was read onto the CPU. Values
that they read are 1. What is not checked, because it does not work without a GPU: autograd's formulas (a backward pass
only gives every parameter a gradient), the optimizers' kernels, CUDA graphs, NCCL.
"""

import argparse
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, load
from test_scripts import QUICK, SCRATCH, SCRIPTS
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda")
DUMMY = ["--dummy", "--debug", 1, "-b", 4, "--image-size", 32, "-p", 1]
RESNET = SCRIPTS["auxiliary_nets_study/cifar_resnet.py"]
METHODS = [["auglocal"], ["infopro", "--infopro-loss", "contrast"], ["checkpoint"]]
CASES = [
    *SCRIPTS.items(),
    *(("auxiliary_nets_study/cifar_resnet.py", [*RESNET, "--method", *method]) for method in METHODS),
    ("buffer_experiments/cifar_buffer.py", [*SCRIPTS["buffer_experiments/cifar_buffer.py"], "--quantize", "2,4"]),
    ("dni_comparisons/cifar_cnn_dni.py", QUICK),
    ("imagenet_dgl/imagenet.py", [*DUMMY, "--arch", "vgg11_bn"]),  # with dropout
    ("imagenet_dgl/imagenet_dgl.py", [*DUMMY, "--arch", "resnet18"]),
    ("imagenet_dgl/imagenet_dgl.py", [*DUMMY, "--arch", "vgg11", "--block_size", 4]),
]


def backward(output, gradient=None):
    """Give every leaf of the output's graph a gradient."""
    assert gradient is None or (gradient.device, gradient.shape) == (output.device, output.shape)
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [next_node for next_node, _ in node.next_functions]
        if hasattr(node, "variable"):
            node.variable.grad = torch.zeros_like(node.variable)


def fused_kernel(*arguments, **options):
    """In place of an optimizer's: it has no version without values."""
    tensors = [x for x in tree_leaves((arguments, options)) if isinstance(x, torch.Tensor)]
    assert {x.device.type for x in tensors} == {"cuda"}


def move(network, function, recurse=True):
    """nn.Module._apply without values: it cannot keep the parameters' identity."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(function(parameter.detach()))
        for name, buffer in module._buffers.items():
            module._buffers[name] = function(buffer)
    return network


def deepcopy(tensor, memo):
    """A tensor's without a storage."""
    clone = tensor.detach().clone()
    return nn.Parameter(clone, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone


def ones(tensor):
    return np.ones(tensor.shape, float if tensor.is_floating_point() else int).tolist()


@pytest.fixture
def pretended_gpu(monkeypatch):
    patch = monkeypatch.setattr
    patch(torch.Tensor, "backward", backward)
    patch(torch.autograd, "backward", lambda outputs, gradients: [backward(*pair) for pair in zip(outputs, gradients)])
    patch(torch.Tensor, "__deepcopy__", deepcopy)
    patch(torch.Tensor, "tolist", ones)
    patch(torch.Tensor, "item", ones)
    patch(torch.Tensor, "__int__", lambda _: 1)
    patch(torch.Tensor, "__bool__", lambda _: True)
    patch(nn.Module, "_apply", move)
    patch(sys.modules["torch.optim.sgd"], "_fused_sgd", fused_kernel)
    patch(sys.modules["torch.optim.adam"], "_fused_adam", fused_kernel)
    patch(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    patch(torch.cuda, "is_bf16_supported", lambda *_: True)
    patch(torch.cuda, "get_device_name", lambda *_: "none")
    patch(torch.cuda, "mem_get_info", lambda *_: (2**40, 2**40))
    for name in ("get_rng_state", "set_rng_state", "synchronize", "reset_peak_memory_stats", "max_memory_allocated"):
        patch(torch.cuda, name, lambda *_: 0)
    patch(torch.cuda, "current_stream", lambda *_: types.SimpleNamespace(synchronize=lambda: None))


class Pretended:
    """A script whose device is the GPU. Its checkpoints are kept here."""

    def __init__(self, script, monkeypatch):
        folder, name = script.removesuffix(".py").split("/")
        for file in (ROOT / folder).glob("*.py"):  # none that has another folder's modules, or another test's
            monkeypatch.delitem(sys.modules, file.stem, raising=False)
        self.module, patch = load(folder, name), monkeypatch.setattr
        self.utils, self.saved = sys.modules["utils"], []
        setup = self.utils.setup
        patch(self.utils, "setup", lambda args: (setup(args), CUDA)[1])
        patch(self.utils.Run, "save", lambda run: self.save(run))
        patch(self.utils, "load_checkpoint", lambda *_: self.saved[0])
        if "imagenet" in script:
            patch(sys.modules["data"], "DEBUG_STEPS", 2)
        else:
            cifar = sys.modules["cifar"]
            patch(cifar.CudaGraph, "DEVICE", "none")
            train, test, classes = cifar.read_folder(Path(SCRATCH.name))  # now, while tensors have values
            patch(cifar, "read_folder", lambda _: (train, test, classes))
            patch(cifar, "balanced", lambda images, labels, *_: (images, labels))

    def save(self, run):
        state = {
            "arguments": dict(vars(run.args)),
            "data": run.data.description,
            "epoch": run.epoch,
            "log": [run.log_file.name, run.log_length],
            "generator": run.data.train.generator.get_state(),
            "parts": {name: part.state_dict() for name, part in run.parts.items()},
        }
        self.saved.append(tree_map_only(FakeTensor, lambda tensor: tensor.cpu(), state))

    def run(self, *flags):
        """Two epochs, and the second one again from the checkpoint of the first."""
        flags = [str(flag) for flag in (*flags, "--epochs", 2)]
        with FakeTensorMode(allow_non_fake_inputs=True):
            self.module.main(flags)
            epochs = len(self.saved)
            self.module.main([*flags, "--resume", "a checkpoint"])
        assert len(self.saved) == 2 * epochs - 1 > 1


@pytest.mark.slow
@pytest.mark.parametrize(("script", "flags"), CASES)
def test_a_run(script, flags, pretended_gpu, monkeypatch, tmp_path):
    precision = "bf16" if "--dni" in flags else "fp16"  # more happens than in float32
    Pretended(script, monkeypatch).run(*flags, "--precision", precision, "--save_folder", tmp_path)


@pytest.mark.slow
def test_a_worker_of_cifar_async(pretended_gpu, monkeypatch):
    """A batch arrives on the CPU, and one leaves on the GPU, from where the sending thread fetches it."""
    module, count = Pretended("buffer_experiments/cifar_async.py", monkeypatch).module, Counter()
    stream = argparse.Namespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **options: empty(*shape, **options))
    flags = ["--buffer", "2", "--ncnn", "3", "--down", "[0]", "--feature_size", "4", "--batch_size", "5", "--seed", "1"]
    args = module.parse_args([*flags, "--quantize", "2,4", "--precision", "fp16"])
    with FakeTensorMode():
        network = module.make_network(args, 10)
        parts = module.utils.to_device(nn.ModuleList([network.blocks[1], network.auxiliary_nets[1]]), args, CUDA)
        numbers = [-1, 0]  # of messages: the last one says that there are no more
        receive = lambda message: message.__setitem__(0, numbers.pop())  # noqa: E731
        team = argparse.Namespace(thread=lambda _: None, receive=receive)
        inputs = module.Received(args, network.shapes[0], CUDA, team, count)
        outputs = module.Sending(args, network.shapes[1], CUDA, team, count)
        worker = module.Worker(args, 1, parts, network.shapes[1], 2, CUDA, inputs, outputs, count, lambda: False)
        assert {tensor.device.type for tensor in inputs.message[1:]} == {"cpu"}
        inputs.receive()
        worker.train_epoch()
        sent, message = outputs.waiting, outputs.message[1:]
        assert {tensor.device.type for tensor in sent} == {"cuda"}
        assert [(t.shape, t.dtype) for t in sent] == [(t.shape, t.dtype) for t in message]
        worker.load_state_dict(tree_map_only(FakeTensor, lambda tensor: tensor.cpu(), worker.state_dict()))
        worker.train_epoch()
        tested = module.cifar.Batches(torch.zeros(6, 32, 32, 3, dtype=torch.uint8), torch.zeros(6).long(), 4, CUDA)
        network = module.utils.to_device(network, args, CUDA)
        module.evaluate(network, worker.autocast, tested)


@pytest.mark.slow
def test_images_of_imagenet(pretended_gpu, monkeypatch):
    module = Pretended("imagenet_dgl/imagenet.py", monkeypatch).module
    args = module.parse_args(["x", "-b", "4"])
    with FakeTensorMode(allow_non_fake_inputs=True):
        batches = module.data.Batches(args, [], CUDA)
        batches.loader = [(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.long), [])]
        ((images, labels),) = batches
    assert (images.device.type, labels.device.type) == ("cuda", "cuda")
    assert images.is_contiguous(memory_format=torch.channels_last)


def labels_stay_on_the_cpu(module, patch):
    batches = module.cifar.Batches.__iter__
    patch(module.cifar.Batches, "__iter__", lambda self: ((images, labels.cpu()) for images, labels in batches(self)))


def network_stays_on_the_cpu(module, patch):
    patch(module.utils, "to_device", lambda model, *_: model)


def meters_are_on_the_cpu(module, patch):
    meter = module.cifar.Meter
    patch(module.cifar, "Meter", lambda _: meter("cpu"))


def momentum_is_on_the_cpu(module, patch):
    patch(torch, "zeros_like", lambda tensor: torch.zeros(tensor.shape))


def what_waits_stays_on_the_cpu(module, patch):
    """After resuming."""
    patch(module.Delays, "load_state_dict", lambda delays, state: vars(delays).update(state))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "mutate"),
    [
        ("learning_curves/cifar_dgl.py", labels_stay_on_the_cpu),
        ("learning_curves/cifar_dgl.py", network_stays_on_the_cpu),
        ("learning_curves/cifar_dgl.py", meters_are_on_the_cpu),
        ("learning_curves/cifar_dgl.py", momentum_is_on_the_cpu),
        ("ddg_comparisons/cifar_features_replay.py", what_waits_stays_on_the_cpu),
    ],
)
def test_a_cpu_tensor_is_found(script, mutate, pretended_gpu, monkeypatch, tmp_path):
    pretended = Pretended(script, monkeypatch)
    mutate(pretended.module, monkeypatch.setattr)
    with pytest.raises(Exception, match=r"(?s)device.*cpu|cpu.*cuda"):
        pretended.run(*SCRIPTS[script], "--save_folder", tmp_path)
