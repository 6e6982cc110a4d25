"""What a worker makes of what it hears, without processes and sockets."""

from __future__ import annotations

import contextlib
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from tests.toys import RandomActor
from zrl.collect.build import CollectOptions, build
from zrl.collect.collect import collect
from zrl.data.fragment import Slot
from zrl.errors import EnvError, ProcessError
from zrl.nodes.page import Page
from zrl.nodes.worker import BYE_TIMEOUT, _Worker
from zrl.protocol import messages as m
from zrl.protocol.peers import LEAST_RATE
from zrl.protocol.restarts import Restarts

RUN, ME = b"R" * 16, b"W" * 16


class Told:
    """A link over which these messages come."""

    def __init__(self, *messages: m.Message) -> None:
        self._messages = list(messages)

    def receive(self, timeout: float) -> m.Message | None:
        return self._messages.pop(0) if self._messages else None


class Job:
    run_id, incarnation = RUN, ME

    def __init__(self) -> None:
        self.rebuilds = Restarts(3, first_delay=0.0)


@contextlib.contextmanager
def worker(*told: m.Message) -> Any:
    job: Any = Job()
    link: Any = Told(*told)
    with contextlib.ExitStack() as opened, Page.create(ME) as page:
        yield _Worker(job, page, link, opened)


def test_why_a_learner_refuses_is_shown_escaped() -> None:
    with (
        worker(m.Reject(RUN, ME, "spec", "\x1b]0;title\x07\nnext", False, "")) as it,
        pytest.raises(ProcessError) as no,
    ):
        it._answer(m.Attached, 1.0)
    assert str(no.value) == r"the learner refused this worker (spec): \x1b]0;title\x07\nnext"


def test_a_slot_that_is_not_there_is_not_granted() -> None:
    with worker(*(m.Release(RUN, ME, slot, 1) for slot in (2, 65534, 1))) as it:
        it._n_slots = 2
        grant = it._next_grant()
        assert grant is not None
        assert grant.slot == 1
        assert it.page.read().releases == 3


class Depends(gym.Env[Any, Any]):
    """On something that all of them share: those that were made before it went are broken."""

    gone: set[int]
    resets: list[tuple[int, int | None]]

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        self.action_space = gym.spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        Depends.resets.append((id(self), seed))
        return self.observe(), {}

    def step(self, action: Any) -> Any:
        return self.observe(), 0.0, False, False, {}

    def observe(self) -> Any:
        if id(self) in Depends.gone:
            raise ValueError("what it depends on is gone")
        return np.zeros(2, np.float32)


def collecting(n: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Slot]:
    monkeypatch.setattr(Depends, "gone", set(), raising=False)
    monkeypatch.setattr(Depends, "resets", [], raising=False)
    ctx = build(Depends, RandomActor(3), CollectOptions(n_steps=2, n_columns=n))
    slot = Slot(ctx.spec)
    collect(ctx, slot)
    return ctx, slot


@pytest.mark.filterwarnings("ignore:environment .* is made anew")
def test_all_environments_that_have_failed_are_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one fails when the first one has been replaced, in the reset of both."""
    ctx, slot = collecting(2, monkeypatch)
    before = list(ctx.columns._envs)
    Depends.gone.update(map(id, before))
    Depends.resets.clear()
    with worker() as it:
        it._seq = 1
        assert not it._collected(ctx, slot, debug=False)
        assert it._rebuilt == 2
        assert not it._is_broken
        assert not set(map(id, ctx.columns._envs)) & set(map(id, before))
        seeds = [seed for _, seed in Depends.resets]
        assert len({id(env) for env in ctx.columns._envs}) == 2
        assert None not in [seed for who, seed in Depends.resets if who not in Depends.gone]
        assert len(set(seeds) - {None}) == 2  # each its own
        assert it._collected(ctx, slot, debug=False)


@pytest.mark.filterwarnings("ignore:environment .* is made anew")
def test_environments_that_take_turns_to_fail_are_not_made_anew_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx, slot = collecting(5, monkeypatch)
    turns = 0

    def fails_in_turn(*_: Any) -> None:
        nonlocal turns
        turns += 1
        raise EnvError("its licence went to another", env_index=turns % 5, phase="step")

    monkeypatch.setattr("zrl.nodes.worker.collect", fails_in_turn)
    with worker() as it:
        it._seq = 1
        for _ in range(3 + 5):
            assert not it._collected(ctx, slot, debug=False)
        with pytest.raises(EnvError, match="its licence"):
            it._collected(ctx, slot, debug=False)
        it._rebuilt = 0  # as after a fragment that was delivered
        assert not it._collected(ctx, slot, debug=False)


def test_what_fails_while_it_leaves_does_not_keep_it_from_saying_bye(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM to all processes of a host ends those of an AsyncVectorEnv at once."""
    ctx, slot = collecting(2, monkeypatch)
    Depends.gone.update(map(id, ctx.columns._envs))

    def refuses() -> None:
        raise BrokenPipeError

    monkeypatch.setattr(ctx.columns, "close", refuses)
    with worker() as it:
        it._told_to_leave = True
        assert not it._collected(ctx, slot, debug=False)
        it._close(ctx.columns)
        it._is_broken = False
        with pytest.raises(BrokenPipeError):
            it._close(ctx.columns)


@pytest.mark.parametrize("on_the_wire", [0, 10 * LEAST_RATE])
def test_the_answer_to_bye_is_waited_for_behind_all_payloads(on_the_wire: int) -> None:
    waited: list[float] = []
    with worker(m.ByeAck(RUN, ME)) as it:
        receive = it.link.receive
        it.link.send = lambda message: waited.clear()

        def timed(timeout: float) -> m.Message | None:
            waited.append(timeout)
            return receive(timeout)  # type: ignore[no-any-return]

        it.link.receive = timed
        it._leave(on_the_wire)
    assert waited == [pytest.approx(BYE_TIMEOUT + on_the_wire / LEAST_RATE, abs=1.0)]
