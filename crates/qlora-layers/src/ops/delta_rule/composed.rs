//! The delta rule by chunks, out of stock operations and products, for devices without a kernel.
//!
//! Within a chunk of `c` tokens behind a state `S`, with `G` the running sum of `g` and `D[t, i] = exp(G[t] − G[i])` for
//! `i ≤ t`, the corrections `u` of all tokens solve
//!
//! ```text
//! (I + L) U = beta (V − exp(G) K S)      L[t, i] = beta[t] D[t, i] k[t]·k[i],  i < t
//! ```
//!
//! so that `U = A beta V − W S` with `A = (I + L)⁻¹` and `W = A beta exp(G) K`, which need no state. With
//! `P = D ∘ Q Kᵀ`,
//!
//! ```text
//! O = exp(G) Q S + P U      S ← exp(G[c]) S + (exp(G[c] − G) K)ᵀ U
//! ```
//!
//! The inverse is built from blocks of 1, 2, 4 .. tokens: `X ← X − X L' X` with the part `L'` of `L` between neighbouring
//! blocks. That is as stable as forward substitution, which powers of `L` are not: repeated keys make them grow as binomial
//! coefficients.
//!
//! The backward pass computes states and corrections again, walks the chunks from last to first for the gradients of the
//! states behind them, and takes everything else from products over all chunks at once.

use super::DeltaRows;
use crate::ops::{float_dtype, matmul};
use burn::tensor::{DType, Device, FloatDType, Tensor};

/// Tokens of a chunk.
const CHUNK: usize = 64;
/// Far below any logarithm of a decay, yet finite: WGSL has no literal for infinity.
const HIDDEN: f32 = -1e30;

/// The operands, or a gradient for each; shapes as [`super::delta_rule`] has them.
#[derive(Clone, Debug)]
pub(super) struct Inputs {
    pub q: Tensor<4>,
    pub k: Tensor<4>,
    pub v: Tensor<4>,
    pub g: Tensor<3>,
    pub beta: Tensor<3>,
}

impl Inputs {
    /// The tokens of one of the rows that are packed.
    fn row(&self, start: usize, len: usize) -> Self {
        Self {
            q: self.q.clone().narrow(1, start, len),
            k: self.k.clone().narrow(1, start, len),
            v: self.v.clone().narrow(1, start, len),
            g: self.g.clone().narrow(1, start, len),
            beta: self.beta.clone().narrow(1, start, len),
        }
    }
}

#[derive(Clone, Copy)]
struct Dims {
    rows: usize,
    len: usize,
    key_heads: usize,
    heads: usize,
    key_dim: usize,
    value_dim: usize,
    /// Tokens of a chunk.
    chunk: usize,
    chunks: usize,
}

impl Dims {
    fn of(inputs: &Inputs) -> Self {
        let ([rows, len, key_heads, key_dim], [.., heads, value_dim]) = (inputs.k.dims(), inputs.v.dims());
        let chunk = len.next_power_of_two().min(CHUNK);
        Self { rows, len, key_heads, heads, key_dim, value_dim, chunk, chunks: len.div_ceil(chunk) }
    }

    fn batches(self) -> usize {
        self.rows * self.heads
    }

    /// `[rows, len, heads, width]` as f32 chunks of each row and head, `[rows * heads, chunks, chunk, width]`; tokens beyond
    /// the row are zeros, which change no state.
    fn chunked(self, x: Tensor<4>) -> Tensor<4> {
        let [rows, len, heads, width] = x.dims();
        let x = x.cast(FloatDType::F32).swap_dims(1, 2).reshape([rows * heads, len, width]);
        let missing = self.chunks * self.chunk - len;
        let x = match missing {
            0 => x,
            _ => {
                let zeros = Tensor::zeros([rows * heads, missing, width], (&x.device(), DType::F32));
                Tensor::cat(vec![x, zeros], 1)
            }
        };
        x.reshape([rows * heads, self.chunks, self.chunk, width])
    }

    /// Heads of queries or keys, one for each head of values.
    fn shared(self, x: Tensor<4>) -> Tensor<4> {
        let [rows, len, heads, width] = x.dims();
        let group = self.heads / self.key_heads;
        match group {
            1 => x,
            _ => x.reshape([rows * len, heads, 1, width]).repeat_dim(2, group).reshape([rows, len, self.heads, width]),
        }
    }

