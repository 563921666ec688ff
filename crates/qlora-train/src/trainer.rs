//! A whole run: load, train, evaluate, save, resume, report.

mod first_step;
mod rows;
mod saving;
mod start;

use crate::checkpoint::{self, Basis, Evaluations};
use crate::checkpointing::{Policies, Room};
use crate::config::{ComputeDtype, RunConfig, TrainConfig};
use crate::engine::Engine;
use crate::error::TrainError;
use crate::events::TrainEvents;
use crate::loss_scale::LossScaler;
use crate::metrics::{EvalMetrics, METRICS_FILE, MetricsWriter, RunInfo, StepMetrics};
use crate::plan::Plan;
use crate::prompts::Prompts;
use crate::report::{Outcome, Summary, device_name};
use crate::resize::{Resized, resize};
use crate::run_folder::{ADAPTER_DIR, RunFolder};
use adapter_io::checksum;
use burn::tensor::{Device, FloatDType};
use chat_text::Tokenizer;
use model_hub::Hub;
use paged_optim::{OptimizerConfig, Paging};
use qlora_data::{Batches, Position};
use qlora_layers::mix;
use qlora_models::{
    Decoder, LoadOptions, ModelConfig, check_compute_dtype, default_compute_dtype, device_memory, peak_memory,
    select_device,
};
use rows::Rows;
use start::Resumed;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

pub use rows::load_rows;
pub use start::{Resume, Start};

/// A run that is ready to go.
pub struct Trainer<'e> {
    config: TrainConfig,
    engine: Engine,
    rows: Arc<Rows>,
    metrics: MetricsWriter,
    events: &'e mut dyn TrainEvents,
    /// What the run stands on, for its checkpoints.
    basis: Basis,
    prompts: Prompts,
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
    /// Held to the end; the last field, so that everything else is closed before the folder is given back.
    folder: RunFolder,
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
    Ok(engine.with_loss_scaler(loss_scaler))
}

impl<'e> Trainer<'e> {
    /// Checks the configuration, takes the output folder, reads the data, loads the model and puts the adapters in place.
    /// `events` is told of this and of all that follows.
    ///
    /// # Errors
    /// [`TrainError`], before anything in the output folder is changed: bad configuration, data or model, a checkpoint that can't be
    /// resumed, a folder that holds another run or in which one is under way; [`TrainError::Stopped`] when the events ask to stop.
    pub fn new(
        config: TrainConfig,
        start: impl Into<Start>,
        events: &'e mut dyn TrainEvents,
    ) -> Result<Self, TrainError> {
        let start = start.into();
        config.validate()?;
        let folder = RunFolder::take(&config.train.output_dir)?;
        if folder.is_unprotected() {
            let path = folder.path().display();
            events.on_warning(&format!("{path}: its file system has no locks: nothing keeps a second run out of it"));
        }
        let resumed = Resumed::find(&folder, &start)?;
        if let Some(Resumed { checkpoint, .. }) = &resumed {
            let changes = checkpoint.config_changes(&config)?;
            warn_of(checkpoint.judge(changes, start.accept_changes)?, events);
        }
        let device = select_device(&config.device)?;
        let dtype = compute_dtype(config.quantization.compute_dtype, &device)?;
        if dtype == FloatDType::F16 && !config.train.loss_scale.is_on(dtype) {
            events.on_warning(
                "train.loss_scale = \"off\" in f16: gradients below 6e-8 become 0; \"auto\" scales the loss against that",
            );
        }
        let hub = Hub { progress: events.download_progress(), ..Hub::from_env() };
        let model_dir = hub.resolve(&config.model.path, config.model.revision.as_deref())?;
        let tokenizer = Tokenizer::from_dir(&model_dir)?;
        let Resized { config: resized, model: shape, notice } =
            resize(&config, ModelConfig::from_dir(&model_dir)?, &tokenizer)?;
        notice.iter().for_each(|notice| events.on_notice(notice));
        let rows = Rows::load(&config, &tokenizer, &shape, events)?;
        let total_steps = config.train.total_steps(rows.train.examples.len());
        warn_of(config.train.warnings(total_steps), events);
        let prompts = rows.prompts(&config, &tokenizer)?;
        let basis = rows.basis(checksum::fingerprint(&model_dir)?, prompts.template());
        if let Some(Resumed { checkpoint, .. }) = &resumed {
            let changes = checkpoint.basis_changes(&basis, &config);
            warn_of(checkpoint.judge(changes, start.accept_changes)?, events);
            checkpoint.check_trained_tokens(&resized.lora)?;
        }

        let room = Room::of(&device, config.train.memory_budget);
        let Plan { policies, lighter, .. } = Plan::new(&config, &shape, dtype, &room, &rows.train.examples)?;
        tracing::info!(kept = %policies, "what blocks keep for the backward pass");
        let options = LoadOptions { quantization: config.quantization.quant_config(), dtype };
        let mut model = Decoder::load(&model_dir, options, &device, &mut |progress| events.on_load(progress))?;
        model.resize_embeddings(shape.vocab_size)?;
        let lora = &resized.lora;
        match &resumed {
            Some(Resumed { checkpoint, .. }) => {
                model.resume_lora(lora, config.train.seed, &checkpoint.adapter)?;
            }
            None => {
                model.attach_lora_to(lora, config.train.seed, &rows.calibration(&config))?;
            }
        }
        let mut engine = engine(model, &config.train, policies)?.with_lighter(lighter);
        if let Some(Resumed { checkpoint, .. }) = &resumed {
            let moments = checkpoint.moments(&parameter_names(engine.model()), config.train.optimizer)?;
            checkpoint.state.loss_scaler.into_iter().for_each(|state| engine.loss_scaler_mut().restore(state));
            engine
                .optimizer_mut()
                .restore(checkpoint.state.updates(), &moments)
                .map_err(|source| TrainError::Optimizer { path: checkpoint.path.clone(), source })?;
        }
        if events.should_stop() {
            return Err(TrainError::Stopped);
        }

        // From here on the folder is this run's.
        let log = folder.path().join(METRICS_FILE);
        let (metrics, step, position, evaluations) = match &resumed {
            Some(Resumed { checkpoint, same_run }) => {
                let state = &checkpoint.state;
                if !same_run {
                    folder.clear()?;
                    let before = checkpoint.path.parent().map(|run| run.join(METRICS_FILE));
                    MetricsWriter::copy(before.as_deref(), &log)?;
                } else if state.step < total_steps {
                    warn_of(folder.go_on_after(state.step)?, events);
                }
                (MetricsWriter::resume(&log, state.step)?, state.step, state.batch_position(), state.evaluations)
            }
            None => {
                folder.clear()?;
                (MetricsWriter::create(&log)?, 0, Position::default(), Evaluations::default())
            }
        };
        Ok(Self {
            config,
            engine,
            rows: Arc::new(rows),
            metrics,
            events,
            basis,
            prompts,
            evaluations,
            total_steps,
            step,
            start_step: step,
            position,
            saved: resumed.filter(|resumed| resumed.same_run).map(|resumed| resumed.checkpoint.path),
            dtype,
            peak_memory: 0,
            started: Instant::now(),
            folder,
        })
    }

