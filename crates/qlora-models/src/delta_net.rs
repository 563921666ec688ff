//! Linear attention with the gated delta rule (Yang et al., 2024, arXiv 2412.06464), between its projections.
//!
//! Queries, keys and values go through a short convolution; queries and keys have length 1, and queries the scale of attention.
//! The state of a head forgets at the rate `exp(-rate · softplus(a + dt_bias))` and is corrected with the strength
//! `sigmoid(b)`. What it gives is normalised for each head and gated by `silu(z)`.

use crate::config::LinearAttentionConfig;
use crate::norm::RmsNorm;
use crate::sequence::Sequence;
use crate::short_conv::{convolved, filter};
use burn::tensor::activation::sigmoid;
use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData};
use host_copies::persistent;
use qlora_layers::Pass;
use qlora_layers::ops::fused::{Activation, Conv, Norm, causal_conv, gated, reorder_columns, rms_norm};
use qlora_layers::ops::{DeltaRows, delta_rule, delta_rule_after};

/// Added to the square of a query's or key's length.
const LENGTH_EPS: f64 = 1e-6;

/// A block's linear attention without its projections and norm.
#[derive(Clone, Debug)]
pub(crate) struct DeltaNet {
    config: LinearAttentionConfig,
    /// f32 `[taps, channels]`.
    conv: Tensor<2>,
    /// Negative, f32 `[1, heads]`.
    rates: Tensor<2>,
    /// f32 `[1, heads]`.
    dt_bias: Tensor<2>,
    /// What queries and keys of mean square 1 are multiplied by, f32 `[key_dim]`.
    lengths: [Tensor<1>; 2],
    /// Where two projections give what four give otherwise, the order of each one's columns that brings queries, keys, values and
    /// gates of all heads together, and strengths and decays; and the inverses.
    orders: Option<[[Tensor<1, Int>; 2]; 2]>,
}

/// What a sequence leaves behind for its next token, in a block without keys and values.
#[derive(Clone, Debug)]
pub(crate) struct SequenceState {
    /// The last inputs of the convolution, `[taps - 1, channels]`.
    pub tail: Tensor<2>,
    /// f32 `[1, heads, key_dim, value_dim]`; none of a block that has no more than a convolution.
    pub state: Option<Tensor<4>>,
}

impl DeltaNet {
    /// Of a checkpoint's tensors, each as it holds them: the convolution's weight `[channels, 1, taps]`, and logarithms of
    /// rates and biases `[heads]`. `by_head` where projections hold one head of keys after the other.
    pub fn new(
        config: LinearAttentionConfig,
        by_head: bool,
        conv: &[f32],
        rates: &[f32],
        dt_bias: Vec<f32>,
        device: &Device,
    ) -> Self {
        let held = |values: Vec<f32>, shape: [usize; 2]| {
            persistent(device, TensorData::new(values, shape), |data| Tensor::from_data(data, (device, DType::F32)))
        };
        let length = |length: f64| {
            let row: Tensor<2> = held(vec![length as f32; config.key_dim], [1, config.key_dim]);
            row.reshape([config.key_dim])
        };
        // The norm divides by the root of the mean square, which is the length over the root of the width.
        let width = config.key_dim as f64;
        let group = config.value_heads / config.key_heads;
        let values = group * config.value_dim;
        let order = |widths: &[usize]| {
            let order = by_part(config.key_heads, widths);
            let mut inverse = vec![0; order.len()];
            (0..).zip(&order).for_each(|(place, column)| inverse[*column as usize] = place);
            [order, inverse].map(|order| {
                let len = order.len();
                persistent(device, TensorData::new(order, [len]), |data| Tensor::from_data(data, (device, DType::I32)))
            })
        };
        Self {
            config,
            conv: filter(conv, config.taps, device),
            rates: held(rates.iter().map(|rate| -rate.exp()).collect(), [1, config.value_heads]),
            dt_bias: held(dt_bias, [1, config.value_heads]),
            lengths: [length(1.0 / width), length(1.0 / width.sqrt())],
            orders: by_head.then(|| [order(&[config.key_dim, config.key_dim, values, values]), order(&[group; 2])]),
        }
    }

    /// Queries, keys and values, the gate, the strength and the decay, out of what the projections give.
    ///
    /// # Shapes
    /// `[tokens, channels]`, `[tokens, heads * value_dim]` and twice `[tokens, heads]`.
    pub fn split(&self, outputs: Vec<Tensor<2>>) -> [Tensor<2>; 4] {
        let Some(orders) = &self.orders else {
            return outputs.try_into().unwrap_or_else(|_| panic!("linear attention has four projections"));
        };
        let LinearAttentionConfig { value_heads, value_dim, .. } = self.config;
        let widths = [[self.config.channels(), value_heads * value_dim], [value_heads; 2]];
        let mut parts =
            outputs.into_iter().zip(orders).zip(widths).flat_map(|((x, [order, inverse]), [first, second])| {
                let x = reorder_columns(x, order.clone(), inverse.clone());
                [x.clone().narrow(1, 0, first), x.narrow(1, first, second)]
            });
        std::array::from_fn(|_| parts.next().unwrap_or_else(|| panic!("linear attention has two projections")))
    }

