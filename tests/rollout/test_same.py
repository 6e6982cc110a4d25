"""The iterator that collects in this process: weights, validity, interrupts, and what it leaves behind."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.toys import CountingActor, CountingEnv, DrawingEnv, RandomActor, SpoiltEnv, simulate
from zrl import ActorError, Batch, ClosedError, ConfigError, EnvError, FragmentMeta, StaleBatchError, WeightsError
from zrl.data.fragment import map_leaves
from zrl.data.spec import flatten
from zrl.rollout import same
from zrl.zoo import GRUActor, MLPActor

T, B = 5, 2


def leaves(batch: Batch) -> dict[str, Tensor]:
    """All tensors of a batch by name."""
    fields = ("state", "actor", "hx", "bootstrap", "final_value", "mask", "ep_return", "ep_length", "final_obs", "env")
    named = {f"{f}.{i}": x for f in fields for i, x in enumerate(flatten(getattr(batch, f))[0])}
    return {name: x for name, x in named.items() if x is not None}


def same_numbers(a: Batch, b: Batch) -> bool:
    mine, theirs = leaves(a), leaves(b)
    return mine.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in mine.items())


def counting(actor: torch.nn.Module | None = None, **options: Any) -> same.SameRollout:
    envs = [CountingEnv(limit=7, column=j) for j in range(B)]
    return same.rollout(envs, CountingActor() if actor is None else actor, T, **options)


class Weighted(RandomActor):
    """Its value is its weight, and its info says whether it is in training mode."""

    def forward(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None) -> Any:
        actions, hx, info = super().forward(obs, act, rew, fin)
        return actions, hx, info | {"value": self.weight.expand(fin.shape), "training": fin * 0 + int(self.training)}


def values(batch: Batch) -> set[float]:
    """The values that a fragment was made with: of the actor's steps, and of the bootstrap."""
    return {float(x) for x in batch.actor["value"].flatten()} | {float(x) for x in batch.bootstrap.flatten()}


# -- batches ---------------------------------------------------------------------------------------------------------


def test_batches_are_the_simulated_ones() -> None:
    scripts = [{2: "trunc", 6: "term"}, {5: "trunc"}]
    envs = [CountingEnv(script, column=j) for j, script in enumerate(scripts)]
    with same.rollout(envs, CountingActor(), T) as batches:
        for want in simulate(scripts, T, 4):
            batch = next(batches)
            for name, x in (("obs", batch.state.obs), ("act", batch.state.act), ("rew", batch.state.rew)):
                assert torch.equal(x.double(), torch.from_numpy(getattr(want, name)))
            assert torch.equal(batch.bootstrap.double(), torch.from_numpy(want.bootstrap))
            assert torch.equal(batch.hx.double(), torch.from_numpy(want.hx))
            assert batch.n_env_steps == T * len(scripts)


def test_shapes_and_dtypes() -> None:
    with counting(keep_final_obs=True, info_keys={"n": int}) as batches:
        batch = next(batches)
    s = batch.state
    shapes = {"obs": (T + 1, B, 3), "act": (T + 1, B), "rew": (T + 1, B), "fin": (T + 1, B), "term": (T + 1, B)}
    assert {name: tuple(x.shape) for name, x in s._asdict().items()} == shapes
    assert [x.dtype for x in s] == [torch.float32, torch.int64, torch.float32, torch.bool, torch.bool]
    for x, shape, dtype in (
        (batch.actor["value"], (T, B), torch.float32),
        (batch.actor["fin"], (T, B), torch.bool),
        (batch.hx, (1, B, 1), torch.float32),
        (batch.bootstrap, (1, B), torch.float32),
        (batch.final_value, (T + 1, B), torch.float32),
        (batch.mask, (T, B), torch.bool),
        (batch.ep_return, (T + 1, B), torch.float32),
        (batch.ep_length, (T + 1, B), torch.int32),
        (batch.final_obs, (T + 1, B, 3), torch.float32),
        (batch.env["n"], (T, B), torch.int64),
        (batch.env["_n"], (T, B), torch.bool),
    ):
        assert tuple(x.shape) == shape
        assert x.dtype == dtype


