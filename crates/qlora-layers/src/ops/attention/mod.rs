//! Causal attention as one operation with one backward.
//!
//! `o = softmax(scale · q kᵀ) v` over the keys that a query sees: itself and what came before it in its row, or of that
//! the last `window`. Query heads share key heads in groups (GQA); scores may go through `cap · tanh(s / cap)`, and [`Sinks`]
//! may have their share of a query's weights. For the
//! backward, `q`, `k`, `v`, `o` and one f32 per query and head (the log-sum-exp) are kept; scores are computed again.
//!
//! CUDA devices run [`fused_kernels::attention`] on 16-bit tensors. Elsewhere the operation is composed of products
//! over chunks of queries and the keys that they see ([`composed`]), so that what exists of the scores at a time does
//! not grow with the square of the length. Both round the probabilities, and their gradients, to the dtype of `q`.

mod autodiff;
mod composed;
mod cube;
mod flex;
mod sinks;

use super::QloraOps;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, backend_extension};
use burn::tensor::Tensor;
pub use composed::MAX_SCORES;
use composed::Sight;
pub use fused_kernels::attention::Options;
pub use sinks::Sinks;
use std::sync::Arc;

/// What an attention layer is configured with, and how a batch divides into rows.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionOptions {
    /// Scale, window and cap of the scores: what differs between models.
    pub scores: Options,
    /// First tokens of the rows that lie one after the other in a batch of one, from 0 on, and the number of tokens.
    pub packed: Option<Arc<[u32]>>,
    /// The sinks of the query heads.
    pub sinks: Option<Sinks>,
}

impl AttentionOptions {
    /// Attention over rows of one length.
    pub fn new(scale: f32, window: Option<usize>, softcap: Option<f32>) -> Self {
        Self { scores: Options { scale, window, softcap }, packed: None, sinks: None }
    }

    /// The same with the sinks of a layer, if it has some.
    pub fn with_sinks(self, sinks: Option<Sinks>) -> Self {
        Self { sinks, ..self }
    }

    /// The sinks' values.
    pub(crate) fn sinks(&self) -> Option<&[f32]> {
        self.sinks.as_ref().map(Sinks::values)
    }

    /// Plain causal attention: [`new`](Self::new) with the usual scale.
    pub fn causal(head_dim: usize) -> Self {
        Self::new(1.0 / (head_dim as f32).sqrt(), None, None)
    }
}

/// The tensor-level part, which autodiff knows.
#[backend_extension(Cube, Flex, Autodiff)]
pub trait AttentionOps: Backend {
    /// See [`attention`].
    fn attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        options: AttentionOptions,
    ) -> FloatTensor<Self> {
        Self::attention_keeping(q, k, v, options).0
    }

    /// See [`attention_keeping`].
    fn attention_keeping(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        options: AttentionOptions,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// See [`attention_again`]; without autodiff, the output that is given.
    fn attention_again(
        _q: FloatTensor<Self>,
        _k: FloatTensor<Self>,
        _v: FloatTensor<Self>,
        output: FloatTensor<Self>,
        _log_sum_exp: FloatTensor<Self>,
        _options: AttentionOptions,
    ) -> FloatTensor<Self> {
        output
    }
}

/// Queries, keys, values: `[rows, q_len, heads, head_dim]` and twice `[rows, kv_len, kv_heads, head_dim]`.
pub(crate) struct Operands<F> {
    q: F,
    k: F,
    v: F,
}

/// What the gradient of scores is made of, all f32 and `[batches, group, queries, keys]` or `[.., 1]`.
pub(crate) struct ScoreGradients<F> {
    /// Of queries and keys.
    products: F,
    /// Log-sum-exp of each query's scores.
    lse: F,
    /// The gradient of the softmax.
    d_weights: F,
    /// Each query's sum of outputs times their gradients.
    delta: F,
}

/// The two passes, on backends without autodiff.
pub(crate) trait AttentionPasses: QloraOps {
    /// The output, in the shape and dtype of `q`, and the log-sum-exp, f32, of rank 4 in a layout of the backend's own.
    fn attention_forward(
        operands: Operands<FloatTensor<Self>>,
        options: &AttentionOptions,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        composed::forward::<Self>(operands, options)
    }

    /// The gradients of `q`, `k` and `v`, in their shapes and dtype, for `d_out` in that dtype.
    fn attention_backward(
        operands: Operands<FloatTensor<Self>>,
        o: FloatTensor<Self>,
        lse: FloatTensor<Self>,
        d_out: FloatTensor<Self>,
        options: &AttentionOptions,
    ) -> [FloatTensor<Self>; 3] {
        composed::backward::<Self>(operands, o, lse, d_out, options)
    }

    /// Softmax over the keys in sight of scores out of products `[batches, group, queries, keys]`, and its log-sum-exp
    /// `[.., 1]`; f32.
    fn seen_softmax(
        products: FloatTensor<Self>,
        sight: Sight,
        options: &AttentionOptions,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        composed::softmax::<Self>(products, sight, options)
    }

