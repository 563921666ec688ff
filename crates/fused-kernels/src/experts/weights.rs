//! The router's weights of a token's experts, and the gradient of its scores.
//!
//! With `p = softmax(scores)` the weights are `w_j = p_j` of the chosen experts, or `p_j / Σ p` over the chosen, which is the
//! softmax over them alone. With `s = Σ w_j dw_j` over the chosen, the gradient of score i is `w_i dw_i` if i is
//! chosen, less `p_i s`, where p is the softmax of the same experts. The choice itself has no gradient.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::{Places, Routing};
use crate::KernelError;
use crate::elementwise::{UNITS, buffer, cube_count};

/// Units of a cube of the forward kernel, where each has a token: few, so that all multiprocessors have some.
const TOKENS: usize = 32;

/// Writes the weights of each token's experts, the likeliest first.
///
/// # Shapes
/// `scores` is f32 `[tokens, experts]`, `weights` f32 `[tokens, per_token]`. With `normalise` a token's sum to 1.
///
/// # Errors
/// The variants about sizes when a buffer does not hold its shape.
pub fn weights(
    client: &Client,
    scores: &Handle,
    words: &Handle,
    weights: &Handle,
    routing: &Routing,
    normalise: bool,
) -> Result<(), KernelError> {
    let scores = buffer("scores", scores, routing.tokens * routing.experts, 4, 1)?;
    let weights = buffer("weights", weights, routing.rows(), 4, 1)?;
    let words = routing.words_argument(words)?;
    if routing.tokens == 0 {
        return Ok(());
    }
    let cubes = cube_count(client, routing.tokens.div_ceil(TOKENS));
    let dim = CubeDim::new_1d(TOKENS as u32);
    // SAFETY: the buffers' sizes are checked, and what the words name is within them.
    unsafe {
        forward_kernel::launch_unchecked(client, cubes, dim, scores, words, weights, routing.launch(), normalise);
    }
    Ok(())
}

/// Buffers of [`weight_gradient`] beside the words.
#[derive(Clone, Copy, Debug)]
pub struct WeightGradient<'a> {
    /// f32 `[tokens, per_token]`: the gradient of the weights.
    pub dweights: &'a Handle,
    /// As [`weights`] left them.
    pub weights: &'a Handle,
    /// As [`weights`] had them.
    pub scores: &'a Handle,
    /// f32 `[tokens, experts]`, which this writes.
    pub dscores: &'a Handle,
}

/// Writes the gradient of the scores.
///
/// # Errors
/// As [`weights`].
pub fn weight_gradient(
    client: &Client,
    buffers: WeightGradient<'_>,
    words: &Handle,
    routing: &Routing,
    normalise: bool,
) -> Result<(), KernelError> {
    let all = routing.tokens * routing.experts;
    let dweights = buffer("dweights", buffers.dweights, routing.rows(), 4, 1)?;
    let weights = buffer("weights", buffers.weights, routing.rows(), 4, 1)?;
    let scores = buffer("scores", buffers.scores, all, 4, 1)?;
    let dscores = buffer("dscores", buffers.dscores, all, 4, 1)?;
    let words = routing.words_argument(words)?;
    if routing.tokens == 0 {
        return Ok(());
    }
    let (cubes, dim) = (cube_count(client, all.div_ceil(UNITS)), CubeDim::new_1d(UNITS as u32));
    let places = routing.launch();
    // SAFETY: as in `weights`.
    unsafe {
        backward_kernel::launch_unchecked(
            client, cubes, dim, dweights, weights, scores, words, dscores, places, normalise,
        );
    }
    Ok(())
}

/// A token a unit.
#[cube(launch_unchecked)]
fn forward_kernel(scores: &[f32], words: &[u32], weights: &mut [f32], places: &Places, #[comptime] normalise: bool) {
    let (experts, per_token) = (comptime!(places.experts), comptime!(places.per_token));
    let token = ABSOLUTE_POS;
    if token < places.tokens {
        let of_token = token * experts;
        let first = token * per_token;
        // The largest, so that no exponential exceeds 1.
        let largest = scores[of_token + words[first] as usize];
        let mut sum = 0.0f32;
        if normalise {
            for place in 0..per_token {
                sum += (scores[of_token + words[first + place] as usize] - largest).exp();
            }
        } else {
            for expert in 0..experts {
                sum += (scores[of_token + expert] - largest).exp();
            }
        }
        for place in 0..per_token {
            weights[first + place] = (scores[of_token + words[first + place] as usize] - largest).exp() / sum;
        }
    }
}

/// A score a unit.
#[cube(launch_unchecked)]
fn backward_kernel(
    dweights: &[f32],
    weights: &[f32],
    scores: &[f32],
    words: &[u32],
    dscores: &mut [f32],
    places: &Places,
    #[comptime] normalise: bool,
) {
    let (experts, per_token) = (comptime!(places.experts), comptime!(places.per_token));
    let position = ABSOLUTE_POS;
    let token = position / experts;
    if token < places.tokens {
        let (expert, first) = ((position % experts) as u32, token * per_token);
        let mut sum = 0.0f32;
        let mut own = 0.0f32;
        let mut share = 0.0f32;
        for place in 0..per_token {
            let weight = weights[first + place];
            let product = weight * dweights[first + place];
            sum += product;
            if words[first + place] == expert {
                own = product;
                share = weight;
            }
        }
        if !normalise {
            // The token's first weight is that of its largest score.
            let largest = scores[token * experts + words[first] as usize];
            share = weights[first] * (scores[position] - largest).exp();
        }
        dscores[position] = own - share * sum;
    }
}
