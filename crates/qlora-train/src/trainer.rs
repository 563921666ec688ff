//! A whole run: load, train, evaluate, save, resume, report.

use crate::checkpoint::{self, Checkpoint, TrainingState};
use crate::config::{ComputeDtype, TrainConfig, TrainOptions};
use crate::data::{self, Batch, BatchOrder, Dataset, MASKED_LABEL};
use crate::engine::Engine;
use crate::error::TrainError;
use crate::metrics::{EvalMetrics, METRICS_FILE, MetricsWriter, RunInfo, StepMetrics, TrainEvents};
use crate::report::{Outcome, Summary, device_name};
use adapter_io::FormatError;
use burn::tensor::{Device, FloatDType};
use paged_optim::{OptimizerConfig, Paging};
use qlora_layers::{Initialization, mix};
use qlora_models::tokenizer::Tokenizer;
use qlora_models::{CalibrationBatch, Decoder, LoadOptions, default_compute_dtype, device_memory, hub, select_device};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Folder of the finished adapter in a run's output folder.
pub const ADAPTER_DIR: &str = "adapter";

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
#[derive(Debug)]
pub struct Trainer {
    config: TrainConfig,
    engine: Engine,
    train: Dataset,
    eval: Vec<Batch>,
    eval_rows: usize,
    order: BatchOrder,
    metrics: MetricsWriter,
    /// Optimizer steps done.
    step: usize,
    /// Pass over the rows and micro-batches of it that are done.
    cursor: (usize, usize),
    dtype: FloatDType,
    peak_memory: u64,
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
pub fn engine(model: Decoder, options: &TrainOptions) -> Result<Engine, TrainError> {
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

impl Trainer {
    /// Checks the configuration, reads the data, loads the model and puts the adapters in place.
    ///
    /// # Errors
    /// [`TrainError`], before anything is written: bad configuration, data or model, or a checkpoint that
    /// can't be resumed. An output folder that holds another run is refused unless it is resumed.
    pub fn new(config: TrainConfig, resume: &Resume, events: &mut dyn TrainEvents) -> Result<Self, TrainError> {
        config.validate()?;
        let output_dir = config.train.output_dir.clone();
        let resumed = find_checkpoint(&output_dir, resume)?;
        if let Some(checkpoint) = &resumed {
            checkpoint.check_config(&config)?;
        }
        let device = select_device(&config.device)?;
        let dtype = compute_dtype(config.quantization.compute_dtype, &device);
        let model_dir = hub::resolve(&config.model.path, config.model.revision.as_deref())?;
        let tokenizer = Tokenizer::from_dir(&model_dir)?;
        let (train, eval) = data::load_splits(&config.data, &tokenizer, config.train.seed)?;
        for warning in train.report.warnings() {
            events.on_warning(&warning);
        }

        let options = LoadOptions { quantization: config.quantization.quant_config(), dtype };
        let mut model = Decoder::load(&model_dir, options, &device, &mut |progress| events.on_load(progress))?;
        let pad_id = tokenizer.padding_id();
        let order = BatchOrder::new(&train.examples, &config.data, config.train.batch_size, config.train.seed, pad_id);
        match &resumed {
            Some(checkpoint) => model.resume_lora(&config.lora, config.train.seed, &checkpoint.adapter)?,
            None => {
                let batches = calibration(&config, &order, &train);
                model.attach_lora_to(&config.lora, config.train.seed, &batches)?;
            }
        }
        let parameters = parameter_names(&model);
        let mut engine = engine(model, &config.train)?;

        let eval_batches =
            BatchOrder::in_file_order(&eval.examples, config.train.batch_size, pad_id).epoch(&eval.examples, 0);
        let (mut step, mut cursor) = (0, (0, 0));
        let metrics_path = output_dir.join(METRICS_FILE);
        let metrics = match resumed {
            Some(checkpoint) => {
                let state = &checkpoint.state;
                let tokens = count_tokens(&train);
                if (state.train_rows, state.train_tokens) != (train.examples.len(), tokens) {
                    return Err(TrainError::Checkpoint {
                        path: checkpoint.path,
                        problem: format!(
                            "was made with {} training rows of {} tokens, {} now holds {} rows of {tokens} tokens: restore the data, or start afresh",
                            state.train_rows,
                            state.train_tokens,
                            config.data.train.display(),
                            train.examples.len(),
                        ),
                    });
                }
                (step, cursor) = (state.step, (state.epoch, state.position));
                let moments = checkpoint.moments(&parameters, config.train.optimizer)?;
                engine
                    .optimizer_mut()
                    .restore(step as u64, &moments)
                    .map_err(|source| TrainError::Optimizer { path: checkpoint.path.clone(), source })?;
                MetricsWriter::resume(&metrics_path, step)?
            }
            None => {
                refuse_other_run(&output_dir)?;
                std::fs::create_dir_all(&output_dir)
                    .map_err(|source| FormatError::Write { path: output_dir.clone(), source })?;
                MetricsWriter::create(&metrics_path)?
            }
        };
        Ok(Self {
            config,
            engine,
            train,
            eval: eval_batches,
            eval_rows: eval.examples.len(),
            order,
            metrics,
            step,
            cursor,
            dtype,
            peak_memory: 0,
        })
    }

    /// Trains to the end, or until `events` asks to stop; then writes the adapter and the report.
    ///
    /// # Errors
    /// The device fails, training diverges, or a file can't be written. Checkpoints of before stay readable.
    pub fn run(mut self, events: &mut dyn TrainEvents) -> Result<Summary, TrainError> {
        let options = self.config.train.clone();
        let total_steps = options.total_steps(self.train.examples.len());
        let info = self.info(total_steps);
        events.on_start(&info);
        let started = Instant::now();
        let elapsed_before = self.metrics.elapsed_before();
        let elapsed = || elapsed_before + started.elapsed().as_secs_f64();
        let mut saved = None;
        let mut outcome = Outcome::Finished;
        let mut epoch_batches = self.order.epoch(&self.train.examples, self.cursor.0);
        if self.step == 0 {
            self.evaluate(elapsed(), events)?;
        }
        while self.step < total_steps {
            let (step_started, before) = (Instant::now(), self.cursor);
            let micro_batches = self.next_micro_batches(&mut epoch_batches, options.gradient_accumulation_steps);
            let tokens: u64 = micro_batches.iter().flat_map(|batch| &batch.lengths).map(|&len| len as u64).sum();
            let learning_rate = options.learning_rate_at(self.step, total_steps);
            let seed = mix(options.seed ^ mix(self.step as u64));
            let output = match self.engine.step(&micro_batches, learning_rate, seed) {
                Ok(output) => output,
                Err(error) => {
                    let unsaved = self.step > info.start_step && !every(options.save_every, self.step);
                    if unsaved && matches!(error, TrainError::OutOfMemory { .. }) {
                        self.save_before(before, events);
                    }
                    return Err(error);
                }
            };
            self.step += 1;
            let (in_use, reserved) = device_memory(self.engine.model().device()).unwrap_or_default();
            self.peak_memory = self.peak_memory.max(reserved);
            let metrics = StepMetrics {
                step: self.step,
                epoch: self.cursor.0 as f64 + self.cursor.1 as f64 / epoch_batches.len() as f64,
                loss: output.loss,
                learning_rate,
                grad_norm: output.grad_norm,
                tokens,
                tokens_per_second: tokens as f64 / step_started.elapsed().as_secs_f64(),
                memory_bytes: self.peak_memory,
                memory_in_use_bytes: in_use,
                memory_reserved_bytes: reserved,
                paging: Some(self.engine.optimizer().paging()).filter(|paging| *paging != resting(paging)),
                elapsed_seconds: elapsed(),
            };
            self.metrics.step(&metrics)?;
            let last = self.step == total_steps;
            events.on_step(&metrics);
            if last || every(options.eval_every, self.step) {
                self.evaluate(elapsed(), events)?;
            }
            let stop = !last && events.should_stop();
            if last || stop || every(options.save_every, self.step) {
                saved = Some(self.save(events)?);
            }
            if stop {
                outcome = Outcome::Interrupted;
                break;
            }
        }
        let adapter = match outcome {
            Outcome::Finished => {
                let dir = options.output_dir.join(ADAPTER_DIR);
                let adapter = self.export()?;
                adapter_io::atomic::replace_dir(&dir, |tmp| adapter.save(tmp))?;
                dir
            }
            Outcome::Interrupted => saved.unwrap_or_else(|| options.output_dir.clone()),
        };
        self.metrics.sync()?;
        let summary = Summary::new(info, self.metrics.history(), outcome, adapter);
        summary.write(&options.output_dir, self.metrics.history())?;
        events.on_end(&summary);
        Ok(summary)
    }

    /// The model in training.
    pub fn model(&self) -> &Decoder {
        self.engine.model()
    }

    /// The next `count` micro-batches; a step never reaches over the end of a pass.
    fn next_micro_batches(&mut self, epoch_batches: &mut Vec<Batch>, count: usize) -> Vec<Batch> {
        let _span = tracing::trace_span!("data").entered();
        if self.cursor.1 >= epoch_batches.len() {
            self.cursor = (self.cursor.0 + 1, 0);
            *epoch_batches = self.order.epoch(&self.train.examples, self.cursor.0);
        }
        let end = (self.cursor.1 + count).min(epoch_batches.len());
        let batches = epoch_batches[self.cursor.1..end].to_vec();
        self.cursor.1 = end;
        batches
    }

    fn evaluate(&mut self, elapsed_seconds: f64, events: &mut dyn TrainEvents) -> Result<(), TrainError> {
        if self.eval.is_empty() {
            return Ok(());
        }
        let _span = tracing::trace_span!("evaluate").entered();
        let (eval_loss, tokens) = self.engine.evaluate(&self.eval)?;
        let metrics = EvalMetrics { step: self.step, eval_loss, eval_tokens: tokens as u64, elapsed_seconds };
        self.metrics.eval(&metrics)?;
        events.on_eval(&metrics);
        Ok(())
    }

    fn export(&self) -> Result<adapter_io::Adapter, TrainError> {
        let model = &self.config.model;
        Ok(self.engine.model().export_adapter(&model.path, model.revision.as_deref())?)
    }

    fn save(&mut self, events: &mut dyn TrainEvents) -> Result<PathBuf, TrainError> {
        let _span = tracing::trace_span!("save").entered();
        // The log must not lag behind the checkpoint: a resumed run cuts it at the checkpoint's step.
        self.metrics.sync()?;
        let options = &self.config.train;
        let state = TrainingState::new(
            &self.config,
            self.step,
            self.cursor,
            self.train.examples.len(),
            count_tokens(&self.train),
        )?;
        let parameters = parameter_names(self.engine.model());
        let adapter = self.export()?;
        let moments = self.engine.optimizer_mut().state()?;
        let moments = (options.optimizer, moments.as_slice());
        let path = checkpoint::save(&options.output_dir, &state, &adapter, &parameters, moments, options.save_limit)?;
        events.on_save(&path);
        Ok(path)
    }

    /// Saves what the steps before a failed one led to; `cursor` is where that one began.
    fn save_before(&mut self, cursor: (usize, usize), events: &mut dyn TrainEvents) {
        self.cursor = cursor;
        if let Err(error) = self.save(events) {
            events.on_warning(&format!("the {} steps so far could not be saved: {error}", self.step));
        }
    }

    fn info(&self, total_steps: usize) -> RunInfo {
        let model = self.engine.model();
        let options = &self.config.train;
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
            train_rows: self.train.examples.len(),
            train_tokens: count_tokens(&self.train),
            eval_rows: self.eval_rows,
            total_steps,
            start_step: self.step,
            rows_per_step: options.batch_size * options.gradient_accumulation_steps,
            output_dir: options.output_dir.clone(),
        }
    }
}

fn parameter_names(model: &Decoder) -> Vec<String> {
    model.parameters().into_iter().map(|(name, _)| name).collect()
}

/// The first micro-batches of the run, for an initialisation that looks at activations. As in PEFT only tokens that
/// are learned count.
fn calibration(config: &TrainConfig, order: &BatchOrder, train: &Dataset) -> Vec<CalibrationBatch> {
    if config.lora.init != Initialization::Eva {
        return Vec::new();
    }
    let batches = order.epoch(&train.examples, 0).into_iter().take(config.lora.eva_batches);
    batches
        .map(|batch| CalibrationBatch {
            counted: batch.labels.iter().map(|label| *label != MASKED_LABEL).collect(),
            rows: batch.rows,
            ids: batch.input_ids,
        })
        .collect()
}

/// What the pager of an optimizer reports whose state never left the device.
fn resting(paging: &Paging) -> Paging {
    Paging { evicted: 0, bytes_in: 0, bytes_out: 0, ..*paging }
}

/// Whether `step` is a multiple of `interval`; an interval of 0 means never.
fn every(interval: usize, step: usize) -> bool {
    interval > 0 && step.is_multiple_of(interval)
}

fn count_tokens(dataset: &Dataset) -> u64 {
    dataset.examples.iter().map(|example| example.input_ids.len() as u64).sum()
}

fn find_checkpoint(output_dir: &Path, resume: &Resume) -> Result<Option<Checkpoint>, TrainError> {
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
        config.train.output_dir = dir.path().into();
        let mut trainer = Trainer::new(config.clone(), &Resume::No, &mut ()).unwrap();
        // The step after the third took two micro-batches, and failed.
        (trainer.step, trainer.cursor) = (3, (0, 8));
        trainer.save_before((0, 6), &mut ());
        let trainer = Trainer::new(config, &Resume::Auto, &mut ()).unwrap();
        assert_eq!((trainer.step, trainer.cursor), (3, (0, 6)));
    }
}
