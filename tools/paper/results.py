"""Results: the whole protocol as one call, and its numbers as JSON values.

Comes in: a Protocol and a Clock. Goes out: OUT/results.json and OUT/figures. OUT/paper.json, written first, says what
OUT holds, so that no run goes on in the folder of another.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.measure import machine
from strokenet import __version__
from strokenet.data.files import read_json, write_json
from tools.paper import table
from tools.paper.claim import claim, digest_of_code, digest_of_sizes
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
    claim(protocol.out, "paper.json", _asked(protocol))
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
    files = {f"files_of_{name}": None if folder is None else digest_of_sizes(folder) for name, folder in given.items()}
    return {
        "scale": {**asdict(protocol.scale), "prepare": protocol.scale.prepare.to_json()},
        "seed": protocol.seed,
        **{name: None if folder is None else folder.resolve().name for name, folder in given.items()},
        **files,
        "version": __version__,
        "code": digest_of_code(CODE),
    }
