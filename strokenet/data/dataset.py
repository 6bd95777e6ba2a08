"""Dataset: which files belong to which case, and which cases train together.

Comes in: an nnU-Net v2 raw folder (dataset.json, imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz). Goes out: a Dataset
of checked names and paths, and the folds. A dataset.json may come from a stranger: no path in it leaves the folder.
What is not built yet (regions, an ignore label, 2d images) is refused by name.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from strokenet.data.description import ENDINGS, channel_names, file_ending, json_object, label_values
from strokenet.data.errors import InputError
from strokenet.data.files import read_json, safe_name

_IMAGE = re.compile(r"(?P<case>.+)_(?P<channel>[0-9]{4})", re.DOTALL)  # a line break is refused, not passed over
_log = logging.getLogger("strokenet")


@dataclass(frozen=True, kw_only=True)
class CaseFiles:
    """The files of one case. images: in channel order. label: None where there is none.

    channels: names of the images, where a case to segment lacks some of the model's; empty where all are there.
    problem: why the case cannot be read, in one line; None where nothing is known against it.
    """

    case_id: str
    images: tuple[Path, ...]
    label: Path | None
    problem: str | None = None
    channels: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A raw dataset. channels: names in input order. labels: name -> value, background 0 included."""

    root: Path
    name: str
    channels: tuple[str, ...]
    labels: dict[str, int]
    file_ending: str
    cases: tuple[CaseFiles, ...]


def read_dataset(root: Path) -> Dataset:
    """The dataset of an nnU-Net v2 raw folder; no scan is opened.

    Raises:
        InputError: dataset.json is missing or wrong, a case lacks a channel or its label, or there is no case.
    """
    where = root / "dataset.json"
    if not root.is_dir():
        raise InputError(f"{root}: is no folder; give an nnU-Net raw dataset (dataset.json, imagesTr, labelsTr)")
    if not where.exists():
        raise InputError(
            f"{where}: not found; a raw dataset contains dataset.json, imagesTr (CASE_0000.nii.gz ...) and labelsTr "
            "(CASE.nii.gz)"
        )
    description = json_object(read_json(where), str(where))
    ending = file_ending(description, where)
    channels = channel_names(description, where)
    if "dataset" in description:
        cases = _listed_cases(root, description["dataset"], len(channels), where)
    else:
        cases = _found_cases(root, channels, ending)
    _compare_count(description, len(cases), where)
    return Dataset(
        root=root,
        name=safe_name(root.resolve().name, "dataset"),
        channels=channels,
        labels=label_values(description, where),
        file_ending=ending,
        cases=cases,
    )


