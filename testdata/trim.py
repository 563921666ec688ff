"""Cuts a reference folder down to what the repository carries.

usage: trim.py FULL_REFERENCE_DIR OUT_DIR

The full folder is written by make_reference.py. The layout stays the same, so every
program that reads the full folder reads the trimmed one. What is cut:
  logits, qlora, adapters   the first positions (the model is causal: they depend on nothing later), and of these every COLUMNS-th
                            logit, but for the adapter that trains single tokens
  bnb/quantize_4bit         of each group of cases over 30,000 elements only the double-quantized NF4 one with blocksize 64
                            an input that several cases share is with the first of them, and named in the others' JSON
  bnb/matmul_4bit           the second of three shapes, and the weights before they were quantized
  qlora                     the final adapter and logits of the bf16 run; its losses stay. Ids and labels are in 32 bits
  bnb/optimizers            the first ELEMENTS elements of every parameter, gradient and moment (blocks of 256 do not know of
                            each other), without the paged optimizers and PyTorch's, which give the same
  archs                     all of it: make_archs.py writes smaller models of the same families
Needs safetensors, numpy and ml_dtypes.
"""
import json, shutil, sys
from pathlib import Path
import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

POSITIONS, ADAPTER_POSITIONS = 3, 2
COLUMNS = 16
ELEMENTS = 512
ADAPTERS = ["plain", "rslora", "patterns", "regex", "dora", "layers", "lora_bias", "modules_to_save", "tokens"]
src, dst = Path(sys.argv[1]), Path(sys.argv[2])


def copy(name):
    (dst / name).parent.mkdir(parents=True, exist_ok=True)
    if (src / name).is_dir():
        shutil.copytree(src / name, dst / name, dirs_exist_ok=True)
    else:
        shutil.copyfile(src / name, dst / name)


def tensors(name, edit):
    with safe_open(src / name, "np") as f:
        meta = f.metadata()
    out = edit(load_file(src / name))
    (dst / name).parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.copy() for k, v in out.items()}, dst / name, metadata=meta)


def positions(count=POSITIONS):
    def cut(name, v):
        whole = not name.startswith("logits.") or name == "logits.tokens"
        return v[:, :count] if whole or v.shape[-1] <= 4096 // COLUMNS else v[:, :count, ::COLUMNS]
    return lambda t: {k: cut(k, v) for k, v in t.items()}


def optimizers(t):
    full = len(t["param0"])
    cut = {full: ELEMENTS, full // 256: ELEMENTS // 256}
    length = lambda k, v: v.shape[-1] if "qmap" in k else cut.get(v.shape[-1], v.shape[-1])
    return {k: v[..., : length(k, v)] for k, v in t.items() if not k.startswith(("paged_", "torch_"))}


def quantizations(t):
    out, first = {}, {}
    for case in kept:
        out |= {k: v for k, v in t.items() if k.startswith(case["prefix"])}
        name = case["prefix"] + "input"
        values = t[case.get("input", name)]
        shared = first.setdefault((values.dtype.str, values.tobytes()), name)
        if shared != name:
            out.pop(name, None)
            case["input"] = shared
    return out


for name in ["reference.json", "tiny-llama", "tiny-llama-bnb-4bit", "chat", "logits/greedy.json", "bnb/quantize_blockwise.safetensors",
             "bnb/optimizers.json", "qlora/hyper.json", "qlora/log_f32.json", "qlora/log_bf16.json",
             "qlora/merged_greedy.json", "qlora/initial_adapter", "qlora/final_adapter_f32", *(f"adapters/{a}" for a in ADAPTERS)]:
    copy(name)
tensors("logits/tiny-llama.safetensors", positions())
tensors("qlora/logits_f32.safetensors", positions())
tensors("adapters/logits.safetensors", positions(ADAPTER_POSITIONS))
tensors("qlora/batches.safetensors", lambda t: {k: v.astype("int32") for k, v in t.items()})
tensors("bnb/optimizers.safetensors", optimizers)
cases = json.loads((src / "bnb/quantize_4bit.json").read_text())
kept = [c for c in cases if c["shape"][0] * c["shape"][1] < 30_000 or (c["quant_type"], c["blocksize"], c["double_quant"]) == ("nf4", 64, True)]
tensors("bnb/quantize_4bit.safetensors", quantizations)
(dst / "bnb/quantize_4bit.json").write_text(json.dumps(kept, indent=1))
tensors("bnb/matmul_4bit.safetensors", lambda t: {k: v for k, v in t.items() if not k.startswith("m1.") and not k.endswith(".w")})
