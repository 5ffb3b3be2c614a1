"""Interfaces between the parts of a network.

For a trigger of batch size B, a synthesizer's loss is (1/B) * sum over batch and features of (synthetic - true)^2.
Its gradient is added to the `.grad` of the synthesizer's parameters, which your optimizer steps. It never flows into
the trigger.
"""

import torch
from torch import nn

from .scopes import backward, state


def synthesize(synthesizer, trigger, dtype, train):
    """The synthesizer's message for the detached trigger, as `dtype`. It has a graph only if `train` is set."""
    with torch.set_grad_enabled(train):
        return synthesizer(trigger.detach(), state.context).to(dtype)


def error_gradient(synthetic, true):
    """Gradient of (1/B) * sum (synthetic - true)^2 with respect to `synthetic`."""
    return (synthetic - true) * (2 / len(true))


class TrainByGradient(torch.autograd.Function):
    """Copies the trigger. The copy's real gradient goes on to the trigger, and trains the synthesizer."""

    @staticmethod
    def forward(trigger, synthetic):
        return trigger.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, gradient):
        (synthetic,) = ctx.saved_tensors
        return gradient, error_gradient(synthetic, gradient)


def train_by_gradient(trigger, synthetic):
    # requires_grad, so that there is a backward pass even if the synthesizer has no parameters
    return TrainByGradient.apply(trigger if trigger.requires_grad else trigger.detach().requires_grad_(), synthetic)


class UnidirectionalInterface(nn.Module):
    """Synthesizes messages in one direction and learns from real ones, in train and eval mode and in any order."""

    def __init__(self, synthesizer):
        super().__init__()
        self.synthesizer = synthesizer

    @torch.compiler.disable(recursive=False)
    def receive(self, trigger):
        """A synthetic message for the trigger, detached."""
        return synthesize(self.synthesizer, trigger, trigger.dtype, train=False)

    @torch.compiler.disable(recursive=False)
    def send(self, message, trigger):
        """Train the synthesizer to predict this message from this trigger."""
        synthetic = synthesize(self.synthesizer, trigger, message.dtype, train=True)
        if synthetic.requires_grad:
            backward(synthetic, error_gradient(synthetic.detach(), message.detach()))


class ForwardInterface(UnidirectionalInterface):
    """In training, replaces activations with synthetic ones, so that the next part need not wait."""

    def forward(self, message, trigger):
        """In training, train the synthesizer and return a synthetic message; otherwise return the real message."""
        if not self.training:
            return message
        self.send(message, trigger)
        return self.receive(trigger)


class BackwardInterface(UnidirectionalInterface):
    """In training, replaces gradients with synthetic ones, so that the previous part need not wait.

    Its messages are gradients: `send` and `receive` do for them what they do in a UnidirectionalInterface.
    """

    @torch.compiler.disable(recursive=False)
    def backward(self, trigger, factor=1):
        """In training, backpropagate `factor` times the synthetic gradient from the trigger, if that requires grad."""
        if self.training and trigger.requires_grad:
            backward(trigger, factor * self.receive(trigger))

    @torch.compiler.disable(recursive=False)
    def make_trigger(self, trigger):
        """A copy of the trigger. Its real gradient trains the synthesizer, and goes on to the trigger."""
        if not (self.training and torch.is_grad_enabled()):
            return trigger
        return train_by_gradient(trigger, synthesize(self.synthesizer, trigger, trigger.dtype, train=True))

    @torch.compiler.disable(recursive=False)
    def forward(self, trigger):
        """`backward(trigger)`, then `make_trigger(trigger.detach())`, with a single call of the synthesizer."""
        if not (self.training and torch.is_grad_enabled()):
            return trigger
        synthetic = synthesize(self.synthesizer, trigger, trigger.dtype, train=True)
        if trigger.requires_grad:
            backward(trigger, synthetic.detach())
        return train_by_gradient(trigger.detach(), synthetic)


class BidirectionalInterface(nn.Module):
    """Complete unlock: the parts wait neither for each other's activations nor for each other's gradients.

    `forward_synthesizer` predicts messages from triggers, `backward_synthesizer` gradients from messages.
    """

    def __init__(self, forward_synthesizer, backward_synthesizer):
        super().__init__()
        self.forward_interface = ForwardInterface(forward_synthesizer)
        self.backward_interface = BackwardInterface(backward_synthesizer)

    def receive(self, trigger):
        """A synthetic message for the next part. Its real gradient trains the backward synthesizer."""
        return self.backward_interface.make_trigger(self.forward_interface.receive(trigger))

    def send(self, message, trigger):
        """For the first part: train the forward synthesizer and backpropagate a synthetic gradient from `message`."""
        self.forward_interface.send(message, trigger)
        self.backward_interface.backward(message)

    def forward(self, message, trigger):
        """For both parts in one process. In training, `send` then `receive`; otherwise return the real message."""
        if not self.training:
            return message
        self.send(message, trigger)
        return self.receive(trigger)
