"""Loads what `qlora` writes with transformers, PEFT and bitsandbytes, on the CPU, and compares logits with ours.

    cargo build --release --bin qlora --example logits
    pip install torch transformers peft==0.21.0 bitsandbytes==0.50.2 accelerate
    python benches/peers/check_peft.py --bin target/release --reference testdata/reference

1. Adapters of every kind, loaded and saved by us, and one that `qlora train` made: our logits on the f32 base against
   PEFT's with the file we wrote, and against the recorded ones.
2. Merging, every kind of adapter (and embeddings with and without DoRA, made here): our weights against those of
   merge_and_unload; logits of the merged checkpoint in transformers and here against base and adapter. Merging into
   the dequantized 4-bit base against the recorded logits of the adapter on that base.
3. Combinations (linear, cat, svd) against add_weighted_adapter.
4. The bnb-4bit checkpoint: transformers' logits against ours and the recorded ones, and bitsandbytes' own checkpoint.
5. Adapters, merging and bnb-4bit on the other architectures of the reference folder.
"""
import argparse, json, os, subprocess, sys, tempfile
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from peft import LoraConfig, PeftModel, get_peft_model

p = argparse.ArgumentParser(); p.add_argument("--bin", required=True); p.add_argument("--reference", required=True); a = p.parse_args()
ref = os.path.abspath(a.reference); tmp = tempfile.mkdtemp(); bad = 0
def out(*n): return os.path.join(tmp, *n)
def run(program, *args, ok=True, **kw):
    r = subprocess.run([os.path.abspath(os.path.join(a.bin, program)), *map(str, args)], capture_output=True, text=True, **kw)
    if ok and r.returncode: raise SystemExit(f"{program} {args}: {r.stderr}")
    return r
def qlora(*args, **kw): return run("qlora", *args, **kw)
def report(what, ok, more=""):
    global bad; bad += not ok; print(("ok    " if ok else "WRONG ") + what, more, flush=True)
def base(**kw): return AutoModelForCausalLM.from_pretrained(kw.pop("path", out("base")), dtype=torch.float32, **kw).eval()
@torch.no_grad()
def logits(m, ids): return m(input_ids=ids).logits.float()
def ours(model, ids, *adapter):
    """Our logits; adapter is a folder, and one to save it to."""
    save_file({"input_ids": ids.to(torch.int64).contiguous()}, out("ids.safetensors"))
    run("examples/logits", model, out("ids.safetensors"), out("logits.bin"), *adapter)
    return torch.from_numpy(np.fromfile(out("logits.bin"), dtype=np.float32)).reshape(*ids.shape, -1)
