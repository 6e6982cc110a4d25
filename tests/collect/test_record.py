"""What is in row t: every number of the record against `toys.simulate`, which is the definition written out slowly."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.toys import (
    Array,
    CountingActor,
    CountingEnv,
    DrawingEnv,
    Expected,
    RandomActor,
    RestlessActor,
    Script,
    SpaceEnv,
    action_of,
    reward_of,
    simulate,
    value_of,
)
from zrl import BaseActorModule, Batch, EnvError, Episode
from zrl.algo import returns
from zrl.collect.build import CollectOptions, build
from zrl.collect.collect import Context, collect
from zrl.data.fragment import Slot, map_leaves
from zrl.data.spec import flatten
from zrl.errors import ConfigError
from zrl.rollout import same
from zrl.zoo import GRUActor, MLPActor


def counting(
    scripts: Sequence[Script], n_steps: int, actor: BaseActorModule | None = None, **options: Any
) -> tuple[Context, list[CountingEnv]]:
    """A context over one `CountingEnv` a script."""
    envs = [CountingEnv(script, column=j) for j, script in enumerate(scripts)]
    o = CollectOptions(n_steps=n_steps, n_columns=len(envs), **options)
    return build(envs, actor or CountingActor(), o), envs


def fragments(ctx: Context, n: int, *, poison: bool = True) -> list[Slot]:
    """`n` fragments in a row, each in a slot of its own that was full of poison, or of zeros."""
    slots = []
    for _ in range(n):
        slot = Slot(ctx.spec)
        if poison:
            slot.poison()
        collect(ctx, slot)
        slots.append(slot)
    return slots


def assert_is(slot: Slot, want: Expected) -> None:
    """The record equals the simulated one, bit for bit; masked rows of the actor's info are zero."""
    r = slot.np
    got = {f.name: getattr(r.state, f.name, None) for f in dataclasses.fields(Expected)}
    for name in ("final_value", "ep_return", "ep_length", "mask", "hx", "bootstrap"):
        got[name] = getattr(r, name)
    got |= {"seen": r.actor["count"], "value": r.actor["value"], "final_obs": r.final_obs}
    for name, x in got.items():
        if x is not None:
            np.testing.assert_array_equal(x, getattr(want, name), err_msg=name)
    # what the actor said it saw at t is what row t holds, and nothing where it was not asked
    for name in ("obs", "act", "rew", "fin"):
        row = np.array(getattr(r.state, name)[:-1])
        row[~r.mask] = 0
        np.testing.assert_array_equal(r.actor[name], row, err_msg=f"info[{name!r}]")


def assert_chained(slots: Sequence[Slot]) -> None:
    """Row T of every fragment is row 0 of the next, in every leaf that has T+1 rows."""
    fields = ("state.obs", "state.act", "state.rew", "state.fin", "state.term")
    others = ("final_value", "ep_return", "ep_length", "final_obs")
    for one, two in itertools.pairwise(slots):
        for field in fields + others:
            for a, b in zip(one.arrays_of(field), two.arrays_of(field), strict=True):
                np.testing.assert_array_equal(a[-1], b[0], err_msg=field)


# -- by arithmetic ---------------------------------------------------------------------------------------------------

T = 5
SCRIPTS: dict[str, list[Script]] = {
    "no end": [{}],
    "row 1": [{1: "term"}],
    "row T-1": [{T - 1: "trunc"}],
    "row T": [{T: "trunc"}],
    "row T, terminated": [{T: "term"}],
    "rows T and T+1": [{T: "trunc", T + 1: "trunc"}],
    "every row": [dict.fromkeys(range(1, 8), "trunc")],
    "each way": [{3: "term"}, {3: "trunc"}, {3: "both"}, {}],
    "two in a fragment": [{2: "trunc", 4: "both", 9: "term"}, {6: "term", 7: "trunc"}],
    "all at once, then one by one": [{2: "term", 8: "trunc"}, {2: "trunc", 9: "term"}, {2: "both", 10: "trunc"}],
}


@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize("scripts", SCRIPTS.values(), ids=SCRIPTS)
def test_every_number_of_three_fragments(scripts: list[Script], sticky: bool) -> None:
    ctx, _ = counting(scripts, T, sticky=sticky, keep_final_obs=True)
    slots = fragments(ctx, 3)
    for slot, want in zip(slots, simulate(scripts, T, 3, sticky=sticky), strict=True):
        assert_is(slot, want)
    assert_chained(slots)


ENDS = st.dictionaries(st.integers(1, 24), st.sampled_from(["term", "trunc", "both"]), max_size=7)


