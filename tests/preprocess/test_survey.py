"""What planning learns of one case."""

from __future__ import annotations

import numpy as np
import pytest

from strokenet.data.errors import InputError
from strokenet.preprocess.survey import survey
from tests.preprocess.heads import head


def test_a_survey_measures_the_crop_and_the_lesion_in_it() -> None:
    case = head()
    summary = survey(case, orientation="as-stored", draws=5000)
    assert summary.case_id == "head"
    assert summary.shape_after_crop == (12, 14, 9)
    assert summary.spacing == (2.0, 1.0, 1.5)
    assert summary.relative_size == pytest.approx(12 * 14 * 9 / (14 * 18 * 12))
    assert case.label is not None
    lesion = case.label > 0
    lesion[0] = False  # the labelled voxel outside the box
    for channel, values in zip(case.image, summary.values, strict=True):
        np.testing.assert_array_equal(values, channel[lesion])
    assert [counts.sum() for counts in summary.counts] == [5000, 5000]
    assert not np.array_equal(*summary.counts)  # each channel draws its own


def test_the_draws_are_those_of_choice_with_nnunets_seed() -> None:
    summary = survey(head(), orientation="as-stored", draws=1000)
    random = np.random.RandomState(1234)
    for values, counts in zip(summary.values, summary.counts, strict=True):
        drawn = random.choice(values, 1000, replace=True)
        np.testing.assert_array_equal(np.sort(drawn), np.sort(np.repeat(values, counts)))


def test_ras_turns_shape_and_spacing() -> None:
    case = head((3.0, 1.0, 2.0))
    swapped = np.array(case.geometry.affine[:, [2, 0, 1, 3]])  # stored as w, d, h
    geometry = type(case.geometry)(shape=(12, 14, 18), spacing=(2.0, 3.0, 1.0), affine=swapped)
    assert case.label is not None
    stored = type(case)(
        case_id=case.case_id,
        channels=case.channels,
        image=np.ascontiguousarray(case.image.transpose(0, 3, 1, 2)),
        label=np.ascontiguousarray(case.label.transpose(2, 0, 1)),
        geometry=geometry,
        header=case.header,
    )
    ras, as_stored = (survey(stored, orientation=o, draws=10) for o in ("RAS", "as-stored"))
    assert (ras.shape_after_crop, ras.spacing) == ((12, 14, 9), (3.0, 1.0, 2.0))
    assert (as_stored.shape_after_crop, as_stored.spacing) == ((9, 12, 14), (2.0, 3.0, 1.0))


def test_a_case_without_lesion_contributes_no_values() -> None:
    case = head()
    assert case.label is not None
    case.label[:] = 0
    summary = survey(case, orientation="RAS", draws=10)
    assert [len(values) for values in summary.values] == [0, 0]


def test_a_case_without_label_is_refused() -> None:
    with pytest.raises(InputError, match="head: no label"):
        survey(head(labelled=False), orientation="RAS", draws=10)
