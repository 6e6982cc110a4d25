"""Vector environments of every kind give the record of plain ones, number for number."""

from __future__ import annotations

import copy
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space

from tests.toys import CountingActor, CountingEnv, DrawingEnv, LambdaActor, RandomActor, Script, SpaceEnv, simulate
from zrl.collect.actor import BaseActorModule
from zrl.collect.build import CollectOptions, build
from zrl.collect.collect import collect
from zrl.data.fragment import Slot
from zrl.errors import ConfigError, EnvError
from zrl.rollout import same
from zrl.zoo import GRUActor

Factory = Callable[..., Any]
T = 6
MODES = list(AutoresetMode)
# ends at rows 1, T-1 and T, in two columns at once, of both kinds and of both at once
SCRIPTS: list[Script] = [
    {1: "term", T - 1: "trunc", T: "trunc", 3 * T: "term"},
    {T: "trunc", 2 * T - 1: "term", 2 * T + 2: "both"},
    {1: "trunc", 2: "term", 2 * T: "both", 2 * T + 2: "trunc"},
]
B = len(SCRIPTS)


def fragments(factory: Any, actor: BaseActorModule, n_fragments: int = 4, n: int = B, **options: Any) -> list[Slot]:
    ctx = build(factory, actor, CollectOptions(T, n, entropy=4, **options))
    slots = []
    try:
        for _ in range(n_fragments):
            slots.append(Slot(ctx.spec))
            slots[-1].poison()
            collect(ctx, slots[-1])
    finally:
        ctx.columns.close()
    return slots


def assert_equal(mine: Sequence[Slot], theirs: Sequence[Slot]) -> None:
    for k, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        for leaf, x, y in zip(a.spec.leaves, a.arrays, b.arrays, strict=True):
            np.testing.assert_array_equal(x, y, f"fragment {k}, {leaf.path}")


def scripted(**options: Any) -> list[Callable[[], CountingEnv]]:
    return [lambda j=j, s=s: Numbered(s, column=j, **options) for j, s in enumerate(SCRIPTS)]  # type: ignore[misc]


class Numbered(CountingEnv):
    """`CountingEnv` whose infos are numbers, as those of vector environments have to be."""

    def step(self, action: Any) -> Any:
        *others, info = super().step(action)
        return (*others, {"n": info["n"], **({"late": float(self.at)} if self.n % 2 else {})})


class One:
    """A factory that makes the environments of a list in turn, the first of them also as a scratch instance."""

    def __init__(self, makers: Sequence[Factory]) -> None:
        self.makers = [makers[0], *makers]

    def __call__(self) -> Any:
        return self.makers.pop(0)()


@pytest.fixture(autouse=True)
def _forks() -> Iterator[None]:
    with warnings.catch_warnings():  # Python 3.12 warns of forks beside threads, which torch has
        warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
        yield


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("kind", [SyncVectorEnv, AsyncVectorEnv])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_scripted_ends(kind: Any, mode: AutoresetMode, nested: bool) -> None:
    """With recurrent state, truncation, final observations and infos."""
    actor = LambdaActor(nested_counting) if nested else CountingActor()
    options: dict[str, Any] = {"keep_final_obs": True, "info_keys": {"n": int, "late": float}}
    plain = fragments(One(scripted(nested=nested)), actor, **options)
    vector = fragments(lambda: kind(scripted(nested=nested), autoreset_mode=mode), actor, **options)
    assert_equal(plain, vector)
    assert sum(int(s.np.state.fin[1:].sum()) for s in vector) == sum(map(len, SCRIPTS))
    if not nested:  # and both are what was written down, one step at a time
        for slot, want in zip(vector, simulate(SCRIPTS, T, 4), strict=True):
            for name in ("obs", "act", "rew", "fin", "term"):
                np.testing.assert_array_equal(getattr(slot.np.state, name), getattr(want, name), name)
            for name in ("final_value", "ep_return", "ep_length", "final_obs", "mask", "hx", "bootstrap"):
                np.testing.assert_array_equal(getattr(slot.np, name), getattr(want, name), name)


