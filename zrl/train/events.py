"""Events for TensorBoard; needs the extra ``tensorboard``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from zrl.errors import ConfigError


class Events:
    """Scalars of a run, as TensorBoard reads them.

    Args:
        folder: of the events.
        after: environment step that the run goes on from: what was written behind it does not count; 0: a new run.

    Raises:
        ConfigError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path, after: int = 0) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as e:
            raise ConfigError("tensorboard: needs tensorboardX: pip install 'zrl[tensorboard]'") from e
        self._writer: Any = SummaryWriter(str(folder), purge_step=after + 1 if after else None)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """The numbers among `values`, at an environment step."""
        for name, value in values.items():
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left; idempotent."""
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
