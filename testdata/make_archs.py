"""Records small random models of every supported architecture, and what transformers computes with them.

usage: make_archs.py testdata/reference/archs [--steps] [NAME...]

With --steps the models stay as they are, and only the steps beside PEFT (training.json) are recorded again.

Written by transformers 5.17 with torch 2.11 (those of `SMALL` and of Qwen 3.5: 5.24 and 2.15) on a CPU, eager attention, f32. Weights are stored in bf16, which
holds them exactly; logits are f32. The names are those of make_reference.py where it has the family, the shapes
are smaller and less regular: head widths that do not divide the model, windows shorter than the rows, rotary
scalings past their original context, experts in some blocks only, files in shards and with stacked experts.
"""
import json, shutil, sys
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, Gemma3Config,
                          Gemma3ForConditionalGeneration, Gemma4Config, Gemma4ForConditionalGeneration, Gemma4UnifiedConfig,
                          Gemma4UnifiedForConditionalGeneration,
                          Mistral3Config, Mistral3ForConditionalGeneration, PixtralVisionConfig, Qwen3_5Config, Qwen3_5ForConditionalGeneration,
                          Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration)

OUT, ROWS, LENGTH = Path(sys.argv[1]), 2, 24
STEPS_ALONE = "--steps" in sys.argv
ONLY = [name for name in sys.argv[2:] if name != "--steps"]
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
SINKS_YARN = rope("yarn", factor=4.0, original_max_position_embeddings=8, beta_fast=32.0, beta_slow=1.0, truncate=False)
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
    "qwen2_5_vl": ("qwen2_5_vl", dict(num_key_value_heads=1, hidden_size=32, use_sliding_window=True, sliding_window=6, max_window_layers=1, tie_word_embeddings=False,
                                      rope_parameters=rope("default", mrope_section=[1, 1, 2])), {}),
    "qwen3_vl": ("qwen3_vl", dict(head_dim=12, tie_word_embeddings=True, num_attention_heads=3, num_key_value_heads=1,
                                  rope_parameters=rope("default", mrope_section=[2, 2, 2], mrope_interleaved=True)), {}),
    "qwen3_vl_moe": ("qwen3_vl_moe", dict(head_dim=8, num_attention_heads=3, num_key_value_heads=1, num_experts=5, num_experts_per_tok=2,
                                          moe_intermediate_size=12, tie_word_embeddings=True,
                                          rope_parameters=rope("default", mrope_section=[2, 1, 1], mrope_interleaved=True)), {}),
    "qwen3_vl_moe_inputs": ("qwen3_vl_moe", dict(head_dim=6, num_experts=4, num_experts_per_tok=3, moe_intermediate_size=12, num_hidden_layers=3, hidden_size=16,
                                                 intermediate_size=20, mlp_only_layers=[1], attention_bias=True, tie_word_embeddings=False,
                                                 rope_parameters=rope("default", mrope_section=[1, 1, 1], mrope_interleaved=True)), dict(inputs_first=True)),
    "ernie": ("ernie4_5", dict(head_dim=8), {}),
    "qwen3_next": ("qwen3_next", dict(head_dim=8, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
                                      linear_num_value_heads=6, linear_key_head_dim=6, linear_value_head_dim=4, num_experts=4, num_experts_per_tok=2,
                                      moe_intermediate_size=12, shared_expert_intermediate_size=20, mlp_only_layers=[1]), {}),
    "qwen3_next_stacked": ("qwen3_next", dict(head_dim=12, layer_types=["full_attention", "linear_attention"], attention_bias=True, tie_word_embeddings=True,
                                              linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=10, linear_value_head_dim=8,
                                              linear_conv_kernel_dim=3, num_experts=3, num_experts_per_tok=1, moe_intermediate_size=20,
                                              shared_expert_intermediate_size=9, norm_topk_prob=False,
                                              rope_parameters=rope("default", partial_rotary_factor=0.5)), dict(save_original_format=False)),
    "qwen3_5_moe": ("qwen3_5_moe_text", dict(head_dim=16, num_key_value_heads=1, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
                                             linear_num_value_heads=4, linear_key_head_dim=5, linear_value_head_dim=6, num_experts=5, num_experts_per_tok=3,
                                             moe_intermediate_size=12, shared_expert_intermediate_size=14), {}),
    "qwen3_5_moe_images": ("qwen3_5_moe", dict(head_dim=8, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=1, linear_num_value_heads=3,
                                               linear_key_head_dim=8, linear_value_head_dim=4, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16,
                                               shared_expert_intermediate_size=8), dict(save_original_format=False)),
    "glm4_moe": ("glm4_moe", dict(head_dim=8, attention_bias=True, use_qk_norm=True, moe_intermediate_size=12, n_routed_experts=6, num_experts_per_tok=2,
                                  routed_scaling_factor=1.5, num_mtp_layers=0), {}),
    "glm4_moe_groups": ("glm4_moe", dict(hidden_size=32, head_dim=12, num_key_value_heads=1, partial_rotary_factor=0.5, moe_intermediate_size=8, n_routed_experts=6, num_experts_per_tok=3, n_group=3,
                                         topk_group=2, n_shared_experts=2, norm_topk_prob=False, tie_word_embeddings=True, first_k_dense_replace=0,
                                         num_attention_heads=3), {}),
    "deepseek_v2": ("deepseek_v2", dict(num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6,
                                        moe_intermediate_size=12, n_routed_experts=6, num_experts_per_tok=2, first_k_dense_replace=1,
                                        rope_parameters=YARN), {}),
    "deepseek_v2_ranks": ("deepseek_v2", dict(num_attention_heads=3, num_key_value_heads=3, attention_bias=True, q_lora_rank=9, kv_lora_rank=10, qk_nope_head_dim=4,
                                              qk_rope_head_dim=6, v_head_dim=8, moe_intermediate_size=12, n_routed_experts=4, num_experts_per_tok=3,
                                              n_shared_experts=1, tie_word_embeddings=True), {}),
    "deepseek_v3": ("deepseek_v3", dict(num_key_value_heads=4, attention_bias=True, q_lora_rank=10, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6,
                                        moe_intermediate_size=12, n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2, first_k_dense_replace=1,
                                        rope_parameters=YARN), dict(save_original_format=False)),
    "deepseek_v3_whole": ("deepseek_v3", dict(num_attention_heads=3, num_key_value_heads=3, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=2, qk_rope_head_dim=6,
                                              v_head_dim=10, moe_intermediate_size=12, n_routed_experts=4, num_experts_per_tok=3, n_group=1, topk_group=1,
                                              first_k_dense_replace=0, rope_interleave=False, norm_topk_prob=False, tie_word_embeddings=True,
                                              n_shared_experts=2), {}),
    "glm4_moe_lite": ("glm4_moe_lite", dict(num_key_value_heads=4, q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=10,
                                            moe_intermediate_size=12, n_routed_experts=5, num_experts_per_tok=2), {}),
    "glm4_moe_lite_layers": ("glm4_moe_lite", dict(hidden_size=32, num_attention_heads=2, num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8,
                                                   v_head_dim=4, moe_intermediate_size=8, n_routed_experts=6, num_experts_per_tok=3, n_group=2, topk_group=1,
                                                   mlp_layer_types=["sparse", "dense", "sparse"], num_hidden_layers=3, tie_word_embeddings=True,
                                                   rms_norm_eps=1e-4), {}),
    "lfm2": ("lfm2", dict(num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"], block_multiple_of=4), {}),
    "lfm2_wide": ("lfm2", dict(layer_types=["full_attention", "conv"], conv_L_cache=4, block_auto_adjust_ff_dim=False, tie_word_embeddings=False,
                               num_attention_heads=3, num_key_value_heads=1, norm_eps=1e-3), {}),
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
    "gpt_oss": ("gpt_oss", dict(head_dim=10, intermediate_size=20, num_local_experts=4, num_experts_per_tok=2, sliding_window=5,
                                rope_parameters=SINKS_YARN), {}),
    "gpt_oss_tied": ("gpt_oss", dict(hidden_size=32, intermediate_size=32, head_dim=6, num_attention_heads=4, num_key_value_heads=1, num_local_experts=3,
                                     num_experts_per_tok=2, sliding_window=7, layer_types=["full_attention", "sliding_attention"], attention_bias=False,
                                     tie_word_embeddings=True, rope_parameters=dict(SINKS_YARN, rope_theta=5000.0)), {}),
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
    if kind in ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"):
        vision = dict(hidden_size=8, intermediate_size=8, depth=1, num_heads=2, patch_size=2, out_hidden_size=more["hidden_size"], spatial_merge_size=1)
        vision |= dict(fullatt_block_indexes=[0], window_size=4) if kind == "qwen2_5_vl" else dict(num_position_embeddings=4, deepstack_visual_indexes=[0])
        config = CONFIG_MAPPING[kind](text_config=more, vision_config=vision, image_token_id=38, video_token_id=39, vision_start_token_id=37,
                                      vision_end_token_id=40, tie_word_embeddings=more["tie_word_embeddings"])
        return AutoModelForImageTextToText.from_config(config, attn_implementation="eager").float()
    if kind == "qwen3_5_moe":
        more = {key: value for key, value in more.items() if key != "intermediate_size"}  # as published files
        vision = dict(hidden_size=8, intermediate_size=8, depth=1, num_heads=2, patch_size=2, out_hidden_size=24, num_position_embeddings=4, deepstack_visual_indexes=[])
        config = Qwen3_5MoeConfig(text_config=more, vision_config=vision, image_token_id=37, video_token_id=38, vision_start_token_id=39, vision_end_token_id=40)
        return Qwen3_5MoeForConditionalGeneration._from_config(config, attn_implementation="eager").float()
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


STEPS, RATE, RANK = 5, 1e-2, 4
# At the usual rate these ones' steps hang on roundings: in f64 PEFT's own gradient norms of the first are others by 1e-3, at this rate by
# 1e-5; of the second ours on an H200 are others by 3e-4.
RATES = {"gemma4_small": 2e-3, "gemma4_images": 2e-3}
LEFT_OUT = ("vision", "visual", "multi_modal", "audio", "lm_head", "embed_")


def train(model, folder):
    """Steps of PEFT with torch's AdamW over all linear layers of the language model that are modules (transformers 5 stacks experts, and PEFT
    leaves those out; routers' and other gates are left out here). Factors are made of numbers that the Rust side makes too."""
    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules()
              if isinstance(module, torch.nn.Linear) and not any(part in name for part in LEFT_OUT) and not name.endswith("gate")}
    if any(name.endswith("experts") for name, _ in model.named_modules()):
        # PEFT takes these for the stacked experts' parameters, dense blocks' and shared experts' too.
        linear -= {"gate_proj", "up_proj", "down_proj"}
    model = get_peft_model(model.float().eval(), LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=sorted(linear),
                                                            exclude_modules=".*(" + "|".join(LEFT_OUT) + ").*"))
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    paths = sorted({name.split(".lora_")[0] for name in factors})
    with torch.no_grad():
        for name, p in factors.items():
            number = 2 * paths.index(name.split(".lora_")[0]) + ("lora_B" in name)
            p.copy_((((torch.arange(p.numel()) * 389 + number * 97) % 1021) / 4096 - 0.125).reshape(p.shape))
    ids = load_file(folder / "reference.safetensors")["input_ids"]
    rate = RATES.get(folder.name, RATE)
    optimizer = torch.optim.AdamW(factors.values(), lr=rate, weight_decay=0.0)
    losses, norms = [], []
    for _ in range(STEPS):
        logits = model(input_ids=ids, use_cache=False).logits.float()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.stack([p.grad.square().sum() for p in factors.values() if p.grad is not None]).sum().sqrt().item())
        optimizer.step()
    steps = dict(target_modules=sorted(linear), rank=RANK, alpha=2.0 * RANK, learning_rate=rate, losses=losses, grad_norms=norms)
    (folder / "training.json").write_text(json.dumps(steps) + "\n")
    return f"{len(paths)} adapters, losses {losses[0]:.3f} to {losses[-1]:.3f}"


