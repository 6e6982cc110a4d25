"""Every space through worker processes, and workers whose spaces differ."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.collect.test_nesting import nests
from tests.spaces import INFO_KEYS, AnyActor, EchoEnv, Nest, Replay, every_env, everything
from zrl import Batch, ConfigError, EnvError, WorkerError
from zrl.collect.streams import env_seeds
from zrl.rollout import cluster, multi, single
from zrl.train.named import EnvFactory

ROOT = Path(__file__).parents[2]
DEADLINE = 40.0  # seconds for anything at all
T, B = 4, 2
REMOTE = {"cluster": (), "remote": ("--no-shm",)}  # words for zrl worker
MORE: dict[str, Any] = {"entropy": 3, "max_lag": 0, "keep_final_obs": True}


def check(it: Iterator[Batch], n_workers: int, make: Callable[[], EchoEnv] = every_env) -> None:
    """The first three batches are what the workers' environments give when they are played again."""
    replays = [Replay([make() for _ in range(B)], env_seeds(3, index, 0, B + 1)[:B]) for index in range(n_workers)]
    for batch in itertools.islice(it, 3):
        assert [meta.worker for meta in batch.meta] == list(range(n_workers))
        for i, replay in enumerate(replays):
            replay.check(batch, i * B)


def actor() -> AnyActor:
    return AnyActor(everything().space)


def test_single() -> None:
    with single.rollout(every_env, actor(), T, B, info_keys=INFO_KEYS, **MORE) as it:
        check(it, 1)


def test_multi() -> None:
    with multi.rollout(every_env, actor(), T, 2, B, 4, 2, info_keys=INFO_KEYS, sticky=True, **MORE) as it:
        check(it, 2)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "how",
    [
        pytest.param("single", marks=pytest.mark.long),
        "multi",
        pytest.param("cluster", marks=pytest.mark.long),
        "remote",
    ],
)
@settings(max_examples=3, derandomize=True, phases=[Phase.generate])  # each starts processes
@given(seen=nests(["tuple", "list", "named"]), act=nests(["tuple"]), sticky=st.booleans())
def test_drawn_spaces(how: str, seen: Nest, act: Nest, sticky: bool) -> None:
    """Random spaces, random episodes: what comes out of the batches is what went in."""

    def factory() -> EchoEnv:
        return EchoEnv(seen, act.space)

    more: Any = {"sticky": sticky, **MORE}
    if how == "single":
        with single.rollout(factory, AnyActor(act.space), T, B, info_keys=INFO_KEYS, **more) as it:
            check(it, 1, factory)
        return
    if how == "multi":
        with multi.rollout(factory, AnyActor(act.space), T, 2, B, 4, 2, info_keys=INFO_KEYS, **more) as it:
            check(it, 2, factory)
        return
    with tempfile.TemporaryDirectory() as name:  # 0700
        folder, url = Path(name), f"ipc://{name}/l"
        (folder / "nests").write_bytes(cloudpickle.dumps((seen, act)))
        with (
            worker(url, folder / "a", *REMOTE[how], ZRL_TEST_NESTS=str(folder / "nests")) as first,
            cluster.rollout(
                "tests.spaces:tests/Drawn-v0",
                AnyActor(act.space),
                *(T, B, 2, 2),
                bind=url,
                actor_name="tests.spaces:any_actor",
                info_keys=tuple(INFO_KEYS),
                n_actors=2,
                **more,
            ) as it,
        ):
            check(it, 2, factory)
            it.close()
            assert first.wait(DEADLINE) == 0


def test_a_worker_with_another_space(tmp_path: Path) -> None:
    """Whichever process comes first makes one space, the other one another."""
    made: list[int] = []

    def factory() -> EchoEnv:
        if not made:
            try:
                (tmp_path / "taken").touch(exist_ok=False)
                made.append(3)
            except FileExistsError:
                made.append(4)
        return EchoEnv(everything(made[0]), everything().space)

    with multi.rollout(factory, actor(), T, 2, B, 4, 2, **MORE) as it, pytest.raises(WorkerError) as caught:
        next(it)
    found = re.search(r"refused this worker \(spec\).*state\.obs\['seen'\]\['box'\]: (.*?);", str(caught.value))
    assert found is not None, str(caught.value)
    assert found[1] in (f"expected float32[{a}], found float32[{b}]" for a, b in ((3, 4), (4, 3)))
    assert caught.value.at_start


@contextlib.contextmanager
def worker(url: str, log: Path, *more: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    words = ["worker", "--connect", url, "--count", "2", "--id", log.stem, "--import", "tests.spaces", *more]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "zrl", *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )
    try:
        yield process
        process.wait(DEADLINE)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("how", REMOTE)
def test_cluster_and_a_host_with_another_space(tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str) -> None:
    tmp_path.chmod(0o700)
    url = f"ipc://{tmp_path}/l"
    names: Any = {"actor_name": "tests.spaces:any_actor", "info_keys": tuple(INFO_KEYS), "n_actors": 2}
    with caplog.at_level(logging.WARNING, "zrl"), worker(url, tmp_path / "a", *REMOTE[how]) as first:
        with cluster.rollout("tests.spaces:tests/Every-v0", actor(), T, B, 2, 2, bind=url, **names, **MORE) as it:
            check(it, 2)
            with worker(url, tmp_path / "b", *REMOTE[how], ZRL_TEST_WIDTH="4") as other:
                assert other.wait(DEADLINE) == 5
            next(it)
            assert it.stats()["losses"]["rejected: spec"] >= 1
        assert first.wait(DEADLINE) == 0
    said = (
        "so its environments or its actor are others: state.obs['seen']['box']: expected float32[3], found float32[4]"
    )
    assert said in (tmp_path / "b").read_text()
    assert said in caplog.text


@pytest.mark.parametrize("env", [every_env, lambda: every_env(), None, ""], ids=["function", "lambda", "None", "empty"])
def test_hosts_are_given_names_and_no_code(env: Any) -> None:
    with pytest.raises(ConfigError, match=r"env: .* by their names.* expected a Gymnasium id, or module:id, not") as e:
        cluster.rollout(env, actor(), T, B, 2, 2, bind="ipc:///nowhere/l")
    assert "gymnasium.register" in str(e.value)
    with pytest.raises(ConfigError, match=r"actor_name: .* expected module:function, not"):
        cluster.rollout("CartPole-v1", actor(), T, B, 2, 2, bind="ipc:///nowhere/l", actor_name=env)


def test_a_function_is_no_name_of_an_environment() -> None:
    with pytest.raises(EnvError, match=r"where importing tests\.spaces registers the id every_env; no function"):
        EnvFactory("tests.spaces:every_env")()
