"""Adapters of every kind against PEFT, on the CPU, in both directions.

    cargo build --release --bin qlora --bin conformance
    python benches/peers/check_adapters.py --bin target/release --reference DIR

1. Made by PEFT, with random values, on the reference models (DIR/tiny-llama, DIR/archs/*): combinations of DoRA, rsLoRA,
   patterns, biases, embeddings, heads, rows of single tokens, whole modules, exclusions, PiSSA and OLoRA as saved without conversion.
2. Trained by us for a few steps, one of each kind that the configuration reaches, and loaded by PEFT; the same over a random model of each
   family, with the reference model's tokenizer.

3. Trained by us for five steps, and from the first of them on by PEFT and torch's AdamW, with our moments: the same
   adapter in the end, magnitudes, biases, embeddings, rows of single tokens and whole modules included.

In 1 and 2 PEFT's logits on the f32 base are recorded in a folder of the reference layout, and `conformance` compares.
Needs torch, transformers and peft==0.21.*
"""
import argparse, json, os, shutil, subprocess, sys, tempfile, warnings
import torch, transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from peft import LoraConfig, PeftModel, get_peft_model

warnings.filterwarnings("ignore"); os.environ["TQDM_DISABLE"] = "1"; transformers.utils.logging.disable_progress_bar()
p = argparse.ArgumentParser(); p.add_argument("--bin", required=True); p.add_argument("--reference", required=True); p.add_argument("--only", default=""); a = p.parse_args()
ref, bins, tmp, bad = os.path.abspath(a.reference), os.path.abspath(a.bin), tempfile.mkdtemp(), 0
DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../examples/quickstart/word_problems.jsonl")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MADE = {
    "tiny-llama": dict(
        dora_rslora_patterns=dict(use_dora=True, use_rslora=True, target_modules=["q_proj", "k_proj", "down_proj"], rank_pattern={"k_proj": 2, r"layers\.3\.mlp\.down_proj": 7}, alpha_pattern={"down_proj": 3}),
        embeddings_whole=dict(target_modules=["embed_tokens", "v_proj"], modules_to_save=["norm", "lm_head"]),
        embeddings_dora=dict(use_dora=True, target_modules=["embed_tokens", "up_proj"]),
        head_dora=dict(use_dora=True, target_modules=["lm_head", "o_proj"]),
        head=dict(target_modules=["lm_head", "q_proj"], lora_bias=True),
        whole_mlp=dict(target_modules=["q_proj"], modules_to_save=["mlp", "embed_tokens"]),
        tied=dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        tied_lora=dict(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
        all_linear_excluded=dict(target_modules="all-linear", exclude_modules=r".*layers\.[02]\..*|.*\.o_proj"),
        layers_pattern=dict(target_modules=["gate_proj"], layers_to_transform=[2, 5], layers_pattern="layers"),
        one_layer=dict(target_modules=["gate_proj"], layers_to_transform=3),
        tokens=dict(target_modules=["q_proj"], trainable_token_indices=[300, 5, 4000]),
        tokens_by_name=dict(target_modules=["v_proj"], trainable_token_indices={"embed_tokens": [7, 6], "lm_head": [7, 6]}),
        gaussian=dict(target_modules=["q_proj"], init_lora_weights="gaussian"),
        pissa=dict(target_modules=["q_proj", "up_proj"], init_lora_weights="pissa"),
        olora_dora=dict(target_modules=["v_proj", "down_proj"], init_lora_weights="olora", use_dora=True),
        olora_rslora=dict(target_modules=["v_proj", "down_proj"], init_lora_weights="olora", use_rslora=True),
    ),
    "qwen2": dict(bias=dict(target_modules=["q_proj", "v_proj", "o_proj"], lora_bias=True), bias_all=dict(target_modules=["q_proj", "down_proj"], bias="all"), dora=dict(target_modules="all-linear", use_dora=True), whole=dict(target_modules=["o_proj"], modules_to_save=["q_proj", "norm"])),
    "phi3": dict(dora=dict(target_modules=["qkv_proj", "gate_up_proj", "o_proj"], use_dora=True, use_rslora=True), all_linear=dict(target_modules="all-linear", rank_pattern={"qkv_proj": 3})),
    "gemma2": dict(embeddings=dict(target_modules=["embed_tokens", "q_proj"]), dora=dict(target_modules=["embed_tokens", "down_proj"], use_dora=True), norms=dict(target_modules=["k_proj"], modules_to_save=["layernorm", "norm"])),
    "qwen3": dict(norms=dict(target_modules=["k_proj"], modules_to_save=["q_norm", "k_norm"]), dora=dict(target_modules=["k_proj", "up_proj"], use_dora=True)),
}
TRAINED = dict(
    plain="", dora="use_dora=true use_rslora=true", bias="lora_bias=true", gaussian="init=gaussian", pissa="init=pissa", pissa_fast="init=pissa_niter_4 use_dora=true", olora="init=olora use_rslora=true", eva="init=eva eva_batches=4",
    tokens="trainable_token_indices=[2,300,77]", whole='modules_to_save=["norm","lm_head"]', table='modules_to_save=["embed_tokens"]', embeddings='target_modules=["embed_tokens","q_proj","lm_head"] use_dora=true',
    mixed='rank_pattern={q_proj=2} alpha_pattern={v_proj=4} exclude_modules=["down_proj"] layers_to_transform=[0,3,5] layers_pattern=["layers"]',
)

