"""The kernel of a notebook: interrupted inside of ``next()``, and shut down without a word to the rollout."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager
from jupyter_core.utils import ensure_event_loop

from tests.faults.world import ROOT, alive, descendants, needs_linux, seen, tell, until

pytestmark = [needs_linux, pytest.mark.timeout(180)]
PATIENCE = 60.0  # seconds for a cell

BEGIN = """
import functools, json
from tests.faults.world import Ledger, StampEnv
from tests.toys import RandomActor
from zrl.rollout import multi
it = multi.rollout(functools.partial(StampEnv, FOLDER), RandomActor(3), 4, 2, 2, 4, 2)
ledger = Ledger()
ledger.check(next(it))
"""
GO_ON = """
for _ in range(20):
    ledger.check(next(it))
stats = it.stats()
print(json.dumps([stats["losses"], stats["dropped"], stats["workers"]]))
"""


class Kernel:
    """A kernel of this interpreter, with its files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.manager = KernelManager(
            kernel_name="python3",
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
            connection_file=str(folder / "kernel.json"),
            transport="ipc",  # its sockets are in the folder, too
        )
        environment = {"IPYTHONDIR": str(folder), "TMPDIR": str(folder), "PYTHONPATH": str(ROOT), "XDG_RUNTIME_DIR": ""}
        with (folder / "kernel.log").open("wb") as log:
            self.manager.start_kernel(env={**os.environ, **environment}, cwd=str(folder), stdout=log, stderr=log)
        self.client: BlockingKernelClient = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=PATIENCE)
        self.pid = int(self.run("import os\nprint(os.getpid())"))

    def begin(self, code: str) -> str:
        """Run a cell, without waiting for its end; its name."""
        return str(self.client.execute(code))

    def end(self, cell: str) -> tuple[dict[str, Any], str]:
        """Of a cell that was begun: how it ended, and what it printed."""
        reply: dict[str, Any] = {}
        while reply.get("parent_header", {}).get("msg_id") != cell:
            reply = self.client.get_shell_msg(timeout=PATIENCE)
        printed, idle = "", False
        while not idle:
            message = self.client.get_iopub_msg(timeout=PATIENCE)
            content = message["content"]
            if message["parent_header"].get("msg_id") == cell:
                printed += content["text"] if message["msg_type"] == "stream" else ""
                idle = content.get("execution_state") == "idle"
        return reply["content"], printed

    def run(self, code: str) -> str:
        """What a cell prints that does not raise."""
        content, printed = self.end(self.begin(code))
        assert content["status"] == "ok", content
        return printed

    def close(self) -> None:
        self.client.stop_channels()
        if self.manager.has_kernel:
            self.manager.shutdown_kernel(now=True)
        ensure_event_loop().close()  # jupyter_client's, which it makes at first use and keeps
        asyncio.set_event_loop(None)


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    made = Kernel(tmp_path)
    yield made
    made.close()


@pytest.mark.long
@pytest.mark.parametrize("then", ["closes", "shuts down"])
def test_an_interrupt_inside_next(kernel: Kernel, tmp_path: Path, then: str) -> None:
    """The cell raises KeyboardInterrupt, and the next one goes on with the same workers; after `close()`, or with the
    kernel, all of them are gone."""
    kernel.run(BEGIN.replace("FOLDER", repr(str(tmp_path))))
    below = descendants(kernel.pid)
    run_dir = Path(kernel.run("print(it._collator._run_dir)").strip())
    assert run_dir.exists()
    workers = [pid for pid in below if os.getpgid(pid) == pid and descendants(pid) == []]
    assert len(workers) == 2
    told = [tell(tmp_path, "hold", pid) for pid in workers]
    cell = kernel.begin("while True: ledger.check(next(it))")
    until(lambda: all(map(seen, told)))
    time.sleep(0.3)  # what they had ready is taken: it waits
    kernel.manager.interrupt_kernel()
    content, _ = kernel.end(cell)
    assert (content["status"], content["ename"]) == ("error", "KeyboardInterrupt")
    assert all(map(alive, below))
    for path in told:
        path.unlink()
    assert json.loads(kernel.run(GO_ON)) == [{}, {}, 2]
    if then == "closes":
        kernel.run("it.close()")
        until(lambda: not any(map(alive, below)), 5.0)
        kernel.run(BEGIN.replace("FOLDER", repr(str(tmp_path))) + GO_ON)  # and there can be another one
        below = descendants(kernel.pid)
        assert not run_dir.exists()
        run_dir = Path(kernel.run("print(it._collator._run_dir)").strip())
    kernel.manager.shutdown_kernel(now=then == "closes")
    until(lambda: not any(map(alive, below)), 5.0)
    until(lambda: not run_dir.exists(), 5.0)
