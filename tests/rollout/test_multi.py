"""Batches from worker processes: the same numbers as in-process, whatever carries them."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.rollout.test_same import same_numbers
from tests.toys import CountingActor, CountingEnv, DrawingEnv, RandomActor
from zrl import Batch, ClosedError, ConfigError, StaleBatchError, WorkerError
from zrl.rollout import multi, same, single
from zrl.rollout.inline import InlineRollout
from zrl.rollout.local import dealt
from zrl.rollout.pipeline import PipelineRollout
from zrl.zoo import GRUActor, MLPActor

T, B = 5, 3
Rollout = PipelineRollout | InlineRollout | same.SameRollout


def drawing() -> DrawingEnv:
    return DrawingEnv()


def nudge(actor: torch.nn.Module) -> None:
    """What an optimizer does."""
    with torch.no_grad():
        for x in actor.parameters():
            x.add_(0.01 * torch.arange(x.numel()).view_as(x))


def batches(it: Rollout, actor: torch.nn.Module, n: int) -> list[Batch]:
    """Clones of the first n batches, with the actor changed after each; closes the iterator."""
    found = []
    with it:
        for _ in range(n):
            found.append(next(it).clone())
            nudge(actor)
    return found


def actor_of(kind: str) -> torch.nn.Module:
    torch.manual_seed(3)
    env = drawing()
    make: dict[str, Callable[[], torch.nn.Module]] = {
        "mlp": lambda: MLPActor(env.observation_space, env.action_space),
        "numpy": lambda: MLPActor(env.observation_space, env.action_space, numpy=True),
        "gru": lambda: GRUActor(env.observation_space, env.action_space),
    }
    return make[kind]()


@pytest.mark.parametrize("kind", ["mlp", "numpy", "gru"])
@pytest.mark.parametrize("sticky", [False, True])
def test_same_single_and_multi_give_the_same_numbers(kind: str, sticky: bool) -> None:
    found = []
    for which in ("same", "single", "multi", "inline"):
        actor = actor_of(kind)
        it: Rollout
        if which == "same":
            it = same.rollout(drawing, actor, T, B, entropy=11, sticky=sticky)
        elif which == "single":
            it = single.rollout(drawing, actor, T, B, entropy=11, sticky=sticky, max_lag=0)
        else:
            how: Any = "fork" if which == "multi" else "inline"
            it = multi.rollout(drawing, actor, T, 1, B, 2, 1, entropy=11, sticky=sticky, max_lag=0, start_method=how)
        found.append(batches(it, actor, 4))
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            assert same_numbers(mine, theirs)
            assert mine.meta == theirs.meta
            assert mine.version == theirs.version


def test_two_runs_of_several_workers_are_equal_bit_for_bit() -> None:
    runs = []
    for how in ("fork", "spawn", "inline"):
        actor = actor_of("mlp")
        method: Any = how
        it = multi.rollout(drawing, actor, T, 2, B, 4, 4, entropy=5, max_lag=0, start_method=method)
        runs.append(batches(it, actor, 3))
    for other in runs[1:]:
        for mine, theirs in zip(runs[0], other, strict=True):
            assert same_numbers(mine, theirs)
            assert mine.meta == theirs.meta
    assert [meta.worker for meta in runs[0][0].meta] == [0, 1, 0, 1]
    assert not same_numbers(runs[0][0], runs[0][1])


class Weighted(RandomActor):
    """Its value is its weight, and its info says whether it is in training mode."""

    def forward(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None) -> Any:
        actions, hx, info = super().forward(obs, act, rew, fin)
        return actions, hx, info | {"value": self.weight.expand(fin.shape), "training": fin * 0 + int(self.training)}


def counting() -> CountingEnv:
    return CountingEnv(limit=7)


@pytest.mark.parametrize("max_lag", [None, 0, 1, 2])
def test_lag_is_bounded_and_says_which_weights_acted(max_lag: int | None) -> None:
    actor = Weighted()
    actor.weight.data.fill_(1)
    with multi.rollout(counting, actor, T, 2, B, 6, 2, max_lag=max_lag) as it:
        for n in range(1, 30):
            batch = next(it)
            assert batch.version == it.version == n
            for i, (meta, lag) in enumerate(zip(batch.meta, batch.lag, strict=True)):
                assert 0 <= lag <= (n if max_lag is None else max_lag)
                values = batch.actor["value"][:, i * B : (i + 1) * B]
                assert torch.equal(values, torch.full_like(values, meta.version))
                assert torch.equal(batch.bootstrap[0, i * B : (i + 1) * B], torch.full((B,), float(meta.version)))
            actor.weight.data.fill_(n + 1)
        until(lambda: it.stats()["workers"] == 2)  # one may have done it all
        stats = it.stats()
    fragments = stats["fragments"]
    assert fragments["committed"] == fragments["consumed"] + fragments["dropped"] + fragments["in_flight"]
    assert fragments["consumed"] == 29 * 2 == sum(stats["lag"].values())
    assert sum(stats["slots"].values()) == 6


@pytest.mark.parametrize("start_method", ["fork", "inline"])
def test_fragments_of_a_worker_follow_one_another(start_method: Any) -> None:
    seen: dict[int, tuple[int, Batch, int]] = {}
    expected = 2 if start_method == "fork" else 1  # inline makes each batch with the first workers
    deadline = time.monotonic() + 30
    with multi.rollout(counting, CountingActor(), T, 2, B, 5, 1, start_method=start_method, debug=True) as it:
        for n in itertools.count():
            if n >= 12 and (len(seen) == expected or time.monotonic() > deadline):
                break  # on a busy machine one of the workers may come late
            batch = next(it).clone()
            (meta,) = batch.meta
            if meta.worker in seen:
                seq, before, _ = seen[meta.worker]
                assert meta.seq == seq + 1
                for mine, theirs in zip(batch.state, before.state, strict=True):
                    assert torch.equal(mine[0], theirs[-1])
                assert torch.equal(batch.final_value[0], before.final_value[-1])
            seen[meta.worker] = meta.seq, batch, 0
    assert len(seen) == expected


@pytest.mark.parametrize("start_method", ["fork", "inline"])
def test_debug_finds_who_uses_a_batch_past_its_time(start_method: Any) -> None:
    with multi.rollout(counting, CountingActor(), T, 1, B, 2, 1, debug=True, start_method=start_method) as it:
        first = next(it)
        kept, obs = first.clone(), first.state.obs
        next(it)
        assert same_numbers(first, kept)
        next(it)
        assert torch.isnan(obs).all()
        with pytest.raises(StaleBatchError, match=r"batch.state: this batch was valid until"):
            first.state.obs.sum()
        assert torch.isfinite(kept.state.obs).all()


class Forgetful(RandomActor):
    """Counts its calls in an integer buffer, where the count is lost."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().forward(*args, **kwargs)


