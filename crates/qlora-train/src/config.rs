//! The training configuration: one TOML file with a section for each concern.
//!
//! A configuration is read in three steps, so that every mistake is reported where it was made:
//! [`TrainConfig::load`] parses the file and rejects unknown keys with their line and the nearest
//! known name, [`TrainConfig::set`] applies overrides such as `train.learning_rate = 1e-4`, and
//! [`TrainConfig::validate`] checks the ranges and names `section.key` and what is allowed.
//!
//! The key names are not listed a second time for the check: they are asked of the structs
//! themselves (see `keys`). [`TEMPLATE`] is a file that documents every key at its default; a test
//! parses it and compares it with [`TrainConfig::default`].
//!
//! Relative paths mean what they mean on the command line: they start at the current directory,
//! not at the folder of the configuration file. A file and a flag with the same text name the same
//! thing, and a hub id such as `org/name` is never mistaken for a path beside the file.

mod best;
mod distributed;
mod eval;
mod keys;
mod objective;
mod rates;
mod schedule;
mod serve;
#[cfg(test)]
mod tests;
mod validate;

use std::path::{Path, PathBuf};

use nf4_quant::{QuantConfig, QuantType};
use paged_optim::{Budget, OptimizerKind};
use qlora_layers::LoraConfig;
use qlora_models::{ConfigOptions, ModelConfig, ModelError};
use serde::{Deserialize, Serialize};

use crate::checkpointing::Checkpointing;
use crate::error::TrainError;
use crate::loss_scale::LossScale;
use crate::residency::Residency;
use crate::trackers::Tracker;
use qlora_data::DataConfig;

pub use best::{FinalAdapter, KeepBest};
pub use distributed::{DistributedConfig, Transport};
pub use eval::EvalConfig;
pub use keys::known_keys;
pub use objective::{Objective, PreferenceConfig, Reference, Term};
pub use rates::{ParameterRates, WeightDecayOf};
pub use schedule::{Curve, DecayShape, Schedule};
pub use serve::{ServeConfig, listen_address};

/// A commented configuration that documents every key; parses to the defaults.
pub const TEMPLATE: &str = include_str!("config/template.toml");

/// Everything that decides a training run.
///
/// The defaults are the recipe of the QLoRA paper (Dettmers et al. 2023, arXiv 2305.14314,
/// appendix B, 7B and 13B models): NF4 with double quantization, adapters of rank 64 and alpha 16
/// on every linear layer, constant learning rate 2e-4, 16 rows a step, gradients clipped at 0.3.
/// Only dropout, 0.1 there, is off.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Where to run: `auto`, `cpu`, `cuda`, `cuda:1`, `vulkan` or `metal`.
    pub device: String,
    /// The base model.
    pub model: BaseModelConfig,
    /// How its linear layers are kept in memory.
    pub quantization: QuantizationConfig,
    /// The adapters that are trained; the keys mean what they mean in PEFT's `LoraConfig`.
    pub lora: LoraConfig,
    /// The rows to learn from.
    pub data: DataConfig,
    /// The optimizer, its schedule, and what is written when.
    pub train: RunConfig,
    /// The settings of objectives that compare answers.
    #[serde(skip_serializing_if = "PreferenceConfig::is_default")]
    pub preference: PreferenceConfig,
    /// What evaluations do besides measuring the loss.
    pub eval: EvalConfig,
    /// What several processes that train together do otherwise.
    pub distributed: DistributedConfig,
    /// What a server over this base is told; nothing of it decides the run.
    pub serve: ServeConfig,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            device: "auto".into(),
            model: BaseModelConfig::default(),
            quantization: QuantizationConfig::default(),
            lora: LoraConfig::default(),
            data: DataConfig::default(),
            train: RunConfig::default(),
            preference: PreferenceConfig::default(),
            eval: EvalConfig::default(),
            distributed: DistributedConfig::default(),
            serve: ServeConfig::default(),
        }
    }
}

/// `[model]`: the base model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BaseModelConfig {
    /// A folder with a Hugging Face checkpoint, or a hub id such as `org/name`.
    pub path: String,
    /// Branch, tag or commit of a hub id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Whether embedding and output head get rows for tokens of the tokenizer that they have none for. The new rows
    /// are trained and saved with the adapter.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub resize_embeddings: bool,
    /// Where frozen weights are while the device does not compute with them.
    pub residency: Residency,
    /// How much of the device's memory the frozen weights may take.
    pub device_budget: Budget,
    /// Keys of `config.json` that are passed over although they are not known and may change what the model computes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub accept_keys: Vec<String>,
}

