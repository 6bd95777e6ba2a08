"""Adaptation of weights: what stays the same function, what is hand-computed, and that every parameter is told of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from planner.plan import NetworkPlan, Plan, PostprocessRule
from strokenet.data.errors import InputError
from strokenet.model.adapt import Adapted, Fate, adapt_weights, channel_shares, fresh_weights, place_of
from strokenet.model.checkpoint import network_with
from tests.plans import STATS, tiny_network, tiny_plan

FIRST = "encoder.stages.0.0.convs.0.conv.weight"


def plan_of(*channels: str, labels: int = 2, **network: Any) -> Plan:
    n = len(channels)
    return tiny_plan(
        channels=channels,
        labels={"background": 0, **{f"label {value}": value for value in range(1, labels)}},
        normalisation=("zscore",) * n,
        use_mask_for_norm=(False,) * n,
        intensity=(STATS,) * n,
        patch=(48, 48, 48),  # a multiple of every stride here
        network=tiny_network(**network),
        postprocess=PostprocessRule(),
    )


def trained(plan: Plan, seed: int = 1) -> dict[str, Tensor]:
    """Weights with nothing at its first value: norms and biases are drawn too."""
    generator = torch.Generator().manual_seed(seed)
    fresh = fresh_weights(plan, seed)
    return {name: t + 0.3 * torch.randn(t.shape, generator=generator) for name, t in fresh.items()}


def adapted(source: Plan, target: Plan, keep_heads: bool = True, **wanted: str) -> tuple[dict[str, Tensor], Adapted]:
    weights = trained(source)
    shares = channel_shares(source.channels, target.channels, wanted)
    return weights, adapt_weights(weights, fresh_weights(target, 5), shares, keep_heads=keep_heads)


def answer(plan: Plan, weights: dict[str, Tensor], image: Tensor) -> Tensor:
    with torch.inference_mode():
        return network_with(plan, weights).eval()(image)


def image_of(channels: int, seed: int = 3) -> Tensor:
    return torch.randn((1, channels, 16, 16, 16), generator=torch.Generator().manual_seed(seed))


def fate(done: Adapted, name: str) -> Fate:
    return next(one for one in done.fates if one.name == name)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_the_same_plan_gives_the_same_bits_and_says_copied(kind: str) -> None:
    plan = plan_of("T1", "FLAIR", kind=kind, features=(4, 8, 12), encoder_blocks=(1, 2, 1), decoder_convs=(2, 1))
    weights, done = adapted(plan, plan)
    assert list(done.weights) == list(weights)
    assert all(torch.equal(done.weights[name], weights[name]) for name in weights)
    assert {(one.words, one.source == one.name, one.zero, one.new, one.unused) for one in done.fates} == {
        (("copied",), True, 0, 0, 0)
    }
    assert done.dropped == ()


@pytest.mark.parametrize("kind", ["plain", "residual"])
@pytest.mark.parametrize(
    ("source", "target"),
    [(("T1",), ("T1", "FLAIR")), (("T1",), ("FLAIR", "T1")), (("T1", "T2"), ("T2", "FLAIR", "T1"))],
)
@pytest.mark.parametrize("size", [1.0, 1000.0])
def test_zero_keeps_the_function_whatever_the_new_channel_holds(
    kind: str, source: tuple[str, ...], target: tuple[str, ...], size: float
) -> None:
    ours, theirs = plan_of(*target, kind=kind), plan_of(*source, kind=kind)
    weights, done = adapted(theirs, ours, FLAIR="zero")
    known = image_of(len(source))
    image = size * image_of(len(target), seed=4)
    for number, name in enumerate(target):
        if name in source:
            image[:, number] = known[:, source.index(name)]
    close(answer(ours, done.weights, image), answer(theirs, weights, known))


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_channels_in_another_order_are_found_by_name(kind: str) -> None:
    theirs, ours = plan_of("flair", "t1", kind=kind), plan_of("T1", "FLAIR", kind=kind)
    weights, done = adapted(theirs, ours)
    image = image_of(2)
    close(answer(ours, done.weights, image), answer(theirs, weights, image.flip(1)))


@pytest.mark.parametrize("kind", ["plain", "residual"])
@pytest.mark.parametrize(
    ("source", "target", "wanted"),
    [
        (("T1",), ("T1", "FLAIR"), {}),
        (("T1", "T2"), ("T1", "T2", "FLAIR"), {}),
        (("T1", "T2"), ("T1", "T2", "FLAIR"), {"FLAIR": "t2"}),
        (("T1",), ("T1", "FLAIR", "DWI"), {"DWI": "zero"}),
        (("T1", "T2"), ("FLAIR",), {}),
    ],
)
def test_equal_channels_get_the_sources_answer(
    kind: str, source: tuple[str, ...], target: tuple[str, ...], wanted: dict[str, str]
) -> None:
    theirs, ours = plan_of(*source, kind=kind), plan_of(*target, kind=kind)
    weights, done = adapted(theirs, ours, **wanted)
    one = image_of(1)
    there, here = (one.expand(1, n, 16, 16, 16) for n in (len(source), len(target)))
    close(answer(ours, done.weights, here), answer(theirs, weights, there))


def test_the_papers_rule_by_hand() -> None:
    weights, done = adapted(plan_of("T1"), plan_of("FLAIR", "T1"))
    half = weights[FIRST][:, 0] / 2
    assert torch.equal(done.weights[FIRST], torch.stack([half, half], 1))
    assert torch.equal(done.weights["encoder.stages.0.0.convs.0.conv.bias"], weights[FIRST.replace("weight", "bias")])
    assert fate(done, FIRST).words == ("averaged",)
    assert {one.words for one in done.fates if one.name != FIRST} == {("copied",)}


@pytest.mark.parametrize(
    ("source", "target", "wanted", "expected"),
    [
        ("T1", "T1 FLAIR", {}, [[1 / 2, 1 / 2]]),
        ("T1", "T1 FLAIR", {"flair": "T1"}, [[1 / 2, 1 / 2]]),
        ("T1", "T1 FLAIR", {"FLAIR": "zero"}, [[1, 0]]),
        ("T1", "T1 FLAIR DWI", {"FLAIR": "zero"}, [[1 / 2, 0, 1 / 2]]),
        ("T1 FLAIR", "T1 FLAIR DWI", {}, [[2 / 3, 0, 1 / 3], [0, 2 / 3, 1 / 3]]),
        ("T1 FLAIR", "T1 FLAIR DWI", {"DWI": "T1"}, [[1 / 2, 0, 1 / 2], [0, 1, 0]]),
        ("T1 FLAIR", "T1", {}, [[1], [0]]),
        ("T1 FLAIR", "FLAIR T1", {}, [[0, 1], [1, 0]]),
        ("T1", "T1 FLAIR", {"T1": "zero"}, [[0, 1]]),
    ],
)
def test_shares_by_hand(source: str, target: str, wanted: dict[str, str], expected: list[list[float]]) -> None:
    shares = channel_shares(source.split(), target.split(), wanted)
    np.testing.assert_allclose(shares.numpy(), expected, atol=1e-7)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"DWI": "T1"}, "--map DWI=T1: the plan has no channel DWI; its channels: T1, FLAIR"),
        ({"FLAIR": "T2"}, "--map FLAIR=T2: the model has no channel T2; allowed: T1, zero, mean"),
        ({"FLAIR": "T1", "flair": "zero"}, "flair is mapped twice"),
        ({"FLAIR": "zero", "T1": "zero"}, "every channel is zero"),
    ],
)
def test_a_map_that_cannot_be_is_refused(wanted: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        channel_shares(("T1",), ("T1", "FLAIR"), wanted)


def test_a_channel_that_nobody_takes_is_counted_as_unused() -> None:
    weights, done = adapted(plan_of("T1", "FLAIR"), plan_of("T1"))
    assert torch.equal(done.weights[FIRST], weights[FIRST][:, :1])
    assert (fate(done, FIRST).words, fate(done, FIRST).unused) == (("copied", "cropped"), 4 * 27)


@pytest.mark.parametrize("wider", [(5, 5, 5), (3, 5, 7)])
def test_a_padded_kernel_has_the_same_response(wider: tuple[int, int, int]) -> None:
    theirs, ours = plan_of("T1"), plan_of("T1", kernels=(wider, (3, 3, 3), (3, 3, 3)))
    weights, done = adapted(theirs, ours)
    image = image_of(1)
    padding = [(k - 1) // 2 for k in wider]
    narrow = functional.conv3d(image, weights[FIRST], padding=1)
    wide = functional.conv3d(image, done.weights[FIRST], padding=padding)
    close(wide, narrow)
    close(answer(ours, done.weights, image), answer(theirs, weights, image))
    assert fate(done, FIRST).words == ("copied", "padded")
    assert fate(done, FIRST).taken == 4 * 27


def test_a_cropped_kernel_is_the_centre() -> None:
    five, flat = plan_of("T1", kernels=((5, 5, 5),) * 3), plan_of("T1", kernels=((1, 3, 3),) * 3)
    weights, done = adapted(five, flat)
    assert torch.equal(done.weights[FIRST], weights[FIRST][:, :, 2:3, 1:4, 1:4])
    assert fate(done, FIRST).words == ("copied", "cropped")
    assert fate(done, FIRST).unused == 4 * (125 - 9)


def up_of(before: int, after: int) -> tuple[Tensor, Tensor, Fate]:
    """The transposed convolution of the deepest step, (in, out, D), for another stride along D."""
    theirs, ours = (plan_of("T1", strides=((1, 1, 1), (2, 2, 2), (s, 2, 2))) for s in (before, after))
    name = "decoder.transpconvs.0.weight"
    weights, done = adapted(theirs, ours)
    return weights[name][..., 0, 1], done.weights[name][..., 0, 1], fate(done, name)


def test_the_tile_of_a_transposed_convolution_is_repeated_where_the_stride_grows() -> None:
    old, new, told = up_of(1, 2)
    assert torch.equal(new, torch.cat([old, old], 2))
    assert told.words == ("repeated",)
    old, new, _ = up_of(2, 4)
    assert torch.equal(new, old[..., [0, 0, 1, 1]])


def test_the_tile_of_a_transposed_convolution_is_averaged_where_the_stride_shrinks() -> None:
    old, new, told = up_of(2, 1)
    close(new[..., 0], (old[..., 0] + old[..., 1]) / 2)
    assert told.words == ("averaged",)
    two, three, _ = up_of(2, 3)
    close(three, torch.stack([two[..., 0], (two[..., 0] + two[..., 1]) / 2, two[..., 1]], 2))


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_grown_features_leave_the_answer_as_it_was(kind: str) -> None:
    """Also where both halves of every concatenation grow: the skip's features must find their own weights."""
    blocks = {"encoder_blocks": (2, 2, 2), "decoder_convs": (2, 2), "kind": kind}
    theirs, ours = plan_of("T1", features=(4, 8, 12), **blocks), plan_of("T1", features=(6, 11, 20), **blocks)
    weights, done = adapted(theirs, ours)
    image = image_of(1)
    close(answer(ours, done.weights, image), answer(theirs, weights, image))
    first = fate(done, "decoder.stages.0.convs.0.conv.weight")
    assert first.words == ("copied", "padded", "new")
    assert (first.taken, first.zero, first.new) == (8 * 16 * 27, 8 * 6 * 27, 3 * 22 * 27)
    assert float(done.weights["decoder.stages.0.convs.0.conv.weight"][8:].abs().min()) > 0


