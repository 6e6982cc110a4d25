"""Equal entropy, equal run, bit for bit; and the random states of the process belong to the user alone."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.toys import N_ACTIONS, CountingActor, CountingEnv, DrawingEnv, RandomActor, SpoiltEnv
from zrl import BaseActorModule, Batch, EnvError
from zrl.collect.streams import RandomStreams, block, env_seeds, evaluation_seeds, undrawn
from zrl.data.spec import flatten
from zrl.rollout import same
from zrl.zoo import GRUActor, MLPActor

FIELDS = ("state", "actor", "hx", "bootstrap", "final_value", "mask", "ep_return", "ep_length", "final_obs")


def run(
    entropy: int | None,
    actor: BaseActorModule | None = None,
    between: Callable[[], object] = lambda: None,
    n: int = 4,
    **options: Any,
) -> list[Batch]:
    between()
    with same.rollout(DrawingEnv, actor or RandomActor(), 5, 3, entropy=entropy, **options) as batches:
        got = []
        for _ in range(n):
            between()
            got.append(next(batches).clone())
        return got


def equal(a: Batch, b: Batch) -> bool:
    pairs = [(x, y) for f in FIELDS for x, y in zip(flatten(getattr(a, f))[0], flatten(getattr(b, f))[0], strict=True)]
    return all(torch.equal(x, y) for x, y in pairs if x is not None)


def meddle() -> None:
    """What a user may do between two batches."""
    torch.manual_seed(5)
    torch.rand(3)
    np.random.seed(6)
    np.random.normal()  # leaves half of a pair behind
    random.seed(7)
    random.gauss(0, 1)


def states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


@pytest.mark.parametrize("options", [{}, {"sticky": True}, {"keep_final_obs": True}, {"debug": True}], ids=str)
@pytest.mark.parametrize("kind", [RandomActor, MLPActor, GRUActor])
def test_the_same_entropy_gives_the_same_run(kind: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    env = DrawingEnv()
    actor = RandomActor() if kind is RandomActor else kind(env.observation_space, env.action_space)
    one, two = run(7, actor, **options), run(7, actor, meddle, **options)
    assert all(equal(a, b) for a, b in zip(one, two, strict=True))
    assert not any(equal(a, b) for a, b in zip(one, run(8, actor, **options), strict=True))


def test_checks_do_not_change_the_run() -> None:
    assert all(equal(a, b) for a, b in zip(run(7), run(7, debug=True), strict=True))


def test_training_is_repeated_bit_for_bit() -> None:
    """Also what the learner makes of it, when its own draws are seeded."""

    def train() -> list[torch.Tensor]:
        torch.manual_seed(0)
        env = DrawingEnv()
        actor = GRUActor(env.observation_space, env.action_space, hidden=8)
        optim = torch.optim.Adam(actor.parameters(), lr=0.1)
        with same.rollout(DrawingEnv, actor, 5, 3, entropy=1) as batches:
            for _ in range(4):
                batch = next(batches)
                s = batch.state.rows(0, 5)
                _, _, info = actor(s.obs, s.act, s.rew, s.fin, hx=batch.hx)
                loss = info["value"].square().mean() - actor.log_prob(info, batch.state.act[1:]).mean()
                optim.zero_grad()
                loss.backward()
                optim.step()
            return [batch.state.obs.clone(), batch.actor["logits"].clone(), *actor.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(train(), train(), strict=True))


def test_the_users_random_states_are_left_alone() -> None:
    meddle()
    before = states()
    actor = RandomActor()
    batches = same.rollout(DrawingEnv, actor, 5, 3, entropy=3)
    assert states() == before
    for _ in range(3):
        next(batches)
        assert states() == before
    batches.close()
    assert states() == before


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_also_when_collecting_fails(error: type[BaseException]) -> None:
    def spoil(_: Any) -> Any:
        np.random.random()
        raise error

    meddle()
    before = states()
    with same.rollout(lambda: SpoiltEnv(4, spoil), RandomActor(), 5, 2, entropy=3) as batches:
        with pytest.raises((EnvError, KeyboardInterrupt)):
            next(batches)
        assert states() == before


def test_also_when_building_fails() -> None:
    def factory() -> Any:
        np.random.random()
        torch.rand(1)
        raise ZeroDivisionError

    before = states()
    with pytest.raises(EnvError):
        same.rollout(factory, RandomActor(), 5, 2)
    assert states() == before


def test_without_entropy_runs_differ_and_can_be_repeated() -> None:
    with same.rollout(DrawingEnv, RandomActor(), 5, 3) as batches:
        entropy, first = batches.entropy, next(batches).clone()
    assert equal(first, run(entropy, n=1)[0])
    assert not equal(first, run(None, n=1)[0])


def test_columns_differ() -> None:
    (batch,) = run(0, n=1)
    obs = batch.state.obs
    assert len({tuple(obs[0, j].tolist()) for j in range(3)}) == 3


# -- seeds -----------------------------------------------------------------------------------------------------------


def test_no_two_environments_of_a_run_share_a_seed() -> None:
    """Of whatever worker and generation. Were the seeds drawn, some 25 of these pairs would be equal."""
    n = 257
    keys = [(index, generation) for index in (*range(60), 4095, 65535) for generation in (*range(17), 63, 64, 511)]
    seeds = [seed for index, generation in keys for seed in env_seeds(1, index, generation, n)]
    seeds += evaluation_seeds(1, n)
    assert len(set(seeds)) == len(seeds) == (len(keys) + 1) * n
    assert min(seeds) >= 0
    assert max(seeds) < 2**31


def test_the_most_that_have_seeds_of_their_own() -> None:
    """What `env_seeds` promises, to the last of them."""
    for index, generation, n in ((65535, 63, 128), (63, 511, 1024)):
        assert block(index, generation) * n + n <= 2**31
        assert max(block(i, g) for i in (0, index) for g in (0, generation)) == block(index, generation)
    pairs = [(index, generation) for index in range(70) for generation in range(600)]
    assert len({block(*pair) for pair in pairs}) == len(pairs)


def test_seeds_follow_from_the_entropy_and_look_random() -> None:
    assert env_seeds(1, 0, 0, 7) == env_seeds(1, 0, 0, 9)[:7]
    assert not set(env_seeds(1, 0, 0, 64)) & set(env_seeds(2, 0, 0, 64))
    seeds = np.array(env_seeds(3, 0, 0, 20_000)) / 2**31
    assert np.histogram(seeds, 10)[0] == pytest.approx(2000, abs=250)
    assert np.histogram(np.diff(seeds) % 1.0, 10)[0] == pytest.approx(2000, abs=250)
    # beyond the last number there is no error: the first ones come again
    assert env_seeds(1, 2**40, 0, 3) == env_seeds(1, 0, 0, 3)


def test_an_environment_is_seeded_once_and_by_its_column() -> None:
    made: list[CountingEnv] = []

    def factory() -> CountingEnv:
        made.append(CountingEnv({2: "term"}))
        return made[-1]

    with same.rollout(factory, CountingActor(), 5, 3, entropy=11) as batches:
        next(batches)
    scratch, *run_envs = made
    assert [env.seeds for env in run_envs] == [[s, None] for s in env_seeds(11, 0, 0, 3)]
    assert scratch.seeds[0] not in env_seeds(11, 0, 0, 3)
    assert len(scratch.seeds) == 1
    # environments of the user's own making get the same ones
    envs = [CountingEnv(), CountingEnv()]
    with same.rollout(envs, CountingActor(), 5, entropy=11) as batches:
        next(batches)
    assert [env.seeds[-1] for env in envs] == env_seeds(11, 0, 0, 2)


def test_a_factory_may_take_its_seed() -> None:
    given: list[int] = []
    made: list[CountingEnv] = []

    def factory(*, seed: int, size: int = 3) -> CountingEnv:
        given.append(seed)
        made.append(CountingEnv())
        return made[-1]

    with same.rollout(factory, CountingActor(), 5, 3, entropy=12):
        pass
    assert len(set(given)) == 4
    assert given == [env.seeds[0] for env in made]


def test_a_factory_may_draw() -> None:
    """It runs with the worker's random states: the same environments for the same entropy."""

    def made_by(entropy: int) -> list[float]:
        drawn: list[float] = []

        def factory() -> CountingEnv:
            drawn.append(np.random.random() + random.random() + float(torch.rand(())))
            return CountingEnv()

        with same.rollout(factory, CountingActor(), 5, 3, entropy=entropy):
            return drawn

    one = made_by(1)
    meddle()
    assert one == made_by(1) != made_by(2)
    assert len(set(one)) == 4


