//! One query and the positions of a tile.
//!
//! Inner loops run over the elements of a head or the positions of a tile.

use crate::ops::exponential::exponential;
use crate::ops::vectors::{LANES, Lanes, for_processor, joined, largest};
use fused_kernels::attention::Options;

/// Positions of a tile.
pub(super) const TILE: usize = 64;

/// Softmax of one query so far: its largest score, and the sums relative to it.
pub(super) struct Running<'a> {
    pub(super) peak: &'a mut f32,
    pub(super) sum: &'a mut f32,
    pub(super) values: &'a mut [f32],
}

#[inline(always)]
fn sum_of(values: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    for values in values.chunks(LANES) {
        lanes.iter_mut().zip(values).for_each(|(lane, value)| *lane += value);
    }
    joined(&lanes)
}

/// Dot products of a query with keys. Their lanes go through memory: joined at once, the compiler would see a tree of scalars and
/// make no vectors of it.
#[inline(always)]
fn dots(q: &[f32], keys: &[&[f32]], scores: &mut [f32]) {
    let mut lanes = [[0.0_f32; LANES]; TILE];
    let (whole, rest) = q.as_chunks::<LANES>();
    for (lanes, key) in lanes.iter_mut().zip(keys) {
        let mut sums = [0.0_f32; LANES];
        for (q, key) in whole.iter().zip(key.as_chunks::<LANES>().0) {
            for i in 0..LANES {
                sums[i] += q[i] * key[i];
            }
        }
        *lanes = sums;
    }
    for ((score, lanes), key) in scores.iter_mut().zip(&lanes).zip(keys) {
        *score = joined(lanes);
        if !rest.is_empty() {
            *score += rest.iter().zip(key.as_chunks::<LANES>().1).map(|(q, key)| q * key).sum::<f32>();
        }
    }
}

/// `sums + weight * values`.
#[inline(always)]
fn plus(mut sums: Lanes, weight: f32, values: &Lanes) -> Lanes {
    for i in 0..LANES {
        sums[i] += weight * values[i];
    }
    sums
}

/// Adds values times weights, position by position.
#[inline(always)]
fn add_weighted(to: &mut [f32], weights: &[f32], values: &[&[f32]]) {
    let (whole, rest) = to.as_chunks_mut::<LANES>();
    let (fours, ones) = whole.as_chunks_mut::<4>();
    // Four at a time, since each sum waits for the one before it.
    for (four, to) in fours.iter_mut().enumerate() {
        let [mut a, mut b, mut c, mut d] = *to;
        for (weight, values) in weights.iter().zip(values) {
            let values = &values.as_chunks::<LANES>().0.as_chunks::<4>().0[four];
            a = plus(a, *weight, &values[0]);
            b = plus(b, *weight, &values[1]);
            c = plus(c, *weight, &values[2]);
            d = plus(d, *weight, &values[3]);
        }
        *to = [a, b, c, d];
    }
    for (one, to) in ones.iter_mut().enumerate() {
        let mut sums = *to;
        for (weight, values) in weights.iter().zip(values) {
            sums = plus(sums, *weight, &values.as_chunks::<LANES>().0[4 * fours.len() + one]);
        }
        *to = sums;
    }
    if !rest.is_empty() {
        for (weight, values) in weights.iter().zip(values) {
            rest.iter_mut().zip(values.as_chunks::<LANES>().1).for_each(|(to, value)| *to += weight * value);
        }
    }
}

/// Takes the positions of a tile that a query sees, in order, into its running softmax.
#[inline(always)]
fn take_tile_body(q: &[f32], keys: &[&[f32]], values: &[&[f32]], options: Options, running: Running<'_>) {
    let mut scores = [0.0_f32; TILE];
    let scores = &mut scores[..keys.len()];
    dots(q, keys, scores);
    scores.iter_mut().for_each(|score| *score *= options.scale);
    if let Some(cap) = options.softcap {
        scores.iter_mut().for_each(|score| *score = cap * (*score / cap).tanh());
    }
    let most = largest(*running.peak, scores);
    // 0 at first, when the peak is minus infinity.
    let factor = exponential(*running.peak - most);
    scores.iter_mut().for_each(|score| *score = exponential(*score - most));
    *running.sum = *running.sum * factor + sum_of(scores);
    *running.peak = most;
    running.values.iter_mut().for_each(|value| *value *= factor);
    add_weighted(running.values, scores, values);
}
for_processor! {
    /// [`take_tile_body`], in the widest vectors that the processor has.
    pub(super) fn take_tile(q: &[f32], keys: &[&[f32]], values: &[&[f32]], options: Options, running: Running<'_>) = take_tile_body
}
