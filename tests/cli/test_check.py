"""``zrl check``: what it finds out about environments, good ones and others."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from click.testing import CliRunner, Result

from tests.toys import SpaceEnv
from zrl.cli import main
from zrl.collect.build import CollectOptions, build
from zrl.collect.collect import collect
from zrl.config import TrainConfig
from zrl.data.fragment import Slot
from zrl.data.ring import Ring
from zrl.nodes.buffers import HostBuffers
from zrl.train.rollouts import SLOTS
from zrl.zoo import MLPActor

FEW = ["--steps", "64"]


def run(*words: str) -> Result:
    return CliRunner().invoke(main, ["check", *words, *FEW])


def as_json(*words: str, code: int = 0) -> dict[str, Any]:
    result = run(*words, "--json")
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.output)
    return found


def test_what_is_recorded_and_what_it_takes() -> None:
    found = as_json("CartPole-v1", "--envs", "6", "--n-steps", "5", "--workers", "3", "--slots", "4")
    env = gym.make("CartPole-v1")
    actor = MLPActor(env.observation_space, env.action_space)
    ctx = build(lambda: gym.make("CartPole-v1"), actor, CollectOptions(n_steps=5, n_columns=2))
    spec = ctx.spec
    leaves = {leaf["path"]: leaf for leaf in found["leaves"]}
    assert list(leaves) == [leaf.path for leaf in spec.leaves]
    assert leaves["state.obs"] == {
        "path": "state.obs",
        "dtype": "float32",
        "shape": [6, 2, 4],
        "row_nbytes": 32,
        "nbytes": 192,
    }
    assert found["slot_nbytes"] == spec.nbytes
    assert found["slots_nbytes"] == 3 * 4 * spec.nbytes
    assert found["batches_nbytes"] == HostBuffers.n_buffers * spec.with_columns(6).nbytes
    assert found["actor"] == "MLPActor"
    assert found["n_parameters"] == sum(p.numel() for p in actor.parameters())
    assert found["max_episode_steps"] == 500
    assert found["env_steps_per_s"] > 0
    assert found["steps_per_s"] > 0
    assert found["problems"] == []
    assert found["refused"] is False
    # CartPole's velocities have no bounds; each warning once, without colours
    assert found["gymnasium"] == sorted(set(found["gymnasium"]), key=found["gymnasium"].index)
    assert "A Box observation space minimum value is -infinity. This is probably too low." in found["gymnasium"]


def test_in_process_there_are_no_batch_buffers() -> None:
    found = as_json("CartPole-v1", "--workers", "0", "--envs", "4", "--n-steps", "5")
    assert (found["n_slots"], found["batches_nbytes"]) == (2, 0)
    assert found["slots_nbytes"] == 2 * found["slot_nbytes"]


def test_the_defaults_are_those_of_a_run() -> None:
    found, config = as_json("CartPole-v1"), TrainConfig().resolved(0)
    assert (found["n_envs"], found["n_steps"], found["workers"]) == (config.n_envs, config.n_steps, config.workers)
    assert found["n_slots"] == SLOTS * config.workers


def test_lines_for_people() -> None:
    result = run("zrl.zoo:zrl/NarrowPath-v0", "--env-kwargs", '{"length": 12}')
    assert result.exit_code == 0, result.output
    for text in (
        'environment   zrl.zoo:zrl/NarrowPath-v0 {"length": 12}',
        "observations  Discrete(13)",
        "time limit    200 steps",
        "a fragment: 32 steps of 16 environments",
        "zrl can collect from it",
    ):
        assert text in result.output


class TwoAtOnce(gym.vector.VectorEnv[Any, Any, Any]):
    """Cannot do anything but say how it resets."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}  # noqa: RUF012 (Gymnasium's way)
    n_closed = 0

    def __init__(self, num_envs: int = 1) -> None:
        self.num_envs = num_envs

    def close(self, **kwargs: Any) -> None:
        type(self).n_closed += 1


def box(dtype: Any = np.float32, n: int = 3) -> gym.spaces.Box:
    return gym.spaces.Box(-1.0, 1.0, (n,), dtype)


