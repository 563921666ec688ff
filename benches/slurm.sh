#!/bin/bash
# Starts a Slurm in a temporary folder (munged, slurmctld, slurmd), runs the command that it is given under it, and ends it:
#   benches/slurm.sh srun -n 2 --overcommit hostname
# Its one node is this host; or its nodes are SLURM_HOSTS, on which `SLURM_ON HOST COMMAND...` runs a command with that name as the host's, all seeing this
# file system (two_hosts.sh has such hosts); the command then runs on the first. SLURM_CPUS says how many processors a node has, 8 without it: they are
# counted, not bound.
# Wants root, Debian's slurmctld, slurmd, slurm-client and munge, and names of hosts that resolve on all of them. Nothing outside the folder is
# written, and no service is used that runs already.
set -euo pipefail
PATH=$PATH:/usr/sbin
for program in munged slurmctld slurmd srun; do
    command -v "$program" > /dev/null || { echo "no $program: apt-get install slurmctld slurmd slurm-client munge"; exit 2; }
done
[ "$(id -u)" = 0 ] || { echo "slurmd starts tasks as their users, for which it has to be root"; exit 2; }
read -ra hosts <<< "${SLURM_HOSTS:-$(hostname -s)}"
on() { # host, command; replaces this process
    [ -n "${SLURM_ON:-}" ] || shift
    exec ${SLURM_ON:-} "$@"
}
first() { (on "${hosts[0]}" "$@"); }
dir=$(mktemp -d)
munge=$dir/munge
pids=()
end() {
    # Tasks are no children of slurmd, and would outlive it.
    first scancel --me --full > /dev/null 2>&1 || true
    for _ in $(seq 100); do [ -z "$(first squeue -h 2> /dev/null)" ] && break; sleep 0.1; done
    # Those that were started here, the last first.
    for ((i = ${#pids[@]} - 1; i >= 0; i--)); do kill "${pids[i]}" 2> /dev/null || true; done
    for pid in "${pids[@]}"; do wait "$pid" 2> /dev/null || true; done
    rm -rf "$dir"
}
trap end EXIT
mkdir -p "$munge" "$dir/state" "${hosts[@]/#/$dir/spool-}"
# munged refuses a socket below a folder that others can write to.
chmod 755 "$dir" "$munge"
head -c 1024 /dev/urandom > "$munge/key"
chmod 600 "$munge/key"
munged --foreground --force --key-file="$munge/key" --socket="$munge/socket" --pid-file="$munge/pid" --log-file="$munge/log" \
    --seed-file="$munge/seed" > /dev/null 2>&1 &
pids+=($!)
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }
cat > "$dir/slurm.conf" <<CONF
ClusterName=bench
SlurmctldHost=${hosts[0]}
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
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
# A job that is queued again waits for its old credentials to expire (cred_expire above, 120 s without it), then for its turn.
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
$(printf "NodeName=%s CPUs=${SLURM_CPUS:-8} State=UNKNOWN\n" "${hosts[@]}")
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$dir/slurm.conf
for _ in $(seq 50); do [ -S "$munge/socket" ] && break; sleep 0.1; done
on "${hosts[0]}" slurmctld -D > "$dir/slurmctld.out" 2>&1 &
pids+=($!)
for host in "${hosts[@]}"; do
    on "$host" slurmd -D > "$dir/slurmd-$host.out" 2>&1 &
    pids+=($!)
done
for _ in $(seq 150); do
    [ "$(first sinfo -h -t idle -o %D 2> /dev/null || true)" = ${#hosts[@]} ] && ready=1 && break
    sleep 0.2
done
[ -n "${ready:-}" ] || { tail -n 20 "$dir"/*.log "$dir"/*.out "$munge/log"; echo "the nodes do not become idle"; exit 1; }
first "$@"
