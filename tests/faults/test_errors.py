"""Exceptions in the workers, settings that make no sense, addresses that are taken: each names what is wrong."""

from __future__ import annotations

import functools
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from tests.faults.world import (
    B,
    Ledger,
    StampEnv,
    T,
    audit,
    drive,
    impatient,
    kid_of,
    needs_linux,
    pid_of,
    rolling,
    stamps,
    tell,
)
from tests.toys import LambdaActor, RandomActor
from zrl.errors import ActorError, ClosedError, ConfigError, WorkerError
from zrl.nodes.collator import Plan
from zrl.rollout import multi

pytestmark = needs_linux


class Spoilt(StampEnv):
    """Raises in `where`, the second environment that a worker steps or resets."""

    made = 0

    def __init__(self, where: str) -> None:
        super().__init__()
        Spoilt.made += 1
        self.where, self.number = where, Spoilt.made  # 1 is the one that is probed
        if where == "factory" and self.number == 3:
            raise ValueError("spoilt on purpose")

    def reset(self, **options: Any) -> Any:
        self.spoil("reset")
        return super().reset(**options)

    def step(self, action: Any) -> Any:
        self.spoil("step")
        return super().step(action)

    def spoil(self, where: str) -> None:
        if self.where == where and self.number == 3:
            raise ValueError("spoilt on purpose")


@pytest.mark.parametrize("where", ["factory", "reset", "step"])
def test_before_the_first_fragment_an_exception_ends_the_run(where: str, tmp_path: Path) -> None:
    with rolling(functools.partial(Spoilt, where), log_dir=tmp_path) as it:
        with pytest.raises(WorkerError, match="spoilt on purpose") as caught:
            next(it)
        error = caught.value
        assert error.worker in (0, 1)
        assert error.env_index == 1  # the second column
        assert "ValueError: spoilt on purpose" in error.remote_traceback
        assert "failed before its first fragment" in str(error)
        assert str(tmp_path / f"worker-{error.worker}.log") in str(error)
        with pytest.raises(ClosedError, match=r"closed after WorkerError: .*spoilt on purpose"):
            next(it)


def in_a_worker(home: int, obs: Any, act: Any, rew: Any, fin: Any, hx: Any) -> Any:
    if os.getpid() != home:
        raise ValueError("spoilt on purpose")
    return RandomActor(3)(obs, act, rew, fin, hx=hx)


def of_a_kind(kind: type[BaseException]) -> Callable[[], StampEnv]:
    def make() -> StampEnv:
        raise kind("spoilt on purpose")

    return make


def test_an_actor_that_fails_in_the_worker_alone(tmp_path: Path) -> None:
    with rolling(stamps(), actor=LambdaActor(functools.partial(in_a_worker, os.getpid())), log_dir=tmp_path) as it:
        with pytest.raises(WorkerError, match="spoilt on purpose") as caught:
            next(it)
        assert caught.value.env_index == -1
        assert "ValueError: spoilt on purpose" in caught.value.remote_traceback


@pytest.mark.parametrize("kind", [KeyboardInterrupt, pytest.param(GeneratorExit, marks=pytest.mark.long)])
def test_exceptions_that_are_none_of_the_usual(kind: type[BaseException], tmp_path: Path) -> None:
    with rolling(of_a_kind(kind), log_dir=tmp_path) as it, pytest.raises(WorkerError) as caught:
        next(it)
    assert kind.__name__ in caught.value.remote_traceback


@pytest.mark.parametrize("status", [pytest.param(0, marks=pytest.mark.long), 3])
def test_an_environment_that_exits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int) -> None:
    """sys.exit in an environment is a failure like others, also with the status that a worker keeps for itself."""
    impatient(monkeypatch)

    def make() -> StampEnv:
        sys.exit(status)

    with rolling(make, log_dir=tmp_path) as it, pytest.raises(WorkerError, match=f"exit.*{status}"):
        next(it)


