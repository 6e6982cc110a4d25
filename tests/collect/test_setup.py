"""`setup`: every copy that acts is told once which columns are its own, in every kind of collector."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.toys import N_ACTIONS, CountingEnv, RandomActor
from zrl import ActorError, Batch, evaluate
from zrl.collect.build import CollectOptions, build
from zrl.collect.streams import setup_generator
from zrl.rollout import multi, same, single

T, B, ENTROPY = 4, 3, 5


def counting() -> CountingEnv:
    return CountingEnv(limit=3)


class Own(RandomActor):
    """Its actions are the numbers of its columns, modulo 5; `info` has them, the worker, and what it drew at first."""

    column: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.column, self.worker, self.drawn, self.n_setups = torch.zeros(1, dtype=torch.int64), -1, 0.0, 0

    def setup(self, worker: int, columns: range, generator: torch.Generator) -> None:
        self.n_setups += 1
        self.worker, self.column = worker, torch.tensor(columns)
        self.drawn = float(torch.rand((), generator=generator, dtype=torch.float64))

    def forward(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None) -> Any:
        column = self.column.expand(fin.shape).clone()
        number = torch.tensor([self.worker, self.drawn, self.n_setups], dtype=torch.float64)
        info = {"value": rew + self.weight, "column": column, "number": number.expand(*fin.shape, 3).clone()}
        return column % N_ACTIONS, (), info


def numbers(worker: int, generation: int = 0) -> list[float]:
    """Of a worker of this life."""
    generator = setup_generator(ENTROPY, worker, generation)
    return [worker, float(torch.rand((), generator=generator, dtype=torch.float64)), 1]


@pytest.mark.parametrize("how", ["same", "single", "multi", "inline"])
def test_every_copy_gets_its_columns(how: Any) -> None:
    actor = Own()
    many: Any = {"entropy": ENTROPY, "max_lag": 0, "start_method": "inline" if how == "inline" else "fork"}
    workers = [0]
    if how == "same":
        it: Any = same.rollout(counting, actor, T, B, entropy=ENTROPY, debug=True)
    elif how == "single":
        it = single.rollout(counting, actor, T, B, entropy=ENTROPY, max_lag=0)
    else:
        workers = [0, 1]
        it = multi.rollout(counting, actor, T, 2, B, 4, 2, **many)
    with it:
        for _ in range(3):
            batch: Batch = next(it)
            columns = torch.arange(B * len(workers)).expand(T, -1)
            assert torch.equal(batch.actor["column"], columns)
            assert torch.equal(batch.state.act[1:], columns % N_ACTIONS)
            for i, worker in enumerate(workers):
                seen = batch.actor["number"][:, i * B : (i + 1) * B]
                assert torch.equal(seen, torch.tensor(numbers(worker), dtype=torch.float64).expand(T, B, 3))
    assert actor.n_setups == 0


def test_another_life_of_a_worker_draws_other_numbers() -> None:
    lives = [numbers(worker, generation)[1] for worker in range(3) for generation in range(3)]
    assert len(set(lives)) == 9
    made = []
    for generation in (0, 1, 1):
        actor = Own()
        options = CollectOptions(T, B, entropy=ENTROPY, index=2, generation=generation)
        build(counting, actor, options).columns.close()
        assert actor.n_setups == 1
        assert actor.column.tolist() == [6, 7, 8]
        made.append(actor.drawn)
    assert made == [lives[6], lives[7], lives[7]]


def test_what_it_draws_disturbs_nobody() -> None:
    class Also(RandomActor):
        def setup(self, worker: int, columns: range, generator: torch.Generator) -> None:
            torch.rand(3, generator=generator)

    acts = []
    for actor in (RandomActor(), Also()):
        with same.rollout(counting, actor, T, B, entropy=ENTROPY) as it:
            acts.append([next(it).state.act.clone() for _ in range(3)])
    assert all(map(torch.equal, *acts))


def test_evaluations_have_none() -> None:
    actor = Own()
    evaluate([counting(), counting()], actor)
    assert actor.n_setups == 0


# -- what goes wrong -------------------------------------------------------------------------------------------------


class Mischief(RandomActor):
    kept: Tensor

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.register_buffer("kept", torch.full((2,), torch.nan), persistent=False)

    def setup(self, worker: int, columns: range, generator: torch.Generator) -> None:
        if self.what == "raise":
            raise ZeroDivisionError("in setup")
        if self.what == "add":
            self.register_buffer("eps", torch.zeros(len(columns)))
        if self.what == "resize":
            self.kept = torch.zeros(len(columns))
        if self.what == "fill":
            self.kept.fill_(1.0)
        if self.what == "weight":
            with torch.no_grad():
                self.weight.fill_(1.0)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("raise", r"^setup\(\) of the actor raised ZeroDivisionError: in setup"),
        ("add", r"^setup\(\) changed which parameters .*: 'eps': expected no such tensor"),
        ("resize", r"^setup\(\) changed which parameters .*: 'kept': expected float32 \(2,\), found float32 \(3,\)"),
    ],
)
def test_errors_name_setup(what: str, text: str) -> None:
    envs = [counting() for _ in range(B)]
    with pytest.raises(ActorError, match=text):
        same.rollout(envs, Mischief(what), T)
    with pytest.raises(ActorError, match=text):
        multi.rollout(counting, Mischief(what), T, 1, B, 2, 1, start_method="inline")


@pytest.mark.parametrize("what", ["fill", "weight"])
def test_debug_warns_of_what_the_next_publish_overwrites(what: str) -> None:
    name = "kept" if what == "fill" else "weight"
    with (
        pytest.warns(UserWarning, match=rf"setup\(\) of the actor changed '{name}'.*plain attributes"),
        same.rollout(counting, Mischief(what), T, B, debug=True) as it,
    ):
        next(it)


def test_no_warning_without_a_reason() -> None:
    """A buffer of NaN that is left alone is the same as before."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same.rollout(counting, Mischief("nothing"), T, B, debug=True).close()