def nested_counting(obs: Any, act: Any, rew: Any, fin: Any, hx: Any) -> tuple[Any, Any, Any]:
    here, there = obs["at"]
    flat = torch.cat([here, there.unsqueeze(-1).float()], -1)
    actions, hx, info = CountingActor()(flat, act, rew, fin, hx=hx)
    return actions, hx, {**info, "value": info["value"].detach()}


def cart_pole() -> gym.Env[Any, Any]:
    return gym.make("CartPole-v1", max_episode_steps=9, disable_env_checker=True)


def gru() -> GRUActor:
    torch.manual_seed(0)
    env = cart_pole()
    return GRUActor(env.observation_space, env.action_space, hidden=8)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
def test_sampled_actions(mode: AutoresetMode, debug: bool) -> None:
    """A GRU that draws its actions, and environments with a seed each."""
    actor = gru()
    plain = fragments(cart_pole, actor, 6, keep_final_obs=True)
    vector = fragments(
        lambda: SyncVectorEnv([cart_pole] * B, autoreset_mode=mode), actor, 6, keep_final_obs=True, debug=debug
    )
    assert_equal(plain, vector)
    assert sum(int(s.np.final_value.astype(bool).sum()) for s in vector) > 3
    assert len({float(x) for x in vector[0].np.state.obs[0, :, 0]}) == B


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_without_copies(mode: AutoresetMode) -> None:
    """With ``copy=False`` every step and every reset overwrites the observations that were returned before.

    So do environments with one buffer; but under SAME_STEP Gymnasium itself keeps the final one while it resets.
    """
    makers = scripted(one_buffer=mode is not AutoresetMode.SAME_STEP)
    plain = fragments(One(scripted()), CountingActor(), keep_final_obs=True)
    vector = fragments(
        lambda: SyncVectorEnv(makers, autoreset_mode=mode, copy=False), CountingActor(), keep_final_obs=True
    )
    assert_equal(plain, vector)


def test_one_column() -> None:
    plain = fragments(cart_pole, gru(), 6, n=1)
    assert_equal(plain, fragments(lambda: SyncVectorEnv([cart_pole]), gru(), 6, n=1))


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_statistics_of_wrappers(mode: AutoresetMode, inside: bool) -> None:
    """Return and length are those that a wrapper has counted, around the vector or around each environment; also where
    columns are reset alone, at which Gymnasium's wrapper would count anew in all columns."""

    def one() -> Any:
        return gym.wrappers.RecordEpisodeStatistics(cart_pole()) if inside else cart_pole()

    def many() -> Any:
        vector = SyncVectorEnv([one] * B, autoreset_mode=mode)
        return vector if inside else gym.wrappers.vector.RecordEpisodeStatistics(vector)

    plain, vector = fragments(cart_pole, gru(), 6), fragments(many, gru(), 6)
    assert_equal(plain, vector)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_an_iterator_over_them(mode: AutoresetMode) -> None:
    """The same by `same.rollout`, with the environments themselves given."""
    vector = SyncVectorEnv([cart_pole] * B, autoreset_mode=mode)
    with (
        same.rollout(cart_pole, gru(), T, B, entropy=4) as plain,
        same.rollout(vector, gru(), T, entropy=4, close=False) as given,
    ):
        for _, a, b in zip(range(3), plain, given, strict=False):
            assert torch.equal(a.state.obs, b.state.obs)
            assert a.episodes == b.episodes
    vector.reset()  # not closed
    vector.close()


