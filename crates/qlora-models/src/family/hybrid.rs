//! Families with linear attention in the place of attention in most blocks.

use super::{BASE, Family, Only, PER_HEAD, Rotary, Sizes, Switch};

/// Linear attention with the gated delta rule (Yang et al., 2024, arXiv 2412.06464). `layer_types` says which blocks have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Linear {
    /// Queries, keys and values in this order; the gate of the output; the rule's strength; and its decay.
    pub projections: [&'static str; 4],
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
        projections: [
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
    fixed: &[("attn_output_gate", Only::Flag(true)), ("mlp_bias", Only::Flag(false))],
    // States are f32 here. The blocks that predict further tokens are not loaded, and no block has experts.
    harmless: &["mamba_ssm_dtype", "mlp_only_layers", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"],
    ..BASE
};