    /// What the rule gives for rows that start here.
    ///
    /// # Shapes
    /// `qkv` `[rows * len, channels]`, `b` and `a` `[rows * len, heads]` to `[rows * len, heads * value_dim]`.
    pub fn forward(&self, qkv: Tensor<2>, [b, a]: [Tensor<2>; 2], sequence: &Sequence) -> Tensor<2> {
        let (len, packed) = (sequence.len, &sequence.packed);
        let [tokens, _] = qkv.dims();
        let conv = Conv { packed: packed.clone(), ..Conv::new(len, self.config.taps) };
        let [q, k, v] = self.heads(causal_conv(qkv, self.conv.clone(), conv), len);
        let out = delta_rule(q, k, v, self.factors(b, a, len), &DeltaRows { packed: packed.clone() });
        out.reshape([tokens, self.config.value_heads * self.config.value_dim])
    }

    /// [`forward`](Self::forward) of one row that goes on from a state, or starts here without one, and the state behind it.
    pub fn forward_after(
        &self,
        qkv: Tensor<2>,
        [b, a]: [Tensor<2>; 2],
        before: Option<SequenceState>,
    ) -> (Tensor<2>, SequenceState) {
        let LinearAttentionConfig { value_heads, key_dim, value_dim, .. } = self.config;
        let (len, device) = (qkv.dims()[0], qkv.device());
        let (tail, state) = before.map_or((None, None), |SequenceState { tail, state }| (Some(tail), state));
        let (mixed, tail) = convolved(qkv, &self.conv, true, tail);
        let [q, k, v] = self.heads(mixed, len);
        let zeros = || Tensor::zeros([1, value_heads, key_dim, value_dim], (&device, DType::F32));
        let (out, state) = delta_rule_after(q, k, v, self.factors(b, a, len), state.unwrap_or_else(zeros));
        (out.reshape([len, value_heads * value_dim]), SequenceState { tail, state: Some(state) })
    }

    /// Normalised for each head and gated.
    ///
    /// # Shapes
    /// All `[tokens, heads * value_dim]`.
    pub fn gated(&self, out: Tensor<2>, z: Tensor<2>, norm: &RmsNorm, pass: Pass) -> Tensor<2> {
        gated(z, norm.forward_heads(out, pass), Activation::Silu)
    }

    /// Queries, keys and values of `[tokens, channels]`.
    fn heads(&self, mixed: Tensor<2>, len: usize) -> [Tensor<4>; 3] {
        let LinearAttentionConfig { key_heads, value_heads, key_dim, value_dim, .. } = self.config;
        let tokens = mixed.dims()[0];
        let rows = tokens / len.max(1);
        let [keys, _, values] = self.config.widths();
        let norm = Norm { eps: (LENGTH_EPS / key_dim as f64) as f32, offset: 0.0 };
        let of_length = |start: usize, length: &Tensor<1>| {
            let x = mixed.clone().narrow(1, start, keys).reshape([tokens * key_heads, key_dim]);
            rms_norm(x, length.clone(), norm).reshape([rows, len, key_heads, key_dim])
        };
        let [q, k] = [of_length(0, &self.lengths[0]), of_length(keys, &self.lengths[1])];
        [q, k, mixed.narrow(1, 2 * keys, values).reshape([rows, len, value_heads, value_dim])]
    }

    /// Logarithms of what states keep, and strengths of corrections, f32 `[rows, len, heads]`.
    fn factors(&self, b: Tensor<2>, a: Tensor<2>, len: usize) -> [Tensor<3>; 2] {
        let [tokens, heads] = a.dims();
        let a = a.cast(FloatDType::F32) + self.dt_bias.clone();
        // softplus, whose exponential can't overflow.
        let soft = a.clone().clamp_min(0.0) + (a.abs().neg().exp()).log1p();
        let g = soft * self.rates.clone();
        [g, sigmoid(b.cast(FloatDType::F32))].map(|x| x.reshape([tokens / len.max(1), len, heads]))
    }
}

/// The columns of all heads' first parts, then of their second parts, and so on, where the parts of a head have these widths and
/// lie together.
fn by_part(heads: usize, widths: &[usize]) -> Vec<i32> {
    let whole: usize = widths.iter().sum();
    let mut start = 0;
    let part = |width: &usize| {
        let first = start;
        start += width;
        (0..heads).flat_map(move |head| (0..*width).map(move |i| (head * whole + first + i) as i32)).collect::<Vec<_>>()
    };
    widths.iter().flat_map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_taken_apart_part_by_part() {
        assert_eq!(by_part(2, &[2, 1, 3]), [0, 1, 6, 7, 2, 8, 3, 4, 5, 9, 10, 11]);
    }
}
