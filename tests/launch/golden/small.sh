#!/bin/bash
# Made by `zrl launch slurm`: sbatch FILE
#SBATCH --job-name=zrl
#SBATCH --output=%x-%j.log
# Before the job is preempted or out of time this script gets SIGTERM, and the learner saves a checkpoint.
# A job that was preempted is queued again, and goes on from there.
#SBATCH --signal=B:TERM@60
#SBATCH --requeue
# A node that fails takes its host along, not the job.
#SBATCH --no-kill
# part 0, the learner, which runs in this script:
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH hetjob
# part 1, the hosts of workers:
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4

set -euo pipefail

keys=keys
runs=runs/job-$SLURM_JOB_ID  # the same when the job is queued again
port=5555

fail() {
  echo "zrl launch: $*" >&2
  exit 2
}

command -v zrl > /dev/null || fail "no zrl on $(hostname): name its virtual environment," \
  "zrl launch slurm --activate FOLDER"

for file in server.secret server.public authorized/hosts.public hosts.secret hosts.public; do
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
set -- CartPole-v1 --algo a2c --workers 4
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then  # queued again
  for run in "$runs"/*/; do
    for checkpoint in "$run"checkpoints/step_*.pt; do
      if [ -e "$checkpoint" ]; then
        set -- "$@" --resume "$run"
        break
      fi
    done
  done
fi

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
srun --het-group=1 --nodes=1 --ntasks=1 --cpus-per-task=4 --no-kill --kill-on-bad-exit=0 --wait=0 \
  --label --export=ALL \
  bash -c '
    for start in 1 2 3 4 5; do
      if zrl worker --id "host-$SLURM_PROCID" "$@"; then exit 0; else code=$?; fi
      case $code in 2 | 5 | 130 | 143) break ;; esac
      echo "zrl worker ended with $code, start $start of 5" >&2
      sleep 5
    done
    exit "$code"' \
  host --connect "tcp://$address:$port" --keys "$keys" --count 4 &
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
