"""The collator: owns the sockets, knows every slot's state, forms batches of slot indices. One thread, one loop.

    workers ── Ready(slot) ──► ROUTER ─► decode ─► Peers ─► Scheduler ─► Feed ─► the user's thread
            ◄─ Release(slot) ─                        │          ▲         │
                                                    own host     └─copied──┘

All that is decided is decided by the pure tables of `zrl.protocol`: what comes in is handed to them, and the commands
that they return are carried out here, in their order. Everything but `start`, `advance`, `stats`, `status` and
`close` runs on the loop's thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvloop

from zrl.data.batch import FragmentMeta
from zrl.data.memory import boot_id
from zrl.errors import ConfigError, ProtocolError, StarvationError, ZrlError
from zrl.metrics import History, HostFigures, Recent, Situation, StageTimes, Totals, verdict
from zrl.net.addresses import pub_url, reachable
from zrl.net.auth import Gate
from zrl.net.codec import TOPIC_STATUS, decode, encode
from zrl.net.endpoint import Endpoint
from zrl.net.keys import LearnerKeys
from zrl.net.sockets import Context, Rest, bind, make_context, make_pub, make_router, secure, send
from zrl.nodes.children import Zygote
from zrl.nodes.feed import Feed
from zrl.nodes.host import Host, Patience, RunInfo
from zrl.nodes.limits import raise_descriptor_limit
from zrl.nodes.publisher import Publisher
from zrl.nodes.rings import Refusal, Rings
from zrl.nodes.status import Learner, cores, document, frame, has_room, rows_of
from zrl.protocol import messages as m
from zrl.protocol import peers as p
from zrl.protocol import schedule as s
from zrl.protocol.peer_states import State
from zrl.protocol.redirect import Redirect
from zrl.protocol.slots import Slot as SlotState
from zrl.protocol.slots import SlotTable, Unmap

TICK = 1.0  # seconds between two looks at the clock
MAX_FRAGMENT_BYTES = 256 << 20
MOST_WARNINGS, MOST_TEXT = 20, 500  # of what peers do, in a second; characters of each error
PORT_TRIES = 50
DRAIN_SHARE = 0.3  # of the time for closing, in which workers may finish by themselves

logger = logging.getLogger("zrl")


@dataclass(frozen=True)
class Plan:
    """What a run is to do.

    Attributes:
        n_steps, n_columns: T and B of a fragment.
        n_per_batch: P, fragments of a batch.
        slots_of: K of the worker with this index.
        n_workers: how many the run has; 0: whoever connects.
        max_lag, entropy, sticky, keep_final_obs, worker_mode: as for `zrl.rollout.multi.rollout`.
        info_keys: their names.
        env, actor: their names, for hosts that are given no more.
        bind: URLs besides the one in the run's folder.
        keys: tcp is encrypted, and for those alone whose keys this learner knows; None: plain.
        insecure: whether other machines may connect without keys.
        starve_timeout: seconds with too few slots for a batch, after which the run ends.
        max_fragment_bytes: a larger fragment is refused.
        indices, redirect: as for `zrl.protocol.peers.Peers`.
    """

    n_steps: int
    n_columns: int
    n_per_batch: int
    slots_of: Callable[[int], int]
    n_workers: int
    max_lag: int | None
    entropy: int
    sticky: bool = False
    keep_final_obs: bool = False
    info_keys: tuple[str, ...] = ()
    worker_mode: str = "train"
    env: str = ""
    actor: str = ""
    bind: tuple[str, ...] = ()
    keys: LearnerKeys | None = None
    insecure: bool = False
    starve_timeout: float = 60.0
    max_fragment_bytes: int = MAX_FRAGMENT_BYTES
    indices: range = range(1 << 16)
    redirect: Redirect | None = None


@dataclass(frozen=True)
class OwnHost:
    """The learner's own children: how many, who starts them, when to lose patience, which logs to keep, which cores to
    keep them on."""

    zygote: Zygote
    count: int
    patience: Patience
    keep_log: Callable[[Path], Path]
    cores: tuple[int, ...] = ()


@dataclass(slots=True)
class _HostCounts:
    """`HostFigures` that are counted up."""

    fragments: int = 0
    env_steps: int = 0
    seconds: float = 0.0


class Collator:
    """Made and closed by the user's thread; `start` it once.

    Args:
        plan: the run.
        publisher: closed by its owner, after `close`.
        run_dir: folder for a socket of our own, 0700; None: only `plan.bind`.
        device: of the batches.
        own: the learner's own workers, if it has any. Their zygote is closed here.

    Attributes:
        feed: where the batches come out.
        urls: of the ROUTER, that in `run_dir` first; after `start`.
        slots: the books; `slots.newest` is set by the user's thread before it publishes.
        learner: what the user's thread has done; written by that thread.
    """

    def __init__(
        self, plan: Plan, publisher: Publisher, run_dir: Path | None, device: torch.device, own: OwnHost | None
    ) -> None:
        self.plan = plan
        self.publisher = publisher
        self.urls: list[str] = []
        self.slots = SlotTable(newest=publisher.version)
        self.scheduler = s.scheduler(
            self.slots, n_per_batch=plan.n_per_batch, max_lag=plan.max_lag, n_workers=plan.n_workers
        )
        self.feed = Feed(plan.n_per_batch, device, on_copied=lambda batch_id: self._post(self._copied, batch_id))
        self._rings = Rings(plan.n_steps, plan.n_columns, plan.slots_of, plan.max_fragment_bytes, self.feed)
        self.times = StageTimes()
        self.waited = 0.0  # seconds that workers waited for slots
        self.rebuilt = 0  # environments that were made anew, each at the cost of a fragment
        self.losses: Counter[str] = Counter()
        self.stale: Counter[int] = Counter()  # fragments dropped as too old, by worker: the stragglers
        self.learner = Learner()
        self._began = time.monotonic()
        self._granted_at: dict[bytes, dict[int, float]] = {}  # by incarnation and slot
        self._of_hosts: dict[str, _HostCounts] = {}  # by name; their number is limited by `Peers`
        self._history = History()
        self._recent = Recent()  # as of the last tick
        self._cores = cores()
        self._most_steps = plan.n_steps * plan.n_columns  # of a fragment
        self._odd = 0
        self._warned = 0  # of what peers do, since the last tick
        self._run_dir = run_dir
        self._own = own
        self._todo: deque[s.Command | p.Command] = deque()
        self._busy = False
        self._had_enough = own is not None  # those of others are waited for
        self._starving_since: float | None = None
        self._gate: Gate | None = None
        self._host: Host | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop
        self._closing: asyncio.Event
        self._deadline = 0.0  # of the closing
        self._started = threading.Event()
        self._start_error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="zrl-collator", daemon=True)
        self._lock = threading.RLock()  # one closer at a time
        self._is_closing = self._closed = False

    # ── the user's thread ────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Bind the sockets and start the workers; returns when the sockets are bound.

        Raises:
            ConfigError: an address cannot be bound, or the folder of keys not be read.
            ZrlError: strangers are not kept out.
        """
        self._thread.start()
        self._started.wait()
        if self._start_error is not None:
            self._thread.join()
            raise self._start_error

    def advance(self, *, published: int = 0, yielded: tuple[int, int] | None = None, request: bool = False) -> None:
        """Tell what happened, in this order: a batch was `yielded` (or found too old) at a version, a version was
        published, another batch is wanted. Returns at once."""
        self._post(self._advance, published, yielded, request)

    def stats(self, timeout: float = 5.0) -> dict[str, Any]:
        """Where everything is, see `_stats`; of the last moment, where the collator has ended."""
        return self._asked(self._stats, timeout)

    def status(self, timeout: float = 5.0) -> dict[str, Any]:
        """What the topic of this name says; of the last moment, where the collator has ended."""
        return self._asked(self._status, timeout)

    def hosts(self, timeout: float = 5.0) -> dict[str, int]:
        """The hosts that are here: how many workers each keeps, by name."""
        return self._asked(lambda: {host.name: host.count for host in self.peers.hosts.values()}, timeout)

    def _asked(self, figures: Callable[[], dict[str, Any]], timeout: float) -> dict[str, Any]:
        """What `figures` says on the loop's thread; empty where that does not answer in time."""
        answer: concurrent.futures.Future[dict[str, Any]] = concurrent.futures.Future()
        self._post(lambda: answer.set_result(figures()))
        deadline = time.monotonic() + timeout
        while self._thread.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                return answer.result(0.05)  # it may be about to end, and not answer any more
        return {} if self._thread.is_alive() else figures()

    def is_own_thread(self) -> bool:
        """Whether this is called from a thread of the collator's, which cannot close it."""
        return threading.current_thread() in (self._thread, self.feed.thread)

    def close(self, deadline: float) -> None:
        """End everything by `deadline` on ``time.monotonic()``, or wait for another thread that does; idempotent, and
        to be called again where it was interrupted. From any thread but its own."""
        with self._lock:
            if self._is_closing or self._closed:  # the first: in the handler of a signal that came in between
                return
            self._is_closing = True
            try:
                self.feed.close(max(0.0, (deadline - time.monotonic()) / 4))
                self._deadline = deadline
                if self._thread.is_alive():
                    self._post(lambda: self._closing.set())
                    self._thread.join(max(0.0, deadline - time.monotonic()) + 1.0)
                if self._own is not None:
                    self._own.zygote.close(deadline)
                self._closed = True
            finally:
                self._is_closing = False

    def _post(self, call: Callable[..., object], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(call, *args)

    # ── the thread of the loop ───────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                self._loop = runner.get_loop()
                runner.run(self._main())
        except BaseException as error:  # no descriptors for a loop; or an error of ours at the end
            self._start_error = error  # too late to be raised, where it had started
            self.fail(error)
        finally:
            self._started.set()

    async def _main(self) -> None:
        self._closing = asyncio.Event()
        self._loop.set_exception_handler(self._on_exception)
        with contextlib.ExitStack() as opened:
            try:
                self._open(opened)
            except BaseException as error:
                self._start_error = error
                return
            finally:
                self._started.set()
            await self._closing.wait()
            await self._drain()

    def _open(self, opened: contextlib.ExitStack) -> None:
        raise_descriptor_limit(0 if self._own is None else self._own.count)
        context = make_context()
        opened.callback(self._end_context, context)
        if self.plan.keys is not None:  # before anything is bound
            self._gate = Gate(context, self.plan.keys)
        self._router, self._pub = make_router(context), make_pub(context)
        opened.callback(self._pub.close)
        opened.callback(self._router.close)
        self._bind()
        opened.callback(self._rings.close)
        welcome = self._welcome()
        encode(welcome)  # a name that is too long is an error now
        self.peers = p.Peers(
            welcome,
            boot_id=boot_id(),
            slots_of=self.plan.slots_of,
            indices=self.plan.indices,
            redirect=self.plan.redirect,
        )
        admit = None if self._gate is None else self._gate.admit
        self._endpoint = Endpoint(self._router, self._loop, self._on_message, admit=admit)
        opened.callback(self._endpoint.close)
        opened.callback(self._end_timer)
        if self._own is not None:
            self._host = Host(
                self._own.zygote,
                self._loop,
                name="learner",
                count=self._own.count,
                patience=self._own.patience,
                tell=self._from_own_host,
                failed=self.fail,
                keep_log=self._own.keep_log,
                cores=self._own.cores,
            )
            opened.callback(self._host.close)
            self._from_own_host(self._host.hello())
        self._timer = self._loop.call_later(TICK, self._tick)

    def _bind(self) -> None:
        """First ipc, which stays plain, then tcp, with keys where there are some; with them strangers are tried out."""
        plan, gate = self.plan, self._gate
        own = [] if self._run_dir is None else [f"ipc://{self._run_dir}/learner.sock"]
        plain = [url for url in (*own, *plan.bind) if url.startswith("ipc://")]
        for url in plain:
            self._bind_both(url)
        if plan.keys is not None:
            secure(self._router, plan.keys.pair)
            secure(self._pub, plan.keys.pair)
        for url in plan.bind:
            if url not in plain:
                bound, pub = self._bind_both(url)
                if gate is not None:
                    gate.check(bound)
                    gate.check(pub, pub=True)

    def _bind_both(self, url: str) -> tuple[str, str]:
        """ROUTER and, beside it, PUB: where they are bound. For ``*`` a port is sought that is free with the next."""
        anywhere = self.plan.keys is not None or self.plan.insecure
        for left in reversed(range(PORT_TRIES if url.endswith(":*") else 1)):
            bound = bind(self._router, url, anywhere=anywhere)
            try:
                pub = bind(self._pub, pub_url(bound), anywhere=anywhere)
            except ConfigError:
                if not left:
                    raise
                self._router.unbind(bound)
            else:
                break
        self.urls.append(reachable(bound))
        return bound, pub

    def _end_context(self, context: Context) -> None:
        context.term()
        if self._gate is not None:
            self._gate.join()

    def _welcome(self) -> m.Welcome:
        plan = self.plan
        return m.Welcome(
            self.publisher.run_id,
            m.NO_ID,
            n_steps=plan.n_steps,
            n_columns=plan.n_columns,
            n_slots=plan.slots_of(0),
            sticky=plan.sticky,
            keep_final_obs=plan.keep_final_obs,
            info_keys=plan.info_keys,
            worker_mode=plan.worker_mode,
            entropy=plan.entropy.to_bytes(16, "big"),
            index_base=0,
            env=plan.env,
            actor=plan.actor,
            version=self.publisher.version,
            pub_url="",
        )

    def fail(self, error: BaseException) -> None:
        """There is no going on: the user's thread gets this error."""
        self.feed.fail(error)

    def _on_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        logger.error("the collator failed: %s", context.get("message"), exc_info=error)
        self.fail(error if isinstance(error, BaseException) else ZrlError(str(context.get("message"))))

    async def _drain(self) -> None:
        """Ask everybody to finish; wait for it, for a part of the time. Then the stack of `_main` closes all."""
        self._do(self.scheduler.drain())
        self._do(self.peers.drain())
        self._publish_status()  # for hosts that stand still, and find their connection broken when they go on
        left = max(0.0, self._deadline - time.monotonic())
        until = time.monotonic() + left * DRAIN_SHARE
        if self._host is not None:
            await self._host.ended(until - time.monotonic())
        while self._others() and time.monotonic() < until:
            await asyncio.sleep(0.01)

    def _others(self) -> bool:
        """Whether there are hosts besides our own."""
        return any(host.peer != p.OWN for host in self.peers.hosts.values())

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    # ── what comes in ────────────────────────────────────────────────────────────────────────────────────────────────

    def _on_message(self, peer: bytes, header: bytes, rest: Rest) -> None:
        try:
            message = decode(header)
        except ProtocolError:
            self._odd += 1
            return
        commands = self.peers.receive(peer, message, time.monotonic(), self.slots.books)
        if not (commands and isinstance(message, m.Ready)) or self._receive(message, rest):
            self._do(commands)

    def _receive(self, ready: m.Ready, payload: Rest) -> bool:
        """Take the fragment out of the socket, where a remote worker in good standing sends one. Where that comes to
        nothing its slot stays with the worker, which will disagree with the books, and be replaced."""
        if not self._rings.is_remote(ready.incarnation):
            return True
        if self.slots.check(ready.incarnation, ready.slot, ready.seq, ready.version) is not None:
            return False  # and counted
        try:
            self._rings.receive(ready.incarnation, ready.slot, payload)
        except ProtocolError as error:
            self.slots.refused["payload"] += 1
            self._warn("worker %d: %s", self.peers.workers[ready.incarnation].index, error)
            return False
        return True

    def _from_own_host(self, message: m.Message) -> None:
        self._do(self.peers.receive(p.OWN, message, time.monotonic(), self.slots.books))

    def _advance(self, published: int, yielded: tuple[int, int] | None, request: bool) -> None:
        if yielded is not None:
            self._do(self.scheduler.batch_yielded(*yielded))
        if published:
            self.peers.welcome = dataclasses.replace(self.peers.welcome, version=published)
            if self._others():  # before any Release that calls for this version
                send(self._pub, self.publisher.frame())
            self._do(self.scheduler.published(published))
        if request:
            self._do(self.scheduler.batch_requested())

    def _copied(self, batch_id: int) -> None:
        self._do(self.scheduler.batch_copied(batch_id))

    def _tick(self) -> None:
        now = time.monotonic()
        self._timer = self._loop.call_later(TICK, self._tick)
        self._warned = 0
        self._do(self.peers.tick(now))
        if self._host is not None:
            self._host.tick(now)
        self._check_starvation(now)
        self._recent = self._history.look(self._totals(now))
        self._publish_status()

    def _publish_status(self) -> None:
        send(self._pub, TOPIC_STATUS + frame(self._status(rows=has_room(len(self.peers.workers)))))

    def _check_starvation(self, now: float) -> None:
        """Too few slots for a batch, counting those of workers that are being built."""
        building = self._building()
        rings = [len(ring.states) for ring in self.slots.live()]
        alive = len(rings) + len(building)
        slots = sum(rings) + sum(self.plan.slots_of(index) for index in building)
        enough = slots >= self.plan.n_per_batch
        if self.plan.max_lag == 0:  # every worker has its places in every batch
            enough = enough and alive >= self.plan.n_workers
        # a batch was formed: there had been enough, if only between two looks
        self._had_enough = self._had_enough or enough or self.slots.counters["formed"] > 0
        if enough or not self._had_enough:
            self._starving_since = None
            return
        self._starving_since = now if self._starving_since is None else self._starving_since
        if now - self._starving_since >= self.plan.starve_timeout:
            self.fail(
                StarvationError(
                    f"{alive} workers with {slots} slots are alive, for {self.plan.starve_timeout:.0f} s now; a batch "
                    f"needs {max(1, self.plan.n_workers if self.plan.max_lag == 0 else 1)} workers with "
                    f"{self.plan.n_per_batch} slots; workers lost so far: {_listed(self.losses) or 'none'}"
                )
            )

    def _building(self) -> list[int]:
        """Indices of the workers that are about to come."""
        workers = self.peers.workers
        building = [w.index for w in workers.values() if w.state in (State.WELCOMED, State.ATTACHING)]
        if self._host is not None:
            building += [kid.index for kid in self._host.kids.values() if kid.incarnation not in workers]
        return building

    # ── what is to be done ───────────────────────────────────────────────────────────────────────────────────────────

    def _do(self, commands: Iterable[s.Command | p.Command]) -> None:
        """Carry out commands in their order, also those that follow from them."""
        self._todo.extend(commands)
        if self._busy:
            return
        self._busy = True
        try:
            while self._todo:
                command = self._todo.popleft()
                self._DO[type(command)](self, command)
        finally:
            self._busy = False

    def _grant(self, c: s.Grant) -> None:
        worker = self.peers.workers.get(c.incarnation)
        if worker is not None:  # else it was lost since
            self._granted_at.setdefault(c.incarnation, {})[c.slot] = time.monotonic()
            self._to(worker.peer, m.Release(self.publisher.run_id, c.incarnation, c.slot, c.least_version))

    def _form(self, c: s.FormBatch) -> None:
        slots = [self._rings.slot(f.incarnation, f.slot) for f in c.fragments]
        metas = [FragmentMeta(f.version, f.worker, f.seq) for f in c.fragments]
        self.feed.submit(c.batch_id, slots, metas)

    def _drop(self, c: s.Drop) -> None:
        self.stale[c.fragment.worker] += c.reason == "stale"

    def _discard(self, c: s.Discard) -> None:
        """The books have counted it."""

    def _unmap(self, c: Unmap) -> None:
        self._rings.let_go(c.incarnation)

    def _send(self, c: p.Send) -> None:
        if c.peer == p.OWN:
            self._to_own_host(c.message)
        else:
            self._to(c.peer, c.message)

    def _deliver(self, c: p.Deliver) -> None:
        r = c.ready
        committed = self.slots.counters["committed"]
        self._do(self.scheduler.ready(r.incarnation, r.slot, r.seq, r.version))
        if self.slots.counters["committed"] == committed:
            return  # refused, and counted
        times = self.times
        times.env += r.env
        times.actor += r.actor
        times.write += r.write
        times.reset += r.reset
        times.total += r.total
        taken = min(r.n_env_steps, self._most_steps)
        times.n_env_steps += taken
        times.n_masked += self._most_steps - taken
        self.waited += r.wait
        self.rebuilt += r.rebuilt
        host = self._of_hosts.setdefault(self.peers.workers[r.incarnation].host.name, _HostCounts())
        host.fragments += 1
        host.env_steps += taken
        host.seconds += time.monotonic() - self._granted_at[r.incarnation].pop(r.slot)

    def _inspect(self, c: p.Inspect) -> None:
        attach = c.attach
        index = self.peers.workers[attach.incarnation].index
        try:
            if attach.incarnation in self.slots.rings:  # lost, with a slot that is still being copied
                raise Refusal("ring", "this incarnation has had its ring")
            local = self._rings.attach(attach, index)
        except Refusal as no:
            self._do(self.peers.refused(attach.incarnation, no.code, str(no)))
            return
        except Exception as error:  # no memory for the batches, a device that failed
            self.fail(error)
            return
        slack = 0.0 if local else attach.n_slots * attach.slot_nbytes / p.LEAST_RATE
        accepted = self.peers.accepted(attach.incarnation, local=local, slack=slack)
        if not accepted:
            self._rings.let_go(attach.incarnation)
            return
        self._do(accepted)
        self._do(self.scheduler.worker_attached(attach.incarnation, index, attach.n_slots))

    def _send_weights(self, c: p.SendWeights) -> None:
        header, frames = self.publisher.answer(c.incarnation)
        self._endpoint.send(c.peer, encode(header), *frames)

    def _lost(self, c: p.Lost) -> None:
        report = c.report
        if not c.again and c.reason not in ("bye", "drained"):
            self.losses[c.reason] += 1
        if report is not None and self._host is None and report.cause not in ("drained", "disconnected"):
            self._warn("worker %d is gone (%s): %s", c.worker, report.cause, m.printable(report.error[:MOST_TEXT]))
        self._granted_at.pop(c.incarnation, None)
        before = self.scheduler.n_regranted
        self._do(self.scheduler.gone(c.incarnation, "gone", clean=c.clean))
        if self.scheduler.n_regranted > before:
            logger.warning(
                "worker %d is gone, and another makes its fragments of this batch: this run cannot be repeated bit for "
                "bit any more",
                c.worker,
            )

    def _warn(self, text: str, *args: object) -> None:
        self._warned += 1
        if self._warned <= MOST_WARNINGS:
            logger.warning(text, *args)

    def _host_lost(self, c: p.HostLost) -> None:
        logger.info("host %s is gone: %s", m.printable(c.name), c.reason)

    def _forget(self, c: p.Forget) -> None:
        self._of_hosts.pop(c.name, None)

    _DO: dict[type[Any], Callable[[Collator, Any], None]] = {  # noqa: RUF012 - never changed
        s.Grant: _grant,
        s.FormBatch: _form,
        s.Drop: _drop,
        s.Discard: _discard,
        Unmap: _unmap,
        p.Send: _send,
        p.Deliver: _deliver,
        p.Inspect: _inspect,
        p.SendWeights: _send_weights,
        p.Lost: _lost,
        p.HostLost: _host_lost,
        p.Forget: _forget,
    }

    def _to(self, peer: bytes, message: m.Message) -> None:
        try:
            data = encode(message)
        except ProtocolError as error:  # no message of ours can be this: then of nobody's making but ours
            logger.error("a message that cannot be sent: %s", error)
            self._odd += 1
            return
        if not self._endpoint.send(peer, data):
            self._do(self.peers.unreachable(peer))

    def _to_own_host(self, message: m.Message) -> None:
        host = self._host
        if host is None:
            return
        if isinstance(message, m.Welcome):
            host.begin(
                RunInfo(
                    message.run_id,
                    self.urls[0],
                    message.index_base,
                    self.publisher.board.address,
                    self.publisher.digest,
                    self.publisher.nbytes,
                )
            )
        elif isinstance(message, m.Revoke):
            host.revoke(message.worker, message.reason)
        elif isinstance(message, m.Drain):
            host.drain()

    def _stats(self, *, rows: bool = True) -> dict[str, Any]:
        slots, times = self.slots, self.times.figures()
        feed = self.feed.stats
        counters = {name: slots.counters[name] for name in ("granted", "committed", "consumed", "dropped", "lost")}
        return {
            "version": self.publisher.version,
            "slots": {state.name.lower(): slots.totals[state] for state in SlotState if state is not SlotState.ENDED},
            "fragments": {**counters, "in_flight": slots.in_flight},
            "dropped": dict(slots.dropped),
            "refused": {**slots.refused, **self.peers.counters, **self._refused()},
            "workers": len(list(slots.live())),
            "hosts": len(self.peers.hosts),
            "replaced": self._host.n_replaced if self._host is not None else 0,
            "rebuilt": self.rebuilt,
            "losses": dict(self.losses),
            "regranted": self.scheduler.n_regranted,
            "stale": {worker: n for worker, n in self.stale.items() if n},
            **times,
            "seconds": {**times["seconds"], "wait": self.waited, "copy": feed.copy_seconds},
            "waiting_for": self.scheduler.waiting_for(),
            **self._rows(rows),
            **self._recent.as_dict(),
            "verdict": verdict(self._situation()),
        }

    def _refused(self) -> dict[str, int]:
        """What came to no message, or from nobody."""
        counters = {"odd": self._odd, **({} if self._gate is None else self._gate.counters)}
        return {reason: n for reason, n in counters.items() if n}

    def _rows(self, rows: bool) -> dict[str, Any]:
        """One a worker; or how many there would be."""
        if rows:
            return {"peers": rows_of(self.peers, self.slots, time.monotonic())}
        return {"peers_omitted": len(self.peers.workers)}

    def _status(self, *, rows: bool = True) -> dict[str, Any]:
        stats = self._stats(rows=rows)
        seconds = {**stats["seconds"], **self.learner.seconds()}
        return document(
            {**stats, **self.learner.figures(), "seconds": seconds},
            self.learner,
            run_id=self.publisher.run_id.hex(),
            lag=self._recent.lag,
            time=time.time(),
            uptime=time.monotonic() - self._began,
            url=self.urls[0] if self.urls else "",
            ending=self.peers.draining,
        )

    def _totals(self, now: float) -> Totals:
        slots, workers = self.slots, self.peers.workers
        live = [ring.incarnation for ring in slots.live()]
        return Totals(
            now,
            workers=len(live),
            waiting=sum(i in workers and workers[i].phase == "wait" for i in live),
            stages=self.times.as_dict(),
            wait=self.waited,
            learner=self.learner.clock.read(now),
            gather=self.feed.stats.copy_seconds,
            fragments=slots.counters["committed"],
            batches=self.learner.batches,
            lags=dict(self.learner.lags),
            stale=slots.dropped["stale"] + slots.dropped["stale batch"],
            stale_by=dict(self.stale),
            by_host={name: HostFigures(x.fragments, x.env_steps, x.seconds) for name, x in self._of_hosts.items()},
        )

    def _situation(self) -> Situation:
        n_workers = len(list(self.slots.live()))
        return Situation(
            recent=self._recent,
            workers=n_workers,
            max_lag=self.plan.max_lag,
            cores=self._cores if all(host.local for host in self.peers.hosts.values()) else None,
            no_batch=self.learner.clock.waiting(),
            why=self.scheduler.waiting_for() if n_workers else self._why_no_worker(),
            had_workers=self.slots.counters["committed"] > 0,
        )

    def _why_no_worker(self) -> str:
        if building := len(self._building()):
            return f"{building} {'is' if building == 1 else 'are'} being started"
        if self.losses:
            return f"lost so far: {_listed(self.losses)}; their logs say why"
        if not self.peers.hosts:
            return f"start some: zrl worker --connect {self.urls[0]}"
        return "they are being started"


def _listed(counter: Counter[str]) -> str:
    return ", ".join(f"{n} {what}" for what, n in counter.most_common())