def test_cut_features_are_the_first_of_each_half() -> None:
    weights, done = adapted(plan_of("T1", features=(4, 8, 8)), plan_of("T1", features=(3, 5, 8)))
    name = "decoder.stages.0.convs.0.conv.weight"
    kept = [0, 1, 2, 3, 4, 8, 9, 10, 11, 12]
    assert torch.equal(done.weights[name], weights[name][:5][:, kept])
    assert fate(done, name).words == ("copied", "cropped")
    assert fate(done, name).unused == (8 * 16 - 5 * 10) * 27
    up = "decoder.transpconvs.1.weight"  # (in, out, 2, 2, 2)
    assert torch.equal(done.weights[up], weights[up][:5, :3])


DEEPER = {
    "features": (4, 8, 8, 10),
    "strides": ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
    "kernels": ((3, 3, 3),) * 4,
    "encoder_blocks": (1, 1, 1, 1),
    "decoder_convs": (1, 1, 1),
    "decoder_kernels": ((3, 3, 3),) * 3,
}


def test_an_added_stage_is_new_and_the_decoder_is_matched_by_level() -> None:
    weights, done = adapted(plan_of("T1"), plan_of("T1", **DEEPER))
    for step in (0, 1):
        for part in ("transpconvs.{}.weight", "stages.{}.convs.0.conv.weight", "seg_layers.{}.weight"):
            here, there = (f"decoder.{part.format(n)}" for n in (step + 1, step))
            assert torch.equal(done.weights[here], weights[there])
            assert fate(done, here).source == there
    new = {one.name for one in done.fates if one.words == ("new",)}
    places = {place_of(name, 4) for name in new}
    assert places == {("encoder", 3), ("decoder", 2), ("head", 2)}
    assert done.dropped == ()