def test_a_warning_of_a_worker_reaches_the_log_of_the_learner_once(caplog: pytest.LogCaptureFixture) -> None:
    with multi.rollout(counting, Forgetful(), T, 2, B, 4, 2, max_lag=0, debug=True) as it:
        for _ in range(3):
            next(it)
        until(lambda: "warns" in caplog.text)
    (message,) = (record.getMessage() for record in caplog.records if "warns" in record.getMessage())
    assert message.endswith(
        "warns: UserWarning: the actor changed its buffer 'calls' while collecting; that is lost at the next publish"
    )
    assert message.startswith("worker ")


@pytest.mark.parametrize("worker_mode", ["train", "eval"])
def test_the_mode_of_the_workers_is_chosen_and_not_followed(worker_mode: Any) -> None:
    actor = Weighted()
    with multi.rollout(counting, actor, T, 1, B, 2, 1, worker_mode=worker_mode) as it:
        for batch, _ in zip(it, range(4), strict=False):
            actor.train(not actor.training)
            assert batch.actor["training"].unique().tolist() == [worker_mode == "train"]


def test_publishing_by_hand() -> None:
    actor = Weighted()
    with multi.rollout(counting, actor, T, 1, B, 2, 1, auto_publish=False, max_lag=0) as it:
        assert [next(it).version for _ in range(3)] == [1, 1, 1]
        actor.weight.data.fill_(7.0)
        assert it.publish() == 2
        batch = next(it)
        assert batch.version == 2
        assert batch.actor["value"].unique().tolist() == [7.0]


def test_wrapped_learners_are_published_without_their_wrappers() -> None:
    actor = Weighted()
    wrapped = torch.nn.Module()
    wrapped._modules["_orig_mod"] = actor  # what torch.compile returns
    with multi.rollout(counting, wrapped, T, 1, B, 2, 1, max_lag=0) as it:
        next(it)
        actor.weight.data.fill_(5.0)
        assert next(it).actor["value"].unique().tolist() == [5.0]


class Buffered(RandomActor):
    """Says what stands in its buffers; whole numbers, flags and scalars among them."""

    count: Tensor
    flags: Tensor
    small: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor(2**40))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("small", torch.tensor([3], dtype=torch.uint8))
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None) -> Any:
        actions, hx, info = super().forward(obs, act, rew, fin)
        buffers = {name: b.expand(*fin.shape, *b.shape).clone() for name, b in self.named_buffers()}
        return actions, hx, info | buffers


