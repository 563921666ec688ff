//! A whole run: load, train, evaluate, save, resume, report.

mod rows;

use crate::checkpoint::{self, TrainingCheckpoint, TrainingState};
use crate::config::{ComputeDtype, RunConfig, TrainConfig};
use crate::engine::Engine;
use crate::error::TrainError;
use crate::events::TrainEvents;
use crate::metrics::{EvalMetrics, METRICS_FILE, MetricsWriter, RunInfo, StepMetrics};
use crate::report::{Outcome, Summary, device_name};
use adapter_io::FormatError;
use burn::tensor::{Device, FloatDType};
use chat_text::Tokenizer;
use model_hub::Hub;
use paged_optim::{OptimizerConfig, Paging};
use qlora_data::{Batches, Position};
use qlora_layers::mix;
use qlora_models::{Decoder, LoadOptions, default_compute_dtype, device_memory, select_device};
use rows::Rows;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// Folder of the finished adapter in a run's output folder.
const ADAPTER_DIR: &str = "adapter";

/// Where a run starts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Resume {
    /// At the beginning.
    #[default]
    No,
    /// At the newest checkpoint of the output folder, or at the beginning when there is none.
    Auto,
    /// At this checkpoint.
    From(PathBuf),
}

/// A run that is ready to go.
pub struct Trainer<'e> {
    config: TrainConfig,
    engine: Engine,
    rows: Arc<Rows>,
    metrics: MetricsWriter,
    events: &'e mut dyn TrainEvents,
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
pub fn compute_dtype(choice: ComputeDtype, device: &Device) -> FloatDType {
    match choice {
        ComputeDtype::Auto => default_compute_dtype(device),
        ComputeDtype::F32 => FloatDType::F32,
        ComputeDtype::Bf16 => FloatDType::BF16,
        ComputeDtype::F16 => FloatDType::F16,
    }
}

/// The engine that a configuration asks for, on a model whose adapters are in place.
///
/// # Errors
/// [`TrainError::NothingToTrain`] when it has no adapter.
pub fn engine(model: Decoder, options: &RunConfig) -> Result<Engine, TrainError> {
    let optimizer = OptimizerConfig {
        kind: options.optimizer,
        betas: (options.betas[0], options.betas[1]),
        eps: options.eps,
        weight_decay: options.weight_decay,
        ..Default::default()
    };
    let max_grad_norm = options.max_grad_norm as f32;
    Engine::new(model, optimizer, options.optimizer_budget, max_grad_norm, options.activation_checkpointing)
}

