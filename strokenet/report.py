"""Report: what each command says when it is done, as tables and lines for people or as JSON for scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strokenet.console import show, show_json, show_table

if TYPE_CHECKING:
    from strokenet.demo import DemoOutcome
    from strokenet.doctor import Report
    from strokenet.evaluate.fit import Fit
    from strokenet.evaluate.records import CaseScore, Comparison, Evaluation, Summaries, Summary
    from strokenet.evaluate.strata import Stratum
    from strokenet.infer.infer import CaseResult
    from strokenet.model.adapt import Fate
    from strokenet.model.adapted import Adaptation
    from strokenet.nnunet.export import Exported
    from strokenet.nnunet.foreign import ForeignModel
    from strokenet.prepare.cohort import Preparation
    from strokenet.prepare.outputs import PreparedCase
    from strokenet.preprocess.planning import Planned, Preprocessed
    from strokenet.synth.synth import SynthCohort
    from strokenet.train.train import TrainResult

_SHOWN = {  # metric -> its name and digits
    "dice": ("Dice", 3),
    "iou": ("IoU", 3),
    "sensitivity": ("sensitivity", 3),
    "precision": ("precision", 3),
    "hd95_mm": ("HD95, mm", 1),
    "absolute_volume_difference_ml": ("|volume difference|, ml", 2),
    "volume_difference_ml": ("volume difference, ml", 2),
    "lesion_count_difference": ("|lesion count difference|", 1),
    "lesion_f1": ("lesion F1", 3),
    "anima_f1": ("lesion F1, Anima", 3),
    "anima_sensitivity": ("lesion sensitivity, Anima", 3),
    "anima_ppv": ("lesion PPV, Anima", 3),
}
_SCORES = ("Dice", "HD95\nmm", "ref\nml", "pred\nml", "found/\nmissed/\nfalse", "lesion\nF1")
_BY_SIZE = ("reference", "found,\nISLES'22", "found,\nAnima", "predicted", "false,\nISLES'22", "false,\nAnima")
_FLAGS = {
    "both_empty": "both masks empty, scored as perfect",
    "ref_empty": "reference empty but not the prediction",
    "missed": "prediction empty but not the reference",
    "missing_prediction": "no prediction, scored as an empty mask",
}
_NOTES = {"missing_prediction": "no file", "both_empty": "both empty", "ref_empty": "ref empty", "missed": "pred empty"}


def show_synth(cohort: SynthCohort, *, as_json: bool) -> None:
    """What the cohort has beside the paper's Table I, and the next command."""
    from strokenet.synth.burden import MEAN_ML, MEDIAN_ML, PRIMARY, SECONDARY

    if as_json:
        from strokenet.data.files import read_json

        show_json(read_json(cohort.root / "cohort.json"))
        return
    got = cohort.achieved
    rows = [
        ("median lesion, ml", f"{got.median_ml:.2f}", f"{MEDIAN_ML:.2f}"),
        ("mean lesion, ml", f"{got.mean_ml:.2f}", f"{MEAN_ML:.2f}"),
        ("range, ml", f"{got.smallest_ml:.2f} to {got.largest_ml:.1f}", ""),
        *((f"{side}, share", f"{getattr(got, side):.2f}", f"{share:.2f}") for side, share in PRIMARY.items()),
        *(
            (f"a second one {side}", f"{getattr(got, f'second_{side}'):.2f}", f"{share:.2f}")
            for side, share in SECONDARY.items()
        ),
    ]
    columns = ("this cohort", "Table I")
    show_table(f"{got.cases} semi-synthetic cases", ("what", *columns), rows, numbers=columns)
    changes = [row.changed_ml for row in cohort.rows if row.changed_ml is not None]
    if changes:
        show(f"two times: {sum(ml > 0 for ml in changes)} of {len(changes)} changed; the label is what is new or grown")
    clinic = (cohort.root / "patients").is_dir()
    command = f"prepare {cohort.root / 'patients'} -o DATASET" if clinic else f"plan {cohort.root} -o WORK"
    show(f"no patient: they test a method. Truth in {cohort.root / 'truth'}; next: strokenet {command}")


