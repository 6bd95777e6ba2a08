"""Inference from files to files: bad cases among good ones, what is left on disk, and the Python calls."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from planner.plan import PostprocessRule
from strokenet.data.case import case_from_images
from strokenet.data.dataset import CaseFiles
from strokenet.data.errors import InputError
from strokenet.data.track import silent
from strokenet.infer import infer as station
from strokenet.infer.config import mask_rule, mirror_axes
from strokenet.infer.infer import InferConfig, infer, infer_folder, infer_one
from strokenet.infer.manifest import FOLDER
from strokenet.infer.predict import predict, predict_images
from strokenet.model.checkpoint import load_model, save_weights
from strokenet.workspace import Workspace
from tests.infer.models import head, known_model, known_plan, oblique, write_case, write_model, write_scan
from tests.plans import tiny_plan

DEFAULT = InferConfig()


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Cases a, b and c."""
    for seed, case in enumerate("abc"):
        write_case(tmp_path / "scans", case, seed)
    return tmp_path / "scans"


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def report(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "results.json").read_text())
    return content


def names(folder: Path) -> list[str]:
    """What lies in a folder, but for the manifests."""
    return sorted(path.name for path in folder.iterdir() if path.name != FOLDER)


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


def test_bad_cases_are_reported_and_the_others_go_on(model: Path, scans: Path, tmp_path: Path) -> None:
    write_case(scans, "d", 7)
    damage(scans / "b_0001.nii.gz")
    (scans / "d_0000.nii.gz").write_bytes(b"")
    results = infer_folder(model, scans, tmp_path / "out", DEFAULT)
    assert [(r.case, r.status) for r in results] == [("a", "ok"), ("b", "failed"), ("c", "ok"), ("d", "failed")]
    assert names(tmp_path / "out") == ["a.nii.gz", "c.nii.gz", "results.json"]
    for result in results:
        assert (result.error is None) == (result.status == "ok")
    assert results[1].error is not None
    assert "b_0001.nii.gz: corrupt" in results[1].error
    assert "\n" not in results[1].error


def test_results_json_holds_what_design_promises(model: Path, scans: Path, tmp_path: Path) -> None:
    damage(scans / "a_0000.nii.gz")
    infer_folder(model, scans, tmp_path / "out", DEFAULT)
    content = report(tmp_path / "out")
    assert content["model"] == "model"
    assert content["folds"] == ["0"]
    assert set(content["cases"][0]) == {
        *("case", "status", "error", "seconds", "lesion_volume_ml", "lesion_count", "channels", "folds", "agreement"),
        "kept",
    }
    bad, good = content["cases"][:2]
    assert (bad["lesion_volume_ml"], bad["lesion_count"]) == (None, None)
    mask = voxels(tmp_path / "out" / "b.nii.gz")
    assert good["lesion_volume_ml"] == pytest.approx(mask.sum() / 1000)
    assert (good["channels"], good["folds"], bad["folds"]) == (["T1", "FLAIR"], ["0"], [])
    assert good["seconds"] > 0
    assert str(tmp_path) not in json.dumps(good)


def test_the_files_equal_the_python_call(model: Path, scans: Path, tmp_path: Path) -> None:
    infer_folder(model, scans, tmp_path / "out", InferConfig(probabilities=True))
    images = {name: scans / f"a_{c:04d}.nii.gz" for c, name in enumerate(("T1", "FLAIR"))}
    found = predict_images(load_model(model), images, DEFAULT)
    assert 0 < found.mask.sum() < found.mask.size
    np.testing.assert_array_equal(voxels(tmp_path / "out" / "a.nii.gz"), found.mask_ijk)
    written = voxels(tmp_path / "out" / "probabilities" / "a.nii.gz")
    np.testing.assert_array_equal(written, found.probability[1].transpose(2, 1, 0))
    assert written.dtype == np.float32
    np.testing.assert_allclose(found.probability.sum(0), 1, atol=1e-6)


