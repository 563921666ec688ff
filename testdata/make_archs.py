"""Records small random models of every supported architecture, and what transformers computes with them.

usage: make_archs.py testdata/reference/archs [NAME...]

Written by transformers 5.17 with torch 2.11 (those of `SMALL` and of Qwen 3.5: 5.24 and 2.15) on a CPU, eager attention, f32. Weights are stored in bf16, which
holds them exactly; logits are f32. The names are those of make_reference.py where it has the family, the shapes
are smaller and less regular: head widths that do not divide the model, windows shorter than the rows, rotary
scalings past their original context, experts in some blocks only, files in shards and with stacked experts.
"""
import shutil, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import (AutoConfig, AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration, Gemma4Config,
                          Gemma4ForConditionalGeneration, Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration, Mistral3Config,
                          Mistral3ForConditionalGeneration, PixtralVisionConfig, Qwen3_5Config, Qwen3_5ForConditionalGeneration)

OUT, ROWS, LENGTH = Path(sys.argv[1]), 2, 24
ONLY = sys.argv[2:]
BASE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def rope(kind, **more):
    return dict(rope_type=kind, rope_theta=10000.0, **more)


def divisors(n, first, step):
    return [first + step * i for i in range(n)]


TEXT = dict(BASE, head_dim=16, num_hidden_layers=3, layer_types=["sliding_attention", "full_attention", "sliding_attention"], sliding_window=5)
MODELS = {
    "llama3": ("llama", dict(attention_bias=True, mlp_bias=True, num_attention_heads=8, num_key_value_heads=2, head_dim=6,
                             rope_parameters=rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)), {}),
    "llama_linear": ("llama", dict(tie_word_embeddings=True, hidden_act="gelu", num_key_value_heads=1, rope_parameters=rope("linear", factor=4.0)), {}),
    "llama_dynamic": ("llama", dict(max_position_embeddings=16, rope_parameters=rope("dynamic", factor=2.0)), {}),
    "llama_yarn": ("llama", dict(head_dim=12, rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=16)), {}),
    "mistral": ("mistral", dict(sliding_window=7, num_key_value_heads=4, head_dim=12), {}),
    "qwen2": ("qwen2", dict(num_hidden_layers=3, use_sliding_window=True, sliding_window=6, max_window_layers=1), {}),
    "qwen3": ("qwen3", dict(head_dim=12, attention_bias=True, tie_word_embeddings=True), {}),
    "qwen3_5": ("qwen3_5_text", dict(head_dim=16, num_hidden_layers=4, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
                                     linear_value_head_dim=6), {}),
    "qwen3_5_images": ("qwen3_5", dict(head_dim=8, num_attention_heads=5, num_key_value_heads=1, hidden_size=40, linear_num_key_heads=1,
                                       linear_num_value_heads=3, linear_key_head_dim=12, linear_value_head_dim=10, linear_conv_kernel_dim=3,
                                       layer_types=["full_attention", "linear_attention"], rope_parameters=rope("default", partial_rotary_factor=0.5)), {}),
    "gemma2": ("gemma2", dict(head_dim=12, query_pre_attn_scalar=20, attn_logit_softcapping=3.0, final_logit_softcapping=5.0, sliding_window=5), {}),
    "gemma3": ("gemma3_text", dict(TEXT, query_pre_attn_scalar=24, final_logit_softcapping=4.0, rope_scaling=dict(rope_type="linear", factor=8.0)), {}),
    "gemma3_images": ("gemma3", dict(query_pre_attn_scalar=16), {}),
    "phi3": ("phi3", dict(num_key_value_heads=1, partial_rotary_factor=0.5, original_max_position_embeddings=16, tie_word_embeddings=True,
                          rope_scaling=dict(type="longrope", short_factor=divisors(2, 1.0, 0.1), long_factor=divisors(2, 2.0, 0.3))), {}),
    "mixtral": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=9, head_dim=12, intermediate_size=40), {}),
    "qwen3_moe": ("qwen3_moe", dict(head_dim=12, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=False, mlp_only_layers=[1],
                                    num_hidden_layers=3), dict(max_shard_size="40KB")),
    "qwen3_moe_stacked": ("qwen3_moe", dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40, norm_topk_prob=True,
                                            decoder_sparse_step=2), dict(save_original_format=False)),
}


