"""Models for any subset of their channels: what stands for an absent scan, and how far the channels agree."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from planner.plan import IntensityStats, Normalisation, NormaliseWhen, PostprocessRule
from strokenet.data.case import case_from_images
from strokenet.data.errors import InputError
from strokenet.data.geometry import AS_STORED, Geometry
from strokenet.infer.agreement import compare, confidence
from strokenet.infer.infer import InferConfig, infer_folder, infer_one
from strokenet.infer.predict import Prediction, completed, predict, predict_images
from strokenet.model.checkpoint import Model, load_model
from strokenet.preprocess.crop import Box
from strokenet.preprocess.normalise import blank_channels, normalise
from strokenet.preprocess.preprocess import Origin, preprocess
from tests.infer.models import head, known_model, known_plan, oblique, write_case, write_model, write_scan
from tests.plans import STATS, tiny_plan

FAR = IntensityStats(mean=40, std=9, min=0, max=99, median=40, percentile_00_5=5, percentile_99_5=90)
DEFAULT = InferConfig()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "model", dropout=0.5)
    return tmp_path / "model"


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """a has both channels, b T1 alone, c FLAIR alone."""
    for seed, case in enumerate("abc"):
        write_case(tmp_path / "scans", case, seed)
    (tmp_path / "scans" / "b_0001.nii.gz").unlink()
    (tmp_path / "scans" / "c_0000.nii.gz").unlink()
    return tmp_path / "scans"


def rows(out: Path) -> dict[str, dict[str, Any]]:
    return {row["case"]: row for row in json.loads((out / "results.json").read_text())["cases"]}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("when", get_args(NormaliseWhen))
@pytest.mark.parametrize("scheme", get_args(Normalisation))
def test_zeros_are_zero_after_every_scheme_but_ct(scheme: Normalisation, when: NormaliseWhen, masked: bool) -> None:
    """Beside a real channel, on any mask: what blank_channels says of one voxel holds of every voxel."""
    for mean in (FAR, STATS):
        plan = tiny_plan(
            normalisation=("zscore", scheme),
            use_mask_for_norm=(masked, masked),
            intensity=(STATS, mean),
            normalise=when,
        )
        image = np.stack([np.random.default_rng(0).normal(90, 9, (4, 5, 6)), np.zeros((4, 5, 6))]).astype(np.float32)
        inside = torch.from_numpy(np.random.default_rng(1).random((4, 5, 6)) < 0.5)
        stays = not normalise(torch.from_numpy(image), inside, plan)[1].any()
        assert stays == (scheme != "ct" or mean is STATS)
        assert ("FLAIR" in blank_channels(plan)) == stays


def test_an_absent_channel_is_zero_for_the_network_and_leaves_the_crop(model: Path) -> None:
    loaded = load_model(model)
    case = case_from_images("x", {"FLAIR": (head(), oblique())})
    whole = completed(case, loaded)
    assert whole.channels == ("T1", "FLAIR")
    prepared = preprocess(whole, loaded.plan)
    assert not prepared.image[0].any()
    assert prepared.image[1].any()
    inside = np.argwhere(case.image[0] != 0)
    turn = prepared.origin.turn
    grid = np.argwhere(np.asarray(turn.apply(case.image))[0] != 0)
    assert prepared.origin.box.start == tuple(grid.min(0))
    assert prepared.origin.box.stop == tuple(grid.max(0) + 1)
    assert len(inside) < case.image.size  # there is a border to crop


def test_a_channel_that_zeros_cannot_stand_for_is_asked_for(model: Path) -> None:
    plan = tiny_plan(channels=("T1", "CT"), normalisation=("zscore", "ct"), intensity=(STATS, FAR))
    loaded = replace(load_model(model), plan=plan)
    with pytest.raises(InputError, match="x: lacks CT, which this model cannot do without") as caught:
        predict(loaded, case_from_images("x", {"T1": (head(), oblique())}), DEFAULT)
    assert "\n" not in str(caught.value)


def test_cases_that_lack_channels_are_segmented_and_say_so(model: Path, scans: Path, tmp_path: Path) -> None:
    results = infer_folder(model, scans, tmp_path / "out", DEFAULT)
    assert [(r.case, r.status, r.channels) for r in results] == [
        *(("a", "ok", ("T1", "FLAIR")), ("b", "ok", ("T1",)), ("c", "ok", ("FLAIR",)))
    ]
    written = rows(tmp_path / "out")
    assert [written[case]["channels"] for case in "abc"] == [["T1", "FLAIR"], ["T1"], ["FLAIR"]]
    assert [written[case]["agreement"] is None for case in "abc"] == [False, True, True]


def test_one_case_and_the_python_call_take_either_channel(model: Path, scans: Path, tmp_path: Path) -> None:
    (row,) = infer_one(model, {"flair": scans / "c_0001.nii.gz"}, tmp_path / "out", DEFAULT, case_id="c")
    assert (row.status, row.channels) == ("ok", ("FLAIR",))
    found = predict_images(load_model(model), {"FLAIR": scans / "c_0001.nii.gz"}, DEFAULT)
    assert row.lesion_volume_ml == pytest.approx(found.mask.sum() / 1000)
    with pytest.raises(InputError, match="reads T1, FLAIR, one or more of them; given: none"):
        infer_one(model, {}, tmp_path / "out", DEFAULT)
    with pytest.raises(InputError, match="unknown: DWI"):
        infer_one(model, {"t1": scans / "b_0000.nii.gz", "DWI": scans / "b_0000.nii.gz"}, tmp_path / "out", DEFAULT)


def test_a_model_without_dropout_refuses_them_as_before(scans: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "plain")
    whole, *lacking = infer_folder(tmp_path / "plain", scans, tmp_path / "out", DEFAULT)
    assert (whole.status, whole.agreement) == ("ok", None)
    assert [r.status for r in lacking] == ["failed", "failed"]
    assert "case b lacks FLAIR (b_0001.nii.gz)" in str(lacking[0].error)
    with pytest.raises(InputError, match="missing: FLAIR"):
        infer_one(tmp_path / "plain", {"T1": scans / "b_0000.nii.gz"}, tmp_path / "out", DEFAULT)
    with pytest.raises(InputError, match="missing: T1"):
        predict_images(load_model(tmp_path / "plain"), {"FLAIR": scans / "c_0001.nii.gz"}, DEFAULT)


def test_each_channel_alone_is_what_infer_gives_for_its_scan(model: Path, scans: Path, tmp_path: Path) -> None:
    """Also with another crop than both have together: the T1 shows half of the head here."""
    half = head(seed=3)
    half[:10] = 0
    write_scan(scans / "a_0000.nii.gz", half)
    infer_folder(model, scans, tmp_path / "out", DEFAULT)
    row, loaded = rows(tmp_path / "out")["a"], load_model(model)
    masks = {}
    for n, name in enumerate(("T1", "FLAIR")):
        alone = predict_images(loaded, {name: scans / f"a_{n:04d}.nii.gz"}, DEFAULT)
        masks[name] = alone.mask > 0
        said = row["agreement"]["alone"][name]
        assert said["lesion_volume_ml"] == pytest.approx(masks[name].sum() / 1000)
        assert said["confidence"] == pytest.approx(float(alone.probability[1][masks[name]].mean()), abs=1e-5)
    both = predict_images(loaded, {n: scans / f"a_{c:04d}.nii.gz" for c, n in enumerate(masks)}, DEFAULT).mask > 0
    assert row["lesion_volume_ml"] == pytest.approx(both.sum() / 1000)  # the written mask is that of all channels
    for name, mask in masks.items():
        dice = 2 * (mask & both).sum() / (mask.sum() + both.sum())
        assert row["agreement"]["alone"][name]["dice"] == pytest.approx(dice)


def test_no_agreement_saves_its_inferences(
    model: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("asked a channel alone")

    monkeypatch.setattr("strokenet.infer.agreement.predict_case", never)
    rows = infer_folder(model, scans, tmp_path / "out", InferConfig(agreement=False))
    assert [(r.status, r.agreement) for r in rows] == [("ok", None)] * 3


def test_an_error_of_the_comparison_does_not_cost_the_mask(
    model: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks(*_: object, **__: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("strokenet.infer.agreement.predict_case", breaks)
    rows = infer_folder(model, scans, tmp_path / "out", DEFAULT)
    assert [(r.status, r.agreement) for r in rows] == [("ok", None)] * 3
    assert (tmp_path / "out" / "a.nii.gz").is_file()
    assert "a: its channels were not compared: MemoryError: no room" in caplog.text


def made(probability: list[float], threshold: float = 0.5) -> Prediction:
    lesion = np.array(probability, np.float32).reshape(1, 1, -1)
    shape = (1, 1, len(probability))
    origin = Origin(
        geometry=Geometry(shape=shape, spacing=(1.0, 1.0, 1.0), affine=np.eye(4)),
        turn=AS_STORED,
        box=Box(start=(0, 0, 0), stop=shape),
    )
    cropped = torch.from_numpy(np.stack([1 - lesion, lesion]))
    return Prediction(mask=(lesion > threshold).astype(np.uint8), lesion_sizes=(), cropped=cropped, origin=origin)


def test_agreement_by_hand() -> None:
    """Of 2000 mm3 voxels: all find 3 (mean .7), T1 two of them (.9), FLAIR one of them and another (.6), DWI none."""
    alone = {
        "T1": made([0.9, 0.9, 0.1, 0.1]),
        "FLAIR": made([0.1, 0.1, 0.6, 0.6]),
        "DWI": made([0.4, 0.4, 0.4, 0.4]),
    }
    said = compare(made([0.7, 0.8, 0.6, 0.2]), alone.items(), 2000.0)
    assert said.confidence == pytest.approx(0.7)
    assert [one.dice for one in said.alone.values()] == pytest.approx([4 / 5, 2 / 5, 0.0])
    assert [one.lesion_volume_ml for one in said.alone.values()] == pytest.approx([4.0, 4.0, 0.0])
    assert said.alone["T1"].confidence == pytest.approx(0.9)
    assert said.alone["FLAIR"].confidence == pytest.approx(0.6)
    assert said.alone["DWI"].confidence is None
    assert said.surer_alone == ("T1",)


def test_empty_masks_agree_and_have_no_confidence() -> None:
    nothing, lesion = made([0.1, 0.2]), made([0.6, 0.2])
    assert confidence(nothing) is None
    said = compare(nothing, {"T1": nothing, "FLAIR": lesion}.items(), 1.0)
    assert [one.dice for one in said.alone.values()] == [1.0, 0.0]
    assert said.surer_alone == ("FLAIR",)  # it finds a lesion that all together lose
    assert compare(lesion, {"T1": nothing, "FLAIR": lesion}.items(), 1.0).surer_alone == ()


def test_the_common_field_is_that_of_the_given_channels() -> None:
    """The zeros of an absent channel are no field of view: they would empty every mask."""
    plan = known_plan(
        channels=("T1", "FLAIR"),
        normalisation=("none", "none"),
        use_mask_for_norm=(False, False),
        intensity=(STATS, STATS),
        postprocess=PostprocessRule(threshold=0.5, common_field=True),
    )
    known: Model = replace(known_model(plan), modality_dropout=0.5)
    image = np.where(head() > 100, 10, np.minimum(head(), 1)).astype(np.float32)
    found = predict(known, case_from_images("x", {"T1": (image, oblique())}), DEFAULT)
    np.testing.assert_array_equal(found.mask_ijk, image == 10)
