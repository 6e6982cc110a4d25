"""PPO with continuous actions: a Gaussian policy and running normalisation of observations, written out.

    python scripts/example_mujoco.py [--env InvertedPendulum-v5] [--steps 100000] [--goal 900]

Needs MuJoCo: pip install 'zrl[mujoco]'; any other environment with Box actions will do too, such as Pendulum-v1. What
there is to see about the contract of actors:

- An info with ``mean`` and ``log_std`` is all that `zrl.algo` needs to know the density of a diagonal Gaussian.
- Actions are recorded as they were sampled, and clipped to the action space on their way into the environment: the
  density of what was sampled stays that of the policy.
- Observations are recorded raw. What normalises them are buffers of the actor, which travel to the workers with the
  weights, and which the learner alone updates, from what was recorded. With ``max_lag=0`` a batch is made and learnt
  from with the same ones.

Two cores balance the pendulum for 900 of 1,000 steps within a minute or two.
"""

from __future__ import annotations

import argparse
import functools
from collections import deque
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn

import zrl
from zrl import algo
from zrl.rollout import multi


class GaussianActor(zrl.BaseActorModule):
    """Perceptrons for mean and value; the logarithm of the standard deviation does not depend on the observation."""

    obs_mean: Tensor
    obs_var: Tensor
    obs_count: Tensor

    def __init__(self, n_obs: int, n_act: int, size: int = 64) -> None:
        super().__init__()
        # of all observations so far; in float64, where a long run's sums stay exact enough
        self.register_buffer("obs_mean", torch.zeros(n_obs, dtype=torch.float64))
        self.register_buffer("obs_var", torch.ones(n_obs, dtype=torch.float64))
        self.register_buffer("obs_count", torch.zeros((), dtype=torch.float64))
        self.policy = nn.Sequential(nn.Linear(n_obs, size), nn.Tanh(), nn.Linear(size, size), nn.Tanh())
        self.to_mean = nn.Linear(size, n_act)
        self.log_std = nn.Parameter(torch.zeros(n_act))
        self.baseline = nn.Sequential(
            nn.Linear(n_obs, size), nn.Tanh(), nn.Linear(size, size), nn.Tanh(), nn.Linear(size, 1)
        )
        with torch.no_grad():
            self.to_mean.weight.mul_(0.01)  # small actions at the start

    def forward(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None) -> tuple[Any, Any, Any]:
        x = ((obs - self.obs_mean) / (self.obs_var + 1e-8).sqrt()).clamp(-10, 10).float()
        mean = self.to_mean(self.policy(x))
        log_std = self.log_std.expand_as(mean)
        actions = torch.normal(mean, log_std.exp()) if self.training else mean
        return actions, (), {"value": self.baseline(x).squeeze(-1), "mean": mean, "log_std": log_std}

    @torch.no_grad()
    def observe(self, obs: Tensor) -> None:
        """Add observations ``[n, n_obs]`` to mean and variance (Chan, Golub and LeVeque 1983, for two samples)."""
        self.obs_count += len(obs)
        share = len(obs) / self.obs_count
        shift = obs.double().mean(0) - self.obs_mean
        spread = obs.double().var(0, unbiased=False) + (1 - share) * shift.square()
        self.obs_var += share * (spread - self.obs_var)
        self.obs_mean += share * shift


def update(batch: zrl.Batch, actor: GaussianActor, optimizer: torch.optim.Optimizer) -> None:
    """Ten passes of PPO over the batch; then, for the next one, the statistics of its observations."""
    extra = algo.advantages(batch, gamma=0.99, lam=0.95)
    for _ in range(10):
        for part in batch.minibatches(64, by="step", extra=extra):
            loss, _ = algo.ppo(part, actor, c_entropy=0.0)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(actor.parameters(), 0.5)
            optimizer.step()
    actor.observe(batch.state.obs[:-1][batch.mask])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--env", default="InvertedPendulum-v5", help="a Gymnasium id; observations and actions are vectors"
    )
    parser.add_argument("--steps", type=int, default=100_000, help="of the environments, at most")
    parser.add_argument("--goal", type=float, default=900.0, help="mean return of 20 episodes at which to stop")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--n-steps", type=int, default=128, help="of each fragment")
    parser.add_argument("--start-method", choices=("fork", "spawn", "inline"), default="fork")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    make_env = functools.partial(gym.make, args.env)
    env: gym.Env[Any, Any] = make_env()
    actor = GaussianActor(gym.spaces.flatdim(env.observation_space), gym.spaces.flatdim(env.action_space))
    env.close()
    optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3)
    returns: deque[float] = deque(maxlen=20)
    steps = 0
    with multi.rollout(
        make_env,
        actor,
        n_steps=args.n_steps,
        n_actors=args.workers,
        n_per_actor=4,
        n_buffers=args.workers,
        n_per_batch=args.workers,
        max_lag=0,  # PPO wants fragments of the newest weights
        entropy=args.seed,
        start_method=args.start_method,
    ) as rollout:
        for batch in rollout:
            update(batch, actor, optimizer)
            steps += batch.n_env_steps
            returns.extend(episode.ret for episode in batch.episodes)
            mean = sum(returns) / max(1, len(returns))
            print(f"{steps:7,} steps: mean return {mean:7.1f} of the last {len(returns)} episodes", flush=True)
            if steps >= args.steps or (len(returns) == 20 and mean >= args.goal):
                break


if __name__ == "__main__":
    main()