@settings(max_examples=60, derandomize=True)
@given(
    scripts=st.lists(ENDS, min_size=1, max_size=3),
    n_steps=st.integers(1, 7),
    sticky=st.booleans(),
    keep=st.booleans(),
)
def test_every_number_for_any_script(scripts: list[Script], n_steps: int, sticky: bool, keep: bool) -> None:
    ctx, envs = counting(scripts, n_steps, sticky=sticky, keep_final_obs=keep)
    slots = fragments(ctx, 4)
    expected = simulate(scripts, n_steps, 4, sticky=sticky)
    for slot, want in zip(slots, expected, strict=True):
        assert_is(slot, want)
    assert_chained(slots)
    # the environments were stepped with the recorded actions, in order, and with no others
    for j, env in enumerate(envs):
        acts = [int(want.act[t + 1, j]) for want in expected for t in range(n_steps) if want.mask[t, j]]
        assert env.actions == acts
    assert ctx.times.n_env_steps == sum(int(want.mask.sum()) for want in expected)


def test_worked_numbers() -> None:
    """One truncated and one terminated end, spelt out, lest the simulation and the loop share a mistake."""
    ctx, _ = counting([{2: "trunc"}, {3: "both"}], 3, keep_final_obs=True)
    (slot,) = fragments(ctx, 1)
    s, r = slot.np.state, slot.np
    assert s.obs[:, 0].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
    assert s.obs[:, 1].tolist() == [[1, 0, 0], [1, 0, 1], [1, 0, 2], [1, 1, 0]]
    assert s.rew.T.tolist() == [[0, 1, 2, 11], [0, 1, 2, 3]]
    assert s.fin.T.tolist() == [[True, False, True, False], [True, False, False, True]]
    assert s.term.T.tolist() == [[True, False, False, False], [True, False, False, True]]
    # a_t = (column + 2 step + count) mod 5
    assert s.act.T.tolist() == [[0, 0, 3, 0], [0, 1, 4, 2]]
    assert r.actor["count"].T.tolist() == [[0, 1, 0], [0, 1, 2]]
    assert r.final_obs[2, 0].tolist() == [0, 0, 2]
    assert r.final_obs[3, 1].tolist() == [1, 0, 2 + 1]
    assert r.ep_return.T.tolist() == [[0, 0, 3, 0], [0, 0, 0, 6]]
    assert r.ep_length.T.tolist() == [[0, 0, 2, 0], [0, 0, 0, 3]]
    # v(x'_2): reward 2, two steps counted (the state before its reset), fin False, action 3, step 2 of episode 0
    assert r.final_value.T.tolist() == [[0, 0, 2 + 2 * 2**7 + 3 * 2**13 + 2 * 2**16, 0], [0, 0, 0, 0]]
    # v(x_3): column 0 goes on with episode 1; column 1 begins episode 1: its reward and action are the old ones
    assert r.bootstrap[0, 0] == 11 + 1 * 2**7 + 1 * 2**16 + 2**21
    assert r.bootstrap[0, 1] == 3 + 2**12 + 2 * 2**13 + 2**21


def test_obs_of_the_final_step_is_never_in_obs() -> None:
    """``obs[t]`` at an end is the first observation of the next episode: step 0 there, and only there."""
    ctx, _ = counting([{2: "trunc", 5: "term"}], 6)
    (slot,) = fragments(ctx, 1)
    np.testing.assert_array_equal(slot.np.state.obs[:, 0, 2] == 0, slot.np.state.fin[:, 0])


# -- returns ---------------------------------------------------------------------------------------------------------

GAMMA = 0.5


def exact_return(ends: Mapping[int, str], n_steps: int, t: int) -> float:
    """G_t of one column over one fragment: summed forward, from the numbers of the environment."""
    (x,) = simulate([ends], n_steps, 1)
    total, discount = 0.0, 1.0
    for k in range(t, n_steps):
        total += discount * float(x.rew[k + 1, 0])
        discount *= GAMMA
        if x.fin[k + 1, 0]:
            return total + discount * float(x.final_value[k + 1, 0])
    return total + discount * float(x.bootstrap[0, 0])


@pytest.mark.parametrize("at", [1, 2, T - 1, T])
@pytest.mark.parametrize("how", ["term", "trunc", "both"])
def test_returns_are_exact(at: int, how: str) -> None:
    ctx, _ = counting([{at: how}], T)
    (slot,) = fragments(ctx, 1)
    s, r = slot.pt.state, slot.pt
    kwargs = {"gamma": GAMMA, "bootstrap": r.bootstrap[0]}
    g = returns(s.rew, s.fin, final_value=r.final_value, **kwargs)[1:]
    assert g[:, 0].tolist() == [exact_return({at: how}, T, t) for t in range(T)]
    short = returns(s.rew[1:], s.fin[1:], final_value=r.final_value[1:], **kwargs)
    assert torch.equal(short, g)
    without = returns(s.rew, s.fin, **kwargs)[1:]
    affected = torch.arange(T) < at  # the steps of the episode that was cut
    assert torch.equal(without[:, 0] != g[:, 0], affected if how == "trunc" else torch.zeros(T, dtype=torch.bool))