class Lengths(SpaceEnv):
    """Observations without a fixed shape."""

    def __init__(self) -> None:
        super().__init__(gym.spaces.Sequence(box()), gym.spaces.Discrete(2))


class Words(SpaceEnv):
    """Texts and alternatives, beside what fills the memory; the same observation again and again."""

    def __init__(self) -> None:
        choice = gym.spaces.OneOf([gym.spaces.Text(7), gym.spaces.Discrete(2)])
        pixels = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
        super().__init__(gym.spaces.Dict(choice=choice, pixels=pixels, text=gym.spaces.Text(5)), gym.spaces.Discrete(2))
        self.only = self.observation_space.sample()

    def observe(self) -> Any:
        return self.only


class Double(SpaceEnv):
    """Observations of float64."""

    def __init__(self) -> None:
        super().__init__(gym.spaces.Dict({"a": box(np.float64), "b": box()}), gym.spaces.Discrete(2))


class Liar(SpaceEnv):
    """Observations that are not in its space."""

    def __init__(self) -> None:
        super().__init__(box(), gym.spaces.Discrete(2), shown=lambda x: x[:2])


class Widened(SpaceEnv):
    """Observations of another width than the space says."""

    def __init__(self) -> None:
        super().__init__(box(), gym.spaces.Discrete(2), shown=lambda x: x.astype(np.float64))


class Pushes(SpaceEnv):
    """Actions that no default actor has."""

    def __init__(self) -> None:
        words = gym.spaces.OneOf([gym.spaces.Text(4), gym.spaces.Discrete(2)])
        super().__init__(box(), gym.spaces.Tuple([gym.spaces.Discrete(2), words]))


class Vectorial(SpaceEnv):
    """Several rewards at once."""

    def __init__(self) -> None:
        super().__init__(box(), gym.spaces.Discrete(2))

    def step(self, action: Any) -> Any:
        obs, _, *rest = super().step(action)
        return obs, np.ones(2), *rest


class Fragile(SpaceEnv):
    """Breaks at the first step."""

    def __init__(self) -> None:
        super().__init__(box(), gym.spaces.Discrete(2))

    def step(self, action: Any) -> Any:
        raise OSError("the arm fell off")


PLAIN: tuple[Any, ...] = (Lengths, Words, Double, Liar, Widened, Pushes, Vectorial, Fragile)
VECTOR: Any = TwoAtOnce


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    for env in PLAIN:
        gym.register(f"test/{env.__name__}-v0", entry_point=env)
    gym.register("test/TwoAtOnce-v0", vector_entry_point=VECTOR)
    yield
    for env in (*PLAIN, VECTOR):
        del gym.registry[f"test/{env.__name__}-v0"]


@pytest.mark.parametrize(
    ("env", "text", "hint"),
    [
        ("Lengths", "leaf state.obs; expected Box, Discrete", "fixed shapes"),
        ("Liar", "the first observation is not what the observation space says", "correct the space"),
        ("Pushes", "no default policy for this action space", "--actor module:function"),
        ("Vectorial", "rew", "the reward as one finite number"),
        ("Fragile", "step raised OSError: the arm fell off", "let step() return"),
        ("TwoAtOnce", "only a vector environment: zrl cannot collect from those yet", "register a plain one"),
        ("Nothing", "Gymnasium cannot make 'test/Nothing-v0'", "--env-kwargs"),
    ],
)
def test_refusals_with_what_to_do(env: str, text: str, hint: str) -> None:
    result = run(f"test/{env}-v0", "--workers", "0", "--envs", "2")
    assert result.exit_code == 5, result.output
    assert "\nrefused: " in result.output
    assert text in result.output
    assert hint in result.output
    assert "zrl would refuse it" in result.output
    assert "Traceback" not in result.output