def show_prepared(done: Preparation, out: Path, *, as_json: bool) -> None:
    """A row a case, what to look at, what failed at which step, and the next command."""
    if as_json:
        from strokenet.data.files import read_json

        show_json(read_json(out / "prepare.json"))
        return
    numbers = ("brain, ml", "moved, mm", "metric", "brains' Dice", "s")
    rows = [_prepared_row(row) for row in done.cases]
    if rows:
        show_table(f"Prepared, channels {', '.join(done.channels)}", ("case", "in", *numbers), rows, numbers=numbers)
    for case_id, flags in done.flags.items():
        for flag in flags:
            show(f"look at {case_id}: {flag}")
    for failed in done.failed:
        show(f"failed: {failed.case_id}: {failed.step}: {failed.error}")
    if rows:
        show(f"pictures in {out / 'qc'}; transforms in {out / 'prepare'}")
        trained = any(row.part == "Tr" for row in (*done.cases, *done.earlier))
        show(f"next: strokenet {f'plan {out} -o WORK' if trained else f'infer MODEL {out}/imagesTs -o MASKS'}")


def _prepared_row(row: PreparedCase) -> tuple[str, ...]:
    q = row.quality
    measured = ("" if x is None else f"{x:.3g}" for x in (q.displacement_mm, q.metric, q.agreement))
    seconds = "cached" if row.cached else f"{row.seconds:.1f}"
    return (row.case_id, f"images{row.part}", f"{q.brain_ml:.0f}", *measured, seconds)


def show_plan(planned: Planned, *, as_json: bool) -> None:
    """Every decision with its reason, and the folds."""
    from planner.plan import to_json
    from planner.rules import explain
    from strokenet.model.figure import network_figure

    if as_json:
        show_json(to_json(planned.plan))
        return
    decisions = explain(planned.plan, planned.fingerprint)
    show_table(
        f"Plan of {planned.plan.dataset}", ("what", "value", "why"), [(d.what, d.value, d.why) for d in decisions]
    )
    show(f"\n{network_figure(planned.plan)}\n")
    sizes = ", ".join(f"{len(split.train)}+{len(split.val)}" for split in planned.splits)
    show(f"folds (train+validate): {sizes}" if sizes else "one subject: no folds, train with --fold all")
    show(f"written to {planned.workspace.root}; next: strokenet preprocess {planned.workspace.root}")


def show_preprocessed(done: Preprocessed, work: Path, *, as_json: bool) -> None:
    """How many cases were made and how many were there, and the command that trains on them."""
    from strokenet.data.splits import subject_of

    if as_json:
        show_json({"made": list(done.made), "kept": list(done.kept)})
        return
    show(f"{len(done.made)} cases preprocessed, {len(done.kept)} were there already")
    subjects = {subject_of(case) for case in (*done.made, *done.kept)}
    show(f"next: strokenet train {work}{'' if len(subjects) > 1 else ' --fold all'}")


def show_training(result: TrainResult, *, as_json: bool) -> None:
    """Where the weights are and what the last epoch looked like."""
    last = {k: v for k, v in (result.history[-1] if result.history else {}).items() if v == v}  # JSON has no NaN
    if as_json:
        show_json({"folder": result.folder.root.name, "finished": result.finished, "last_epoch": last})
        return
    state = "finished" if result.finished else "stopped; --resume goes on"
    show(f"{result.folder.root}: {state} after {len(result.history)} epochs")
    if last:
        show(f"loss {last['train_loss']:.3f}, validation {last['val_loss']:.3f}, pseudo-Dice {last['ema_dice']:.3f}")
    if result.finished:
        show(f"next: strokenet infer {result.folder.root.parent} SCANS -o OUT")


def show_inference(results: Sequence[CaseResult], out: Path, *, as_json: bool) -> None:
    """One line a case, and where the masks are; as JSON what OUT/results.json holds."""
    if as_json:
        from strokenet.data.files import read_json
        from strokenet.infer.outputs import RESULTS

        show_json(read_json(out / RESULTS))
        return
    rows = [
        (
            *(r.case, "kept" if r.kept else r.status, f"{r.seconds:.1f}"),
            "" if r.lesion_volume_ml is None else f"{r.lesion_volume_ml:.2f}",
            "" if r.lesion_count is None else str(r.lesion_count),
            r.error or "",
        )
        for r in results
    ]
    show_table("Inference", ("case", "status", "seconds", "lesion ml", "lesions", "error"), rows)
    _show_agreement(results)
    written = "masks and results.json" if any(r.status == "ok" for r in results) else "no mask; results.json"
    show(f"{written} in {out}")


