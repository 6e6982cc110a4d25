"""A worker: steps B environments with its own copy of the actor, one fragment after the other. One thread, one loop.

    Hello ─► Welcome ─► newest weights ─► environments, actor, layout ─► ring ─► Attach ─► Attached
    then, for each Release(slot, least version):
        adopt the newest weights ─► collect() straight into the slot ─► Ready(slot)

Its incarnation lasts as long as its connection. What ends it, and how its host hears of that:

===============================  ======================================================
Drain, SIGTERM, its host leaves  status 0, after the fragment in hand, Bye and ByeAck
connection lost, HelloAgain      status `CONNECTION_ENDED`: its host starts another
an exception, but see below      status 1, the traceback through the zygote's pipe; the
                                 column of the environment to blame on the page
the host's or the zygote's end   SIGKILL from the kernel
===============================  ======================================================

A plain environment that fails after the first fragment does not end its worker, unless it does so again and again: the
fragment in hand is thrown away and begun anew, with another environment in its place.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch

from zrl.collect.actor import BaseActorModule
from zrl.collect.build import CollectOptions, build
from zrl.collect.collect import Context, collect
from zrl.collect.debug import check_forward
from zrl.collect.envs import Columns
from zrl.collect.spaces import Factory
from zrl.data.board import Board
from zrl.data.fragment import Slot
from zrl.data.memory import MemoryAddress, boot_id
from zrl.data.ring import Ring
from zrl.data.spec import FragmentSpec
from zrl.data.weights import WeightsPacker
from zrl.errors import EnvError, ProcessError
from zrl.net.keys import host_keys_at
from zrl.net.link import Link, LinkLost
from zrl.net.sockets import Frames, lasting_frames
from zrl.nodes.job import WorkerJob
from zrl.nodes.page import Page, Phase
from zrl.nodes.pipe import CONNECTION_ENDED
from zrl.protocol import messages as m
from zrl.protocol.peers import LEAST_RATE

HELLO_AGAIN = 1.0  # seconds without an answer after which Hello is sent again
START_TIMEOUT = 60.0  # seconds for an answer of any kind; the host's own limit on the start is the other bound
BYE_TIMEOUT = 2.0  # seconds for the ByeAck
LOOK = 0.25  # seconds between two looks at the page, while there is nothing to do
ADOPT_POLL = 0.005  # seconds between two looks at the board, while the weights that a grant calls for are on their way
M = TypeVar("M", bound=m.Message)


@dataclass(frozen=True)
class Recipe:
    """What the workers of a host are made of. Travels once, through the zygote, never through a socket.

    Attributes:
        factory: makes one environment.
        actor: the copy that acts, in its mode; its weights are replaced before the first step.
        info_keys: as for `zrl.rollout.multi.rollout`; None: the names in the Welcome.
        device: of the actor.
        debug: see `CollectOptions`.
        close: whether to close the environments at the end.
    """

    factory: Factory
    actor: BaseActorModule
    info_keys: Mapping[str, Any] | Iterable[str] | None = None
    device: str = "cpu"
    debug: bool = False
    close: bool = True


def main(recipe: Recipe, job: WorkerJob) -> None:
    """The life of a worker whose host gave it factory and actor."""
    live(job, lambda welcome: recipe)


def live(job: WorkerJob, recipe_of: Callable[[m.Welcome], Recipe]) -> None:
    """The life of a worker, from its Hello to its end.

    Raises:
        RecordError, WeightsError, SharedMemoryError: environment, actor or memory will not do.
        ConfigError: its host's keys cannot be read any more.
        ProcessError: the learner refused this worker.
        SystemExit: the connection ended.
    """
    if job.core is not None:  # before anything is allocated: then its memory is near that core
        os.sched_setaffinity(0, {job.core})
    with contextlib.ExitStack() as opened:
        page = opened.enter_context(Page.attach(job.page, job.incarnation))
        link = Link(job.url, keys=host_keys_at(Path(job.keys)) if job.keys else None)
        opened.callback(link.close)
        try:
            _Worker(job, page, link, opened).run(recipe_of)
        except LinkLost as lost:
            page.enter(Phase.CUT_OFF)  # so that no environment that exits with this status passes for it
            _end_connection(str(lost))
        except EnvError as error:
            page.blame(max(error.env_index, -1))  # of a vector environment as a whole no column is to blame
            raise


def _end_connection(why: str) -> NoReturn:
    print(f"{why}: this worker ends, its host starts another", file=sys.stderr)
    raise SystemExit(CONNECTION_ENDED)


class _Worker:
    """What a worker has in hand. `opened` closes what is opened on the way."""

    def __init__(self, job: WorkerJob, page: Page, link: Link, opened: contextlib.ExitStack) -> None:
        self.job, self.page, self.link = job, page, link
        self._opened = opened
        self._grants: deque[m.Release] = deque()
        self._n_slots = 0  # of the ring
        self._draining = False
        self._told_to_leave = False  # by SIGTERM
        self._version = 0
        self._seq = 0
        self._n_rebuilt = self._rebuilt = 0  # environments: in all, and since the last Ready
        self._is_broken = False  # one of them has failed, and there is no other in its place

    def run(self, recipe_of: Callable[[m.Welcome], Recipe]) -> None:
        """Until the end."""
        welcome = self._hello()
        recipe = recipe_of(welcome)
        self._open_board(recipe.actor)
        self._adopt(1)
        ctx = build(recipe.factory, recipe.actor.to(recipe.device), _options(recipe, welcome, self.job))
        if recipe.close:
            self._opened.callback(self._close, ctx.columns)
        ctx.columns.calls = self.page.calls
        ctx.streams.stay()
        slots, payloads = self._attach(ctx.spec, welcome.n_slots)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        while (grant := self._next_grant()) is not None and self._adopt(grant.least_version):
            self._deliver(ctx, slots[grant.slot], grant, payloads[grant.slot], debug=recipe.debug)
        self._leave(sum(len(frame) for payload in payloads for frame in payload))

    def _on_sigterm(self, signum: int, frame: object) -> None:
        """Whoever ends a container or a service tells all of its processes. The second one kills."""
        self._told_to_leave = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    # ── the start ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _hello(self) -> m.Welcome:
        job = self.job
        hello = m.Hello(
            job.run_id,
            job.incarnation,
            protocol=m.PROTOCOL_VERSION,
            role="worker",
            name=job.name,
            versions=(f"python {sys.version_info[0]}.{sys.version_info[1]}", f"torch {torch.__version__}"),
            process=job.incarnation,
            boot_id=boot_id(),
            host=job.host,
            index=job.index,
            generation=job.generation,
            count=0,
        )
        deadline, delay = time.monotonic() + START_TIMEOUT, 0.5
        while time.monotonic() < deadline:
            self.link.send(hello)
            answer = self._answer(m.Welcome, HELLO_AGAIN)
            if isinstance(answer, m.Welcome):
                return answer
            if isinstance(answer, m.Reject):
                time.sleep(delay)  # its predecessor's end, or its host's Welcome, is still on its way
                delay = min(2 * delay, 5.0)
        raise LinkLost(f"no Welcome within {START_TIMEOUT:.0f} s")

    def _attach(self, spec: FragmentSpec, n_slots: int) -> tuple[list[Slot], list[Frames]]:
        """The slots of the new ring, accepted by the learner; and of each what a Ready brings along: nothing, where the
        learner reads the ring, else the slot itself, in pieces."""
        job, digest = self.job, spec.digest
        ids = {"run_id": job.run_id, "incarnation": job.incarnation, "digest": digest}
        ring = Ring.create(spec.nbytes, n_slots, **ids, shared=job.shm)
        self._opened.callback(ring.close)
        at = ring.address if job.shm else MemoryAddress(pid=0, fd=-1, nbytes=0, boot_id="")
        self.link.send(
            m.Attach(
                job.run_id,
                job.incarnation,
                spec=spec.to_plain(),
                digest=digest,
                n_slots=n_slots,
                slot_nbytes=spec.nbytes,
                pid=at.pid,
                fd=at.fd,
                nbytes=at.nbytes,
                boot_id=at.boot_id,
                path=at.path,
            )
        )
        answer = self._answer(m.Attached, START_TIMEOUT)
        if not isinstance(answer, m.Attached):
            raise LinkLost(f"no answer to Attach within {START_TIMEOUT:.0f} s")
        ring.memory.unlink()
        self._n_slots = n_slots
        pieces = [[] if answer.local else lasting_frames(ring.slot(k).data) for k in range(n_slots)]
        return [Slot(spec, ring.slot(k)) for k in range(n_slots)], pieces

    def _answer(self, kind: type[M], timeout: float) -> M | m.Reject | None:
        """What the learner says to Hello or Attach; a Reject that is worth trying again comes back, another raises."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            message = self.link.receive(left)
            if isinstance(message, m.Reject) and not message.retry:
                if message.code == "draining":
                    raise LinkLost("the run is about to end")
                raise ProcessError(f"the learner refused this worker ({message.code}): {m.printable(message.text)}")
            if isinstance(message, (kind, m.Reject)):
                return message
            if message is not None:
                self._take(message)
        return None

    # ── work ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _next_grant(self) -> m.Release | None:
        """The oldest Release that is not yet worked off; waits for it. None: the run ends."""
        started = time.perf_counter()
        if not self._grants:
            self.page.enter(Phase.WAIT)
        while not self._leaving:
            message = self.link.receive(0.0 if self._grants else LOOK)
            if message is not None:
                self._take(message)
            elif self._grants:
                break
        self._waited = time.perf_counter() - started
        return None if self._leaving else self._grants.popleft()

    @property
    def _leaving(self) -> bool:
        """Whether the learner or the host has no use for another fragment."""
        return self._draining or self._told_to_leave or self.page.leave

    def _take(self, message: m.Message) -> None:
        """A message that nobody waits for in particular; of another incarnation, it is ignored."""
        job = self.job
        if (message.run_id, message.incarnation) != (job.run_id, job.incarnation):
            if isinstance(message, m.HelloAgain):
                raise LinkLost("the learner is another run")
        elif isinstance(message, m.Release):
            self.page.count_release()
            if message.slot < self._n_slots:  # else it is no slot of ours
                self._grants.append(message)
        elif isinstance(message, m.Drain):
            self._draining = True
        elif isinstance(message, m.HelloAgain):
            raise LinkLost("the learner does not know this worker any more")

    def _deliver(self, ctx: Context, slot: Slot, grant: m.Release, payload: Frames, *, debug: bool) -> None:
        while not self._collected(ctx, slot, debug=debug):
            if self._leaving or not self._adopt(grant.least_version):  # what begins anew begins with the newest weights
                return
        times = ctx.times
        self._seq += 1
        self.page.set_sent(self._seq)  # before it is: else who is killed in between has delivered and not proven itself
        self.link.send(
            m.Ready(
                self.job.run_id,
                self.job.incarnation,
                slot=grant.slot,
                seq=self._seq,
                version=self._version,
                env=times.env,
                actor=times.actor,
                write=times.write,
                reset=times.reset,
                wait=self._waited,
                total=times.total,
                n_env_steps=times.n_env_steps,
                rebuilt=self._rebuilt,
            ),
            *payload,
        )
        self._rebuilt = 0

    def _collected(self, ctx: Context, slot: Slot, *, debug: bool) -> bool:
        """Whether the slot holds a fragment. If not an environment has failed and there is a new one in its place, or
        the run ends; all columns begin new episodes."""
        self.page.enter(Phase.COLLECT)
        if debug:
            slot.poison()
        ctx.times.clear()
        try:
            collect(ctx, slot)
            if debug:
                check_forward(ctx, slot)
            return True
        except EnvError as error:
            if self._leaving:  # whoever told this worker to leave may have told the processes of its environment, too
                self._is_broken = True
                traceback.print_exception(error)
                return False
            if self._seq == 0 or ctx.remake is None or error.env_index < 0:
                raise
            self._is_broken = True
            self._make_anew(ctx, error)
            self._is_broken = self._leaving
            return False

    def _make_anew(self, ctx: Context, error: EnvError) -> None:
        """A new environment in the place of the one that failed, after a while; unless it has failed too often, or so
        many have since the last fragment that this leads to none. Another may fail in the reset of all that follows."""
        assert ctx.remake is not None
        most = self.job.rebuilds.budget + ctx.spec.n_columns
        self.page.enter(Phase.BUILD)
        while True:
            j = error.env_index
            delay = self.job.rebuilds.failed(j, time.monotonic()) if j >= 0 and self._rebuilt < most else None
            if delay is None:
                raise error
            traceback.print_exception(error)
            warnings.warn(f"environment {j} is made anew in {delay:g} s; it failed: {error}", stacklevel=2)
            deadline = time.monotonic() + delay
            while (left := deadline - time.monotonic()) > 0 and not self._leaving:
                if (message := self.link.receive(min(left, LOOK))) is not None:
                    self._take(message)
            if self._leaving:
                return
            self._rebuilt += 1
            self._n_rebuilt += 1
            try:
                ctx.remake(j, self._n_rebuilt)
                ctx.restart()
                return
            except EnvError as again:
                error = again

    # ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _open_board(self, actor: BaseActorModule) -> None:
        job = self.job
        self._packer = WeightsPacker(actor)
        manifest = self._packer.manifest
        if (manifest.digest, manifest.nbytes) != (job.board_digest, job.board_nbytes):
            raise ProcessError(
                f"the actor of this worker has {manifest.nbytes} bytes of weights, the learner's {job.board_nbytes}, "
                "or other names, dtypes or shapes: both machines need the same version of the code"
            )
        self._board = Board.attach(job.board, run_id=job.run_id, digest=job.board_digest, nbytes=job.board_nbytes)
        self._opened.callback(self._board.close)
        self._flat = np.empty(job.board_nbytes, np.uint8)

    def _adopt(self, least: int) -> bool:
        """Take the newest weights over; wait only while all that can be had is older than `least`. False: the run ends
        before they come."""
        while True:
            version = self._board.read(self._flat, self._version)
            if version is not None and version > self._version:
                self._packer.unpack(self._flat)
                self._version = version
            if self._version >= least or self._leaving:
                return self._version >= least
            self.page.enter(Phase.ADOPT)
            self.page.count_look()
            message = self.link.receive(ADOPT_POLL)
            if message is not None:
                self._take(message)

    # ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _close(self, columns: Columns) -> None:
        with contextlib.suppress(
            *([Exception] if self._is_broken else [])
        ):  # it may not be able to, and is not to blame
            columns.close()

    def _leave(self, on_the_wire: int) -> None:
        """Say Bye, and wait for the answer: behind as many bytes of payloads as may be on their way."""
        self.page.enter(Phase.DRAIN)
        self.link.send(m.Bye(self.job.run_id, self.job.incarnation))
        deadline = time.monotonic() + BYE_TIMEOUT + on_the_wire / LEAST_RATE
        with contextlib.suppress(LinkLost):  # it may have closed right after its answer
            while (left := deadline - time.monotonic()) > 0:
                if isinstance(self.link.receive(left), m.ByeAck):
                    return


def _options(recipe: Recipe, welcome: m.Welcome, job: WorkerJob) -> CollectOptions:
    return CollectOptions(
        n_steps=welcome.n_steps,
        n_columns=welcome.n_columns,
        sticky=welcome.sticky,
        keep_final_obs=welcome.keep_final_obs,
        info_keys=recipe.info_keys if recipe.info_keys is not None else (welcome.info_keys or None),
        entropy=int.from_bytes(welcome.entropy, "big"),
        index=job.index,
        generation=job.generation,
        device=torch.device(recipe.device),
        debug=recipe.debug,
    )
