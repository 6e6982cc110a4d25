"""A run that is resumed goes on as if it had never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.test_loop import config
from zrl import Batch
from zrl.config import TrainConfig
from zrl.errors import PreflightError
from zrl.train import checkpoint, loop
from zrl.train.loop import Start, train
from zrl.train.rollouts import Rollout, entropy_of, make_rollout


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


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = checkpoint.load(path)["weights"]
    return weights


@pytest.mark.parametrize("algo", ["ppo", "a2c"])
def test_the_next_update_is_the_one_that_would_have_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algo: str
) -> None:
    """Bit for bit, given the same batches: weights, moments of the optimizer, learning rate, order of minibatches."""
    tape: list[Batch] = []
    c = config(tmp_path, algo=algo, workers=0, steps=512, checkpoint_every=64, keep=100, minibatch=32)
    monkeypatch.setattr(loop, "make_rollout", lambda *args, **kw: Tape(make_rollout(*args, **kw), tape))
    whole = train(c)
    saved = sorted(whole.run.checkpoints.glob("step_*.pt"))
    assert len(saved) == len(tape) == 8
    expected = {path.name: weights_of(path) for path in saved}
    for path in saved[4:]:
        path.unlink()
    del tape[:4]  # those that were learnt from already
    torch.rand(17)
    resumed = train(c, resume=whole.run)
    assert resumed.run.path == whole.run.path
    for path in saved[4:]:
        weights = weights_of(path)
        assert all(torch.equal(weights[name], x) for name, x in expected[path.name].items()), path.name
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
