"""From a config to its parts: environment factory, actor, and the function that makes one update from one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch

from zrl import algo
from zrl.collect.actor import BaseActorModule
from zrl.config import TrainConfig
from zrl.data.batch import Batch
from zrl.errors import ConfigError, ZrlError
from zrl.train.allowed import Allowed
from zrl.train.named import EnvFactory, make_named_actor

Update = Callable[[Batch], dict[str, float]]
#: Called with a loss function of `zrl.algo`, a batch and keywords; gives loss and info.
Compute = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]


class DivergedError(ZrlError):
    """The loss is not finite: the weights are of no use any more."""


class Losses(torch.nn.Module):
    """Losses as the output of a module. DistributedDataParallel finds out from the output of a forward pass which
    parameters get a gradient: from a loss it does so exactly, whatever the loss makes of the actor and its density."""

    def __init__(self, actor: BaseActorModule) -> None:
        super().__init__()
        self.actor = actor

    def forward(
        self, loss: Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]], batch: Batch, **settings: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return loss(batch, self.actor, **settings)


def make_actor(config: TrainConfig) -> BaseActorModule:
    """The learner's actor.

    Raises:
        ConfigError, EnvError, ActorError: environment or actor cannot be made, or there is nothing to train.
    """
    actor = make_named_actor(config.actor, Allowed(None), EnvFactory(config.env, config.env_kwargs))
    if not any(True for _ in actor.parameters()):
        raise ConfigError(f"actor: expected one with parameters to train, not {type(actor).__name__}, which has none")
    return actor


def _bare(method: Callable[..., Any]) -> Any:
    """A method without the decorator that keeps `torch.compile` off it; as it is, where it has none."""
    return getattr(method, "__wrapped__", method)


class Adam(torch.optim.Adam):
    """torch's, number for number, where nothing is compiled. To say that these methods shall not be compiled, torch
    imports its compiler as the first of them is called: a second of every start, and 70 MB."""

    add_param_group = _bare(torch.optim.Adam.add_param_group)
    zero_grad = _bare(torch.optim.Adam.zero_grad)
    state_dict = _bare(torch.optim.Adam.state_dict)
    load_state_dict = _bare(torch.optim.Adam.load_state_dict)
    step = torch.no_grad()(_bare(torch.optim.Adam.step))


def make_optimizer(config: TrainConfig, actor: torch.nn.Module) -> torch.optim.Optimizer:
    """Adam, with the epsilon that policy gradients like (Engstrom et al. 2020 list it among PPO's details)."""
    # fused: one kernel for all tensors saves a quarter of the time of a small update
    return Adam(actor.parameters(), lr=config.lr or 0.0, eps=1e-5, fused=True)


def make_update(
    config: TrainConfig,
    actor: BaseActorModule,
    optimizer: torch.optim.Optimizer,
    pause: Callable[[], None] = lambda: None,
    shared: Compute | None = None,
) -> Update:
    """The function that improves `actor` with one batch, and returns the mean of what its losses report.

    Args:
        config: resolved.
        actor: the learner's.
        optimizer: of its parameters.
        pause: called between two steps of the optimizer; it may raise.
        shared: computes losses whose gradients are those of several learners. Then the norm of the gradient is
            reported, too: it is the same for all of them, and so they agree where it is not finite.
    """
    common: dict[str, Any] = {"gamma": config.gamma, "c_entropy": config.c_entropy}

    def compute(loss: Any, batch: Batch, **settings: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        value, info = loss(batch, actor, **settings) if shared is None else shared(loss, batch, **settings)
        return value, dict(info)

    def descend(loss: torch.Tensor, info: dict[str, torch.Tensor]) -> None:
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(actor.parameters(), config.max_grad_norm or 0.0)
        if shared is not None:
            info["grad_norm"] = norm.detach()
        optimizer.step()

    def once(loss: torch.Tensor, info: dict[str, torch.Tensor]) -> dict[str, float]:
        descend(loss, info)
        return {name: float(x) for name, x in info.items()}

    def a2c(batch: Batch) -> dict[str, float]:
        return once(*compute(algo.a2c, batch, lam=config.lam or 0.0, c_value=config.c_value, **common))

    def impala(batch: Batch) -> dict[str, float]:
        return once(*compute(algo.impala, batch, lam=config.lam or 0.0, c_value=config.c_value, **common))

    def reinforce(batch: Batch) -> dict[str, float]:
        return once(*compute(algo.reinforce, batch, **common))

    def ppo(batch: Batch) -> dict[str, float]:
        extra = algo.advantages(batch, gamma=config.gamma or 0.0, lam=config.lam or 0.0)
        size, by = _minibatch(config, batch)
        infos = []
        for _ in range(config.epochs):
            for part in batch.minibatches(size, by=by, extra=extra):
                loss, info = compute(algo.ppo, part, clip=config.clip, c_value=config.c_value, **common)
                descend(loss, info)
                pause()
                infos.append(info)
        return {name: float(torch.stack([i[name] for i in infos]).mean()) for name in infos[0]}

    return {"a2c": a2c, "impala": impala, "reinforce": reinforce, "ppo": ppo}[config.algo]


def _minibatch(config: TrainConfig, batch: Batch) -> tuple[int, str]:
    """Size of a minibatch, in steps or, for recurrent actors, in columns; and in which."""
    recurrent = bool(optree.tree_leaves(batch.hx))
    size = max(1, config.minibatch // len(batch.mask)) if recurrent else config.minibatch
    return size, "column" if recurrent else "step"


def n_optimizer_steps(config: TrainConfig, batch: Batch) -> int:
    """That an update with this batch takes."""
    if config.algo != "ppo":
        return 1
    size, by = _minibatch(config, batch)
    n = batch.n_env_steps if by == "step" else batch.mask.shape[1]
    return config.epochs * -(-n // size)
