"""Sample Factory: APPO with two rollout workers, double-buffered as it recommends, one policy worker, one learner.

Collection alone is its sampling interface (`SyncSamplingAPI`), which has no learner. With an update: one epoch of one
batch of the same size, without V-trace; its loss is that of PPO. The network is that of `nets`, as an encoder that
policy and value share; with a GRU of 64 where the work has one. Inputs and returns are not normalised, nothing is
saved. It needs Gymnasium 0.29, which has HalfCheetah-v4 instead of v5.

"Solve" has the settings of its own example for CartPole-v1 (``sf_examples/train_gym_env.py``), with two workers.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
from sample_factory.algo.runners.runner import AlgoObserver
from sample_factory.algo.sampling.simplified_sampling_api import SyncSamplingAPI
from sample_factory.algo.utils.context import global_model_factory
from sample_factory.algo.utils.env_info import obtain_env_info_in_a_separate_process
from sample_factory.algo.utils.rl_utils import samples_per_trajectory
from sample_factory.cfg.arguments import parse_full_cfg, parse_sf_args
from sample_factory.envs.env_utils import register_env
from sample_factory.model.encoder import Encoder
from sample_factory.train import make_runner

from bench_peers import nets
from bench_peers.window import Window
from bench_peers.work import GOAL, Work, make_env

COMMON = (
    *("--algo=APPO", "--experiment=bench", "--device=cpu", "--num_workers=2", "--with_vtrace=False", "--seed=1"),
    *(
        "--normalize_input=False",
        "--normalize_returns=False",
        "--obs_scale=1.0",
        "--decorrelate_experience_max_seconds=0",
    ),
    *("--save_every_sec=100000", "--save_best_every_sec=100000", "--experiment_summaries_interval=100000"),
    *("--restart_behavior=overwrite", "--with_wandb=False", "--adaptive_stddev=False"),
)


class Body(Encoder):  # type: ignore[misc]
    """The body of `nets`."""

    def __init__(self, cfg: Any, obs_space: Any) -> None:
        super().__init__(cfg)
        self.env = cfg.env
        self.body = nets.body(cfg.env)

    def forward(self, obs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.body(obs["obs"])  # type: ignore[no-any-return]

    def get_out_size(self) -> int:
        return nets.N_FEATURES[self.env]

    def type_for_input_tensor(self, name: str) -> torch.dtype:
        return torch.uint8 if self.env in ("pong", "minigrid") else torch.float32


def make_sf_env(name: str, cfg: Any = None, env_config: Any = None, render_mode: Any = None) -> Any:
    return make_env(name)


def config(env: str, folder: str, *words: str) -> Any:
    register_env(env, make_sf_env)
    argv = [*COMMON, f"--env={env}", f"--train_dir={folder}", *words]
    parser, _ = parse_sf_args(argv=argv)
    return parse_full_cfg(parser, argv)


def config_of(work: Work, folder: str) -> Any:
    recurrent = work.env == "minigrid"
    global_model_factory().register_encoder_factory(Body)
    return config(
        work.env,
        folder,
        f"--num_envs_per_worker={work.n_envs}",
        f"--rollout={work.n_steps}",
        f"--recurrence={work.n_steps if recurrent else 1}",
        f"--use_rnn={recurrent}",
        *("--rnn_type=gru", "--rnn_size=64"),
        f"--batch_size={work.n_all * work.n_steps}",
        *("--num_batches_per_epoch=1", "--num_epochs=1"),
    )


def run(work: Work, window: Window) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        cfg = config_of(work, folder)
        if work.update:
            train(cfg, Deliveries(window, cfg.batch_size))
        else:
            sample(cfg, window)


def sample(cfg: Any, window: Window) -> None:
    sampler = SyncSamplingAPI(cfg, obtain_env_info_in_a_separate_process(cfg))
    sampler.start()
    while not window.delivered(samples_per_trajectory(sampler.get_trajectories_sync())):
        pass
    sampler.stop()


def train(cfg: Any, observer: AlgoObserver) -> None:
    _, runner = make_runner(cfg)
    runner.register_observer(observer)
    runner.init()
    runner.run()


class Deliveries(AlgoObserver):  # type: ignore[misc]
    """Each iteration of the learner takes one batch."""

    def __init__(self, window: Window, size: int) -> None:
        self._window, self._size = window, size

    def on_training_step(self, runner: Any, iteration: int) -> None:
        if self._window.delivered(self._size) and not runner.stopped:
            runner._stop_training()


class Goal(AlgoObserver):  # type: ignore[misc]
    """Looks at the last 100 episodes after every iteration of the learner."""

    def __init__(self) -> None:
        self.first, self.reached, self.steps = 0.0, 0.0, 0

    def on_training_step(self, runner: Any, iteration: int) -> None:
        self.first = self.first or time.perf_counter()
        returns = runner.policy_avg_stats.get("reward", [()])[0]
        if len(returns) >= 100 and sum(list(returns)[-100:]) >= 100 * GOAL and not self.steps:
            self.steps = runner.env_steps[0]
            self.reached = time.perf_counter()
            runner._stop_training()


def solve(seed: int) -> tuple[int | None, float, float]:
    words = (
        *("--num_envs_per_worker=20", "--policy_workers_per_policy=2", "--recurrence=1", "--use_rnn=False"),
        *("--batch_size=512", "--reward_scale=0.1", f"--seed={seed}", "--train_for_env_steps=1000000"),
    )
    goal = Goal()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        train(config("cartpole", folder, *words), goal)
    return goal.steps or None, goal.first, goal.reached or time.perf_counter()
