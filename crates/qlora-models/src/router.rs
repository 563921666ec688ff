//! Routers whose scores are sigmoids (DeepSeek-AI, 2024, arXiv 2412.19437, section 2.1.2).
//!
//! `s = sigmoid(logits)`; the choice is by `s + correction`, among the experts of those groups whose two best sum up to most. The
//! weights of the chosen are `s`, divided by their sum where the model does so, times a factor. The correction balances experts while
//! a model is trained from scratch; it is frozen here, and no gradient flows through the choice.

use crate::config::GroupedScores;
use burn::tensor::activation::sigmoid;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use host_copies::persistent;

/// What the softmax of other routers is replaced by.
#[derive(Clone, Debug)]
pub(crate) struct SigmoidScores {
    /// f32 `[1, experts]`
    correction: Tensor<2>,
    config: GroupedScores,
    /// Whether the weights of a token's experts are divided by their sum.
    normalise: bool,
}

/// What transformers adds to a sum of weights before it divides by it.
const LEAST_SUM: f64 = 1e-20;

impl SigmoidScores {
    /// With a checkpoint's correction of each expert.
    pub fn new(config: GroupedScores, correction: Vec<f32>, normalise: bool, device: &Device) -> Self {
        let shape = [1, correction.len()];
        let correction = persistent(device, TensorData::new(correction, shape), |data| {
            Tensor::from_data(data, (device, DType::F32))
        });
        Self { correction, config, normalise }
    }

    /// What the choice goes by, without gradients: minus infinity for experts of other groups.
    ///
    /// # Shapes
    /// f32 `[tokens, experts]` in and out.
    pub fn for_choice(&self, logits: Tensor<2>) -> Tensor<2> {
        let scores = sigmoid(logits.detach()) + self.correction.clone();
        let GroupedScores { groups, groups_per_token, .. } = self.config;
        if groups_per_token == groups {
            return scores;
        }
        let [tokens, experts] = scores.dims();
        let size = experts / groups;
        let grouped = scores.reshape([tokens, groups, size]);
        let ahead_of = hidden_groups(two_best(grouped.clone()), groups_per_token);
        let hidden = ahead_of.reshape([tokens, groups, 1]).expand([tokens, groups, size]);
        grouped.mask_fill(hidden, f32::NEG_INFINITY).reshape([tokens, experts])
    }

    /// The weights of the chosen experts, `[tokens, per_token]`.
    ///
    /// # Shapes
    /// f32 `[tokens, experts]` and i32 `[tokens, per_token]`
    pub fn weights(&self, logits: Tensor<2>, chosen: Tensor<2, Int>) -> Tensor<2> {
        let weights = sigmoid(logits).gather(1, chosen);
        let weights = match self.normalise {
            true => weights.clone() / weights.sum_dim(1).add_scalar(LEAST_SUM),
            false => weights,
        };
        match self.config.factor {
            1.0 => weights,
            factor => weights.mul_scalar(factor),
        }
    }
}

/// The sum of the two largest of each group, `[tokens, groups]`.
fn two_best(grouped: Tensor<3>) -> Tensor<2> {
    let [tokens, groups, size] = grouped.dims();
    let (best, place) = grouped.clone().max_dim_with_indices(2);
    let places = Tensor::<1, Int>::arange(0..size as i64, &grouped.device()).cast(place.dtype());
    let is_best =
        places.reshape([1, 1, size]).expand([tokens, groups, size]).equal(place.expand([tokens, groups, size]));
    let second = grouped.mask_fill(is_best, f32::NEG_INFINITY).max_dim(2);
    (best + second).reshape([tokens, groups])
}

/// Whether so many groups or more are ahead of a group, those of equal sums in order: `[tokens, groups]`.
fn hidden_groups(sums: Tensor<2>, groups_per_token: usize) -> Tensor<2, burn::tensor::Bool> {
    let [tokens, groups] = sums.dims();
    let all = [tokens, groups, groups];
    let own = sums.clone().reshape([tokens, groups, 1]).expand(all);
    let other = sums.reshape([tokens, 1, groups]).expand(all);
    let numbers = Tensor::<1, Int>::arange(0..groups as i64, &own.device());
    let earlier =
        numbers.clone().reshape([1, 1, groups]).expand(all).lower(numbers.reshape([1, groups, 1]).expand(all));
    let ahead = other.clone().greater(own.clone()).bool_or(other.equal(own).bool_and(earlier));
    ahead.int().sum_dim(2).greater_equal_elem(groups_per_token as i64).reshape([tokens, groups])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn tensor(values: &[f32], shape: [usize; 2]) -> Tensor<2> {
        Tensor::from_data(TensorData::new(values.to_vec(), shape), (&Device::flex(), DType::F32))
    }

    /// Six experts in three groups: the last group has the best one, and the first two the better pairs.
    #[test]
    fn a_group_counts_by_its_two_best() {
        let config = GroupedScores { groups: 3, groups_per_token: 2, factor: 2.0 };
        let scores = SigmoidScores::new(config, vec![0.0, 0.0, 0.0, 0.0, 0.0, -9.0], true, &Device::flex());
        let logits = tensor(&[1.0, 1.0, 0.5, 0.5, 3.0, 3.0], [1, 6]);
        let choice = scores.for_choice(logits.clone()).try_into_vec_as::<f32>().unwrap();
        assert!(choice[..4].iter().all(|score| score.is_finite()), "{choice:?}");
        assert_eq!(choice[4..], [f32::NEG_INFINITY; 2]);
        // The correction is in the choice, and not in the weights.
        let chosen = Tensor::from_data(TensorData::new(vec![0i32, 5], [1, 2]), (&Device::flex(), DType::I32));
        let weights = scores.weights(logits, chosen).try_into_vec_as::<f32>().unwrap();
        let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
        let expected = [sigmoid(1.0), sigmoid(3.0)].map(|score| 2.0 * score / (sigmoid(1.0) + sigmoid(3.0)));
        for (weight, expected) in weights.iter().zip(expected) {
            // A few roundings of f32.
            assert!((weight - expected).abs() < 1e-6, "{weights:?}");
        }
    }

    #[test]
    fn of_equal_groups_the_first_are_taken() {
        let hidden = hidden_groups(tensor(&[1.0, 1.0, 1.0, 1.0, 0.0, 2.0, 1.0, 2.0], [2, 4]), 2);
        let hidden: Vec<bool> = hidden.into_data().iter::<bool>().collect();
        assert_eq!(hidden, [false, false, true, true, true, false, true, false]);
    }
}