def test_an_end_at_row_t_says_the_same_in_both_fragments() -> None:
    """The truncation at row T belongs to the fragment that made the step; the next one must not bootstrap from it."""
    ctx, _ = counting([{T: "trunc"}], T)
    one, two = fragments(ctx, 2)
    assert one.np.final_value[T, 0] == two.np.final_value[0, 0] != 0
    assert [e.length for e in batch_of(one).episodes] == [T]
    assert batch_of(two).episodes == []


@pytest.mark.parametrize("sticky", [False, True])
def test_g_equals_brute_force_over_rows(sticky: bool) -> None:
    """Returns over the whole record, every column and row, against sums over rows that follow the mask."""
    scripts = [{3: "trunc", 8: "term"}, {5: "both", 6: "trunc"}, {}]
    ctx, _ = counting(scripts, 4, sticky=sticky)
    for slot in fragments(ctx, 3):
        s, r = slot.np.state, slot.np
        got = returns(s.rew, s.fin, gamma=0.9, bootstrap=r.bootstrap[0], final_value=r.final_value)[1:]
        for j in range(len(scripts)):
            for t in range(4):
                if r.mask[t, j]:
                    np.testing.assert_allclose(got[t, j], brute_force(slot, t, j, 0.9), rtol=1e-6)


def brute_force(slot: Slot, t: int, j: int, gamma: float) -> float:
    s, r = slot.np.state, slot.np
    rows = list(range(t + 1, len(s.fin)))
    stop = next((k for k in rows if s.fin[k, j]), None)
    rows = [k for k in rows if stop is None or k <= stop]
    rewards = sum(gamma ** (k - t - 1) * float(s.rew[k, j]) for k in rows)
    tail = r.bootstrap[0, j] if stop is None else r.final_value[stop, j]
    return rewards + gamma ** len(rows) * float(tail)


# -- the first row ---------------------------------------------------------------------------------------------------


def test_the_first_row_ever() -> None:
    ctx, _ = counting([{}, {}], 3, keep_final_obs=True)
    (slot,) = fragments(ctx, 1)
    s, r = slot.np.state, slot.np
    assert s.fin[0].all()
    assert s.term[0].all()
    for a in (s.rew[0], s.act[0], r.final_value[0], r.ep_return[0], r.ep_length[0], r.final_obs[0], r.hx):
        assert not a.any()
    assert s.obs[0].tolist() == [[0, 0, 0], [1, 0, 0]]
    assert batch_of(slot).episodes == []


def test_the_first_action_lies_in_a_shifted_space() -> None:
    spaces = gym.spaces.Dict({"a": gym.spaces.Discrete(3, start=-7), "b": gym.spaces.Box(1.0, 2.0, (2,))})
    env = SpaceEnv(gym.spaces.Box(0, 1, (2,), np.float32), spaces)

    class Actor(RandomActor):
        def forward(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None) -> Any:
            assert (act["a"] >= -7).all()
            assert (act["a"] <= -5).all()
            actions = {"a": torch.full(fin.shape, -6), "b": torch.full((*fin.shape, 2), 1.5)}
            return actions, (), {"value": rew}

    ctx = build([env], Actor(), CollectOptions(n_steps=2, n_columns=1))
    (slot,) = fragments(ctx, 1)
    assert slot.np.state.act["a"][:, 0].tolist() == [-7, -6, -6]
    assert slot.np.state.act["b"][0].tolist() == [[0, 0]]


def test_the_first_state_is_the_actors_initial_one() -> None:
    """A learnt initial state: `reset` says what it is, at the start and at every end."""

    class Learnt(CountingActor):
        def reset(self, j: int, hx: Tensor) -> Tensor:
            assert isinstance(j, int)
            hx = hx.clone()
            hx[:, j] = 7.0
            return hx

        def forward(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None) -> Any:
            h = obs.new_full((1, fin.shape[1], 1), 7.0) if hx is None else hx
            return torch.zeros(fin.shape, dtype=torch.int64), h + 1, {"value": h[..., 0], "count": h[..., 0]}

    ctx, _ = counting([{2: "term"}, {}], 4, Learnt())
    one, two = fragments(ctx, 2)
    assert one.np.hx.flatten().tolist() == [7, 7]
    assert one.np.actor["count"].T.tolist() == [[7, 8, 7, 8], [7, 8, 9, 10]]
    assert two.np.hx.flatten().tolist() == [9, 11]


def test_a_restart_begins_with_a_first_row() -> None:
    ctx, envs = counting([{2: "trunc"}], 3)
    fragments(ctx, 1)
    ctx.restart()
    (slot,) = fragments(ctx, 1)
    s, r = slot.np.state, slot.np
    assert s.fin[0, 0]
    assert s.term[0, 0]
    assert not any(a[0, 0].any() for a in (s.rew, s.act, r.final_value, r.ep_return, r.ep_length, r.hx))
    assert s.obs[0, 0].tolist() == [0, 2, 0]
    assert len(envs[0].seeds) == 4  # the probe, the start, the end, the restart
    assert envs[0].seeds[-1] is None  # an environment is seeded once


