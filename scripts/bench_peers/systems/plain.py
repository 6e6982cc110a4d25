"""The bare loop: what one writes with no library. Two processes, each with its environments, the eager network, softmax
and multinomial; every leaf is recorded into NumPy arrays. Nothing leaves the processes: what they count is delivered.

It is the limit of what such a loop can do, since it saves all communication. Without `learns` it learns nothing, also
in works with an update; with it each process makes its own update of its own half of the batch, and the two drift
apart.
"""

from __future__ import annotations

import multiprocessing
import time
from typing import Any

import numpy as np
import torch

from bench_peers.learn import Learner
from bench_peers.nets import CONTINUOUS, N_ACTIONS, Net
from bench_peers.window import Window
from bench_peers.work import Work, make_env

POLL = 0.005  # seconds


class Loop:
    """The environments and the record of one process."""

    def __init__(self, work: Work, *, race: bool, learns: bool) -> None:
        t, b = work.n_steps, work.n_envs
        self.net, self.race = Net(work.env), race
        self.learner = Learner(self.net, work.update) if learns else None
        self.envs = [make_env(work.env) for _ in range(b)]
        self.now = [env.reset(seed=j)[0] for j, env in enumerate(self.envs)]
        space = self.envs[0].observation_space
        n, continuous = N_ACTIONS[work.env], work.env in CONTINUOUS
        self.obs: Any = np.zeros((t, b, *(space.shape or ())), space.dtype)
        self.act: Any = np.zeros((t, b, n), np.float32) if continuous else np.zeros((t, b), np.int64)
        self.out: Any = np.zeros((t, b, n), np.float32)
        self.value, self.rew = np.zeros((t, b), np.float32), np.zeros((t, b), np.float32)
        self.fin = np.zeros((t, b), bool)
        self.hx: Any = torch.zeros(b, 64) if self.net.core is not None else None

    def fragment(self) -> None:
        with torch.inference_mode():
            for t in range(len(self.obs)):
                self.step(t)
        if self.learner is not None:
            record = {name: getattr(self, name) for name in ("obs", "act", "out", "value", "rew", "fin")}
            self.learner(**record, last=np.array(self.now))

    def step(self, t: int) -> None:
        self.obs[t] = self.now
        out, value, self.hx = self.net(torch.from_numpy(self.obs[t]), self.hx)
        act = self.net.sample(out, race=self.race)
        self.out[t], self.value[t] = out.numpy(), value.numpy()
        self.act[t] = act.numpy()
        actions = np.clip(self.act[t], -1, 1) if act.ndim > 1 else act.tolist()
        for j, a in enumerate(actions):
            self.now[j], self.rew[t, j], terminated, truncated, _ = self.envs[j].step(a)
            self.fin[t, j] = terminated or truncated
            if self.fin[t, j]:
                self.now[j] = self.envs[j].reset()[0]
                if self.hx is not None:
                    self.hx[j] = 0


def worker(work: Work, counter: Any, options: dict[str, bool]) -> None:
    torch.set_num_threads(1)
    loop = Loop(work, **options)
    while True:
        loop.fragment()
        counter.value += work.n_envs * work.n_steps


def run(work: Work, window: Window, *, race: bool = False, learns: bool = False) -> None:
    context = multiprocessing.get_context("fork")
    counters = [context.Value("q", 0, lock=False) for _ in range(work.workers)]
    options = {"race": race, "learns": learns}
    workers = [context.Process(target=worker, args=(work, c, options), daemon=True) for c in counters]
    for process in workers:
        process.start()
    while not all(c.value for c in counters):
        time.sleep(POLL)
    before = 0
    while True:
        time.sleep(POLL)
        now = sum(c.value for c in counters)
        if now > before and window.delivered(now - before):
            break
        before = now
    for process in workers:
        process.terminate()
