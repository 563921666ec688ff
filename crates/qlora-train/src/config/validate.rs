//! Ranges: what each key may hold, and the message when it doesn't.

use std::fmt::Display;

use super::{BaseQuantType, FinalAdapter, KeepBest, RunConfig, Schedule, TrainConfig};
use crate::error::TrainError;
use crate::residency::Residency;
use paged_optim::Budget;
use qlora_models::ParameterKind;

impl TrainConfig {
    /// Checks every value that has a range.
    ///
    /// # Errors
    /// The first value out of its range, named `section.key`, with what is allowed.
    pub fn validate(&self) -> Result<(), TrainError> {
        let device = self.device.as_str();
        let card = device.strip_prefix("cuda:").is_some_and(|index| index.parse::<u16>().is_ok());
        check(
            "device",
            device,
            card || ["auto", "cpu", "cuda", "vulkan", "metal"].contains(&device),
            "must be auto, cpu, cuda, cuda:1 (the second card), vulkan or metal",
        )?;
        if self.model.path.is_empty() {
            return Err(TrainError::ConfigMissing {
                key: "model.path".into(),
                hint: "give the folder of a Hugging Face checkpoint or a hub id".into(),
            });
        }
        let q = &self.quantization;
        self.validate_residency()?;
        check(
            "distributed.shard_base",
            self.distributed.shard_base,
            !self.distributed.shard_base || q.quant_type != BaseQuantType::None,
            "needs weights in 4 bits: set quantization.quant_type to \"nf4\" or \"fp4\"",
        )?;
        check(
            "distributed.shard_base",
            self.distributed.shard_base,
            !self.distributed.shard_base || self.model.residency != Residency::Host,
            "has all blocks on the devices: set model.residency to \"auto\" or \"device\"",
        )?;
        check(
            "quantization.blocksize",
            q.blocksize,
            q.blocksize.is_power_of_two() && (32..=4096).contains(&q.blocksize),
            "must be a power of two from 32 to 4096",
        )?;
        self.lora.validate()?;
        self.train.validate()?;
        self.train.objective.validate()?;
        self.preference.validate(&self.train.objective)?;
        let pairs = self.train.objective.takes_pairs().is_some();
        let margin = "needs an objective that compares two answers, such as train.objective = \"dpo\"";
        check("train.keep_best", "\"margin\"", pairs || self.train.keep_best != KeepBest::Margin, margin)?;
        self.serve.validate()?;
        self.eval.validate(&self.data)?;
        Ok(self.data.validate()?)
    }

    /// Checks where frozen weights are to be.
    ///
    /// # Errors
    /// Weights that are not in 4 bits are to wait in the host's memory, or a budget is given for what never leaves the device.
    pub fn validate_residency(&self) -> Result<(), TrainError> {
        let q = &self.quantization;
        check(
            "model.residency",
            self.model.residency,
            self.model.residency != Residency::Host || q.quant_type != BaseQuantType::None,
            "needs weights in 4 bits: set quantization.quant_type to \"nf4\" or \"fp4\"",
        )?;
        check(
            "model.device_budget",
            self.model.device_budget,
            self.model.residency != Residency::Device || self.model.device_budget == Budget::Auto,
            "says what else waits in the host's memory: set model.residency to \"auto\" or \"host\"",
        )
    }
}