def test_paths_nibabel_images_and_arrays_give_one_answer(model: Path, scans: Path) -> None:
    loaded, paths = load_model(model), [scans / f"a_{c:04d}.nii.gz" for c in (0, 1)]
    images = [nibabel.load(path) for path in paths]
    arrays = [(np.asarray(image.dataobj), image.affine) for image in images]
    answers = [
        predict_images(loaded, {"flair": second, "t1": first}, DEFAULT)  # order and case of the names do not matter
        for first, second in (paths, images, arrays, (paths[0], arrays[1]))
    ]
    for answer in answers[1:]:
        np.testing.assert_array_equal(answer.mask, answers[0].mask)
        np.testing.assert_array_equal(answer.probability, answers[0].probability)


def test_a_case_in_memory_is_predicted_without_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    image = np.where(head() > 100, 10, np.minimum(head(), 1)).astype(np.float32)
    case = case_from_images("here", {"T1": (image, oblique())})
    found = predict(known_model(known_plan()), case, InferConfig())
    np.testing.assert_array_equal(found.mask_ijk, image == 10)
    assert not names(tmp_path)


def test_masks_lie_on_the_grid_of_the_first_scan(model: Path, tmp_path: Path) -> None:
    affine = oblique((0.9, 1.1, 1.7), degrees=27) @ np.diag([-1.0, 1, 1, 1])
    files = [write_scan(tmp_path / f"{name}.nii.gz", head(seed=s), affine) for s, name in enumerate(("t1", "flair"))]
    infer_one(model, dict(zip(("T1", "FLAIR"), files, strict=True)), tmp_path / "out", InferConfig(probabilities=True))
    given = nibabel.load(files[0])
    for path, dtype in ((tmp_path / "out/t1.nii.gz", "u1"), (tmp_path / "out/probabilities/t1.nii.gz", "f4")):
        image = nibabel.load(path)
        assert image.shape == given.shape
        assert image.get_data_dtype() == np.dtype(dtype)
        for field in ("pixdim", "xyzt_units", "qform_code", "sform_code", "srow_x", "srow_y", "srow_z"):
            np.testing.assert_array_equal(image.header[field], given.header[field], err_msg=field)
        for field in ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"):
            np.testing.assert_array_equal(image.header[field], given.header[field], err_msg=field)


def test_one_case_is_named_after_its_first_file_or_as_told(model: Path, scans: Path, tmp_path: Path) -> None:
    files = {"FLAIR": scans / "a_0001.nii.gz", "t1": scans / "a_0000.nii.gz"}
    infer_one(model, files, tmp_path / "out", DEFAULT)
    infer_one(model, files, tmp_path / "told", DEFAULT, case_id="patient 7")
    assert names(tmp_path / "out") == ["a.nii.gz", "results.json"]
    assert names(tmp_path / "told") == ["patient 7.nii.gz", "results.json"]
    with pytest.raises(InputError, match=r"case '\.\./x' holds a character that is not allowed"):
        infer_one(model, files, tmp_path / "out", DEFAULT, case_id="../x")


def test_missing_and_unknown_channels_are_named(model: Path, scans: Path, tmp_path: Path) -> None:
    t1 = scans / "a_0000.nii.gz"
    with pytest.raises(InputError, match="reads T1, FLAIR.*missing: FLAIR, unknown: none"):
        infer_one(model, {"T1": t1}, tmp_path / "out", DEFAULT)
    with pytest.raises(InputError, match="missing: FLAIR, unknown: DWI"):
        infer_one(model, {"T1": t1, "DWI": t1}, tmp_path / "out", DEFAULT)
    with pytest.raises(InputError, match="each once"):
        infer_one(model, {"T1": t1, "t1": t1, "FLAIR": t1}, tmp_path / "out", DEFAULT)
    assert not (tmp_path / "out").exists()


def test_a_case_without_one_of_its_channels_fails_alone(model: Path, scans: Path, tmp_path: Path) -> None:
    (scans / "b_0001.nii.gz").unlink()
    results = infer_folder(model, scans, tmp_path / "out", DEFAULT)
    assert [r.status for r in results] == ["ok", "failed", "ok"]
    assert "case b lacks FLAIR (b_0001.nii.gz); add it or leave the case out" in str(results[1].error)
    for case in "ac":
        (scans / f"{case}_0001.nii.gz").unlink()
    with pytest.raises(InputError, match="case a lacks FLAIR .*no case of the folder has the channels T1, FLAIR"):
        infer_folder(model, scans, tmp_path / "out", DEFAULT)


