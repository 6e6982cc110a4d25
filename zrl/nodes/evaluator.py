"""An evaluator: plays episodes with weights that it is asked to try. One thread, one loop, no sockets.

    learner                                    evaluator
    ───────                                    ─────────
    board: version v, v+1, …    ─ looks at ─►  adopt the newest, unless it was played already
    results file, line by line  ◄── appends ─  play a fixed number of episodes

It never waits for the learner nor the learner for it: versions that come and go while it plays are never seen here.
Page and end are those of a worker (`zrl.nodes.worker`), but SIGHUP closes the environments first.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from zrl.collect.actor import BaseActorModule
from zrl.collect.evaluate import Stage, play
from zrl.collect.spaces import Factory, make_env
from zrl.collect.streams import RandomStreams, evaluation_seeds
from zrl.data.board import Board
from zrl.data.memory import MemoryAddress
from zrl.data.weights import WeightsPacker
from zrl.nodes.page import Page, Phase

NICENESS = 10  # about a tenth of what a learner or a worker gets of a core that they compete for
POLL = 0.02  # seconds between two looks at the board
INDEX = 1 << 31  # of its random streams: no worker has it, so that nobody is tested on what he was trained with


@dataclass(frozen=True)
class EvaluatorRecipe:
    """What an evaluator is made of. Travels once, through the zygote.

    Attributes:
        factory: makes one environment.
        actor: the copy that acts, in its mode; its weights are replaced before each evaluation.
        quotas: episodes of an evaluation by environment.
        longest: steps after which an episode is cut.
        seed: of everything random in an evaluation, each time anew.
        device: of the actor.
    """

    factory: Factory
    actor: BaseActorModule
    quotas: tuple[int, ...]
    longest: int
    seed: int
    device: str = "cpu"


@dataclass(frozen=True)
class EvaluatorJob:
    """Where an evaluator finds what it shares with its host.

    Attributes:
        run_id, digest, nbytes: of the board.
        incarnation: of the page.
        results: path of the file that it appends to: one line of JSON per evaluation, see `Line`.
        played: newest version that needs no evaluation any more.
    """

    board: MemoryAddress
    run_id: bytes
    digest: bytes
    nbytes: int
    page: MemoryAddress
    incarnation: bytes
    results: str
    played: int


@dataclass(frozen=True)
class Line:
    """One finished evaluation: the version that was played, its episodes as in `Played`, and the seconds it took."""

    version: int
    returns: list[float]
    lengths: list[int]
    n_cut: int
    seconds: float

    def to_bytes(self) -> bytes:
        return json.dumps(vars(self)).encode() + b"\n"

    @classmethod
    def from_bytes(cls, line: bytes) -> Line:
        return cls(**json.loads(line))


def main(recipe: EvaluatorRecipe, job: EvaluatorJob) -> None:
    """The life of an evaluator; ends with its zygote, or by SIGHUP.

    Raises:
        RecordError, WeightsError, SharedMemoryError: environment, actor or memory will not do.
        SystemExit: SIGHUP came.
    """
    for signum in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(signum, lambda *_: sys.exit())
    os.nice(NICENESS)
    with contextlib.ExitStack() as opened:
        page = opened.enter_context(Page.attach(job.page, job.incarnation))
        board = opened.enter_context(Board.attach(job.board, run_id=job.run_id, digest=job.digest, nbytes=job.nbytes))
        results = opened.enter_context(open(job.results, "ab", buffering=0))
        actor = recipe.actor.to(recipe.device)
        stage, seeds = _build(recipe, actor, opened)
        stage.calls = page.calls
        page.enter(Phase.WAIT)
        for version in _adopted(board, actor, job.played):
            page.enter(Phase.COLLECT)
            results.write(_evaluation(recipe, stage, seeds, version).to_bytes())
            page.enter(Phase.WAIT)


def _build(recipe: EvaluatorRecipe, actor: BaseActorModule, opened: contextlib.ExitStack) -> tuple[Stage, list[int]]:
    """The environments, on a stage, and their seeds; `opened` closes them."""
    seeds = evaluation_seeds(recipe.seed, len(recipe.quotas))
    with _streams(recipe).active():
        envs = []
        for j, seed in enumerate(seeds):
            envs.append(opened.enter_context(contextlib.closing(make_env(recipe.factory, seed, j))))
        return Stage(envs, actor, torch.device(recipe.device), seed=seeds[0]), seeds


def _adopted(board: Board, actor: BaseActorModule, version: int) -> Iterator[int]:
    """Versions newer than `version`, as they appear on the board; the actor has the weights of the last one."""
    packer, flat = WeightsPacker(actor), np.empty(board.nbytes, np.uint8)
    while True:
        newest = board.read(flat, version)
        if newest is None or newest == version:  # overtaken while reading, or nothing new
            time.sleep(POLL)
            continue
        packer.unpack(flat)
        version = newest
        yield version


def _evaluation(recipe: EvaluatorRecipe, stage: Stage, seeds: list[int], version: int) -> Line:
    """One evaluation: nothing random in it is left over from the one before."""
    started = time.monotonic()
    with _streams(recipe).active():
        stage.begin(seeds)
        played = play(stage, recipe.quotas, recipe.longest)
    return Line(version, *played, seconds=time.monotonic() - started)


def _streams(recipe: EvaluatorRecipe) -> RandomStreams:
    return RandomStreams(recipe.seed, INDEX, 0, torch.device(recipe.device))