# ── sticky: a column cannot stand still ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_frozen_columns_are_stepped_on_and_begin_anew(mode: AutoresetMode) -> None:
    slots = fragments(
        lambda: SyncVectorEnv(scripted(), autoreset_mode=mode), CountingActor(), sticky=True, info_keys={"n": int}
    )
    last: list[Any] = []
    n_frozen = 0
    for slot in slots:
        r = slot.np
        if last:
            for a, b in zip(slot.rows[0].carried, last, strict=True):
                np.testing.assert_array_equal(a, b)
        last = [a.copy() for a in slot.rows[T].carried]
        for t, j in np.argwhere(~r.mask):
            assert r.state.fin[t, j]
            assert r.state.fin[t + 1, j]
            assert r.state.term[t + 1, j]
            assert r.state.rew[t + 1, j] == r.actor["value"][t, j] == r.env["n"][t, j] == 0
            if t + 1 < T:
                np.testing.assert_array_equal(r.state.obs[t + 1, j], r.state.obs[t, j])
            n_frozen += 1
        # row T of a frozen column is the first observation of an episode that has not been acted in
        for j in np.flatnonzero(~r.mask[-1]):
            assert r.state.obs[T, j, 2] == 0
    assert n_frozen > B
    lengths = [int(n) for slot in slots for n in slot.np.ep_length[1:][slot.np.state.fin[1:] & slot.np.mask]]
    assert all(0 < n <= 2 * T for n in lengths)


def test_one_frozen_column_waits_as_a_plain_one_does() -> None:
    plain = fragments(One(scripted()[:1]), CountingActor(), n=1, sticky=True)
    assert_equal(plain, fragments(lambda: SyncVectorEnv(scripted()[:1]), CountingActor(), n=1, sticky=True))


# ── environments of one's own ────────────────────────────────────────────────────────────────────────────────────────


class Own(VectorEnv[Any, Any, Any]):
    """Counts steps, in NumPy: an episode of column j has 3 + j steps. The step after an end begins the next episode.

    Attributes:
        seeds: of its resets.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, n: int = B) -> None:
        self.num_envs = n
        self.single_observation_space = gym.spaces.Box(-9.0, 99.0, (2,), np.float32)
        self.single_action_space = gym.spaces.Discrete(5)
        self.observation_space = batch_space(self.single_observation_space, n)
        self.action_space = batch_space(self.single_action_space, n)
        self.at = np.zeros(n, int)
        self.seeds: list[Any] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)  # an integer, or it raises
        self.seeds.append(seed)
        self.at[self.chosen(options)] = 0
        return self.obs(), {}

    def chosen(self, options: dict[str, Any] | None) -> Any:
        return slice(None)

    def obs(self) -> Any:
        return np.stack([np.arange(self.num_envs), self.at], 1).astype(np.float32)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        begins = self.at == np.arange(self.num_envs) + 3
        self.at = np.where(begins, 0, self.at + 1)
        ended = self.at == np.arange(self.num_envs) + 3
        return self.obs(), np.where(begins, 0.0, 1.0), ended, np.zeros(self.num_envs, bool), {"at": self.at * 2.0}


class Resettable(Own):
    def chosen(self, options: dict[str, Any] | None) -> Any:
        return options["reset_mask"] if options else slice(None)


class Constant(Own):
    """Nobody can see from outside which columns a reset has begun anew."""

    def obs(self) -> Any:
        return np.zeros((self.num_envs, 2), np.float32)


class Disabled(Own):
    metadata = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012


class Silent(Own):
    metadata = {"render_modes": []}  # noqa: RUF012


class Text(Own):
    """The mode by its value, as read from a file."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP.value}  # noqa: RUF012


