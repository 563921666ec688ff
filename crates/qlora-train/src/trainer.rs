//! A whole run: load, train, evaluate, save, resume, report.

mod build;
mod finish;
mod first_step;
mod reference;
mod rows;
mod saving;
mod start;
mod together;

use crate::answers::{self, Asked};
use crate::checkpoint::{Basis, Evaluations};
use crate::checkpointing::Policies;
use crate::config::{ComputeDtype, RunConfig, TrainConfig};
use crate::engine::Engine;
use crate::error::TrainError;
use crate::events::{EvalPart, TrainEvents};
use crate::loss_scale::LossScaler;
use crate::metrics::{EvalMetrics, MetricsWriter, SlowestRank, StepMetrics};
use crate::prompts::Prompts;
use crate::ranks::Ranks;
use crate::report::{self, Outcome, Summary};
use crate::run_folder::RunFolder;
use crate::trackers::Trackers;
use burn::tensor::{Device, FloatDType};
use paged_optim::{OptimizerConfig, Paging};
use qlora_data::{Batches, Padding, Position};
use qlora_layers::mix;
use qlora_models::{Decoder, check_compute_dtype, default_compute_dtype, device_memory, peak_memory};
use reference::{Known, bring};
use rows::Rows;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

pub use rows::{load_rows, packing_note, training_order};
pub use start::{Resume, Start};

/// A run that is ready to go.
pub struct Trainer<'e> {
    config: TrainConfig,
    engine: Engine,
    rows: Arc<Rows>,
    /// What the reference thinks of them, where that is known ahead.
    known: Option<Known>,
    metrics: MetricsWriter,
    events: &'e mut dyn TrainEvents,
    /// What the run stands on, for its checkpoints.
    basis: Basis,
    prompts: Prompts,
    /// Prompts that are answered at evaluations.
    asked: Option<Asked>,
    trackers: Trackers,
    evaluations: Evaluations,
    total_steps: usize,
    /// Optimizer steps done.
    step: usize,
    /// Optimizer steps done when this run was started.
    start_step: usize,
    /// Where the next micro-batch stands in the training rows.
    position: Position,
    /// The newest checkpoint of this run.
    saved: Option<PathBuf>,
    dtype: FloatDType,
    peak_memory: u64,
    started: Instant,
    /// The ranks that train together, where there are several.
    ranks: Option<Ranks>,
    /// Seconds that this rank's own part of the last step took.
    own_seconds: f64,
    /// Which rank the others waited for in the last step.
    slowest_rank: Option<SlowestRank>,
    /// Held to the end; the last field, so that everything else is closed before the folder is given back. Only rank 0 has it.
    folder: Option<RunFolder>,
}

impl fmt::Debug for Trainer<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { config, step, total_steps, position, .. } = self;
        let mut fields = f.debug_struct("Trainer");
        fields.field("config", config).field("step", step).field("total_steps", total_steps);
        fields.field("position", position).finish_non_exhaustive()
    }
}

/// The dtype that `compute_dtype` stands for on a device.
///
/// # Errors
/// [`ModelError::ComputeDtype`](qlora_models::ModelError::ComputeDtype) when the device does not compute in it.
pub fn compute_dtype(choice: ComputeDtype, device: &Device) -> Result<FloatDType, TrainError> {
    let dtype = match choice {
        ComputeDtype::Auto => default_compute_dtype(device),
        ComputeDtype::F32 => FloatDType::F32,
        ComputeDtype::Bf16 => FloatDType::BF16,
        ComputeDtype::F16 => FloatDType::F16,
    };
    check_compute_dtype(device, dtype)?;
    Ok(dtype)
}

