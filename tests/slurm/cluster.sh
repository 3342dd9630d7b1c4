#!/usr/bin/env bash
# A real SLURM cluster of several nodes on one Linux machine, for tests.
#
#   cluster.sh up                start munged, slurmctld and $NODES nodes; well under a second
#   cluster.sh down              stop everything that `up` started, leave nothing behind
#   cluster.sh status            nodes as SLURM sees them, processes as the machine does
#   cluster.sh env               the export line that a shell needs: eval "$(cluster.sh env)"
#   cluster.sh kill-node n2      power the node off (SIGKILL to its whole pid namespace)
#   cluster.sh start-node n2     bring a node back that was powered off
#   cluster.sh kill-slurmd n2    kill only the daemon; processes of jobs live on
#   cluster.sh start-slurmd n2   start the daemon again, as an init system would
#   cluster.sh wait JOB [SEC]    until the job is over; prints its state (`sbatch --wait` backs off to 32 s)
#
# A node is a set of namespaces (network, host name, mounts, processes): own address, own /etc/hosts, own /dev/shm; the
# file system is shared, as on a real cluster. Needs root and, on Debian or Ubuntu,
#   apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2
# No systemd, no cgroups, no database, nothing written outside $SLURM_TEST_DIR.
set -euo pipefail

ID=${SLURM_TEST_ID:-0}                 # 0..250; clusters of different ids live side by side
D=${SLURM_TEST_DIR:-/tmp/slurm-test-$ID}
NODES=${NODES:-2}
CPUS=${CPUS:-4}                        # what a node claims to have; may exceed the machine
MEM=${MEM:-8000}                       # MB
GPUS=${GPUS:-2}                        # fake ones (links to /dev/null); 0 for none
GRACE=${GRACE:-20}                     # seconds between the notice of a preemption and the end
NET=10.199.$ID
BR=slbr$ID
PORT=$((16817 + 2 * ID))               # of slurmctld; slurmd's is the next one
CTLHOST=$(hostname -s)
conf=$D/slurm.conf
export SLURM_CONF=$conf

say() { echo "cluster.sh: $*" >&2; }
die() { say "$*"; exit 1; }
alive() { # running, and no zombie that nobody has reaped yet
  [ -n "${1:-}" ] && case $(sed 's/^.*) //' "/proc/$1/stat" 2>/dev/null) in "" | Z* | X*) return 1 ;; esac
}
start_id() { sed 's/^.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; } # start time: a pid may be used again
record() { echo "$2 $(start_id "$2")" >"$D/pids/$1"; }
pid_of() { # name -> pid, only while it is the process that we started
  local p s
  read -r p s 2>/dev/null <"$D/pids/$1" || return 1
  alive "$p" && [ "$(start_id "$p")" = "$s" ] && echo "$p"
}
stop() { # name [signal]
  local p
  p=$(pid_of "$1") || { rm -f "$D/pids/$1"; return 0; }
  kill -"${2:-TERM}" "$p" 2>/dev/null || true
  for _ in $(seq 100); do pid_of "$1" >/dev/null || break; sleep 0.05; done
  p=$(pid_of "$1") && kill -KILL "$p" 2>/dev/null || true
  rm -f "$D/pids/$1"
}

write_conf() {
  local version i gres="" preempt="" scheduler=""
  version=$(slurmctld -V | grep -oE '[0-9]+\.[0-9]+' | head -n 1)
  [ "$GPUS" -gt 0 ] && gres="Gres=gpu:$GPUS"
  case $version in # a preempted job gets the signal of its --signal; an unknown key is fatal
    1* | 20.* | 21.* | 22.*) scheduler=,preempt_send_user_signal ;;
    *) preempt=PreemptParameters=send_user_signal ;;
  esac
  cat >"$conf" <<CONF
