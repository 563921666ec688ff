//! Loss scaling: what keeps small gradients from vanishing where they are computed in f16.
//!
//! The smallest number above 0 that f16 holds is 6e-8, and gradients of activations are often smaller. So the loss is
//! multiplied by a scale, and with it every gradient (Micikevicius et al., 2018, arXiv 1710.03740, section 3.2); the update
//! divides by it. A scale that is too large makes gradients infinite instead.
//!
//! [`LossScaler`] finds the scale as PyTorch's `torch.amp.GradScaler` does, with its constants: it starts at 65536; a step
//! whose gradients are infinite or not a number is skipped and halves the scale; 2000 steps in a row that are not double it.
//! The kernel of the update sees the norm on the device and leaves everything as it is where that is not finite, so that
//! nothing waits for the host; the host takes the step out of the optimizer's count when it reads the norm.
//!
//! Scales are powers of two there, by which multiplication is exact: in f32, where nothing overflows, a run with loss
//! scaling has the bits of one without.
//!
//! What GradScaler has not: an end. A scale that would fall below 1, as DeepSpeed's `min_loss_scale` has it, shows that the
//! forward pass itself overflows or that training diverged; such a run ends with [`TrainError::LossScale`].

use crate::error::TrainError;
use burn::tensor::FloatDType;
use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// `train.loss_scale`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum LossScale {
    /// [`Dynamic`](Self::Dynamic) where the model computes in f16, [`Off`](Self::Off) elsewhere.
    #[default]
    Auto,
    /// As the steps show what the gradients bear.
    Dynamic,
    /// None.
    Off,
    /// This one throughout; gradients that are not finite end the run.
    Fixed(f64),
}

impl LossScale {
    /// Whether it is the default.
    pub fn is_auto(&self) -> bool {
        *self == Self::Auto
    }

    /// Whether gradients are scaled in a run that computes in `dtype`.
    pub fn is_on(self, dtype: FloatDType) -> bool {
        match self {
            Self::Auto => dtype == FloatDType::F16,
            Self::Dynamic | Self::Fixed(_) => true,
            Self::Off => false,
        }
    }

    /// Whether it is a scale that f32 holds, and whose inverse it holds.
    pub(crate) fn is_valid(self) -> bool {
        match self {
            Self::Fixed(scale) => (scale as f32).is_normal() && scale > 0.0 && (1.0 / scale as f32).is_normal(),
            Self::Auto | Self::Dynamic | Self::Off => true,
        }
    }
}

impl fmt::Display for LossScale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.pad("auto"),
            Self::Dynamic => f.pad("dynamic"),
            Self::Off => f.pad("off"),
            Self::Fixed(scale) => write!(f, "{scale}"),
        }
    }
}

impl Serialize for LossScale {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Fixed(scale) => serializer.serialize_f64(*scale),
            words => serializer.collect_str(words),
        }
    }
}

impl<'de> Deserialize<'de> for LossScale {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Words;
        impl Visitor<'_> for Words {
            type Value = LossScale;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"auto\", \"dynamic\", \"off\" or a number")
            }

            fn visit_str<E: Error>(self, word: &str) -> Result<LossScale, E> {
                let words = [LossScale::Auto, LossScale::Dynamic, LossScale::Off];
                let found = words.into_iter().find(|known| known.to_string() == word);
                found.ok_or_else(|| E::invalid_value(Unexpected::Str(word), &self))
            }

            fn visit_f64<E: Error>(self, scale: f64) -> Result<LossScale, E> {
                Ok(LossScale::Fixed(scale))
            }

            fn visit_i64<E: Error>(self, scale: i64) -> Result<LossScale, E> {
                Ok(LossScale::Fixed(scale as f64))
            }

            fn visit_u64<E: Error>(self, scale: u64) -> Result<LossScale, E> {
                Ok(LossScale::Fixed(scale as f64))
            }
        }
        deserializer.deserialize_any(Words)
    }
}

/// `init_scale` of GradScaler.
const INITIAL: f64 = 65536.0;
/// `growth_factor`.
const GROWTH: f64 = 2.0;
/// `backoff_factor`.
const BACKOFF: f64 = 0.5;
/// `growth_interval`.
const GROWTH_INTERVAL: u32 = 2000;
/// The smallest scale that is tried.
const SMALLEST: f64 = 1.0;

