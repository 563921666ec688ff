//! Attention out of products, for backends without a kernel.
//!
//! Queries go in chunks, each with the keys that any of its queries sees: the scores of one chunk exist at a time, and
//! nothing is computed for keys that come after the chunk or lie before its window. Scores, softmax and sums over
//! chunks are f32.

use super::{AttentionOptions, AttentionPasses, Operands, ScoreGradients};
use crate::ops::{QloraOps, float_dtype};
use burn::backend::TensorMetadata;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{FloatDType, Shape, Slice, TensorData};
use std::ops::Range;

/// Scores of a chunk, at most: 64 MiB in f32.
pub const MAX_SCORES: usize = 1 << 24;
/// Queries of a chunk, at most: a chunk computes half of its square in vain.
const MAX_QUERIES: usize = 256;
/// Far below any score, yet finite: WGSL has no literal for infinity.
const HIDDEN: f32 = -1e30;

/// The dimensions, and the order of the operands inside: `[rows * kv_heads, group * len, head_dim]`.
#[derive(Clone, Copy)]
struct Dims {
    rows: usize,
    q_len: usize,
    kv_len: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
}

/// A chunk: its queries and keys among those of all rows.
struct Chunk {
    queries: Range<usize>,
    keys: Range<usize>,
}

impl Dims {
    fn of<F: TensorMetadata>(operands: &Operands<F>) -> Self {
        let [rows, q_len, heads, dim] = operands.q.shape().dims();
        let [_, kv_len, kv_heads, _] = operands.k.shape().dims();
        Self { rows, q_len, kv_len, heads, kv_heads, dim }
    }

    fn batches(self) -> usize {
        self.rows * self.kv_heads
    }

    fn group(self) -> usize {
        self.heads / self.kv_heads
    }

    /// The chunks of every row, in order.
    fn chunks(self, options: &AttentionOptions) -> Vec<Chunk> {
        let whole = [0, self.q_len as u32];
        let bounds = options.packed.as_deref().unwrap_or(&whole);
        let past = self.kv_len - self.q_len;
        let mut chunks = Vec::new();
        for row in bounds.windows(2) {
            let (start, end) = (row[0] as usize, row[1] as usize);
            let longest = MAX_SCORES / (self.rows * self.heads * (end - start + past)).max(1);
            let step = longest.clamp(1, MAX_QUERIES);
            for first in (start..end).step_by(step) {
                let last = (first + step).min(end);
                // The first key of the first query's window.
                let seen = options.scores.window.map_or(0, |window| (first + past + 1).saturating_sub(window));
                // A row that is not packed starts at key 0, before its queries.
                chunks.push(Chunk { queries: first..last, keys: seen.max(start)..last + past });
            }
        }
        chunks
    }

    /// Which keys of the chunk its queries see.
    fn sight(self, chunk: &Chunk, options: &AttentionOptions) -> Sight {
        Sight {
            first: chunk.queries.start + self.kv_len - self.q_len - chunk.keys.start,
            queries: chunk.queries.len(),
            keys: chunk.keys.len(),
            window: options.scores.window.unwrap_or(usize::MAX),
        }
    }
}

/// Which keys the queries of a chunk see.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sight {
    /// The key of the chunk that stands where the first query does.
    first: usize,
    pub(super) queries: usize,
    pub(super) keys: usize,
    window: usize,
}

impl Sight {
    /// The keys that a query sees.
    pub(super) fn of(self, query: usize) -> Range<usize> {
        let own = self.first + query;
        (own + 1).saturating_sub(self.window)..(own + 1).min(self.keys)
    }

    /// 0 where a query sees a key, `[1, 1, queries, keys]`; none if all do.
    fn bias<B: QloraOps>(self, like: &FloatTensor<B>) -> Option<FloatTensor<B>> {
        let mut values = vec![HIDDEN; self.queries * self.keys];
        for (query, values) in values.chunks_mut(self.keys.max(1)).enumerate() {
            values[self.of(query)].fill(0.0);
        }
        if values.iter().all(|value| *value == 0.0) {
            return None;
        }
        let shape = [1, 1, self.queries, self.keys];
        Some(B::float_from_data(TensorData::new(values, shape), &like.device()))
    }
}

fn slice<B: QloraOps>(x: FloatTensor<B>, dim: usize, range: Range<usize>) -> FloatTensor<B> {
    let mut slices: Vec<Slice> = x.shape().iter().map(|len| Slice::from(0..*len)).collect();
    slices[dim] = Slice::from(range);
    B::float_slice(x, &slices)
}

fn transposed<B: QloraOps>(x: FloatTensor<B>) -> FloatTensor<B> {
    B::float_swap_dims(x, 1, 2)
}

/// Keys or values as `[rows * kv_heads, kv_len, dim]`.
fn key_batches<B: QloraOps>(x: FloatTensor<B>, dims: Dims) -> FloatTensor<B> {
    B::float_reshape(B::float_swap_dims(x, 1, 2), Shape::new([dims.batches(), dims.kv_len, dims.dim]))
}

