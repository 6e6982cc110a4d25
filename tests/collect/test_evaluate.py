"""Episodes played for their rewards."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.toys import Array, CountingActor, CountingEnv, DrawingEnv, LambdaActor, RandomActor, SpoiltEnv, reward_of
from zrl import ActorError, BaseActorModule, ConfigError, EnvError, evaluate
from zrl.collect.evaluate import Played, Stage, play
from zrl.collect.streams import RandomStreams
from zrl.zoo import MLPActor


def total(rewards: list[Array]) -> list[float]:
    """The undiscounted returns, as the docstring has it."""
    returns: Any = sum(rewards)
    assert returns.dtype == np.float64
    return [float(x) for x in returns]


def test_rewards_by_arithmetic() -> None:
    """One episode in every environment; 0 where it is over; it stops when all are."""
    envs = [CountingEnv({2: "term"}), CountingEnv({4: "trunc"}, column=1), CountingEnv({1: "both"}, column=2)]
    rewards = evaluate(envs, CountingActor())
    assert [r.tolist() for r in rewards] == [[1, 1, 1], [2, 2, 0], [0, 3, 0], [0, 4, 0]]
    assert all(r.dtype == np.float64 for r in rewards)
    assert total(rewards) == [3, 10, 1]
    assert [env.n for env in envs] == [2, 4, 1]
    assert [env.n_closed for env in envs] == [0, 0, 0]


def test_at_most_n_steps() -> None:
    envs = [CountingEnv({2: "term"}), CountingEnv()]
    assert [r.tolist() for r in evaluate(envs, CountingActor(), 3)] == [[1, 1], [2, 2], [0, 3]]
    assert [r.tolist() for r in evaluate([CountingEnv()], CountingActor(), n_steps=1)] == [[1]]


def test_the_actor_sees_what_it_should() -> None:
    """Its state, the last action and reward: the actions are those of a rollout."""
    envs = [CountingEnv({6: "term"}, column=j) for j in range(3)]
    evaluate(envs, CountingActor())
    for j, env in enumerate(envs):
        assert env.actions == [(j + 2 * t + t) % 5 for t in range(6)]


def test_environments_can_be_played_again() -> None:
    """They begin a new episode each time, as unseeded environments do."""
    envs = [CountingEnv({3: "term", 5: "term"})]
    assert total(evaluate(envs, CountingActor())) == [6]
    assert total(evaluate(envs, CountingActor())) == [reward_of(1, 1) + reward_of(1, 2)]


def test_unseeded_environments_stay_unseeded() -> None:
    envs = [CountingEnv({3: "term"}), CountingEnv({3: "term"})]
    evaluate(envs, CountingActor())
    assert {seed for env in envs for seed in env.seeds} == {None}


def test_repeated_evaluations_are_not_the_same_episode() -> None:
    envs = [DrawingEnv(), DrawingEnv()]
    for env in envs:
        env.reset(seed=1)
    returns = {tuple(total(evaluate(envs, RandomActor(), n_steps=20))) for _ in range(4)}
    assert len({a for a, _ in returns}) == len({b for _, b in returns}) == 4


def test_seeds() -> None:
    envs = [CountingEnv({3: "term"}), CountingEnv({3: "term"})]
    evaluate(envs, CountingActor(), seed=40)
    assert [env.seeds[-1] for env in envs] == [40, 41]


def test_the_mode_of_the_actor_is_left_as_it_is() -> None:
    """And it is the mode that it acts in: greedily in eval mode, whatever torch's generator says."""

    class Watched(DrawingEnv):
        def __init__(self) -> None:
            super().__init__()
            self.actions: list[int] = []

        def step(self, action: Any) -> Any:
            self.actions.append(action)
            return super().step(action)

    env = Watched()
    torch.manual_seed(0)
    actor = MLPActor(env.observation_space, env.action_space)
    acted: dict[bool, set[tuple[int, ...]]] = {True: set(), False: set()}
    for training in (True, False):
        actor.train(training)
        for _ in range(5):
            env = Watched()
            evaluate([env], actor, 12, seed=0)
            acted[training].add(tuple(env.actions))
        assert actor.training is training
    assert len(acted[False]) == 1
    assert len(acted[True]) > 1


