//! Causal self-attention with grouped queries, sliding windows and soft-capped scores.

use burn::tensor::activation::softmax;
use burn::tensor::{DType, Device, FloatDType, Int, Tensor};
use qlora_layers::ops::matmul;

/// Keys and values of the tokens so far, one pair per block, for token-by-token generation. Blocks with a
/// window keep all of them too, and look at the last ones.
#[derive(Clone, Debug, Default)]
pub struct KvCache {
    /// The tokens.
    pub(crate) ids: Vec<u32>,
    blocks: Vec<Option<(Tensor<4>, Tensor<4>)>>,
}

impl KvCache {
    /// An empty cache.
    pub fn new() -> Self {
        Self::default()
    }

    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether the cache holds no token.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Appends a block's new keys and values, and returns all of them.
    ///
    /// # Shapes
    /// `[rows, kv_heads, new, head_dim]` in, `[rows, kv_heads, all, head_dim]` out.
    pub(crate) fn extend(&mut self, block: usize, keys: Tensor<4>, values: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        if self.blocks.len() <= block {
            self.blocks.resize(block + 1, None);
        }
        let all = match self.blocks[block].take() {
            Some((old_keys, old_values)) => {
                (Tensor::cat(vec![old_keys, keys], 2), Tensor::cat(vec![old_values, values], 2))
            }
            None => (keys, values),
        };
        self.blocks[block] = Some(all.clone());
        all
    }
}

/// Which keys each query of a pass may see: those at its own position and before, no further back than a window.
#[derive(Clone, Debug)]
pub struct Mask {
    /// The number of keys that a query sees, its own included; `None` for all before it.
    pub window: Option<usize>,
    /// The position of the first query; the first key's is 0.
    pub past: usize,
    /// The same as a summand of scores, `[1, 1, len, past + len]` f32, 0 where a query may look and very
    /// negative where not; `None` where every query sees every key.
    pub bias: Option<Tensor<4>>,
}

impl Mask {
    /// The mask of `len` queries that follow `past` keys.
    pub fn new(len: usize, past: usize, window: Option<usize>, device: &Device) -> Self {
        let all = past + len;
        let window = window.filter(|window| *window < all);
        // A single query sees every key, unless they are more than its window.
        let bias = (len > 1 || window.is_some()).then(|| {
            let query = Tensor::<1, Int>::arange(past as i64..all as i64, device).reshape([len, 1]).repeat_dim(1, all);
            let key = Tensor::<1, Int>::arange(0..all as i64, device).reshape([1, all]).repeat_dim(0, len);
            let mut hidden = key.clone().greater(query.clone());
            if let Some(window) = window {
                hidden = hidden.bool_or(key.add_scalar(window as i64).lower_equal(query));
            }
            // Far below any score, yet finite: WGSL has no literal for infinity.
            let bias: Tensor<2> = Tensor::zeros([len, all], (device, DType::F32)).mask_fill(hidden, -1e30);
            bias.reshape([1, 1, len, all])
        });
        Self { window, past, bias }
    }
}

/// `softmax(cap(scale · q kᵀ) + bias) v` with `cap(s) = softcap · tanh(s / softcap)` where there is a soft cap
/// (Gemma Team, 2024, arXiv 2408.00118, section 2); scores and softmax in f32.
///
/// The queries that share a key head are stacked along its sequence axis, so keys and values are
/// never repeated.
///
/// # Shapes
/// - `q`: `[rows, heads, len, d]`; `k`, `v`: `[rows, kv_heads, all, d]`
/// - output: `[rows, heads, len, d]`, dtype of `q`
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, scale: f64, softcap: Option<f64>, mask: &Mask) -> Tensor<4> {
    let [rows, heads, len, dim] = q.dims();
    let [_, kv_heads, all, _] = k.dims();
    let group = heads / kv_heads;
    let dtype = q.dtype();
    let q = q.reshape([rows * kv_heads, group * len, dim]);
    let k = k.reshape([rows * kv_heads, all, dim]);
    let v = v.reshape([rows * kv_heads, all, dim]);
    let scores = matmul(q, k.swap_dims(1, 2)).cast(FloatDType::F32).mul_scalar(scale);
    let scores = match softcap {
        Some(cap) => soft_capped(scores, cap),
        None => scores,
    };
    let scores = scores.reshape([rows * kv_heads, group, len, all]);
    let scores = match &mask.bias {
        Some(bias) => scores + bias.clone(),
        None => scores,
    };
    let weights = softmax(scores, 3).cast(dtype).reshape([rows * kv_heads, group * len, all]);
    matmul(weights, v).reshape([rows, heads, len, dim])
}

/// `cap · tanh(x / cap)`.
pub(crate) fn soft_capped<const D: usize>(x: Tensor<D>, cap: f64) -> Tensor<D> {
    x.div_scalar(cap).tanh().mul_scalar(cap)
}
