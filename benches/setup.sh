# What the scripts beside this one begin with; they source it. It finds the repository (`root`) and the program (`qlora`: in the PATH, or what QLORA
# says), and goes into a new folder (`work`) that is removed at the end.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
qlora=$(command -v "${QLORA:-qlora}") || { echo "no qlora in the PATH: build it, and set QLORA to its path"; exit 2; }
qlora=$(realpath "$qlora")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

# Writes rows.jsonl and qlora.toml: some steps of LoRA of rank 4, on the CPU or on what DEVICE says.
write_run() { # model folder, rows, tokens of a row, steps
    head -n "$2" "$root/examples/quickstart/word_problems.jsonl" > rows.jsonl
    cat > qlora.toml <<TOML
device = "${DEVICE:-cpu}"
[model]
path = "$1"
[lora]
rank = 4
dropout = 0.1
[data]
train = "rows.jsonl"
max_length = $3
eval_fraction = 0.2
[train]
output_dir = "run"
max_steps = $4
batch_size = 2
learning_rate = 1e-3
TOML
}
