"""The command line: exit codes, one-line errors, a quick --help, and signals."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import nibabel
import numpy as np
import pytest

from strokenet import __version__
from strokenet.cli import cli, main
from strokenet.preprocess.planning import Preprocessed
from strokenet.train.train import TrainResult
from strokenet.workspace import Workspace
from tests.infer.models import write_case, write_model

Run = Callable[..., tuple[int, str, str]]
SIGNALS = ("SIGTERM", "SIGHUP", "SIGINT")  # Windows has no SIGHUP


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], log_as_it_was: None) -> Iterator[Run]:
    """Runs the command in this process: (exit code, stdout, stderr). Signals and logging are as before afterwards."""
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["strokenet", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, *capsys.readouterr()

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    for seed, case in enumerate("ab"):
        write_case(tmp_path / "scans", case, seed)
    return tmp_path / "scans"


def statuses(out: Path) -> dict[str, str]:
    return {row["case"]: row["status"] for row in json.loads((out / "results.json").read_text())["cases"]}


def is_one_error_line(text: str) -> bool:
    return text.startswith("error: ") and text.count("\n") == 1


def shell(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)


def test_help_answers_within_three_tenths_of_a_second() -> None:
    """Of CPU time: what a busy machine makes it wait is not the command's."""
    seconds = []
    for _ in range(5):
        before = os.times()
        done = shell("-m", "strokenet", "--help")
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert done.returncode == 0
        assert "plan, preprocess, train, infer, evaluate" in done.stdout
    assert statistics.median(seconds) < 0.3


def test_help_imports_no_heavy_package() -> None:
    asks = "import sys; sys.argv = ['strokenet', '--help']; import strokenet.cli as c\ntry: c.main()\nfinally: "
    done = shell("-c", asks + "print(*sys.modules, file=sys.stderr)")
    loaded = set(done.stderr.split())
    assert "click" in loaded
    assert not loaded & {"torch", "numpy", "scipy", "nibabel", "rich", "matplotlib"}


def test_python_m_is_the_same_command(run: Run) -> None:
    assert shell("-m", "strokenet", "--version").stdout == run("--version")[1] == f"strokenet, version {__version__}\n"


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_command_explains_itself_and_has_the_common_options(run: Run, command: str) -> None:
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert f"Usage: strokenet {command}" in out or f"{command} [OPTIONS]" in out
    for option in ("--json", "--verbose", "--quiet"):
        assert option in out


@pytest.mark.parametrize("command", [None, *sorted(cli.commands)])
def test_every_option_is_explained_and_no_summary_is_cut_at_80_columns(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str | None
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(*([command] if command else []), "--help")
    if command is None:
        listed = out.partition("Commands:")[2]
        assert "..." not in listed
        assert len(listed.split("\n")) == 2 + len(cli.commands)
    else:
        options = [p for p in cli.commands[command].params if isinstance(p, click.Option)]
        assert [option.name for option in options if not (option.help or "").strip()] == []


def test_evaluate_names_its_arguments_as_its_help_does(run: Run) -> None:
    assert "[OPTIONS] PRED REF\n" in run("evaluate", "--help")[1]


@pytest.mark.parametrize(
    "words",
    [
        ("fly",),
        ("infer",),
        ("infer", "."),
        ("infer", ".", "-o", "out"),
        ("infer", ".", ".", "-o", "out", "--t1", "setup.cfg"),
        ("infer", "no-such-folder", ".", "-o", "out"),
        ("infer", ".", ".", "-o", "out", "--threshold", "1.5"),
        ("infer", ".", ".", "-o", "out", "--tta", "all"),
        ("infer", ".", "-o", "out", "--channel", "DWI"),
        ("infer", ".", "-o", "out", "--t1", "setup.cfg", "--channel", "T1=setup.cfg"),
        ("train", ".", "--epochs", "0"),
        ("doctor", "--wings"),
        ("adapt", ".", "-o", "out"),
        ("adapt", ".", "--plan", ".", "-o", "out", "--map", "FLAIR"),
        ("prepare", ".", "-o", "out", "--reference", "t2"),
    ],
)
def test_wrong_usage_exits_2_and_makes_nothing(
    run: Run, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "setup.cfg").touch()
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*words)
    assert code == 2
    assert out == ""
    assert "Error" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["setup.cfg"]


