//! Families with multi-head latent attention.

use super::experts::{CORRECTED, CORRECTED_FIXED, CORRECTED_HARMLESS, Scores};
use super::{BASE, Experts, Family, Rotary, Sizes, Switch};
use crate::rope::Pairs;

/// Multi-head latent attention (DeepSeek-AI, 2024, arXiv 2405.04434): keys and values of all heads are made of one narrow vector
/// a token, and what is rotated of a key is the same for all heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Latent {
    /// Of queries, down to their rank and up from it.
    pub queries: [&'static str; 2],
    /// Of queries where they have no rank.
    pub whole_queries: &'static str,
    /// Of keys and values, down to the latent vector with what is rotated of keys behind it, and up from it.
    pub keys: [&'static str; 2],
    /// Norms of what lies between, of queries and of keys.
    pub norms: [&'static str; 2],
    /// `q_lora_rank`, `kv_lora_rank`, `qk_nope_head_dim`, `qk_rope_head_dim` and `v_head_dim` when absent.
    pub sizes: [usize; 5],
}

const LATENT: Latent = Latent {
    queries: ["self_attn.q_a_proj", "self_attn.q_b_proj"],
    whole_queries: "self_attn.q_proj",
    keys: ["self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj"],
    norms: ["self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"],
    sizes: [1536, 512, 128, 64, 128],
};

/// DeepSeek V3 and what shares its architecture. Neighbours are pairs unless `rope_interleave` is false.
pub(super) const DEEPSEEK_V3: Family = Family {
    model_type: "deepseek_v3",
    qkv_bias: Switch::Key("attention_bias"),
    output_bias: Switch::Key("attention_bias"),
    latent: Some(LATENT),
    experts: Some(Experts {
        count: (CORRECTED.count.0, 256),
        width: ("moe_intermediate_size", Some(2048)),
        dense_first: Some(("first_k_dense_replace", 3)),
        scores: Scores::Sigmoid {
            correction: "mlp.gate.e_score_correction_bias",
            groups: ("n_group", 8),
            groups_per_token: ("topk_group", 4),
            factor: ("routed_scaling_factor", 2.5),
        },
        ..CORRECTED
    }),
    rotary: Rotary { pairs: Pairs::Adjacent, ..BASE.rotary },
    sizes: Sizes { max_position_embeddings: 4096, ..BASE.sizes },
    fixed: CORRECTED_FIXED,
    harmless: CORRECTED_HARMLESS,
    ..BASE
};

/// Kimi K2, whose files name a type of their own and have the code of DeepSeek V3.
pub(super) const KIMI_K2: Family = Family { model_type: "kimi_k2", ..DEEPSEEK_V3 };

/// GLM 4.7 Flash: as DeepSeek V3, with other sizes, and with a list of blocks that have experts.
pub(super) const GLM4_MOE_LITE: Family = Family {
    model_type: "glm4_moe_lite",
    latent: Some(Latent { sizes: [768, 512, 192, 64, 256], ..LATENT }),
    experts: Some(Experts {
        count: (CORRECTED.count.0, 64),
        per_token: ("num_experts_per_tok", 4),
        width: ("moe_intermediate_size", Some(1536)),
        block_types: Some("mlp_layer_types"),
        scores: Scores::Sigmoid {
            correction: "mlp.gate.e_score_correction_bias",
            groups: ("n_group", 1),
            groups_per_token: ("topk_group", 1),
            factor: ("routed_scaling_factor", 1.8),
        },
        ..CORRECTED
    }),
    sizes: Sizes { max_position_embeddings: 202_752, ..BASE.sizes },
    rms_norm_eps: 1e-5,
    ..DEEPSEEK_V3
};
