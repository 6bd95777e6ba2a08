"""Training form: a network made ready to learn fast. Same parameters, same mathematics, other order of the numbers.

    layout                  channels_last_3d, where convolution and norm read rows of channels (kernels/)
    biases before a norm    left out: the norm subtracts the mean of every channel, and the bias with it; their gradient
                            is zero but for rounding
    what nothing reads      has no gradient: those biases, and the head whose level has no weight in the loss

Comes in: a UNet. Goes out: a module around it that answers with the logits of every level, as the loss wants them, and
trains the UNet's own parameters. Their names and values in a checkpoint are those of the plain network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from strokenet.model.network import Convolution, UNet


class TrainingForm(nn.Module):
    """(N, C, D, H, W) -> logits of every decoder level: (N, K, D, H, W) first, each next one coarser.

    Args:
        network: changed in place: layout, and what has a gradient.
        channels_last: else torch's own layout.
        without_bias: leave biases before a norm out; else they are added, as nnU-Net does.
        unread_heads: how many heads, from the coarsest on, the loss does not read.
    """

    def __init__(self, network: UNet, *, channels_last: bool, without_bias: bool, unread_heads: int):
        super().__init__()
        self.layout = torch.channels_last_3d if channels_last else torch.contiguous_format
        self.network = network
        for parameter in network.parameters():
            if parameter.ndim == 5:
                parameter.data = parameter.data.contiguous(memory_format=self.layout)
        for convolution in (module for module in network.modules() if isinstance(module, Convolution)):
            convolution.without_bias = without_bias
            if convolution.bias is not None:
                convolution.bias.requires_grad_(not without_bias)
        for place, head in enumerate(network.decoder.seg_layers):  # the deepest comes first
            head.requires_grad_(place >= unread_heads)

    def forward(self, image: Tensor) -> list[Tensor]:
        """image: (N, C, D, H, W), edges multiples of the plan's divisor."""
        return self.network.forward_levels(image.contiguous(memory_format=self.layout))
