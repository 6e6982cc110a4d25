"""zrl: `zrl.rollout.multi` with two workers, fully asynchronous (PPO: ``max_lag=0``), two slots each, through its
public interface, with the actors of `zrl.zoo`. They sample by `algo.categorical`, which is the Gumbel-max trick.

Pong's frames are made by Gymnasium's wrappers as for everybody; with `frames` by `zoo.AtariFrames`, the same to the
bit. With `numpy` perceptron and GRU act by NumPy; with `affinity`
workers stay on one core each. "Solve" is ``zrl train`` with its defaults.
"""

from __future__ import annotations

import functools
import tempfile
import time
from typing import Any

import torch
from torch import Tensor, nn

from bench_peers import learn, nets
from bench_peers.window import Window
from bench_peers.work import GOAL, Work, factory, make_env, make_pool
from zrl import BaseActorModule, algo, zoo
from zrl.rollout import multi


def actor_of(work: Work, *, numpy: bool = False) -> BaseActorModule:
    """The actor of `zrl.zoo` that is the network of `nets`."""
    env = make_env(work.env)
    spaces = env.observation_space, env.action_space
    env.close()
    if work.env == "pong":
        return zoo.CNNActor(*spaces)
    if work.env == "minigrid":
        return zoo.GRUActor(*spaces, numpy=numpy)
    return zoo.MLPActor(*spaces, hidden=(nets.N_FEATURES[work.env],) * 2, shared=True, activation=nn.ReLU, numpy=numpy)


def pool_of(work: Work) -> Any:
    """Makes the EnvPool of one worker."""

    def make(seed: Any = 1) -> Any:
        return make_pool(work, work.n_envs, 1, seed)

    return make


def run(work: Work, window: Window, *, frames: bool = False, numpy: bool = False, affinity: bool = False) -> None:
    env = pool_of(work) if work.pool else functools.partial(zoo.make_atari) if frames else factory(work.env)
    actor = actor_of(work, numpy=numpy)
    update = Update(actor, work.update)
    with multi.rollout(
        env,
        actor,
        n_steps=work.n_steps,
        n_actors=work.workers,
        n_per_actor=work.n_envs,
        n_buffers=2 * work.workers,
        n_per_batch=work.workers,
        max_lag=0 if work.update == "ppo" else None,
        affinity=affinity,
        entropy=1,
    ) as rollout:
        for batch in rollout:
            update(batch)
            if window.delivered(batch.n_env_steps):
                break


class Update:
    """What follows each batch, with the losses of `zrl.algo` and the numbers of `learn`."""

    def __init__(self, actor: BaseActorModule, update: str) -> None:
        self._actor = actor
        self._update = {"": self._none, "a2c": self._a2c, "ppo": self._ppo}[update]
        self._optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3, eps=1e-5, fused=True)

    def __call__(self, batch: Any) -> None:
        self._update(batch)

    def _none(self, batch: Any) -> None:
        float(batch.state.rew[-1, -1])

    def _a2c(self, batch: Any) -> None:
        self._step(algo.a2c(batch, self._actor, gamma=learn.GAMMA, lam=learn.LAM, c_entropy=0.005)[0])

    def _ppo(self, batch: Any) -> None:
        extra = algo.advantages(batch, gamma=learn.GAMMA, lam=learn.LAM)
        for _ in range(learn.EPOCHS):
            for part in batch.minibatches(learn.MINIBATCH, by="step", extra=extra):
                self._step(algo.ppo(part, self._actor, gamma=learn.GAMMA, clip=learn.CLIP, c_entropy=0.005)[0])

    def _step(self, loss: Tensor) -> None:
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._actor.parameters(), 0.5)
        self._optimizer.step()


def solve(seed: int) -> tuple[int | None, float, float]:
    from zrl.config import TrainConfig
    from zrl.train.loop import train

    times: list[float] = []

    with tempfile.TemporaryDirectory() as runs:
        config = TrainConfig(
            algo="ppo", steps=150_000, seed=seed, stop_at_return=GOAL, eval_episodes=0, threads=1, runs=runs
        )
        result = train(config, on_update=lambda status: times.append(time.perf_counter()))
    assert result.status is not None
    return (result.status.step if result.outcome == "goal" else None), times[0], times[-1]