# Two shapes of each: about 25 KB a model.
SMALL_BASE = dict(vocab_size=41, hidden_size=24, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                  max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=6, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)
# Without the parts of the smaller models.
GEMMA4 = dict(hidden_size_per_layer_input=0, tie_word_embeddings=False)
SMALL = {
    "ministral3": ("ministral3", dict(head_dim=8, rope_parameters=dict(YARN, llama_4_scaling_beta=0.3)), {}),
    "mistral3_images": ("mistral3", dict(model_type="ministral3", head_dim=10, num_key_value_heads=1, tie_word_embeddings=True, sliding_window=7,
                                         rope_parameters=dict(YARN, llama_4_scaling_beta=0.2, rope_theta=5000.0)), {}),
    "smollm3": ("smollm3", dict(no_rope_layer_interval=2, num_hidden_layers=3), {}),
    "smollm3_windows": ("smollm3", dict(no_rope_layers=[0, 1, 1], num_hidden_layers=3, use_sliding_window=True, sliding_window=5, attention_bias=True,
                                        mlp_bias=True, tie_word_embeddings=False, num_attention_heads=6, num_key_value_heads=3, head_dim=4), {}),
    "granite": ("granite", dict(embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.2, logits_scaling=8.0, tie_word_embeddings=True), {}),
    "granite_biases": ("granite", dict(embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.125, logits_scaling=3.0, num_key_value_heads=1,
                                       attention_bias=True, mlp_bias=True, rope_parameters=rope("linear", factor=2.0)), {}),
    "seed_oss": ("seed_oss", dict(head_dim=10, attention_dropout=0.0, residual_dropout=0.0), {}),
    "seed_oss_biases": ("seed_oss", dict(head_dim=6, attention_bias=False, attention_out_bias=True, mlp_bias=True, num_key_value_heads=4,
                                         tie_word_embeddings=True), {}),
    "hunyuan": ("hunyuan_v1_dense", dict(head_dim=8, tie_word_embeddings=True,
                                         rope_parameters=rope("dynamic", alpha=1000.0, beta_fast=32, beta_slow=1, factor=1.0, mscale=1.0, mscale_all_dim=1.0)), {}),
    "hunyuan_biases": ("hunyuan_v1_dense", dict(head_dim=12, attention_bias=True, num_attention_heads=2, num_key_value_heads=1), {}),
    "olmo2": ("olmo2", dict(num_key_value_heads=4), {}),
    "olmo2_biases": ("olmo2", dict(attention_bias=True, tie_word_embeddings=True, num_attention_heads=3, num_key_value_heads=1, head_dim=8), {}),
    "olmo3": ("olmo3", dict(num_hidden_layers=4, sliding_window=5, num_key_value_heads=1, intermediate_size=20, hidden_size=20, head_dim=6), {}),
    "olmo3_yarn": ("olmo3", dict(layer_types=["full_attention", "sliding_attention"], sliding_window=6, attention_bias=True, tie_word_embeddings=True,
                                 rope_parameters=dict(full_attention=rope("yarn", factor=4.0, original_max_position_embeddings=8),
                                                      sliding_attention=rope("default"))), {}),
    "glm4": ("glm4", dict(head_dim=8), {}),
    "glm4_plain": ("glm4", dict(head_dim=12, attention_bias=False, num_key_value_heads=1, tie_word_embeddings=True, partial_rotary_factor=1.0), {}),
    "ernie": ("ernie4_5", dict(head_dim=8), {}),
    "gemma4": ("gemma4_text", dict(GEMMA4, head_dim=8, global_head_dim=12, attention_k_eq_v=True, num_global_key_value_heads=1, num_hidden_layers=3,
                                   layer_types=["sliding_attention", "full_attention", "full_attention"], final_logit_softcapping=4.0, sliding_window=5), {}),
    "gemma4_unified": ("gemma4_unified", dict(head_dim=6, global_head_dim=16, attention_bias=True, num_attention_heads=3, num_key_value_heads=3, sliding_window=7,
                                              layer_types=["sliding_attention", "full_attention"], tie_word_embeddings=True, final_logit_softcapping=6.0,
                                              rope_parameters=dict(sliding_attention=rope("default"),
                                                                   full_attention=rope("proportional", partial_rotary_factor=0.5, factor=4.0))), {}),
    "gemma4_small": ("gemma4_text", dict(GEMMA4, tie_word_embeddings=True, head_dim=8, global_head_dim=12, num_hidden_layers=4, hidden_size=16, intermediate_size=12,
                                         layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
                                         sliding_window=5, num_kv_shared_layers=2, use_double_wide_mlp=True, hidden_size_per_layer_input=6,
                                         vocab_size_per_layer_input=41, num_key_value_heads=1), {}),
    "gemma4_images": ("gemma4", dict(head_dim=6, global_head_dim=10, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=3, hidden_size=18,
                                     intermediate_size=20, layer_types=["full_attention", "sliding_attention", "full_attention"], sliding_window=4,
                                     num_kv_shared_layers=1, hidden_size_per_layer_input=4, vocab_size_per_layer_input=43, tie_word_embeddings=True), {}),
    "gemma4_moe": ("gemma4_text", dict(GEMMA4, tie_word_embeddings=True, head_dim=6, global_head_dim=8, num_attention_heads=2, num_key_value_heads=2, hidden_size=20,
                                       num_global_key_value_heads=1, attention_k_eq_v=True, enable_moe_block=True, num_experts=5, top_k_experts=2,
                                       moe_intermediate_size=12, intermediate_size=10, layer_types=["sliding_attention", "full_attention"], sliding_window=6), {}),
    "gemma4_moe_images": ("gemma4", dict(hidden_size_per_layer_input=0, tie_word_embeddings=True, head_dim=4, global_head_dim=8, num_attention_heads=3, num_key_value_heads=1,
                                         hidden_size=16, enable_moe_block=True, num_experts=4, top_k_experts=3, moe_intermediate_size=8, intermediate_size=14,
                                         layer_types=["full_attention", "full_attention"], final_logit_softcapping=5.0), {}),
    "ernie_biases": ("ernie4_5", dict(head_dim=10, use_bias=True, tie_word_embeddings=False, num_key_value_heads=4), {}),
}


