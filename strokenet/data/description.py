"""dataset.json: the channels, labels and file ending that nnU-Net's description of a dataset declares.

Comes in: the values of a dataset.json, of a raw dataset or beside a trained model. Goes out: checked names and numbers.
What is not built yet (regions, an ignore label, other file formats) is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strokenet.data.errors import InputError

ENDINGS = (".nii.gz", ".nii")
MAX_CHANNELS = 64
MAX_LABELS = 256  # masks are written as uint8


def json_object(value: Any, where: str) -> dict[str, Any]:
    """`value` when it is a JSON object, else InputError."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: a JSON object is needed, got {type(value).__name__}; write {{...}}")
    return value


def file_ending(description: Mapping[str, Any], where: Path) -> str:
    """The declared ending of images and labels; InputError for any but NIfTI's."""
    ending = description.get("file_ending")
    if ending not in ENDINGS:
        raise InputError(
            f"{where}: file_ending is {ending!r:.40}; allowed: {', '.join(ENDINGS)} (2d images and other formats are "
            "not supported, convert them to NIfTI)"
        )
    return str(ending)


def channel_names(description: Mapping[str, Any], where: Path) -> tuple[str, ...]:
    """Names in the order of the file, as nnU-Net reads them; keys 0, 1 ... must ascend, else InputError.

    Two that differ in case alone are one name: files are matched to them without regard to case.
    """
    channels = listed_channels(description, where)
    if told_apart(channels) != channels:
        raise InputError(f"{where}: channel_names {list(channels)!s:.80} holds a name twice; give each channel its own")
    return channels


def told_apart(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names, each with its number ("MRI 0", "MRI 1") where two of them are one."""
    if len({name.casefold() for name in names}) == len(names):
        return names
    return tuple(f"{name} {number}" for number, name in enumerate(names))


def listed_channels(description: Mapping[str, Any], where: Path) -> tuple[str, ...]:
    """Names as `channel_names` gives them, but a name may be there twice: nnU-Net never looks at it."""
    names = description.get("channel_names", description.get("modality"))
    if not isinstance(names, dict) or not 1 <= len(names) <= MAX_CHANNELS:
        raise InputError(f'{where}: channel_names is missing or empty; write {{"0": "T1", "1": "FLAIR"}}')
    if [str(key) for key in names] != [str(index) for index in range(len(names))]:
        raise InputError(f"{where}: channel_names has the keys {list(names)!s:.80}; number them from 0 in order")
    channels = tuple(names.values())
    if not all(isinstance(name, str) and name.strip() and name.isprintable() for name in channels):
        raise InputError(f"{where}: channel_names {list(channels)!s:.80}; give each channel a name of printable text")
    return channels


def label_values(description: Mapping[str, Any], where: Path) -> dict[str, int]:
    """Name -> value, background 0 included; a list of one value is that value (nnU-Net's rule), of more a region.

    Raises:
        InputError: regions, an ignore label, no background, or values that are not consecutive.
    """
    labels = json_object(description.get("labels"), f"{where}: labels")
    labels = {name: v[0] if isinstance(v, list) and len(v) == 1 else v for name, v in labels.items()}
    for name, value in labels.items():
        if isinstance(value, list):
            raise InputError(
                f"{where}: label {name!r:.80} is a region {value!s:.80}; regions are not supported yet, nor models "
                "of them; give each label one value"
            )
        if not name.strip() or not name.isprintable():
            raise InputError(f"{where}: label {name!r:.80}; give each label a name of printable text")
        if name == "ignore":
            raise InputError(f"{where}: an ignore label is not supported yet; remove it or its voxels")
        number = isinstance(value, int) or (isinstance(value, str) and value.isdecimal() and len(value) < 9)
        if isinstance(value, bool) or not number:
            raise InputError(f'{where}: label {name!r:.80} is {value!r:.80}; write a whole number, as in "lesion": 1')
    numbers = {str(name): int(value) for name, value in labels.items()}
    if numbers.get("background") != 0:
        raise InputError(f'{where}: labels need "background": 0; give all that is no other label this value')
    if len(numbers) > MAX_LABELS:
        raise InputError(f"{where}: {len(numbers)} labels; allowed: {MAX_LABELS} with the background, merge some")
    if len(numbers) < 2 or sorted(numbers.values()) != list(range(len(numbers))):
        raise InputError(
            f"{where}: label values {sorted(numbers.values())!s:.80}; number them from 0 without a gap, two or more"
        )
    return numbers
