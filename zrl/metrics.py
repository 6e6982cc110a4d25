"""Where the time goes, what happened how often, and the one line that says what to do about it.

Everything here is arithmetic on counters that others keep. `Totals` are such counters at one moment; a `History` keeps
one of them a second; `Recent` is the difference of two of them; `verdict` puts it into a sentence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

WINDOW, LONGEST_WINDOW = 10.0, 60.0  # seconds that shares are about: usually, and where little happens
SHORTEST_WINDOW = 1.0  # seconds below which shares say nothing
PER_WORKER = 2  # fragments of each worker that a window should have
KNOWN = 0.8  # or the share of the workers' time that it should account for
SNAPSHOTS_APART = 0.5  # seconds at least

WAITS = 0.3  # share of waiting from which on somebody is kept waiting
COPIES = 0.5  # share of copying from which on it may be what the others wait for
STALE = 0.01  # share of fragments dropped as too old that is worth a word
STARVED = 5.0  # seconds without a batch
SLOW = 2.0  # times as long as others', from which on fragments are slow
OVERDUE = 2.0  # times as long as batches usually take

Phase = Literal["wait", "publish", "train"]


COUNTS = {"env_steps": "env_steps", "masked_steps": "masked"}  # name in statistics → field of `StageTimes`


@dataclasses.dataclass(slots=True)
class StageTimes:
    """Seconds spent in each stage of making fragments, and how many environment steps came of it.

    Attributes:
        env: inside ``env.step``.
        actor: inside ``actor.step`` and ``actor.value``.
        write: copying what they returned into the record, and turning its actions into what environments take.
        reset: what the end of an episode costs: ``env.reset``, its observation, the recurrent state.
        total: wall time of whole fragments; what the four do not account for is the loop itself.
        n_env_steps: environment steps taken in that time.
        n_masked: rows of columns without one: frozen, or a step that only began an episode.
    """

    env: float = 0.0
    actor: float = 0.0
    write: float = 0.0
    reset: float = 0.0
    total: float = 0.0
    n_env_steps: int = 0
    n_masked: int = 0

    def clear(self) -> None:
        """Start counting anew."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, field.default)

    def __iadd__(self, other: StageTimes) -> Self:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        return self

    def shares(self) -> dict[str, float]:
        """Share of each stage in the total, in [0, 1]; ``other`` is the rest. Empty before the first fragment."""
        if self.total <= 0:
            return {}
        parts = {name: getattr(self, name) / self.total for name in ("env", "actor", "write", "reset")}
        return {**parts, "other": max(0.0, 1.0 - sum(parts.values()))}

    def as_dict(self) -> dict[str, float]:
        """All figures by name."""
        return dataclasses.asdict(self)

    def figures(self) -> dict[str, Any]:
        """The same as collectors show them: ``env_steps``, ``masked_steps``, and ``seconds`` by stage."""
        seconds = self.as_dict()
        counts = {name: int(seconds.pop(f"n_{short}")) for name, short in COUNTS.items()}
        return {**counts, "seconds": seconds}


class LearnerClock:
    """Seconds of the user's thread by phase: ``wait`` for a batch inside of ``next()``, ``publish``, and ``train``, all
    that is outside of ``next()``. It starts with the first `enter` and ends with `stop`.

    Written by the user's thread, read by any: the state is one tuple, replaced as a whole: the phase, its beginning,
    and the seconds of the three phases until then.

    Args:
        clock: gives the seconds; ``time.monotonic``.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._state: tuple[Phase | None, float, float, float, float] = (None, 0.0, 0.0, 0.0, 0.0)
        self._thread = 0
        self._over = False

    def enter(self, phase: Phase) -> None:
        """The calling thread, which is the user's from now on, is in `phase`."""
        self._thread = threading.get_ident()
        self._change(phase)

    @contextlib.contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """In `phase` until the end of the ``with``, then where it was before. Any other thread than the user's, which
        is not what is measured here, changes nothing."""
        before = self._state[0]
        if before is None or threading.get_ident() != self._thread:
            yield
            return
        self._change(phase)
        try:
            yield
        finally:
            self._change(before)

    def stop(self) -> None:
        """From any thread: nothing is counted any more."""
        self._change(None)
        self._over = True

    def read(self, now: float | None = None) -> dict[str, float]:
        """Seconds by phase up to `now`, that of the clock if None, the running phase included."""
        phase, since, wait, publish, train = self._state
        spent = {"wait": wait, "publish": publish, "train": train}
        if phase is not None:
            spent[phase] += max(0.0, (self._clock() if now is None else now) - since)
        return spent

    def waiting(self, now: float | None = None) -> float:
        """For how many seconds the user's thread has been waiting for a batch; 0 where it is not."""
        phase, since, *_ = self._state
        return max(0.0, (self._clock() if now is None else now) - since) if phase == "wait" else 0.0

    def _change(self, phase: Phase | None) -> None:
        if self._over:
            return
        before, since, wait, publish, train = self._state
        now = self._clock()
        if before == "wait":
            wait += now - since
        elif before == "publish":
            publish += now - since
        elif before == "train":
            train += now - since
        self._state = phase, now, wait, publish, train