def test_a_removed_stage_is_dropped_and_the_rest_is_copied() -> None:
    weights, done = adapted(plan_of("T1", **DEEPER), plan_of("T1"))
    assert {one.words for one in done.fates} == {("copied",)}
    assert torch.equal(done.weights["decoder.seg_layers.1.weight"], weights["decoder.seg_layers.2.weight"])
    assert {place_of(name, 4) for name in done.dropped} == {("encoder", 3), ("decoder", 2), ("head", 2)}


def test_blocks_are_added_and_removed_at_the_end_of_a_level() -> None:
    few, many = plan_of("T1"), plan_of("T1", encoder_blocks=(1, 3, 1), decoder_convs=(2, 1))
    _, done = adapted(few, many)
    new = {one.name.rsplit(".", 2)[0] for one in done.fates if one.words == ("new",)}
    assert new == {"encoder.stages.1.0.convs.1", "encoder.stages.1.0.convs.2", "decoder.stages.1.convs.1"}
    _, done = adapted(many, few)
    assert {name.rsplit(".", 2)[0] for name in done.dropped} == new


@pytest.mark.parametrize(("before", "after"), [("plain", "residual"), ("residual", "plain")])
def test_plain_and_residual_share_the_first_convolution_and_the_decoder(before: str, after: str) -> None:
    theirs, ours = plan_of("T1", kind=before), plan_of("T1", kind=after)
    weights, done = adapted(theirs, ours)
    there, here = (
        ("encoder.stem" if kind == "residual" else "encoder.stages.0.0") + ".convs.0.conv.weight"
        for kind in (before, after)
    )
    assert torch.equal(done.weights[here], weights[there])
    copied = {one.name for one in done.fates if one.words == ("copied",)}
    assert copied == {name for name in done.weights if name.startswith(("decoder", here.removesuffix("conv.weight")))}
    assert all(name.startswith("encoder.stages") for name in done.dropped)


