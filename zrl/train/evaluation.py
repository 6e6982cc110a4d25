"""Playing what a run has learnt."""

from __future__ import annotations

import contextlib
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from zrl.collect.actor import BaseActorModule
from zrl.collect.evaluate import evaluate
from zrl.config import TrainConfig
from zrl.errors import CheckpointError, ConfigError
from zrl.train import checkpoint
from zrl.train.named import EnvFactory
from zrl.train.run_folder import RunFolder
from zrl.train.setup import make_actor
from zrl.train.video import Film, Filmed, fps_of, make_with_pictures

LONGEST_EPISODE = 27_000  # steps of an evaluation: half an hour of a game at 60 frames a second, four to a step
LINKS = ("best", "latest")  # beside the checkpoints, each names one of them


class Evaluation(NamedTuple):
    """What came of playing a checkpoint, one entry an episode.

    Attributes:
        checkpoint: the file; `returns`: undiscounted; `lengths`: in steps.
        cut: how many episodes had not ended when they were cut.
    """

    checkpoint: Path
    returns: list[float]
    lengths: list[int]
    cut: int

    @property
    def mean(self) -> float:
        return statistics.fmean(self.returns)

    @property
    def std(self) -> float:
        """Standard deviation of the sample; 0 for a single episode."""
        return statistics.stdev(self.returns) if len(self.returns) > 1 else 0.0


def evaluate_run(
    run: RunFolder,
    episodes: int,
    which: str = "",
    *,
    seed: int | None = None,
    video: Path | None = None,
    longest: int = LONGEST_EPISODE,
) -> Evaluation:
    """Play a checkpoint of a run greedily.

    One episode in each of `episodes` environments: with more where they are short, short ones would count more.

    Args:
        which: see `find_checkpoint`.
        seed: of the first environment, the next one for each further; unseeded, if None.
        video: file that the first episode is filmed into.
        longest: steps after which an episode is cut.

    Raises:
        CheckpointError: no such checkpoint, it cannot be read, or it does not fit the actor.
        EnvError, ActorError, ConfigError: environment or actor cannot be made.
        PreflightError, MissingExtraError: the environment cannot be filmed.
    """
    config = run.config()
    path, state = find_checkpoint(run.checkpoints, which)
    actor = load_actor(config, state, path)
    factory = EnvFactory(config.env, config.env_kwargs)
    with contextlib.ExitStack() as opened:
        envs = [_Episode(opened.enter_context(contextlib.closing(factory()))) for _ in range(episodes)]
        if video is not None:
            pictured = make_with_pictures(factory, list(envs[0].metadata.get("render_modes") or []))
            opened.enter_context(contextlib.closing(pictured))
            envs[0] = _Episode(Filmed(pictured, opened.enter_context(Film(video, fps_of(pictured)))))
        rewards = evaluate(envs, actor, n_steps=longest, seed=seed)
    returns = [float(x) for x in np.sum(rewards, axis=0)]
    return Evaluation(path, returns, [env.length for env in envs], sum(not env.ended for env in envs))


def split_run(text: str) -> tuple[Path, str]:
    """``RUN@WHICH`` as folder and checkpoint; a folder that has an @ in its name is meant as it is."""
    path, at, which = text.rpartition("@")
    return (Path(path), which) if at and not Path(text).is_dir() else (Path(text), "")


def find_checkpoint(folder: Path, which: str) -> tuple[Path, dict[str, Any]]:
    """A checkpoint and its path.

    Args:
        folder: of the checkpoints.
        which: ``best``, ``latest``, or the step that it was saved at; empty: the newest one that can be read.

    Raises:
        ConfigError: `which` is none of these.
        CheckpointError: no such checkpoint, or it cannot be read.
    """
    if not which:
        return checkpoint.newest(folder)
    if which in LINKS:
        path = folder / (folder / which).resolve().name
    elif (digits := which.replace("_", "").replace(",", "")).isdecimal():
        path = folder / f"step_{int(digits):012d}.pt"
    else:
        raise ConfigError(f"expected best, latest or a step behind the @, not {which!r}; {_those_there(folder)}")
    if not path.is_file():
        raise CheckpointError(f"{str(folder)!r}: there is no checkpoint {which}; {_those_there(folder)}")
    return path, checkpoint.load(path)


def _those_there(folder: Path) -> str:
    links = [f"{x} (step {_step_of((folder / x).resolve())})" for x in LINKS if (folder / x).is_file()]
    names = links + [str(_step_of(path)) for path in sorted(folder.glob("step_*.pt"))]
    return f"there are: {', '.join(names)}" if names else "there are none"


def _step_of(path: Path) -> int | str:
    """The step in a checkpoint's name; the name, if it is called otherwise."""
    step = path.stem.removeprefix("step_")
    return int(step) if step.isdecimal() else path.name


def load_actor(config: TrainConfig, state: dict[str, Any], path: Path) -> BaseActorModule:
    """The actor of a run in eval mode, with the weights of a checkpoint."""
    actor = make_actor(config)
    try:
        actor.load_state_dict(state["weights"])
    except RuntimeError as e:
        raise CheckpointError(f"{str(path)!r} does not fit the actor of {config.env}: {e}") from e
    return actor.eval()


class _Episode(gym.Wrapper[Any, Any, Any, Any]):
    """Counts the steps of one episode, and notes its end."""

    length = 0
    ended = False

    def step(self, action: Any) -> Any:
        result = self.env.step(action)
        _, _, terminated, truncated, _ = result
        self.length += 1
        self.ended = bool(terminated or truncated)
        return result