impl<'e> Trainer<'e> {
    /// Checks the configuration, reads the data, loads the model and puts the adapters in place. `events` is told of
    /// this and of all that follows.
    ///
    /// # Errors
    /// [`TrainError`], before anything is written: bad configuration, data or model, or a checkpoint that
    /// can't be resumed. An output folder that holds another run is refused unless it is resumed.
    pub fn new(config: TrainConfig, resume: &Resume, events: &'e mut dyn TrainEvents) -> Result<Self, TrainError> {
        config.validate()?;
        let output_dir = config.train.output_dir.clone();
        let resumed = find_checkpoint(&output_dir, resume)?;
        if let Some(checkpoint) = &resumed {
            checkpoint.check_config(&config)?;
        }
        let device = select_device(&config.device)?;
        let dtype = compute_dtype(config.quantization.compute_dtype, &device);
        let hub = Hub { progress: events.download_progress(), ..Hub::from_env() };
        let model_dir = hub.resolve(&config.model.path, config.model.revision.as_deref())?;
        let tokenizer = Tokenizer::from_dir(&model_dir)?;
        let rows = Rows::load(&config, &tokenizer)?;
        for warning in rows.train.report.warnings() {
            events.on_warning(&warning);
        }

        let options = LoadOptions { quantization: config.quantization.quant_config(), dtype };
        let mut model = Decoder::load(&model_dir, options, &device, &mut |progress| events.on_load(progress))?;
        match &resumed {
            Some(checkpoint) => model.resume_lora(&config.lora, config.train.seed, &checkpoint.adapter)?,
            None => {
                model.attach_lora_to(&config.lora, config.train.seed, &rows.calibration(&config))?;
            }
        }
        let parameters = parameter_names(&model);
        let mut engine = engine(model, &config.train)?;

        let metrics_path = output_dir.join(METRICS_FILE);
        let (metrics, step, position) = match resumed {
            Some(checkpoint) => {
                rows.check(&checkpoint)?;
                let state = &checkpoint.state;
                let moments = checkpoint.moments(&parameters, config.train.optimizer)?;
                engine
                    .optimizer_mut()
                    .restore(state.step as u64, &moments)
                    .map_err(|source| TrainError::Optimizer { path: checkpoint.path.clone(), source })?;
                (MetricsWriter::resume(&metrics_path, state.step)?, state.step, state.batch_position())
            }
            None => {
                refuse_other_run(&output_dir)?;
                std::fs::create_dir_all(&output_dir)
                    .map_err(|source| FormatError::Write { path: output_dir.clone(), source })?;
                (MetricsWriter::create(&metrics_path)?, 0, Position::default())
            }
        };
        Ok(Self {
            total_steps: config.train.total_steps(rows.train.examples.len()),
            config,
            engine,
            rows: Arc::new(rows),
            metrics,
            events,
            step,
            start_step: step,
            position,
            saved: None,
            dtype,
            peak_memory: 0,
            started: Instant::now(),
        })
    }

    /// The model in training.
    pub fn model(&self) -> &Decoder {
        self.engine.model()
    }