def test_bad_data_exits_4_with_one_line(run: Run, model: Path, scans: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for words in (
        ("infer", empty, scans, "-o", tmp_path / "out"),  # no model
        ("infer", model, empty, "-o", tmp_path / "out"),  # no scans
        ("infer", model, "-o", tmp_path / "out", "--t1", scans / "a_0000.nii.gz"),  # no FLAIR
        ("infer", model, scans, "-o", tmp_path / "out", "--folds", "4"),
        ("infer", model, scans, "-o", tmp_path / "out", "--tta", "full"),
        ("infer", model, scans, "-o", tmp_path / "out", "--device", "cuda:77"),
        ("infer", model, scans, "-o", tmp_path / "out", "--threshold", "0.5", "--no-postprocess"),
        ("plan", empty, "-o", tmp_path / "work"),
        ("preprocess", empty),
        ("evaluate", empty, scans),
    ):
        code, out, err = run(*words)
        assert code == 4, words
        assert out == ""
        assert is_one_error_line(err), err
    assert not (tmp_path / "out").exists()


def test_a_control_character_in_a_name_cannot_reach_the_terminal(run: Run, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "\x1b[31mred"
    folder.mkdir()
    code, _, err = run("infer", model, folder, "-o", tmp_path / "out")
    assert code == 4
    assert "\x1b" not in err


def test_all_good_exits_0(run: Run, model: Path, scans: Path, tmp_path: Path) -> None:
    code, out, _ = run("infer", model, scans, "-o", tmp_path / "out", "--json")
    assert code == 0
    assert {row["case"]: row["status"] for row in json.loads(out)["cases"]} == {"a": "ok", "b": "ok"}
    assert statuses(tmp_path / "out") == {"a": "ok", "b": "ok"}


@pytest.mark.parametrize(("kept", "command"), [(("sub-2",), "train ."), (("sub-1_ses-2",), "train . --fold all")])
def test_preprocess_names_the_next_command(
    run: Run, monkeypatch: pytest.MonkeyPatch, kept: tuple[str, ...], command: str
) -> None:
    done = Preprocessed(made=("sub-1_ses-1",), kept=kept)
    monkeypatch.setattr("strokenet.preprocess.planning.preprocess_workspace", lambda *_: done)
    said = "1 cases preprocessed, 1 were there already"
    assert run("preprocess", ".")[:2] == (0, f"{said}\nnext: strokenet {command}\n")
    assert json.loads(run("preprocess", ".", "--json")[1]) == {"made": ["sub-1_ses-1"], "kept": [*kept]}


@pytest.mark.parametrize("finished", [True, False])
def test_train_names_the_next_command(run: Run, monkeypatch: pytest.MonkeyPatch, finished: bool) -> None:
    result = TrainResult(folder=Workspace(Path("work")).fold("0"), history=(), signal=None, finished=finished)
    monkeypatch.setattr("strokenet.train.train.train", lambda *_: result)
    code, out, _ = run("train", ".")
    assert code == 0
    assert ("next: strokenet infer work SCANS -o OUT\n" in out) == finished
    assert ("--resume goes on" in out) != finished
    assert json.loads(run("train", ".", "--json")[1])["finished"] == finished


def test_some_failed_exits_3_and_all_failed_exits_4(run: Run, model: Path, scans: Path, tmp_path: Path) -> None:
    (scans / "a_0000.nii.gz").write_bytes(b"no scan at all, but more than twenty bytes")
    code, out, err = run("infer", model, scans, "-o", tmp_path / "out")
    assert code == 3
    assert "a_0000.nii.gz" in out
    assert "a failed: " in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b.nii.gz", "manifest", "results.json"]
    (scans / "b_0001.nii.gz").write_bytes(b"")
    code, _, _ = run("infer", model, scans, "-o", tmp_path / "out")
    assert code == 4
    assert statuses(tmp_path / "out") == {"a": "failed", "b": "failed"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest", "results.json"]


def test_one_case_by_its_channels(run: Run, model: Path, scans: Path, tmp_path: Path) -> None:
    flair = ("--flair", scans / "a_0001.nii.gz")
    for extra in (("--t1", scans / "a_0000.nii.gz"), ("--channel", f"T1={scans / 'a_0000.nii.gz'}")):
        code, _, _ = run(
            *("infer", model, "-o", tmp_path / extra[0], *extra, *flair, "--case", "anna", "--probabilities"),
            *("--threshold", "0.3", "--min-volume", "0"),
        )
        assert code == 0
        mask = np.asarray(nibabel.load(tmp_path / extra[0] / "anna.nii.gz").dataobj)
        lesion = np.asarray(nibabel.load(tmp_path / extra[0] / "probabilities" / "anna.nii.gz").dataobj)
        np.testing.assert_array_equal(mask, lesion > np.float32(0.3))


def test_doctor_is_healthy_and_its_json_is_valid(run: Run) -> None:
    code, out, _ = run("doctor", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["healthy"] is True
    assert {"facts", "kernels", "checks", "healthy"} == set(report)
    code, out, _ = run("doctor")
    assert code == 0
    assert "Self-checks" in out


@pytest.mark.parametrize("words", [("doctor",), ("preprocess", "."), ("infer", ".", ".", "-o", "out")])
def test_an_unknown_word_for_the_kernels_is_refused_by_every_command(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("STROKENET_KERNELS", "fastest")
    assert run(*words) == (2, "", "error: STROKENET_KERNELS is 'fastest'; allowed: auto, reference\n")


def test_a_broken_installation_makes_doctor_exit_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strokenet.doctor._check_nifti", lambda: (False, "the mask is another"))
    code, out, _ = run("doctor")
    assert code == 1
    assert "FAILED" in out


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_a_signal_ends_infer_with_its_code_and_nothing_half_written(
    number: int, expected: int, model: Path, tmp_path: Path
) -> None:
    for seed in range(6):
        write_case(tmp_path / "scans", f"case{seed:02d}", seed, shape=(28, 28, 28))
    out = tmp_path / "out"
    words = [sys.executable, "-m", "strokenet", "infer", str(model), str(tmp_path / "scans"), "-o", str(out)]
    process = subprocess.Popen([*words, "--probabilities"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(out.glob("*.nii.gz")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == expected, err
    assert b"Traceback" not in err
    found = statuses(out)
    done = sorted(case for case, status in found.items() if status == "ok")
    assert 1 <= len(done) < 6
    assert set(found.values()) == {"ok", "skipped"}
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"{c}.nii.gz" for c in done),
        "manifest",
        "probabilities",
        "results.json",
    ]
    assert sorted(path.name for path in (out / "probabilities").iterdir()) == [f"{c}.nii.gz" for c in done]
    for case in done:
        assert np.asarray(nibabel.load(out / f"{case}.nii.gz").dataobj).shape == (28, 28, 28)


@pytest.mark.parametrize(("first", "second"), [("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGHUP"), ("SIGTERM", "SIGHUP")])
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_a_second_signal_does_not_stop_the_cleaning_up(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, first: str, second: str
) -> None:
    """A terminal that closes tells its processes twice: the system does, and the shell does."""
    cleaned = []

    def ended(*_: object) -> None:
        try:
            signal.raise_signal(signal.Signals[first])
        finally:
            signal.raise_signal(signal.Signals[second])
            cleaned.append(True)

    monkeypatch.setattr("strokenet.nnunet.importing.import_nnunet", ended)
    assert run("import-nnunet", tmp_path, "-o", tmp_path / "model")[0] == 128 + signal.Signals[first]
    assert cleaned == [True]


def test_infer_shows_each_channel_alone_unless_told_not_to(run: Run, tmp_path: Path) -> None:
    write_model(tmp_path / "model", dropout=0.5)
    write_case(tmp_path / "scans", "a")
    code, shown, _ = run("infer", tmp_path / "model", tmp_path / "scans", "-o", tmp_path / "out")
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["cases"]
    assert code == 0
    assert "Each channel alone" in shown
    for name, alone in row["agreement"]["alone"].items():
        assert f"{alone['confidence']:.3f}" in shown
        assert (f"beside {name} lowers the confidence" in shown) == (name in row["agreement"]["surer_alone"])
    t1 = ("--t1", tmp_path / "scans" / "a_0000.nii.gz")
    for scans in ((tmp_path / "scans", "--no-agreement"), t1):
        code, shown, _ = run("infer", tmp_path / "model", *scans, "-o", tmp_path / "out")
        assert code == 0
        assert "Each channel alone" not in shown