/// The engine that a configuration asks for, on a model whose adapters are in place, with what each block keeps for the backward
/// pass.
///
/// # Errors
/// [`TrainError::NothingToTrain`] when it has no adapter.
pub fn engine(model: Decoder, options: &RunConfig, policies: impl Into<Policies>) -> Result<Engine, TrainError> {
    let optimizer = OptimizerConfig {
        kind: options.optimizer,
        betas: (options.betas[0], options.betas[1]),
        eps: options.eps,
        weight_decay: options.weight_decay,
        ..Default::default()
    };
    let max_grad_norm = options.max_grad_norm as f32;
    let loss_scaler = LossScaler::new(options.loss_scale, model.dtype());
    let engine = Engine::new(model, optimizer, options.optimizer_budget, max_grad_norm, policies)?;
    let kinds = engine.model().parameter_kinds().into_iter();
    let rates = kinds.map(|kind| options.rates_of(kind)).collect();
    Ok(engine.with_loss_scaler(loss_scaler).with_rates(rates).with_neftune(options.neftune_alpha as f32))
}

impl Trainer<'_> {
    /// The model in training.
    pub fn model(&self) -> &Decoder {
        self.engine.model()
    }

    /// Trains to the end, until early stopping ends the run, or until the events ask to stop; then writes the adapter and the report.
    ///
    /// Among several ranks only rank 0 writes; the summary of others knows this start alone.
    ///
    /// # Errors
    /// The device fails, training diverges, a file can't be written, or another rank fails. Earlier checkpoints stay readable.
    pub fn run(self) -> Result<Summary, TrainError> {
        let ranks = self.ranks.clone();
        let result = self.run_to_end();
        match ranks {
            Some(ranks) => ranks.tell(result),
            None => result,
        }
    }

    fn run_to_end(mut self) -> Result<Summary, TrainError> {
        let info = self.info();
        self.events.on_start(&info);
        self.started = Instant::now();
        if self.step == 0 {
            self.evaluate()?;
        }
        let rows = Arc::clone(&self.rows);
        let mut batches = rows.order.batches_from(&rows.train.examples, self.position);
        let mut outcome = self.stopped_early();
        let mut moved = false;
        while self.step < self.total_steps && outcome.is_none() {
            let metrics = match moved {
                false => self.first_step(&mut batches)?,
                true => self.step(&mut batches)?,
            };
            moved |= !metrics.is_skipped();
            let after = self.after_step(&metrics);
            outcome = self.keep_if_ranks_failed(after)?;
        }
        self.finish(info, outcome.unwrap_or(Outcome::Finished))
    }

    /// One optimizer step over the next micro-batches.
    fn step(&mut self, batches: &mut Batches<'_>) -> Result<StepMetrics, TrainError> {
        let started = Instant::now();
        let options = &self.config.train;
        let mut micro_batches =
            tracing::trace_span!("data").in_scope(|| batches.next_step(options.gradient_accumulation_steps));
        if let Some(known) = &self.known {
            micro_batches.iter_mut().for_each(|batch| bring(&known.train, batch));
        }
        let mut places = Padding::default();
        micro_batches.iter().for_each(|batch| places += batch.padding());
        let tokens = places.tokens;
        let learning_rate = options.learning_rate_at(self.step, self.total_steps);
        let seed = mix(options.seed ^ mix(self.step as u64));
        let output = match self.engine.step(&micro_batches, learning_rate, seed) {
            Ok(output) => output,
            Err(error @ (TrainError::NotFinite { .. } | TrainError::LossScale { .. })) => {
                return Err(self.spoilt()?.unwrap_or(error));
            }
            Err(error) => {
                if matches!(error, TrainError::OutOfMemory { .. } | TrainError::Ranks(_)) {
                    self.save_steps_so_far();
                }
                return Err(error);
            }
        };
        if let Some(notice) = self.engine.take_notice() {
            self.events.on_warning(&notice);
        }
        self.step += 1;
        self.position = batches.next_position();
        let (in_use, reserved) = device_memory(self.engine.model().device()).unwrap_or_default();
        self.peak_memory = self.peak_memory.max(peak_memory(self.engine.model().device()).unwrap_or(reserved));
        let epoch_part = self.position.batch as f64 / self.rows.order.batches_per_epoch() as f64;
        let seconds = started.elapsed().as_secs_f64();
        self.own_seconds = seconds - output.waited_seconds.unwrap_or(0.0);
        Ok(StepMetrics {
            step: self.step,
            epoch: self.position.epoch as f64 + epoch_part,
            loss: output.loss,
            learning_rate,
            grad_norm: output.grad_norm,
            tokens,
            tokens_per_second: tokens as f64 / seconds,
            padding_tokens: places.cells - tokens,
            memory_bytes: self.peak_memory,
            memory_in_use_bytes: in_use,
            memory_reserved_bytes: reserved,
            paging: Some(self.engine.optimizer().paging()).filter(|paging| *paging != resting(paging)),
            loss_scaling: output.loss_scaling,
            preference: output.preference,
            slowest_rank: self.slowest_rank,
            elapsed_seconds: self.elapsed_seconds(),
        })
    }

    /// Logs a step; evaluates and saves where it is time to. Returns how the run ends, if it ends here.
    fn after_step(&mut self, metrics: &StepMetrics) -> Result<Option<Outcome>, TrainError> {
        if let Err(error) = self.metrics.step(metrics) {
            self.save_steps_so_far();
            return Err(error);
        }
        self.events.on_step(metrics);
        warn_of(self.trackers.step(metrics), self.events);
        let last = self.step == self.total_steps;
        let (eval_every, save_every) = (self.config.train.eval_every, self.config.train.save_every);
        let evaluated = last || every(eval_every, self.step);
        let is_best = evaluated && self.evaluate()?;
        let early = if last { None } else { self.stopped_early() };
        let stop = !last && early.is_none() && self.stop_is_agreed()?;
        if last || early.is_some() || stop || is_best || every(save_every, self.step) {
            self.save()?;
        }
        Ok(if stop { Some(Outcome::Interrupted) } else { early })
    }

    /// Whether this process writes what the run leaves.
    fn is_first(&self) -> bool {
        self.folder.is_some()
    }

    /// Whether the events of any rank ask to stop. With that the ranks tell what their parts of the step took.
    fn stop_is_agreed(&mut self) -> Result<bool, TrainError> {
        let stop = self.events.should_stop();
        let Some(ranks) = &self.ranks else { return Ok(stop) };
        let (stop, seconds) = together::after_step(ranks, stop, self.own_seconds)?;
        self.slowest_rank = SlowestRank::of(&seconds);
        Ok(stop)
    }

    /// Whether evaluations stopped improving for as long as the configuration allows.
    fn stopped_early(&self) -> Option<Outcome> {
        let patience = self.config.train.early_stopping_patience;
        (patience > 0 && self.evaluations.since_best >= patience).then_some(Outcome::StoppedEarly)
    }

    /// Seconds since the run was first started, pauses between stop and resume left out.
    fn elapsed_seconds(&self) -> f64 {
        self.metrics.elapsed_before() + self.started.elapsed().as_secs_f64()
    }

    /// Renews the picture of the run so far. A picture that can't be drawn or written ends no run: the report's says why.
    fn draw_curves(&self) {
        let history = self.metrics.history();
        if self.is_first()
            && !history.steps.is_empty()
            && let Err(error) = report::write_curves(&self.config.train.output_dir, history)
        {
            tracing::warn!("{error}");
        }
    }

    /// Evaluates, and returns whether the result is one to keep a checkpoint for.
    fn evaluate(&mut self) -> Result<bool, TrainError> {
        let Rows { eval, eval_order, .. } = &*self.rows;
        if eval.examples.is_empty() {
            return Ok(false);
        }
        let _span = tracing::trace_span!("evaluate").entered();
        let started = Instant::now();
        let events = &mut *self.events;
        events.on_eval_start(self.step);
        let count = self.ranks.as_ref().map_or(1, Ranks::count);
        let batches = eval_order.batches_per_epoch().div_ceil(count);
        let known = self.known.as_ref().map(|known| &known.eval[..]);
        let of_rows = eval_order.epoch(&eval.examples, 0).map(|mut batch| {
            if let Some(known) = known {
                bring(known, &mut batch);
            }
            batch
        });
        let evaluation = self.engine.evaluate_telling(of_rows, &mut |done| {
            events.on_eval_progress(EvalPart::Batches, done, batches);
        })?;
        let (model, sharers) = (self.engine.model(), self.engine.sharers());
        let answers = match (&self.asked, sharers) {
            (Some(asked), _) => asked.answers(model, sharers, &mut |done, all| {
                events.on_eval_progress(EvalPart::Answers, done, all);
            })?,
            (None, Some(sharers)) if !self.config.eval.prompts.is_empty() => {
                answers::attend(model, sharers)?;
                Vec::new()
            }
            (None, _) => Vec::new(),
        };
        let metrics = EvalMetrics {
            step: self.step,
            eval_loss: evaluation.loss,
            eval_accuracy: evaluation.accuracy,
            eval_perplexity: Some(evaluation.loss.exp())
                .filter(|perplexity| perplexity.is_finite() && evaluation.preference.is_none()),
            preference: evaluation.preference,
            eval_tokens: evaluation.tokens as u64,
            answers,
            eval_seconds: started.elapsed().as_secs_f64(),
            elapsed_seconds: self.elapsed_seconds(),
        };
        self.metrics.eval(&metrics)?;
        self.events.on_eval(&metrics);
        warn_of(self.trackers.eval(&metrics), self.events);
        self.draw_curves();
        let options = &self.config.train;
        let value = options.keep_best.value(&metrics);
        let (kept, counted) =
            self.evaluations.next(self.step, value, options.keep_best, options.early_stopping_threshold);
        self.evaluations = counted;
        Ok(kept && options.keep_best.is_on() && self.step > 0)
    }
}