/// A chunk of queries as `[rows * kv_heads, group * chunk, dim]`, from `[rows, heads, q_len, dim]`.
fn query_batches<B: QloraOps>(x: FloatTensor<B>, chunk: &Chunk, dims: Dims) -> FloatTensor<B> {
    let shape = [dims.batches(), dims.group() * chunk.queries.len(), dims.dim];
    B::float_reshape(slice::<B>(x, 2, chunk.queries.clone()), Shape::new(shape))
}

/// Products of a chunk's queries and keys, `[rows * kv_heads, group, queries, keys]`.
fn products<B: QloraOps>(q: FloatTensor<B>, k: FloatTensor<B>, chunk: &Chunk, dims: Dims) -> FloatTensor<B> {
    let products = B::matmul(q, transposed::<B>(k), FloatDType::F32);
    let shape = [dims.batches(), dims.group(), chunk.queries.len(), chunk.keys.len()];
    B::float_reshape(products, Shape::new(shape))
}

/// Scaled, capped and masked scores out of products, and the cap's tanh.
fn scores<B: QloraOps>(
    products: FloatTensor<B>,
    sight: Sight,
    options: &AttentionOptions,
) -> (FloatTensor<B>, Option<FloatTensor<B>>) {
    let (scores, tanh) = match options.scores.softcap {
        None => (B::float_mul_scalar(products, options.scores.scale.into()), None),
        Some(cap) => {
            let tanh = B::float_tanh(B::float_mul_scalar(products, (options.scores.scale / cap).into()));
            (B::float_mul_scalar(tanh.clone(), cap.into()), Some(tanh))
        }
    };
    match sight.bias::<B>(&scores) {
        Some(bias) => (B::float_add(scores, bias), tanh),
        None => (scores, tanh),
    }
}

/// The sinks of the heads of `[batches, group, queries, 1]`, in that shape.
fn sinks_like<B: QloraOps>(like: &FloatTensor<B>, sinks: &[f32]) -> FloatTensor<B> {
    let [batches, group, queries, _] = like.shape().dims();
    let of_heads = (0..batches * group).flat_map(|head| std::iter::repeat_n(sinks[head % sinks.len()], queries));
    let values = TensorData::new(of_heads.collect::<Vec<f32>>(), [batches, group, queries, 1]);
    B::float_from_data(values, &like.device())
}

/// `AttentionPasses::seen_softmax`.
pub(super) fn softmax<B: QloraOps>(
    products: FloatTensor<B>,
    sight: Sight,
    options: &AttentionOptions,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (scores, _) = scores::<B>(products, sight, options);
    let mut most = B::float_max_dim(scores.clone(), 3);
    let sinks = options.sinks().map(|sinks| sinks_like::<B>(&most, sinks));
    if let Some(sinks) = &sinks {
        let higher = B::float_sub(sinks.clone(), most.clone());
        most = B::float_add(most, B::float_clamp_min(higher, 0.0.into()));
    }
    let weights = B::float_exp(B::float_sub(scores, most.clone()));
    let mut sum = B::float_sum_dim(weights.clone(), 3);
    if let Some(sinks) = sinks {
        sum = B::float_add(sum, B::float_exp(B::float_sub(sinks, most.clone())));
    }
    (B::float_div(weights, sum.clone()), B::float_add(most, B::float_log(sum)))
}

/// `AttentionPasses::seen_softmax_gradients`.
pub(super) fn softmax_gradients<B: QloraOps>(
    ScoreGradients { products, lse, d_weights, delta }: ScoreGradients<FloatTensor<B>>,
    sight: Sight,
    options: &AttentionOptions,
) -> [FloatTensor<B>; 2] {
    let (scores, tanh) = scores::<B>(products, sight, options);
    let weights = B::float_exp(B::float_sub(scores, lse));
    let mut gradients = B::float_mul(weights.clone(), B::float_sub(d_weights, delta));
    if let Some(tanh) = tanh {
        let slope = B::float_add_scalar(B::float_neg(B::float_mul(tanh.clone(), tanh)), 1.0.into());
        gradients = B::float_mul(gradients, slope);
    }
    [weights, gradients]
}

/// `AttentionPasses::attention_forward`; lse is `[rows * kv_heads, group, q_len, 1]`.
pub(super) fn forward<B: AttentionPasses>(
    operands: Operands<FloatTensor<B>>,
    options: &AttentionOptions,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let dims = Dims::of(&operands);
    let dtype = float_dtype(operands.q.dtype());
    let Operands { q, k, v } = operands;
    let (q, k, v) = (B::float_swap_dims(q, 1, 2), key_batches::<B>(k, dims), key_batches::<B>(v, dims));
    let (mut outs, mut sums) = (Vec::new(), Vec::new());
    for chunk in dims.chunks(options) {
        let keys = slice::<B>(k.clone(), 1, chunk.keys.clone());
        let products = products::<B>(query_batches::<B>(q.clone(), &chunk, dims), keys, &chunk, dims);
        let (weights, lse) = B::seen_softmax(products, dims.sight(&chunk, options), options);
        let weights = B::float_cast(weights, dtype);
        let shape = [dims.batches(), dims.group() * chunk.queries.len(), chunk.keys.len()];
        let weights = B::float_reshape(weights, Shape::new(shape));
        let out = B::matmul(weights, slice::<B>(v.clone(), 1, chunk.keys.clone()), dtype);
        outs.push(B::float_reshape(out, Shape::new([dims.rows, dims.heads, chunk.queries.len(), dims.dim])));
        sums.push(lse);
    }
    (B::float_swap_dims(cat::<B>(outs), 1, 2), cat::<B>(sums))
}