def build(kind, more):
    if kind == "mistral3":
        vision = PixtralVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=4, image_size=8, patch_size=4)
        config = Mistral3Config(text_config=more, vision_config=vision, image_token_index=40, tie_word_embeddings=more["tie_word_embeddings"])
        return Mistral3ForConditionalGeneration._from_config(config, attn_implementation="eager").float()
    if kind == "gemma3":
        vision = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
        config = Gemma3Config(text_config={**TEXT, **more}, vision_config=vision, mm_tokens_per_image=4, image_token_index=60, boi_token_index=61, eoi_token_index=62)
        return Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").float()
    if kind == "gemma4":
        vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=4, patch_size=2,
                      position_embedding_size=4)
        config = Gemma4Config(text_config=more, vision_config=vision, tie_word_embeddings=True, boi_token_id=38, eoi_token_id=38, image_token_id=39,
                              video_token_id=39, boa_token_id=40, eoa_token_index=40, audio_token_id=40)
        return Gemma4ForConditionalGeneration._from_config(config, attn_implementation="eager").float()
    if kind == "gemma4_unified":
        vision = dict(patch_size=4, mm_embed_dim=8, mm_posemb_size=4, output_proj_dims=24)
        config = Gemma4UnifiedConfig(text_config=more, vision_config=vision, audio_config=dict(audio_embed_dim=8), tie_word_embeddings=more["tie_word_embeddings"],
                                     boi_token_id=38, eoi_token_id=38, image_token_id=39, video_token_id=39, boa_token_id=40, eoa_token_index=40, audio_token_id=40)
        return Gemma4UnifiedForConditionalGeneration._from_config(config, attn_implementation="eager").float()
    if kind == "qwen3_5":
        vision = dict(hidden_size=8, intermediate_size=16, depth=1, num_heads=2, patch_size=4, out_hidden_size=40, num_position_embeddings=4)
        config = Qwen3_5Config(text_config={**BASE, **more}, vision_config=vision, image_token_id=60, video_token_id=61, vision_start_token_id=62,
                               vision_end_token_id=63, tie_word_embeddings=True)
        return Qwen3_5ForConditionalGeneration._from_config(config, attn_implementation="eager").float()
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**BASE, **more}), attn_implementation="eager").float()


torch.set_num_threads(1)
MODELS |= {name: (kind, {**SMALL_BASE, **more}, how) for name, (kind, more, how) in SMALL.items()}
for name, (kind, more, how) in MODELS.items():
    if ONLY and name not in ONLY:
        continue
    torch.manual_seed(70)
    model = build(kind, more).eval()
    with torch.no_grad():
        for path, p in model.named_parameters():
            if path.endswith(("gate.weight", "router.proj.weight")):
                p.normal_(0, 0.3)  # routers that tell experts apart
            elif p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.2)
                if kind.startswith("gemma4") and path.endswith("q_norm.weight"):
                    p.mul_(0.3)  # it holds the scale of scores
            else:
                p.mul_(4.0)
            p.copy_(p.bfloat16().float())
        for path, scalar in model.named_buffers():
            if path.endswith("layer_scalar"):
                scalar.copy_((0.6 + 0.3 * torch.rand_like(scalar)).bfloat16().float())
        ids = torch.randint(3, 38, (ROWS, 16)) if name in SMALL else torch.randint(3, 60, (ROWS, LENGTH))
        logits = model(input_ids=ids, use_cache=False).logits.float().contiguous()
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    model.bfloat16().save_pretrained(folder, **how)
    save_file({"input_ids": ids, "logits": logits}, folder / "reference.safetensors")
    (folder / "generation_config.json").unlink(missing_ok=True)
    print(name, f"{sum(f.stat().st_size for f in folder.iterdir()) / 1024:.0f} KiB, largest logit {logits.abs().max():.2f}", flush=True)
