"""A learner that listens with keys, or insecurely, heard by peers of a few lines."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest

from tests.toys import CountingActor
from zrl.data.memory import boot_id
from zrl.errors import ConfigError
from zrl.net import keys as k
from zrl.net.link import Link
from zrl.protocol import messages as m
from zrl.rollout import cluster
from zrl.rollout.pipeline import PipelineRollout

LIMIT = 10.0  # seconds


@pytest.fixture
def keys(tmp_path: Path) -> k.HostKeys:
    """Of a host that the learner with the keys in ``a`` knows."""
    tmp_path.chmod(0o700)
    server = k.new_pair(tmp_path / "a", "server")
    k.authorize(tmp_path / "a", "one", k.new_pair(tmp_path / "b", "one"))
    k.authorize(tmp_path / "b", "server", server)
    return k.host_keys(tmp_path / "b")


def listening(*bind: str, keys: Path | None = None, insecure: bool = False) -> PipelineRollout:
    return cluster.rollout("E", CountingActor(), 4, 1, 1, 1, bind=bind, keys=keys, insecure=insecure)


def hello(name: str) -> m.Hello:
    return m.Hello(m.NO_ID, os.urandom(16), m.PROTOCOL_VERSION, "host", name, (), m.NO_ID, boot_id(), m.NO_ID, 0, 0, 1)


def test_tcp_wants_a_key_and_ipc_does_not(tmp_path: Path, keys: k.HostKeys) -> None:
    with listening("tcp://127.0.0.1:*", f"ipc://{tmp_path}/l", keys=tmp_path / "a") as it:
        ipc, tcp = it.urls
        assert ipc.startswith("ipc://")
        for url, pair in ((ipc, None), (tcp, keys)):
            with contextlib.closing(Link(url, keys=pair)) as link:
                link.send(hello(url[:3]))
                assert isinstance(link.receive(LIMIT), m.Welcome)
        assert not it.stats()["refused"]  # the strangers that it tried itself with do not count


def test_what_a_revoked_host_says_is_discarded(tmp_path: Path, keys: k.HostKeys) -> None:
    with (
        listening("tcp://127.0.0.1:*", keys=tmp_path / "a") as it,
        contextlib.closing(Link(it.urls[0], keys=keys)) as link,
    ):
        link.send(hello("one"))
        assert isinstance(link.receive(LIMIT), m.Welcome)
        k.revoke(tmp_path / "a", "one")
        deadline = time.monotonic() + LIMIT
        while "revoked_message" not in it.stats()["refused"]:
            assert time.monotonic() < deadline, it.stats()["refused"]
            link.send(hello("two"))
        while link.receive(0.0) is not None:  # of those before the learner looked
            pass
        before = it.stats()["refused"]["revoked_message"]
        link.send(hello("three"))
        while it.stats()["refused"]["revoked_message"] == before:
            assert time.monotonic() < deadline
        assert link.receive(0.0) is None


@pytest.mark.parametrize(("keys_too", "text"), [(True, "insecure: makes no sense with keys"), (False, "0.0.0.0")])
def test_other_machines_without_keys(
    tmp_path: Path, keys: k.HostKeys, caplog: pytest.LogCaptureFixture, keys_too: bool, text: str
) -> None:
    url = "tcp://0.0.0.0:*"
    if keys_too:
        with pytest.raises(ConfigError, match=text):
            listening(url, keys=tmp_path / "a", insecure=True)
        return
    with pytest.raises(ConfigError, match="--insecure to go without"):
        listening(url)
    assert not caplog.records
    with listening(url, insecure=True):
        assert text in caplog.text


def test_keys_that_cannot_be_used(tmp_path: Path, keys: k.HostKeys) -> None:
    (tmp_path / "a" / "server.secret").chmod(0o640)
    with pytest.raises(ConfigError, match="mode 0600, found 0640"):
        listening("tcp://127.0.0.1:*", keys=tmp_path / "a")
    (tmp_path / "a" / "server.secret").chmod(0o600)
    (tmp_path / "a" / "authorized" / "two.public").write_text("nonsense")
    with pytest.raises(ConfigError, match=r"two\.public: expected a key"):
        listening("tcp://127.0.0.1:*", keys=tmp_path / "a")