impl BaseModelConfig {
    /// How the base's `config.json` is read.
    pub fn config_options(&self) -> ConfigOptions {
        ConfigOptions::accepting(&self.accept_keys)
    }
}

/// `[quantization]`: how the base model's linear layers are kept in memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QuantizationConfig {
    /// The 4-bit data type, or `none` for unquantized weights.
    pub quant_type: BaseQuantType,
    /// Elements that share one absmax: a power of two from 32 to 4096.
    pub blocksize: usize,
    /// Whether the absmax are quantized to 8 bits too.
    pub double_quant: bool,
    /// The dtype of activations and of the dequantized weights.
    pub compute_dtype: ComputeDtype,
    /// Linear layers that are left unquantized, by parts of their paths.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub skip_modules: Vec<String>,
    /// What becomes of small projections that much hangs on.
    #[serde(skip_serializing_if = "Sensitive::is_default")]
    pub sensitive: Sensitive,
}

impl Default for QuantizationConfig {
    fn default() -> Self {
        Self {
            quant_type: BaseQuantType::Nf4,
            blocksize: 64,
            double_quant: true,
            compute_dtype: ComputeDtype::Auto,
            skip_modules: Vec::new(),
            sensitive: Sensitive::Quantize,
        }
    }
}

/// What becomes of small projections that much hangs on, as those of strength and decay of linear attention.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sensitive {
    /// They are quantized as all others.
    #[default]
    Quantize,
    /// They are kept in the compute dtype.
    Keep,
}

impl Sensitive {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl QuantizationConfig {
    /// The codec's settings, or `None` where the base stays unquantized.
    pub fn quant_config(&self) -> Option<QuantConfig> {
        let quant_type = match self.quant_type {
            BaseQuantType::Nf4 => QuantType::Nf4,
            BaseQuantType::Fp4 => QuantType::Fp4,
            BaseQuantType::None => return None,
        };
        Some(QuantConfig { quant_type, blocksize: self.blocksize, double_quant: self.double_quant })
    }

    /// The configuration of the base in a folder, read as `options` say, with the layers that are left unquantized.
    ///
    /// # Errors
    /// As [`ModelConfig::from_dir`], and a name of `skip_modules` that is in no path.
    pub fn base_config(&self, dir: &Path, options: &ConfigOptions) -> Result<ModelConfig, ModelError> {
        let mut config = ModelConfig::from_dir_with(dir, options)?;
        config.keep_dense(&self.skip_modules)?;
        if self.sensitive == Sensitive::Keep {
            config.keep_sensitive_dense();
        }
        Ok(config)
    }

    /// The settings in words, for a log line or a report.
    pub fn describe(&self) -> String {
        let name = match self.quant_type {
            BaseQuantType::Nf4 => "NF4",
            BaseQuantType::Fp4 => "FP4",
            BaseQuantType::None => return "unquantized".into(),
        };
        let nested = if self.double_quant { " with double quantization" } else { "" };
        format!("{name}, blocksize {}{nested}", self.blocksize)
    }
}

/// The base model's weight type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BaseQuantType {
    /// 4-bit NormalFloat.
    Nf4,
    /// 4-bit float.
    Fp4,
    /// Weights stay in the compute dtype: plain LoRA.
    None,
}

/// The dtype of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ComputeDtype {
    /// bf16 where the device has it, f16 on older CUDA devices with tensor cores, otherwise f32.
    Auto,
    /// 32-bit float.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}