def worst(x, y):
    """The largest difference; of recorded logits there may be every n-th."""
    few = min(x.shape[-1], y.shape[-1]); x, y = (z if z.shape[-1] == few else z[..., ::-(-z.shape[-1] // few)] for z in (x, y))
    return (x - y).abs().max().item()
def rounding(theirs, folder):
    """A random adapter with a large scaling amplifies the rounding of f32; how much, PEFT itself shows: the same adapter
    merged into the weights is equal but for rounding. conformance has the same bar."""
    return min(5e-4, max(1e-4, 2 * worst(theirs, logits(PeftModel.from_pretrained(base(), folder).merge_and_unload().eval(), ids))))
def close(what, bar=lambda: 1e-4, **pairs):
    """Every pair of logits within 1e-4, or within a wider bar that is asked for only then."""
    far = {k: worst(*v) for k, v in pairs.items()}; most = max(far.values()); limit = 1e-4 if most < 1e-4 else bar()
    report(what, most < limit, ", ".join(f"{k} {d:.1e}" for k, d in far.items()) + (f" (bar {limit:.1e})" if limit > 1e-4 else ""))

m = AutoModelForCausalLM.from_pretrained(os.path.join(ref, "tiny-llama"), dtype=torch.float32); m.save_pretrained(out("base"))
recorded = load_file(os.path.join(ref, "adapters", "logits.safetensors")); ids = recorded["input_ids"]
names = sorted(n for n in os.listdir(os.path.join(ref, "adapters")) if os.path.isdir(os.path.join(ref, "adapters", n)))
folders = {n: os.path.join(ref, "adapters", n) for n in names}
for n, kw in dict(embeddings=dict(target_modules=["embed_tokens", "v_proj"]), embeddings_dora=dict(target_modules=["embed_tokens", "q_proj"], use_dora=True), excluded=dict(target_modules="all-linear", exclude_modules=["down_proj"], rank_pattern={"k_proj": 2}), head=dict(target_modules=["lm_head", "up_proj"])).items():
    torch.manual_seed(7); pm = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, init_lora_weights=False, **kw)); pm.save_pretrained(out("made_" + n)); folders[n] = out("made_" + n)

# 1
rows = [json.dumps({"messages": [{"role": "user", "content": f"What is {i} + {i}?"}, {"role": "assistant", "content": f"Answer: {2 * i}"}]}) for i in range(16)]
open(out("rows.jsonl"), "w").write("\n".join(rows))
open(out("qlora.toml"), "w").write(f"device = 'cpu'\n[model]\npath = '{out('base')}'\n[lora]\nrank = 8\n[data]\ntrain = '{out('rows.jsonl')}'\n[train]\noutput_dir = '{out('run')}'\nmax_steps = 5\nlearning_rate = 1e-3\n")
import shutil
for n in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"): shutil.copy(os.path.join(ref, "tiny-llama", n), out("base"))
qlora("train", out("qlora.toml")); folders["trained"] = out("run", "adapter")
for n, folder in folders.items():
    mine = ours(out("base"), ids, folder, out("re_" + n))
    x = {k: v for k, v in load_file(os.path.join(folder, "adapter_model.safetensors")).items()}; y = load_file(out("re_" + n, "adapter_model.safetensors"))
    same = x.keys() == y.keys() and all(torch.equal(x[k].float(), y[k]) for k in x) and json.load(open(os.path.join(folder, "adapter_config.json"))) == json.load(open(out("re_" + n, "adapter_config.json")))
    theirs = logits(PeftModel.from_pretrained(base(), out("re_" + n)).eval(), ids); want = recorded.get("logits." + n)
    report(f"adapter {n}: the same after loading and saving", same)
    close(f"adapter {n}: our logits", lambda: rounding(theirs, folder), PEFT=(mine, theirs), **({} if want is None else dict(recorded=(mine, want))))

# 2
for n, folder in folders.items():
    r = qlora("merge", "--model", out("base"), "--adapter", folder, "--output", out("merged_" + n), ok=False)
    if n == "lora_bias": report("merge lora_bias: refused, as by PEFT", r.returncode == 3 and "lora_bias" in r.stderr, r.stderr.strip().splitlines()[-1][:90]); continue
    if r.returncode: report("merge " + n, False, r.stderr[:300]); continue
    mine = base(path=out("merged_" + n)); pm = PeftModel.from_pretrained(base(), folder).eval(); whole = logits(pm, ids); there = logits(mine, ids)
    close(f"merge {n}: merged model in transformers", lambda: rounding(whole, folder), base_and_adapter=(there, whole), ours=(there, ours(out("merged_" + n), ids)))
    if n in ("embeddings", "embeddings_dora", "head"): continue  # tied: PEFT merges into the shared tensor, we keep the function
    theirs = pm.merge_and_unload().state_dict(); own = mine.state_dict(); w = max(worst(own[k], theirs[k]) for k in theirs)
    report(f"merge {n}: weights against merge_and_unload", w < 1e-6, f"{w:.1e}")
final = os.path.join(ref, "qlora", "final_adapter_f32"); rec = load_file(os.path.join(ref, "qlora", "logits_f32.safetensors")); rows = rec["input_ids"][:2]
for how, want in (("full", "adapter_on_f32"), ("dequantized-4bit", "4bit")):
    qlora("merge", "--model", out("base"), "--adapter", final, "--output", out("rounded"), "--base", how, "--force"); got = logits(base(path=out("rounded")), rows)
    other = "4bit" if how == "full" else "adapter_on_f32"
    close(f"merge, --base {how}", **{want: (got, rec["logits." + want])}); print(f"      (from {other} it is {worst(got, rec['logits.' + other]):.1e} away)")

# 3
one, two = os.path.join(ref, "adapters", "plain"), os.path.join(ref, "adapters", "patterns")
three = out("made_three"); torch.manual_seed(3); get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=2, init_lora_weights=False, target_modules=["q_proj", "o_proj"])).save_pretrained(three)
for how, x, y in (("cat", one, two), ("svd", one, two), ("linear", one, three), ("cat", one, three)):
    pm = PeftModel.from_pretrained(base(), x, adapter_name="x"); pm.load_adapter(y, "y"); pm.add_weighted_adapter(["x", "y"], [0.7, -0.4], "z", combination_type=how); pm.set_adapter("z")
    qlora("combine", "--combine", how, "--adapter", x + ":0.7", "--adapter", y + ":-0.4", "--output", out("combined"), "--force"); got = logits(PeftModel.from_pretrained(base(), out("combined")).eval(), ids)
    report(f"combine {how}", worst(got, logits(pm.eval(), ids)) < 1e-4, f"{worst(got, logits(pm, ids)):.1e}")

