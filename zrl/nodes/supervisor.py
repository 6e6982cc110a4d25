"""A host as a process: what `zrl worker` runs. Keeps workers for a learner that it reaches over a socket.

Its life is a sequence of runs. Of each:

    Hello ─► Welcome ─► Fetch ─► Weights ─► board ─► workers start          DEALER
    from Fetch on: Beat, every second                                       DEALER
    then: Gone, when one ends; Revoke, Drain                                DEALER
          weights, the newest of them, onto the board                       SUB
          the learner's heartbeat                                           SUB

SIGTERM: the workers finish what they have in hand, and leave, then this process does. SIGINT: at once.

The learner may be one of several, and send a newcomer to another. There it stays: after a cut it looks for that learner
first, and for the one whose address it was given when nobody answers there for long.

What ends a run: Drain (then this process ends too), a broken connection, HelloAgain, or a learner that has been silent
for too long. Then all workers are killed, for their slots are no longer anybody's, and everything begins anew with a
Hello: the same learner after a cut, or another one at the same address.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import logging
import math
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from zrl.data.board import Board, crc32
from zrl.errors import ConfigError, ProtocolError, WorkerError, ZrlError
from zrl.net.addresses import check_connect, is_loopback, pub_url, run_directory
from zrl.net.codec import TOPIC_STATUS, TOPIC_WEIGHTS, decode, decode_weights, encode
from zrl.net.endpoint import Endpoint
from zrl.net.keys import HostKeys
from zrl.net.sockets import Context, Disconnections, Rest, connect, make_context, make_dealer, make_sub, why_refused
from zrl.nodes.children import Spawner, Target, Zygote
from zrl.nodes.host import TICK, Host, Patience, RunInfo
from zrl.nodes.limits import raise_descriptor_limit
from zrl.nodes.logs import Logs
from zrl.protocol import messages as m
from zrl.protocol.redirect import PATIENCE

MAX_WEIGHTS_NBYTES = 1 << 36
ANSWER_TIMEOUT = 60.0  # seconds for Weights after Fetch: they may be large, and the way slow
FIRST_DELAY, MOST_DELAY = 0.5, 30.0  # seconds before another Hello
NOTICE = 5.0  # seconds without an answer after which to say so
GRACE = 5.0  # seconds for the workers' end
BYE_TIMEOUT = 2.0
MOST_WARNINGS = 20  # of messages that make no sense, in a run
MOST_HOPS = 3  # redirects in a row that are followed
MOST_ANSWERS = 100  # that nobody has waited for yet
MOST_INDICES = 1 << 16
SETTLE = 0.1  # seconds between the end of the connection and the look at what came before it on others
EXIT_DONE, EXIT_FAILED, EXIT_LEARNER_LOST, EXIT_BUDGET_SPENT, EXIT_REFUSED = 0, 1, 3, 4, 5

logger = logging.getLogger("zrl")


@dataclass(frozen=True)
class SupervisorOptions:
    """What `zrl worker` is told.

    Attributes:
        url: of the learner's ROUTER.
        name: of this host; one that comes back gets its workers' indices, and so their seeds, again.
        count: workers to keep.
        target, payload: what every child runs; it gets (payload, `WorkerJob`).
        log_dir: of the workers; a temporary one that goes at the end, if None.
        give_up_after: seconds without a learner after which to end; None: never.
        silence: seconds without the learner's heartbeat after which it is lost; None: 5 on this machine, else 15.
        drain_timeout: seconds after SIGTERM in which the workers may finish their fragments.
        cores: that the workers are kept on, one each and in turn; empty: wherever there is room.
        shm: whether a learner on this machine may read the workers' memory; without, all is as if it were on another.
        keys: of this host; its workers read them from the same files.
        insecure: whether a learner may send this host to other machines without keys.
        patience_away: seconds without an answer after which it returns from where it was sent to.
    """

    url: str
    name: str
    count: int
    target: Target
    payload: object
    log_dir: Path | None = None
    preload: tuple[str, ...] = ()
    start_method: str = "fork"
    patience: Patience = field(default_factory=Patience)
    give_up_after: float | None = None
    silence: float | None = None
    keys: HostKeys | None = None
    cores: tuple[int, ...] = ()
    shm: bool = True
    drain_timeout: float = 20.0
    insecure: bool = False
    patience_away: float = PATIENCE


class _Over(Exception):
    """The run is over for this host; `code`: exit status, if the process is to end."""

    def __init__(self, why: str, code: int | None = None) -> None:
        super().__init__(why)
        self.code = code


class _Elsewhere(_Over):
    """This host is to go on at `url`; "": at the address that it was given."""

    def __init__(self, why: str, url: str) -> None:
        super().__init__(why)
        self.url = url


def why_not_followed(url: str, first: str, *, keys: bool, insecure: bool) -> str:
    """Why a host that was given the address `first` does not go on at `url`, which a learner sends it to; "" if it
    does: where the learner must have the key that this host knows; on this machine, where `first` is; or anywhere, if
    whoever started it does not mind."""
    try:
        check_connect(url)
    except ConfigError as error:
        return str(error)
    if is_loopback(url):
        return "" if is_loopback(first) else f"it is on this machine, and {first} is not"
    return "" if keys or insecure else "it is not on this machine; that needs --keys DIR, or --insecure to go without"


def supervise(options: SupervisorOptions, say: Callable[[str], None] = lambda text: None) -> int:
    """Keep workers until the learner has no more use for them, SIGINT or SIGTERM; the exit status.

    Args:
        options: what to do.
        say: gets a line whenever something changes.

    Raises:
        ConfigError: a URL that cannot be connected to, more workers than this process may have open files for, a folder
            for logs that cannot be made, or a payload that cannot travel.
        ProcessError: no process can be started.
    """
    check_connect(options.url)
    raise_descriptor_limit(options.count)
    run_dir = run_directory()
    keep_log = Logs(options.log_dir).keep
    try:
        zygote = (Spawner if options.start_method == "spawn" else Zygote).start(
            options.target,
            options.payload,
            run_dir=run_dir,
            log_dir=options.log_dir or run_dir / "logs",
            preload=["zrl.nodes.worker", *options.preload],
            keep_log=keep_log,
        )
    except BaseException:
        shutil.rmtree(run_dir, ignore_errors=True)
        raise
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_Supervisor(options, zygote, say, keep_log).live())
    finally:
        zygote.close()


class _Supervisor:
    def __init__(
        self,
        options: SupervisorOptions,
        zygote: Zygote,
        say: Callable[[str], None],
        keep_log: Callable[[Path], Path],
    ) -> None:
        self._o, self._zygote, self._say, self._keep_log = options, zygote, say, keep_log
        self._url = options.url  # where this host belongs, or was sent to
        self._home_at = math.inf  # when to return from there, unless somebody answers
        self._hops = 0  # since it was welcomed last
        self._not_followed = 0
        self._run: _Run | None = None
        self._last: _Over | None = None  # why the process is to end
        self._wake = asyncio.Event()
        self._host: Host
        self._leaving: asyncio.Future[None] | None = None

    async def live(self) -> int:
        """Run after run, until one says that it was the last."""
        loop = asyncio.get_running_loop()
        host = self._host = Host(
            self._zygote,
            loop,
            name=self._o.name,
            count=self._o.count,
            patience=self._o.patience,
            tell=self._tell,
            failed=self._failed,
            keep_log=self._keep_log,
            cores=self._o.cores,
            near=self._o.shm,
        )
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, functools.partial(self._stop, signum))
        try:
            return await self._runs(host)
        finally:
            if self._leaving is not None:
                self._leaving.cancel()
            host.close()

    async def _runs(self, host: Host) -> int:
        delay, seen = FIRST_DELAY, time.monotonic()
        while True:
            context = make_context()
            try:
                away = self._url != self._o.url
                at = dataclasses.replace(self._o, url=self._url)
                self._run = run = _Run(at, host, context, self._say, self._home_at if away else math.inf)
                give_up = None if self._o.give_up_after is None else seen + self._o.give_up_after
                try:
                    await run.live(give_up)
                except _Over as over:
                    self._say(f"{over}")
                    if over.code is not None:
                        self._last = self._last or over
                    self._home_at = run.home_at
                    if run.welcomed:
                        delay, seen = FIRST_DELAY, time.monotonic()
                        self._hops, self._home_at = 0, seen + self._o.patience_away
                    if isinstance(over, _Elsewhere):
                        moved = self._go_to(over.url)
                    else:
                        moved = away and time.monotonic() >= self._home_at and self._go_to("")
                finally:
                    await run.end()
            finally:
                self._run = None
                context.term()
            if self._last is None and not moved:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), delay)
            if self._last is not None:
                return self._last.code or EXIT_DONE
            delay = delay if moved else min(2 * delay, MOST_DELAY)

    def _go_to(self, url: str) -> bool:
        """Whether to go on there at once."""
        why = (
            why_not_followed(url, self._o.url, keys=self._o.keys is not None, insecure=self._o.insecure) if url else ""
        )
        if not why and self._hops >= MOST_HOPS:
            why = f"it was sent on {MOST_HOPS} times in a row"
        if why:
            self._not_followed += 1
            self._say(f"does not go to {m.printable(url)} ({self._not_followed} such so far): {why}")
        if why or not url:
            self._url, self._hops = self._o.url, 0
            return not why
        self._url, self._hops = url, self._hops + 1
        self._home_at = time.monotonic() + self._o.patience_away
        return True

    def _tell(self, message: m.Message) -> None:
        if self._run is not None:
            self._run.send(message)

    def _failed(self, error: ZrlError) -> None:
        code = EXIT_FAILED
        if isinstance(error, WorkerError):
            code = EXIT_REFUSED if error.at_start else EXIT_BUDGET_SPENT
        self._over(_Over(str(error), code))

    def _stop(self, signum: int) -> None:
        over = _Over(f"stopped by {signal.Signals(signum).name}", 128 + signum)
        if signum != signal.SIGTERM or self._last is not None or self._run is None or not self._host.kids:
            self._over(over)
            return
        self._say(f"SIGTERM: the workers finish what they have in hand, for {self._o.drain_timeout:g} s at most")
        self._last = over
        self._host.drain()
        self._leaving = asyncio.ensure_future(self._leave(over))

    async def _leave(self, over: _Over) -> None:
        if not await self._host.ended(self._o.drain_timeout):
            logger.warning("not all workers have finished within %g s, and are killed", self._o.drain_timeout)
        self._over(over)

    def _over(self, over: _Over) -> None:
        """The process is to end: at once, or as soon as what it is doing is over."""
        self._last = self._last or over
        self._wake.set()
        if self._run is not None:
            self._run.over(over)


class _Run:
    """One connection to one learner."""

    def __init__(
        self, o: SupervisorOptions, host: Host, context: Context, say: Callable[[str], None], home_at: float
    ) -> None:
        self._o, self._host, self._context, self._say = o, host, context, say
        self.home_at = home_at  # when this address is given up, unless somebody answers
        self._silence = o.silence or (5.0 if o.shm and is_loopback(o.url) else 15.0)
        self._loop = asyncio.get_running_loop()
        self._end: asyncio.Future[None] = self._loop.create_future()
        self._answers: asyncio.Queue[m.Message] = asyncio.Queue(MOST_ANSWERS)
        self._status: Endpoint | None = None
        self._flat: Any = None  # the payload of the last Weights
        self._hello = host.hello()
        self._welcome: m.Welcome | None = None
        self._board: Board | None = None
        self._behind = 0  # version that the last heartbeat was ahead of the board with
        self._heard = time.monotonic()
        self._draining = False
        self._n_odd = 0  # messages that made no sense
        with contextlib.ExitStack() as opened:
            self._dealer = Endpoint(make_dealer(context), self._loop, self._on_message)
            opened.callback(self._dealer.close)
            broken = self._broken = Disconnections(self._dealer.socket)
            opened.callback(broken.close)
            opened.callback(Endpoint(broken.socket, self._loop, self._on_event).close)
            opened.callback(broken.stop)  # first of all
            connect(self._dealer.socket, o.url, o.keys)
            self._opened = opened.pop_all()

    @property
    def welcomed(self) -> bool:
        return self._welcome is not None

    def over(self, over: _Over) -> None:
        """The run ends, for this reason; the first one counts."""
        if not self._end.done():
            self._end.set_exception(over)

    def send(self, message: m.Message) -> bool:
        return self._dealer.send(encode(message))

    async def live(self, give_up: float | None) -> None:
        """The whole run.

        Raises:
            _Over: always.
        """
        await self._unless_over(self._start(give_up))
        last = time.monotonic()
        while True:
            await self._unless_over(asyncio.sleep(TICK))
            now = time.monotonic()
            self._heard += max(0.0, now - last - 2 * TICK)  # we stood still ourselves, and could not hear it
            last = now
            self._host.tick(now)
            if now - self._heard > self._silence:
                raise _Over(f"the learner has been silent for {self._silence:.0f} s")
            if self._draining and not self._host.kids:
                raise _Over("the run is over", EXIT_DONE)

    async def _unless_over(self, work: Any) -> None:
        """Do this, unless the run ends before."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task, self._end}, return_when=asyncio.FIRST_COMPLETED)
            if self._end.done():
                self._end.result()
            task.result()
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def end(self) -> None:
        """Kill the workers, say Bye where somebody listens, and let go of everything.

        Raises:
            ProcessError: the workers cannot be killed. All else is done then.
        """
        try:
            self._host.end()
            await self._host.ended(GRACE)
            if self.welcomed and self.send(m.Bye(self._hello.run_id, self._hello.incarnation)):
                with contextlib.suppress(TimeoutError, _Over):
                    await asyncio.wait_for(self._answer(m.ByeAck), BYE_TIMEOUT)
        finally:
            self._close()

    def _close(self) -> None:
        self._opened.close()
        if not self._end.done():
            self._end.cancel()
        elif not self._end.cancelled():
            self._end.exception()  # seen

    # ── the start ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _start(self, give_up: float | None) -> None:
        welcome = await self._hello_until(give_up)
        self._hello = self._hello_in(welcome.run_id)
        if welcome.index_base + self._o.count > MOST_INDICES:
            raise _Over(f"the learner has no indices for {self._o.count} workers", EXIT_REFUSED)
        published = welcome.pub_url or pub_url(self._o.url)
        weights, flat = await self._fetch()
        board = self._board = Board.create(weights.nbytes, run_id=welcome.run_id, digest=weights.digest)
        self._opened.callback(board.close)
        board.publish(weights.version, lambda out: np.copyto(out, flat))
        limit = weights.nbytes + 2 * m.SMALL_HEADER
        for topic, handler, most in (
            (TOPIC_WEIGHTS, self._on_weights, limit),
            (TOPIC_STATUS, self._on_status, m.LARGE_HEADER),
        ):
            try:
                check_connect(published)
                sub = make_sub(self._context, published, topic, max_nbytes=most, keys=self._o.keys)
            except ConfigError as error:
                raise _Over(f"what the learner publishes: {m.printable(str(error))}", EXIT_REFUSED) from None
            endpoint = Endpoint(sub, self._loop, handler)
            self._opened.callback(endpoint.close)
        self._status = endpoint
        self._heard = time.monotonic()
        if self._draining:
            raise _Over("the run is over", EXIT_DONE)
        self._host.begin(
            RunInfo(
                welcome.run_id,
                self._o.url,
                welcome.index_base,
                board.address,
                weights.digest,
                weights.nbytes,
                "" if self._o.keys is None else str(self._o.keys.path),
                self._o.shm,
            )
        )
        last = welcome.index_base + self._o.count - 1
        self._say(f"welcome: {m.printable(welcome.env)}, workers {welcome.index_base} to {last}")

    def _hello_in(self, run_id: bytes) -> m.Hello:
        """Our Hello, with the run that it led to."""
        return dataclasses.replace(self._hello, run_id=run_id)

    async def _hello_until(self, give_up: float | None) -> m.Welcome:
        delay, notice = FIRST_DELAY, time.monotonic() + NOTICE
        while give_up is None or time.monotonic() < give_up:
            self.send(self._hello)  # without a connection it goes nowhere, and is said again
            try:
                answer = await asyncio.wait_for(self._answer(m.Welcome, m.Reject), 1.0)
            except TimeoutError:
                if time.monotonic() >= self.home_at:
                    raise _Elsewhere(f"nobody answers at {self._o.url}", "") from None
                if time.monotonic() >= notice:
                    self._say(f"nobody has answered at {self._o.url} for {NOTICE:.0f} s: trying on")
                    notice = math.inf
                continue
            if self.home_at < math.inf:
                self.home_at = time.monotonic() + self._o.patience_away
            if isinstance(answer, m.Welcome):
                self._welcome = answer
                return answer
            assert isinstance(answer, m.Reject)
            if answer.code == "redirect":
                raise _Elsewhere(f"sent on to {m.printable(answer.url)}: {m.printable(answer.text)}", answer.url)
            text = f"the learner refuses this host ({answer.code}): {m.printable(answer.text)}"
            if answer.code == "draining" and answer.run_id == self._host.run_id:
                raise _Over("the run is over", EXIT_DONE)  # the one that this host was in until its connection broke
            if not answer.retry and answer.code != "draining":
                raise _Over(text, EXIT_REFUSED)
            self._say(text)
            await asyncio.sleep(delay)
            delay = min(2 * delay, MOST_DELAY)
        raise _Over(f"no learner at {self._o.url} for {self._o.give_up_after:.0f} s", EXIT_LEARNER_LOST)

    async def _fetch(self) -> tuple[m.Weights, Any]:
        """The learner's weights. It may take no host for silent meanwhile, so this one beats."""
        self.send(m.Fetch(self._hello.run_id, self._hello.incarnation))
        deadline = time.monotonic() + ANSWER_TIMEOUT
        while time.monotonic() < deadline:
            try:
                weights = await asyncio.wait_for(self._answer(m.Weights), TICK)
            except TimeoutError:
                self.send(m.Beat(self._hello.run_id, self._hello.incarnation, ()))
                continue
            assert isinstance(weights, m.Weights)
            return weights, self._flat
        raise _Over(f"no weights within {ANSWER_TIMEOUT:.0f} s")

    async def _answer(self, *kinds: type[m.Message]) -> m.Message:
        while True:
            message = await self._answers.get()
            if isinstance(message, kinds):
                return message

    # ── what comes in ────────────────────────────────────────────────────────────────────────────────────────────────

    def _on_event(self, peer: bytes, event: bytes, rest: Rest) -> None:
        """The connection was lost or refused, or came about."""
        if not self._broken.take(event):
            return
        if self._broken.refusal is not None:
            self.over(_Over(why_refused(self._broken.refusal, self._o.url, self._o.keys)))
            return
        self._loop.call_later(SETTLE, self._on_broken)

    def _on_broken(self) -> None:
        """The learner is gone. It does not wait for ever for those who are asked to finish: a Drain that was not read
        in time went with the connection, but the last status is still there."""
        if self._status is not None:
            self._status.read()
        if self._draining:
            self.over(_Over("the run is over", EXIT_DONE))
        self.over(_Over("the connection to the learner broke"))

    def _on_message(self, peer: bytes, header: bytes, rest: Rest) -> None:
        try:
            message = decode(header)
            flat = self._payload(message, rest) if isinstance(message, m.Weights) else None
        except ProtocolError as error:
            self._warn_of(error)
            return
        if message.incarnation != self._hello.incarnation:
            return
        if isinstance(message, m.HelloAgain):
            self.over(_Over("the learner does not know this host any more"))
        elif isinstance(message, m.Revoke):
            self._host.revoke(message.worker, m.printable(message.reason))
        elif isinstance(message, m.Drain):
            self._drain()
        elif isinstance(message, m.Weights) and self._board is not None:
            self._adopt(message.version, flat)
        else:
            if flat is not None:
                self._flat = flat
            with contextlib.suppress(asyncio.QueueFull):
                self._answers.put_nowait(message)

    def _drain(self) -> None:
        if not self._draining:
            self._draining = True
            self._host.drain()

    def _payload(self, weights: m.Weights, rest: Rest) -> Any:
        if weights.nbytes > MAX_WEIGHTS_NBYTES:
            raise ProtocolError(f"weights of {weights.nbytes} bytes, at most {MAX_WEIGHTS_NBYTES}")
        try:
            flat = np.empty(weights.nbytes, np.uint8)
        except MemoryError:
            raise ProtocolError(f"weights of {weights.nbytes} bytes, for which there is no memory") from None
        rest.into(memoryview(flat.data))
        if crc32(flat) != weights.crc32:
            raise ProtocolError("weights with another checksum than they were sent with")
        return flat

    def _warn_of(self, error: ProtocolError) -> None:
        self._n_odd += 1
        if self._n_odd <= MOST_WARNINGS:
            logger.warning("from the learner: %s", error)

    def _on_weights(self, peer: bytes, frame: bytes, rest: Rest) -> None:
        try:
            weights, payload = decode_weights(frame)
        except ProtocolError as error:
            self._warn_of(error)
            return
        flat = np.frombuffer(payload, np.uint8)
        if weights.run_id == self._hello.run_id and crc32(flat) == weights.crc32:
            self._adopt(weights.version, flat)

    def _adopt(self, version: int, flat: Any) -> None:
        board = self._board
        if board is not None and flat.shape == (board.nbytes,) and version > board.version:
            board.publish(version, lambda out: np.copyto(out, flat))

    def _on_status(self, peer: bytes, frame: bytes, rest: Rest) -> None:
        """The heartbeat. It also tells of weights that we missed: those of the moment in which we subscribed."""
        try:
            status = json.loads(frame[len(TOPIC_STATUS) :])
            run_id, version, ending = status["run_id"], int(status["version"]), status.get("ending") is True
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return
        if run_id != self._hello.run_id.hex():
            return
        self._heard = time.monotonic()
        if ending:
            self._drain()
        board = self._board
        if board is None or version <= board.version:
            self._behind = 0
        elif self._behind and self._behind > board.version:  # for a second now
            self.send(m.Fetch(self._hello.run_id, self._hello.incarnation))
        else:
            self._behind = version