/// `[train]`: the optimizer, its schedule, and what is written when.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunConfig {
    /// Folder for checkpoints, metrics, the report and the final adapter.
    pub output_dir: PathBuf,
    /// What is learned from the rows.
    #[serde(skip_serializing_if = "Objective::is_default")]
    pub objective: Objective,
    /// An adapter that training begins with, a folder or a run's folder; its settings must be those of `[lora]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from_adapter: Option<PathBuf>,
    /// Passes over the training rows, fractions allowed; `max_steps` ends a run earlier or later.
    pub epochs: f64,
    /// Optimizer steps in all; overrides `epochs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<usize>,
    /// Rows in a micro-batch; sequences where rows are packed.
    pub batch_size: usize,
    /// Micro-batches in one optimizer step.
    pub gradient_accumulation_steps: usize,
    /// Peak learning rate, reached after the warmup.
    pub learning_rate: f64,
    /// What the learning rate does after the warmup.
    pub schedule: Schedule,
    /// What falling schedules end at, as a part of `learning_rate`.
    #[serde(skip_serializing_if = "is_zero")]
    pub min_learning_rate_ratio: f64,
    /// Cosines of a schedule with restarts.
    #[serde(skip_serializing_if = "is_one")]
    pub cycles: usize,
    /// The part of all steps in which [`Schedule::WarmupStableDecay`] falls.
    #[serde(skip_serializing_if = "is_default_decay")]
    pub decay_ratio: f64,
    /// How it falls there.
    #[serde(skip_serializing_if = "DecayShape::is_default")]
    pub decay_shape: DecayShape,
    /// Steps of linear warmup; overrides `warmup_ratio`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_steps: Option<usize>,
    /// Linear warmup as a part of all steps.
    pub warmup_ratio: f64,
    /// The update rule and the precision of its state.
    pub optimizer: OptimizerKind,
    /// How much of the optimizer's state may stay on the device.
    pub optimizer_budget: Budget,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Weight decay of some kinds of parameters in place of `weight_decay`.
    #[serde(skip_serializing_if = "WeightDecayOf::is_empty")]
    pub weight_decay_of: WeightDecayOf,
    /// LoRA+: what the learning rate of `lora_b` is a multiple of `learning_rate` by.
    #[serde(skip_serializing_if = "is_one_ratio")]
    pub lora_plus_ratio: f64,
    /// Peak learning rate of embedding and output head, where they are trained.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embedding_learning_rate: Option<f64>,
    /// NEFTune: the scale of noise on embeddings in training; 0: none.
    #[serde(skip_serializing_if = "is_zero")]
    pub neftune_alpha: f64,
    /// AdamW's decay rates of the first and second moment; Lion's weight and decay rate of its moment.
    pub betas: [f64; 2],
    /// AdamW's epsilon.
    pub eps: f64,
    /// Gradients are scaled down to this global norm; 0 leaves them as they are.
    pub max_grad_norm: f64,
    /// What the loss is multiplied by, so that small gradients do not vanish in f16.
    #[serde(skip_serializing_if = "LossScale::is_auto")]
    pub loss_scale: LossScale,
    /// Seed of adapter initialisation, dropout, shuffling and the evaluation split.
    pub seed: u64,
    /// Whether activations are kept for backward or computed again.
    pub activation_checkpointing: Checkpointing,
    /// Bytes of the device's memory that the run may take, by which `auto` chooses what is kept.
    pub memory_budget: Budget,
    /// Evaluate every so many steps; 0: only at the end. Does nothing without evaluation rows.
    pub eval_every: usize,
    /// By what evaluations are compared, so that the best one's checkpoint is kept beside the newest ones.
    pub keep_best: KeepBest,
    /// Which adapter a finished run leaves: that of the last step or of the best evaluation.
    pub final_adapter: FinalAdapter,
    /// End the run after so many evaluations that did not improve on the best; 0: never.
    pub early_stopping_patience: usize,
    /// What an evaluation must gain on the best to count as an improvement.
    pub early_stopping_threshold: f64,
    /// Save a training checkpoint every so many steps; 0: only at the end.
    pub save_every: usize,
    /// How many training checkpoints are kept, the newest ones; 0 keeps all.
    pub save_limit: usize,
    /// Steps between two lines of output where there is no progress bar; the metrics hold every step.
    pub log_every: usize,
    /// Trackers that are told of the run beside its own log.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub log_to: Vec<Tracker>,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self {
            output_dir: PathBuf::from("runs/qlora"),
            objective: Objective::default(),
            from_adapter: None,
            epochs: 1.0,
            max_steps: None,
            batch_size: 4,
            gradient_accumulation_steps: 4,
            learning_rate: 2e-4,
            schedule: Schedule::Constant,
            min_learning_rate_ratio: 0.0,
            cycles: 1,
            decay_ratio: DECAY_RATIO,
            decay_shape: DecayShape::Cosine,
            warmup_steps: None,
            warmup_ratio: 0.03,
            optimizer: OptimizerKind::AdamW32bit,
            optimizer_budget: Budget::Auto,
            weight_decay: 0.0,
            weight_decay_of: WeightDecayOf::default(),
            lora_plus_ratio: 1.0,
            embedding_learning_rate: None,
            neftune_alpha: 0.0,
            betas: [0.9, 0.999],
            eps: 1e-8,
            max_grad_norm: 0.3,
            loss_scale: LossScale::Auto,
            seed: 42,
            activation_checkpointing: Checkpointing::Auto,
            memory_budget: Budget::Auto,
            eval_every: 100,
            keep_best: KeepBest::Off,
            final_adapter: FinalAdapter::Last,
            early_stopping_patience: 0,
            early_stopping_threshold: 0.0,
            save_every: 100,
            save_limit: 2,
            log_every: 1,
            log_to: Vec::new(),
        }
    }
}

