"""EnvPool: one call a step, ended columns reset at once, seeds where it is made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.toys import LambdaActor
from zrl.collect.build import CollectOptions, build
from zrl.collect.collect import collect
from zrl.collect.streams import env_seeds
from zrl.data.fragment import Slot
from zrl.errors import ConfigError, EnvError

envpool = pytest.importorskip("envpool", reason="EnvPool is not installed: pip install zrl[envpool]")
pytestmark = pytest.mark.filterwarnings("ignore:.*precision lowered")

T, B = 16, 4


def cart_poles(seed: Any, n: int = B, **options: Any) -> Any:
    options = {"max_episode_steps": 9, "num_threads": 1, **options}
    return envpool.make("CartPole-v1", env_type="gymnasium", num_envs=n, seed=seed, **options)


def make(seed: Any) -> Any:
    return cart_poles(seed)


def lean(obs: Any, act: Any, rew: Any, fin: Any, hx: Any) -> tuple[Any, Any, Any]:
    """Push where the pole leans, except that column 1 always pushes right: it falls soon. The value is the angle."""
    actions = (obs[..., 2] > 0).long()
    actions[:, 1] = 1
    return actions, (), {"value": obs[..., 2]}


def fragments(n: int, **options: Any) -> list[Slot]:
    options = {"keep_final_obs": True, "entropy": 3, **options}
    ctx = build(make, LambdaActor(lean), CollectOptions(T, B, **options))
    slots = []
    for _ in range(n):
        slots.append(Slot(ctx.spec))
        slots[-1].poison()
        collect(ctx, slots[-1])
    ctx.columns.close()
    return slots


def naive(n_rows: int) -> list[list[tuple[Any, float, bool, bool]]]:
    """By column: (obs, reward, terminated, truncated) of every step, as an EnvPool gives them, without its dummies."""
    env = cart_poles(env_seeds(3, 0, 0, B + 1)[:B])
    obs = env.reset()[0]
    columns: list[list[tuple[Any, float, bool, bool]]] = [[(obs[j].copy(), 0.0, True, False)] for j in range(B)]
    done = np.zeros(B, bool)
    while min(map(len, columns)) <= n_rows:
        actions = (obs[:, 2] > 0).astype(int)
        actions[1] = 1
        obs, rewards, terminated, truncated, _ = env.step(actions)
        for j in range(B):
            if done[j]:  # the step only began the episode
                columns[j].append((obs[j].copy(), np.nan, False, False))
            else:
                columns[j].append((obs[j].copy(), float(rewards[j]), bool(terminated[j]), bool(truncated[j])))
        done = terminated | truncated
    return columns


def test_the_record_is_what_the_pool_gives_without_its_dummies() -> None:
    slots = fragments(3)
    assert all(s.np.mask.all() for s in slots)
    truth = naive(4 * 3 * T)
    n_ends = 0
    for j in range(B):
        steps = iter(truth[j])
        next(steps)
        for slot in slots:
            r = slot.np
            for t in range(1, T + 1):
                obs, rew, terminated, truncated = next(steps)
                assert r.state.rew[t, j] == rew
                assert r.state.fin[t, j] == (terminated or truncated)
                assert r.state.term[t, j] == terminated
                if terminated or truncated:
                    n_ends += 1
                    np.testing.assert_array_equal(r.final_obs[t, j], obs)
                    assert r.final_value[t, j] == (obs[2] if truncated else 0)
                    obs, rew, *_ = next(steps)
                    assert np.isnan(rew)
                np.testing.assert_array_equal(r.state.obs[t, j], obs)
    assert n_ends > 3 * B
    assert any(s.np.final_value.any() for s in slots)


def test_every_column_and_every_worker_has_a_seed_of_its_own() -> None:
    firsts = [fragments(1, index=i, generation=g)[0].np.state.obs[0] for i, g in ((0, 0), (1, 0), (0, 1))]
    assert len({x.tobytes() for obs in firsts for x in obs}) == 3 * B
    np.testing.assert_array_equal(firsts[0], fragments(1)[0].np.state.obs[0])


def test_sticky_columns_are_frozen() -> None:
    slots = fragments(3, sticky=True)
    for a, b in zip(slots[0].rows[T].carried, slots[1].rows[0].carried, strict=True):
        np.testing.assert_array_equal(a, b)
    for slot in slots:
        r = slot.np
        assert not r.mask.all()
        for t, j in np.argwhere(~r.mask[:-1]):
            np.testing.assert_array_equal(r.state.obs[t + 1, j], r.state.obs[t, j])


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (lambda: cart_poles(1), "Let the factory take seed= and pass it on"),
        (lambda seed: cart_poles(7), "expected the 4 seeds of its columns"),
        (lambda seed: cart_poles(seed, batch_size=2), "leave batch_size out"),
        (lambda seed: cart_poles(seed if isinstance(seed, int) else seed[:2], 2), "expected the number of columns"),
    ],
)
def test_what_is_refused(factory: Any, words: str) -> None:
    with pytest.raises((EnvError, ConfigError), match=words):
        build(factory, LambdaActor(lean), CollectOptions(T, B))


def test_float_actions_are_cast_and_clipped() -> None:
    def act(obs: Any, act: Any, rew: Any, fin: Any, hx: Any) -> tuple[Any, Any, Any]:
        return torch.full((*fin.shape, 1), 99.0, dtype=torch.float64), (), {"value": rew}

    def pendulums(seed: Any) -> Any:
        return envpool.make("Pendulum-v1", env_type="gymnasium", num_envs=2, seed=seed, num_threads=1)

    ctx = build(pendulums, LambdaActor(act), CollectOptions(3, 2))
    slot = Slot(ctx.spec)
    collect(ctx, slot)
    ctx.columns.close()
    assert (slot.np.state.act[1:] == 99.0).all()  # as sampled
    assert np.isfinite(slot.np.state.obs).all()
