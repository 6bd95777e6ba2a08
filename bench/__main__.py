"""python -m bench [SUITE ...]: runs the suites named (default: all), prints their tables, keeps them with --save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import click

from bench import augment, components, infer, norm, read, resample
from bench.measure import Measurement
from bench.table import report, save, write_readme


@dataclass(frozen=True)
class Suite:
    """What to run, and on which devices its numbers say something."""

    run: Callable[[], list[Measurement]]
    kinds: tuple[str, ...] = ("CPU", "GPU")


SUITES = {
    "read": Suite(read.run, ("CPU",)),
    "resample": Suite(resample.run),
    "components": Suite(components.run),
    "norm": Suite(norm.run),
    "augment": Suite(augment.run),
    "infer": Suite(infer.run),
}


@click.command()
@click.argument("suites", nargs=-1, type=click.Choice(list(SUITES)))
@click.option("--save", "keep", is_flag=True, help="Keep the numbers in bench/results.")
@click.option("--readme", is_flag=True, help="Measure nothing; write what bench/results holds into the README.")
def main(suites: tuple[str, ...], keep: bool, readme: bool) -> None:
    """Runs SUITES (default: all), ours and the peers' in turn, and prints medians and ratios."""
    if readme:
        write_readme({name: suite.kinds for name, suite in SUITES.items()})
        return
    for suite in suites or SUITES:
        measured = SUITES[suite].run()
        report(measured)
        if keep and measured:
            print(f"kept in {save(suite, measured)}")


if __name__ == "__main__":
    main(prog_name="python -m bench")
