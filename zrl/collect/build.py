"""Everything that `collect` needs, built from a factory and an actor: the same code in every kind of worker."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from zrl.collect.actor import BaseActorModule
from zrl.collect.collect import Context
from zrl.collect.debug import CheckedStep
from zrl.collect.envs import PlainColumns
from zrl.collect.probe import first_actions, fragment_spec, probe_actor
from zrl.collect.setup import set_up
from zrl.collect.spaces import EnvLayout, Factory, make_env, probe_env
from zrl.collect.streams import RandomStreams, env_seeds, setup_generator
from zrl.errors import ConfigError
from zrl.metrics import StageTimes

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class CollectOptions:
    """How fragments are made.

    Attributes:
        n_steps: T, steps of a fragment.
        n_columns: B, environments.
        sticky: freeze a column after an end within a fragment until the fragment's end.
        keep_final_obs: record the true final observations.
        info_keys: keys of the step's info to record: names, or a mapping from name to dtype, space or example.
        entropy: seed of everything random in the run.
        index, generation: which worker this is, and how often it was replaced.
        device: of the actor.
        debug: check at every step what is otherwise checked once or not at all.
    """

    n_steps: int
    n_columns: int
    sticky: bool = False
    keep_final_obs: bool = False
    info_keys: Mapping[str, Any] | Iterable[str] | None = None
    entropy: int = 0
    index: int = 0
    generation: int = 0
    device: torch.device = CPU
    debug: bool = False

    def __post_init__(self) -> None:
        for name, least in (("n_steps", 1), ("n_columns", 1), ("entropy", 0), ("index", 0), ("generation", 0)):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name}: expected an integer of at least {least}, not {value!r}")
            object.__setattr__(self, name, int(value))


def build(factory: Factory | Sequence[Any], actor: BaseActorModule, options: CollectOptions) -> Context:
    """Make the environments, probe them and the actor, and stand ready for the first fragment.

    Args:
        factory: makes one environment; or the B environments themselves.
        actor: acts as it is, on ``options.device``; it must not be trained or moved elsewhere.

    Raises:
        EnvError, ActorError, ConfigError: whatever cannot be recorded, before the first step is taken. The environments
            made until then are closed.
    """
    o = options
    times = StageTimes()
    streams = RandomStreams(o.entropy, o.index, o.generation, o.device)
    seeds = env_seeds(o.entropy, o.index, o.generation, o.n_columns + 1)
    with contextlib.ExitStack() as made:
        with streams.active():
            layout, envs = _environments(factory, o, seeds, made)
            set_up(actor, o.index, o.n_columns, setup_generator(o.entropy, o.index, o.generation), debug=o.debug)
            actor_layout = probe_actor(actor, layout, o.n_columns, o.device)
        ctx = Context(
            actor=actor,
            columns=PlainColumns(envs, layout, seeds[: o.n_columns], times, debug=o.debug),
            spec=fragment_spec(layout, actor_layout, o.n_steps, o.n_columns, keep_final_obs=o.keep_final_obs),
            streams=streams,
            times=times,
            initial_hx=actor_layout.initial_hx,
            first_actions=first_actions(layout.act, actor_layout.act),
            device=o.device,
            sticky=o.sticky,
        )
        made.pop_all()
    if o.debug:
        checked = CheckedStep(actor)
        ctx.step, ctx.value = checked, checked.value
    return ctx


def _environments(
    factory: Factory | Sequence[Any], o: CollectOptions, seeds: Sequence[int], made: contextlib.ExitStack
) -> tuple[EnvLayout, list[Any]]:
    """The layout, and the run's environments; those that were made here are registered for closing in `made`."""
    if not callable(factory):
        envs = list(factory)
        if len(envs) != o.n_columns:
            raise ConfigError(f"n_envs is {o.n_columns}, but {len(envs)} environments were given")
        if len({id(env) for env in envs}) != len(envs):
            raise ConfigError("the same environment was given twice; every column needs its own")
        return probe_env(envs[0], o.info_keys, seed=seeds[-1], may_step=False), envs
    scratch = make_env(factory, seeds[-1], -1)
    with contextlib.closing(scratch):
        layout = probe_env(scratch, o.info_keys, seed=seeds[-1], may_step=True)
    envs = []
    for j in range(o.n_columns):
        env = make_env(factory, seeds[j], j)
        made.callback(env.close)
        envs.append(env)
    if len({id(env) for env in (scratch, *envs)}) != len(envs) + 1:
        raise ConfigError("the factory returned the same environment twice; it must make a new one at each call")
    return layout, envs
