//! What a run is about to train and on which rows, for the caller and the report.

use std::path::PathBuf;

use qlora_data::Packed;
use serde::{Deserialize, Serialize};

/// What is about to be trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunInfo {
    /// The base model as the configuration names it.
    pub model: String,
    /// The device in words.
    pub device: String,
    /// Dtype of activations, e.g. `bf16`.
    pub compute_dtype: String,
    /// The base's weights in words, e.g. `NF4, blocksize 64 with double quantization`.
    pub quantization: String,
    /// The base's weights by what they are held in, e.g. `3.6 GiB in 4 bits, 250.0 MiB in 16 bits`.
    #[serde(default)]
    pub held: String,
    /// Parameters of the base model.
    pub base_parameters: u64,
    /// Parameters of the adapters.
    pub trainable_parameters: u64,
    /// Modules that have an adapter.
    pub adapted_modules: usize,
    /// Rank of the adapters.
    pub rank: usize,
    /// What compares answers, in words; `None` where answers are learned as they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub objective: Option<String>,
    /// The training rows as the configuration names them.
    pub train_data: String,
    /// Training rows.
    pub train_rows: usize,
    /// Tokens of the training rows.
    pub train_tokens: u64,
    /// Evaluation rows.
    pub eval_rows: usize,
    /// Steps of the whole run.
    pub total_steps: usize,
    /// Steps done before this start: 0, or those of the checkpoint that is resumed.
    pub start_step: usize,
    /// Processes that train together.
    #[serde(default = "one")]
    pub ranks: usize,
    /// Rows in an optimizer step, of all ranks; sequences where rows are packed.
    pub rows_per_step: usize,
    /// How rows are packed, where they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packing: Option<PackingInfo>,
    /// What blocks keep for the backward pass, e.g. `none`.
    #[serde(default)]
    pub activation_checkpointing: String,
    /// Where everything is written.
    pub output_dir: PathBuf,
}

/// Rows that lie end to end.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PackingInfo {
    /// Sequences of an epoch.
    pub sequences: usize,
    /// Rows in them.
    pub rows: usize,
    /// Tokens of a sequence at most.
    pub max_length: usize,
    /// The part of the sequences that holds tokens.
    pub fill: f64,
}

impl PackingInfo {
    /// Of an order whose epochs visit so many rows.
    pub(crate) fn new(packed: Packed, rows: usize) -> Self {
        Self { sequences: packed.sequences, rows, max_length: packed.capacity, fill: packed.fill() }
    }
}

impl RunInfo {
    /// What an optimizer step holds, in words: `16 rows`, or `16 sequences of up to 2048 tokens (12.3 rows)`.
    pub fn step_contents(&self) -> String {
        match self.packing {
            None => format!("{} rows", self.rows_per_step),
            Some(PackingInfo { sequences, rows, max_length, .. }) => {
                let rows = rows as f64 / sequences.max(1) as f64;
                format!("{} sequences of up to {max_length} tokens ({rows:.1} rows)", self.rows_per_step)
            }
        }
    }
}

fn one() -> usize {
    1
}
