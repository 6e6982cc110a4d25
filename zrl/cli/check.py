"""``zrl check``: looks at an environment before a run."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from zrl.cli.failures import EXIT_PREFLIGHT, failures
from zrl.cli.options import Count
from zrl.config import ALGO_DEFAULTS, TrainConfig, value_of

if TYPE_CHECKING:
    from zrl.train.check import LeafSize, Report

DEFAULTS = ALGO_DEFAULTS[TrainConfig.algo]


@click.command("check")
@click.argument("env")
@click.option("--actor", default=TrainConfig.actor, show_default=True, help="module:function that makes the actor")
@click.option(
    "--envs",
    "n_envs",
    type=click.IntRange(1),
    default=DEFAULTS["n_envs"],
    show_default=True,
    help="environments in all, shared out to the workers",
)
@click.option(
    "--n-steps", type=click.IntRange(1), default=DEFAULTS["n_steps"], show_default=True, help="steps of a fragment"
)
@click.option(
    "--workers",
    type=click.IntRange(0),
    default=TrainConfig.workers,
    show_default=True,
    help="worker processes; 0: collect in-process",
)
@click.option("--slots", type=click.IntRange(1), default=2, show_default=True, help="slots of each worker")
@click.option("--env-kwargs", default=None, metavar="JSON", help="arguments of the environment, a JSON object")
@click.option("--steps", type=Count(), default=None, help="steps of each measurement  [default: those of a second]")
@click.option("--json", "as_json", is_flag=True, help="print one object")
def check_command(slots: int, env_kwargs: str | None, steps: int | None, as_json: bool, **settings: Any) -> None:
    """Look at ENV, a Gymnasium id, before a run: what is recorded of it, memory, speed, and what speaks against it.

    It takes a few seconds, and ends with 5 if a run would be refused.
    """
    from zrl.train.check import check

    with failures() as signals, signals.interruptible():
        kwargs = None if env_kwargs is None else value_of("env_kwargs", env_kwargs, "--env-kwargs")
        report = check(TrainConfig(**settings, env_kwargs=kwargs), slots=slots, steps=steps)
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(report), "refused": report.refused}))
    else:
        _print(report)
    if report.refused:
        raise SystemExit(EXIT_PREFLIGHT)


def _print(report: Report) -> None:
    for name, text in _facts(report):
        click.echo(f"{name:<13} {text}")
    if report.leaves:
        click.echo()
        _print_leaves(report)
    for line in _objections(report):
        click.echo(line)
    click.echo("\nzrl would refuse it" if report.refused else "\nzrl can collect from it")


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    """Name and value, as far as they are known."""
    kwargs = f" {json.dumps(report.env_kwargs)}" if report.env_kwargs else ""
    yield "environment", report.env + kwargs
    if report.autoreset:
        yield "autoreset", report.autoreset
    if report.observation_space:
        yield "observations", report.observation_space
        yield "actions", report.action_space
        limit = report.max_episode_steps
        yield "time limit", "none stated" if limit is None else f"{limit:,} steps"
    if report.actor:
        yield "actor", f"{report.actor}, {report.n_parameters:,} parameters"
    if report.env_steps_per_s is not None:
        both = "" if report.steps_per_s is None else f"; {report.steps_per_s:,.0f} with the actor"
        yield "steps/s", f"{report.env_steps_per_s:,.0f} of the environment alone{both}; in one process"
    if report.leaves:
        slots, batches = report.slots_nbytes, report.batches_nbytes
        yield (
            "memory",
            f"{decimal(slots + batches)}: {report.n_slots} slots of {decimal(report.slot_nbytes)}"
            + (f", and {decimal(batches)} for batches" if batches else ""),
        )


def _print_leaves(report: Report) -> None:
    """A table on a terminal, plain columns elsewhere."""
    title = f"a fragment: {report.n_steps} steps of {report.columns} environments" + (
        "" if report.actor else ", without what the actor adds"
    )
    heads = ("leaf", "dtype", "shape", "bytes a row", "bytes")
    rows = [_cells(leaf) for leaf in report.leaves]
    if sys.stdout.isatty():
        table = Table(title=title, title_justify="left")
        for i, head in enumerate(heads):
            table.add_column(head, justify="right" if i > 2 else "left")
        for row in rows:
            table.add_row(*row)
        Console(markup=False, highlight=False).print(table)
        return
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    click.echo(title)
    for row in (heads, *rows):
        cells = [f"{x:>{n}}" if i > 2 else f"{x:<{n}}" for i, (x, n) in enumerate(zip(row, widths, strict=True))]
        click.echo(f"  {'  '.join(cells)}")


def _cells(leaf: LeafSize) -> tuple[str, ...]:
    return leaf.path, leaf.dtype, str(list(leaf.shape)), f"{leaf.row_nbytes:,}", f"{leaf.nbytes:,}"


def _objections(report: Report) -> Iterator[str]:
    """Problems, the refusals first, and what Gymnasium's checker says."""
    for problem in sorted(report.problems, key=lambda p: not p.refused):
        yield f"\n{'refused' if problem.refused else 'hint'}: {problem.text}"
        if problem.hint:
            yield f"  {problem.hint}"
    if report.gymnasium:
        yield "\nGymnasium's checker says:"
        yield from (f"  {text}" for text in report.gymnasium)
