"""What one sees while a run goes on: the live view on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import click
from rich.console import Console, RenderableType
from rich.live import Live

from zrl.cli.view import line, render

if TYPE_CHECKING:
    from zrl.train.loop import Start
    from zrl.train.status import Status

SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_LOOKS = 0.5


class Reporter(Protocol):
    """Shows the start of a run and its updates."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...
    def start(self, start: Start) -> None: ...
    def update(self, status: Status) -> None: ...
    def worker(self, there: int, expected: int) -> None: ...


def reporter() -> Reporter:
    """The reporter that fits where standard output goes."""
    return _View() if sys.stdout.isatty() else _Lines()


def _heading(start: Start) -> str:
    c = start.config
    goal = "" if c.stop_at_return is None else f" until the mean return is {c.stop_at_return:g}"
    shape = f"{c.n_envs} environments, {c.n_steps} steps a fragment"
    lines = [
        f"{c.algo} on {c.env}{goal}, at most {c.steps:,} steps; {shape}, seed {c.seed}",
        f"run folder {start.run.path}",
    ]
    lines += [f"left out: {why}" for why in start.skipped]
    if start.resumed is not None:
        lines.append(f"goes on from {start.resumed}, at step {start.step:,}")
    lines += [f"watch it with: zrl top {url}" for url in getattr(start.rollout, "urls", [])[:1]]
    return "\n".join(lines)


def _workers(there: int, expected: int) -> str:
    return f"{there} of {expected} workers are there" + ("" if there < expected else ": training begins")


class Quiet:
    """Nothing: another learner of the same run shows it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        pass

    def start(self, start: Start) -> None:
        pass

    def update(self, status: Status) -> None:
        pass

    def worker(self, there: int, expected: int) -> None:
        pass


class _Lines:
    """Plain lines, one every few seconds."""

    def __init__(self) -> None:
        self._next = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        pass

    def start(self, start: Start) -> None:
        click.echo(_heading(start))
        self._rollout = start.rollout
        self._next = time.monotonic() + SECONDS_BETWEEN_LINES

    def worker(self, there: int, expected: int) -> None:
        click.echo(_workers(there, expected))

    def update(self, status: Status) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + SECONDS_BETWEEN_LINES
        try:
            click.echo(line(self._rollout.status()))
        except OSError:  # nobody reads it any more: no reason to end the run
            self._next = math.inf


class _View:
    """The whole picture, in place; the last one stays on the screen.

    It is drawn by a thread of its own, so it moves on while an update takes long.
    """

    def __init__(self) -> None:
        self._console = Console()
        self._start: Start | None = None
        self._document: dict[str, Any] = {}
        self._looked = 0.0
        self._live = Live(
            get_renderable=self._draw, console=self._console, refresh_per_second=4, transient=False, auto_refresh=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._live.stop()

    def start(self, start: Start) -> None:
        self._console.print(_heading(start), highlight=False, soft_wrap=True)
        self._start = start
        self._live.start()

    def worker(self, there: int, expected: int) -> None:
        self._console.print(_workers(there, expected), highlight=False)

    def update(self, status: Status) -> None:
        pass  # the next look sees it

    def _draw(self) -> RenderableType:
        now = time.monotonic()
        if self._start is not None and now - self._looked >= SECONDS_BETWEEN_LOOKS:
            self._looked = now
            self._document = self._start.rollout.status() or self._document
        return render(self._document)
