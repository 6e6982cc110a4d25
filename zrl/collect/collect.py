"""The hot loop: one fragment of T steps of B environments, written straight into a slot."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zrl.collect.actor import ArrayStep, BaseActorModule
from zrl.collect.bounds import check_actions
from zrl.collect.cut import CutEpisodes, is_default, value_of
from zrl.collect.envs import Columns, Ends, check_rewards
from zrl.collect.spaces import describe
from zrl.collect.streams import RandomStreams
from zrl.data.fragment import Array, Inputs, Row, Slot, map_leaves
from zrl.data.spec import FragmentSpec, flatten, tree_paths
from zrl.errors import ActorError, EnvError, RecordError
from zrl.metrics import StageTimes

MANY = 8  # ends of episodes in one step that are written faster by arrays than one by one


def collect(ctx: Context, slot: Slot) -> None:
    """Fill `slot` with the next fragment; every byte of its leaves is written.

    Row by row: ``(x_t, a_{t-1}, r_t, d_t; h_t) → (a_t, h_{t+1})`` by the actor, which reads row t of the slot itself,
    then one step of all environments, which write ``x_{t+1}, r_{t+1}`` into row t+1. See `zrl.data.spec` for the
    fields.

    Raises:
        EnvError, ActorError: what came does not fit the record. The fragment is then worthless, and `ctx` must be
            started anew.
    """
    clock, times, columns, write = perf_counter, ctx.times, ctx.columns, ctx.write
    step, rows, onto = ctx.step, slot.rows, None if ctx.read is _on_host else ctx.read
    returns, acting, stepping, in_envs = ctx.returns, 0.0, 0.0, times.env
    started = clock()
    live: list[int] | None = None  # the columns that are not frozen; None: all of them
    with ctx.streams.active(), torch.inference_mode(), _blaming(ctx, slot):
        hx = _begin(ctx, slot)
        arrays = ctx.arrays
        if arrays is not None and not arrays.begin(ctx.n_steps, ctx.spec.n_columns):
            arrays = None
        for t in range(ctx.n_steps):
            row, nxt = rows[t], rows[t + 1]
            t0 = clock()
            if arrays is None:
                actions, hx, info = step(*(onto(row) if onto else row.inputs), hx)
                t1 = clock()
                write(actions, info, row)
            else:
                outputs, hx = arrays(row.obs[0], row.fin, hx, t)
                t1 = clock()
                for out, x in zip(row.output_arrays, outputs, strict=True):
                    out[:] = x
            ends = columns.step(row, nxt) if live is None else columns.step_some(row, nxt, live)
            acting += t1 - t0
            stepping += clock() - t1
            returns += columns.rewards
            if columns.dummies:
                hx = _skip(ctx, columns.dummies, t, row, nxt, hx)
            if ends is not None:
                hx = _end_episodes(ctx, slot, ends, t, hx)
                if ctx.sticky and t + 1 < ctx.n_steps:
                    live = _freeze(ctx, slot, t + 1, ends, live)
                    if not live:
                        break
        _finish(ctx, slot, hx)
    check_rewards(slot.np.state.rew[1:], ctx.clock + 1)
    if ctx.action_bounds:
        paths = [leaf.path for leaf in slot.spec.fields["state.act"].leaves]
        check_actions([a[1:] for a in slot.arrays_of("state.act")], ctx.action_bounds, paths, ctx.clock + 1)
    ctx.clock += ctx.n_steps
    taken = int(np.count_nonzero(slot.np.mask))
    times.n_env_steps += taken
    times.n_masked += slot.np.mask.size - taken
    times.actor += acting
    times.write += stepping - (times.env - in_envs)
    times.total += clock() - started


@contextlib.contextmanager
def _blaming(ctx: Context, slot: Slot) -> Iterator[None]:
    """Environments' exceptions come as `EnvError` already; whatever else is raised comes out of the actor."""
    slot.np.state.rew.fill(0)  # so that what is not finite there afterwards is of this fragment
    try:
        yield
    except RecordError:
        raise
    except Exception as e:
        # an actor that was shown a NaN reward is not to blame for what it says to that
        check_rewards(slot.np.state.rew[1:], ctx.clock + 1)
        raise ActorError(f"the actor raised {describe(e)}") from e


