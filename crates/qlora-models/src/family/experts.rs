//! Mixtures of experts: what modules are called, which keys say how many there are, and how a router chooses.

use super::{BASE, Family, Only, PER_HEAD, Rotary, Sizes, Switch};

/// A mixture of experts in the place of the MLP. Modules have the names that checkpoints and adapters use, one module
/// per expert and projection; transformers 5 holds them stacked, and may save them so.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Experts {
    /// The router.
    pub router: &'static str,
    /// What the experts' indices follow.
    pub list: &'static str,
    /// An expert's gate, input and output projection.
    pub projections: [&'static str; 3],
    /// The router in files with stacked experts.
    pub stacked_router: &'static str,
    /// Gate and input projections of all experts, stacked: `[experts, 2 * intermediate, hidden]`.
    pub stacked_gate_up: &'static str,
    /// Output projections of all experts, stacked: `[experts, hidden, intermediate]`.
    pub stacked_down: &'static str,
    /// The keys with the number of experts, the first that is there counts, and what it is when absent.
    pub count: (&'static [&'static str], usize),
    /// The key with the number of experts per token, and what it is when absent.
    pub per_token: (&'static str, usize),
    /// The key with the width of an expert, and what it is when absent.
    pub width: (&'static str, Option<usize>),
    /// Whether the chosen experts' weights are divided by their sum.
    pub normalise: Switch,
    /// The key with the list of blocks that have an MLP instead.
    pub dense_blocks: Option<&'static str>,
    /// The key with n where only every n-th block has experts.
    pub every: Option<&'static str>,
    /// An MLP that all tokens go through beside their experts.
    pub shared: Option<Shared>,
    /// The key with the number of first blocks that have an MLP instead, and what it is when absent.
    pub dense_first: Option<(&'static str, usize)>,
    /// The key with a list that says `dense` or `sparse` of each block.
    pub block_types: Option<&'static str>,
    /// How a router's outputs become experts and weights.
    pub scores: Scores,
}

/// How a router's outputs become a token's experts and their weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Scores {
    /// Their softmax: the largest.
    Softmax,
    /// The sigmoid of each (DeepSeek-AI, 2024, arXiv 2412.19437, section 2.1.2).
    Sigmoid {
        /// What is added to the scores for the choice, and to no weight.
        correction: &'static str,
        /// The key with the number of groups that experts lie in, and what it is when absent.
        groups: (&'static str, usize),
        /// The key with how many groups a token's experts come from, and what it is when absent.
        groups_per_token: (&'static str, usize),
        /// The key with what weights are multiplied by, and what it is when absent.
        factor: (&'static str, f64),
    },
}

/// An MLP whose output is added to that of a token's experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shared {
    /// What its projections follow; they are called as those of an expert.
    pub path: &'static str,
    /// Its width.
    pub width: SharedWidth,
    /// The layer of one output whose sigmoid its output is multiplied by.
    pub gate: Option<&'static str>,
}

/// The width of a shared expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SharedWidth {
    /// The value of this key, and what it is when absent.
    Key(&'static str, usize),
    /// That of an expert, times the value of this key, and what that is when absent.
    Experts(&'static str, usize),
}

/// The plainest entry: names as transformers has them, softmax over all experts, nothing beside them.
pub(super) const ROUTED: Experts = Experts {
    router: "mlp.gate",
    list: "mlp.experts",
    projections: ["gate_proj", "up_proj", "down_proj"],
    stacked_router: "mlp.gate",
    stacked_gate_up: "mlp.experts.gate_up_proj",
    stacked_down: "mlp.experts.down_proj",
    count: (&["num_local_experts", "num_experts"], 8),
    per_token: ("num_experts_per_tok", 2),
    width: ("moe_intermediate_size", None),
    normalise: Switch::Off,
    dense_blocks: None,
    every: None,
    shared: None,
    dense_first: None,
    block_types: None,
    scores: Scores::Softmax,
};

/// Sigmoid scores, a correction of the choice, and experts of all tokens.
pub(super) const CORRECTED: Experts = Experts {
    count: (&["n_routed_experts", "num_local_experts"], 128),
    per_token: ("num_experts_per_tok", 8),
    width: ("moe_intermediate_size", Some(1408)),
    normalise: Switch::Unless("norm_topk_prob"),
    shared: Some(Shared { path: "mlp.shared_experts", width: SharedWidth::Experts("n_shared_experts", 1), gate: None }),
    dense_first: Some(("first_k_dense_replace", 1)),
    scores: Scores::Sigmoid {
        correction: "mlp.gate.e_score_correction_bias",
        groups: ("n_group", 1),
        groups_per_token: ("topk_group", 1),
        factor: ("routed_scaling_factor", 1.0),
    },
    ..ROUTED
};

/// GLM 4.5 to 4.7 with experts: half of each head is rotated, as two halves of it.
pub(super) const GLM4_MOE: Family = Family {
    model_type: "glm4_moe",
    qkv_bias: Switch::Key("attention_bias"),
    qk_norm: Some(PER_HEAD),
    qk_normed: Switch::Key("use_qk_norm"),
    experts: Some(CORRECTED),
    rotary: Rotary { partial: Some(0.5), ..BASE.rotary },
    sizes: Sizes { num_key_value_heads: Some(8), max_position_embeddings: 131_072, ..BASE.sizes },
    rms_norm_eps: 1e-5,
    fixed: CORRECTED_FIXED,
    harmless: CORRECTED_HARMLESS,
    ..BASE
};

/// The one kind of router.
pub(super) const CORRECTED_FIXED: &[(&str, Only)] = &[
    ("mlp_bias", Only::Flag(false)),
    ("moe_layer_freq", Only::Number(1.0)),
    ("scoring_func", Only::Text("sigmoid")),
    ("topk_method", Only::Text("noaux_tc")),
];
/// What trains routers, splits experts over devices, or says again what follows from other keys.
pub(super) const CORRECTED_HARMLESS: &[&str] = &[
    "aux_loss_alpha",
    "ep_size",
    "output_router_logits",
    "pretraining_tp",
    "qk_head_dim",
    "router_aux_loss_coef",
    "seq_aux",
];
