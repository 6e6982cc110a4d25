"""Tianshou: a `Collector` with a buffer of one batch, over a `DummyVectorEnv` of all environments in one process, or
over a `SubprocVectorEnv` with shared memory, which has a process for each environment: it has no other way.

Actor and critic are one module with the network of `nets`, which is asked twice: values are not recorded as it acts.
The update is Tianshou's own A2C or PPO, on the whole buffer.
"""

from __future__ import annotations

from typing import Any

import torch
from tianshou.algorithm.modelfree.a2c import A2C
from tianshou.algorithm.modelfree.ppo import PPO
from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy, ProbabilisticActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv, SubprocVectorEnv
from tianshou.utils.torch_utils import policy_within_training_step

from bench_peers import learn
from bench_peers.nets import CONTINUOUS, Net
from bench_peers.window import Window
from bench_peers.work import Work, factory, make_env


class Actor(torch.nn.Module):
    """Logits, or mean and deviation, as Tianshou calls an actor."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, obs: Any, state: Any = None, info: Any = None) -> tuple[Any, Any]:
        out = self.net(torch.as_tensor(obs))[0]
        if self.net.log_std is None:
            return out, state
        return (out, self.net.log_std.exp().expand_as(out)), state


class Critic(torch.nn.Module):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, obs: Any) -> torch.Tensor:
        return self.net(torch.as_tensor(obs))[1]  # type: ignore[no-any-return]


def gaussian(parameters: Any) -> torch.distributions.Distribution:
    return torch.distributions.Independent(torch.distributions.Normal(*parameters), 1)


def algorithm_of(work: Work) -> Any:
    net, single = Net(work.env), make_env(work.env)
    spaces = {"action_space": single.action_space, "observation_space": single.observation_space}
    policy: Any
    if work.env in CONTINUOUS:
        policy = ProbabilisticActorPolicy(actor=Actor(net), dist_fn=gaussian, **spaces)
    else:
        policy = DiscreteActorPolicy(actor=Actor(net), **spaces)
    single.close()
    kind: Any = PPO if work.update == "ppo" else A2C
    return kind(
        policy=policy,
        critic=Critic(net),
        optim=AdamOptimizerFactory(lr=1e-3),
        max_batchsize=work.n_all * work.n_steps,
        max_grad_norm=0.5,
        ent_coef=0.005,
        gamma=learn.GAMMA,
        gae_lambda=learn.LAM,
    )


def run(work: Work, window: Window, *, processes: bool) -> None:
    factories = [factory(work.env)] * work.n_all
    env = SubprocVectorEnv(factories, share_memory=True) if processes else DummyVectorEnv(factories)
    algorithm = algorithm_of(work)
    n = work.n_all * work.n_steps
    collector = Collector(algorithm.policy, env, VectorReplayBuffer(n, work.n_all))
    collector.reset()
    size, repeat = (learn.MINIBATCH, learn.EPOCHS) if work.update == "ppo" else (None, 1)
    with policy_within_training_step(algorithm.policy):
        while True:
            collector.collect(n_step=n)
            if work.update:
                algorithm.update(collector.buffer, batch_size=size, repeat=repeat)
            collector.reset_buffer(keep_statistics=True)
            if window.delivered(n):
                break
    env.close()
