"""Every model type that `qlora convert` writes, read by llama.cpp: a random model of transformers' and an adapter of PEFT's on it.

    cargo build --release --bin qlora
    pip install torch transformers peft llama-cpp-python
    python benches/peers/check_gguf_families.py --qlora target/release/qlora [--only TYPE]

Of each model: logits of its GGUF in F32 and F16 against transformers', and of a LoRA GGUF of all its linear layers (experts left out) over the
F32 one against PEFT's, over more tokens than a window has. llama.cpp's F32 is the same sums in another order, within 1e-5 of the largest logit, or 1e-3
where its table of GELU in F16 is read; F16 rounds weights to 11 bits.
"""
import argparse, json, os, subprocess, sys, tempfile
import numpy as np
import torch
import llama_cpp
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

p = argparse.ArgumentParser(); p.add_argument("--qlora", required=True); p.add_argument("--only", default=""); a = p.parse_args()
TOKENS, VOCABULARY, bad = 24, 96, 0
BASE = dict(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
def rope(kind, **more): return dict(rope_type=kind, rope_theta=10000.0, **more)
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
HUNYUAN = rope("dynamic", alpha=1000.0, beta_fast=32, beta_slow=1, factor=1.0, mscale=1.0, mscale_all_dim=1.0)
LONG = dict(rope_type="longrope", short_factor=[1 + i / 10 for i in range(8)], long_factor=[2 + i / 3 for i in range(8)], original_max_position_embeddings=16, rope_theta=10000.0)
EXPERTS = dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=32, norm_topk_prob=True)
MODELS = {
    "llama": ("llama", dict(head_dim=24, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3)),
    "llama_tied_linear": ("llama", dict(tie_word_embeddings=True, rope_parameters=rope("linear", factor=4.0))),
    "llama_yarn": ("llama", dict(rope_parameters=YARN)),
    "mistral": ("mistral", dict(sliding_window=None, head_dim=32)),
    "mistral_windows": ("mistral", dict(sliding_window=9)),
    "mixtral": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen2": ("qwen2", {}),
    "qwen2_yarn_tied": ("qwen2", dict(tie_word_embeddings=True, rope_parameters=YARN)),
    "qwen3": ("qwen3", dict(head_dim=32)),
    "qwen3_tied": ("qwen3", dict(head_dim=24, tie_word_embeddings=True)),
    "qwen3_moe": ("qwen3_moe", dict(head_dim=32, **EXPERTS)),
    "gemma2": ("gemma2", dict(head_dim=32, query_pre_attn_scalar=32, attn_logit_softcapping=3.0, final_logit_softcapping=5.0, sliding_window=7, tie_word_embeddings=True)),
    "gemma3_text": ("gemma3_text", dict(head_dim=32, num_hidden_layers=7, query_pre_attn_scalar=32, sliding_window=7, tie_word_embeddings=True)),
    "phi3": ("phi3", dict(num_key_value_heads=4)),
    "phi3_longrope": ("phi3", dict(original_max_position_embeddings=16, rope_parameters=LONG)),
    "phi3_windows": ("phi3", dict(sliding_window=9)),
    "smollm3": ("smollm3", dict(num_hidden_layers=5, tie_word_embeddings=True)),
    "granite": ("granite", dict(embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.2, logits_scaling=8.0, tie_word_embeddings=True)),
    "granite_biases": ("granite", dict(embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.125, logits_scaling=3.0, attention_bias=True, mlp_bias=True)),
    "seed_oss": ("seed_oss", dict(head_dim=32)),
    "hunyuan": ("hunyuan_v1_dense", dict(head_dim=32, rope_parameters=HUNYUAN, tie_word_embeddings=True)),
    "hunyuan_plain": ("hunyuan_v1_dense", dict(head_dim=16)),
    "olmo2": ("olmo2", dict(num_key_value_heads=4)),
    "olmo2_groups": ("olmo2", {}),
    "olmo3": ("olmo3", dict(num_hidden_layers=5, sliding_window=7)),
    "olmo3_yarn": ("olmo3", dict(num_hidden_layers=5, sliding_window=7, rope_parameters=dict(full_attention=YARN, sliding_attention=rope("default")))),
    "glm4": ("glm4", dict(head_dim=32)),
    "glm4_plain": ("glm4", dict(head_dim=16, attention_bias=False, partial_rotary_factor=1.0, tie_word_embeddings=True)),
    "ernie4_5": ("ernie4_5", dict(head_dim=32, tie_word_embeddings=True)),
    "ernie4_5_untied": ("ernie4_5", dict(head_dim=16)),
}

