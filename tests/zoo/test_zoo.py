"""The example actors over all spaces, and the example environments with their known answers."""

from __future__ import annotations

import itertools
import warnings
from collections import namedtuple
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch import Tensor

from tests.toys import SpaceEnv
from zrl import ActorError, BaseActorModule, EnvError
from zrl.data.fragment import map_leaves
from zrl.rollout import same
from zrl.zoo import ChainMDP, CNNActor, GRUActor, MLPActor, NarrowPath, default_actor
from zrl.zoo.actors import Features

box = gym.spaces.Box
DISCRETE = gym.spaces.Discrete(4)

ACTIONS: dict[str, gym.Space[Any]] = {
    "Discrete": DISCRETE,
    "shifted Discrete": gym.spaces.Discrete(3, start=-7),
    "one action": gym.spaces.Discrete(1),
    "MultiDiscrete": gym.spaces.MultiDiscrete([2, 4, 3]),
    "shifted MultiDiscrete": gym.spaces.MultiDiscrete([2, 3], start=[5, -1]),
    "MultiDiscrete table": gym.spaces.MultiDiscrete(np.array([[2, 3], [1, 2]]), start=np.array([[0, 1], [2, 3]])),
    "MultiBinary": gym.spaces.MultiBinary(3),
    "MultiBinary table": gym.spaces.MultiBinary((2, 2)),
    "Box": box(-1.0, 1.0, (2,), np.float32),
    "Box table": box(-np.inf, np.inf, (2, 2), np.float32),
    "scalar Box": box(0.0, 1.0, (), np.float32),
    "Box of float64": box(-1.0, 1.0, (2,), np.float64),
}
FINITE = {name: space for name, space in ACTIONS.items() if not isinstance(space, box)}

OBSERVATIONS: dict[str, tuple[gym.Space[Any], int]] = {
    "Box": (box(-1.0, 1.0, (3,), np.float32), 3),
    "Box of float64": (box(-1.0, 1.0, (3,), np.float64), 3),
    "scalar Box": (box(-1.0, 1.0, (), np.float32), 1),
    "Box table": (box(0, 255, (2, 3), np.uint8), 6),
    "Discrete": (DISCRETE, 4),
    "shifted Discrete": (gym.spaces.Discrete(3, start=-7), 3),
    "MultiDiscrete": (gym.spaces.MultiDiscrete([2, 4], start=[1, -3]), 6),
    "MultiDiscrete table": (gym.spaces.MultiDiscrete(np.array([[2, 3], [1, 2]])), 8),
    "MultiBinary": (gym.spaces.MultiBinary(3), 3),
    "MultiBinary table": (gym.spaces.MultiBinary((2, 2)), 4),
    "keys of two kinds": (gym.spaces.Dict({1: DISCRETE, "a": DISCRETE}), 8),  # type: ignore[dict-item]
    "Text": (gym.spaces.Text(3, charset="abc"), 12),
    "OneOf": (gym.spaces.OneOf([gym.spaces.Text(2, charset="ab"), gym.spaces.Discrete(3, start=-7), DISCRETE]), 16),
    "without size": (
        gym.spaces.Dict(a=box(0, 1, (2, 0), np.float32), b=gym.spaces.MultiDiscrete(np.zeros(0, int)), c=DISCRETE),
        4,
    ),
    "Dict": (gym.spaces.Dict(b=DISCRETE, a=gym.spaces.Tuple([box(0, 1, (2,), np.float32), DISCRETE])), 10),
}


def play(env: SpaceEnv, actor: BaseActorModule, n: int = 3, **options: Any) -> list[Any]:
    """Batches under all checks; the environment checks the actions."""
    with same.rollout([env], actor, 6, entropy=0, debug=True, **options) as batches:
        return [next(batches).clone() for _ in range(n)]


