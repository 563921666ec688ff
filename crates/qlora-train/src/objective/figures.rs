//! What is told of a step or an evaluation beside its loss.

use qlora_data::{Batch, Side};
use serde::{Deserialize, Serialize};

/// Numbers that a micro-batch sends beside its loss, sums over its answers: rewards of preferred answers and of others, pairs whose
/// preferred answer has the higher reward, log-probabilities of preferred answers and of others.
pub(crate) const FIGURES: usize = 5;

/// Means over answers. Rewards are b (log P - log P of the reference), and without a reference b log P, by token in `orpo` and `simpo`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PreferenceFigures {
    /// Of preferred answers; `None` where there were none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rewards_chosen: Option<f64>,
    /// Of the others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rewards_rejected: Option<f64>,
    /// The difference of both.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rewards_margin: Option<f64>,
    /// The part of pairs whose preferred answer has the higher reward; equal ones count half.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rewards_accuracy: Option<f64>,
    /// Log-probability of preferred answers, whole ones, in nats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_probs_chosen: Option<f64>,
    /// Of the others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_probs_rejected: Option<f64>,
    /// `kto`: how far the model is from its reference on answers that do not fit, at least 0, in nats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl: Option<f64>,
}

/// Answers of some micro-batches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub chosen: usize,
    pub rejected: usize,
    pub pairs: usize,
}

impl Counts {
    /// Those of micro-batches.
    pub fn of<'a>(batches: impl IntoIterator<Item = &'a Batch>) -> Self {
        let mut counts = Self::default();
        for judged in batches.into_iter().filter_map(|batch| batch.judged.as_ref()) {
            let chosen = judged.sides.iter().filter(|side| **side == Side::Chosen).count();
            counts.chosen += chosen;
            counts.rejected += judged.sides.len() - chosen;
            counts.pairs += judged.pairs();
        }
        counts
    }
}

impl PreferenceFigures {
    /// The means, from the [sums](FIGURES) over so many answers.
    pub(crate) fn new(sums: &[f64], counts: Counts, kl: Option<f64>) -> Self {
        let mean = |which: usize, count: usize| sums.get(which).filter(|_| count > 0).map(|sum| sum / count as f64);
        let (chosen, rejected) = (mean(0, counts.chosen), mean(1, counts.rejected));
        Self {
            rewards_chosen: chosen,
            rewards_rejected: rejected,
            rewards_margin: chosen.zip(rejected).map(|(chosen, rejected)| chosen - rejected),
            rewards_accuracy: mean(2, counts.pairs),
            log_probs_chosen: mean(3, counts.chosen),
            log_probs_rejected: mean(4, counts.rejected),
            kl,
        }
    }

    /// The figures that say most, in words: `92.5 % in order  margin 1.203`; empty where there are none.
    pub fn words(&self) -> String {
        let right = self.rewards_accuracy.map(|part| format!("{:.1} % in order", 100.0 * part));
        let margin = self.rewards_margin.map(|margin| format!("margin {margin:.3}"));
        let kl = self.kl.map(|kl| format!("KL {kl:.3}"));
        right.into_iter().chain(margin).chain(kl).collect::<Vec<_>>().join("  ")
    }

    /// The figures that are there, by what trackers call those of a step and of an evaluation.
    pub fn named(&self) -> impl Iterator<Item = ([&'static str; 2], f64)> {
        let all = [
            (["train/rewards_chosen", "eval/rewards_chosen"], self.rewards_chosen),
            (["train/rewards_rejected", "eval/rewards_rejected"], self.rewards_rejected),
            (["train/rewards_margin", "eval/rewards_margin"], self.rewards_margin),
            (["train/rewards_accuracy", "eval/rewards_accuracy"], self.rewards_accuracy),
            (["train/log_probs_chosen", "eval/log_probs_chosen"], self.log_probs_chosen),
            (["train/log_probs_rejected", "eval/log_probs_rejected"], self.log_probs_rejected),
            (["train/kl", "eval/kl"], self.kl),
        ];
        all.into_iter().filter_map(|(names, value)| Some((names, value?)))
    }
}
