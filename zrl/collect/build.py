"""Everything that `collect` needs, built from a factory and an actor: the same code in every kind of worker."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from zrl.collect.actor import BaseActorModule
from zrl.collect.bounds import action_bounds
from zrl.collect.collect import Context
from zrl.collect.debug import CheckedStep
from zrl.collect.encoding import is_encoded
from zrl.collect.envs import Columns, PlainColumns
from zrl.collect.probe import first_actions, fragment_spec, probe_actor
from zrl.collect.setup import set_up
from zrl.collect.spaces import Environments, EnvLayout, Factory, check_alike, make_env, probe_env
from zrl.collect.streams import RandomStreams, env_seeds, seed_of_new, setup_generator
from zrl.collect.vector import VectorColumns
from zrl.collect.vector_probe import check_pool_seeds, check_vector, holds_pool, is_vector, probe_vector
from zrl.errors import ConfigError
from zrl.metrics import StageTimes

CPU = torch.device("cpu")
ANOTHER_KIND = "the factory made a plain environment and a vector of them; it must make the same kind at each call"


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


def build(factory: Environments, actor: BaseActorModule, options: CollectOptions) -> Context:
    """Make the environments, probe them and the actor, and stand ready for the first fragment.

    Args:
        factory: makes one environment, or a vector of B; or the B environments themselves, or their vector.
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
            layout, columns = _columns(factory, o, seeds, times, made)
            set_up(actor, o.index, o.n_columns, setup_generator(o.entropy, o.index, o.generation), debug=o.debug)
            actor_layout = probe_actor(actor, layout, o.n_columns, o.device)
        ctx = Context(
            actor=actor,
            columns=columns,
            spec=fragment_spec(layout, actor_layout, o.n_steps, o.n_columns, keep_final_obs=o.keep_final_obs),
            streams=streams,
            times=times,
            initial_hx=actor_layout.initial_hx,
            first_actions=first_actions(layout.act, actor_layout.act),
            device=o.device,
            sticky=o.sticky,
            # those of a Text or OneOf are looked at in every step, as they are decoded
            action_bounds=[] if is_encoded(layout.action_space) else action_bounds(layout.act),
        )
        made.pop_all()
    if isinstance(columns, PlainColumns) and callable(factory):
        ctx.remake = _remaker(factory, columns, o)
    if o.device.type == "cpu" and not o.debug:
        ctx.arrays = actor.by_arrays()
    if o.debug:
        checked = CheckedStep(actor)
        ctx.step, ctx.value = checked, checked.value
    return ctx


def _columns(
    factory: Environments,
    o: CollectOptions,
    seeds: Sequence[int],
    times: StageTimes,
    made: contextlib.ExitStack,
) -> tuple[EnvLayout, Columns]:
    """The layout, and the run's environments; those that were made here are registered for closing in `made`."""
    own, last = list(seeds[:-1]), seeds[-1]
    if is_vector(factory):
        layout, obstacle = probe_vector(factory, o.info_keys, seeds=[], may_step=False)
        return layout, _vector(factory, layout, [] if holds_pool(factory) else own, obstacle, o, times)
    if not callable(factory):
        envs = list(factory)
        if len(envs) != o.n_columns:
            raise ConfigError(f"n_envs is {o.n_columns}, but {len(envs)} environments were given")
        if len({id(env) for env in envs}) != len(envs):
            raise ConfigError("the same environment was given twice; every column needs its own")
        layout = probe_env(envs[0], o.info_keys, seed=last, may_step=False)
        return layout, PlainColumns(envs, layout, own, times, debug=o.debug)
    scratch = make_env(factory, last, -1)
    with contextlib.closing(scratch):
        if is_vector(scratch):
            seeded = [] if holds_pool(scratch) else [last] * int(scratch.num_envs)
            layout, obstacle = probe_vector(scratch, o.info_keys, seeds=seeded, may_step=True)
            check_vector(scratch, o.n_columns, sticky=o.sticky, obstacle=obstacle)
        else:
            layout = probe_env(scratch, o.info_keys, seed=last, may_step=True)
    if is_vector(scratch):
        env = make_env(factory, own, 0)
        made.callback(env.close)
        _check_new(scratch, env)
        if not is_vector(env):
            raise ConfigError(ANOTHER_KIND)
        check_alike(env, layout, 0, prefix="single_")
        if holds_pool(env):
            check_pool_seeds(factory, env, own)
        return layout, _vector(env, layout, [] if holds_pool(env) else own, obstacle, o, times)
    envs = []
    for j in range(o.n_columns):
        envs.append(make_env(factory, own[j], j))
        made.callback(envs[-1].close)
        if is_vector(envs[-1]):
            raise ConfigError(ANOTHER_KIND)
    _check_new(scratch, *envs)
    return layout, PlainColumns(envs, layout, own, times, debug=o.debug)


def _remaker(factory: Factory, columns: PlainColumns, o: CollectOptions) -> Callable[[int, int], None]:
    def remake(j: int, k: int) -> None:
        seed = seed_of_new(o.entropy, o.index, o.generation, o.n_columns + 1, j, k)
        columns.replace(j, make_env(factory, seed, j), seed)

    return remake


def _vector(
    env: Any, layout: EnvLayout, seeds: list[int], obstacle: str, o: CollectOptions, times: StageTimes
) -> VectorColumns:
    check_vector(env, o.n_columns, sticky=o.sticky, obstacle=obstacle)
    return VectorColumns(env, layout, seeds, times, partial=not obstacle, debug=o.debug)


def _check_new(*envs: Any) -> None:
    if len({id(env) for env in envs}) != len(envs):
        raise ConfigError("the factory returned the same environment twice; it must make a new one at each call")