# -- streams ---------------------------------------------------------------------------------------------------------


def test_streams_are_the_workers_own() -> None:
    """Another worker, or another life of it, draws other numbers, in each of the three states."""

    def draws(entropy: int, index: int = 0, generation: int = 0) -> tuple[float, float, float]:
        with RandomStreams(entropy, index, generation).active():
            return float(torch.rand(())), float(np.random.random()), random.random()

    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 2, 0), (0, 1, 1)]
    assert draws(0) == draws(0, 0, 0)
    drawn = [draws(*key) for key in keys]
    assert all(len({d[state] for d in drawn}) == len(keys) for state in range(3))


def test_streams_go_on_where_they_stopped() -> None:
    one, two = RandomStreams(5), RandomStreams(5)
    with one.active():
        whole = [(float(torch.rand(())), float(np.random.random()), random.gauss(0, 1)) for _ in range(4)]
    parts = []
    for _ in range(4):
        meddle()
        with contextlib.suppress(ZeroDivisionError), two.active():
            parts.append((float(torch.rand(())), float(np.random.random()), random.gauss(0, 1)))
            raise ZeroDivisionError
    assert parts == whole


def test_streams_that_stay_are_the_same() -> None:
    """A worker in a process of its own draws what it would draw in another's, NumPy's second normal included."""

    def fragment(streams: RandomStreams) -> tuple[float, ...]:
        with streams.active():
            return (
                float(torch.rand(())),
                float(np.random.normal()),
                float(np.random.normal()),
                np.random.normal(),
                (random.gauss(0, 1)),
            )

    swapped = RandomStreams(5)
    expected = [fragment(swapped) for _ in range(4)]
    outside, generator, cpu = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()  # type: ignore[attr-defined]
    staying = RandomStreams(5)
    try:
        staying.stay()
        assert [fragment(staying) for _ in range(4)] == expected
    finally:
        random.setstate(outside)
        np.random.set_bit_generator(generator)  # type: ignore[attr-defined]
        torch.set_rng_state(cpu)


def test_undrawn() -> None:
    torch.manual_seed(0)
    with undrawn():
        inside = torch.rand(3)
    assert torch.equal(inside, torch.rand(3))


def test_actions_are_random() -> None:
    """Lest all of this holds because nothing is drawn."""
    acts = torch.cat([b.state.act[1:] for b in run(1, n=20)])
    assert set(acts.flatten().tolist()) == set(range(N_ACTIONS))
