"""Manifests for Kubernetes: a Job for the learner, a Service that finds it, a Deployment of hosts.

    Job NAME-learner        one pod: zrl learner, bound to the pod's address      Secret NAME-learner-keys
    Service NAME-learner    a name for that address
    Deployment NAME-hosts   HOSTS pods: zrl worker, each with its workers         Secret NAME-host-keys

No key stands in a manifest: Secrets are made from the folder of keys by commands that are printed as comments. The
volume of a Secret belongs to root and has links for files, which zrl refuses where keys are secret. So an init
container copies them into memory, with the modes that ``zrl keys`` gives them.

Hosts are a Deployment, whose pods are started again also when they end well: a learner that is evicted says to its
hosts that the run is over, and the one that takes its place needs them again.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zrl.launch.plan import GO_ON, HOST_FILES, HOSTS_PAIR, LEARNER_FILES, Plan, matches, one_line

KEYS, SECRET, RUNS = "/keys", "/secret", "/runs"  # where volumes are mounted

# Kubernetes puts variables in for $(NAME) in a command, and one dollar for two: these scripts have neither.

#: Copies the files of a Secret, whose names have no folder in them, into the folder that zrl wants: from $1 to $2.
COPY_KEYS = """\
set -eu
umask 077
mkdir -p "$2/authorized"
for file in "$1"/*; do
  name=${file##*/}
  case $name in authorized-*) name=authorized/${name#authorized-} ;; esac
  cp "$file" "$2/$name"
  chmod 0600 "$2/$name"
done
"""

#: $1: folder for run folders, $2: port, $3: folder of the keys; then the learner's words.
LEARN = f"""\
set -eu
runs=$1 port=$2 keys=$3
shift 3
{GO_ON}case $POD_IP in *:*) POD_IP="[$POD_IP]" ;; esac
exec zrl learner "$@" --bind "tcp://$POD_IP:$port" --keys "$keys" --runs "$runs"
"""

_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_NAMESPACE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_CLAIM = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,511}")
_QUANTITY = re.compile(r"[0-9]{1,9}(\.[0-9]{1,3})?(Ki|Mi|Gi|Ti|k|M|G|T)?")


@dataclass(frozen=True)
class Kubernetes:
    """What Kubernetes has to know.

    Attributes:
        image: with zrl and the environment; its entry point is not used.
        keys: folder of the keys on the machine that makes the Secrets.
        name: of everything, with a suffix.
        namespace: None: that of kubectl's context.
        cpus, memory, gpus: of the learner.
        host_memory: of each host; its CPUs are as many as its workers.
        shm: size of /dev/shm of every pod.
        claim: PersistentVolumeClaim for run folders; None: they go with the pod, and nothing can be gone on with.
        user: numeric user that everything runs as.

    Raises:
        ConfigError: a name or quantity that Kubernetes would refuse.
    """

    image: str
    keys: str
    name: str = "zrl"
    namespace: str | None = None
    cpus: int = 2
    memory: str = "4Gi"
    gpus: int = 0
    host_memory: str = "4Gi"
    shm: str = "1Gi"
    claim: str | None = None
    user: int = 1000

    def __post_init__(self) -> None:
        one_line("--keys", self.keys)
        matches("--image", self.image, _IMAGE, "the name of an image, such as registry/zrl:1")
        small = "small letters, digits and '-', the last a letter or digit"
        matches("--name", self.name, _NAME, f"up to 40 {small}, the first a letter")
        for option, value, pattern, expected in (
            ("--namespace", self.namespace, _NAMESPACE, f"up to 63 {small}"),
            ("--claim", self.claim, _CLAIM, f"{small}; or '.'"),
            ("--memory", self.memory, _QUANTITY, "a quantity such as 4Gi"),
            ("--host-memory", self.host_memory, _QUANTITY, "a quantity such as 4Gi"),
            ("--shm", self.shm, _QUANTITY, "a quantity such as 1Gi"),
        ):
            if value is not None:
                matches(option, value, pattern, expected)


def manifest(plan: Plan, k8s: Kubernetes) -> str:
    """The documents, as YAML, with what to do first as comments."""
    documents = [_service(plan, k8s), _learner(plan, k8s), _hosts(plan, k8s)]
    return "\n".join([*_first(k8s), *("---\n" + "\n".join(_block(document)) for document in documents), ""])


def _first(k: Kubernetes) -> list[str]:
    where = [] if k.namespace is None else ["--namespace", k.namespace]

    def secret(name: str, files: Sequence[str]) -> str:
        sources = [f"--from-file={file.replace('/', '-')}={k.keys}/{file}" for file in files]
        return "#   " + shlex.join(["kubectl", *where, "create", "secret", "generic", name, *sources])

    folder = shlex.quote(k.keys)
    return [
        "# Made by `zrl launch k8s`. Once, before `kubectl apply -f FILE`: the keys, if there are none,",
        f"#   zrl keys new --server --keys {folder}",
        f"#   zrl keys new {HOSTS_PAIR} --keys {folder}",
        f"#   zrl keys authorize {HOSTS_PAIR} {shlex.quote(f'{k.keys}/{HOSTS_PAIR}.public')} --keys {folder}",
        "# and the Secrets that hold them:",
        secret(f"{k.name}-learner-keys", LEARNER_FILES),
        secret(f"{k.name}-host-keys", HOST_FILES),
    ]


def _service(plan: Plan, k: Kubernetes) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(k, "learner"),
        "spec": {
            "clusterIP": "None",  # a name alone: the learner's pod says its own address for what it publishes
            "selector": _labels(k, "learner"),
            "ports": [
                {"name": "workers", "port": plan.port},
                {"name": "weights", "port": plan.port + 1},
            ],
        },
    }


def _learner(plan: Plan, k: Kubernetes) -> dict[str, Any]:
    words = [RUNS + "/" + k.name, str(plan.port), KEYS + "/zrl", *map(_literal, plan.learner)]
    container = {
        **_container(k, ["sh", "-c", LEARN, "learner", *words], k.cpus, k.memory, k.gpus),
        "env": [*_environment(), {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
        "ports": [{"containerPort": plan.port}, {"containerPort": plan.port + 1}],
    }
    container["volumeMounts"] += [{"name": "runs", "mountPath": RUNS}]
    runs = {"emptyDir": {}} if k.claim is None else {"persistentVolumeClaim": {"claimName": k.claim}}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(k, "learner"),
        "spec": {
            "backoffLimit": 5,
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
                    # wrong words, or what cannot be made here: the next pod would fail likewise
                    {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2, 5]}},
                ]
            },
            "template": _pod(k, "learner", container, "Never", 60, [{"name": "runs", **runs}]),
        },
    }


def _hosts(plan: Plan, k: Kubernetes) -> dict[str, Any]:
    url = f"tcp://{k.name}-learner:{plan.port}"
    command = ["zrl", "worker", "--connect", url, "--keys", KEYS + "/zrl", "--id", "$(POD_NAME)"]
    name = {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}
    container = {
        **_container(k, [*command, *map(_literal, plan.worker)], plan.workers_per_host, k.host_memory, 0),
        "env": [*_environment(), name],
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(k, "hosts"),
        "spec": {
            "replicas": plan.hosts,
            "selector": {"matchLabels": _labels(k, "hosts")},
            "strategy": {"type": "Recreate"},
            "template": _pod(k, "hosts", container, "Always", 30, []),
        },
    }


def _pod(
    k: Kubernetes, part: str, container: dict[str, Any], restart: str, grace: int, volumes: list[dict[str, Any]]
) -> dict[str, Any]:
    secret = f"{k.name}-{'learner' if part == 'learner' else 'host'}-keys"
    keys = {
        **_container(k, ["sh", "-c", COPY_KEYS, "keys", SECRET, KEYS + "/zrl"], 1, "64Mi", 0),
        "name": "keys",
        "volumeMounts": [
            {"name": "secret", "mountPath": SECRET, "readOnly": True},
            {"name": "keys", "mountPath": KEYS},
        ],
    }
    return {
        "metadata": {"labels": _labels(k, part)},
        "spec": {
            "restartPolicy": restart,
            "terminationGracePeriodSeconds": grace,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": k.user,
                "runAsGroup": k.user,
                "fsGroup": k.user,  # may read the Secret, which is root's
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "initContainers": [keys],
            "containers": [container],
            "volumes": [
                {"name": "secret", "secret": {"secretName": secret, "defaultMode": 0o440}},
                {"name": "keys", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": k.shm}},
                {"name": "tmp", "emptyDir": {}},
                *volumes,
            ],
        },
    }


def _container(k: Kubernetes, command: Sequence[str], cpus: int, memory: str, gpus: int) -> dict[str, Any]:
    """A container that may write nowhere but into its volumes."""
    gpu = {"nvidia.com/gpu": gpus} if gpus else {}
    return {
        "name": "zrl",
        "image": k.image,
        "command": list(command),
        "resources": {"requests": {"cpu": cpus, "memory": memory}, "limits": {"memory": memory, **gpu}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "keys", "mountPath": KEYS, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }


def _environment() -> list[dict[str, Any]]:
    """Folders that libraries write into, and output at once."""
    return [
        {"name": "HOME", "value": "/tmp"},
        {"name": "PYTHONUNBUFFERED", "value": "1"},
    ]


def _metadata(k: Kubernetes, part: str) -> dict[str, Any]:
    where = {} if k.namespace is None else {"namespace": k.namespace}
    return {"name": f"{k.name}-{part}", **where, "labels": _labels(k, part)}


def _labels(k: Kubernetes, part: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": "zrl", "app.kubernetes.io/instance": k.name, "app.kubernetes.io/component": part}


def _literal(word: str) -> str:
    """For a command: Kubernetes puts variables in for ``$(NAME)``, and one dollar for two."""
    return word.replace("$", "$$")


# ── YAML ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9./_-]*")
_WORDS = {"true", "false", "yes", "no", "on", "off", "y", "n", "null"}  # which are no texts


def _block(value: Any) -> list[str]:
    """Mappings and lists in block style, a line each."""
    lines = []
    if isinstance(value, Mapping):
        for key, item in value.items():
            lines += _item(f"{_scalar(key)}:", item)
    else:
        for item in value:
            if isinstance(item, Mapping):
                first, *rest = _block(item)
                lines += [f"- {first}", *(f"  {line}" for line in rest)]
            else:
                lines += _item("-", item)
    return lines


def _item(head: str, value: Any) -> list[str]:
    if isinstance(value, Mapping | list) and value:
        return [head, *(f"  {line}" for line in _block(value))]
    if isinstance(value, str) and "\n" in value:  # a script of ours
        return [f"{head} |", *(f"  {line}" for line in value.splitlines())]
    return [f"{head} {_scalar(value)}"]


def _scalar(value: Any) -> str:
    """A scalar, or something empty. Texts are quoted as JSON quotes them, but for plain ones."""
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)