# 4
def quantized(path, **kw):
    """Loads a 4-bit model and decodes its layers with bitsandbytes' generic code: its CPU kernel (0.50.2) is wrong
    where a row is no whole number of blocks (down_proj here), for its own checkpoints as for ours."""
    import bitsandbytes.functional as F
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    q = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **kw).eval(); decoded = {}
    for name, mod in list(q.named_modules()):
        if type(mod).__name__ != "Linear4bit": continue
        s = mod.weight.quant_state; absmax = F.dequantize_blockwise(s.absmax, s.state2) + s.offset if s.nested else s.absmax
        w = _dequantize_4bit_compute(mod.weight.data.reshape(-1), absmax.float(), s.code, s.blocksize, s.shape, torch.float32).reshape(s.shape)
        new = torch.nn.Linear(w.shape[1], w.shape[0], bias=mod.bias is not None); new.weight.data = w; decoded[name] = w
        if mod.bias is not None: new.bias.data = mod.bias.data.float()
        q.set_submodule(name, new)
    return torch.nn.Module.float(q), decoded
qlora("quantize", "--format", "bnb-4bit", "--model", os.path.join(ref, "tiny-llama"), "--output", out("bnb"))
q, w = quantized(out("bnb")); want = load_file(os.path.join(ref, "logits", "tiny-llama.safetensors"))
report("bnb-4bit: 42 layers are loaded as Linear4bit", len(w) == 42)
close("bnb-4bit: logits in transformers", ours=(logits(q, ids), ours(out("bnb"), ids)), recorded=(logits(q, want["input_ids"]), want["logits.nf4_dq_f32"]), their_own_checkpoint=(logits(q, ids), logits(quantized(os.path.join(ref, "tiny-llama-bnb-4bit"))[0], ids)))

# 5, where the folder of architectures is at hand
for n in ("qwen3", "gemma2", "phi3", "mixtral", "qwen3_moe", "gemma3", "mistral", "qwen2", "llama3"):
    folder = os.path.join(ref, "archs", n)
    if not os.path.isdir(folder): continue
    rec = load_file(os.path.join(folder, "reference.safetensors")); ids = rec["input_ids"]; torch.manual_seed(11)
    modules = ["qkv_proj", "o_proj", "gate_up_proj"] if n == "phi3" else ["q_proj", "v_proj", "o_proj"]
    pm = get_peft_model(base(path=folder), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=4, init_lora_weights=False, use_dora=n == "qwen3", target_modules=modules)).eval()
    pm.save_pretrained(out("arch_" + n)); whole = logits(pm, ids)
    mine = ours(folder, ids, out("arch_" + n), out("arch_re_" + n)); again = logits(PeftModel.from_pretrained(base(path=folder), out("arch_re_" + n)).eval(), ids)
    qlora("merge", "--model", folder, "--adapter", out("arch_" + n), "--output", out("arch_merged"), "--force"); merged = logits(base(path=out("arch_merged")), ids)
    close(f"{n}: logits of base and adapter", PEFT=(again, whole), ours=(mine, whole), merged=(merged, whole), merged_ours=(merged, ours(out("arch_merged"), ids)))
    qlora("quantize", "--format", "bnb-4bit", "--model", folder, "--output", out("arch_bnb"), "--force")
    try:
        (mine, w), (theirs, v) = quantized(out("arch_bnb")), quantized(folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32))
        close(f"{n}: bnb-4bit in transformers", ours=(logits(mine, ids), ours(out("arch_bnb"), ids)))
        # On the CPU its 8-bit statistics are searched in another way than on CUDA, whose bits ours are: a few differ by one step.
        off = sum(((w[k] - v[k]).abs() > 1e-5 * v[k].abs()).sum().item() for k in v); all_ = sum(x.numel() for x in v.values())
        report(f"{n}: bnb-4bit against transformers quantizing itself on the CPU", w.keys() == v.keys() and worst(logits(mine, ids), logits(theirs, ids)) < 5e-3, f"logits {worst(logits(mine, ids), logits(theirs, ids)):.1e}, {off} of {all_} weights differ, by {max(worst(w[k], v[k]) for k in v):.1e} at most")
    except Exception as e: report(f"{n}: bnb-4bit", False, repr(e)[:300])
print("all as it should be" if not bad else f"{bad} WRONG"); sys.exit(bool(bad))
