//! What model families differ in, as a table. The decoder itself is shared.

/// One `model_type` of `config.json`.
#[derive(Debug, PartialEq, Eq)]
pub struct Family {
    /// The value of `model_type`.
    pub model_type: &'static str,
    /// The value of `architectures[0]`.
    pub architecture: &'static str,
    /// Keys of `config.json` that change the arithmetic in a way this family's table entry covers,
    /// with the only value that is covered.
    pub fixed: &'static [(&'static str, &'static str)],
}

/// Every family that loads.
pub const FAMILIES: &[Family] =
    &[Family { model_type: "llama", architecture: "LlamaForCausalLM", fixed: &[("hidden_act", "silu")] }];

impl Family {
    /// The family of a `model_type`.
    pub fn find(model_type: &str) -> Option<&'static Self> {
        FAMILIES.iter().find(|family| family.model_type == model_type)
    }

    /// The supported model types, for messages.
    pub fn supported() -> String {
        FAMILIES.iter().map(|family| family.model_type).collect::<Vec<_>>().join(", ")
    }
}
