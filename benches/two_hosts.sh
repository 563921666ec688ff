#!/bin/bash
# Two hosts on one machine: two network namespaces, joined by a virtual cable. The ranks of either see no network but the cable.
#   benches/two_hosts.sh
# 1. Two ranks on each train the recorded tiny model together; losses and adapter must be those of one process.
# 2. The cable is cut (ip link set down) while they train: all four must end within 60 s, with a message that names a rank and a host.
# Wants root, ip (Debian: iproute2), and `qlora` in the PATH or its path in QLORA. The default timeouts hold: 45 s of silence.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
qlora=$(command -v "${QLORA:-qlora}") || { echo "no qlora in the PATH: build it, and set QLORA to its path"; exit 2; }
[ "$(id -u)" = 0 ] || { echo "network namespaces are made by root"; exit 2; }
work=$(mktemp -d)
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

cd "$work"
head -n 40 "$root/examples/quickstart/word_problems.jsonl" > rows.jsonl
cat > qlora.toml <<TOML
device = "cpu"
[model]
path = "$root/testdata/reference/tiny-llama"
[lora]
rank = 4
dropout = 0.1
[data]
train = "rows.jsonl"
max_length = 96
eval_fraction = 0.2
[train]
max_steps = 8
batch_size = 2
learning_rate = 1e-3
TOML

# A rank of the host that is given, in its namespace and with its name.
rank() { # namespace, host name, rank, its number on the host, then flags
    local space=$1 host=$2 rank=$3 local=$4
    shift 4
    RANK=$rank WORLD_SIZE=4 LOCAL_RANK=$local LOCAL_WORLD_SIZE=2 MASTER_ADDR=10.77.0.1 MASTER_PORT=29511 RAYON_NUM_THREADS=1 \
        ip netns exec "$space" unshare --uts sh -c 'hostname "$0" && exec "$@"' "$host" "$qlora" train qlora.toml "$@" \
        > "rank-$rank.log" 2>&1 &
    pids+=($!)
}
all() { # flags
    pids=()
    rank $a host-a 0 0 "$@"
    rank $a host-a 1 1 "$@"
    rank $b host-b 2 0 "$@"
    rank $b host-b 3 1 "$@"
}
losses() { python3 -c '
import json, sys
for line in open(sys.argv[1] + "/metrics.jsonl"):
    entry = json.loads(line)
    print({key: entry[key] for key in ("step", "loss", "grad_norm", "eval_loss") if key in entry})' "$1"; }

"$qlora" train qlora.toml --output-dir one --gradient-accumulation-steps 4 > one.log 2>&1 || { cat one.log; exit 1; }
all --output-dir two --gradient-accumulation-steps 1
for pid in "${pids[@]}"; do wait "$pid" || { tail -n 5 rank-*.log; echo "a rank failed"; exit 1; }; done
grep -h "ranks on .*, by " rank-0.log
cmp <(losses one) <(losses two)
cmp one/adapter/adapter_model.safetensors two/adapter/adapter_model.safetensors
echo "two hosts: losses and adapter of one process"

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