    /// The way back from [`chunked`](Self::chunked).
    fn whole(self, x: Tensor<4>) -> Tensor<4> {
        let [.., width] = x.dims();
        let x = x.reshape([self.rows, self.heads, self.chunks * self.chunk, width]);
        x.narrow(2, 0, self.len).swap_dims(1, 2)
    }

    /// The way back from [`shared`](Self::shared) for gradients: their sums over a group.
    fn summed(self, x: Tensor<4>) -> Tensor<4> {
        let [rows, len, _, width] = x.dims();
        let group = self.heads / self.key_heads;
        match group {
            1 => x,
            _ => x.reshape([rows * len, self.key_heads, group, width]).sum_dim(2).reshape([
                rows,
                len,
                self.key_heads,
                width,
            ]),
        }
    }
}

/// What products over all chunks give without a state. All are `[batches, chunks, ..]`, f32.
struct Chunks {
    dims: Dims,
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    /// `[.., chunk, 1]`.
    beta: Tensor<4>,
    /// `exp(G)`, `[.., chunk, 1]`.
    kept: Tensor<4>,
    /// `exp(G[c] − G)`, `[.., chunk, 1]`.
    left: Tensor<4>,
    /// `exp(G[c])`, `[.., 1, 1]`.
    last: Tensor<4>,
    /// `D`, 0 above the diagonal, `[.., chunk, chunk]`.
    decay: Tensor<4>,
    /// `D` below the diagonal.
    strict: Tensor<4>,
    /// `K Kᵀ`.
    products: Tensor<4>,
    /// `Q Kᵀ`.
    scores: Tensor<4>,
    /// `A`.
    inverse: Tensor<4>,
}

fn transposed(x: Tensor<4>) -> Tensor<4> {
    x.swap_dims(2, 3)
}

/// 1 where `keep` says so of token and earlier token, `[1, 1, chunk, chunk]`.
fn mask(chunk: usize, device: &Device, keep: impl Fn(usize, usize) -> bool) -> Tensor<4> {
    let values: Vec<f32> = (0..chunk * chunk).map(|i| f32::from(keep(i / chunk, i % chunk))).collect();
    Tensor::<1>::from_data(values.as_slice(), (device, DType::F32)).reshape([1, 1, chunk, chunk])
}

impl Chunks {
    fn new(inputs: Inputs) -> Self {
        let dims = Dims::of(&inputs);
        let chunk = dims.chunk;
        let Inputs { q, k, v, g, beta } = inputs;
        let device = v.device();
        let (q, k) = (dims.chunked(dims.shared(q)), dims.chunked(dims.shared(k)));
        let (v, g, beta) = (dims.chunked(v), dims.chunked(g.unsqueeze_dim(3)), dims.chunked(beta.unsqueeze_dim(3)));
        let sums = g.cumsum(2);
        let end = sums.clone().narrow(2, chunk - 1, 1);
        let below = mask(chunk, &device, |t, i| i <= t);
        let differences = sums.clone() - transposed(sums.clone());
        let hidden = (below.clone() - 1.0) * -HIDDEN;
        let decay = (differences * below + hidden).exp();
        let strict = decay.clone() * mask(chunk, &device, |t, i| i < t);
        let products = matmul(k.clone(), transposed(k.clone()));
        let scores = matmul(q.clone(), transposed(k.clone()));
        let system = products.clone() * strict.clone() * beta.clone();
        let inverse = inverse(system, chunk, &device);
        let (kept, left, last) = (sums.clone().exp(), (end.clone() - sums).exp(), end.exp());
        Self { dims, q, k, v, beta, kept, left, last, decay, strict, products, scores, inverse }
    }

    /// `P`.
    fn attention(&self) -> Tensor<4> {
        self.scores.clone() * self.decay.clone()
    }

    /// `exp(G) Q`.
    fn decayed_q(&self) -> Tensor<4> {
        self.q.clone() * self.kept.clone()
    }

    /// `exp(G) K`.
    fn decayed_k(&self) -> Tensor<4> {
        self.k.clone() * self.kept.clone()
    }

    /// `exp(G[c] − G) K`.
    fn remaining_k(&self) -> Tensor<4> {
        self.k.clone() * self.left.clone()
    }

