//! What a run measures: one JSON object a line in `metrics.jsonl`.
//!
//! A line is a step or an evaluation; the second has the key `eval_loss`:
//!
//! ```json
//! {"step":1,"epoch":0.008,"loss":8.31,"learning_rate":0.0002,"grad_norm":1.9,"tokens":1650,
//!  "tokens_per_second":910.2,"memory_bytes":512000000,"memory_in_use_bytes":301000000,
//!  "memory_reserved_bytes":512000000,"elapsed_seconds":1.8}
//! {"step":2,"epoch":0.016,...,"memory_reserved_bytes":512000000,"paging":{"pages":80,"resident":12,"evicted":68,
//!  "resident_bytes":201326592,"bytes_in":1140850688,"bytes_out":2281701376},"elapsed_seconds":3.5}
//! {"step":100,"eval_loss":0.91,"eval_tokens":20312,"elapsed_seconds":181.0}
//! ```
//!
//! `padding_tokens` counts the places of a step's batches that held padding, where some did; `tokens` counts none of them.
//! An evaluation has `eval_accuracy`, `eval_perplexity` and, where the configuration has prompts, `answers` to them, each
//! `{"prompt":"...","answer":"...","tokens":12,"ended":true}`.
//!
//! Where answers are compared, `preference` holds [`PreferenceFigures`], of a step and of an evaluation; `loss` is the objective's then, and there
//! is neither accuracy of tokens nor perplexity.
//!
//! `paging` is there once optimizer state was moved to host memory, and `loss_scaling` where the loss is scaled:
//! `{"scale":65536.0,"skipped":false,"skipped_steps":0}`. Loss or norm of a step that was skipped is `null`. Among several
//! ranks `slowest_rank` is there from the second step on, `{"rank":1,"seconds":0.613,"share":0.021}`: see [`SlowestRank`].
//!
//! The file is a log: lines are appended as they come, which is the one exception to the rule that
//! files appear whole. A run that resumes at step k first drops every later line (and a last line
//! that a crash cut short), so the log reads as if the run had never stopped.

mod run_info;

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use paged_optim::Paging;
use serde::{Deserialize, Deserializer, Serialize};

use crate::answers::Answer;
use crate::error::TrainError;
use crate::loss_scale::LossScaling;
use crate::objective::PreferenceFigures;

pub use run_info::{PackingInfo, RunInfo};

/// Name of the log in a run's output folder.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// One optimizer step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Optimizer steps done, this one included.
    pub step: usize,
    /// Passes over the training rows done so far.
    pub epoch: f64,
    /// Mean loss over the step's unmasked tokens, in nats; of an objective that compares answers over its pairs or rows.
    #[serde(deserialize_with = "number_or_nan")]
    pub loss: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Global norm of the gradients before clipping.
    #[serde(deserialize_with = "number_or_nan")]
    pub grad_norm: f64,
    /// Tokens read, masked ones included, padding not.
    pub tokens: u64,
    /// `tokens` by the time of the step; both are those of all ranks.
    #[serde(deserialize_with = "number_or_nan")]
    pub tokens_per_second: f64,
    /// Places of the batches that held padding, which are computed as tokens are; 0 and left out where rows are packed.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub padding_tokens: u64,
    /// Memory reserved on the device (of the process, on the CPU); the highest value seen so far.
    pub memory_bytes: u64,
    /// What the device's allocator has in use after the step (the process, on the CPU).
    #[serde(default)]
    pub memory_in_use_bytes: u64,
    /// What it has reserved after the step.
    #[serde(default)]
    pub memory_reserved_bytes: u64,
    /// Where the optimizer's state is and what of it was moved since the start or the last resume; left out while all
    /// of it stays on the device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paging: Option<Paging>,
    /// What loss scaling did; left out where the loss is not scaled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scaling: Option<LossScaling>,
    /// Rewards and log-probabilities, where the objective compares answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preference: Option<PreferenceFigures>,
    /// Which rank the others waited for in the step before this one; left out where there is one process, and of the first
    /// step after a start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slowest_rank: Option<SlowestRank>,
    /// Time since the start of the run, pauses between stop and resume left out.
    pub elapsed_seconds: f64,
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// The rank that took longest for its own part of a step, which all others wait for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SlowestRank {
    /// Its number.
    pub rank: usize,
    /// What its own part took: the step but for its wait for the sums of all.
    pub seconds: f64,
    /// The part of that time in which the others were done, on average: 0 where all are equally fast.
    pub share: f64,
}

