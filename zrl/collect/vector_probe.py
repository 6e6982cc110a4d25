"""What a vector environment is and what it can do, found before the first step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import optree
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from zrl.collect.batched import batch_of, column_of
from zrl.collect.spaces import EnvLayout, Factory, check_reset, describe, layout_of, space_leaves, takes_seed
from zrl.data.fragment import Array
from zrl.errors import EVERY, ConfigError, EnvError, RecordError

if TYPE_CHECKING:
    from typing_extensions import TypeIs

PROBE_STEPS = 8  # tries to tell a partial reset from a full one


def is_vector(env: Any) -> TypeIs[VectorEnv[Any, Any, Any]]:
    """Whether `env` is a vector environment; an EnvPool is one, and a plain `gymnasium.Env` besides."""
    return isinstance(env, VectorEnv)


def is_pool(env: Any) -> bool:
    """Whether `env` itself, not what it wraps, is an EnvPool."""
    return any(base.__module__.startswith("envpool.") for base in type(env).__mro__)


def holds_pool(env: Any) -> bool:
    """Whether `env` is an EnvPool or wraps one."""
    return is_pool(env.unwrapped)


def autoreset_mode(env: Any) -> AutoresetMode:
    """How a vector environment begins the next episode of a column.

    Raises:
        EnvError: its metadata do not say.
    """
    mode = (getattr(env, "metadata", None) or {}).get("autoreset_mode")
    try:
        return mode if isinstance(mode, AutoresetMode) else AutoresetMode(mode)
    except ValueError:
        raise EnvError(
            "a vector environment must say how it resets columns whose episode ended; set metadata = "
            '{"autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP} in its class if the step after an end begins '
            "the next episode, SAME_STEP if the step of the end does it, DISABLED if nothing does",
            env_index=-1,
            phase="factory",
            leaf="metadata['autoreset_mode']",
            expected=", ".join(str(m) for m in AutoresetMode),
            found=repr(mode),
        ) from None


def check_vector(env: Any, n: int, *, sticky: bool, obstacle: str) -> None:
    """Look whether fragments of `n` columns can be made with a vector environment.

    Args:
        env: the run's, or one like it.
        n: B.
        sticky: whether columns are to be frozen.
        obstacle: as `why_not_alone` says.

    Raises:
        ConfigError: it has another number of columns.
        EnvError: its metadata do not name its autoreset mode, it is asynchronous, or it cannot reset a column alone
            where that is needed.
    """
    if env.num_envs != n:
        raise ConfigError(
            f"n_envs (n_per_actor): expected the number of columns of the vector environment, {env.num_envs}, not {n}"
        )
    mode = autoreset_mode(env)
    if holds_pool(env) and env.unwrapped.is_async:
        raise EnvError(
            "an EnvPool must return all columns at each step; leave batch_size out",
            env_index=EVERY,
            phase="factory",
            expected=f"batch_size={n}",
            found=str(env.unwrapped.config["batch_size"]),
        )
    if obstacle and (sticky or mode is AutoresetMode.DISABLED):
        why = "sticky=True freezes columns" if sticky else "its autoreset mode is DISABLED"
        raise EnvError(
            f"{why}, and this vector environment does not reset columns alone; teach it reset(options="
            '{"reset_mask": …}), or choose ' + ("sticky=False" if sticky else "NEXT_STEP"),
            env_index=EVERY,
            phase="reset",
            expected="a reset of only the columns in the mask",
            found=obstacle,
        )


def check_pool_seeds(factory: Factory, env: Any, seeds: Sequence[int]) -> None:
    """Look whether an EnvPool got its seeds: they can be given only where it is made, by ``envpool.make(seed=…)``.

    Raises:
        EnvError: the factory does not take them, or does not pass them on.
    """
    config = env.unwrapped.config
    given = config.get("env_seed") or config.get("seed")
    if not takes_seed(factory) or list(np.atleast_1d(given)) != list(seeds):
        raise EnvError(
            "an EnvPool is seeded when it is made: every worker would play the same episodes. Let the factory take "
            "seed= and pass it on: def make(seed): return envpool.make(…, seed=seed)",
            env_index=-1,
            phase="factory",
            leaf="seed",
            expected=f"the {len(seeds)} seeds of its columns",
            found=str(given) if takes_seed(factory) else "a factory without the parameter seed",
        )


def probe_vector(
    env: Any, info_keys: Mapping[str, Any] | Iterable[str] | None, *, seeds: Sequence[int], may_step: bool
) -> tuple[EnvLayout, str]:
    """Find the leaves of a vector environment, and why no column can be reset alone; empty if one can.

    Args:
        env: a scratch instance, or with ``may_step=False`` one that is only reset.
        info_keys: as for `zrl.collect.spaces.probe_env`.
        seeds: one a column, or none.
        may_step: whether it may be stepped.

    Raises:
        EnvError, ConfigError: as for `zrl.collect.spaces.probe_env`.
    """
    autoreset_mode(env)
    space, action_space = (_single_space(env, f"single_{name}_space") for name in ("observation", "action"))
    if seeds:
        action_space.seed(seeds[0])  # so that what it is tried with is the same each time
    obs = reset_all(env, seeds)
    try:
        first = column_of(space, obs, 0)
    except Exception as e:
        raise EnvError(
            "the first observations are not what the observation space says",
            env_index=-1,
            phase="reset",
            leaf="state.obs",
            expected=f"a batch of {space}",
            found=f"{type(obs).__name__} ({describe(e)})",
        ) from e
    layout = layout_of(_OneColumn(env), first, action_space, space, info_keys, may_step=may_step)
    return layout, why_not_alone(env, may_step=may_step)


def _single_space(env: Any, name: str) -> gym.Space[Any]:
    space = getattr(env, name, None)
    if not isinstance(space, gym.Space):
        raise EnvError(
            "a vector environment must state the spaces of one column",
            env_index=-1,
            phase="spaces",
            leaf=name,
            expected="a gymnasium.Space",
            found=type(space).__name__,
        )
    space_leaves(space, name)
    return space


class _OneColumn:
    """A scratch vector environment that is stepped at random like a plain one: all that its infos say is in one."""

    def __init__(self, env: Any) -> None:
        self._env = env
        self.action_space = self

    def sample(self) -> Any:
        return sampled(self._env)

    def reset(self) -> tuple[Any, dict[str, Any]]:
        return self._env.reset()[0], {}

    def step(self, actions: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, rewards, terminated, truncated, info = self._env.step(actions)
        merged = {**first_infos(info.get("final_info", {}), len(rewards)), **first_infos(info, len(rewards))}
        stuck = autoreset_mode(self._env) is AutoresetMode.DISABLED and bool((terminated | truncated).any())
        return obs, rewards, stuck, False, merged


def first_infos(info: Any, n: int) -> dict[str, Any]:
    """Of every key the value of the first column that has it."""
    if not isinstance(info, dict):
        return {}
    found: dict[str, Any] = {}
    for key in info:
        columns = np.flatnonzero(present_in(info, key, n))
        values = info[key]
        if columns.size and isinstance(values, (np.ndarray, list, tuple)) and len(values) == n:
            found[key] = values[columns[0]]
    return found


def sampled(env: Any) -> Any:
    """Actions of all columns, drawn from the single space: that of an EnvPool is not batched."""
    space = env.single_action_space
    return batch_of(space, [space.sample() for _ in range(env.num_envs)])


def why_not_alone(env: Any, *, may_step: bool) -> str:
    """Why one column cannot be reset and the others left alone; empty if it can.

    Known of Gymnasium's own, also with its own wrappers around them, and of EnvPools. Another kind is tried, if it may
    be stepped.
    """
    if env.num_envs == 1 or is_pool(env) or _is_gymnasiums(env):
        return ""
    if not may_step:
        return "not tried, since the environment itself was given: pass a factory"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return "" if _resets_one(env) else "others were reset, too, or none"
        except Exception as e:
            return describe(e)


def _is_gymnasiums(env: Any) -> bool:
    if type(env.unwrapped).reset not in (SyncVectorEnv.reset, AsyncVectorEnv.reset):
        return False
    while env is not env.unwrapped:
        if not type(env).__module__.startswith("gymnasium."):
            return False
        env = env.env
    return True


def _resets_one(env: Any) -> bool:
    """Step, reset column 0, and look who has moved; where nothing can be seen the answer is no."""
    space = env.single_observation_space
    for _ in range(PROBE_STEPS):
        env.reset()
        stepped = env.step(sampled(env))[0]
        before = [_bytes_of(space, stepped, j) for j in range(env.num_envs)]
        after_reset, _ = resetter(env)(np.array([0]))
        after = [_bytes_of(space, after_reset, j) for j in range(env.num_envs)]
        if after[1:] != before[1:]:
            return False
        if after[0] != before[0]:
            return True
    return False


def _bytes_of(space: Any, obs: Any, j: int) -> list[Any]:
    leaves = optree.tree_leaves(column_of(space, obs, j), none_is_leaf=True)
    return [np.asarray(x).tobytes() for x in leaves]


def resetter(env: Any) -> Callable[[Array], tuple[Any, dict[str, Any]]]:
    """What resets some columns alone: ``(obs, info)`` of all columns; of an EnvPool, of those alone."""
    n, options = int(env.num_envs), dict if env is env.unwrapped else _MaskForAll

    def by_ids(columns: Array) -> tuple[Any, dict[str, Any]]:
        # as its reset(ids) does, which makes a dict of all its configuration twice besides
        env._reset(columns.astype(np.int32))
        return env.recv(reset=True, return_info=True)  # type: ignore[no-any-return]

    def by_mask(columns: Array) -> tuple[Any, dict[str, Any]]:
        mask = np.zeros(n, bool)
        mask[columns] = True
        return env.reset(options=options(reset_mask=mask))  # type: ignore[no-any-return]

    if n == 1:
        return lambda columns: env.reset()
    return by_ids if is_pool(env) else by_mask


class _MaskForAll(dict[str, Any]):
    """Reset options whose mask can be taken out more than once.

    `SyncVectorEnv` pops it, so that the options of single environments are without it; a wrapper around it
    (`gymnasium.wrappers.vector.RecordEpisodeStatistics`) then finds none, and begins to count anew in *all* columns.
    """

    def pop(self, key: str, *default: Any) -> Any:
        return self[key] if key == "reset_mask" else super().pop(key, *default)

    def __reduce__(self) -> tuple[Any, ...]:  # to the processes of an AsyncVectorEnv: without the mask
        return dict, ()


def reset_all(env: Any, seeds: Sequence[int]) -> Any:
    """Begin an episode in every column; returns the observations.

    Gymnasium's own take a list of seeds, one a column. Others that do not are given the first one, to make of it what
    they do.

    Raises:
        EnvError: ``reset`` raised, or returned something else than ``(obs, info)``.
    """
    try:
        result = _seeded(env, list(seeds))
    except RecordError:
        raise
    except Exception as e:
        raise EnvError(f"reset raised {describe(e)}", env_index=EVERY, phase="reset") from e
    check_reset(result, EVERY)
    obs, info = result
    if is_pool(env) and np.any(info["elapsed_step"]):
        obs, _ = env.recv(reset=True, return_info=True)  # that was the answer to a step that was interrupted
    return obs


def _seeded(env: Any, seeds: list[int]) -> Any:
    if not seeds:
        _check_settled(env)
        return env.reset()
    inner = env.unwrapped
    if isinstance(inner, SyncVectorEnv):
        for one, seed in zip(inner.envs, seeds, strict=True):
            one.action_space.seed(seed)  # so that environments that sample from it repeat themselves
    if type(inner).reset in (SyncVectorEnv.reset, AsyncVectorEnv.reset):
        return env.reset(seed=seeds)
    try:
        return env.reset(seed=seeds)
    except Exception:
        return env.reset(seed=seeds[0])


def _is_waiting(env: Any) -> bool:
    """Whether an AsyncVectorEnv was interrupted while it waited for its processes."""
    inner = env.unwrapped
    return isinstance(inner, AsyncVectorEnv) and inner._state.value != "default"


def _check_settled(env: Any) -> None:
    if _is_waiting(env):
        raise EnvError(
            "an AsyncVectorEnv that was interrupted in the middle of a step cannot go on: which of its processes still "
            "owe an answer is not known. Make a new rollout",
            env_index=EVERY,
            phase="reset",
        )


def close_vector(env: Any) -> None:
    """Close it; without waiting for answers that may never come, if it was interrupted."""
    if not _is_waiting(env):
        env.close()
        return
    inner = env.unwrapped
    inner._state = type(inner._state)("default")  # else it waits for them, or raises what they were interrupted by
    env.close(terminate=True)


def present_in(info: Mapping[str, Any], key: str, n: int) -> Array:
    """Which columns have this key: Gymnasium's ``_key`` says so; without it, as in an EnvPool, all or none."""
    mask = info.get(f"_{key}")
    return np.full(n, key in info) if mask is None else np.array(mask, bool)