@pytest.mark.parametrize("trouble", ["raise", pytest.param("exit", marks=pytest.mark.long), "abort"])
def test_later_failures_are_replaced_until_the_budget_is_spent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trouble: str
) -> None:
    impatient(monkeypatch, restarts=2)
    ledger = Ledger()
    with rolling(stamps(tmp_path), log_dir=tmp_path) as it:
        pid = 0
        for n in (1, 2):
            drive(it, ledger, lambda: len(ledger.from_stamps) == 2)
            kid = kid_of(it, 1, not_pid=pid)
            pid = pid_of(kid)
            tell(tmp_path, trouble, pid, "3")
            known = set(ledger.from_stamps[1])
            drive(it, ledger, lambda known=known: ledger.from_stamps[1] - known)  # type: ignore[misc]
            stats = audit(it)
            assert stats["replaced"] == n
            assert sum(stats["losses"].values()) == n
        tell(tmp_path, trouble, pid_of(kid_of(it, 1, not_pid=pid)), "3")
        with pytest.raises(WorkerError, match="failed again after 2 restarts in 300 s, and is not replaced") as caught:
            drive(it, ledger, lambda: False)
        assert caught.value.worker == 1
        if trouble == "raise":
            assert caught.value.env_index in range(B)
            assert "ValueError: told to fail" in caught.value.remote_traceback


def test_an_environment_that_fails_is_made_anew_before_its_worker_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At the cost of the fragment in hand: the worker goes on, and so do its other environments, with new episodes."""
    impatient(monkeypatch, rebuilds=2, restarts=0)
    with rolling(stamps(tmp_path), n=1, k=2, p=1, log_dir=tmp_path) as it:
        first = next(it).state.obs[0].clone()
        pid = pid_of(kid_of(it, 0))
        for n in (1, 2):
            tell(tmp_path, "once", pid, str(int(first[0, 0])))
            batch = next(batch for batch in it if (batch.state.obs[0, :, 0] != first[:, 0]).any())
            s = batch.state
            assert (s.obs[0, :, 0] != first[:, 0]).tolist() == [True, False]
            assert s.obs[0, 0, 1] == 0
            assert torch.equal(s.obs[1:, :, 1], s.obs[:-1, :, 1] + 1)  # nothing is missing within the fragment
            assert s.fin[0].all()
            assert s.term[0].all()
            assert not s.rew[0].any()
            assert batch.mask.all()
            assert not [e for e in batch.episodes if e.length > 7]
            stats = audit(it)
            assert (stats["rebuilt"], stats["replaced"], stats["losses"]) == (n, 0, {})
            first = s.obs[0].clone()
        assert pid_of(kid_of(it, 0)) == pid
        assert (
            sum("environment 0 is made anew" in r.message and "told to fail" in r.message for r in caplog.records) == 2
        )
        tell(tmp_path, "raise", pid)
        with pytest.raises(WorkerError, match="told to fail") as caught:  # the third within 300 s
            for _ in it:
                pass
        assert (caught.value.worker, caught.value.env_index, caught.value.at_start) == (0, 0, False)
        assert "told to fail" in (tmp_path / "worker-0.log").read_text()


class FailsToBeMadeAnew(StampEnv):
    made = 0

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        FailsToBeMadeAnew.made += 1
        if FailsToBeMadeAnew.made == B + 2:  # after the one that is probed and those of the columns
            raise RuntimeError("no more of these")


def test_a_new_environment_that_cannot_be_made_counts_as_another_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    impatient(monkeypatch, rebuilds=2, restarts=0)
    with rolling(functools.partial(FailsToBeMadeAnew, str(tmp_path)), n=1, k=2, p=1, log_dir=tmp_path) as it:
        next(it)
        tell(tmp_path, "once", pid_of(kid_of(it, 0)))
        batch = next(batch for batch in it if audit(it)["rebuilt"])
        assert audit(it)["rebuilt"] == 2
        assert batch.mask.all()
        assert "no more of these" in caplog.text


def test_an_environment_that_crashes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """In C, by a signal: the worker's log says where, and all else which signal it was."""
    impatient(monkeypatch, restarts=1)
    ledger = Ledger()
    with rolling(stamps(tmp_path), log_dir=tmp_path) as it:
        drive(it, ledger, lambda: len(ledger.from_stamps) == 2)
        pid = pid_of(kid_of(it, 1))
        tell(tmp_path, "crash", pid)
        known = set(ledger.from_stamps[1])
        drive(it, ledger, lambda: ledger.from_stamps[1] - known)
        assert audit(it)["losses"] in ({"signal": 1}, {"unreachable": 1})  # who was told first
        assert "worker 1 ended (signal SIGSEGV); another starts" in caplog.text
        tell(tmp_path, "crash", pid_of(kid_of(it, 1, not_pid=pid)))
        with pytest.raises(WorkerError, match="and is not replaced: signal SIGSEGV; its log: "):
            drive(it, ledger, lambda: False)
    log = (tmp_path / "worker-1.log").read_text()
    assert log.count("Fatal Python error: Segmentation fault") == 2
    assert "in _crash" in log


