#!/bin/bash
# Checks that TensorBoard and MLflow, as PyPI has them, read what a run tells them.
#
# usage: benches/trackers.sh QLORA FOLDER
#
# QLORA is the program. In FOLDER a virtual environment with tensorboard and mlflow is made unless one is there, an MLflow server is started, a
# small run on the CPU is stopped after a few steps and resumed, and check_trackers.py compares what both packages read with the
# run's metrics.jsonl. Run it from the repository's root.
set -euo pipefail
qlora=$(realpath "$1"); mkdir -p "$2"; folder=$(realpath "$2")
if [ ! -x "$folder/venv/bin/mlflow" ]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install -q tensorboard mlflow
fi
port=${PORT:-5055}
rm -rf "$folder/mlflow" "$folder/run"; mkdir -p "$folder/mlflow"
"$folder/venv/bin/mlflow" server --port "$port" --workers 1 --backend-store-uri "sqlite:///$folder/mlflow/runs.db" \
    --default-artifact-root "$folder/mlflow/artifacts" > "$folder/mlflow/log" 2>&1 &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
for _ in $(seq 120); do curl -sf "http://127.0.0.1:$port/health" > /dev/null && break; sleep 1; done

export MLFLOW_TRACKING_URI=http://127.0.0.1:$port MLFLOW_EXPERIMENT_NAME=trackers
train=("$qlora" train examples/quickstart/qlora.toml --device cpu --model testdata/reference/tiny-llama --output-dir "$folder/run"
    --max-length 96 --batch-size 2 --gradient-accumulation-steps 1 --set data.eval_fraction=0.002 --set train.eval_every=4
    --set train.save_every=4 --set 'train.log_to=["tensorboard","mlflow"]' --set 'eval.prompts=["What is 2 + 3?"]'
    --set eval.max_new_tokens=4 --quiet)
# The end of the first start lies behind the checkpoint that the second goes on from.
"${train[@]}" --max-steps 6
rm -r "$folder/run/checkpoint-000006"
"${train[@]}" --max-steps 12 --resume
"$folder/venv/bin/python" benches/check_trackers.py "$folder/run"
