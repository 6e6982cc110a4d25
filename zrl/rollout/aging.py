"""What ``debug=True`` does about batches that are used past their time."""

from __future__ import annotations

from zrl.data.batch import Batch

VALID = 2  # a batch is valid until the next-but-one is asked for


class Aging:
    """Hands out clones, and overwrites each when its time is over, so that late readers notice."""

    def __init__(self) -> None:
        self._young: list[Batch] = []

    def __call__(self, batch: Batch) -> Batch:
        """A clone to yield instead; the one of two batches ago is poisoned."""
        if len(self._young) == VALID:
            self._young.pop(0).poison()
        self._young.append(batch.clone())
        return self._young[-1]
