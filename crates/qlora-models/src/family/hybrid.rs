//! Families with linear attention in the place of attention in most blocks.

use super::experts::{Experts, ROUTED, Shared, SharedWidth};
use super::{BASE, Family, Only, PER_HEAD, Rotary, Sizes, Switch};

/// Linear attention with the gated delta rule (Yang et al., 2024, arXiv 2412.06464). `layer_types` says which blocks have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Linear {
    /// Queries, keys and values in this order; the gate of the output; the rule's strength; and its decay. Or two: one whose output
    /// holds queries, keys, values and gate of one head of keys after the other, and one with strengths and decays likewise.
    pub projections: &'static [&'static str],
    /// The output projection.
    pub output: &'static str,
    /// The short convolution over queries, keys and values.
    pub conv: &'static str,
    /// The logarithms of the rates of decay, and what is added to the decay's projection.
    pub rates: [&'static str; 2],
    /// The norm of the output's heads.
    pub norm: &'static str,
    /// The key with n where, without `layer_types`, all but every n-th block have it, and what it is when absent.
    pub all_but_every: (&'static str, usize),
}

/// Text has one position for all three sections of the rotation, so that what `mrope_section` interleaves is the same.
pub(super) const QWEN3_5_TEXT: Family = Family {
    model_type: "qwen3_5_text",
    qkv_bias: Switch::Key("attention_bias"),
    output_bias: Switch::Key("attention_bias"),
    qk_norm: Some(PER_HEAD),
    attention_gate: true,
    linear: Some(Linear {
        projections: &[
            "linear_attn.in_proj_qkv",
            "linear_attn.in_proj_z",
            "linear_attn.in_proj_b",
            "linear_attn.in_proj_a",
        ],
        output: "linear_attn.out_proj",
        conv: "linear_attn.conv1d",
        rates: ["linear_attn.A_log", "linear_attn.dt_bias"],
        norm: "linear_attn.norm",
        all_but_every: ("full_attention_interval", 4),
    }),
    norm_offset: 1.0,
    rotary: Rotary { partial: Some(0.25), harmless: &["mrope_interleaved", "mrope_section"], ..BASE.rotary },
    sizes: Sizes {
        vocab_size: Some(248_320),
        hidden_size: Some(4096),
        intermediate_size: Some(12_288),
        num_hidden_layers: Some(32),
        num_attention_heads: Some(16),
        num_key_value_heads: Some(4),
        head_dim: Some(256),
        max_position_embeddings: 32_768,
    },
    fixed: &[
        ("attn_output_gate", Only::Flag(true)),
        ("mlp_bias", Only::Flag(false)),
        // The gate's silu; files of Qwen 3.6 say so.
        ("output_gate_type", Only::Text("swish")),
    ],
    // States are f32 here. The blocks that predict further tokens are not loaded, and no block has experts.
    harmless: &["mamba_ssm_dtype", "mlp_only_layers", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"],
    ..BASE
};

/// Experts beside one that all tokens go through, behind a gate.
const GATED_EXPERTS: Experts = Experts {
    count: (&["num_experts"], 256),
    per_token: ("num_experts_per_tok", 8),
    width: ("moe_intermediate_size", Some(512)),
    normalise: Switch::On,
    shared: Some(Shared {
        path: "mlp.shared_expert",
        width: SharedWidth::Key("shared_expert_intermediate_size", 512),
        gate: Some("mlp.shared_expert_gate"),
    }),
    ..ROUTED
};

pub(super) const QWEN3_5_MOE_TEXT: Family = Family {
    model_type: "qwen3_5_moe_text",
    experts: Some(GATED_EXPERTS),
    sizes: Sizes {
        hidden_size: Some(2048),
        num_hidden_layers: Some(40),
        num_key_value_heads: Some(2),
        ..QWEN3_5_TEXT.sizes
    },
    fixed: &[
        ("attn_output_gate", Only::Flag(true)),
        ("mlp_bias", Only::Flag(false)),
        ("norm_topk_prob", Only::Flag(true)),
        // Files of Qwen 3.8 say so.
        ("output_gate_type", Only::Text("swish")),
    ],
    // The load-balancing loss trains routers, which stay as they are here.
    harmless: &[
        "mamba_ssm_dtype",
        "mlp_only_layers",
        "mtp_num_hidden_layers",
        "mtp_use_dedicated_embeddings",
        "output_router_logits",
        "router_aux_loss_coef",
    ],
    ..QWEN3_5_TEXT
};

pub(super) const QWEN3_NEXT: Family = Family {
    model_type: "qwen3_next",
    linear: match QWEN3_5_TEXT.linear {
        Some(linear) => Some(Linear { projections: &["linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"], ..linear }),
        None => None,
    },
    experts: Some(Experts {
        count: (&["num_experts"], 512),
        per_token: ("num_experts_per_tok", 10),
        normalise: Switch::Unless("norm_topk_prob"),
        dense_blocks: Some("mlp_only_layers"),
        every: Some("decoder_sparse_step"),
        ..GATED_EXPERTS
    }),
    rotary: Rotary { harmless: &[], ..QWEN3_5_TEXT.rotary },
    sizes: Sizes {
        vocab_size: Some(151_936),
        hidden_size: Some(2048),
        intermediate_size: Some(5632),
        num_hidden_layers: Some(48),
        num_key_value_heads: Some(2),
        ..QWEN3_5_TEXT.sizes
    },
    fixed: &[
        ("mlp_bias", Only::Flag(false)),
        ("use_sliding_window", Only::Flag(false)),
        ("output_gate_type", Only::Text("swish")),
    ],
    harmless: &["mtp_num_hidden_layers", "output_router_logits", "router_aux_loss_coef"],
    ..QWEN3_5_TEXT
};
