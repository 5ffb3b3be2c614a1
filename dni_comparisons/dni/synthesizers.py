"""A synthesizer for vectors. For other shapes, write your own: any module `(trigger, context) -> message`."""

import itertools

from torch import nn


class BasicSynthesizer(nn.Module):
    """An MLP with ReLU. Its last layer's weights start at zero, so its first messages do not depend on the input.

    Args:
        output_dim: features of the message.
        n_hidden: number of hidden layers; with 0, the synthesizer is linear.
        hidden_dim, trigger_dim: features of the hidden layers and of the trigger; `output_dim` by default.
        context_dim: features of the context, which has its own linear layer, added to the first; None for no context.
    """

    def __init__(self, output_dim, n_hidden=0, hidden_dim=None, trigger_dim=None, context_dim=None):
        super().__init__()
        width = hidden_dim or output_dim
        widths = [trigger_dim or output_dim, *[width] * n_hidden, output_dim]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))
        self.context = nn.Linear(context_dim, widths[1]) if context_dim else None
        nn.init.zeros_(self.layers[-1].weight)
        if self.context and not n_hidden:
            nn.init.zeros_(self.context.weight)

    def forward(self, trigger, context=None):
        """(B, trigger_dim) and (B, context_dim) or None -> (B, output_dim)."""
        first, *others = self.layers
        x = first(trigger)
        if self.context:
            if context is None:
                raise ValueError("this synthesizer needs a context: call it inside dni.synthesizer_context")
            x = x + self.context(context)
        for layer in others:
            x = layer(x.relu())
        return x
