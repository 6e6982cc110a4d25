"""The learner's memory for workers that send."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from zrl.data.spec import ArraySpec, FragmentSpec
from zrl.nodes.feed import Feed
from zrl.nodes.rings import Rings
from zrl.protocol import messages as m

SPEC = FragmentSpec.build(
    1, 1, obs=ArraySpec("uint8", (8 << 20,)), act=ArraySpec("int64"), actor={"value": ArraySpec("float32")}
)


def attach(incarnation: bytes) -> m.Attach:
    ids = (bytes(16), incarnation)
    return m.Attach(*ids, SPEC.to_plain(), SPEC.digest, 4, SPEC.nbytes, pid=0, fd=-1, nbytes=0, boot_id="", path="")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_promised_to_a_worker_is_not_available_for_the_next_one() -> None:
    """Memory that was only mapped still counts as available: all would be promised the same, and killed for it."""
    feed = Feed(1, torch.device("cpu"), on_copied=lambda batch: None)
    rings = Rings(1, 1, lambda index: 4, 1 << 30, feed)
    try:
        assert not rings.attach(attach(b"a" * 16), 0)  # makes the buffers of the batches, too
        before = resident()
        assert not rings.attach(attach(b"b" * 16), 1)
        assert resident() - before > 0.9 * 4 * SPEC.nbytes
    finally:
        rings.close()
        feed.close()
