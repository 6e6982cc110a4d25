"""A training loop in the manner of rlplay: an actor that explores by ε, recurrent or not, and an A2C of one's own.

    python scripts/example_seed_a2c.py [--epochs 10] [--lstm]

What differs from a notebook written for rlplay: the imports; ``obs[:-1]`` where it had ``obs[1:-1]``; ``final_value``
is passed to the returns, so that truncated episodes count for what they would have been worth; and means use
``batch.mask``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Generator
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import zrl
from zrl import algo
from zrl.rollout import same


def factory() -> gym.Env[Any, Any]:
    return gym.make("CartPole-v1")


class CartPoleActor(zrl.BaseActorModule):
    """Looks at the observation, the last action and the last reward; optionally with a recurrent core."""

    epsilon: Tensor

    def __init__(self, epsilon: float = 0.1, lstm: bool = False) -> None:
        super().__init__()
        self.lstm = lstm
        # a buffer follows the learner to whoever acts; a plain attribute would be frozen when the run starts
        self.register_buffer("epsilon", torch.tensor(epsilon))
        self.features = nn.ModuleDict(
            {
                "obs": nn.Sequential(nn.Linear(4, 64), nn.ReLU()),
                "act": nn.Embedding(2, 4),
                "rew": nn.Sequential(nn.Linear(1, 4), nn.ReLU()),
            }
        )
        n_features = 64 + 4 + 4
        self.core = nn.GRU(n_features, 64, 1) if lstm else nn.Sequential(nn.Linear(n_features, 64), nn.ReLU())
        self.policy = nn.Sequential(nn.Linear(64, 2), nn.LogSoftmax(dim=-1))
        self.baseline = nn.Linear(64, 1)

    def forward(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None) -> tuple[Any, Any, Any]:
        parts = [self.features["obs"](obs), self.features["act"](act), self.features["rew"](rew.unsqueeze(-1))]
        x: Any = torch.cat(parts, dim=-1)
        if not self.lstm:
            output, hx = self.core(x), ()
        else:
            n_steps = len(fin)
            if n_steps > 1:  # sticky fragments: a column is over at its first end behind row 0
                x = pack_padded_sequence(x, (1 + (~fin[1:]).sum(0)).cpu(), enforce_sorted=False)
            output, hx = self.core(x, hx)
            if n_steps > 1:
                output, _ = pad_packed_sequence(output, total_length=n_steps)
        logits = self.policy(output)
        info = {"value": self.baseline(output).squeeze(-1), "logits": logits}
        if not self.training:
            return logits.argmax(dim=-1), hx, info
        info["log_prob_all"] = algo.mix_uniform(logits.detach(), self.epsilon)
        return algo.categorical(info["log_prob_all"]), hx, info


def a2c(
    batch: zrl.Batch, module: CartPoleActor, *, gamma: float = 0.99, c_entropy: float = 1e-2, c_value: float = 0.25
) -> tuple[Tensor, dict[str, float]]:
    s, mask = batch.state, batch.mask
    _, _, info = module(s.obs[:-1], s.act[:-1], s.rew[:-1], s.fin[:-1], hx=batch.hx)
    returns = algo.returns(s.rew, s.fin, gamma=gamma, bootstrap=batch.bootstrap[0], final_value=batch.final_value)[1:]

    # π is the target policy, μ is the behaviour policy
    logits, actions = info["logits"], s.act[1:].unsqueeze(-1)
    log_pi = logits.gather(-1, actions).squeeze(-1)
    log_mu = batch.actor["log_prob_all"].gather(-1, actions).squeeze(-1)
    rho = (log_pi.detach() - log_mu).exp().clamp(max=1)

    adv = returns - info["value"]
    policy_score = (log_pi * adv.detach() * rho)[mask].mean()
    value_score = -adv.square()[mask].mean()
    entropy = -(logits.exp() * logits).sum(dim=-1)[mask].mean()
    objective = policy_score + c_entropy * entropy + c_value * value_score
    return -objective, {"policy": policy_score.item(), "value": value_score.item(), "entropy": entropy.item()}


def evaluations(
    factory: Callable[[], Any], actor: CartPoleActor, n_envs: int, n_steps: int
) -> Generator[Any, None, None]:
    """Returns of `n_envs` episodes of the actor as it is at each ``next()``."""
    envs = [factory() for _ in range(n_envs)]
    try:
        while True:
            actor.eval()
            rewards = zrl.evaluate(envs, actor, n_steps=n_steps)
            actor.train()
            yield sum(rewards)
    finally:
        for env in envs:
            env.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="of 100 updates each")
    parser.add_argument("--lstm", action="store_true", help="recurrent core over sticky fragments")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    learner = CartPoleActor(lstm=args.lstm)
    optim = torch.optim.Adam(learner.parameters(), lr=1e-3)
    batchit = same.rollout(factory, learner, n_steps=51, n_envs=8, sticky=args.lstm, entropy=args.seed)
    test_it = evaluations(factory, learner, n_envs=4, n_steps=500)
    for epoch in range(args.epochs):
        for _, batch in zip(range(100), batchit, strict=False):
            optim.zero_grad()
            loss, info = a2c(batch, learner)
            loss.backward()  # type: ignore[no-untyped-call]
            optim.step()
        returns = next(test_it)
        print(f"epoch {epoch + 1:3d}: greedy return {np.mean(returns):6.1f}, entropy {info['entropy']:.3f}", flush=True)
        if returns.min() >= 475:
            break
    batchit.close()
    test_it.close()


if __name__ == "__main__":
    main()
