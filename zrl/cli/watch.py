"""``zrl status`` and ``zrl top``: looking at a learner from outside, without it knowing."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from zrl.cli.keys import host_keys_in, keys_option
from zrl.cli.view import age_in_words, line, render
from zrl.errors import ConfigError
from zrl.net.keys import HostKeys
from zrl.net.observer import Observer
from zrl.nodes.status import plain

EXIT_USAGE, EXIT_NO_LEARNER = 2, 3
SILENT = 3.0  # seconds without a status, of which there is one every second, after which the learner seems gone
REDRAW = 1.0  # seconds
LINES_AROUND = 12  # of a page, besides its rows of workers


@click.command("status")
@click.argument("target", metavar="URL|RUN")
@click.option("--json", "as_json", is_flag=True, help="print the document itself")
@click.option(
    "--timeout", type=click.FloatRange(0, 86_400, min_open=True), default=5.0, show_default=True, metavar="S",
    help="exit with 3 after so many seconds without a learner",
)  # fmt: skip
@keys_option("folder with this machine's keys, for a learner that has some")
def status_command(target: str, as_json: bool, timeout: float, keys: Path | None) -> None:
    """Show where the learner at URL stands: its workers, where the time goes, and what it waits for.

    URL is the one that workers connect to. A run folder is shown as its status.json says, with the age of that.
    """
    folder = Path(target)
    status, age = _of_folder(folder) if folder.is_dir() else (_of_learner(target, timeout, keys), None)
    if as_json:
        with _usage_errors():
            status = plain(status, "status")
        click.echo(json.dumps(status if age is None else {**status, "age": age}, indent=2))
        return
    if age is not None:
        click.echo(f"as of {age_in_words(age)} ago, from {folder / 'status.json'}")
    Console(highlight=False).print(render(status))


@click.command("top")
@click.argument("url", metavar="URL")
@keys_option("folder with this machine's keys, for a learner that has some")
def top_command(url: str, keys: Path | None) -> None:
    """Show the learner at URL, the one that workers connect to, as it goes on, until Ctrl-C.

    A learner that is not there, or gone, is waited for. Where the output is no terminal: a line a second.
    """
    with _usage_errors(), Observer(url, _keys(keys)) as observer, contextlib.suppress(KeyboardInterrupt):
        console = Console(highlight=False)
        if console.is_terminal:
            _live(observer, console)
        else:
            _lines(observer)


def _live(observer: Observer, console: Console) -> None:
    seen, heard = None, time.monotonic()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            silent = time.monotonic() - heard
            live.update(_page(seen, silent, observer.address, console.height, observer.problem), refresh=True)
            status = observer.next(REDRAW)
            if status is not None:
                seen, heard = status, time.monotonic()


def _page(status: dict[str, Any] | None, silent: float, address: str, height: int, problem: str = "") -> RenderableType:
    if status is None:
        return Text(problem or f"waiting for a learner at {address}")
    page = render(status, rows=max(1, height - LINES_AROUND))
    gone = problem or _gone(silent, address)
    return Group(Text(gone, style="bold red"), page) if silent >= SILENT else page


def _lines(observer: Observer) -> None:
    heard, told = time.monotonic(), False
    while True:
        status = observer.next(REDRAW)
        now = time.monotonic()
        if status is not None:
            click.echo(line(status))
            heard, told = now, False
        elif now - heard >= SILENT and not told:
            click.echo(observer.problem or _gone(now - heard, observer.address))
            told = True


def _gone(silent: float, address: str) -> str:
    return f"no learner at {address} for {age_in_words(silent)}; waiting for one"


def _keys(folder: Path | None) -> HostKeys | None:
    try:
        return host_keys_in(folder)
    except ConfigError as e:
        raise _failure(f"--keys: {e}", EXIT_USAGE) from e


def _of_learner(url: str, timeout: float, keys: Path | None) -> dict[str, Any]:
    with _usage_errors(" (or the folder of a run)"), Observer(url, _keys(keys)) as observer:
        status = observer.next(timeout)
    if status is not None:
        return status
    if observer.problem:
        raise _failure(observer.problem, EXIT_NO_LEARNER)
    raise _failure(
        f"no learner published a status at {observer.address} within {timeout:g} s. Is it running? Is {url} what it "
        "prints for `zrl worker --connect`? Its status comes from the next port, or from the path with .pub",
        EXIT_NO_LEARNER,
    )


def _of_folder(folder: Path) -> tuple[dict[str, Any], float]:
    """What the run folder's status.json says, and its age in seconds."""
    file = folder / "status.json"
    try:
        status = json.loads(file.read_text())
        age = time.time() - file.stat().st_mtime
    except FileNotFoundError:
        raise _failure(f"{folder} has no status.json: expected a run folder, or a URL", EXIT_USAGE) from None
    except (OSError, ValueError, RecursionError) as e:
        raise _failure(f"{file} cannot be read: {e}", EXIT_USAGE) from e
    if not isinstance(status, dict):
        raise _failure(f"{file}: expected an object, found {type(status).__name__}", EXIT_USAGE)
    return status, max(0.0, age)


@contextlib.contextmanager
def _usage_errors(hint: str = "") -> Iterator[None]:
    try:
        yield
    except ConfigError as e:
        raise _failure(f"URL: {e}{hint}", EXIT_USAGE) from e


def _failure(message: str, code: int) -> click.ClickException:
    failure = click.ClickException(message)
    failure.exit_code = code  # type: ignore[misc]
    return failure
