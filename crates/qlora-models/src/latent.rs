//! Multi-head latent attention (DeepSeek-AI, 2024, arXiv 2405.04434): what lies between its projections and attention.
//!
//! A token's keys and values are made of one vector of `rank` numbers; of a query and a key `plain_dim` dimensions come from their
//! projections as they are, and `rotary_dim` are rotated, those of keys the same for all heads:
//!
//! `q = [q_plain, R(q_rotary)]`, `k = [k_plain, R(k_rotary)]`, and `[k_plain, v]` of each head from the vector.
//!
//! # Widths
//!
//! Attention has one width for queries, keys and values. Where values are narrower, as with 128 of 192 in DeepSeek V3, they are filled
//! up with zeros, and what comes out is cut: a fifth more operations in attention's forward pass, a sixth more in its backward pass, and
//! half again as many bytes of values and outputs. With 256 of 256 (GLM 4.7 Flash) there is nothing to fill.

use crate::config::LatentConfig;
use burn::tensor::Tensor;

/// The vector that keys and values are made of, and what is rotated of keys: `[tokens, rank]` and `[tokens, rotary_dim]`.
pub(crate) fn split(both: Tensor<2>, sizes: &LatentConfig) -> [Tensor<2>; 2] {
    [both.clone().narrow(1, 0, sizes.rank), both.narrow(1, sizes.rank, sizes.rotary_dim)]
}

/// Queries as attention takes them, of `[tokens, heads * query_dim]`. `rotated` rotates heads of `rotary_dim`.
///
/// # Shapes
/// `[tokens, heads * head_dim]`
pub(crate) fn queries(
    q: Tensor<2>,
    sizes: &LatentConfig,
    heads: usize,
    rotated: impl Fn(Tensor<2>) -> Tensor<2>,
) -> Tensor<2> {
    let [plain, rotary] = query_parts(q, sizes, heads, rotated);
    filled(vec![plain, rotary], sizes.head_dim())
}

/// What of queries is not rotated, `[tokens, heads, plain_dim]`, and what was, `[tokens, heads, rotary_dim]`.
pub(crate) fn query_parts(
    q: Tensor<2>,
    sizes: &LatentConfig,
    heads: usize,
    rotated: impl Fn(Tensor<2>) -> Tensor<2>,
) -> [Tensor<3>; 2] {
    let tokens = q.dims()[0];
    let q = q.reshape([tokens, heads, sizes.query_dim()]);
    let rotary = q.clone().narrow(2, sizes.plain_dim, sizes.rotary_dim).reshape([tokens, heads * sizes.rotary_dim]);
    [q.narrow(2, 0, sizes.plain_dim), rotated(rotary).reshape([tokens, heads, sizes.rotary_dim])]
}

/// Keys and values as attention takes them, of `both` `[tokens, heads * (plain_dim + value_dim)]` and the rotated key of all heads,
/// `[tokens, rotary_dim]`.
///
/// # Shapes
/// Each `[tokens, heads * head_dim]`.
pub(crate) fn keys_and_values(
    both: Tensor<2>,
    rotary: Tensor<2>,
    sizes: &LatentConfig,
    heads: usize,
) -> [Tensor<2>; 2] {
    let tokens = both.dims()[0];
    let both = both.reshape([tokens, heads, sizes.plain_dim + sizes.value_dim]);
    let plain = both.clone().narrow(2, 0, sizes.plain_dim);
    let rotary = rotary.reshape([tokens, 1, sizes.rotary_dim]).expand([tokens, heads, sizes.rotary_dim]);
    let values = both.narrow(2, sizes.plain_dim, sizes.value_dim);
    [filled(vec![plain, rotary], sizes.head_dim()), filled(vec![values], sizes.head_dim())]
}

/// Heads side by side, filled up to `width` with zeros: `[tokens, heads * width]`.
pub(crate) fn filled(mut parts: Vec<Tensor<3>>, width: usize) -> Tensor<2> {
    let [tokens, heads, _] = parts[0].dims();
    let missing = width - parts.iter().map(|part| part.dims()[2]).sum::<usize>();
    if missing > 0 {
        parts.push(Tensor::zeros([tokens, heads, missing], (&parts[0].device(), parts[0].dtype())));
    }
    let whole = if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(parts, 2) };
    whole.reshape([tokens, heads * width])
}

/// What the output projection reads of `[tokens, heads, head_dim]`: as many dimensions as values have.
pub(crate) fn values(mixed: Tensor<3>, width: usize) -> Tensor<2> {
    let [tokens, heads, head_dim] = mixed.dims();
    let mixed = if width < head_dim { mixed.narrow(2, 0, width) } else { mixed };
    mixed.reshape([tokens, heads * width])
}