def test_a_restart_forgets_the_rewards_of_the_episodes_it_cuts() -> None:
    ctx, _ = counting([{7: "term"}, {}], 4)
    fragments(ctx, 1)
    ctx.restart()
    (slot,) = fragments(ctx, 1)
    assert batch_of(slot).episodes == [Episode(11 + 12 + 13, 3, 0, False)]


# -- nothing is left over --------------------------------------------------------------------------------------------


class Everything(CountingActor):
    """Gives a leaf of every kind of dtype, none of them zero."""

    def forward(self, *inputs: Any, hx: Any = None) -> Any:
        actions, hx, info = super().forward(*inputs, hx=hx)
        one = torch.ones_like(info["count"])
        more = {"i8": one.to(torch.int8), "u8": one.to(torch.uint8), "nested": [one.double(), (one.bool(),)]}
        return actions, hx, info | more


@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize("scripts", SCRIPTS.values(), ids=SCRIPTS)
def test_no_poison_is_left(scripts: list[Script], sticky: bool) -> None:
    """Whatever a slot held before, the record is the same: all leaves, those of info included."""
    options = CollectOptions(T, len(scripts), sticky, keep_final_obs=True, info_keys={"n": int, "end": "float32"})

    def run(poison: bool) -> list[Slot]:
        envs = [QuietEnv(script, column=j) for j, script in enumerate(scripts)]
        return fragments(build(envs, Everything(), options), 3, poison=poison)

    for poisoned, clean in zip(run(True), run(False), strict=True):
        for leaf, a, b in zip(poisoned.spec.leaves, poisoned.arrays, clean.arrays, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=leaf.path)


class QuietEnv(CountingEnv):
    """Its info has ``end`` as a number."""

    def step(self, action: Any) -> Any:
        *rest, info = super().step(action)
        info = {"n": info["n"]} | ({"end": float(len(info["end"]))} if "end" in info else {})
        return *rest, info


@pytest.mark.parametrize("sticky", [False, True])
def test_a_slot_may_be_used_again(sticky: bool) -> None:
    """The same two slots in turn hold what fresh ones would."""
    scripts: list[Script] = [{2: "trunc", 6: "term"}, {1: "term", 9: "both"}]
    ctx, _ = counting(scripts, 3, sticky=sticky, keep_final_obs=True)
    slots = [Slot(ctx.spec), Slot(ctx.spec)]
    for i, want in enumerate(simulate(scripts, 3, 6, sticky=sticky)):
        collect(ctx, slots[i % 2])
        assert_is(slots[i % 2], want)


# -- sticky ----------------------------------------------------------------------------------------------------------


def test_sticky_row_by_row() -> None:
    ctx, envs = counting([{2: "trunc"}, {}], 5, sticky=True)
    one, two = fragments(ctx, 2)
    s, r = one.np.state, one.np
    tau = 2
    assert s.fin[:, 0].tolist() == [True, False, True, True, True, True]
    assert s.term[:, 0].tolist() == [True, False, False, True, True, True]
    for a in (s.obs, s.act):
        assert all(np.array_equal(a[t, 0], a[tau, 0]) for t in range(tau, 6))
    assert s.rew[:, 0].tolist() == [0, 1, 2, 0, 0, 0]
    assert r.final_value[tau, 0] != 0
    assert not r.final_value[tau + 1 :, 0].any()
    assert r.mask.T.tolist() == [[True, True, False, False, False], [True] * 5]
    assert not any(leaf[tau:, 0].any() for leaf in flatten(r.actor)[0])
    assert r.ep_length[:, 0].tolist() == [0, 0, 2, 0, 0, 0]
    # the next fragment starts the episode whose first observation was held all the time
    assert two.np.state.obs[:, 0].tolist() == [[0, 1, k] for k in range(6)]
    assert two.np.hx[0, 0, 0] == 0
    assert two.np.hx[0, 1, 0] == 5
    assert two.np.mask.all()  # fin[0] freezes nothing
    assert two.np.state.fin[0, 0]
    assert len(envs[0].actions) == 2 + 5


def test_sticky_episode_lengths_over_fragments() -> None:
    """An episode over three fragments behind one that froze: neither frozen rows nor the old rewards count."""
    script: Script = {2: "term", 13: "trunc"}
    ctx, _ = counting([script, {1: "term"}], 4, sticky=True)
    ended = [e for slot in fragments(ctx, 5) for e in batch_of(slot).episodes if e.column == 0]
    assert [(e.length, e.truncated) for e in ended] == [(2, False), (11, True)]
    assert [e.ret for e in ended] == [sum(reward_of(0, k) for k in (1, 2)), sum(reward_of(1, k) for k in range(1, 12))]


