"""From an environment's spaces and a scratch instance to the leaves of the record, before the first real step."""

from __future__ import annotations

import collections
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import optree
from gymnasium.vector import VectorEnv

from zrl.collect.alike import unlike
from zrl.collect.encoding import LEAF_SPACES, ObsEncoder, encoder, is_encoded, rebuilt
from zrl.collect.writers import cast_problem, first_line, nesting_of
from zrl.data.spec import ArraySpec, flatten, tree_paths
from zrl.errors import ConfigError, EnvError, RecordError

Factory = Callable[..., Any]
Environments = Factory | Sequence[Any] | VectorEnv[Any, Any, Any]  # what makes them, or the environments themselves
PROBE_STEPS = 200  # random steps of a scratch environment that a listed info key may take to turn up


@dataclasses.dataclass(frozen=True)
class EnvLayout:
    """What of one environment goes into the record.

    Attributes:
        obs: tree of `ArraySpec`, in the containers that the environment really returns. A Text is int32 codes, a OneOf
            ``(index, (alternative 0, ...))``: see `zrl.collect.encoding`.
        act: tree of the leaf spaces of what actors return: Dict gives a dict, Tuple a tuple, OneOf ``(Discrete,
            (alternative 0, ...))``, Text `zrl.collect.encoding.TextCodes`.
        env: `ArraySpec` by key of ``info``, with a ``_key`` mask each; None if no key is declared.
        example: one observation of the scratch environment, nested like `obs`.
        observation_space, action_space: as the environment states them.
    """

    obs: Any
    act: Any
    env: dict[str, ArraySpec] | None
    example: Any
    observation_space: gym.Space[Any] | None
    action_space: gym.Space[Any]


def takes_seed(factory: Factory) -> bool:
    """Whether a factory is called with ``seed=``."""
    return "seed" in _parameters(factory)


def _parameters(factory: Factory) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(factory).parameters
    except (TypeError, ValueError):  # builtins and C callables may have no signature
        return {}


def make_env(factory: Factory, seed: int | list[int], env_index: int) -> Any:
    """Call a factory that takes no argument, or ``seed=``: an integer, or for a vector environment a list of them.

    Raises:
        EnvError: the factory raised, needs other arguments, or returned something without ``reset``, ``step`` or
            ``close``.
    """
    parameters = _parameters(factory)
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
    _check_methods(env, env_index)
    return env


def check_env(env: Any, env_index: int) -> None:
    """Look whether something is a plain environment.

    Raises:
        EnvError: a vector environment, or something without ``reset``, ``step`` or ``close``.
    """
    if isinstance(env, VectorEnv):  # first: an EnvPool is an instance of both
        raise EnvError(
            "a vector environment where a plain one belongs: here every environment is a column of its own",
            env_index=env_index,
            phase="factory",
            expected="a gymnasium.Env",
            found=type(env).__name__,
        )
    _check_methods(env, env_index)


def _check_methods(env: Any, env_index: int) -> None:
    missing = [name for name in ("reset", "step", "close") if not callable(getattr(env, name, None))]
    if isinstance(env, type) or missing:
        raise EnvError(
            "the factory must return an environment",
            env_index=env_index,
            phase="factory",
            expected="an object with reset, step and close",
            found=f"the class {env.__name__}" if isinstance(env, type) else f"{type(env).__name__}: no {missing[0]}",
        )


def check_alike(env: Any, layout: EnvLayout, env_index: int, *, prefix: str = "") -> None:
    """Look whether the spaces of an environment are those of `layout`. Only bounds of Boxes that are observed may
    differ.

    Args:
        prefix: of the attributes: ``"single_"`` for a vector environment.

    Raises:
        EnvError: naming the first leaf in which they differ.
    """
    for name, first in (("observation_space", layout.observation_space), ("action_space", layout.action_space)):
        space = getattr(env, prefix + name, None)
        if name == "observation_space" and (first is None or space is None):
            continue  # the observations themselves are looked at anyway
        if difference := unlike(first, space, name, bounds=name == "action_space"):
            leaf, expected, found = difference
            raise EnvError(
                "its spaces are not those of the other environments",
                env_index=env_index,
                phase="spaces",
                leaf=leaf,
                expected=expected,
                found=found,
            )


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
    check_reset(result, env_index)
    return result[0]


