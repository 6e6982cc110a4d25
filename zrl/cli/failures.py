"""How a verb fails: one message, one exit code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import click

from zrl.errors import ConfigError, MissingExtraError, PreflightError, StarvationError, WorkerError, ZrlError
from zrl.train.stop import Stopped, StopSignals

EXIT_FAILED, EXIT_USAGE, EXIT_NO_WORKERS, EXIT_PREFLIGHT = 1, 2, 4, 5


class Failure(click.ClickException):
    """An error that ends the command: one message, one exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code  # type: ignore[misc]


@contextlib.contextmanager
def failures() -> Iterator[StopSignals]:
    """What ends a verb, as a message and an exit code."""
    try:
        with StopSignals() as signals:
            yield signals
    except Stopped as e:
        raise SystemExit(128 + e.signum) from e
    except (PreflightError, MissingExtraError) as e:
        raise Failure(str(e), EXIT_PREFLIGHT) from e
    except ConfigError as e:
        raise Failure(str(e), EXIT_USAGE) from e
    except (WorkerError, StarvationError) as e:
        raise Failure(str(e), EXIT_NO_WORKERS) from e
    except ZrlError as e:
        raise Failure(str(e), EXIT_FAILED) from e


@contextlib.contextmanager
def usage() -> Iterator[None]:
    """A `ConfigError` in here is about the words of the command line."""
    try:
        yield
    except ConfigError as e:
        raise Failure(str(e), EXIT_USAGE) from e
