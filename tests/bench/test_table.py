"""What is kept of a run, and the README's section, which is what the kept files say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.measure import CPU_BF16, CPU_FLOAT32, GPU, Measurement, Suite, kind_of, machine, slug
from bench.suites import SUITES
from bench.table import BEGIN, END, README, RESULTS, kept, markdown, readme_section, report, save, write_readme
from strokenet.data.files import read_json, write_json

MEASURED = Measurement(
    suite="x",
    what="a brain",
    times_ms={"strokenet": (10.0, 12.0, 11.0), "peer": (33.0,)},
    on="AMD EPYC",
    answers="equal",
    floor_ms=5.5,
    peaks_gb={"strokenet": 1.5},
)


def test_the_readme_says_what_the_kept_files_say() -> None:
    section = README.read_text().split(BEGIN)[1].split(END)[0]
    assert section.strip() == readme_section(SUITES).strip()


def test_a_suite_is_kept_under_its_machine_as_numbers_a_table_and_a_picture(tmp_path: Path) -> None:
    path = save("x", [MEASURED], tmp_path)
    assert path == tmp_path / slug(machine()) / "x.json"
    assert json.loads(path.read_text())["measurements"][0]["times_ms"]["strokenet"] == [10.0, 12.0, 11.0]
    row = "x: a brain | 11 ms [10 ms .. 12 ms] | peer 33 ms (x 3.00) | 50% | strokenet 1.50 GB | equal | AMD EPYC"
    assert f"| {row} | `python -m bench x` |" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_what_is_kept_of_this_code_and_machine_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept("x", tmp_path) == []
    save("x", [MEASURED], tmp_path)
    (again,) = kept("x", tmp_path)
    assert (again.what, again.median_ms("strokenet"), again.peaks_gb) == ("a brain", 11.0, {"strokenet": 1.5})
    with monkeypatch.context() as changed:
        changed.setattr("bench.table.digest_of_code", lambda: "another")
        assert kept("x", tmp_path) == []
    place = tmp_path / slug(machine()) / "x.json"
    write_json(place, read_json(place) | {"machine": machine() | {"torch": "0.1"}})
    assert kept("x", tmp_path) == []


def test_suites_of_two_codes_are_two_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for suite, code in (("x", "1" * 12), ("y", "2" * 12), ("z", "1" * 12)):
        monkeypatch.setattr("bench.table.digest_of_code", lambda code=code: code)
        save(suite, [MEASURED], tmp_path)
    suites = dict.fromkeys("xyz", Suite(lambda _: [], whole=True))
    first, second = readme_section(suites, tmp_path).split("code " + "2" * 12)
    assert "x: a brain" in first
    assert "z: a brain" in first
    assert "y: a brain" in second


def test_the_kept_files_are_of_suites_that_are_and_name_their_own() -> None:
    for path in RESULTS.glob("*/*.json"):
        assert path.stem in SUITES
        assert {row["suite"] for row in read_json(path)["measurements"]} == {path.stem}
        assert path.with_suffix(".md").read_text() == markdown({path.stem: read_json(path)})


def test_little_memory_is_said_in_megabytes(capsys: pytest.CaptureFixture[str]) -> None:
    report([replace(MEASURED, peaks_gb={"strokenet": 0.005})])
    assert "5.1 MB" in capsys.readouterr().out


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    save("x", [MEASURED], tmp_path)
    here = kind_of(machine())
    section = readme_section({"x": Suite(lambda _: []), "y": Suite(lambda _: [], (here,))}, tmp_path)
    missing = [line for line in section.splitlines() if "not yet measured" in line]
    others = [kind for kind in (CPU_FLOAT32, CPU_BF16, GPU) if kind != here]
    assert sorted(missing) == sorted(
        [
            *(f"| {kind} | not yet measured | `python -m bench x --save` |" for kind in others),
            f"| {here} | not yet measured | `python -m bench y --save` |",
        ]
    )
    assert "not yet" not in readme_section({"x": Suite(lambda _: [], (here,))}, tmp_path)


def test_the_readme_has_rows_of_whole_work_and_says_where_its_parts_are(tmp_path: Path) -> None:
    for suite in "xy":
        save(suite, [MEASURED], tmp_path)
    section = readme_section({"x": Suite(lambda _: [], whole=True), "y": Suite(lambda _: [])}, tmp_path)
    assert "| x: a brain |" in section
    assert "y: a brain" not in section
    assert f"- {slug(machine())}: [y](bench/results/{slug(machine())}/y.md)\n" in section


def test_the_section_takes_its_place_and_nothing_else(tmp_path: Path) -> None:
    save("x", [MEASURED], tmp_path / "results")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    suites = {"x": Suite(lambda _: [], (), whole=True)}
    write_readme(suites, readme, tmp_path / "results")
    text = readme.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "a brain" in text
    readme.write_text("no place")
    with pytest.raises(ValueError, match="one line"):
        write_readme(suites, readme, tmp_path / "results")
    assert readme.read_text() == "no place"


def test_report_prints_floor_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    report([MEASURED])
    shown = capsys.readouterr().out
    assert "x: a brain; equal; AMD EPYC" in shown
    assert "floor x 2.00   1.50 GB" in shown


def test_parts_stand_beside_their_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    split = replace(MEASURED, parts_ms={"strokenet": {"forward": 3.0, "backward": 8.0}, "peer": {"forward": 20.0}})
    report([split])
    assert "forward 3 ms, backward 8 ms\n" in capsys.readouterr().out
    path = save("x", [split], tmp_path)
    row = "x: a brain | 11 ms [10 ms .. 12 ms]: forward 3 ms, backward 8 ms | peer 33 ms (x 3.00): forward 20 ms |"
    assert row in path.with_suffix(".md").read_text()
    older = {name: value for name, value in read_json(path)["measurements"][0].items() if name != "parts_ms"}
    assert "x: a brain | 11 ms [10 ms .. 12 ms] | peer" in markdown({"x": read_json(path) | {"measurements": [older]}})


def test_a_machine_is_named_by_its_gpu_or_its_processor() -> None:
    cpu = {"GPU": "none", "processor": "AMD EPYC", "cores": "2", "instructions": "AVX512 bf16"}
    assert slug(cpu) == "amd-epyc-2-cores-avx512-bf16"
    assert slug(cpu | {"GPU": "NVIDIA H200"}) == "nvidia-h200"
    assert "processor AMD EPYC" in markdown({"x": {"machine": cpu, "measurements": []}})
    assert kind_of(cpu) == CPU_BF16
    assert kind_of(cpu | {"instructions": "AVX2"}) == CPU_FLOAT32
    assert kind_of(cpu | {"GPU": "NVIDIA H200"}) == GPU
