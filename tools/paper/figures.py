"""Figures: the analogues of the paper's Figs. 2, 3, 5 and 6, and a picture of every validation case.

Comes in: the facts of the stages. Goes out: OUT/figures/*.png. Fig. 2 is the loss by epoch over the recommended
schedule, Fig. 3 over one three times as long, Fig. 5 of the pretrained network and, after it, the fine-tuned one;
Fig. 6 is the Dice of the pretrained network on T1 and the fine-tuned one on T1+FLAIR, by case.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from strokenet.data.case import read_case
from strokenet.data.geometry import turn_to_ras
from strokenet.evaluate.figures import draw_boxes, draw_overlay
from strokenet.train.curve import draw_curve
from tools.paper.protocol import Protocol, validation_cases
from tools.paper.stages import StageResult
from tools.paper.table import PAPER_BOXES, Dice

Row = Mapping[str, float | None]


def draw_figures(protocol: Protocol, results: Mapping[str, StageResult], dice: Dice) -> tuple[Path, ...]:
    """Writes every picture; their paths in the order of the paper."""
    folder = protocol.out / "figures"
    short, long, tuned = (_history(results[name]) for name in ("train_short", "train_t1", "finetune"))
    moved = [{**row, "epoch": row["epoch"] + len(long)} for row in tuned]
    validation = results["plan_t1_flair"].facts["validation"]
    curves = {f"fig_{n}.png": rows for n, rows in ((2, short), (3, long))}
    for name, rows in curves.items():
        draw_curve(rows, folder / name)
    draw_curve([*long, *moved], folder / "fig_5.png", {len(long): "fine-tuning"})
    tests = zip(PAPER_BOXES, ("T1", "T1+FLAIR"), strict=True)
    draw_boxes({name: [dice[test][case] for case in validation] for name, test in tests}, folder / "fig_6.png")
    return (*(folder / f"fig_{n}.png" for n in (2, 3, 5, 6)), *_overlays(protocol, folder / "cases"))


def _history(result: StageResult) -> list[dict[str, float]]:
    rows: Sequence[Row] = result.facts["history"]
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]


def _overlays(protocol: Protocol, folder: Path) -> list[Path]:
    """T1 and FLAIR of every validation case with its label and the fine-tuned network's mask."""
    paths = []
    channels = protocol.t1_flair.read_plan().channels
    for files in validation_cases(protocol.t1_flair):
        case = read_case(files.case_id, dict(zip(channels, files.images, strict=True)), files.label)
        mask = read_case(
            files.case_id, {"mask": protocol.out / "predictions" / "T1+FLAIR" / f"{files.case_id}.nii.gz"}
        ).image[0]
        turn = turn_to_ras(case.geometry)
        paths.append(folder / f"{files.case_id}.png")
        assert case.label is not None
        draw_overlay(
            {name: turn.apply(image) for name, image in zip(channels, case.image, strict=True)},
            turn.permute(case.geometry.spacing),
            paths[-1],
            case=files.case_id,
            reference=turn.apply(case.label > 0),
            prediction=turn.apply(mask > 0),
        )
    return paths
