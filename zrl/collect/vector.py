"""Vector environments as columns: one call a step for all of them, and every array copied once.

Whatever the autoreset mode, a column that ended begins its next episode *at once*, so that the record is that of plain
environments, number for number:

=============  ======================================================================================
SAME_STEP      the environment has done it; the true final observation is in ``info["final_obs"]``
NEXT_STEP,     the step returned the true final observation; once it is copied, the ended columns are
DISABLED       reset alone: ``reset(options={"reset_mask": …})``, or ``reset(ids)`` of an EnvPool
NEXT_STEP      where no column can be reset alone, the next step does it: that row takes no action
               (``mask`` False), and is the one difference to plain environments
=============  ======================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, MutableSequence, Sequence
from time import perf_counter
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from zrl.collect.batched import BatchActions, BatchWriter
from zrl.collect.envs import Ends, check_finite, checked_reward, info_writers
from zrl.collect.spaces import EnvLayout, describe
from zrl.collect.vector_probe import autoreset_mode, close_vector, is_pool, present_in, reset_all, resetter
from zrl.collect.writers import LeafWriter
from zrl.data.fragment import Array, Row
from zrl.errors import EVERY, EnvError, RecordError
from zrl.metrics import StageTimes

_NONE: Array = np.empty(0, np.intp)


class VectorColumns:
    """The columns of one vector environment.

    A column cannot stand still while the others are stepped. A frozen one is stepped on: what it does is discarded, and
    it begins a new episode at the fragment's end.

    Args:
        env: a `gymnasium.vector.VectorEnv` that `check_vector` lets pass.
        layout: what of it is recorded.
        seeds: of the first reset, one a column; none for an EnvPool, which got them when it was made.
        times: gets the seconds spent in ``env.step`` (stage ``env``).
        partial: whether a column can be reset alone, as `zrl.collect.vector_probe.why_not_alone` says.
        debug: refuse what would otherwise be cast or let pass, and look at every value and action.
    """

    def __init__(
        self,
        env: Any,
        layout: EnvLayout,
        seeds: Sequence[int],
        times: StageTimes,
        *,
        partial: bool,
        debug: bool = False,
    ) -> None:
        self.n = int(env.num_envs)
        self.rewards: Array = np.zeros(self.n)
        self.dummies: Sequence[int] = ()
        self.calls: MutableSequence[int] | memoryview = [0]
        self._env = env
        self._mode = autoreset_mode(env)
        self._partial = partial
        self._reset_alone = resetter(env)
        self._pool = is_pool(env)
        self._seeds = list(seeds)
        self._times = times
        self._debug = debug
        self._obs = BatchWriter(layout, self.n, debug=debug)
        self._actions = BatchActions(layout)
        self._infos = info_writers(layout.env or {}, self.n, debug=debug)
        self._every = np.arange(self.n)
        self._firsts: Any = None  # SAME_STEP: what the last step returned, with first observations
        self._pending: Array = _NONE  # without partial reset: the columns whose next step only begins an episode
        self._strayed = np.zeros(self.n, bool)  # stepped while frozen

    def reset(self, row: Row) -> None:
        obs = reset_all(self._env, self._seeds)
        self._seeds = []
        self.calls[0] += 1
        self._pending = _NONE
        self._strayed.fill(False)
        try:
            self._obs.write(obs, row, "reset")
        except RecordError:
            raise
        except Exception as e:
            raise _broken_reset(EVERY, e) from e

    def step(self, row: Row, nxt: Row) -> Ends | None:
        actions = self._actions(nxt.act)
        if self._debug:
            self._actions.check(nxt.act, range(self.n))
        started = perf_counter()
        try:
            result = self._env.step(actions)
        except Exception as e:
            raise _step_error(f"step raised {describe(e)}") from e
        self._times.env += perf_counter() - started
        self.calls[0] += 1
        try:
            return self._record(result, row, nxt)
        except RecordError:
            raise
        except Exception as e:
            raise _broken(describe(e)) from e

    def _record(self, result: Any, row: Row, nxt: Row) -> Ends | None:
        """Write what a step returned."""
        obs, terminated, truncated, info = self._take(result)
        self._obs.write(obs, nxt)
        done = terminated | truncated
        pending, self._pending = self._pending, _NONE
        self.dummies = pending.tolist() if pending.size else ()
        if self.dummies:
            self.rewards[pending], done[pending] = 0.0, False
        nxt.rew[:] = self.rewards
        if self._debug:
            check_finite(self.rewards)
        ended = done.nonzero()[0]
        final = info
        if ended.size and self._mode is AutoresetMode.SAME_STEP:
            final = self._final(obs, nxt, ended, info)
        if self._infos:
            self._write_infos(info, final, ended, pending, row.env)
        if not ended.size:
            return None
        return _ends(ended, terminated, final if "episode" in final else info)

    def _take(self, result: Any) -> tuple[Any, Array, Array, dict[str, Any]]:
        """``(obs, terminated, truncated, info)`` of a step, its rewards put in their place."""
        obs, rewards, terminated, truncated, info = result
        terminated, truncated = self._flags("terminated", terminated), self._flags("truncated", truncated)
        if not isinstance(info, dict):
            raise _broken(f"info: {type(info).__name__}")
        if self._pool and (info["env_id"] != self._every).any():
            raise _broken(f"columns in the order {info['env_id'].tolist()}")
        raw = np.asarray(rewards)
        if raw.shape == (self.n,) and raw.dtype.kind in "biuf":
            self.rewards[:] = raw
        else:
            self.rewards[:] = self._one_by_one(rewards, raw)
        return obs, terminated, truncated, info

    def _flags(self, name: str, flags: Any) -> Array:
        a = np.asarray(flags)
        if a.dtype != bool or a.shape != (self.n,):
            raise _broken(f"{name}: {a.dtype}{list(a.shape)}")
        return a

    def _one_by_one(self, rewards: Any, raw: Array) -> list[float]:
        """Rewards that are no array of numbers; the column that is to blame gets a name."""
        if raw.ndim == 0 or len(raw) != self.n:
            raise _broken(f"rewards of shape {list(raw.shape)}")
        return [checked_reward(r, j) for j, r in enumerate(rewards)]

    def _final(self, obs: Any, nxt: Row, ended: Array, info: dict[str, Any]) -> dict[str, Any]:
        """SAME_STEP: put the true final observations into `nxt`; returns the infos of the final steps."""
        self._firsts = obs
        if "final_obs" not in info:
            raise EnvError(
                "episodes ended, and the true final observations are missing",
                env_index=int(ended[0]),
                phase="step",
                leaf="info['final_obs']",
                expected="one observation for each column that ended, as with Gymnasium's SAME_STEP",
                found=f"keys {sorted(map(str, info))}",
            )
        self._obs.write_each(info["final_obs"], ended, nxt.obs, "step")
        final = info.get("final_info", {})
        return final if isinstance(final, dict) else {}

    def step_some(self, row: Row, nxt: Row, live: Sequence[int]) -> Ends | None:
        frozen = np.ones(self.n, bool)
        frozen[live] = False
        for a, b in zip(row.act, nxt.act, strict=True):
            b[frozen] = a[frozen]
        ends = self.step(row, nxt)
        self._strayed |= frozen
        for a, b in zip(row.obs, nxt.obs, strict=True):
            b[frozen] = a[frozen]
        for a in row.env:
            a[frozen] = 0
        nxt.rew[frozen] = self.rewards[frozen] = 0.0
        return self._of_live(ends, frozen) if ends is not None else None

    def _of_live(self, ends: Ends, frozen: Array) -> Ends | None:
        """What of `ends` counts; a frozen column that ended again is only made fit for its next step."""
        again = frozen[ends.columns]
        columns, terminated = np.asarray(ends.columns), np.asarray(ends.terminated)
        if again.any() and self._mode is AutoresetMode.DISABLED:
            self._begin_alone(columns[again], None)
        if again.all():
            return None
        infos = [info for info, skip in zip(ends.infos, again, strict=False) if not skip]
        return Ends(columns[~again], terminated[~again], infos)

    def begin(self, columns: Sequence[int] | Array, row: Row) -> None:
        ended = np.asarray(columns)
        if self._mode is AutoresetMode.SAME_STEP:
            self._obs.write_some(self._firsts, ended, ended, row.obs)
        elif self._partial:
            self._begin_alone(ended, row)
        else:
            self._pending = ended  # row t+1 keeps the final observation; the next step begins the episode

    def finish(self, frozen: Sequence[int], row: Row) -> None:
        """What frozen columns did meanwhile is over: their next episode begins in row T."""
        strayed = np.array([j for j in frozen if self._strayed[j]], np.intp)
        self._strayed.fill(False)
        if strayed.size:
            self._begin_alone(strayed, row)

    def _begin_alone(self, columns: Array, row: Row | None) -> None:
        """Reset these columns alone; their first observations into `row`."""
        try:
            obs, info = self._reset_alone(columns)
            self.calls[0] += 1
            if row is None:
                return
            rows = columns
            if self._pool:  # it returns the columns that were reset, and no others
                order = np.argsort(info["env_id"])
                rows = order[np.searchsorted(info["env_id"], columns, sorter=order)]
            self._obs.write_some(obs, rows, columns, row.obs)
        except RecordError:
            raise
        except Exception as e:
            raise _broken_reset(int(columns[0]), e) from e

    def _write_infos(
        self, info: dict[str, Any], final: dict[str, Any], ended: Array, skipped: Array, arrays: Sequence[Array]
    ) -> None:
        """Declared keys: where a column ended those of its final step; none of a step that only began an episode."""
        for key, writer, value, mask in self._infos:
            present = present_in(info, key, self.n)
            if final is not info:
                present[ended] = False
            present[skipped] = False
            self._write_info(info.get(key), np.flatnonzero(present), writer, arrays[value])
            if final is not info:
                late = ended[present_in(final, key, self.n)[ended]]
                self._write_info(final.get(key), late, writer, arrays[value])
                present[late] = True
            arrays[value][~present] = np.nan if writer.dtype.kind in "fc" else 0
            arrays[mask][:] = present

    @staticmethod
    def _write_info(values: Any, columns: Array, writer: LeafWriter, array: Array) -> None:
        if isinstance(values, np.ndarray) and values.dtype == array.dtype and values.shape == array.shape:
            array[columns] = values[columns]
            return
        for j in columns:
            writer.write_one(int(j), values[j], array)

    def close(self) -> None:
        close_vector(self._env)


def _ends(ended: Array, terminated: Array, info: Mapping[str, Any]) -> Ends:
    """What the loop wants to know of each end: with the statistics of the episode, if a wrapper has counted them."""
    episode = info.get("episode")
    if not isinstance(episode, Mapping) or "r" not in episode or "l" not in episode:
        return Ends(ended, terminated.take(ended), ())
    present = present_in(info, "episode", len(terminated))
    infos = [{"episode": {"r": episode["r"][j], "l": episode["l"][j]}} if present[j] else {} for j in ended.tolist()]
    return Ends(ended, terminated[ended], infos)


def _broken_reset(j: int, e: Exception) -> EnvError:
    return EnvError(f"reset raised, or broke Gymnasium's contract: {describe(e)}", env_index=j, phase="reset")


def _step_error(what: str) -> EnvError:
    return EnvError(what, env_index=EVERY, phase="step")


def _broken(found: str) -> EnvError:
    return EnvError(
        "step broke Gymnasium's contract for vector environments",
        env_index=EVERY,
        phase="step",
        expected="(obs, rewards [B], terminated [B] bool, truncated [B] bool, info dict), columns in order",
        found=found,
    )
