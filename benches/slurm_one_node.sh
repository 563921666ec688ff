#!/bin/bash
# Starts a Slurm of one node in a temporary folder (munged, slurmctld, slurmd), runs the command that it is given under it and ends it:
#   benches/slurm_one_node.sh srun -n 2 --overcommit hostname
# Wants root, Debian's slurmctld, slurmd, slurm-client and munge, and a host name that resolves to this host. SLURM_CPUS says how many
# processors the node has, 8 without it: they are counted, not bound. Nothing outside the folder is written, and no service is used that runs
# already.
set -euo pipefail
for program in munged slurmctld slurmd srun; do
    PATH=$PATH:/usr/sbin command -v "$program" > /dev/null || { echo "no $program: apt-get install slurmctld slurmd slurm-client munge"; exit 2; }
done
PATH=$PATH:/usr/sbin
[ "$(id -u)" = 0 ] || { echo "slurmd starts tasks as their users, for which it has to be root"; exit 2; }
dir=$(mktemp -d)
host=$(hostname -s)
pids=()
end() {
    # Tasks are no children of slurmd, and would outlive it.
    scancel --me --full > /dev/null 2>&1 || true
    for _ in $(seq 100); do [ -z "$(squeue -h 2> /dev/null)" ] && break; sleep 0.1; done
    # Those that were started here, the last first.
    for ((i = ${#pids[@]} - 1; i >= 0; i--)); do kill "${pids[i]}" 2> /dev/null || true; done
    for pid in "${pids[@]}"; do wait "$pid" 2> /dev/null || true; done
    rm -rf "$dir"
}
trap end EXIT
# munged refuses a socket below a folder that others can write to.
chmod 755 "$dir"
mkdir -p "$dir/munge" "$dir/state" "$dir/spool"
head -c 1024 /dev/urandom > "$dir/munge/key"
chmod 600 "$dir/munge/key"
chmod 755 "$dir/munge"
munge=$dir/munge
munged --foreground --force --key-file="$munge/key" --socket="$munge/socket" --pid-file="$munge/pid" --log-file="$munge/log" \
    --seed-file="$munge/seed" > /dev/null 2>&1 &
pids+=($!)
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }
cat > "$dir/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$munge/socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
# A job that is queued again waits for its old credentials to expire (cred_expire above, 120 s without it), then for its turn.
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
NodeName=$host CPUs=${SLURM_CPUS:-8} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$dir/slurm.conf
for _ in $(seq 50); do [ -S "$munge/socket" ] && break; sleep 0.1; done
slurmctld -D > "$dir/slurmctld.out" 2>&1 &
pids+=($!)
slurmd -D > "$dir/slurmd.out" 2>&1 &
pids+=($!)
for _ in $(seq 100); do
    case $(sinfo -h -o %t 2> /dev/null || true) in idle*) ready=1; break ;; esac
    sleep 0.2
done
[ -n "${ready:-}" ] || { tail -n 20 "$dir"/*.log "$dir"/*.out "$munge/log"; echo "the node does not become idle"; exit 1; }
"$@"