def test_a_shortcut_is_found_with_and_without_its_pool() -> None:
    strides = ((1, 1, 1), (1, 1, 1), (2, 2, 2))
    theirs, ours = plan_of("T1", kind="residual"), plan_of("T1", kind="residual", strides=strides)
    weights, done = adapted(theirs, ours)
    here, there = (f"encoder.stages.1.blocks.0.skip.{n}.conv.weight" for n in (0, 1))
    assert torch.equal(done.weights[here], weights[there])


def test_new_heads_are_fresh_and_the_old_ones_told_as_dropped() -> None:
    theirs, ours = plan_of("T1"), plan_of("T1", labels=4)
    _, done = adapted(theirs, ours, keep_heads=False)
    heads = {name for name in done.weights if "seg_layers" in name}
    assert {one.name for one in done.fates if one.words == ("new",)} == heads
    assert all(torch.equal(done.weights[name], fresh_weights(ours, 5)[name]) for name in heads)
    assert set(done.dropped) == heads


def test_fresh_numbers_come_from_the_seed_alone() -> None:
    plan, state = plan_of("T1"), torch.random.get_rng_state()
    one, same, other = (fresh_weights(plan, seed)[FIRST] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(state, torch.random.get_rng_state())


def drawn_plan(rng: np.random.Generator) -> Plan:
    """Any topology: 2 to 4 levels, strides 1 to 3, kernels 1 to 5."""
    stages = int(rng.integers(2, 5))

    def triples(n: int, *allowed: int) -> tuple[Any, ...]:
        return tuple(tuple(int(k) for k in rng.choice(allowed, 3)) for _ in range(n))

    network = NetworkPlan(
        kind="plain" if rng.random() < 0.5 else "residual",
        features=tuple(int(f) for f in rng.integers(1, 7, stages)),
        strides=((1, 1, 1), *triples(stages - 1, 1, 2, 3)),
        kernels=triples(stages, 1, 3, 5),
        encoder_blocks=tuple(int(n) for n in rng.integers(1, 4, stages)),
        decoder_convs=tuple(int(n) for n in rng.integers(1, 4, stages - 1)),
        decoder_kernels=triples(stages - 1, 1, 3, 5),
    )
    channels = ("T1", "FLAIR", "T2", "DWI")
    n = int(rng.integers(1, 5))
    return tiny_plan(
        channels=tuple(rng.permutation(channels)[:n].tolist()),
        normalisation=("zscore",) * n,
        use_mask_for_norm=(False,) * n,
        intensity=(STATS,) * n,
        patch=network.divisor,
        network=network,
    )


@pytest.mark.parametrize("seed", range(40))
def test_every_parameter_of_both_networks_is_told_of(seed: int) -> None:
    rng = np.random.default_rng(seed)
    theirs, ours = drawn_plan(rng), drawn_plan(rng)
    words = dict(zip(ours.channels, rng.choice(["zero", "mean", theirs.channels[0]], len(ours.channels)), strict=True))
    words[ours.channels[0]] = "mean"
    weights, done = adapted(theirs, ours, keep_heads=bool(rng.random() < 0.5), **words)
    fresh = fresh_weights(ours, 5)
    network_with(ours, done.weights)  # strict
    assert [one.name for one in done.fates] == list(fresh) == list(done.weights)
    used = {one.source for one in done.fates if one.source}
    assert used.isdisjoint(done.dropped)
    assert used | set(done.dropped) == set(weights)
    for one in done.fates:
        result = done.weights[one.name]
        assert (result.shape, result.dtype) == (fresh[one.name].shape, torch.float32)
        assert one.numbers == result.numel()
        assert min(one.taken, one.zero, one.new, one.unused) >= 0
        assert int((result == 0).sum()) >= one.zero
        if result.ndim == 5 and one.source:  # trained weights and fresh kernels hold no zero by chance
            assert int((result == 0).sum()) == one.zero
            assert int((result == fresh[one.name]).sum()) == one.new
        assert (one.words == ("new",)) == (one.source is None)
        assert ("padded" in one.words, "new" in one.words, "cropped" in one.words) == (
            one.zero > 0,
            one.new > 0,
            one.unused > 0,
        )
