"""Published configurations, shrunk, in transformers and here: does the loss agree?

usage: compare_configs.py LOGITS FOLDER [WORK]

LOGITS is the program of `cargo build --release -p burn-qlora --example logits`. FOLDER holds configurations as they were published,
any *.json below it with a `model_type`, such as the config.json files that `hf download ORG/NAME config.json --local-dir FOLDER/NAME`
brings. Of each, sizes are changed and nothing else: every key stays, with its value unless it is a size, but `quantization_config`, since
the weights are made in f32. transformers makes a random
model of it in f32, and both compute the loss of the same random tokens. What transformers does not load is left out and said.
A line for each file, and how far the losses are apart: up to 1e-5, since both sum a few hundred products in f32 in their own order.
"""
import copy, json, subprocess, sys, tempfile
from pathlib import Path
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

LOGITS, FOLDER = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
WORK = Path(sys.argv[3]) if len(sys.argv) > 3 else None
VOCABULARY, LENGTH, BAR = 96, 40, 1e-5
SAME = {"kimi_k2": ("deepseek_v3", ["DeepseekV3ForCausalLM"])}


def heads(config):
    """Fewer heads, in the published proportion where it is one."""
    queries, keys = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if not queries:
        return
    groups = queries // keys if keys and queries % keys == 0 else 1
    few = 2 if groups == 1 else min(groups, 4)
    config["num_attention_heads"] = few * (1 if groups == 1 else 1 + (few < 4))
    if keys:
        config["num_key_value_heads"] = config["num_attention_heads"] // few if groups > 1 else config["num_attention_heads"]


def shrink(config):
    """Sizes only. What hangs on one, such as a list with an entry for each layer, is cut to it."""
    config = copy.deepcopy(config)
    config.pop("quantization_config", None)
    for section in [config, *(config[key] for key in ("text_config", "vision_config", "audio_config") if isinstance(config.get(key), dict))]:
        if section is config.get("text_config") and "hidden_size" not in section:
            # It relies on defaults, which are those of a whole model.
            section.update(num_hidden_layers=4, hidden_size=64, intermediate_size=40, num_attention_heads=4, num_key_value_heads=4)
        layers = section.get("num_hidden_layers")
        if layers:
            # As many as show every kind that the first period has, and of those that share keys of others, two periods.
            most = 12 if section.get("num_kv_shared_layers") else 7 if "layer_types" in section or "sliding_window_pattern" in section else 4
            section["num_hidden_layers"] = min(layers, most)
            if section.get("num_kv_shared_layers"):
                section["num_kv_shared_layers"] = min(section["num_kv_shared_layers"], 5)
            for key, value in section.items():
                if isinstance(value, list) and len(value) == layers:
                    section[key] = value[: section["num_hidden_layers"]]
        for key, most in {"vocab_size": VOCABULARY, "intermediate_size": 40, "moe_intermediate_size": 24, "max_window_layers": 2, "num_experts": 8,
                          "num_local_experts": 8, "org_vocab_size": VOCABULARY, "sliding_window": 9, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 12,
                          "linear_value_head_dim": 10, "global_head_dim": 24, "num_global_key_value_heads": 1, "vocab_size_per_layer_input": VOCABULARY,
                          "hidden_size_per_layer_input": 12, "shared_expert_intermediate_size": 20, "n_routed_experts": 16, "q_lora_rank": 20,
                          "kv_lora_rank": 12, "qk_nope_head_dim": 12, "qk_rope_head_dim": 16, "v_head_dim": 14}.items():
            if isinstance(section.get(key), int):
                section[key] = min(section[key], most)
        for key in ("num_experts_per_tok", "top_k_experts"):
            if isinstance(section.get(key), int):
                section[key] = min(section[key], 3)
        heads(section)
        queries, width = section.get("num_attention_heads"), 16
        factors = [p for p in (section.get("rope_scaling"), section.get("rope_parameters")) if isinstance(p, dict)]
        longrope = [p for p in factors if "short_factor" in p]
        if section.get("head_dim"):
            section["head_dim"] = width
        if section.get("attention_head_dim"):
            section["attention_head_dim"] = width
        if section.get("hidden_size") and queries:
            section["hidden_size"] = queries * width
        for scaling in factors:
            if isinstance(scaling.get("mrope_section"), list):
                pairs = int(width * scaling.get("partial_rotary_factor", section.get("partial_rotary_factor", 1.0))) // 2
                scaling["mrope_section"] = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
        for scaling in longrope:
            partial = section.get("partial_rotary_factor", 1.0)
            for key in ("short_factor", "long_factor"):
                scaling[key] = scaling[key][: int(width * partial) // 2]
        # Contexts shorter than the tokens, so that scalings beyond them are seen.
        for scaling in [section, *factors]:
            if isinstance(scaling.get("original_max_position_embeddings"), int):
                scaling["original_max_position_embeddings"] = 16
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if isinstance(section.get(key), (int, list)):
                section[key] = 0
    for key in ("image_token_index", "image_token_id", "boi_token_index", "eoi_token_index", "audio_token_id", "audio_token_index", "video_token_id",
                "vision_start_token_id", "vision_end_token_id"):
        if isinstance(config.get(key), int):
            config[key] = VOCABULARY - 1
    vision = config.get("vision_config")
    if isinstance(vision, dict):
        vision.update(image_size=28, patch_size=14, num_hidden_layers=1)
        if "depth" in vision:
            width = config.get("text_config", config)["hidden_size"]
            vision.update(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=width, fullatt_block_indexes=[0],
                          deepstack_visual_indexes=[0] if "deepstack_visual_indexes" in vision else [], num_position_embeddings=4)
    return config


def known(config):
    """What transformers reads the configuration as: types that it has no name for are computed as those that they are."""
    config = copy.deepcopy(config)
    config.pop("auto_map", None)
    for section in (config, config.get("text_config")):
        if isinstance(section, dict) and section.get("model_type") in SAME:
            section["model_type"], section["architectures"] = SAME[section["model_type"]]
            section.pop("auto_map", None)
    return config


def build(folder):
    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(5)
    name = (config.architectures or [""])[0]
    # Rewards and embeddings have bodies of the same type, which get a head of words here.
    kind = getattr(transformers, name, None) if name.endswith(("ForCausalLM", "ForConditionalGeneration")) else None
    generic = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModelForImageTextToText
    make = kind._from_config if kind else generic.from_config
    model = make(config, attn_implementation="eager", dtype=torch.float32).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.normal_(0, 0.3)
            elif parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.normal_(0, 0.08)
    model.tie_weights()
    return model


def loss(logits, ids):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten()).item()


