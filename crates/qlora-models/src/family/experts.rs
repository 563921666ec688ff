//! Mixtures of experts: what modules are called, and which keys say how many there are.

use super::Switch;

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
};