def test_sticky_everything_frozen_early() -> None:
    """When no column is left the environments rest; ends at the same and at different rows."""
    ctx, envs = counting([{1: "term", 6: "trunc"}, {3: "trunc", 4: "term"}], 6, sticky=True)
    one, two = fragments(ctx, 2)
    assert [len(env.actions) for env in envs] == [1 + 5, 3 + 1]
    assert one.np.mask.sum(0).tolist() == [1, 3]
    assert two.np.mask.sum(0).tolist() == [5, 1]
    assert ctx.times.n_env_steps == 10


def test_sticky_at_row_t_freezes_nothing() -> None:
    ctx, _ = counting([{3: "trunc"}], 3, sticky=True)
    one, two = fragments(ctx, 2)
    assert one.np.mask.all()
    assert two.np.mask.all()


def test_sticky_is_the_same_as_plain_where_nothing_ends() -> None:
    plain, _ = counting([{3: "term"}, {6: "trunc"}], 3)
    sticky, _ = counting([{3: "term"}, {6: "trunc"}], 3, sticky=True)
    for a, b in zip(fragments(plain, 3), fragments(sticky, 3), strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a.arrays, b.arrays, strict=True))


# -- on-policy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [MLPActor, GRUActor])
@pytest.mark.parametrize("sticky", [False, True])
def test_on_policy_importance_weights_are_one(kind: Any, sticky: bool) -> None:
    """A forward over the T rows of every fragment, from its hx, gives the densities that were acted with."""
    torch.manual_seed(0)
    actor = kind(DrawingEnv().observation_space, DrawingEnv().action_space)
    with same.rollout(DrawingEnv, actor, n_steps=7, n_envs=3, entropy=1, sticky=sticky) as batches:
        seen = 0
        for _, batch in zip(range(5), batches, strict=False):
            s = batch.state.rows(0, 7)
            _, _, info = actor(s.obs, s.act, s.rew, s.fin, hx=batch.hx)
            act = batch.state.act[1:]
            rho = (actor.log_prob(info, act) - actor.log_prob(batch.actor, act)).exp()
            assert (rho[batch.mask] - 1).abs().max() < 1e-6
            assert torch.isfinite(actor.log_prob(batch.actor, act)[batch.mask]).all()
            seen += len(batch.episodes)
        assert seen > 3


def test_bootstrap_advances_nothing() -> None:
    """v(x_T) at the end of one fragment is the value at row 0 of the next."""
    torch.manual_seed(0)
    actor = GRUActor(DrawingEnv().observation_space, DrawingEnv().action_space)
    with same.rollout(DrawingEnv, actor, n_steps=4, n_envs=2, entropy=2) as batches:
        last = next(batches).clone()
        for _, batch in zip(range(4), batches, strict=False):
            torch.testing.assert_close(batch.actor["value"][0], last.bootstrap[0], rtol=0, atol=1e-6)
            last = batch.clone()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("sticky", [False, True])
def test_values_leave_the_random_stream_as_they_found_it(sticky: bool, keep: bool) -> None:
    """Whether an actor draws in `value` makes no difference to its actions."""

    def acts(actor: RandomActor) -> list[Tensor]:
        with same.rollout(DrawingEnv, actor, 6, 3, entropy=3, sticky=sticky, keep_final_obs=keep) as batches:
            drawn = [next(batches).clone() for _ in range(8)]
        assert sum(len(batch.episodes) for batch in drawn) > 2
        return [batch.state.act for batch in drawn]

    assert all(torch.equal(a, b) for a, b in zip(acts(RandomActor()), acts(RestlessActor()), strict=True))


# -- final observations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize("actor", [RandomActor, RestlessActor])
def test_keeping_final_observations_changes_no_action(actor: type[RandomActor], sticky: bool) -> None:
    def run(keep: bool) -> list[Batch]:
        with same.rollout(DrawingEnv, actor(), 6, 3, entropy=3, sticky=sticky, keep_final_obs=keep) as batches:
            return [next(batches).clone() for _ in range(4)]

    for kept, plain in zip(run(True), run(False), strict=True):
        assert plain.final_obs is None
        plain.final_obs, kept.final_obs = kept.final_obs, None
        for field in ("state", "actor", "bootstrap", "final_value", "mask", "ep_return", "ep_length"):
            for a, b in zip(flatten(getattr(kept, field))[0], flatten(getattr(plain, field))[0], strict=True):
                assert torch.equal(a, b), field


@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize("one_buffer", [False, True])
def test_the_true_final_observation_even_if_a_reset_overwrites_it(one_buffer: bool, sticky: bool) -> None:
    scripts: list[Script] = [{2: "trunc", 5: "term"}, {4: "both", 6: "trunc"}]
    envs = [CountingEnv(script, column=j, one_buffer=one_buffer) for j, script in enumerate(scripts)]
    options = CollectOptions(n_steps=4, n_columns=2, keep_final_obs=True, sticky=sticky)
    slots = fragments(build(envs, CountingActor(), options), 3)
    for slot, want in zip(slots, simulate(scripts, 4, 3, sticky=sticky), strict=True):
        assert_is(slot, want)


