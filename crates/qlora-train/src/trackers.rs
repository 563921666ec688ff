//! Where a run is told of besides its own log: experiment trackers.
//!
//! A tracker that fails is told of once, and left out from then on: no run ends for it. Rank 0 alone writes. A run that resumes goes on in
//! what it began: TensorBoard drops what an earlier start wrote behind the step that is resumed, the runs of MLflow and Trackio have
//! their ids in the output folder.

mod courier;
mod mlflow;
mod server;
mod tensorboard;
mod tfevents;
mod trackio;

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::answers::Answer;
use crate::metrics::{EvalMetrics, StepMetrics};
use crate::objective::PreferenceFigures;
use crate::report::Outcome;

pub(crate) use mlflow::MLFLOW_FILE;
pub(crate) use tensorboard::remove_events;
pub(crate) use trackio::TRACKIO_FILE;

/// A tracker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tracker {
    /// Event files in the folder `tensorboard` of the output folder.
    TensorBoard,
    /// An MLflow server, at `MLFLOW_TRACKING_URI`, in the experiment `MLFLOW_EXPERIMENT_NAME`.
    MlFlow,
    /// A Trackio server, at `TRACKIO_SERVER_URL` or in the Space `TRACKIO_SPACE_ID`, in the project `TRACKIO_PROJECT`.
    Trackio,
}

impl Tracker {
    fn name(self) -> &'static str {
        match self {
            Self::TensorBoard => "tensorboard",
            Self::MlFlow => "mlflow",
            Self::Trackio => "trackio",
        }
    }
}

/// Where a run's trackers begin.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Beginning<'a> {
    /// The output folder.
    pub folder: &'a Path,
    /// The run's configuration, key by key.
    pub settings: &'a [(String, toml::Value)],
    /// Steps that are done.
    pub step: usize,
}

/// What takes values of a run. An error is a sentence without a full stop.
trait Sink: Send {
    /// Values of a step by their names.
    fn scalars(&mut self, step: usize, values: &[(&'static str, f64)]) -> Result<(), String>;
    /// Answers of an evaluation.
    fn answers(&mut self, step: usize, answers: &[Answer]) -> Result<(), String>;
    /// The run is over; `None` where it failed.
    fn finish(&mut self, outcome: Option<Outcome>) -> Result<(), String>;
}

/// Answers as Markdown, by names that stay the same over a run.
fn texts(answers: &[Answer]) -> impl Iterator<Item = (String, String)> {
    answers.iter().enumerate().map(|(number, answer)| (format!("answers/{}", number + 1), answer.to_markdown()))
}

/// The trackers of a run.
#[derive(Default)]
pub(crate) struct Trackers {
    sinks: Vec<(Tracker, Box<dyn Sink>)>,
    finished: bool,
}

impl Trackers {
    /// Opens trackers, and says which could not be.
    pub(crate) fn open(which: &[Tracker], beginning: Beginning<'_>) -> (Self, Vec<String>) {
        let (mut sinks, mut warnings) = (Vec::new(), Vec::new());
        for tracker in which {
            let sink: Result<Box<dyn Sink>, String> = match tracker {
                Tracker::TensorBoard => tensorboard::EventFile::create(beginning).map(|file| Box::new(file) as _),
                Tracker::MlFlow => mlflow::MlFlow::begin(beginning).map(|run| Box::new(run) as _),
                Tracker::Trackio => trackio::Trackio::begin(beginning).map(|run| Box::new(run) as _),
            };
            match sink {
                Ok(sink) => sinks.push((*tracker, sink)),
                Err(problem) => warnings.push(given_up(*tracker, &problem)),
            }
        }
        (Self { sinks, finished: false }, warnings)
    }

    /// Tells of a step. Returns which trackers failed.
    pub(crate) fn step(&mut self, metrics: &StepMetrics) -> Vec<String> {
        let mut values = vec![
            ("train/loss", metrics.loss),
            ("train/learning_rate", metrics.learning_rate),
            ("train/grad_norm", metrics.grad_norm),
            ("train/epoch", metrics.epoch),
            ("train/tokens_per_second", metrics.tokens_per_second),
            ("train/memory_bytes", metrics.memory_bytes as f64),
        ];
        values.extend(metrics.loss_scaling.map(|scaling| ("train/loss_scale", scaling.scale)));
        let figures = metrics.preference.iter().flat_map(PreferenceFigures::named);
        values.extend(figures.map(|([of_step, _], value)| (of_step, value)));
        self.each(|sink| sink.scalars(metrics.step, &values))
    }

    /// Tells of an evaluation. Returns which trackers failed.
    pub(crate) fn eval(&mut self, metrics: &EvalMetrics) -> Vec<String> {
        let mut values = vec![("eval/loss", metrics.eval_loss)];
        values.extend(metrics.preference.is_none().then(|| ("eval/perplexity", metrics.perplexity())));
        values.extend(metrics.eval_accuracy.map(|accuracy| ("eval/accuracy", accuracy)));
        let figures = metrics.preference.iter().flat_map(PreferenceFigures::named);
        values.extend(figures.map(|([_, of_evaluation], value)| (of_evaluation, value)));
        self.each(|sink| {
            sink.scalars(metrics.step, &values)?;
            if metrics.answers.is_empty() { Ok(()) } else { sink.answers(metrics.step, &metrics.answers) }
        })
    }

    /// Ends the run in its trackers. Returns which failed.
    pub(crate) fn finish(&mut self, outcome: Outcome) -> Vec<String> {
        self.finished = true;
        self.each(|sink| sink.finish(Some(outcome)))
    }

    fn each(&mut self, mut tell: impl FnMut(&mut dyn Sink) -> Result<(), String>) -> Vec<String> {
        let mut warnings = Vec::new();
        self.sinks.retain_mut(|(tracker, sink)| match tell(&mut **sink) {
            Ok(()) => true,
            Err(problem) => {
                warnings.push(given_up(*tracker, &problem));
                false
            }
        });
        warnings
    }
}

impl Drop for Trackers {
    fn drop(&mut self) {
        if !self.finished {
            // The run failed, and says why itself.
            self.each(|sink| sink.finish(None));
        }
    }
}

fn given_up(tracker: Tracker, problem: &str) -> String {
    format!("{} (train.log_to): {problem}; the run goes on without it", tracker.name())
}

#[cfg(test)]
mod stub;
#[cfg(test)]
mod tests;