impl SlowestRank {
    /// Of the seconds that the own part of each rank took; `None` where there are less than two, or they are no times.
    pub(crate) fn of(seconds: &[f64]) -> Option<Self> {
        let (rank, slowest) = seconds.iter().copied().enumerate().max_by(|(_, a), (_, b)| a.total_cmp(b))?;
        let others = seconds.len() - 1;
        if others == 0 || !(slowest > 0.0 && slowest.is_finite()) {
            return None;
        }
        let rest = (seconds.iter().sum::<f64>() - slowest) / others as f64;
        Some(Self { rank, seconds: slowest, share: ((slowest - rest) / slowest).clamp(0.0, 1.0) })
    }
}

impl StepMetrics {
    /// Whether loss scaling skipped the step: nothing was updated.
    pub fn is_skipped(&self) -> bool {
        self.loss_scaling.is_some_and(|scaling| scaling.skipped)
    }
}

/// One pass over the evaluation rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalMetrics {
    /// Optimizer steps done before it.
    pub step: usize,
    /// Mean loss over all unmasked tokens of the evaluation rows, in nats.
    #[serde(deserialize_with = "number_or_nan")]
    pub eval_loss: f64,
    /// Part of those tokens that the model thought likeliest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_accuracy: Option<f64>,
    /// The exponential of the loss.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_perplexity: Option<f64>,
    /// Unmasked tokens of the evaluation rows.
    pub eval_tokens: u64,
    /// Rewards and log-probabilities, where the objective compares answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preference: Option<PreferenceFigures>,
    /// Answers to the configuration's prompts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub answers: Vec<Answer>,
    /// Time that it took.
    #[serde(default)]
    pub eval_seconds: f64,
    /// Time since the start of the run, pauses between stop and resume left out.
    pub elapsed_seconds: f64,
}

impl EvalMetrics {
    /// The exponential of the loss.
    pub fn perplexity(&self) -> f64 {
        self.eval_loss.exp()
    }
}

/// JSON has no NaN and no infinity: they are written as null.
fn number_or_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// A line of the log.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Entry {
    Eval(EvalMetrics),
    Step(StepMetrics),
}

impl Entry {
    fn step(&self) -> usize {
        match self {
            Self::Eval(eval) => eval.step,
            Self::Step(step) => step.step,
        }
    }

    fn elapsed_seconds(&self) -> f64 {
        match self {
            Self::Eval(eval) => eval.elapsed_seconds,
            Self::Step(step) => step.elapsed_seconds,
        }
    }
}

/// Everything a log holds, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    /// The steps.
    pub steps: Vec<StepMetrics>,
    /// The evaluations.
    pub evals: Vec<EvalMetrics>,
}

impl History {
    /// Reads a log. A last line that was cut short is left out.
    ///
    /// # Errors
    /// The file can't be read, or another line isn't an entry.
    pub fn read(path: &Path) -> Result<Self, TrainError> {
        let text = read(path)?;
        let (lines, _) = parse(path, &text)?;
        Ok(Self::from_entries(lines.iter().map(|(entry, _)| entry)))
    }

    fn from_entries<'a>(entries: impl IntoIterator<Item = &'a Entry>) -> Self {
        let mut history = Self::default();
        for entry in entries {
            match entry {
                Entry::Step(step) => history.steps.push(step.clone()),
                Entry::Eval(eval) => history.evals.push(eval.clone()),
            }
        }
        history
    }
}

/// Appends to a run's log and keeps what it wrote for the report.
#[derive(Debug)]
pub(crate) struct MetricsWriter {
    path: PathBuf,
    /// `None` on ranks that don't write.
    file: Option<BufWriter<File>>,
    history: History,
    elapsed_before: f64,
}

impl MetricsWriter {
    /// Starts a new log; an old one at `path` is replaced.
    ///
    /// # Errors
    /// The file can't be created.
    pub(crate) fn create(path: &Path) -> Result<Self, TrainError> {
        let options = OpenOptions::new().write(true).create(true).truncate(true).to_owned();
        Self::open(path, &options, &[])
    }

    /// A log that no file keeps, of a rank that does not write.
    pub(crate) fn in_memory() -> Self {
        Self { path: PathBuf::new(), file: None, history: History::default(), elapsed_before: 0.0 }
    }

    /// Copies the log of another run, from which this one goes on, where there is one.
    ///
    /// # Errors
    /// The files can't be read or written.
    pub(crate) fn copy(from: Option<&Path>, to: &Path) -> Result<(), TrainError> {
        match from.filter(|from| from.is_file()) {
            Some(from) => {
                let text = read(from)?;
                Ok(adapter_io::atomic::write_bytes(to, &text)?)
            }
            None => Ok(()),
        }
    }