def test_the_seeds_usage() -> None:
    """Positional arguments, `zip` with a range, close; environments by a factory, or as a list."""
    it = same.rollout(CountingEnv, CountingActor(), T, B, sticky=False, pinned=False, close=True, device=None)
    assert iter(it) is it
    assert [batch.meta for _, batch in zip(range(3), it, strict=False)] == [(FragmentMeta(k, 0, k),) for k in (1, 2, 3)]
    it.close()
    it = same.rollout([CountingEnv()], CountingActor(), n_steps=T, device="cpu")
    assert next(it).mask.shape == (T, 1)
    it.close()


@pytest.mark.parametrize("max_lag", [None, 0, 5])
def test_the_lag_is_zero(max_lag: int | None) -> None:
    with counting(max_lag=max_lag) as batches:
        assert [next(batches).lag for _ in range(3)] == [(0,)] * 3


def test_pinned_needs_cuda() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    with pytest.warns(UserWarning, match="pinned"), counting(pinned=True) as batches:
        next(batches)


# -- backward --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def as_usual() -> Iterator[None]:
    yield


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("around", ["rollout", "next", "both"])
@pytest.mark.parametrize("mode", [as_usual, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", [MLPActor, GRUActor])
def test_backward_works_on_every_batch(kind: Any, mode: Callable[[], Any], around: str, debug: bool) -> None:
    """Every float leaf may be saved for backward, hx included, wherever the batch was made."""
    env = DrawingEnv()
    actor = kind(env.observation_space, env.action_space, hidden=(8,) if kind is MLPActor else 8)
    with mode() if around != "next" else as_usual():
        batches = same.rollout(DrawingEnv, actor, T, B, entropy=0, debug=debug, keep_final_obs=True)
    for _ in range(4):
        with mode() if around != "rollout" else as_usual():
            batch = next(batches)
        for part in (batch, batch.clone(), next(batch.minibatches(1)), batch.to("cpu")):
            for name, x in leaves(part).items():
                assert not x.is_inference(), name
                if x.is_floating_point():
                    scale = torch.ones((), requires_grad=True)
                    (x * scale).sum().backward()  # type: ignore[no-untyped-call]
        s = batch.state.rows(0, T)
        hx = map_leaves(lambda h: h.clone().requires_grad_(), batch.hx)
        actor.zero_grad()
        for state in (batch.hx, hx):
            _, _, info = actor(s.obs, s.act, s.rew, s.fin, hx=state)
            log_pi = actor.log_prob(info, batch.state.act[1:])
            (info["value"].square().mean() - log_pi.mean() - actor.entropy(info).mean()).backward()
        assert all(torch.isfinite(p.grad).all() for p in actor.parameters())
    batches.close()


def test_a_learnt_initial_state_gets_its_gradient() -> None:
    """Through the reset at the rows with fin, of which row 0 of the first batch is one."""

    class Learnt(GRUActor):
        def __init__(self) -> None:
            env = DrawingEnv()
            super().__init__(env.observation_space, env.action_space, hidden=4)
            self.h0 = torch.nn.Parameter(torch.ones(1, 4))

        def reset(self, j: int, hx: Tensor) -> Tensor:
            hx = hx.clone()
            hx[:, j] = self.h0
            return hx

        def forward(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None) -> Any:
            x = self.encoder(self.features(obs))
            hx = self.h0.unsqueeze(1).repeat(1, fin.shape[1], 1) if hx is None else hx
            rows = []
            for t in range(len(x)):
                hx = torch.where(fin[t].view(1, -1, 1), self.h0.unsqueeze(1), hx)
                y, hx = self.core(x[t : t + 1], hx)
                rows.append(y)
            core = torch.cat(rows)
            actions, info = self._heads(core, core)
            return actions, hx, info

    actor = Learnt()
    with same.rollout(DrawingEnv, actor, T, B, entropy=0, debug=True) as batches:
        batch = next(batches)
        assert batch.hx.eq(1).all()
        s = batch.state.rows(0, T)
        actor(s.obs, s.act, s.rew, s.fin, hx=batch.hx)[2]["value"].sum().backward()
        assert actor.h0.grad is not None
        assert actor.h0.grad.any()
        with torch.no_grad():
            actor.h0.fill_(2.0)
        later = [next(batches).clone() for _ in range(12)]
        assert sum(len(batch.episodes) for batch in later) > 0  # `debug` compared the states after their resets


# -- validity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("debug", [False, True])
def test_a_batch_is_valid_until_the_next_but_one(debug: bool) -> None:
    with counting(debug=debug) as batches:
        held: list[tuple[Batch, Batch]] = []
        for _ in range(5):
            batch = next(batches)
            held.append((batch, batch.clone()))
            assert all(same_numbers(batch, kept) for batch, kept in held[-2:])
        for batch, kept in held[:-2]:
            if not debug:
                assert not same_numbers(batch, kept)
                continue
            with pytest.raises(StaleBatchError):
                same_numbers(batch, kept)
    assert same_numbers(*held[-1])  # close() takes nothing away


def test_debug_poisons_batches_past_their_time() -> None:
    with counting(debug=True, keep_final_obs=True, info_keys={"n": int}) as batches:
        late, kept = (batch := next(batches)), batch.clone()
        taken, mine = leaves(late), torch.ones(T, B)
        late.extra["mine"] = late.actor["mine"] = mine
        assert late.n_env_steps == T * B
        next(batches)
        next(batches)
        assert mine.eq(1).all()  # what the user put there is no part of the record
        for x in taken.values():
            if x.is_floating_point():
                assert x.isnan().all()
            elif x.dtype == torch.bool:
                assert x.all()
            else:
                assert x.eq(torch.iinfo(x.dtype).min).all()
        for x in leaves(kept).values():
            assert not x.is_floating_point() or x.isfinite().all()


def test_debug_refuses_batches_past_their_time() -> None:
    with counting(debug=True) as batches:
        late, kept = (batch := next(batches)), batch.clone()
        assert late.n_env_steps == T * B
        next(batches)
        assert same_numbers(late, kept)
        next(batches)
        uses: dict[str, Callable[[], Any]] = {
            "state": lambda: late.state,
            "actor": lambda: late.actor["value"],
            "hx": lambda: late.hx,
            "bootstrap": lambda: late.bootstrap,
            "mask": lambda: late.mask,
            "final_value": lambda: late.final_value,
        }
        for name, use in uses.items():
            with pytest.raises(StaleBatchError, match=rf"batch\.{name}: this batch was valid .* clone\(\)"):
                use()
        for method in (late.clone, lambda: late.episodes, lambda: next(late.minibatches(1))):
            with pytest.raises(StaleBatchError):
                method()
        # what says where it came from, and numbers that were worked out in time
        assert (late.meta, late.version, late.lag, late.n_env_steps) == ((FragmentMeta(1, 0, 1),), 1, (0,), T * B)
        assert "past its time" in repr(late)
        assert isinstance(late, Batch)
        assert kept.clone().n_env_steps == T * B


def test_a_user_may_write_into_a_batch() -> None:
    """Nothing of it goes into the next ones."""
    with counting(entropy=1) as clean, counting(entropy=1) as written:
        for _ in range(4):
            expected, batch = next(clean).clone(), next(written)
            assert same_numbers(batch, expected)
            batch.poison()


# -- weights ---------------------------------------------------------------------------------------------------------


def set_weight(actor: RandomActor, x: float) -> None:
    with torch.no_grad():
        actor.weight.fill_(x)


def test_every_next_but_the_first_publishes() -> None:
    actor = Weighted()
    with counting(actor) as batches:
        set_weight(actor, 1.0)  # after construction, before the first next(): not published yet
        batch = next(batches)
        assert (batches.version, batch.version, batch.meta[0].version) == (1, 1, 1)
        assert values(batch) == {0.0}
        for version in (2, 3, 4):
            set_weight(actor, float(version))
            batch = next(batches)
            assert (batches.version, batch.version, batch.meta[0].version) == (version, version, version)
            assert values(batch) == {float(version)}


def test_publishing_by_hand() -> None:
    actor = Weighted()
    with counting(actor, auto_publish=False) as batches:
        set_weight(actor, 1.0)
        assert [values(next(batches)) for _ in range(3)] == [{0.0}] * 3
        assert batches.version == 1
        assert batches.publish() == 2
        set_weight(actor, 2.0)
        batch = next(batches)
        assert values(batch) == {1.0}
        assert batch.meta == (FragmentMeta(2, 0, 4),)
        assert batch.lag == (0,)


def test_publishing_before_the_first_next() -> None:
    actor = Weighted()
    with counting(actor) as batches:
        set_weight(actor, 1.0)
        assert batches.publish() == 2
        assert values(next(batches)) == {1.0}
        assert batches.version == 2


def test_buffers_travel_and_the_workers_own_changes_are_lost() -> None:
    class Buffered(Weighted):
        calls: Tensor
        scale: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
            self.register_buffer("scale", torch.zeros(()), persistent=False)

        def forward(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None) -> Any:
            self.calls += 1
            actions, hx, info = super().forward(obs, act, rew, fin)
            info |= {"value": self.scale.expand(fin.shape), "calls": self.calls.expand(fin.shape).clone()}
            return actions, hx, info

    actor = Buffered()
    with counting(actor) as batches:
        next(batches)
        actor.scale.fill_(0.5)
        actor.calls.fill_(100)
        batch = next(batches)
    assert values(batch) == {0.5}
    assert batch.actor["calls"][0].tolist() == [101] * B
    assert int(actor.calls) == 100


def test_the_learner_is_left_alone() -> None:
    actor = Weighted()
    before = copy.deepcopy(actor.state_dict())
    actor.eval()
    with counting(actor, worker_mode="train") as batches:
        next(batches)
        next(batches)
    assert actor.weight.requires_grad
    assert not actor.training
    assert all(torch.equal(x, before[name]) for name, x in actor.state_dict().items())


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_mode_is_chosen_at_the_start_and_never_followed(mode: Any) -> None:
    actor = Weighted()
    with counting(actor, worker_mode=mode) as batches:
        for training in (True, False, False, True):
            actor.train(training)
            assert set(next(batches).actor["training"].flatten().tolist()) == {int(mode == "train")}


def test_workers_train_by_default() -> None:
    with counting(Weighted().eval()) as batches:
        assert next(batches).actor["training"].eq(1).all()


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_a_wrapped_learner(wrap: Any) -> None:
    actor = Weighted()
    with counting(wrap(actor)) as batches:
        assert values(next(batches)) == {0.0}
        set_weight(actor, 3.0)
        assert values(next(batches)) == {3.0}


def test_an_optimizer_step_arrives() -> None:
    actor = Weighted()
    optim = torch.optim.SGD(actor.parameters(), lr=1.0)
    with counting(actor) as batches:
        for expected in (0.0, 1.0, 2.0):
            batch = next(batches)
            assert sorted(values(batch)) == pytest.approx([expected])
            s = batch.state.rows(0, T)
            loss = -actor(s.obs, s.act, s.rew, s.fin)[2]["value"].mean()
            optim.zero_grad()
            loss.backward()
            optim.step()


def test_a_learner_that_changed_its_shape() -> None:
    actor = Weighted()
    with counting(actor) as batches:
        next(batches)
        actor.more = torch.nn.Parameter(torch.zeros(2))
        with pytest.raises(WeightsError, match="more"):
            next(batches)


# -- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("close", [True, False])
def test_close(close: bool) -> None:
    envs = [CountingEnv(), CountingEnv()]
    batches = same.rollout(envs, CountingActor(), T, close=close)
    next(batches)
    for _ in range(3):
        batches.close()
    assert [env.n_closed for env in envs] == [int(close)] * 2
    for call in (lambda: next(batches), batches.publish):
        with pytest.raises(ClosedError, match="closed"):
            call()
    assert batches.stats()["fragments"] == 1


def test_close_before_the_first_batch() -> None:
    env = CountingEnv()
    same.rollout([env], CountingActor(), T).close()
    assert env.n_closed == 1


def test_with_closes_also_after_an_error_of_the_users() -> None:
    env = CountingEnv()
    with contextlib.suppress(ZeroDivisionError), same.rollout([env], CountingActor(), T) as batches:
        next(batches)
        raise ZeroDivisionError
    assert env.n_closed == 1
    with pytest.raises(ClosedError):
        next(batches)


def test_after_an_error_it_is_closed_and_says_why() -> None:
    def spoil(_: Any) -> Any:
        raise ZeroDivisionError("physics")

    envs = [CountingEnv(), SpoiltEnv(7, spoil)]
    batches = same.rollout(envs, CountingActor(), T)
    kept = next(batches).clone()
    with pytest.raises(EnvError, match="physics"):
        next(batches)
    assert [env.n_closed for env in envs] == [1, 1]
    with pytest.raises(ClosedError, match=r"EnvError.*physics"):
        next(batches)
    assert kept.n_env_steps == 2 * T


def test_environments_are_closed_when_building_fails() -> None:
    made: list[CountingEnv] = []

    def factory() -> CountingEnv:
        made.append(CountingEnv())
        return made[-1]

    class Late(RandomActor):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            actions, hx, info = super().forward(*args, **kwargs)
            return actions, hx, {"logits": info["logits"]}

    with pytest.raises(ActorError):
        same.rollout(factory, Late(), T, 3)
    assert [env.n_closed for env in made] == [1] * 4

    class Resetless(CountingEnv):
        def reset(self, **kwargs: Any) -> Any:
            if len(made) == 3:  # the scratch one may
                raise OSError
            return super().reset(**kwargs)

    made.clear()
    with pytest.raises(EnvError, match="OSError"):
        same.rollout(lambda: made.append(Resetless()) or made[-1], RandomActor(), T, 2)  # type: ignore[func-returns-value]
    assert [env.n_closed for env in made] == [1] * 3


def test_the_users_own_environments_are_not_closed_when_building_fails() -> None:
    envs = [CountingEnv(), CountingEnv()]
    with pytest.raises(ActorError):
        same.rollout(envs, torch.nn.Linear(1, 1), T)
    assert [env.n_closed for env in envs] == [0, 0]


# -- Ctrl-C ----------------------------------------------------------------------------------------------------------


class Interrupted(CountingEnv):
    """Ctrl-C arrives inside of step number `at`, or of the reset after so many steps."""

    def __init__(self, at: int, where: str = "step", **options: Any) -> None:
        super().__init__(**options)
        self.interrupts, self.where, self.at_n = 1, where, at

    def step(self, action: Any) -> Any:
        result = super().step(action)
        self.interrupt("step")
        return result

    def reset(self, **kwargs: Any) -> Any:
        self.interrupt("reset")
        return super().reset(**kwargs)

    def interrupt(self, where: str) -> None:
        if self.interrupts and where == self.where and self.n == self.at_n:
            self.interrupts -= 1
            raise KeyboardInterrupt


@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize("where", ["step", "reset"])
def test_after_ctrl_c_the_next_batch_begins_with_a_first_row(where: str, sticky: bool) -> None:
    envs = [CountingEnv(), Interrupted(8, where, ends={8: "trunc"}, column=1)]
    with same.rollout(envs, CountingActor(), T, sticky=sticky, entropy=3) as batches:
        kept = next(batches).clone()
        with pytest.raises(KeyboardInterrupt):
            next(batches)
        assert [env.n_closed for env in envs] == [0, 0]
        batch = next(batches)
        s = batch.state
        assert s.fin[0].all()
        assert s.term[0].all()
        for x in (s.rew[0], s.act[0], batch.final_value[0], batch.ep_length[0], batch.hx):
            assert not x.any()
        assert s.obs[:, :, 2].tolist() == [[k] * 2 for k in range(T + 1)]  # new episodes in both columns
        assert batch.episodes == []
        assert batch.meta == (FragmentMeta(3, 0, 2),)
        assert kept.meta == (FragmentMeta(1, 0, 1),)
        stats = batches.stats()
        assert (stats["fragments"], stats["lost"]) == (2, 1)
        # episodes are counted from there on
        later = next(batches)
        assert torch.equal(later.state.obs[0], s.obs[T])


def test_ctrl_c_in_the_first_batch_and_again() -> None:
    env = Interrupted(2)
    with same.rollout([env], CountingActor(), T) as batches:
        with pytest.raises(KeyboardInterrupt):
            next(batches)
        env.interrupts, env.where, env.at_n = 1, "reset", env.n
        with pytest.raises(KeyboardInterrupt):
            next(batches)
        batch = next(batches)
        assert batch.state.obs[:, 0, 2].tolist() == list(range(T + 1))
        assert batches.stats()["lost"] == 2


def test_after_ctrl_c_a_learnt_initial_state_is_todays() -> None:
    class Learnt(CountingActor):
        def reset(self, j: int, hx: Tensor) -> Tensor:
            hx = hx.clone()
            hx[:, j] = self.weight
            return hx

    actor = Learnt()
    with same.rollout([CountingEnv(), Interrupted(T + 1)], actor, T) as batches:
        assert next(batches).hx.flatten().tolist() == [1.0, 1.0]
        with torch.no_grad():
            actor.weight.fill_(2.0)
        with pytest.raises(KeyboardInterrupt):
            next(batches)
        assert next(batches).hx.flatten().tolist() == [2.0, 2.0]


def test_a_held_batch_outlives_an_interrupt() -> None:
    """The fragment that was lost was to go where the batch before the last one was."""
    env = Interrupted(2 * T + 2)
    with same.rollout([env], CountingActor(), T) as batches:
        next(batches)
        held = next(batches)
        kept = held.clone()
        with pytest.raises(KeyboardInterrupt):
            next(batches)
        assert same_numbers(held, kept)
        next(batches)
        assert same_numbers(held, kept)


# -- stats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sticky", [False, True])
def test_stats(sticky: bool) -> None:
    batches = same.rollout([CountingEnv({2: "term"}), CountingEnv()], CountingActor(), T, sticky=sticky)
    start = batches.stats()
    assert (start["version"], start["fragments"], start["lost"], start["env_steps"]) == (1, 0, 0, 0)
    steps = sum(next(batches).n_env_steps for _ in range(3))
    stats = batches.stats()
    assert (stats["version"], stats["fragments"], stats["lost"], stats["env_steps"]) == (3, 3, 0, steps)
    assert steps == 6 * T - (3 if sticky else 0)
    assert set(stats["seconds"]) == {"env", "actor", "write", "reset", "total"}
    assert all(x > 0 for x in stats["seconds"].values())
    batches.close()
    assert batches.stats() == stats


# -- Gymnasium's own -------------------------------------------------------------------------------------------------


def test_cartpole() -> None:
    """A real environment with its time limit and checkers; truncation at the limit is no termination."""
    env = gym.make("CartPole-v1")
    actor = MLPActor(env.observation_space, env.action_space)
    env.close()
    with same.rollout(lambda: gym.make("CartPole-v1", max_episode_steps=9), actor, 20, 3, entropy=0, debug=True) as it:
        batch = next(it)
        assert torch.isfinite(batch.state.obs).all()
        assert {e.length for e in batch.episodes if e.truncated} <= {9}
        assert all(e.ret == e.length for e in batch.episodes)
        assert any(e.truncated for e in batch.episodes)
        truncated = batch.state.fin & ~batch.state.term
        assert torch.equal(batch.final_value != 0, truncated)


class Odd(RandomActor):
    """Behaves for two fragments, then does what it is told."""

    def __init__(self, mischief: Callable[[Any], Any]) -> None:
        super().__init__()
        self.mischief = mischief
        self.calls = 0

    def forward(self, obs: Any, act: Any, rew: Any, fin: Any, *, hx: Any = None) -> tuple[Any, Any, Any]:
        actions, hx, info = super().forward(obs, act, rew, fin, hx=hx)
        self.calls += 1
        return self.mischief((actions, hx, info, rew)) if self.calls > 12 else (actions, hx, info)


def stop_iteration(_: Any) -> Any:
    return next(iter(()))


def sparse_value(outputs: Any) -> Any:
    actions, hx, info, _ = outputs
    return actions, hx, {**info, "value": info["value"].to_sparse()}


@pytest.mark.parametrize("mischief", [stop_iteration, sparse_value])
def test_nothing_ends_silently(mischief: Any) -> None:
    rollout = same.rollout(CountingEnv, Odd(mischief), 4, 2)
    with pytest.raises(ActorError):
        for _ in rollout:
            pass
    with pytest.raises(ClosedError, match="ActorError"):
        next(rollout)


def test_an_actor_that_chokes_on_a_nan_reward_is_not_to_blame() -> None:
    class NaNReward(CountingEnv):
        def step(self, action: Any) -> Any:
            obs, _, terminated, truncated, info = super().step(action)
            return obs, float("nan"), terminated, truncated, info

    def choke(outputs: Any) -> Any:
        raise ValueError("what is this?")

    actor = Odd(choke)
    actor.calls = 7  # the probe makes a few calls
    with same.rollout(NaNReward, actor, 16, 2) as rollout, pytest.raises(EnvError, match="not finite") as caught:
        next(rollout)
    assert (caught.value.env_index, caught.value.leaf) == (0, "state.rew")


def test_the_containers_of_a_batch_are_the_users() -> None:
    with same.rollout(CountingEnv, RandomActor(), 4, 2) as rollout:
        first = next(rollout)
        first.actor["mine"] = first.mask
        del first.actor["value"]
        next(rollout)
        third = next(rollout)
    assert "mine" not in third.actor
    assert "value" in third.actor


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"factory": CountingEnv()}, "factory: expected a callable, a list"),
        ({"factory": None}, "factory: expected a callable, a list"),
        ({"device": "abacus"}, "device: 'abacus' cannot be used"),
        ({"device": "cuda:99"}, "device: 'cuda:99' cannot be used"),
        ({"max_lag": True}, "max_lag: expected None or an integer"),
        ({"n_steps": 0}, "n_steps: expected an integer of at least 1, not 0"),
        ({"n_steps": 2.5}, "n_steps: expected an integer"),
        ({"n_steps": 10**14}, "cannot be had"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], text: str) -> None:
    usual: dict[str, Any] = {"factory": CountingEnv, "actor": RandomActor(), "n_steps": 4, "n_envs": 2}
    with pytest.raises(ConfigError, match=text):
        same.rollout(**{**usual, **arguments})
    with same.rollout(**{**usual, "n_steps": np.int64(4)}) as rollout:
        assert next(rollout).n_env_steps == 8