@dataclasses.dataclass
class Context:
    """What lives on from one fragment to the next.

    Attributes:
        actor: acts, on `device`, as it is.
        columns: the environments.
        spec: of the fragments.
        streams: swapped in while a fragment is made.
        times: seconds by stage, since the start.
        initial_hx: the recurrent state of a first row.
        first_actions: the a_{-1} of a first row, one array a leaf.
        sticky: freeze a column after an end.
        action_bounds: see `zrl.collect.bounds.action_bounds`; empty: nothing to look at once a fragment.
        n_steps: T.
        resets: whether the actor is to be told of ends.
        cut: the episodes that were truncated within the fragment in hand.
        carry: a row that keeps row T of the last fragment, to become row 0 of the next.
        hx: h_0 of the next fragment; tensors of our own, never views of a slot.
        returns: float64 ``[B]``, reward so far of the running episodes.
        starts: int64 ``[B]``, number of the step with which they began.
        clock: steps taken by a column since the start.
        arrays: acts in the place of `step`, wherever it can.
        remake: puts a new environment in the place of column j, the k-th one that is made anew; None: nobody can.
        step, value: ``actor.step`` and ``actor.value``, or the same with checks around them.
        read: the actor's inputs from a row, on the actor's device.
        write: the actor's outputs into the record.
    """

    actor: BaseActorModule
    columns: Columns
    spec: FragmentSpec
    streams: RandomStreams
    times: StageTimes
    initial_hx: Any
    first_actions: Sequence[Array]
    device: torch.device
    sticky: bool
    action_bounds: Sequence[tuple[Any, Any] | None] = ()
    step: Callable[..., tuple[Any, Any, Any]] = dataclasses.field(init=False)
    value: Callable[..., Tensor] = dataclasses.field(init=False)
    read: Callable[[Row], Inputs] = dataclasses.field(init=False)
    write: OutputWriter = dataclasses.field(init=False)
    carry: Row = dataclasses.field(init=False)
    hx: Any = dataclasses.field(init=False)
    returns: Array = dataclasses.field(init=False)
    starts: Array = dataclasses.field(init=False)
    n_steps: int = dataclasses.field(init=False)
    resets: bool = dataclasses.field(init=False)
    cut: CutEpisodes = dataclasses.field(init=False)
    clock: int = 0
    arrays: ArrayStep | None = None
    remake: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        self.n_steps = self.spec.n_steps
        self.step, self.value = self.actor.step, self.actor.value
        self.read = _on_host if self.device.type == "cpu" else _onto(self.device)
        self.write = OutputWriter(self.spec)
        self.carry = Slot(self.spec.with_steps(1)).rows[0]
        # an actor without recurrent state need not be told of ends, unless it wants to be
        self.resets = bool(flatten(self.initial_hx)[0]) or not is_default(self.actor.reset, BaseActorModule.reset)
        self.cut = CutEpisodes(self)
        self.restart()

    def restart(self) -> None:
        """Begin new episodes in all columns. The row that follows is the first of its kind: it ends no episode."""
        row = self.carry
        first_row(row, self.first_actions)
        with self.streams.active():
            self.columns.reset(row)
        self.hx = map_leaves(torch.clone, self.initial_hx)
        if self.resets:  # a learnt initial state may have changed since the actor was probed
            with torch.inference_mode():
                for j in range(self.spec.n_columns):
                    self.hx = self.actor.reset(j, self.hx)
        self.returns = np.zeros(self.spec.n_columns)
        self.starts = np.full(self.spec.n_columns, self.clock, np.int64)


def first_row(row: Row, actions: Sequence[Array]) -> None:
    """Make `row` the first one ever, observation apart: ``fin`` and ``term`` True, the first actions, no reward."""
    for a in row.carried:
        a.fill(0)
    for a, first in zip(row.act, actions, strict=True):
        a[:] = first
    row.fin.fill(True)
    row.term.fill(True)