# -- actors over spaces ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("worker_mode", ["train", "eval"])
@pytest.mark.parametrize("kind", [MLPActor, GRUActor])
@pytest.mark.parametrize("space", ACTIONS.values(), ids=ACTIONS)
def test_actions_of_all_spaces(space: gym.Space[Any], kind: Any, worker_mode: Any) -> None:
    """Actions are in the space, in its values; the density is that of the actions; every weight gets a gradient."""
    torch.manual_seed(0)
    actor = kind(OBSERVATIONS["Box"][0], space)
    for batch in play(SpaceEnv(OBSERVATIONS["Box"][0], space), actor, worker_mode=worker_mode):
        s, act = batch.state.rows(0, 6), batch.state.act[1:]
        assert act.shape == (6, 1, *(space.shape or ()))
        _, _, info = actor(s.obs, s.act, s.rew, s.fin, hx=batch.hx)
        log_pi, entropy = actor.log_prob(info, act), actor.entropy(info)
        assert log_pi.shape == entropy.shape == info["value"].shape == (6, 1)
        torch.testing.assert_close(log_pi, actor.log_prob(batch.actor, act), rtol=1e-6, atol=1e-6)
        assert torch.isfinite(log_pi).all()
        assert torch.isfinite(entropy).all()
        actor.zero_grad()
        (log_pi.sum() + entropy.sum() + info["value"].sum()).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in actor.parameters())


@pytest.mark.parametrize("space", FINITE.values(), ids=FINITE)
def test_densities_sum_to_one(space: Any) -> None:
    """Over all actions of the space; so do their entropies agree with the sum of −p log p."""
    torch.manual_seed(0)
    actor = MLPActor(OBSERVATIONS["Box"][0], space)
    with torch.no_grad():
        actor.policy.linear.weight.mul_(200)  # far from uniform
    everything = actions_of(space)
    n = len(everything)
    obs = torch.randn(1, 1, 3).expand(1, n, 3)
    unused = torch.zeros(1, n)
    with torch.no_grad():
        _, _, info = actor(obs, unused, unused, unused.bool())
        log_p = actor.log_prob(info, everything.unsqueeze(0))
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-5)
    assert float(-(log_p.exp() * log_p).sum()) == pytest.approx(float(actor.entropy(info)[0, 0]), abs=1e-5)
    if n > 1:
        assert float(log_p.exp().max() / log_p.exp().min()) > 2
    # and the greedy action is the likeliest one
    greedy = actor.eval()(obs, unused, unused, unused.bool())[0][0, 0]
    assert torch.equal(greedy, everything[int(log_p.argmax())])
    # the sampled ones come as often as their density says
    torch.manual_seed(1)
    many = 4000
    unused = torch.zeros(1, many)
    drawn = actor.train()(obs[:, :1].expand(1, many, 3), unused, unused, unused.bool())[0][0]
    for action, p in zip(everything, log_p[0].exp().tolist(), strict=True):
        share = float((drawn == action).reshape(many, -1).all(-1).float().mean())
        assert share == pytest.approx(p, abs=0.04)


def actions_of(space: Any) -> Tensor:
    """All actions of a finite space, [n, ...]."""
    if isinstance(space, gym.spaces.Discrete):
        return torch.arange(int(space.n)) + int(space.start)
    shape = space.shape
    nvec, start = (space.nvec, space.start) if isinstance(space, gym.spaces.MultiDiscrete) else (np.full(shape, 2), 0)
    grid = np.array(list(itertools.product(*map(range, nvec.ravel())))).reshape(-1, *shape)
    return torch.from_numpy(grid + start)


def test_gaussian_actions() -> None:
    torch.manual_seed(0)
    actor = MLPActor(OBSERVATIONS["Box"][0], ACTIONS["Box"])
    obs, unused = torch.randn(1, 1, 3).expand(1, 4000, 3), torch.zeros(1, 4000)
    with torch.no_grad():
        actor.policy.log_std.copy_(torch.tensor([-1.0, 1.0]))
        drawn, _, info = actor(obs, unused, unused, unused.bool())
    assert (drawn[0].mean(0) - info["mean"][0, 0]).abs().max() < 0.15
    assert drawn[0].std(0).tolist() == pytest.approx(np.exp([-1.0, 1.0]).tolist(), rel=0.05)
    assert torch.equal(actor.eval()(obs, unused, unused, unused.bool())[0], info["mean"])


@pytest.mark.parametrize("kind", [MLPActor, GRUActor])
@pytest.mark.parametrize(("space", "size"), OBSERVATIONS.values(), ids=OBSERVATIONS)
def test_observations_of_all_spaces(space: gym.Space[Any], size: int, kind: Any) -> None:
    torch.manual_seed(0)
    actor = kind(space, DISCRETE)
    assert actor.features.size == size
    for batch in play(SpaceEnv(space, DISCRETE), actor):
        assert torch.isfinite(batch.actor["value"]).all()
        assert actor.features(batch.state.obs).shape == (7, 1, size)
        assert actor.features(batch.state.obs).dtype == torch.float32