    /// The model in training.
    pub fn model(&self) -> &Decoder {
        self.engine.model()
    }

    /// Trains to the end, until early stopping ends the run, or until the events ask to stop; then writes the adapter and the report.
    ///
    /// # Errors
    /// The device fails, training diverges, or a file can't be written. Earlier checkpoints stay readable.
    pub fn run(mut self) -> Result<Summary, TrainError> {
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
            outcome = self.after_step(&metrics)?;
        }
        self.finish(info, outcome.unwrap_or(Outcome::Finished))
    }

    /// One optimizer step over the next micro-batches.
    fn step(&mut self, batches: &mut Batches<'_>) -> Result<StepMetrics, TrainError> {
        let started = Instant::now();
        let options = &self.config.train;
        let micro_batches =
            tracing::trace_span!("data").in_scope(|| batches.next_step(options.gradient_accumulation_steps));
        let tokens: u64 = micro_batches.iter().flat_map(|batch| &batch.lengths).map(|&len| len as u64).sum();
        let learning_rate = options.learning_rate_at(self.step, self.total_steps);
        let seed = mix(options.seed ^ mix(self.step as u64));
        let output = match self.engine.step(&micro_batches, learning_rate, seed) {
            Ok(output) => output,
            Err(error @ (TrainError::NotFinite { .. } | TrainError::LossScale { .. })) => {
                return Err(self.spoilt()?.unwrap_or(error));
            }
            Err(error) => {
                if matches!(error, TrainError::OutOfMemory { .. }) {
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
        Ok(StepMetrics {
            step: self.step,
            epoch: self.position.epoch as f64 + epoch_part,
            loss: output.loss,
            learning_rate,
            grad_norm: output.grad_norm,
            tokens,
            tokens_per_second: tokens as f64 / started.elapsed().as_secs_f64(),
            memory_bytes: self.peak_memory,
            memory_in_use_bytes: in_use,
            memory_reserved_bytes: reserved,
            paging: Some(self.engine.optimizer().paging()).filter(|paging| *paging != resting(paging)),
            loss_scaling: output.loss_scaling,
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
        let last = self.step == self.total_steps;
        let (eval_every, save_every) = (self.config.train.eval_every, self.config.train.save_every);
        let evaluated = last || every(eval_every, self.step);
        let is_best = evaluated && self.evaluate()?;
        let early = if last { None } else { self.stopped_early() };
        let stop = !last && early.is_none() && self.events.should_stop();
        if last || early.is_some() || stop || is_best || every(save_every, self.step) {
            self.save()?;
        }
        Ok(if stop { Some(Outcome::Interrupted) } else { early })
    }

    /// Whether evaluations stopped improving for as long as the configuration allows.
    fn stopped_early(&self) -> Option<Outcome> {
        let patience = self.config.train.early_stopping_patience;
        (patience > 0 && self.evaluations.since_best >= patience).then_some(Outcome::StoppedEarly)
    }

    /// Writes the adapter, unless the run was interrupted, and the report.
    fn finish(mut self, info: RunInfo, outcome: Outcome) -> Result<Summary, TrainError> {
        let output_dir = self.folder.path().to_owned();
        let (adapter, adapter_step) = match outcome {
            Outcome::Finished | Outcome::StoppedEarly => {
                let dir = output_dir.join(ADAPTER_DIR);
                let (adapter, step) = self.final_adapter()?;
                adapter_io::atomic::replace_dir(&dir, |tmp| -> Result<(), TrainError> {
                    adapter.save(tmp)?;
                    self.prompts.save(tmp)
                })?;
                (dir, step)
            }
            Outcome::Interrupted => (self.saved.clone().unwrap_or_else(|| output_dir.clone()), self.step),
        };
        self.metrics.sync()?;
        // What could not be removed before may go now; of what still can't, the user has been told.
        checkpoint::prune(&output_dir, self.config.train.save_limit, self.best_step())?;
        let history = self.metrics.history();
        let mut summary = Summary::new(info, history, outcome, adapter);
        summary.adapter_step = adapter_step;
        // Saving takes memory too.
        let peak = peak_memory(self.engine.model().device()).unwrap_or(0);
        summary.peak_memory_bytes = summary.peak_memory_bytes.max(peak);
        if let Some(warning) = summary.nothing_learned(history, self.engine.model().config().vocab_size) {
            self.events.on_warning(&warning);
        }
        summary.write(&output_dir, history)?;
        self.events.on_end(&summary);
        Ok(summary)
    }

    /// Seconds since the run was first started, pauses between stop and resume left out.
    fn elapsed_seconds(&self) -> f64 {
        self.metrics.elapsed_before() + self.started.elapsed().as_secs_f64()
    }

    /// Evaluates, and returns whether the result is one to keep a checkpoint for.
    fn evaluate(&mut self) -> Result<bool, TrainError> {
        let Rows { eval, eval_order, .. } = &*self.rows;
        if eval.examples.is_empty() {
            return Ok(false);
        }
        let _span = tracing::trace_span!("evaluate").entered();
        let started = Instant::now();
        let evaluation = self.engine.evaluate(eval_order.epoch(&eval.examples, 0))?;
        let metrics = EvalMetrics {
            step: self.step,
            eval_loss: evaluation.loss,
            eval_accuracy: Some(evaluation.accuracy),
            eval_tokens: evaluation.tokens as u64,
            eval_seconds: started.elapsed().as_secs_f64(),
            elapsed_seconds: self.elapsed_seconds(),
        };
        self.metrics.eval(&metrics)?;
        self.events.on_eval(&metrics);
        let options = &self.config.train;
        let value = options.keep_best.value(&metrics);
        let (kept, counted) =
            self.evaluations.next(self.step, value, options.keep_best, options.early_stopping_threshold);
        self.evaluations = counted;
        Ok(kept && options.keep_best.is_on() && self.step > 0)
    }

    fn info(&self) -> RunInfo {
        let model = self.engine.model();
        let options = &self.config.train;
        let report = &self.rows.train.report;
        RunInfo {
            model: self.config.model.path.clone(),
            device: device_name(model.device()),
            compute_dtype: format!("{:?}", self.dtype).to_lowercase(),
            quantization: self.config.quantization.describe(),
            base_parameters: model.num_params() as u64,
            trainable_parameters: model.num_trainable() as u64,
            adapted_modules: model.adapted_modules().len(),
            rank: self.config.lora.rank,
            train_data: self.config.data.train.clone(),
            train_rows: report.rows,
            train_tokens: report.tokens,
            eval_rows: self.rows.eval.examples.len(),
            total_steps: self.total_steps,
            start_step: self.start_step,
            rows_per_step: options.batch_size * options.gradient_accumulation_steps,
            activation_checkpointing: self.engine.policies().to_string(),
            output_dir: options.output_dir.clone(),
        }
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
        config.data.train = root.join("examples/quickstart/word_problems.jsonl");
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
