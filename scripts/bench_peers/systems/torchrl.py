"""TorchRL: `MultiSyncCollector` and `MultiAsyncCollector` with two workers.

Each worker has one vector environment of Gymnasium (`SyncVectorEnv`), wrapped by `GymWrapper`: a `SerialEnv` of as
many environments, the usual way, is slower. The policy is the network of `nets` as a `ProbabilisticActor`, and its
value is recorded beside; workers get new weights after each update. The update is that of `learn`, not one of TorchRL's
own losses.

The synchronous collector delivers both workers' halves as one batch. The asynchronous one delivers one half at a time,
and is updated with each.
"""

from __future__ import annotations

import functools
from typing import Any

import gymnasium as gym
import torch
from tensordict.nn import InteractionType, TensorDictModule, TensorDictSequential
from torchrl.collectors import MultiAsyncCollector, MultiSyncCollector
from torchrl.envs import GymWrapper
from torchrl.modules import ProbabilisticActor

from bench_peers.learn import Learner
from bench_peers.nets import CONTINUOUS, Net
from bench_peers.window import Window
from bench_peers.work import Work, factory


def make_vector(work: Work) -> GymWrapper:
    env = gym.vector.SyncVectorEnv([factory(work.env)] * work.n_envs, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    return GymWrapper(env, categorical_action_encoding=True)


class Heads(torch.nn.Module):
    """The network, with the names that TorchRL wants for what a distribution is made of."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, value, _ = self.net(obs)
        if self.net.log_std is None:
            return out, value.unsqueeze(-1)
        return out, self.net.log_std.exp().expand_as(out), value.unsqueeze(-1)


def policy_of(work: Work, net: Net) -> TensorDictSequential:
    continuous = work.env in CONTINUOUS
    keys = ["loc", "scale"] if continuous else ["logits"]
    heads = TensorDictModule(Heads(net), in_keys=["observation"], out_keys=[*keys, "state_value"])
    kind: Any = independent_normal if continuous else torch.distributions.Categorical
    return ProbabilisticActor(
        heads,
        in_keys=keys,
        out_keys=["action"],
        distribution_class=kind,
        default_interaction_type=InteractionType.RANDOM,
        return_log_prob=True,
    )


def independent_normal(loc: torch.Tensor, scale: torch.Tensor) -> torch.distributions.Distribution:
    return torch.distributions.Independent(torch.distributions.Normal(loc, scale), 1)


def run(work: Work, window: Window, *, asynchronous: bool) -> None:
    net = Net(work.env)
    learner = Learner(net, work.update) if work.update else None
    half = work.n_envs * work.n_steps
    kind = MultiAsyncCollector if asynchronous else MultiSyncCollector
    collector = kind(
        [functools.partial(make_vector, work)] * work.workers,
        policy_of(work, net),
        frames_per_batch=half if asynchronous else work.workers * half,
        total_frames=-1,
        device="cpu",
        cat_results=None if asynchronous else 0,
    )
    for data in collector:
        if learner is not None:
            learn_from(learner, data, work)
            collector.update_policy_weights_()
        if window.delivered(data.numel()):
            break


def learn_from(learner: Learner, data: Any, work: Work) -> None:
    """`data` is [columns, T]."""
    data = data.reshape(-1, work.n_steps).transpose(0, 1)
    after = data["next"]
    learner(
        obs=data["observation"],
        act=data["action"],
        out=data["logits"],
        value=data["state_value"].squeeze(-1),
        rew=after["reward"].squeeze(-1),
        fin=after["done"].squeeze(-1),
        last=after["observation"][-1],
    )
