//! Causal self-attention with grouped queries.

use burn::tensor::activation::softmax;
use burn::tensor::{FloatDType, Tensor};
use qlora_layers::ops::matmul;

/// Keys and values of the tokens so far, one pair per block, for token-by-token generation.
#[derive(Clone, Debug, Default)]
pub struct KvCache {
    blocks: Vec<Option<(Tensor<4>, Tensor<4>)>>,
}

impl KvCache {
    /// An empty cache.
    pub fn new() -> Self {
        Self::default()
    }

    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.blocks.first().and_then(Option::as_ref).map_or(0, |(keys, _)| keys.dims()[2])
    }

    /// Whether the cache holds no token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
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

/// `softmax(q kᵀ / sqrt(d) + bias) v`, scores and softmax in f32.
///
/// The queries that share a key head are stacked along its sequence axis, so keys and values are
/// never repeated.
///
/// # Shapes
/// - `q`: `[rows, heads, len, d]`; `k`, `v`: `[rows, kv_heads, all, d]`
/// - `bias`: `[1, 1, len, all]` f32, 0 where a query may look and very negative where not
/// - output: `[rows, heads, len, d]`, dtype of `q`
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, bias: Option<&Tensor<4>>) -> Tensor<4> {
    let [rows, heads, len, dim] = q.dims();
    let [_, kv_heads, all, _] = k.dims();
    let group = heads / kv_heads;
    let dtype = q.dtype();
    let q = q.reshape([rows * kv_heads, group * len, dim]);
    let k = k.reshape([rows * kv_heads, all, dim]);
    let v = v.reshape([rows * kv_heads, all, dim]);
    let scores = matmul(q, k.swap_dims(1, 2)).cast(FloatDType::F32).mul_scalar(1.0 / (dim as f64).sqrt());
    let scores = scores.reshape([rows * kv_heads, group, len, all]);
    let scores = match bias {
        Some(bias) => scores + bias.clone(),
        None => scores,
    };
    let weights = softmax(scores, 3).cast(dtype).reshape([rows * kv_heads, group * len, all]);
    matmul(weights, v).reshape([rows, heads, len, dim])
}
