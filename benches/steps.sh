#!/usr/bin/env bash
# Whole training steps on one NVIDIA card: the cases of docs/src/performance.md, ours beside PEFT and Unsloth where
# python3 has them, from programs that were built elsewhere. About six minutes on an H100 with both peers.
#
# usage: benches/steps.sh BIN OUT [PART...]      from the repository's root; parts: short long batch vocabulary large memory
#   BIN  qlora-bench
#   OUT  takes a JSON file per part
set -uo pipefail
bin=$(realpath "$1") out=$(realpath "$2")
shift 2
parts=${*:-batch short long vocabulary large memory}
export CUDA_PATH=${CUDA_PATH:-/usr/local/cuda} PYTHONUNBUFFERED=1
peers=() peft=() unsloth=()
if python3 -c 'import torch, bitsandbytes, peft' 2>/dev/null; then peft=(--peer-script benches/peers/bench_step_peft.py); fi
if python3 -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("unsloth"))' 2>/dev/null; then
    unsloth=(--peer-script benches/peers/bench_step_unsloth.py)
fi
beside() { [ $# = 0 ] || echo --peer python3 "$@"; }
# measure PART SECONDS ARGUMENTS...
measure() {
    local part=$1 limit=$2
    shift 2
    case " $parts " in *" $part "*) ;; *) return ;; esac
    echo "== $part"
    # shellcheck disable=SC2046
    timeout "$limit" "$bin/qlora-bench" step --device cuda --json "$out/step-$part.json" "$@" 2>&1
    echo "   $SECONDS s so far"
}

# 7B, as much as PEFT needs and as little as Unsloth does.
measure batch 200 --policy selective,full,offload --case 4x2048 $(beside "${unsloth[@]}" "${peft[@]}")
measure short 120 --policy full --case 1x2048,4x512 $(beside "${unsloth[@]}" "${peft[@]}")
measure long 160 --policy selective,offload --case 1x16384 --steps 3 --warm-up 1 $(beside "${unsloth[@]}")
# 128 thousand words: the logits.
measure vocabulary 120 --shape llama-3.1-8b --policy selective,full --case 4x2048 --steps 5 $(beside "${peft[@]}")
# 70B, the optimizer's state in the host's memory.
measure large 120 --shape llama-2-70b --policy full --case 1x512,1x2048 --set train.optimizer_budget=0MiB --steps 3 --warm-up 1
# Flat over a thousand steps.
measure memory 60 --shape tiny --policy full --case 4x64 --steps 1000
