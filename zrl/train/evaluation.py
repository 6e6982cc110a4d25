"""Playing what a run has learnt."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from zrl.collect.actor import BaseActorModule
from zrl.collect.evaluate import evaluate
from zrl.config import TrainConfig
from zrl.errors import CheckpointError
from zrl.train import checkpoint
from zrl.train.named import EnvFactory
from zrl.train.run_folder import RunFolder
from zrl.train.setup import make_actor

LONGEST_EPISODE = 27_000  # steps of an evaluation: half an hour of a game at 60 frames a second, four to a step


def evaluate_run(run: RunFolder, episodes: int, *, seed: int | None = None) -> tuple[Path, list[float]]:
    """Play a run's newest checkpoint greedily, one episode in each of `episodes` environments; gives their returns.

    Episodes are cut at `LONGEST_EPISODE` steps.

    Raises:
        CheckpointError: no checkpoint can be read, or it does not fit the actor.
        EnvError, ActorError, ConfigError: environment or actor cannot be made.
    """
    config = run.config()
    path, state = checkpoint.newest(run.checkpoints)
    actor = load_actor(config, state, path)
    factory = EnvFactory(config.env)
    with contextlib.ExitStack() as opened:
        envs = [opened.enter_context(contextlib.closing(factory())) for _ in range(episodes)]
        rewards = evaluate(envs, actor, n_steps=LONGEST_EPISODE, seed=seed)
    return path, [float(x) for x in np.sum(rewards, axis=0)]


def load_actor(config: TrainConfig, state: dict[str, Any], path: Path) -> BaseActorModule:
    """The actor of a run in eval mode, with the weights of a checkpoint."""
    actor = make_actor(config)
    try:
        actor.load_state_dict(state["weights"])
    except RuntimeError as e:
        raise CheckpointError(f"{str(path)!r} does not fit the actor of {config.env}: {e}") from e
    return actor.eval()
