"""Fragments that come over the wire: peers of a few lines send them well and badly."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from zmq.utils.garbage import gc

from tests.faults.world import audit, until
from tests.toys import CountingActor
from zrl import Batch
from zrl.data.fragment import Slot, private_memory
from zrl.data.spec import ArraySpec, FragmentSpec
from zrl.net import keys as k
from zrl.net.link import Link, LinkLost
from zrl.net.sockets import MAX_FRAME, chunks
from zrl.protocol import messages as m
from zrl.rollout import cluster
from zrl.rollout.pipeline import PipelineRollout

LIMIT = 10.0  # seconds
T, B = 3, 2
SMALL = (5,)
LARGE = (300, 300)  # 0.36 MB a row and column: several frames


def spec_of(shape: tuple[int, ...]) -> FragmentSpec:
    flags, value = ArraySpec("bool", (3,)), ArraySpec("float32")
    return FragmentSpec.build(
        T, B, obs={"x": ArraySpec("uint8", shape), "flags": flags}, act=ArraySpec("int64"), actor={"value": value}
    )


@dataclass
class Peer:
    """A worker that has attached; its host says nothing more."""

    link: Link
    me: m.Hello
    spec: FragmentSpec
    welcome: m.Welcome
    seq: int = 0

    def release(self) -> m.Release:
        found = self.link.receive(LIMIT)
        assert isinstance(found, m.Release), found
        return found

    def ready(self, slot: int, *payload: memoryview, seq: int = 0, version: int = 1) -> None:
        self.seq = seq or self.seq + 1
        ids = (self.welcome.run_id, self.me.incarnation)
        times = (0.0,) * 6
        self.link.send(m.Ready(*ids, slot, self.seq, version, *times, T * B), *payload)


def hello(role: str, **more: Any) -> m.Hello:
    given: dict[str, Any] = {"name": role, "host": m.NO_ID, "index": 0, "generation": 0, "count": 0, **more}
    ids = (m.NO_ID, os.urandom(m.ID_NBYTES))
    return m.Hello(*ids, protocol=1, role=role, versions=(), process=m.NO_ID, boot_id="", **given)


@contextlib.contextmanager
def attached(
    it: PipelineRollout, spec: FragmentSpec, name: str = "host", keys: k.HostKeys | None = None
) -> Iterator[Peer]:
    with (
        contextlib.closing(Link(it.urls[0], keys=keys)) as host,
        contextlib.closing(Link(it.urls[0], keys=keys)) as link,
    ):
        his = hello("host", name=name, count=1)
        host.send(his)
        told = host.receive(LIMIT)
        assert isinstance(told, m.Welcome)
        me = hello("worker", host=his.incarnation, index=told.index_base)
        link.send(me)
        welcome = link.receive(LIMIT)
        assert isinstance(welcome, m.Welcome)
        link.send(
            m.Attach(
                welcome.run_id,
                me.incarnation,
                spec=spec.to_plain(),
                digest=spec.digest,
                n_slots=welcome.n_slots,
                slot_nbytes=spec.nbytes,
                pid=0,
                fd=-1,
                nbytes=0,
                boot_id="",
                path="",
            )
        )
        answer = link.receive(LIMIT)
        assert isinstance(answer, m.Attached)
        assert not answer.local
        yield Peer(link, me, spec, welcome)


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """pyzmq's thread that lets go of what was sent without a copy ends with the process; here it ends with the test."""
    yield
    gc.stop()


@pytest.fixture
def it(tmp_path: Path) -> Iterator[PipelineRollout]:
    tmp_path.chmod(0o700)
    with cluster.rollout("E", CountingActor(), T, B, 2, 1, bind=f"ipc://{tmp_path}/l") as it:
        yield it


def fragment(spec: FragmentSpec, seed: int) -> tuple[Slot, memoryview]:
    """A slot full of noise, but for flags, which are flags."""
    memory = private_memory(spec.nbytes)
    memory[:] = np.random.default_rng(seed).integers(0, 256, spec.nbytes, np.uint8)
    slot = Slot(spec, memory)
    for a in slot.arrays:
        if a.dtype == np.bool_:
            a[...] = a.view(np.uint8) % 2 == 1
        if a.dtype.kind == "f":
            a[...] = np.random.default_rng(seed).normal(size=a.shape)
    return slot, memory.data


