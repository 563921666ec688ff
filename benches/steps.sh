#!/usr/bin/env bash
# Whole training steps on one NVIDIA card: the cases of docs/src/performance.md, ours beside PEFT and Unsloth where
# python3 has them, from programs that were built elsewhere. About twenty minutes on an H100 with both peers.
#
# usage: benches/steps.sh BIN OUT [PART...]      from the repository's root; parts: batch short long longest vocabulary large memory stress pairs
#   BIN  qlora-bench
#   OUT  takes a JSON file per part
set -uo pipefail
[ $# -ge 2 ] || { echo "usage: benches/steps.sh BIN OUT [PART...]" >&2; exit 2; }
bin=$(realpath "$1") out=$(realpath "$2")
shift 2
parts=${*:-batch short long longest vocabulary large memory stress pairs}
export CUDA_PATH=${CUDA_PATH:-/usr/local/cuda} PYTHONUNBUFFERED=1
peft=() unsloth=() answers=()
if python3 -c 'import torch, bitsandbytes, peft' 2>/dev/null; then peft=(--peer-script benches/peers/bench_step_peft.py); fi
if python3 -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("unsloth"))' 2>/dev/null; then
    unsloth=(--peer-script benches/peers/bench_step_unsloth.py)
    answers=(--peer-script benches/peers/bench_step_unsloth_dpo.py)
fi
if python3 -c 'import torch, bitsandbytes, peft, trl' 2>/dev/null; then answers+=(--peer-script benches/peers/bench_step_trl.py); fi
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
measure batch 400 --policy selective,full,offload,offload_selective --case 4x2048 $(beside "${unsloth[@]}" "${peft[@]}")
measure short 300 --policy full,offload_selective --case 1x2048,4x512 $(beside "${unsloth[@]}" "${peft[@]}")
measure long 300 --policy offload,offload_selective --case 1x16384 $(beside "${unsloth[@]}")
# What 24 GiB hold.
measure longest 200 --policy offload --case 1x102400 --steps 1 --warm-up 1
# 128 thousand words: the logits.
measure vocabulary 240 --shape llama-3.1-8b --policy selective,full,offload_selective --case 4x2048 $(beside "${peft[@]}")
# 70B, the optimizer's state in the host's memory.
measure large 300 --shape llama-2-70b --policy full --case 1x512,1x2048 --set train.optimizer_budget=256MiB \
    $(beside "${peft[@]}")
# DPO, the reference computed and known ahead.
measure pairs 500 --policy selective,full --case 2x1024-pairs,2x1024-pairs-ahead $(beside "${answers[@]}")
# Flat over a thousand steps.
measure memory 60 --shape tiny --policy full --case 4x64 --steps 1000
# Rows that grow while a few GiB are left: state makes way, the run goes on.
case " $parts " in *" stress "*)
    echo "== stress"
    timeout 120 "$bin/qlora-bench" stress --device cuda --layers 4 --rank 256 --leave 6 2>&1 | tee "$out/stress.txt"
    echo "   $SECONDS s so far"
esac
