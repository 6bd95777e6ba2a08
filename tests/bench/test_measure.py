"""The measuring tool: contenders run in turn, warm-up is not counted, what is kept can be read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.__main__ import main
from bench.measure import Measurement, digest_of_code, in_turn, machine
from bench.table import report, save


def test_contenders_run_in_turn_and_the_warm_up_is_not_counted() -> None:
    order: list[str] = []
    measured = in_turn("x", "y", {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3, warm_up=2)
    assert order == ["a", "b"] * 5
    assert [len(times) for times in measured.times_ms.values()] == [3, 3]


def test_the_median_is_quoted() -> None:
    measured = Measurement(suite="x", what="y", times_ms={"a": (1.0, 9.0, 2.0)})
    assert measured.median_ms("a") == 2.0


def test_less_than_a_millisecond_is_printed_in_microseconds(capsys: pytest.CaptureFixture[str]) -> None:
    report([Measurement(suite="x", what="y", times_ms={"a": (0.0315,), "b": (12.0,)})])
    shown = capsys.readouterr().out.splitlines()
    assert "31.5 us" in shown[-2]
    assert "12.0 ms" in shown[-1]


def test_what_is_kept_names_the_machine(tmp_path: Path) -> None:
    path = save("x", [Measurement(suite="x", what="y", times_ms={"a": (1.0,)})], tmp_path)
    content = json.loads(path.read_text())
    assert content["machine"] == machine()
    assert content["code"] == digest_of_code()
    assert content["measurements"][0]["times_ms"] == {"a": [1.0]}


def test_a_suite_compares_the_answers_and_prints_a_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.post.QUICK", (21, 25, 23))
    result = CliRunner().invoke(main, ["post", "--quick"])
    assert result.exit_code == 0, result.output
    assert "cc3d.dust" in result.output
    assert "x 1.00" in result.output
    assert "(21, 25, 23), full; equal, 1 lesions left" in result.output


def test_the_digest_is_of_the_code_that_is_measured() -> None:
    assert re.fullmatch("[0-9a-f]{12}", digest_of_code())
    assert digest_of_code() == digest_of_code()


def test_the_model_of_the_processor_is_on_the_row() -> None:
    measured = in_turn("x", "y", {"a": lambda: None}, repeats=1)
    assert measured.on == machine()["processor"]
    assert measured.peaks_gb == {}


def test_an_unknown_suite_is_a_usage_error() -> None:
    assert CliRunner().invoke(main, ["speed"]).exit_code == 2
