"""python -m bench [SUITE ...]: runs the suites named (default: all), prints their tables, keeps them with --save."""

from __future__ import annotations

import click

from bench import augment, components, infer, norm, read, resample
from bench.measure import report, save

SUITES = {
    "read": read.run,
    "resample": resample.run,
    "components": components.run,
    "norm": norm.run,
    "augment": augment.run,
    "infer": infer.run,
}


@click.command()
@click.argument("suites", nargs=-1, type=click.Choice(list(SUITES)))
@click.option("--save", "keep", is_flag=True, help="Keep the numbers in bench/results.")
def main(suites: tuple[str, ...], keep: bool) -> None:
    """Runs SUITES (default: all), ours and the peers' in turn, and prints medians and ratios."""
    for suite in suites or SUITES:
        measured = SUITES[suite]()
        report(measured)
        if keep:
            print(f"kept in {save(suite, measured)}")


if __name__ == "__main__":
    main(prog_name="python -m bench")
