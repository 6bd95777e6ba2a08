"""python -m bench [SUITE ...]: runs the suites named (default: all), prints their tables, keeps them with --save."""

from __future__ import annotations

import sys

import click

from bench.measure import machine
from bench.suites import SUITES, Runs, run_suite
from bench.table import write_readme


@click.command()
@click.argument("suites", nargs=-1, type=click.Choice(list(SUITES)))
@click.option(
    "--quick", is_flag=True, help="Smaller sizes and fewer repeats, a minute a suite; such numbers are not kept."
)
@click.option(
    "--save", "keep", is_flag=True, help="Keep each comparison in bench/results; go on with what is kept there."
)
@click.option("--again", is_flag=True, help="With --save: forget what is kept, and measure it anew.")
@click.option("--budget", type=click.FloatRange(min=0), default=480.0, show_default=True, help="Seconds of a suite.")
@click.option("--readme", is_flag=True, help="Measure nothing; write what bench/results holds into the README.")
def main(suites: tuple[str, ...], quick: bool, keep: bool, again: bool, budget: float, readme: bool) -> None:
    """Runs SUITES (default: all), ours and the peers' in turn, and prints medians and ratios."""
    if quick and keep:
        raise click.UsageError("--quick numbers are never kept; leave out --quick or --save")
    if readme:
        write_readme(SUITES)
        return
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    how = Runs(quick=quick, keep=keep, again=again, budget=budget)
    went_well = [run_suite(name, SUITES[name], how) for name in suites or SUITES]
    sys.exit(0 if all(went_well) else 1)


if __name__ == "__main__":
    main(prog_name="python -m bench")
