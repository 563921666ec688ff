//! Element-wise loops of the CPU implementation, with an exponential that runs in vectors.

use super::Activation;
use crate::ops::exponential::exponential;
use crate::ops::vectors::{LANES, Lanes, for_processor, largest};
use nf4_quant::Element;

/// Elements of a row that are widened at a time.
const PART: usize = 256;

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    let e = exponential(-x.abs());
    (if x < 0.0 { e } else { 1.0 }) / (1.0 + e)
}

#[inline(always)]
fn gated_body<T: Element>(activation: Activation, gate: &[T], up: &[T], y: &mut [T]) {
    if activation != Activation::Silu {
        for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
            *y = T::from_f32(activation.value(gate.to_f32()) * activation.factor(up.to_f32()));
        }
        return;
    }
    for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
        let x = gate.to_f32();
        *y = T::from_f32(x * sigmoid(x) * up.to_f32());
    }
}

for_processor! {
    /// `activation(gate) · up`.
    pub(super) fn gated<T: Element>(activation: Activation, gate: &[T], up: &[T], y: &mut [T]) = gated_body
}

#[inline(always)]
fn gated_grads_body<T: Element>(activation: Activation, [dy, gate, up]: [&[T]; 3], [dgate, dup]: [&mut [T]; 2]) {
    let read = dy.iter().zip(gate).zip(up);
    let each = dgate.iter_mut().zip(dup).zip(read);
    if activation != Activation::Silu {
        for ((dgate, dup), ((dy, gate), up)) in each {
            let (x, dy) = (gate.to_f32(), dy.to_f32());
            let up = up.to_f32();
            *dgate = T::from_f32(dy * activation.factor(up) * activation.slope(x));
            *dup = T::from_f32(dy * activation.value(x) * activation.factor_slope(up));
        }
        return;
    }
    for ((dgate, dup), ((dy, gate), up)) in each {
        let (x, dy) = (gate.to_f32(), dy.to_f32());
        let sigmoid = sigmoid(x);
        *dgate = T::from_f32(dy * up.to_f32() * (sigmoid * (1.0 + x * (1.0 - sigmoid))));
        *dup = T::from_f32(dy * (x * sigmoid));
    }
}

for_processor! {
    /// The gradients of gate and up, from those of [`gated`]'s result.
    pub(super) fn gated_grads<T: Element>(
        activation: Activation,
        read: [&[T]; 3],
        written: [&mut [T]; 2],
    ) = gated_grads_body
}

#[inline(always)]
fn log_sum_exp_body<T: Element>(row: &[T]) -> f32 {
    let mut wide = [0.0; PART];
    let mut top = f32::NEG_INFINITY;
    for part in row.chunks(PART) {
        let wide = &mut wide[..part.len()];
        T::widen(part, wide);
        top = largest(top, wide);
    }
    // One running sum of a whole vocabulary in f32 would lose three digits.
    let mut sum = 0.0_f64;
    for part in row.chunks(PART) {
        let wide = &mut wide[..part.len()];
        T::widen(part, wide);
        wide.iter_mut().for_each(|value| *value = exponential(*value - top));
        let mut lanes: Lanes = [0.0; LANES];
        let (whole, rest) = wide.as_chunks::<LANES>();
        for values in whole {
            for i in 0..LANES {
                lanes[i] += values[i];
            }
        }
        sum += lanes.iter().chain(rest).map(|value| f64::from(*value)).sum::<f64>();
    }
    top + sum.ln() as f32
}

for_processor! {
    /// `log Σ exp(row)`.
    pub(super) fn log_sum_exp<T: Element>(row: &[T]) -> f32 = log_sum_exp_body
}

#[inline(always)]
fn logit_grads_body<T: Element>(row: &mut [T], target: usize, dloss: f32, whole: f32) {
    let hit = dloss * (exponential(row[target].to_f32() - whole) - 1.0);
    for value in &mut *row {
        *value = T::from_f32(dloss * exponential(value.to_f32() - whole));
    }
    row[target] = T::from_f32(hit);
}

for_processor! {
    /// The gradient of a row's logits, in their place: `dloss · (softmax(row) - 1 at the target)`, with the row's
    /// log-sum-exp.
    pub(super) fn logit_grads<T: Element>(row: &mut [T], target: usize, dloss: f32, whole: f32) = logit_grads_body
}