    /// Continues the log of a run that resumes after `step`: later lines are dropped. A log that
    /// doesn't exist is created.
    ///
    /// # Errors
    /// The file can't be read or written, or a line but the last isn't an entry.
    pub(crate) fn resume(path: &Path, step: usize) -> Result<Self, TrainError> {
        if !path.exists() {
            return Self::create(path);
        }
        let text = read(path)?;
        let (mut lines, torn) = parse(path, &text)?;
        let before = lines.len();
        lines.retain(|(entry, _)| entry.step() <= step);
        if torn || lines.len() < before {
            // Lines are kept as they stand: numbers written again could differ in their last digit.
            adapter_io::atomic::write_file(path, |file| {
                lines.iter().try_for_each(|(_, line)| file.write_all(line).and_then(|()| file.write_all(b"\n")))
            })?;
        }
        let entries: Vec<Entry> = lines.into_iter().map(|(entry, _)| entry).collect();
        Self::open(path, OpenOptions::new().append(true), &entries)
    }

    fn open(path: &Path, options: &OpenOptions, entries: &[Entry]) -> Result<Self, TrainError> {
        let file = options.open(path).map_err(|source| write_error(path, source))?;
        Ok(Self {
            path: path.to_owned(),
            file: Some(BufWriter::new(file)),
            history: History::from_entries(entries),
            elapsed_before: entries.iter().map(Entry::elapsed_seconds).fold(0.0, f64::max),
        })
    }

    /// Appends a step.
    ///
    /// # Errors
    /// The file can't be written.
    pub(crate) fn step(&mut self, metrics: &StepMetrics) -> Result<(), TrainError> {
        self.append(metrics)?;
        self.history.steps.push(metrics.clone());
        Ok(())
    }

    /// Appends an evaluation.
    ///
    /// # Errors
    /// The file can't be written.
    pub(crate) fn eval(&mut self, metrics: &EvalMetrics) -> Result<(), TrainError> {
        self.append(metrics)?;
        self.history.evals.push(metrics.clone());
        Ok(())
    }

    fn append(&mut self, entry: &impl Serialize) -> Result<(), TrainError> {
        let Some(file) = &mut self.file else { return Ok(()) };
        serde_json::to_writer(&mut *file, entry)
            .map_err(std::io::Error::from)
            .and_then(|()| file.write_all(b"\n"))
            .and_then(|()| file.flush())
            .map_err(|source| write_error(&self.path, source))
    }

    /// Makes sure that the log is on the disk. To be called before a checkpoint is saved, so that
    /// a checkpoint never knows of a step that the log doesn't.
    ///
    /// # Errors
    /// The file can't be written.
    pub(crate) fn sync(&mut self) -> Result<(), TrainError> {
        let Some(file) = &self.file else { return Ok(()) };
        file.get_ref().sync_data().map_err(|source| write_error(&self.path, source))
    }

    /// What the log holds, the part from before a resume included.
    pub(crate) fn history(&self) -> &History {
        &self.history
    }

    /// Seconds that the run had taken before it was resumed; add them to `elapsed_seconds`.
    pub(crate) fn elapsed_before(&self) -> f64 {
        self.elapsed_before
    }
}

fn write_error(path: &Path, source: std::io::Error) -> TrainError {
    TrainError::MetricsWrite { path: path.to_owned(), source }
}

fn read(path: &Path) -> Result<Vec<u8>, TrainError> {
    std::fs::read(path).map_err(|source| TrainError::MetricsRead {
        path: path.to_owned(),
        line: 0,
        problem: source.to_string(),
    })
}

/// An entry with the text of its line.
type Line<'a> = (Entry, &'a [u8]);

