"""Adaptation: the weights of one network in the shape of another (Meddahi 2024, V and VI.B steps 2 to 4).

Comes in: trained weights, fresh weights of the target's shape, and which input channel takes what. Goes out: weights of
the target's shape, and for each of them what it is made of. Pure functions; folders are adapted.py's business.

    channels   each source channel's weights are shared out once among the target channels that take them
    levels     correspond by number from level 0, in the decoder too, whose steps are numbered from the deepest
    features   the first ones are kept, in each half of a concatenation; kept ones take 0 from grown ones
    kernels    cut or filled with 0 about their centre; those of transposed convolutions stretched with their stride

Differs from the published script, which repeats the first convolution for every channel (here: the default of a new
channel alone), cuts kernels at their end (that shifts the features; here the centre stays), treats levels 0 and 5 and
one transposed convolution of one network alone (here: all of any), leaves the new first bias at random and pads with
noise (here: copied, and 0), keeps the source's plan beside the target's weights, and tells nothing (here: Fate). It
learns the target's shapes from an epoch of training; here they follow from the plan, so no epoch is spent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from planner.plan import Plan
from strokenet.data.errors import InputError
from strokenet.model.network import build_network

Word = Literal["copied", "averaged", "repeated", "cropped", "padded", "new"]

ZERO, MEAN = "zero", "mean"  # of --map: words in the place of a source channel
PLAIN_FIRST, RESIDUAL_FIRST = "encoder.stages.0.0.convs.0.", "encoder.stem.convs.0."  # the convolution of the image


@dataclass(frozen=True, kw_only=True)
class Fate:
    """What one parameter of the target is made of.

    source: the source's parameter, None where all is new. words: copied (as it was), averaged (mixed or scaled) or
    repeated (a stretched kernel); then cropped (a part of the source's is left out), padded (zeros beside it), new
    (fresh numbers). taken, zero, new: its numbers by origin. unused: numbers of the source's parameter left out.
    """

    name: str
    source: str | None
    words: tuple[Word, ...]
    taken: int
    zero: int
    new: int
    unused: int = 0

    @property
    def numbers(self) -> int:
        """How many numbers the parameter holds."""
        return self.taken + self.zero + self.new


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapted:
    """Weights of the target's shape, one Fate each in the same order, and the source's parameters that nobody took."""

    weights: dict[str, Tensor]
    fates: tuple[Fate, ...]
    dropped: tuple[str, ...]


def channel_shares(source: Sequence[str], target: Sequence[str], wanted: Mapping[str, str]) -> Tensor:
    """How the first convolution's weights are shared out: (source channels, target channels), float32.

    A target channel takes the source channel of its name (upper or lower case), or what `wanted` says: a source
    channel, "mean" of all of them, or "zero". One that the source lacks takes the mean: the paper's rule. Then each
    source channel is shared equally by those that take it, so that its row sums to 1: channels that hold the same
    z-scored image get the source's response, and one channel made n is divided by n, as published. "zero" takes no
    share: the others keep their weights, and the answer is the source's whatever the new channel holds. A row of zeros
    is a source channel that nobody takes; the others are not scaled to make up for it, because 0 is its mean.

    Raises:
        InputError: `wanted` names a channel that is not in the target or the source, one twice, or all are zero.
    """
    choices = _choices(source, target, wanted)
    shares = torch.zeros(len(source), len(target))
    for column, choice in enumerate(choices):
        if choice == MEAN:
            shares[:, column] = 1 / len(source)
        elif isinstance(choice, int):
            shares[choice, column] = 1
    if not shares.any():
        raise InputError("--map: every channel is zero, so the network would see nothing; let one take a channel")
    taken = shares.sum(1, keepdim=True)
    return shares / torch.where(taken > 0, taken, 1)


def adapt_weights(
    source: Mapping[str, Tensor], fresh: Mapping[str, Tensor], shares: Tensor, *, keep_heads: bool
) -> Adapted:
    """The source's weights in the shape of `fresh`, which gives the numbers that are new.

    Levels correspond by number: the filters of level l are fed by those of level l-1, and that chain is kept whole also
    where strides differ; stages that are added or dropped are the deepest. Between a plain and a residual encoder the
    first convolution is shared and nothing else.

    Args:
        source, fresh: state dicts of two UNets, float32. shares: of channel_shares.
        keep_heads: False leaves the heads at their fresh weights.
    """
    weights, fates = {}, []
    for name, target in fresh.items():
        origin = _source_name(name, source, fresh)
        if origin is None or (not keep_heads and _is_head(name)):
            weights[name] = target.clone()
            fates.append(Fate(name=name, source=None, words=("new",), taken=0, zero=0, new=target.numel()))
        else:
            weights[name], fate = _fit(name, origin, source[origin], target, shares)
            fates.append(fate)
    used = {fate.source for fate in fates}
    return Adapted(weights=weights, fates=tuple(fates), dropped=tuple(name for name in source if name not in used))


def fresh_weights(plan: Plan, seed: int) -> dict[str, Tensor]:
    """Weights of the plan's network as a new training would draw them; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_network(plan).state_dict()


def place_of(name: str, stages: int) -> tuple[str, int]:
    """Where a parameter sits: ("stem" | "encoder" | "decoder" | "head", level). stages: of its network.

    A transposed convolution belongs to the level that it leads to.
    """
    if name.startswith(RESIDUAL_FIRST):
        return "stem", 0
    side, _, number = name.split(".")[:3]
    if side == "encoder":
        return side, int(number)
    return "head" if _is_head(name) else side, stages - 2 - int(number)


def _choices(source: Sequence[str], target: Sequence[str], wanted: Mapping[str, str]) -> list[int | str]:
    """A source channel's number, "mean" or "zero" for each target channel."""
    theirs, ours = [name.casefold() for name in source], [name.casefold() for name in target]
    choices: list[int | str] = [theirs.index(name) if name in theirs else MEAN for name in ours]
    mapped = set()
    for new, old in wanted.items():
        column, origin = new.casefold(), old.casefold()
        if column not in ours:
            raise InputError(f"--map {new}={old}: the plan has no channel {new}; its channels: {', '.join(target)}")
        if column in mapped:
            raise InputError(f"--map {new}={old}: {new} is mapped twice; name each channel once")
        if origin not in (*theirs, ZERO, MEAN):
            names = ", ".join(source)
            raise InputError(f"--map {new}={old}: the model has no channel {old}; allowed: {names}, {ZERO}, {MEAN}")
        mapped.add(column)
        choices[ours.index(column)] = theirs.index(origin) if origin in theirs else origin
    return choices


def _source_name(name: str, source: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> str | None:
    """The source's parameter at the same place, or None."""
    first = _first_convolution(fresh)
    if name.startswith(first):
        name = _first_convolution(source) + name.removeprefix(first)
    elif name.startswith("decoder."):  # step 0 is the deepest: the same level is another step where stages differ
        _, kind, step, rest = name.split(".", 3)
        name = f"decoder.{kind}.{int(step) + _steps(source) - _steps(fresh)}.{rest}"
    same = (name, *(re.sub(r"\.skip\.\d\.", f".skip.{n}.", name) for n in (0, 1)))  # 1 where a pool precedes it
    return next((candidate for candidate in same if candidate in source), None)


def _first_convolution(weights: Mapping[str, Tensor]) -> str:
    return RESIDUAL_FIRST if f"{RESIDUAL_FIRST}conv.weight" in weights else PLAIN_FIRST


def _steps(weights: Mapping[str, Tensor]) -> int:
    """Steps of the decoder: stages - 1."""
    return sum(name.startswith("decoder.transpconvs.") and name.endswith(".weight") for name in weights)


def _is_head(name: str) -> bool:
    return ".seg_layers." in name


def _fit(name: str, origin: str, given: Tensor, fresh: Tensor, shares: Tensor) -> tuple[Tensor, Fate]:
    """One parameter: the source's numbers where both have a place, 0 where a kept feature meets a new one, else fresh.

    With 0 there, the kept features of a grown network are the source's own (each channel is normalised by itself).
    """
    up = ".transpconvs." in name and given.ndim == 5
    image = name in (f"{PLAIN_FIRST}conv.weight", f"{RESIDUAL_FIRST}conv.weight")
    halves = 2 if re.fullmatch(r"decoder\.stages\.\d+\.convs\.0\.conv\.weight", name) else 1
    old, result = _as_weight(given, up=up), _as_weight(fresh, up=up).clone()  # (out, in, D, H, W)
    before, after = old.shape[2:], result.shape[2:]
    value = torch.einsum("omdhw,mn->ondhw", old, shares) if image else old
    value = _stretched(value, after) if up else _centred(value, after)
    rows, columns = _shared(len(old), len(result), 1), _shared(value.shape[1], result.shape[1], halves)
    result[rows[1]] = 0
    result[rows[1][:, None], columns[1]] = value[rows[0][:, None], columns[0]]

    used_in, taken_in = (int(shares.any(axis).sum()) if image else len(columns[0]) for axis in (1, 0))
    both = [min(pair) for pair in zip(before, after, strict=True)]
    taken = len(rows[0]) * taken_in * math.prod(after if up else both)
    unused = old.numel() - len(rows[0]) * used_in * math.prod(before if up else both)
    new = (len(result) - len(rows[1])) * result[0].numel()
    zero = result.numel() - taken - new
    how = _how_mixed(shares) if image else _how_stretched(before, after) if up else "copied"
    words = (how, *_partial(unused, zero, new))
    result = (result.transpose(0, 1) if up else result).reshape(fresh.shape).contiguous()
    return result, Fate(name=name, source=origin, words=words, taken=taken, zero=zero, new=new, unused=unused)


def _as_weight(tensor: Tensor, *, up: bool) -> Tensor:
    """(out, in, D, H, W): a bias or norm parameter has one input, a transposed convolution its first axes swapped."""
    if tensor.ndim == 1:
        return tensor[:, None, None, None, None]  # (out,) -> (out, 1, 1, 1, 1)
    return tensor.transpose(0, 1) if up else tensor


def _shared(source: int, target: int, halves: int) -> tuple[Tensor, Tensor]:
    """Positions in the source and in the target of the features that both have: the first ones of each half."""
    s, t = source // halves, target // halves
    kept = torch.arange(min(s, t))
    return torch.cat([kept + h * s for h in range(halves)]), torch.cat([kept + h * t for h in range(halves)])


def _centred(weight: Tensor, kernel: Sequence[int]) -> Tensor:
    """Kernels (all odd) cut or filled with 0 symmetrically, so that the filter stays where it was."""
    for axis, wanted in enumerate(kernel, start=2):
        margin = (wanted - weight.shape[axis]) // 2
        if margin < 0:
            weight = weight.narrow(axis, -margin, wanted)
        elif margin > 0:
            sides = [0, 0] * (weight.ndim - 1 - axis) + [margin, margin]  # from the last axis to this one
            weight = torch.nn.functional.pad(weight, sides)
    return weight


def _stretched(weight: Tensor, kernel: Sequence[int]) -> Tensor:
    """Kernels of a transposed convolution brought to another stride, each the tile that one input voxel becomes.

    An output voxel takes one weight alone, so the tile is resampled by area: repeated where the stride grows, averaged
    where it shrinks. A map without detail keeps its response; cutting or zeros would leave holes.
    """
    for axis, wanted in enumerate(kernel, start=2):
        given = weight.shape[axis]
        if given != wanted:
            out, into = given * torch.arange(wanted)[:, None], wanted * torch.arange(given)  # in 1 / (given wanted)
            overlap = torch.minimum(out + given, into + wanted) - torch.maximum(out, into)
            area = overlap.clamp(min=0) / given  # (wanted, given), rows sum to 1
            weight = torch.tensordot(weight, area, dims=([axis], [1])).movedim(-1, axis)
    return weight


def _how_mixed(shares: Tensor) -> Word:
    whole = ((shares == 0) | (shares == 1)).all() and (shares.sum(0) <= 1).all()
    return "copied" if whole else "averaged"


def _how_stretched(given: Sequence[int], wanted: Sequence[int]) -> Word:
    if list(given) == list(wanted):
        return "copied"
    return "repeated" if all(w % g == 0 for g, w in zip(given, wanted, strict=True)) else "averaged"


def _partial(unused: int, zero: int, new: int) -> tuple[Word, ...]:
    words: tuple[tuple[int, Word], ...] = ((unused, "cropped"), (zero, "padded"), (new, "new"))
    return tuple(word for count, word in words if count)