    /// The softmax again, and the gradient of scores without their scale.
    fn seen_softmax_gradients(
        parts: ScoreGradients<FloatTensor<Self>>,
        sight: Sight,
        options: &AttentionOptions,
    ) -> [FloatTensor<Self>; 2] {
        composed::softmax_gradients::<Self>(parts, sight, options)
    }
}

/// Causal attention; queries are the last tokens of their rows.
///
/// Tensors may be views with any strides over tokens and heads, such as a reshaped projection or a transposed cache:
/// GPU kernels read them in place.
///
/// # Shapes
/// - `q`: `[rows, q_len, heads, head_dim]`
/// - `k`, `v`: `[rows, kv_len, kv_heads, head_dim]`, `kv_len >= q_len`, `heads` a multiple of `kv_heads`
/// - output: as `q`, in its dtype
///
/// # Panics
/// When shapes or dtypes don't fit one another, a window is 0, or row bounds don't cover a batch of one.
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, options: &AttentionOptions) -> Tensor<4> {
    check(&q, &k, &v, options);
    if q.shape().num_elements() == 0 {
        return q;
    }
    Tensor::from_dispatch(<Dispatch as AttentionOps>::attention(
        q.into_dispatch(),
        k.into_dispatch(),
        v.into_dispatch(),
        options.clone(),
    ))
}

/// What a backward pass needs of attention's forward pass beside its inputs; without autodiff.
#[derive(Clone, Debug)]
pub struct AttentionResult {
    output: Tensor<4>,
    log_sum_exp: Tensor<4>,
}

impl AttentionResult {
    /// Output, as the queries, and log-sum-exp.
    pub(crate) fn into_parts(self) -> [Tensor<4>; 2] {
        [self.output, self.log_sum_exp]
    }

    /// As [`into_parts`](Self::into_parts) gave them.
    pub(crate) fn from_parts([output, log_sum_exp]: [Tensor<4>; 2]) -> Self {
        Self { output, log_sum_exp }
    }
}

/// [`attention`], and what it computed, for [`attention_again`].
///
/// # Shapes
/// # Panics
/// As [`attention`]; the batch is not empty.
pub fn attention_keeping(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    options: &AttentionOptions,
) -> (Tensor<4>, AttentionResult) {
    check(&q, &k, &v, options);
    let (output, log_sum_exp) = <Dispatch as AttentionOps>::attention_keeping(
        q.into_dispatch(),
        k.into_dispatch(),
        v.into_dispatch(),
        options.clone(),
    );
    let (output, log_sum_exp) = (Tensor::<4>::from_dispatch(output), Tensor::<4>::from_dispatch(log_sum_exp));
    let kept =
        AttentionResult { output: output.clone().without_autodiff(), log_sum_exp: log_sum_exp.without_autodiff() };
    (output, kept)
}

/// [`attention`] whose result is known from a pass over the same inputs: records the operation without computing it.
///
/// # Shapes
/// # Panics
/// As [`attention`].
pub fn attention_again(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    result: AttentionResult,
    options: &AttentionOptions,
) -> Tensor<4> {
    check(&q, &k, &v, options);
    assert_eq!(q.dims(), result.output.dims(), "attention: the result is that of other queries");
    Tensor::from_dispatch(<Dispatch as AttentionOps>::attention_again(
        q.into_dispatch(),
        k.into_dispatch(),
        v.into_dispatch(),
        result.output.into_dispatch(),
        result.log_sum_exp.into_dispatch(),
        options.clone(),
    ))
}

fn check(q: &Tensor<4>, k: &Tensor<4>, v: &Tensor<4>, options: &AttentionOptions) {
    let ([rows, q_len, heads, dim], [kv_rows, kv_len, kv_heads, kv_dim]) = (q.dims(), k.dims());
    assert_eq!(k.dims(), v.dims(), "attention: keys and values differ in shape");
    assert!((rows, dim) == (kv_rows, kv_dim), "attention: q is {:?}, k {:?}", q.dims(), k.dims());
    assert!(kv_len >= q_len, "attention: {q_len} queries of {kv_len} keys");
    assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "attention: {heads} query heads, {kv_heads} key heads");
    assert!(q.dtype() == k.dtype() && k.dtype() == v.dtype(), "attention: q, k and v must have one dtype");
    assert!(options.scores.window != Some(0), "attention: a query sees itself at least");
    assert!(options.sinks().is_none_or(|sinks| sinks.len() == heads), "attention: one sink for each of {heads} heads");
    if let Some(bounds) = &options.packed {
        assert!(rows == 1 && q_len == kv_len, "attention: packed rows lie in a batch of one");
        assert!(
            bounds.first() == Some(&0) && bounds.last() == Some(&(q_len as u32)) && bounds.is_sorted(),
            "attention: row bounds {bounds:?} don't cover {q_len} tokens"
        );
    }
}
