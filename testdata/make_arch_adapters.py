"""Records adapters that PEFT writes on the small models of testdata/reference/archs, and what PEFT computes with them.

usage: make_arch_adapters.py testdata/reference/archs [NAME...]

Of each model: archs/<name>/adapters/<kind>/ and the logits of the first rows in archs/<name>/adapters/logits.safetensors, f32, of the adapter as
PeftModel.from_pretrained loads it again. Kinds that begin with `other_` are files that other programs and versions write and PEFT reads: with its
adapter's name in keys, with the modules' names of transformers 4.50, with nulls in the configuration. Made with PEFT 0.21.2, transformers 5.24 and
torch 2.15 on a CPU.
"""
import json, shutil, sys
from pathlib import Path
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

OUT, ONLY, POSITIONS = Path(sys.argv[1]), sys.argv[2:], 8
ATTENTION, EXPERTS = ["q_proj", "k_proj", "v_proj", "o_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IMAGES = dict(exclude_modules=".*(vision|visual|multi_modal|lm_head).*")
KINDS = {
    "ministral3": dict(all_linear=dict(target_modules="all-linear")),
    "smollm3": dict(dora=dict(target_modules=["k_proj", "down_proj"], use_dora=True, use_rslora=True)),
    "granite": dict(tokens=dict(target_modules=["q_proj", "down_proj"], trainable_token_indices=[3, 17, 40])),
    "seed_oss": dict(bias=dict(target_modules=["q_proj", "k_proj"], lora_bias=True),
                     tokens_by_name=dict(target_modules=["o_proj"], trainable_token_indices={"embed_tokens": [5, 4], "lm_head": [5, 4]})),
    "hunyuan": dict(norms=dict(target_modules=["v_proj", "up_proj"], modules_to_save=["query_layernorm", "key_layernorm", "norm"])),
    "olmo2": dict(patterns=dict(target_modules=["q_proj", "o_proj", "gate_proj"], rank_pattern={"o_proj": 3}, alpha_pattern={r"layers\.1\.mlp\.gate_proj": 5})),
    "olmo3": dict(embeddings=dict(target_modules=["embed_tokens", "q_proj"], layers_to_transform=[1, 3])),
    "glm4": dict(fused=dict(target_modules=["gate_up_proj", "o_proj"], use_dora=True)),
    "ernie": dict(head=dict(target_modules=["lm_head", "v_proj"])),
    "qwen3_5": dict(linear_attention=dict(target_modules=["in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj", "q_proj"])),
    "mixtral": dict(experts=dict(target_modules=ATTENTION[:2], target_parameters=EXPERTS),
                    router=dict(target_modules=ATTENTION[2:], target_parameters=["mlp.gate.weight", "mlp.experts.down_proj"])),
    "qwen3_moe": dict(experts=dict(target_modules=ATTENTION[:1], target_parameters=EXPERTS, rank_pattern={"down_proj": 3}, alpha_pattern={"gate_up_proj": 6})),
    "qwen3_moe_stacked": dict(experts=dict(target_modules=ATTENTION[3:], target_parameters=EXPERTS[:1], use_rslora=True)),
    "gemma3_images": dict(plain=dict(target_modules=["q_proj", "down_proj"], **IMAGES)),
}


def default_inside(key):
    parts = [("lora_A.", "lora_A.default."), ("lora_B.", "lora_B.default."), ("lora_magnitude_vector", "lora_magnitude_vector.default.weight")]
    for part, other in parts:
        key = key.replace(part, other)
    return key


def keys(rename):
    def write(folder):
        file = folder / "adapter_model.safetensors"
        save_file({rename(key): tensor for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    return write


def nulls(folder):
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    off = ["use_dora", "use_rslora", "lora_bias", "fan_in_fan_out", "init_lora_weights", "inference_mode", "use_qalora", "ensure_weight_tying",
           "trainable_token_indices", "loftq_config", "layers_to_transform", "exclude_modules"]
    file.write_text(json.dumps(config | {key: None for key in off}, indent=2, sort_keys=True))


# A kind of the list above, and how others write it.
OTHERS = {
    "smollm3": dict(other_default=("dora", keys(default_inside)),
                    other_weight=("dora", keys(lambda key: key.replace("lora_magnitude_vector", "lora_magnitude_vector.weight")))),
    "ministral3": dict(other_nulls=("all_linear", nulls)),
    "gemma3_images": dict(other_names=("plain", keys(lambda key: key.replace("model.language_model.", "language_model.model.")))),
    "mixtral": dict(other_default=("experts", keys(default_inside))),
}


def base(folder):
    config = AutoConfig.from_pretrained(folder)
    kind = AutoModelForImageTextToText if hasattr(config, "text_config") else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def adapted(folder, kind, more, out):
    torch.manual_seed(len(kind))
    model = get_peft_model(base(folder), LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=3, init_lora_weights=False, **more))
    for name, p in model.named_parameters():
        if p.requires_grad:
            # Of a size that matters beside the weights' and leaves logits where f32 is fine.
            p.copy_(torch.randn_like(p) * 0.2 if "lora_" in name and "magnitude" not in name else p + torch.randn_like(p) * 0.1)
    model.peft_config["default"].base_model_name_or_path = folder.name
    model.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)


torch.set_num_threads(1)
for name, kinds in KINDS.items():
    if ONLY and name not in ONLY:
        continue
    folder, out = OUT / name, OUT / name / "adapters"
    shutil.rmtree(out, ignore_errors=True)
    for kind, more in kinds.items():
        adapted(folder, kind, more, out / kind)
    for kind, (of, write) in OTHERS.get(name, {}).items():
        shutil.copytree(out / of, out / kind)
        write(out / kind)
    ids = load_file(folder / "reference.safetensors")["input_ids"][:, :POSITIONS].contiguous()
    tensors = {"input_ids": ids}
    with torch.no_grad():
        plain = base(folder)(input_ids=ids, use_cache=False).logits
        for kind in sorted(f.name for f in out.iterdir()):
            model = PeftModel.from_pretrained(base(folder), out / kind).eval()
            tensors["logits." + kind] = model(input_ids=ids, use_cache=False).logits.float().contiguous()
            moved = (tensors["logits." + kind] - plain).abs().max()
            print(name, kind, f"moves logits by {moved:.2f}, {sum(f.stat().st_size for f in (out / kind).iterdir()) / 1024:.0f} KiB", flush=True)
    save_file(tensors, out / "logits.safetensors")
