//! Families without experts that differ from the plainest in where norms lie, in how positions are rotated, or in factors.

use super::{
    BASE, EmbeddingScale, Family, LLAMA, Local, NO_BIAS, Norms, Only, PER_HEAD, QkNorm, Rotary, ScoreScale, Sizes,
    Switch, Window, Windowed,
};
use crate::rope::Pairs;

/// Phi 3 and 4: projections in one piece, and LongRoPE.
pub(super) const PHI3: Family = Family {
    model_type: "phi3",
    qkv: &["self_attn.qkv_proj"],
    gate_up: &["mlp.gate_up_proj"],
    window: Window { blocks: Windowed::All, width: None, switch: None },
    rotary: Rotary { partial: Some(1.0), long_aliases: true, original_context: Some(4096), ..BASE.rotary },
    sizes: Sizes { max_position_embeddings: 4096, ..BASE.sizes },
    rms_norm_eps: 1e-5,
    fixed: &[
        ("attention_bias", Only::Flag(false)),
        ("mlp_bias", Only::Flag(false)),
        ("lm_head_bias", Only::Flag(false)),
        ("full_attn_mod", Only::Number(1.0)),
        ("interpolate_factor", Only::Number(1.0)),
    ],
    ..BASE
};

/// Ministral 3: queries grow with the logarithm of their position beyond the original context.
pub(super) const MINISTRAL3: Family = Family {
    model_type: "ministral3",
    window: Window { blocks: Windowed::All, width: None, switch: None },
    // Its own files have the longest context where the scaling is, too.
    rotary: Rotary { theta: 1_000_000.0, query_growth: true, harmless: &["max_position_embeddings"], ..BASE.rotary },
    sizes: Sizes {
        vocab_size: Some(131_072),
        hidden_size: Some(4096),
        intermediate_size: Some(14_336),
        num_hidden_layers: Some(34),
        num_attention_heads: Some(32),
        num_key_value_heads: Some(8),
        head_dim: Some(128),
        max_position_embeddings: 262_144,
    },
    rms_norm_eps: 1e-5,
    fixed: NO_BIAS,
    ..BASE
};

/// SmolLM 3: every fourth block has no rotary embeddings.
pub(super) const SMOLLM3: Family = Family {
    model_type: "smollm3",
    window: Window { blocks: Windowed::Unrotated, width: None, switch: Some("use_sliding_window") },
    rotary: Rotary {
        theta: 2_000_000.0,
        unrotated: Some(("no_rope_layers", "no_rope_layer_interval", 4)),
        ..BASE.rotary
    },
    sizes: Sizes { num_key_value_heads: Some(4), max_position_embeddings: 32_768, ..BASE.sizes },
    tied: true,
    fixed: &[],
    // Their files have keys of other families, which transformers does not read for this one.
    harmless: &["pretraining_tp", "max_window_layers"],
    ..LLAMA
};

/// Granite 3, and 4 without experts: factors of embeddings, branches, scores and logits.
pub(super) const GRANITE: Family = Family {
    model_type: "granite",
    embedding_scale: EmbeddingScale::Key("embedding_multiplier"),
    residual_scale: Some("residual_multiplier"),
    score_scale: ScoreScale::Factor("attention_multiplier"),
    logit_divisor: Some("logits_scaling"),
    fixed: &[],
    harmless: &["pretraining_tp"],
    ..LLAMA
};

/// Seed OSS: biases of queries, keys and values, and one of the attention's output by itself.
pub(super) const SEED_OSS: Family = Family {
    model_type: "seed_oss",
    qkv_bias: Switch::Unless("attention_bias"),
    output_bias: Switch::Key("attention_out_bias"),
    mlp_bias: Switch::Key("mlp_bias"),
    sizes: Sizes { num_key_value_heads: Some(8), head_dim: Some(128), max_position_embeddings: 524_288, ..BASE.sizes },
    harmless: &["pretraining_tp"],
    ..BASE
};

