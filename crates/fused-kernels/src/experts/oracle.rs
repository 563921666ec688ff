//! The scalar oracle, in f64.

use super::Routing;
use crate::gated::{self, Activation};
use crate::low_rank::FactorLayout;

/// The words of a routing: see the module above.
///
/// # Shapes
/// `scores` is `[tokens, experts]`.
pub fn route(scores: &[f32], routing: &Routing) -> Vec<u32> {
    let (experts, per_token) = (routing.experts, routing.per_token);
    let mut words = vec![0; routing.words()];
    let mut groups = vec![Vec::new(); experts];
    for token in 0..routing.tokens {
        let scores = &scores[token * experts..][..experts];
        let mut order: Vec<usize> = (0..experts).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        for (place, &expert) in order[..per_token].iter().enumerate() {
            let entry = token * per_token + place;
            words[entry] = expert as u32;
            groups[expert].push(entry as u32);
        }
    }
    let (mut row, mut tile) = (0, 0);
    for (expert, group) in groups.iter().enumerate() {
        words[routing.offsets().start + expert] = row;
        let end = row + group.len() as u32;
        for first in (row..end).step_by(routing.tile_rows) {
            let at = routing.tiles().start + 3 * tile;
            words[at..at + 3].copy_from_slice(&[expert as u32, first, end.min(first + routing.tile_rows as u32)]);
            tile += 1;
        }
        for entry in group {
            words[routing.slots().start + *entry as usize] = row;
            words[routing.entries().start + row as usize] = *entry;
            row += 1;
        }
    }
    words[routing.offsets().end - 1] = row;
    words
}

/// The weights of each token's experts.
pub fn weights(scores: &[f64], words: &[u32], routing: &Routing, normalise: bool) -> Vec<f64> {
    let chosen = &words[routing.chosen()];
    let of_token = |token: usize| {
        let scores = &scores[token * routing.experts..][..routing.experts];
        let chosen = &chosen[token * routing.per_token..][..routing.per_token];
        let largest = scores.iter().copied().fold(f64::MIN, f64::max);
        let power = |score: f64| (score - largest).exp();
        let sum: f64 = match normalise {
            true => chosen.iter().map(|expert| power(scores[*expert as usize])).sum(),
            false => scores.iter().map(|score| power(*score)).sum(),
        };
        chosen.iter().map(|expert| power(scores[*expert as usize]) / sum).collect::<Vec<f64>>()
    };
    (0..routing.tokens).flat_map(of_token).collect()
}

/// The gradient of the scores by the chain rule: of each weight in each score.
pub fn weight_gradient(
    dweights: &[f64],
    scores: &[f64],
    words: &[u32],
    routing: &Routing,
    normalise: bool,
) -> Vec<f64> {
    let weights = weights(scores, words, routing, normalise);
    let (experts, per_token) = (routing.experts, routing.per_token);
    let mut dscores = vec![0.0; scores.len()];
    for token in 0..routing.tokens {
        let scores = &scores[token * experts..][..experts];
        let sum: f64 = scores.iter().map(|score| score.exp()).sum();
        let chosen = &words[token * per_token..][..per_token];
        for expert in 0..experts {
            let place = chosen.iter().position(|other| *other as usize == expert);
            let share = match normalise {
                true => place.map_or(0.0, |place| weights[token * per_token + place]),
                false => scores[expert].exp() / sum,
            };
            for (other, weight) in weights[token * per_token..][..per_token].iter().enumerate() {
                let own = f64::from(u8::from(place == Some(other)));
                dscores[token * experts + expert] += dweights[token * per_token + other] * weight * (own - share);
            }
        }
    }
    dscores
}

/// The rows of all experts.
pub fn gather(x: &[f64], words: &[u32], routing: &Routing, width: usize) -> Vec<f64> {
    let token = |entry: &u32| *entry as usize / routing.per_token;
    words[routing.entries()].iter().flat_map(|entry| x[token(entry) * width..][..width].to_vec()).collect()
}

/// The biases of all rows, `[rows, width]`, out of those of all experts.
pub fn biases(bias: &[f64], words: &[u32], routing: &Routing, width: usize) -> Vec<f64> {
    let expert = |entry: &u32| words[*entry as usize] as usize;
    words[routing.entries()].iter().flat_map(|entry| bias[expert(entry) * width..][..width].to_vec()).collect()
}

/// Each token's sum of its rows.
pub fn combine(rows: &[f64], weights: Option<&[f64]>, words: &[u32], routing: &Routing, width: usize) -> Vec<f64> {
    let mut out = vec![0.0; routing.tokens * width];
    for (entry, slot) in words[routing.slots()].iter().enumerate() {
        let row = &rows[*slot as usize * width..][..width];
        let weight = weights.map_or(1.0, |weights| weights[entry]);
        let token = &mut out[entry / routing.per_token * width..][..width];
        token.iter_mut().zip(row).for_each(|(sum, value)| *sum += weight * value);
    }
    out
}

/// Gradients of gate and up, the activation's result, and the gradient of the weights.
#[expect(clippy::too_many_arguments, reason = "as many as the kernel's")]
pub fn gated_backward(
    dy: &[f64],
    gate: &[f64],
    up: &[f64],
    weights: &[f64],
    words: &[u32],
    routing: &Routing,
    width: usize,
    activation: Activation,
) -> [Vec<f64>; 4] {
    let [mut dgate, mut dup, mut result] = [(); 3].map(|()| Vec::new());
    let mut dweights = vec![0.0; routing.rows()];
    for (row, entry) in words[routing.entries()].iter().enumerate() {
        let entry = *entry as usize;
        for i in row * width..(row + 1) * width {
            let h = gated::oracle::forward(gate[i], up[i], activation);
            let (dg, du) = gated::oracle::backward(weights[entry] * dy[i], gate[i], up[i], activation);
            dgate.push(dg);
            dup.push(du);
            result.push(h);
            dweights[entry] += dy[i] * h;
        }
    }
    [dgate, dup, result, dweights]
}

/// The gradients of a factor of all experts.
pub fn gradient(
    x: &[f64],
    product: &[f64],
    weights: Option<&[f64]>,
    words: &[u32],
    routing: &Routing,
    [features, rank]: [usize; 2],
    layout: FactorLayout,
) -> Vec<f64> {
    let mut out = vec![0.0; routing.experts * features * rank];
    let offsets = &words[routing.offsets()];
    for expert in 0..routing.experts {
        let out = &mut out[expert * features * rank..][..features * rank];
        for row in offsets[expert] as usize..offsets[expert + 1] as usize {
            let weight = weights.map_or(1.0, |weights| weights[words[routing.entries().start + row] as usize]);
            for k in 0..rank {
                for feature in 0..features {
                    let at = match layout {
                        FactorLayout::RankFirst => k * features + feature,
                        FactorLayout::FeaturesFirst => feature * rank + k,
                    };
                    out[at] += weight * product[row * rank + k] * x[row * features + feature];
                }
            }
        }
    }
    out
}