def _show_agreement(results: Sequence[CaseResult]) -> None:
    """What each channel says alone, and where it is surer than all together."""
    asked = {r.case: (r.channels, r.agreement) for r in results if r.agreement is not None}
    rows = [
        (case, name, f"{one.dice:.3f}", f"{one.lesion_volume_ml:.2f}", _confidence(one.confidence))
        for case, (_, agreement) in asked.items()
        for name, one in agreement.alone.items()
    ]
    columns = ("Dice with\nall channels", "lesion ml", "confidence")
    if rows:
        show_table("Each channel alone", ("case", "channel", *columns), rows, numbers=columns)
    for case, (channels, agreement) in asked.items():
        for name in agreement.surer_alone:
            others, alone = " and ".join(c for c in channels if c != name), agreement.alone[name]
            show(
                f"look at {case}: {others} beside {name} lowers the confidence, "
                f"{_confidence(alone.confidence)} -> {_confidence(agreement.confidence)}"
            )


def _confidence(value: float | None) -> str:
    return "no lesion" if value is None else f"{value:.3f}"


def show_scores(evaluation: Evaluation, *, as_json: bool) -> None:
    """The cases, what they say together in both conventions, who was empty or failed, and the paired difference."""
    from strokenet.evaluate.tables import to_json

    if as_json:
        show_json(to_json(evaluation))
        return
    several = len(evaluation.by_label) > 1
    _show_cases(evaluation.cases, several=several)
    everyone, diseased = evaluation.summary.all_cases, evaluation.summary.ref_nonempty
    _show_summary("All cases (empty masks by the ISLES'22 rules)", everyone)
    if diseased != everyone:
        _show_summary("Only cases whose reference has a lesion", diseased)
    elif everyone:
        show("Every reference has a lesion: over such cases alone the numbers are the same.")
    if several:
        _show_labels(evaluation.by_label)
    for label, strata in evaluation.strata.items():
        _show_strata(f"Lesions by size, all cases together{f': {label}' if several else ''}", strata)
    for flag, names in evaluation.empty.items():
        if names:
            show(f"{_FLAGS[flag]} ({len(names)}): {', '.join(names)}")
    for failure in evaluation.failures:
        show(f"failed: {failure.case}: {failure.error}")
    if evaluation.comparison is not None:
        _show_difference(evaluation.comparison)


def show_fit(fit: Fit, *, as_json: bool) -> None:
    """The whole grid, and what the model's rule was and is."""
    from strokenet.evaluate.fit import to_json

    if as_json:
        show_json(to_json(fit))
        return
    volumes = tuple(f"> {volume:g} mm3" for volume in fit.volumes_mm3)
    rows = [
        (f"> {threshold:g}", *(f"{value:.4f}" for value in row))
        for threshold, row in zip(fit.thresholds, fit.dice, strict=True)
    ]
    show_table(f"Mean Dice of {len(fit.cases)} cases", ("threshold", *volumes), rows, numbers=volumes)
    for case, why in fit.left_out.items():
        show(f"left out: {case}: {why}")
    for when, rule in (("was", fit.before), ("now, in plan.json,", fit.after)):
        limits = f"threshold {rule.threshold:g}, components above {rule.min_volume_mm3:g} mm3"
        show(f"{when} {limits}: Dice {fit.dice_of(rule):.4f}")
    show("the Dice is that of the cases it was chosen on; report that of others")


def _show_cases(cases: Sequence[CaseScore], *, several: bool) -> None:
    rows = [
        (
            *(row.case, *([row.label] if several else [])),
            *(f"{row.dice:.3f}", f"{row.hd95_mm:.1f}"),
            *(f"{row.reference_volume_ml:.2f}", f"{row.prediction_volume_ml:.2f}"),
            f"{row.lesions_found}/{row.lesions_missed}/{row.lesions_false}",
            f"{row.lesion_f1:.3f}",
            "; ".join(note for flag, note in _NOTES.items() if getattr(row, flag)),
        )
        for row in cases
    ]
    show_table("Scores", ("case", *(["label"] if several else []), *_SCORES, "note"), rows, numbers=_SCORES)


def _show_summary(title: str, summary: Mapping[str, Summary]) -> None:
    rows = []
    for name, (shown, digits) in _SHOWN.items():
        if name in summary:
            s = summary[name]
            mean, median, q1, q3 = (f"{value:.{digits}f}" for value in (s.mean, s.median, s.q1, s.q3))
            rows.append((shown, str(s.n), f"{mean}{_interval(s.ci95, digits)}", median, f"{q1} to {q3}"))
    if rows:
        columns = ("n", "mean [95 % CI]", "median", "quartiles")
        show_table(title, ("metric", *columns), rows, numbers=columns)
    else:
        show(f"{title}: none")


