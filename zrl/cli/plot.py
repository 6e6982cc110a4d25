"""``zrl plot``: figures of runs."""

from __future__ import annotations

from pathlib import Path

import click

from zrl.cli.failures import failures
from zrl.errors import ConfigError

SUFFIXES = (".png", ".svg")


@click.command("plot")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=None,
    metavar="FOLDER|FILE",
    help="a folder, or a .png or .svg  [default: RUN/plots/overview.png; for several runs ./zrl-plot.png]",
)
@click.option("--svg", is_flag=True, help="an SVG as well")
def plot_command(runs: tuple[Path, ...], out: Path | None, svg: bool) -> None:
    """Draw run folders: return, lag, and where the time went, over environment steps.

    Several runs come into one figure; those that differ in nothing but their seed as their mean, with a band of one
    standard deviation to either side.
    """
    from zrl.train.plot import plot_runs

    with failures() as signals, signals.interruptible():
        targets = _targets(runs, out, svg)
        plot_runs(runs, targets)
    for target in targets:
        click.echo(str(target))


def _targets(runs: tuple[Path, ...], out: Path | None, svg: bool) -> list[Path]:
    """The files to write."""
    if out is None:
        first = runs[0] / "plots" / "overview.png" if len(runs) == 1 else Path("zrl-plot.png")
    elif out.is_dir() or not out.suffix:
        first = out / "zrl-plot.png"
    elif out.suffix in SUFFIXES:
        first = out
    else:
        raise ConfigError(
            f"--out: expected a folder or a file that ends with {' or '.join(SUFFIXES)}, not {str(out)!r}"
        )
    return [first] if not svg or first.suffix == ".svg" else [first, first.with_suffix(".svg")]