def test_features_by_hand() -> None:
    spaces = {"b": gym.spaces.Discrete(3, start=1), "a": gym.spaces.Tuple([box(0, 9, (2, 2), np.uint8)])}
    spaces |= {"c": gym.spaces.MultiDiscrete([2, 3], start=[0, 5]), "d": gym.spaces.MultiBinary(2)}
    spaces |= {"e": gym.spaces.OneOf([DISCRETE, gym.spaces.Text(2, charset="ab")])}
    obs = {
        "a": (torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8),),
        "b": torch.tensor([[3]]),
        "c": torch.tensor([[[1, 5]]]),
        "d": torch.tensor([[[1, 0]]], dtype=torch.int8),
        "e": (torch.tensor([[1]]), (torch.tensor([[0]]), torch.tensor([[[1, 2]]], dtype=torch.int32))),
    }
    a, b, c, d = [1, 2, 3, 4], [0, 0, 1], [0, 1, 1, 0, 0], [1, 0]
    e = [0, 1, *[1, 0, 0, 0], *[0, 1, 0], *[0, 0, 1]]  # the second alternative: "b", and padding
    assert Features(gym.spaces.Dict(spaces))(obs).tolist() == [[[*a, *b, *c, *d, *e]]]


Named = namedtuple("Named", ["x", "y"])


@pytest.mark.parametrize("shown", [tuple, list, lambda x: Named(*x)])
def test_tuples_may_come_as_lists_or_namedtuples(shown: Any) -> None:
    """As Gymnasium's own check lets them."""
    space = gym.spaces.Dict(t=gym.spaces.Tuple([box(0, 1, (2,), np.float32), DISCRETE]), a=DISCRETE)
    env = SpaceEnv(space, DISCRETE, shown=lambda x: {"t": shown(x["t"]), "a": x["a"]})
    for batch in play(env, MLPActor(space, DISCRETE)):
        expected = torch.nn.functional.one_hot(batch.state.obs["a"], 4)
        assert torch.equal(MLPActor(space, DISCRETE).features(batch.state.obs)[..., :4], expected.float())


def test_options_of_the_perceptron() -> None:
    space = OBSERVATIONS["Box"][0]
    one = MLPActor(space, DISCRETE, hidden=(8,), shared=True)
    two = MLPActor(space, DISCRETE, hidden=(8,), shared=False, activation=torch.nn.ReLU)
    n = {actor: sum(p.numel() for p in actor.parameters()) for actor in (one, two)}
    assert n[two] - n[one] == 3 * 8 + 8
    play(SpaceEnv(space, DISCRETE), two)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("space", ACTIONS.values(), ids=ACTIONS)
def test_one_step_is_a_forward_of_one_row_number_for_number(space: gym.Space[Any], shared: bool) -> None:
    """Whatever the way that it takes: nothing of it may be seen, nor in the random stream that it leaves."""
    activation = torch.nn.ReLU if shared else torch.nn.Tanh
    actor = MLPActor(OBSERVATIONS["Box"][0], space, shared=shared, activation=activation)
    with torch.no_grad():  # else nearly all policies are alike
        for p in actor.parameters():
            p.normal_()
    assert_steps_are_forwards(actor)
    actor.eval()
    assert_steps_are_forwards(actor)


@pytest.mark.parametrize("state", [None, 3.0])
def test_one_step_of_the_other_actors_is_a_forward_too(state: float | None) -> None:
    hx = None if state is None else torch.full((1, 5, 64), state)
    assert_steps_are_forwards(GRUActor(OBSERVATIONS["Box"][0], DISCRETE), hx=hx)
    image = box(0, 255, (2, 36, 36), np.uint8)
    assert_steps_are_forwards(CNNActor(image, DISCRETE, hidden=16), torch.randint(256, (1, 5, 2, 36, 36)).byte())


