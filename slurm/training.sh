# What happens around a training: its record, its start, and what becomes of the job after it. Sourced after common.sh
# and requeue.sh.

# shellcheck shell=bash disable=SC2034,SC2154
# shellcheck source=slurm/recipe.sh
source "$here/recipe.sh"
prepare_lock="" # a file: this job's data are prepared first, by one of those that name the same file

# --- the record of a training ----------------------------------------------------------------------------------------

layer() { # FILE NAME: a recipe of this job, kept as NAME in the record at the first start, with what it says of three keys
  local found
  if [ ! -d "$record/code" ]; then
    [ -f "$1" ] || refuse "$1: no such recipe (looked from $PWD)"
    cp -- "$1" "$record/$2"
    # A head, a source or a loss of one's own may lie beside the recipe.
    find "$(dirname -- "$1")" -maxdepth 1 -name '*.py' -exec cp -n -- {} "$record/" \;
  fi
  found=$(recipe_value "$record/$2" ds_config "$a_text")
  ds_config=${found:-$ds_config}
  look_into "$record/$2"
}

read_words() { # RECIPE [words] -> those for the ranks in $words, those for `pal-ds prepare` in $prepare_words
  local name value layers=1
  ds_config="" cache="" stop_signals="" fresh=0
  layer "$1" recipe.yaml
  shift
  words=() prepare_words=("--config=$record/recipe.yaml")
  while [ $# -gt 0 ]; do
    name=${1%%=*} value=${1#*=}
    case $name in
      --config | --train.ds_config | --backbone.cache | --train.stop_signals | --allow_change)
        if [ "$name" = "$1" ]; then
          [ $# -gt 1 ] || refuse "$name: names nothing"
          value=$2
          shift
        fi
        ;;
    esac
    case $name in
      --config)
        layers=$((layers + 1))
        as_paths value
        layer "$value" "recipe_$layers.yaml"
        words+=("--config=$record/recipe_$layers.yaml")
        prepare_words+=("--config=$record/recipe_$layers.yaml")
        ;;
      --fresh) fresh=1 ;; # looked after below: a second start of this job finds what the first one made
      --allow_change) words+=("$name=$value") ;;
      --trust_checkpoint) words+=("$1") ;;
      --train.ds_config) ds_config=$value words+=("$name=$value") prepare_words+=("$name=$value") ;;
      --backbone.cache) cache=$value words+=("$name=$value") prepare_words+=("$name=$value") ;;
      --train.stop_signals) stop_signals=$value words+=("$name=$value") prepare_words+=("$name=$value") ;;
      *) words+=("$1") prepare_words+=("$1") ;;
    esac
    shift
  done
}

snapshot() { # RECIPE [words] -> $record/: code and recipes as the job first found them; a requeued job goes on with those
  record=$run_dir/slurm/$job
  mkdir -p -- "$record"
  read_words "$@"
  as_paths ds_config cache
  refuse_without_usr2
  if [ ! -d "$record/code" ]; then
    if [ "$fresh" = 1 ] && [ -n "$(find "$run_dir" -mindepth 1 -maxdepth 1 ! -name slurm ! -name lock)" ]; then
      refuse "$run_dir: --fresh needs an empty directory. Name another --run_dir or empty this one."
    fi
    rm -rf -- "$record/code.part"
    mkdir -- "$record/code.part"
    [ ! -f "$ds_config" ] || cp -- "$ds_config" "$record/ds_config.json"
    # Hidden files may hold keys; nothing of the environment is written anywhere either.
    tar --exclude='.*' --exclude=__pycache__ -cf - -C "$packages" pal_ds -C "$root" ds_configs slurm |
      tar -C "$record/code.part" -xf -
    git -C "$root" describe --always --dirty >"$record/commit" 2>/dev/null || true
    mv -- "$record/code.part" "$record/code"
  fi
  code=$(cd "$record/code" && pwd)
  # The run knows this file by its path, so a copy cannot take its place.
  if [ -f "$record/ds_config.json" ] && ! cmp -s -- "$ds_config" "$record/ds_config.json"; then
    refuse "$ds_config: not what it was when this job first started ($record/ds_config.json). Restore it and requeue."
  fi
}

checkpoint_step() { # 0 where there is none
  local step
  step=$(json_field "$run_dir/latest.json" step)
  echo "${step:-0}"
}

so_far() { echo "update $(checkpoint_step)"; }

# Texts that a start has encoded into a cache are not encoded again, so they are progress as checkpoints are.
saved() { echo "$(checkpoint_step)${cache:++$(num_shards)}"; }

refuse_second_job() { # two jobs in one run directory would write over each other
  local other
  other=$(tail -n 1 -- "$run_dir/slurm/starts.jsonl" 2>/dev/null | sed 's/^{"job": "\([^"]*\)".*/\1/') || true
  if [ -n "$other" ] && [ "$other" != "$job" ] && [ -n "$(squeue -h -t RUNNING -j "$other" 2>/dev/null || true)" ]; then
    refuse "$run_dir: job $other is training there. Wait for it or cancel it, or name another --run_dir."
  fi
}