/// Hunyuan 1 without experts: queries and keys are normalised after they are rotated.
pub(super) const HUNYUAN: Family = Family {
    model_type: "hunyuan_v1_dense",
    qkv_bias: Switch::Key("attention_bias"),
    output_bias: Switch::Key("attention_bias"),
    qk_norm: Some(QkNorm {
        names: ["self_attn.query_layernorm", "self_attn.key_layernorm"],
        rotated: true,
        ..PER_HEAD
    }),
    rotary: Rotary { alpha: true, ..BASE.rotary },
    rms_norm_eps: 1e-5,
    fixed: &[
        ("mlp_bias", Only::Flag(false)),
        ("norm_type", Only::Text("rms")),
        ("num_experts", Only::Number(1.0)),
        ("position_embedding_xdrope", Only::Flag(false)),
        ("use_cla", Only::Flag(false)),
        ("use_mla", Only::Flag(false)),
        ("use_qk_norm", Only::Flag(true)),
        ("use_rotary_pos_emb", Only::Flag(true)),
    ],
    // What their files say about images, classification and parts that are switched off above.
    harmless: &[
        "add_classification_head",
        "anyres_pooling_size",
        "anyres_vit_max_image_size",
        "anyres_vit_two_views",
        "attention_head_dim",
        "cla_share_factor",
        "class_num",
        "dense_list",
        "enable_lm_head_fp32",
        "eod_token_id",
        "group_limited_greedy",
        "im_end_id",
        "im_newline_id",
        "im_start_id",
        "image_token_id",
        "mask_init_id",
        "num_media_embeds",
        "org_vocab_size",
        "pad_id",
        "pool_type",
        "pretraining_tp",
        "routed_scaling_factor",
        "sep_id",
        "skip_cls_token",
        "text_end_id",
        "text_start_id",
        "video_end_id",
        "video_start_id",
        "xdrope_section",
    ],
    ..BASE
};

/// OLMo 2: norms of the outputs of attention and MLP, none of their inputs, and of queries and keys over all heads.
pub(super) const OLMO2: Family = Family {
    model_type: "olmo2",
    qkv_bias: Switch::Key("attention_bias"),
    output_bias: Switch::Key("attention_bias"),
    qk_norm: Some(QkNorm { whole: true, ..PER_HEAD }),
    norms: Norms {
        attention_input: None,
        attention_output: Some("post_attention_layernorm"),
        mlp_input: None,
        mlp_output: Some("post_feedforward_layernorm"),
    },
    rms_norm_eps: 1e-5,
    fixed: &[("mlp_bias", Only::Flag(false)), ("clip_qkv", Only::Null)],
    ..BASE
};

/// OLMo 3: a window in three blocks of four, whose positions are not scaled.
pub(super) const OLMO3: Family = Family {
    model_type: "olmo3",
    window: Window { blocks: Windowed::AllButEvery(None, 4), width: Some(4096), switch: None },
    rotary: Rotary { theta: 500_000.0, local: Some(Local::SameTheta), ..BASE.rotary },
    ..OLMO2
};

/// GLM 4 (0414): half of each head is rotated, by pairs of neighbours, and branches are normalised on both ends.
pub(super) const GLM4: Family = Family {
    model_type: "glm4",
    qkv_bias: Switch::Unless("attention_bias"),
    gate_up: &["mlp.gate_up_proj"],
    norms: Norms {
        attention_input: Some("input_layernorm"),
        attention_output: Some("post_self_attn_layernorm"),
        mlp_input: Some("post_attention_layernorm"),
        mlp_output: Some("post_mlp_layernorm"),
    },
    rotary: Rotary { partial: Some(0.5), pairs: Pairs::Adjacent, ..BASE.rotary },
    sizes: Sizes { num_key_value_heads: Some(2), head_dim: Some(128), max_position_embeddings: 131_072, ..BASE.sizes },
    rms_norm_eps: 0.000_000_156_25,
    fixed: &[("mlp_bias", Only::Flag(false))],
    ..BASE
};

/// ERNIE 4.5 without experts: positions are rotated by pairs of neighbours.
pub(super) const ERNIE: Family = Family {
    model_type: "ernie4_5",
    qkv_bias: Switch::Key("use_bias"),
    output_bias: Switch::Key("use_bias"),
    mlp_bias: Switch::Key("use_bias"),
    rotary: Rotary { theta: 500_000.0, pairs: Pairs::Adjacent, ..BASE.rotary },
    sizes: Sizes { num_key_value_heads: Some(2), head_dim: Some(128), max_position_embeddings: 131_072, ..BASE.sizes },
    tied: true,
    rms_norm_eps: 1e-5,
    fixed: &[("compression_ratio", Only::Number(1.0))],
    ..BASE
};