BASE = dict(vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
FAMILIES = dict(
    ministral3=dict(head_dim=32, rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16, llama_4_scaling_beta=0.3)), smollm3={}, granite=dict(embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.2, logits_scaling=8.0, tie_word_embeddings=True),
    seed_oss=dict(head_dim=32), hunyuan_v1_dense=dict(head_dim=32), olmo2={}, olmo3=dict(sliding_window=9), glm4=dict(head_dim=32), ernie4_5=dict(head_dim=32), qwen3_5_text=dict(head_dim=32, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=12),
    phi3=dict(num_key_value_heads=4), gemma2=dict(head_dim=32), gemma3_text=dict(head_dim=32, sliding_window=9), qwen2={}, qwen3=dict(head_dim=32), mixtral=dict(num_local_experts=4), qwen3_moe=dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
)

# PEFT decomposes in f32 when it loads a PiSSA adapter, and what is left of the weights then depends on the LAPACK at
# hand: logits move by 1e-4. In f64 they don't.
svd = torch.linalg.svd
torch.linalg.svd = lambda x, **kw: tuple(t.to(x.dtype) for t in svd(x.double(), **kw))

def base(path): return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
@torch.no_grad()
def logits(m, ids): return m(input_ids=ids).logits.float().contiguous()

def folder(name, model):
    """A folder of the reference layout with one model."""
    d = os.path.join(tmp, name); os.makedirs(os.path.join(d, "adapters")); shutil.copytree(model, os.path.join(d, os.path.basename(model)))
    g = torch.Generator().manual_seed(5); vocab = json.load(open(os.path.join(model, "config.json")))["vocab_size"]
    return d, torch.randint(4, vocab, (3, 24), generator=g)

def compare(d, ids, out):
    global bad
    save_file({"input_ids": ids, **out}, os.path.join(d, "adapters", "logits.safetensors"))
    r = subprocess.run([os.path.join(bins, "conformance"), "--reference", d, "--device", "cpu", "--only", "adapters"], capture_output=True, text=True)
    print(r.stdout, r.stderr, flush=True); bad += r.returncode != 0