# -- infos -----------------------------------------------------------------------------------------------------------


def test_info_keys_of_a_mapping() -> None:
    """``env[t]`` is the info of the step by a_t, at an end that of the final step; absent: NaN or 0, and no mask."""
    keys = {
        "n": np.int64,
        "end": "float32",
        "never": gym.spaces.Box(0, 1, (2,), np.float32),
        "neither": np.zeros(2, int),
    }
    env = QuietEnv({2: "trunc", 4: "term"})
    ctx = build([env], CountingActor(), CollectOptions(n_steps=3, n_columns=1, info_keys=keys))
    one, two = fragments(ctx, 2)
    assert one.np.env["n"][:, 0].tolist() == [1, 2, 3]
    assert two.np.env["n"][:, 0].tolist() == [4, 5, 6]
    assert one.np.env["_n"].all()
    np.testing.assert_array_equal(one.np.env["end"][:, 0], [np.nan, 5, np.nan])
    np.testing.assert_array_equal(two.np.env["end"][:, 0], [4, np.nan, np.nan])
    assert one.np.env["_end"][:, 0].tolist() == [False, True, False]
    assert two.np.env["_end"][:, 0].tolist() == [True, False, False]
    assert one.np.env["never"].shape == (3, 1, 2)
    assert np.isnan(one.np.env["never"]).all()
    assert not one.np.env["neither"].any()
    assert not one.np.env["_never"].any()
    assert {name: a.dtype.name for name, a in one.np.env.items() if not name.startswith("_")} == {
        "n": "int64",
        "end": "float32",
        "never": "float32",
        "neither": "int64",
    }


def test_info_keys_of_a_list_are_found_on_a_scratch_environment() -> None:
    made: list[QuietEnv] = []

    def factory() -> QuietEnv:
        made.append(QuietEnv({3: "trunc"}))
        return made[-1]

    ctx = build(factory, CountingActor(), CollectOptions(n_steps=4, n_columns=2, info_keys=["end", "n"]))
    assert [env.n for env in made] == [3, 0, 0]  # only the scratch one was stepped
    assert [env.n_closed for env in made] == [1, 0, 0]
    (slot,) = fragments(ctx, 1)
    assert slot.np.env["n"].tolist() == [[1, 1], [2, 2], [3, 3], [4, 4]]
    assert slot.np.env["_end"][:, 0].tolist() == [False, False, True, False]


def test_info_keys_on_frozen_rows() -> None:
    env = QuietEnv({2: "trunc"})
    options = CollectOptions(n_steps=4, n_columns=1, sticky=True, info_keys={"n": int, "end": float})
    (slot,) = fragments(build([env], CountingActor(), options), 1)
    assert slot.np.env["_n"][:, 0].tolist() == [True, True, False, False]
    assert slot.np.env["_end"][:, 0].tolist() == [False, True, False, False]
    assert slot.np.env["n"][:, 0].tolist() == [1, 2, 0, 0]


