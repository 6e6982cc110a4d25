"""Workers that come and go while a learner learns: two real ones and a crowd that only speaks the protocol."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import zmq

from tests.faults.world import ROOT, audit, until
from zrl.data.spec import FragmentSpec
from zrl.net.codec import decode, encode
from zrl.net.sockets import Context, chunks, connect, make_context, make_dealer, send
from zrl.protocol import messages as m
from zrl.rollout import cluster
from zrl.rollout.pipeline import PipelineRollout
from zrl.zoo import default_actor

CROWD = 62
T, B = 8, 2


class Client:
    """A host with one worker, remote: two connections."""

    def __init__(self, context: Context, url: str, name: str, spec: FragmentSpec, payload: list[memoryview]) -> None:
        self.name, self.spec, self.payload = name, spec, payload
        self.host, self.worker = make_dealer(context), make_dealer(context)
        self.ids = {self.host: os.urandom(m.ID_NBYTES), self.worker: os.urandom(m.ID_NBYTES)}
        self.seq, self.run_id, self.beat_at, self.attached = 0, m.NO_ID, 0.0, False
        for socket in self.ids:
            connect(socket, url)

    def hello(self, socket: zmq.Socket[bytes], index: int = 0) -> None:
        role = "host" if socket is self.host else "worker"
        host = m.NO_ID if socket is self.host else self.ids[self.host]
        head = (m.PROTOCOL_VERSION, role, self.name, (), m.NO_ID, "", host, index, 0, int(socket is self.host))
        socket.poll(10_000, zmq.POLLOUT)
        send(socket, encode(m.Hello(m.NO_ID, self.ids[socket], *head)))

    def turn(self, now: float) -> None:
        """Answer what has come, and beat."""
        for socket in self.ids:
            while socket.poll(0):
                self.take(socket, decode(socket.recv_multipart()[0]))
        if self.run_id != m.NO_ID and now >= self.beat_at:
            self.beat_at = now + 1.0
            send(self.host, encode(m.Beat(self.run_id, self.ids[self.host], ())))

    def take(self, socket: zmq.Socket[bytes], message: m.Message) -> None:
        ids = (self.run_id, self.ids[socket])
        if isinstance(message, m.Welcome) and socket is self.host:
            self.run_id = message.run_id
            self.hello(self.worker, message.index_base)
        elif isinstance(message, m.Welcome):
            spec = self.spec
            where: Any = {"pid": 0, "fd": -1, "nbytes": 0, "boot_id": "", "path": ""}
            attach = m.Attach(*ids, spec.to_plain(), spec.digest, message.n_slots, spec.nbytes, **where)
            send(socket, encode(attach))
        elif isinstance(message, m.Attached):
            self.attached = True
        elif isinstance(message, m.Release):
            self.seq += 1
            ready = m.Ready(*ids, message.slot, self.seq, message.least_version, *(0.0,) * 6, T * B)
            send(socket, encode(ready), *self.payload)

    def leave(self, *, politely: bool) -> None:
        if politely:
            for socket in (self.worker, self.host):
                send(socket, encode(m.Bye(self.run_id, self.ids[socket])))
                socket.poll(10_000)
        for socket in self.ids:
            socket.close()


class Crowd(threading.Thread):
    """Clients, `CROWD` of them; from `churn` on one of them is replaced again and again, half of the time without a
    word."""

    def __init__(self, url: str, spec: FragmentSpec) -> None:
        super().__init__(name="crowd")
        self.url, self.spec = url, spec
        self.churn, self.over = threading.Event(), threading.Event()
        self.n_joined = self.n_left = 0
        self.error: BaseException | None = None
        self.payload = chunks(np.zeros(spec.nbytes, np.uint8).data)
        self.context = make_context()
        self.clients: list[Client] = []

    def run(self) -> None:
        try:
            self._run(random.Random(1))
        except BaseException as error:
            self.error = error
        finally:
            for client in self.clients:
                client.leave(politely=False)
            self.context.term()

    def _run(self, rng: random.Random) -> None:
        next_change = 0.0
        while not self.over.is_set():
            now = time.monotonic()
            if len(self.clients) < CROWD:
                self.n_joined += 1
                client = Client(self.context, self.url, f"client-{self.n_joined}", self.spec, self.payload)
                client.hello(client.host)
                self.clients.append(client)
            elif self.churn.is_set() and now >= next_change:
                next_change = now + 0.05
                self.clients.pop(rng.randrange(CROWD)).leave(politely=rng.random() < 0.5)
                self.n_left += 1
            for client in self.clients:
                client.turn(now)
            time.sleep(0.001)


@pytest.fixture
def it(tmp_path: Path) -> Iterator[PipelineRollout]:
    tmp_path.chmod(0o700)
    env = gym.make("CartPole-v1")
    actor = default_actor(env.observation_space, env.action_space)
    with cluster.rollout("CartPole-v1", actor, T, B, 2, 4, bind=f"ipc://{tmp_path}/l") as it:
        yield it


def test_sixty_four_workers_come_and_go(it: PipelineRollout, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "zrl", "worker", "--connect", it.urls[0], "--count", "2", "--no-shm"]
    with (tmp_path / "log").open("wb") as log:
        real = subprocess.Popen(words, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(ROOT)})
    crowd = None
    try:
        next(it)
        spec = it._collator._rings.spec
        assert spec is not None
        crowd = Crowd(it.urls[0], spec)
        crowd.start()
        longest, most, n_real = 0.0, 0, 0
        deadline = time.monotonic() + 40.0
        while crowd.n_left < 40 or n_real < 20:
            assert time.monotonic() < deadline, (crowd.n_joined, crowd.n_left, n_real, it.stats())
            assert crowd.error is None, crowd.error
            begin = time.monotonic()
            batch = next(it)
            longest = max(longest, time.monotonic() - begin)
            n_real += sum(meta.worker < 2 for meta in batch.meta)
            most = max(most, it.stats()["workers"])
            if most == CROWD + 2:
                crowd.churn.set()
        crowd.over.set()
        crowd.join()
        assert longest < 5.0  # nobody was waited for
        until(lambda: next(it) and it.stats()["workers"] == 2)
        stats = audit(it)
        assert stats["losses"].keys() <= {"unreachable", "host silent", "host unreachable"}
        assert set(stats["refused"]) <= {"stale", "unknown", "unexpected"}
        it.close()
        assert real.wait(20) == 0, (tmp_path / "log").read_text()
    finally:
        if crowd is not None:
            crowd.over.set()
            crowd.join()
        real.kill()
        real.wait()