_STAGES = ("env", "actor", "write", "reset")


class HostFigures(NamedTuple):
    """What the workers of one host have delivered: fragments, the environment steps in them, and seconds from each
    grant to its fragment, the way there and back included."""

    fragments: int = 0
    env_steps: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Totals:
    """What has been counted up to a moment, all of it over the whole run.

    Attributes:
        now: the moment, in seconds.
        workers: how many there are at this moment; `waiting`: how many of them stand in phase wait.
        stages: figures of `StageTimes`, of all fragments so far; `wait`: seconds that workers waited before them.
        learner: `LearnerClock.read`; `gather`: seconds of copying slots into batches.
        fragments: delivered; `batches`: yielded; `lags`: fragments of these by their lag.
        stale: fragments dropped as too old; `stale_by`: by worker, as far as it is known.
        by_host: by the host's name.
        present, idle: seconds of workers in all, and in phase wait; a `History` fills them in.
    """

    now: float
    workers: int = 0
    waiting: int = 0
    stages: Mapping[str, float] = dataclasses.field(default_factory=dict)
    wait: float = 0.0
    learner: Mapping[str, float] = dataclasses.field(default_factory=dict)
    gather: float = 0.0
    fragments: int = 0
    batches: int = 0
    lags: Mapping[int, int] = dataclasses.field(default_factory=dict)
    stale: int = 0
    stale_by: Mapping[int, int] = dataclasses.field(default_factory=dict)
    by_host: Mapping[str, HostFigures] = dataclasses.field(default_factory=dict)
    present: float = 0.0
    idle: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Recent:
    """What happened within the last seconds.

    Attributes:
        seconds: how many.
        enough: whether one can judge by it: it has 2 fragments a worker, or most of the workers' time is accounted for.
        workers: shares of the workers' time, in [0, 1]: env, actor, write, reset, other, wait. They add up to 1.
        learner: shares of wall time: wait, train and publish of the user's thread, which add up to 1, and gather, of
            the thread that copies fragments into batches meanwhile.
        fragments: delivered.
        env_steps_per_s, batches_per_s: of delivered fragments, and yielded.
        lag: min, mean and max of the fragments yielded.
        stale: share of the fragments delivered that were dropped as too old.
        stragglers: workers that most of these came from, the worst first.
        by_host: fragments and environment steps per second, and seconds of a fragment, by the host's name.
        slow_host: the slowest of several hosts, and how many times as long its fragments take as those of the host in
            the middle; empty where that is less than twice.
    """

    seconds: float = 0.0
    enough: bool = False
    workers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    learner: Mapping[str, float] = dataclasses.field(default_factory=dict)
    fragments: int = 0
    env_steps_per_s: float = 0.0
    batches_per_s: float = 0.0
    lag: Mapping[str, float] = dataclasses.field(default_factory=dict)
    stale: float = 0.0
    stragglers: tuple[int, ...] = ()
    by_host: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    slow_host: tuple[str, float] = ("", 0.0)

    def as_dict(self) -> dict[str, Any]:
        """What of it goes into a status: ``shares`` and ``rates``."""
        return {
            "shares": {"seconds": self.seconds, "workers": dict(self.workers), "learner": dict(self.learner)},
            "rates": {"env_steps_per_s": self.env_steps_per_s, "batches_per_s": self.batches_per_s},
            "by_host": {name: dict(found) for name, found in self.by_host.items()},
        }


class History:
    """Snapshots of the last minute, and what happened since one of them.

    The window is the last 10 s. While fewer than 2 fragments per worker came in it, it reaches further back, to at most
    60 s: fragments may take long. What was before there were workers does not count.

    **The rule for workers' time.** A worker reports what a fragment took, and how long it waited before it, only
    together with that fragment. So there is time in a window that nobody has accounted for: one for each worker and
    second, less what was reported. Of this, as much counts as ``wait`` as workers were seen in phase wait, in each
    second, beyond the waits that were reported. The rest belongs to fragments that are still being made; shares leave
    it out. Reported waits that are longer than the window has room for began before it, and are cut.
    """

    def __init__(self) -> None:
        self._kept: deque[Totals] = deque()

    def look(self, totals: Totals) -> Recent:
        """What happened up to these totals, which are kept if the last ones are old enough."""
        if not self._kept or not self._kept[-1].workers:
            self._kept.clear()
            self._kept.append(totals)
        last = self._kept[-1]
        seconds = totals.now - last.now
        totals = dataclasses.replace(
            totals,
            present=last.present + seconds * totals.workers,
            idle=last.idle + seconds * min(totals.waiting, totals.workers),
        )
        while len(self._kept) > 1 and totals.now - self._kept[1].now >= LONGEST_WINDOW:
            self._kept.popleft()
        recent = difference(self._base(totals), totals)
        if seconds >= SNAPSHOTS_APART:
            self._kept.append(totals)
        return recent

    def _base(self, totals: Totals) -> Totals:
        for old in reversed(self._kept):
            if totals.now - old.now >= WINDOW and _has_enough(old, totals):
                return old
        return self._kept[0]