def load(folder):
    """A recorded model; one that reads more than text has another class."""
    config = AutoConfig.from_pretrained(folder)
    kind = AutoModelForImageTextToText if hasattr(config, "text_config") else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


torch.set_num_threads(1)
MODELS |= {name: (kind, {**SMALL_BASE, **more}, how) for name, (kind, more, how) in SMALL.items()}
for name, (kind, more, how) in MODELS.items():
    if ONLY and name not in ONLY:
        continue
    folder = OUT / name
    if STEPS_ALONE:
        print(name, train(load(folder), folder), flush=True)
        continue
    torch.manual_seed(70)
    model = build(kind, more).eval()
    with torch.no_grad():
        for path, p in model.named_parameters():
            if path.endswith("gate_up_proj_bias"):
                p.normal_(0, 4.0)  # beyond where gates and what they are multiplied with are clamped
            elif path.endswith("down_proj_bias"):
                p.normal_(0, 0.3)
            elif path.endswith(("gate.weight", "router.weight", "router.proj.weight")):
                p.normal_(0, 0.3)  # routers that tell experts apart
            elif p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.2)
                if kind.startswith("gemma4") and path.endswith("q_norm.weight"):
                    p.mul_(0.3)  # it holds the scale of scores
            else:
                p.mul_(4.0)
            p.copy_(p.bfloat16().float())
        for path, p in model.named_buffers():
            if path.endswith("e_score_correction_bias"):  # changes which experts are chosen
                p.normal_(0, 0.2).copy_(p.bfloat16().float())
            elif path.endswith("layer_scalar"):
                p.copy_((0.6 + 0.3 * torch.rand_like(p)).bfloat16().float())
        ids = torch.randint(3, 38, (ROWS, 16)) if name in SMALL else torch.randint(3, 60, (ROWS, LENGTH))
        logits = model(input_ids=ids, use_cache=False).logits.float().contiguous()
    shutil.rmtree(folder, ignore_errors=True)
    inputs_first = how.pop("inputs_first", False)
    model.bfloat16().save_pretrained(folder, **how)
    if inputs_first:  # as published
        tensors = load_file(folder / "model.safetensors")
        turned = {path: t.transpose(1, 2).contiguous() if ".experts." in path else t for path, t in tensors.items()}
        save_file(turned, folder / "model.safetensors", metadata={"format": "pt"})
    save_file({"input_ids": ids, "logits": logits}, folder / "reference.safetensors")
    (folder / "generation_config.json").unlink(missing_ok=True)
    print(name, train(load(folder), folder), f"{sum(f.stat().st_size for f in folder.iterdir()) / 1024:.0f} KiB, largest logit {logits.abs().max():.2f}", flush=True)