/// The entries of a log, each with its line, and whether the last line was cut short.
fn parse<'a>(path: &Path, text: &'a [u8]) -> Result<(Vec<Line<'a>>, bool), TrainError> {
    let mut entries = Vec::new();
    let mut lines = text.split(|byte| *byte == b'\n').enumerate().peekable();
    while let Some((index, line)) = lines.next() {
        if line.is_empty() {
            continue;
        }
        match serde_json::from_slice(line) {
            Ok(entry) => entries.push((entry, line)),
            Err(_) if lines.peek().is_none() => break,
            Err(problem) => {
                return Err(TrainError::MetricsRead {
                    path: path.to_owned(),
                    line: index + 1,
                    problem: problem.to_string(),
                });
            }
        }
    }
    let torn = text.last().is_some_and(|byte| *byte != b'\n');
    Ok((entries, torn))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn step(step: usize) -> StepMetrics {
        StepMetrics {
            step,
            epoch: step as f64 / 10.0,
            loss: 0.1 + 0.7 / step as f64,
            learning_rate: 2e-4,
            grad_norm: 0.5,
            tokens: 100,
            tokens_per_second: 1000.0,
            padding_tokens: (step as u64 % 2) * 12,
            memory_bytes: 1 << 20,
            memory_in_use_bytes: 1 << 19,
            memory_reserved_bytes: 1 << 20,
            paging: step.is_multiple_of(2).then(|| Paging { pages: 10, bytes_in: 1 << 40, ..Default::default() }),
            slowest_rank: SlowestRank::of(&[0.25 * step as f64, 0.5]).filter(|_| step > 1),
            loss_scaling: (step == 3).then_some(LossScaling { scale: 1024.0, skipped: false, skipped_steps: 2 }),
            preference: (step == 2).then_some(PreferenceFigures {
                rewards_margin: Some(0.25),
                kl: None,
                ..PreferenceFigures::default()
            }),
            elapsed_seconds: step as f64,
        }
    }

    fn eval(step: usize) -> EvalMetrics {
        EvalMetrics {
            step,
            eval_loss: 1.25,
            eval_accuracy: Some(0.5),
            eval_perplexity: Some(1.25f64.exp()),
            eval_tokens: 7,
            preference: None,
            answers: vec![Answer { prompt: "1 + 1?".into(), answer: "2".into(), tokens: 2, ended: true }],
            eval_seconds: 0.25,
            elapsed_seconds: step as f64 + 0.5,
        }
    }

    fn log(dir: &Path) -> PathBuf {
        let path = dir.join(METRICS_FILE);
        let mut writer = MetricsWriter::create(&path).unwrap();
        for k in 1..=4 {
            writer.step(&step(k)).unwrap();
        }
        writer.eval(&eval(4)).unwrap();
        writer.step(&step(5)).unwrap();
        writer.sync().unwrap();
        path
    }

    #[test]
    fn a_log_reads_back_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = log(dir.path());
        let history = History::read(&path).unwrap();
        assert_eq!(history.steps.len(), 5);
        for (read, written) in history.steps.iter().zip((1..=5).map(step)) {
            // serde_json may miss the last bit of an f64 when it reads one.
            assert!((read.loss - written.loss).abs() < 1e-15);
            assert_eq!(StepMetrics { loss: written.loss, ..read.clone() }, written);
        }
        assert_eq!(history.evals, [eval(4)]);
        assert_eq!(MetricsWriter::resume(&path, 5).unwrap().history(), &history);
    }

    #[test]
    fn the_slowest_rank_is_the_one_that_the_others_wait_for() {
        let of = SlowestRank::of;
        assert_eq!(of(&[0.5, 1.0, 0.75]), Some(SlowestRank { rank: 1, seconds: 1.0, share: 0.375 }));
        assert_eq!(of(&[0.5, 0.5]).map(|slowest| slowest.share), Some(0.0));
        for nothing in [&[][..], &[1.0], &[0.0, 0.0], &[f64::NAN, 1.0]] {
            assert_eq!(of(nothing), None, "{nothing:?}");
        }
    }

    #[test]
    fn resume_drops_what_came_after_the_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let path = log(dir.path());
        let never_stopped = std::fs::read(&path).unwrap();
        let mut writer = MetricsWriter::resume(&path, 3).unwrap();
        assert_eq!(writer.history().steps.iter().map(|step| step.step).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(writer.elapsed_before(), 3.0);
        writer.step(&step(4)).unwrap();
        writer.eval(&eval(4)).unwrap();
        writer.step(&step(5)).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), never_stopped);
    }

    #[test]
    fn a_torn_last_line_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = log(dir.path());
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 20]).unwrap();
        assert_eq!(History::read(&path).unwrap().steps.len(), 4);
        let mut writer = MetricsWriter::resume(&path, 5).unwrap();
        assert_eq!(writer.elapsed_before(), 4.5);
        writer.step(&step(5)).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), whole);
        // Whole but for its newline: kept, and the next line still starts a line.
        std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        MetricsWriter::resume(&path, 5).unwrap().step(&step(6)).unwrap();
        assert_eq!(History::read(&path).unwrap().steps.len(), 6);
    }

    #[test]
    fn a_broken_line_inside_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = log(dir.path());
        let text = std::fs::read_to_string(&path).unwrap().replacen("{\"step\":2", "{step:2", 1);
        std::fs::write(&path, text).unwrap();
        let message = History::read(&path).unwrap_err().to_string();
        assert!(message.contains("metrics.jsonl:2: "), "{message}");
    }

    #[test]
    fn a_loss_that_is_not_a_number_survives() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(METRICS_FILE);
        let nan = StepMetrics { loss: f64::NAN, grad_norm: f64::INFINITY, ..step(1) };
        MetricsWriter::create(&path).unwrap().step(&nan).unwrap();
        let history = History::read(&path).unwrap();
        assert!(history.steps[0].loss.is_nan() && history.steps[0].grad_norm.is_nan());
    }

    #[test]
    fn an_unwritable_log_is_named() {
        let message = MetricsWriter::create(Path::new("no/such/folder/m.jsonl")).unwrap_err().to_string();
        assert!(message.contains("no/such/folder/m.jsonl"), "{message}");
    }
}
