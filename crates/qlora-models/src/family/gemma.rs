//! Gemma 2, 3 and 4.

use super::experts::ROUTED;
use super::experts::Stacking;
use super::{
    BASE, EmbeddingScale, Experts, Family, Local, Norms, Only, PER_HEAD, Rotary, ScoreScale, Sizes, Switch, Window,
    Windowed,
};
use qlora_layers::ops::fused::Activation;

/// Keys with the heads of blocks without a window. `per_layer_config`, which transformers 5 writes, goes before the first two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GlobalAttention {
    /// The width of a head, and what it is when absent.
    pub head_dim: (&'static str, usize),
    /// Key and value heads where keys are values; those of the other blocks when absent.
    pub key_heads: &'static str,
    /// Whether the key projection gives the values too.
    pub keys_are_values: &'static str,
}

/// Inputs of each block beside the block before it: a vector that is looked up by token, and a projection of the embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LayerInputNames {
    /// The key with the width of an input, 0 where there are none, and what it is when absent.
    pub width: (&'static str, usize),
    /// The key with the number of tokens in the table, and what it is when absent.
    pub words: (&'static str, usize),
    /// The table, the projection, and the norm of a block's part of that.
    pub model: [&'static str; 3],
    /// A block's gate of its input, the projection behind it, and the norm of what that gives.
    pub block: [&'static str; 3],
}

/// Experts beside the MLP: both read what attention gave, and what they give is normalised, each by itself, and added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BesideNames {
    /// The key that says whether there are experts.
    pub switch: &'static str,
    /// Factors of what the router reads, normalised without a weight, and of each expert's share.
    pub scales: [&'static str; 2],
    /// Norms of what the MLP gives, and of what experts read and give.
    pub norms: [&'static str; 3],
}

/// Gemma 2: norms on both ends of a branch, soft caps, a window in every other block.
pub(super) const GEMMA2: Family = Family {
    model_type: "gemma2",
    qkv_bias: Switch::Key("attention_bias"),
    output_bias: Switch::Key("attention_bias"),
    norms: Norms {
        attention_input: Some("input_layernorm"),
        attention_output: Some("post_attention_layernorm"),
        mlp_input: Some("pre_feedforward_layernorm"),
        mlp_output: Some("post_feedforward_layernorm"),
    },
    norm_offset: 1.0,
    embedding_scale: EmbeddingScale::SqrtWidth,
    activation: ("hidden_activation", Activation::GeluTanh),
    score_scale: ScoreScale::Scalar("query_pre_attn_scalar", 256.0),
    score_softcap: Some(("attn_logit_softcapping", Some(50.0))),
    logit_softcap: Some(("final_logit_softcapping", Some(30.0))),
    window: Window { blocks: Windowed::AllButEvery(None, 2), width: Some(4096), switch: None },
    sizes: Sizes { num_key_value_heads: Some(4), head_dim: Some(256), max_position_embeddings: 8192, ..BASE.sizes },
    tied: true,
    fixed: &[("use_bidirectional_attention", Only::Flag(false)), ("mlp_bias", Only::Flag(false))],
    // `hidden_activation` and `sliding_window` decide; early files have both of each.
    harmless: &["hidden_act", "sliding_window_size"],
    ..BASE
};

/// Gemma 3: norms of queries and keys, and positions of their own for blocks with a window.
pub(super) const GEMMA3_TEXT: Family = Family {
    model_type: "gemma3_text",
    qk_norm: Some(PER_HEAD),
    // transformers has the key and does not use it.
    score_softcap: None,
    logit_softcap: Some(("final_logit_softcapping", None)),
    window: Window { blocks: Windowed::AllButEvery(Some("sliding_window_pattern"), 6), ..GEMMA2.window },
    rotary: Rotary { theta: 1_000_000.0, local: Some(Local::Theta("rope_local_base_freq", 10_000.0)), ..BASE.rotary },
    // Sections of larger files leave out what equals these.
    sizes: Sizes {
        vocab_size: Some(262_208),
        hidden_size: Some(2304),
        intermediate_size: Some(9216),
        num_hidden_layers: Some(26),
        num_attention_heads: Some(8),
        max_position_embeddings: 131_072,
        ..GEMMA2.sizes
    },
    fixed: &[
        ("use_bidirectional_attention", Only::Flag(false)),
        ("mlp_bias", Only::Flag(false)),
        ("attn_logit_softcapping", Only::Null),
    ],
    harmless: &["hidden_act", "_sliding_window_pattern"],
    ..GEMMA2
};

/// Gemma 4. Blocks without a window have wider heads, of which a part is rotated, and may take their keys for values.
pub(super) const GEMMA4_TEXT: Family = Family {
    model_type: "gemma4_text",
    qkv_bias: Switch::Key("attention_bias"),
    output_bias: Switch::Key("attention_bias"),
    qk_norm: Some(PER_HEAD),
    norms: GEMMA2.norms,
    embedding_scale: EmbeddingScale::SqrtWidth,
    activation: ("hidden_activation", Activation::GeluTanh),
    // Norms of queries and keys have learnt the scale.
    score_scale: ScoreScale::One,
    logit_softcap: Some(("final_logit_softcapping", None)),
    window: Window { blocks: Windowed::AllButEveryAndLast(6), width: Some(512), switch: None },
    rotary: Rotary {
        theta: 1_000_000.0,
        local: Some(Local::Theta("rope_local_base_freq", 10_000.0)),
        proportional: Some(0.25),
        ..BASE.rotary
    },
    sizes: Sizes {
        vocab_size: Some(262_144),
        hidden_size: Some(2304),
        intermediate_size: Some(9216),
        num_hidden_layers: Some(30),
        num_attention_heads: Some(8),
        num_key_value_heads: Some(4),
        head_dim: Some(256),
        max_position_embeddings: 131_072,
    },
    tied: true,
    fixed: &[
        // What is bidirectional then are images alone.
        ("use_bidirectional_attention", Only::Text("vision")),
        ("attn_logit_softcapping", Only::Null),
        ("mlp_bias", Only::Flag(false)),
    ],
    // The last three say nothing of a model without experts.
    harmless: &["hidden_act", "expert_intermediate_size", "num_experts", "top_k_experts", "moe_intermediate_size"],
    experts: Some(Experts {
        router: "router.proj",
        list: "experts",
        projections: ["gate_proj", "up_proj", "down_proj"],
        stacked_router: "router.proj",
        stacked_gate_up: "experts.gate_up_proj",
        stacked_down: "experts.down_proj",
        count: (&["num_experts"], 128),
        per_token: ("top_k_experts", 8),
        width: ("moe_intermediate_size", None),
        normalise: Switch::On,
        dense_blocks: None,
        every: None,
        ..ROUTED
    }),
    beside: Some(BesideNames {
        switch: "enable_moe_block",
        scales: ["router.scale", "router.per_expert_scale"],
        norms: ["post_feedforward_layernorm_1", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2"],
    }),
    stacked_only: Some(Stacking::Outputs),
    global_attention: Some(GlobalAttention {
        head_dim: ("global_head_dim", 512),
        key_heads: "num_global_key_value_heads",
        keys_are_values: "attention_k_eq_v",
    }),
    value_norm: true,
    block_factor: Some("layer_scalar"),
    shared_keys: Some("num_kv_shared_layers"),
    wide_mlp: Some("use_double_wide_mlp"),
    layer_inputs: Some(LayerInputNames {
        width: ("hidden_size_per_layer_input", 256),
        words: ("vocab_size_per_layer_input", 262_144),
        model: ["embed_tokens_per_layer", "per_layer_model_projection", "per_layer_projection_norm"],
        block: ["per_layer_input_gate", "per_layer_projection", "post_per_layer_input_norm"],
    }),
    ..BASE
};

/// The model that reads images and sound without encoders of their own.
pub(super) const GEMMA4_UNIFIED_TEXT: Family = Family {
    model_type: "gemma4_unified_text",
    window: Window { width: Some(1024), ..GEMMA4_TEXT.window },
    sizes: Sizes { max_position_embeddings: 262_144, ..GEMMA4_TEXT.sizes },
    layer_inputs: None,
    experts: None,
    beside: None,
    harmless: &["hidden_act", "hidden_size_per_layer_input", "vocab_size_per_layer_input"],
    ..GEMMA4_TEXT
};
