"""The board: versions grow, a torn read is never returned, and a dead writer leaves the old weights readable."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import zrl
from zrl.data import board as board_module
from zrl.data.board import Board, crc32
from zrl.data.memory import MemoryAddress
from zrl.errors import SharedMemoryError, WeightsError

ROOT = Path(zrl.__file__).parents[1]
DEADLINE_S = 30
RUN, DIGEST = b"r" * 16, b"d" * 16
NBYTES = 4160
Bytes = npt.NDArray[np.uint8]
linux = pytest.mark.skipif(sys.platform != "linux", reason="memfd and /proc are Linux")


def make(nbytes: int = NBYTES, **changes: Any) -> Board:
    return Board.create(nbytes, **{"run_id": RUN, "digest": DIGEST, **changes})


def attach(address: MemoryAddress, **changes: Any) -> Board:
    return Board.attach(address, **{"run_id": RUN, "digest": DIGEST, "nbytes": NBYTES, **changes})


def writes(version: int) -> Callable[[Bytes], None]:
    """Fills a buffer with its version, word by word."""

    def write(out: Bytes) -> None:
        out.view(np.uint64)[:] = version

    return write


def holds(out: Bytes) -> list[int]:
    """The distinct words in a buffer."""
    return [int(word) for word in np.unique(out.view(np.uint64))]


@pytest.fixture
def out() -> Bytes:
    return np.zeros(NBYTES, np.uint8)


def test_nothing_published_is_version_0(out: Bytes) -> None:
    out[:] = 7
    with make() as board, attach(board.address) as reader:
        assert (board.version, reader.version) == (0, 0)
        assert reader.read(out, 0) == 0
        assert (out == 7).all()
        assert reader.torn == 0


def test_newest_is_read_once(out: Bytes) -> None:
    with make() as board, attach(board.address) as reader:
        have = 0
        for version in (1, 2, 3, 10, 12, 14, 1 << 40, (1 << 63) - 1):
            board.publish(version, writes(version))
            assert reader.version == board.version == version
            have = reader.read(out, have) or -1
            assert have == version
            assert holds(out) == [version]
            out[:] = 0
            assert reader.read(out, have) == have
            assert not out.any()  # nothing newer: untouched
        assert reader.torn == 0


def test_reader_skips_to_the_newest(out: Bytes) -> None:
    with make() as board, attach(board.address) as reader:
        for version in range(1, 8):
            board.publish(version, writes(version))
        assert reader.read(out, 3) == 7
        assert holds(out) == [7]


def test_versions_must_grow() -> None:
    with make() as board:
        board.publish(5, writes(5))
        for version in (5, 4, 0, -1, 1 << 63):
            with pytest.raises(WeightsError, match="cannot follow 5"):
                board.publish(version, writes(version))
        assert board.version == 5


def test_private_board_serves_its_own_process(out: Bytes) -> None:
    with make(shared=False) as board:
        board.publish(1, writes(1))
        assert board.read(out, 0) == 1
        assert holds(out) == [1]
        with pytest.raises(SharedMemoryError, match="private"):
            _ = board.address


def test_module_without_weights_has_a_board_too() -> None:
    with make(nbytes=0) as board, attach(board.address, nbytes=0) as reader:
        board.publish(1, lambda out: None)
        assert reader.read(np.empty(0, np.uint8), 0) == 1


def test_readers_cannot_write() -> None:
    with make() as board, attach(board.address) as reader:
        with pytest.raises(SharedMemoryError, match="only its creator"):
            reader.publish(1, writes(1))
        with pytest.raises(ValueError, match="read-only"):
            reader.memory.data[0] = 0


def test_closed_board_says_so(out: Bytes) -> None:
    board = make()
    board.close()
    board.close()
    uses: list[Callable[[], object]] = [
        lambda: board.version,
        lambda: board.read(out, 0),
        lambda: board.publish(1, writes(1)),
    ]
    for use in uses:
        with pytest.raises(SharedMemoryError, match="closed"):
            use()


@pytest.mark.parametrize("wrong", [np.zeros(NBYTES + 1, np.uint8), np.zeros(NBYTES, np.int8), np.zeros((1, NBYTES))])
def test_out_must_fit(wrong: Any) -> None:
    with make() as board, pytest.raises(WeightsError, match=f"expected {NBYTES} uint8"):
        board.read(wrong, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run_id": b"x" * 16}, "run_id: expected 78787878.*found 72727272"),
        ({"digest": b"x" * 16}, "digest: expected 78787878.*found 64646464"),
        ({"nbytes": NBYTES + 1}, f"nbytes: expected {NBYTES + 1}, found {NBYTES}"),
        ({"nbytes": 9000}, "mapping: expected 28672, found 20480"),
        ({"nbytes": -1}, "nbytes"),
        ({"run_id": b""}, "run_id: expected 16 bytes"),
    ],
)
def test_another_board_than_expected_is_refused(change: dict[str, Any], message: str) -> None:
    with make() as board, pytest.raises(SharedMemoryError, match=message):
        attach(board.address, **change)


def test_failing_write_publishes_nothing(out: Bytes) -> None:
    def fails(buffer: Bytes) -> None:
        buffer[:100] = 255
        raise RuntimeError("CUDA error")

    with make() as board, attach(board.address) as reader:
        board.publish(1, writes(1))
        with pytest.raises(RuntimeError, match="CUDA"):
            board.publish(2, fails)
        assert reader.version == 1
        assert reader.read(out, 0) == 1
        assert holds(out) == [1]
        board.publish(2, writes(2))
        assert reader.read(out, 1) == 2
        assert holds(out) == [2]


def test_writer_never_touches_the_newest_buffer_whatever_the_versions(out: Bytes) -> None:
    """Conflation hands a host 2, 4, 6, …: parity would choose the buffer that the workers read."""
    with make() as board, attach(board.address) as reader:
        board.publish(2, writes(2))

        def write(buffer: Bytes) -> None:
            assert reader.read(out, 0) == 2  # a read in the middle of the writing
            assert holds(out) == [2]
            writes(4)(buffer)

        board.publish(4, write)
        assert reader.read(out, 2) == 4
        assert reader.torn == 0


def overtaken(monkeypatch: pytest.MonkeyPatch, board: Board, times: int, n_versions: int) -> None:
    """Have `n_versions` published in the midst of each of the next `times` copies."""
    copy = board_module._copy
    left = times

    def slow_copy(out: Bytes, source: Bytes) -> None:
        nonlocal left
        half = len(out) // 2
        copy(out[:half], source[:half])
        if left:
            left -= 1
            for _ in range(n_versions):
                board.publish(board.version + 1, writes(board.version + 1))
        copy(out[half:], source[half:])

    monkeypatch.setattr(board_module, "_copy", slow_copy)


def test_one_publish_during_a_read_disturbs_nobody(monkeypatch: pytest.MonkeyPatch, out: Bytes) -> None:
    with make() as board, attach(board.address) as reader:
        board.publish(1, writes(1))
        overtaken(monkeypatch, board, times=1, n_versions=1)
        assert reader.read(out, 0) == 1
        assert holds(out) == [1]
        assert reader.version == 2


@pytest.mark.parametrize("times", [1, 2])
def test_torn_read_is_noticed_and_tried_again(monkeypatch: pytest.MonkeyPatch, out: Bytes, times: int) -> None:
    with make() as board, attach(board.address) as reader:
        board.publish(1, writes(1))
        overtaken(monkeypatch, board, times, n_versions=2)
        newest = 1 + 2 * times
        assert reader.read(out, 0) == newest
        assert holds(out) == [newest]
        assert reader.torn == 0


def test_after_three_torn_reads_it_is_given_up_and_counted(monkeypatch: pytest.MonkeyPatch, out: Bytes) -> None:
    with make() as board, attach(board.address) as reader:
        board.publish(1, writes(1))
        overtaken(monkeypatch, board, times=3, n_versions=2)
        assert reader.read(out, 0) is None
        assert reader.torn == 1
        assert len(holds(out)) == 2  # it really was torn
        assert reader.read(out, 0) == 7
        assert holds(out) == [7]


def test_writing_that_began_but_never_ended_is_not_returned(monkeypatch: pytest.MonkeyPatch, out: Bytes) -> None:
    """The writer dies in the middle of its second publish during our copy; `newest` already names its first."""
    with make() as board, attach(board.address) as reader:
        board.publish(1, writes(1))
        copy = board_module._copy

        def dies(buffer: Bytes) -> None:
            buffer[NBYTES // 2 :] = 255
            raise SystemExit

        def copy_beside_dying_writer(out: Bytes, source: Bytes) -> None:
            monkeypatch.setattr(board_module, "_copy", copy)
            board.publish(2, writes(2))
            with pytest.raises(SystemExit):
                board.publish(3, dies)
            copy(out, source)

        monkeypatch.setattr(board_module, "_copy", copy_beside_dying_writer)
        assert reader.read(out, 0) == 2
        assert holds(out) == [2]


WRITER = """
import dataclasses, json, sys
import numpy as np
from zrl.data.board import Board