def test_the_bytes_are_those_that_are_allocated() -> None:
    """Of a slot, of a ring of them, and of the batches; and an observation lies in a slot once."""
    found = as_json("test/Words-v0", "--envs", "4", "--n-steps", "15", "--workers", "2", "--slots", "3")
    sizes = {leaf["path"]: (leaf["dtype"], leaf["shape"], leaf["nbytes"]) for leaf in found["leaves"]}
    assert sizes["state.obs['choice'][0]"] == ("int64", [16, 2], 16 * 2 * 8)
    assert sizes["state.obs['choice'][1][0]"] == ("int32", [16, 2, 7], 16 * 2 * 7 * 4)
    assert sizes["state.obs['text']"] == ("int32", [16, 2, 5], 16 * 2 * 5 * 4)
    pixels = 16 * 2 * 64 * 64 * 3
    assert [n for _, _, n in sizes.values() if n > pixels / 20] == [pixels]
    env = Words()
    ctx = build(Words, MLPActor(env.observation_space, env.action_space), CollectOptions(n_steps=15, n_columns=2))
    slot = Slot(ctx.spec)
    assert found["slot_nbytes"] == slot.memory.nbytes == sum(-(-a.nbytes // 64) * 64 for a in slot.arrays)
    with Ring.create(ctx.spec.nbytes, 3, run_id=bytes(16), incarnation=bytes(16), digest=bytes(16)) as ring:
        assert [ring.slot(k).nbytes for k in range(3)] == [found["slot_nbytes"]] * 3
        assert ring.memory.nbytes == 4096 + 3 * -(-found["slot_nbytes"] // 4096) * 4096  # slots begin on pages
    buffers = HostBuffers(ctx.spec, 2)
    leaves = [x.untyped_storage().nbytes() for k in range(buffers.n_buffers) for x in buffers.leaves(k)]
    assert found["batches_nbytes"] == sum(-(-n // 64) * 64 for n in leaves)
    # and collecting takes no more
    collect(ctx, slot)
    tracemalloc.start()
    try:
        collect(ctx, slot)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < pixels / 4


def test_a_vector_environment_says_how_it_resets() -> None:
    before = TwoAtOnce.n_closed
    assert as_json("test/TwoAtOnce-v0", code=5)["autoreset"] == "SameStep"
    assert TwoAtOnce.n_closed == before + 1


def test_hints_are_no_refusals() -> None:
    found = as_json("test/Double-v0")
    assert [p["text"].partition(":")[0] for p in found["problems"]] == [
        "no time limit is stated",
        "state.obs['a'] is float64",
    ]
    assert not any(p["refused"] for p in found["problems"])


def test_a_warning_of_the_recorder_is_a_hint() -> None:
    problems = as_json("test/Widened-v0")["problems"]
    assert any("float64" in p["text"] and "state.obs" in p["text"] for p in problems)


def test_without_an_actor_the_leaves_of_the_environment_are_known() -> None:
    found = as_json("test/Pushes-v0", code=5)
    paths = [leaf["path"] for leaf in found["leaves"]]
    assert paths[:5] == ["state.obs", "state.act[0]", *(f"state.act[1]{x}" for x in ("[0]", "[1][0]", "[1][1]"))]
    assert (found["leaves"][3]["dtype"], found["leaves"][3]["shape"][2:]) == ("int32", [4])
    assert (found["actor"], found["n_parameters"], found["steps_per_s"]) == ("", None, None)
    assert found["env_steps_per_s"] > 0


def test_an_actor_by_name() -> None:
    assert as_json("CartPole-v1", "--actor", "zrl.zoo:GRUActor")["actor"] == "GRUActor"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--env-kwargs", "[1]"], "--env-kwargs: expected a JSON object"),
        (["--env-kwargs", "{"], "--env-kwargs: expected a JSON object"),
        (["--envs", "5", "--workers", "2"], "envs: expected a multiple of the 2 workers, not 5"),
        (["--actor", "zrl.zoo:Nobody"], "has no function 'Nobody'"),
        (["--actor", "no"], "actor: expected module:function"),
    ],
)
def test_wrong_words(words: list[str], text: str) -> None:
    result = run("CartPole-v1", *words)
    assert result.exit_code == 2, result.output
    assert text in result.output


def test_wrong_arguments_of_the_environment() -> None:
    result = run("CartPole-v1", "--env-kwargs", '{"colour": "red"}')
    assert result.exit_code == 5
    assert "unexpected keyword argument 'colour'" in result.output
