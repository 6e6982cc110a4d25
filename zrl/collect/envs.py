"""Environments as columns: one interface for the loop, whatever stands behind it.

`Columns` is that interface. It fits plain environments (`PlainColumns`, here) and vector environments alike: ``step``
writes what came of one step of all columns into the next row, with the *final* observation where an episode ended;
``begin`` then puts the first observation of the next episode in its place.
"""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import optree

from zrl.collect.spaces import EnvLayout, describe, reset_env
from zrl.data.fragment import Array, Row
from zrl.data.spec import ArraySpec, flatten, tree_paths
from zrl.errors import EnvError
from zrl.metrics import StageTimes

End = tuple[int, bool, dict[str, Any]]  # column, terminated, the info of the final step
_RANK = {"b": 0, "u": 1, "i": 1, "f": 2, "c": 3}  # a value may move to a kind of at least its rank


class Columns(Protocol):
    """``B`` environments that are stepped together. All writing goes into rows of the slot in hand.

    Attributes:
        n: B.
        rewards: float64 ``[B]``, the rewards of the last step before they were rounded to float32.
    """

    n: int
    rewards: Array

    def reset(self, row: Row) -> None:
        """Begin an episode in every column, the very first one with its seed: observations into `row`."""

    def step(self, row: Row, nxt: Row) -> Sequence[End]:
        """Step every column with ``nxt.act``; write observations and rewards into `nxt`, infos into ``row.env``.

        Returns the columns whose episode ended; their observation in `nxt` is the final one.
        """

    def step_some(self, row: Row, nxt: Row, live: Sequence[int]) -> Sequence[End]:
        """The same for the columns `live`; the others repeat ``obs`` and ``act`` of `row`, with no reward."""

    def begin(self, ends: Iterable[End], row: Row) -> None:
        """Begin the next episode of the columns that ended: first observations into `row`."""

    def close(self) -> None:
        """Close the environments."""


class LeafWriter:
    """Writes one leaf of the observations of all columns into its row, and refuses what does not belong there.

    The fast path is one `numpy.concatenate` that casts nothing; only when it fails does anybody look closer.
    """

    def __init__(self, spec: ArraySpec, path: str, n: int, *, debug: bool) -> None:
        self.path = path
        self.shape = spec.shape
        self.dtype = np.dtype(spec.dtype)
        self.write = self._write_arrays if spec.shape else self._write_scalars
        self._lengths = [spec.shape[0]] * n if spec.shape else []
        self._scalars = (n,)
        self._casting = "no"
        self._debug = debug
        self._warned = False

    def _write_arrays(self, values: Sequence[Any], row: Array, flat: Array) -> None:
        try:
            # concatenate itself refuses other dtypes, other numbers of axes, other lengths of all axes but the first
            if list(map(len, values)) == self._lengths:
                np.concatenate(values, 0, flat, casting=self._casting)  # type: ignore[call-overload]
                return
        except (TypeError, ValueError):
            pass
        for j, x in enumerate(values):
            self.write_one(j, x, row)

    def _write_scalars(self, values: Sequence[Any], row: Array, flat: Array) -> None:
        try:
            a = np.array(values)
        except ValueError:  # columns of different shapes
            a = np.empty(0)
        if a.dtype == self.dtype and a.shape == self._scalars:
            row[:] = a
            return
        for j, x in enumerate(values):
            self.write_one(j, x, row)

    def write_one(self, j: int, x: Any, row: Array) -> None:
        """Write column `j`, with every check."""
        try:
            a = np.asarray(x)
        except ValueError as e:
            raise self._refusal(j, f"something that is no array ({e})") from e
        if a.shape != self.shape:
            raise self._refusal(j, f"{a.dtype}{list(a.shape)}")
        if a.dtype != self.dtype:
            self._check_cast(j, x, a)
        row[j] = a

    def _check_cast(self, j: int, x: Any, a: Array) -> None:
        """Let a value of another dtype pass if that loses nothing but precision; say so once."""
        kind = _RANK.get(a.dtype.kind)
        if kind is None or kind > _RANK[self.dtype.kind]:
            raise self._refusal(j, f"{a.dtype}{list(a.shape)}")
        if self.dtype.kind in "ui" and a.size:
            limits = np.iinfo(self.dtype)
            if a.min() < limits.min or a.max() > limits.max:
                raise self._refusal(j, f"a value outside of {limits.min} to {limits.max}")
        if not isinstance(x, (np.ndarray, np.generic)):  # Python numbers have no dtype to get wrong
            return
        if self._debug:
            raise self._refusal(j, f"{a.dtype}{list(a.shape)}")
        if self.dtype.kind in "fc" and np.can_cast(a.dtype, self.dtype, "same_kind"):
            self._casting = "same_kind"  # not for integers: their limits are looked at every time
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"environment {j}: {self.path} is {a.dtype}, its space says {self.dtype}; it is cast at every step",
                stacklevel=2,
            )

    def _refusal(self, j: int, found: str) -> EnvError:
        return EnvError(
            "an observation does not fit its record",
            env_index=j,
            phase="step",
            leaf=self.path,
            expected=f"{self.dtype}{list(self.shape)}",
            found=found,
        )


