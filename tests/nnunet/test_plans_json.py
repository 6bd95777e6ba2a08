"""plans.json and dataset.json with anything anywhere: a plan, or one line of a sensible length."""

from __future__ import annotations

import copy
import json
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from planner import plan as plan_records
from planner.plan import Plan
from strokenet.data.errors import InputError
from strokenet.nnunet.export import dataset_json, plans_json
from strokenet.nnunet.importing import import_nnunet
from strokenet.nnunet.plans import answer_notes, configuration_of, plan_from_json
from tests.nnunet.hostile import LONGEST, refused
from tests.nnunet.v2_folders import foreign_plan, old_form, residual_network, write_folder

NAME, SOURCE = "3d_fullres", Path("source")
Place = tuple[Any, ...]


def nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


ANYTHING: dict[str, Any] = {
    "none": None,
    "true": True,
    "minus-one": -1,
    "zero": 0,
    "half": 0.5,
    "large": 1e308,
    "infinite": float("inf"),
    "nan": float("nan"),
    "digits": 10**400,
    "minus-digits": -(10**400),
    "empty": "",
    "long": "x" * 10**6,
    "lines": "a\nb\x1b[2J",
    "surrogate": "\ud800",
    "list": [],
    "object": {},
    "long-key": {"x" * 10**5: 1},
    "lists": [[[[]]]],
    "deep": nested(900),
}
KEYS = ("", "x" * 10**5, "a\nb\ud800")


def files(form: str) -> dict[str, dict[str, Any]]:
    """A good plans.json and dataset.json. form: of the network."""
    plan = foreign_plan(**({"network": residual_network()} if form == "residual" else {}))
    stored = plans_json(plan)
    del stored["strokenet"]
    if form == "old":
        old_form(stored)
    return {"plans.json": json.loads(json.dumps(stored)), "dataset.json": dataset_json(plan)}


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Every container and leaf below, by its path."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*place, key)
        yield from places(inner, (*place, key))


def replaced(value: dict[str, Any], place: Place, new: Any, *, key: str | None = None) -> dict[str, Any]:
    """A copy with another value at one place, or with the value under another key."""
    found: Any = copy.deepcopy(value)
    at = found
    for step in place[:-1]:
        at = at[step]
    if key is None:
        at[place[-1]] = new
    else:
        at[key] = at.pop(place[-1])
    return dict(found)


def spoiled(good: dict[str, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    for place in places(good):
        for name, new in ANYTHING.items():
            yield (*place, name), replaced(good, place, new)
        for key in KEYS if isinstance(place[-1], str) else ():
            yield (*place, "key"), replaced(good, place, None, key=key)


def read(stored: dict[str, Any], description: dict[str, Any]) -> tuple[Plan, tuple[str, ...]]:
    plan = plan_from_json(stored, description, NAME, (0, 1, 2), SOURCE)
    return plan, answer_notes(stored, configuration_of(stored, NAME, SOURCE), SOURCE)


def fault(stored: dict[str, Any], description: dict[str, Any]) -> str:
    """What is wrong with the answer: an error of another kind or a line too long, a plan that cannot be kept."""
    try:
        plan, notes = read(stored, description)
    except InputError as error:
        return "" if str(error).isprintable() and len(str(error)) < LONGEST else f"{error!s:.100} ({len(str(error))})"
    except Exception as error:
        return f"{type(error).__name__}: {error!s:.100}"
    kept = json.dumps(plan_records.to_json(plan), allow_nan=False)
    if plan_records.from_json(json.loads(kept)) != plan:
        return "the plan is another one when it is read back"
    lines = [note for note in notes if not note.isprintable() or len(note) > LONGEST]
    return f"note {lines[0]!r:.100}" if lines else ""


@pytest.mark.parametrize("form", ["new", "old", "residual"])
@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
def test_anything_anywhere_is_a_plan_or_one_line(form: str, name: str) -> None:
    good = files(form)
    assert fault(*good.values()) == ""
    found = {}
    for place, changed in spoiled(good[name]):
        if wrong := fault(*{**good, name: changed}.values()):
            found["/".join(map(str, place))[:120]] = wrong
    assert not found, "\n".join(f"{place}: {wrong}" for place, wrong in found.items())


def test_anything_anywhere_is_imported_or_refused(tmp_path: Path) -> None:
    """The same through the files, for some of the places."""
    source = write_folder(tmp_path / "source")
    for name, good in files("new").items():
        changes = list(places(good))
        for seed in range(60):
            rng = random.Random(seed)
            changed = replaced(good, rng.choice(changes), rng.choice(list(ANYTHING.values())))
            (source / name).write_text(json.dumps(changed))
            try:
                import_nnunet(source, tmp_path / f"{name}-{seed}")
            except InputError:
                assert not (tmp_path / f"{name}-{seed}").exists()
        (source / name).write_text(json.dumps(good))


@pytest.mark.parametrize("depth", [900, 980, 985, 990, 995, 100_000])
@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
def test_lists_nested_to_pythons_limit_are_refused(tmp_path: Path, name: str, depth: int) -> None:
    source = write_folder(tmp_path / "source")
    text = (source / name).read_text()
    key = '"spacing": ' if name == "plans.json" else '"lesion": '
    assert key in text
    (source / name).write_text(text.replace(key, f'{key}{"[" * depth}{"]" * depth}, "other": '))
    refused(source, tmp_path, name)


UNPRINTABLE = ("a\nb", "a\u2028b", "\ud800", "a\x1b[31mb", "\u202egolb")
NAMES = [
    *(("dataset", name) for name in UNPRINTABLE),
    *((what, name) for what in ("channel", "label") for name in (*UNPRINTABLE, "", "   ")),
]


@pytest.mark.parametrize(("what", "name"), NAMES)
def test_names_that_cannot_be_printed_are_refused(tmp_path: Path, what: str, name: str) -> None:
    source, good = write_folder(tmp_path / "source"), files("new")
    if what == "dataset":
        good["plans.json"]["dataset_name"] = name
    elif what == "channel":
        good["dataset.json"]["channel_names"]["0"] = name
    else:
        good["dataset.json"]["labels"] = {"background": 0, name: 1}
    for file, value in good.items():
        (source / file).write_text(json.dumps(value))
    refused(source, tmp_path, "plans.json" if what == "dataset" else "dataset.json")


@pytest.mark.parametrize("base", ["x" * 10**4, [1] * 10**4])
def test_features_are_numbers_before_they_are_doubled(base: Any) -> None:
    """A text of 10 kB times 2^11, at the lowest level, would be 20 MB; one of a file's 64 MB would be 130 GB."""
    good = files("old")
    configuration = good["plans.json"]["configurations"][NAME]
    configuration["UNet_base_num_features"] = base
    configuration["unet_max_num_features"] = base[:0] + base[:1] * 2
    configuration["n_conv_per_stage_encoder"] = [2] * 12
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="plans.json"):
            read(*good.values())
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
