"""Environments as columns: one interface for the loop, whatever stands behind it.

`Columns` is that interface. It fits plain environments (`PlainColumns`, here) and vector environments alike: ``step``
writes what came of one step of all columns into the next row, with the *final* observation where an episode ended;
``begin`` then puts the first observation of the next episode in its place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, MutableSequence, Sequence
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker

from zrl.collect.encoding import action_reader, obs_writer
from zrl.collect.spaces import EnvLayout, check_alike, check_env, describe, reset_env
from zrl.collect.writers import LeafWriter
from zrl.data.fragment import Array, Row
from zrl.data.spec import ArraySpec
from zrl.errors import EnvError
from zrl.metrics import StageTimes

_UNSET = object()  # no result of a step yet


class Ends(NamedTuple):
    """Episodes that ended with one step; at least one.

    Attributes:
        columns: where, in ascending order.
        terminated: whether by termination, one flag a column.
        infos: of the final steps, one a column; empty if none of them holds statistics of its episode.
    """

    columns: Sequence[int] | Array
    terminated: Sequence[bool] | Array
    infos: Sequence[dict[str, Any]]


class Columns(Protocol):
    """``B`` environments that are stepped together. All writing goes into rows of the slot in hand.

    ``step`` and ``step_some``, and nothing else, add the seconds inside ``env.step`` to the stage ``env``; the rest of
    their time is the stage ``write``.

    Attributes:
        n: B.
        rewards: float64 ``[B]``, the rewards of the last step before they were rounded to float32.
        dummies: columns whose last step was none: it only began their next episode, as vector environments do it that
            cannot reset a column alone. Their final observation stays in the row of the end.
        calls: one word that every call of an environment counts up when it is done: a sign of life.
    """

    n: int
    rewards: Array
    dummies: Sequence[int]
    calls: MutableSequence[int] | memoryview

    def reset(self, row: Row) -> None:
        """Begin an episode in every column, the very first one with its seed: observations into `row`."""

    def step(self, row: Row, nxt: Row) -> Ends | None:
        """Step every column with ``nxt.act``; write observations and rewards into `nxt`, infos into ``row.env``.

        Returns the episodes that ended, if any; the observation of their columns in `nxt` is the final one.
        """

    def step_some(self, row: Row, nxt: Row, live: Sequence[int]) -> Ends | None:
        """The same for the columns `live`; the others repeat ``obs`` and ``act`` of `row`, with no reward."""

    def begin(self, columns: Sequence[int] | Array, row: Row) -> None:
        """Begin the next episode of the columns that ended: first observations into `row`."""

    def finish(self, frozen: Sequence[int], row: Row) -> None:
        """A fragment is over: the columns `frozen` begin their next episode in `row`, its last, unless they have."""

    def close(self) -> None:
        """Close the environments."""


class PlainColumns:
    """``B`` plain Gymnasium environments, stepped one after the other in this process.

    Args:
        envs: the environments; column j is ``envs[j]``.
        layout: what of them is recorded.
        seeds: of the first reset, one a column.
        times: gets the seconds spent in ``env.step`` (stage ``env``).
        debug: refuse what would otherwise be cast or let pass, and look at every value and action.

    Raises:
        EnvError: a column that is no environment, a vector of them, or one with other spaces.
    """

    def __init__(
        self, envs: Sequence[Any], layout: EnvLayout, seeds: Sequence[int], times: StageTimes, *, debug: bool = False
    ) -> None:
        for j, env in enumerate(envs):
            check_env(env, j)
            check_alike(env, layout, j)
        self.n = len(envs)
        self.rewards: Array = np.zeros(self.n)
        self.dummies: Sequence[int] = ()
        self.calls: MutableSequence[int] | memoryview = [0]
        self._envs = list(envs)
        self._steps: list[Callable[[Any], Any]] = []  # after the first reset
        self._long: list[Any] = []  # environments whose steps pass through wrappers that have yet to do their work
        # What came of the last step stays until the next one replaces it, value by value: NumPy keeps the memory of
        # only a few small arrays at hand for new ones, and a whole row given up at once is more than that.
        self._observations: list[Any] = [None] * self.n
        self._raw_rewards: list[Any] = [None] * self.n
        self._seeds: list[int | None] = list(seeds)
        self._layout = layout
        self._times = times
        self._debug = debug
        self._write_obs = obs_writer(layout.obs, layout.observation_space, self.n, debug=debug)
        self._read_actions = action_reader(layout.action_space, layout.act)
        self._infos = info_writers(layout.env or {}, self.n, debug=debug)

    def reset(self, row: Row) -> None:
        for j, env in enumerate(self._envs):
            seed = self._seeds[j] if self._seeds else None
            if seed is not None:
                env.action_space.seed(seed)  # so that environments that sample from it repeat themselves
            self._write_obs.write_one(j, reset_env(env, j, seed), row.obs, "reset")
            self.calls[0] += 1
        self._seeds = []
        self._long = list(self._envs)
        self._shorten()

    def replace(self, j: int, env: Any, seed: int) -> None:
        """Put `env` in the place of column `j`; `reset` comes next, with this seed for it. The old one is closed.

        Raises:
            EnvError: no environment, or one with other spaces; it is closed.
        """
        try:
            check_env(env, j)
            check_alike(env, self._layout, j)
        except EnvError:
            with contextlib.suppress(Exception):
                env.close()
            raise
        with contextlib.suppress(Exception):  # it is broken
            self._envs[j].close()
        self._envs[j] = env
        self._seeds = self._seeds or [None] * self.n  # another one may have been replaced since the last reset
        self._seeds[j] = seed

    def step(self, row: Row, nxt: Row) -> Ends | None:
        actions = self._read_actions(nxt.act)
        if self._debug:
            self._read_actions.check(nxt.act, range(self.n))
        observations, rewards = self._observations, self._raw_rewards
        infos: list[dict[str, Any]] = []
        ended: list[tuple[int, bool, dict[str, Any]]] = []
        keep_infos = bool(self._infos)
        calls = self.calls
        first = calls[0] + 1
        j, result = 0, _UNSET
        started = perf_counter()
        try:
            for j, step in enumerate(self._steps):
                result = _UNSET
                result = step(actions[j])
                calls[0] = first + j
                observations[j], rewards[j], terminated, truncated, info = result
                if terminated or truncated:
                    ended.append((j, bool(terminated), info))
                if keep_infos:
                    infos.append(info)
        except Exception as e:
            raise _failure(e, j, actions, result) from e
        self._times.env += perf_counter() - started
        self._write_obs.write(observations, nxt)
        self.rewards = nxt.rew[:] = _reward_array(rewards)
        if self._debug:
            check_finite(self.rewards)
        if keep_infos:
            for j, info in enumerate(infos):
                self._write_info(j, info, row.env)
        return _ends(ended) if ended else None

    def step_some(self, row: Row, nxt: Row, live: Sequence[int]) -> Ends | None:
        for a, b in zip(row.obs, nxt.obs, strict=True):
            b[:] = a
        frozen = np.ones(self.n, bool)
        frozen[live] = False
        for a, b in zip(row.act, nxt.act, strict=True):
            b[frozen] = a[frozen]
        self.rewards = np.zeros(self.n)
        for a in row.env:
            a[:] = 0
        actions = self._read_actions(nxt.act, live)
        if self._debug:
            self._read_actions.check(nxt.act, live)
        ended: list[tuple[int, bool, dict[str, Any]]] = []
        for j in live:
            result: Any = _UNSET
            started = perf_counter()
            try:
                result = self._steps[j](actions[j])
                self.calls[0] += 1
                obs, rew, terminated, truncated, info = result
                over = bool(terminated or truncated)
            except Exception as e:
                raise _failure(e, j, actions, result) from e
            self._times.env += perf_counter() - started
            self._write_obs.write_one(j, obs, nxt.obs)
            self.rewards[j] = checked_reward(rew, j)
            if self._infos:
                self._write_info(j, info, row.env)
            if over:
                ended.append((j, bool(terminated), info))
        if self._debug:
            check_finite(self.rewards)
        nxt.rew[:] = self.rewards
        return _ends(ended) if ended else None

    def finish(self, frozen: Sequence[int], row: Row) -> None:
        """Nothing to do for frozen columns: they wait at the first observation, which `row` repeats."""
        if self._long:
            self._shorten()

    def _shorten(self) -> None:
        self._long = [env for env in self._long if not shorten(env)]
        self._steps = [env.step for env in self._envs]

    def begin(self, columns: Sequence[int] | Array, row: Row) -> None:
        for j in columns:
            self._write_obs.write_one(j, reset_env(self._envs[j], j), row.obs, "reset")
            self.calls[0] += 1

    def _write_info(self, j: int, info: dict[str, Any], arrays: Sequence[Array]) -> None:
        """Declared keys of one info; where a key is absent NaN or 0, and False in its mask."""
        _check_info(info, j)
        for key, writer, value, mask in self._infos:
            present = arrays[mask][j] = key in info
            if present:
                writer.write_one(j, info[key], arrays[value])
            else:
                arrays[value][j] = np.nan if writer.dtype.kind in "fc" else 0

    def close(self) -> None:
        with contextlib.ExitStack() as every:  # all of them, even if one of them raises
            for env in reversed(self._envs):
                every.callback(env.close)


def _ends(ended: Sequence[tuple[int, bool, dict[str, Any]]]) -> Ends:
    columns, terminated, infos = map(list, zip(*ended, strict=True))
    for j, info in zip(columns, infos, strict=True):
        _check_info(info, j)
    return Ends(columns, terminated, infos)


def shorten(env: Any) -> bool:
    """Let ``step`` pass by wrappers that have nothing more to do, of those that `gymnasium.make` puts around every
    environment; whether none of them is left in its way.

    `OrderEnforcing` refuses steps before the first reset, `PassiveEnvChecker` looks at the first two steps; afterwards,
    for good, each only costs calls of functions. `env` stays as it is in all else.
    """
    chain = []
    while isinstance(env, gym.Wrapper):
        chain.append(env)
        env = env.env
    left = 0
    for wrapper in reversed(chain):
        if type(wrapper) is OrderEnforcing:
            over = wrapper.has_reset
        elif type(wrapper) is PassiveEnvChecker:
            over = wrapper.checked_step and getattr(wrapper, "checked_data_reuse", True)
        else:
            continue
        left += not over
        if over:
            wrapper.step = wrapper.env.step  # type: ignore[method-assign]
    return not left


def info_writers(specs: dict[str, ArraySpec], n: int, *, debug: bool) -> list[tuple[str, LeafWriter, int, int]]:
    """By declared key: its writer, and where its values and its mask are among the arrays of a row's ``env``."""
    names = sorted(specs)  # the order of the leaves of a dict
    return [
        (key, LeafWriter(specs[key], f"env[{key!r}]", n, debug=debug, declared=True), i, names.index(f"_{key}"))
        for i, key in enumerate(names)
        if not key.startswith("_")
    ]


