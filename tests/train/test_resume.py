"""A run that is resumed goes on as if it had never stopped."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.test_loop import config
from zrl import Batch
from zrl.config import TrainConfig
from zrl.errors import PreflightError
from zrl.train import checkpoint, loop
from zrl.train.loop import Start, seed_everything, train
from zrl.train.rng import random_states
from zrl.train.rollouts import Rollout, entropy_of, make_rollout
from zrl.train.run_folder import RunFolder
from zrl.train.stop import StopSignals


class Tape:
    """A collector that plays batches from a tape; where it ends, the real one's, which it records."""

    def __init__(self, rollout: Rollout, tape: list[Batch]) -> None:
        self._rollout, self._tape = rollout, tape
        self.at = 0

    def __next__(self) -> Batch:
        self.at += 1
        if self.at > len(self._tape):
            self._tape.append(next(self._rollout).clone())
        elif self.at > 1:
            self._rollout.publish()  # type: ignore[attr-defined]
        return self._tape[self.at - 1].clone()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rollout, name)

    def __enter__(self) -> Tape:
        return self

    def __exit__(self, *_: object) -> None:
        self._rollout.close()


def learnt(path: Path) -> dict[str, Any]:
    """What an update changes, as a checkpoint has it."""
    saved = checkpoint.load(path)
    return {name: saved[name] for name in ("weights", "optimizer", "random", "step", "update")}


