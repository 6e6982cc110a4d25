"""The updates for systems that bring none: a step of A2C, or PPO, written as one writes them first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench_peers.nets import Net

GAMMA, LAM = 0.99, 0.95
EPOCHS, MINIBATCH, CLIP = 4, 256, 0.2


class Learner:
    """Updates a network from a batch [T, B]: observations, actions, log-probabilities, values, rewards, ends.

    What a truncated episode would have gone on to earn is not asked for: a loop of a few lines leaves it out.
    """

    def __init__(self, net: Net, update: str) -> None:
        self.net = net
        self._optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, eps=1e-5, fused=True)
        self._update = {"a2c": self._a2c, "ppo": self._ppo}[update]

    def __call__(self, *, obs: Any, act: Any, out: Any, value: Any, rew: Any, fin: Any, last: Any) -> None:
        """`out` [T, B, A] are the logits as the actor acted, `last` [B, ...] the observations after the last step."""
        tensors = (torch.as_tensor(x) for x in (obs, act, out, value, rew, fin, last))
        obs, act, out, value, rew, fin, last = tensors
        with torch.no_grad():
            adv = gae(rew, fin, value, self.net(last)[1])
            log_prob = self.net.distribution(out).log_prob(act)
        flat = (x.flatten(0, 1) for x in (obs, act, log_prob, adv, adv + value))
        self._update(*flat)

    def _a2c(self, obs: Tensor, act: Tensor, log_prob: Tensor, adv: Tensor, ret: Tensor) -> None:
        out, value, _ = self.net(obs)
        pi = self.net.distribution(out)
        adv = (adv - adv.mean()) / (adv.std() + 1e-8)
        self._step(-(pi.log_prob(act) * adv).mean(), value, ret, pi)

    def _ppo(self, obs: Tensor, act: Tensor, log_prob: Tensor, adv: Tensor, ret: Tensor) -> None:
        for _ in range(EPOCHS):
            for i in torch.randperm(len(adv)).split(MINIBATCH):  # type: ignore[no-untyped-call]
                out, value, _ = self.net(obs[i])
                pi = self.net.distribution(out)
                a = (adv[i] - adv[i].mean()) / (adv[i].std() + 1e-8)
                ratio = (pi.log_prob(act[i]) - log_prob[i]).exp()
                loss = -torch.min(ratio * a, ratio.clamp(1 - CLIP, 1 + CLIP) * a).mean()
                self._step(loss, value, ret[i], pi)

    def _step(self, policy: Tensor, value: Tensor, ret: Tensor, pi: Any) -> None:
        loss = policy + 0.5 * (value - ret).square().mean() - 0.005 * pi.entropy().mean()
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 0.5)
        self._optimizer.step()


def gae(rew: Tensor, fin: Tensor, value: Tensor, bootstrap: Tensor) -> Tensor:
    """Generalized advantages [T, B], by the plain loop."""
    adv, after, later = torch.zeros_like(rew), bootstrap, torch.zeros_like(bootstrap)
    on = GAMMA * (~fin.bool()).float()
    for t in reversed(range(len(rew))):
        later = rew[t] + on[t] * after - value[t] + on[t] * LAM * later
        adv[t], after = later, value[t]
    return adv
