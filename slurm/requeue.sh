# How a job that can go on is started anew, when SLURM does so by itself, and when it is given up. Sourced after common.sh.
# Whoever sources it says by `so_far` from where the next start goes on, by `saved` (a word) what the starts have saved
# for it, and by `ledger` in which folder the starts are written down.

# shellcheck shell=bash disable=SC2034,SC2154
max_failures=3   # failed starts in a row that saved nothing new, before a job is given up
max_starts=10    # starts in a row that saved nothing new, however they ended
save_oftener=""  # what else a person may do so that a start saves something
stopped_early=75 # exit code: `embed` was stopped before the end; what it has encoded is kept (pal_ds/errors.py)
not_requeued=7   # exit code: stopped and saved, and nobody starts it again; no rank ends with it (pal_ds/errors.py)

rest() { sleep "$1" & wait $! || true; } # unlike a plain sleep it does not hold back the end of the job

nodes_answer() {
  timeout 60 srun --overlap --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 true 2>/dev/null
}

await_lost_nodes() { # SLURM requeues the job when it takes one for lost, and ends this script then
  nodes_answer && return 0
  say "a node does not answer; waiting for SLURM to notice, which requeues the job then"
  rest 600
}

end_unfinished() { # never with 0: jobs that wait for this one (afterok) would take it for finished
  say "$*; submit it again to go on from $(so_far)"
  give_up
}

give_up() { # with what went wrong; where nothing did, the ranks have saved and nobody goes on
  case $exit_code in
    0 | "$stopped_early") exit "$not_requeued" ;;
    *) exit "$exit_code" ;;
  esac
}

await_slurm() { # until it says how the job is; a controller may be away for some minutes
  command -v scontrol >/dev/null || return 1
  for _ in $(seq 30); do
    [ -z "$(job_field JobState)" ] || return 0
    say "SLURM does not answer; asking again"
    rest 20
  done
  return 1
}

leave_if_slurm_acts() { # ends this start where SLURM starts the job anew, or ends it, by itself
  local state restarts
  await_slurm || end_unfinished "SLURM does not answer: not requeued"
  state=$(job_field JobState) restarts=$(job_field Restarts)
  # A node whose daemon died still runs this script when SLURM has long started the job elsewhere.
  if [ -n "$restarts" ] && [ "$restarts" != "$start" ]; then say "SLURM has started this job anew"; exit 0; fi
  case $state in
    "" | RUNNING | SIGNALING | CONFIGURING | RESIZING) ;; # the second while a signal is on its way to a node
    # Such a job has a state of its own, whatever this exit code is.
    *) say "SLURM is ending this job: $state"; exit 0 ;;
  esac
}

is_preempted() { # and in its grace
  local notice
  notice=$(job_field PreemptTime)
  [ -n "$notice" ] && [ "$notice" != None ]
}

requeue() { # starts the job anew unless SLURM does so itself
  local left
  leave_if_slurm_acts
  if is_preempted; then
    # SLURM requeues a preempted job at the end of its grace; doing so as well would start it twice.
    say "preempted; waiting for SLURM to requeue"
    left=$(seconds_left)
    rest $((${left:-0} + 120))
  fi
  for _ in 1 2 3; do
    leave_if_slurm_acts
    say "requeueing, to go on from $(so_far)"
    if scontrol requeue "$job"; then rest 300; exit 0; fi
    rest 20
  done
  end_unfinished "this job cannot be requeued"
}

# --- starts that come no further -------------------------------------------------------------------------------------

num_shards() { # of the feature cache, whoever writes them
  { find "$cache" -name '*.safetensors' 2>/dev/null || true; } | wc -l
}

record_start() { # [FACTS]: a line of this start; FACTS are further keys of its JSON
  saved_at_start=$(saved)
  printf '{"job": "%s", "start": %d, "time": "%s", "nodes": "%s", "tasks": %d, %s"saved": "%s"}\n' "$job" "$start" \
    "$(date -Is)" "$SLURM_JOB_NODELIST" "$SLURM_NTASKS" "${1:+$1, }" "$saved_at_start" >>"$ledger/starts.jsonl"
}

refuse_to_go_round() { # a job that is always stopped before it saves would be started for ever
  local starts
  starts=$(awk -v job="{\"job\": \"$job\"," -v at="\"saved\": \"$(saved)\"}" \
    'index($0, job) == 1 { n = index($0, at) ? n + 1 : 0 } END { print n + 0 }' "$ledger/starts.jsonl" 2>/dev/null) || true
  if [ "${starts:-0}" -ge "$max_starts" ]; then
    say "gave up: $starts starts in a row saved nothing beyond $(so_far). Give each more time (--time, and an earlier" \
      "notice by --signal=B:USR2@SECONDS), ${save_oftener:+$save_oftener, }or keep it from being preempted; then submit it again."
    exit "$not_requeued"
  fi
}

too_many_failures() { # notes this one; whether as many of this job in a row saved nothing new
  local at failures
  at=$(saved)
  echo "$at $exit_code $job $start" >>"$ledger/failures"
  failures=$(awk -v job="$job" -v at="$at" '$3 == job { n = $1 == at ? n + 1 : 0 } END { print n + 0 }' "$ledger/failures")
  [ "$failures" -ge "$max_failures" ]
}

fail() { # starts the job anew, unless the last starts came no further than this one
  # Ranks that SLURM's TERM meets while they start die of it; that is no failure of theirs.
  leave_if_slurm_acts
  if ! is_preempted && too_many_failures; then
    say "gave up: $max_failures failures in a row at $(so_far)"
    give_up
  fi
  say "the ranks ended with $exit_code"
  requeue
}
