# What the jobs beside this file share: facts of the job, signals, steps. Sourced, with `here` set to this folder.

# shellcheck shell=bash disable=SC2034
root=$(cd "${here:?}/.." && pwd)
code=$root     # where the ranks import pal_ds from
# An installed wheel keeps these scripts in PREFIX/share/pal_ds, and the package where its Python looks.
for place in "$root"/../../lib/python3*/{site,dist}-packages; do
  if [ ! -d "$code/pal_ds" ] && [ -d "$place/pal_ds" ]; then code=$(cd "$place" && pwd); fi
done
packages=$code # before a job takes its snapshot
container=()
srun_options=()
job=$SLURM_JOB_ID
# The plain id of an array's last task means the whole array to scontrol.
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
start=${SLURM_RESTART_COUNT:-0}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# shellcheck source=slurm/site.sh
source "$here/site.sh"

say() { echo "slurm: $(date '+%F %T') job $job start $start: $*"; }
refuse() { say "error: $*" >&2; exit 2; }
# Before 4.4 an empty array counts as unset.
[ -d "$packages/pal_ds" ] || refuse "$root: neither a checkout of pal_ds nor the share/pal_ds of an installed one."
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || refuse "bash $BASH_VERSION: 4.4 or later is needed."
# A script that ends without a word cannot be mended.
set -E
trap 'say "error: this command failed: $BASH_COMMAND" >&2' ERR

as_paths() { # NAME...: gives the paths in these variables a ./ where they are relative, so that no program reads an option
  local name
  for name in "$@"; do
    case ${!name} in
      "" | /* | ./* | ../*) ;;
      *) printf -v "$name" './%s' "${!name}" ;;
    esac
  done
}

job_field() { # NAME -> its value as SLURM has it now, nothing where it does not answer
  local all
  all=" $(scontrol show job "$job" 2>/dev/null || true)"
  [[ $all =~ [[:space:]]$1=([^[:space:]]*) ]] && echo "${BASH_REMATCH[1]}"
  return 0
}

json_field() { # FILE NAME -> value of a key on the top level of a small JSON file
  sed -n "s/^.*\"$2\": *\"\{0,1\}\([^\",}]*\).*/\1/p" -- "$1" 2>/dev/null | sed -n '1s/^null$//p;1p' | head -n 1 || true
}

seconds_left() { # until SLURM ends the job; nothing where there is no limit
  local end
  end=$(job_field EndTime)
  # Of nothing, `date` makes midnight.
  end=$(date -d "${end:-Unknown}" +%s 2>/dev/null) || end=${SLURM_JOB_END_TIME:-}
  [ -z "$end" ] || echo $((end - $(date +%s)))
}

minutes_left() { # for the ranks: a fifth of the time, or three minutes, is kept for what is none of theirs
  local left
  left=$(seconds_left)
  # Their clock starts with their process: not while srun and a container start. Afterwards the job requeues itself.
  [ -z "$left" ] ||
    awk -v left="$left" 'BEGIN { margin = left / 5 < 180 ? left / 5 : 180; printf "%.2f", (left > 1 ? left - margin : 1) / 60 }'
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

attend() { # COMMAND...: runs it, with signals passed on -> its exit code in $exit_code
  "$@" &
  steps=$!
  # A signal may have come before there was anyone to tell.
  [ -z "$forwarded" ] || kill -USR2 "$steps" 2>/dev/null || true
  while :; do
    trapped=0
    wait "$steps" && exit_code=0 || exit_code=$?
    # A trapped signal ends `wait`, not the step.
    [ "$trapped" = 1 ] || break
  done
  steps=""
}

# Since SLURM 22.05 a step does not inherit --cpus-per-task. -P: not the checkout that happens to lie in the way.

run_ranks() { # words of a pal_ds command, on every task of the job -> the worst exit code in $exit_code
  MASTER_PORT=$(free_port)
  export MASTER_PORT
  # One rank's end must not kill the others while they save (KillOnBadExit); --wait ends those that hang for good.
  PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH} attend srun --kill-on-bad-exit=0 --wait=600 \
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${srun_options[@]}" "${container[@]}" python -P -m pal_ds.distributed.slurm "$@"
}

run_one() { # words for Python, in one process where ranks would run: in their container -> $exit_code
  PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH} attend srun --nodes=1 --ntasks=1 --ntasks-per-node=1 \
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${srun_options[@]}" "${container[@]}" python -P "$@"
}