record_training() { # the updates between the newest checkpoint and the last logged one are made again
  local logged
  logged=$(tail -n 2 -- "$run_dir/metrics.jsonl" 2>/dev/null | sed -n 's/^{"step": \([0-9]*\),.*}$/\1/p' | tail -n 1) || true
  record_start "\"logged_step\": ${logged:-0}, \"checkpoint_step\": $(checkpoint_step)"
}

# --- the end of a start ----------------------------------------------------------------------------------------------

dismiss_leftover() { # of a node that SLURM takes for lost srun gives up the ranks, which train on and hold the run
  local pid
  pid=$(json_field "$run_dir/lock" pid)
  is_rank "$pid" || return 0
  say "srun has left process $pid behind: asking it to save and stop"
  kill -USR2 "$pid" || true
  for _ in $(seq 600); do
    is_rank "$pid" || return 0
    rest 1
  done
}

is_rank() { # PROCESS -> whether it runs on this node as one of this job's
  [[ $1 =~ ^[0-9]+$ ]] && tr '\0' '\n' 2>/dev/null <"/proc/$1/environ" | grep -qx "SLURM_JOB_ID=$SLURM_JOB_ID"
} 2>/dev/null

finish() { # ends the job as the ranks left it: done, requeued, or failed with their exit code (pal_ds/errors.py)
  local state reason
  trap : USR2 TERM # there is no one left to tell
  [ -z "${watcher:-}" ] || kill "$watcher" 2>/dev/null || true
  # SLURM's own TERM reaches every process here, those that read for us too; a moment later it says what it is up to.
  [ "$forwarded" != TERM ] || rest 1
  dismiss_leftover
  state=$(json_field "$run_dir/status.json" state) || state=$(json_field "$run_dir/status.json" state)
  reason=$(json_field "$run_dir/status.json" reason) || reason=$(json_field "$run_dir/status.json" reason)
  cp -- "$run_dir/config.yaml" "$record/" 2>/dev/null || true
  case $exit_code in
    0)
      say "${state:-done}${reason:+, $reason}, at update $(checkpoint_step)"
      [ "$state" != finished ] || : >"$record/finished"
      if [ "$state" = finished ] || [ "$reason" = stop_after ]; then exit 0; fi
      # srun may end with 0 where a node was lost.
      if [ "$state" != stopped ]; then leave_if_slurm_acts; fail; fi
      # Too little time for a single update would go on for ever.
      if [ "$reason" = "time limit" ] && [ "$(saved)" = "$saved_at_start" ]; then fail; fi
      requeue
      ;;
    # A step that could not be launched ends with 1, too.
    [1-4]) if nodes_answer; then say "failed with exit code $exit_code"; exit "$exit_code"; fi ;;
  esac
  # Asked to stop while still starting: the ranks may have died of the signal itself.
  [ -z "$forwarded" ] || requeue
  if [ "$exit_code" = 6 ]; then
    # What an earlier start left behind on a lost node: it finds out, saves and lets go.
    say "another process writes to $run_dir; trying again in a while"
    rest 60
    fail
  fi
  await_lost_nodes
  fail
}

# --- a start ---------------------------------------------------------------------------------------------------------

watch_for_a_newer_start() { # SLURM may have given this node up and started the job elsewhere, which waits for the run
  local restarts
  while sleep 60 >/dev/null 2>&1; do
    restarts=$(job_field Restarts)
    if [ -n "$restarts" ] && [ "$restarts" != "$start" ]; then
      say "SLURM has started this job anew"
      kill -USR2 $$
      return
    fi
  done
}

prepare() { # the jobs of a sweep may read the same data: one prepares them, the others find them prepared
  exec 9>"$prepare_lock"
  attend flock 9
  if [ "$exit_code" = 0 ]; then run_one -m pal_ds prepare "${prepare_words[@]}" 9>&-; fi
  exec 9>&-
  [ -z "$forwarded" ] || exit_code=140 # what is asked to stop has not begun
  [ "$exit_code" = 0 ] || finish
}

train() { # RECIPE RUN_DIR [words of `pal-ds train`]
  local limit recipe=$1
  run_dir=$2 exit_code=0
  as_paths recipe run_dir
  ledger=$run_dir/slurm
  save_oftener="lower train.save_every, encode ahead by slurm/embed.sbatch"
  [ -f "$recipe" ] || [ -d "$run_dir/slurm/$job/code" ] || refuse "$recipe: no such recipe (looked from $PWD)"
  refuse_second_job
  snapshot "$recipe" "${@:3}"
  # SLURM 24.11 starts a job that was preempted once again after its end.
  [ ! -e "$record/finished" ] || { say "finished by an earlier start"; exit 0; }
  refuse_to_go_round
  record_training
  trap 'forward USR2' USR2
  trap 'forward TERM' TERM
  watch_for_a_newer_start &
  watcher=$!
  disown
  [ -z "$prepare_lock" ] || prepare
  limit=$(minutes_left)
  # A limit among the given words wins.
  case " ${words[*]}" in *" --train.time"[_-]"limit"[_-]"minutes"*) limit="" ;; esac
  say "$SLURM_NTASKS ranks on $SLURM_JOB_NODELIST${limit:+, $limit minutes}: $run_dir"
  run_ranks train --config="$record/recipe.yaml" --run_dir="$run_dir" \
    ${limit:+--train.time_limit_minutes="$limit"} "${words[@]}"
  finish
}
