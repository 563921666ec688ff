#!/bin/bash
# Checks that TensorBoard, MLflow and Trackio, as PyPI has them, read what a run tells them.
#
# usage: benches/trackers.sh QLORA FOLDER
#
# QLORA is the program. In FOLDER a virtual environment with the three is made unless one is there, servers of MLflow and Trackio are started, a
# small run on the CPU is stopped after a few steps and resumed, and check_trackers.py compares what the packages read with the
# run's metrics.jsonl. Run it from the repository's root.
set -euo pipefail
qlora=$(realpath "$1"); mkdir -p "$2"; folder=$(realpath "$2")
if [ ! -x "$folder/venv/bin/trackio" ]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install -q tensorboard mlflow trackio
fi
port=${PORT:-5055}
rm -rf "$folder/mlflow" "$folder/trackio" "$folder/run"; mkdir -p "$folder/mlflow" "$folder/trackio"
"$folder/venv/bin/mlflow" server --port "$port" --workers 1 --backend-store-uri "sqlite:///$folder/mlflow/runs.db" \
    --default-artifact-root "$folder/mlflow/artifacts" > "$folder/mlflow/log" 2>&1 &
servers=$!
trap 'kill $servers 2>/dev/null || true' EXIT
export TRACKIO_DIR=$folder/trackio/data TRACKIO_WRITE_TOKEN=of-this-check TRACKIO_PROJECT=trackers HF_HUB_OFFLINE=1
"$folder/venv/bin/trackio" show > "$folder/trackio/log" 2>&1 &
servers="$servers $!"
for _ in $(seq 120); do curl -sf "http://127.0.0.1:$port/health" > /dev/null && break; sleep 1; done
for _ in $(seq 120); do grep -q 'launched at' "$folder/trackio/log" && break; sleep 1; done
TRACKIO_SERVER_URL=$(grep -o 'http://[^? ]*:[0-9]*' "$folder/trackio/log" | head -n 1)
export TRACKIO_SERVER_URL

export MLFLOW_TRACKING_URI=http://127.0.0.1:$port MLFLOW_EXPERIMENT_NAME=trackers
train=("$qlora" train examples/quickstart/qlora.toml --device cpu --model testdata/reference/tiny-llama --output-dir "$folder/run"
    --max-length 96 --batch-size 2 --gradient-accumulation-steps 1 --set data.eval_fraction=0.002 --set train.eval_every=4
    --set train.save_every=4 --set 'train.log_to=["tensorboard","mlflow","trackio"]' --set 'eval.prompts=["What is 2 + 3?"]'
    --set eval.max_new_tokens=4 --quiet)
# The end of the first start lies behind the checkpoint that the second goes on from.
"${train[@]}" --max-steps 6
rm -r "$folder/run/checkpoint-000006"
"${train[@]}" --max-steps 12 --resume
"$folder/venv/bin/python" benches/check_trackers.py "$folder/run"
