"""Protocol: the paper's experiment (Meddahi 2024, VI), every station by name, in the order of STAGES.

Comes in: a Protocol. Goes out: OUT with the two cohorts, the workspaces of the networks, the masks of every test, and a
mark a stage, whose facts are what table.py and figures.py read. The cohorts are semi-synthetic; what is done with them
is the paper's: pretraining on T1, the clinic's scans prepared, the T1 network tested on them, adapted to T1 + FLAIR,
fine-tuned on four fifths of the clinic's cases and tested on the last fifth, which none of its steps has seen. That
holds of drawn heads and strokes; label maps and real masks are few, and come back in many cases of both cohorts.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from planner.fingerprint import Fingerprint
from planner.plan import Plan
from planner.rules import make_plan
from planner.smaller import at_spacing, narrower
from strokenet.data.dataset import CaseFiles
from strokenet.data.errors import InputError
from strokenet.data.track import Track, silent
from strokenet.evaluate.evaluate import score_case
from strokenet.evaluate.pairs import Pair, read_pair
from strokenet.infer.infer import InferConfig, infer
from strokenet.model.adapted import AdaptConfig, adapt_model
from strokenet.prepare.cohort import prepare_cohort
from strokenet.prepare.inputs import read_inputs
from strokenet.preprocess.jobs import worker_count
from strokenet.preprocess.planning import PlanConfig, plan_workspace, preprocess_workspace
from strokenet.synth.styles import Style
from strokenet.synth.synth import SynthConfig, synthesise
from strokenet.train.run import TrainConfig
from strokenet.train.train import train
from strokenet.workspace import Workspace
from tools.paper.scales import FINETUNE_LR, Scale
from tools.paper.stages import TIME_IS_UP, Clock, Facts, Stage, Stopped

FOLD = "0"  # of five: 80 % train, 20 % validate (VI)
PREPARE_BYTES = 2 * 2**30  # a case of prepare at its peak
KEPT = ("epoch", "train_loss", "val_loss", "pseudo_dice", "ema_dice", "seconds")  # of a row of log.csv
_log = logging.getLogger("strokenet")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is asked for.

    out: the folder. label_maps, lesions: folders for `synthesise`, None for drawn ones. jobs: None: one a CPU.
    """

    out: Path
    scale: Scale
    seed: int = 0
    label_maps: Path | None = None
    lesions: Path | None = None
    jobs: int | None = None
    track: Track = silent

    @property
    def t1(self) -> Workspace:
        """The pretrained network (Fig. 3), and the cohort that it is trained on."""
        return Workspace(self.out / "t1")

    @property
    def t1_flair(self) -> Workspace:
        """The fine-tuned network, and the clinic's cases."""
        return Workspace(self.out / "t1_flair")


def stages(protocol: Protocol) -> tuple[Stage, ...]:
    """All that is done, in order."""
    p, scale = protocol, protocol.scale
    pretrained, adapted = p.t1.root, p.out / "adapted"
    short = partial(_train, p, p.out / "t1_short", p.t1, epochs=scale.short_epochs)
    long = partial(_train, p, pretrained, p.t1, epochs=scale.long_epochs, stop_epoch=scale.stop_epoch)
    tune: dict[str, Any] = {"epochs": scale.finetune_epochs, "init": adapted}
    paper = partial(_train, p, p.t1_flair.root, p.t1_flair, lr=FINETUNE_LR, **tune)
    listed = [
        Stage(name="atlas", title="draw the ATLAS-like cohort, T1", run=partial(_draw, p, "atlas")),
        Stage(name="plan_t1", title="plan and preprocess it", run=partial(_plan, p, p.t1, "atlas")),
        Stage(name="train_short", title=f"pretrain for {scale.short_epochs} epochs (Fig. 2)", run=short),
        Stage(name="train_t1", title=f"pretrain, {scale.stop_epoch} of {scale.long_epochs} epochs (Fig. 3)", run=long),
        _test(p, "ATLAS", pretrained, lambda: validation_cases(p.t1)),
        Stage(name="clinic", title="draw the clinic's cohort, T1 and FLAIR", run=partial(_draw, p, "clinic")),
        Stage(name="prepare", title="prepare its scans (IV.B)", run=partial(_prepare, p)),
        Stage(name="plan_t1_flair", title="plan and preprocess them", run=partial(_plan, p, p.t1_flair, "prepared")),
        _test(p, "T1", pretrained, lambda: one_channel(p.t1_flair.read_dataset().cases, 0)),
        _test(p, "FLAIR", pretrained, lambda: one_channel(p.t1_flair.read_dataset().cases, 1)),
        Stage(name="adapt", title="adapt the T1 network to T1 + FLAIR (V)", run=partial(_adapt, p, adapted)),
        _test(p, "adapted", adapted, lambda: validation_cases(p.t1_flair)),
        Stage(name="finetune", title="fine-tune it (VI.B)", run=paper),
        _test(p, "T1+FLAIR", p.t1_flair.root, lambda: validation_cases(p.t1_flair)),
    ]
    if scale.other_lr is not None:
        other = p.out / "t1_flair_other"
        run = partial(_train, p, other, p.t1_flair, lr=scale.other_lr, **tune)
        listed += [
            Stage(name="finetune_other", title=f"fine-tune it at {scale.other_lr:g} instead (ours)", run=run),
            _test(p, "other", other, lambda: validation_cases(p.t1_flair)),
        ]
    return tuple(listed)