def test_render_is_called_while_an_episode_runs() -> None:
    class Shown(CountingEnv):
        shown = 0
        render_mode = "human"

        def render(self) -> Any:
            self.shown += 1

    envs = [Shown({2: "term"}), Shown({4: "trunc"})]
    evaluate(envs, CountingActor(), render=True)
    assert [env.shown for env in envs] == [2, 4]
    envs = [Shown({2: "term"})]
    evaluate(envs, CountingActor())
    assert envs[0].shown == 0


def test_nothing_to_render_is_said_before_the_first_reset() -> None:
    class Blind:
        """Quacks like an environment."""

        def __init__(self) -> None:
            self._env = CountingEnv({2: "term"})
            self.observation_space, self.action_space = self._env.observation_space, self._env.action_space
            self.reset, self.step, self.close = self._env.reset, self._env.step, self._env.close

    class Quiet(Blind):
        n_rendered = 0

        def render(self) -> None:
            self.n_rendered += 1

    plain, wrapped = CountingEnv({2: "term"}), gym.wrappers.TimeLimit(CountingEnv({2: "term"}), 5)
    for env, name in ((plain, "CountingEnv was made without"), (wrapped, "TimeLimit was"), (Blind(), "Blind has no")):
        with pytest.raises(ConfigError, match=rf'environment 1: {name} .*gym\.make\(\.\.\., render_mode="human"\)'):
            evaluate([Quiet(), env], CountingActor(), render=True)
    assert plain.seeds == []
    quiet = Quiet()
    evaluate([quiet], CountingActor(), render=True)
    assert quiet.n_rendered == 2


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_a_wrapped_actor(wrap: Any) -> None:
    actor = wrap(CountingActor())
    assert len(evaluate([CountingEnv({2: "term"})], actor)) == 2


def test_nothing_is_left_to_backward_through() -> None:
    actor = CountingActor()
    evaluate([CountingEnv({2: "term"})], actor)
    assert actor.weight.requires_grad
    assert actor.weight.grad is None
    assert not actor.weight.is_inference()


def test_bad_arguments() -> None:
    wrong: list[Any] = [[], CountingEnv(), CountingEnv]
    for envs in wrong:
        with pytest.raises(ConfigError, match="evaluate"):
            evaluate(envs, CountingActor())
    with pytest.raises(ConfigError, match="n_steps"):
        evaluate([CountingEnv()], CountingActor(), n_steps=0)
    with pytest.raises(ActorError, match="BaseActorModule"):
        evaluate([CountingEnv()], torch.nn.Linear(3, 5))


def test_bad_environments() -> None:
    for spoil, leaf, found in (
        (lambda r: (np.zeros(2), *r[1:]), "state.obs", "float64[2]"),
        (lambda r: (r[0], np.nan, *r[2:]), "state.rew", "nan"),
        (lambda r: (r[0], np.zeros(2), *r[2:]), "state.rew", "[2]"),
    ):
        with pytest.raises(EnvError) as e:
            evaluate([CountingEnv({9: "term"}), SpoiltEnv(3, spoil)], CountingActor(), n_steps=9)
        assert (e.value.env_index, e.value.leaf) == (1, leaf)
        assert found in e.value.found


# -- play ------------------------------------------------------------------------------------------------------------


def staged(envs: list[Any], actor: BaseActorModule | None = None) -> Stage:
    stage = Stage(envs, actor or CountingActor(), torch.device("cpu"))
    stage.begin()
    return stage


