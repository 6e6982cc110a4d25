"""What peers repeat after its time, and whose keys are good for something else: it is heard once, or not at all."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.faults.test_peers import Stranger
from tests.faults.world import Ledger, audit, drive, impatient, kid_of, kill, needs_linux, rolling, stamps, until
from tests.rollout.test_remote import SMALL, B, T, attached, collected, fragment, same, spec_of
from tests.system.programs import ZRL, Programs, folder, free_port, goes_on, keys_in, programs, status_of
from tests.toys import CountingActor
from zrl.net import keys as k
from zrl.net.codec import decode
from zrl.net.link import Link
from zrl.protocol import messages as m
from zrl.rollout import cluster

__all__ = ["collected", "folder", "programs"]  # fixtures
pytestmark = needs_linux

LIMIT = 20.0  # seconds for what takes few


class NoPayload:
    more = False


@pytest.mark.long
def test_what_a_dead_worker_said_is_not_heard_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Readys, recorded while it lived, from a stranger and as its successor's own, which has the same slots."""
    impatient(monkeypatch)
    recorded: dict[bytes, list[bytes]] = {}

    def recording(header: bytes) -> m.Message:
        message = decode(header)
        if isinstance(message, m.Ready):
            recorded.setdefault(message.incarnation, []).append(header)
        return message

    monkeypatch.setattr("zrl.nodes.collator.decode", recording)
    ledger, nothing = Ledger(), NoPayload()
    with rolling(stamps()) as it, Stranger(it.urls[0]) as stranger:
        kid = kid_of(it, 0)
        drive(it, ledger, lambda: len(recorded.get(kid.incarnation, ())) >= 10)
        pid, known = kill(kid), set(ledger.from_stamps[0])
        drive(it, ledger, lambda: ledger.from_stamps[0] - known)
        successor = kid_of(it, 0, not_pid=pid).incarnation
        said = recorded[kid.incarnation][-10:]
        collator, before = it._collator, it.stats()["refused"]
        for header in said:
            stranger.send(header)
        stranger.settle()

        def again() -> None:
            peer = collator.peers.workers[successor].peer
            for header in said:
                collator._on_message(peer, header, nothing)  # type: ignore[arg-type]

        collator._post(again)
        for _ in range(10):
            ledger.check(next(it))
        stats = audit(it)
        refused = {reason: n - before.get(reason, 0) for reason, n in stats["refused"].items()}
        assert (refused["unknown"], refused["stale"]) == (10, 10)
        assert sum(stats["losses"].values()) == stats["replaced"] == 1


def test_another_host_with_a_key_gains_nothing_by_a_recorded_ready(tmp_path: Path) -> None:
    """Before its time, after it, and after the end of the worker that it came from: the payload is never looked at."""
    tmp_path.chmod(0o700)
    keys_in(tmp_path, "c")
    one_has, two_has = k.host_keys(tmp_path / "b"), k.host_keys(tmp_path / "c")
    spec = spec_of(SMALL)
    (mine, data), (_, other) = fragment(spec, 1), fragment(spec, 2)
    with contextlib.ExitStack() as opened:
        it = opened.enter_context(
            cluster.rollout("E", CountingActor(), T, B, 2, 1, bind="tcp://127.0.0.1:*", keys=tmp_path / "a")
        )
        one = opened.enter_context(attached(it, spec, "one", one_has))
        two = opened.enter_context(attached(it, spec, "two", two_has))
        ready = m.Ready(it._collator.publisher.run_id, one.me.incarnation, one.release().slot, 1, 1, *(0.0,) * 6, T * B)

        def refused(n: int) -> dict[str, Any]:
            until(lambda: sum(it.stats()["refused"].values()) >= n, LIMIT)
            found: dict[str, Any] = it.stats()["refused"]
            return found

        two.link.send(ready, other)  # before its worker says it
        assert refused(1) == {"stale": 1}
        one.link.send(ready, data)
        assert same(next(it), mine)
        two.link.send(ready, other)
        assert refused(2) == {"stale": 2}
        one.link.send(m.Bye(ready.run_id, ready.incarnation))
        until(lambda: it.stats()["workers"] == 1, LIMIT)
        two.link.send(ready, other)
        assert refused(3) == {"stale": 3}
        with contextlib.closing(Link(it.urls[0], keys=two_has)) as link:
            link.send(ready, other)
            assert isinstance(link.receive(LIMIT), m.HelloAgain)
        assert refused(4) == {"stale": 3, "unknown": 1}
        assert audit(it)["fragments"]["committed"] == 1
        two.ready(two.release().slot, other, version=it.version)
        assert next(it).meta[0].worker == two.me.index


@pytest.mark.long
@pytest.mark.timeout(180)
def test_a_key_that_is_not_known_yet(programs: Programs) -> None:
    """Its host says so and tries again; what others do is none of its business, and once it is authorized it works."""
    keys_in(programs.folder, "c")
    (programs.folder / "a" / "authorized" / "c.public").unlink()
    url = f"tcp://127.0.0.1:{free_port()}"
    learner = programs.learner(url, "--keys", "a", "--steps", "100M", "--max-lag", "-1")
    known = programs.worker(url, "--keys", "b")
    known.wait_for("welcome")
    goes_on(programs, learner)
    unknown = programs.worker(url, "--keys", "c")
    unknown.wait_for("does not know the key", 2)
    goes_on(programs, learner)
    status = status_of(url, programs.folder, "--keys", "b")
    assert (status["hosts"], status["workers"]) == (1, 2)
    assert status["refused"]["key_unknown"] >= 2
    assert "welcome" not in unknown.text
    public = (programs.folder / "c" / "c.public").read_text().strip()
    authorize = programs.start([*ZRL, "keys", "authorize", "c", public, "--keys", "a"])
    assert authorize.wait() == 0, authorize.text
    unknown.wait_for("welcome")
    until(lambda: status_of(url, programs.folder, "--keys", "c")["workers"] == 4, LIMIT)
    goes_on(programs, learner)
    learner.process.send_signal(signal.SIGINT)
    assert learner.wait() == 130, learner.text
    assert (known.wait(), unknown.wait()) == (0, 0), unknown.text