class OutputWriter:
    """Writes what the actor returned: actions into the next row, the info dict into this one."""

    def __init__(self, spec: FragmentSpec) -> None:
        self._act = spec.fields["state.act"].tree
        self._info = spec.fields["actor"].tree
        self._one_action = self._act.is_leaf()
        leaves = (*spec.fields["state.act"].leaves, *spec.fields["actor"].leaves)
        self._sizes = [math.prod(leaf.full_shape(spec.n_columns)) // leaf.rows for leaf in leaves]
        # one action and a dict of two tensors or more, the usual case, need no walk through trees
        keys = self._info.entries() if all(x.is_leaf() for x in self._info.children()) else []
        self._n_keys = len(keys) if self._one_action and len(keys) > 1 else -1
        self._pick = operator.itemgetter(*keys or [None])

    def __call__(self, actions: Any, info: Any, row: Row) -> None:
        try:
            usual = type(info) is dict and len(info) == self._n_keys
            values = (actions, *self._pick(info)) if usual else self._flatten(actions, info)
        except KeyError:
            values = self._flatten(actions, info)  # raises
        try:
            for x, out, size in zip(values, row.outputs, self._sizes, strict=True):
                if x.numel() != size:  # copy_ would broadcast; it refuses another shape of the same size
                    raise self._misshapen(values, row)
                out.copy_(x)
        except (AttributeError, TypeError, RuntimeError) as e:  # no tensor, or one of another shape
            raise self._misshapen(values, row) from e

    def _flatten(self, actions: Any, info: Any) -> tuple[Any, ...]:
        try:
            acts = (actions,) if self._one_action else self._act.flatten_up_to(actions)
            return (*acts, *self._info.flatten_up_to(info))
        except (ValueError, TypeError) as e:
            raise ActorError(f"the actor returned another structure than at the start: {e}") from e

    def _misshapen(self, values: Sequence[Any], row: Row) -> ActorError:
        paths = tree_paths(self._act, "state.act") + tree_paths(self._info, "info")
        triples = list(zip(paths, values, row.outputs, strict=True))
        wrong = [t for t in triples if not isinstance(t[1], Tensor) or t[1].shape != t[2].shape]
        if not wrong:  # a sparse tensor, a failed device
            return ActorError("an output of the actor cannot be copied into the record")
        path, x, out = wrong[0]
        found = str(list(x.shape)) if isinstance(x, Tensor) else type(x).__name__
        return ActorError("the actor's output changed its shape", leaf=path, expected=str(list(out.shape)), found=found)


def _on_host(row: Row) -> Inputs:
    return row.inputs


def _onto(device: torch.device) -> Callable[[Row], Inputs]:
    def read(row: Row) -> Inputs:
        inputs: Inputs = map_leaves(lambda x: x.to(device, non_blocking=True), row.inputs)
        return inputs

    return read


def _begin(ctx: Context, slot: Slot) -> Any:
    """Row 0 and h_0 from where the last fragment stopped; what only ends of episodes write is cleared."""
    ctx.cut.clear()
    r = slot.np
    for a in (r.state.fin, r.state.term, r.final_value, r.ep_return, r.ep_length, *slot.arrays_of("final_obs")):
        a.fill(0)
    r.mask.fill(True)
    for a, kept in zip(slot.rows[0].carried, ctx.carry.carried, strict=True):
        a[:] = kept
    for out, h in zip(slot.tensors_of("hx"), flatten(ctx.hx)[0], strict=True):
        out.copy_(h)
    return ctx.hx


def _end_episodes(ctx: Context, slot: Slot, ends: Ends, t: int, hx: Any) -> Any:
    """Write what the ends of episodes add to row t+1, begin the next ones, and return h_{t+1} after the resets."""
    started, acting = perf_counter(), ctx.times.actor
    ended, nxt = ends.columns, slot.rows[t + 1]
    if not all(ends.terminated) if type(ended) is list else not np.all(ends.terminated):
        # row t+1 holds the true final observations until `begin` replaces them, and fin is still False
        ctx.cut.keep(slot, t + 1, ends, hx)
    write = _write_ends if type(ended) is list and len(ended) < MANY else _write_many_ends
    write(ctx, ends, ctx.clock + t + 1, nxt)
    if nxt.final_obs:
        for obs, kept in zip(nxt.obs, nxt.final_obs, strict=True):
            kept[ended] = obs[ended]
    ctx.columns.begin(ended, nxt)
    hx = _reset_state(ctx, ended, hx)
    ctx.times.reset += perf_counter() - started - (ctx.times.actor - acting)
    return hx


def _write_ends(ctx: Context, ends: Ends, after: int, nxt: Row) -> None:
    """Flags and statistics of the episodes that ended with step number `after`."""
    for k, (j, terminated) in enumerate(zip(ends.columns, ends.terminated, strict=True)):
        nxt.fin[j] = True
        nxt.term[j] = terminated
        ret, length = ctx.returns[j], after - ctx.starts[j]
        if ends.infos and "episode" in ends.infos[k]:
            ret, length = episode_statistics(j, ends.infos[k]["episode"], ret, length)
        nxt.ep_return[j], nxt.ep_length[j] = ret, length
        ctx.returns[j] = 0.0
        ctx.starts[j] = after


def _write_many_ends(ctx: Context, ends: Ends, after: int, nxt: Row) -> None:
    """The same, by arrays: for the hundreds of columns that a vector environment may have."""
    ended = np.asarray(ends.columns)
    nxt.fin[ended] = True
    nxt.term[ended] = ends.terminated
    nxt.ep_return[ended] = ctx.returns.take(ended)
    nxt.ep_length[ended] = after - ctx.starts.take(ended)
    for j, info in zip(ended.tolist() if ends.infos else (), ends.infos, strict=True):
        if "episode" in info:
            ret, length = nxt.ep_return[j], nxt.ep_length[j]
            nxt.ep_return[j], nxt.ep_length[j] = episode_statistics(j, info["episode"], ret, length)
    ctx.returns[ended] = 0.0
    ctx.starts[ended] = after


def _reset_state(ctx: Context, columns: Sequence[int] | Array, hx: Any) -> Any:
    """The recurrent state with `columns` back at its initial value, one after the other unless that is zero."""
    if not ctx.resets:
        return hx
    if is_default(ctx.actor.reset, BaseActorModule.reset) and all(h.is_floating_point() for h in flatten(hx)[0]):
        return map_leaves(lambda h: h.index_fill(1, torch.as_tensor(columns, device=h.device), 0), hx)
    for j in columns:
        hx = ctx.actor.reset(int(j), hx)
    return hx


def _skip(ctx: Context, dummies: Sequence[int], t: int, row: Row, nxt: Row, hx: Any) -> Any:
    """The step of these columns only began their episode: no action was taken at row t. Row t+1 says that it begins
    one, like the very first row, so that h_{t+1} is reset by whoever goes through the rows again, too."""
    for j in dummies:
        row.mask[j] = False
        nxt.fin[j] = nxt.term[j] = True
        ctx.starts[j] = ctx.clock + t + 1
    return _reset_state(ctx, dummies, hx)


def episode_statistics(j: int, episode: Any, ret: float, length: int) -> tuple[float, int]:
    """Return and length of an episode: what ``info["episode"]`` says counts, because wrappers change rewards."""
    if not isinstance(episode, dict) or "r" not in episode or "l" not in episode:
        return ret, length
    try:
        return float(np.asarray(episode["r"]).item()), int(np.asarray(episode["l"]).item())
    except (TypeError, ValueError) as e:
        raise EnvError(
            "the statistics of an episode are not one number each",
            env_index=j,
            phase="step",
            leaf="info['episode']",
            expected="'r' and 'l' as scalars",
            found=repr(episode),
        ) from e


def _freeze(ctx: Context, slot: Slot, row: int, ends: Ends, live: list[int] | None) -> list[int]:
    """Freeze the columns that ended at `row` until the end of the fragment; returns those that go on."""
    r = slot.np
    ended = ends.columns
    r.mask[row:, ended] = False
    r.state.fin[row + 1 :, ended] = True
    r.state.term[row + 1 :, ended] = True
    left = [j for j in (range(ctx.spec.n_columns) if live is None else live) if j not in ended]
    if not left:  # nothing to step any more: the remaining rows repeat this one
        for a in (*slot.arrays_of("state.obs"), *slot.arrays_of("state.act")):
            a[row + 1 :] = a[row]
        for a in (r.state.rew[row + 1 :], *(a[row:] for a in slot.arrays_of("env"))):
            a.fill(0)
    return left


def _finish(ctx: Context, slot: Slot, hx: Any) -> None:
    """What closes a fragment: thaw frozen columns, v(x_T), and row T and h_T kept for the next one."""
    frozen = np.flatnonzero(~slot.np.mask[-1]).tolist() if ctx.sticky else []
    ctx.columns.finish(frozen, slot.rows[-1])
    if frozen:
        hidden = ~slot.np.mask
        for a in slot.arrays_of("actor"):
            a[hidden] = 0
        for j in frozen:
            ctx.starts[j] = ctx.clock + ctx.n_steps
        hx = _reset_state(ctx, frozen, hx)
    ctx.cut.write(slot)
    last = slot.rows[-1]
    slot.pt.bootstrap[0].copy_(value_of(ctx, ctx.read(last), hx))
    for kept, a in zip(ctx.carry.carried, last.carried, strict=True):
        kept[:] = a
    if [h.shape for h in flatten(hx)[0]] != [h.shape for h in slot.tensors_of("hx")]:
        expected, found = ([list(h.shape) for h in hs] for hs in (slot.tensors_of("hx"), flatten(hx)[0]))
        raise ActorError("the recurrent state changed its shape", leaf="hx", expected=str(expected), found=str(found))
    # an actor may hand its inputs on as state: keep copies, for the slot will be written again
    ctx.hx = map_leaves(torch.clone, hx)
