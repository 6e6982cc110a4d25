"""Peers that speak nonsense, another version, or for others, while a run goes on."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgpack
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults.machinery import DEADLINE, Ledger, books_balance, stamped, until
from zrl import ConfigError
from zrl.data.memory import boot_id
from zrl.net.codec import decode, encode
from zrl.protocol import messages as m
from zrl.rollout import cluster
from zrl.rollout.pipeline import PipelineRollout
from zrl.zoo import MLPActor


class Stranger:
    """A raw DEALER."""

    def __init__(self, url: str) -> None:
        self._context = zmq.Context()
        self._context.linger = 0
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.rcvtimeo = int(DEADLINE * 1000)
        self.socket.connect(url)

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def say(self, message: m.Message) -> None:
        self.send(encode(message))

    def hear(self) -> m.Message:
        return decode(self.socket.recv_multipart()[0])

    def close(self) -> None:
        self.socket.close()
        self._context.term()


@pytest.fixture(scope="module")
def run() -> Iterator[tuple[PipelineRollout, Ledger]]:
    with stamped() as it:
        until(lambda: it.stats()["workers"] == 2, "both workers")
        yield it, Ledger()


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> None:
    """In place of the one of the whole suite: here one run serves many tests, and ends with the last of them."""


@pytest.fixture
def stranger(run: tuple[PipelineRollout, Ledger]) -> Iterator[Stranger]:
    stranger = Stranger(run[0].urls[0])
    yield stranger
    stranger.close()


def hello(**changes: Any) -> m.Hello:
    message = m.Hello(
        m.NO_ID,
        os.urandom(16),
        protocol=m.PROTOCOL_VERSION,
        role="worker",
        name="stranger",
        versions=(),
        pid=os.getpid(),
        boot_id=boot_id(),
        host=os.urandom(16),
        index=0,
        generation=0,
        count=0,
    )
    return replace(message, **changes)


def goes_on(run: tuple[PipelineRollout, Ledger], n: int = 3) -> None:
    it, ledger = run
    for _ in range(n):
        ledger.check(next(it))
    stats = it.stats()
    assert stats["workers"] == 2
    assert set(stats["losses"]) <= {"rejected: remote_unsupported"}  # of the test of rings that are none
    assert books_balance(it)


def test_another_version_is_told_so(run: tuple[PipelineRollout, Ledger], stranger: Stranger) -> None:
    stranger.send(other_version())
    answer = stranger.hear()
    assert isinstance(answer, m.Reject)
    assert answer.code == "version"
    assert "protocol 99, not 1" in answer.text
    goes_on(run)


def other_version() -> bytes:
    data = encode(hello(protocol=m.PROTOCOL_VERSION))
    values = msgpack.unpackb(data)
    values[3] = 99
    packed: bytes = msgpack.packb(values)
    return packed


def test_a_worker_without_a_host_is_rejected(run: tuple[PipelineRollout, Ledger], stranger: Stranger) -> None:
    stranger.say(hello())
    answer = stranger.hear()
    assert isinstance(answer, m.Reject)
    assert (answer.code, answer.retry) == ("unknown_host", True)
    goes_on(run)


def test_whoever_was_not_welcomed_is_asked_for_a_hello(run: tuple[PipelineRollout, Ledger], stranger: Stranger) -> None:
    run_id, me = run[0]._publisher.run_id, os.urandom(16)
    for message in (
        m.Bye(run_id, me),
        m.Fetch(run_id, me),
        m.Beat(run_id, me, ()),
        m.Gone(run_id, me, me, 0, "error", 1, -1, "", ""),
        m.Ready(run_id, me, 0, 1, 1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0),
    ):
        stranger.say(message)
        assert isinstance(stranger.hear(), m.HelloAgain)
    goes_on(run)


def test_nobody_can_speak_for_a_worker(run: tuple[PipelineRollout, Ledger], stranger: Stranger) -> None:
    it, _ = run
    collator = it._collator
    run_id = it._publisher.run_id
    for incarnation in list(collator.peers.workers):
        for message in (
            m.Ready(run_id, incarnation, 0, 1 << 40, 1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0),
            m.Bye(run_id, incarnation),
            hello(run_id=run_id, incarnation=incarnation),
        ):
            stranger.say(message)
    host = next(iter(collator.peers.hosts))
    for worker in list(collator.peers.workers):
        stranger.say(m.Gone(run_id, host, worker, 0, "error", 1, -1, "", ""))
    stranger.say(replace(hello(), host=host, index=1))  # a second worker 1
    heard = [stranger.hear() for _ in range(7)]
    assert any(isinstance(x, m.Reject) and x.code == "name_taken" for x in heard)
    goes_on(run)


def test_a_ring_that_is_none(run: tuple[PipelineRollout, Ledger]) -> None:
    """A host that is welcome, and a worker of it that attaches to whatever it likes."""
    it, _ = run
    spec = it._collator.spec
    assert spec is not None
    host, worker = Stranger(it.urls[0]), Stranger(it.urls[0])
    try:
        me = hello(role="host", name="other", count=3, host=m.NO_ID)
        host.say(me)
        welcome = host.hear()
        assert isinstance(welcome, m.Welcome)
        run_id = welcome.run_id
        for fd in (0, 9999):
            his = hello(host=me.incarnation, index=welcome.index_base)
            worker.say(his)
            answer = worker.hear()
            assert isinstance(answer, m.Welcome), answer
            attach = m.Attach(
                run_id, his.incarnation, spec.to_plain(), spec.digest, answer.n_slots, spec.nbytes,
                os.getpid(), fd, 4096 + answer.n_slots * (-(-spec.nbytes // 4096) * 4096), boot_id(), "",
            )  # fmt: skip
            worker.say(attach)
            no = worker.hear()
            assert isinstance(no, m.Reject)
            assert no.code == "remote_unsupported"
        host.say(m.Bye(run_id, me.incarnation))
        assert isinstance(host.hear(), m.ByeAck)
    finally:
        host.close()
        worker.close()
    for _ in range(3):
        run[1].check(next(it))


VALID = [
    encode(hello()),
    encode(m.Bye(bytes(16), bytes(16))),
    encode(m.Beat(bytes(16), bytes(16), (m.ChildBeat(bytes(16), 1, 2, 3, 4),))),
    encode(m.Ready(bytes(16), bytes(16), 0, 1, 1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0)),
    encode(m.Attach(bytes(16), bytes(16), [1, 2, []], bytes(16), 2, 64, 1, 3, 8192, "", "")),
]


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    frames=st.lists(
        st.one_of(
            st.binary(max_size=200),
            st.tuples(st.sampled_from(VALID), st.integers(0, 300), st.binary(max_size=4)).map(
                lambda x: x[0][: x[1]] + x[2] + x[0][x[1] + len(x[2]) :]
            ),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_garbage_is_counted_and_changes_nothing(run: tuple[PipelineRollout, Ledger], frames: list[bytes]) -> None:
    stranger = Stranger(run[0].urls[0])
    try:
        stranger.send(*frames)
        stranger.say(m.Fetch(bytes(16), bytes(16)))  # so that we know when it was read
        while not isinstance(stranger.hear(), m.HelloAgain):
            pass
    finally:
        stranger.close()
    goes_on(run, n=1)


def test_a_flood_of_garbage(run: tuple[PipelineRollout, Ledger], stranger: Stranger) -> None:
    it, ledger = run
    draw = random.Random(7)
    before = it.stats()["refused"].get("odd", 0)
    for _ in range(3000):
        stranger.send(draw.randbytes(draw.randrange(1, 300)))
    until(lambda: it.stats()["refused"].get("odd", 0) - before > 2900, "the flood to be read")
    for _ in range(5):
        ledger.check(next(it))
    goes_on(run)


def test_a_frame_that_is_too_large_costs_its_sender_the_connection(run: tuple[PipelineRollout, Ledger]) -> None:
    stranger = Stranger(run[0].urls[0])
    try:
        stranger.send(bytes(1 << 20))
        goes_on(run)
    finally:
        stranger.close()


def test_an_address_in_use() -> None:
    import gymnasium as gym

    env = gym.make("CartPole-v1")
    actor = MLPActor(env.observation_space, env.action_space)
    with cluster.rollout("CartPole-v1", actor, 4, 1, 2, 1, bind="tcp://127.0.0.1:*") as first:
        (url,) = first.urls
        with pytest.raises(ConfigError, match="address in use"):
            cluster.rollout("CartPole-v1", actor, 4, 1, 2, 1, bind=url)


SMALL_SHM = """
import gymnasium as gym, torch
from zrl import zoo
from zrl.rollout import multi
import os
assert os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize <= 1 << 20
make = lambda: gym.make("CartPole-v1")
env = make()
actor = zoo.default_actor(env.observation_space, env.action_space)
with multi.rollout(make, actor, 512, 2, 16, 8, 2) as it:  # some 600 KB a fragment
    for _ in range(4):
        next(it)
print("fine")
"""


def test_a_small_dev_shm_does_not_matter() -> None:
    mount = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    probe = subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"needs a mount namespace of its own: {probe.stderr.strip()}")
    words = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, SMALL_SHM]
    done = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE * 2, check=False)
    assert done.stdout == "fine\n", done.stderr
