"""Loads what `qlora quantize --format gptq` writes with transformers, through GPTQModel on a CPU, and compares logits with ours.

    cargo build --release --bin qlora --example logits
    pip install torch transformers gptqmodel optimum
    python benches/peers/check_gptq.py --bin target/release --model M --rows calibration.jsonl --held held.jsonl

1. M is quantized with the rows, in order and with --act-order, in groups of 64.
2. transformers' logits, computed with GPTQModel's layers in f32, against ours on the same folder.
3. With --held: perplexity of the rows in 16 bits, after GPTQ, in NF4 and in FP4, by `qlora eval`.
"""
import argparse, os, re, subprocess, tempfile
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

p = argparse.ArgumentParser()
p.add_argument("--bin", required=True); p.add_argument("--model", required=True); p.add_argument("--rows", required=True)
p.add_argument("--held"); p.add_argument("--group-size", type=int, default=64); p.add_argument("--keep", help="a folder for what is made")
a = p.parse_args(); bad = 0
tmp = a.keep or tempfile.mkdtemp(); os.makedirs(tmp, exist_ok=True)
def run(program, *args):
    r = subprocess.run([os.path.join(a.bin, program), *map(str, args)], capture_output=True, text=True)
    if r.returncode: raise SystemExit(f"{program} {args}: {r.stderr}")
    return r.stdout
def report(what, ok, more=""):
    global bad; bad += not ok; print(("ok    " if ok else "WRONG ") + what, more, flush=True)

tokenizer = AutoTokenizer.from_pretrained(a.model)
ids = tokenizer(open(a.rows).read(), return_tensors="pt").input_ids[:, :96]
save_file({"input_ids": ids.to(torch.int64).contiguous()}, os.path.join(tmp, "ids.safetensors"))
folders = {}
for name, flags in (("in order", []), ("act-order", ["--act-order"])):
    folder = folders[name] = os.path.join(tmp, name.replace(" ", "-"))
    if not os.path.exists(folder):
        run("qlora", "quantize", "--model", a.model, "--format", "gptq", "--device", "cpu", "--data", a.rows, "--eval-rows", 0, "--max-length", 512, "--group-size", a.group_size, *flags, "--output", folder)
    run("examples/logits", folder, os.path.join(tmp, "ids.safetensors"), os.path.join(tmp, "logits.bin"))
    mine = torch.from_numpy(np.fromfile(os.path.join(tmp, "logits.bin"), dtype=np.float32)).reshape(*ids.shape, -1)
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32, quantization_config=GPTQConfig(bits=4, backend="torch")).eval()
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "qweight")}
    with torch.no_grad(): theirs = model(input_ids=ids).logits.float()
    far = (mine - theirs).abs().max().item()
    # f32 sums in other orders: 1e-4 of the largest logit.
    report(f"GPTQ {name}: {len(layers)} layers in transformers, logits", far < 1e-4 * theirs.abs().max().item(), f"largest difference {far:.1e} of {theirs.abs().max().item():.1f}")
if a.held:
    for name, args in {"16 bits": [a.model, "none"], "GPTQ": [folders["in order"], "none"], "GPTQ, act-order": [folders["act-order"], "none"], "NF4": [a.model, "nf4"], "FP4": [a.model, "fp4"]}.items():
        out = run("qlora", "eval", "--model", args[0], "--quant-type", args[1], "--device", "cpu", "--data", a.held, "--loss-on", "all", "--max-length", 512)
        print(f"{name:<18}", re.search(r"perplexity.*", out)[0], flush=True)
raise SystemExit(bad > 0)
