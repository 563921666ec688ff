"""Reads back what `qlora convert` writes, with llama.cpp's own Python package, converter and program.

    cargo build --release --bin qlora
    pip install gguf torch transformers sentencepiece          # and, for the last step, llama-cpp-python
    python benches/peers/check_gguf.py --qlora target/release/qlora --reference testdata/reference \
        [--llama-cpp PATH_OF_LLAMA_CPP_SOURCE]

1. Blocks: Q8_0, Q4_0, Q4_1, Q5_0, F16, BF16 of tiny-llama against gguf's quantizers, byte for byte.
2. With --llama-cpp: every tensor and metadata entry against llama.cpp's converter on the same folders (the
   pre-tokenizer's name is patched in, because its table of hashes does not know a tokenizer made for tests);
   and a GPTQ checkpoint of ours, decoded by the converter.
3. With llama_cpp installed: greedy continuations of the merged model in F16, and of base and LoRA GGUF, against
   transformers' (qlora/merged_greedy.json); logits of every architecture that is written against transformers', in F32 and F16, and of the
   adapters on it that have a place in a LoRA GGUF, against PEFT's.

What `qlora convert` refuses is listed with its reason.
"""
import argparse, json, os, subprocess, sys, tempfile
import numpy as np
import gguf
from gguf import GGUFReader, GGMLQuantizationType as T
from safetensors import safe_open

p = argparse.ArgumentParser()
p.add_argument("--qlora", required=True); p.add_argument("--reference", required=True); p.add_argument("--llama-cpp")
a = p.parse_args()
ref = os.path.abspath(a.reference); tmp = tempfile.mkdtemp(); bad = 0
def out(name): return os.path.join(tmp, name)
def qlora(*args): subprocess.run([os.path.abspath(a.qlora), *args], check=True, stdout=subprocess.DEVNULL)
def written(what, *args):
    """Whether qlora converts; why not is said."""
    r = subprocess.run([os.path.abspath(a.qlora), "convert", *args], capture_output=True, text=True)
    if r.returncode: print("refused", what + ":", r.stderr.strip().splitlines()[-1][-200:], flush=True)
    return not r.returncode
def convert(model, target, kind, *more):
    tokenizer = [] if os.path.exists(os.path.join(model, "tokenizer.json")) else ["--without-tokenizer"]
    qlora("convert", "--model", model, "--output", target, "--type", kind, "--force", *tokenizer, *more)
def report(what, ok, more=""):
    global bad; bad += not ok; print(("ok    " if ok else "WRONG ") + what, more, flush=True)

def entries(reader):
    found = {}
    for k, f in reader.fields.items():
        if k.startswith("GGUF."): continue
        found[k] = f.contents()
    return found

# 1. blocks
tiny = os.path.join(ref, "tiny-llama")
for kind in ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0"): convert(tiny, out(f"tiny-{kind}.gguf"), kind)
full = {t.name: t for t in GGUFReader(out("tiny-f32.gguf")).tensors}
for kind in ("f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0"):
    r = GGUFReader(out(f"tiny-{kind}.gguf")); same = True; types = {}
    for t in r.tensors:
        x = np.array(full[t.name].data, dtype=np.float32)
        q = gguf.quants.quantize(x, t.tensor_type); types[t.tensor_type.name] = types.get(t.tensor_type.name, 0) + 1
        if q.tobytes() != np.ascontiguousarray(t.data).tobytes(): same = False; print("   differs:", t.name, t.tensor_type.name)
        d = gguf.quants.dequantize(np.array(t.data), t.tensor_type).reshape(x.shape)
        if kind == "q8_0": same &= np.abs(d - x).max() <= np.abs(x).max() / 127
    report(f"blocks {kind}", same, types)

# 2. llama.cpp's converter
def theirs(folder, target, ftype, lora=None):
    """Runs the converter in a process of its own, with the vocabulary's hash patched."""
    has_vocab = os.path.exists(os.path.join(folder, "tokenizer.json"))
    code = f"""
import sys; sys.path[:0] = [{a.llama_cpp!r}, {os.path.join(a.llama_cpp, 'gguf-py')!r}]
import conversion.base as b
b.TextModel.get_vocab_base_pre = lambda self, tok: "gpt-2"
import gguf, conversion, runpy
has_vocab = {has_vocab}
for f in ("llama", "gemma", "qwen", "phi"):
    m = __import__("conversion." + f, fromlist=["x"])
    for c in vars(m).values():
        if isinstance(c, type) and "set_vocab" in vars(c) and not has_vocab: c.set_vocab = lambda self: self.gguf_writer.add_tokenizer_model("none")
if not has_vocab:
    b.TextModel.set_vocab = lambda self: self.gguf_writer.add_tokenizer_model("none")
    import conversion.gemma as g
    g.Gemma3Model.modify_tensors = lambda self, data, name, bid: b.TextModel.modify_tensors(self, data + self.norm_shift(name), name, bid)
sys.argv = ["convert", "--outtype", {ftype!r}, "--outfile", {target!r}] + ({["--base", folder, lora]!r} if {lora is not None} else [{folder!r}])
runpy.run_path({os.path.join(a.llama_cpp, 'convert_lora_to_gguf.py' if lora else 'convert_hf_to_gguf.py')!r}, run_name="__main__")
"""
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if r.returncode: print(r.stderr[-1500:])
    return r.returncode == 0

