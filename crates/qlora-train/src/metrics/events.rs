//! How the training loop tells its caller what happens; libraries don't print.

use std::path::{Path, PathBuf};

use qlora_models::LoadProgress;
use serde::{Deserialize, Serialize};

use super::{EvalMetrics, StepMetrics};
use crate::report::Summary;

/// Receives what happens in a run, in order. Every method may be left out.
///
/// `()` is the observer that ignores everything.
pub trait TrainEvents {
    /// A module of the base model was loaded.
    fn on_load(&mut self, _progress: LoadProgress<'_>) {}
    /// Model and data are ready; the first step follows.
    fn on_start(&mut self, _run: &RunInfo) {}
    /// A step is done.
    fn on_step(&mut self, _metrics: &StepMetrics) {}
    /// An evaluation is done.
    fn on_eval(&mut self, _metrics: &EvalMetrics) {}
    /// A training checkpoint was saved.
    fn on_save(&mut self, _checkpoint: &Path) {}
    /// Something the user should know of, which doesn't stop the run.
    fn on_warning(&mut self, _message: &str) {}
    /// The run is over; adapter and report are written.
    fn on_end(&mut self, _summary: &Summary) {}
    /// Asked after every step: whether to save a checkpoint and stop.
    fn should_stop(&mut self) -> bool {
        false
    }
}

impl TrainEvents for () {}

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
    /// Parameters of the base model.
    pub base_parameters: u64,
    /// Parameters of the adapters.
    pub trainable_parameters: u64,
    /// Modules that have an adapter.
    pub adapted_modules: usize,
    /// Rank of the adapters.
    pub rank: usize,
    /// The training rows as the configuration names them.
    pub train_data: PathBuf,
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
    /// Rows in an optimizer step.
    pub rows_per_step: usize,
    /// Where everything is written.
    pub output_dir: PathBuf,
}
