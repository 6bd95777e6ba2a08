"""The best single threshold: against a search that tries every level by hand."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from strokenet.evaluate.threshold import LEVELS, apply_threshold, fit_threshold, standardise

Case = tuple[NDArray[np.float32], NDArray[np.bool_]]


def cases(*, bright: bool, channel: int) -> list[Case]:
    """Noise with a lesion two and a half deviations away in one channel; a rim of zeros outside the head."""
    made = []
    for index in range(3):
        rng = np.random.default_rng(index)
        image = rng.normal(100, 10, (2, 10, 12, 11)).astype(np.float32)
        lesion = np.zeros(image.shape[1:], bool)
        lesion[3:6, 4:8, 3:7] = True
        image[channel][lesion] += 25 if bright else -25
        image[:, :1] = 0
        made.append((image, lesion))
    return made


def dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def search(given: list[Case]) -> tuple[int, bool, float]:
    best = (-1.0, 0, True, 0.0)
    for channel in range(2):
        for above in (True, False):
            for level in LEVELS:
                scores = []
                for image, lesion in given:
                    z = standardise(image[channel])
                    scores.append(dice((z > level) if above else (z <= level), lesion))
                if np.mean(scores) > best[0] + 1e-9:
                    best = (float(np.mean(scores)), channel, above, float(level))
    return best[1], best[2], best[3]


@pytest.mark.parametrize("bright", [True, False])
@pytest.mark.parametrize("channel", [0, 1])
def test_the_fit_is_the_best_of_all_levels(bright: bool, channel: int) -> None:
    given = cases(bright=bright, channel=channel)
    found = fit_threshold(given)
    assert (found.channel, found.above) == (channel, bright)
    assert (found.channel, found.above, found.value) == search(given)
    masks = [apply_threshold(image, found).astype(bool) for image, _ in given]
    assert found.dice == pytest.approx(np.mean([dice(m, lesion) for m, (_, lesion) in zip(masks, given, strict=True)]))


def test_standardised_voxels_of_the_head_have_mean_0_and_deviation_1() -> None:
    image, _ = cases(bright=True, channel=0)[0]
    scaled = standardise(image[1])
    assert np.isnan(scaled[:1]).all()
    assert float(scaled[1:].mean()) == pytest.approx(0, abs=1e-6)
    assert float(scaled[1:].std()) == pytest.approx(1, abs=1e-6)
    assert np.isnan(standardise(np.zeros((2, 2, 2), np.float32))).all()


def test_outside_the_head_is_never_lesion() -> None:
    given = cases(bright=False, channel=0)
    mask = apply_threshold(given[0][0], fit_threshold(given))
    assert mask.dtype == np.uint8
    assert mask.any()
    assert not mask[:1].any()