def assert_steps_are_forwards(actor: BaseActorModule, obs: Tensor | None = None, *, hx: Any = (), n: int = 5) -> None:
    row = torch.randn(1, n, 3) if obs is None else obs, torch.zeros(1, n), torch.zeros(1, n), torch.rand(1, n) < 0.5
    for grad in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with grad():
            torch.manual_seed(1)
            actions, after_hx, info = actor(*row, hx=hx)
            after = torch.rand(1)
            torch.manual_seed(1)
            stepped, told_hx, told = actor.step(*row, hx)
            assert torch.equal(told_hx, after_hx) if isinstance(told_hx, Tensor) else told_hx == after_hx
            assert torch.equal(torch.rand(1), after)
            assert torch.equal(stepped, actions)
            assert list(told) == list(info)
            for key, x in info.items():
                assert torch.equal(told[key], x), key
                assert told[key].shape == x.shape


class Doubles(torch.nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Own(MLPActor):
    def forward(self, *args: Any, hx: Any = None) -> tuple[Any, Any, Any]:
        actions, hx, info = super().forward(*args, hx=hx)
        return actions, hx, {**info, "value": info["value"] + 1}


def test_one_step_of_what_was_made_one_s_own_is_a_forward_too() -> None:
    space = OBSERVATIONS["Box"][0]
    assert_steps_are_forwards(Own(space, DISCRETE))
    odd = MLPActor(space, DISCRETE, activation=torch.nn.Softplus)
    odd.core[0] = Doubles(3, 64)
    odd.value_head = Doubles(64, 1)
    assert_steps_are_forwards(odd)
    seen: list[Tensor] = []
    hooked = MLPActor(space, DISCRETE)
    hooked.core[0].register_forward_hook(lambda _, x, y: seen.append(y) or 3 * y)  # type: ignore[func-returns-value]
    hooked.core[1].register_forward_pre_hook(lambda _, x: (x[0] + 1,))
    hooked.policy.linear.register_forward_hook(lambda _, x, y: -y)
    assert_steps_are_forwards(hooked)
    assert all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))  # nor written into afterwards
    torch.nn.utils.parametrizations.spectral_norm(odd.core[2])
    assert_steps_are_forwards(odd.eval())


def test_steps_follow_the_weights_however_they_change() -> None:
    actor = MLPActor(OBSERVATIONS["Box"][0], DISCRETE)
    assert_steps_are_forwards(actor)
    other = MLPActor(OBSERVATIONS["Box"][0], DISCRETE)
    actor.load_state_dict(other.state_dict(), assign=True)
    assert_steps_are_forwards(actor)
    actor.core[0].weight.data = torch.randn(64, 3)
    assert_steps_are_forwards(actor)
    actor.value_head = torch.nn.Linear(64, 1)
    assert_steps_are_forwards(actor)


# -- recurrent -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p_fin", [0.0, 0.3, 1.0])
def test_t_rows_at_once_equal_t_steps(p_fin: float) -> None:
    torch.manual_seed(0)
    actor = GRUActor(OBSERVATIONS["Box"][0], DISCRETE, hidden=8).eval()
    n_steps, n = 9, 4
    obs, hx = torch.randn(n_steps, n, 3), torch.randn(1, n, 8)
    fin = torch.rand(n_steps, n) < p_fin
    act, rew = torch.zeros(n_steps, n, dtype=torch.int64), torch.zeros(n_steps, n)
    with torch.no_grad():
        actions, last, info = actor(obs, act, rew, fin, hx=hx)
        h, rows = hx, []
        for t in range(n_steps):
            for j in fin[t].nonzero().flatten().tolist():
                h = actor.reset(j, h)
            row = slice(t, t + 1)
            a, h, i = actor.step(obs[row], act[row], rew[row], fin[row], h)
            rows.append((a, i))
    torch.testing.assert_close(last, h)
    assert torch.equal(actions, torch.cat([a for a, _ in rows]))
    for key in info:
        torch.testing.assert_close(info[key], torch.cat([i[key] for _, i in rows]))


def test_no_state_is_the_initial_state() -> None:
    actor = GRUActor(OBSERVATIONS["Box"][0], DISCRETE, hidden=8).eval()
    inputs = torch.randn(2, 3, 3), torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    (a, h, info), (b, g, other) = actor(*inputs), actor(*inputs, hx=torch.zeros(1, 3, 8))
    assert torch.equal(a, b)
    assert torch.equal(h, g)
    assert map_leaves(lambda x: x.shape, info) == map_leaves(lambda x: x.shape, other)
    assert h.shape == (1, 3, 8)