def plan_at(fingerprint: Fingerprint, plan: Plan, scale: Scale) -> Plan:
    """The plan that nnU-Net's rules make of the same cases at the scale's spacing, with its narrower network.

    The planner sees the fingerprint of cases that were brought to this spacing and, as the paper's were (IV.B 4), cut
    to the brain before; all else it decides itself. Else ATLAS's wide borders would have its z-scores taken inside the
    brain and the clinic's over the whole crop, and the adapted weights would see other intensities than they know.
    """
    made = make_plan(
        replace(at_spacing(fingerprint, scale.spacing_mm), median_relative_size=1.0),
        dataset=plan.dataset,
        channels=plan.channels,
        labels=plan.labels,
        gpu_memory_gb=scale.gpu_memory_gb,
    )
    return narrower(made, scale.narrower)


def validation_cases(workspace: Workspace) -> tuple[CaseFiles, ...]:
    """The fifth of a workspace's cases that the fold does not train on."""
    names = set(workspace.read_splits()[int(FOLD)].val)
    return tuple(case for case in workspace.read_dataset().cases if case.case_id in names)


def one_channel(cases: Sequence[CaseFiles], channel: int) -> tuple[CaseFiles, ...]:
    """The cases as a network of one channel is given them."""
    return tuple(replace(case, images=(case.images[channel],)) for case in cases)


def _draw(protocol: Protocol, style: Style, clock: Clock) -> Facts:
    """A cohort; of the clinic with another seed, or its strokes would be as large as ATLAS's, case by case."""
    root = protocol.out / style
    shutil.rmtree(root, ignore_errors=True)  # of a run that was killed before the mark
    config = SynthConfig(
        cases=protocol.scale.atlas if style == "atlas" else protocol.scale.clinic,
        style=style,
        label_maps=protocol.label_maps,
        lesions=protocol.lesions,
        seed=protocol.seed if style == "atlas" else protocol.seed + 1,
    )
    return asdict(synthesise(root, config, jobs=protocol.jobs, track=protocol.track).achieved)


def _prepare(protocol: Protocol, clock: Clock) -> Facts:
    """The clinic's patients as an nnU-Net raw folder. Cases that are done are kept when the time is up."""
    cases = read_inputs(protocol.out / "clinic" / "patients")
    jobs = worker_count(protocol.jobs, len(cases), PREPARE_BYTES)
    track = clock.between_items(protocol.track)
    done = prepare_cohort(cases, protocol.out / "prepared", protocol.scale.prepare, jobs=jobs, track=track)
    for failed in done.failed:
        _log.warning("%s: %s: %s; it is in no column of the table", failed.case_id, failed.step, failed.error)
    if len(done.cases) < 2:
        raise InputError(f"{protocol.out / 'prepared'}: fewer than two cases could be prepared; see prepare.json there")
    seconds = sum(case.seconds for case in done.cases) / len(done.cases)
    return {
        "cases": len(done.cases),
        "failed": [{"case": row.case_id, "step": row.step} for row in done.failed],
        "seconds_a_case": seconds,
    }