    /// Trains to the end, or until the events ask to stop; then writes the adapter and the report.
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
        let mut outcome = Outcome::Finished;
        while self.step < self.total_steps && outcome == Outcome::Finished {
            let metrics = self.step(&mut batches)?;
            outcome = self.after_step(&metrics)?;
        }
        self.finish(info, outcome)
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
            Err(error) => {
                if matches!(error, TrainError::OutOfMemory { .. }) {
                    self.save_steps_so_far();
                }
                return Err(error);
            }
        };
        self.step += 1;
        self.position = batches.next_position();
        let (in_use, reserved) = device_memory(self.engine.model().device()).unwrap_or_default();
        self.peak_memory = self.peak_memory.max(reserved);
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
            elapsed_seconds: self.elapsed_seconds(),
        })
    }

    /// Logs a step; evaluates and saves where it is time to. Returns whether the run was asked to stop here.
    fn after_step(&mut self, metrics: &StepMetrics) -> Result<Outcome, TrainError> {
        self.metrics.step(metrics)?;
        self.events.on_step(metrics);
        let last = self.step == self.total_steps;
        let (eval_every, save_every) = (self.config.train.eval_every, self.config.train.save_every);
        if last || every(eval_every, self.step) {
            self.evaluate()?;
        }
        let stop = !last && self.events.should_stop();
        if last || stop || every(save_every, self.step) {
            self.save()?;
        }
        Ok(if stop { Outcome::Interrupted } else { Outcome::Finished })
    }

    /// Writes the adapter, unless the run was interrupted, and the report.
    fn finish(mut self, info: RunInfo, outcome: Outcome) -> Result<Summary, TrainError> {
        let output_dir = &self.config.train.output_dir;
        let adapter = match outcome {
            Outcome::Finished => {
                let dir = output_dir.join(ADAPTER_DIR);
                let adapter = self.export()?;
                adapter_io::atomic::replace_dir(&dir, |tmp| adapter.save(tmp))?;
                dir
            }
            Outcome::Interrupted => self.saved.clone().unwrap_or_else(|| output_dir.clone()),
        };
        self.metrics.sync()?;
        let summary = Summary::new(info, self.metrics.history(), outcome, adapter);
        summary.write(output_dir, self.metrics.history())?;
        self.events.on_end(&summary);
        Ok(summary)
    }

    /// Seconds since the run was first started, pauses between stop and resume left out.
    fn elapsed_seconds(&self) -> f64 {
        self.metrics.elapsed_before() + self.started.elapsed().as_secs_f64()
    }

    fn evaluate(&mut self) -> Result<(), TrainError> {
        let Rows { eval, eval_order, .. } = &*self.rows;
        if eval.examples.is_empty() {
            return Ok(());
        }
        let _span = tracing::trace_span!("evaluate").entered();
        let elapsed_seconds = self.elapsed_seconds();
        let (eval_loss, tokens) = self.engine.evaluate(eval_order.epoch(&eval.examples, 0))?;
        let metrics = EvalMetrics { step: self.step, eval_loss, eval_tokens: tokens as u64, elapsed_seconds };
        self.metrics.eval(&metrics)?;
        self.events.on_eval(&metrics);
        Ok(())
    }

    fn export(&self) -> Result<adapter_io::Adapter, TrainError> {
        let model = &self.config.model;
        Ok(self.engine.model().export_adapter(&model.path, model.revision.as_deref())?)
    }

    fn save(&mut self) -> Result<(), TrainError> {
        let _span = tracing::trace_span!("save").entered();
        // The log must not lag behind the checkpoint: a resumed run cuts it at the checkpoint's step.
        self.metrics.sync()?;
        let options = &self.config.train;
        let report = &self.rows.train.report;
        let state = TrainingState::new(&self.config, self.step, self.position, report.rows, report.tokens)?;
        let parameters = parameter_names(self.engine.model());
        let adapter = self.export()?;
        let moments = self.engine.optimizer_mut().state()?;
        let moments = (options.optimizer, moments.as_slice());
        let path = checkpoint::save(&options.output_dir, &state, &adapter, &parameters, moments, options.save_limit)?;
        self.events.on_save(&path);
        self.saved = Some(path);
        Ok(())
    }

    /// Saves what the steps before a failed one led to, unless a checkpoint has it already.
    fn save_steps_so_far(&mut self) {
        if self.step == self.start_step || every(self.config.train.save_every, self.step) {
            return;
        }
        if let Err(error) = self.save() {
            self.events.on_warning(&format!("the {} steps so far could not be saved: {error}", self.step));
        }
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

fn find_checkpoint(output_dir: &Path, resume: &Resume) -> Result<Option<TrainingCheckpoint>, TrainError> {
    match resume {
        Resume::No => Ok(None),
        Resume::From(path) => checkpoint::load(path).map(Some),
        Resume::Auto => match checkpoint::list(output_dir)?.last() {
            Some((_, path)) => checkpoint::load(path).map(Some),
            None => Ok(None),
        },
    }
}

/// A fresh run must not mix its files with those of a run that could still be resumed.
fn refuse_other_run(output_dir: &Path) -> Result<(), TrainError> {
    match checkpoint::list(output_dir)?.last() {
        Some((step, path)) => Err(TrainError::Checkpoint {
            path: path.clone(),
            problem: format!(
                "the output folder already holds a run, at step {step}: resume it, remove it, or choose another train.output_dir"
            ),
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let mut trainer = Trainer::new(config.clone(), &Resume::No, &mut silent).unwrap();
        let rows = Arc::clone(&trainer.rows);
        let mut batches = rows.order.batches_from(&rows.train.examples, trainer.position);
        trainer.step(&mut batches).unwrap();
        let next = batches.clone().next();
        // The second step takes its micro-batches, and fails.
        batches.next_step(2);
        trainer.save_steps_so_far();
        let mut silent = ();
        let resumed = Trainer::new(config, &Resume::Auto, &mut silent).unwrap();
        assert_eq!((resumed.step, resumed.position), (1, Position { epoch: 0, batch: 2 }));
        assert_eq!(resumed.rows.order.batches_from(&resumed.rows.train.examples, resumed.position).next(), next);
    }
}