def same(batch: Batch, slot: Slot) -> bool:
    expected = [torch.from_numpy(a) for name in slot.spec.fields for a in slot.arrays_of(name)]
    s = batch.state
    found = [s.obs["flags"], s.obs["x"], s.act, s.rew, s.fin, s.term, batch.actor["value"]]
    found += [batch.bootstrap, batch.final_value, batch.mask, batch.ep_return, batch.ep_length]
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_what_was_sent_is_what_is_yielded(it: PipelineRollout, shape: tuple[int, ...]) -> None:
    spec = spec_of(shape)
    with attached(it, spec) as peer:
        for seed in range(5):
            slot, data = fragment(spec, seed)
            peer.ready(peer.release().slot, *chunks(data))
            assert same(next(it), slot)
        assert len(chunks(data)) == -(-spec.nbytes // (256 << 10))
    stats = it.stats()
    assert stats["fragments"]["committed"] == 5
    assert not stats["refused"]
    audit(it)


def read_on(link: Link) -> None:
    """Until nothing comes any more."""
    while link.receive(LIMIT) is not None:
        pass


@pytest.mark.parametrize("more", [0, 1])
def test_full_frames_encrypted(tmp_path: Path, more: int) -> None:
    """Encryption makes a frame longer, which is no reason to cut the connection; twice as long a frame is."""
    tmp_path.chmod(0o700)
    server = k.new_pair(tmp_path / "a", "server")
    k.authorize(tmp_path / "a", "one", k.new_pair(tmp_path / "b", "one"))
    k.authorize(tmp_path / "b", "server", server)
    keys, spec = k.host_keys(tmp_path / "b"), spec_of(LARGE)
    with (
        cluster.rollout("E", CountingActor(), T, B, 2, 1, bind="tcp://127.0.0.1:*", keys=tmp_path / "a") as it,
        attached(it, spec, keys=keys) as peer,
    ):
        slot, data = fragment(spec, 1)
        peer.ready(peer.release().slot, *chunks(data, MAX_FRAME * (1 + more)))
        if more:
            with pytest.raises(LinkLost):
                read_on(peer.link)
        else:
            assert same(next(it), slot)


def test_frames_may_have_any_size_below_the_limit(it: PipelineRollout) -> None:
    spec = spec_of(LARGE)
    slot, data = fragment(spec, 1)
    with attached(it, spec) as peer:
        peer.ready(peer.release().slot, *chunks(data[:1000], 1), data[1000:1000], *chunks(data[1000:], 99_991))
        assert same(next(it), slot)


def test_flags_are_made_true_or_false(it: PipelineRollout) -> None:
    """A byte that is neither 0 nor 1 would be a bool that is neither True nor False."""
    spec = spec_of(SMALL)
    slot, data = fragment(spec, 2)
    for a in slot.arrays:
        if a.dtype == np.bool_:
            a.view(np.uint8)[...] = np.where(a, 7, 0)
    with attached(it, spec) as peer:
        peer.ready(peer.release().slot, data)
        batch = next(it)
    for a in (batch.state.obs["flags"], batch.state.fin, batch.state.term, batch.mask):
        found = a.view(torch.uint8)
        assert set(found.flatten().tolist()) == {0, 1}
    assert torch.equal(batch.state.fin, torch.from_numpy(slot.arrays_of("state.fin")[0].view(np.uint8) == 7))


def test_a_payload_of_another_size_is_counted_and_the_slot_stays_with_the_worker(it: PipelineRollout) -> None:
    spec = spec_of(SMALL)
    slot, data = fragment(spec, 3)
    with attached(it, spec) as peer:
        granted = peer.release().slot
        more = bytearray(data) + b"\0"
        for bad in ([], [data[:-1]], [memoryview(more)], [data, data], [data, *[data[:0]] * 3000, data]):
            peer.ready(granted, *bad)
        peer.ready(granted, data)
        assert same(next(it), slot)
        assert it.stats()["refused"] == {"payload": 5}
        assert it.stats()["fragments"]["committed"] == 1
        audit(it)


def test_what_the_books_do_not_allow_is_not_received(it: PipelineRollout) -> None:
    """Another one's slot, one that is not granted, weights from the future, a number twice."""
    spec = spec_of(SMALL)
    slot, data = fragment(spec, 4)
    other = fragment(spec, 5)[1]
    with attached(it, spec) as peer:
        first, second = peer.release(), peer.release()
        peer.ready(first.slot, data)
        peer.ready(first.slot, other)  # its own once, and now not any more
        peer.ready(60_000, other)
        peer.ready(second.slot, other, version=99)
        peer.ready(second.slot, other, seq=1)
        assert same(next(it), slot)
        until(lambda: sum(it.stats()["refused"].values()) == 4)
        assert it.stats()["refused"] == {"slot not granted": 2, "version out of range": 1, "seq repeated": 1}
        audit(it)


def test_the_verdict_names_a_slow_host(it: PipelineRollout, monkeypatch: pytest.MonkeyPatch) -> None:
    """One answers at once, the other after 0.2 s: batches do not wait for it."""
    spec = spec_of(SMALL)
    _, data = fragment(spec, 7)
    with attached(it, spec, "quick") as quick, attached(it, spec, "slow") as slow:
        held: list[tuple[float, m.Release]] = []
        deadline = time.monotonic() + 3 * LIMIT
        while "host slow" not in (said := it.stats()["verdict"]):
            assert time.monotonic() < deadline, said
            if isinstance(granted := quick.link.receive(0.001), m.Release):
                quick.ready(granted.slot, data, version=it.version)
            if it.stats()["slots"]["ready"]:
                next(it)
            while (release := slow.link.receive(0.001)) is not None:
                assert isinstance(release, m.Release)
                held.append((time.monotonic() + 0.2, release))
            while held and held[0][0] < time.monotonic():
                slow.ready(held.pop(0)[1].slot, data, version=it.version)
        by_host = it.stats()["by_host"]
    assert re.search(r"; fragments of host slow take [0-9.]+ times as long as others, no batch waits for them$", said)
    assert by_host["slow"]["fragment_seconds"] >= 0.2
    assert by_host["quick"]["fragments_per_s"] > by_host["slow"]["fragments_per_s"]


@pytest.mark.long  # it takes 15 s to be missed
def test_a_worker_that_goes_leaves_what_it_sent_to_the_books(it: PipelineRollout) -> None:
    spec = spec_of(SMALL)
    slot, data = fragment(spec, 6)
    with attached(it, spec) as peer:
        peer.ready(peer.release().slot, data)
        assert same(next(it), slot)
        peer.ready(peer.release().slot, data)
        until(lambda: it.stats()["fragments"]["committed"] == 2)
    until(lambda: not it.stats()["workers"])
    stats = it.stats()
    assert stats["fragments"]["committed"] == stats["fragments"]["consumed"] + stats["fragments"]["in_flight"] + sum(
        stats["dropped"].values()
    )
    audit(it)
