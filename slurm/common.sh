# What the jobs beside this file share. Sourced, with `here` set to this folder; talks to SLURM through srun, scontrol.

# shellcheck shell=bash
root=$(cd "${here:?}/.." && pwd)
code=$root     # where the ranks import pal_ds from
container=()
srun_options=()
max_failures=3 # failed starts in a row without a new checkpoint, before a training is given up
job=$SLURM_JOB_ID
# The plain id of an array's last task means the whole array to scontrol.
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
start=${SLURM_RESTART_COUNT:-0}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# shellcheck source=slurm/site.sh
source "$here/site.sh"

say() { echo "slurm: $(date '+%F %T') job $job start $start: $*"; }
refuse() { say "error: $*" >&2; exit 2; }
# A script that ends without a word cannot be mended.
set -E
trap 'say "error: this command failed: $BASH_COMMAND" >&2' ERR

job_field() { # NAME -> its value as SLURM has it now, nothing where it does not answer
  local all
  all=" $(scontrol show job "$job" 2>/dev/null || true)"
  [[ $all =~ [[:space:]]$1=([^[:space:]]*) ]] && echo "${BASH_REMATCH[1]}"
  return 0
}

json_field() { # FILE NAME -> value of a key on the top level of a small JSON file
  sed -n "s/^.*\"$2\": *\"\{0,1\}\([^\",}]*\).*/\1/p" "$1" 2>/dev/null | sed -n '1s/^null$//p;1p' | head -n 1 || true
}

seconds_left() { # until SLURM ends the job; nothing where there is no limit
  local end
  end=$(job_field EndTime)
  # Of nothing, `date` makes midnight.
  end=$(date -d "${end:-Unknown}" +%s 2>/dev/null) || end=${SLURM_JOB_END_TIME:-}
  [ -z "$end" ] || echo $((end - $(date +%s)))
}

minutes_left() { # for the ranks: a tenth of the time, or a minute, is kept for what comes after them
  local left
  left=$(seconds_left)
  [ -z "$left" ] ||
    awk -v left="$left" 'BEGIN { margin = left / 10 < 60 ? left / 10 : 60; printf "%.2f", (left > 1 ? left - margin : 1) / 60 }'
}

free_port() { # one for the ranks to meet at, from the job's id; another at each start, and not one in use here
  local port=$((20000 + (SLURM_JOB_ID + 4001 * start) % 12000))
  while (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
  echo "$port"
}

# --- signals ---------------------------------------------------------------------------------------------------------

steps=""     # process id of srun
forwarded="" # the signal that was passed on
trapped=0

forward() { # SIGNAL
  trapped=1
  [ -z "$forwarded" ] || return 0
  forwarded=$1
  say "$1: asking the ranks to save and stop"
  # srun passes USR2 on to every rank; of TERM it would kill them on the spot.
  [ -z "$steps" ] || kill -USR2 "$steps" 2>/dev/null || true
}

run_ranks() { # words of a pal_ds command, on every task of the job -> the worst exit code in $exit_code
  MASTER_PORT=$(free_port)
  export MASTER_PORT PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH}
  # One rank's end must not kill the others while they save (KillOnBadExit); --wait ends those that hang for good.
  # Since SLURM 22.05 a step does not inherit --cpus-per-task. -P: not the checkout that happens to lie in the way.
  srun --kill-on-bad-exit=0 --wait=600 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${srun_options[@]}" \
    "${container[@]}" python -P -m pal_ds.engine.slurm "$@" &
  steps=$!
  # A signal may have come before there was anyone to tell.
  [ -z "$forwarded" ] || kill -USR2 "$steps" 2>/dev/null || true
  while :; do
    trapped=0
    wait "$steps" && exit_code=0 || exit_code=$?
    # A trapped signal ends `wait`, not the step.
    [ "$trapped" = 1 ] || break
  done
}

# --- the record of a training ----------------------------------------------------------------------------------------

snapshot() { # RECIPE -> $record/: code and recipe as the job was submitted with; a requeued job goes on with those
  record=$run_dir/slurm/$job
  mkdir -p "$record"
  if [ ! -d "$record/code" ]; then
    rm -rf "$record/code.part"
    mkdir "$record/code.part"
    # Hidden files may hold keys; nothing of the environment is written anywhere either.
    tar -C "$root" --exclude='.*' --exclude=__pycache__ -cf - pal_ds ds_configs slurm | tar -C "$record/code.part" -xf -
    git -C "$root" describe --always --dirty >"$record/commit" 2>/dev/null || true
    cp "$1" "$record/recipe.yaml"
    mv "$record/code.part" "$record/code"
  fi
  code=$(cd "$record/code" && pwd)
}

checkpoint_step() { # 0 where there is none
  local step
  step=$(json_field "$run_dir/latest.json" step)
  echo "${step:-0}"
}

refuse_second_job() { # two jobs in one run directory would write over each other
  local other
  other=$(tail -n 1 "$run_dir/slurm/starts.jsonl" 2>/dev/null | sed 's/^{"job": "\([^"]*\)".*/\1/') || true
  if [ -n "$other" ] && [ "$other" != "$job" ] && [ -n "$(squeue -h -t RUNNING -j "$other" 2>/dev/null || true)" ]; then
    refuse "$run_dir: job $other is training there. Wait for it or cancel it, or name another --run_dir."
  fi
}