for arch, kinds in MADE.items():
    if a.only and a.only not in ("made", arch): continue
    model = os.path.join(ref, arch) if arch == "tiny-llama" else os.path.join(ref, "archs", arch)
    if not os.path.isdir(model): print("skipped: no", model); continue
    d, ids = folder("made-" + arch, model); out = {}
    for seed, (kind, kw) in enumerate(kinds.items()):
        torch.manual_seed(seed); m = get_peft_model(base(model), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **{"init_lora_weights": False, **kw})).eval()
        with torch.no_grad():
            for n, t in m.named_parameters():
                if t.requires_grad: t.add_(torch.randn_like(t) * (0.02 if kw.get("init_lora_weights") else 0.02 if "tokens_delta" in n else 0.01 if "modules_to_save" in n or "bias" in n or "magnitude" in n else 0.0))
                if "embedding" in n: t.mul_(0.1)  # standard normal factors make rows a hundred times the table's
                if n.endswith("bias"): t.add_(torch.randn_like(t) * (0.1 if t.requires_grad else 0))
        m.peft_config["default"].base_model_name_or_path = os.path.basename(model)
        path = os.path.join(d, "adapters", kind); m.save_pretrained(path); del m
        out["logits." + kind] = logits(PeftModel.from_pretrained(base(model), path).eval(), ids)
    compare(d, ids, out)

def trained(name, model, kinds):
    global bad
    d, ids = folder("trained-" + name, model); out = {}
    for kind, keys in kinds.items():
        run = os.path.join(tmp, f"run-{name}-{kind}"); config = os.path.join(tmp, kind + ".toml"); open(config, "w").write(f'device = "cpu"\n[model]\npath = "{model}"\n[quantization]\nquant_type = "none"\n[lora]\nrank = 4\nalpha = 8\n[data]\ntrain = "{DATA}"\nmax_length = 96\n[train]\noutput_dir = "{run}"\nmax_steps = 4\nbatch_size = 2\ngradient_accumulation_steps = 1\nlearning_rate = 2e-3\n')
        r = subprocess.run([os.path.join(bins, "qlora"), "train", config, *(f"--set=lora.{k}" for k in keys.split())], capture_output=True, text=True)
        if r.returncode: print("WRONG", kind, r.stderr); bad += 1; continue
        path = os.path.join(d, "adapters", kind); shutil.copytree(os.path.join(run, "adapter"), path)
        c = json.load(open(os.path.join(path, "adapter_config.json"))); c["base_model_name_or_path"] = os.path.basename(model)
        json.dump(c, open(os.path.join(path, "adapter_config.json"), "w"), indent=2, sort_keys=True)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always"); m = PeftModel.from_pretrained(base(model), path).eval()
        for w in seen:
            if "adapter keys" in str(w.message): print("WRONG", kind, w.message); bad += 1
        out["logits." + kind] = logits(m, ids)
    compare(d, ids, out)

if not a.only or a.only == "trained": trained("tiny-llama", os.path.join(ref, "tiny-llama"), TRAINED)
for kind, more in FAMILIES.items():
    if a.only and a.only not in ("families", kind): continue
    torch.manual_seed(70); model = os.path.join(tmp, kind); m = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**BASE, **more})).float()
    with torch.no_grad():
        for n, t in m.named_parameters(): t.add_(torch.randn_like(t) * 0.2) if t.ndim == 1 else t.normal_(0, 0.3 if n.endswith("gate.weight") else 0.08)
    m.tie_weights(); m.save_pretrained(model); del m
    for n in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"): shutil.copy(os.path.join(ref, "tiny-llama", n), model)
    # PEFT has no DoRA on stacked experts.
    trained(kind, model, {n: TRAINED[n] for n in (("plain",) if any("experts" in k for k in more) else ("plain", "dora"))})
