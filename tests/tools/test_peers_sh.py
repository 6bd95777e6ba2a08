"""tools/peers.sh --wheels: parcels that stay under the limit, and a wheel that is larger can be joined again."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPT = "tools/peers.sh"


def bash(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(("bash", *words), cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, str]:
    """Files of many sizes in parcels of 1000 bytes, and what was printed."""
    wheels, parcels = tmp_path / "wheels", tmp_path / "parcels"
    wheels.mkdir()
    parcels.mkdir()
    for size in (1, 400, 600, 999, 1000, 1001, 2500):
        (wheels / f"p{size}.whl").write_bytes(bytes(n % 251 for n in range(size)))
    lines = f". {SCRIPT}; limit=1000; into_parcels {wheels} {parcels}; cut_into_parcels {wheels} {parcels}"
    done = bash("-c", f"{lines}; say_how {parcels}")
    assert done.returncode == 0, done.stderr
    assert list(wheels.iterdir()) == []
    return parcels, done.stdout


def test_a_parcel_stays_within_the_limit_and_none_is_wasted(packed: tuple[Path, str]) -> None:
    parcels, _ = packed
    names = {parcel.name: sorted(file.name for file in parcel.iterdir()) for parcel in parcels.iterdir()}
    assert all(sum(file.stat().st_size for file in parcel.iterdir()) <= 1000 for parcel in parcels.iterdir())
    assert names["1"] == ["p1000.whl"]
    assert names["2"] == ["p1.whl", "p999.whl"]
    assert names["3"] == ["p400.whl", "p600.whl"]
    assert len(names) == 3 + 2 + 3


def test_what_is_printed_joins_the_large_wheels(packed: tuple[Path, str]) -> None:
    parcels, said = packed
    for line in re.findall(r"^ +cat .*$", said, re.M):
        assert bash("-c", line).returncode == 0
    for size in (1001, 2500):
        assert (parcels / "1" / f"p{size}.whl").read_bytes() == bytes(n % 251 for n in range(size))
    assert f"pip install --no-index --no-deps {parcels}/*/*.whl" in said


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    done = bash(SCRIPT, "--wheels", str(tmp_path))
    assert done.returncode == 2
    assert "is not empty" in done.stderr


@pytest.mark.parametrize("words", [("--wheels",), ("--what",), ("--wheels", "a", "b")])
def test_other_words_show_the_usage(words: tuple[str, ...]) -> None:
    done = bash(SCRIPT, *words)
    assert done.returncode == 2
    assert "--wheels FOLDER" in done.stderr


def test_every_wheel_is_pinned_and_named_once() -> None:
    lines = [line for line in (ROOT / "tools/wheels.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert len({line.split("==")[0].lower().replace("-", "_") for line in lines}) == len(lines)


def test_what_strokenet_needs_has_the_pin_of_the_tests() -> None:
    pins, wheels = (
        dict(line.lower().split("==") for line in (ROOT / name).read_text().splitlines() if "==" in line)
        for name in ("tools/constraints.txt", "tools/wheels.txt")
    )
    assert {name for name in pins if name in wheels and pins[name] != wheels[name]} == set()
    there = {"torch", "numpy", "scipy", "deepbet", "pytest-xdist", "ruff", "mypy"}
    assert pins.keys() - wheels.keys() == there