def _show_labels(by_label: Mapping[str, Summaries]) -> None:
    rows = []
    for label, summaries in by_label.items():
        for name in ("dice", "hd95_mm", "lesion_f1"):
            shown, digits = _SHOWN[name]
            sets = [s[name] for s in (summaries.all_cases, summaries.ref_nonempty) if name in s]
            means = [f"{s.mean:.{digits}f}{_interval(s.ci95, digits)}, n = {s.n}" for s in sets]
            rows.append((label, shown, *means, *["none"] * (2 - len(means))))
    show_table("By label: mean [95 % CI]", ("label", "metric", "all cases", "reference not empty"), rows)


def _show_strata(title: str, strata: Sequence[Stratum]) -> None:
    rows = []
    for s in strata:
        size = f"{s.low_ml:g} ml and more" if s.high_ml is None else f"{s.low_ml:g} to {s.high_ml:g} ml"
        found = (s.reference_lesions, s.lesions_found, s.anima_found)
        false = (s.prediction_lesions, s.lesions_false, s.anima_false)
        rows.append((size, *(str(n) for n in (*found, *false))))
    show_table(title, ("size", *_BY_SIZE), rows, numbers=_BY_SIZE)


def _show_difference(comparison: Comparison) -> None:
    rows = []
    for name, (shown, digits) in _SHOWN.items():
        if name in comparison.difference:
            d = comparison.difference[name]
            mean = f"{d.mean:+.{digits}f}{_interval(d.ci95, digits, sign='+')}"
            rows.append((shown, str(d.n), mean, f"{d.median:+.{digits}f}"))
    columns = ("n", "mean [95 % CI]", "median")
    show_table("Paired difference, PRED minus --against", ("metric", *columns), rows, numbers=columns)
    missing = comparison.empty["missing_prediction"]
    if missing:
        show(f"--against: {_FLAGS['missing_prediction']} ({len(missing)}): {', '.join(missing)}")


def _interval(ci95: tuple[float, float] | None, digits: int, sign: str = "") -> str:
    return "" if ci95 is None else f" [{ci95[0]:{sign}.{digits}f}, {ci95[1]:{sign}.{digits}f}]"


def show_import(model: ForeignModel, out: Path, *, as_json: bool) -> None:
    """What was read of a foreign model, and the command that uses it. Spacing, patch and mirroring: network axes."""
    plan, rule = model.plan, model.plan.postprocess
    facts: dict[str, Any] = {
        "nnunet": model.generation,
        "trainer": model.trainer,
        "configuration": model.configuration,
        "network": plan.network.kind,
        "features": list(plan.network.features),
        "channels": list(plan.channels),
        "labels": dict(plan.labels),
        "orientation": plan.orientation,
        "network_axes": ["DHW"[axis] for axis in plan.transpose],
        "spacing_mm": list(plan.spacing),
        "patch": list(plan.patch),
        "mirror_axes": ["DHW"[plan.transpose[axis]] for axis in plan.mirror_axes],
        "folds": list(model.weights),
        "checkpoint": model.checkpoint,
        "mask": "most probable label" if rule.threshold is None else f"probability above {rule.threshold:g}",
        "removed": f"components up to {rule.min_volume_mm3:g} mm3" if rule.min_volume_mm3 else "nothing",
        "semantics": plan.semantics,
    }
    if as_json:
        show_json({**facts, "notes": list(model.notes), "model": str(out)})
        return
    show_table(
        "Imported", ("what", "value"), [(what.replace("_", " "), _listed(value)) for what, value in facts.items()]
    )
    for note in model.notes:
        show(f"note: {note}")
    show(f"written to {out}; next: strokenet infer {out} SCANS -o OUT")


def _listed(value: Any) -> str:
    """A text as it is, the entries of a list in their order, a mapping as `value name`."""
    if isinstance(value, str):
        return value
    entries = [f"{number} {name}" for name, number in value.items()] if isinstance(value, dict) else map(_short, value)
    return ", ".join(entries) or "none"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def show_export(exported: Exported, *, as_json: bool) -> None:
    """What was written for nnU-Net, and the command that uses it there."""
    if as_json:
        show_json({"folder": str(exported.folder), "folds": list(exported.folds), "notes": list(exported.notes)})
        return
    for note in exported.notes:
        show(f"note: {note}")
    if not exported.folds:
        show(f"no trained fold, so no checkpoint: {', '.join(exported.files)} are in {exported.folder}")
        show("next: copy plans.json to nnUNet_preprocessed/DATASET/nnUNetPlans.json, the others beside it")
        return
    folds = " ".join([fold for fold in exported.folds if fold != "all"] or exported.folds)  # as infer chooses them
    show(f"written to {exported.folder}; next: nnUNetv2_predict_from_modelfolder -m {exported.folder} -f {folds} ...")