class NotANumber(StampEnv):
    """From its step 20 on its rewards or its observations are none."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.what = what

    def observe(self) -> Any:
        return np.full(2, np.nan if self.what == "observation" and self.counter >= 20 else 1.0, np.float32)

    def step(self, action: Any) -> Any:
        obs, rew, *rest = super().step(action)
        return obs, np.nan if self.what == "reward" and self.counter >= 20 else rew, *rest


@pytest.mark.parametrize(
    ("what", "debug"), [("reward", False), pytest.param("observation", True, marks=pytest.mark.long)]
)
def test_what_is_no_number_is_an_error_of_its_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str, debug: bool
) -> None:
    impatient(monkeypatch, restarts=0)
    with rolling(functools.partial(NotANumber, what), log_dir=tmp_path, debug=debug) as it:
        finite = (batch.state.obs.isfinite().all() and batch.state.rew.isfinite().all() for batch in it)
        with pytest.raises(WorkerError, match=rf"{what} .*is not finite.*found (nan|NaN)") as caught:
            assert all(finite)  # whatever is delivered
        assert caught.value.env_index in range(B)


@pytest.mark.long
def test_an_observation_that_is_no_number_is_let_through() -> None:
    """Looking at every pixel costs: it is for debug=True."""
    with rolling(functools.partial(NotANumber, "observation")) as it:
        found = [next(it).state.obs.isnan().any() for _ in range(20)]
        assert any(found)
        assert not found[0]
        assert audit(it)["losses"] == {}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_buffers": 1}, "n_buffers"),
        ({"n_per_batch": 5}, "n_per_batch"),
        ({"n_per_batch": 3, "max_lag": 0}, "n_per_batch"),
        ({"n_actors": 0}, "n_actors"),
        ({"n_steps": 0}, "n_steps"),
        ({"n_per_actor": True}, "n_per_actor"),
        ({"max_lag": -1}, "max_lag"),
        ({"start_method": "forkserver"}, "start_method"),
        ({"worker_mode": "test"}, "worker_mode"),
        ({"stall_timeout": 0}, "stall_timeout"),
        ({"start_timeout": float("nan")}, "start_timeout"),
        ({"entropy": 1 << 128}, "entropy"),
        ({"info_keys": "lives"}, "info_keys"),
        ({"device": "cuda:99"}, "device"),
        ({"factory": 3}, "factory"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], named: str) -> None:
    good = {"factory": StampEnv, "n_steps": T, "n_actors": 2, "n_per_actor": B, "n_buffers": 4, "n_per_batch": 2}
    with pytest.raises(ValueError, match=f"^{named}: ") as caught:
        multi.rollout(actor=RandomActor(3), **{**good, **changes})
    assert isinstance(caught.value, ConfigError)


def test_a_loop_that_cannot_be_made_is_an_error_and_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_loop() -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("zrl.nodes.collator.uvloop.new_event_loop", no_loop)
    with pytest.raises(OSError, match="Too many open files"), rolling(stamps()):
        pass


def test_an_actor_that_cannot_travel() -> None:
    actor = RandomActor(3)
    vars(actor)["lock"] = threading.Lock()
    with pytest.raises(ActorError, match="locks, files"):
        multi.rollout(StampEnv, actor, T, 2, B, 4, 2)


@pytest.mark.parametrize("kind", ["ipc", pytest.param("tcp", marks=pytest.mark.long)])
def test_an_address_in_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    tmp_path.chmod(0o700)
    url = f"ipc://{tmp_path}/l.sock" if kind == "ipc" else f"tcp://127.0.0.1:{free_port()}"
    monkeypatch.setattr("zrl.rollout.local.Plan", functools.partial(Plan, bind=(url,)))
    with rolling(stamps()) as it:
        assert url in it.urls
        with pytest.raises(ConfigError, match="address in use: another learner may be running there"):
            multi.rollout(StampEnv, RandomActor(3), T, 2, B, 4, 2)
        Ledger().check(next(it))  # the first one is as it was
    with rolling(stamps()) as it:  # and its address is free after it
        next(it)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
