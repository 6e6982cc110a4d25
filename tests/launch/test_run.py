"""The commands of a batch script and of a manifest, run as they are, by stand-ins for Slurm and Kubernetes."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launch.golden.make import rendered
from tests.launch.processes import (
    DEADLINE,
    SMALL,
    checkpoints,
    command,
    environment,
    free_port,
    keys_in,
    marked,
    mode,
    nothing_left,
    until,
    updates,
)
from tests.launch.test_files import expanded, secret_commands

pytestmark = pytest.mark.timeout(180)  # a dozen interpreters on a busy machine

#: Tasks as process groups; SIGTERM is theirs.
SRUN = """
set -m
for word in "$@"; do
  case $word in --ntasks=*) tasks=${word#*=} ;; --*) ;; *) break ;; esac
  shift
done
trap 'for task in $pids; do kill -TERM -- "-$task"; done' TERM
for ((i = 0; i < tasks; i++)); do
  SLURM_PROCID=$i "$@" &
  pids="$pids $!"
done
code=0
for task in $pids; do wait "$task" || code=$?; done
exit "$code"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with nothing_left(tmp_path):
        yield tmp_path


class Job:
    """A batch script in a folder, with a stand-in for srun."""

    def __init__(self, folder: Path, script: str) -> None:
        self.folder, self.script = folder, folder / "job.sh"
        self.script.write_text(script)
        self.environment = {**environment(folder), "SLURM_JOB_ID": "7", "LEARNER_ADDRESS": "127.0.0.1"}
        command(folder / "bin" / "srun", SRUN)
        self.log = folder / "log"

    def start(self, **variables: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                ["bash", self.script],
                cwd=self.folder,
                env={**self.environment, **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def text(self) -> str:
        return self.log.read_text()

    def wait(self, job: subprocess.Popen[bytes]) -> int:
        try:
            return job.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running: {self.text}") from None


def test_a_job_is_preempted_and_goes_on(folder: Path) -> None:
    keys = keys_in(folder / "keys")
    words = ["slurm", "--keys", "keys", "--hosts", "2", "--workers-per-host", "1", "--port", str(free_port())]
    job = Job(folder, rendered([*words, "--", *SMALL, "--max-lag", "0"]))
    runs = folder / "runs" / "job-7"
    first = job.start(ZRL_STEPS="100M")
    until(lambda: updates(runs) > 20 or first.poll() is not None, lambda: job.text)
    for secret in keys.glob("*.secret"):
        assert not any(secret.read_text().strip() in words for words in marked(folder).values())
        assert secret.read_text().strip() not in job.script.read_text()
    first.send_signal(signal.SIGTERM)  # as --signal=B:TERM does it: to the script alone
    assert job.wait(first) == 143, job.text
    assert job.text.count("the run is over") == 2, job.text
    assert "stopped by SIGTERM" in job.text
    until(lambda: not marked(folder), lambda: f"{marked(folder)}")
    (step,) = checkpoints(runs)
    second = job.start(ZRL_STEPS=str(step + 500), SLURM_RESTART_COUNT="1")
    assert job.wait(second) == 0, job.text
    assert f"step_{step:012}.pt" in job.text.partition("SIGTERM")[2]
    assert "all steps taken" in job.text
    assert len(list(runs.iterdir())) == 1
    assert max(checkpoints(runs)) >= step + 500


def test_a_job_without_keys_says_so(folder: Path) -> None:
    job = Job(folder, rendered(["slurm", "--keys", "keys", "--", *SMALL]))
    assert job.wait(job.start()) == 2
    assert "keys/server.secret cannot be read on" in job.text
    assert "Make the keys before sbatch" in job.text


def test_a_job_whose_hosts_fail_ends(folder: Path) -> None:
    keys_in(folder / "keys")
    words = ["slurm", "--keys", "keys", "--workers-per-host", "1", "--port", str(free_port()), "--import", "no_module"]
    script = rendered([*words, "--", *SMALL])
    assert script.count("sleep 10") == 1
    job = Job(folder, script.replace("sleep 10", "sleep 0"))
    running = job.start(ZRL_STEPS="100M")
    assert job.wait(running) == 143, job.text
    assert "no module 'no_module' can be found here" in job.text
    assert "no host is left, the last ended with 2; the learner stops" in job.text


# ── Kubernetes ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Pod:
    """The containers of a pod as processes: volumes are folders, and a Secret's files are links to what root has."""

    def __init__(self, folder: Path, template: dict[str, Any], secret: dict[str, Path], port: int) -> None:
        self.spec, self.folder, self.port = template["spec"], folder, port
        for volume in ("secret", "keys", "runs"):
            (folder / volume).mkdir(parents=True, exist_ok=True)
        data = folder / "secret" / "..2026"
        data.mkdir()
        (folder / "secret" / "..data").symlink_to(data.name)
        for name, source in secret.items():
            (data / name).write_bytes(source.read_bytes())
            (data / name).chmod(0o440)
            (folder / "secret" / name).symlink_to(f"..data/{name}")

    def start(self, variables: dict[str, str]) -> subprocess.Popen[bytes]:
        (first,), (container,) = self.spec["initContainers"], self.spec["containers"]
        subprocess.run(self._words(first), check=True, timeout=DEADLINE, cwd=self.folder, env=variables)
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                self._words(container), cwd=self.folder, env=variables, stdout=log, stderr=subprocess.STDOUT
            )

    def _words(self, container: dict[str, Any]) -> list[str]:
        variables = {"POD_NAME": self.folder.name}
        words = [expanded(word, variables) for word in container["command"]]
        for mount in ("/secret", "/keys", "/runs"):
            words = [str(self.folder) + word if word.startswith(mount) else word for word in words]
        return [word.replace("zrl-learner:", "127.0.0.1:") for word in words]

    @property
    def text(self) -> str:
        return (self.folder / "log").read_text()


def secrets_of(manifest: str, folder: Path) -> dict[str, dict[str, Path]]:
    """What the commands in the comments would put into each Secret."""
    found = {}
    for name, words in secret_commands(manifest).items():
        sources = (word.removeprefix("--from-file=").split("=") for word in words if word.startswith("--from-file="))
        found[name] = {file: folder / path for file, path in sources}
    return found


@pytest.mark.long
def test_a_learner_is_evicted_and_goes_on(folder: Path) -> None:
    keys_in(folder / "keys")
    port = free_port()
    words = ["k8s", "--image", "zrl", "--keys", "keys", "--workers-per-host", "2", "--port", str(port)]
    manifest = rendered([*words, "--", *SMALL])
    _, job, deployment = yaml.safe_load_all(manifest)
    secrets = secrets_of(manifest, folder)
    learner, host = (
        Pod(folder / name, document["spec"]["template"], secrets[secret], port)
        for name, document, secret in (("learner", job, "zrl-learner-keys"), ("host", deployment, "zrl-host-keys"))
    )
    variables = {**environment(folder), "POD_IP": "127.0.0.1"}
    runs = folder / "learner" / "runs" / "zrl"
    running, working = learner.start({**variables, "ZRL_STEPS": "100M"}), host.start(variables)
    assert mode(folder / "learner" / "keys" / "zrl") == 0o700
    assert mode(folder / "learner" / "keys" / "zrl" / "server.secret") == 0o600
    assert not list((folder / "host").rglob("server.secret"))
    until(lambda: updates(runs) > 20 or running.poll() is not None, lambda: learner.text + host.text)
    assert os.readlink(f"/proc/{running.pid}/exe").rpartition("/")[2].startswith("python")  # it has SIGTERM itself
    running.terminate()
    assert running.wait(DEADLINE) == 143, learner.text
    assert working.wait(DEADLINE) == 0, host.text  # and would be started again
    (step,) = checkpoints(runs)
    running, working = learner.start({**variables, "ZRL_STEPS": str(step + 500)}), host.start(variables)
    assert running.wait(DEADLINE) == 0, learner.text
    assert working.wait(DEADLINE) == 0, host.text
    assert "all steps taken" in learner.text
    assert f"step_{step:012}.pt" in learner.text.partition("SIGTERM")[2]
    assert len(list(runs.iterdir())) == 1
