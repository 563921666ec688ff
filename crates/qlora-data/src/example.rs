//! One row as tokens with their labels.

use chat_text::MASKED_LABEL;

/// A row as tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Example {
    /// Token ids, below 2^31.
    pub input_ids: Vec<u32>,
    /// For each token its id, or [`MASKED_LABEL`]. Not shifted: the label at position t is what
    /// the model should predict at t - 1, so the first one is never used.
    pub labels: Vec<i64>,
    /// Line of the file, from 1.
    pub line: usize,
}

impl Example {
    /// Tokens that the loss counts.
    pub fn label_tokens(&self) -> usize {
        let labels = self.labels.iter().skip(1);
        labels.filter(|label| **label != MASKED_LABEL).count()
    }
}