/// The part of a run in which [`Schedule::WarmupStableDecay`] falls unless something else is said.
const DECAY_RATIO: f64 = 0.1;

// Keys at their defaults are left out of what checkpoints hold, so that those from before the keys existed can be resumed.
fn is_zero(value: &f64) -> bool {
    *value == 0.0
}

fn is_one(value: &usize) -> bool {
    *value == 1
}

fn is_one_ratio(value: &f64) -> bool {
    *value == 1.0
}

fn is_default_decay(value: &f64) -> bool {
    *value == DECAY_RATIO
}

impl RunConfig {
    /// Optimizer steps of a run over so many training rows, or sequences where rows are packed
    /// ([`BatchOrder::sequences`](qlora_data::BatchOrder::sequences)): `max_steps`, or as many as `epochs`
    /// takes, where the last step of an epoch may hold fewer rows. At least 1.
    pub fn total_steps(&self, rows: usize) -> usize {
        self.max_steps.unwrap_or_else(|| {
            let rows_per_step = self.batch_size * self.gradient_accumulation_steps;
            let steps_per_epoch = rows.div_ceil(rows_per_step.max(1));
            ((self.epochs * steps_per_epoch as f64).ceil() as usize).max(1)
        })
    }

    /// Steps of warmup in a run of `total_steps`.
    pub fn warmup_steps_of(&self, total_steps: usize) -> usize {
        self.warmup_steps.unwrap_or_else(|| (self.warmup_ratio * total_steps as f64).ceil() as usize)
    }

    /// What a user should know of these settings before a run of `total_steps`.
    pub fn warnings(&self, total_steps: usize) -> Vec<String> {
        let warmup = self.warmup_steps_of(total_steps);
        let peak = self.learning_rate_at(total_steps.saturating_sub(1), total_steps) / self.learning_rate;
        let mut warnings = Vec::new();
        if warmup > total_steps {
            warnings.push(format!(
                "the run of {total_steps} steps ends inside the warmup of {warmup}, at {:.1} % of train.learning_rate: lower \
                 train.warmup_steps or train longer",
                100.0 * peak
            ));
        }
        warnings
    }

    /// The learning rate of `step` (from 0) in a run of `total_steps`.
    pub fn learning_rate_at(&self, step: usize, total_steps: usize) -> f64 {
        self.learning_rate * self.curve(total_steps).factor(step)
    }
}

impl TrainConfig {
    /// Reads a configuration file.
    ///
    /// # Errors
    /// The file can't be read, isn't TOML, holds an unknown key, or a value of the wrong type. The
    /// message names the line. Ranges are checked by [`TrainConfig::validate`], after overrides.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, TrainError> {
        let path = path.as_ref();
        let text =
            std::fs::read_to_string(path).map_err(|source| TrainError::ConfigRead { path: path.to_owned(), source })?;
        if let Some(what) = keys::foreign(path, &text) {
            return Err(TrainError::ConfigForeign { path: path.to_owned(), what });
        }
        Self::parse(&text, &path.display().to_string())
    }

    /// Parses a configuration; `file` is the name used in error messages.
    ///
    /// # Errors
    /// As [`TrainConfig::load`].
    pub fn parse(text: &str, file: &str) -> Result<Self, TrainError> {
        keys::parse(text, file)
    }

    /// Sets one key, named `section.key` (or `device`), to a value written as in TOML. Quotes
    /// around a string may be left out: `set("lora.target_modules", "all-linear")`.
    ///
    /// # Errors
    /// The key is unknown, or the value doesn't fit it; the configuration is unchanged then.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), TrainError> {
        *self = keys::with_override(self, key, value)?;
        Ok(())
    }

    /// The configuration as TOML, every key included; [`TrainConfig::parse`] reads it back.
    ///
    /// # Errors
    /// A value has no form in TOML, e.g. a seed above 2^63 - 1.
    pub fn to_toml(&self) -> Result<String, TrainError> {
        toml::to_string_pretty(self).map_err(|e| TrainError::ConfigWrite { message: e.to_string() })
    }
}