def _has_enough(old: Totals, new: Totals) -> bool:
    return new.fragments - old.fragments >= PER_WORKER * max(1, new.workers)


def difference(old: Totals, new: Totals) -> Recent:
    """What happened from the one moment to the other."""
    seconds = new.now - old.now
    fragments = new.fragments - old.fragments
    stale_by = _less(new.stale_by, old.stale_by)
    most = max(stale_by.values(), default=0)
    known = sum(_busy_and_wait(old, new)) >= KNOWN * (new.present - old.present) > 0
    by_host = _by_host(old.by_host, new.by_host, seconds)
    worst = sorted((w for w, n in stale_by.items() if 2 * n > most), key=lambda w: (-stale_by[w], w))
    return Recent(
        seconds=seconds,
        enough=seconds >= LONGEST_WINDOW or (seconds >= SHORTEST_WINDOW and (_has_enough(old, new) or known)),
        workers=_worker_shares(old, new),
        learner=_learner_shares(old, new),
        fragments=fragments,
        env_steps_per_s=_ratio(_less(new.stages, old.stages).get("n_env_steps", 0.0), seconds),
        batches_per_s=_ratio(new.batches - old.batches, seconds),
        lag=_summary(_less(new.lags, old.lags)),
        stale=_ratio(new.stale - old.stale, fragments),
        stragglers=tuple(worst[:3]),
        by_host=by_host,
        slow_host=_slowest(by_host),
    )


def _by_host(
    old: Mapping[str, HostFigures], new: Mapping[str, HostFigures], seconds: float
) -> dict[str, dict[str, float]]:
    """Of hosts that delivered something in this time."""
    found = {}
    for name, now in new.items():
        then = old.get(name, HostFigures())
        if n := now.fragments - then.fragments:
            found[name] = {
                "fragments_per_s": _ratio(n, seconds),
                "env_steps_per_s": _ratio(now.env_steps - then.env_steps, seconds),
                "fragment_seconds": (now.seconds - then.seconds) / n,
            }
    return found


