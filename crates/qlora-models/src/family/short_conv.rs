//! Families with short convolutions in the place of attention in most blocks.

use super::{BASE, Family, Norms, Only, QkNorm, Rotary, Sizes};

/// A gated short convolution: `output(c · conv(b · x))`. `layer_types` says which blocks have one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ShortConvNames {
    /// The projection that gives `b`, `c` and `x` in this order.
    pub projection: &'static str,
    /// The convolution.
    pub conv: &'static str,
    /// The output projection.
    pub output: &'static str,
    /// The key with the tokens that it looks at, and what it is when absent.
    pub taps: (&'static str, usize),
    /// What `layer_types` calls such blocks.
    pub kind: &'static str,
    /// The key with the list of the other blocks, for files without `layer_types`; without either, all have attention.
    pub attention_blocks: &'static str,
}

/// The width of an MLP for which `intermediate_size` stands: two thirds of that, times a factor, up to the next multiple.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct MlpWidth {
    /// A key that counts in the place of `intermediate_size` where it is there.
    pub key: &'static str,
    /// The key that has to be true, or absent.
    pub switch: &'static str,
    /// The key with the factor, and what it is when absent. With null the width is not rounded either.
    pub factor: (&'static str, f64),
    /// The key with what the width is a multiple of, and what it is when absent.
    pub multiple: (&'static str, usize),
}

pub(super) const LFM2: Family = Family {
    model_type: "lfm2",
    qk_norm: Some(QkNorm { names: ["self_attn.q_layernorm", "self_attn.k_layernorm"], whole: false, rotated: false }),
    gate_up: &["feed_forward.w1", "feed_forward.w3"],
    norms: Norms { attention_input: Some("operator_norm"), mlp_input: Some("ffn_norm"), ..BASE.norms },
    rotary: Rotary { theta: 1_000_000.0, ..BASE.rotary },
    sizes: Sizes {
        vocab_size: Some(65_536),
        hidden_size: Some(2560),
        intermediate_size: Some(12_288),
        num_hidden_layers: Some(32),
        num_attention_heads: Some(32),
        num_key_value_heads: Some(8),
        max_position_embeddings: 128_000,
        ..BASE.sizes
    },
    tied: true,
    rms_norm_eps: 1e-5,
    fixed: &[("conv_bias", Only::Flag(false)), ("hidden_act", Only::Text("silu"))],
    // How the models were made, and what other keys say already.
    harmless: &[
        "block_dim",
        "block_mlp_init_scale",
        "block_norm_eps",
        "block_out_init_scale",
        "block_use_swiglu",
        "block_use_xavier_init",
        "conv_dim",
        "conv_dim_out",
        "conv_use_xavier_init",
        "num_heads",
        "theta",
        "use_pos_enc",
    ],
    short_conv: Some(ShortConvNames {
        projection: "conv.in_proj",
        conv: "conv.conv",
        output: "conv.out_proj",
        taps: ("conv_L_cache", 3),
        kind: "conv",
        attention_blocks: "full_attn_idxs",
    }),
    attention_output: "self_attn.out_proj",
    mlp_output: "feed_forward.w2",
    last_norm: "embedding_norm",
    norm_eps_key: "norm_eps",
    mlp_width: Some(MlpWidth {
        key: "block_ff_dim",
        switch: "block_auto_adjust_ff_dim",
        factor: ("block_ffn_dim_multiplier", 1.0),
        multiple: ("block_multiple_of", 256),
    }),
    tie_key: Some("tie_embedding"),
    ..BASE
};
