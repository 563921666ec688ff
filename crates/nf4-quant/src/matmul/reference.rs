//! The oracle of the product.

use super::{Direction, Problem};

/// The product in f64, from operands as f64 values: x `[tokens, depth]`, the weight
/// `[out_features, in_features]`, the low-rank operands (`[tokens, rank]` and as [`super::LowRank::factor`]) and a bias.
///
/// # Shapes
///
/// Returns `[tokens, features]`.
pub fn reference(
    problem: &Problem,
    x: &[f64],
    weight: &[f64],
    low_rank: Option<(&[f64], &[f64])>,
    bias: Option<&[f64]>,
) -> Vec<f64> {
    let (features, depth, rank) = (problem.features(), problem.depth(), problem.rank);
    let forward = problem.direction == Direction::Forward;
    let mut out = Vec::with_capacity(problem.tokens * features);
    for token in 0..problem.tokens {
        for feature in 0..features {
            let mut sum = bias.map_or(0.0, |bias| bias[feature]);
            for k in 0..depth {
                let at = if forward { feature * problem.in_features + k } else { k * problem.in_features + feature };
                sum += x[token * depth + k] * weight[at];
            }
            if let Some((product, factor)) = low_rank {
                for k in 0..rank {
                    let at = if forward { feature * rank + k } else { k * features + feature };
                    sum += product[token * rank + k] * factor[at];
                }
            }
            out.push(sum);
        }
    }
    out
}
