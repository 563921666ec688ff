//! How the training loop tells its caller what happens; libraries don't print.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use model_hub::OnProgress;
use qlora_models::LoadProgress;

use crate::metrics::{EvalMetrics, RunInfo, StepMetrics};
use crate::report::Summary;

/// A callback for how far rows are read.
pub type OnRows = Arc<dyn Fn(qlora_data::LoadProgress<'_>) + Send + Sync>;

/// A part of an evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EvalPart {
    /// Batches of evaluation rows.
    Batches,
    /// The prompts that are answered.
    Answers,
}

/// Receives what happens in a run, in order. Every method may be left out.
///
/// `()` is the observer that ignores everything.
pub trait TrainEvents {
    /// Asked before the base model is downloaded: what to tell how far that is.
    fn download_progress(&mut self) -> Option<OnProgress> {
        None
    }

    /// Asked before rows are read: what to tell how far that is, from the thread that reads them.
    fn rows_progress(&mut self) -> Option<OnRows> {
        None
    }

    /// A module of the base model was loaded.
    fn on_load(&mut self, _progress: LoadProgress<'_>) {}
    /// Model and data are ready; the first step follows.
    fn on_start(&mut self, _run: &RunInfo) {}
    /// A step is done.
    fn on_step(&mut self, _metrics: &StepMetrics) {}
    /// An evaluation after so many steps begins.
    fn on_eval_start(&mut self, _step: usize) {}
    /// So many of a part of the evaluation are done; among ranks, of this rank's share.
    fn on_eval_progress(&mut self, _part: EvalPart, _done: usize, _total: usize) {}
    /// An evaluation is done.
    fn on_eval(&mut self, _metrics: &EvalMetrics) {}
    /// A training checkpoint was saved.
    fn on_save(&mut self, _checkpoint: &Path) {}
    /// Something was done that the configuration asks for, and that shows nowhere else.
    fn on_notice(&mut self, _message: &str) {}
    /// Something the user should know of, which doesn't stop the run.
    fn on_warning(&mut self, _message: &str) {}
    /// The run is over; adapter and report are written.
    fn on_end(&mut self, _summary: &Summary) {}
    /// Asked before long work on other threads begins: a flag that is raised to stop it.
    fn stop_flag(&mut self) -> Option<Arc<AtomicBool>> {
        None
    }
    /// Asked after every step, and before the first: whether to save a checkpoint and stop.
    fn should_stop(&mut self) -> bool {
        false
    }
}

impl TrainEvents for () {}
