"""The network: the whole figure in one file (Meddahi 2024, Fig. 1 and 4; Isensee 2021, Fig. 2).

Comes in: an image patch (N, C, D, H, W). Goes out: logits, one map a label, at full resolution; in training also at
every coarser level of the decoder (deep supervision). The shape of the network is data: a NetworkPlan.

    level 0   image -> block block ------------------- skip ---> concat -> block block -> head 0 (full resolution)
    level 1      stride -> block block ------ skip ---> concat -> block block -> up ^  -> head 1
    ...             ...
    level S-1          stride -> block block -> up ^                      (bottleneck)

Parameter names are the peer's (dynamic_network_architectures 0.4.4), so that models travel without a table of names:
encoder.stages.L.0.convs.J, decoder.transpconvs.u, decoder.stages.u.convs.J, decoder.seg_layers.u; u = 0 is deepest.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.instance_norm_act import instance_norm_act, recoverable
from planner.plan import NetworkPlan, Plan, Triple

NEGATIVE_SLOPE = 0.01
NORM_EPS = 1e-5


class Convolution(nn.Conv3d):
    """A convolution before a norm, which takes the mean of every channel away, and the bias with it.

    without_bias: leave the bias out, which changes the answer by rounding alone; it stays a parameter, unread.
    """

    without_bias = False

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, D, H, W) -> (N, out, D', H', W')."""
        answer: Tensor = self._conv_forward(x, self.weight, None if self.without_bias else self.bias)
        return answer