ClusterName=test
SlurmctldHost=$CTLHOST($NET.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start; below 5 it would be the default, 120 s
AuthInfo=socket=$D/munge/munge.sock,cred_expire=5
SlurmctldPort=$PORT
SlurmdPort=$((PORT + 1))
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/slurmd.%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$D/log/jobcomp.log
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0$scheduler
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=${KILL_WAIT:-5}
SlurmdTimeout=5
SlurmctldTimeout=30
InactiveLimit=0
MinJobAge=3600
MessageTimeout=10
TCPTimeout=2
BatchStartTimeout=10
CompleteWait=0
EnforcePartLimits=ALL
MailProg=/bin/true
KillOnBadExit=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
$preempt
$([ "$GPUS" -gt 0 ] && echo GresTypes=gpu)
CONF
  for i in $(seq "$NODES"); do
    echo "NodeName=n$i NodeAddr=$NET.$((10 + i)) NodeHostname=n$i CPUs=$CPUS RealMemory=$MEM $gres State=UNKNOWN"
  done >>"$conf"
  cat >>"$conf" <<CONF
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=00:10:00 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=$GRACE
PartitionName=high Nodes=ALL MaxTime=INFINITE DefaultTime=00:10:00 State=UP PriorityTier=10 PreemptMode=OFF
CONF
  if [ "$GPUS" -gt 0 ]; then # slurmd wants character devices
    mkdir -p "$D/dev"
    for i in $(seq 0 $((GPUS - 1))); do ln -s /dev/null "$D/dev/nvidia$i"; done
    echo "Name=gpu File=$D/dev/nvidia$([ "$GPUS" = 1 ] && echo 0 || echo "[0-$((GPUS - 1))]")" >"$D/gres.conf"
  fi
  # From 23.11 on slurmd looks for cgroups even where no plugin uses them.
  case $version in 23.02 | 22.* | 21.* | 20.* | 1*) ;; *) echo CgroupPlugin=disabled >"$D/cgroup.conf" ;; esac
  : >"$D/resolv.conf"
  {
    echo "127.0.0.1 localhost"
    echo "$NET.1 $CTLHOST"
    for i in $(seq "$NODES"); do echo "$NET.$((10 + i)) n$i"; done
  } >"$D/hosts"
}

write_node_init() {
  cat >"$D/node-init.sh" <<'INIT'
#!/usr/bin/env bash
# Process 1 of a node: bash reaps orphans, the daemon runs below it.
set -u
D=$1 node=$2
hostname "$node"
[ -e /etc/hosts ] || : >/etc/hosts
mount --bind "$D/hosts" /etc/hosts
# Names come from /etc/hosts alone: a name server that cannot be reached would stall every look-up of n1 for 20 s.
mount --bind "$D/resolv.conf" "$(readlink -f /etc/resolv.conf)" 2>/dev/null || true
mount -t tmpfs -o mode=1777 tmpfs /dev/shm # as on real nodes, no shared memory between them
for _ in $(seq 200); do ip link show eth0 >/dev/null 2>&1 && [ -e "$D/net.$node" ] && break; sleep 0.05; done
while :; do
  slurmd -D -f "$D/slurm.conf" -N "$node" >>"$D/log/slurmd.$node.out" 2>&1 &
  wait $!
  # The daemon died but the machine is still there: processes of jobs live on until someone starts it again.
  while [ ! -e "$D/start.$node" ]; do sleep 0.2; done
  rm -f "$D/start.$node"
done
INIT
}

