"""The house: imports go downwards only, only the console prints, and the README's map leads somewhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from strokenet.model.figure import network_figure
from tests.plans import paper_plan

ROOT = Path(__file__).resolve().parent.parent
FLOORS = (  # a file imports from its own floor or a lower one
    ("planner", "kernels"),
    ("strokenet/__init__", "strokenet/signals", "strokenet/memory", "strokenet/data"),
    ("strokenet/workspace", "strokenet/synth", "strokenet/prepare", "strokenet/preprocess"),
    ("strokenet/model",),
    ("strokenet/nnunet",),
    ("strokenet/infer",),
    ("strokenet/evaluate",),
    ("strokenet/train",),
    ("strokenet/demo", "strokenet/doctor", "strokenet/live", "strokenet/console", "strokenet/report"),
    ("strokenet/cli", "strokenet/__main__"),
)
SOURCES = sorted(path for folder in ("planner", "kernels", "strokenet") for path in (ROOT / folder).rglob("*.py"))


def floor_of(module: str) -> int:
    matches = [n for n, names in enumerate(FLOORS) if any(module == x or module.startswith(f"{x}/") for x in names)]
    assert matches, f"{module} has no place in FLOORS"
    return matches[0]


def imported_modules(path: Path) -> set[str]:
    """Modules of ours that a file imports at run time: not those under `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text())
    hints = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in hints:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    places = {name.replace(".", "/") for name in names if name.split(".")[0] in ("planner", "kernels", "strokenet")}
    return {place for place in places if (ROOT / f"{place}.py").is_file()}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    module = str(path.relative_to(ROOT).with_suffix(""))
    above = {name for name in imported_modules(path) if floor_of(name) > floor_of(module)}
    assert not above, f"{module} imports {above} from a floor above it"


def test_the_planner_knows_neither_torch_nor_files() -> None:
    for path in SOURCES:
        if path.is_relative_to(ROOT / "planner"):
            assert not re.search(r"^\s*(import|from) (torch|nibabel|pathlib|strokenet|kernels)", path.read_text(), re.M)


def test_only_the_console_prints() -> None:
    printing = [
        path.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert set(printing) <= {"console.py"}


def test_namespace_folders_have_no_init() -> None:
    """Hugging Face ships a package called kernels too: an __init__ of ours would overwrite theirs."""
    assert not (ROOT / "planner" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()


README = (ROOT / "README.md").read_text() if (ROOT / "README.md").is_file() else ""
MAP = re.findall(r"`((?:strokenet|planner|kernels|tests|tools)/[\w/.]+\.(?:py|sh))(?::(\w+))?`", README)


def test_the_readme_maps_the_method() -> None:
    assert len(MAP) > 40


@pytest.mark.parametrize(("file", "name"), sorted(set(MAP)))
def test_a_place_named_in_the_readme_exists(file: str, name: str) -> None:
    text = (ROOT / file).read_text()
    if name:
        assert re.search(rf"^\s*(def|class) {name}\b|^{name}\b", text, re.M), f"{file} has no {name}"


def test_the_readme_shows_the_papers_network() -> None:
    figure = network_figure(paper_plan("T1", "FLAIR"))
    assert "\n".join(f"    {line}" for line in figure.splitlines()) in README
    fig_1 = network_figure(paper_plan("T1")).splitlines()[1]
    assert f"    {fig_1}\n" in README