def _check_info(info: Any, j: int) -> None:
    if not isinstance(info, dict):
        raise EnvError(
            "the info of a step is no dict",
            env_index=j,
            phase="step",
            leaf="info",
            expected="a dict",
            found=type(info).__name__,
        )


def check_finite(rewards: Array) -> None:
    """Under debug at every step, what `check_rewards` looks at once a fragment: else the actor sees it first."""
    if not np.isfinite(rewards).all():
        j = int(np.flatnonzero(~np.isfinite(rewards))[0])
        raise EnvError(
            "a reward is not finite",
            env_index=j,
            phase="step",
            leaf="state.rew",
            expected="a finite number",
            found=str(rewards[j]),
        )


def _failure(e: Exception, j: int, actions: Sequence[Any], result: Any) -> EnvError:
    """The error for an exception out of the stepping loop: the environment's own, or a broken return value."""
    if result is _UNSET:
        return EnvError(f"step({actions[j]!r}) raised {describe(e)}", env_index=j, phase="step")
    return EnvError(
        "step broke the Gymnasium contract",
        env_index=j,
        phase="step",
        expected="(obs, reward, terminated, truncated, info) with scalar flags",
        found=describe(e),
    )


def _reward_array(rewards: Sequence[Any]) -> Array:
    """Scalar rewards as float64 ``[B]``; raises `EnvError` as `checked_reward` does."""
    try:
        a = np.array(rewards, np.float64)
        if a.ndim == 1:
            return a
    except Exception:  # a tensor that requires grad, say; one by one they get a name
        pass
    return np.array([checked_reward(r, j) for j, r in enumerate(rewards)])


def checked_reward(r: Any, j: int) -> float:
    """A scalar reward as a float.

    Raises:
        EnvError: a vector, or no number at all.
    """
    try:
        if np.ndim(r) == 0:
            return float(r)
        found = f"an array of shape {list(np.shape(r))} (reduce vector rewards to one number in a wrapper)"
    except Exception:
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
