#!/usr/bin/env bash
# The GPU baseline: conformance, the quickstart, and training steps of a Llama-2-7B shape with random weights, beside
# PEFT and Unsloth where python3 has them.
# usage: benches/baseline.sh [BIN_DIR] [WORK_DIR]   from the repository's root
set -euo pipefail
bin=${1:-target/release}
work=${2:-/tmp/qlora-baseline}
mkdir -p "$work"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader

"$bin/conformance" --reference testdata/reference --device cuda | tee "$work/conformance.log" | tail -1
"$bin/qlora" train examples/quickstart/qlora.toml --device cuda --output-dir "$work/quickstart"
"$bin/qlora-bench" step --shape llama-2-7b --policy full,none --case 1x2048,4x2048 --device cuda \
    --peer python3 --json "$work/step.json"
