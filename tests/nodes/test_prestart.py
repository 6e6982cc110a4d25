"""A zygote that is begun before anybody knows what it is for."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import zrl
from tests.nodes.test_zygote import PATIENCE, ROOT, alive, ended, new, until, written
from zrl.nodes import prestart
from zrl.nodes.children import Lost, Spawner, Zygote
from zrl.nodes.prestart import Launched

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    zrl.end_prestarted()


def begun() -> Launched:
    zrl.prestart()
    assert prestart._launched is not None
    return prestart._launched


def pid_of(launched: Launched) -> int:
    assert launched._process is not None
    return launched._process.pid


def test_the_first_zygote_takes_it_over_and_the_second_is_a_fresh_one(tmp_path: Path) -> None:
    pid = pid_of(begun())
    with new(Zygote, tmp_path / "a") as first, new(Zygote, tmp_path / "b") as second:
        assert first.process.pid == pid
        assert second.process.pid != pid
        for zygote in (first, second):
            assert ended(zygote, zygote.fork("worker-0", ("end", 7))).code == 7
            assert zygote.ready is not None
            assert zygote.ready.n_threads == 1
    assert not alive(pid)
    assert not (tmp_path / "a" / "run").exists()


def test_its_children_find_what_those_of_a_fresh_one_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Variables, folder and path of the later of the two times; and what it prints is in the log, not here."""
    monkeypatch.setenv("ZRL_TEST_GONE", "1")
    begun()
    monkeypatch.delenv("ZRL_TEST_GONE")
    monkeypatch.setenv("ZRL_TEST_NEW", "2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "found_late.py").write_text(
        "import os, sys\n"
        "def look(payload, path):\n"
        "    from tests.nodes import targets\n"
        "    print('a word in the log', flush=True)\n"
        "    names = [name for name in os.environ if name.startswith('ZRL_TEST')]\n"
        "    threads = os.environ['OMP_NUM_THREADS'], os.environ.get('PYTHONPATH') == payload\n"
        "    targets.write(None, path, (names, os.getcwd(), threads))\n"
    )
    with new(Zygote, tmp_path / "a", "found_late:look", os.environ.get("PYTHONPATH")) as zygote:
        child = zygote.fork("worker-0", (str(tmp_path / "out"),))
        assert written(zygote, tmp_path / "out") == (["ZRL_TEST_NEW"], str(tmp_path), ("1", True))
        assert ended(zygote, child).code == 0
        assert "a word" in child.log.read_text()
        assert zygote.log.exists()
    assert capfd.readouterr() == ("", "")


def test_what_it_printed_before_is_in_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "talks.py").write_text("print('before there was a log')")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setattr(prestart, "PRELOAD", ("talks",))
    begun()
    with new(Zygote, tmp_path / "a") as zygote:
        assert ended(zygote, zygote.fork("worker-0", ("end", 0))).code == 0
        assert zygote.log.read_text() == "before there was a log\n"


def test_a_second_call_does_nothing_and_an_unused_one_can_be_ended() -> None:
    first = begun()
    assert begun() is first
    pid = pid_of(first)
    assert alive(pid)
    zrl.end_prestarted()
    assert not alive(pid)
    zrl.end_prestarted()
    assert pid_of(begun()) != pid


def test_spawn_leaves_it_alone(tmp_path: Path) -> None:
    pid = pid_of(begun())
    with new(Spawner, tmp_path / "a") as zygote:
        assert zygote.process.pid != pid
    assert prestart._launched is not None


@pytest.mark.parametrize("seen", [True, False], ids=["seen", "unseen"])
def test_one_that_has_died_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: bool) -> None:
    """Also where it ends after we have looked: the pair is closed then, and the process may still be there."""
    process = begun()._process
    assert process is not None
    process.kill()
    process.wait(PATIENCE)
    if not seen:
        monkeypatch.setattr(Launched, "alive", property(lambda self: self._process is not None))
    with new(Zygote, tmp_path / "a") as zygote:
        assert zygote.process.pid != process.pid
        assert ended(zygote, zygote.fork("worker-0", ("end", 0))).code == 0


