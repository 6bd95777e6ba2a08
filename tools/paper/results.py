"""Results: the whole protocol as one call, and its numbers as JSON values.

Comes in: a Protocol and a Clock. Goes out: OUT/results.json and OUT/figures. OUT/paper.json, written first, says what
OUT holds, so that no run goes on in the folder of another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.measure import machine
from strokenet import __version__
from strokenet.data.errors import InputError
from strokenet.data.files import read_json, write_json
from tools.paper import table
from tools.paper.figures import draw_figures
from tools.paper.protocol import Protocol, stages
from tools.paper.scales import SCALES
from tools.paper.stages import Clock, StageResult, run_stages

CODE = ("strokenet", "planner", "kernels", "tools/paper")
DISTRIBUTIONS = ("torch", "numpy", "scipy", "nibabel", "SimpleITK", "deepbet")


def reproduce(protocol: Protocol, clock: Clock) -> dict[str, Any]:
    """Runs what is left to do; the content of OUT/results.json.

    Raises:
        Stopped: the time is up, or a signal came. InputError: OUT holds another run, or a station refuses its input.
    """
    _begin(protocol)
    done = run_stages(stages(protocol), protocol.out / "marks", clock)
    found = results(protocol, done)
    write_json(protocol.out / "results.json", found)
    draw_figures(protocol, done, found["dice"])
    return found


def results(protocol: Protocol, done: dict[str, StageResult]) -> dict[str, Any]:
    """All numbers as JSON values: of every test by case, what is computed from them, and what they were made on."""
    dice = {name.removeprefix("test_"): r.facts["dice"] for name, r in done.items() if name.startswith("test_")}
    splits = {name: done[f"plan_{name}"].facts for name in ("t1", "t1_flair")}
    validation = splits["t1_flair"]["validation"]
    return {
        **_asked(protocol),
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": {name: version(name) for name in DISTRIBUTIONS},
        "seconds": {name: round(result.seconds, 1) for name, result in done.items()},
        "cohorts": {name: done[name].facts for name in ("atlas", "clinic")},
        "prepared": done["prepare"].facts,
        "adapted": done["adapt"].facts,
        "plans": splits,
        "steps": {name: result.facts["steps"] for name, result in done.items() if "steps" in result.facts},
        "last_epoch": {name: r.facts["history"][-1] for name, r in done.items() if "history" in r.facts},
        "validation": validation,
        "dice": dice,
        "table_2": [asdict(line) for line in table.table_2(dice, validation)],
        "boxes": {n: dict(zip(table.STATISTICS, v, strict=True)) for n, v in table.boxes(dice, validation).items()},
        "difference": table.difference(dice["T1+FLAIR"], dice["T1"], validation),
        "shapes": [asdict(shape) for shape in table.shapes(dice, validation)],
    }


def keep(path: Path, found: dict[str, Any]) -> None:
    """The numbers of one scale in a file that keeps those of the others."""
    kept = read_json(path)["scales"] if path.is_file() else {}
    kept[found["scale"]["name"]] = found
    write_json(path, {"scales": {name: kept[name] for name in SCALES if name in kept}})


def _asked(protocol: Protocol) -> dict[str, Any]:
    """What the numbers depend on; folders by their names, for where they lay is nobody's business, and their files."""
    given = {"label_maps": protocol.label_maps, "lesions": protocol.lesions}
    files = {f"files_of_{name}": None if folder is None else _digest_of_sizes(folder) for name, folder in given.items()}
    return {
        "scale": {**asdict(protocol.scale), "prepare": protocol.scale.prepare.to_json()},
        "seed": protocol.seed,
        **{name: None if folder is None else folder.resolve().name for name, folder in given.items()},
        **files,
        "version": __version__,
        "code": _digest_of_code(),
    }


def _digest_of_sizes(folder: Path) -> str:
    """Names and sizes of a folder's files: another set of them, or one that was replaced, is another."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return _digest(f"{path.relative_to(folder)} {path.stat().st_size}" for path in files)


def _digest_of_code() -> str:
    """Every source that a stage runs: stages of two versions of it are not one experiment."""
    root = Path(__file__).resolve().parents[2]
    files = sorted(path for room in CODE for path in (root / room).rglob("*.py"))
    return _digest(f"{path.relative_to(root)} {path.read_text()}" for path in files)


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _begin(protocol: Protocol) -> None:
    """OUT/paper.json, written first, says what OUT holds; another run in it is refused."""
    path, asked = protocol.out / "paper.json", _asked(protocol)
    if not path.is_file():
        if protocol.out.is_dir() and any(protocol.out.iterdir()):
            raise InputError(f"{protocol.out}: is not empty and holds no earlier run; choose another -o")
        write_json(path, asked)
        return
    before = read_json(path)
    now = _as_json(asked)
    if changed := [name for name in now if before.get(name) != now[name]]:
        raise InputError(f"{protocol.out}: holds a run with another {', '.join(changed)}; choose another -o")


def _as_json(value: Any) -> Any:
    """As it comes back from a file: tuples are lists."""
    return json.loads(json.dumps(value))
