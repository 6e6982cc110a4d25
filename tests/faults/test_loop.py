"""What the user's loop may do to an iterator: raise, leave, be interrupted, close it twice or from elsewhere."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import pytest

from tests.faults.world import (
    PATIENCE,
    Ledger,
    alive,
    audit,
    drive,
    impatient,
    kids,
    needs_linux,
    pid_of,
    rolling,
    stamps,
    until,
)
from tests.toys import RandomActor
from zrl import Batch
from zrl.errors import ClosedError
from zrl.rollout import multi
from zrl.rollout.pipeline import PipelineRollout

pytestmark = needs_linux


def make(**more: Any) -> PipelineRollout:
    it = multi.rollout(stamps(), RandomActor(3), 4, 2, 2, 4, 2, **more)
    assert isinstance(it, PipelineRollout)
    return it


def everything(it: PipelineRollout) -> list[int]:
    """All processes of a rollout."""
    assert it._collator._own is not None
    return [it._collator._own.zygote.process.pid, *map(pid_of, kids(it))]


def test_an_exception_in_the_loop_with_with() -> None:
    pids: list[int] = []

    def train() -> None:
        with make() as it:
            for _ in it:
                pids.extend(everything(it))
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert not any(map(alive, pids))


def test_an_exception_in_the_loop_without_with() -> None:
    """The traceback keeps the iterator; with it, it ends."""
    pids: list[int] = []

    def train() -> None:
        it = make()
        for _ in it:
            pids.extend(everything(it))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        train()
    assert all(map(alive, pids))
    del caught
    gc.collect()
    assert not any(map(alive, pids))


def test_a_generator_that_is_closed_takes_its_iterator_along() -> None:
    def generate(pids: list[int]) -> Generator[Batch, None, None]:
        it = make()
        for batch in it:
            pids.extend(everything(it))
            yield batch

    pids: list[int] = []
    generator = generate(pids)
    next(generator)
    generator.close()
    gc.collect()
    assert not any(map(alive, pids))


@pytest.mark.parametrize("thread", [pytest.param("user", marks=pytest.mark.long), "collator", "feed"])
def test_an_iterator_in_a_cycle_is_collected_by_whichever_thread(thread: str) -> None:
    it = make()
    next(it)
    pids = everything(it)
    collator = it._collator
    threads = [collator._thread, collator.feed.thread]
    gc.disable()
    try:
        it.myself = it  # type: ignore[attr-defined]
        del it
        if thread == "user":
            gc.collect()
        elif thread == "collator":
            collator._post(gc.collect)
        else:
            on_copied = collator.feed._on_copied

            def collect_garbage(batch_id: int) -> None:
                on_copied(batch_id)
                gc.collect()

            collator.feed._on_copied = collect_garbage
            with contextlib.suppress(ClosedError):  # it has been collected already
                taken = collator.feed.take(PATIENCE)
                assert taken is not None
                collator.advance(yielded=(taken.batch_id, 1), request=True)
        del collator
        until(lambda: not any(map(alive, pids)))
        until(lambda: not any(t.is_alive() for t in threads))
    finally:
        gc.enable()


def test_close_twice_and_use_afterwards() -> None:
    it = make()
    batch = next(it)
    before = batch.state.obs.clone()
    it.close()
    begin = time.monotonic()
    it.close()
    assert time.monotonic() - begin < 0.1
    assert (batch.state.obs == before).all()
    for call in (lambda: next(it), it.publish):
        with pytest.raises(ClosedError, match="was closed; make a new one"):
            call()
    stats = it.stats()
    assert stats["batches"] == 1
    assert stats["losses"] == {}


def test_close_at_once() -> None:
    for wait in (0.0, 0.3):
        it = make()
        time.sleep(wait)  # into the start-up
        begin = time.monotonic()
        it.close()
        assert time.monotonic() - begin < 5.5


def test_close_from_another_thread_while_next_waits() -> None:
    with rolling(stamps(slow=1000)) as it, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, it)
        until(lambda: kids(it))
        assert not waiting.done()
        it.close()
        with pytest.raises(ClosedError, match="was closed; make a new one"):
            waiting.result(PATIENCE)


def test_close_from_several_threads_at_once() -> None:
    """Whoever returns from it finds it closed."""
    it = make()
    next(it)
    pids = everything(it)
    barrier = threading.Barrier(4)

    def close() -> list[int]:
        barrier.wait(PATIENCE)
        it.close()
        return [pid for pid in pids if alive(pid)]

    with ThreadPoolExecutor(4) as pool:
        left = [done.result(PATIENCE) for done in [pool.submit(close) for _ in range(4)]]
    assert left == [[], [], [], []]


def test_close_in_a_signal_handler_that_interrupts_a_close() -> None:
    it = make()
    next(it)
    pids = everything(it)
    old = signal.signal(signal.SIGUSR1, lambda *_: it.close())
    striker = threading.Timer(0.005, os.kill, (os.getpid(), signal.SIGUSR1))
    striker.start()
    try:
        it.close()
        striker.join()
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert not any(map(alive, pids))


def test_an_interrupted_close_can_be_repeated() -> None:
    for _ in range(2):
        it = make()
        next(it)
        pids = everything(it)
        with Interrupts(PipelineRollout.close, 0.01) as interrupts:
            while not interrupts.n_struck and it._closer.alive:
                with contextlib.suppress(KeyboardInterrupt):
                    it.close()
        it.close()
        assert not any(map(alive, pids))


def test_stats_while_it_is_closed() -> None:
    it = make()
    next(it)
    stop = threading.Event()

    def ask() -> list[dict[str, Any]]:
        found = [it.stats()]
        while not stop.is_set():
            found.append(it.stats())
        return [*found, it.stats()]

    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(ask) for _ in range(2)]
        it.close()
        stop.set()
        for answers in (done.result(PATIENCE) for done in asked):
            assert all({"version", "fragments", "batches"} <= set(answer) for answer in answers)


class Interrupts:
    """Ctrl-C after random delays of up to `most` seconds, from another process: a thread of this one would have to hold
    the GIL for it, and never strike between two lines. Without effect where it does not strike inside of `function`."""

    PROGRAM = (
        "import os, random, signal, sys, time\n"
        "while os.getppid() == int(sys.argv[1]):\n"
        "    time.sleep(random.uniform(0, float(sys.argv[2])))\n"
        "    os.kill(int(sys.argv[1]), signal.SIGINT)"
    )

    def __init__(self, function: Any, most: float) -> None:
        self.inside, self.most = function.__code__, most
        self.n_struck = 0
        self.over = False

    def __enter__(self) -> Interrupts:
        self.old = signal.signal(signal.SIGINT, self.strike)
        command = [sys.executable, "-S", "-E", "-c", self.PROGRAM, str(os.getpid()), str(self.most)]
        self.process = subprocess.Popen(command)
        return self

    def strike(self, signum: int, frame: FrameType | None) -> None:
        while frame is not None and not self.over:
            if frame.f_code is self.inside:
                self.n_struck += 1
                raise KeyboardInterrupt
            frame = frame.f_back

    def __exit__(self, *_: object) -> None:
        self.over = True
        self.process.kill()
        self.process.wait()
        signal.signal(signal.SIGINT, self.old)


@pytest.mark.parametrize("max_lag", [None, 0, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("n", [150, pytest.param(5000, marks=[pytest.mark.long, pytest.mark.timeout(300)])])
def test_ctrl_c_inside_next_and_going_on(monkeypatch: pytest.MonkeyPatch, max_lag: int | None, n: int) -> None:
    """Wherever it strikes, the next call goes on; what was about to be returned may be lost, nothing else."""
    impatient(monkeypatch)
    ledger = Ledger()
    with rolling(stamps(), max_lag=max_lag) as it:
        drive(it, ledger, lambda: len(ledger.from_stamps) == 2)
        with Interrupts(PipelineRollout.__next__, 1e-3) as interrupts:
            while interrupts.n_struck < n:
                with contextlib.suppress(KeyboardInterrupt):
                    while True:
                        ledger.check(next(it))
        for _ in range(20):
            batch = ledger.check(next(it))
            assert max_lag is None or max(batch.lag) <= max_lag
        assert audit(it)["losses"] == {}
