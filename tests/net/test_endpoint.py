"""A socket on an event loop: nothing that arrives stays unread, whatever else touches the socket."""

from __future__ import annotations

import asyncio
import select
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvloop
import zmq

from zrl.net import sockets as z
from zrl.net.addresses import run_directory
from zrl.net.endpoint import Endpoint

LIMIT = 5.0  # seconds
MISSED = 0.3  # seconds after which a message counts as missed

Runner = Callable[[Callable[[], Awaitable[None]]], None]


@pytest.fixture
def folder() -> Iterator[Path]:
    made = run_directory()
    yield made
    shutil.rmtree(made)


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Runner:
    def go(main: Callable[[], Awaitable[None]]) -> None:
        async def bounded() -> None:
            await asyncio.wait_for(main(), 20.0)

        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(bounded())

    return go


class Careless(Endpoint):
    """Without the rule: trusts the descriptor."""

    def _schedule(self) -> None:
        pass


class Inbox:
    """What arrived, and a way to wait for it on the loop."""

    def __init__(self) -> None:
        self.got: list[tuple[bytes, bytes]] = []
        self._news = asyncio.Event()

    def __call__(self, peer: bytes, header: bytes, rest: z.Rest) -> None:
        self.got.append((peer, header))
        self._news.set()

    async def count(self, n: int, seconds: float = LIMIT) -> bool:
        """Whether n messages arrive in time."""
        try:
            async with asyncio.timeout(seconds):
                while len(self.got) < n:
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            return False
        return True


@asynccontextmanager
async def connected(folder: Path, kind: type[Endpoint]) -> AsyncIterator[tuple[Endpoint, Inbox, z.Socket, bytes]]:
    """An endpoint on a DEALER, its inbox, and the ROUTER at the other end with the DEALER's routing id."""
    context = z.make_context()
    router, dealer = z.make_router(context), z.make_dealer(context)
    z.connect(dealer, z.bind(router, f"ipc://{folder}/r"))
    deadline = time.monotonic() + LIMIT
    while not z.send(dealer, b"hello") and time.monotonic() < deadline:
        await asyncio.sleep(0.001)
    router.poll(int(LIMIT * 1000))
    peer, _ = router.recv_multipart(zmq.NOBLOCK)
    inbox = Inbox()
    endpoint = kind(dealer, asyncio.get_running_loop(), inbox)
    try:
        yield endpoint, inbox, router, peer
    finally:
        endpoint.close()
        context.destroy()


def swallow_the_edge(endpoint: Endpoint) -> None:
    """Wait, without the loop, until the descriptor says that something came; then send until it says no more."""
    fd: int = endpoint.socket.get(zmq.FD)  # type: ignore[assignment]
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(LIMIT * 1000), "nothing came"
    deadline = time.monotonic() + LIMIT
    while poll.poll(0):  # a send looks for news only now and then
        assert time.monotonic() < deadline
        endpoint.send(b"something")


@pytest.mark.parametrize(("kind", "arrives"), [(Endpoint, True), (Careless, False)])
def test_a_send_may_swallow_the_edge(run: Runner, folder: Path, kind: type[Endpoint], arrives: bool) -> None:
    """The race of which a pipeline hangs: without the rule the message stays in the socket although it is there."""

    async def main() -> None:
        async with connected(folder, kind) as (endpoint, inbox, router, peer):
            await asyncio.sleep(0)  # the reader is in place
            z.waiting(endpoint.socket)
            z.send(router, peer, b"news")
            swallow_the_edge(endpoint)
            assert await inbox.count(1, LIMIT if arrives else MISSED) == arrives
            assert arrives or z.waiting(endpoint.socket)  # it was there all the time

    run(main)


def test_what_came_before_the_endpoint_is_read(run: Runner, folder: Path) -> None:
    async def main() -> None:
        context = z.make_context()
        router, dealer = z.make_router(context), z.make_dealer(context)
        z.connect(dealer, z.bind(router, f"ipc://{folder}/r"))
        deadline = time.monotonic() + LIMIT
        while not z.send(dealer, b"early") and time.monotonic() < deadline:
            await asyncio.sleep(0.001)
        router.poll(int(LIMIT * 1000))  # this swallows the edge
        inbox = Inbox()
        endpoint = Endpoint(router, asyncio.get_running_loop(), inbox)
        assert await inbox.count(1)
        endpoint.close()
        endpoint.close()
        context.destroy()

    run(main)


def test_many_messages_both_ways(run: Runner, folder: Path) -> None:
    """Every message is answered from within its handler: reading and sending in turns, on both sides."""
    n = 3000

    async def main() -> None:
        context = z.make_context()
        router, dealer = z.make_router(context), z.make_dealer(context)
        z.connect(dealer, z.bind(router, f"ipc://{folder}/r"))
        loop = asyncio.get_running_loop()
        answers = Inbox()

        def answer(peer: bytes, header: bytes, rest: z.Rest) -> None:
            assert server.send(peer, header)

        server = Endpoint(router, loop, answer, max_messages=7)
        client = Endpoint(dealer, loop, answers)
        deadline = time.monotonic() + LIMIT
        while not client.send(b"0") and time.monotonic() < deadline:
            await asyncio.sleep(0.001)
        for i in range(1, n):
            client.send(b"%d" % i)
            if i % 100 == 0:
                await asyncio.sleep(0)
        assert await answers.count(n)
        assert [header for _, header in answers.got] == [b"%d" % i for i in range(n)]
        client.close()
        server.close()
        context.destroy()

    run(main)


def test_a_handler_that_raises_does_not_stop_the_reading(run: Runner, folder: Path) -> None:
    async def main() -> None:
        raised: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, info: raised.append(info.get("exception")))
        async with connected(folder, Endpoint) as (endpoint, inbox, router, peer):

            def fail_once(peer: bytes, header: bytes, rest: z.Rest) -> None:
                if header == b"bad":
                    raise KeyError(header)
                inbox(peer, header, rest)

            endpoint._handler = fail_once
            z.send(router, peer, b"bad")
            z.send(router, peer, b"good")
            assert await inbox.count(1)
            assert [type(error) for error in raised] == [KeyError]

    run(main)


def test_a_handler_may_close_its_endpoint(run: Runner, folder: Path) -> None:
    async def main() -> None:
        async with connected(folder, Endpoint) as (endpoint, inbox, router, peer):

            def close(peer: bytes, header: bytes, rest: z.Rest) -> None:
                endpoint.close()
                inbox(peer, header, rest)

            endpoint._handler = close
            z.send(router, peer, b"last", b"payload")
            z.send(router, peer, b"more")
            assert await inbox.count(1)
            await asyncio.sleep(0)
            assert len(inbox.got) == 1

    run(main)
