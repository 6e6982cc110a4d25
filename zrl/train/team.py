"""Several learners of one run: `torchrun --nproc-per-node=2 -m zrl learner …`.

    learner 0                             learner 1 …
    ─────────────────────────             ─────────────────────────
    its hosts ─► its batch                its hosts ─► its batch
              \\                          /
               vote: who has a batch, how many steps, stop?        gloo, a few numbers
                          │ all have one
    loss, backward ◄─── mean of the gradients ───► loss, backward  DistributedDataParallel
    optimizer.step                        optimizer.step           the same on all

Nobody begins an update before all can: a learner without a batch votes again, every quarter of a second. So all stop
after the same update, whoever was asked to, and no wait is longer than the slowest update, however long workers are
waited for.

What ends one learner ends all: it says why in torch's store, and leaves; the next vote of the others fails, and they
read there what to say.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from zrl.config import TrainConfig
from zrl.errors import CheckpointError, ConfigError, PreflightError, StarvationError, WorkerError, ZrlError
from zrl.protocol.redirect import Spread
from zrl.train.ranks import Rank
from zrl.train.setup import DivergedError, Losses
from zrl.train.stop import Stopped

JOIN_SECONDS = 120.0  # for all learners to come
TIMEOUT = 300.0  # seconds for one exchange among them: for what the slowest does meanwhile
LEAVE_SECONDS = 5.0  # for the others, at the end
SLICE = 0.25  # seconds of waiting for a batch between two votes
LOOK = 0.1  # seconds between two looks at the store
REPORT_SECONDS = 1.0  # between two reports of who is there
FIRST_COMPLAINT, NEXT_COMPLAINTS = 5.0, 30.0  # seconds of waiting for others before we say so

#: What may end a learner, and so the others. All else is a `TeamError` to them.
_KINDS: dict[str, type[ZrlError]] = {
    kind.__name__: kind for kind in (StarvationError, PreflightError, ConfigError, CheckpointError, DivergedError)
}

logger = logging.getLogger("zrl")


class TeamError(ZrlError):
    """Another learner of this run failed, or is gone."""


class Vote(NamedTuple):
    """What a learner says of itself, before each update and between its parts.

    Attributes:
        batch: 1 if it has one, of `n_env_steps`, for `n_optimizer_steps`.
        workers: that it has.
        goal: 1 if the run has reached it, as far as it knows.
        signum: by which it was asked to stop; 0: not asked.
    """

    batch: int = 0
    n_env_steps: int = 0
    n_optimizer_steps: int = 0
    workers: int = 0
    goal: int = 0
    signum: int = 0


NOTHING = Vote()


class Team:
    """This learner's connection to the others. A context manager: what is raised inside is what the others hear.

    Args:
        rank: which of them this is.
        device: of the learner, as the user says; ``cuda`` is the GPU of its local rank.
        check: called while others are waited for; may raise.
        timeout: seconds for one exchange.

    Attributes:
        rank: as given.
        device: of this learner.

    Raises:
        ConfigError: a device that several cannot have.
        TeamError: not all have come.
    """

    def __init__(
        self, rank: Rank, device: str, check: Callable[[], None] = lambda: None, timeout: float = TIMEOUT
    ) -> None:
        self.rank = rank
        self.device, backend = _device(device, rank)
        if self.device.startswith("cuda"):
            torch.cuda.set_device(self.device)  # NCCL takes the current one
        self._spread: Spread | None = None
        self._here: dict[str, int] = {}  # hosts, as of the last report
        self._report_at = 0.0
        within = datetime.timedelta(seconds=timeout)
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                rank.host,
                rank.port,
                rank.size,
                is_master=rank.leads and not rank.store_is_there,
                timeout=datetime.timedelta(seconds=JOIN_SECONDS),
                wait_for_workers=False,
            )
            self._store = dist.PrefixStore(f"zrl/{rank.attempt}", store)  # type: ignore[attr-defined]
            self._all_there(check)
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("torch", self._store),  # type: ignore[attr-defined]
                rank=rank.rank,
                world_size=rank.size,
                timeout=within,
            )
            self._votes: dist.ProcessGroup | None = dist.new_group(backend="gloo", timeout=within)
        except RuntimeError as e:
            raise TeamError(
                f"the {rank.size} learners cannot reach each other: {e}; is {rank.host}:{rank.port} (MASTER_ADDR, "
                "MASTER_PORT) right, and GLOO_SOCKET_IFNAME?"
            ) from e

    @property
    def leads(self) -> bool:
        return self.rank.leads

    def _all_there(self, check: Callable[[], None]) -> None:
        """Wait for all, in a way that a signal ends: what torch waits in is none."""
        there = self._store.add("there", 1)
        deadline = time.monotonic() + JOIN_SECONDS
        while there < self.rank.size:
            try:
                check()
            except BaseException as e:
                self._tell_why(e)
                raise
            if self._store.check(["end"]):
                raise self._why(RuntimeError("it ended before all had come"))
            if time.monotonic() >= deadline:
                raise TeamError(f"{there} of {self.rank.size} learners have come within {JOIN_SECONDS:.0f} s")
            time.sleep(LOOK)
            there = self._store.add("there", 0)

    # ── the start ────────────────────────────────────────────────────────────────────────────────────────────────────

    def config(self, own: TrainConfig) -> TrainConfig:
        """The config of learner 0, which counts for all."""
        state = self.share({"config": json.dumps(own.as_dict())} if self.leads else None)
        return TrainConfig.from_dict({**json.loads(state["config"]), "device": self.device})

    def share(self, state: dict[str, Any] | None) -> dict[str, Any]:
        """What learner 0 has, tensors on this learner's device; the others give None. Nothing in it is executed."""
        packed = io.BytesIO()
        if state is not None:
            torch.save(state, packed)
        size = torch.tensor([packed.tell()])
        with self.together():
            dist.broadcast(size, 0, self._votes)
            data = torch.empty(int(size), dtype=torch.uint8)
            if state is not None:
                data = torch.frombuffer(bytearray(packed.getvalue()), dtype=torch.uint8)
            dist.broadcast(data, 0, self._votes)
        if state is not None:
            return state
        received: dict[str, Any] = torch.load(
            io.BytesIO(data.numpy().tobytes()), map_location=self.device, weights_only=True
        )
        return received

    def wrapped(self, losses: Losses) -> torch.nn.Module:
        """Losses whose gradients are the mean over all learners, of parameters that are those of learner 0.

        Buffers are those of learner 0 too, at the beginning of each forward pass.

        Raises:
            ConfigError: their actors differ.
        """
        try:
            with self.together():  # a loss need not use all parameters: REINFORCE has no use for a value
                return DistributedDataParallel(losses, find_unused_parameters=True)
        except RuntimeError as e:
            raise ConfigError(f"actor: it must be the same for all learners, and have something to learn: {e}") from e

    def announce(self, url: str) -> None:
        """Let learner 0 know where this one listens."""
        self._store.set(f"url/{self.rank.rank}", url)
        self._store.set(f"hosts/{self.rank.rank}", "{}")

    def redirect(self) -> Spread:
        """For learner 0, after all others have announced themselves: where newcomers are sent to."""
        urls = [self._store.get(f"url/{rank}").decode() for rank in range(1, self.rank.size)]
        self._spread = Spread(["", *urls])
        return self._spread

    def tell(self, key: str, text: str) -> None:
        self._store.set(key, text)

    def told(self, key: str) -> str:
        """What somebody told before a vote that has passed."""
        return self._store.get(key).decode()

    # ── together ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def vote(self, own: Vote = NOTHING) -> list[Vote]:
        """What all say, in the order of their ranks. Every learner calls it as often as the others.

        Raises:
            TeamError: one is gone; or what ended it, where it has said so.
        """
        mine = torch.tensor(own)
        all_of_them = [torch.empty_like(mine) for _ in range(self.rank.size)]
        with self.together():
            work = dist.all_gather(all_of_them, mine, group=self._votes, async_op=True)
            pause = 2e-5
            while not work.is_completed():  # a wait for it would keep the handlers of signals waiting, too
                time.sleep(pause)
                pause = min(2 * pause, 5e-3)
            work.wait()
        return [Vote(*vote.tolist()) for vote in all_of_them]

    def pause(self, signum: int) -> None:
        """Between two steps of the optimizer: stop all, if one was asked to.

        Raises:
            Stopped: it was.
        """
        self._stop(self.vote(Vote(signum=signum)))

    def _stop(self, votes: list[Vote]) -> None:
        if signum := max(vote.signum for vote in votes):
            raise Stopped(signum)

    def batch(
        self,
        take: Callable[[float], Any],
        say: Callable[[Any], Vote],
        hosts: Callable[[], Mapping[str, int]] = dict,
    ) -> tuple[Any, int] | None:
        """Wait until all have a batch: this learner's, and how many environment steps there are in all of them; None if
        the goal is reached.

        Args:
            take: gives the next batch, or None after so many seconds.
            say: what to say of a batch, or of None.
            hosts: that are here, for `report`.

        Raises:
            ConfigError: the batches do not make for the same number of steps of the optimizer.
            Stopped: a learner was asked to.
        """
        batch, since = None, time.monotonic()
        complain_at = since + FIRST_COMPLAINT
        while True:
            self.report(hosts)
            own = say(batch)
            if batch is None and not own.goal and not own.signum:
                batch = take(SLICE)
                own = say(batch)
            votes = self.vote(own._replace(workers=sum(self._here.values())))
            self._stop(votes)
            if any(vote.goal for vote in votes):
                return None
            if all(vote.batch for vote in votes):
                return batch, self._agreed(votes)
            now = time.monotonic()
            if batch is not None and now >= complain_at:
                complain_at = now + NEXT_COMPLAINTS
                self._complain(votes, now - since)

    def _agreed(self, votes: list[Vote]) -> int:
        steps = [vote.n_optimizer_steps for vote in votes]
        if len(set(steps)) > 1:
            raise ConfigError(
                f"minibatch: every learner must make as many steps of the optimizer as the others, but their batches "
                f"have {_listed([v.n_env_steps for v in votes])} actions, which makes {_listed(steps)} minibatches: "
                "take minibatches as large as a batch, or an algorithm without them"
            )
        return sum(vote.n_env_steps for vote in votes)

    def _complain(self, votes: list[Vote], seconds: float) -> None:
        behind = [(rank, vote.workers) for rank, vote in enumerate(votes) if not vote.batch]
        logger.warning(
            "learner %d has waited for %.0f s: no batch yet at %s",
            self.rank.rank,
            seconds,
            ", ".join(f"learner {rank}, with {workers} workers" for rank, workers in behind),
        )

    def report(self, hosts: Callable[[], Mapping[str, int]]) -> None:
        """Let learner 0 know who is here, or have it look who is elsewhere; at most once a second."""
        now = time.monotonic()
        if now < self._report_at:
            return
        self._report_at = now + REPORT_SECONDS
        before, self._here = self._here, dict(hosts())
        with self.together():
            if self._spread is not None:
                others = range(1, self.rank.size)
                self._spread.there = {rank: json.loads(self._store.get(f"hosts/{rank}")) for rank in others}
            elif self._here != before:
                self._store.set(f"hosts/{self.rank.rank}", json.dumps(self._here))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Work that needs the others: what it raises when they are gone is why they are.

        Raises:
            TeamError, or what ended the one that was first.
        """
        try:
            yield
        except RuntimeError as e:
            if isinstance(e, dist.DistError) or "gloo" in str(e):
                raise self._why(e) from e
            raise

    # ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _why(self, error: RuntimeError) -> BaseException:
        with contextlib.suppress(RuntimeError, ValueError, KeyError):
            if self._store.check(["end"]):
                end = json.loads(self._store.get("end"))
                if end["kind"] == "Stopped":
                    return Stopped(int(end["text"]))
                return _KINDS.get(end["kind"], TeamError)(f"learner {end['rank']}: {end['text']}")
        return TeamError(f"another learner is gone, or does not answer: {str(error).partition(' This is')[0]}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if error is None:
                self._leave_together()
            else:
                self._tell_why(error)
        finally:
            self._votes = None  # its connections end with the last reference, and that is what the others notice
            dist.destroy_process_group()

    def _tell_why(self, error: BaseException) -> None:
        """The first reason counts."""
        text = str(error.signum) if isinstance(error, Stopped) else str(error)
        name = "StarvationError" if isinstance(error, WorkerError) else type(error).__name__
        end = json.dumps({"kind": name, "rank": self.rank.rank, "text": text})
        with contextlib.suppress(RuntimeError):
            if self._store.add("ended", 1) == 1:
                self._store.set("end", end)

    def _leave_together(self) -> None:
        """Who leaves first must not be taken for lost."""
        deadline = time.monotonic() + LEAVE_SECONDS
        with contextlib.suppress(RuntimeError):
            gone = self._store.add("left", 1)
            while gone < self.rank.size and time.monotonic() < deadline:
                time.sleep(LOOK / 10)
                gone = self._store.add("left", 0)


def _device(device: str, rank: Rank) -> tuple[str, str]:
    """Device and backend of one of several learners on a machine."""
    if not device.startswith("cuda"):
        return device, "gloo"
    if device != "cuda":
        raise ConfigError(f"device: with several learners each has its own: expected cuda or cpu, not {device}")
    n = torch.cuda.device_count()
    if not n:
        raise ConfigError("device: no GPU is visible here; take cpu")
    if rank.n_local > n:
        if rank.local == 0:
            logger.warning("%d learners share %d GPUs: their gradients go by way of the CPU", rank.n_local, n)
        return f"cuda:{rank.local % n}", "gloo"
    return f"cuda:{rank.local}", "nccl"


def _listed(numbers: list[int]) -> str:
    return " and ".join(str(n) for n in numbers)
