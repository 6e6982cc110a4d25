"""Workers' processes, real ones: how they start, how they end, and that nothing of them outlives their host."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from zrl.errors import ConfigError, ProcessError
from zrl.nodes.children import MOST_ASKED, Child, Event, Lost, Spawner, Zygote
from zrl.nodes.logs import Logs
from zrl.nodes.pipe import CONNECTION_ENDED, MAX_TRACEBACK, Ended, Started, Warned

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

ROOT = Path(__file__).parents[2]
PATIENCE = 40.0  # seconds for what takes none, or the imports of a fresh interpreter, on a busy machine
PAYLOAD = {"a": 1}


def call(payload: dict[str, Any], function: str, *args: Any) -> None:
    """The target of most tests: one zygote serves them all."""
    from tests.nodes import targets

    getattr(targets, function)(payload, *args)


TARGET = f"{__name__}:call" if __name__.startswith("tests.") else "tests.nodes.test_zygote:call"


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    yield from started(Zygote, tmp_path_factory.mktemp("fork"))


@pytest.fixture(scope="module")
def spawner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    yield from started(Spawner, tmp_path_factory.mktemp("spawn"))


@pytest.fixture(scope="module", params=["zygote", "spawner"])
def either(request: pytest.FixtureRequest) -> Zygote:
    made: Zygote = request.getfixturevalue(request.param)
    return made


def started(kind: type[Zygote], folder: Path) -> Iterator[Zygote]:
    with new(kind, folder) as zygote:
        yield zygote
    assert not alive(zygote.process.pid)
    assert not (folder / "run").exists()


def new(kind: type[Zygote], folder: Path, target: Any = TARGET, payload: object = PAYLOAD, **more: Any) -> Zygote:
    (folder / "run").mkdir(parents=True)
    return kind.start(target, payload, run_dir=folder / "run", log_dir=folder / "log", **more)


def until(condition: Callable[[], object], zygote: Zygote | None = None, patience: float = PATIENCE) -> Any:
    """Wait for it, and take the zygote's events meanwhile; fails after `patience` seconds."""
    deadline = time.monotonic() + patience
    while not (result := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        if zygote is None or zygote._over:
            time.sleep(0.005)  # there is nothing to wait on: another's file or process
        else:
            zygote.wait_event(0.005)
    return result


def ended(zygote: Zygote, child: Child, patience: float = PATIENCE) -> Ended:
    result = until(lambda: child.ended, zygote, patience)
    assert isinstance(result, Ended)
    return result


def pid_of(child: Child) -> int:
    assert child.pid is not None  # 0 would be ourselves
    return child.pid


def written(zygote: Zygote | None, path: Path) -> Any:
    """What a target wrote with `targets.write`, as soon as it is there: its third item if it has one."""
    until(lambda: path.exists() and not (zygote and any(c.pid is None for c in zygote.children.values())), zygote)
    items = ast.literal_eval(path.read_text())
    return items[1] if len(items) > 1 else items


def alive(pid: int) -> bool:
    """Whether a process runs: a zombie whose parent is slow to look does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] not in "ZX"
    except OSError:
        return False


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0]


# ── how a child ends ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_start_and_end_are_reported_in_order(zygote: Zygote) -> None:
    child = zygote.fork("worker-0", ("end", 0))
    first, second = zygote.wait_event(PATIENCE), zygote.wait_event(PATIENCE)
    assert first == Started(child.serial, pid_of(child), "worker-0")
    assert second == Ended(child.serial, child.pid, "worker-0", 0, None, "")
    assert child.ended == second
    assert zygote.children == {}
    assert zygote.events() == []


def test_payload_and_arguments_arrive(either: Zygote, tmp_path: Path) -> None:
    child = either.fork("worker-0", ("write", str(tmp_path / "out"), [1, 2], None))
    assert ended(either, child).code == 0
    assert ast.literal_eval((tmp_path / "out").read_text()) == (PAYLOAD, [1, 2], None)


@pytest.mark.parametrize("code", [0, 1, CONNECTION_ENDED, 77])
@pytest.mark.parametrize("how", ["end", "end_at_once"])
def test_exit_status(zygote: Zygote, how: str, code: int) -> None:
    result = ended(zygote, zygote.fork("worker-0", (how, code)))
    assert (result.code, result.signal, result.traceback) == (code, None, "")


def test_exit_with_a_message(zygote: Zygote) -> None:
    result = ended(zygote, zygote.fork("worker-0", ("end_with_message",)))
    assert result.code == 1
    assert result.traceback.endswith("no such thing")


def test_an_exception_comes_with_traceback_and_name(either: Zygote) -> None:
    child = either.fork("worker-7", ("fail", "the reason"))
    result = ended(either, child)
    assert (result.code, result.signal) == (1, None)
    assert result.traceback.startswith(f"worker-7 (pid {child.pid}):\nTraceback")
    assert result.traceback.endswith("ValueError: the reason\n")
    assert "targets.py" in result.traceback
    assert "ValueError: the reason" in child.log.read_text()


def test_warnings_come_while_it_goes_on_and_stand_in_the_log(either: Zygote) -> None:
    child = either.fork("worker-0", ("warn_and_fail",))
    _, one, other, end = (either.wait_event(PATIENCE) for _ in range(4))
    assert one == Warned(child.serial, "UserWarning: mind this: é")
    assert isinstance(other, Warned)
    assert other.text.startswith("UserWarning: xxx")
    assert 2000 < len(other.text) < 2100
    assert isinstance(end, Ended)
    assert end.traceback.startswith(f"worker-0 (pid {child.pid}):\nTraceback")
    assert "UserWarning: mind\nthis: é" in child.log.read_text()


def test_the_cause_travels_too(zygote: Zygote) -> None:
    text = ended(zygote, zygote.fork("worker-0", ("fail_with_cause",))).traceback
    assert text.index("KeyError") < text.index("direct cause") < text.index("RuntimeError: consequence")


def test_a_long_traceback_keeps_its_end(zygote: Zygote) -> None:
    text = ended(zygote, zygote.fork("worker-0", ("fail", "é" * MAX_TRACEBACK + "end"))).traceback
    assert text.startswith("worker-0 (pid ")
    assert text.endswith("end\n")
    assert (
        MAX_TRACEBACK // 2 < len(text.encode()) <= MAX_TRACEBACK + 2
    )  # a character cut in two is replaced by a longer


def test_many_tracebacks_at_once_all_arrive(zygote: Zygote) -> None:
    """More than the pair holds, to a host that does not read meanwhile."""
    children = [zygote.fork(f"worker-{i}", ("fail", "x" * MAX_TRACEBACK + str(i))) for i in range(12)]
    for i, child in enumerate(children):
        assert ended(zygote, child).traceback.endswith(f"x{i}\n")


def test_kill_9_is_reported_at_once(either: Zygote, tmp_path: Path) -> None:
    child = either.fork("worker-0", ("hang", str(tmp_path / "up")))
    written(either, tmp_path / "up")
    begin = time.monotonic()
    os.kill(pid_of(child), signal.SIGKILL)
    result = ended(either, child)
    assert time.monotonic() - begin < 1
    assert (result.code, result.signal) == (None, signal.SIGKILL)


def test_a_crash_is_reported_with_its_signal_and_logged(zygote: Zygote) -> None:
    child = zygote.fork("crash-0", ("crash",))
    assert ended(zygote, child).signal == signal.SIGSEGV
    assert "Segmentation fault" in child.log.read_text()


@pytest.mark.parametrize("target", ["no_such_module:f", "tests.nodes.targets:no_such_function"])
def test_a_target_that_is_not_there(tmp_path: Path, target: str) -> None:
    with new(Zygote, tmp_path, target) as zygote:
        result = ended(zygote, zygote.fork("worker-0"))
    assert result.code == 1
    assert "no_such" in result.traceback


def test_a_log_that_cannot_be_opened(tmp_path: Path) -> None:
    with new(Zygote, tmp_path) as zygote:
        (tmp_path / "log" / "worker-0.log").mkdir()
        result = ended(zygote, zygote.fork("worker-0", ("end", 0)))
    assert result.code == 1
    assert "IsADirectoryError" in result.traceback


# ── what the host may do to a child ──────────────────────────────────────────────────────────────────────────────────


def test_kill_and_terminate(zygote: Zygote, tmp_path: Path) -> None:
    for send, signum in ((zygote.kill, signal.SIGKILL), (zygote.terminate, signal.SIGTERM)):
        child = zygote.fork("worker-0", ("hang",))
        send(child)  # right behind the request: whether it has settled or not
        assert ended(zygote, child).signal == signum
        send(child)  # nobody there: nothing happens


def test_many_are_asked_for_while_nobody_reads(tmp_path: Path) -> None:
    """More than the pair holds; a zygote that imports does not read either."""
    with new(Spawner, tmp_path) as zygote:
        os.kill(zygote.process.pid, signal.SIGSTOP)
        begin = time.monotonic()
        children = [zygote.fork(f"worker-{i}", ("hang",)) for i in range(500)]
        for child in children[MOST_ASKED + 2 :]:
            zygote.dump(child)
            zygote.kill(child)
        assert time.monotonic() - begin < 5
        never = [child.ended for child in children[MOST_ASKED + 2 :]]
        assert zygote.events() == never
        assert {(end.pid, end.signal) for end in never if end} == {(None, signal.SIGKILL)}
        asked, waiting = children[:MOST_ASKED], children[MOST_ASKED : MOST_ASKED + 2]
        for child in asked:
            zygote.kill(child)
        os.kill(zygote.process.pid, signal.SIGCONT)
        assert {ended(zygote, child).signal for child in asked} == {signal.SIGKILL}
        for child in waiting:  # there is room for them now
            until(lambda child=child: child.pid, zygote)  # type: ignore[misc]
            zygote.kill(child)
            ended(zygote, child)


def test_a_stopped_child_can_be_killed(zygote: Zygote, tmp_path: Path) -> None:
    child = zygote.fork("worker-0", ("hang", str(tmp_path / "up")))
    written(zygote, tmp_path / "up")
    os.kill(pid_of(child), signal.SIGSTOP)
    until(lambda: state(pid_of(child)) == "T")
    assert zygote.events() == []  # stopped is not ended
    zygote.kill(child)
    assert ended(zygote, child).signal == signal.SIGKILL


def test_a_stopped_child_goes_on(zygote: Zygote, tmp_path: Path) -> None:
    child = zygote.fork("worker-0", ("hang", str(tmp_path / "up")))
    written(zygote, tmp_path / "up")
    os.kill(pid_of(child), signal.SIGSTOP)
    until(lambda: state(pid_of(child)) == "T")
    os.kill(pid_of(child), signal.SIGCONT)
    zygote.terminate(child)
    assert ended(zygote, child).signal == signal.SIGTERM


def test_stacks_are_dumped_into_the_log(either: Zygote, tmp_path: Path) -> None:
    child = either.fork("dumped-0", ("deep_wait", str(tmp_path / "up")))
    written(either, tmp_path / "up")
    for n in (1, 2):
        either.dump(child)
        until(lambda n=n: child.log.read_text().count("in where_it_hangs") == n)  # type: ignore[misc]
    assert child.ended is None
    either.kill(child)
    ended(either, child)


def test_a_dump_asked_for_too_early_does_not_kill(either: Zygote) -> None:
    child = either.fork("dumped-1", ("hang",))
    either.dump(child)
    until(lambda: child.log.exists() and "most recent call first" in child.log.read_text(), either)
    either.kill(child)
    ended(either, child)


# ── what a child is ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_child_has_nothing_of_anybody_elses(either: Zygote, tmp_path: Path) -> None:
    children = [either.fork(f"self-{i}", ("describe_self", str(tmp_path / f"self-{i}"))) for i in range(2)]
    found = [written(either, tmp_path / f"self-{i}") for i in range(2)]
    for child, facts in zip(children, found, strict=True):
        assert facts["sigint"]
        assert facts["sigterm"]
        assert facts["blocked"] == []
        assert facts["threads"] == facts["torch_threads"] == 1
        assert facts["leads_group"]
        assert facts["main"] == []
        assert facts["pythonpath"] == os.environ.get("PYTHONPATH")
        assert facts["argv"] == sys.argv
        fds = dict(facts["fds"])
        assert fds.pop(0) == "/dev/null"
        assert fds.pop(1) == fds.pop(2) == str(child.log)
        assert len(fds) == 2  # the pipe for the traceback, and the one that tells that the zygote is gone
        assert all(target.startswith("pipe:") for target in fds.values())
    errors = [set(dict(facts["fds"]).values()) for facts in found]
    assert len(errors[0] & errors[1]) == 2  # /dev/null, and the zygote's life, of which nobody writes
    for child in children:
        either.kill(child)
        ended(either, child)


def test_the_zygote_has_one_thread(zygote: Zygote, tmp_path: Path) -> None:
    child = zygote.fork("worker-0", ("end", 0))
    ended(zygote, child)
    assert os.listdir(f"/proc/{zygote.process.pid}/task") == [str(zygote.process.pid)]
    assert zygote.ready is not None
    assert zygote.ready.n_threads == 1
    assert zygote.ready.pid == zygote.process.pid


def test_the_zygote_sees_a_preload_that_starts_threads(tmp_path: Path) -> None:
    (tmp_path / "starts_a_thread.py").write_text(
        "import threading, signal\nthreading.Thread(target=signal.pause, daemon=True).start()\n"
    )
    sys.path.append(str(tmp_path))
    try:
        with new(Zygote, tmp_path, preload=["starts_a_thread"]) as zygote:
            until(lambda: zygote.ready, zygote)
    finally:
        sys.path.remove(str(tmp_path))
    assert zygote.ready is not None
    assert zygote.ready.n_threads == 2
    assert "a fork may hang" in zygote.log.read_text()


def test_sigint_to_the_group_ends_nobody(either: Zygote, tmp_path: Path) -> None:
    child = either.fork("worker-0", ("hang", str(tmp_path / "up")))
    written(either, tmp_path / "up")
    os.killpg(pid_of(child), signal.SIGINT)
    os.killpg(either.process.pid, signal.SIGINT)
    other = either.fork("worker-1", ("end", 0))
    assert ended(either, other).code == 0
    assert child.ended is None
    assert os.getpgid(pid_of(child)) != os.getpgid(0) != os.getpgid(either.process.pid)
    either.kill(child)
    ended(either, child)


def test_grandchildren_end_with_a_killed_child(zygote: Zygote, tmp_path: Path) -> None:
    child = zygote.fork("worker-0", ("have_children", str(tmp_path / "pids")))
    pids = written(zygote, tmp_path / "pids")
    os.kill(pid_of(child), signal.SIGKILL)
    assert ended(zygote, child).signal == signal.SIGKILL
    until(lambda: not any(map(alive, pids)))


def test_grandchildren_without_ears_end_too(zygote: Zygote, tmp_path: Path) -> None:
    def target(payload: object, path: str) -> None:
        from tests.nodes import targets

        targets.have_children(payload, path, ignore=True)

    with new(Zygote, tmp_path, target) as own:
        child = own.fork("worker-0", (str(tmp_path / "pids"),))
        pids = written(own, tmp_path / "pids")
        own.kill(child)
        ended(own, child)
    until(lambda: not any(map(alive, pids)))


def test_a_grandchild_does_not_hold_up_the_traceback(zygote: Zygote, tmp_path: Path) -> None:
    """It has the writing end of the pipe too, so there is no end of file."""
    child = zygote.fork("worker-0", ("have_children_and_fail", str(tmp_path / "pids")))
    result = ended(zygote, child, patience=5)
    assert result.traceback.endswith("ValueError: with a grandchild left\n")
    pids = written(zygote, tmp_path / "pids")
    until(lambda: not any(map(alive, pids)))


def test_a_child_may_have_an_async_vector_env(zygote: Zygote, tmp_path: Path) -> None:
    child = zygote.fork("vector-0", ("vector_env", str(tmp_path / "shape")))
    assert ended(zygote, child).traceback == ""
    assert written(zygote, tmp_path / "shape") == (2, 4)


def test_a_second_child_of_a_name_goes_on_with_the_log(zygote: Zygote) -> None:
    for text in ("first", "second"):
        child = zygote.fork("twice-0", ("fail", text))
        ended(zygote, child)
    log = child.log.read_text()
    assert log.index("ValueError: first") < log.index("ValueError: second")


# ── what cannot work is refused ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a\nb", "x" * 101])
def test_a_name_that_is_no_file_name(zygote: Zygote, name: str) -> None:
    with pytest.raises(ConfigError, match="name: expected letters"):
        zygote.fork(name)


def test_what_cannot_be_pickled(zygote: Zygote, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"arguments of worker-0 cannot be sent to a worker: .*lock"):
        zygote.fork("worker-0", (threading.Lock(),))
    with pytest.raises(ConfigError, match="the environment factory or the actor cannot be sent"):
        new(Zygote, tmp_path, payload=threading.Lock())


def test_a_preload_that_fails_names_the_reason(tmp_path: Path) -> None:
    with new(Zygote, tmp_path, preload=["no_such_module"]) as zygote:
        child = zygote.fork("worker-0", ("end", 0))
        events = [zygote.wait_event(PATIENCE), zygote.wait_event(PATIENCE)]
        assert isinstance(events[0], Ended)
        assert events[0] == child.ended
        assert isinstance(events[1], Lost)
        assert "status 1" in events[1].why
        assert "No module named 'no_such_module'" in events[1].why
        assert zygote.wait_event(0) is None
        with pytest.raises(ProcessError, match="worker-1 cannot be started"):
            zygote.fork("worker-1")


# ── factories from anywhere ──────────────────────────────────────────────────────────────────────────────────────────

SCRIPT = """
import sys, threading
from pathlib import Path
from zrl.nodes.children import {kind} as Kind

print("imported", flush=True)
import torch
import beside

class Mine(torch.nn.Linear):
    def answer(self):
        return float(self.weight.sum()), type(self).__name__

actor = Mine(1, 1, bias=False)
torch.nn.init.constant_(actor.weight, 3.0)
folder = Path(sys.argv[1])
(folder / "run").mkdir()
factory = lambda: (beside.NUMBER, *actor.answer())
zygote = Kind.start("tests.nodes.targets:write_result", factory, run_dir=folder / "run", log_dir=folder / "log")
child = zygote.fork("worker-0", (str(folder / "out"),))
while child.ended is None:
    assert zygote.wait_event(60)
print(child.ended.code, child.ended.traceback, flush=True)
zygote.close()
"""


@pytest.mark.parametrize("kind", ["Zygote", "Spawner"])
def test_an_unguarded_script_with_a_lambda(tmp_path: Path, kind: str) -> None:
    (tmp_path / "beside.py").write_text("NUMBER = 42\n")
    (tmp_path / "script.py").write_text(SCRIPT.format(kind=kind))
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path)], capture_output=True, text=True, timeout=50
    )
    assert done.stdout == "imported\n0 \n", done.stderr
    assert ast.literal_eval((tmp_path / "out").read_text()) == ((42, 3.0, "Mine"),)


def test_a_target_by_value(tmp_path: Path) -> None:
    with new(Zygote, tmp_path, lambda payload, code: sys.exit(payload + code), 40) as zygote:
        assert ended(zygote, zygote.fork("worker-0", (2,))).code == 42


# ── the end of the zygote ────────────────────────────────────────────────────────────────────────────────────────────


def test_close_reports_how_the_children_ended(tmp_path: Path) -> None:
    zygote = new(Zygote, tmp_path)
    child = zygote.fork("worker-0", ("hang", str(tmp_path / "up")))
    written(zygote, tmp_path / "up")
    begin = time.monotonic()
    zygote.close()
    assert time.monotonic() - begin < 1
    assert child.ended is not None
    assert child.ended.signal == signal.SIGHUP
    assert child.ended in zygote.events()
    assert zygote.events() == []
    zygote.close()
    with pytest.raises(ProcessError):
        zygote.fork("worker-1")
    zygote.kill(child)
    assert not (tmp_path / "run").exists()
    assert zygote.process.returncode == 0


def test_close_kills_those_who_ignore_sighup_or_are_stopped(tmp_path: Path) -> None:
    zygote = new(Zygote, tmp_path)
    deaf = zygote.fork("worker-0", ("hang_without_ears", str(tmp_path / "up-0")))
    stopped = zygote.fork("worker-1", ("hang", str(tmp_path / "up-1")))
    for i in range(2):
        written(zygote, tmp_path / f"up-{i}")
    os.kill(pid_of(stopped), signal.SIGSTOP)
    until(lambda: state(pid_of(stopped)) == "T")  # else SIGHUP may come first
    begin = time.monotonic()
    zygote.close(begin + 1.5)
    assert time.monotonic() - begin < 1.5
    for child in (deaf, stopped):
        assert child.ended is not None
        assert child.ended.signal == signal.SIGKILL
        assert not alive(pid_of(child))


def test_close_before_the_imports_are_done(tmp_path: Path) -> None:
    zygote = new(Zygote, tmp_path)
    child = zygote.fork("worker-0", ("hang",))
    begin = time.monotonic()
    zygote.close(begin + 0.3)
    assert time.monotonic() - begin < 1
    assert child.ended is not None
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("left", [1.0, -1.0])
def test_close_of_a_stopped_zygote(tmp_path: Path, left: float) -> None:
    zygote = new(Zygote, tmp_path)
    child = zygote.fork("worker-0", ("hang", str(tmp_path / "up")))
    written(zygote, tmp_path / "up")
    os.kill(zygote.process.pid, signal.SIGSTOP)
    begin = time.monotonic()
    zygote.close(begin + left)
    assert time.monotonic() - begin < 1.5
    until(lambda: not alive(pid_of(child)), patience=2)
    assert not alive(zygote.process.pid)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", [Zygote, Spawner])
def test_kill_9_of_the_zygote_is_a_loss(tmp_path: Path, kind: type[Zygote]) -> None:
    with new(kind, tmp_path) as zygote:
        child = zygote.fork("worker-0", ("hang_without_ears", str(tmp_path / "up")))
        written(zygote, tmp_path / "up")
        zygote.process.kill()
        end, lost = zygote.wait_event(PATIENCE), zygote.wait_event(PATIENCE)
        assert isinstance(end, Ended)
        assert (end.name, end.code, end.signal) == ("worker-0", None, None)
        assert isinstance(lost, Lost)
        assert "signal 9" in lost.why
        until(lambda: not alive(pid_of(child)), patience=2)
        with pytest.raises(ProcessError):
            zygote.fork("worker-1")


def test_the_log_that_a_loss_names_stays(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    logs = Logs(None)
    with Spawner.start(
        TARGET, None, run_dir=tmp_path / "run", log_dir=tmp_path / "run" / "logs", keep_log=logs.keep
    ) as zygote:
        zygote.process.kill()
        lost = zygote.wait_event(PATIENCE)
        assert isinstance(lost, Lost)
        with pytest.raises(ProcessError, match="its log") as caught:
            zygote.fork("worker-0")
    for text in (lost.why, str(caught.value)):
        (log,) = (word for word in text.replace(":\n", " ").split() if word.endswith("zygote.log"))
        assert Path(log).exists()


def test_sigterm_is_not_for_the_zygote_and_sigusr2_ends_it_with_its_children(tmp_path: Path) -> None:
    with new(Zygote, tmp_path) as zygote:
        child = zygote.fork("worker-0", ("hang", str(tmp_path / "up")))
        written(zygote, tmp_path / "up")
        zygote.process.terminate()
        assert ended(zygote, zygote.fork("worker-1", ("end", 0))).code == 0  # as if nothing had happened
        zygote.process.send_signal(signal.SIGUSR2)
        assert ended(zygote, child).signal == signal.SIGHUP
        assert isinstance(zygote.wait_event(PATIENCE), Lost)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("still", [0, 1], ids=["zygote-stopped", "child-stopped"])
@pytest.mark.parametrize("mode", ["fork", "spawn"])
def test_kill_9_of_the_host_leaves_nothing(tmp_path: Path, mode: str, still: int) -> None:
    """A zygote that stands still is sent SIGHUP and SIGCONT by the kernel: nobody of its session is its parent."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    words = [sys.executable, "-m", "tests.nodes.targets", str(run_dir), str(tmp_path / "log")]
    words += [mode, "3", str(tmp_path / "pids")]
    with subprocess.Popen(words, cwd=ROOT, start_new_session=True) as host:
        pids = written(None, tmp_path / "pids")
        os.kill(pids[still], signal.SIGSTOP)
        assert all(map(alive, pids))
        host.kill()
        until(lambda: not any(map(alive, pids)) and not run_dir.exists(), patience=2)


def test_kill_9_of_a_host_whose_zygote_still_imports(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    program = (
        "import sys, signal; from pathlib import Path\n"
        "from zrl.nodes.children import Zygote; from tests.nodes import targets\n"
        "z = Zygote.start('a:b', None, run_dir=Path(sys.argv[1]), log_dir=Path(sys.argv[2]))\n"
        "targets.write(None, sys.argv[3], z.process.pid); signal.pause()"
    )
    words = [str(run_dir), str(tmp_path / "log"), str(tmp_path / "pid")]
    with subprocess.Popen([sys.executable, "-c", program, *words], cwd=ROOT) as host:
        pid = written(None, tmp_path / "pid")
        host.kill()
        until(lambda: not alive(pid) and not run_dir.exists())


# ── asyncio ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_events_wake_an_asyncio_loop(zygote: Zygote) -> None:
    import asyncio

    async def main() -> list[Event]:
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        seen: list[Event] = []

        def news() -> None:
            seen.extend(zygote.events())
            if len(seen) == 4:
                done.set()

        loop.add_reader(zygote.fileno(), news)
        try:
            for i in range(2):
                zygote.fork(f"worker-{i}", ("end", i))
            await asyncio.wait_for(done.wait(), PATIENCE)
        finally:
            loop.remove_reader(zygote.fileno())
        return seen

    events = asyncio.run(main())
    assert sorted(event.code or 0 for event in events if isinstance(event, Ended)) == [0, 1]


def test_the_watch_for_systems_that_do_not_kill_orphans() -> None:
    program = (
        "import sys, signal; from zrl.nodes import child; child._watch(0); print('up', flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as orphan:
        assert orphan.stdin is not None
        assert orphan.stdout is not None
        assert orphan.stdout.readline() == b"up\n"
        orphan.stdin.close()
        assert orphan.wait(PATIENCE) == -signal.SIGKILL
