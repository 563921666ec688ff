#!/usr/bin/env bash
# Seconds from the start of `qlora serve` to its first answer, on one NVIDIA card, with a checkpoint of random weights that was
# just written and so lies in the page cache. The first start compiles kernels, the others find them in the kernel cache.
#
# usage: benches/serve_start.sh BIN [SHAPE [STARTS]]      from the repository's root; SHAPE as in peers/step_timing.py
#   BIN  the folder with qlora; python3 needs torch and transformers to write the checkpoint into TMPDIR (13 GB for a 7B)
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: benches/serve_start.sh BIN [SHAPE [STARTS]]" >&2; exit 2; }
bin=$(realpath "$1") shape=${2:-llama-2-7b} starts=${3:-3} port=${PORT:-8765}
export CUDA_PATH=${CUDA_PATH:-/usr/local/cuda}
work=$(mktemp -d)
trap 'kill "${server:-}" 2>/dev/null || true; rm -rf "$work"' EXIT
export BURN_QLORA_KERNEL_CACHE=$work/kernels
model=$(cd benches/peers && python3 - "$shape" <<'PYTHON'
import argparse, sys
from random_checkpoint import checkpoint
print(checkpoint(argparse.Namespace(shape=sys.argv[1], layers=None, words=None)))
PYTHON
)
model=${model##*$'\n'}
body='{"model": "base", "prompt": "hello world 7", "max_tokens": 1, "temperature": 0}'
for start in $(seq "$starts"); do
    began=$(date +%s.%N)
    "$bin/qlora" serve --model "$model" --served-name base --device cuda --port "$port" --cache-gib 4 >"$work/log" 2>&1 &
    server=$!
    until curl --silent --fail --output "$work/answer" --header 'Content-Type: application/json' --data "$body" \
        "http://127.0.0.1:$port/v1/completions"; do
        kill -0 "$server" 2>/dev/null || { cat "$work/log" >&2; exit 1; }
        sleep 0.02
    done
    ended=$(date +%s.%N)
    used=$(nvidia-smi -i 0 --query-gpu=memory.used --format=csv,noheader)
    python3 -c "print(f'start $start: first answer after {$ended - $began:.2f} s, the driver counts $used')"
    kill "$server"
    wait "$server" || true
done
cat "$work/log"
