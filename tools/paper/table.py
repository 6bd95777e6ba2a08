"""Table: our numbers beside the paper's (Meddahi 2024, Table II and Fig. 6), and whether its shape shows.

Comes in: Dice by case of every test. Goes out: means, the six box statistics, the paired difference with its interval,
two verdicts; as rows for the console, and as the README's table from the results that were kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from strokenet.evaluate.summary import bootstrap_ci95
from tools.paper.scales import FINETUNE_LR

RESULTS = Path(__file__).resolve().parent / "results.json"
STATISTICS = ("min", "q1", "median", "q3", "max", "mean")
PAPER_BOXES = {  # Fig. 6
    "pretrained, T1": (0.608, 0.6315, 0.698, 0.732, 0.810, 0.692),
    "fine-tuned, T1+FLAIR": (0.552, 0.5945, 0.657, 0.801, 0.952, 0.707),
}
LEAST_JUDGED = 3  # validation cases; fewer show nothing
FAR_BELOW = 0.5  # "far below": at most this share of the T1's mean; the paper's shares are 0.30 and 0.24
NOT_MEASURED = "not yet measured"
README_SCALES = ("cpu", "gpu", "full")  # smoke shows nothing but that it runs

Dice = Mapping[str, Mapping[str, float]]  # test -> case -> Dice


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of Table II. paper, ours: (pretrained on validation cases, on all, fine-tuned); None is the table's x."""

    dataset: str
    paper: tuple[float | None, float | None, float | None]
    ours: tuple[float | None, float | None, float | None]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the paper leads one to expect, whether it came (None: too few cases to say), and the numbers that say so."""

    expected: str
    shown: bool | None
    why: str


def table_2(dice: Dice, validation: Sequence[str]) -> tuple[Line, ...]:
    """The paper's Table II with ours. validation: the clinic's cases that fine-tuning did not train on."""
    atlas = _mean(dice["ATLAS"])
    ours = {name: (_mean(dice[name], validation), _mean(dice[name]), None) for name in ("FLAIR", "T1")}
    both = (None, None, _mean(dice["T1+FLAIR"], validation))
    return (
        Line(dataset="ATLAS", paper=(0.633, 0.633, None), ours=(atlas, atlas, None)),
        Line(dataset="FLAIR", paper=(0.210, 0.158, None), ours=ours["FLAIR"]),
        Line(dataset="T1", paper=(0.692, 0.655, None), ours=ours["T1"]),
        Line(dataset="T1+FLAIR", paper=(None, None, 0.707), ours=both),
    )


def boxes(dice: Dice, validation: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """The six statistics of Fig. 6, in the order of STATISTICS; quartiles linear between cases."""
    tests = dict(zip(PAPER_BOXES, ("T1", "T1+FLAIR"), strict=True))
    return {name: _box([dice[test][case] for case in validation]) for name, test in tests.items()}


def difference(first: Mapping[str, float], second: Mapping[str, float], cases: Sequence[str]) -> dict[str, Any]:
    """first minus second, paired by case: n, mean, and ci95, the bootstrap interval of the mean (None for one case)."""
    paired = np.array([[first[case] - second[case]] for case in cases])
    interval = [float(end) for end in bootstrap_ci95(paired)[:, 0]] if len(paired) > 1 else None
    return {"n": len(paired), "mean": float(paired.mean()), "ci95": interval}


def shapes(dice: Dice, validation: Sequence[str]) -> tuple[Shape, Shape]:
    """The two findings of the paper that a reproduction should show; nothing is tuned until it does."""
    _, flair, t1, _ = table_2(dice, validation)
    gained = difference(dice["T1+FLAIR"], dice["T1"], validation)
    pairs = [(flair.ours[column] or 0.0, t1.ours[column] or 0.0) for column in (0, 1)]
    far = all(below <= FAR_BELOW * above and above > 0 for below, above in pairs)
    enough = len(validation) >= LEAST_JUDGED
    numbers = " and ".join(f"{below:.3f} beside {above:.3f}" for below, above in pairs)
    return (
        Shape(
            expected=f"the T1 network on FLAIR far below T1 (at most {FAR_BELOW:g} of its mean Dice, in both columns)",
            shown=far if enough else None,
            why=numbers,
        ),
        Shape(
            expected="T1+FLAIR, fine-tuned, at least as good as T1 (mean paired difference not below 0)",
            shown=gained["mean"] >= 0 if enough else None,
            why=difference_text(gained),
        ),
    )


def difference_text(value: Mapping[str, Any]) -> str:
    """+0.015 [-0.010, +0.040], n = 9."""
    interval = "no interval" if value["ci95"] is None else "[{:+.3f}, {:+.3f}]".format(*value["ci95"])
    return f"{value['mean']:+.3f} {interval}, n = {value['n']}"


def readme_table(kept: Mapping[str, Any]) -> str:
    """Markdown: the paper's numbers and those of every scale that was kept, and which were not measured.

    kept: the values of RESULTS.
    """
    found = {name: kept["scales"][name] for name in README_SCALES if name in kept["scales"]}
    head = ["mean Dice, and more", "paper", *(f"`{name}`" for name in found)]
    columns = [_column(result) for result in found.values()]
    rows = [[*labels, *cells] for labels, *cells in zip(_LABELS, *columns, strict=True)]
    missing = ", ".join(f"`{name}`" for name in README_SCALES if name not in found)
    note = f"\n\n{missing}: {NOT_MEASURED}." if missing else ""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + note


def _paper_box(network: str) -> str:
    return " ".join(f"{value:.4g}" for value in PAPER_BOXES[network][:5])


_LABELS = (
    ("cases: ATLAS, clinic", "655, 47"),
    ("grid; steps of pretraining, of fine-tuning", "1 mm; 625,000, 125,000"),
    ("ATLAS, validation cases: pretrained", "0.633"),
    ("FLAIR: pretrained on T1; validation / all", "0.210 / 0.158"),
    ("T1: pretrained on T1; validation / all", "0.692 / 0.655"),
    ("T1+FLAIR, validation cases: fine-tuned at 1e-5", "0.707"),
    ("T1+FLAIR minus T1, paired, 95 % interval", "+0.015"),
    ("Fig. 6, pretrained, T1: min q1 median q3 max", _paper_box("pretrained, T1")),
    ("Fig. 6, fine-tuned, T1+FLAIR", _paper_box("fine-tuned, T1+FLAIR")),
    ("FLAIR far below T1", "shown"),
    ("T1+FLAIR at least as good as T1", "shown"),
    ("ours: adapted, before fine-tuning", ""),
    ("ours: fine-tuned at another rate", ""),
    ("minutes, on", ""),
)


def _column(result: Mapping[str, Any]) -> list[str]:
    """The cells of one scale, in the order of _LABELS."""
    dice, validation, scale = result["dice"], result["validation"], result["scale"]
    atlas, flair, t1, both = table_2(dice, validation)
    first, second = shapes(dice, validation)
    box = boxes(dice, validation).values()
    steps = [f"{result['steps'][name]:,}" for name in ("train_t1", "finetune")]
    other = f"{_mean(dice['other'], validation):.3f} ({scale['other_lr']:g})" if "other" in dice else "none"
    return [
        f"{scale['atlas']}, {scale['clinic']}",
        f"{scale['spacing_mm']:g} mm; {', '.join(steps)}",
        _cell(atlas.ours[0]),
        f"{_cell(flair.ours[0])} / {_cell(flair.ours[1])}",
        f"{_cell(t1.ours[0])} / {_cell(t1.ours[1])}",
        _cell(both.ours[2]),
        difference_text(difference(dice["T1+FLAIR"], dice["T1"], validation)),
        *(" ".join(f"{value:.3f}" for value in values[:5]) for values in box),
        *(verdict(shape) for shape in (first, second)),
        f"{_mean(dice['adapted'], validation):.3f}",
        other,
        f"{sum(result['seconds'].values()) / 60:.0f}, {_machine(result['machine'])}",
    ]


def verdict(shape: Shape) -> str:
    """shown, not shown, or not judged."""
    return {True: "shown", False: "not shown", None: "not judged"}[shape.shown]


def console_rows(dice: Dice, validation: Sequence[str], other_lr: float | None) -> list[tuple[str, ...]]:
    """Table II for the console: dataset, and for each of its three columns ours and the paper's; then our own rows."""
    rows = [(line.dataset, *_beside(line)) for line in table_2(dice, validation)]
    rows.append(("T1+FLAIR, adapted, not fine-tuned (ours)", "x", "x", _cell(_mean(dice["adapted"], validation))))
    if "other" in dice:
        rate = f"T1+FLAIR, fine-tuned at {other_lr:g}, not {FINETUNE_LR:g} (ours)"
        rows.append((rate, "x", "x", _cell(_mean(dice["other"], validation))))
    return rows


