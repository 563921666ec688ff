//! Learning rates and weight decay by kind of parameter, and the schedule over a run.
//!
//! The rates by kind are those of PEFT's `create_loraplus_optimizer` (Hayou et al. 2024, arXiv 2402.12354): `lora_b` and vectors learn
//! at a multiple of the rate, embeddings at a rate of their own. Where that is not given, embeddings learn at the base rate; PEFT's default
//! there is 1e-6.

use qlora_models::ParameterKind;
use serde::{Deserialize, Serialize};

use super::{Curve, DecayShape, RunConfig};

/// Weight decay by kind of parameter; what is not set is `weight_decay`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WeightDecayOf {
    /// The factors that read a layer's input.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_a: Option<f64>,
    /// The factors that write its output.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_b: Option<f64>,
    /// Embedding and output head, however they are trained, but for `lora_a` and `lora_b` of the head.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embeddings: Option<f64>,
    /// Weights of other layers in `modules_to_save`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub matrices: Option<f64>,
    /// Weights of norms, biases, DoRA's magnitudes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vectors: Option<f64>,
}

impl WeightDecayOf {
    /// What is set for a kind.
    pub fn get(&self, kind: ParameterKind) -> Option<f64> {
        match kind {
            ParameterKind::LoraA => self.lora_a,
            ParameterKind::LoraB => self.lora_b,
            ParameterKind::Embedding => self.embeddings,
            ParameterKind::Matrix => self.matrices,
            ParameterKind::Vector => self.vectors,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl DecayShape {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// How a parameter is updated beside others.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ParameterRates {
    /// The multiple of the step's learning rate that it learns at.
    pub learning_rate_factor: f64,
    /// Decoupled weight decay per unit of its own learning rate.
    pub weight_decay: f64,
}

/// The name of a kind in `weight_decay_of`.
fn name(kind: ParameterKind) -> &'static str {
    match kind {
        ParameterKind::LoraA => "lora_a",
        ParameterKind::LoraB => "lora_b",
        ParameterKind::Embedding => "embeddings",
        ParameterKind::Matrix => "matrices",
        ParameterKind::Vector => "vectors",
    }
}

impl RunConfig {
    /// The schedule over a run of `total_steps`.
    pub fn curve(&self, total_steps: usize) -> Curve {
        Curve {
            schedule: self.schedule,
            warmup_steps: self.warmup_steps_of(total_steps),
            total_steps,
            floor: self.min_learning_rate_ratio,
            decay_steps: (self.decay_ratio * total_steps as f64).ceil() as usize,
            decay_shape: self.decay_shape,
            cycles: self.cycles,
        }
    }

    /// How parameters of a kind are updated.
    pub fn rates_of(&self, kind: ParameterKind) -> ParameterRates {
        let learning_rate_factor = match (kind, self.embedding_learning_rate) {
            (ParameterKind::LoraB | ParameterKind::Vector, _) => self.lora_plus_ratio,
            (ParameterKind::Embedding, Some(rate)) => rate / self.learning_rate,
            _ => 1.0,
        };
        let weight_decay = self.weight_decay_of.get(kind).unwrap_or(self.weight_decay);
        ParameterRates { learning_rate_factor, weight_decay }
    }

    /// What a user should know of settings for kinds of which a model trains no parameter.
    pub(crate) fn without_effect(&self, kinds: &[ParameterKind]) -> Vec<String> {
        let missing = |kind: &ParameterKind| !kinds.contains(kind);
        let decays = ParameterKind::ALL.into_iter().filter(missing);
        let decays = decays.filter(|kind| self.weight_decay_of.get(*kind).is_some());
        let mut found: Vec<String> = decays.map(|kind| format!("train.weight_decay_of.{}", name(kind))).collect();
        if self.embedding_learning_rate.is_some() && missing(&ParameterKind::Embedding) {
            found.push("train.embedding_learning_rate".into());
        }
        let words =
            |key: String| format!("{key} does nothing: lora trains no such parameter (see lora.modules_to_save)");
        found.into_iter().map(words).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use std::collections::BTreeMap;

    /// What `testdata/make_lora_plus.py` writes.
    #[derive(Deserialize)]
    struct Recorded {
        learning_rate: f64,
        lora_plus_ratio: f64,
        embedding_learning_rate: f64,
        weight_decay: f64,
        /// Learning rate and weight decay by the name that PEFT has for the parameter.
        parameters: BTreeMap<String, [f64; 2]>,
    }

    #[test]
    fn rates_are_those_of_pefts_lora_plus() {
        let recorded: Recorded =
            serde_json::from_str(include_str!("../../../../testdata/reference/lora_plus.json")).unwrap();
        let run = RunConfig {
            learning_rate: recorded.learning_rate,
            lora_plus_ratio: recorded.lora_plus_ratio,
            embedding_learning_rate: Some(recorded.embedding_learning_rate),
            weight_decay: recorded.weight_decay,
            ..RunConfig::default()
        };
        let mut seen = Vec::new();
        for (name, [learning_rate, weight_decay]) in recorded.parameters {
            let kind = match &name {
                name if name.contains("lora_embedding_") => ParameterKind::Embedding,
                name if name.contains("lora_A") => ParameterKind::LoraA,
                name if name.contains("lora_B") => ParameterKind::LoraB,
                name if name.contains("magnitude") || name.contains("norm") => ParameterKind::Vector,
                _ => ParameterKind::Matrix,
            };
            seen.push(kind);
            let found = run.rates_of(kind);
            // A product of two numbers against the same product.
            let rate = run.learning_rate * found.learning_rate_factor;
            assert!((rate / learning_rate - 1.0).abs() < 1e-14, "{name}: {rate} against {learning_rate}");
            assert_eq!(found.weight_decay, weight_decay, "{name}");
        }
        assert!(ParameterKind::ALL.iter().all(|kind| seen.contains(kind)), "{seen:?}");
    }

    #[test]
    fn a_setting_for_what_is_not_trained_is_told() {
        let run = RunConfig {
            embedding_learning_rate: Some(1e-5),
            weight_decay_of: WeightDecayOf { vectors: Some(0.0), lora_a: Some(0.1), ..WeightDecayOf::default() },
            ..RunConfig::default()
        };
        let told = run.without_effect(&[ParameterKind::LoraA, ParameterKind::LoraB]);
        assert!(told[0].starts_with("train.weight_decay_of.vectors does nothing"), "{told:?}");
        assert!(told[1].starts_with("train.embedding_learning_rate does nothing"), "{told:?}");
        assert_eq!(told.len(), 2);
        assert!(run.without_effect(&ParameterKind::ALL).is_empty());
        assert_eq!(run.rates_of(ParameterKind::LoraA).weight_decay, 0.1);
        assert_eq!(run.rates_of(ParameterKind::LoraB).weight_decay, 0.0);
    }
}