def _plan(protocol: Protocol, workspace: Workspace, cohort: str, clock: Clock) -> Facts:
    """Fingerprint, plan at the scale's spacing, split, preprocessed cases."""
    config = PlanConfig(gpu_memory_gb=protocol.scale.gpu_memory_gb, jobs=protocol.jobs)
    planned = plan_workspace(protocol.out / cohort, workspace.root, config, protocol.track)
    plan = plan_at(planned.fingerprint, planned.plan, protocol.scale)
    workspace.write_plan(plan)
    preprocess_workspace(workspace.root, protocol.jobs, protocol.track)
    split = planned.splits[int(FOLD)]
    return {
        "train": list(split.train),
        "validation": list(split.val),
        "patch": list(plan.patch),
        "batch_size": plan.batch_size,
        "features": list(plan.network.features),
    }


def _train(protocol: Protocol, root: Path, like: Workspace, clock: Clock, **settings: Any) -> Facts:
    """The fold, from where an earlier run left it. like: the workspace whose plan and cases it has; may be itself."""
    workspace = Workspace(root)
    if root != like.root:
        _share(like, workspace)
    config = TrainConfig(
        fold=FOLD,
        iterations=protocol.scale.iterations,
        val_iterations=protocol.scale.val_iterations,
        seed=protocol.seed,
        resume=True,
        max_time_minutes=clock.minutes_left,
        **settings,
    )
    result = train(workspace, config, protocol.track)
    if result.signal is not None:
        raise Stopped(128 + result.signal)
    if not result.finished:
        raise Stopped(TIME_IS_UP)
    return {"steps": len(result.history) * config.iterations, "history": [_row(row) for row in result.history]}


def _share(like: Workspace, workspace: Workspace) -> None:
    """Another network on the same cases: they are a link, for training reads them and never writes."""
    workspace.write_dataset(like.read_dataset())
    workspace.write_plan(like.read_plan())
    workspace.write_splits(like.read_splits())
    if not workspace.preprocessed.exists():
        workspace.preprocessed.symlink_to(Path("..") / like.root.name / like.preprocessed.name)


def _row(row: Mapping[str, float]) -> dict[str, float | None]:
    """What the figures show; JSON has no NaN."""
    return {name: row[name] if row[name] == row[name] else None for name in KEPT}


def _adapt(protocol: Protocol, out: Path, clock: Clock) -> Facts:
    """The paper's rule: the T1 weights in both channels, divided by two. The plan is its skeleton (VI.B step 2)."""
    shutil.rmtree(out, ignore_errors=True)
    done = adapt_model(protocol.t1.root, protocol.t1_flair.root, out, AdaptConfig(channels={}, seed=protocol.seed))
    return {
        "channels": {name: dict(taken) for name, taken in done.channels.items()},
        "warnings": list(done.warnings),
        "notes": list(done.notes),
    }


def _test(protocol: Protocol, name: str, model: Path, cases: Callable[[], tuple[CaseFiles, ...]]) -> Stage:
    """Segment and score; no mirroring at test time, as in the released configuration."""

    def run(clock: Clock) -> Facts:
        files = cases()
        out = protocol.out / "predictions" / name
        results = infer(model, files, out, InferConfig(folds=(FOLD,), tta="none"), protocol.track)
        if failed := [result for result in results if result.status != "ok"]:
            raise InputError(
                f"{name}: {len(failed)} of {len(results)} cases failed: {failed[0].case}: {failed[0].error}"
            )
        return {"dice": dice_of(files, out)}

    return Stage(name=f"test_{name}", title=f"test: {name}", run=run)


def dice_of(cases: Sequence[CaseFiles], masks: Path) -> dict[str, float]:
    """Case id -> Dice of MASKS/CASE.nii.gz against the case's label."""
    found = {}
    for case in cases:
        assert case.label is not None
        pair = read_pair(
            Pair(case=case.case_id, reference=case.label, prediction=masks / f"{case.case_id}.nii.gz"), None
        )
        score = score_case(case.case_id, "lesion", pair.prediction > 0, pair.reference > 0, pair.spacing)
        found[case.case_id] = score.dice
    return found