@pytest.mark.parametrize("kind", [Own, Constant, Text])
def test_dummy_rows_are_masked_and_reset_the_state(kind: type[Own]) -> None:
    """Where no column can be reset alone the row of the end keeps the final observation, and takes no action."""
    made: list[Own] = []

    def make() -> Own:
        made.append(kind())
        return made[-1]

    counting = LambdaActor(count_steps)
    slots = fragments(make, counting, 4, info_keys=["at"])
    rows = {name: np.concatenate([getattr(s.np, name) for s in slots]) for name in ("mask",)}
    state = {
        name: np.concatenate([getattr(s.np.state, name)[:-1] for s in slots] + [getattr(slots[-1].np.state, name)[-1:]])
        for name in ("obs", "rew", "fin", "term")
    }
    count = np.concatenate([s.np.actor["count"] for s in slots])
    env = {name: np.concatenate([s.np.env[name] for s in slots]) for name in ("at", "_at")}
    n_rows = 4 * T
    for j in range(B):
        at, dummy = 0, False
        for t in range(n_rows):
            assert rows["mask"][t, j] == (not dummy)
            assert count[t, j] == (0 if dummy else at)
            assert env["_at"][t, j] == (not dummy)
            if kind is Own:
                assert state["obs"][t, j, 1] == (3 + j if dummy else at)
            if dummy:
                assert np.isnan(env["at"][t, j])
                # the row behind it begins an episode, like the very first one: a forward over the rows resets there
                assert state["rew"][t + 1, j] == 0.0
                assert state["fin"][t + 1, j]
                assert state["term"][t + 1, j]
                at, dummy = 0, False
                continue
            at += 1
            dummy = at == 3 + j
            assert state["rew"][t + 1, j] == 1.0
            assert state["fin"][t + 1, j] == state["term"][t + 1, j] == dummy
            assert env["at"][t, j] == 2 * at
    final = np.concatenate([s.np.final_value[:-1] for s in slots])
    assert not final.any()
    ends = np.concatenate([s.np.ep_length[1:][s.np.state.fin[1:] & s.np.mask] for s in slots])
    assert set(ends.tolist()) == {3 + j for j in range(B)}
    assert all(isinstance(env.seeds[0], int) for env in made)
    assert len({env.seeds[0] for env in made}) == 2


def count_steps(obs: Any, act: Any, rew: Any, fin: Any, hx: Any) -> tuple[Any, Any, Any]:
    h = torch.zeros(1, fin.shape[1], 1) if hx is None else hx
    h = h.masked_fill(fin[0].view(1, -1, 1), 0.0)
    actions = torch.zeros(fin.shape, dtype=torch.int64)
    return actions, h + 1, {"value": torch.zeros(fin.shape), "count": h[..., 0]}


def test_a_forward_over_rows_with_dummies_gives_what_was_recorded() -> None:
    """The recurrent state of who acts and of who learns is reset at the same rows."""
    make = lambda: gym.make_vec("CartPole-v1", num_envs=B, vectorization_mode="vector_entry_point")  # noqa: E731
    env = cart_pole()
    actor = GRUActor(env.observation_space, env.action_space, hidden=8)
    with same.rollout(make, actor, 40, B, entropy=2) as it:
        for _, batch in zip(range(3), it, strict=False):
            s, mask = batch.state, batch.mask
            assert not mask.all()
            _, _, info = actor(s.obs[:-1], s.act[:-1], s.rew[:-1], s.fin[:-1], hx=batch.hx)
            torch.testing.assert_close(info["value"][mask], batch.actor["value"][mask])


def test_one_that_resets_columns_alone_has_no_dummy_rows() -> None:
    slots = fragments(Resettable, LambdaActor(count_steps), 4)
    assert all(s.np.mask.all() for s in slots)
    lengths = np.concatenate([s.np.ep_length[1:][s.np.state.fin[1:]] for s in slots])
    assert sorted(set(lengths.tolist())) == [3 + j for j in range(B)]


# ── wrappers, interrupts, seeds ──────────────────────────────────────────────────────────────────────────────────────


class Bandit(CountingEnv):
    """Every step ends an episode."""

    def __init__(self) -> None:
        super().__init__(limit=1)


class Careful(gym.vector.VectorWrapper[Any, Any, Any, Any, Any]):
    """Looks for the mask in either way, and hands on a copy."""

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        if options and "reset_mask" in options:
            return self.env.reset(seed=seed, options={**options})
        return self.env.reset(seed=seed)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("one", [Bandit, lambda: Numbered({3: "term", 4: "trunc"})])
