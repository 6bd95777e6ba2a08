"""The fingerprint against explicit draws and numpy's own statistics of them."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from planner.fingerprint import CaseSummary, foreground_counts, from_json, make_fingerprint, to_json
from planner.plan import PlanError
from tests.planner.fingerprints import brains


def summary(case_id: str, voxels: int, draws: int, *, channels: int = 2, **changes: object) -> CaseSummary:
    """A case with random lesion intensities, ties among them."""
    rng = np.random.default_rng(voxels)
    values = tuple(np.round(rng.gamma(2, 50, voxels) - 40, 1).astype(np.float32) for _ in range(channels))
    case = CaseSummary(
        case_id=case_id,
        shape_after_crop=(10 + voxels % 7, 20, 30),
        spacing=(1.0 + voxels % 3, 1.0, 0.5),
        relative_size=1 / (1 + voxels % 5),
        values=values,
        counts=foreground_counts([voxels] * channels, draws),
    )
    return replace(case, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("voxels", [1, 2, 3, 1000, 65_537])
def test_the_counted_draws_are_those_of_choice_with_the_peers_seed(
    voxels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("planner.fingerprint._CHUNK", 1009)  # many chunks, the last one shorter
    counted = foreground_counts([voxels, voxels], 20_000)
    random = np.random.RandomState(1234)
    for counts in counted:
        drawn = random.choice(np.arange(voxels), 20_000, replace=True)
        np.testing.assert_array_equal(counts, np.bincount(drawn, minlength=voxels))


def test_a_channel_without_foreground_draws_nothing_and_leaves_the_stream() -> None:
    empty, counts = foreground_counts([0, 50], 1000)
    assert empty.shape == (0,)
    np.testing.assert_array_equal(counts, foreground_counts([50], 1000)[0])


@pytest.mark.parametrize("sizes", [(500, 40, 0), (1,), (2, 1), (0, 3000)])
def test_the_statistics_are_numpys_of_the_drawn_voxels(sizes: tuple[int, ...]) -> None:
    summaries = [summary(f"case_{i}", n, 7001) for i, n in enumerate(sizes)]
    stats = make_fingerprint(summaries).intensity
    for channel in range(2):
        drawn = np.concatenate([np.repeat(case.values[channel], case.counts[channel]) for case in summaries])
        assert len(drawn) == 7001 * np.count_nonzero(sizes)
        exact = drawn.astype(np.float64)
        low, median, high = np.percentile(exact, (0.5, 50, 99.5))
        expected = {
            "mean": exact.mean(),
            "std": exact.std(),
            "min": exact.min(),
            "max": exact.max(),
            "median": median,
            "percentile_00_5": low,
            "percentile_99_5": high,
        }
        found = {name: getattr(stats[channel], name) for name in expected}
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_a_voxel_that_was_never_drawn_does_not_count() -> None:
    values = np.array([-100, 1, 2, 900], np.float32)
    case = summary("a", 4, 1, channels=1, values=(values,), counts=(np.array([0, 3, 1, 0]),))
    stats = make_fingerprint([case]).intensity[0]
    assert (stats.min, stats.max, stats.mean) == (1, 2, 1.25)


def test_cases_keep_their_order_and_the_size_is_a_median() -> None:
    found = make_fingerprint([summary("b", 4, 10), summary("a", 9, 10), summary("c", 5, 10)])
    assert found.case_ids == ("b", "a", "c")
    assert found.shapes_after_crop == ((14, 20, 30), (12, 20, 30), (15, 20, 30))
    assert found.spacings == ((2.0, 1.0, 0.5), (1.0, 1.0, 0.5), (3.0, 1.0, 0.5))
    assert found.median_relative_size == pytest.approx(0.2)  # of 1/5, 1/5, 1/1


def test_a_dataset_without_case_channel_or_lesion_is_refused() -> None:
    with pytest.raises(PlanError, match="no case"):
        make_fingerprint([])
    with pytest.raises(PlanError, match=r"cases have \[1, 2\] channels"):
        make_fingerprint([summary("a", 5, 10), summary("b", 5, 10, channels=1)])
    with pytest.raises(PlanError, match="no case has a labelled lesion voxel"):
        make_fingerprint([summary("a", 0, 10), summary("b", 0, 10)])


def test_json_gives_the_fingerprint_back_under_the_peers_names() -> None:
    found = make_fingerprint([summary("a", 50, 100), summary("b", 70, 100)])
    data = json.loads(json.dumps(to_json(found)))
    assert from_json(data) == found
    assert set(data) == {
        "cases",
        "foreground_intensity_properties_per_channel",
        "median_relative_size_after_cropping",
        "shapes_after_crop",
        "spacings",
    }
    assert set(data["foreground_intensity_properties_per_channel"]["1"]) == {
        *("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std")
    }


@pytest.mark.parametrize(
    "data",
    [None, [], {}, {"cases": ["a"]}, to_json(brains()) | {"spacings": [[1, 1]]}, to_json(brains()) | {"cases": 3}],
)
def test_a_broken_fingerprint_is_refused_with_one_line(data: object) -> None:
    with pytest.raises(PlanError, match="run `plan` again") as error:
        from_json(data)
    assert "\n" not in str(error.value)


def test_a_fingerprint_cannot_be_altered() -> None:
    with pytest.raises(FrozenInstanceError):
        brains().case_ids = ()  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        summary("a", 1, 1).spacing = (1, 1, 1)  # type: ignore[misc]
