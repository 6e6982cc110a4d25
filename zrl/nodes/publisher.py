"""Weights on their way out: from the learner's module to the board of its own host, and as bytes for other hosts.

    user's thread                       collator's thread
    ─────────────                       ─────────────────
    module ─► board, version += 1  ──►  snapshot: a copy and its crc32 ─► PUB; Weights in answer to Fetch

The user's thread does no more than the copy onto the board, and waits for the collator's only where it published so
fast that that copy was overtaken three times. What goes over the network is read from there, only where
there is somebody to read it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import torch

from zrl.data.board import Board, crc32
from zrl.data.memory import Bytes
from zrl.data.weights import WeightsPacker
from zrl.net.codec import encode_weights
from zrl.net.sockets import chunks
from zrl.protocol import messages as m


class Publisher:
    """The learner's weights and their version.

    Args:
        actor: the learner's module, wrapped or not, on any device.
        run_id: 16 bytes.
        version: of the weights as they are now.

    Attributes:
        board: of the learner's own host; closed by `close`.
        version: newest on the board.

    Raises:
        WeightsError: a tensor of the module cannot travel.
        SharedMemoryError: there is not that much memory.
    """

    def __init__(self, actor: torch.nn.Module, *, run_id: bytes, version: int = 1) -> None:
        self._packer: WeightsPacker | None = WeightsPacker(actor)
        manifest = self._packer.manifest
        self.run_id = run_id
        self.version = version
        self.nbytes, self.digest = manifest.nbytes, manifest.digest
        self.board = Board.create(manifest.nbytes, run_id=run_id, digest=manifest.digest)
        self.board.publish(version, self._packer.pack)
        self._writing = threading.Lock()
        self._snapshot: Bytes | None = None
        self._snapshot_version = 0
        self._crc = 0

    # The user's thread.

    def publish(self, announce: Callable[[int], None]) -> int:
        """Put the module's weights on the board; their version. `announce` hears of it before anybody can see it.

        Raises:
            WeightsError: the module is not what it was.
            SharedMemoryError: closed.
        """
        if self._packer is None:
            raise RuntimeError("closed")
        version = self.version + 1
        announce(version)
        with self._writing:
            self.board.publish(version, self._packer.pack)
        self.version = version
        return version

    # The collator's thread.

    def answer(self, incarnation: bytes) -> tuple[m.Weights, list[memoryview]]:
        """What a host's Fetch is answered with: the header, and the payload in frames."""
        version, flat = self._newest()
        frames = chunks(memoryview(flat.data))
        return self._header(incarnation, version, len(frames)), frames

    def frame(self) -> bytes:
        """The newest weights as they go out on PUB."""
        version, flat = self._newest()
        return encode_weights(self._header(m.NO_ID, version, 1), memoryview(flat.data))

    def _header(self, incarnation: bytes, version: int, n_chunks: int) -> m.Weights:
        return m.Weights(
            self.run_id,
            incarnation,
            version=version,
            nbytes=self.nbytes,
            digest=self.digest,
            crc32=self._crc,
            n_chunks=n_chunks,
        )

    def _newest(self) -> tuple[int, Bytes]:
        """Version and bytes of a copy that nobody writes; what was sent before keeps its own."""
        if self._snapshot is None or self.board.version > self._snapshot_version:
            flat = np.empty(self.nbytes, np.uint8)
            version = self.board.read(flat, self._snapshot_version)
            if version is None:  # overtaken three times by the user's thread: for once it has to wait
                with self._writing:
                    version = self.board.read(flat, self._snapshot_version)
            assert version is not None
            self._snapshot, self._snapshot_version, self._crc = flat, version, crc32(flat)
        return self._snapshot_version, self._snapshot

    def close(self) -> None:
        """Let go of the board; idempotent."""
        self._packer = None  # its views would keep the board mapped
        self.board.close()
