"""A batch script for Slurm: a heterogeneous job of two parts, the learner's node and the hosts' nodes.

    part 0   the batch script itself, on the learner's node ─► zrl learner
    part 1   one task a node, by srun ─► bash ─► zrl worker

The learner is a child of the script and no step of its own: srun answers SIGTERM by killing its tasks, and this one has
a checkpoint to save. When the learner ends it tells the hosts so, and they end by themselves.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass

from zrl.launch.plan import GO_ON, HOST_FILES, LEARNER_FILES, Plan, matches, one_line

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,-]{0,255}")
_TIME = re.compile(r"\d{1,6}(-\d{1,2})?(:\d{1,2}){0,2}")
_GPUS = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*:)?\d{1,3}")


@dataclass(frozen=True)
class Slurm:
    """What Slurm has to know.

    Attributes:
        keys: folder of the keys, on a file system that all nodes have.
        job_name, partition, account, time: as sbatch takes them; None: the cluster's default.
        host_partition: of the hosts, where it is another one than the learner's.
        cpus, gpus: of the learner; `gpus` as in ``1`` or ``a100:1``.
        activate: folder of the virtual environment that has zrl; None: the one that the job inherits.

    Raises:
        ConfigError: a value that sbatch could take for something else.
    """

    keys: str
    job_name: str = "zrl"
    partition: str | None = None
    host_partition: str | None = None
    account: str | None = None
    time: str | None = None
    cpus: int = 2
    gpus: str | None = None
    activate: str | None = None

    def __post_init__(self) -> None:
        one_line("--keys", self.keys)
        if self.activate is not None:
            one_line("--activate", self.activate)
        some = "letters, digits, '_', '.' and '-', the first a letter or digit"
        matches("--job-name", self.job_name, _NAME, f"up to 64 {some}")
        for option, value, pattern, expected in (
            ("--partition", self.partition, _NAMES, f"{some}; several with commas"),
            ("--host-partition", self.host_partition, _NAMES, f"{some}; several with commas"),
            ("--account", self.account, _NAME, some),
            ("--time", self.time, _TIME, "minutes, hours:minutes:seconds or days-hours:minutes:seconds"),
            ("--gpus", self.gpus, _GPUS, "a number, or kind:number such as a100:1"),
        ):
            if value is not None:
                matches(option, value, pattern, expected)


def script(plan: Plan, slurm: Slurm) -> str:
    """The batch script."""
    return "\n".join([*_header(plan, slurm), "", _body(plan, slurm)])


def _header(plan: Plan, slurm: Slurm) -> list[str]:
    def options(*given: str | tuple[str, object]) -> list[str]:
        return [
            f"#SBATCH --{option}" if isinstance(option, str) else f"#SBATCH --{option[0]}={option[1]}"
            for option in given
            if isinstance(option, str) or option[1] is not None
        ]

    return [
        "#!/bin/bash",
        "# Made by `zrl launch slurm`: sbatch FILE",
        *options(("job-name", slurm.job_name), ("output", "%x-%j.log")),
        "# Before the job is preempted or out of time this script gets SIGTERM, and the learner saves a checkpoint.",
        "# A job that was preempted is queued again, and goes on from there.",
        *options(("signal", "B:TERM@60"), "requeue"),
        "# A node that fails takes its host along, not the job.",
        *options("no-kill"),
        "# part 0, the learner, which runs in this script:",
        *options(("partition", slurm.partition), ("account", slurm.account), ("time", slurm.time)),
        *options(("nodes", 1), ("ntasks", 1), ("cpus-per-task", slurm.cpus), ("gpus-per-node", slurm.gpus)),
        "#SBATCH hetjob",
        "# part 1, the hosts of workers:",
        *options(
            ("partition", slurm.host_partition or slurm.partition), ("account", slurm.account), ("time", slurm.time)
        ),
        *options(("nodes", plan.hosts), ("ntasks-per-node", 1), ("cpus-per-task", plan.workers_per_host)),
    ]


def _body(plan: Plan, slurm: Slurm) -> str:
    return _filled(
        _BODY,
        keys=_path(slurm.keys),
        runs=_path(plan.runs),
        port=str(plan.port),
        files=" ".join(dict.fromkeys((*LEARNER_FILES, *HOST_FILES))),
        activate="" if slurm.activate is None else _filled(_ACTIVATE, folder=_path(slurm.activate)),
        go_on="" if plan.resumes else _filled(_RESTARTED, loop=textwrap.indent(GO_ON, "  ")),
        learner=shlex.join(plan.learner),
        worker=shlex.join(plan.worker),
        hosts=str(plan.hosts),
        cpus=str(plan.workers_per_host),
    )


def _path(text: str) -> str:
    """Quoted, and no option, however it begins."""
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def _filled(template: str, **values: str) -> str:
    """``@NAME@`` in the template, all at once: what stands in a value is never looked at."""
    return re.sub("@([A-Z_]+)@", lambda match: values[match[1].lower()], template)


_ACTIVATE = """\
set +u  # activate is not ours
# shellcheck source=/dev/null
. @FOLDER@/bin/activate
set -u
"""

_RESTARTED = """\
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then  # queued again
@LOOP@fi
"""

_BODY = r"""set -euo pipefail