def test_an_import_that_fails_is_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "broken.py").write_text("raise RuntimeError('no such thing')")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setattr(prestart, "PRELOAD", ("broken",))
    begun()
    with new(Zygote, tmp_path / "a", preload=["broken"]) as zygote:
        event = zygote.wait_event(PATIENCE)
        assert isinstance(event, Lost)
        assert "no such thing" in event.why


def test_a_log_that_cannot_be_written_is_an_error_at_once(tmp_path: Path) -> None:
    begun()
    (tmp_path / "a" / "log" / "zygote.log").mkdir(parents=True)
    with pytest.raises(zrl.ProcessError, match="directory"):
        new(Zygote, tmp_path / "a")


def test_a_folder_that_is_gone_and_cores_are_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun()
    cores = os.sched_getaffinity(0)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    try:
        os.sched_setaffinity(0, {max(cores)})
        zygote = new(Zygote, tmp_path / "a", "tests.nodes.test_prestart:look")
    finally:
        os.sched_setaffinity(0, cores)
    with zygote:
        zygote.fork("worker-0", (str(tmp_path / "out"),))
        assert written(zygote, tmp_path / "out") == [{max(cores)}, f"{gone} (deleted)"]


def look(_: object, path: str) -> None:
    from tests.nodes import targets

    targets.write(None, path, [os.sched_getaffinity(0), os.readlink("/proc/self/cwd")])


def test_children_of_multiprocessing_begin_none() -> None:
    """They import the main module again, which calls it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(begin_and_look) is False
        pool.close()
        pool.join()


def begin_and_look() -> bool:
    zrl.prestart()
    return prestart._launched is not None


def test_what_cannot_be_pickled_leaves_it_for_the_next(tmp_path: Path) -> None:
    pid = pid_of(begun())
    with pytest.raises(zrl.ConfigError, match="cannot be sent"):
        new(Zygote, tmp_path / "a", payload=sys._getframe())
    with new(Zygote, tmp_path / "b") as zygote:
        assert zygote.process.pid == pid


def test_a_fork_of_ours_neither_uses_nor_ends_it(tmp_path: Path) -> None:
    pid = pid_of(begun())
    if (child := os.fork()) == 0:
        held = prestart._launched
        for fd in range(3, 200):  # as daemons do it
            with contextlib.suppress(OSError):
                os.close(fd)
        ours = prestart.take_prestarted()
        zrl.end_prestarted()
        os._exit(ours is not None or held is None)
    assert os.waitpid(child, 0)[1] == 0
    assert alive(pid)
    with new(Zygote, tmp_path / "a") as zygote:
        assert zygote.process.pid == pid
        assert ended(zygote, zygote.fork("worker-0", ("end", 0))).code == 0


@pytest.mark.parametrize("how", ["end", "kill", "fork"])
def test_it_ends_with_its_host(tmp_path: Path, how: str) -> None:
    """Also where a fork of the host holds the pair open."""
    program = (
        "import os, signal, sys, time, zrl; from zrl.nodes import prestart; from tests.nodes import targets\n"
        "zrl.prestart()\n"
        "assert 'torch' not in sys.modules\n"
        "fork = os.fork() if sys.argv[2] == 'fork' else -1\n"
        "if fork == 0: time.sleep(60)\n"
        "targets.write(None, sys.argv[1], [prestart._launched._process.pid, fork])\n"
        "if sys.argv[2] != 'end': signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "pid"), how], cwd=ROOT) as host:
        pid, fork = written(None, tmp_path / "pid")
        try:
            if how == "end":
                assert host.wait(PATIENCE) == 0
            else:
                host.kill()
            until(lambda: not alive(pid))
        finally:
            if fork > 0:
                os.kill(fork, signal.SIGKILL)
