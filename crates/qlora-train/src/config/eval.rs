//! `[eval]`: what evaluations do besides measuring the loss.

use serde::{Deserialize, Serialize};

use super::validate::check;
use crate::error::TrainError;
use qlora_data::DataConfig;

/// `[eval]`: prompts that are answered at each evaluation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalConfig {
    /// What is asked, each written as the training rows are.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub prompts: Vec<String>,
    /// Tokens of an answer at most.
    pub max_new_tokens: usize,
}

impl Default for EvalConfig {
    fn default() -> Self {
        Self { prompts: Vec::new(), max_new_tokens: 64 }
    }
}

impl EvalConfig {
    /// Checks the section. Answers belong to evaluations.
    pub(super) fn validate(&self, data: &DataConfig) -> Result<(), TrainError> {
        let count = format!("[{} prompts]", self.prompts.len());
        let asks = !self.prompts.is_empty();
        let evaluates = data.eval.is_some() || data.eval_fraction > 0.0;
        let rows = "are answered at evaluations: set data.eval or data.eval_fraction";
        check("eval.prompts", &count, !asks || evaluates, rows)?;
        let empty = self.prompts.iter().any(|prompt| prompt.trim().is_empty());
        check("eval.prompts", "\"\"", !empty, "must not be empty")?;
        check("eval.max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "must be 1 or more")
    }
}
