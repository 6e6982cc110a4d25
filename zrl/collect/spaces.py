"""From an environment's spaces and a scratch instance to the leaves of the record, before the first real step."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import optree

from zrl.data.spec import ArraySpec
from zrl.errors import ConfigError, EnvError, RecordError

Factory = Callable[..., Any]
LEAF_SPACES = (gym.spaces.Box, gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary)
PROBE_STEPS = 200  # random steps of a scratch environment that a listed info key may take to turn up


@dataclasses.dataclass(frozen=True)
class EnvLayout:
    """What of one environment goes into the record.

    Attributes:
        obs: tree of `ArraySpec`, in the containers that the environment really returns.
        act: tree of the leaf spaces of the action space; Dict gives a dict, Tuple a tuple.
        env: `ArraySpec` by key of ``info``, with a ``_key`` mask each; None if no key is declared.
        example: one observation of the scratch environment.
        observation_space, action_space: as the environment states them.
    """

    obs: Any
    act: Any
    env: dict[str, ArraySpec] | None
    example: Any
    observation_space: gym.Space[Any] | None
    action_space: gym.Space[Any]


def make_env(factory: Factory, seed: int, env_index: int) -> Any:
    """Call a factory that takes no argument, or ``seed=``.

    Raises:
        EnvError: the factory raised, needs other arguments, or returned something that has no ``step``.
    """
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # builtins and C callables may have no signature
        parameters = {}  # type: ignore[assignment]
    kwargs: dict[str, Any] = {"seed": seed} if "seed" in parameters else {}
    required = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in kwargs
    ]
    if required:
        raise EnvError(
            "the factory must take no argument, or only seed=",
            env_index=env_index,
            phase="factory",
            expected="factory() or factory(seed=...)",
            found=f"required parameters {', '.join(required)}",
        )
    try:
        env = factory(**kwargs)
    except Exception as e:
        raise EnvError(f"the factory raised {describe(e)}", env_index=env_index, phase="factory") from e
    if isinstance(env, type) or not callable(getattr(env, "step", None)) or not callable(getattr(env, "reset", None)):
        raise EnvError(
            "the factory must return an environment",
            env_index=env_index,
            phase="factory",
            expected="an object with reset and step",
            found=type(env).__name__,
        )
    return env


def describe(e: BaseException) -> str:
    """``TypeName: message`` of an exception, or only the name if it has no message."""
    return f"{type(e).__name__}: {e}" if str(e) else type(e).__name__


def reset_env(env: Any, env_index: int, seed: int | None = None) -> Any:
    """The first observation of an episode.

    Raises:
        EnvError: ``reset`` raised, or returned something else than ``(obs, info)``.
    """
    try:
        result = env.reset(seed=seed) if seed is not None else env.reset()
    except Exception as e:
        raise EnvError(f"reset raised {describe(e)}", env_index=env_index, phase="reset") from e
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        raise EnvError(
            "reset broke the Gymnasium contract",
            env_index=env_index,
            phase="reset",
            expected="(obs, info dict)",
            found=type(result).__name__,
        )
    return result[0]


def probe_env(
    env: Any, info_keys: Mapping[str, Any] | Iterable[str] | None, *, seed: int | None, may_step: bool
) -> EnvLayout:
    """Find the leaves of an environment: from its spaces, and from its first observation where they are silent.

    Args:
        env: a scratch instance; it is reset, and stepped with random actions only where `info_keys` is a list of names.
        info_keys: keys of the step's info to record: a mapping from key to dtype, space or example array; or names
            alone, whose dtype and shape are then looked for.
        seed: for the scratch instance; None leaves its random state alone.
        may_step: False if `env` is not a scratch instance; then `info_keys` must state dtypes.

    Raises:
        EnvError: a space without a fixed shape, an observation that is not in its space, a dtype without a place.
        ConfigError: an info key that was not found or has no dtype.
    """
    action_space = getattr(env, "action_space", None)
    if not isinstance(action_space, gym.Space):
        raise _space_error("action_space", "a gymnasium.Space", type(action_space).__name__)
    observation_space = getattr(env, "observation_space", None)
    if seed is not None:
        action_space.seed(seed)
    obs = reset_env(env, -1, seed)
    act = space_leaves(action_space, "action_space")
    try:
        obs_specs = observation_specs(observation_space, obs, "state.obs")
    except EnvError:
        raise
    except RecordError as e:  # a dtype outside the table
        raise EnvError(
            "observation cannot be recorded",
            env_index=-1,
            phase="reset",
            leaf="state.obs",
            expected=e.expected,
            found=e.found,
        ) from e
    if not optree.tree_leaves(obs_specs, none_is_leaf=True):
        raise _space_error("observation_space", "at least one leaf", "an empty container")
    info = _info_specs(env, info_keys, may_step) if info_keys else None
    return EnvLayout(obs_specs, act, info, obs, observation_space, action_space)


def _space_error(leaf: str, expected: str, found: str, hint: str = "") -> EnvError:
    what = "the space cannot be recorded" + (f" ({hint})" if hint else "")
    return EnvError(what, env_index=-1, phase="spaces", leaf=leaf, expected=expected, found=found)


def space_leaves(space: gym.Space[Any], path: str) -> Any:
    """The tree of leaf spaces of a space: Dict gives a dict, Tuple a tuple.

    Raises:
        EnvError: a space without a fixed shape.
    """
    if isinstance(space, gym.spaces.Dict):
        return {key: space_leaves(sub, f"{path}[{key!r}]") for key, sub in space.spaces.items()}
    if isinstance(space, gym.spaces.Tuple):
        return tuple(space_leaves(sub, f"{path}[{i}]") for i, sub in enumerate(space.spaces))
    if not isinstance(space, LEAF_SPACES):
        raise _space_error(
            path,
            "Box, Discrete, MultiDiscrete, MultiBinary, or Dict and Tuple of them",
            type(space).__name__,
            "it has no fixed shape; pad it to one in a wrapper of the environment",
        )
    return space


def observation_specs(space: Any, obs: Any, path: str) -> Any:
    """The tree of `ArraySpec` of an observation: containers as in `obs`, dtypes and shapes as in `space`.

    Where there is no space, `obs` itself decides.

    Raises:
        EnvError: `obs` and `space` do not match, or the space has no fixed shape.
        RecordError: a dtype outside the table.
    """
    if space is None:
        return optree.tree_map(ArraySpec.of, obs, none_is_leaf=True)
    if isinstance(space, gym.spaces.Dict):
        if not isinstance(obs, dict) or set(obs) != set(space.spaces):
            found = f"keys {sorted(map(str, obs))}" if isinstance(obs, dict) else type(obs).__name__
            raise _mismatch(path, f"a dict with keys {sorted(map(str, space.spaces))}", found)
        parts = {k: observation_specs(space[k], obs[k], f"{path}[{k!r}]") for k in obs}
        return type(obs)(parts)
    if isinstance(space, gym.spaces.Tuple):
        if not isinstance(obs, (tuple, list)) or len(obs) != len(space):
            found = f"{type(obs).__name__} of {len(obs)}" if isinstance(obs, (tuple, list)) else type(obs).__name__
            raise _mismatch(path, f"a tuple or list of {len(space)}", found)
        parts_ = [observation_specs(s, x, f"{path}[{i}]") for i, (s, x) in enumerate(zip(space, obs, strict=True))]
        return type(obs)(*parts_) if hasattr(obs, "_fields") else type(obs)(parts_)
    space_leaves(space, path)  # refuses what has no fixed shape
    spec = ArraySpec(np.dtype(space.dtype).name, tuple(space.shape))
    shape = np.shape(obs)
    if shape != spec.shape:
        raise _mismatch(path, str(spec), f"shape {list(shape)}")
    return spec


def _mismatch(leaf: str, expected: str, found: str) -> EnvError:
    what = "the first observation is not what the observation space says"
    return EnvError(what, env_index=-1, phase="reset", leaf=leaf, expected=expected, found=found)


def _info_specs(env: Any, info_keys: Mapping[str, Any] | Iterable[str], may_step: bool) -> dict[str, ArraySpec]:
    """`ArraySpec` by declared key, each with a ``_key`` mask beside it."""
    if isinstance(info_keys, str):
        raise ConfigError(f"info_keys must be a list of keys or a mapping, not the string {info_keys!r}")
    if isinstance(info_keys, Mapping):
        found = {key: _declared(key, value) for key, value in info_keys.items()}
    else:
        found = _found_by_stepping(env, list(info_keys), may_step)
    if reserved := [key for key in found if key.startswith("_")]:
        raise ConfigError(f"info_keys {reserved}: names with a leading underscore are those of the masks")
    return {name: spec for key, s in found.items() for name, spec in ((key, s), (f"_{key}", ArraySpec("bool")))}


def _declared(key: str, value: Any) -> ArraySpec:
    try:
        if isinstance(value, ArraySpec):
            return value
        if isinstance(value, gym.Space):
            return ArraySpec(np.dtype(value.dtype).name, tuple(value.shape or ()))
        if isinstance(value, (type, str, np.dtype)):
            return ArraySpec(np.dtype(value).name)
        return ArraySpec.of(value)
    except (TypeError, RecordError) as e:
        raise ConfigError(f"info_keys[{key!r}]: expected a dtype, a space or an example array, not {value!r}") from e


def _found_by_stepping(env: Any, keys: list[str], may_step: bool) -> dict[str, ArraySpec]:
    advice = "declare its dtype: info_keys={key: dtype, space or example}"
    if not may_step:
        raise ConfigError(f"info_keys {keys}: there is no scratch environment to find them with; {advice}")
    found: dict[str, ArraySpec] = {}
    for _ in range(PROBE_STEPS):
        try:
            _, _, terminated, truncated, info = env.step(env.action_space.sample())
        except Exception as e:
            raise EnvError(f"step raised {describe(e)}", env_index=-1, phase="step") from e
        for key in keys:
            if key not in found and key in info:
                found[key] = _declared(key, np.asarray(info[key]))
        if len(found) == len(keys):
            return found
        if terminated or truncated:
            reset_env(env, -1)
    missing = [key for key in keys if key not in found]
    raise ConfigError(f"info_keys {missing} did not turn up in {PROBE_STEPS} random steps; {advice}")
