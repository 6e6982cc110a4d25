"""A host and its children, real ones: what they do to each other from one run to the next."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from zrl.data.memory import MemoryAddress
from zrl.errors import ZrlError
from zrl.nodes.children import MOST_ASKED, Spawner
from zrl.nodes.host import Host, Patience, RunInfo
from zrl.nodes.page import Phase
from zrl.protocol import messages as m

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="stops processes")

PATIENCE = 40.0  # seconds
N = MOST_ASKED + 2
RUN = RunInfo(b"r" * 16, "ipc:///nowhere", 0, MemoryAddress(0, 0, 0, ""), b"d" * 16, 8)


class Said:
    def __init__(self) -> None:
        self.messages: list[m.Message] = []
        self.errors: list[ZrlError] = []

    @property
    def gone(self) -> list[m.Gone]:
        return [message for message in self.messages if isinstance(message, m.Gone)]


@contextlib.contextmanager
def hosting(zygote: Spawner, said: Said) -> Iterator[Host]:
    loop = asyncio.get_running_loop()
    tell, failed = said.messages.append, said.errors.append
    host = Host(zygote, loop, name="a", count=N, patience=Patience(), tell=tell, failed=failed)
    host.hello()
    try:
        yield host
    finally:
        host.close()


@pytest.fixture
def stopped(tmp_path: Path) -> Iterator[Spawner]:
    """A zygote that does nothing, as while it imports."""
    (tmp_path / "run").mkdir()
    with Spawner.start("tests.nodes.targets:idle", None, run_dir=tmp_path / "run", log_dir=tmp_path / "log") as made:
        os.kill(made.process.pid, signal.SIGSTOP)
        yield made
        os.kill(made.process.pid, signal.SIGCONT)


def test_children_of_the_run_before_that_have_not_ended_are_nobodys(stopped: Spawner) -> None:
    async def main() -> None:
        with hosting(stopped, said := Said()) as host:
            host.begin(RUN)
            old = set(host.kids)
            host.end()
            assert not await host.ended(0.05)
            assert len(host.kids) == MOST_ASKED  # the others have not been asked for, and are no more
            host.begin(RUN)
            assert len(host.kids) == N
            assert not old & set(host.kids)
            assert {kid.generation for kid in host.kids.values()} == {1}  # of the same run: with seeds of their own
            os.kill(stopped.process.pid, signal.SIGCONT)
            deadline = time.monotonic() + PATIENCE
            while any(kid.child.pid is None for kid in host.kids.values()):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
            assert len(host.kids) == host.n_started - N == N
            assert (host.n_replaced, said.gone, said.errors) == (0, [], [])
            host.end()
            assert await host.ended(PATIENCE)
            host.begin(dataclasses.replace(RUN, run_id=b"s" * 16))
            assert {kid.generation for kid in host.kids.values()} == {0}
            host.end()
            assert await host.ended(PATIENCE)

    asyncio.run(main())


def test_who_has_not_started_is_drained_at_once(stopped: Spawner) -> None:
    async def main() -> None:
        with hosting(stopped, said := Said()) as host:
            host.begin(RUN)
            host.drain()
            await asyncio.sleep(0)
            assert [gone.cause for gone in said.gone] == ["drained"] * (N - MOST_ASKED)
            assert said.errors == []

    asyncio.run(main())


def test_who_makes_an_environment_anew_is_asked_to_leave_and_not_ended(
    stopped: Spawner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has delivered before, and says Bye; who builds for the first time has nothing to say."""

    async def main() -> None:
        with hosting(stopped, Said()) as host:
            host.begin(RUN)
            first, again = list(host.kids.values())[:2]
            for kid in (first, again):
                kid.page.enter(Phase.BUILD)
            again.page.set_sent(3)
            ended: list[object] = []
            monkeypatch.setattr(host._zygote, "terminate", ended.append)
            host.drain()
            assert first.child in ended
            assert again.child not in ended
            assert again.cause != "drained"
            assert again.page.leave
            monkeypatch.undo()

    asyncio.run(main())


def test_the_wait_for_a_learner_is_no_time_of_the_children(stopped: Spawner) -> None:
    async def main() -> None:
        with hosting(stopped, Said()) as host:
            host._last_tick -= 1000
            host.begin(RUN)
            host.tick(time.monotonic())
            assert all(kid.since <= time.monotonic() for kid in host.kids.values())

    asyncio.run(main())