fn parameter_names(model: &Decoder) -> Vec<String> {
    model.parameters().into_iter().map(|(name, _)| name).collect()
}

/// What the pager of an optimizer reports whose state never left the device.
fn resting(paging: &Paging) -> Paging {
    Paging { evicted: 0, bytes_in: 0, bytes_out: 0, ..*paging }
}

/// Whether `step` is a multiple of `interval`; an interval of 0 means never.
fn every(interval: usize, step: usize) -> bool {
    interval > 0 && step.is_multiple_of(interval)
}

fn warn_of(messages: Vec<String>, events: &mut dyn TrainEvents) {
    messages.iter().for_each(|message| events.on_warning(message));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn what_was_done_before_a_failed_step_can_be_resumed() {
        let dir = tempfile::tempdir().unwrap();
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
        let mut config = TrainConfig { device: "cpu".into(), ..Default::default() };
        config.model.path = root.join("testdata/reference/tiny-llama").display().to_string();
        config.data.train = root.join("examples/quickstart/word_problems.jsonl").into();
        config.data.max_length = 96;
        config.train.batch_size = 1;
        config.train.gradient_accumulation_steps = 2;
        config.train.output_dir = dir.path().into();
        let mut silent = ();
        let mut trainer = Trainer::new(config.clone(), Resume::No, &mut silent).unwrap();
        let rows = Arc::clone(&trainer.rows);
        let mut batches = rows.order.batches_from(&rows.train.examples, trainer.position);
        trainer.step(&mut batches).unwrap();
        let next = batches.clone().next();
        // The second step takes its micro-batches, and fails.
        batches.next_step(2);
        trainer.save_steps_so_far();
        drop(trainer);
        let mut silent = ();
        let resumed = Trainer::new(config, Resume::Auto, &mut silent).unwrap();
        assert_eq!((resumed.step, resumed.position), (1, Position { epoch: 0, batch: 2 }));
        assert_eq!(resumed.rows.order.batches_from(&resumed.rows.train.examples, resumed.position).next(), next);
    }
}
