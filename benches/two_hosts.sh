#!/bin/bash
# Two hosts on one machine: two network namespaces, joined by a virtual cable. The ranks of either see no network but the cable.
#   benches/two_hosts.sh
# 1. Two ranks on each train the recorded tiny model together; losses and adapter must be those of one process.
# 2. The same by launchers over both, as far as they are at hand: torchrun on each host, Open MPI's mpirun (whose remote shell is a command in
#    the other namespace), and a Slurm of two nodes.
# 3. The cable is cut (ip link set down) while they train: all four must end within 60 s, with a message that names a rank and a host.
# Wants root, ip (Debian: iproute2), and `qlora` in the PATH or its path in QLORA; torchrun's in TORCHRUN. The default timeouts hold: 45 s of
# silence.
set -euo pipefail
[ "$(id -u)" = 0 ] || { echo "network namespaces are made by root"; exit 2; }
. "$(dirname "$0")/setup.sh"
torchrun=$(command -v "${TORCHRUN:-torchrun}" || true)
a=qlora-a-$$ b=qlora-b-$$
pids=()
end() {
    for pid in "${pids[@]}"; do kill -9 "$pid" 2> /dev/null || true; done
    for space in $a $b; do ip netns del "$space" 2> /dev/null || true; done
    rm -rf "$work"
}
trap end EXIT
for space in $a $b; do
    ip netns add "$space" || { echo "this machine gives no network namespaces"; exit 2; }
    ip -n "$space" link set lo up
done
ip -n $a link add cable type veth peer name cable netns $b
ip -n $a addr add 10.77.0.1/24 dev cable
ip -n $b addr add 10.77.0.2/24 dev cable
for space in $a $b; do ip -n "$space" link set cable up; done

write_run "$root/testdata/reference/tiny-llama" 40 96 8

# A command on a host: in its namespace, with its name, and with both names known.
printf '127.0.0.1 localhost\n10.77.0.1 host-a\n10.77.0.2 host-b\n' > hosts
cat > on <<ON
#!/bin/bash
case \$1 in host-a) space=$a ;; host-b) space=$b ;; *) exit 2 ;; esac
exec nsenter --net="/run/netns/\$space" unshare --uts --mount bash -c 'hostname "\$0" && mount --bind $work/hosts /etc/hosts && exec "\$@"' "\$@"
ON
printf '#!/bin/bash\nhost=$1\nshift\nexec %s/on "$host" bash -c "$*"\n' "$work" > agent
chmod +x on agent

# A rank of the host that is given.
rank() { # host, rank, its number on the host, then flags
    local host=$1 rank=$2 local=$3
    shift 3
    RANK=$rank WORLD_SIZE=4 LOCAL_RANK=$local LOCAL_WORLD_SIZE=2 MASTER_ADDR=10.77.0.1 MASTER_PORT=29511 RAYON_NUM_THREADS=1 \
        ./on "$host" "$qlora" train qlora.toml "$@" > "rank-$rank.log" 2>&1 &
    pids+=($!)
}
all() { # flags
    pids=()
    rank host-a 0 0 "$@"
    rank host-a 1 1 "$@"
    rank host-b 2 0 "$@"
    rank host-b 3 1 "$@"
}
losses() { python3 -c '
import json, sys
for line in open(sys.argv[1] + "/metrics.jsonl"):
    entry = json.loads(line)
    print({key: entry[key] for key in ("step", "loss", "grad_norm", "eval_loss") if key in entry})' "$1"; }

"$qlora" train qlora.toml --output-dir one --gradient-accumulation-steps 4 > one.log 2>&1 || { cat one.log; exit 1; }
all --output-dir two --gradient-accumulation-steps 1
for pid in "${pids[@]}"; do wait "$pid" || { tail -n 5 rank-*.log; echo "a rank failed"; exit 1; }; done
same() { # output folder, log of rank 0
    grep -h "4 ranks on 2 hosts, by " "$2" || { cat "$2"; exit 1; }
    cmp <(losses one) <(losses "$1")
    cmp one/adapter/adapter_model.safetensors "$1/adapter/adapter_model.safetensors"
    echo "$1: losses and adapter of one process"
}
same two rank-0.log

export RAYON_NUM_THREADS=1
flags=(--gradient-accumulation-steps 1 --output-dir)
if [ -n "$torchrun" ]; then
    pids=()
    for node in 0 1; do
        host=$([ $node = 0 ] && echo host-a || echo host-b)
        ./on "$host" "$torchrun" --no-python --nnodes 2 --node-rank $node --master-addr host-a --nproc-per-node 2 \
            "$qlora" train qlora.toml "${flags[@]}" torchrun > "torchrun-$node.log" 2>&1 &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || { cat torchrun-*.log; exit 1; }; done
    same torchrun torchrun-0.log
else
    echo "no torchrun in the PATH: left out (set TORCHRUN)"
fi
openmpi=$(command -v mpirun.openmpi || true)
if [ -n "$openmpi" ]; then
    OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 ./on host-a "$openmpi" --mca plm_rsh_agent "$work/agent" --oversubscribe -n 4 \
        --host host-a:2,host-b:2 -x MASTER_ADDR=host-a -x RAYON_NUM_THREADS "$qlora" train qlora.toml "${flags[@]}" openmpi \
        > openmpi.log 2>&1 || { cat openmpi.log; exit 1; }
    same openmpi openmpi.log
else
    echo "no mpirun.openmpi in the PATH: left out (Debian: openmpi-bin)"
fi
if PATH=$PATH:/usr/sbin command -v slurmctld > /dev/null; then
    SLURM_HOSTS="host-a host-b" SLURM_ON=$work/on "$root/benches/slurm.sh" srun --nodes 2 --ntasks-per-node 2 \
        "$qlora" train qlora.toml "${flags[@]}" slurm > slurm.log 2>&1 || { cat slurm.log; exit 1; }
    same slurm slurm.log
else
    echo "no slurmctld in the PATH: left out (Debian: slurmctld slurmd slurm-client munge)"
fi

all --output-dir cut --gradient-accumulation-steps 1 --max-steps 100000
for _ in $(seq 300); do
    [ -s cut/metrics.jsonl ] && [ "$(wc -l < cut/metrics.jsonl)" -ge 3 ] && break
    sleep 0.1
done
ip -n $b link set cable down
cut=$(date +%s.%N)
failed=0
for rank in 0 1 2 3; do
    code=0
    wait "${pids[rank]}" || code=$?
    took=$(python3 -c "import time; print(round(time.time() - $cut, 1))")
    message=$(grep -h "^error" "rank-$rank.log" | head -n 1 || true)
    echo "rank $rank ended with $code, $took s after the cut: $message"
    python3 -c "raise SystemExit(not ($took < 60 and $code in (1, 4)))" || failed=1
    grep -q "^error: rank [0-3] on host-[ab]: " "rank-$rank.log" || failed=1
done
[ $failed = 0 ] || { echo "the cable was cut, and a rank did not end as it should"; exit 1; }
[ -n "$(ls -d cut/checkpoint-* 2> /dev/null)" ] || { echo "rank 0 saved nothing"; exit 1; }
echo "a cut cable: all ranks ended by name, and rank 0 saved $(basename "$(ls -d cut/checkpoint-* | tail -n 1)")"
