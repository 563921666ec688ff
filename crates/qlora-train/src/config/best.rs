//! Which evaluation is the best one, and what follows from it.

use serde::{Deserialize, Serialize};

use crate::checkpoint::Evaluations;
use crate::metrics::EvalMetrics;

/// By what evaluations are compared, so that the best one's checkpoint is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeepBest {
    /// Not at all; early stopping then goes by the loss.
    #[default]
    Off,
    /// The lowest evaluation loss.
    Loss,
    /// The highest part of tokens that are predicted right; of pairs whose preferred answer has the higher reward, where answers are compared.
    Accuracy,
    /// The largest difference between rewards of preferred answers and of others.
    Margin,
}

impl KeepBest {
    /// Whether a checkpoint is kept.
    pub fn is_on(self) -> bool {
        self != Self::Off
    }

    /// The value that counts.
    pub fn value(self, metrics: &EvalMetrics) -> f64 {
        match self {
            Self::Off | Self::Loss => metrics.eval_loss,
            Self::Accuracy => {
                let of_pairs = metrics.preference.and_then(|figures| figures.rewards_accuracy);
                metrics.eval_accuracy.or(of_pairs).unwrap_or(f64::NAN)
            }
            Self::Margin => metrics.preference.and_then(|figures| figures.rewards_margin).unwrap_or(f64::NAN),
        }
    }

    /// By how much `value` is better than `best`.
    fn gain(self, value: f64, best: f64) -> f64 {
        match self {
            Self::Off | Self::Loss => best - value,
            Self::Accuracy | Self::Margin => value - best,
        }
    }
}

/// Which adapter a finished run leaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinalAdapter {
    /// That of the last step.
    #[default]
    Last,
    /// That of the best evaluation.
    Best,
}

impl Evaluations {
    /// Takes a further evaluation in, made after `step` steps. Returns whether it is the best so far, and the new state.
    ///
    /// Early stopping starts to count again only where the gain is above `threshold`.
    pub(crate) fn next(self, step: usize, value: f64, by: KeepBest, threshold: f64) -> (bool, Self) {
        // What is not a number is never better.
        let gain = self.best.map_or(f64::INFINITY, |(_, best)| by.gain(value, best));
        let is_best = !value.is_nan() && gain > 0.0;
        let enough = !value.is_nan() && gain > threshold;
        let best = if is_best { Some((step, value)) } else { self.best };
        let since_best = if enough { 0 } else { self.since_best + 1 };
        (is_best, Self { best, since_best })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_gains_are_kept_but_do_not_put_the_end_off() {
        let follow = |by, threshold, values: &[f64]| {
            values
                .iter()
                .enumerate()
                .fold(Evaluations::default(), |state, (step, value)| state.next(step, *value, by, threshold).1)
        };
        let state = follow(KeepBest::Loss, 0.1, &[2.0, 1.5, 1.45, 1.44, f64::NAN]);
        assert_eq!(state, Evaluations { best: Some((3, 1.44)), since_best: 3 });
        let state = follow(KeepBest::Accuracy, 0.0, &[0.2, 0.4, 0.4, 0.3]);
        assert_eq!(state, Evaluations { best: Some((1, 0.4)), since_best: 2 });
        assert_eq!(follow(KeepBest::Off, 0.0, &[f64::NAN]), Evaluations { best: None, since_best: 1 });
    }
}
