"""Weights for other hosts, while the user's thread publishes."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from zrl.data.board import Board, crc32
from zrl.nodes.publisher import Publisher


def test_a_host_gets_weights_also_where_publishing_is_faster_than_copying(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is overtaken as often as it can be; then the writer has to wait for it."""
    with contextlib.closing(Publisher(torch.nn.Linear(2, 2), run_id=bytes(16))) as publisher:
        read, held = Board.read, []

        def overtaken(board: Board, out: np.ndarray, newer_than: int) -> int | None:
            held.append(publisher._writing.locked())
            return read(board, out, newer_than) if held[-1] else None

        monkeypatch.setattr(Board, "read", overtaken)
        header, frames = publisher.answer(b"i" * 16)
        assert held == [False, True]
        assert header.version == 1
        assert header.crc32 == crc32(np.frombuffer(b"".join(frames), np.uint8))
        assert publisher.publish(lambda version: None) == 2
        assert publisher.answer(b"i" * 16)[0].version == 2
