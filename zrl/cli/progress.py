"""What one sees while a run goes on: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from zrl.config import TrainConfig
from zrl.train.run_folder import RunFolder

if TYPE_CHECKING:
    from zrl.train.loop import Status

SECONDS_BETWEEN_LINES = 5.0


class Reporter(Protocol):
    """Shows the start of a run and its updates."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...
    def start(self, config: TrainConfig, run: RunFolder) -> None: ...
    def update(self, status: Status) -> None: ...


def reporter(steps: int) -> Reporter:
    """The reporter that fits where standard output goes."""
    return _Bar(steps) if sys.stdout.isatty() else _Lines()


def _heading(config: TrainConfig, run: RunFolder) -> str:
    goal = "" if config.stop_at_return is None else f" until the mean return is {config.stop_at_return:g}"
    return (
        f"{config.algo} on {config.env}{goal}, at most {config.steps:,} steps; "
        f"{config.n_envs} environments, {config.n_steps} steps a fragment, seed {config.seed}\nrun folder {run.path}"
    )


def _returns(status: Status) -> str:
    if status.return_100 is not None:
        return f"return {status.return_100:.1f}"
    return f"return {status.return_update:.1f}" if status.return_update is not None else "return -"


class _Lines:
    """Plain lines, one every few seconds."""

    def __init__(self) -> None:
        self._next = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        pass

    def start(self, config: TrainConfig, run: RunFolder) -> None:
        click.echo(_heading(config, run))
        self._next = time.monotonic() + SECONDS_BETWEEN_LINES

    def update(self, status: Status) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + SECONDS_BETWEEN_LINES
        split = " ".join(f"{name} {share:.0%}" for name, share in status.shares.items())
        click.echo(
            f"step {status.step:,}  {status.steps_per_s:,.0f} steps/s  {_returns(status)}  "
            f"episodes {status.episodes}  time: {split}"
        )


class _Bar:
    """A progress bar that stays on one line."""

    def __init__(self, steps: int) -> None:
        self._progress = Progress(
            TextColumn("{task.completed:,.0f} / {task.total:,.0f} steps"),
            BarColumn(),
            TextColumn("{task.fields[rate]}  {task.fields[ret]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(),
        )
        self._steps = steps
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()

    def start(self, config: TrainConfig, run: RunFolder) -> None:
        self._progress.console.print(_heading(config, run), highlight=False, soft_wrap=True)
        self._progress.start()
        self._task = self._progress.add_task("train", total=self._steps, rate="", ret="")

    def update(self, status: Status) -> None:
        assert self._task is not None
        self._progress.update(
            self._task, completed=status.step, rate=f"{status.steps_per_s:,.0f} steps/s", ret=_returns(status)
        )