def box_rows(dice: Dice, validation: Sequence[str]) -> list[tuple[str, ...]]:
    """Fig. 6 for the console: a row for ours and one for the paper's, of either network."""
    rows = []
    for name, values in boxes(dice, validation).items():
        rows += [(name, "ours", *(f"{v:.3f}" for v in values)), ("", "paper", *(f"{v:.4g}" for v in PAPER_BOXES[name]))]
    return rows


def _beside(line: Line) -> list[str]:
    return [
        f"{_cell(ours)} ({_cell(paper)})" if paper is not None else "x"
        for ours, paper in zip(line.ours, line.paper, strict=True)
    ]


def _mean(dice: Mapping[str, float], cases: Sequence[str] | None = None) -> float:
    """Over these cases; None: all."""
    return float(np.mean([dice[case] for case in (dice if cases is None else cases)]))


def _box(values: Sequence[float]) -> tuple[float, ...]:
    return (*(float(v) for v in np.percentile(values, [0, 25, 50, 75, 100])), float(np.mean(values)))


def _cell(value: float | None) -> str:
    return "x" if value is None else f"{value:.3f}"


def _machine(machine: Mapping[str, str]) -> str:
    return machine["GPU"] if machine["GPU"] != "none" else f"{machine['cores']} cores of {machine['processor']}"
