"""The output of workers: which of it outlives the run."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path


class Logs:
    """Logs in a folder that somebody chose stay. Others are inside the run's directory and go with it, so that nothing
    is left behind; what an error is to name is copied first.

    Args:
        folder: that somebody chose; None: nobody did.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._kept: Path | None = None

    def keep(self, log: Path) -> Path:
        """Where `log` will still be when the run is over."""
        if self._folder is not None:
            return log
        try:
            self._kept = self._kept or Path(tempfile.mkdtemp(prefix="zrl-logs-"))
            return Path(shutil.copy(log, self._kept))
        except OSError:
            return log