def compare(label, ours, theirs_):
    o, t = GGUFReader(ours), GGUFReader(theirs_); eo, et = entries(o), entries(t)
    skip = {"general.name", "general.sampling.temp", "general.sampling.top_k", "general.sampling.top_p", "general.license", "general.basename", "general.finetune", "general.version", "general.tags", "general.base_model.count", "tokenizer.ggml.pre", "general.organization"}
    for k in sorted(set(eo) | set(et)):
        if k in skip or k.startswith("general.base_model"): continue
        x, y = eo.get(k, "(none)"), et.get(k, "(none)")
        # Written always, where the converter leaves llama.cpp to its default; and needed without a vocabulary.
        if y == "(none)" and (k.endswith("rope.freq_base") and x == 10000.0 or k.endswith(".vocab_size")): continue
        close = isinstance(x, float) and isinstance(y, float) and abs(x - y) <= 1e-6 * abs(y)
        if x != y and not close:
            s = lambda v: str(v)[:80]
            report(f"{label}: {k}", False, f"ours {s(x)} theirs {s(y)}")
    to, tt = {t.name: t for t in o.tensors}, {t.name: t for t in t.tensors}
    report(f"{label}: names", set(to) == set(tt), set(to) ^ set(tt) or "")
    wrong = [n for n in set(to) & set(tt) if to[n].tensor_type != tt[n].tensor_type or list(to[n].shape) != list(tt[n].shape) or np.ascontiguousarray(to[n].data).tobytes() != np.ascontiguousarray(tt[n].data).tobytes()]
    report(f"{label}: {len(to)} tensors, byte for byte", not wrong, [(n, to[n].tensor_type.name, tt[n].tensor_type.name, to[n].shape.tolist(), tt[n].shape.tolist()) for n in wrong][:3] or "")

archs = sorted(os.listdir(os.path.join(ref, "archs"))) if os.path.isdir(os.path.join(ref, "archs")) else []
def arch(name): return os.path.join(ref, "archs", name)
archs = [n for n in archs if written(n, "--model", arch(n), "--output", out(f"{n}.gguf"), "--type", "f32", "--without-tokenizer")]
lora = os.path.join(ref, "qlora", "final_adapter_f32")
qlora("convert", "--model", tiny, "--adapter", lora, "--adapter-only", "--type", "f32", "--output", out("lora.gguf"))
if a.llama_cpp:
    for kind in ("f32", "f16", "bf16", "q8_0"):
        if theirs(tiny, out("t.gguf"), kind): compare(f"tiny-llama {kind}", out(f"tiny-{kind}.gguf"), out("t.gguf"))
        else: report(f"tiny-llama {kind}", False, "their converter failed")
    for name in archs:
        if theirs(os.path.join(ref, "archs", name), out("t.gguf"), "f32"): compare(name, out(f"{name}.gguf"), out("t.gguf"))
        else: report(name, False, "their converter failed")
    if theirs(tiny, out("t.gguf"), "f32", lora): compare("LoRA", out("lora.gguf"), out("t.gguf"))
    else: report("LoRA", False, "their converter failed")

    rows = out("rows.jsonl")
    with open(rows, "w") as f:
        for i in range(24): f.write(json.dumps({"text": f"Sentence number {i} says that {i} and {i + 1} make {2 * i + 1}, as everybody who counts knows."}) + "\n")
    qlora("quantize", "--format", "gptq", "--model", tiny, "--data", rows, "--group-size", "16", "--act-order", "--device", "cpu", "--output", out("gptq"))
    if theirs(out("gptq"), out("t.gguf"), "f32"):
        far = 0.0
        with safe_open(os.path.join(out("gptq"), "model.safetensors"), "np") as f:
            for name in f.keys():
                if not name.endswith("v_proj.qweight"): continue
                m = name[: -len(".qweight")]; q, s, g = (f.get_tensor(f"{m}.{x}") for x in ("qweight", "scales", "g_idx"))
                codes = np.stack([(q.view(np.uint32) >> (4 * k)) & 15 for k in range(8)], 1).reshape(-1, q.shape[1]).astype(np.float32)
                mine = ((codes - 8) * s.astype(np.float32)[g]).T; layer = m.split(".")[2]
                t = next(t for t in GGUFReader(out("t.gguf")).tensors if t.name == f"blk.{layer}.attn_v.weight")
                far = max(far, float(np.abs(np.array(t.data, dtype=np.float32) - mine).max()))
        report("GPTQ, decoded by the converter", far == 0.0, f"largest difference {far:.1e}")
    else: report("GPTQ", False, "their converter failed")

