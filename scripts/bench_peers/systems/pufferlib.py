"""PufferLib's vectorisation: `Serial`, or `Multiprocessing` with two workers, with a plain loop, the network of `nets`,
softmax and multinomial, recorded into NumPy arrays, and the update of `learn`.

With processes the loop is the asynchronous one that PufferLib recommends: it acts for one worker's environments while
the other worker steps its own, and updates with each half of a batch. Version 1.0.1: later ones fetch a graphics
library from elsewhere when pip builds them. A step after an end only resets the environment, which counts, in its
favour.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pufferlib.emulation
import pufferlib.vector
import torch

from bench_peers.learn import Learner
from bench_peers.nets import CONTINUOUS, N_ACTIONS, Net
from bench_peers.window import Window
from bench_peers.work import Work, factory


def make(env: str) -> Any:
    return pufferlib.emulation.GymnasiumPufferEnv(env_creator=factory(env))


class Half:
    """The record of the environments that one call of ``recv`` brings."""

    def __init__(self, work: Work, columns: int, shape: tuple[int, ...], dtype: Any) -> None:
        t, b, n = work.n_steps, columns, N_ACTIONS[work.env]
        continuous = work.env in CONTINUOUS
        self.at = -1  # the row whose actions are under way
        self.record: dict[str, Any] = {
            "obs": np.zeros((t, b, *shape), dtype),
            "act": np.zeros((t, b, n), np.float32) if continuous else np.zeros((t, b), np.int64),
            "out": np.zeros((t, b, n), np.float32),
            "value": np.zeros((t, b), np.float32),
            "rew": np.zeros((t, b), np.float32),
            "fin": np.zeros((t, b), bool),
        }


def run(work: Work, window: Window, *, processes: bool) -> None:
    net = Net(work.env)
    learner = Learner(net, work.update) if work.update else None
    options: dict[str, Any] = {"backend": pufferlib.vector.Serial}
    columns = work.n_all
    if processes:
        columns = work.n_envs
        options = {
            "backend": pufferlib.vector.Multiprocessing,
            "num_workers": work.workers,
            "batch_size": work.n_envs,
        }
    env = pufferlib.vector.make(make, env_kwargs={"env": work.env}, num_envs=work.n_all, **options)
    space = env.single_observation_space
    halves: dict[int, Half] = {}
    env.async_reset(1)
    while True:
        now, rew, terminated, truncated, _, ids, _ = env.recv()
        half = halves.setdefault(int(ids.flat[0]), Half(work, columns, space.shape, space.dtype))
        record = half.record
        if half.at >= 0:
            record["rew"][half.at] = rew
            record["fin"][half.at] = np.logical_or(terminated, truncated)
        half.at += 1
        if half.at == work.n_steps:
            half.at = 0
            if learner is not None:
                learner(**record, last=now)
            if window.delivered(columns * work.n_steps):
                break
        with torch.inference_mode():
            record["obs"][half.at] = now
            out, value, _ = net(torch.from_numpy(record["obs"][half.at]))
            act = record["act"][half.at] = net.sample(out).numpy()
        record["out"][half.at], record["value"][half.at] = out.numpy(), value.numpy()
        env.send(np.clip(act, -1, 1) if act.ndim > 1 else act)
    env.close()