    /// `W`.
    fn weights(&self) -> Tensor<4> {
        matmul(self.inverse.clone(), self.decayed_k() * self.beta.clone())
    }

    /// The states before each chunk and behind the last, and the corrections of all tokens.
    fn scan(&self, state: Option<Tensor<4>>) -> (Vec<Tensor<4>>, Tensor<4>) {
        let dims = self.dims;
        let shape = [dims.batches(), 1, dims.key_dim, dims.value_dim];
        let zeros = || Tensor::zeros(shape, (&self.v.device(), DType::F32));
        let mut states = vec![state.map_or_else(zeros, |state| state.reshape(shape))];
        let own = matmul(self.inverse.clone(), self.v.clone() * self.beta.clone());
        let (weights, keys) = (self.weights(), transposed(self.remaining_k()));
        let mut corrections = Vec::with_capacity(dims.chunks);
        for chunk in 0..dims.chunks {
            let of = |x: &Tensor<4>| x.clone().narrow(1, chunk, 1);
            let state = states[chunk].clone();
            let u = of(&own) - matmul(of(&weights), state.clone());
            states.push(state * of(&self.last) + matmul(of(&keys), u.clone()));
            corrections.push(u);
        }
        (states, Tensor::cat(corrections, 1))
    }
}

/// `(I + L)⁻¹` of a strictly lower triangular `L`.
fn inverse(system: Tensor<4>, chunk: usize, device: &Device) -> Tensor<4> {
    let identity = mask(chunk, device, |t, i| t == i);
    let mut size = 1;
    let between = |size: usize| mask(chunk, device, |t, i| t / (2 * size) == i / (2 * size) && t / size > i / size);
    let mut inverse = identity - system.clone() * between(size);
    size *= 2;
    while size < chunk {
        let part = system.clone() * between(size);
        inverse = inverse.clone() - matmul(inverse.clone(), matmul(part, inverse));
        size *= 2;
    }
    inverse
}

/// Output, in the dtype of `v`, and last states, `[rows, heads, key_dim, value_dim]`, f32.
pub(super) fn forward(inputs: Inputs, state: Option<Tensor<4>>, rows: &DeltaRows) -> (Tensor<4>, Tensor<4>) {
    if let Some(bounds) = &rows.packed {
        let spans = bounds.windows(2).map(|row| (row[0] as usize, (row[1] - row[0]) as usize));
        let alone = DeltaRows::default();
        let each = spans.filter(|(_, len)| *len > 0).map(|(start, len)| forward(inputs.row(start, len), None, &alone));
        let (outputs, states): (Vec<_>, Vec<_>) = each.unzip();
        return (Tensor::cat(outputs, 1), Tensor::cat(states, 0));
    }
    let dtype = float_dtype(inputs.v.dtype());
    let chunks = Chunks::new(inputs);
    let dims = chunks.dims;
    let (mut states, corrections) = chunks.scan(state);
    let last = states.pop().unwrap_or_else(|| panic!("delta_rule: a scan has a state behind it"));
    let out = matmul(chunks.decayed_q(), Tensor::cat(states, 1)) + matmul(chunks.attention(), corrections);
    (dims.whole(out).cast(dtype), last.reshape([dims.rows, dims.heads, dims.key_dim, dims.value_dim]))
}