impl RunConfig {
    /// Checks the section's ranges; see [`TrainConfig::validate`].
    fn validate(&self) -> Result<(), TrainError> {
        const ONE: &str = "must be 1 or more";
        const POSITIVE: &str = "must be a finite number above 0";
        const NOT_NEGATIVE: &str = "must be a finite number, 0 or more";
        let positive = |x: f64| x > 0.0 && x.is_finite();
        let not_negative = |x: f64| x >= 0.0 && x.is_finite();
        check(
            "train.output_dir",
            "\"\"",
            !self.output_dir.as_os_str().is_empty(),
            "must be a folder, which is created where it doesn't exist",
        )?;
        check("train.epochs", self.epochs, positive(self.epochs), POSITIVE)?;
        if let Some(steps) = self.max_steps {
            check(
                "train.max_steps",
                steps,
                steps >= 1,
                "must be 1 or more; leave the key out to train for train.epochs",
            )?;
        }
        let accumulation = self.gradient_accumulation_steps;
        check("train.batch_size", self.batch_size, self.batch_size >= 1, ONE)?;
        check("train.gradient_accumulation_steps", accumulation, accumulation >= 1, ONE)?;
        // Updates are computed in f32.
        let rate = self.learning_rate as f32;
        let in_f32 = self.learning_rate > 0.0 && rate > 0.0 && rate.is_finite();
        check("train.learning_rate", self.learning_rate, in_f32, "must be above 0 and finite as a 32-bit number")?;
        self.validate_rates()?;
        let ratio = (0.0..1.0).contains(&self.warmup_ratio);
        check("train.warmup_ratio", self.warmup_ratio, ratio, "must be from 0 to below 1")?;
        check("train.weight_decay", self.weight_decay, not_negative(self.weight_decay), NOT_NEGATIVE)?;
        for beta in self.betas {
            check("train.betas", beta, (0.0..1.0).contains(&beta), "must be from 0 to below 1, both")?;
        }
        check("train.eps", self.eps, positive(self.eps), POSITIVE)?;
        check("train.max_grad_norm", self.max_grad_norm, not_negative(self.max_grad_norm), NOT_NEGATIVE)?;
        check(
            "train.loss_scale",
            self.loss_scale,
            self.loss_scale.is_valid(),
            "must be \"auto\", \"dynamic\", \"off\" or a number above 0 that is finite as a 32-bit number",
        )?;
        // TOML's integers are signed, and the seed must survive being written to a checkpoint.
        check("train.seed", self.seed, i64::try_from(self.seed).is_ok(), "must be from 0 to 2^63 - 1")?;
        let threshold = self.early_stopping_threshold;
        check("train.early_stopping_threshold", threshold, not_negative(threshold), NOT_NEGATIVE)?;
        check(
            "train.final_adapter",
            "\"best\"",
            self.final_adapter == FinalAdapter::Last || self.keep_best.is_on(),
            "needs train.keep_best = \"loss\" or \"accuracy\", which says what the best is",
        )?;
        let twice = (1..self.log_to.len()).any(|at| self.log_to[..at].contains(&self.log_to[at]));
        check("train.log_to", format!("{:?}", self.log_to), !twice, "names a tracker twice")?;
        check("train.log_every", self.log_every, self.log_every >= 1, ONE)
    }

    /// Checks what bends the learning rate: over the run, and by kind of parameter.
    fn validate_rates(&self) -> Result<(), TrainError> {
        const NOT_NEGATIVE: &str = "must be a finite number, 0 or more";
        const IN_F32: &str = "must be above 0, and the learning rate that it gives finite as a 32-bit number";
        let not_negative = |x: f64| x >= 0.0 && x.is_finite();
        let in_f32 = |rate: f64| rate > 0.0 && (rate as f32) > 0.0 && (rate as f32).is_finite();
        let floor = self.min_learning_rate_ratio;
        let key = "train.min_learning_rate_ratio";
        check(key, floor, (0.0..=1.0).contains(&floor), "must be from 0 to 1")?;
        let falls = floor == 0.0 || self.schedule.has_floor();
        check(
            key,
            floor,
            falls,
            "needs a train.schedule that falls to a floor: linear, a cosine or warmup_stable_decay",
        )?;
        check("train.cycles", self.cycles, self.cycles >= 1, "must be 1 or more")?;
        let restarts = self.cycles == 1 || self.schedule == Schedule::CosineWithRestarts;
        check("train.cycles", self.cycles, restarts, "needs train.schedule = \"cosine_with_restarts\"")?;
        let decay = self.decay_ratio;
        check("train.decay_ratio", decay, decay > 0.0 && decay <= 1.0, "must be above 0 and at most 1")?;
        let plus = self.lora_plus_ratio;
        check("train.lora_plus_ratio", plus, plus > 0.0 && in_f32(self.learning_rate * plus), IN_F32)?;
        if let Some(rate) = self.embedding_learning_rate {
            check("train.embedding_learning_rate", rate, in_f32(rate), IN_F32)?;
        }
        for kind in ParameterKind::ALL {
            let decay = self.weight_decay_of.get(kind).unwrap_or(0.0);
            check("train.weight_decay_of", decay, not_negative(decay), NOT_NEGATIVE)?;
        }
        check("train.neftune_alpha", self.neftune_alpha, not_negative(self.neftune_alpha), NOT_NEGATIVE)
    }
}

pub(super) fn check(key: &str, value: impl Display, ok: bool, allowed: &str) -> Result<(), TrainError> {
    if ok {
        return Ok(());
    }
    Err(TrainError::ConfigRange { key: key.to_string(), value: value.to_string(), allowed: allowed.to_string() })
}