def input_cases(folder: Path, channels: Sequence[str], *, subsets: bool = False) -> tuple[CaseFiles, ...]:
    """The cases of a folder of scans CASE_0000.nii.gz, CASE_0001.nii.gz ... (or .nii), without labels.

    A case that lacks a channel or has one too many carries that as its problem; the others can still be segmented.
    Files are numbered as the dataset.json beside the folder says, where there is one that names channels of the model:
    `strokenet prepare` gives a cohort of FLAIR alone the number 0000. Else by the model's own numbers.

    Args:
        channels: the model's. subsets: any of them will do (a model trained with modality dropout).

    Raises:
        InputError: no scan is there, no case has the channels, or two files make one case's channel.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder; give a folder of CASE_0000.nii.gz files")
    found = _images(folder, ENDINGS)
    below = next((folder / name for name in ("imagesTs", "imagesTr") if (folder / name).is_dir()), None)
    if not found and below is not None:
        raise InputError(f"{folder}: is a raw dataset and holds no scans itself; give {below}")
    if not found:
        raise InputError(_nothing_found(folder, "CASE_0000.nii.gz"))
    images, number_of = _renumbered(folder, found, channels)
    cases = tuple(
        _input_case(folder, case_id, images[case_id], channels, number_of, subsets) for case_id in sorted(images)
    )
    if all(case.problem for case in cases):
        raise InputError(f"{cases[0].problem}; no case of the folder has the channels {', '.join(channels)}")
    return cases


def to_json(dataset: Dataset, relative_to: Path) -> dict[str, Any]:
    """The dataset as plain JSON values; its root is stored relative to the workspace, so that both can move."""
    root = dataset.root.resolve()
    return {
        "root": Path(os.path.relpath(root, relative_to.resolve())).as_posix(),
        "name": dataset.name,
        "channels": list(dataset.channels),
        "labels": dataset.labels,
        "file_ending": dataset.file_ending,
        "cases": [
            {
                "case": case.case_id,
                "images": [_below(path, dataset.root) for path in case.images],
                "label": None if case.label is None else _below(case.label, dataset.root),
            }
            for case in dataset.cases
        ],
    }


def from_json(value: Any, relative_to: Path) -> Dataset:
    """The dataset of a workspace's dataset.json.

    Raises:
        InputError: it was not written by to_json, or names a path outside its root.
    """
    where = "dataset.json of the workspace"
    fields = json_object(value, where)
    try:
        root = Path(os.path.normpath(relative_to.resolve() / fields["root"]))
        channels = tuple(str(name) for name in fields["channels"])
        return Dataset(
            root=root,
            name=safe_name(fields["name"], "dataset"),
            channels=channels,
            labels=label_values(fields, Path(where)),
            file_ending=file_ending(fields, Path(where)),
            cases=tuple(_case_from_json(root, case, len(channels), where) for case in fields["cases"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: cannot be read ({error}); run `strokenet plan` again") from None


def _case_from_json(root: Path, fields: Any, channels: int, where: str) -> CaseFiles:
    images, label = fields["images"], fields["label"]
    if not isinstance(images, list) or len(images) != channels:
        raise InputError(f"{where}: a case has not {channels} images, one a channel; run `strokenet plan` again")
    return CaseFiles(
        case_id=safe_name(fields["case"], "case"),
        images=tuple(_inside(root, path, where) for path in images),
        label=None if label is None else _inside(root, label, where),
    )


def _compare_count(description: Mapping[str, Any], found: int, where: Path) -> None:
    declared = description.get("numTraining")
    if declared is not None and declared != found:
        _log.warning("%s: numTraining is %s, %d cases were found; all of them are used", where, declared, found)


def _listed_cases(root: Path, listed: Any, channels: int, where: Path) -> tuple[CaseFiles, ...]:
    """The cases of the `dataset` key: {case: {"images": [...], "label": ...}}, paths relative to the folder."""
    cases = []
    for case_id, files in sorted(json_object(listed, f"{where}: dataset").items()):
        safe_name(case_id, f"{where}: case")
        images = json_object(files, f"{where}: dataset {case_id}").get("images")
        label = files.get("label")
        if not isinstance(images, list) or len(images) != channels or not isinstance(label, str):
            raise InputError(
                f"{where}: case {case_id} needs {channels} images (one a channel) and a label; complete it"
            )
        paths = [_inside(root, path, f"{where}: case {case_id}") for path in (*images, label)]
        for path in paths:
            if not path.is_file():
                raise InputError(f"{path}: not found, case {case_id} names it; correct dataset.json")
            # a link that the user put into imagesTr is followed; a file that a stranger's dataset.json names is not
            if not path.resolve().is_relative_to(root.resolve()):
                raise InputError(f"{path}: is a link out of the dataset, case {case_id} names it; copy the file there")
        cases.append(CaseFiles(case_id=case_id, images=tuple(paths[:-1]), label=paths[-1]))
    if not cases:
        raise InputError(f"{where}: dataset names no case; list the cases or leave the key out")
    return tuple(cases)


def _found_cases(root: Path, channels: Sequence[str], ending: str) -> tuple[CaseFiles, ...]:
    """The cases of imagesTr, each with its label in labelsTr."""
    images_folder, labels_folder = root / "imagesTr", root / "labelsTr"
    for folder in (images_folder, labels_folder):
        if not folder.is_dir():
            raise InputError(f"{folder}: not found; an nnU-Net raw dataset has imagesTr and labelsTr")
    found = _images(images_folder, (ending,))
    if not found:
        raise InputError(_nothing_found(images_folder, f"CASE_0000{ending}"))
    cases = []
    for case_id, images in sorted(found.items()):
        label = labels_folder / f"{case_id}{ending}"
        if not label.is_file():
            raise InputError(f"{label}: not found; add the label or leave {case_id} out of imagesTr")
        cases.append(
            CaseFiles(case_id=case_id, images=_in_order(images_folder, case_id, images, channels), label=label)
        )
    spare = {p.name.removesuffix(ending) for p in labels_folder.glob(f"*{ending}")} - set(found)
    if spare:
        _log.warning("%s: %d labels without images are not used, first %r", labels_folder, len(spare), min(spare))
    return tuple(cases)


def _images(folder: Path, endings: tuple[str, ...]) -> dict[str, dict[int, Path]]:
    """case id -> channel number -> file. Hidden files, folders and (with a warning) other scans are passed over."""
    found: dict[str, dict[int, Path]] = defaultdict(dict)
    nameless: list[str] = []
    for path in sorted(folder.iterdir()):
        ending = next((e for e in endings if path.name.endswith(e)), None)
        if ending is None or path.name.startswith(".") or path.is_dir():
            continue
        match = _IMAGE.fullmatch(path.name.removesuffix(ending))
        if match is None:
            nameless.append(path.name)
            continue
        case_id, channel = safe_name(match["case"], f"{folder}: case"), int(match["channel"])
        if channel in found[case_id]:
            raise InputError(f"{path}: {found[case_id][channel].name} is the same channel; keep one of them")
        found[case_id][channel] = path
    if found and nameless:
        _log.warning(
            "%s: %d scans have no channel number (_0000) and are not used, first %r", folder, len(nameless), nameless[0]
        )
    return found


_Images = Mapping[str, Mapping[int, Path]]


def _renumbered(folder: Path, found: _Images, channels: Sequence[str]) -> tuple[_Images, dict[str, int] | None]:
    """The images by the model's numbers, and its channels with the numbers of their files; None where these are one.

    A channel whose number nobody knows has none, and files of channels that the model does not read are passed over.
    Where neither side has all the names of the other, they say nothing of the order: the numbers are taken as they are,
    with a warning.
    """
    ours = {name.casefold(): number for number, name in enumerate(channels)}
    named = _named_beside(folder)
    if named is None or [name.casefold() for name in named] == list(ours):
        return found, None
    theirs = {name.casefold() for name in named}
    if not (theirs <= set(ours) or theirs >= set(ours)):
        _log.warning(
            "%s: dataset.json beside it names the channels %s, the model %s; files are taken by their numbers",
            *(folder, ", ".join(named), ", ".join(channels)),
        )
        return found, None
    to_ours = {number: ours[name.casefold()] for number, name in enumerate(named) if name.casefold() in ours}
    spare = set(range(len(named))) - set(to_ours)
    beyond = len(channels)  # a number that dataset.json does not have stays one too many
    images = {
        case: {to_ours.get(n, beyond + n): path for n, path in of.items() if n not in spare}
        for case, of in found.items()
        if set(of) - spare
    }
    if not images:
        raise InputError(
            f"{folder}: no case has any of the channels {', '.join(channels)}; there are {', '.join(named)}"
        )
    return images, {channels[there]: number for number, there in to_ours.items()}


def _named_beside(folder: Path) -> tuple[str, ...] | None:
    """The channels of the dataset whose imagesTs or imagesTr a folder is; None where no dataset.json names them."""
    where = folder.resolve().parent / "dataset.json"
    if not folder.resolve().name.startswith("images") or not where.is_file():
        return None
    try:
        return channel_names(json_object(read_json(where), str(where)), where)
    except InputError as error:
        _log.warning("%s; the files of %s are taken by their numbers", error, folder)
        return None


def _input_case(
    folder: Path,
    case_id: str,
    images: Mapping[int, Path],
    channels: Sequence[str],
    number_of: Mapping[str, int] | None,
    subsets: bool,
) -> CaseFiles:
    given = tuple(name for n, name in enumerate(channels) if n in images)
    problem = None
    try:
        _in_order(folder, case_id, images, channels, number_of, subsets=subsets and bool(given))
    except InputError as error:
        problem = str(error)
    return CaseFiles(
        case_id=case_id,
        images=tuple(images[channel] for channel in sorted(images)),
        label=None,
        problem=problem,
        channels=given if problem is None and len(given) < len(channels) else (),
    )


def _in_order(
    folder: Path,
    case_id: str,
    images: Mapping[int, Path],
    channels: Sequence[str],
    number_of: Mapping[str, int] | None = None,
    *,
    subsets: bool = False,
) -> tuple[Path, ...]:
    """The files of a case in the order of the channels. number_of: channel -> number of its file; None: in order."""
    present = min(images.values()).name
    ending = next(e for e in ENDINGS if present.endswith(e))
    numbers = number_of or {name: number for number, name in enumerate(channels)}
    missing = [
        f"{name} ({case_id}_{numbers[name]:04d}{ending})" if name in numbers else name
        for n, name in enumerate(channels)
        if n not in images
    ]
    if missing and not subsets:
        raise InputError(f"{folder}: case {case_id} lacks {', '.join(missing)}; add it or leave the case out")
    spare = [images[n].name for n in sorted(images) if n >= len(channels)]
    if spare:
        raise InputError(
            f"{folder}: case {case_id} has {', '.join(spare)} beyond its {len(channels)} channels "
            f"({', '.join(channels)}); remove it"
        )
    return tuple(images[n] for n in range(len(channels)) if n in images)


def _nothing_found(folder: Path, pattern: str) -> str:
    names = [path.name for path in folder.iterdir()]
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
    there = f"there are {len(names)} other files such as {', '.join(near)}" if names else "the folder is empty"
    return f"{folder}: no file like {pattern} (four digits for the channel); {there}; rename them"


def _inside(root: Path, path: Any, where: str) -> Path:
    """root / path, refused where it is absolute, climbs out, or holds control characters."""
    pure = PurePosixPath(path if isinstance(path, str) else "")
    unsafe = pure.is_absolute() or ".." in pure.parts or any(c in str(pure) for c in "\\:") or not pure.parts
    if unsafe or not str(pure).isprintable():
        raise InputError(f"{where}: path {path!r}; a path below the dataset's folder is needed, without '..'")
    return root / Path(*pure.parts)


def _below(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()