def test_buffers_of_every_kind_travel_to_the_workers() -> None:
    actor = Buffered()
    with single.rollout(counting, actor, T, B, max_lag=0) as it:
        for _ in range(3):
            batch = next(it)
            for name, b in actor.named_buffers():
                assert torch.equal(batch.actor[name], b.expand(T, B, *b.shape)), name
                assert batch.actor[name].dtype == b.dtype
            actor.count += 1
            actor.flags.logical_not_()
            actor.small.mul_(2)
            actor.scale.neg_()


class Noting(CountingEnv):
    """Notes in a folder that it was closed."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def close(self) -> None:
        (self.folder / uuid.uuid4().hex).touch()


@pytest.mark.parametrize("close", [True, False])
@pytest.mark.parametrize("how", ["single", "multi", "inline"])
def test_environments_may_be_left_open(how: Any, close: bool, tmp_path: Path) -> None:
    """But for the scratch one of each worker, which is ours."""

    def noting() -> Noting:
        return Noting(tmp_path)

    n = 1 if how == "single" else 2
    start: Any = {"pinned": True, "start_method": "inline" if how == "inline" else "fork", "max_lag": 0}
    if how == "single":
        it: Rollout = single.rollout(noting, CountingActor(), T, B, close=close)
    else:
        it = multi.rollout(noting, CountingActor(), T, n, B, 4, 2, close=close, **start)
    with it:
        next(it)
        assert len(list(tmp_path.iterdir())) == n
    assert len(list(tmp_path.iterdir())) == n * (1 + B if close else 1)


def test_info_keys_and_final_observations_travel() -> None:
    options: Any = {"keep_final_obs": True, "info_keys": {"step": np.int64}, "max_lag": 0, "entropy": 1}
    with single.rollout(counting, CountingActor(), T, B, **options) as it:
        found = [next(it).clone() for _ in range(3)]
    with same.rollout(counting, CountingActor(), T, B, **{**options, "max_lag": 0}) as it2:
        expected = [next(it2).clone() for _ in range(3)]
    assert found[0].final_obs is not None
    assert found[0].env is not None
    for mine, theirs in zip(found, expected, strict=True):
        assert same_numbers(mine, theirs)


def test_a_backward_pass_goes_through_a_batch_hx_included() -> None:
    actor = actor_of("gru")
    with torch.inference_mode(), single.rollout(drawing, actor, T, B) as it:
        batch = next(it)
    hx = batch.hx.clone().requires_grad_()
    s = batch.state.rows(0, T)
    _, _, info = actor(s.obs, s.act, s.rew, s.fin, hx=hx)
    (info["value"] * batch.mask).sum().backward()
    assert hx.grad is not None
    assert all(x.grad is not None for name, x in actor.named_parameters() if "value" in name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_buffers": 1}, "n_buffers: expected at least one a worker, 2, not 1"),
        ({"n_per_batch": 5}, "n_per_batch: 5 fragments never fit into n_buffers=4"),
        ({"max_lag": 0, "n_per_batch": 3}, "n_per_batch: with max_lag=0 .* multiple of n_actors=2, not 3"),
        ({"max_lag": -1}, "max_lag: expected an integer of at least 0, not -1"),
        ({"n_actors": 0}, "n_actors: expected an integer of at least 1"),
        ({"n_steps": 1.5}, "n_steps: expected an integer of at least 1, not 1.5"),
        ({"worker_mode": "test"}, "worker_mode: expected one of train, eval"),
        ({"start_method": "thread"}, "start_method: expected one of fork, spawn, inline"),
        ({"stall_timeout": 0}, "stall_timeout: expected seconds"),
        ({"entropy": 1 << 128}, "entropy: expected less than"),
        ({"info_keys": "reward"}, "info_keys: expected names or a mapping, not the text 'reward'"),
        ({"device": "gpu"}, "device: 'gpu' cannot be used"),
        ({"factory": 3}, "factory: expected a callable"),
    ],
)
def test_arguments_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    values = {"n_steps": T, "n_actors": 2, "n_per_actor": B, "n_buffers": 4, "n_per_batch": 2, "factory": counting}
    values |= change
    with pytest.raises(ConfigError, match=message) as caught:
        multi.rollout(values.pop("factory"), CountingActor(), **values)  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError)


def test_slots_are_dealt_out_evenly_and_never_raised() -> None:
    assert [dealt(7, 3)(i) for i in range(3)] == [3, 2, 2]
    with multi.rollout(counting, CountingActor(), T, 2, B, 3, 1) as it:
        until(lambda: it.stats()["workers"] == 2)
        assert sum(it.stats()["slots"].values()) == 3


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_actor_without_weights() -> None:
    with multi.rollout(counting, CountingActor(), T, 1, B, 2, 1, max_lag=0) as it:
        assert [next(it).version for _ in range(3)] == [1, 2, 3]


def test_nothing_works_after_close() -> None:
    it = single.rollout(counting, CountingActor(), T, B)
    it.close()
    it.close()
    for call in (it.publish, lambda: next(it)):
        with pytest.raises(ClosedError, match="make a new one"):
            call()
    assert isinstance(it.stats(), dict)


def test_close_from_another_thread_wakes_a_waiting_next() -> None:
    def never() -> CountingEnv:
        time.sleep(60)
        raise AssertionError

    it = single.rollout(never, CountingActor(), T, B)
    closer = threading.Timer(0.3, it.close)
    closer.start()
    with pytest.raises(ClosedError):
        next(it)
    closer.join()


def test_an_error_before_the_first_fragment_names_worker_environment_and_traceback() -> None:
    def broken(seed: int | None = None) -> CountingEnv:
        raise ValueError("no such game")

    with (
        pytest.raises(WorkerError, match="no such game") as caught,
        single.rollout(broken, CountingActor(), T, B) as it,
    ):
        next(it)
    assert caught.value.worker == 0
    assert caught.value.at_start
    assert "Traceback" in caught.value.remote_traceback
    with pytest.raises(ClosedError, match="after WorkerError"):
        next(it)


def test_what_inline_gave_up_is_counted() -> None:
    """An interrupt in the second worker's fragment: the first one's is dropped, its own is lost."""
    made = 0

    class Interrupting(CountingEnv):
        def step(self, action: Any) -> Any:
            nonlocal made
            made += 1
            if made == 2 * 2 * T * B + T * B + 1:
                raise KeyboardInterrupt
            return super().step(action)

    with multi.rollout(Interrupting, CountingActor(), T, 2, B, 4, 2, start_method="inline") as it:
        for _ in range(2):
            next(it)
        with pytest.raises(KeyboardInterrupt):
            next(it)
        next(it)
        f = it.stats()["fragments"]
    assert f == {"granted": 8, "committed": 7, "consumed": 6, "dropped": 1, "lost": 1, "in_flight": 0}


def test_waiting_in_slices_gives_the_same_batches() -> None:
    """And publishes once for each, however often it was asked."""
    found = []
    for timeout in (None, 0.0, 0.01):
        actor = actor_of("mlp")
        with multi.rollout(drawing, actor, T, 1, B, 2, 1, entropy=11, max_lag=0) as rollout:
            assert isinstance(rollout, PipelineRollout)
            assert rollout.hosts() == {"learner": 1}
            some = []
            for _ in range(3):
                batch = next(rollout) if timeout is None else None
                while batch is None:
                    assert timeout is not None
                    batch = rollout.next_within(timeout)
                some.append(batch.clone())
                nudge(actor)
            found.append(some)
    for other in found[1:]:
        assert [batch.version for batch in other] == [1, 2, 3]
        for one, two in zip(found[0], other, strict=True):
            same_numbers(one, two)


class Cores(CountingEnv):
    """Observes on which cores its process may run: one bit each."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = gym.spaces.Box(0, 1, (64,), np.int64)

    def reset(self, **options: Any) -> Any:
        super().reset(**options)
        return self.where(), {}

    def step(self, action: Any) -> Any:
        return self.where(), *super().step(action)[1:]

    def where(self) -> Any:
        seen = np.zeros(64, np.int64)
        seen[sorted(os.sched_getaffinity(0))[:64]] = 1
        return seen


@pytest.mark.skipif(sys.platform != "linux", reason="cores to be kept on")
@pytest.mark.parametrize("affinity", [True, False])
def test_workers_are_kept_on_a_core_each_if_that_is_wanted(affinity: bool) -> None:
    cores = sorted(os.sched_getaffinity(0))
    with multi.rollout(Cores, RandomActor(2), T, 3, B, 6, 3, max_lag=0, affinity=affinity) as it:
        batch = next(it)
    for i, meta in enumerate(batch.meta):
        found = batch.state.obs[0, i * B].nonzero().flatten().tolist()
        assert found == ([cores[meta.worker % len(cores)]] if affinity else cores)
