"""Inference form: a trained network made ready to answer fast, with the same answer.

    biases before a norm    dropped: the norm subtracts the mean of every channel, and the bias with it (exact)
    numbers                 weights in the arithmetic's type once, not on every call; norms keep float32
    layout                  channels_last_3d on the CPU and on NVIDIA GPUs, where convolution and norm read rows of
                            channels; elsewhere torch's own
    convolutions            on the CPU oneDNN's, where it has them. Of one sample with few channels in or out torch
                            itself takes a plain loop (T1 at 128^3 for one, and the head): 2.5 to 4 times slower, and of
                            the other layout

Comes in: a UNet. Goes out: a module that answers like it. Training never sees this form.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from strokenet.model.device import onednn_computes
from strokenet.model.network import ConvBlock, UNet


class InferenceNetwork(nn.Module):
    """The inference form of a UNet: (N, C, D, H, W) of any type -> logits (N, K, D, H, W) of its own type."""

    def __init__(self, network: UNet, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.heads, self.dtype = network.heads, dtype
        self.layout = torch.channels_last_3d if device.type in ("cpu", "cuda") else torch.contiguous_format
        self.network = _copied(network, lambda module, parameter: self._converted(module, parameter, device))
        blocks = [module for module in self.network.modules() if isinstance(module, ConvBlock)]
        for block in blocks:
            block.conv.bias = None
        if device.type == "cpu" and onednn_computes(dtype):
            for block in blocks:
                block.conv = OneDnnConvolution(block.conv)  # type: ignore[assignment]
            heads = self.network.decoder.seg_layers
            head = heads[-1]  # of full resolution, the one that answers
            assert isinstance(head, nn.Conv3d)
            heads[-1] = OneDnnConvolution(head)
        self.eval()

    def _converted(self, module: nn.Module, parameter: Tensor, device: torch.device) -> Tensor:
        """A parameter in its type, place and layout."""
        dtype = torch.float32 if isinstance(module, nn.InstanceNorm3d) else self.dtype
        moved = parameter.detach().to(device, dtype)
        return moved.contiguous(memory_format=self.layout) if moved.ndim == 5 else moved

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> logits (N, K, D, H, W)."""
        return self.network(x.to(self.dtype, memory_format=self.layout))  # type: ignore[no-any-return]


class TrainedForm(nn.Module):
    """A UNet as training runs it: torch's layers and layout, less arithmetic by autocast. What nnU-Net infers with.

    For `exact`: to the last bit the peer's answer on the CPU, which no other order of additions gives.
    """

    def __init__(self, network: UNet, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.heads, self.dtype = network.heads, dtype
        self.network = _copied(network, lambda module, parameter: parameter.detach().to(device))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> logits (N, K, D, H, W)."""
        with torch.autocast(x.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self.network(x)  # type: ignore[no-any-return]


def _copied(network: UNet, converted: Callable[[nn.Module, Tensor], Tensor]) -> UNet:
    """The network with other parameters; not one is copied where it is, because that device may be full."""
    parameters = {
        id(parameter): nn.Parameter(converted(module, parameter), requires_grad=False)
        for module in network.modules()
        for parameter in module.parameters(recurse=False)
    }
    return copy.deepcopy(network, parameters)  # what deepcopy finds there counts as copied


class OneDnnConvolution(nn.Module):
    """A convolution by oneDNN, whatever its size: channels_last_3d in and out, on the CPU."""

    def __init__(self, convolution: nn.Conv3d):
        super().__init__()
        assert isinstance(convolution.padding, tuple)
        self.weight, self.bias, self.groups = convolution.weight, convolution.bias, convolution.groups
        self.sizes = (convolution.padding, convolution.stride, convolution.dilation)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> (N, K, D / stride, H / stride, W / stride)."""
        return torch.mkldnn_convolution(x, self.weight, self.bias, *self.sizes, self.groups)