# Windows that llama.cpp leaves out: up to their width nothing differs.
WINDOWS = {"mistral_windows": 9, "phi3_windows": 9}
def report(what, ok, more=""):
    global bad; bad += not ok; print(("ok    " if ok else "WRONG ") + what, more, flush=True)
def convert(what, *args):
    r = subprocess.run([os.path.abspath(a.qlora), "convert", *args], capture_output=True, text=True)
    if r.returncode: print("refused", what + ":", r.stderr.strip().splitlines()[-1][-220:], flush=True)
    return not r.returncode
def theirs(path, rows, **kw):
    """llama.cpp's logits, with caches in F32 and without flash attention."""
    m = llama_cpp.Llama(path, n_ctx=64, n_threads=2, verbose=False, logits_all=True, type_k=0, type_v=0, flash_attn=False, **kw); found = []
    for row in rows.tolist():
        m.reset(); m.eval(row); found.append(np.array(m.scores[: len(row)], dtype=np.float32))
    return torch.from_numpy(np.stack(found))
def compare(what, path, rows, want, bar, **kw):
    try: got = theirs(path, rows, **kw)
    except Exception as e: report(what + ": loads in llama.cpp", False, repr(e)[:160]); return
    few = WINDOWS.get(name, TOKENS); worst, scale = (got - want)[:, :few].abs().max().item(), want.abs().max().item()
    report(what, worst <= bar * max(scale, 1), f"largest difference {worst:.1e} of {scale:.1f}")

@torch.no_grad()
def filled(kind, more):
    torch.manual_seed(70); model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**BASE, **more}), attn_implementation="eager").float().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"): parameter.normal_(0, 0.3)
        elif parameter.ndim == 1: parameter.add_(torch.randn_like(parameter) * 0.2)
        else: parameter.normal_(0, 0.08)
    model.tie_weights(); return model

torch.set_num_threads(1)
for name, (kind, more) in MODELS.items():
    if a.only and a.only not in (name, kind): continue
    with tempfile.TemporaryDirectory() as work, torch.no_grad():
        at = lambda *parts: os.path.join(work, *parts)
        model = filled(kind, more); model.save_pretrained(at("model")); rows = torch.randint(3, VOCABULARY, (2, TOKENS)); want = model(input_ids=rows, use_cache=False).logits
        of_model = ["--model", at("model"), "--without-tokenizer"]
        if not convert(name, *of_model, "--type", "f32", "--output", at("f32.gguf")): continue
        exact = 1e-3 if "gemma" in kind else 1e-5
        compare(f"{name} F32", at("f32.gguf"), rows, want, exact)
        if convert(name, *of_model, "--type", "f16", "--output", at("f16.gguf")): compare(f"{name} F16", at("f16.gguf"), rows, want, 1e-2)
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n and not n.endswith("gate")})
        if any(n.endswith("experts") for n, _ in model.named_modules()): linear = [n for n in linear if n not in ("gate_proj", "up_proj", "down_proj")]
        peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=4, init_lora_weights=False, target_modules=linear)).eval()
        for n, parameter in peft.named_parameters():
            if "lora_" in n: parameter.normal_(0, 0.15)
        peft.save_pretrained(at("adapter")); moved = peft(input_ids=rows, use_cache=False).logits
        if convert(name + " LoRA", "--model", at("model"), "--adapter", at("adapter"), "--adapter-only", "--type", "f32", "--output", at("lora.gguf")):
            compare(f"{name} LoRA (moves by {(moved - want).abs().max():.1f})", at("f32.gguf"), rows, moved, exact, lora_path=at("lora.gguf"))
print("all as it should be" if not bad else f"{bad} WRONG"); sys.exit(bool(bad))
