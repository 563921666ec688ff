//! The CPU implementation: composed, on Flex's parallel products; what lies between them is one pass over the scores, on all
//! threads, that leaves out keys out of sight.

use super::composed::Sight;
use super::{AttentionOps, AttentionOptions, AttentionPasses, Operands, ScoreGradients, composed};
use crate::ops::exponential::exponential;
use crate::ops::vectors::{LANES, for_processor, joined, largest};
use burn::backend::Flex;
use burn::backend::tensor::FloatTensor;
use burn::tensor::TensorData;
use burn_flex::FlexTensor;
use rayon::prelude::*;

#[inline(always)]
fn softmax_of_body(scores: &mut [f32], scale: f32, sink: f32) -> f32 {
    scores.iter_mut().for_each(|score| *score *= scale);
    let most = largest(sink, scores);
    let mut lanes = [0.0; LANES];
    let (whole, rest) = scores.as_chunks_mut::<LANES>();
    for scores in whole {
        for i in 0..LANES {
            scores[i] = exponential(scores[i] - most);
            lanes[i] += scores[i];
        }
    }
    let mut sum = joined(&lanes);
    for score in rest {
        *score = exponential(*score - most);
        sum += *score;
    }
    sum += exponential(sink - most);
    scores.iter_mut().for_each(|weight| *weight /= sum);
    most + sum.ln()
}

for_processor! {
    /// Scores become their softmax, in which a sink joins; the result is their log-sum-exp. Minus infinity is no sink.
    fn softmax_of(scores: &mut [f32], scale: f32, sink: f32) -> f32 = softmax_of_body
}

#[inline(always)]
fn gradients_of_body(scores: &mut [f32], gradients: &mut [f32], scale: f32, lse: f32, delta: f32) {
    for (score, gradient) in scores.iter_mut().zip(gradients) {
        *score = exponential(*score * scale - lse);
        *gradient = *score * (*gradient - delta);
    }
}

for_processor! {
    /// Scores become their softmax, and the softmax's gradients those of the scores.
    fn gradients_of(scores: &mut [f32], gradients: &mut [f32], scale: f32, lse: f32, delta: f32) = gradients_of_body
}

/// Zeros where a query does not look, and the rest.
fn in_sight(values: &mut [f32], sight: Sight, row: usize) -> &mut [f32] {
    let seen = sight.of(row % sight.queries);
    values[..seen.start].fill(0.0);
    values[seen.end..].fill(0.0);
    &mut values[seen]
}

impl AttentionPasses for Flex {
    fn seen_softmax(
        products: FloatTensor<Self>,
        sight: Sight,
        options: &AttentionOptions,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let scores = options.scores;
        if scores.softcap.is_some() {
            return composed::softmax::<Self>(products, sight, options);
        }
        let mut weights = products.to_contiguous();
        drop(products);
        let mut shape = weights.layout().shape().to_vec();
        let rows = weights.storage_mut::<f32>().par_chunks_mut(sight.keys.max(1)).enumerate();
        // Rows go by batch, head of its group and query: all heads of a batch's row follow one another.
        let sink = |row: usize| options.sinks().map(|sinks| sinks[row / sight.queries % sinks.len()]);
        let softmax = |(row, values): (usize, &mut [f32])| {
            softmax_of(in_sight(values, sight, row), scores.scale, sink(row).unwrap_or(f32::NEG_INFINITY))
        };
        let lse: Vec<f32> = rows.map(softmax).collect();
        shape[3] = 1;
        (weights, FlexTensor::from_data(TensorData::new(lse, shape)))
    }

    fn seen_softmax_gradients(
        parts: ScoreGradients<FloatTensor<Self>>,
        sight: Sight,
        options: &AttentionOptions,
    ) -> [FloatTensor<Self>; 2] {
        let scores = options.scores;
        if scores.softcap.is_some() {
            return composed::softmax_gradients::<Self>(parts, sight, options);
        }
        let (mut weights, mut gradients) = (parts.products.to_contiguous(), parts.d_weights.to_contiguous());
        let (lse, delta) = (parts.lse.to_contiguous(), parts.delta.to_contiguous());
        drop((parts.products, parts.d_weights));
        let width = sight.keys.max(1);
        let written = weights.storage_mut::<f32>().par_chunks_mut(width);
        let written = written.zip(gradients.storage_mut::<f32>().par_chunks_mut(width));
        let read = lse.storage::<f32>().par_iter().zip(delta.storage::<f32>());
        written.zip(read).enumerate().for_each(|(row, ((weights, gradients), (lse, delta)))| {
            let (weights, gradients) = (in_sight(weights, sight, row), in_sight(gradients, sight, row));
            gradients_of(weights, gradients, scores.scale, *lse, *delta);
        });
        [weights, gradients]
    }
}

impl AttentionOps for Flex {
    fn attention_keeping(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        options: AttentionOptions,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        Self::attention_forward(Operands { q, k, v }, &options)
    }
}
