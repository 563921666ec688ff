//! Learning-rate schedules: a linear warmup, then one of several curves.
//!
//! The curves are those of transformers' `get_scheduler` by the same names, with one difference: its first step of a warmup has a rate
//! of 0 and learns nothing, here the first step has the second one's rate.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// What the learning rate does after the warmup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Stays at its peak, as in the QLoRA paper.
    Constant,
    /// Falls in a line, to reach the floor after the last step.
    Linear,
    /// Falls along half a cosine, to reach the floor after the last step.
    Cosine,
    /// Falls along half a cosine several times, each from the peak.
    CosineWithRestarts,
    /// Stays at its peak, and falls in the last part of the run.
    #[serde(alias = "wsd")]
    WarmupStableDecay,
    /// Falls as one over the square root of the steps.
    InverseSqrt,
}

impl Schedule {
    /// Whether it falls to a floor.
    pub fn has_floor(self) -> bool {
        !matches!(self, Self::Constant | Self::InverseSqrt)
    }
}

/// How the rate falls in the last part of [`Schedule::WarmupStableDecay`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecayShape {
    /// Along half a cosine.
    #[default]
    Cosine,
    /// In a line.
    Linear,
    /// As `1 - sqrt(t)` (Hägele et al. 2024, arXiv 2405.18392).
    Sqrt,
}

/// The factor on the peak learning rate over the steps of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Curve {
    /// What comes after the warmup.
    pub schedule: Schedule,
    /// Steps of warmup.
    pub warmup_steps: usize,
    /// Steps of the run.
    pub total_steps: usize,
    /// The factor that falling curves end at, from 0 to 1.
    pub floor: f64,
    /// Steps of decay at the end of [`Schedule::WarmupStableDecay`].
    pub decay_steps: usize,
    /// Their shape.
    pub decay_shape: DecayShape,
    /// Cosines of [`Schedule::CosineWithRestarts`], 1 at least.
    pub cycles: usize,
}

/// Steps that [`Schedule::InverseSqrt`] counts from where there is no warmup, as in transformers.
const TIMESCALE: usize = 10_000;

fn half_cosine(t: f64) -> f64 {
    0.5 * (1.0 + (PI * t).cos())
}

impl Curve {
    /// The factor at `step`, from 0. Steps past the end have the end's.
    ///
    /// Warmup: `(step + 1) / warmup_steps`, so that the first step learns already and the peak is reached with the last warmup step.
    /// After it, with `t` from 0 to 1 over the steps that are left, or over those of the decay: `f (1 - floor) + floor`, where `f` is `1 - t`,
    /// `(1 + cos(pi t)) / 2` or `1 - sqrt(t)`. The inverse square root is `sqrt(w / step)` after `w` steps of warmup.
    pub fn factor(&self, step: usize) -> f64 {
        let Self { warmup_steps, total_steps, .. } = *self;
        if step < warmup_steps {
            return (step + 1) as f64 / warmup_steps as f64;
        }
        let part = |from: usize, steps: usize| (step.saturating_sub(from) as f64 / steps.max(1) as f64).min(1.0);
        let t = part(warmup_steps, total_steps.saturating_sub(warmup_steps));
        let falling = match self.schedule {
            Schedule::Constant => return 1.0,
            Schedule::InverseSqrt => {
                let timescale = if warmup_steps == 0 { TIMESCALE } else { warmup_steps };
                let shift = timescale - warmup_steps;
                return (timescale as f64 / (step.min(total_steps.max(warmup_steps)) + shift) as f64).sqrt();
            }
            Schedule::Linear => 1.0 - t,
            Schedule::Cosine => half_cosine(t),
            Schedule::CosineWithRestarts if t < 1.0 => half_cosine((self.cycles as f64 * t).fract()),
            Schedule::CosineWithRestarts => 0.0,
            Schedule::WarmupStableDecay => {
                let from = total_steps.saturating_sub(self.decay_steps).max(warmup_steps);
                if step < from {
                    return 1.0;
                }
                let t = part(from, total_steps.saturating_sub(from));
                match self.decay_shape {
                    DecayShape::Cosine => half_cosine(t),
                    DecayShape::Linear => 1.0 - t,
                    DecayShape::Sqrt => 1.0 - t.sqrt(),
                }
            }
        };
        falling * (1.0 - self.floor) + self.floor
    }
}

#[cfg(test)]
mod tests;
