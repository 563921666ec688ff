#!/usr/bin/env bash
# The GPU baseline: conformance, the quickstart, and ten training steps of a Llama-2-7B shape with random
# weights (1 x 2048 tokens, rank 64 on every linear layer), beside PEFT + bitsandbytes where python3 has them.
# usage: benches/baseline.sh [BIN_DIR] [WORK_DIR]   from the repository's root; needs about 15 GB in WORK_DIR
set -euo pipefail
bin=${1:-target/release}
work=${2:-/tmp/qlora-baseline}
mkdir -p "$work"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader

"$bin/conformance" --reference testdata/reference --device cuda | tee "$work/conformance.log" | tail -1
"$bin/qlora" train examples/quickstart/qlora.toml --device cuda --output-dir "$work/quickstart"

[ -d "$work/7b" ] || "$bin/xtask" random-checkpoint --shape llama-2-7b --out "$work/7b"
# Rows long enough to fill 2,048 tokens: word problems strung together.
python3 - "$work/long.jsonl" <<'P'
import json, sys
rows = [json.loads(line)["messages"] for line in open("examples/quickstart/word_problems.jsonl")]
text = [m[0]["content"] + " " + m[1]["content"] for m in rows]
with open(sys.argv[1], "w") as out:
    for i in range(0, len(text) - 150, 40):
        out.write(json.dumps({"text": " ".join(text[i:i + 150])}) + "\n")
P
cat > "$work/7b.toml" <<C
device = "cuda"
[model]
path = "$work/7b"
[lora]
rank = 64
alpha = 16
[data]
train = "$work/long.jsonl"
eval_fraction = 0.0
format = "text"
max_length = 2048
[train]
batch_size = 1
gradient_accumulation_steps = 1
max_steps = 10
save_every = 0
eval_every = 0
C
for policy in full none; do
    rm -rf "$work/$policy"
    (while sleep 0.5; do nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits; done > "$work/memory_$policy.log") &
    sampler=$!
    "$bin/qlora" train "$work/7b.toml" --output-dir "$work/$policy" --set train.activation_checkpointing=$policy
    kill $sampler
    echo "$policy: driver's peak $(sort -n "$work/memory_$policy.log" | tail -1) MiB"
done
python3 -c 'import peft, bitsandbytes' && python3 benches/peers/bench_step_peft.py llama2-7b,1,2048