def check_reset(result: Any, env_index: int) -> None:
    """Look at what ``reset`` returned.

    Raises:
        EnvError: it is not ``(obs, info)``.
    """
    if isinstance(result, tuple) and len(result) == 2:
        if isinstance(result[1], dict):
            return
        found = f"as info a {type(result[1]).__name__}"
    else:
        found = type(result).__name__
    raise EnvError(
        "reset broke the Gymnasium contract",
        env_index=env_index,
        phase="reset",
        expected="(obs, info dict)",
        found=found,
    )


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
        EnvError: no plain environment, a space without a fixed shape, an observation that is not in its space, a dtype
            without a place.
        ConfigError: an info key that was not found or has no dtype.
    """
    check_env(env, -1)
    action_space = getattr(env, "action_space", None)
    if not isinstance(action_space, gym.Space):
        raise _space_error("action_space", "a gymnasium.Space", type(action_space).__name__)
    observation_space = getattr(env, "observation_space", None)
    if seed is not None:
        action_space.seed(seed)
    obs = reset_env(env, -1, seed)
    return layout_of(env, obs, action_space, observation_space, info_keys, may_step=may_step)


def layout_of(
    env: Any,
    obs: Any,
    action_space: gym.Space[Any],
    observation_space: Any,
    info_keys: Mapping[str, Any] | Iterable[str] | None,
    *,
    may_step: bool,
) -> EnvLayout:
    """The leaves of an environment, by its spaces and by one observation of one column.

    Args:
        env: is stepped at random, where `info_keys` is a list of names and it may be.

    Raises:
        EnvError, ConfigError: as `probe_env`.
    """
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
    if observation_space is not None and is_encoded(observation_space):
        obs = ObsEncoder(observation_space, obs_specs)(obs)
    info = _info_specs(env, info_keys, may_step) if info_keys else None
    return EnvLayout(obs_specs, act, info, obs, observation_space, action_space)


def _space_error(leaf: str, expected: str, found: str) -> EnvError:
    what = "the space cannot be recorded"
    return EnvError(what, env_index=-1, phase="spaces", leaf=leaf, expected=expected, found=found)


def space_leaves(space: gym.Space[Any], path: str) -> Any:
    """The tree of leaf spaces of what is recorded of a space, as in `EnvLayout.act`.

    Raises:
        EnvError: a space without a fixed shape.
    """
    return encoder(space, path).leaves


def observation_specs(space: Any, obs: Any, path: str) -> Any:
    """The tree of `ArraySpec` of an observation: containers as in `obs`, dtypes and shapes as in `space`.

    Where there is no space, `obs` itself decides.

    Raises:
        EnvError: `obs` and `space` do not match, or the space has no fixed shape.
        RecordError: a dtype outside the table.
    """
    if space is None:
        leaves, tree = flatten(obs)
        return tree.unflatten([_leaf_spec(x, p) for x, p in zip(leaves, tree_paths(tree, path), strict=True)])
    if isinstance(space, gym.spaces.Dict):
        # no subclasses but the ordered one: they are leaves to a flattener, or need arguments to be made anew
        plain = type(obs) in (dict, collections.OrderedDict)
        if not plain or set(obs) != set(space.spaces):
            found = f"keys {sorted(map(str, obs))}" if plain else type(obs).__name__
            raise _mismatch(path, f"a plain dict with keys {sorted(map(str, space.spaces))}", found)
        parts = {k: observation_specs(space[k], obs[k], f"{path}[{k!r}]") for k in obs}
        return type(obs)(parts)
    if isinstance(space, gym.spaces.Tuple):
        named = optree.is_namedtuple_instance(obs)
        if not (named or type(obs) in (tuple, list)) or len(obs) != len(space):
            found = f"{type(obs).__name__} of {len(obs)}" if isinstance(obs, (tuple, list)) else type(obs).__name__
            raise _mismatch(path, f"a tuple, namedtuple or list of {len(space)}", found)
        parts_ = [observation_specs(s, x, f"{path}[{i}]") for i, (s, x) in enumerate(zip(space, obs, strict=True))]
        return rebuilt(obs, parts_)
    part = encoder(space, path)
    spaces, tree = flatten(part.leaves)
    specs = [ArraySpec(np.dtype(s.dtype).name, tuple(s.shape)) for s in spaces]
    try:
        leaves = tree.flatten_up_to(part.encode(obs))
    except RecordError as e:
        raise _mismatch(e.leaf, e.expected, e.found) from e
    for where, spec, x in zip(tree_paths(tree, path), specs, leaves, strict=True):
        _check_first(x, spec, where)
    return tree.unflatten(specs)


def _check_first(x: Any, spec: ArraySpec, path: str) -> None:
    a = _as_array(x, path, str(spec))
    if a.shape != spec.shape:
        raise _mismatch(path, str(spec), f"{nesting_of(x)} of shape {list(a.shape)}")
    if problem := cast_problem(x, a, np.dtype(spec.dtype)):
        raise _mismatch(path, str(spec), problem)


def _leaf_spec(x: Any, path: str) -> ArraySpec:
    return ArraySpec.of(_as_array(x, path, "an array"))


def _as_array(x: Any, path: str, expected: str) -> np.ndarray[Any, Any]:
    try:
        return np.asarray(x)
    except Exception as e:
        raise _mismatch(path, expected, f"something that is no array ({first_line(e)})") from e


def _mismatch(leaf: str, expected: str, found: str) -> EnvError:
    what = "the first observation is not what the observation space says"
    return EnvError(what, env_index=-1, phase="reset", leaf=leaf, expected=expected, found=found)


def _info_specs(env: Any, info_keys: Mapping[str, Any] | Iterable[str], may_step: bool) -> dict[str, ArraySpec]:
    """`ArraySpec` by declared key, each with a ``_key`` mask beside it."""
    if isinstance(info_keys, str) or not isinstance(info_keys, Iterable):
        raise ConfigError(f"info_keys must be a list of keys or a mapping, not {info_keys!r}")
    keys = list(info_keys)
    if wrong := [key for key in keys if not isinstance(key, str)]:
        raise ConfigError(f"info_keys: every key must be a string, not {wrong[0]!r}")
    if reserved := [key for key in keys if key.startswith("_")]:
        raise ConfigError(f"info_keys {reserved}: names with a leading underscore are those of the masks")
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ConfigError(f"info_keys {twice}: given twice")
    if isinstance(info_keys, Mapping):
        found = {key: _declared(key, value) for key, value in info_keys.items()}
    else:
        found = _found_by_stepping(env, keys, may_step)
    return {name: spec for key, s in found.items() for name, spec in ((key, s), (f"_{key}", ArraySpec("bool")))}


def _declared(key: str, value: Any) -> ArraySpec:
    try:
        if isinstance(value, ArraySpec):
            return value
        if isinstance(value, gym.Space):
            if not isinstance(value, LEAF_SPACES):
                raise TypeError
            return ArraySpec(np.dtype(value.dtype).name, tuple(value.shape or ()))
        if isinstance(value, (type, str, np.dtype)):
            return ArraySpec(np.dtype(value).name)
        return ArraySpec.of(value)
    except Exception as e:  # whatever NumPy raises over things that are none of these
        expected = "a dtype, a space of one array (Box, Discrete, MultiDiscrete, MultiBinary) or an example array"
        raise ConfigError(f"info_keys[{key!r}]: expected {expected}, not {value!r}") from e


def _found_by_stepping(env: Any, keys: list[str], may_step: bool) -> dict[str, ArraySpec]:
    advice = "declare its dtype: info_keys={key: dtype, space or example}"
    if not may_step:
        raise ConfigError(f"info_keys {keys}: there is no scratch environment to find them with; {advice}")
    found: dict[str, ArraySpec] = {}
    for _ in range(PROBE_STEPS):
        info, ended = _random_step(env)
        for key in keys:
            if key not in found and key in info:
                found[key] = _declared(key, _as_info(key, info[key]))
        if len(found) == len(keys):
            return found
        if ended:
            reset_env(env, -1)
    missing = [key for key in keys if key not in found]
    raise ConfigError(f"info_keys {missing} did not turn up in {PROBE_STEPS} random steps; {advice}")


def _random_step(env: Any) -> tuple[dict[str, Any], bool]:
    """The info of one step of the scratch environment with a random action, and whether it ended the episode."""
    try:
        result = env.step(env.action_space.sample())
    except Exception as e:
        raise EnvError(f"step raised {describe(e)}", env_index=-1, phase="step") from e
    try:
        _, _, terminated, truncated, info = result
        ended = bool(terminated or truncated)
        if not isinstance(info, dict):
            raise TypeError(f"info is no dict but {type(info).__name__}")
    except Exception as e:
        raise EnvError(
            "step broke the Gymnasium contract",
            env_index=-1,
            phase="step",
            expected="(obs, reward, terminated, truncated, info dict) with scalar flags",
            found=describe(e),
        ) from e
    return info, ended


def _as_info(key: str, value: Any) -> np.ndarray[Any, Any]:
    try:
        return np.asarray(value)
    except Exception as e:
        found = f"something that is no array ({first_line(e)})"
        raise EnvError(
            "an info value cannot be recorded",
            env_index=-1,
            phase="step",
            leaf=f"env[{key!r}]",
            expected="an array",
            found=found,
        ) from e