class ObsWriter:
    """Writes whole observations, nested as the environment nests them."""

    def __init__(self, specs: Any, n: int, *, debug: bool) -> None:
        leaves, self._tree = flatten(specs)
        paths = tree_paths(self._tree, "state.obs")
        self.leaves = [LeafWriter(s, p, n, debug=debug) for s, p in zip(leaves, paths, strict=True)]
        self._flat = self._tree.is_leaf()

    def write(self, observations: Sequence[Any], row: Row) -> None:
        """All columns into `row`."""
        if self._flat:
            self.leaves[0].write(observations, row.obs[0], row.obs_flat[0])
            return
        try:
            columns = zip(*map(self._tree.flatten_up_to, observations), strict=True)
        except (ValueError, TypeError):
            for j, obs in enumerate(observations):
                self.split(j, obs)
            raise
        for leaf, values, a, flat in zip(self.leaves, columns, row.obs, row.obs_flat, strict=True):
            leaf.write(values, a, flat)

    def write_one(self, j: int, obs: Any, arrays: Sequence[Array]) -> None:
        """Column `j` of one array ``[B, ...]`` per leaf."""
        for leaf, x, a in zip(self.leaves, self.split(j, obs), arrays, strict=True):
            leaf.write_one(j, x, a)

    def split(self, j: int, obs: Any) -> list[Any]:
        """The leaves of one observation.

        Raises:
            EnvError: it is nested in another way than the first one was.
        """
        try:
            return self._tree.flatten_up_to(obs)
        except (ValueError, TypeError) as e:
            raise EnvError(
                "an observation is nested in another way than the first one",
                env_index=j,
                phase="step",
                leaf="state.obs",
                expected=str(self._tree),
                found=str(e),
            ) from e


class ActionReader:
    """Turns a row of recorded actions into what every environment takes: clipped and cast copies."""

    def __init__(self, spaces: Any) -> None:
        leaves, self._tree = optree.tree_flatten(spaces)
        self._leaves = [_leaf_reader(space) for space in leaves]
        self._flat = self._tree.is_leaf()

    def __call__(self, arrays: Sequence[Array]) -> list[Any]:
        """One action a column from one array ``[B, ...]`` per leaf."""
        if self._flat:
            return self._leaves[0](arrays[0])
        columns = zip(*(read(a) for read, a in zip(self._leaves, arrays, strict=True)), strict=True)
        return [self._tree.unflatten(parts) for parts in columns]


def _leaf_reader(space: gym.Space[Any]) -> Callable[[Array], list[Any]]:
    dtype = np.dtype(space.dtype)
    if isinstance(space, gym.spaces.Discrete):
        return lambda a: a.tolist()
    if isinstance(space, gym.spaces.Box):
        low, high = space.low, space.high
        if not space.shape:  # arrays, not the NumPy scalars that `list` makes
            return lambda a: [np.asarray(x) for x in np.clip(a, low, high).astype(dtype)]
        if np.isfinite(low).any() or np.isfinite(high).any():
            return lambda a: list(np.clip(a, low, high).astype(dtype, copy=False))
    # copies: an environment may keep its action, or write into it
    return lambda a: list(a.astype(dtype))


