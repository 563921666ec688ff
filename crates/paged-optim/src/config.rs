//! Which optimizer, its hyper-parameters, and the scalars of one update.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{BLOCKSIZE, OptimError};

/// An update rule and the precision of its state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum OptimizerKind {
    /// AdamW with f32 moments.
    #[default]
    #[serde(rename = "adamw_32bit")]
    AdamW32bit,
    /// AdamW with block-wise 8-bit moments.
    #[serde(rename = "adamw_8bit")]
    AdamW8bit,
    /// Lion with a block-wise 8-bit moment.
    #[serde(rename = "lion_8bit")]
    Lion8bit,
}

/// The arithmetic of an update.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Rule {
    AdamW,
    Lion,
}

impl Rule {
    /// Names of the moments that it keeps.
    pub(crate) fn moments(self) -> &'static [&'static str] {
        match self {
            Self::AdamW => &["m", "v"],
            Self::Lion => &["m"],
        }
    }
}

impl OptimizerKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::AdamW32bit, Self::AdamW8bit, Self::Lion8bit];

    /// Its name in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::AdamW32bit => "adamw_32bit",
            Self::AdamW8bit => "adamw_8bit",
            Self::Lion8bit => "lion_8bit",
        }
    }

    /// Names of the moments it keeps of every parameter: `m`, and AdamW's `v`.
    pub fn moments(self) -> &'static [&'static str] {
        self.rule().moments()
    }

    pub(crate) fn rule(self) -> Rule {
        match self {
            Self::AdamW32bit | Self::AdamW8bit => Rule::AdamW,
            Self::Lion8bit => Rule::Lion,
        }
    }
}

impl fmt::Display for OptimizerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for OptimizerKind {
    type Err = OptimError;

    fn from_str(s: &str) -> Result<Self, OptimError> {
        Self::ALL.into_iter().find(|kind| kind.name() == s).ok_or_else(|| OptimError::UnknownKind(s.to_owned()))
    }
}

/// Hyper-parameters; the defaults are PyTorch's AdamW, without weight decay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OptimizerConfig {
    /// The update rule and the precision of its state.
    pub kind: OptimizerKind,
    /// AdamW: decay rates of the first and second moment. Lion: the weight of the moment in the update, and its
    /// decay rate.
    pub betas: (f64, f64),
    /// AdamW: added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay per unit of learning rate.
    pub weight_decay: f64,
    /// Parameters with fewer elements keep 32-bit state whatever the kind; 4096 in bitsandbytes.
    pub min_8bit_size: usize,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self { kind: OptimizerKind::default(), betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.0, min_8bit_size: 4096 }
    }
}

impl OptimizerConfig {
    /// Whether a parameter of `len` elements has 8-bit state.
    pub fn is_8bit(&self, len: usize) -> bool {
        self.kind != OptimizerKind::AdamW32bit && len >= self.min_8bit_size
    }

    /// Bytes of state of a parameter of `len` elements, without the padding of pages.
    pub fn state_bytes(&self, len: usize) -> u64 {
        let moments = self.kind.moments().len();
        let moment = if self.is_8bit(len) { len + 4 * len.div_ceil(BLOCKSIZE) } else { 4 * len };
        (moments * moment) as u64
    }

    /// The scalars of update number `step`, from 1.
    pub fn scalars(&self, step: u64, learning_rate: f64, max_norm: f32) -> Scalars {
        let (beta1, beta2) = self.betas;
        let step = step as f64;
        let (step_size, correction2) = match self.kind.rule() {
            Rule::AdamW => (learning_rate / (1.0 - beta1.powf(step)), (1.0 - beta2.powf(step)).sqrt()),
            Rule::Lion => (learning_rate, 1.0),
        };
        Scalars {
            beta1: beta1 as f32,
            rest1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            rest2: (1.0 - beta2) as f32,
            step_size: step_size as f32,
            correction2: correction2 as f32,
            eps: self.eps as f32,
            keep: (1.0 - learning_rate * self.weight_decay) as f32,
            max_norm,
            unscale: 1.0,
        }
    }
}

/// What one update's arithmetic takes from the host: computed in f64, rounded once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scalars {
    /// β₁.
    pub beta1: f32,
    /// 1 − β₁.
    pub rest1: f32,
    /// β₂.
    pub beta2: f32,
    /// 1 − β₂.
    pub rest2: f32,
    /// AdamW: lr / (1 − β₁ᵗ). Lion: lr.
    pub step_size: f32,
    /// AdamW: √(1 − β₂ᵗ).
    pub correction2: f32,
    /// ε.
    pub eps: f32,
    /// 1 − lr · weight_decay.
    pub keep: f32,
    /// Gradients are scaled down to this global norm; 0: they are left as they are.
    pub max_norm: f32,
    /// 1 / loss scale: what gradients and their norm are multiplied by before anything else.
    pub unscale: f32,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn names_parse_back_and_others_are_refused() {
        for kind in OptimizerKind::ALL {
            assert_eq!(kind.to_string().parse::<OptimizerKind>().unwrap(), kind);
        }
        let message = "adam".parse::<OptimizerKind>().unwrap_err().to_string();
        assert!(message.contains("`adam`") && message.contains("adamw_8bit"), "{message}");
    }

    #[test]
    fn small_parameters_keep_32_bits() {
        let config = OptimizerConfig { kind: OptimizerKind::AdamW8bit, ..Default::default() };
        assert_eq!(config.state_bytes(4095), 8 * 4095);
        assert_eq!(config.state_bytes(4096), 2 * (4096 + 4 * 16));
        assert_eq!(config.state_bytes(4097), 2 * (4097 + 4 * 17));
        let lion = OptimizerConfig { kind: OptimizerKind::Lion8bit, ..config };
        assert_eq!(lion.state_bytes(8192), 8192 + 4 * 32);
        assert_eq!(OptimizerConfig::default().state_bytes(8192), 8 * 8192);
    }
}
