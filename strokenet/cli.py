"""The command line: options -> a frozen config -> one library call -> the console. No method lives here.

Exit codes: 0 all good, 1 internal error, 2 usage, 3 some cases failed, 4 none succeeded or bad data, 128 + signal.
Only click is imported at the top, so that --help answers at once; each command imports its station when it runs.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from strokenet import __version__
from strokenet.signals import heeded

if TYPE_CHECKING:
    from rich.console import Console

FOLDER = click.Path(path_type=Path, file_okay=False)
EXISTING = click.Path(path_type=Path, exists=True)
_SCANS = click.Choice(["t1", "flair", "t1_2", "flair_2"])
_PRECISION = click.Choice(["auto", "fp32", "bf16", "fp16"])


def _main_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """-v, -q and --json, which every command has."""
    for option in (
        click.option("-v", "--verbose", "verbose", flag_value=1, type=int, default=0, help="Show more of the log."),
        click.option("-q", "--quiet", "verbose", flag_value=-1, type=int, help="Show warnings and errors alone."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."),
    ):
        command = option(command)
    return command


def _start(verbose: int, rank: int = 0) -> Console:
    from strokenet.console import start_logging

    return start_logging(verbose=verbose, rank=rank)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="strokenet")
def cli() -> None:
    """From raw T1/FLAIR scans to a stroke lesion mask: the whole nnU-Net method in plain PyTorch.

    In order: plan, preprocess, train, infer, evaluate. `strokenet demo` runs them all on drawn heads.
    """


@cli.command(short_help="The whole method on drawn heads, with no download.")
@click.option("-o", "--out", type=FOLDER, default=Path("demo"), show_default=True, help="Folder to make.")
@click.option("--minutes", type=click.FloatRange(min=0.05), default=2.5, show_default=True, help="To train, about.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of every random draw.")
@_main_options
def demo(out: Path, minutes: float, seed: int, verbose: int, as_json: bool) -> None:
    """The whole method on an embedded cohort: no download, a score table and pictures at the end."""
    from strokenet.console import tracking
    from strokenet.demo import DemoConfig, run_demo
    from strokenet.memory import keep_freed_memory
    from strokenet.report import show_demo

    keep_freed_memory()
    with tracking(_start(verbose)) as track:
        outcome = run_demo(out, DemoConfig(minutes=minutes, seed=seed), track)
    show_demo(outcome, as_json=as_json)


@cli.command(short_help="Draw a semi-synthetic stroke cohort with its truth.")
@click.option("-o", "--out", type=FOLDER, required=True, help="Folder to make.")
@click.option("-n", "cases", type=click.IntRange(min=1), required=True, help="How many cases.")
@click.option(
    "--style",
    type=click.Choice(["atlas", "clinic"]),
    default="atlas",
    show_default=True,
    help="T1 alone, stripped, in MNI space; or whole-head T1 and FLAIR as a hospital stores them.",
)
@click.option("--label-maps", type=EXISTING, help="Folder of FreeSurfer label maps [default: drawn heads].")
@click.option("--lesions", type=EXISTING, help="Folder of lesion masks in MNI space [default: drawn strokes].")
@click.option(
    "--domain",
    type=click.Choice(["natural", "random"]),
    default="natural",
    show_default=True,
    help="Contrasts of T1 and FLAIR, or any at all.",
)
@click.option(
    "--times",
    type=click.IntRange(1, 2),
    default=1,
    show_default=True,
    help="Style clinic: examinations of each patient; of two, the label is what changed.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of every random draw.")
@click.option("--jobs", type=click.IntRange(min=1), help="Processes [default: by cores and free memory].")
@_main_options
def synth(out: Path, jobs: int | None, verbose: int, as_json: bool, **options: Any) -> None:
    """Draw a cohort of strokes: real or drawn heads, real or drawn lesions, volumes as in the paper's Table I."""
    from strokenet.console import tracking
    from strokenet.report import show_synth
    from strokenet.synth.synth import SynthConfig, synthesise

    with tracking(_start(verbose)) as track:
        cohort = synthesise(out, SynthConfig(**options), jobs=jobs, track=track)
    show_synth(cohort, as_json=as_json)