/// The gradients of all inputs, in their dtypes.
pub(super) fn backward(inputs: Inputs, d_out: Tensor<4>, rows: &DeltaRows) -> Inputs {
    if let Some(bounds) = &rows.packed {
        let spans = bounds.windows(2).map(|row| (row[0] as usize, (row[1] - row[0]) as usize));
        let alone = DeltaRows::default();
        let (mut q, mut k, mut v, mut g, mut beta) = (vec![], vec![], vec![], vec![], vec![]);
        for (start, len) in spans.filter(|(_, len)| *len > 0) {
            let part = backward(inputs.row(start, len), d_out.clone().narrow(1, start, len), &alone);
            q.push(part.q);
            k.push(part.k);
            v.push(part.v);
            g.push(part.g);
            beta.push(part.beta);
        }
        let [q, k, v] = [q, k, v].map(|parts| Tensor::cat(parts, 1));
        let [g, beta] = [g, beta].map(|parts| Tensor::cat(parts, 1));
        return Inputs { q, k, v, g, beta };
    }
    let dtype = float_dtype(inputs.v.dtype());
    let chunks = Chunks::new(inputs);
    let dims = chunks.dims;
    let (mut states, u) = chunks.scan(None);
    states.pop();
    let state = Tensor::cat(states, 1);
    let d_out = dims.chunked(d_out);

    // The states' gradients, and the corrections', from last to first.
    let local = matmul(transposed(chunks.attention()), d_out.clone());
    let (weights, queries) = (transposed(chunks.weights()), transposed(chunks.decayed_q()));
    let keys = chunks.remaining_k();
    let zeros = Tensor::zeros([dims.batches(), 1, dims.key_dim, dims.value_dim], (&d_out.device(), DType::F32));
    let (mut d_states, mut d_corrections) = (vec![zeros], Vec::with_capacity(dims.chunks));
    for chunk in (0..dims.chunks).rev() {
        let of = |x: &Tensor<4>| x.clone().narrow(1, chunk, 1);
        let behind = d_states[d_states.len() - 1].clone();
        let d_u = of(&local) + matmul(of(&keys), behind.clone());
        let before = behind * of(&chunks.last) + matmul(of(&queries), of(&d_out)) - matmul(of(&weights), d_u.clone());
        d_states.push(before);
        d_corrections.push(d_u);
    }
    // The last is of the state before the row.
    d_states.pop();
    d_states.reverse();
    d_corrections.reverse();
    let (d_state, d_u) = (Tensor::cat(d_states, 1), Tensor::cat(d_corrections, 1));

    let Chunks { q, k, v, beta, kept, left, last, decay, strict, products, scores, inverse, .. } = chunks;
    let row_sum = |x: Tensor<4>| x.sum_dim(3);
    // U = A rhs with rhs = beta (V − exp(G) K S).
    let d_rhs = matmul(transposed(inverse), d_u);
    let known = matmul(k.clone(), state.clone()) * kept.clone();
    let d_v = d_rhs.clone() * beta.clone();
    let mut d_beta = row_sum(d_rhs.clone() * (v - known.clone()));
    let mut d_sums = row_sum(d_v.clone() * known).neg();
    let mut d_k = (matmul(d_v.clone(), transposed(state.clone())) * kept.clone()).neg();
    // L, of which A is the inverse of I + L.
    let d_system = matmul(d_rhs, transposed(u.clone())).neg() * strict;
    d_beta = d_beta + row_sum(d_system.clone() * products.clone());
    let d_products = d_system * beta;
    d_k = d_k + matmul(d_products.clone(), k.clone()) + matmul(transposed(d_products.clone()), k.clone());
    // P.
    let d_scores = matmul(d_out.clone(), transposed(u.clone())) * decay;
    let mut d_q = matmul(d_scores.clone(), k.clone());
    d_k = d_k + matmul(transposed(d_scores.clone()), q.clone());
    let exponents = d_products * products + d_scores * scores;
    d_sums = d_sums + row_sum(exponents.clone()) - transposed(exponents.sum_dim(2));
    // exp(G) Q S.
    let from_state = matmul(d_out, transposed(state.clone())) * kept;
    d_sums = d_sums + row_sum(from_state.clone() * q);
    d_q = d_q + from_state;
    // The state behind the chunk.
    let into_state = matmul(u, transposed(d_state.clone())) * left;
    let shares = row_sum(into_state.clone() * k);
    d_k = d_k + into_state;
    let at_end = shares.clone().sum_dim(2) + (state * d_state).sum_dim(3).sum_dim(2) * last;
    d_sums = d_sums - shares;
    // g[t] is in the sums of its token and of all later ones: totals without what lies before.
    let before = d_sums.clone().cumsum(2) - d_sums.clone();
    let d_g = d_sums.sum_dim(2) + at_end - before;

    let narrow = |x: Tensor<4>| dims.whole(x).cast(dtype);
    let factor = |x: Tensor<4>| dims.whole(x).reshape([dims.rows, dims.len, dims.heads]);
    let shared = |x: Tensor<4>| dims.summed(dims.whole(x)).cast(dtype);
    Inputs { q: shared(d_q), k: shared(d_k), v: narrow(d_v), g: factor(d_g), beta: factor(d_beta) }
}