/// What a checkpoint keeps of a [`LossScaler`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossScalerState {
    /// What the next step's loss is multiplied by.
    pub scale: f64,
    /// Steps since the scale was changed, or one was skipped.
    pub growth_tracker: u32,
    /// Steps of the run that were skipped: they count as steps, but not as updates of the optimizer.
    pub skipped_steps: u64,
}

/// What loss scaling did in a step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossScaling {
    /// What the loss was multiplied by.
    pub scale: f64,
    /// Whether the step was skipped, because its gradients were infinite or not a number.
    pub skipped: bool,
    /// Steps of the run that were skipped so far, this one included.
    pub skipped_steps: u64,
}

/// The scale of each step's loss.
#[derive(Clone, Debug, PartialEq)]
pub struct LossScaler {
    mode: Mode,
    state: LossScalerState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Off,
    Fixed,
    Dynamic,
}

impl Default for LossScaler {
    /// No scaling.
    fn default() -> Self {
        Self::new(LossScale::Off, FloatDType::F32)
    }
}

impl LossScaler {
    /// The scaler of a run that computes in `dtype`.
    pub fn new(choice: LossScale, dtype: FloatDType) -> Self {
        let (mode, scale) = match choice {
            LossScale::Fixed(scale) => (Mode::Fixed, scale),
            _ if choice.is_on(dtype) => (Mode::Dynamic, INITIAL),
            _ => (Mode::Off, 1.0),
        };
        Self { mode, state: LossScalerState { scale, growth_tracker: 0, skipped_steps: 0 } }
    }

    /// What the next step's loss is multiplied by.
    pub fn scale(&self) -> f32 {
        self.state.scale as f32
    }

    /// What a checkpoint keeps; `None` where there is nothing to keep.
    pub fn state(&self) -> Option<LossScalerState> {
        (self.mode != Mode::Off || self.state.skipped_steps > 0).then_some(self.state)
    }

    /// Goes on from a checkpoint. A run whose scale is not dynamic takes no more than the number of steps that were skipped.
    pub fn restore(&mut self, state: LossScalerState) {
        self.state = match self.mode {
            Mode::Dynamic => state,
            Mode::Off | Mode::Fixed => LossScalerState { skipped_steps: state.skipped_steps, ..self.state },
        };
    }

    /// Takes note of a step: the scale of the next one follows. What was done in this one is `None` without scaling.
    ///
    /// # Errors
    /// Loss or gradient norm is not finite: [`TrainError::NotFinite`] where the scale is not dynamic,
    /// [`TrainError::LossScale`] where it can't fall further. The scaler is unchanged then.
    pub(crate) fn update(
        &mut self,
        loss: f32,
        grad_norm: f32,
        learning_rate: f64,
    ) -> Result<Option<LossScaling>, TrainError> {
        let LossScalerState { scale, growth_tracker, skipped_steps } = self.state;
        let finite = loss.is_finite() && grad_norm.is_finite();
        match self.mode {
            Mode::Off | Mode::Fixed if !finite => return Err(TrainError::NotFinite { loss, grad_norm, learning_rate }),
            Mode::Off => return Ok(None),
            Mode::Fixed => {}
            Mode::Dynamic if !finite => {
                let smaller = scale * BACKOFF;
                if smaller < SMALLEST {
                    return Err(TrainError::LossScale { scale, loss, grad_norm, learning_rate, skipped_steps });
                }
                self.state = LossScalerState { scale: smaller, growth_tracker: 0, skipped_steps: skipped_steps + 1 };
            }
            Mode::Dynamic if growth_tracker + 1 < GROWTH_INTERVAL => self.state.growth_tracker += 1,
            Mode::Dynamic => {
                self.state.growth_tracker = 0;
                // A scale that f32 does not hold stays as it is.
                if ((scale * GROWTH) as f32).is_finite() {
                    self.state.scale = scale * GROWTH;
                }
            }
        }
        Ok(Some(LossScaling { scale, skipped: !finite, skipped_steps: self.state.skipped_steps }))
    }
}

#[cfg(test)]
mod tests;