/// Chunks of queries one after the other.
fn cat<B: QloraOps>(mut chunks: Vec<FloatTensor<B>>) -> FloatTensor<B> {
    if chunks.len() == 1 { chunks.swap_remove(0) } else { B::float_cat(chunks, 2) }
}

/// `sum[.., keys, ..] += part`.
fn add<B: QloraOps>(sum: FloatTensor<B>, keys: &Range<usize>, part: FloatTensor<B>) -> FloatTensor<B> {
    let [batches, len, dim] = sum.shape().dims();
    if *keys == (0..len) {
        return B::float_add(sum, part);
    }
    let old = slice::<B>(sum.clone(), 1, keys.clone());
    let place = [Slice::from(0..batches), Slice::from(keys.clone()), Slice::from(0..dim)];
    B::float_slice_assign(sum, &place, B::float_add(old, part))
}

/// `AttentionPasses::attention_backward`.
pub(super) fn backward<B: AttentionPasses>(
    operands: Operands<FloatTensor<B>>,
    o: FloatTensor<B>,
    lse: FloatTensor<B>,
    d_out: FloatTensor<B>,
    options: &AttentionOptions,
) -> [FloatTensor<B>; 3] {
    let dims = Dims::of(&operands);
    let dtype = float_dtype(operands.q.dtype());
    let Operands { q, k, v } = operands;
    let (k, v) = (key_batches::<B>(k, dims), key_batches::<B>(v, dims));
    let [q, o, d_out] = [q, o, d_out].map(|x| B::float_swap_dims(x, 1, 2));
    let zeros = || B::float_zeros(k.shape(), &k.device(), FloatDType::F32);
    let (mut dk, mut dv, mut dqs) = (zeros(), zeros(), Vec::new());
    for chunk in dims.chunks(options) {
        let queries = |x: &FloatTensor<B>| query_batches::<B>(x.clone(), &chunk, dims);
        let (q, o, d_out) = (queries(&q), queries(&o), queries(&d_out));
        let keys = slice::<B>(k.clone(), 1, chunk.keys.clone());
        let values = slice::<B>(v.clone(), 1, chunk.keys.clone());
        let outputs = B::float_mul(B::float_cast(o, FloatDType::F32), B::float_cast(d_out.clone(), FloatDType::F32));
        let by_query = |last| Shape::new([dims.batches(), dims.group(), chunk.queries.len(), last]);
        let gradients = B::seen_softmax_gradients(
            ScoreGradients {
                products: products::<B>(q.clone(), keys.clone(), &chunk, dims),
                lse: slice::<B>(lse.clone(), 2, chunk.queries.clone()),
                d_weights: B::float_reshape(
                    B::matmul(d_out.clone(), transposed::<B>(values), FloatDType::F32),
                    by_query(chunk.keys.len()),
                ),
                delta: B::float_reshape(B::float_sum_dim(outputs, 2), by_query(1)),
            },
            dims.sight(&chunk, options),
            options,
        );
        let flat = Shape::new([dims.batches(), dims.group() * chunk.queries.len(), chunk.keys.len()]);
        let [weights, gradients] = gradients.map(|x| B::float_cast(B::float_reshape(x, flat.clone()), dtype));

        let dq = B::matmul(gradients.clone(), keys, FloatDType::F32);
        let dq = B::float_cast(B::float_mul_scalar(dq, options.scores.scale.into()), dtype);
        dqs.push(B::float_reshape(dq, Shape::new([dims.rows, dims.heads, chunk.queries.len(), dims.dim])));
        dk = add::<B>(dk, &chunk.keys, B::matmul(transposed::<B>(gradients), q, FloatDType::F32));
        dv = add::<B>(dv, &chunk.keys, B::matmul(transposed::<B>(weights), d_out, FloatDType::F32));
    }
    let dk = B::float_mul_scalar(dk, options.scores.scale.into());
    let [dk, dv] = [dk, dv].map(|x| {
        let x = B::float_reshape(x, Shape::new([dims.rows, dims.kv_heads, dims.kv_len, dims.dim]));
        B::float_cast(B::float_swap_dims(x, 1, 2), dtype)
    });
    [B::float_swap_dims(cat::<B>(dqs), 1, 2), dk, dv]
}
