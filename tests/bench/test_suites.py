"""The run of a suite: in parts, each going on where the last one ended, and quick numbers are never kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.__main__ import main
from bench.measure import Comparison, Measurement, Suite
from bench.suites import SUITES, Runs, run_suite
from bench.table import kept


class Fake:
    """A suite of three comparisons a, b, c; counts what is measured, and each takes as long as the clock is told."""

    def __init__(self) -> None:
        self.measured: list[str] = []
        self.now = 0.0
        self.fails: tuple[str, ...] = ()

    def suite(self) -> Suite:
        return Suite(lambda _: [Comparison(what=what, run=self._run(what)) for what in "abc"])

    def _run(self, what: str) -> Callable[[], Measurement]:
        def run() -> Measurement:
            self.measured.append(what)
            self.now += 100.0
            if what in self.fails:
                raise AssertionError("the answers differ")
            return Measurement(suite="fake", what=what, times_ms={"strokenet": (1.0 * len(self.measured),)})

        return run


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    monkeypatch.setattr("bench.suites.time.monotonic", lambda: made.now)
    return made


def names(folder: Path) -> list[str]:
    return [measurement.what for measurement in kept("fake", folder)]


def test_a_call_ends_before_the_comparison_that_would_end_too_late(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_suite("fake", fake.suite(), Runs(keep=True, budget=250, folder=tmp_path))
    assert fake.measured == ["a", "b"]
    assert names(tmp_path) == ["a", "b"]
    assert "1 of 3 comparisons left after 250 s; run `python -m bench fake --save` again" in capsys.readouterr().out


def test_the_next_call_goes_on_and_a_finished_suite_is_left_alone(fake: Fake, tmp_path: Path) -> None:
    how = Runs(keep=True, budget=0, folder=tmp_path)
    for seen in (["a"], ["a", "b"], ["a", "b", "c"], ["a", "b", "c"]):
        assert run_suite("fake", fake.suite(), how)
        assert fake.measured == seen
        assert names(tmp_path) == seen


def test_again_forgets_what_is_kept(fake: Fake, tmp_path: Path) -> None:
    run_suite("fake", fake.suite(), Runs(keep=True, folder=tmp_path))
    run_suite("fake", fake.suite(), Runs(keep=True, again=True, budget=0, folder=tmp_path))
    assert fake.measured == ["a", "b", "c", "a"]
    assert [(m.what, m.times_ms["strokenet"]) for m in kept("fake", tmp_path)] == [("a", [4.0])]


def test_numbers_of_other_code_are_measured_again(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = Runs(keep=True, folder=tmp_path)
    run_suite("fake", fake.suite(), how)
    monkeypatch.setattr("bench.table.digest_of_code", lambda: "another")
    run_suite("fake", fake.suite(), how)
    assert fake.measured == ["a", "b", "c"] * 2


def test_each_comparison_is_kept_when_it_is_measured(fake: Fake, tmp_path: Path) -> None:
    seen = []

    def watched(what: str) -> Comparison:
        def run() -> Measurement:
            seen.append(names(tmp_path))
            return Measurement(suite="fake", what=what, times_ms={"strokenet": (1.0,)})

        return Comparison(what=what, run=run)

    suite = Suite(lambda _: [watched(what) for what in "ab"])
    run_suite("fake", suite, Runs(keep=True, folder=tmp_path))
    assert seen == [[], ["a"]]


def test_one_that_fails_costs_only_itself(fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake.fails = ("b",)
    assert not run_suite("fake", fake.suite(), Runs(keep=True, folder=tmp_path))
    assert names(tmp_path) == ["a", "c"]
    assert "fake: b failed: the answers differ" in capsys.readouterr().out
    fake.fails = ()
    assert run_suite("fake", fake.suite(), Runs(keep=True, folder=tmp_path))
    assert names(tmp_path) == ["a", "b", "c"]  # in the suite's order


def test_without_save_nothing_is_kept_and_that_is_said(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_suite("fake", fake.suite(), Runs(budget=0, folder=tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert "nothing was kept: with --save" in capsys.readouterr().out


def test_a_call_that_ends_by_its_budget_ends_well_and_a_failure_does_not(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SUITES, "io", fake.suite())
    assert CliRunner().invoke(main, ["io", "--budget", "0"]).exit_code == 0
    fake.fails = ("a",)
    assert CliRunner().invoke(main, ["io"]).exit_code == 1


def test_quick_numbers_are_not_kept(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUITES, "io", fake.suite())
    result = CliRunner().invoke(main, ["io", "--quick", "--save"])
    assert result.exit_code == 2
    assert result.output.splitlines()[-1] == "Error: --quick numbers are never kept; leave out --quick or --save"
    assert fake.measured == []


def test_the_issues_suites_are_there() -> None:
    assert {"infer", "post", "resample", "norm", "conv", "io", "step", "data", "epoch"} <= set(SUITES)


@pytest.mark.parametrize("name", [name for name in SUITES if name not in ("infer", "step", "data", "epoch")])
def test_a_suite_names_each_comparison_once(name: str) -> None:
    for quick in (False, True):
        what = [comparison.what for comparison in SUITES[name].comparisons(quick)]
        assert what
        assert len(set(what)) == len(what)