def show_adapted(done: Adaptation, work: Path, out: Path, *, every: bool, as_json: bool) -> None:
    """The channels, what became of the parameters by level (every: one by one), what differs, and the next command."""
    from strokenet.model.adapted import to_json

    if as_json:
        show_json(to_json(done))
        return
    taken = [(new, " + ".join(f"{s:.3g} {old}" for old, s in olds.items())) for new, olds in done.channels.items()]
    rows = [(new, olds or "zero: ignored until it is trained") for new, olds in taken]
    show_table("Channels", ("channel", "takes"), rows)
    columns = ("parameters", "taken", "zero", "new")
    show_table("Parameters", ("where", "what", *columns), _by_place(done), numbers=columns)
    if every:
        fates = [(fate.name, ", ".join(fate.words), f"{fate.numbers:,}", fate.source or "") for fate in done.fates]
        dropped = [("", "dropped", "", name) for name in done.dropped]
        show_table("Every parameter", ("name", "what", "numbers", "of the model's"), [*fates, *dropped])
    if done.lost_channels:
        show(f"note: no channel takes the model's {', '.join(done.lost_channels)}")
    for note in done.notes:
        show(f"note: {note}")
    show(f"folds {', '.join(done.folds)}, heads {done.heads}; written to {out}, all parameters in {out / 'adapt.json'}")
    show(f"next: strokenet train {work} --init {out} --lr 1e-5 --epochs 500")


def _by_place(done: Adaptation) -> list[tuple[str, ...]]:
    """A row for the parameters of one level that share one fate; the last row: those of the source that nobody took."""
    from strokenet.model.adapt import place_of

    groups: dict[tuple[str, str], list[Fate]] = {}
    for fate in done.fates:
        side, level = place_of(fate.name, done.plan.network.stages)
        groups.setdefault((f"{side} {level}", ", ".join(fate.words)), []).append(fate)
    rows: list[tuple[str, ...]] = [
        (*where, str(len(group)), *(f"{sum(getattr(f, n) for f in group):,}" for n in ("taken", "zero", "new")))
        for where, group in groups.items()
    ]
    return [*rows, ("the model's", "dropped", str(len(done.dropped)), "", "", "")] if done.dropped else rows


def show_doctor(report: Report, *, as_json: bool) -> None:
    """Versions, devices, the kernels' choices, the self-checks."""
    if as_json:
        kernels, checks = ([asdict(row) for row in rows] for rows in (report.kernels, report.checks))
        show_json({"facts": report.facts, "kernels": kernels, "checks": checks, "healthy": report.healthy})
        return
    show_table("Installation", ("what", "value"), list(report.facts.items()))
    show_table("Kernels", ("operator", "runs", "why"), [(k.operator, k.implementation, k.why) for k in report.kernels])
    rows = [(check.name, "ok" if check.passed else "FAILED", check.detail) for check in report.checks]
    show_table("Self-checks", ("check", "result", "detail"), rows)


def show_demo(outcome: DemoOutcome, *, as_json: bool) -> None:
    """The held-out scores, the best threshold beside them, and where the pictures are."""
    from strokenet.evaluate.tables import to_json

    threshold, comparison = outcome.threshold, outcome.evaluation.comparison
    assert comparison is not None
    rule = f"{outcome.channel} {'above' if threshold.above else 'below'} {threshold.value:+.2f} standard deviations"
    if as_json:
        facts = {"threshold": rule, "steps": outcome.steps, "seconds": round(outcome.seconds, 1)}
        show_json({**to_json(outcome.evaluation), "demo": facts})
        return
    show_scores(outcome.evaluation, as_json=False)
    ours, rival = outcome.evaluation.summary.all_cases["dice"], comparison.summary.all_cases["dice"]
    show(
        f"held-out Dice {ours.mean:.3f}; best single threshold ({rule}, fitted on the training cases) {rival.mean:.3f}"
    )
    show(f"{outcome.steps} training steps, {outcome.seconds:.0f} s in all; drawn heads show learning, not accuracy")
    show("pictures: " + ", ".join(str(picture) for picture in outcome.pictures))
    workspace = outcome.root / "workspace"
    show(f"next, with your own scans: strokenet infer {workspace} --t1 T1.nii.gz --flair FLAIR.nii.gz -o OUT")
