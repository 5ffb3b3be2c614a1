"""Interfaces between the parts of a network.

On a trigger of batch size B, every synthesizer gets the gradient of its mean squared error,
(1/B) * sum over batch and features of (synthetic - true)^2. It is added to `.grad` like any other; the user's optimizer
makes the step. No error of a synthesizer flows into its trigger.
"""

import torch
from torch import nn

from .scopes import backward, state


def synthesize(synthesizer, trigger, dtype, train):
    """The synthesizer's message, as `dtype`, from the trigger's values; with a graph only if it is to `train`."""
    with torch.set_grad_enabled(train):
        return synthesizer(trigger.detach(), state.context).to(dtype)


def error_gradient(synthetic, true):
    """Gradient of (1/B) * sum (synthetic - true)^2 with respect to `synthetic`."""
    return (synthetic - true) * (2 / len(true))


class TrainByGradient(torch.autograd.Function):
    """A copy of the trigger; the gradient that it gets trains what synthesized the synthetic gradient."""

    @staticmethod
    def forward(trigger, synthetic):
        return trigger.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, gradient):
        (synthetic,) = ctx.saved_tensors
        return None, error_gradient(synthetic, gradient)


def train_by_gradient(trigger, synthetic):
    # requires_grad, so that there is a backward pass even if the synthesizer has no parameters
    return TrainByGradient.apply(trigger.detach().requires_grad_(), synthetic)


class UnidirectionalInterface(nn.Module):
    """Synthesizes messages in one direction, and learns from real ones, in any mode and in any order."""

    def __init__(self, synthesizer):
        super().__init__()
        self.synthesizer = synthesizer

    @torch.compiler.disable(recursive=False)
    def receive(self, trigger):
        """A message synthesized from the trigger, detached."""
        return synthesize(self.synthesizer, trigger, trigger.dtype, train=False)

    @torch.compiler.disable(recursive=False)
    def send(self, message, trigger):
        """Train the synthesizer to answer this trigger with this message."""
        synthetic = synthesize(self.synthesizer, trigger, message.dtype, train=True)
        if synthetic.requires_grad:
            backward(synthetic, error_gradient(synthetic.detach(), message.detach()))


class ForwardInterface(UnidirectionalInterface):
    """Replaces activations by synthetic ones in training, so that the next part need not wait for them."""

    def forward(self, message, trigger):
        """In training, train the synthesizer and return a synthetic message; otherwise return the real message."""
        if not self.training:
            return message
        self.send(message, trigger)
        return self.receive(trigger)


class BackwardInterface(nn.Module):
    """Replaces gradients by synthetic ones in training, so that the part before need not wait for them."""

    def __init__(self, synthesizer):
        super().__init__()
        self.synthesizer = synthesizer

    @torch.compiler.disable(recursive=False)
    def backward(self, trigger, factor=1):
        """Backpropagate the synthetic gradient, times `factor`, from the trigger; if it needs none, do nothing."""
        if self.training and trigger.requires_grad:
            backward(trigger, factor * synthesize(self.synthesizer, trigger, trigger.dtype, train=False))

    @torch.compiler.disable(recursive=False)
    def make_trigger(self, trigger):
        """A copy of the trigger, cut off from its graph, whose real gradient trains the synthesizer when it comes."""
        if not (self.training and torch.is_grad_enabled()):
            return trigger
        return train_by_gradient(trigger, synthesize(self.synthesizer, trigger, trigger.dtype, train=True))

    @torch.compiler.disable(recursive=False)
    def forward(self, trigger):
        """`backward` and `make_trigger` with one run of the synthesizer."""
        if not (self.training and torch.is_grad_enabled()):
            return trigger
        synthetic = synthesize(self.synthesizer, trigger, trigger.dtype, train=True)
        if trigger.requires_grad:
            backward(trigger, synthetic.detach())
        return train_by_gradient(trigger, synthetic)


class BidirectionalInterface(nn.Module):
    """Both at once, a complete unlock: the parts need neither each other's activations nor each other's gradients.

    `forward_synthesizer` makes messages from triggers; `backward_synthesizer` makes gradients from messages.
    """

    def __init__(self, forward_synthesizer, backward_synthesizer):
        super().__init__()
        self.forward_interface = ForwardInterface(forward_synthesizer)
        self.backward_interface = BackwardInterface(backward_synthesizer)

    def receive(self, trigger):
        """A synthetic message for the next part. Its real gradient trains the backward synthesizer."""
        return self.backward_interface.make_trigger(self.forward_interface.receive(trigger))

    def send(self, message, trigger):
        """For the part before: train the forward synthesizer, and backpropagate a synthetic gradient from `message`."""
        self.forward_interface.send(message, trigger)
        self.backward_interface.backward(message)

    def forward(self, message, trigger):
        """Both parts in one process: in training, `send` then `receive`; otherwise return the real message."""
        if not self.training:
            return message
        self.send(message, trigger)
        return self.receive(trigger)