# -- images and defaults ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4, 36, 40), np.uint8), ((40, 36, 3), np.uint8), ((1, 36, 36), np.float32)]
)
def test_images(shape: tuple[int, ...], dtype: Any) -> None:
    torch.manual_seed(0)
    space = box(0, 255 if dtype == np.uint8 else 1, shape, dtype)
    actor = default_actor(space, DISCRETE)
    assert isinstance(actor, CNNActor)
    play(SpaceEnv(space, DISCRETE), actor, n=1)


def test_channels_first_or_last_and_bytes_or_floats() -> None:
    """The same image gives the same values."""
    torch.manual_seed(0)
    first = CNNActor(box(0, 255, (3, 40, 36), np.uint8), DISCRETE, hidden=16)
    last = CNNActor(box(0, 255, (40, 36, 3), np.uint8), DISCRETE, hidden=16)
    floats = CNNActor(box(0, 1, (3, 40, 36), np.float32), DISCRETE, hidden=16)
    for other in (last, floats):
        other.load_state_dict(first.state_dict())
    image, unused = torch.randint(256, (2, 3, 3, 40, 36), dtype=torch.uint8), torch.zeros(2, 3)
    inputs = unused, unused, unused.bool()
    expected = first(image, *inputs)[2]["value"]
    assert expected.shape == (2, 3)
    torch.testing.assert_close(last(image.movedim(2, -1), *inputs)[2]["value"], expected)
    torch.testing.assert_close(floats(image.float() / 255, *inputs)[2]["value"], expected)


def test_default_actors() -> None:
    for space, _ in OBSERVATIONS.values():
        assert type(default_actor(space, DISCRETE)) is MLPActor
    assert type(default_actor(box(0, 255, (35, 100, 3), np.uint8), DISCRETE)) is MLPActor
    assert type(default_actor(box(0, 255, (3, 36, 100), np.uint8), DISCRETE)) is CNNActor
    for space in ACTIONS.values():
        default_actor(OBSERVATIONS["Box"][0], space)


@pytest.mark.parametrize("kind", [default_actor, MLPActor, GRUActor])
@pytest.mark.parametrize(
    "space", [gym.spaces.Tuple([DISCRETE]), gym.spaces.Dict(a=DISCRETE), gym.spaces.Text(3), box(0, 9, (2,), np.int64)]
)
def test_no_policy_for_an_action_space(kind: Any, space: gym.Space[Any]) -> None:
    with pytest.raises(ActorError, match="BaseActorModule") as e:
        kind(OBSERVATIONS["Box"][0], space)
    assert (e.value.leaf, e.value.found) == ("action_space", str(space))
    assert "Discrete" in e.value.expected


def test_observations_without_a_fixed_shape() -> None:
    with pytest.raises(EnvError) as e:
        default_actor(gym.spaces.Dict(x=gym.spaces.Sequence(DISCRETE)), DISCRETE)
    assert (e.value.leaf, e.value.found) == ("observation_space['x']", "Sequence")


@pytest.mark.parametrize("space", [box(0, 1, (3,), np.float32), box(0, 255, (20, 20, 3), np.uint8)])
def test_no_convolutions_over_what_is_no_image(space: gym.Space[Any]) -> None:
    with pytest.raises(ActorError) as e:
        CNNActor(space, DISCRETE)
    assert e.value.leaf == "observation_space"
    assert e.value.expected
    assert e.value.found


