"""Tables: a suite's measurements on the screen, on the disk with their machine, and in the README.

Comes in: Measurements. Goes out: bench/results/MACHINE/SUITE.json, SUITE.md and SUITE.png; and, from all of these, the
README's section of numbers, which nobody writes by hand. A file holds numbers of one machine with one code: the first
one that is kept of another code takes the place of all.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.measure import KINDS, Measurement, Suite, digest_of_code, kind_of, machine, slug
from strokenet.data.files import read_json, replacing, write_bytes, write_json

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- python -m bench --readme -->", "<!-- end of what it wrote -->"


def report(measurements: Sequence[Measurement]) -> None:
    """A table on stdout: the median of each contender, its spread, and how many times as long as ours it takes."""
    for m in measurements:
        ours = next(iter(m.times_ms))
        print(f"\n{m.suite}: " + "; ".join(words for words in (m.what, m.answers, m.on) if words))
        for name, values in m.times_ms.items():
            ratio = m.median_ms(name) / m.median_ms(ours)
            scale, unit = (1, "ms") if m.median_ms(name) >= 1 else (1000, "us")
            median, low, high = (scale * time for time in (m.median_ms(name), min(values), max(values)))
            floor = f"   floor x {m.median_ms(name) / m.floor_ms:.2f}" if m.floor_ms else ""
            peak = f"   {_memory(m.peaks_gb[name])}" if name in m.peaks_gb else ""
            print(f"  {name:<34} {median:9.1f} {unit}   {low:9.1f} .. {high:.1f}   x {ratio:.2f}{floor}{peak}")
            if parts := _parts(m.parts_ms.get(name, {})):
                print(f"  {'':<34} {parts}")


def save(suite: str, measurements: Sequence[Measurement], folder: Path = RESULTS) -> Path:
    """Keeps a suite's measurements under this machine's name: every repeat as JSON, a table and a picture."""
    of = machine()
    place = folder / slug(of) / f"{suite}.json"
    write_json(place, {"machine": of, "code": digest_of_code(), "measurements": [asdict(m) for m in measurements]})
    draw(place)
    return place


def draw(place: Path) -> None:
    """The table and the picture of a kept file, beside it."""
    suite, content = place.stem, read_json(place)
    write_bytes(place.with_suffix(".md"), markdown({suite: content}).encode())
    with replacing(place.with_suffix(".png")) as temporary:
        picture(suite, content).savefig(temporary, dpi=120)


def kept(suite: str, folder: Path = RESULTS) -> list[Measurement]:
    """What is kept of a suite from this machine, its torch and threads, and from this code; else nothing."""
    of = machine()
    place = folder / slug(of) / f"{suite}.json"
    content = read_json(place) if place.is_file() else {}
    if (content.get("machine"), content.get("code")) != (of, digest_of_code()):
        return []
    return [Measurement(**row) for row in content["measurements"]]


def markdown(suites: Mapping[str, Mapping[str, Any]]) -> str:
    """A line a comparison of one machine and one code. suites: name -> the content of its JSON file."""
    first = next(iter(suites.values()))
    of = first["machine"] | ({"code": first["code"]} if "code" in first else {})
    head = ", ".join(f"{name} {value}" for name, value in of.items() if value != "none")
    lines = [
        head,
        "",
        "| what | strokenet | beside it | of the floor | peak memory | answers | on | command |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for suite, content in suites.items():
        lines += [_line(suite, row) for row in content["measurements"]]
    return "\n".join(lines) + "\n"


def picture(suite: str, content: Mapping[str, Any]) -> Figure:
    """Bars: the median of every contender as a multiple of ours, a group a comparison, the spread as a line."""
    rows = content["measurements"]
    bars = [(row, name, times) for row in rows for name, times in row["times_ms"].items()]
    figure = Figure(figsize=(9, 1 + 0.32 * (len(bars) + len(rows))), layout="constrained")
    axes = figure.subplots()
    at, ticks, names = 0.0, [], []
    for row in rows:
        ours = statistics.median(next(iter(row["times_ms"].values())))
        axes.text(0, at, f" {row['what']}", va="center", fontsize=7)
        for number, (name, times) in enumerate(row["times_ms"].items()):
            at += 1
            median = statistics.median(times)
            axes.barh(at, median / ours, color="tab:blue" if number == 0 else "tab:gray")
            axes.plot([min(times) / ours, max(times) / ours], [at, at], color="black", linewidth=1)
            ticks.append(at)
            names.append(f"{name}, {_time(median)}")
        at += 1
    axes.set_yticks(ticks, names, fontsize=7)
    axes.set_ylim(at, -1)  # downwards, the first name inside
    axes.set_xlabel("times as long as strokenet (median, shortest to longest)")
    axes.set_title(f"{suite}: {content['machine']['processor']}, GPU {content['machine']['GPU']}", fontsize=9)
    return figure


def readme_section(suites: Mapping[str, Suite], folder: Path = RESULTS) -> str:
    """Tables of what users wait for, of every machine in `folder`; where the others are; what was measured on none."""
    parts, parts_of_work, seen = [], [], set()
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        found = {name: read_json(place / f"{name}.json") for name in suites if (place / f"{name}.json").is_file()}
        seen |= {(name, kind_of(content["machine"])) for name, content in found.items()}
        parts += [markdown(alike) for alike in _of_one_make({n: of for n, of in found.items() if suites[n].whole})]
        links = ", ".join(f"[{n}](bench/results/{place.name}/{n}.md)" for n in found if not suites[n].whole)
        parts_of_work += [f"- {place.name}: {links}\n"] if links else []
    if parts_of_work:
        parts.append("Parts of that work, each beside its peers:\n\n" + "".join(parts_of_work))
    return "\n".join([*parts, *_not_measured(suites, seen)])


def _not_measured(suites: Mapping[str, Suite], seen: Set[tuple[str, str]]) -> list[str]:
    """A table with a row a kind of machine, or nothing. seen: suite and kind of what was measured."""
    rows = []
    for kind in KINDS:
        missing = [name for name, suite in suites.items() if kind in suite.kinds and (name, kind) not in seen]
        rows += [f"| {kind} | not yet measured | `python -m bench {' '.join(missing)} --save` |\n"] if missing else []
    return ["| on | strokenet | command |\n|---|---|---|\n" + "".join(rows)] if rows else []


def _of_one_make(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Mapping[str, Any]]]:
    """The suites of a machine, those together that were measured with one code and one torch: a table has one head."""
    makes: dict[str, dict[str, Mapping[str, Any]]] = {}
    for suite, content in found.items():
        makes.setdefault(json.dumps([content["machine"], content.get("code")]), {})[suite] = content
    return list(makes.values())


def write_readme(suites: Mapping[str, Suite], readme: Path = README, folder: Path = RESULTS) -> None:
    """Puts the section in its place.

    Raises:
        ValueError: the README has not one place for it.
    """
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{readme}: one line {BEGIN} and one line {END} are needed")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_bytes(readme, f"{before}{BEGIN}\n{readme_section(suites, folder)}{END}{after}".encode())


def _line(suite: str, row: Mapping[str, Any]) -> str:
    (own, ours), *peers = ((name, statistics.median(times)) for name, times in row["times_ms"].items())
    spread = {name: _spread(times) for name, times in row["times_ms"].items()}
    parts = {name: f": {_parts(of)}" for name, of in row.get("parts_ms", {}).items()}  # none in older files
    beside = "; ".join(
        f"{name} {_time(median)}{spread[name]} (x {median / ours:.2f}){parts.get(name, '')}" for name, median in peers
    )
    floor = f"{row['floor_ms'] / ours:.0%}" if row["floor_ms"] else ""
    peaks = "; ".join(f"{name} {_memory(gb)}" for name, gb in row["peaks_gb"].items())
    command = f"`python -m bench {suite}`"
    cells = (
        f"{suite}: {row['what']}",
        f"{_time(ours)}{spread[own]}{parts.get(own, '')}",
        beside,
        floor,
        peaks,
        row["answers"],
        row["on"],
        command,
    )
    return f"| {' | '.join(cells)} |"


def _spread(times_ms: Sequence[float]) -> str:
    """From the shortest to the longest, in brackets; nothing of a single time."""
    return f" [{_time(min(times_ms))} .. {_time(max(times_ms))}]" if len(times_ms) > 1 else ""


def _parts(parts_ms: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {_time(ms)}" for name, ms in parts_ms.items())


def _memory(gb: float) -> str:
    return f"{gb:.2f} GB" if gb >= 0.1 else f"{1024 * gb:.1f} MB"


def _time(ms: float) -> str:
    """Three digits: 31.5 us, 41.0 ms, 26.3 s."""
    value, unit = (1000 * ms, "us") if ms < 1 else (ms, "ms") if ms < 10_000 else (ms / 1000, "s")
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