class ConvBlock(nn.Module):
    """Convolution, instance normalisation, LeakyReLU: (N, in, D, H, W) -> (N, out, D', H', W')."""

    recover: bool | None = None  # of `instance_norm_act`; UNet.choose_kept_maps looks

    def __init__(self, inputs: int, outputs: int, kernel: Triple, stride: Triple = (1, 1, 1)):
        super().__init__()
        d, h, w = kernel
        padding = ((d - 1) // 2, (h - 1) // 2, (w - 1) // 2)
        self.conv = Convolution(inputs, outputs, kernel, stride, padding, bias=True)
        self.norm = nn.InstanceNorm3d(outputs, eps=NORM_EPS, affine=True)

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """(N, C, D, H, W) -> (N, outputs, D / stride, H / stride, W / stride), each axis rounded up.

        shortcut: of the output's shape, added between norm and activation.
        """
        return instance_norm_act(  # x, the convolution's fresh answer, may be overwritten
            self.conv(x),
            self.norm.weight,
            self.norm.bias,
            eps=self.norm.eps,
            slope=NEGATIVE_SLOPE,
            residual=shortcut,
            inplace=True,
            recover=self.recover,
        )


class ConvStack(nn.Module):
    """`count` ConvBlocks in a row; the first one takes the stride and the change of features."""

    def __init__(self, inputs: int, outputs: int, kernel: Triple, stride: Triple, count: int):
        super().__init__()
        first = ConvBlock(inputs, outputs, kernel, stride)
        self.convs = nn.Sequential(first, *(ConvBlock(outputs, outputs, kernel) for _ in range(count - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> (N, outputs, D / stride, H / stride, W / stride)."""
        return self.convs(x)  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut (He 2016; the pooled shortcut of ResNet-D): act(main(x) + shortcut(x))."""

    def __init__(self, inputs: int, outputs: int, kernel: Triple, stride: Triple):
        super().__init__()
        self.conv1 = ConvBlock(inputs, outputs, kernel, stride)
        self.conv2 = ConvBlock(outputs, outputs, kernel)
        shortcut: list[nn.Module] = []
        if stride != (1, 1, 1):
            shortcut.append(nn.AvgPool3d(stride, stride))
        if inputs != outputs:
            shortcut.append(Projection(inputs, outputs))
        self.skip = nn.Sequential(*shortcut)  # empty: the identity

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> (N, outputs, D / stride, H / stride, W / stride)."""
        shortcut = self.skip(x)  # before the main branch: autograd then adds the two in the peer's order
        return self.conv2(self.conv1(x), shortcut)  # type: ignore[no-any-return]


class Projection(nn.Module):
    """1x1x1 convolution without bias and a norm: the shortcut where the number of features changes."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, 1, bias=False)
        self.norm = nn.InstanceNorm3d(outputs, eps=NORM_EPS, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> (N, outputs, D, H, W)."""
        weight, bias = self.norm.weight, self.norm.bias
        return instance_norm_act(self.conv(x), weight, bias, eps=self.norm.eps, slope=1.0, inplace=True)


class ResidualStack(nn.Module):
    """`count` ResidualBlocks in a row; the first one takes the stride and the change of features."""

    def __init__(self, inputs: int, outputs: int, kernel: Triple, stride: Triple, count: int):
        super().__init__()
        first = ResidualBlock(inputs, outputs, kernel, stride)
        rest = (ResidualBlock(outputs, outputs, kernel, (1, 1, 1)) for _ in range(count - 1))
        self.blocks = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> (N, outputs, D / stride, H / stride, W / stride)."""
        return self.blocks(x)  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """The way down. Goes out: one feature map a level, level 0 first, the bottleneck last."""

    def __init__(self, plan: NetworkPlan, channels: int):
        super().__init__()
        residual = plan.kind == "residual"
        if residual:  # a stem at full resolution, so that level 0 starts with its own number of features
            self.stem: nn.Module = ConvStack(channels, plan.features[0], plan.kernels[0], (1, 1, 1), 1)
        else:
            self.stem = nn.Identity()
        inputs = (plan.features[0] if residual else channels, *plan.features[:-1])
        levels = zip(inputs, plan.features, plan.kernels, plan.strides, plan.encoder_blocks, strict=True)
        if residual:
            self.stages = nn.Sequential(*(ResidualStack(*level) for level in levels))
        else:
            self.stages = nn.Sequential(*(nn.Sequential(ConvStack(*level)) for level in levels))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, C, D, H, W) -> level l: (N, features[l], D, H, W divided by the strides up to l)."""
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class Decoder(nn.Module):
    """The way up. Step u goes from level S-1-u to level S-2-u: transposed convolution, concatenation, convolutions."""

    def __init__(self, plan: NetworkPlan, heads: int):
        super().__init__()
        ups, stacks, seg_layers = [], [], []
        for level in reversed(range(plan.stages - 1)):
            here, below, stride = plan.features[level], plan.features[level + 1], plan.strides[level + 1]
            kernel, count = plan.decoder_kernels[level], plan.decoder_convs[level]
            ups.append(nn.ConvTranspose3d(below, here, stride, stride, bias=True))
            stacks.append(ConvStack(2 * here, here, kernel, (1, 1, 1), count))
            seg_layers.append(nn.Conv3d(here, heads, 1, bias=True))
        self.transpconvs, self.stages = nn.ModuleList(ups), nn.ModuleList(stacks)
        self.seg_layers = nn.ModuleList(seg_layers)

    def forward(self, maps: list[Tensor], *, all_levels: bool) -> list[Tensor]:
        """Logits (N, K, D, H, W), full resolution first; only that one unless all_levels.

        maps: of the Encoder; taken out as they are used, because the last one alone may be a tenth of the memory.
        """
        x = maps.pop()
        logits = []
        last = len(self.stages) - 1
        for u, (up, stack, head) in enumerate(zip(self.transpconvs, self.stages, self.seg_layers, strict=True)):
            x = stack(torch.cat([up(x), maps.pop()], dim=1))  # concat order: [from below, skip]
            if all_levels or u == last:
                logits.append(head(x))
        return logits[::-1]


class UNet(nn.Module):
    """PlainConvUNet or ResidualEncoderUNet of nnU-Net, as the plan's `kind` says.

    forward(x): x (N, C, D, H, W), edges multiples of the plan's divisor -> logits (N, K, D, H, W).
    forward_levels(x): the logits of every decoder level, full resolution first, for deep supervision.
    """

    def __init__(self, plan: NetworkPlan, *, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.encoder = Encoder(plan, channels)
        self.decoder = Decoder(plan, heads)
        self.apply(_initialise)
        for module in self.modules():
            if isinstance(module, ResidualBlock):  # every block starts as its shortcut
                nn.init.zeros_(module.conv2.norm.weight)
                nn.init.zeros_(module.conv2.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> logits (N, K, D, H, W)."""
        return self.decoder(self.encoder(x), all_levels=False)[0]  # type: ignore[no-any-return]

    def choose_kept_maps(self) -> bool:
        """Looks where a norm's gradients need its answer alone and not its input too; whether any answer is a new one.

        For a GPU, where the norms do not look themselves (kernels/instance_norm_act.py): a map a block less is kept
        for the backward. Waits for the GPU once: for the start of an epoch. A CUDA graph of the step holds the choice,
        and is recorded anew after True.
        """
        blocks = [module for module in self.modules() if isinstance(module, ConvBlock)]
        found = torch.stack([recoverable(block.norm.weight, block.norm.bias) for block in blocks]).tolist()
        changed = [block.recover for block in blocks] != found
        for block, recover in zip(blocks, found, strict=True):
            block.recover = recover
        return changed

    def forward_levels(self, x: Tensor) -> list[Tensor]:
        """(N, C, D, H, W) -> logits of every decoder level: (N, K, D, H, W) first, each next one coarser."""
        return self.decoder(self.encoder(x), all_levels=True)  # type: ignore[no-any-return]


def build_network(plan: Plan) -> UNet:
    """The plan's network with fresh weights, drawn from torch's global generator (nnU-Net's He initialisation)."""
    return UNet(plan.network, channels=len(plan.channels), heads=plan.heads)


def _initialise(module: nn.Module) -> None:
    """He normal for LeakyReLU(0.01), fan-in; biases zero (Isensee 2021, Methods)."""
    if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)) and not module.weight.is_meta:  # no numbers: torch needs 2 s
        nn.init.kaiming_normal_(module.weight, a=NEGATIVE_SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