def test_every_environment_plays_its_number_of_episodes_however_long_they_are() -> None:
    """While the first plays one, the second could play six; and the third has none to play."""
    envs = [CountingEnv(limit=6), CountingEnv({1: "term", 3: "term"}), CountingEnv()]
    stage = staged(envs)
    played = play(stage, [1, 2, 0], 100)
    assert played == Played([21.0, 1.0, reward_of(1, 1) + reward_of(1, 2)], [6, 1, 2], 0)
    assert [env.n for env in envs] == [6, 3, 0]
    assert stage.calls[0] == 6 + 3 + 4  # steps and resets


def test_long_episodes_are_cut_and_counted() -> None:
    """One that ends by itself with the last step that it may take is not cut."""
    envs = [CountingEnv(), CountingEnv(limit=3), CountingEnv(limit=2)]
    played = play(staged(envs), [2, 1, 1], 3)
    second = sum(reward_of(1, step) for step in (1, 2, 3))
    assert played == Played([6.0, second, 6.0, 3.0], [3, 3, 3, 2], 2)
    assert [env.n for env in envs] == [6, 3, 2]


@pytest.mark.parametrize("nested", [False, True])
def test_a_new_episode_begins_with_a_new_state(nested: bool) -> None:
    """The actor's state, last action and reward begin anew after an end and after a cut, and only there."""
    envs = [CountingEnv({4: "term"}, column=j, nested=nested) for j in range(2)]
    seen: list[list[tuple[float, bool, float]]] = []

    def watch(obs: Any, act: Tensor, rew: Tensor, fin: Tensor, hx: Any) -> Any:
        step = (obs["at"].there if nested else obs[..., 2])[0].float()
        count = torch.zeros(1, fin.shape[1], 1) if hx is None else hx
        seen.append(list(zip(step.tolist(), fin[0].tolist(), count[0, :, 0].tolist(), strict=True)))
        return act * 0, count + 1, {"value": rew * 0}

    stage = staged(envs, LambdaActor(watch))
    seen.clear()  # what the probe showed
    play(stage, [2, 1], 5)
    episode = [(float(t), t == 0, float(t)) for t in range(5)]
    assert [a for a, _ in seen] == [*episode[:4], *episode]
    assert [b for _, b in seen[:4]] == episode[:4]


def test_statistics_of_a_wrapper_count() -> None:
    """It saw the rewards before others changed them."""
    env = gym.wrappers.TransformReward(gym.wrappers.RecordEpisodeStatistics(CountingEnv(limit=2)), lambda r: -float(r))
    assert play(staged([env]), [1], 100) == Played([3.0], [2], 0)
    assert play(staged([env]), [1], 1).returns == [-reward_of(1, 1)]  # a cut one has none


def test_equal_seeds_and_states_give_equal_episodes() -> None:
    envs = [DrawingEnv(), DrawingEnv()]
    stage = Stage(envs, RandomActor(), torch.device("cpu"))

    def played(seed: int) -> Played:
        with RandomStreams(seed).active():
            stage.begin([seed, seed + 1])
            return play(stage, [3, 2], 50)

    first = played(5)
    assert len(set(first.returns)) == 5
    assert played(6) != first
    assert played(5) == first


def test_a_learnt_initial_state_is_taken_anew() -> None:
    class Starting(BaseActorModule):
        def __init__(self) -> None:
            super().__init__()
            self.start = torch.nn.Parameter(torch.ones(()))

        def forward(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None) -> Any:
            h = self.start.expand(1, fin.shape[1], 1) if hx is None else hx
            return h[..., 0].long(), h, {"value": rew}

        def reset(self, j: int, hx: Any) -> Any:
            h = hx.clone()
            h[:, j] = self.start
            return h

    env, actor = CountingEnv(limit=1), Starting()
    stage = staged([env], actor)
    play(stage, [2], 9)
    with torch.no_grad():
        actor.start.fill_(3.0)
    stage.begin()
    play(stage, [2], 9)
    assert env.actions == [1, 1, 3, 3]