@cli.command(short_help="Native MRI to one grid: brain, registration, bias, crop.")
@click.argument("source", type=EXISTING, required=False)
@click.option("-o", "--out", type=FOLDER, required=True, help="nnU-Net raw folder to make.")
@click.option("--t1", type=EXISTING, help="One case: its T1.")
@click.option("--flair", type=EXISTING, help="One case: its FLAIR.")
@click.option("--t1-2", type=EXISTING, help="One case: its T1 of a second time.")
@click.option("--flair-2", type=EXISTING, help="One case: its FLAIR of a second time.")
@click.option("--label", type=EXISTING, help="One case: its lesion mask; of two times, of what changed.")
@click.option("--case", "case_id", help="Name of the one case [default: its first file's, or its folder's].")
@click.option("--reference", type=_SCANS, default="flair", show_default=True, help="Scan whose voxels all are given.")
@click.option("--brain", default="deepbet", show_default=True, help="deepbet, none (stripped already), or a mask file.")
@click.option("--bias/--no-bias", default=True, show_default=True, help="Remove the bias field (N4).")
@click.option("--zscore", is_flag=True, help="Mean 0, deviation 1 inside the brain.")
@click.option("--label-on", type=_SCANS, help="Scan that the label was drawn on [default: by its grid].")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes, 2 GB each.")
@_main_options
def prepare(
    source: Path | None,
    out: Path,
    t1: Path | None,
    flair: Path | None,
    t1_2: Path | None,
    flair_2: Path | None,
    label: Path | None,
    case_id: str | None,
    brain: str,
    jobs: int,
    verbose: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Prepare SOURCE (a folder of PATIENT/t1, flair, label .nii.gz, or a table case,t1,flair,label .csv), or one case.

    Meddahi 2024, IV.B: RAS, brain extraction, T1 registered to FLAIR, bias, one resampling, crop with the T1's brain.
    With t1_2 and flair_2, the scans of a second time, they are brought to the first time's.
    """
    from strokenet.console import tracking
    from strokenet.prepare.cohort import prepare_cohort
    from strokenet.prepare.config import PrepareConfig
    from strokenet.prepare.inputs import one_case, read_inputs
    from strokenet.report import show_prepared

    given = {"t1": t1, "flair": flair, "t1_2": t1_2, "flair_2": flair_2}
    scans = {name: path for name, path in given.items() if path is not None}
    if (source is None) == (not scans) or (source is not None and (label or case_id)):
        raise click.UsageError("give either SOURCE or one case by --t1, --flair, --label, --case")
    cases = read_inputs(source) if source is not None else one_case(scans, label, case_id)
    config = PrepareConfig(brain=brain if brain in ("deepbet", "none") else Path(brain), **options)  # type: ignore[arg-type]
    with tracking(_start(verbose)) as track:
        done = prepare_cohort(cases, out, config, jobs=jobs, track=track)
    show_prepared(done, out, as_json=as_json)
    sys.exit(done.exit_code)


@cli.command(short_help="Look at a raw dataset and decide how to train.")
@click.argument("dataset", type=EXISTING)
@click.option("-o", "--out", type=FOLDER, required=True, help="Workspace to make.")
@click.option(
    "--planner",
    type=click.Choice(["plain", "resenc-m", "resenc-l", "resenc-xl"]),
    default="plain",
    show_default=True,
    help="Network: plain U-Net, or one with a residual encoder of size M, L, XL.",
)
@click.option("--gpu-memory", type=click.FloatRange(min=0, min_open=True), help="Budget, GB [default: the planner's].")
@click.option(
    "--orientation",
    type=click.Choice(["RAS", "as-stored"]),
    default="RAS",
    show_default=True,
    help="Turn every scan to RAS, or leave its axes as the file has them.",
)
@click.option("--jobs", type=click.IntRange(min=1), help="Processes [default: by cores and free memory].")
@_main_options
def plan(
    dataset: Path,
    out: Path,
    planner: Any,
    gpu_memory: float | None,
    orientation: Any,
    jobs: int | None,
    verbose: int,
    as_json: bool,
) -> None:
    """Look at DATASET (an nnU-Net v2 raw folder) and decide how to train."""
    from strokenet.console import tracking
    from strokenet.preprocess.planning import PlanConfig, plan_workspace
    from strokenet.report import show_plan

    config = PlanConfig(planner=planner, gpu_memory_gb=gpu_memory, orientation=orientation, jobs=jobs)
    with tracking(_start(verbose)) as track:
        planned = plan_workspace(dataset, out, config, track)
    show_plan(planned, as_json=as_json)


@cli.command(short_help="Bring every case to the plan's grid and intensities.")
@click.argument("work", type=EXISTING)
@click.option("--jobs", type=click.IntRange(min=1), help="Processes [default: by cores and free memory].")
@_main_options
def preprocess(work: Path, jobs: int | None, verbose: int, as_json: bool) -> None:
    """Bring every case of WORK to the plan's grid and intensities."""
    from strokenet.console import tracking
    from strokenet.preprocess.planning import preprocess_workspace
    from strokenet.report import show_preprocessed

    with tracking(_start(verbose)) as track:
        done = preprocess_workspace(work, jobs, track)
    show_preprocessed(done, work, as_json=as_json)


@cli.command()
@click.argument("work", type=EXISTING)
@click.option("--fold", default="0", show_default=True, help='Number of the fold, or "all" to train on every case.')
@click.option("--epochs", type=click.IntRange(min=1), default=1000, show_default=True, help="Length of the schedule.")
@click.option("--stop-epoch", type=click.IntRange(min=1), help="Stop there; the schedule stays.")
@click.option(
    "--iters-per-epoch",
    "iterations",
    type=click.IntRange(min=1),
    default=250,
    show_default=True,
    help="Steps an epoch.",
)
@click.option(
    "--val-iters",
    "val_iterations",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Validation batches an epoch.",
)
@click.option("--batch-size", type=click.IntRange(min=1), help="Patches a step [default: the plan's].")
@click.option(
    "--lr",
    type=click.FloatRange(min=0, min_open=True),
    default=1e-2,
    show_default=True,
    help="Learning rate of the first epoch.",
)
@click.option("--init", type=EXISTING, help="Model folder whose weights to start from.")
@click.option(
    "--init-heads",
    type=click.Choice(["keep", "new"]),
    default="keep",
    show_default=True,
    help="With --init: keep its last layers where the labels agree, or draw new ones.",
)
@click.option(
    "--augment",
    type=click.Choice(["device", "batchgenerators", "none"]),
    default="device",
    show_default=True,
    help="Who changes the patches: our code on the device, the package on the CPU, nobody.",
)
@click.option(
    "--modality-dropout",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    metavar="P",
    help="Chance that a patch loses channels: one model for any of them.",
)
@click.option(
    "--resident-gb",
    type=click.FloatRange(min=0),
    metavar="GB",
    help="GPU memory for the cases; 0 reads each patch from disk [default: what the network leaves free].",
)
@click.option("--validate-every", type=click.IntRange(min=0), default=0, help="Whole volumes every N epochs, 0 never.")
@click.option("--precision", type=_PRECISION, default="auto", show_default=True, help="Numbers of the network.")
@click.option(
    "--step",
    type=click.Choice(["fast", "reference"]),
    default="fast",
    show_default=True,
    help="How a step is computed: fast, or by torch's own layers, to compare.",
)
@click.option("--compile", is_flag=True, help="The network by torch.compile; without it where that fails.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--resume", is_flag=True, help="Go on where the run stopped; with more --epochs, extend it.")
@click.option("--max-time", "max_time_minutes", type=click.FloatRange(min=0), help="Minutes after which to stop.")
@click.option(
    "--checkpoint-every",
    "checkpoint_minutes",
    type=click.FloatRange(min=0),
    default=10,
    show_default=True,
    metavar="MIN",
    help="Within an epoch too, a checkpoint every so many minutes.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of every random draw.")
@click.option("--deterministic", is_flag=True, help="Refuse operations that are not reproducible.")
@_main_options
def train(work: Path, verbose: int, as_json: bool, **options: Any) -> None:
    """Train one fold of WORK.

    The processes that torchrun or srun starts train it together, each with a share of every batch.
    """
    from strokenet.console import watching
    from strokenet.infer.shard import launched_shard
    from strokenet.memory import keep_freed_memory
    from strokenet.report import show_training
    from strokenet.train.distributed import restarted
    from strokenet.train.run import TrainConfig
    from strokenet.train.train import train as run
    from strokenet.workspace import Workspace

    keep_freed_memory()
    launched = launched_shard()
    rank = launched.index if launched else 0
    options["resume"] |= restarted()
    with watching(_start(verbose, rank)) as (track, view):
        result = run(Workspace(work), TrainConfig(**options), track, view, launched)
    if rank == 0:
        show_training(result, as_json=as_json)
    sys.exit(128 + result.signal if result.signal else 0)


@cli.command(short_help="Bring a model to another plan: channels, network.")
@click.argument("model", type=EXISTING)
@click.option("--plan", "target", type=EXISTING, required=True, metavar="WORK", help="Workspace with the new plan.")
@click.option("-o", "--out", type=FOLDER, required=True, help="Model folder to make.")
@click.option(
    "--map",
    "pairs",
    multiple=True,
    metavar="NEW=OLD|zero|mean",
    help="What a channel of the plan takes: one of the model's, nothing, or all [default: its namesake, else mean].",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the new parameters.")
@_main_options
def adapt(model: Path, target: Path, out: Path, pairs: tuple[str, ...], seed: int, verbose: int, as_json: bool) -> None:
    """Bring the trained MODEL to the plan of WORK, ready for `strokenet train WORK --init`."""
    from strokenet.model.adapted import AdaptConfig, adapt_model
    from strokenet.report import show_adapted

    _start(verbose)
    done = adapt_model(model, target, out, AdaptConfig(channels=_channel_map(pairs), seed=seed))
    show_adapted(done, target, out, every=verbose > 0, as_json=as_json)


@cli.command(short_help="Segment a folder of scans, or one case.")
@click.argument("model", type=EXISTING)
@click.argument("input_dir", type=EXISTING, required=False)
@click.option("-o", "--out", type=FOLDER, required=True, help="Folder for the masks.")
@click.option("--t1", type=EXISTING, help="One case: its T1.")
@click.option("--flair", type=EXISTING, help="One case: its FLAIR.")
@click.option("--channel", "channels", multiple=True, metavar="NAME=FILE", help="One case: any other channel.")
@click.option("--case", "case_id", help="Name of the one case [default: its first file's name].")
@click.option(
    "--tta",
    type=click.Choice(["none", "plan", "full"]),
    default="plan",
    show_default=True,
    help="Mirrored copies to average: none, along the plan's axes, or along all.",
)
@click.option("--precision", type=_PRECISION, default="auto", show_default=True, help="Numbers of the network.")
@click.option("--folds", help="Folds to average, e.g. 0,1,2 [default: all that are trained].")
@click.option(
    "--semantics",
    type=click.Choice(["improved", "exact"]),
    help="Sum tiles in float32, or round as nnU-Net does [default: the plan's].",
)
@click.option(
    "--crop",
    type=click.Choice(["nonzero", "brain"]),
    default="nonzero",
    show_default=True,
    help="What is tiled: all of the scan that is not zero, or the brain alone: fewer tiles, another answer.",
)
@click.option("--threshold", type=click.FloatRange(0, 1, max_open=True), help="Lesion above it [default: the plan's].")
@click.option("--min-volume", "min_volume_mm3", type=click.FloatRange(min=0), help="mm3 [default: the plan's].")
@click.option("--no-postprocess", is_flag=True, help="Most probable label, nothing removed.")
@click.option("--probabilities", is_flag=True, help="Also write OUT/probabilities/CASE.nii.gz.")
@click.option(
    "--validation", is_flag=True, help="Instead of INPUT_DIR: MODEL's validation cases, each by its own fold."
)
@click.option("--native", is_flag=True, help="Prepared scans: also OUT/native/CASE.nii.gz, on the given grid.")
@click.option(
    "--agreement/--no-agreement",
    default=True,
    show_default=True,
    help="With a model of --modality-dropout: each channel alone beside all of them.",
)
@click.option("--native-scan", type=_SCANS, help="With --native: on which scan's [default: the reference's].")
@click.option(
    "--shard", metavar="I/N", help="Segment the Ith of N parts [default: what torchrun or srun says, else all]."
)
@click.option("--recompute", is_flag=True, help="Also cases that are finished and have not changed.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@_main_options
def infer(
    model: Path,
    input_dir: Path | None,
    out: Path,
    t1: Path | None,
    flair: Path | None,
    channels: tuple[str, ...],
    case_id: str | None,
    folds: str | None,
    no_postprocess: bool,
    validation: bool,
    shard: str | None,
    verbose: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Segment the scans of INPUT_DIR (CASE_0000.nii.gz ...), or one case given by --t1, --flair, --channel."""
    from strokenet.console import tracking
    from strokenet.infer.infer import InferConfig, infer_folder, infer_one
    from strokenet.infer.shard import launched_shard, shard_from_words
    from strokenet.infer.validation import infer_validation
    from strokenet.memory import keep_freed_memory
    from strokenet.report import show_inference

    numbers = tuple(folds.split(",")) if folds else None
    files = _channel_files(t1, flair, channels)
    part = shard_from_words(shard) if shard else None if files else launched_shard()
    config = InferConfig(folds=numbers, postprocess=not no_postprocess, shard=part, **options)
    if bool(files) + validation + (input_dir is not None) != 1:
        raise click.UsageError("give one of INPUT_DIR, --validation, or one case by --t1, --flair, --channel")
    keep_freed_memory()
    with tracking(_start(verbose)) as track:
        if validation:
            results = infer_validation(model, out, config, track)
        elif input_dir is not None:
            results = infer_folder(model, input_dir, out, config, track)
        else:
            results = infer_one(model, files, out, config, track, case_id)
    show_inference(results, out, as_json=as_json)
    bad = sum(r.status == "failed" for r in results)
    sys.exit(0 if part and part.of == "torchrun" else _exit_code(len(results) - bad, len(results)) if results else 0)


@cli.command()
@click.argument("prediction", metavar="PRED", type=EXISTING)
@click.argument("reference", metavar="REF", type=EXISTING)
@click.option("-o", "--out", type=click.Path(path_type=Path, dir_okay=False), help="scores.json; a .csv joins it.")
@click.option("--against", type=EXISTING, help="A second prediction to compare with, case by case.")
@click.option(
    "--fit-postprocessing",
    "fit",
    type=EXISTING,
    metavar="MODEL",
    help="Instead: fit MODEL's threshold and smallest volume on its validation cases in PRED, and write them.",
)
@_main_options
def evaluate(
    prediction: Path,
    reference: Path,
    out: Path | None,
    against: Path | None,
    fit: Path | None,
    verbose: int,
    as_json: bool,
) -> None:
    """Score PRED against REF: two folders of masks, or two files."""
    from strokenet.console import tracking
    from strokenet.evaluate.evaluate import evaluate_paths
    from strokenet.evaluate.fit import fit_postprocessing
    from strokenet.report import show_fit, show_scores

    if fit is not None and against is not None:
        raise click.UsageError("--fit-postprocessing fits one prediction; leave --against out")
    with tracking(_start(verbose)) as track:
        if fit is not None:
            show_fit(fit_postprocessing(prediction, reference, fit, out=out, track=track), as_json=as_json)
            return
        evaluation = evaluate_paths(prediction, reference, against=against, out=out, track=track)
    show_scores(evaluation, as_json=as_json)
    sys.exit(_exit_code(len(evaluation.cases), len(evaluation.cases) + len(evaluation.failures)))


@cli.command("import-nnunet", short_help="Take over a trained nnU-Net, v1 or v2.")
@click.argument("source", type=EXISTING)
@click.option("-o", "--out", type=FOLDER, required=True, help="Model folder to make.")
@_main_options
def import_nnunet(source: Path, out: Path, verbose: int, as_json: bool) -> None:
    """Read SOURCE, the results folder of a trained nnU-Net, v1 or v2, and write it as a model. Runs nothing in it."""
    from strokenet.nnunet.importing import import_nnunet as run
    from strokenet.report import show_import

    _start(verbose)
    show_import(run(source, out), out, as_json=as_json)


@cli.command("export-nnunet", short_help="Give a model to nnU-Net v2.")
@click.argument("model", type=EXISTING)
@click.option("-o", "--out", type=FOLDER, required=True, help="Results folder to make.")
@_main_options
def export_nnunet(model: Path, out: Path, verbose: int, as_json: bool) -> None:
    """Write MODEL as a results folder for nnUNetv2_predict_from_modelfolder; without weights, its plans alone."""
    from strokenet.nnunet.export import export_nnunet as run
    from strokenet.report import show_export

    _start(verbose)
    show_export(run(model, out), as_json=as_json)


@cli.command(short_help="Versions, devices, kernels and self-checks.")
@_main_options
def doctor(verbose: int, as_json: bool) -> None:
    """Versions, devices, which kernels run and why, and quick self-checks."""
    from strokenet.doctor import examine
    from strokenet.report import show_doctor

    _start(verbose)
    report = examine()
    show_doctor(report, as_json=as_json)
    sys.exit(0 if report.healthy else 1)


def _channel_files(t1: Path | None, flair: Path | None, channels: tuple[str, ...]) -> dict[str, Path]:
    files = {name: path for name, path in (("T1", t1), ("FLAIR", flair)) if path is not None}
    for pair in channels:
        name, _, path = pair.partition("=")
        if not path or name in files:
            raise click.UsageError(f"--channel {pair!r}: write NAME=FILE, each name once")
        files[name] = Path(path)
    return files


def _channel_map(pairs: tuple[str, ...]) -> dict[str, str]:
    channels: dict[str, str] = {}
    for pair in pairs:
        new, _, old = pair.partition("=")
        if not new or not old or new.casefold() in map(str.casefold, channels):
            raise click.UsageError(f"--map {pair!r}: write NEW=OLD, NEW=zero or NEW=mean, each channel once")
        channels[new] = old
    return channels


def _exit_code(succeeded: int, of: int) -> int:
    return 0 if succeeded == of and of else 3 if succeeded else 4


def _stop(number: int, frame: FrameType | None) -> None:
    for other in heeded():
        signal.signal(other, signal.SIG_IGN)  # a second one would end the removal of half-written files
    sys.exit(128 + number)


def _fail(text: str, code: int) -> NoReturn:
    from strokenet.console import show_error

    show_error(text)
    sys.exit(code)


def main() -> None:
    """Runs the command; every expected error becomes one line and the right exit code."""
    from kernels.dispatch import wanted
    from planner.plan import PlanError
    from strokenet.data.errors import InputError, ToldElsewhere

    for number in heeded():
        signal.signal(number, _stop)
    try:
        wanted()
    except ValueError as error:  # before any case is read: a worker would meet it in the middle
        _fail(str(error), 2)
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except ToldElsewhere as error:
        sys.exit(error.exit_code)
    except InputError as error:
        _fail(str(error), error.exit_code)
    except (PlanError, OSError) as error:
        _fail(str(error), InputError.exit_code)