# Names of our moments, by the ends of PEFT's parameters.
PARTS = {"lora_A.default.weight": "lora_a", "lora_B.default.weight": "lora_b", "lora_B.default.bias": "lora_bias", "lora_magnitude_vector.default.weight": "lora_magnitude", "lora_embedding_A.default": "lora_embedding_a", "lora_embedding_B.default": "lora_embedding_b", "modules_to_save.default.weight": "weight", "token_adapter.trainable_tokens_delta.default": "trainable_tokens_delta"}
def moments_of(name, moments):
    name = name.removeprefix("base_model.model.")
    for end, part in PARTS.items():
        if name.endswith("." + end):
            key = name.removesuffix(end) + part; shape = lambda v, p: v.reshape(p.shape)
            return lambda p: {"step": torch.tensor(1.0), "exp_avg": shape(moments[key + ".m"], p), "exp_avg_sq": shape(moments[key + ".v"], p)}
    raise SystemExit("no moments for " + name)

if not a.only or a.only == "continued":
    model = os.path.join(ref, "tiny-llama"); tokenizer = AutoTokenizer.from_pretrained(model)
    text = "The boxes hold three apples each, and there are twelve of them on the market this morning."; rows = os.path.join(tmp, "row.jsonl"); open(rows, "w").write(json.dumps({"text": text}) + "\n")
    ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
    for kind in ("plain", "dora", "bias", "whole", "table", "embeddings", "mixed", "tokens"):
        run = os.path.join(tmp, "cont-" + kind); config = os.path.join(tmp, "cont-" + kind + ".toml")
        open(config, "w").write(f'device = "cpu"\n[model]\npath = "{model}"\n[quantization]\nquant_type = "none"\n[lora]\nrank = 4\nalpha = 8\n[data]\ntrain = "{rows}"\nformat = "text"\nloss_on = "all"\n[train]\noutput_dir = "{run}"\nmax_steps = 5\nbatch_size = 1\ngradient_accumulation_steps = 1\nlearning_rate = 1e-3\nwarmup_steps = 0\nmax_grad_norm = 0\nsave_every = 1\nsave_limit = 0\n')
        r = subprocess.run([os.path.join(bins, "qlora"), "train", config, *(f"--set=lora.{k}" for k in TRAINED[kind].split())], capture_output=True, text=True)
        if r.returncode: print("WRONG", kind, r.stderr); bad += 1; continue
        first = os.path.join(run, "checkpoint-000001"); m = PeftModel.from_pretrained(base(model), first, is_trainable=True)
        named = [(n, t) for n, t in m.named_parameters() if t.requires_grad]; moments = load_file(os.path.join(first, "optimizer.safetensors"))
        opt = torch.optim.AdamW([t for _, t in named], lr=1e-3, weight_decay=0.0)
        for n, t in named: opt.state[t] = moments_of(n, moments)(t)
        losses = []
        for _ in range(4):
            loss = m(input_ids=ids, labels=ids).loss; opt.zero_grad(); loss.backward(); opt.step(); losses.append(loss.item())
        m.save_pretrained(os.path.join(tmp, "theirs-" + kind)); ours, theirs = (load_file(os.path.join(d, "adapter_model.safetensors")) for d in (os.path.join(run, "adapter"), os.path.join(tmp, "theirs-" + kind)))
        logged = [json.loads(l)["loss"] for l in open(os.path.join(run, "metrics.jsonl")) if '"loss"' in l][1:]
        off = max(abs(x - y) for x, y in zip(losses, logged)); started = load_file(os.path.join(first, "adapter_model.safetensors"))
        moved = sum((theirs[k] - started[k]).square().sum() for k in ours) ** 0.5; away = sum((theirs[k] - ours[k]).square().sum() for k in ours) ** 0.5
        missing = [k for k in theirs if k not in ours and "base_layer" not in k] + [k for k in ours if k not in theirs]
        # f32 in another order; AdamW divides by the root of tiny second moments, which is where most of it comes from.
        ok = not missing and len(logged) == 4 and off < 1e-4 and away < 0.02 * moved; bad += not ok
        print(("ok    " if ok else "WRONG ") + f"continued {kind}: losses off by {off:.1e}, adapter by {away / moved:.1e} of its way", missing, flush=True)
shutil.rmtree(tmp); sys.exit(bad > 0)
