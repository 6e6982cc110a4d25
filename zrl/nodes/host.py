"""A host: starts workers, watches them, replaces them, and says what became of each. An object on an asyncio loop.

The learner has one for its own children; `zrl worker` is a process around another one. It reaches its children through
the zygote and one page each, never through a socket; what it says, it says in messages, to whoever `tell` reaches.

============================  ========================================================  ==================
a child                       what its host does                                        budget of restarts
============================  ========================================================  ==================
ended by itself or a signal   says Gone, starts another                                 one used
lost its connection           says Gone, starts another                                 none used
left, on SIGTERM              says Gone, starts another                                 none used
the same before 1st Ready     the same                                                  one used
stands still in an env call   dumps its stacks into its log, kills it; as above         one used
revoked by the learner        kills it; as above                                        one used
failed before its 1st Ready   says Gone, gives up: `failed`                             –
failed, the budget is spent   says Gone, gives up: `failed`                             –
============================  ========================================================  ==================
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from zrl.data.memory import MemoryAddress, boot_id
from zrl.errors import ProcessError, SharedMemoryError, WorkerError, ZrlError
from zrl.nodes.children import Child, Lost, Zygote
from zrl.nodes.job import WorkerJob
from zrl.nodes.limits import kills_for_memory
from zrl.nodes.page import Page, Phase, Progress
from zrl.nodes.pipe import CONNECTION_ENDED, MAX_WARNINGS, Ended, Warned
from zrl.protocol import messages as m
from zrl.protocol.restarts import Restarts

OUT_OF_MEMORY = "the kernel killed it, since its control group (container, job) was out of memory"
TICK = 1.0  # seconds between two looks at the children
DUMP_SECONDS = 0.5  # that a child gets to write its stacks before it is killed
#: Seconds that a revoked child gets to end by itself: one that cannot be reached may be writing its traceback.
LAST_WORDS = 0.5
_ROWS = 60  # children in one Beat
UNSEEN = Progress(0, Phase.BUILD, 0, 0, -1)

logger = logging.getLogger("zrl")


@dataclass(frozen=True)
class Patience:
    """When a host loses it.

    Attributes:
        stall: seconds without a finished call of an environment while a fragment is made.
        start: seconds until the environments are built.
        restarts: how many a worker gets within `window` seconds.
        rebuilds: how many environments of a column a worker makes anew within as many seconds, before it fails itself.
        first_delay, most_delay: seconds before either; doubling from the one to the other.
    """

    stall: float = 60.0
    start: float = 300.0
    restarts: int = 5
    rebuilds: int = 5
    window: float = 300.0
    first_delay: float = 0.5
    most_delay: float = 30.0


@dataclass(frozen=True)
class RunInfo:
    """What the children of a run have in common: where the learner is, the board of this host, and its key files."""

    run_id: bytes
    url: str
    index_base: int
    board: MemoryAddress
    board_digest: bytes
    board_nbytes: int
    keys: str = ""
    shm: bool = True


@dataclass
class Kid:
    """One child as its host sees it. `cause`: why it was killed, if it was."""

    index: int
    generation: int
    incarnation: bytes
    page: Page
    child: Child
    since: float  # when `progress` was first seen
    progress: Progress = UNSEEN
    cause: str = ""
    timers: list[asyncio.TimerHandle] = field(default_factory=list)


class Host:
    """The workers of this process. Everything on the loop's thread.

    Args:
        zygote: starts them; closed by its owner, after `close`.
        loop: whose thread this is.
        name: of this host.
        count: how many workers it keeps.
        patience: with them.
        tell: takes a message for the learner.
        failed: takes the error after which there is no going on.
        keep_log: makes sure that a log stays; its path then.
        cores: that its workers are kept on, one each and in turn; empty: wherever there is room.
        near: whether to say which machine this is: a learner on the same one expects to hear from it more often.

    Attributes:
        incarnation: 16 random bytes, new with each `hello`.
        kids: by incarnation: all that have not ended.
        run_id: of the last run.
    """

    def __init__(
        self,
        zygote: Zygote,
        loop: asyncio.AbstractEventLoop,
        *,
        name: str,
        count: int,
        patience: Patience,
        tell: Callable[[m.Message], None],
        failed: Callable[[ZrlError], None],
        keep_log: Callable[[Path], Path] = lambda log: log,
        cores: Sequence[int] = (),
        near: bool = True,
    ) -> None:
        self.name, self.count = name, count
        self.incarnation = m.NO_ID
        self._process = os.urandom(m.ID_NBYTES)  # a pid is another process's in another container
        self.kids: dict[bytes, Kid] = {}
        self.n_started = self.n_replaced = 0
        self._zygote, self._loop, self._near = zygote, loop, near
        self._patience, self._cores = patience, cores
        self._tell, self._failed, self._keep_log = tell, failed, keep_log
        self._by_serial: dict[int, Kid] = {}
        self._kills_for_memory = kills_for_memory()
        self._proven: set[int] = set()  # indices that have sent a Ready in this run
        self._restarts = self._new_budget(patience.restarts)
        self._waiting: dict[int, asyncio.TimerHandle] = {}  # restarts that are due, by index
        self._run: RunInfo | None = None
        self.run_id = m.NO_ID
        self._generations: dict[int, int] = {}  # newest of each index in that run
        self._warnings: set[str] = set()  # that workers have uttered
        self._stopping = False
        self._last_tick = time.monotonic()
        self._empty = asyncio.Event()
        self._empty.set()
        loop.add_reader(zygote.fileno(), self._on_events)

    def hello(self) -> m.Hello:
        """The Hello of a new incarnation of this host."""
        self.incarnation = os.urandom(m.ID_NBYTES)
        return m.Hello(
            m.NO_ID,
            self.incarnation,
            protocol=m.PROTOCOL_VERSION,
            role="host",
            name=self.name,
            versions=(f"python {sys.version_info[0]}.{sys.version_info[1]}",),
            process=self._process,
            boot_id=boot_id() if self._near else "",
            host=m.NO_ID,
            index=0,
            generation=0,
            count=self.count,
        )

    def begin(self, run: RunInfo) -> None:
        """Start the workers of a run. Those of the one before have ended, or were killed: nobody waits for one that the
        system does not let go."""
        for kid in list(self.kids.values()):
            logger.warning("worker %d of the run before was killed and has not ended yet", kid.index)
            self._forget(kid)
        self._run = run
        self._last_tick = time.monotonic()
        self._stopping = False
        self._proven.clear()
        self._warnings.clear()
        self._restarts = self._new_budget(self._patience.restarts)
        if run.run_id != self.run_id:
            self.run_id = run.run_id
            self._generations.clear()
        for index in range(run.index_base, run.index_base + self.count):
            self._launch(index, self._generations.get(index, -1) + 1)  # a run that goes on has had the seeds of others

    def revoke(self, incarnation: bytes, reason: str) -> None:
        """The learner has no use for this worker any more: another takes its place."""
        kid = self.kids.get(incarnation)
        if kid is not None:
            logger.warning("worker %d is revoked: %s", kid.index, reason)
            kid.timers.append(self._loop.call_later(LAST_WORDS, self._kill, kid, "revoked"))

    def drain(self) -> None:
        """Replace nobody any more, and ask all to leave; the learner may tell them, too. Who is still building, for the
        first time, has nothing to finish."""
        self._no_more()
        for kid in self.kids.values():
            kid.page.ask_to_leave()
            progress = self._look(kid)
            if progress.phase == Phase.BUILD and not progress.sent:
                kid.cause = kid.cause or "drained"
                self._zygote.terminate(kid.child)
        self._loop.call_soon(self._on_events)  # of those that have not started

    def end(self) -> None:
        """Kill all workers, whose run is over: nobody wants to hear of it. Replace nobody."""
        self._no_more()
        self._run = None
        for kid in self.kids.values():
            self._zygote.kill(kid.child)
        self._loop.call_soon(self._on_events)

    async def ended(self, timeout: float) -> bool:
        """Wait for the end of the last child; False if it has not come within `timeout` seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), max(0.0, timeout))
        return self._empty.is_set()

    def close(self) -> None:
        """Stop watching; the zygote ends what is left."""
        self._no_more()
        self._loop.remove_reader(self._zygote.fileno())
        for kid in list(self.kids.values()):
            self._forget(kid)

    def tick(self, now: float) -> None:
        """To be called every second: Beats, and an end to who stands still. What this process was late by is given to
        the children as well: they may have stood still with it."""
        late = max(0.0, now - self._last_tick - TICK)
        self._last_tick = now
        for kid in list(self.kids.values()):
            kid.since += late
            self._watch(kid, now)
        rows = [self._row(kid) for kid in self.kids.values()]
        if self._run is None:
            return
        for at in range(0, max(1, len(rows)), _ROWS):
            self._tell(m.Beat(self._run.run_id, self.incarnation, tuple(rows[at : at + _ROWS])))

    # ── one child ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _launch(self, index: int, generation: int) -> None:
        run = self._run
        self._waiting.pop(index, None)
        if run is None or self._stopping:
            return
        incarnation = os.urandom(m.ID_NBYTES)
        name = f"worker-{index}"
        try:
            page = Page.create(incarnation)
        except SharedMemoryError as error:
            self._failed(error)
            return
        job = WorkerJob(
            url=run.url,
            name=name,
            run_id=run.run_id,
            host=self.incarnation,
            incarnation=incarnation,
            index=index,
            generation=generation,
            page=page.address,
            board=run.board,
            board_digest=run.board_digest,
            board_nbytes=run.board_nbytes,
            keys=run.keys,
            shm=run.shm,
            core=self._cores[(index - run.index_base) % len(self._cores)] if self._cores else None,
            rebuilds=self._new_budget(self._patience.rebuilds),
        )
        try:
            child = self._zygote.fork(name, (job,))
        except ZrlError as error:
            page.close()
            self._failed(error)
            return
        kid = Kid(index, generation, incarnation, page, child, time.monotonic())
        self.kids[incarnation] = self._by_serial[child.serial] = kid
        self._generations[index] = generation
        self._empty.clear()
        self.n_started += 1

    def _look(self, kid: Kid) -> Progress:
        try:
            return kid.page.read()
        except SharedMemoryError:  # it wrote nonsense there: what was seen last stands still
            return kid.progress

    def _watch(self, kid: Kid, now: float) -> None:
        progress = self._look(kid)
        before = kid.progress
        if (progress.calls, progress.phase, progress.looks) != (before.calls, before.phase, before.looks):
            kid.since = now
        kid.progress = progress
        if progress.sent:
            self._proven.add(kid.index)
        stood = now - kid.since
        if kid.cause:
            return
        if progress.phase == Phase.BUILD and stood >= self._patience.start:
            self._give_up(kid, "start_timeout", f"it has not built its environments within {stood:.0f} s")
        elif progress.phase in (Phase.COLLECT, Phase.ADOPT) and stood >= self._patience.stall:
            self._give_up(kid, "stalled", f"no call of an environment has ended for {stood:.0f} s")

    def _give_up(self, kid: Kid, cause: str, why: str) -> None:
        logger.warning("worker %d is killed: %s; its stacks: %s", kid.index, why, kid.child.log)
        kid.cause = cause
        self._zygote.dump(kid.child)
        kid.timers.append(self._loop.call_later(DUMP_SECONDS, self._kill, kid, cause))

    def _kill(self, kid: Kid, cause: str) -> None:
        kid.cause = kid.cause or cause
        self._zygote.kill(kid.child)
        self._loop.call_soon(self._on_events)

    def _row(self, kid: Kid) -> m.ChildBeat:
        p = kid.progress
        phase = int(p.phase) if p.phase < len(m.PHASES) else int(Phase.WAIT)
        return m.ChildBeat(kid.incarnation, p.calls, phase, p.sent, p.releases)

    # ── ends ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _on_events(self) -> None:
        events = self._zygote.events()
        for lost in (event for event in events if isinstance(event, Lost)):
            self._loop.remove_reader(self._zygote.fileno())
            self._failed(ProcessError(lost.why))  # first of all: it is why the children have ended
            self._no_more()
        for event in events:
            if isinstance(event, Warned) and (kid := self._by_serial.get(event.serial)) is not None:
                self._pass_on(kid, event.text)
            elif isinstance(event, Ended) and (kid := self._by_serial.get(event.serial)) is not None:
                self._on_end(kid, event)

    def _pass_on(self, kid: Kid, warning: str) -> None:
        """A warning goes into our log once, whichever worker it came from first, and no more than a few of them."""
        if warning not in self._warnings and len(self._warnings) < MAX_WARNINGS:
            self._warnings.add(warning)
            logger.warning("worker %d warns: %s", kid.index, m.printable(warning))

    def _on_end(self, kid: Kid, ended: Ended) -> None:
        progress = kid.progress = self._look(kid)
        if progress.sent:
            self._proven.add(kid.index)
        self._forget(kid)
        gone = self._gone(kid, ended)
        if self._run is not None:
            self._tell(gone)
        if self._stopping:
            return
        if gone.cause == "drained" or (gone.cause == "disconnected" and kid.index in self._proven):
            self._restart(kid, self._patience.first_delay, gone)
            return
        if kid.index not in self._proven and gone.cause not in ("revoked", "disconnected"):
            self._failed(self._error(kid, gone, "failed before its first fragment"))
            return
        delay = self._restarts.failed(kid.index, time.monotonic())
        if delay is None:
            p = self._patience
            what = f"failed again after {p.restarts} restarts in {p.window:.0f} s, and is not replaced"
            self._failed(self._error(kid, gone, what))
            return
        self._restart(kid, delay, gone)

    def _restart(self, kid: Kid, delay: float, gone: m.Gone) -> None:
        logger.warning("worker %d ended (%s); another starts in %.1f s", kid.index, _in_words(gone), delay)
        self.n_replaced += 1
        self._waiting[kid.index] = self._loop.call_later(delay, self._launch, kid.index, kid.generation + 1)

    def _gone(self, kid: Kid, ended: Ended) -> m.Gone:
        lines = [line for line in ended.traceback.splitlines() if line.strip()]
        if kid.cause and ended.signal in (signal.SIGKILL, signal.SIGTERM):  # else it was faster than our signal
            cause = kid.cause
        elif ended.code == 0:
            cause = "drained" if self._stopping or kid.progress.phase is Phase.DRAIN else "exit"
        elif ended.code == CONNECTION_ENDED and kid.progress.phase is Phase.CUT_OFF:
            cause = "disconnected"
        elif ended.signal is not None:
            cause = "signal"
        else:
            cause = "error" if lines else "exit"
        if cause == "signal" and ended.signal == signal.SIGKILL and self._killed_for_memory():
            lines = [OUT_OF_MEMORY]
        return m.Gone(
            self._run.run_id if self._run else m.NO_ID,
            self.incarnation,
            worker=kid.incarnation,
            index=kid.index,
            cause=cause,
            status=-ended.signal if ended.signal is not None else (ended.code if ended.code is not None else 1),
            env_index=kid.progress.blamed,
            error=m.clipped(lines[-1] if lines else "", 2048),
            traceback=m.clipped(ended.traceback, 56_000),
        )

    def _killed_for_memory(self) -> bool:
        """Whether there is a kill of the kernel's that no child's end was put down to yet."""
        if kills_for_memory() <= self._kills_for_memory:
            return False
        self._kills_for_memory += 1
        return True

    def _error(self, kid: Kid, gone: m.Gone, what: str) -> WorkerError:
        log = self._keep_log(kid.child.log)
        return WorkerError(
            f"{what}: {_in_words(gone)}; its log: {log}",
            worker=kid.index,
            env_index=gone.env_index,
            remote_traceback=gone.traceback,
            at_start=kid.index not in self._proven,
        )

    def _forget(self, kid: Kid) -> None:
        for timer in kid.timers:
            timer.cancel()
        kid.page.close()
        del self.kids[kid.incarnation], self._by_serial[kid.child.serial]
        if not self.kids:
            self._empty.set()

    def _no_more(self) -> None:
        self._stopping = True
        for timer in self._waiting.values():
            timer.cancel()
        self._waiting.clear()

    def _new_budget(self, most: int) -> Restarts:
        p = self._patience
        return Restarts(most, p.window, p.first_delay, p.most_delay)


def _in_words(gone: m.Gone) -> str:
    """What became of a worker."""
    if gone.cause == "signal":
        with contextlib.suppress(ValueError):
            name = signal.Signals(-gone.status).name
            return f"signal {name}: {gone.error}" if gone.error else f"signal {name}"
    words = {
        "stalled": "stood still and was killed",
        "start_timeout": "took too long to start and was killed",
        "disconnected": "lost its connection",
        "revoked": "revoked",
        "exit": f"exit status {gone.status}",
    }
    return words.get(gone.cause, gone.error or gone.cause)
