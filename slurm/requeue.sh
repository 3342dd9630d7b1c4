# How a job that can go on is started anew, and when SLURM does so by itself. Sourced after common.sh; whoever sources it
# says by `so_far` from where the next start goes on.

# shellcheck shell=bash disable=SC2154
not_requeued=7 # exit code: stopped and saved, and nobody starts it again; no rank ends with it (pal_ds/errors.py)

rest() { sleep "$1" & wait $! || true; } # unlike a plain sleep it does not hold back the end of the job

nodes_answer() {
  timeout 60 srun --overlap --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 true 2>/dev/null
}

end_unfinished() { # never with 0: jobs that wait for this one (afterok) would take it for finished
  say "$*; submit it again to go on from $(so_far)"
  exit "$((exit_code > 0 ? exit_code : not_requeued))"
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

requeue() { # starts the job anew unless SLURM does so itself
  local notice left
  leave_if_slurm_acts
  notice=$(job_field PreemptTime)
  if [ -n "$notice" ] && [ "$notice" != None ]; then
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