def test_the_info_of_a_reset_is_never_recorded() -> None:
    env = CountingEnv({2: "trunc"})
    (slot,) = fragments(build([env], CountingActor(), CollectOptions(4, 1, info_keys={"reset": bool})), 1)
    assert not slot.np.env["_reset"].any()


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ("n", "list"),
        (["absent"], "absent"),
        ({"n": object}, "n"),
        ({"n": {}}, "n"),
        ({"_n": int}, "_n"),
        ({"n": int, "_n": int}, "_n"),
    ],
)
def test_info_keys_that_make_no_sense(keys: Any, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        build(CountingEnv, CountingActor(), CollectOptions(2, 1, info_keys=keys))


def test_info_keys_by_name_need_a_scratch_environment() -> None:
    with pytest.raises(ConfigError, match="declare"):
        build([CountingEnv()], CountingActor(), CollectOptions(2, 1, info_keys=["n"]))


@pytest.mark.parametrize("declared", [np.zeros(2), "bool"])
def test_an_info_value_that_does_not_fit(declared: Any) -> None:
    ctx = build([CountingEnv()], CountingActor(), CollectOptions(2, 1, info_keys={"n": declared}))
    with pytest.raises(EnvError) as e:
        fragments(ctx, 1)
    assert (e.value.env_index, e.value.leaf, e.value.found) == (0, "env['n']", "int64[]")


# -- episodes --------------------------------------------------------------------------------------------------------


def batch_of(slot: Slot) -> Batch:
    return Batch.of_record(slot.pt, (), 0)


def test_episodes_over_fragments() -> None:
    ctx, _ = counting([{2: "trunc", 3: "term", 8: "both"}, {5: "trunc"}], 4)
    ended = [batch_of(slot).episodes for slot in fragments(ctx, 2)]
    assert ended == [
        [Episode(1 + 2, 2, 0, True), Episode(11, 1, 0, False)],
        [Episode(1 + 2 + 3 + 4 + 5, 5, 1, True), Episode(21 + 22 + 23 + 24 + 25, 5, 0, False)],
    ]


class Doubled(gym.RewardWrapper[Any, Any]):
    def reward(self, reward: Any) -> float:
        return 2.0 * float(reward)


@pytest.mark.parametrize("sticky", [False, True])
def test_the_wrappers_word_on_an_episode_counts(sticky: bool) -> None:
    """`RecordEpisodeStatistics` inside of a wrapper that changes rewards: the record has both."""

    def factory() -> Any:
        return Doubled(gym.wrappers.RecordEpisodeStatistics(CountingEnv({3: "trunc", 5: "term"})))

    ctx = build(factory, CountingActor(), CollectOptions(4, 1, sticky=sticky))
    slots = fragments(ctx, 3)
    assert slots[0].np.state.rew[1:4, 0].tolist() == [2, 4, 6]
    ended = [e for slot in slots for e in batch_of(slot).episodes]
    assert ended == [Episode(1 + 2 + 3, 3, 0, True), Episode(11 + 12, 2, 0, False)]


def test_returns_of_episodes_are_summed_in_double_precision() -> None:
    class Tiny(CountingEnv):
        def step(self, action: Any) -> Any:
            obs, _, term, trunc, info = super().step(action)
            return obs, 2.0**24 if self.n == 1 else 1.0, term, trunc, info

    ctx = build([Tiny({31: "term"})], RandomActor(), CollectOptions(31, 1))
    (slot,) = fragments(ctx, 1)
    assert slot.np.ep_return[31, 0] == 2.0**24 + 30


# -- nesting, steps, actions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sticky", [False, True])
def test_nested_observations_hold_the_same_numbers(sticky: bool) -> None:
    class Flattening(CountingActor):
        def forward(self, obs: Any, *rest: Any, hx: Any = None) -> Any:
            assert type(obs["at"]).__name__ == "Pair"
            flat = torch.cat([obs["at"].here, obs["at"].there.unsqueeze(-1).float()], -1)
            return super().forward(flat, *rest, hx=hx)

    scripts: list[Script] = [{2: "trunc", 6: "both"}, {1: "term", 4: "trunc"}]
    envs = [CountingEnv(script, column=j, nested=True) for j, script in enumerate(scripts)]
    ctx = build(envs, Flattening(), CollectOptions(4, 2, sticky=sticky, keep_final_obs=True))
    for slot, want in zip(fragments(ctx, 3), simulate(scripts, 4, 3, sticky=sticky), strict=True):
        for tree, name in ((slot.np.state.obs, "obs"), (slot.np.final_obs, "final_obs")):
            at = np.concatenate([tree["at"].here, tree["at"].there[..., None]], -1)
            np.testing.assert_array_equal(at, getattr(want, name))
            np.testing.assert_array_equal(tree["seen"][..., 0], getattr(want, name)[..., 2])
        np.testing.assert_array_equal(slot.np.state.act, want.act)
        np.testing.assert_array_equal(slot.np.bootstrap, want.bootstrap)
        np.testing.assert_array_equal(slot.np.final_value, want.final_value)


def test_actions_are_recorded_as_sampled_and_clipped_on_their_way() -> None:
    space = gym.spaces.Dict({"a": gym.spaces.Box(-1, 1, (2,), np.float32), "b": gym.spaces.Box(0, 9, (), np.uint8)})
    env = SpaceEnv(gym.spaces.Discrete(3), space)

    class Wild(RandomActor):
        def forward(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None) -> Any:
            actions = {"a": torch.full((*fin.shape, 2), 3.0), "b": torch.full(fin.shape, 300)}
            return actions, (), {"value": rew}

    ctx = build([env], Wild(), CollectOptions(2, 1))
    (slot,) = fragments(ctx, 1)
    assert slot.np.state.act["a"][1:].ravel().tolist() == [3.0] * 4
    assert slot.np.state.act["b"][1:].ravel().tolist() == [300] * 2
    assert [(a["a"].tolist(), int(a["b"])) for a in env.actions] == [([1.0, 1.0], 9)] * 2
    assert env.actions[0]["a"].dtype == np.float32
    assert np.asarray(env.actions[0]["b"]).dtype == np.uint8


def test_an_environment_may_write_into_its_action() -> None:
    class Greedy(SpaceEnv):
        def step(self, action: Any) -> Any:
            result = super().step(action)
            action[...] = -5.0
            return result

    env = Greedy(gym.spaces.Discrete(3), gym.spaces.Box(-np.inf, np.inf, (2,), np.float32))

    class Ones(RandomActor):
        def forward(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None) -> Any:
            return torch.ones(*fin.shape, 2), (), {"value": rew}

    (slot,) = fragments(build([env], Ones(), CollectOptions(2, 1)), 1)
    assert (slot.np.state.act[1:] == 1).all()


def test_stages_of_time() -> None:
    ctx, _ = counting([{2: "trunc"}], 4)
    fragments(ctx, 2)
    times = ctx.times
    assert times.n_env_steps == 8
    assert min(times.env, times.actor, times.write, times.reset) > 0
    assert times.env + times.actor + times.write + times.reset <= times.total
    assert sum(times.shares().values()) == pytest.approx(1)


class Watched(CountingActor):
    """Writes down what its ``value`` is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def value(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, hx: Any) -> Tensor:
        self.calls.append((obs.shape, fin.clone()))
        return super().value(obs, act, rew, fin, hx)


class SetUp(Watched):
    def setup(self, worker: int, columns: range, generator: torch.Generator) -> None:
        assert columns == range(3)


def test_one_value_call_for_all_truncations_of_a_fragment() -> None:
    """They share one call; terminations need none."""
    actor = Watched()
    ctx, _ = counting([{2: "trunc", 3: "term"}, {2: "trunc"}, {}], 4, actor)
    actor.calls.clear()  # of the probe
    fragments(ctx, 1)
    assert [shape for shape, _ in actor.calls] == [(1, 2, 3), (1, 3, 3)]
    assert not actor.calls[0][1].any()  # v(x'_2) with fin False
    assert actor.calls[1][1].tolist() == [[False, False, False]]


def test_more_truncations_than_columns() -> None:
    """No call has more columns than the steps have, or a single one where they have more."""
    scripts: list[Script] = [{1: "trunc", 3: "trunc"}, {2: "trunc", 4: "trunc"}, {}]
    actor = Watched()
    ctx, _ = counting(scripts, 4, actor)
    actor.calls.clear()
    (slot,) = fragments(ctx, 1)
    assert [shape[1] for shape, _ in actor.calls] == [3, 2, 3]
    (want,) = simulate(scripts, 4, 1)
    np.testing.assert_array_equal(slot.np.final_value, want.final_value)


def test_an_actor_that_was_set_up_is_asked_of_all_its_columns() -> None:
    scripts: list[Script] = [{2: "trunc", 3: "term"}, {2: "trunc"}, {3: "trunc"}]
    actor = SetUp()
    ctx, _ = counting(scripts, 4, actor)
    actor.calls.clear()
    (slot,) = fragments(ctx, 1)
    assert [shape for shape, _ in actor.calls] == [(1, 3, 3)] * 3
    (want,) = simulate(scripts, 4, 1)
    np.testing.assert_array_equal(slot.np.final_value, want.final_value)


def test_a_state_of_any_nesting() -> None:
    class Nested(CountingActor):
        def forward(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None) -> Any:
            h = None if hx is None else hx["n"][0]
            actions, h, info = super().forward(obs, act, rew, fin, hx=h)
            return actions, {"n": (h, [h.squeeze(-1).long()])}, info

    scripts: list[Script] = [{2: "trunc"}, {}]
    ctx, _ = counting(scripts, 3, Nested())
    for slot, want in zip(fragments(ctx, 3), simulate(scripts, 3, 3), strict=True):
        h, (whole,) = slot.np.hx["n"]
        np.testing.assert_array_equal(h, want.hx)
        np.testing.assert_array_equal(whole, want.hx[..., 0])
        np.testing.assert_array_equal(slot.np.actor["count"], want.seen)


def test_an_actor_may_hand_its_inputs_on_as_state() -> None:
    """Also where the next fragment goes into the same memory."""

    class Remembers(RandomActor):
        def forward(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None) -> Any:
            last = torch.zeros_like(obs[-1:]) if hx is None else hx
            return torch.zeros(fin.shape, dtype=torch.int64), obs[-1:], {"value": rew.clone(), "last": last}

    ctx, _ = counting([{}, {}], 2, Remembers())
    slot = Slot(ctx.spec)
    for k in range(4):
        slot.poison()
        collect(ctx, slot)
        assert slot.np.actor["last"][:, 1, 2].tolist() == [max(0, 2 * k - 1), 2 * k]
        assert slot.np.hx[0, 1, 2] == max(0, 2 * k - 1)


def test_helpers_tell_their_inputs_apart() -> None:
    """`value_of` is a sum of distinct bits: two inputs that differ have values that differ."""
    obs: Array = np.array([0, 7, 31])
    alone = [(1, 0, 0, 0, 0), (0, 4, 0, 0, 0), (0, 0, 101, 0, 0), (0, 0, 0, 1, 0), (0, 0, 0, 0, 31)]
    parts = [float(value_of(obs * k, act, rew, fin, count)) for k, act, rew, fin, count in alone]
    assert sum(parts) == float(np.float32(sum(parts))) == float(value_of(obs, 4, 101, 1, 31))
    bits = [int(p) for p in parts]
    assert all(a & b == 0 for i, a in enumerate(bits) for b in bits[:i])
    assert int(action_of(obs, 3)) == (0 + 62 + 3) % 5
    assert map_leaves(lambda x: x, {"a": (1,)}) == {"a": (1,)}
