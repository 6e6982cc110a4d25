"""RLlib: IMPALA with two environment runners, its learner in the driver's process, on its new API stack.

One step of IMPALA for every batch of the same size; steps are counted as the learner reports them trained. The network
is RLlib's own of the same sizes, shared by policy and value. Environments of a runner are a vector of Gymnasium,
stepped by it in turns. Collection without the learner, and other works, are not configured.
"""

from __future__ import annotations

from typing import Any

from bench_peers.window import Window
from bench_peers.work import Work, make_env


def run(work: Work, window: Window) -> None:
    import ray
    from ray.rllib.algorithms.impala import IMPALAConfig
    from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
    from ray.tune.registry import register_env

    env = work.env
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    register_env(env, lambda config: make_env(env))
    net = DefaultModelConfig(fcnet_hiddens=[64, 64], fcnet_activation="relu", vf_share_layers=True)
    config = (
        IMPALAConfig()
        .environment(env)
        .env_runners(
            num_env_runners=work.workers,
            num_envs_per_env_runner=work.n_envs,
            rollout_fragment_length=work.n_steps,
        )
        .learners(num_learners=0)
        .training(train_batch_size_per_learner=work.n_all * work.n_steps, lr=1e-3)
        .rl_module(model_config=net)
        .reporting(min_time_s_per_iteration=0.2, metrics_num_episodes_for_smoothing=10)
    )
    algorithm: Any = config.build_algo()
    before = 0
    while True:
        learners = algorithm.train().get("learners", {})
        trained = int(learners.get("__all_modules__", {}).get("num_env_steps_trained_lifetime", 0))
        if trained > before and window.delivered(trained - before):
            break
        before = max(before, trained)
    algorithm.stop()
    ray.shutdown()