def compare(published, work):
    small = shrink(published)
    (work / "config.json").write_text(json.dumps(known(small)))
    model = build(work)
    # transformers 5.24 writes the language model's blocks under a name that only the images' encoder of Kimi K2.5 has in its files.
    model.save_pretrained(work, save_original_format=published["model_type"] != "kimi_k25")
    (work / "config.json").write_text(json.dumps(small))
    ids = torch.randint(3, VOCABULARY - 3, (2, LENGTH))
    with torch.no_grad():
        theirs = loss(model(input_ids=ids, use_cache=False).logits.float(), ids)
    save_file({"input_ids": ids}, work / "ids")
    ran = subprocess.run([LOGITS, work, work / "ids", work / "out"], capture_output=True, text=True)
    if ran.returncode:
        return theirs, None, ran.stderr.strip().splitlines()[-1]
    ours = torch.frombuffer(bytearray((work / "out").read_bytes()), dtype=torch.float32).view(*ids.shape, -1)
    return theirs, loss(ours, ids), ""


torch.set_num_threads(1)
files = sorted(path for path in FOLDER.rglob("*.json") if '"model_type"' in path.read_text())
agree, differ, refused, skipped, worst = 0, 0, 0, 0, 0.0
for path in files:
    name = path.relative_to(FOLDER)
    with tempfile.TemporaryDirectory(dir=WORK) as work:
        try:
            theirs, ours, why = compare(json.loads(path.read_text()), Path(work))
        except Exception as error:  # what transformers makes of the file
            skipped += 1
            print(f"skip     {name}: transformers: {str(error).splitlines()[0][:160]}", flush=True)
            continue
    if ours is None:
        refused += 1
        print(f"refused  {name}: {why[-260:]}", flush=True)
        continue
    apart = abs(ours - theirs)
    worst = max(worst, apart)
    agree, differ = agree + (apart <= BAR), differ + (apart > BAR)
    print(f"{'ok' if apart <= BAR else 'DIFFERS':8} {name}: loss {theirs:.6f}, apart {apart:.1e}", flush=True)
print(f"{len(files)} files: {agree} agree, {differ} differ, {refused} refused, {skipped} that transformers does not load; worst {worst:.1e}")
sys.exit(1 if differ else 0)
