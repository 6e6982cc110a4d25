"""The ring: two processes share slots, and a ring that is not the expected one is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zrl
from zrl.data.memory import Memory
from zrl.data.ring import Ring
from zrl.errors import SharedMemoryError

ROOT = Path(zrl.__file__).parents[1]
DEADLINE_S = 30
RUN, LIFE, DIGEST = bytes(range(16)), b"i" * 16, b"d" * 16
SLOT_NBYTES, N_SLOTS = 5000, 3
linux = pytest.mark.skipif(sys.platform != "linux", reason="memfd and /proc are Linux")


def make(**changes: Any) -> Ring:
    sizes = {"slot_nbytes": SLOT_NBYTES, "n_slots": N_SLOTS}
    return Ring.create(**{**sizes, "run_id": RUN, "incarnation": LIFE, "digest": DIGEST, **changes})


def attach(ring: Ring, **changes: Any) -> Ring:
    expected: dict[str, Any] = {"run_id": RUN, "incarnation": LIFE, "digest": DIGEST}
    sizes = {"slot_nbytes": SLOT_NBYTES, "n_slots": N_SLOTS, "max_nbytes": 1 << 20}
    return Ring.attach(ring.address, **{**expected, **sizes, **changes})


def fill(k: int, nbytes: int = SLOT_NBYTES) -> Any:
    """What slot k holds in these tests: no two slots and no two rotations alike."""
    return (np.arange(nbytes) * (2 * k + 3) % 251).astype(np.uint8)


def test_slots_are_disjoint_aligned_and_of_exact_size() -> None:
    with make() as ring:
        starts = [ring.slot(k).ctypes.data for k in range(N_SLOTS)]
        assert all(start % 4096 == 0 for start in starts)
        assert np.diff(starts).tolist() == [8192, 8192]
        assert ring.memory.nbytes == 4096 + 3 * 8192
        for k in range(N_SLOTS):
            assert ring.slot(k).shape == (SLOT_NBYTES,)
            assert ring.slot(k).dtype == np.uint8
            assert ring.slot(k) is ring.slot(k)
            assert not ring.slot(k).any()
            ring.slot(k)[:] = fill(k)
        for k in range(N_SLOTS):
            np.testing.assert_array_equal(ring.slot(k), fill(k))
        attach(ring).close()  # the header is as it was


def test_slots_that_do_not_exist_are_named() -> None:
    with make() as ring:
        for k in (-1, 3, 1 << 40):
            with pytest.raises(IndexError, match=rf"slot {k} of a ring with the slots 0 to 2"):
                ring.slot(k)


def test_closed_ring_says_so() -> None:
    ring = make()
    view = ring.slot(1)
    view[:] = 5
    ring.close()
    ring.close()
    with pytest.raises(SharedMemoryError, match="closed"):
        ring.slot(0)
    assert view.sum() == 5 * SLOT_NBYTES  # a fragment that is still held is not pulled away


def test_private_ring_has_slots_but_no_address() -> None:
    with make(shared=False) as ring:
        ring.slot(2)[:] = 1
        with pytest.raises(SharedMemoryError, match="private"):
            _ = ring.address


def test_one_byte_slots() -> None:
    with make(slot_nbytes=1, n_slots=1) as ring, attach(ring, slot_nbytes=1, n_slots=1) as peer:
        ring.slot(0)[0] = 9
        assert peer.slot(0).tolist() == [9]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run_id": b"x" * 16}, "run_id: expected 78787878"),
        ({"incarnation": b"x" * 16}, "incarnation: expected 78787878.*found 69696969"),
        ({"digest": b"x" * 16}, "digest: expected 78787878.*found 64646464"),
        ({"slot_nbytes": SLOT_NBYTES + 1}, "slot_nbytes: expected 5001, found 5000"),
        ({"slot_nbytes": 8193}, "nbytes: expected 40960, found 28672"),
        ({"n_slots": 2}, "nbytes: expected 20480, found 28672"),
        ({"slot_nbytes": 3 * 8192, "n_slots": 1}, "n_slots: expected 1, found 3"),
        ({"max_nbytes": 28671}, "nbytes: expected an int of 1 to 28671, found 28672"),
        ({"run_id": b"short"}, "run_id: expected 16 bytes"),
        ({"slot_nbytes": 0}, "slot_nbytes: expected 1 to"),
        ({"n_slots": 0}, "n_slots: expected 1 to"),
    ],
)
def test_another_ring_than_expected_is_refused(change: dict[str, Any], message: str) -> None:
    with make() as ring, pytest.raises(SharedMemoryError, match=message):
        attach(ring, **change)


def test_memory_that_is_no_ring_is_refused() -> None:
    with make() as ring, Memory.create(ring.memory.nbytes) as other:
        other.data[:4096] = ring.memory.data[:4096]
        fake = Ring(other, SLOT_NBYTES, N_SLOTS)
        attach(fake).close()
        other.data[8] = 2
        with pytest.raises(SharedMemoryError, match="layout: expected 1, found 2"):
            attach(fake)
        other.data[0] = 0
        with pytest.raises(SharedMemoryError, match="magic"):
            attach(fake)


def test_identities_must_be_16_bytes_when_made() -> None:
    for name in ("run_id", "incarnation", "digest"):
        with pytest.raises(SharedMemoryError, match=f"{name}: expected 16 bytes"):
            make(**{name: b"too short"})


PEER = """
import json, os, sys
import numpy as np
from zrl.data.memory import MemoryAddress
from zrl.data.ring import Ring

