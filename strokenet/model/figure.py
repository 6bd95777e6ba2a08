"""The network as text: the paper's Fig. 1 (one channel) and Fig. 4 (T1 and FLAIR) drawn from a plan, a line a level.

Comes in: a Plan. Goes out: lines for the console and the README. Nothing is built; network.py builds what is drawn.
"""

from __future__ import annotations

from planner.plan import Plan, Triple


def network_figure(plan: Plan) -> str:
    """A line a level: edges in voxels, the way down, the skip, the way up, the head. Read down the left, up the right.

    "conv 32>64 /2" are features in and out and the stride; kernels are 3x3x3 where none is named.
    """
    network = plan.network
    down = [_encoder(plan, level) for level in range(network.stages)]
    up = [_decoder(plan, level) for level in range(network.stages - 1)]
    sizes = [_numbers(size) for size in level_sizes(plan)]
    wide, left, right = (max(map(len, column)) for column in (sizes, down, up))
    lines = [f"{' + '.join(plan.channels)} in, {plan.heads} labels out; patch {_numbers(plan.patch)} voxels"]
    for level, (size, way_down) in enumerate(zip(sizes, down, strict=True)):
        start = f"{level:2}  {size:>{wide}}  {way_down:<{left}}"
        if level < network.stages - 1:
            lines.append(f"{start}  --skip-->  {up[level]:<{right}}  {_head(level, network.stages)}")
        else:
            lines.append(f"{start}  --up---^  bottleneck")
    return "\n".join(lines)


def level_sizes(plan: Plan) -> tuple[Triple, ...]:
    """Edges of the feature maps in voxels, a triple a level."""
    d, h, w = plan.patch
    sizes = []
    for stride in plan.network.strides:
        d, h, w = d // stride[0], h // stride[1], w // stride[2]
        sizes.append((d, h, w))
    return tuple(sizes)


def _encoder(plan: Plan, level: int) -> str:
    network = plan.network
    inputs = network.features[level - 1] if level else len(plan.channels)
    stem = f"stem {inputs}>{network.features[0]}, " if network.kind == "residual" and level == 0 else ""
    inputs = network.features[0] if stem else inputs
    word = "block" if network.kind == "residual" else "conv"
    stride = _short(network.strides[level])
    first = f"{stem}{word} {inputs}>{network.features[level]}"
    return first + ("" if stride == "1" else f" /{stride}") + _repeat(plan, level) + _kernel(network.kernels[level])


def _repeat(plan: Plan, level: int) -> str:
    count, features = plan.network.encoder_blocks[level] - 1, plan.network.features[level]
    return f", {f'{count}x ' if count > 1 else ''}{features}>{features}" if count else ""


def _head(level: int, stages: int) -> str:
    """The answer is level 0's; the others only teach, and the coarsest has weight 0 in the loss (see train/loss.py)."""
    if level == 0:
        return "head"
    return "head (training)" if level < stages - 2 else "head (idle)"


def _decoder(plan: Plan, level: int) -> str:
    network = plan.network
    here, below = network.features[level], network.features[level + 1]
    steps = [f"up {below}>{here} x{_short(network.strides[level + 1])}, cat, conv {2 * here}>{here}"]
    steps += [f"{here}>{here}"] * (network.decoder_convs[level] - 1)
    return ", ".join(steps) + _kernel(network.decoder_kernels[level])


def _kernel(kernel: Triple) -> str:
    return "" if kernel == (3, 3, 3) else f" ({'x'.join(map(str, kernel))})"


def _short(stride: Triple) -> str:
    return str(stride[0]) if len(set(stride)) == 1 else "x".join(map(str, stride))


def _numbers(size: Triple) -> str:
    return " ".join(map(str, size))