def _slowest(by_host: Mapping[str, Mapping[str, float]]) -> tuple[str, float]:
    took = sorted((found["fragment_seconds"], name) for name, found in by_host.items())
    if len(took) < 2:
        return "", 0.0
    (most, name), middle = took[-1], took[(len(took) - 1) // 2][0]
    return (name, most / middle) if most >= SLOW * middle > 0 else ("", 0.0)


def _busy_and_wait(old: Totals, new: Totals) -> tuple[float, float]:
    """Seconds of the workers, by the rule of `History`."""
    busy = new.stages.get("total", 0.0) - old.stages.get("total", 0.0)
    room = max(0.0, new.present - old.present - busy)
    reported = min(new.wait - old.wait, room)
    unreported = min(max(0.0, new.idle - old.idle - reported), room - reported)
    return busy, reported + unreported


def _worker_shares(old: Totals, new: Totals) -> dict[str, float]:
    spent = _less(new.stages, old.stages)
    busy, wait = _busy_and_wait(old, new)
    if busy + wait <= 0:
        return {}
    shares = {name: spent.get(name, 0.0) / (busy + wait) for name in _STAGES}
    shares["other"] = max(0.0, busy / (busy + wait) - sum(shares.values()))
    return {**shares, "wait": wait / (busy + wait)}


def _learner_shares(old: Totals, new: Totals) -> dict[str, float]:
    spent = _less(new.learner, old.learner)
    wall = sum(spent.values())
    if wall <= 0:
        return {}
    shares = {name: spent.get(name, 0.0) / wall for name in ("wait", "train", "publish")}
    return {**shares, "gather": (new.gather - old.gather) / wall}


def _summary(lags: Mapping[int, float]) -> dict[str, float]:
    seen = {lag: n for lag, n in lags.items() if n > 0}
    if not seen:
        return {}
    mean = sum(lag * n for lag, n in seen.items()) / sum(seen.values())
    return {"min": min(seen), "mean": mean, "max": max(seen)}


def _less(new: Mapping[Any, float], old: Mapping[Any, float]) -> dict[Any, float]:
    return {key: value - old.get(key, 0) for key, value in new.items()}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Situation:
    """What a verdict is made of.

    Attributes:
        recent: the last seconds.
        workers: how many are alive, with slots.
        max_lag: bound on the age of fragments, None without.
        cores: that the workers share with the learner; None where they have others.
        no_batch: seconds that the learner has been waiting by now.
        why: no worker, or no batch, in words.
        had_workers: whether there were any before.
        in_process: collecting and learning take turns in one process.
    """

    recent: Recent = Recent()
    workers: int = 0
    max_lag: int | None = None
    cores: int | None = None
    no_batch: float = 0.0
    why: str = ""
    had_workers: bool = False
    in_process: bool = False


def verdict(s: Situation) -> str:
    """One sentence: what the run waits for, and which option changes that; and which host is far slower than others."""
    name, times = s.recent.slow_host
    found = _verdict(s)
    if not name or not s.recent.enough:
        return found
    shown = name.encode("unicode_escape").decode()
    effect = "every batch waits for them" if s.max_lag == 0 else "no batch waits for them"
    return f"{found}; fragments of host {shown} take {times:.1f} times as long as others, {effect}"


def _verdict(s: Situation) -> str:
    recent = s.recent
    if not s.workers and not s.in_process:
        return f"no worker {'is left' if s.had_workers else 'yet'}: {s.why}"
    if _starves(s):
        return f"starved: no batch for {s.no_batch:.0f} s: {s.why}"
    if recent.stale > STALE:
        return _stale(recent, s.max_lag)
    if not (recent.enough and recent.workers and recent.learner):
        n = recent.fragments
        return f"too little data yet: {n} fragment{'' if n == 1 else 's'} in {recent.seconds:.0f} s"
    if s.in_process or s.max_lag == 0:
        return _one_after_the_other(s)
    learner_waits, workers_wait = recent.learner["wait"], recent.workers["wait"]
    if learner_waits >= WAITS and workers_wait >= WAITS:
        return _both_wait(recent)
    if learner_waits >= WAITS:
        return _worker_bound(s)
    if workers_wait >= WAITS:
        return (
            f"learner-bound: workers wait {_percent(workers_wait)} of the time; "
            "fewer workers or a larger --batch would lose nothing"
        )
    return (
        f"balanced: the learner waits {_percent(learner_waits)} of the time, the workers {_percent(workers_wait)}; "
        "a change to one alone would make the other wait"
    )


def _starves(s: Situation) -> bool:
    """No batch for 5 s, and for longer than the ones before took: fragments may take long by nature."""
    usual = s.recent.batches_per_s
    return s.no_batch >= STARVED and not s.in_process and (not usual or s.no_batch * usual >= OVERDUE)


def _stale(recent: Recent, max_lag: int | None) -> str:
    share = f"{100 * recent.stale:.1f} % of the fragments were too old and were dropped"
    who = f", most of them of {_listed(recent.stragglers)}" if recent.stragglers else ""
    return f"{share}{who}; a --max-lag of more than {max_lag}, or workers of equal speed, would keep them"


def _one_after_the_other(s: Situation) -> str:
    collecting = s.recent.learner["wait"]
    split = (
        f"{_percent(collecting)} of the time goes into collecting and {_percent(1.0 - collecting)} into learning, "
        "one after the other"
    )
    if s.in_process:
        return f"in-process: {split}; worker processes (--workers) would collect in parallel"
    return f"synchronous: {split}; --max-lag 1 would overlap the two"


def _both_wait(recent: Recent) -> str:
    if recent.learner["gather"] >= COPIES:
        return (
            f"copy-bound: copying fragments into batches takes {_percent(recent.learner['gather'])} of the time, and "
            "all wait for it; smaller observations, such as uint8 for pictures, would help"
        )
    return (
        f"slot-bound: the learner waits {_percent(recent.learner['wait'])} of the time, the workers "
        f"{_percent(recent.workers['wait'])}; more slots for each worker or a larger --max-lag would let them run ahead"
    )


def _worker_bound(s: Situation) -> str:
    w = s.recent.workers
    env = w["env"] + w["reset"]
    by_env = env >= w["actor"]
    who, share = ("environment", env) if by_env else ("actor", w["actor"])
    found = (
        f"worker-bound by the {who} ({_percent(share)} of the workers' time): "
        f"the learner waits {_percent(s.recent.learner['wait'])} of the time"
    )
    if s.cores is None or s.workers < s.cores:
        return f"{found}; more --workers would help"
    other = "a faster one" if by_env else "a smaller one, or more --envs for each of its calls,"
    return f"{found}; there are as many workers as cores ({s.cores}), so only {other} would help"


def _listed(workers: Sequence[int]) -> str:
    if len(workers) == 1:
        return f"worker {workers[0]}"
    return f"workers {', '.join(map(str, workers[:-1]))} and {workers[-1]}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
