"""Decoupled neural interfaces with synthetic gradients (Jaderberg et al. 2017, arXiv 1608.05343).

A network is cut into parts. At each cut is an interface with a synthesizer: a small network that looks at what crosses
the cut (the trigger) and predicts what the other part would send (the message, an activation or a gradient).
A synthesizer is any module `(trigger, context) -> message`, with or without parameters.

README.md in this folder has worked examples.
"""

from .interfaces import BackwardInterface, BidirectionalInterface, ForwardInterface, UnidirectionalInterface
from .scopes import backward, defer_backward, synthesizer_context
from .synthesizers import BasicSynthesizer

__all__ = [
    "BackwardInterface",
    "BasicSynthesizer",
    "BidirectionalInterface",
    "ForwardInterface",
    "UnidirectionalInterface",
    "backward",
    "defer_backward",
    "synthesizer_context",
]
