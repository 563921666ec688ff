//! The final report: `summary.md`, `summary.json` and the loss curve as a picture, `loss.svg`.

mod card;
mod curve;
mod device;
mod words;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::answers::Answer;
use crate::error::TrainError;
use crate::metrics::{History, RunInfo};
use crate::objective::PreferenceFigures;

pub use card::Card;
use curve::curves;
pub use device::device_name;
pub use words::{count, duration, memory};

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// All steps are done.
    Finished,
    /// Evaluations stopped improving.
    #[serde(rename = "stopped early")]
    StoppedEarly,
    /// Stopped on request, with a checkpoint to resume from.
    Interrupted,
}

/// What a run did, for the report and for the caller.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// What was trained.
    pub run: RunInfo,
    /// How it ended.
    pub outcome: Outcome,
    /// Steps done, those before a resume included.
    pub steps: usize,
    /// Loss of the first step.
    pub first_loss: Option<f64>,
    /// Loss of the last step.
    pub last_loss: Option<f64>,
    /// Lowest loss of a single step, and the step.
    pub best_loss: Option<(f64, usize)>,
    /// First evaluation loss.
    pub first_eval_loss: Option<f64>,
    /// Last evaluation loss.
    pub last_eval_loss: Option<f64>,
    /// Lowest evaluation loss, and the step.
    pub best_eval_loss: Option<(f64, usize)>,
    /// Tokens read, padding not counted.
    pub tokens: u64,
    /// `tokens` by the time spent in steps.
    pub tokens_per_second: f64,
    /// Highest memory in use on the device.
    pub peak_memory_bytes: u64,
    /// Time of the whole run, pauses between stop and resume left out.
    pub elapsed_seconds: f64,
    /// Part of the evaluation's tokens that were predicted right, in the last one.
    #[serde(default)]
    pub last_eval_accuracy: Option<f64>,
    /// Perplexity of the last evaluation.
    #[serde(default)]
    pub last_eval_perplexity: Option<f64>,
    /// Rewards and log-probabilities of the last evaluation, or, without evaluations, of the last step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_preference: Option<PreferenceFigures>,
    /// Answers to the configuration's prompts in the last evaluation.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub answers: Vec<Answer>,
    /// The step that the adapter is of: the last one, or that of the best evaluation.
    #[serde(default)]
    pub adapter_step: usize,
    /// Steps that loss scaling skipped.
    #[serde(default)]
    pub skipped_steps: u64,
    /// The adapter's folder; where an interrupted run stands: the checkpoint to resume from.
    pub adapter: PathBuf,
}

impl Summary {
    /// Draws up the summary of a run from its log.
    pub(crate) fn new(run: RunInfo, history: &History, outcome: Outcome, adapter: PathBuf) -> Self {
        let steps = &history.steps;
        let evals = &history.evals;
        let lowest = |pairs: &mut dyn Iterator<Item = (f64, usize)>| {
            pairs.filter(|(loss, _)| loss.is_finite()).min_by(|a, b| a.0.total_cmp(&b.0))
        };
        // A step that was skipped may have none.
        let losses = || steps.iter().map(|step| step.loss).filter(|loss| loss.is_finite());
        let skipped = steps.last().and_then(|step| step.loss_scaling).map_or(0, |scaling| scaling.skipped_steps);
        let tokens = steps.iter().map(|step| step.tokens).sum();
        let seconds: f64 = steps
            .iter()
            .filter(|step| step.tokens_per_second > 0.0)
            .map(|step| step.tokens as f64 / step.tokens_per_second)
            .sum();
        Self {
            run,
            outcome,
            steps: steps.last().map_or(0, |step| step.step),
            first_loss: losses().next(),
            last_loss: losses().next_back(),
            best_loss: lowest(&mut steps.iter().map(|step| (step.loss, step.step))),
            first_eval_loss: evals.first().map(|eval| eval.eval_loss),
            last_eval_loss: evals.last().map(|eval| eval.eval_loss),
            best_eval_loss: lowest(&mut evals.iter().map(|eval| (eval.eval_loss, eval.step))),
            tokens,
            tokens_per_second: if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 },
            peak_memory_bytes: steps.iter().map(|step| step.memory_bytes).max().unwrap_or(0),
            elapsed_seconds: steps
                .iter()
                .map(|step| step.elapsed_seconds)
                .chain(evals.iter().map(|eval| eval.elapsed_seconds))
                .fold(0.0, f64::max),
            last_eval_accuracy: evals.last().and_then(|eval| eval.eval_accuracy),
            last_eval_perplexity: evals.last().and_then(|eval| eval.eval_perplexity),
            last_preference: match evals.last() {
                Some(eval) => eval.preference,
                None => steps.last().and_then(|step| step.preference),
            },
            answers: evals.last().map_or(Vec::new(), |eval| eval.answers.clone()),
            adapter_step: steps.last().map_or(0, |step| step.step),
            skipped_steps: skipped,
            adapter,
        }
    }

    /// A warning where the last steps predict all tokens alike or worse than the first one did: training destroyed the model. `vocab_size`
    /// is the number of tokens to choose from.
    pub(crate) fn nothing_learned(&self, history: &History, vocab_size: usize) -> Option<String> {
        // One step says little.
        const LAST: usize = 5;
        let steps = &history.steps;
        let first = self.first_loss?;
        if steps.len() < 2 * LAST {
            return None;
        }
        let losses = steps[steps.len() - LAST..].iter().map(|step| step.loss).filter(|loss| loss.is_finite());
        let (sum, count) = losses.fold((0.0, 0.0), |(sum, count), loss| (sum + loss, count + 1.0));
        let last: f64 = sum / count;
        let uniform = (vocab_size.max(2) as f64).ln();
        let what = if (last / uniform - 1.0).abs() < 0.01 {
            format!("is {last:.3}, that of a model to which all {vocab_size} tokens are equally likely")
        } else if last > first {
            format!("rose from {first:.3} to {last:.3}")
        } else {
            return None;
        };
        Some(format!("the training loss {what}: lower train.learning_rate, or look at the rows with `qlora preview`"))
    }

    /// Writes `summary.md`, `summary.json` and `loss.svg` into `dir`.
    ///
    /// # Errors
    /// A file can't be written, or the picture can't be drawn.
    pub(crate) fn write(&self, dir: &Path, history: &History) -> Result<(), TrainError> {
        let json = serde_json::to_vec_pretty(self)
            .map_err(|e| TrainError::Report { path: dir.join("summary.json"), problem: e.to_string() })?;
        write_curves(dir, history)?;
        adapter_io::atomic::write_bytes(&dir.join("summary.json"), &json)?;
        adapter_io::atomic::write_bytes(&dir.join("summary.md"), self.to_markdown().as_bytes())?;
        Ok(())
    }
}

/// Draws the curves of a run so far into `loss.svg` of its folder.
///
/// # Errors
/// The file can't be written, or the picture can't be drawn.
pub(crate) fn write_curves(dir: &Path, history: &History) -> Result<(), TrainError> {
    Ok(adapter_io::atomic::write_bytes(&dir.join("loss.svg"), curves(history)?.as_bytes())?)
}

#[cfg(test)]
mod tests;