record_start() { # the updates between the newest checkpoint and the last logged one are made again
  local logged
  step_at_start=$(checkpoint_step)
  logged=$(tail -n 2 "$run_dir/metrics.jsonl" 2>/dev/null | sed -n 's/^{"step": \([0-9]*\),.*}$/\1/p' | tail -n 1) || true
  printf '{"job": "%s", "start": %d, "time": "%s", "nodes": "%s", "tasks": %d, "logged_step": %d, "checkpoint_step": %d}\n' \
    "$job" "$start" "$(date -Is)" "$SLURM_JOB_NODELIST" "$SLURM_NTASKS" "${logged:-0}" "$step_at_start" \
    >>"$run_dir/slurm/starts.jsonl"
}

too_many_failures() { # notes this one; whether as many in a row came no further than the newest checkpoint
  local at failures
  at=$(checkpoint_step)
  echo "$at $exit_code $job $start" >>"$run_dir/slurm/failures"
  failures=$(tail -n "$max_failures" "$run_dir/slurm/failures" | grep -c "^$at ")
  [ "$failures" -ge "$max_failures" ]
}

# --- the end of a start ----------------------------------------------------------------------------------------------

rest() { sleep "$1" & wait $! || true; } # unlike a plain sleep it does not hold back the end of the job

nodes_answer() {
  timeout 60 srun --overlap --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 true 2>/dev/null
}

requeue() { # starts the job anew unless SLURM does so itself
  local notice left
  for _ in $(seq 30); do # a controller may be away for some minutes
    [ -z "$(job_field JobState)" ] || break
    say "SLURM does not answer; asking again"
    rest 20
  done
  # A node whose daemon died still runs this script when SLURM has long started the job elsewhere.
  [ "$(job_field Restarts)" = "$start" ] || { say "SLURM has started this job anew"; exit 0; }
  notice=$(job_field PreemptTime)
  if [ -n "$notice" ] && [ "$notice" != None ]; then
    # SLURM requeues a preempted job at the end of its grace; doing so as well would start it twice.
    say "preempted; waiting for SLURM to requeue"
    left=$(seconds_left)
    rest $((${left:-0} + 120))
  fi
  [ "$(job_field JobState)" = RUNNING ] || { say "SLURM is ending this job: $(job_field JobState)"; exit 0; }
  say "requeueing, to go on from update $(checkpoint_step)"
  scontrol requeue "$job" || { say "this job cannot be requeued; submit it again to go on"; exit 0; }
  rest 300
  exit 0
}

finish() { # ends the job as the ranks left it: done, requeued, or failed with their exit code (pal_ds/errors.py)
  local state reason
  trap : USR2 TERM # there is no one left to tell
  # SLURM's own TERM reaches every process here, those that read for us too; a moment later it says what it is up to.
  [ "$forwarded" != TERM ] || rest 1
  state=$(json_field "$run_dir/status.json" state) || state=$(json_field "$run_dir/status.json" state)
  reason=$(json_field "$run_dir/status.json" reason) || reason=$(json_field "$run_dir/status.json" reason)
  cp "$run_dir/config.yaml" "$record/" 2>/dev/null || true
  case $exit_code in
    0)
      say "${state:-done}${reason:+, $reason}, at update $(checkpoint_step)"
      [ "$state" != finished ] || : >"$record/finished"
      if [ "$state" != stopped ] || [ "$reason" = stop_after ]; then exit 0; fi
      # Too little time for a single update would go on for ever.
      if [ "$reason" = "time limit" ] && [ "$(checkpoint_step)" = "$step_at_start" ]; then fail; fi
      requeue
      ;;
    # A step that could not be launched ends with 1, too.
    [1-4]) if nodes_answer; then say "failed with exit code $exit_code"; exit "$exit_code"; fi ;;
  esac
  # Asked to stop while still starting: the ranks may have died of the signal itself.
  [ -z "$forwarded" ] || requeue
  if ! nodes_answer; then
    say "a node does not answer; waiting for SLURM to notice, which requeues the job then"
    rest 600
  fi
  fail
}

fail() { # starts the job anew, unless the last starts came no further than this one
  if too_many_failures; then
    say "gave up: $max_failures failures in a row at update $(checkpoint_step)"
    exit "$((exit_code > 0 ? exit_code : 1))"
  fi
  say "the ranks ended with $exit_code"
  requeue
}

train() { # RECIPE RUN_DIR [words of `pal-ds train`]
  local recipe=$1 limit
  run_dir=$2
  shift 2
  [ -f "$recipe" ] || refuse "$recipe: no such recipe (looked from $PWD)"
  refuse_second_job
  snapshot "$recipe"
  # SLURM 24.11 starts a job that was preempted once again after its end.
  [ ! -e "$record/finished" ] || { say "finished by an earlier start"; exit 0; }
  record_start
  trap 'forward USR2' USR2
  trap 'forward TERM' TERM
  limit=$(minutes_left)
  say "$SLURM_NTASKS ranks on $SLURM_JOB_NODELIST${limit:+, $limit minutes}: $run_dir"
  # First, so that a limit among the given words wins.
  run_ranks train --config "$record/recipe.yaml" --run_dir "$run_dir" \
    ${limit:+--train.time_limit_minutes="$limit"} "$@"
  finish
}