start_node() {
  local n=$1 i=${1#n} p init=""
  pid_of "node.$n" >/dev/null && { say "$n is up"; return; }
  rm -f "$D/net.$n" "$D/start.$n"
  mkdir -p "$D/spool/$n"
  ip link del "sl${ID}n$i" 2>/dev/null || true
  setsid unshare --net --uts --ipc --mount --pid --fork --kill-child --mount-proc \
    bash "$D/node-init.sh" "$D" "$n" </dev/null >>"$D/log/node.$n.log" 2>&1 &
  p=$!
  record "node.$n" "$p"
  for _ in $(seq 100); do
    init=$(tr -d ' ' 2>/dev/null <"/proc/$p/task/$p/children" || true)
    [ -n "$init" ] && [ "$(readlink "/proc/$init/ns/net" || true)" != "$(readlink /proc/self/ns/net)" ] && break
    sleep 0.05
  done
  [ -n "$init" ] || die "$n: did not start; see $D/log/node.$n.log"
  record "init.$n" "$init"
  ip link add "sl${ID}n$i" type veth peer name eth0 netns "$init"
  ip link set "sl${ID}n$i" master "$BR" up
  nsenter -t "$init" -n sh -c "ip link set lo up; ip addr add $NET.$((10 + i))/24 dev eth0; ip link set eth0 up; ip route add default via $NET.1"
  : >"$D/net.$n"
}

up() {
  local c i
  [ "$(id -u)" = 0 ] || die "needs root, for namespaces"
  for c in munged slurmctld slurmd sbatch ip unshare nsenter; do command -v "$c" >/dev/null || die "missing $c"; done
  if [ -d "$D/pids" ]; then
    pid_of slurmctld >/dev/null && { say "already up"; return; }
    down
  fi
  rm -rf "$D"
  mkdir -p "$D"/{pids,log,state,spool,munge}
  chmod 755 "$D" "$D/munge"
  write_conf
  write_node_init
  ip link add "$BR" type bridge 2>/dev/null || true
  ip addr replace "$NET.1/24" dev "$BR"
  ip link set "$BR" up
  (umask 077; head -c 1024 /dev/urandom >"$D/munge/munge.key")
  munged --force --foreground --num-threads=2 --key-file="$D/munge/munge.key" --socket="$D/munge/munge.sock" \
    --pid-file="$D/munge/munged.pid" --log-file="$D/log/munged.log" --seed-file="$D/munge/seed" \
    </dev/null >>"$D/log/munged.out" 2>&1 &
  record munged $!
  for _ in $(seq 100); do munge -S "$D/munge/munge.sock" -n >/dev/null 2>&1 && break; sleep 0.05; done
  munge -S "$D/munge/munge.sock" -n >/dev/null || die "munged did not start: $(tail -n 3 "$D/log/munged.log")"
  setsid slurmctld -D -f "$conf" </dev/null >>"$D/log/slurmctld.out" 2>&1 &
  record slurmctld $!
  for i in $(seq "$NODES"); do start_node "n$i"; done
  wait_idle
  [ -z "${SLURM_TEST_OWNER:-}" ] || watch_owner
  say "up: $(sinfo -h -p test -o '%D nodes %T')"
}

watch_owner() { # whoever asked for the cluster may be killed before it says `down`
  setsid bash -c "while kill -0 $SLURM_TEST_OWNER; do sleep 1; done; exec env SLURM_TEST_ID=$ID SLURM_TEST_DIR='$D' '$0' down" \
    </dev/null >/dev/null 2>&1 &
  record owner $!
}

wait_idle() {
  for _ in $(seq 300); do
    [ "$(sinfo -h -p test -t idle -o %D 2>/dev/null)" = "$NODES" ] && return
    sleep 0.1
  done
  sinfo >&2 || true
  tail -n 5 "$D"/log/*.log >&2
  die "the nodes did not become idle"
}

wait_serving() { # node: until SLURM would start jobs on it again
  for _ in $(seq 150); do
    case $(sinfo -h -n "$1" -p test -o %T) in
      idle | mixed | allocated) return ;;
      down* | drain*) scontrol update nodename="$1" state=resume 2>/dev/null || true ;;
    esac
    sleep 0.2
  done
  die "$1 did not come back: $(sinfo -h -n "$1" -p test -o %T)"
}

kill_slurmd() {
  local init p
  init=$(pid_of "init.$1") || die "$1 is down"
  # Process ids on one line.
  # shellcheck disable=SC2013
  for p in $(cat "/proc/$init/task/$init/children"); do
    [ "$(cat "/proc/$p/comm")" = slurmd ] && { kill -KILL "$p"; say "killed slurmd of $1"; return; }
  done
  die "$1: no slurmd"
}

kill_node() {
  stop "node.$1" KILL
  stop "init.$1" KILL
  ip link del "sl${ID}n${1#n}" 2>/dev/null || true
  say "$1 powered off"
}

down() {
  local f
  [ -d "$D/pids" ] || { say "nothing to stop"; return; }
  [ "$(pid_of owner || true)" = $$ ] || stop owner
  for f in "$D"/pids/node.*; do [ ! -e "$f" ] || kill_node "${f##*/node.}" 2>/dev/null; done
  stop slurmctld
  stop munged
  ip link del "$BR" 2>/dev/null || true
  [ "${KEEP:-0}" = 1 ] || rm -rf "$D"
  say down
}

status() {
  local f
  sinfo -N -l
  for f in "$D"/pids/*; do echo "${f##*/} $(pid_of "${f##*/}" || echo dead)"; done
}

wait_job() { # job [seconds]
  local state
  for _ in $(seq $((${2:-120} * 5))); do
    state=$(scontrol show job "$1" 2>/dev/null | grep -oP 'JobState=\K\S+' || true)
    case $state in COMPLETED | FAILED | CANCELLED | TIMEOUT | NODE_FAIL | PREEMPTED | OUT_OF_MEMORY | BOOT_FAIL | DEADLINE)
      echo "$state"
      return ;;
    esac
    sleep 0.2
  done
  die "job $1 is still $state after ${2:-120} s"
}

case ${1:-} in
  up) up ;;
  down) down ;;
  status) status ;;
  env) echo "export SLURM_CONF=$conf" ;;
  kill-node) kill_node "$2" ;;
  kill-slurmd) kill_slurmd "$2" ;;
  start-node) start_node "$2"; wait_serving "$2" ;;
  start-slurmd) : >"$D/start.$2"; wait_serving "$2" ;;
  wait) wait_job "$2" "${3:-}" ;;
  *) sed -n '2,18p' "$0"; exit 2 ;;
esac
