"""The folder of one run: ``config.json``, ``status.json``, ``metrics.jsonl``, ``checkpoints/``, ``plots/``,
``workers/``, ``tensorboard/``."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zrl.config import TrainConfig
from zrl.errors import ConfigError


class RunFolder:
    """Paths and files of a run.

    Attributes:
        path: the folder; its `checkpoints` and `plots` exist; `workers` is made by whoever has logs for it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.plots = path / "plots"
        self.workers = path / "workers"
        self.tensorboard = path / "tensorboard"

    @classmethod
    def create(cls, config: TrainConfig) -> RunFolder:
        """A new folder ``<env>__<algo>__s<seed>__<time>`` in ``config.runs``, with the config in it.

        Raises:
            ConfigError: the folder cannot be made or written.
        """
        name = f"{_safe(config.env)}__{config.algo}__s{config.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            Path(config.runs).mkdir(parents=True, exist_ok=True)
            path = Path(config.runs) / name
            n = 0
            while not _made(path):  # another run of the same second
                n += 1
                path = Path(config.runs) / f"{name}-{n}"
            run = cls(path)
            run.checkpoints.mkdir()
            run.plots.mkdir()
            run.set_config(config)
        except OSError as e:
            raise ConfigError(
                f"runs: cannot write a run folder in {config.runs!r} ({e}); choose another with --runs"
            ) from e
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The folder of an earlier run.

        Raises:
            ConfigError: no run folder there.
        """
        if not (path / "config.json").is_file():
            raise ConfigError(f"{str(path)!r} is no run folder: it has no config.json")
        return cls(path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else writes here meanwhile.

        Raises:
            ConfigError: somebody does.
        """
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{str(self.path)!r}: another process writes this run; wait for its end") from None
            yield
        finally:
            os.close(fd)

    def config(self) -> TrainConfig:
        """The config of the run.

        Raises:
            ConfigError: it cannot be read.
        """
        file = self.path / "config.json"
        try:
            return TrainConfig.from_dict(json.loads(file.read_text()))
        except (OSError, ValueError, TypeError, ConfigError) as e:
            raise ConfigError(f"{str(file)!r} cannot be read: {e}") from e

    def set_config(self, config: TrainConfig) -> None:
        """Write ``config.json``."""
        _replace(self.path / "config.json", json.dumps(config.as_dict(), indent=2) + "\n")

    def set_status(self, status: Mapping[str, Any]) -> None:
        """Write ``status.json``; who reads it meanwhile sees the old one or the new one."""
        _replace(self.path / "status.json", json.dumps(status) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the metrics of updates behind `step`: a run that is resumed there makes them again."""
        rows = [row for row in self.metrics() if row["step"] <= step]
        _replace(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def append_metrics(self, values: dict[str, Any]) -> None:
        """One more line of ``metrics.jsonl``."""
        with (self.path / "metrics.jsonl").open("a") as f:
            f.write(json.dumps(values) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All lines so far; from a damaged one on they are left out."""
        rows = []
        file = self.path / "metrics.jsonl"
        for line in file.read_text(errors="replace").splitlines() if file.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                break
            rows.append(row)
        return rows


def _made(path: Path) -> bool:
    """Make a folder; False where there is one already."""
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True


def _replace(target: Path, text: str) -> None:
    part = target.with_name(f".{target.name}.part")
    part.write_text(text)
    part.replace(target)


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
