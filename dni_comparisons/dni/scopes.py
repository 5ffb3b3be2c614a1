"""Context managers around interface calls: the context for synthesizers, and deferred backward passes."""

import contextlib
import threading

import torch


class State(threading.local):
    """Per-thread state: the current context, and the (variable, gradient) pairs of the active `defer_backward`."""

    context = None
    deferred = None


state = State()


@contextlib.contextmanager
def synthesizer_context(context):
    """Condition the synthesizers called inside on `context`, such as one-hot labels (B, num_classes). Can be nested."""
    before, state.context = state.context, context
    try:
        yield
    finally:
        state.context = before


@contextlib.contextmanager
def defer_backward():
    """Collect the gradients passed to `dni.backward` inside, and backpropagate them together at the end.

    For a graph that real and synthetic gradients share, as in truncated BPTT. After an exception inside, nothing is
    backpropagated. Nesting raises RuntimeError.
    """
    if state.deferred is not None:
        raise RuntimeError("dni.defer_backward cannot be nested")
    deferred = state.deferred = []
    try:
        yield
    finally:
        state.deferred = None
    if deferred:
        run_backward(*zip(*deferred))


def backward(variable, gradient=None):
    """Backpropagate `gradient` (ones by default) from `variable`, at once or at the end of `defer_backward`."""
    if gradient is None:
        gradient = torch.ones_like(variable)
    if state.deferred is not None:
        state.deferred.append((variable, gradient))
    else:
        run_backward((variable,), (gradient,))


def run_backward(variables, gradients):
    # Interfaces call this during forward passes, but backward passes should not run under autocast.
    with torch.autocast(variables[0].device.type, enabled=False):
        torch.autograd.backward(variables, gradients)
