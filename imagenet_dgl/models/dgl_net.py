"""What every DGL network here is: blocks, and an auxiliary network for each."""

from torch import nn


class DGLNet(nn.Module):
    """K modules, each a block with its own auxiliary network; the last auxiliary network is the real classifier."""

    def __init__(self, blocks, auxiliary_nets):
        super().__init__()
        self.blocks, self.auxiliary_nets = nn.ModuleList(blocks), nn.ModuleList(auxiliary_nets)
        if len(self.blocks) != len(self.auxiliary_nets):
            raise ValueError(
                f"{len(self.blocks)} blocks need as many auxiliary networks, not {len(self.auxiliary_nets)}"
            )

    def forward(self, x, n, upto=False):
        """Module n on its input x. With `upto`, x is the images, and blocks 0 to n-1 run first.

        Returns:
            (logits of auxiliary net n (B, num_classes), output of block n (B, ...)).
        """
        if upto:
            for block in self.blocks[:n]:
                x = block(x)
        representation = self.blocks[n](x)
        return self.auxiliary_nets[n](representation), representation
