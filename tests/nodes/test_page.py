"""The page: what the child writes is what the host reads, and only the right child may write it."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path

import pytest

from zrl.errors import SharedMemoryError
from zrl.nodes.children import Zygote
from zrl.nodes.page import NBYTES, Page, Phase, Progress

ME = bytes(range(16))


def test_a_new_page_says_build_and_nothing_else() -> None:
    with Page.create(ME) as page:
        assert page.read() == Progress(0, Phase.BUILD, 0, 0, -1)


def test_the_host_reads_what_the_child_writes() -> None:
    with Page.create(ME) as host, Page.attach(host.address, ME) as child:
        child.enter(Phase.COLLECT)
        for _ in range(3):
            child.calls[0] += 1
        child.calls[0] += 7
        child.blame(3)
        child.set_sent(2**40)
        child.count_release()
        assert host.read() == Progress(10, Phase.COLLECT, 2**40, 1, 3)


@pytest.mark.parametrize("phase", Phase)
def test_every_phase_travels(phase: Phase) -> None:
    with Page.create(ME) as host, Page.attach(host.address, ME) as child:
        child.enter(phase)
        assert host.read().phase is phase


def test_words_stand_where_the_drawing_says() -> None:
    with Page.create(ME) as page:
        page.calls[0] += 1
        page.enter(Phase.WAIT)
        page.set_sent(3)
        page.count_release()
        raw = page.memory.data
        assert raw[:8].tobytes() == b"zrl.page"
        assert raw[16:32].tobytes() == ME
        assert raw[64:96].view("u8").tolist() == [1, 1, 3, 1]
        assert raw.nbytes == NBYTES


def test_a_page_of_another_incarnation_is_refused() -> None:
    with Page.create(ME) as page, pytest.raises(SharedMemoryError, match="incarnation: expected ff"):
        Page.attach(page.address, b"\xff" * 16)


def test_memory_that_is_no_page_is_refused() -> None:
    with Page.create(ME) as page:
        page.memory.data[:8] = 0
        with pytest.raises(SharedMemoryError, match="page: magic"):
            Page.attach(page.address, ME)
        with pytest.raises(SharedMemoryError, match="4095 bytes"):
            Page.attach(dataclasses.replace(page.address, nbytes=NBYTES - 1), ME)


def test_an_incarnation_is_16_bytes() -> None:
    with pytest.raises(SharedMemoryError, match="expected 16 bytes"):
        Page.create(b"short")


def test_a_phase_that_does_not_exist_is_an_error_of_the_tree() -> None:
    with Page.create(ME) as page:
        page.memory.data[72] = 99
        with pytest.raises(SharedMemoryError, match="found 99"):
            page.read()


def test_close_twice() -> None:
    page = Page.create(ME)
    page.close()
    page.close()


def test_a_stopped_child_can_be_read_and_outlived(tmp_path: Path) -> None:
    def count(_: object, page: Page | None = None, *address: object) -> None:
        from zrl.data.memory import MemoryAddress

        with Page.attach(MemoryAddress(*address), ME) as mine:  # type: ignore[arg-type]
            mine.enter(Phase.COLLECT)
            while True:
                mine.calls[0] += 1

    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with Page.create(ME) as page, Zygote.start(count, None, run_dir=run_dir, log_dir=tmp_path / "log") as zygote:
        child = zygote.fork("worker-0", (None, *dataclasses.astuple(page.address)))
        deadline = time.monotonic() + 30
        while page.read().calls < 1000 and time.monotonic() < deadline:
            zygote.wait_event(0.01)
        while child.pid is None:
            assert zygote.wait_event(30)
        os.kill(child.pid, signal.SIGSTOP)
        while Path(f"/proc/{child.pid}/stat").read_text().rsplit(")")[1].split()[0] != "T":
            assert time.monotonic() < deadline
        first = page.read()
        assert first.calls >= 1000
        assert first.phase is Phase.COLLECT
        assert page.read() == first
