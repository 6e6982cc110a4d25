"""The host of an evaluator: starts the process, watches it, replaces it, and reads what it finds.

It has no thread and no loop of its own: it looks when it is asked to, and never waits but in `close`. It reaches the
process through its zygote, a board, a page and a file.

============================  ==============================================
an evaluator                  what its host does
============================  ==============================================
ended, in whatever way        starts another
stands still in an env call   dumps its stacks into its log, kills it
the same while it builds      likewise
failed four times in a row    gives up: `stopped`, and one warning
lost its zygote               likewise
============================  ==============================================
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import signal
import time
from io import FileIO
from pathlib import Path

import torch

from zrl.data.board import Board
from zrl.data.weights import WeightsPacker
from zrl.errors import ProcessError, SharedMemoryError, ZrlError
from zrl.net.addresses import run_directory
from zrl.nodes.children import Child, Lost, Spawner, Zygote
from zrl.nodes.evaluator import EvaluatorJob, EvaluatorRecipe, Line
from zrl.nodes.logs import Logs
from zrl.nodes.page import Page, Phase
from zrl.nodes.pipe import Ended

RESTARTS = 3  # in a row, with no evaluation between them
CLOSE_TIMEOUT = 3.0  # seconds; a third of it for the evaluator to close its environments
DUMP_SECONDS = 0.5  # that it gets to write its stacks before it is killed

logger = logging.getLogger("zrl")


class EvaluatorHost:
    """Keeps one evaluator process, and holds what this process shares with it.

    Args:
        recipe: of the evaluator.
        actor: whose weights are published.
        log_dir: that somebody chose, or None.
        start_method: of the process.
        patience: seconds that it may stand still, by phase; in others it may for ever.

    Attributes:
        stopped: why there is no evaluator any more; empty while there is.
        n_replaced: evaluators started in place of another.
    """

    def __init__(
        self,
        recipe: EvaluatorRecipe,
        actor: torch.nn.Module,
        log_dir: Path | None,
        start_method: str,
        patience: dict[Phase, float],
    ) -> None:
        self.stopped = ""
        self.n_replaced = 0
        self._patience = patience
        self._keep_log = Logs(log_dir).keep
        self._n_failures = 0  # since the last evaluation
        self._played = 0  # newest version of one
        self._page: Page | None = None
        self._results: FileIO | None = None
        self._packer: WeightsPacker | None = WeightsPacker(actor)
        self._run_id = os.urandom(16)
        manifest = self._packer.manifest
        self._digest = manifest.digest
        with contextlib.ExitStack() as undo:
            self._board = Board.create(manifest.nbytes, run_id=self._run_id, digest=manifest.digest)
            undo.callback(self._board.close)
            self._run_dir = run_directory()
            undo.callback(shutil.rmtree, self._run_dir, ignore_errors=True)
            self._zygote = (Spawner if start_method == "spawn" else Zygote).start(
                "zrl.nodes.evaluator:main",
                recipe,
                run_dir=self._run_dir,
                log_dir=log_dir or self._run_dir / "logs",
                preload=["zrl.nodes.evaluator"],
                keep_log=self._keep_log,
            )
            undo.pop_all()
        self._launch()

    def publish(self, version: int) -> None:
        """Put the learner's weights on the board."""
        assert self._packer is not None
        self._board.publish(version, self._packer.pack)

    def look(self) -> list[Line]:
        """The evaluations finished since the last look; a process that has ended or stands still is seen to."""
        events = self._zygote.events()  # first: who is known to have ended has written all that he will
        lines = self._read()
        if lines:
            self._n_failures, self._played = 0, lines[-1].version
        for event in sorted(events, key=lambda event: not isinstance(event, Lost)):  # it is why the child has ended
            if isinstance(event, Lost):
                self._stop(event.why)
            elif isinstance(event, Ended):
                self._on_end(event)
        try:
            self._watch(time.monotonic())
        except ProcessError as error:  # the zygote does not listen
            self._stop(str(error))
        return lines

    def close(self) -> None:
        """End the process, and let go of everything; idempotent."""
        self._zygote.close(time.monotonic() + CLOSE_TIMEOUT)
        self._forget()
        self._packer = None  # its views would keep the board mapped
        self._board.close()

    # ── the process ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _launch(self) -> None:
        """Start a process, with a page and a results file of its own: the last line of a killed one may be half."""
        try:
            incarnation = os.urandom(16)
            self._page = Page.create(incarnation)
            path = self._run_dir / f"results-{self.n_replaced}.jsonl"
            self._results = open(path, "x+b", buffering=0)  # noqa: SIM115
            self._half = b""
            job = EvaluatorJob(
                self._board.address,
                self._run_id,
                self._digest,
                self._board.nbytes,
                self._page.address,
                incarnation,
                str(path),
                self._played,
            )
            self._child: Child = self._zygote.fork("evaluator", (job,))
        except (ZrlError, OSError) as error:
            self._stop(str(error))
            return
        self._seen, self._since = (0, Phase.BUILD), time.monotonic()
        self._killing: tuple[str, float] | None = None  # why, and when

    def _read(self) -> list[Line]:
        """The lines that were completed."""
        if self._results is None:
            return []
        *lines, self._half = (self._half + self._results.readall()).split(b"\n")
        return [Line.from_bytes(line) for line in lines]

    def _watch(self, now: float) -> None:
        """Kill the process if it stands still."""
        if self._page is None:
            return
        with contextlib.suppress(SharedMemoryError):  # it wrote nonsense there: what was seen last stands still
            progress = self._page.read()
            if (progress.calls, progress.phase) != self._seen:
                self._seen, self._since = (progress.calls, progress.phase), now
                self._killing = None  # a look may come late, and it has gone on meanwhile
        if self._killing is not None:
            if now >= self._killing[1]:
                self._zygote.kill(self._child)
            return
        phase, stood = self._seen[1], now - self._since
        if stood < self._patience.get(phase, math.inf):
            return
        what = "it has not built its environments" if phase is Phase.BUILD else "no call of an environment has ended"
        self._killing = f"{what} for {stood:.0f} s", now + DUMP_SECONDS
        self._zygote.dump(self._child)

    def _on_end(self, ended: Ended) -> None:
        """Replace it, or give it up."""
        why = _in_words(ended, self._killing[0] if self._killing else "")
        self._forget()
        self._n_failures += 1
        if self._n_failures > RESTARTS:
            self._stop(f"it failed {self._n_failures} times in a row, the last time with {why}")
        elif not self.stopped:
            logger.info("the evaluator ended (%s); another one starts", why)
            self.n_replaced += 1
            self._launch()

    def _stop(self, why: str) -> None:
        self._forget()
        if not self.stopped:
            self.stopped = why
            log = self._keep_log(self._zygote.log_dir / "evaluator.log")
            logger.warning("there are no more evaluations beside training: %s; its log: %s", why, log)

    def _forget(self) -> None:
        """Let go of what belongs to the process that was."""
        if self._page is not None:
            self._page.close()
        if self._results is not None:
            self._results.close()
        self._page = self._results = None


def _in_words(ended: Ended, killed_because: str) -> str:
    """What became of a process."""
    if killed_because and ended.signal == signal.SIGKILL:
        return killed_because
    if ended.signal is not None:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(ended.signal).name}"
    lines = [line for line in ended.traceback.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit status {ended.code}"