keys=@KEYS@
runs=@RUNS@/job-$SLURM_JOB_ID  # the same when the job is queued again
port=@PORT@

fail() {
  echo "zrl launch: $*" >&2
  exit 2
}

@ACTIVATE@command -v zrl > /dev/null || fail "no zrl on $(hostname): name its virtual environment," \
  "zrl launch slurm --activate FOLDER"

for file in @FILES@; do
  [ -r "$keys/$file" ] || fail "$keys/$file cannot be read on $(hostname). Make the keys before sbatch," \
    "on a file system that all nodes have; docs/launch.md has the three commands"
done

# Workers subscribe at this address as well: it must be one of this node that other nodes can reach.
address=${LEARNER_ADDRESS:-}
if [ -z "$address" ]; then
  found=$(getent ahostsv4 "$(hostname)" || true)
  address=$(awk '$2 == "STREAM" && $1 !~ /^127[.]/ && !n++ { print $1 }' <<< "$found")
fi
[ -n "$address" ] || fail "$(hostname) has no address in the network that it knows by its own name:" \
  "submit with LEARNER_ADDRESS=ADDRESS sbatch FILE"
echo "learner on $(hostname), tcp://$address:$port; run folders in $runs"

# shellcheck disable=SC2016  # words are passed on as they are
set -- @LEARNER@
@GO_ON@
stops=0
stop() {
  stops=$((stops + 1))
  if [ "$stops" = 1 ]; then  # a second signal would kill it
    kill -TERM "$learner" 2> /dev/null || true
  fi
}

zrl learner "$@" --bind "tcp://$address:$port" --keys "$keys" --runs "$runs" &
learner=$!
trap stop TERM INT

# Workers that die are replaced by zrl worker; this is for when it dies itself. Statuses that another start would not
# change are those of wrong words, of an environment that cannot be made here, and of signals.
# shellcheck disable=SC2016  # the tasks expand it
srun --het-group=1 --nodes=@HOSTS@ --ntasks=@HOSTS@ --cpus-per-task=@CPUS@ --no-kill --kill-on-bad-exit=0 --wait=0 \
  --label --export=ALL \
  bash -c '
    for start in 1 2 3 4 5; do
      if zrl worker --id "host-$SLURM_PROCID" "$@"; then exit 0; else code=$?; fi
      case $code in 2 | 5 | 130 | 143) break ;; esac
      echo "zrl worker ended with $code, start $start of 5" >&2
      sleep 5
    done
    exit "$code"' \
  host --connect "tcp://$address:$port" --keys "$keys" @WORKER@ &
hosts=$!

while kill -0 "$learner" 2> /dev/null; do
  sleep 1  # signals are dealt with in between
  if [ -n "$hosts" ] && ! kill -0 "$hosts" 2> /dev/null; then
    if wait "$hosts"; then code=0; else code=$?; fi
    hosts=''
    # A learner without hosts waits for ever for its first ones. One that is done with them and plays its last
    # evaluation publishes no status any more.
    if [ "$code" != 0 ] && sleep 10 && zrl status "tcp://$address:$port" --keys "$keys" > /dev/null 2>&1; then
      echo "zrl launch: no host is left, the last ended with $code; the learner stops" >&2
      stop
    fi
  fi
done
if wait "$learner"; then code=0; else code=$?; fi

if [ -n "$hosts" ]; then  # they end with their learner, but wait for another one where it could not tell them
  for _ in {1..20}; do
    kill -0 "$hosts" 2> /dev/null || break
    sleep 1
  done
  kill -TERM "$hosts" 2> /dev/null || true
  wait "$hosts" || true
fi
echo "the learner ended with $code"
exit "$code"
"""
