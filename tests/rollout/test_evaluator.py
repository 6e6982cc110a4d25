"""Evaluation beside training, in a real process: what it finds, and that the learner neither waits nor fails."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.toys import CountingEnv, DrawingEnv, SpoiltEnv
from zrl import ActorError, BaseActorModule, ClosedError, ConfigError
from zrl.rollout.evaluator import Evaluation, Evaluator
from zrl.zoo import MLPActor

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

PATIENCE = 40.0  # seconds for what takes none, or the imports of a fresh interpreter, on a busy machine


class Paying(CountingEnv):
    """Pays the action."""

    def step(self, action: Any) -> Any:
        obs, _, terminated, truncated, info = super().step(action)
        return obs, float(action), terminated, truncated, info


class PayingMore(DrawingEnv):
    """Pays the action on top."""

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward + 10.0 * action, terminated, truncated, info


class Gated(Paying):
    """Says who steps it, in the file ``pid``, and does not go on while there is a file ``gate``."""

    def __init__(self, folder: Path) -> None:
        super().__init__(limit=2)
        self.folder = folder

    def step(self, action: Any) -> Any:
        write(self.folder / "pid", str(os.getpid()))
        while (self.folder / "gate").exists():
            time.sleep(0.002)
        return super().step(action)


class Constant(BaseActorModule):
    """Does what its weight says, in eval mode."""

    def __init__(self, action: int = 1) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(float(action)))

    def forward(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None) -> Any:
        return (self.weight * (not self.training) + 0 * rew).long(), (), {"value": rew}

    def become(self, action: int) -> None:
        with torch.no_grad():
            self.weight.fill_(action)


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.rename(path)


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (result := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
    return result


def playing(folder: Path) -> int:
    """The pid of the process that stands before the gate, as soon as it does."""
    until((folder / "pid").exists)
    pid = int((folder / "pid").read_text())
    (folder / "pid").unlink()
    return pid


def counts(evaluator: Evaluator) -> dict[str, int]:
    stats = evaluator.stats()
    assert stats["submitted"] == stats["evaluated"] + stats["skipped"] + stats["waiting"]
    return {name: stats[name] for name in ("evaluated", "skipped", "waiting", "replaced")}


def summary(evaluations: list[Evaluation]) -> list[tuple[int, float]]:
    return [(e.tag, e.mean) for e in evaluations]


def test_figures_of_an_evaluation() -> None:
    evaluation = Evaluation(7, 1, (1.0, 2.0, 6.0), (1, 2, 6), 0, 0.5)
    assert (evaluation.mean, evaluation.minimum) == (3.0, 1.0)
    assert evaluation.std == pytest.approx((14 / 3) ** 0.5)


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_returns_by_arithmetic(start_method: Any) -> None:
    """Five episodes in two environments, a short and an endless one: three there, two here; of the weights submitted,
    in eval mode, though the learner's actor is wrapped and trains. Its random states are left alone."""
    number = itertools.count()

    def factory() -> Paying:
        return Paying(limit=(2, None)[next(number) % 2])

    actor = Constant()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    wrapped = torch.nn.DataParallel(actor)
    with Evaluator(factory, wrapped, n_episodes=5, n_envs=2, longest=6, start_method=start_method) as evaluator:
        assert evaluator.wait(0.0)  # for nothing
        for tag, action in ((100, 2), (200, 4)):
            actor.become(action)
            evaluator.submit(tag)
            actor.become(0)
            assert evaluator.wait(PATIENCE)
        first, second = evaluator.results()
        assert evaluator.results() == []
        stats = evaluator.stats()
    assert (first.tag, first.version, first.n_cut, first.lengths) == (100, 1, 2, (2, 2, 2, 6, 6))
    assert first.returns == (4.0, 4.0, 4.0, 12.0, 12.0)
    assert (second.tag, second.version, second.returns) == (200, 2, (8.0, 8.0, 8.0, 24.0, 24.0))
    assert (stats["episodes"], stats["env_steps"], stats["stopped"]) == (10, 36, "")
    assert stats["seconds"] == first.seconds + second.seconds > 0
    assert wrapped.training
    assert actor.training
    assert actor.weight.requires_grad
    assert (torch.get_rng_state() == states[0]).all()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]  # type: ignore[index]


def test_equal_weights_give_equal_returns() -> None:
    """Though environments draw from everywhere. And an evaluator that nobody holds any more is closed."""
    torch.manual_seed(1)
    env = PayingMore()
    actor = MLPActor(env.observation_space, env.action_space)
    evaluator = Evaluator(PayingMore, actor, n_episodes=5, n_envs=2, seed=3)
    kept = {name: x.clone() for name, x in actor.state_dict().items()}
    for tag in range(3):
        if tag == 1:
            for x in actor.parameters():
                x.data.neg_()
        if tag == 2:
            actor.load_state_dict(kept)
        evaluator.submit(tag)
        assert evaluator.wait(PATIENCE)
    one, other, again = evaluator.results()
    assert len(set(one.returns)) == 5
    assert one.returns == again.returns != other.returns
    assert one.lengths == again.lengths
    del evaluator
    gc.collect()  # the rest is held by conftest