def test_wrapped_vectors_reset_columns_alone(mode: AutoresetMode, one: Any) -> None:
    slots = fragments(lambda: Careful(SyncVectorEnv([one] * B, autoreset_mode=mode)), RandomActor())
    assert all(s.np.mask.all() for s in slots)
    given = gym.wrappers.vector.RecordEpisodeStatistics(SyncVectorEnv([one] * B, autoreset_mode=mode))
    slots = fragments(given, RandomActor(), sticky=True)  # known, though it was not tried
    assert sum(int((~s.np.mask).sum()) for s in slots) > 0


def test_what_an_environment_samples_from_its_action_space_is_seeded() -> None:
    def drawing() -> DrawingEnv:
        return DrawingEnv()

    firsts = [fragments(lambda: SyncVectorEnv([drawing] * B), RandomActor(), 2) for _ in range(2)]
    assert_equal(*firsts)
    assert_equal(firsts[0], fragments(drawing, RandomActor(), 2))


class Slow(CountingEnv):
    def step(self, action: Any) -> Any:
        if self.n == 2:
            time.sleep(0.5)
        return super().step(action)


def test_an_interrupted_asynchronous_vector_says_so_and_closes() -> None:
    """Which of its processes have answered cannot be known: it must not wait for them."""
    ctx = build(lambda: AsyncVectorEnv([CountingEnv, Slow]), RandomActor(), CollectOptions(T, 2))
    slot = Slot(ctx.spec)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.25)
        with pytest.raises(KeyboardInterrupt):
            collect(ctx, slot)
        with pytest.raises(EnvError, match="was interrupted in the middle of a step"):
            ctx.restart()
    finally:
        signal.signal(signal.SIGALRM, before)
        ctx.columns.close()


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


def error_of(factory: Any, *, n: int = B, **options: Any) -> str:
    with pytest.raises((EnvError, ConfigError)) as caught:
        fragments(factory, RandomActor(), n=n, **options)
    return str(caught.value)


def test_a_mode_must_be_named() -> None:
    text = error_of(Silent)
    assert "metadata['autoreset_mode']" in text
    assert "NEXT_STEP" in text


def test_what_cannot_be_reset_alone() -> None:
    assert "reset_mask" in error_of(Disabled)
    assert "sticky=False" in error_of(Own, sticky=True)
    assert "reset_mask" in error_of(lambda: Disabled(2), n=2, sticky=True)


def test_another_number_of_columns() -> None:
    text = error_of(lambda: Own(2))
    assert "expected the number of columns of the vector environment, 2, not 3" in text
    text = error_of([Own(3)] * 3)
    assert "given twice" in text
    text = error_of([Own(3), Own(3), Own(3)])
    assert "vector environment where a plain one belongs" in text


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda r: r[:4], "contract for vector environments"),
        (lambda r: (r[0][:2], *r[1:]), "observations of another number of columns"),
        (lambda r: (r[0].astype(np.int64), *r[1:]), "found int64"),
        (lambda r: (r[0], r[1][:, None].repeat(2, 1), *r[2:]), "environment 0, step: a reward is not one number"),
        (lambda r: (r[0], 1.0, *r[2:]), "rewards of shape []"),
        (lambda r: (r[0], r[1] * np.array([1.0, np.nan, 1.0]), *r[2:]), "environment 1, step: the reward of step"),
        (lambda r: (*r[:2], r[2].astype(int), *r[3:]), "terminated: int64[3]"),
        (lambda r: (*r[:3], r[3][:1], r[4]), "truncated: bool[1]"),
        (lambda r: (*r[:4], None), "info: NoneType"),
        (lambda r: (None, *r[1:]), "contract for vector environments"),
        (lambda r: (r[0], [[1.0], 2.0, 3.0], *r[2:]), "contract for vector environments"),
        (lambda r: (*r[:4], {"at": 1.0}), "contract for vector environments"),
        (lambda r: 1 / 0, "step raised ZeroDivisionError"),
    ],
)
def test_what_a_step_may_not_return(spoil: Callable[[Any], Any], words: str) -> None:
    class Spoilt(Own):
        n = 0

        def step(self, actions: Any) -> Any:
            self.n += 1
            result = super().step(actions)
            return spoil(result) if self.n == 4 else result

    assert words in error_of(Spoilt, info_keys={"at": float})