# -- environments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["NarrowPath", "ChainMDP"])
def test_environments_pass_gymnasiums_check(name: str) -> None:
    env = gym.make(f"zrl/{name}-v0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped, skip_render_check=True)
    env.close()


def test_narrow_path() -> None:
    env = NarrowPath(length=5, n_actions=3, layout_seed=1)
    assert env.reset(seed=0) == (0, {})
    right = [int(a) for a in env.path]
    assert all(0 <= a < 3 for a in right)
    steps = [env.step(a) for a in right]
    assert [obs for obs, *_ in steps] == [1, 2, 3, 4, 5]
    assert [rew for _, rew, *_ in steps] == [0, 0, 0, 0, 1]
    assert [(term, trunc) for _, _, term, trunc, _ in steps] == [(False, False)] * 4 + [(True, False)]
    for k in range(5):  # a wrong action at cell k
        env.reset()
        for a in right[:k]:
            env.step(a)
        obs, rew, term, trunc, info = env.step((right[k] + 1) % 3)
        assert (obs, rew, term, trunc, info["fell"]) == (k, 0.0, True, False, True)
    assert env.observation_space.contains(5)
    assert not env.observation_space.contains(6)


def test_narrow_paths_differ_by_their_layout_alone() -> None:
    def layout(seed: int) -> list[int]:
        return [int(a) for a in NarrowPath(length=20, layout_seed=seed).path]

    assert layout(3) == layout(3)
    assert len({tuple(layout(seed)) for seed in range(5)}) == 5
    assert set(layout(0)) == {0, 1}


def test_narrow_path_shows_itself() -> None:
    env = NarrowPath(length=3, render_mode="ansi")
    env.reset()
    assert env.render() == "@..."
    env.step(env.path[0])
    assert env.render() == ".@.."
    assert NarrowPath().render() is None


def test_chain_without_slipping() -> None:
    env = ChainMDP(length=3, near=2.0, far=10.0, slip=0.0)
    assert env.reset(seed=0) == (0, {})
    steps = [env.step(a)[:4] for a in (0, 0, 0, 0, 1, 0, 1, 1)]
    assert [obs for obs, *_ in steps] == [1, 2, 2, 2, 0, 1, 0, 0]
    assert [rew for _, rew, *_ in steps] == [0, 0, 10, 10, 2, 0, 2, 2]
    assert not any(term or trunc for *_, term, trunc in steps)


def test_chain_slips_as_often_as_it_says() -> None:
    env = ChainMDP(slip=0.2)
    env.reset(seed=0)
    back = 0
    for _ in range(4000):
        obs, *_ = env.step(0)
        back += obs == 0
    assert back / 4000 == pytest.approx(0.2, abs=0.02)
    env = ChainMDP(slip=1.0)
    env.reset(seed=0)
    assert env.step(1)[0] == 1  # the other action happens


def test_chain_is_repeatable() -> None:
    def rewards(seed: int) -> list[float]:
        env = ChainMDP(slip=0.5)
        env.reset(seed=seed)
        return [float(env.step(0)[1]) for _ in range(50)]

    assert rewards(1) == rewards(1) != rewards(2)


def test_the_chain_is_cut_and_not_over() -> None:
    """Its time limit truncates: the value of the last state is there to bootstrap from."""
    actor = MLPActor(gym.spaces.Discrete(5), gym.spaces.Discrete(2))
    with same.rollout(lambda: gym.make("zrl/ChainMDP-v0"), actor, 150, 2, entropy=0) as batches:
        batch = next(batches)
    assert [(e.length, e.truncated) for e in batch.episodes] == [(100, True)] * 2
    assert (batch.final_value[100] != 0).all()
    actor = MLPActor(gym.spaces.Discrete(9), gym.spaces.Discrete(2))
    with same.rollout(lambda: gym.make("zrl/NarrowPath-v0"), actor, 50, 2) as batches:
        batch = next(batches)
    assert not any(e.truncated for e in batch.episodes)
    assert not batch.final_value.any()


# -- known optimal values --------------------------------------------------------------------------------------------

# By state, then action: every (probability, reward, next state); a next state of −1 is the end. Written down from what
# the docstrings say, not from the code.
Dynamics = list[list[list[tuple[float, float, int]]]]


def chain_dynamics(length: int = 5, near: float = 2.0, far: float = 10.0, slip: float = 0.2) -> Dynamics:
    def outcomes(cell: int, p_on: float) -> list[tuple[float, float, int]]:
        on = (far, cell) if cell == length - 1 else (0.0, cell + 1)
        return [(p_on, *on), (1 - p_on, near, 0)]

    return [[outcomes(cell, 1 - slip), outcomes(cell, slip)] for cell in range(length)]


def path_dynamics(path: list[int], n_actions: int) -> Dynamics:
    n = len(path)
    right = [(1.0, 0.0, cell + 1) if cell + 1 < n else (1.0, 1.0, -1) for cell in range(n)]
    return [
        [[right[cell] if action == path[cell] else (1.0, 0.0, -1)] for action in range(n_actions)] for cell in range(n)
    ]


def action_values(dynamics: Dynamics, values: list[float], gamma: float) -> list[list[float]]:
    after = [*values, 0.0]  # index −1: the end
    return [[sum(p * (r + gamma * after[to]) for p, r, to in a) for a in actions] for actions in dynamics]


def optimal(dynamics: Dynamics, gamma: float, policy: list[int] | None = None) -> tuple[list[float], list[int]]:
    """Values and best actions by value iteration, until nothing moves by 1e-10; of one policy, if it is given."""
    values = [0.0] * len(dynamics)
    while True:
        q = action_values(dynamics, values, gamma)
        new = [max(x) for x in q] if policy is None else [x[a] for x, a in zip(q, policy, strict=True)]
        if max(abs(a - b) for a, b in zip(new, values, strict=True)) < 1e-10:
            return new, [max(range(len(x)), key=x.__getitem__) for x in q]
        values = new


def chain_value(gamma: float) -> float:
    """V(0) of walking on for ever, from what happens until the first slip: with p = 0.8, k steps pass without one, and
    earn 10 each from the fifth on; the slip earns 2 and leads back to 0."""
    p = 0.8
    far = 10 * p**5 * gamma**4 / (1 - p * gamma)  # steps 5, 6, … without a slip so far
    slip = (1 - p) / (1 - p * gamma)  # discounted probability of the first slip
    return (far + 2 * slip) / (1 - gamma * slip)


def test_the_chains_optimal_values() -> None:
    """Walking on is best at γ = 0.99, going back where the future counts for little."""
    values, best = optimal(chain_dynamics(), 0.99)
    assert best == [0] * 5
    assert values[0] == pytest.approx(chain_value(0.99), abs=1e-6)
    assert values == sorted(values)
    assert optimal(chain_dynamics(), 0.5)[1] == [1, 1, 1, 0, 0]
    # on average 10 a step in the last cell, where it is after four steps without a slip, and 2 a slip
    average = 0.8**4 * 0.8 * 10 + 0.2 * 2
    assert average == pytest.approx(3.6768)
    assert (1 - 0.9999) * chain_value(0.9999) == pytest.approx(average, rel=1e-3)


@pytest.mark.parametrize("action", [0, 1])
def test_the_chain_earns_what_it_should(action: int) -> None:
    """Simulated: the average reward of always one action, and discounted returns from the first cell."""
    gamma, rows, n = 0.9, 100, 300
    env = ChainMDP()
    env.reset(seed=3)
    returns, rewards = [], []
    for _ in range(n):
        env.reset()
        episode = [float(env.step(action)[1]) for _ in range(rows)]
        returns.append(sum(gamma**t * r for t, r in enumerate(episode)))
        rewards.append(np.mean(episode[20:]))  # it has forgotten by then where it began
    value = optimal(chain_dynamics(), gamma, [action] * 5)[0][0]
    if action == 0:
        assert value == pytest.approx(chain_value(gamma), abs=1e-6)
    assert_mean(returns, value)
    # cell 4 needs four steps on; a step on happens with probability p
    p = 0.2 if action else 0.8
    assert_mean(rewards, 10 * p**5 + 2 * (1 - p))


def assert_mean(sample: Any, expected: float) -> None:
    """The mean of a sample is within three standard errors, and these are small enough to tell."""
    error = float(np.std(sample) / np.sqrt(len(sample)))
    assert error < 0.05 * expected
    assert abs(float(np.mean(sample)) - expected) < 3 * error


@pytest.mark.parametrize(("length", "n_actions"), [(8, 2), (3, 4)])
def test_the_paths_optimal_values(length: int, n_actions: int) -> None:
    """γ^(cells to go − 1): one reward, at the end. At random: each cell is passed with probability 1/n."""
    env = NarrowPath(length, n_actions, layout_seed=2)
    path = [int(a) for a in env.path]
    values, best = optimal(path_dynamics(path, n_actions), 0.9)
    assert values == pytest.approx([0.9 ** (length - 1 - cell) for cell in range(length)])
    assert best == path
    # and the best policy gets them
    obs, _ = env.reset(seed=0)
    ret = sum(0.9**t * float(env.step(a)[1]) for t, a in enumerate(best))
    assert obs == 0
    assert ret == pytest.approx(values[0])


def test_the_path_at_random() -> None:
    env = NarrowPath(3, 2)
    rng = np.random.default_rng(0)
    returns = []
    for _ in range(4000):
        env.reset()
        ret, ended = 0.0, False
        while not ended:
            _, ret, ended, _, _ = env.step(rng.integers(2))
        returns.append(ret)
    assert_mean(returns, 1 / 8)
