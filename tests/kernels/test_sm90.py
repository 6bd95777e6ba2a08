"""Every Triton kernel compiles for an H100 or H200, keeps its values in registers, and waits where it should."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def built() -> list[dict[str, Any]]:
    """A record a build, from a process of its own; skips, with the reason, where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed; it has wheels for Linux alone")
    command = [sys.executable, "-m", "tests.kernels.sm90"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def launched() -> Iterator[tuple[str, str]]:
    """(file, kernel) of every @triton.jit function that no other such function calls: what the host launches."""
    for path in sorted((ROOT / "kernels").glob("*_triton.py")):
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        jitted = [f for f in functions if any("triton.jit" in ast.unparse(mark) for mark in f.decorator_list)]
        called = {
            node.func.id
            for function in jitted
            for node in ast.walk(function)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        yield from ((path.name, function.name) for function in jitted if function.name not in called)


def test_every_kernel_is_built(built: list[dict[str, Any]]) -> None:
    names = {name for _, name in launched()}
    assert "merge_kernel" in names
    assert names == {build["name"] for build in built}


def test_no_kernel_spills(built: list[dict[str, Any]]) -> None:
    assert [build for build in built if build["spilled_bytes"]] == []


def test_components_never_wait_for_the_whole_block(built: list[dict[str, Any]]) -> None:
    ours = {name for file, name in launched() if file == "components_triton.py"}
    assert [build for build in built if build["name"] in ours and build["barriers"]] == []