def test_a_channel_on_another_grid_fails_its_case_alone(model: Path, scans: Path, tmp_path: Path) -> None:
    affine = oblique()
    affine[0, 3] += 2
    write_scan(scans / "b_0001.nii.gz", head(), affine)
    results = infer_folder(model, scans, tmp_path / "out", DEFAULT)
    assert [r.status for r in results] == ["ok", "failed", "ok"]
    assert "2 mm away" in str(results[1].error)


def test_nothing_of_an_earlier_run_stays_under_the_name_of_a_failed_case(
    model: Path, scans: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    infer_folder(model, scans, out, InferConfig(probabilities=True))
    assert names(out / "probabilities") == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    (out / "other.nii.gz").write_bytes(b"of another case")
    damage(scans / "b_0000.nii.gz")
    infer_folder(model, scans, out, DEFAULT)
    assert names(out) == ["a.nii.gz", "c.nii.gz", "other.nii.gz", "probabilities", "results.json"]
    assert not names(out / "probabilities")


@pytest.mark.parametrize("link", ["same", "symlink"])
def test_an_output_never_replaces_an_input(model: Path, tmp_path: Path, link: str) -> None:
    folder, out = tmp_path / "scans", tmp_path / "out"
    first, second = write_case(folder, "a")
    before = first.read_bytes()
    if link == "same":
        out = folder
        case = "a_0000"
    else:
        out.mkdir()
        (out / "a.nii.gz").symlink_to(first)
        case = "a"
    with pytest.raises(InputError, match="a_0000.nii.gz: the output would replace this input; choose another -o"):
        infer_one(model, {"T1": first, "FLAIR": second}, out, DEFAULT, case_id=case)
    assert first.read_bytes() == before
    assert not (out / "results.json").exists()


def test_a_probability_map_never_replaces_an_input(model: Path, tmp_path: Path) -> None:
    first, second = write_case(tmp_path / "out" / "probabilities", "a")
    with pytest.raises(InputError, match="would replace this input"):
        infer_one(model, {"T1": first, "FLAIR": second}, tmp_path / "out", DEFAULT, case_id="a_0000")
    assert first.is_file()


def test_a_file_that_no_run_left_there_is_never_replaced(model: Path, scans: Path, tmp_path: Path) -> None:
    """`-o labelsTr` must not cost anyone their labels."""
    labels = tmp_path / "labelsTr"
    labels.mkdir()
    (labels / "b.nii.gz").write_bytes(b"an hour of an expert")
    with pytest.raises(InputError, match="b.nii.gz: is there, and results.json beside it names no such case"):
        infer_folder(model, scans, labels, DEFAULT)
    assert names(labels) == ["b.nii.gz"]
    assert (labels / "b.nii.gz").read_bytes() == b"an hour of an expert"
    with pytest.raises(InputError, match="holds the scans; give another folder"):
        infer_folder(model, scans, scans, DEFAULT)


def test_one_folder_filled_case_by_case_keeps_every_row(model: Path, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for case in "ab":
        files = {"T1": scans / f"{case}_0000.nii.gz", "FLAIR": scans / f"{case}_0001.nii.gz"}
        infer_one(model, files, out, DEFAULT)
    rows = json.loads((out / "results.json").read_text())["cases"]
    assert [(row["case"], row["status"]) for row in rows] == [("a", "ok"), ("b", "ok")]
    (out / "a.nii.gz").unlink()
    infer_one(model, files, out, DEFAULT)
    rows = json.loads((out / "results.json").read_text())["cases"]
    assert [row["case"] for row in rows] == ["b"]  # no row without its mask, none twice


def test_two_cases_of_one_name_are_refused(model: Path, scans: Path, tmp_path: Path) -> None:
    images = (scans / "a_0000.nii.gz", scans / "a_0001.nii.gz")
    twice = [CaseFiles(case_id=case, images=images, label=None) for case in ("P1", "p1")]
    with pytest.raises(InputError, match="case p1: 2 cases have this name"):
        infer(model, twice, tmp_path / "out", DEFAULT)
    with pytest.raises(InputError, match="no case"):
        infer(model, [], tmp_path / "out", DEFAULT)


def test_an_interruption_keeps_finished_masks_and_says_what_is_left(
    model: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    infer_folder(model, scans, out, DEFAULT)
    real = station.predict_case

    def interrupted(engine: Any, case: Any, *rest: Any) -> Any:
        if case.case_id == "b":
            raise KeyboardInterrupt
        return real(engine, case, *rest)

    monkeypatch.setattr(station, "predict_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        infer_folder(model, scans, out, replace(DEFAULT, recompute=True))
    assert names(out) == ["a.nii.gz", "results.json"]
    assert [(c["case"], c["status"]) for c in report(out)["cases"]] == [("a", "ok"), ("b", "skipped"), ("c", "skipped")]
    assert report(out)["cases"][2]["error"] == "not reached, the run was ended"


def test_results_json_is_up_to_date_after_every_case(
    model: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = station.predict_case, []

    def watching(engine: Any, case: Any, *rest: Any) -> Any:
        seen.append([row["status"] for row in report(tmp_path / "out")["cases"]])
        return real(engine, case, *rest)

    monkeypatch.setattr(station, "predict_case", watching)
    damage(scans / "a_0000.nii.gz")
    infer_folder(model, scans, tmp_path / "out", DEFAULT)
    assert seen == [["failed", "skipped", "skipped"], ["failed", "skipped", "skipped"]]  # b is written meanwhile


@pytest.mark.parametrize(
    "error", [AssertionError("ours"), KeyError("x"), MemoryError(), torch.OutOfMemoryError("full")]
)
def test_any_error_fails_its_case_alone(
    model: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    real = station.predict_case

    def failing(engine: Any, case: Any, *rest: Any) -> Any:
        if case.case_id == "b":
            raise error
        return real(engine, case, *rest)

    monkeypatch.setattr(station, "predict_case", failing)
    results = infer_folder(model, scans, tmp_path / "out", DEFAULT)
    assert [r.status for r in results] == ["ok", "failed", "ok"]
    assert str(results[1].error).startswith(type(error).__name__)


def test_a_disk_that_refuses_a_mask_fails_its_case_and_leaves_no_part_of_it(
    model: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from strokenet.infer import outputs

    real = outputs.write_mask

    def full(path: Path, *rest: Any) -> None:
        if path.name == "b.nii.gz":
            raise OSError(28, "No space left on device")
        real(path, *rest)

    monkeypatch.setattr(outputs, "write_mask", full)
    results = infer_folder(model, scans, tmp_path / "out", InferConfig(probabilities=True))
    assert [r.status for r in results] == ["ok", "failed", "ok"]
    assert "No space left" in str(results[1].error)
    assert results[1].lesion_count is None
    assert names(tmp_path / "out" / "probabilities") == ["a.nii.gz", "c.nii.gz"]
    assert report(tmp_path / "out")["cases"][1]["status"] == "failed"


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_case(
    model: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(station, "predict_case", lambda *_: pytest.fail("a case was computed"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be written .*; choose another -o"):
        infer_folder(model, scans, tmp_path / "file" / "out", DEFAULT)


def test_options_that_the_model_cannot_take_are_refused_before_the_first_case(
    model: Path, scans: Path, tmp_path: Path
) -> None:
    infer_folder(model, scans, tmp_path / "out", DEFAULT)
    before = names(tmp_path / "out")
    with pytest.raises(InputError, match="--tta full: training mirrored along"):
        infer_folder(model, scans, tmp_path / "out", InferConfig(tta="full"))
    with pytest.raises(InputError, match="no weights for fold 3; trained: 0"):
        infer_folder(model, scans, tmp_path / "out", InferConfig(folds=("3",)))
    with pytest.raises(InputError, match="--device 'abacus'"):
        infer_folder(model, scans, tmp_path / "out", InferConfig(device="abacus"))
    assert names(tmp_path / "out") == before  # nothing was taken away for a run that never began


@pytest.mark.parametrize(
    "wrong",
    [
        {"threshold": 1.0},
        {"threshold": float("nan")},
        {"min_volume_mm3": -1.0},
        {"min_volume_mm3": float("nan")},
        {"tta": "all"},
        {"postprocess": False, "threshold": 0.3},
    ],
)
def test_a_config_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="^--"):
        InferConfig(**wrong)


def test_the_config_replaces_the_plans_rule() -> None:
    plan = tiny_plan()
    assert mask_rule(plan, DEFAULT) == PostprocessRule(threshold=0.2, min_volume_mm3=4.0, connectivity=26)
    assert mask_rule(plan, InferConfig(threshold=0.5)) == PostprocessRule(threshold=0.5, min_volume_mm3=4.0)
    assert mask_rule(plan, InferConfig(min_volume_mm3=0)) == PostprocessRule(threshold=0.2)
    assert mask_rule(plan, InferConfig(postprocess=False)) == PostprocessRule()
    several = tiny_plan(labels={"background": 0, "core": 1, "rim": 2}, postprocess=PostprocessRule())
    with pytest.raises(InputError, match="one lesion label; this one has 2"):
        mask_rule(several, InferConfig(threshold=0.5))


def test_mirroring_never_exceeds_what_was_trained() -> None:
    assert mirror_axes(tiny_plan(mirror_axes=(2,)), "plan") == (2,)
    assert mirror_axes(tiny_plan(mirror_axes=()), "plan") == ()
    assert mirror_axes(tiny_plan(mirror_axes=(0, 1, 2)), "full") == (0, 1, 2)
    assert mirror_axes(tiny_plan(mirror_axes=(0, 1, 2)), "none") == ()
    with pytest.raises(InputError, match="use --tta plan"):
        mirror_axes(tiny_plan(mirror_axes=(0, 1)), "full")


def test_threshold_and_postprocess_change_the_mask_as_they_say(model: Path, scans: Path) -> None:
    loaded = load_model(model)
    images = {name: scans / f"a_{c:04d}.nii.gz" for c, name in enumerate(("T1", "FLAIR"))}
    plain = predict_images(loaded, images, InferConfig(postprocess=False))
    lesion = plain.probability[1]
    np.testing.assert_array_equal(plain.mask, lesion > 0.5)
    raised = predict_images(loaded, images, InferConfig(threshold=0.6, min_volume_mm3=0))
    np.testing.assert_array_equal(raised.mask, lesion > np.float32(0.6))
    assert predict_images(loaded, images, InferConfig(min_volume_mm3=1e6)).mask.sum() == 0


def test_folds_and_mirrors_are_averaged(tmp_path: Path, scans: Path) -> None:
    write_model(tmp_path / "model", tiny_plan(postprocess=PostprocessRule(threshold=0.5)), folds=("0", "1", "all"))
    images = {name: scans / f"a_{c:04d}.nii.gz" for c, name in enumerate(("T1", "FLAIR"))}

    def logit(folds: tuple[str, ...] | None, tta: Any = "none") -> np.ndarray:
        p = predict_images(load_model(tmp_path / "model", folds=folds), images, InferConfig(tta=tta)).probability[1]
        inside = p > 0
        return np.where(inside, np.log(np.where(inside, p, 1) / np.where(inside, 1 - p, 1)), 0)

    assert load_model(tmp_path / "model").folds == ("0", "1")
    first, second = logit(("0",)), logit(("1",))
    told = np.maximum(np.abs(first), np.abs(second)) < 9  # nearer to 1 a float32 probability is too coarse
    assert told.mean() > 0.99
    np.testing.assert_allclose(logit(None)[told], (first[told] + second[told]) / 2, atol=0.01)
    assert np.abs(first - logit(("all",))).max() > 0.1
    assert np.abs(logit(("0",), "plan") - logit(("0",))).max() > 0.1


def test_several_labels_give_one_mask_and_a_map_each(tmp_path: Path, scans: Path) -> None:
    labels = {"background": 0, "../core": 1, "rim": 2}
    write_model(tmp_path / "model", tiny_plan(labels=labels, postprocess=PostprocessRule()))
    infer_folder(tmp_path / "model", scans, tmp_path / "out", InferConfig(probabilities=True))
    maps = [voxels(tmp_path / "out/probabilities" / f"a_label{value}.nii.gz") for value in (1, 2)]
    np.testing.assert_array_equal(voxels(tmp_path / "out/a.nii.gz"), np.argmax([1 - maps[0] - maps[1], *maps], axis=0))
    assert len(names(tmp_path / "out/probabilities")) == 6


def test_an_answer_that_is_not_finite_is_an_error_and_no_empty_mask(model: Path, scans: Path, tmp_path: Path) -> None:
    weights = load_model(model).networks[0].state_dict()
    huge = {name: torch.full_like(tensor, 3e38) if "seg_layers" in name else tensor for name, tensor in weights.items()}
    save_weights(Workspace(model).fold("0").last, huge, note={})
    results = infer_folder(model, scans, tmp_path / "out", DEFAULT)
    assert {r.status for r in results} == {"failed"}
    assert "NaN or infinity" in str(results[0].error)
    assert names(tmp_path / "out") == ["results.json"]


def test_the_peak_is_told_before_it_is_taken(
    model: Path, scans: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strokenet.infer.memory.available_bytes", lambda: 1000)
    with caplog.at_level(logging.INFO, logger="strokenet"):
        infer_folder(model, scans, tmp_path / "out", DEFAULT, silent)
    told = [record.getMessage() for record in caplog.records]
    assert any("a: (16, 18, 20) voxels, about 0.0 GB at peak" in line for line in told)
    assert any("0.0 GB are free" in line for line in told)


def test_two_runs_write_equal_files(model: Path, scans: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        infer_folder(model, scans, tmp_path / out, InferConfig(probabilities=True))
    for name in ("a.nii.gz", os.path.join("probabilities", "c.nii.gz")):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_maps_of_a_model_with_other_labels_go_and_those_of_other_cases_stay(model: Path, tmp_path: Path) -> None:
    scans, out = tmp_path / "scans", tmp_path / "out"
    for seed, case in enumerate(("a", "a_label9")):
        write_case(scans, case, seed)
    infer_folder(model, scans, out, InferConfig(probabilities=True))
    for name in ("a_label1", "a_label2", "b_label1"):
        shutil.copyfile(out / "probabilities" / "a.nii.gz", out / "probabilities" / f"{name}.nii.gz")
    for path in scans.glob("a_label9*"):
        path.unlink()
    infer_folder(model, scans, out, DEFAULT)
    assert sorted(path.name for path in (out / "probabilities").iterdir()) == ["a_label9.nii.gz", "b_label1.nii.gz"]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc, which Linux has")
def test_a_hundred_cases_in_a_row_take_no_more_memory_than_twenty(model: Path, tmp_path: Path) -> None:
    """In a process of its own, whose memory nothing else moves."""
    for number in range(100):
        write_case(tmp_path / "scans", f"p{number:03d}", number)
    script = """
import sys
from pathlib import Path
from strokenet.infer import infer as station
from strokenet.infer.infer import InferConfig, infer_folder
from strokenet.memory import keep_freed_memory

keep_freed_memory()  # as the command does
pages, real = [], station.predict_case
def watching(*given):
    pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
    return real(*given)
station.predict_case = watching
model, scans, out = map(Path, sys.argv[1:])
results = infer_folder(model, scans, out, InferConfig(device="cpu"))
assert len(results) == 100 and all(result.status == "ok" for result in results)
print(pages[20], pages[-1])
"""
    words = [sys.executable, "-c", script, str(model), str(tmp_path / "scans"), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    early, late = (int(word) * os.sysconf("SC_PAGESIZE") / 2**20 for word in done.stdout.split())
    assert late - early < 8, f"{early:.0f} MiB after 20 cases, {late:.0f} MiB after 100"
