"""Every benchmark runs, shortened, and prints the keys that it promises; every example runs."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
KEYS = {
    "bench_collect.py": (
        ["--seconds", "0.02", "--rounds", "1"],
        [
            *(
                "collect_over_bare",
                "collect_over_plain",
                "nested_over_flat",
                "recurrent_over_bare",
                "sticky_over_plain",
            ),
            *("share_env", "share_actor", "share_write", "share_reset"),
        ],
    ),
    "bench_cuda.py": (
        ["--device", "cpu", "--seconds", "0.02", "--rounds", "1", "--kib", "64"],
        [
            *("h2d_over_pinned", "pageable_over_pinned", "h2d_gb_per_s", "pinned_gb_per_s"),
            *("stall_share", "publish_ms_6_4mb", "publish_host_ms_6_4mb"),
        ],
    ),
    "bench_pipeline.py": (
        ["--seconds", "0.05", "--rounds", "1"],
        [
            *("pipeline_over_collect", "learner_us_per_fragment", "learner_us_per_fragment_w1", "gather_over_memcpy"),
            *("collect_steps_per_s", "pipeline_steps_per_s"),
        ],
    ),
    "bench_remote.py": (
        ["--seconds", "0.05", "--rounds", "1", "--parts", "pyzmq", "cartpole"],
        [
            *("tcp_over_pyzmq", "tcp_over_pyzmq_1mib", "tcp_over_pyzmq_4mib", "tcp_mib_per_s_4mib"),
            "remote_over_local_cartpole",
        ],
    ),
    "bench_recovery.py": (
        ["--kills", "1", "--storm", "1", "--restarts", "1"],
        ["replace_s_median", "replace_s_worst", "rejoin_s", "storm_over_calm", "storm_kills"],
    ),
    "bench_actor.py": (
        ["--rounds", "1"],
        [
            f"{what}_{actor}"
            for what in ("forward_us", "step_us", "forward_over_step")
            for actor in ("mlp_shared", "mlp", "gaussian", "gru", "cnn")
        ]
        + [
            f"{what}_{a}"
            for what in ("arrays_us", "step_over_arrays")
            for a in ("mlp_shared", "mlp", "gaussian", "gru")
        ],
    ),
    "bench_hostile.py": (
        ["--seconds", "0.3", "--rounds", "1", "--kinds", "noise"],
        ["attacked_over_control", "attacked_over_control_noise", "sent_per_s"],
    ),
    "bench_weights.py": (
        ["--repeats", "1"],
        [f"{what}_ms_{size}" for what in ("publish", "adopted") for size in ("0_1mb", "6_4mb", "64mb")],
    ),
    "bench_relay.py": (
        ["--hosts", "1", "3", "--times", "3", "--interval", "0.2", "--paces", "0.1"],
        [
            *(
                f"{what}_{n}_hosts"
                for n in (1, 3)
                for what in (
                    *("publish_ms", "publish_p99_ms", "collator_ms", "learner_cpu_ms", "host_cpu_ms"),
                    *("half_have_it_ms", "all_have_it_ms", "all_have_it_max_ms", "wrong"),
                )
            ),
            *("no_skips_ms", "skips_ms", "got_share_200ms", "got_share_100ms", "host_rss_mb", "host_pss_mb"),
        ],
    ),
    "bench_scale.py": (
        ["--workers", "1", "60", "--seconds", "0.3", "--rounds", "1"],
        [
            *(
                f"{what}_{n}"
                for n in (1, 60)
                for what in (
                    *("us_per_fragment", "learner_us_per_fragment", "fragments_per_s", "client_core_share"),
                    *("attach_s", "close_s", "rss_mb"),
                )
            ),
            *("us_per_fragment_60_over_1", "latency_p50_ms_60", "latency_p99_ms_60"),
            *("paced_wanted_per_s", "paced_fragments_per_s", "paced_core_share", "paced_client_core_share"),
            *("busy_us", "busy_slowdown_1000", "busy_slowdown_5000"),
        ],
    ),
    "bench_returns.py": (
        ["--steps", "3", "20", "--columns", "2", "--rounds", "1"],
        [
            *("scan_speedup_t3", "scan_speedup_t20", "scan_over_tight_t20", "scan_error"),
            *(f"scan_speedup_{name}_t20" for name in ("returns", "gae", "vtrace")),
        ],
    ),
    "bench_startup.py": (
        ["--workers", "2", "--repeats", "1"],
        ["first_batch_s", "first_batch_spawn_s", "close_s", "script_s", "script_prestarted_s"],
    ),
    "bench_vector.py": (
        ["--seconds", "0.02", "--rounds", "1"],
        [
            "vector_over_bare",
            "vector_late_over_bare",
            "vector_short_over_bare",
            "envpool_over_bare",
            "share_env",
            "share_reset",
        ],
    ),
    "bench_workers.py": (
        ["--workers", "1", "--seconds", "0.05", "--rounds", "1", "--no-model"],
        [
            *("steps_per_s_1", "cpu_us_per_step_1", "worker_us_per_step_1", "learner_us_per_fragment_1"),
            *("fragment_bytes", "load", "cores"),
        ],
    ),
    "bench_solve.py": (["--seeds", "1", "--algos", "ppo", "--steps", "2048"], ["ppo_solved_of_1", "ppo_steps_median"]),
}
TOOLS = {"make_states.py", "run_notebook.py", "soak.py"}  # tests/docs, tests/faults
EXAMPLE = "example_seed_a2c.py"
DISTRIBUTED = "ddp_loop.py"
#: What needs packages of extras: these, and short words.
REAL = {
    "bench_atari.py": (("ale_py", "cv2"), ["--steps", "20", "--rounds", "1"]),
    "example_atari.py": (("ale_py", "cv2"), ["--steps", "8", "--n-steps", "2", "--hidden", "8", "--workers", "1"]),
    "example_minigrid.py": (("minigrid",), ["--steps", "32", "--n-steps", "4", "--start-method", "inline"]),
    "example_mujoco.py": (("mujoco",), ["--steps", "16", "--n-steps", "4", "--start-method", "inline"]),
}


def run(name: str, words: list[str], *before: str) -> str:
    done = subprocess.run(
        [sys.executable, *before, str(SCRIPTS / name), *words],
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_all_scripts_are_known() -> None:
    assert {p.name for p in SCRIPTS.glob("*.py")} == {*KEYS, *TOOLS, EXAMPLE, DISTRIBUTED, *REAL}


@pytest.mark.parametrize("name", KEYS)
def test_benchmark_prints_its_keys(name: str) -> None:
    words, keys = KEYS[name]
    figures = json.loads(run(name, words).splitlines()[-1])
    assert set(keys) <= set(figures)
    assert all(isinstance(x, (int, float)) for x in figures.values())


def test_the_soak_prints_its_key() -> None:
    figures = json.loads(run("bench_pipeline.py", ["--soak", "--batches", "200"]).splitlines()[-1])
    assert isinstance(figures["rss_slope_kib_per_1000"], float)


def test_without_a_device_the_benchmark_of_cuda_says_so() -> None:
    words = [sys.executable, str(SCRIPTS / "bench_cuda.py"), "--device", "cuda:99"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=50, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(r"bench_cuda\.py: (needs a CUDA device|there is no cuda:99).*\n", done.stderr)


def test_the_model_of_cost_finds_the_constants_that_made_the_costs() -> None:
    names = runpy.run_path(str(SCRIPTS / "bench_workers.py"))
    step, fragment, adopt, take, batch, publish = 7.0, 150.0, 40.0, 60.0, 90.0, 30.0
    costs = [
        names["Cost"](
            worker=step * case.n_steps * names["B"] + fragment + adopt * case.publish,
            learner=take + (batch + publish * case.publish) / case.n_per_batch,
            clock=0.0,
        )
        for case in names["MODEL"]
    ]
    found = names["model"](costs)
    assert list(found.values()) == pytest.approx([step, fragment, adopt, take, batch, publish])
    per_fragment = 64 * 16 * step + fragment + adopt + take + (batch + publish) / 4
    assert names["predicted"](found, 64, 4) == pytest.approx(per_fragment / (64 * 16))


def greedy_returns(words: list[str]) -> list[float]:
    return [float(x) for x in re.findall(r"greedy return +([\d.]+)", run(EXAMPLE, words))]


def test_the_example_learns() -> None:
    """An actor that has learnt nothing keeps the pole up for some ten steps."""
    assert max(greedy_returns(["--epochs", "4"])) > 60


def test_the_recurrent_example_runs() -> None:
    assert len(greedy_returns(["--epochs", "1", "--lstm"])) == 1


def test_the_distributed_example_keeps_the_weights_of_all_the_same() -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    out = run(DISTRIBUTED, ["--updates", "5"], *torchrun)
    assert "update     5: mean return" in out
    assert "weights of 2 processes: the same" in out


@pytest.mark.parametrize("name", REAL)
def test_scripts_for_real_environments_run(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, to save the imports. The example for Atari has a worker, which must know of the games."""
    packages, words = REAL[name]
    for package in packages:
        pytest.importorskip(package, reason=f"{package} is not installed: it comes with an extra")
    monkeypatch.setattr(sys, "argv", [name, *words])
    runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    out = capsys.readouterr().out
    if name.startswith("bench"):
        figures = json.loads(out.splitlines()[-1])
        assert figures["atari_wrapper_speedup"] > 0
        assert set(figures) >= {"atari_share_emulator", "atari_us", "gymnasium_us", "emulator_us"}
    else:
        assert re.search(r"[1-9]\d* steps.*mean return", out)