def test_the_newest_wins_and_the_learner_never_waits(tmp_path: Path) -> None:
    actor = Constant()
    (tmp_path / "gate").touch()
    with Evaluator(lambda: Gated(tmp_path), actor, n_episodes=2, n_envs=1) as evaluator:
        evaluator.submit(1)
        pid = playing(tmp_path)
        assert os.getpriority(os.PRIO_PROCESS, pid) > os.getpriority(os.PRIO_PROCESS, 0)
        begun = time.monotonic()
        for tag in (2, 3, 4):
            actor.become(tag)
            evaluator.submit(tag)
            assert evaluator.results() == []
        assert counts(evaluator) == {"evaluated": 0, "skipped": 0, "waiting": 4, "replaced": 0}
        assert not evaluator.wait(0.01)
        assert time.monotonic() - begun < 1.0
        (tmp_path / "gate").unlink()
        assert evaluator.wait(PATIENCE)
        assert summary(evaluator.results()) == [(1, 2.0), (4, 8.0)]
        assert counts(evaluator) == {"evaluated": 2, "skipped": 2, "waiting": 0, "replaced": 0}
        playing(tmp_path)
        (tmp_path / "gate").touch()
        evaluator.submit(5)
        playing(tmp_path)
        begun = time.monotonic()
    assert time.monotonic() - begun < 2.0
    assert not Path(f"/proc/{pid}").exists()


def test_a_killed_evaluator_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As often as there is an evaluation in between: four times here, where four in a row would be too many."""
    actor = Constant()
    with Evaluator(lambda: Gated(tmp_path), actor, n_episodes=2, n_envs=1) as evaluator:
        for tag in range(1, 5):
            (tmp_path / "gate").touch()
            actor.become(tag)
            evaluator.submit(tag)
            os.kill(playing(tmp_path), signal.SIGKILL)
            (tmp_path / "gate").unlink()
            assert evaluator.wait(PATIENCE)
            assert summary(evaluator.results()) == [(tag, 2.0 * tag)]
            playing(tmp_path)
        assert counts(evaluator) == {"evaluated": 4, "skipped": 0, "waiting": 0, "replaced": 4}
    assert caplog.records == []


def test_one_that_stands_still_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "gate").touch()
    log = tmp_path / "logs"
    with Evaluator(
        lambda: Gated(tmp_path), Constant(), n_episodes=2, n_envs=1, stall_timeout=0.2, log_dir=log
    ) as evaluator:
        evaluator.submit(1)
        until(lambda: counts(evaluator)["replaced"])
        (tmp_path / "gate").unlink()
        assert evaluator.wait(PATIENCE)
        assert summary(evaluator.results()) == [(1, 2.0)]
    assert "Current thread" in (log / "evaluator.log").read_text()  # its stacks
    assert "in step" in (log / "evaluator.log").read_text()


def no_such_map(_: Any) -> Any:
    raise OSError("no such map")


def test_failures_end_evaluations_and_not_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Evaluator(lambda: SpoiltEnv(1, no_such_map), Constant(), log_dir=tmp_path) as evaluator:
        evaluator.submit(1)
        assert not evaluator.wait(PATIENCE)
        evaluator.submit(2)
        assert not evaluator.wait(PATIENCE)
        assert evaluator.results() == []
        assert counts(evaluator) == {"evaluated": 0, "skipped": 2, "waiting": 0, "replaced": 3}
        stopped = evaluator.stats()["stopped"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    message = caplog.records[0].getMessage()
    assert stopped in message
    assert "4 times in a row" in stopped
    assert "EnvError: environment 0, step: step(1) raised OSError: no such map" in stopped
    assert str(tmp_path / "evaluator.log") in message
    assert (tmp_path / "evaluator.log").read_text().count("EnvError: environment 0") == 4


def test_the_end_of_the_process_that_starts_it(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with Evaluator(Paying, Constant(), log_dir=tmp_path) as evaluator:
        evaluator.submit(1)
        os.kill(evaluator._host._zygote.process.pid, signal.SIGKILL)
        assert not evaluator.wait(PATIENCE)
        assert "the zygote ended with signal 9" in evaluator.stats()["stopped"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_closed() -> None:
    """At once, while it still imports, and twice."""
    evaluator = Evaluator(Paying, Constant())
    evaluator.submit(1)
    begun = time.monotonic()
    evaluator.close()
    evaluator.close()
    assert time.monotonic() - begun < 4.0
    with pytest.raises(ClosedError):
        evaluator.submit(2)
    assert evaluator.results() == []
    assert not evaluator.wait(PATIENCE)
    assert counts(evaluator)["waiting"] == 1


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("n_episodes", 0),
        ("n_envs", 0),
        ("longest", 1.5),
        ("seed", -1),
        ("start_method", "inline"),
        ("device", "cuda:99"),
        ("start_timeout", 0),
        ("stall_timeout", "a minute"),
    ],
)
def test_bad_arguments(argument: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=argument):
        Evaluator(Paying, Constant(), **{argument: value})


def test_bad_factories_and_actors() -> None:
    unusable: Any = Paying()
    with pytest.raises(ConfigError, match="factory"):
        Evaluator(unusable, Constant())
    with pytest.raises(ActorError):
        Evaluator(Paying, torch.nn.Linear(3, 5))
    lock = threading.Lock()
    with pytest.raises(ConfigError, match="cannot be sent"):
        Evaluator(lambda: Paying(limit=int(lock.locked())), Constant())
