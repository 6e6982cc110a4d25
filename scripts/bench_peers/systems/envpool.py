"""EnvPool with a plain loop: the upper anchor for environments that it has.

One process: all environments in one pool with two threads, stepped by one call, with the eager network, softmax and
multinomial, recorded into NumPy arrays. With `pinned` there is one thread, and both stay on one core: for small
environments that is faster, since waking a thread on another core takes longer than the step. It resets itself in the
step after an end; these steps count, in its favour.
Its CartPole, Atari preprocessing and MuJoCo are its own, written in C++.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from bench_peers.learn import Learner
from bench_peers.nets import CONTINUOUS, N_ACTIONS, Net
from bench_peers.window import Window
from bench_peers.work import Work, make_pool


def run(work: Work, window: Window, *, pinned: bool = False) -> None:
    if pinned:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    t, b, n = work.n_steps, work.n_all, N_ACTIONS[work.env]
    net = Net(work.env)
    learner = Learner(net, work.update) if work.update else None
    env = make_pool(work, b, 1 if pinned else work.workers)
    space, continuous = env.observation_space, work.env in CONTINUOUS
    record: dict[str, Any] = {
        "obs": np.zeros((t, b, *space.shape), space.dtype),
        "act": np.zeros((t, b, n), np.float32) if continuous else np.zeros((t, b), np.int64),
        "out": np.zeros((t, b, n), np.float32),
        "value": np.zeros((t, b), np.float32),
        "rew": np.zeros((t, b), np.float32),
        "fin": np.zeros((t, b), bool),
    }
    now = env.reset()[0]
    while True:
        with torch.inference_mode():
            for k in range(t):
                record["obs"][k] = now
                out, value, _ = net(torch.from_numpy(record["obs"][k]))
                record["out"][k], record["value"][k] = out.numpy(), value.numpy()
                act = record["act"][k] = net.sample(out).numpy()
                act = np.clip(act, -1, 1).astype(np.float64) if continuous else act
                now, record["rew"][k], terminated, truncated, _ = env.step(act)
                np.logical_or(terminated, truncated, out=record["fin"][k])
        if learner is not None:
            learner(**record, last=now)
        if window.delivered(t * b):
            break