def test_final_observations_must_be_there() -> None:
    class Lost(Own):
        metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    assert "info['final_obs']" in error_of(Lost)


def test_spaces_are_checked_as_those_of_plain_ones() -> None:
    space = gym.spaces.Graph(gym.spaces.Discrete(2), None)

    class Graph(Own):
        def __init__(self) -> None:
            super().__init__()
            self.single_observation_space = space

    assert "no fixed shape" in error_of(Graph)


def test_an_error_in_a_process_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(CountingEnv):
        def step(self, action: Any) -> Any:
            if self.n == 3:
                raise OSError("the cable is out")
            return super().step(action)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = error_of(lambda: AsyncVectorEnv([Broken] * B))
    assert "OSError" in text
    assert "the cable is out" in text


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
def test_texts_and_alternatives(mode: AutoresetMode, debug: bool) -> None:
    """They have no arrays: a vector environment batches them as tuples."""
    parts: list[gym.Space[Any]] = [gym.spaces.Text(4), gym.spaces.Box(0, 9, (2,), np.uint8)]
    spaces = gym.spaces.Dict({"a": gym.spaces.OneOf(parts), "b": gym.spaces.Text(3), "c": gym.spaces.Discrete(3)})
    kept: list[SpaceEnv] = []

    def one() -> SpaceEnv:
        kept.append(SpaceEnv(copy.deepcopy(spaces), copy.deepcopy(spaces), limit=4))
        return kept[-1]

    def act(obs: Any, act: Any, rew: Any, fin: Any, hx: Any) -> tuple[Any, Any, Any]:
        actions = torch.utils._pytree.tree_map(lambda x: x.clone(), obs)  # what was observed is an action, too
        return actions, (), {"value": rew}

    plain = fragments(one, LambdaActor(act), keep_final_obs=True)
    mine = [list(env.actions) for env in kept[1:]]
    kept.clear()
    vector = fragments(
        lambda: SyncVectorEnv([one] * B, autoreset_mode=mode), LambdaActor(act), keep_final_obs=True, debug=debug
    )
    assert_equal(plain, vector)
    assert any(len(set(map(str, actions))) > 4 for actions in mine)
    for a, env in zip(mine, kept[B:], strict=True):
        assert [str({**x, "c": int(x["c"])}) for x in a] == [str({**x, "c": int(x["c"])}) for x in env.actions]


def test_actions_are_clipped_cast_and_copied() -> None:
    """What the environments get is what plain ones get, and theirs to keep."""
    box = gym.spaces.Box(-1.0, 1.0, (2,), np.float64)
    spaces = gym.spaces.Dict({"a": box, "b": gym.spaces.Tuple([gym.spaces.Discrete(3, start=2)])})
    kept: list[SpaceEnv] = []

    def one() -> SpaceEnv:
        kept.append(SpaceEnv(gym.spaces.Box(0.0, 1.0, (1,), np.float32), spaces))
        return kept[-1]

    def act(obs: Any, act: Any, rew: Any, fin: Any, hx: Any) -> tuple[Any, Any, Any]:
        a = 3 * torch.randn(*fin.shape, 2)
        b = torch.randint(2, 5, fin.shape)
        return {"a": a, "b": (b,)}, (), {"value": rew}

    plain = fragments(one, LambdaActor(act))
    mine = [[{"a": x["a"].copy(), "b": x["b"]} for x in env.actions] for env in kept[1:]]
    kept.clear()
    vector = fragments(lambda: SyncVectorEnv([one] * B), LambdaActor(act))
    assert_equal(plain, vector)
    for a, env in zip(mine, kept[B:], strict=True):
        assert len(a) == len(env.actions) == 4 * T
        for x, y in zip(a, env.actions, strict=True):
            assert np.array_equal(x["a"], y["a"])
            assert np.abs(y["a"]).max() <= 1.0
            assert x["b"] == tuple(y["b"])
