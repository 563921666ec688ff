//! What a run is about to train and on which rows, for the caller and the report.

use std::path::PathBuf;

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
    /// Rows in an optimizer step, of all ranks.
    pub rows_per_step: usize,
    /// What blocks keep for the backward pass, e.g. `none`.
    #[serde(default)]
    pub activation_checkpointing: String,
    /// Where everything is written.
    pub output_dir: PathBuf,
}

fn one() -> usize {
    1
}