def same(a: Any, b: Any) -> bool:
    """Bit for bit, however nested."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("algo", ["ppo", "a2c"])
def test_what_was_saved_is_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algo: str) -> None:
    """When a resumed run wants its first batch: weights, optimizer, version, counters and random states."""
    c = config(tmp_path, algo=algo, workers=0, steps=256, checkpoint_every=64, minibatch=32)
    first = train(c)
    path, saved = checkpoint.newest(first.run.checkpoints)
    found: list[dict[str, Any]] = []

    class Looks(loop._Run):
        def _next(self) -> tuple[Batch | None, int | None]:
            if not found:
                state = {
                    "weights": self.actor.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "version": self.rollout.version,
                    "random": random_states(),
                }
                found.append({**copy.deepcopy(state), **self.progress.as_dict(time.monotonic())})
            return super()._next()

    monkeypatch.setattr(loop, "_Run", Looks)
    seed_everything(99)
    starts: list[Start] = []
    train(dataclasses.replace(c, steps=512), starts.append, resume=first.run)
    assert starts[0].resumed == path
    assert (starts[0].step, saved["step"], saved["update"]) == (256, 256, 4)
    (state,) = found
    assert len(saved["optimizer"]["state"]) == len(saved["weights"]), "moments of every weight"
    assert state.pop("version") == saved["version"] + 1, "no version is of two weights"
    assert state.pop("seconds") >= saved["seconds"]
    assert {"weights", "optimizer", "random", "step", "update", "episodes"} <= state.keys()
    for name, value in state.items():
        assert same(value, saved[name]), name


@pytest.mark.parametrize(
    ("algo", "workers"), [("ppo", 0), ("a2c", 0), ("ppo", 2), pytest.param("a2c", 2, marks=pytest.mark.long)]
)
def test_the_next_update_is_the_one_that_would_have_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algo: str, workers: int
) -> None:
    """Bit for bit, given the same batches: weights, moments of the optimizer, learning rate, order of minibatches."""
    tape: list[Batch] = []
    often = {"steps": 512, "checkpoint_every": 64, "keep": 100, "minibatch": 32}
    c = config(tmp_path, algo=algo, workers=workers, max_lag=0 if workers else None, **often)
    monkeypatch.setattr(loop, "make_rollout", lambda *args, **kw: Tape(make_rollout(*args, **kw), tape))
    whole = train(c)
    saved = sorted(whole.run.checkpoints.glob("step_*.pt"))
    assert len(saved) == len(tape) == 8
    expected = {path.name: learnt(path) for path in saved}
    for path in saved[4:]:
        path.unlink()
    del tape[:4]  # those that were learnt from already
    torch.rand(17)
    resumed = train(c, resume=whole.run)
    assert resumed.run.path == whole.run.path
    for path in saved[4:]:
        found = learnt(path)
        for name, value in expected[path.name].items():
            assert same(found[name], value), (path.name, name)
    rows = resumed.run.metrics()
    assert [row["update"] for row in rows] == list(range(1, 9))
    versions = [row["version"] for row in rows]
    assert versions == sorted(set(versions)), "versions only grow, over both parts"


def test_it_goes_on_from_the_newest_that_can_be_read(tmp_path: Path) -> None:
    c = config(tmp_path, workers=0, steps=256, checkpoint_every=64)
    first = train(c)
    torn = sorted(first.run.checkpoints.glob("step_*.pt"))[-1]
    torn.write_bytes(torn.read_bytes()[:1000])
    starts: list[Start] = []
    train(c, on_start=starts.append, resume=first.run)
    (start,) = starts
    assert (start.step, start.resumed and start.resumed.name) == (192, "step_000000000192.pt")
    assert len(start.skipped) == 1
    assert torn.name in start.skipped[0]
    assert checkpoint.newest(first.run.checkpoints)[1]["step"] == 256


def test_without_a_checkpoint_there_is_no_going_on(tmp_path: Path) -> None:
    c = config(tmp_path, workers=0, steps=64)
    first = train(c)
    for path in first.run.checkpoints.glob("step_*.pt"):
        path.write_bytes(b"nothing")
    with pytest.raises(PreflightError, match="none of the checkpoints can be read"):
        train(c, resume=first.run)
    assert len(first.run.metrics()) == 1


def test_more_steps_for_a_run_that_was_done(tmp_path: Path) -> None:
    first = train(config(tmp_path, workers=0, steps=128))
    longer = train(config(tmp_path, workers=0, steps=256), resume=first.run)
    assert longer.status is not None
    assert first.status is not None
    assert (longer.status.step, longer.status.update) == (256, 4)
    assert longer.status.seconds > first.status.seconds
    assert longer.run.config().steps == 256


def test_a_checkpoint_of_another_actor(tmp_path: Path) -> None:
    first = train(config(tmp_path, workers=0, steps=64))
    other = config(tmp_path, workers=0, steps=128, env="Acrobot-v1")
    with pytest.raises(PreflightError, match="does not fit this run"):
        train(other, resume=first.run)


def test_workers_of_a_resumed_run_draw_anew() -> None:
    c = TrainConfig(seed=5)
    assert entropy_of(c, 1) == 5
    assert len({entropy_of(c, version) for version in (1, 2, 3)}) == 3
    assert entropy_of(c, 2) == entropy_of(c, 2)


def test_a_resume_takes_the_best_score_from_beside_the_checkpoints(tmp_path: Path) -> None:
    """A run that was killed had it in memory alone, when its newest checkpoint was saved before that evaluation."""
    run = train(config(tmp_path, workers=0)).run
    newest, state = checkpoint.newest(run.checkpoints)
    assert state["eval_best"] is None
    checkpoint.name_best(newest, 123.0)
    with contextlib.ExitStack() as opened:
        signals = opened.enter_context(StopSignals())
        more = dataclasses.replace(run.config(), steps=10**6)
        it = loop._started(more, signals, None, run, opened)
        assert it._best_evaluation == 123.0


def test_nothing_of_a_run_is_read_while_another_process_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the last checkpoint of that one would pass for unreadable: newer than the newest that was read."""
    run = train(config(tmp_path, workers=0)).run
    later = checkpoint.path_of(run.checkpoints, 999_999)
    locked = RunFolder.locked

    @contextlib.contextmanager
    def after_a_last_save(self: RunFolder) -> Iterator[None]:
        shutil.copy(checkpoint.newest(run.checkpoints)[0], later)
        with locked(self):
            yield

    monkeypatch.setattr(RunFolder, "locked", after_a_last_save)
    with contextlib.ExitStack() as opened:
        signals = opened.enter_context(StopSignals())
        more = dataclasses.replace(run.config(), steps=10**6)
        it = loop._started(more, signals, None, run, opened)
        assert it.told.resumed == later
    assert not list(run.checkpoints.glob("*.unreadable"))
