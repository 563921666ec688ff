#!/bin/bash
# Runs the recorded tiny model under the launchers that are at hand (--gpus, torchrun, Open MPI's mpirun) and compares each run's adapter with
# that of one process. Wants `qlora` in the PATH, or its path in QLORA; torchrun's in TORCHRUN. A launcher that is not there is told and left out.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
qlora=$(command -v "${QLORA:-qlora}") || { echo "no qlora in the PATH: build it, and set QLORA to its path"; exit 2; }
torchrun=$(command -v "${TORCHRUN:-torchrun}" || true)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
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
output_dir = "one"
max_steps = 5
batch_size = 2
learning_rate = 1e-3
TOML

train() { # output folder, micro-batches of a rank, and the command before the configuration
    local dir=$1 accumulation=$2
    shift 2
    "$@" qlora.toml --output-dir "$dir" --gradient-accumulation-steps "$accumulation" > "$dir.log" 2>&1 ||
        { cat "$dir.log"; echo "$dir: failed"; exit 1; }
    grep -h "ranks on .*, by " "$dir.log" || true
    cmp one/adapter/adapter_model.safetensors "$dir/adapter/adapter_model.safetensors"
    echo "$dir: the adapter of one process"
}

train one 4 "$qlora" train
train gpus 2 "$qlora" train --gpus 2
if [ -n "$torchrun" ]; then
    train torchrun-standalone 2 "$torchrun" --standalone --no-python --nproc-per-node 2 "$qlora" train
    train torchrun 1 "$torchrun" --no-python --nproc-per-node 4 "$qlora" train
else
    echo "no torchrun in the PATH: left out (set TORCHRUN)"
fi
if command -v mpirun > /dev/null; then
    [ "$(id -u)" != 0 ] || export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    train mpirun 2 mpirun --oversubscribe -n 2 "$qlora" train
else
    echo "no mpirun in the PATH: left out (Debian: openmpi-bin)"
fi