class PlainColumns:
    """``B`` plain Gymnasium environments, stepped one after the other in this process.

    Args:
        envs: the environments; column j is ``envs[j]``.
        layout: what of them is recorded.
        seeds: of the first reset, one a column.
        times: gets the seconds spent in ``env.step`` (stage ``env``) and in writing (stage ``write``).
        debug: refuse what would otherwise be cast or let pass.
    """

    def __init__(
        self, envs: Sequence[Any], layout: EnvLayout, seeds: Sequence[int], times: StageTimes, *, debug: bool = False
    ) -> None:
        self.n = len(envs)
        self.rewards: Array = np.zeros(self.n)
        self._envs = list(envs)
        self._steps = [env.step for env in envs]
        self._seeds = list(seeds)
        self._times = times
        self._write_obs = ObsWriter(layout.obs, self.n, debug=debug)
        self._read_actions = ActionReader(layout.act)
        self._info_keys = [k for k in sorted(layout.env) if not k.startswith("_")] if layout.env else []
        self._info_names = sorted(layout.env) if layout.env else []

    def reset(self, row: Row) -> None:
        for j, env in enumerate(self._envs):
            seed = self._seeds[j] if self._seeds else None
            if seed is not None:
                env.action_space.seed(seed)  # so that environments that sample from it repeat themselves
            self._write_obs.write_one(j, reset_env(env, j, seed), row.obs)
        self._seeds = []

    def step(self, row: Row, nxt: Row) -> list[End]:
        actions = self._read_actions(nxt.act)
        observations: list[Any] = []
        rewards: list[float] = []
        infos: list[dict[str, Any]] = []
        ends: list[End] = []
        keep_infos = bool(self._info_keys)
        started = perf_counter()
        try:
            for step, action in zip(self._steps, actions, strict=True):
                obs, rew, terminated, truncated, info = step(action)
                if terminated or truncated:
                    ends.append((len(rewards), bool(terminated), info))
                if keep_infos:
                    infos.append(info)
                observations.append(obs)
                rewards.append(rew)
        except Exception as e:
            raise _failure(e, len(rewards), actions) from e
        stepped = perf_counter()
        self._write_obs.write(observations, nxt)
        self.rewards = nxt.rew[:] = _reward_array(rewards)
        if keep_infos:
            self._write_infos(infos, row.env)
        written = perf_counter()
        self._times.env += stepped - started
        self._times.write += written - stepped
        return ends

    def step_some(self, row: Row, nxt: Row, live: Sequence[int]) -> list[End]:
        for a, b in zip(row.obs, nxt.obs, strict=True):
            b[:] = a
        frozen = np.ones(self.n, bool)
        frozen[live] = False
        for a, b in zip(row.act, nxt.act, strict=True):
            b[frozen] = a[frozen]
        self.rewards = np.zeros(self.n)
        for a in row.env:
            a[:] = 0
        actions = self._read_actions(nxt.act)
        ends: list[End] = []
        for j in live:
            started = perf_counter()
            try:
                obs, rew, terminated, truncated, info = self._steps[j](actions[j])
                ended = bool(terminated or truncated)
            except Exception as e:
                raise _failure(e, j, actions) from e
            self._times.env += perf_counter() - started
            self._write_obs.write_one(j, obs, nxt.obs)
            self.rewards[j] = _checked_reward(rew, j)
            if self._info_keys:
                self._write_info(j, info, row.env)
            if ended:
                ends.append((j, bool(terminated), info))
        nxt.rew[:] = self.rewards
        return ends

    def begin(self, ends: Iterable[End], row: Row) -> None:
        for j, _, _ in ends:
            self._write_obs.write_one(j, reset_env(self._envs[j], j), row.obs)

    def _write_infos(self, infos: Sequence[dict[str, Any]], arrays: Sequence[Array]) -> None:
        for j, info in enumerate(infos):
            self._write_info(j, info, arrays)

    def _write_info(self, j: int, info: dict[str, Any], arrays: Sequence[Array]) -> None:
        """Declared keys of one info; where a key is absent NaN or 0, and False in its mask."""
        by_name = dict(zip(self._info_names, arrays, strict=True))
        for key in self._info_keys:
            a = by_name[key]
            present = key in info
            by_name[f"_{key}"][j] = present
            value = np.asarray(info[key]) if present else np.asarray(np.nan if a.dtype.kind in "fc" else 0)
            if present and (value.shape != a.shape[1:] or not np.can_cast(value.dtype, a.dtype, "same_kind")):
                raise EnvError(
                    "an info value does not fit its declaration",
                    env_index=j,
                    phase="step",
                    leaf=f"env[{key!r}]",
                    expected=f"{a.dtype}{list(a.shape[1:])}",
                    found=f"{value.dtype}{list(value.shape)}",
                )
            a[j] = value

    def close(self) -> None:
        with contextlib.ExitStack() as every:  # all of them, even if one of them raises
            for env in reversed(self._envs):
                every.callback(env.close)


def _failure(e: Exception, j: int, actions: Sequence[Any]) -> EnvError:
    """The error for an exception out of the stepping loop: the environment's own, or a broken return value."""
    if len(traceback.extract_tb(e.__traceback__)) > 1:
        return EnvError(f"step({actions[j]!r}) raised {describe(e)}", env_index=j, phase="step")
    return EnvError(
        "step broke the Gymnasium contract",
        env_index=j,
        phase="step",
        expected="(obs, reward, terminated, truncated, info) with scalar flags",
        found=describe(e),
    )


def _reward_array(rewards: Sequence[Any]) -> Array:
    """Scalar rewards as float64 ``[B]``; raises `EnvError` as `_checked_reward` does."""
    try:
        a = np.array(rewards, np.float64)
        if a.ndim == 1:
            return a
    except (TypeError, ValueError):
        pass
    return np.array([_checked_reward(r, j) for j, r in enumerate(rewards)])


def _checked_reward(r: Any, j: int) -> float:
    """A scalar reward as a float.

    Raises:
        EnvError: a vector, or no number at all.
    """
    try:
        if np.ndim(r) == 0:
            return float(r)
        found = f"an array of shape {list(np.shape(r))} (reduce vector rewards to one number in a wrapper)"
    except (TypeError, ValueError):
        found = repr(r)
    raise EnvError(
        "a reward is not one number", env_index=j, phase="step", leaf="state.rew", expected="a scalar", found=found
    )


def check_rewards(rew: Array, first_step: int) -> None:
    """Refuse NaN and infinite rewards: they would silently spoil every return behind them.

    Args:
        rew: ``[T, B]``, the rewards of one fragment.
        first_step: number of the step that led into its first row.

    Raises:
        EnvError: naming the column and the step.
    """
    if np.isfinite(rew).all():
        return
    t, j = map(int, np.argwhere(~np.isfinite(rew))[0])
    raise EnvError(
        f"the reward of step {first_step + t} is not finite",
        env_index=j,
        phase="step",
        leaf="state.rew",
        expected="a finite float32",
        found=str(rew[t, j]),
    )