nbytes = int(sys.argv[1])
board = Board.create(nbytes, run_id=b"r" * 16, digest=b"d" * 16)
print(json.dumps(dataclasses.asdict(board.address)), flush=True)
for version in range(1, 1 << 40):
    board.publish(version, lambda out: out.view(np.uint64).fill(version))
"""


@linux
@pytest.mark.parametrize("nbytes", [64, 1 << 18])
def test_reader_beside_a_writer_that_never_rests(nbytes: int) -> None:
    out = np.zeros(nbytes, np.uint8)
    have, reads = 0, 0
    command = [sys.executable, "-c", WRITER, str(nbytes)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout is not None
            address = MemoryAddress(**json.loads(writer.stdout.readline()))
            with attach(address, nbytes=nbytes) as reader:
                end = time.monotonic() + 1.0
                while time.monotonic() < end:
                    seen = reader.version
                    version = reader.read(out, have)
                    if version is not None and version != have:
                        assert version > have
                        assert version >= seen
                        assert holds(out) == [version]
                        have, reads = version, reads + 1
                assert reads > 10
                writer.kill()  # in the middle of something
                writer.wait(DEADLINE_S)
                newest = reader.version
                assert reader.read(out, 0) == newest
                assert holds(out) == [newest]
        finally:
            writer.kill()


def test_address_is_plain(out: Bytes) -> None:
    with make() as board:
        told = json.loads(json.dumps(dataclasses.asdict(board.address)))
        with attach(MemoryAddress(**told)) as reader:
            board.publish(1, writes(1))
            assert reader.read(out, 0) == 1


def test_crc32() -> None:
    flat = np.arange(1000).astype(np.uint8)
    assert crc32(flat) == zlib.crc32(flat.tobytes())
    assert crc32(flat[:0]) == 0
