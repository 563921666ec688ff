//! Linear attention with the gated delta rule (Yang et al., 2024, arXiv 2412.06464), between its projections.
//!
//! Queries, keys and values go through a short convolution; queries and keys have length 1, and queries the scale of attention.
//! The state of a head forgets at the rate `exp(-rate · softplus(a + dt_bias))` and is corrected with the strength
//! `sigmoid(b)`. What it gives is normalised for each head and gated by `silu(z)`.

use crate::config::LinearAttentionConfig;
use crate::norm::RmsNorm;
use crate::sequence::Sequence;
use burn::tensor::activation::sigmoid;
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use host_copies::persistent;
use qlora_layers::Pass;
use qlora_layers::ops::fused::{Activation, Conv, Norm, causal_conv, gated, rms_norm};
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
}

/// What a sequence leaves behind for its next token, in a block.
#[derive(Clone, Debug)]
pub(crate) struct DeltaState {
    /// The last inputs of the convolution, `[taps - 1, channels]`.
    tail: Tensor<2>,
    /// f32 `[1, heads, key_dim, value_dim]`.
    state: Tensor<4>,
}

impl DeltaState {
    /// Bytes of a block's.
    pub fn bytes(config: &LinearAttentionConfig, dtype: FloatDType) -> usize {
        let state = config.value_heads * config.key_dim * config.value_dim * 4;
        state + (config.taps - 1) * config.channels() * DType::from(dtype).size()
    }
}

impl DeltaNet {
    /// Of a checkpoint's tensors, each as it holds them: the convolution's weight `[channels, 1, taps]`, and logarithms of
    /// rates and biases `[heads]`.
    pub fn new(config: LinearAttentionConfig, conv: &[f32], rates: &[f32], dt_bias: Vec<f32>, device: &Device) -> Self {
        let (taps, channels) = (config.taps, config.channels());
        let held = |values: Vec<f32>, shape: [usize; 2]| {
            persistent(device, TensorData::new(values, shape), |data| Tensor::from_data(data, (device, DType::F32)))
        };
        let transposed = (0..taps * channels).map(|i| conv[i % channels * taps + i / channels]).collect();
        let length = |length: f64| {
            let row: Tensor<2> = held(vec![length as f32; config.key_dim], [1, config.key_dim]);
            row.reshape([config.key_dim])
        };
        // The norm divides by the root of the mean square, which is the length over the root of the width.
        let width = config.key_dim as f64;
        Self {
            config,
            conv: held(transposed, [taps, channels]),
            rates: held(rates.iter().map(|rate| -rate.exp()).collect(), [1, config.value_heads]),
            dt_bias: held(dt_bias, [1, config.value_heads]),
            lengths: [length(1.0 / width), length(1.0 / width.sqrt())],
        }
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
        before: Option<DeltaState>,
    ) -> (Tensor<2>, DeltaState) {
        let LinearAttentionConfig { value_heads, key_dim, value_dim, taps, .. } = self.config;
        let [len, channels] = qkv.dims();
        let before = before.unwrap_or_else(|| DeltaState {
            tail: Tensor::zeros([taps - 1, channels], (&qkv.device(), qkv.dtype())),
            state: Tensor::zeros([1, value_heads, key_dim, value_dim], (&qkv.device(), DType::F32)),
        });
        let all = match taps {
            1 => qkv,
            _ => Tensor::cat(vec![before.tail, qkv], 0),
        };
        let tail = all.clone().narrow(0, len, taps - 1);
        let mixed = causal_conv(all, self.conv.clone(), Conv::new(len + taps - 1, taps));
        let [q, k, v] = self.heads(mixed.narrow(0, taps - 1, len), len);
        let (out, state) = delta_rule_after(q, k, v, self.factors(b, a, len), before.state);
        (out.reshape([len, value_heads * value_dim]), DeltaState { tail, state })
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