address, ids, slot_nbytes, n_slots = json.loads(sys.argv[1])
run_id, incarnation, digest = map(bytes.fromhex, ids)
with Ring.attach(MemoryAddress(**address), run_id=run_id, incarnation=incarnation, digest=digest,
                 slot_nbytes=slot_nbytes, n_slots=n_slots, max_nbytes=1 << 20) as ring:
    for k in range(n_slots):
        assert (ring.slot(k) == np.arange(slot_nbytes) * (2 * k + 3) % 251).all()
    try:
        os.truncate(f"/proc/{address['pid']}/fd/{address['fd']}", 0)
    except PermissionError:
        print("truncate refused", flush=True)
    ring.slot(1)[:] = ring.slot(1)[::-1].copy()
    print("turned", flush=True)
    sys.stdin.readline()                       # the owner looks, then ends us
"""


@linux
def test_two_processes_share_slots_and_neither_can_cut_them() -> None:
    with make() as ring:
        for k in range(N_SLOTS):
            ring.slot(k)[:] = fill(k)
        ids = [RUN.hex(), LIFE.hex(), DIGEST.hex()]
        told = json.dumps([dataclasses.asdict(ring.address), ids, SLOT_NBYTES, N_SLOTS])
        command = [sys.executable, "-c", PEER, told]
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer:
            try:
                assert peer.stdout is not None
                assert peer.stdout.readline() == "truncate refused\n"
                assert peer.stdout.readline() == "turned\n"
                np.testing.assert_array_equal(ring.slot(0), fill(0))
                np.testing.assert_array_equal(ring.slot(1), fill(1)[::-1])
                peer.communicate("\n", timeout=DEADLINE_S)
                assert peer.returncode == 0
            finally:
                peer.kill()


WORKER = """
import dataclasses, json, sys
from zrl.data.ring import Ring
ids = dict(run_id=bytes(range(16)), incarnation=b"i" * 16, digest=b"d" * 16)
ring = Ring.create(5000, 3, **ids)
ring.slot(2)[:] = 42
print(json.dumps(dataclasses.asdict(ring.address)), flush=True)
sys.stdin.readline()
"""


@linux
def test_fragment_of_a_killed_worker_can_still_be_read() -> None:
    from zrl.data.memory import MemoryAddress

    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", WORKER], cwd=ROOT, text=True, **pipes) as worker:
        try:
            assert worker.stdout is not None
            address = MemoryAddress(**json.loads(worker.stdout.readline()))
            expected = {"run_id": RUN, "incarnation": LIFE, "digest": DIGEST}
            sizes = {"slot_nbytes": SLOT_NBYTES, "n_slots": N_SLOTS, "max_nbytes": 1 << 20}
            with Ring.attach(address, **expected, **sizes) as ring:  # type: ignore[arg-type]
                worker.kill()
                worker.wait(DEADLINE_S)
                assert not os.path.exists(f"/proc/{address.pid}/fd/{address.fd}")
                assert (ring.slot(2) == 42).all()
        finally:
            worker.kill()
