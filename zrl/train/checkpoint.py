"""Checkpoints: written whole or not at all, and read without running anything that is in them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from zrl.errors import CheckpointError

LATEST, BEST = "latest", "best"  # links beside the checkpoints: the newest, and the one that played best
SCORE = "best.json"  # what the weights behind `BEST` have played


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of an environment step is, or would be."""
    return folder / f"step_{step:012d}.pt"


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write ``step_<step>.pt`` and let ``latest`` name it: temporary file, fsync, rename, fsync of the folder.

    A crash at any instant leaves the old checkpoint or the new one, never a torn one.

    Raises:
        CheckpointError: the file cannot be written (a full disk, say); what was there before is untouched.
    """
    target = path_of(folder, step)
    part = folder / f".{target.name}.part"
    try:
        with part.open("wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        part.replace(target)
        name_it(LATEST, target)
    except (OSError, RuntimeError) as e:  # torch turns a failed write into a RuntimeError
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write the checkpoint {str(target)!r}: {e}{hint(e)}") from e
    return target


def hint(error: Exception) -> str:
    """What to ask about a failed write. An `OSError` that is about something else says so itself; torch does not."""
    full = not isinstance(error, OSError) or error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "; is the disk full?" if full else ""


def name_it(name: str, target: Path) -> None:
    """Let the link `name` beside a checkpoint lead to it: the old one or the new one, at any instant.

    Raises:
        CheckpointError: the link cannot be made.
    """
    link = target.parent / f".{name}.part"
    try:
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        link.replace(target.parent / name)
        _sync(target.parent)
    except OSError as e:
        with contextlib.suppress(OSError):
            link.unlink(missing_ok=True)
        raise CheckpointError(f"cannot link {name!r} to the checkpoint {str(target)!r}: {e}") from e


def name_best(target: Path, score: float) -> None:
    """Let `BEST` lead to a checkpoint, and keep beside it the mean return for which it does.

    Raises:
        CheckpointError: it cannot be written.
    """
    part = target.parent / f".{SCORE}.part"
    try:
        part.write_text(json.dumps({"checkpoint": target.name, "mean": score}) + "\n")
        part.replace(target.parent / SCORE)
    except OSError as e:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {str(target.parent / SCORE)!r}: {e}{hint(e)}") from e
    name_it(BEST, target)


def best_score(folder: Path) -> float | None:
    """The mean return with which `name_best` named the checkpoint that `BEST` leads to; None: nobody knows."""
    try:
        told = json.loads((folder / SCORE).read_text())
        named = (folder / BEST).readlink().name
        return float(told["mean"]) if told["checkpoint"] == named else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def prune(folder: Path, keep: int, besides: Collection[Path] = ()) -> None:
    """Remove all checkpoints but the `keep` newest, the best, and those of `besides`, and what saves that were cut off
    have left. What cannot be removed stays."""
    links = (folder / name for name in (BEST, LATEST))
    spared = {path.name for path in besides} | {link.readlink().name for link in links if link.is_symlink()}
    old = (path for path in sorted(folder.glob("step_*.pt"))[:-keep] if path.name not in spared)
    for path in [*old, *folder.glob(".*.part")]:
        with contextlib.suppress(OSError):
            path.unlink()


def set_aside(resumed: Path) -> None:
    """Rename the checkpoints behind `resumed`: they cannot be read, and would pass for the newest. Links to them, and
    to what is not there, lead to `resumed` from here on.

    Raises:
        CheckpointError: a link cannot be made.
        OSError: the folder cannot be written.
    """
    for name in (LATEST, BEST):
        link = resumed.parent / name
        if link.is_symlink() and (not link.exists() or link.readlink().name > resumed.name):
            name_it(name, resumed)
    for path in resumed.parent.glob("step_*.pt"):
        if path.name > resumed.name:
            path.rename(path.with_suffix(".unreadable"))


def load(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Read one checkpoint, tensors onto `device`. Nothing in the file is executed (``weights_only``).

    Raises:
        CheckpointError: it is missing, torn, damaged, or holds something else.
    """
    try:
        _verify(path)
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as e:  # torn files raise whatever zip and pickle readers raise
        raise CheckpointError(f"cannot read the checkpoint {str(path)!r}: {type(e).__name__}: {e}") from e
    if not isinstance(state, dict) or "weights" not in state:
        raise CheckpointError(f"{str(path)!r} is no checkpoint of zrl: it has no weights")
    return state


def _verify(path: Path) -> None:
    """Raise where a byte of the file is not what was written. torch does not look at the checksums that it writes with
    every record, and takes a record that is marked as a folder for zeros; at a tenth of a second for 100 MB we do."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip() or next((x.filename for x in archive.infolist() if x.external_attr), None)
    if damaged is not None:
        raise ValueError(f"{damaged} is damaged")


def newest(folder: Path, device: str = "cpu", skipped: list[str] | None = None) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that can be read, and its path; `skipped` gets the reasons why newer ones cannot, and
    whether that which `LATEST` leads to is missing.

    Raises:
        CheckpointError: there is none.
    """
    reasons = []
    latest = folder / LATEST
    if latest.is_symlink() and not latest.exists():
        reasons.append(f"{str(folder / latest.readlink())!r}, which {LATEST!r} leads to, is missing")
    for path in sorted(folder.glob("step_*.pt"), reverse=True):
        try:
            state = load(path, device)
        except CheckpointError as e:
            reasons.append(str(e))
        else:
            if skipped is not None:
                skipped += reasons
            return path, state
    what = "none of the checkpoints can be read: " + "; ".join(reasons) if reasons else "there is no checkpoint"
    raise CheckpointError(f"{str(folder)!r}: {what}")


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
