"""What ``debug=True`` does about batches that are used past their time."""

from __future__ import annotations

from zrl.data.batch import Batch

VALID = 2  # a batch is valid until the next-but-one is asked for


class Aging:
    """Hands out clones. When the time of one is over, access to its record is an error, and tensors that were taken
    from it before are overwritten, so that late readers notice."""

    def __init__(self) -> None:
        self._young: list[tuple[Batch, Batch]] = []

    def __call__(self, batch: Batch) -> Batch:
        """A clone to yield instead; the one of two batches ago expires."""
        if len(self._young) == VALID:
            yielded, record = self._young.pop(0)
            record.poison()
            yielded.expire()
        yielded = batch.clone()
        # once more in containers of our own: what the user puts into those of his batch is his, and stays
        self._young.append((yielded, Batch.of_record(yielded, yielded.meta, yielded.version)))
        return yielded