# 3. llama.cpp itself
try: import llama_cpp
except ImportError: llama_cpp = None
if llama_cpp:
    def model(path, **kw): return llama_cpp.Llama(path, n_ctx=256, n_threads=2, verbose=False, logits_all=True, **kw)
    def logits(m, ids):
        m.reset(); m.eval(list(ids)); return np.array(m.scores[: len(ids)], dtype=np.float32)
    def greedy(m, ids, n):
        m.reset(); m.eval(list(ids)); got = list(ids)
        for _ in range(n - len(ids)):
            t = int(np.argmax(m.scores[m.n_tokens - 1])); got.append(t); m.eval([t])
        return got
    want = json.load(open(os.path.join(ref, "qlora", "merged_greedy.json")))
    convert(tiny, out("merged-f16.gguf"), "f16", "--adapter", lora)
    runs = {"merged f16": model(out("merged-f16.gguf")), "f32 base with LoRA GGUF": model(out("tiny-f32.gguf"), lora_path=out("lora.gguf"))}
    qlora("merge", "--model", tiny, "--adapter", lora, "--output", out("merged"))
    for label, m in runs.items():
        for prompt, ids in want.items():
            mine = m.tokenize(prompt.encode(), add_bos=False, special=True)
            report(f"{label}: tokens of {prompt[:24]!r}", mine == ids[: len(mine)], "" if mine == ids[: len(mine)] else f"{mine} {ids[:len(mine)]}")
            n = len(mine); got = greedy(m, ids[:n], len(ids)); agree = next((i for i in range(len(ids)) if got[i] != ids[i]), len(ids))
            report(f"{label}: greedy {prompt[:24]!r}", agree == len(ids), f"{agree} of {len(ids)} tokens")
            ours = subprocess.run([os.path.abspath(a.qlora), "generate", "--device", "cpu", "--quant-type", "none", "--no-chat-template", "--model", out("merged"), "--prompt", prompt, "--max-new-tokens", str(len(ids) - n)], capture_output=True, text=True, check=True).stdout
            text = m.detokenize(got[n:], special=False).decode(); report(f"{label}: text of `qlora generate` {prompt[:24]!r}", ours.strip() == text.strip(), "" if ours.strip() == text.strip() else f"{ours!r} {text!r}")
    with safe_open(os.path.join(ref, "qlora", "logits_f32.safetensors"), "np") as f:
        for row, want_ in zip(f.get_tensor("input_ids"), f.get_tensor("logits.adapter_on_f32")):
            got = logits(runs["f32 base with LoRA GGUF"], row); got = got[:, ::-(-got.shape[-1] // want_.shape[-1])]; report("LoRA logits", np.abs(got - want_).max() < 0.02, f"largest difference {np.abs(got - want_).max():.2e}")
    # Caches in F32, without flash attention: nothing but sums in another order, and tables of activations in F16, lies between.
    EXACT = dict(type_k=0, type_v=0, flash_attn=False)
    def apart(label, path, ids, want_, bar, tokens, **kw):
        try: m = model(path, **EXACT, **kw)
        except Exception as e: report(f"{label}: loads in llama.cpp", False, repr(e)[:200]); return
        worst = max(float(np.abs(logits(m, r[:tokens]) - w[:tokens]).max()) for r, w in zip(ids, want_)); scale = float(np.abs(want_).max())
        report(f"{label}: logits in llama.cpp, {tokens} tokens", worst <= bar * max(scale, 1), f"largest difference {worst:.2e} of {scale:.1f}")
    for name in archs:
        with safe_open(os.path.join(arch(name), "reference.safetensors"), "np") as f: ids, want_ = f.get_tensor("input_ids"), f.get_tensor("logits")
        config = json.load(open(os.path.join(arch(name), "config.json"))); config = config.get("text_config", config)
        # llama.cpp's converter and ours leave out Mistral's windows, which begin to matter at their length.
        tokens = min(ids.shape[1], config["sliding_window"] if config["model_type"] in ("mistral", "mixtral") and config.get("sliding_window") else 10**6)
        apart(name, out(f"{name}.gguf"), ids, want_, 1e-3, tokens)
        convert(arch(name), out("half.gguf"), "f16"); apart(f"{name} f16", out("half.gguf"), ids, want_, 1e-2, tokens)
        kinds = os.path.join(arch(name), "adapters")
        for kind in sorted(os.listdir(kinds)) if os.path.isdir(kinds) else []:
            if not os.path.isdir(os.path.join(kinds, kind)): continue
            if not written(f"{name} {kind}", "--model", arch(name), "--adapter", os.path.join(kinds, kind), "--adapter-only", "--type", "f32", "--force", "--output", out("lora.gguf")): continue
            with safe_open(os.path.join(kinds, "logits.safetensors"), "np") as f: ids, want_ = f.get_tensor("input_ids"), f.get_tensor("logits." + kind)
            apart(f"{name} {kind}", out(f"{name}.gguf"), ids, want_, 1e-3, ids.shape[1], lora_path=out("lora.gguf"))
print("all as it should be" if not bad else f"{bad} WRONG"); sys.exit(bool(bad))
