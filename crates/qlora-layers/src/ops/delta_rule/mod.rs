//! The gated delta rule as one operation with one backward.
//!
//! Linear attention with a state `S` `[key_dim, value_dim]` of each head of values, from zeros at a row's first token:
//!
//! ```text
//! S ← exp(g) S      u = beta (v − Sᵀ k)      S ← S + k uᵀ      o = Sᵀ q
//! ```
//!
//! (Yang et al., 2024, arXiv 2412.06464). For the backward its inputs are kept; states are computed again.
//!
//! CUDA devices run [`fused_kernels::delta_rule`] on 16-bit tensors with heads of 128. The CPU goes token by token, all heads at
//! once ([`flex`]). Elsewhere, and where a row goes on from a state, it goes by chunks of tokens, within which the recurrence is a
//! triangular system (Yang et al., 2024, arXiv 2406.06484): its products run over all chunks at once, and only the state
//! goes from chunk to chunk ([`composed`]). The last two compute in f32 and round once.

mod autodiff;
mod composed;
mod cube;
mod flex;

use super::QloraOps;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, backend_extension};
use burn::tensor::{DType, Tensor};
use std::sync::Arc;

/// How a batch divides into rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeltaRows {
    /// First tokens of the rows that lie one after the other in a batch of one, from 0 on, and the number of tokens; `None`
    /// where the batch's rows are the rows.
    pub packed: Option<Arc<[u32]>>,
}

/// The tensor-level part, which autodiff knows.
#[backend_extension(Cube, Flex, Autodiff)]
pub trait DeltaRuleOps: Backend {
    /// See [`delta_rule`].
    fn delta_rule(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        g: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        rows: DeltaRows,
    ) -> FloatTensor<Self>;

    /// See [`delta_rule_after`]; without a graph.
    fn delta_rule_after(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        g: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        state: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

/// `q` and `k` `[rows, len, key_heads, key_dim]`, `v` `[rows, len, value_heads, value_dim]`, `g` and `beta`
/// `[rows, len, value_heads]`, f32.
#[derive(Clone, Debug)]
pub(crate) struct Operands<F> {
    q: F,
    k: F,
    v: F,
    g: F,
    beta: F,
}

/// The two passes, on backends without autodiff.
pub(crate) trait DeltaRulePasses: QloraOps {
    /// The output, in the shape and dtype of `v`.
    fn delta_rule_forward(operands: Operands<FloatTensor<Self>>, rows: &DeltaRows) -> FloatTensor<Self>;

    /// The output of the batch's rows behind a state, and the state behind their last tokens, f32.
    fn delta_rule_forward_after(
        operands: Operands<FloatTensor<Self>>,
        state: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// The gradients of the operands, in their shapes and dtypes, for `d_out` in the dtype of `v`.
    fn delta_rule_backward(
        operands: Operands<FloatTensor<Self>>,
        d_out: FloatTensor<Self>,
        rows: &DeltaRows,
    ) -> [FloatTensor<Self>; 5];
}

/// The gated delta rule over rows that start from zeros.
///
/// # Shapes
/// - `q`, `k`: `[rows, len, key_heads, key_dim]`, scaled and normalised as the model does
/// - `v`: `[rows, len, value_heads, value_dim]`, in their dtype; `value_heads` a multiple of `key_heads`
/// - `g`, `beta`: `[rows, len, value_heads]`, f32; `g` is the logarithm of what the state keeps
/// - output: as `v`
///
/// # Panics
/// When shapes or dtypes don't fit one another, or row bounds don't cover a batch of one.
pub fn delta_rule(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, [g, beta]: [Tensor<3>; 2], rows: &DeltaRows) -> Tensor<4> {
    check([&q, &k, &v], [&g, &beta]);
    if let Some(bounds) = &rows.packed {
        let [rows, len, ..] = q.dims();
        assert!(rows == 1, "delta_rule: packed rows lie in a batch of one");
        assert!(
            bounds.first() == Some(&0) && bounds.last() == Some(&(len as u32)) && bounds.is_sorted(),
            "delta_rule: row bounds {bounds:?} don't cover {len} tokens"
        );
    }
    if v.shape().num_elements() == 0 {
        return v;
    }
    Tensor::from_dispatch(<Dispatch as DeltaRuleOps>::delta_rule(
        q.into_dispatch(),
        k.into_dispatch(),
        v.into_dispatch(),
        g.into_dispatch(),
        beta.into_dispatch(),
        rows.clone(),
    ))
}

/// [`delta_rule`] of rows that go on from a state, and the state behind them, for generation: without a graph.
///
/// # Shapes
/// - `state` and the second output: `[rows, value_heads, key_dim, value_dim]`, f32
/// - the others as [`delta_rule`]'s, with at least one token
///
/// # Panics
/// When shapes or dtypes don't fit one another.
pub fn delta_rule_after(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    [g, beta]: [Tensor<3>; 2],
    state: Tensor<4>,
) -> (Tensor<4>, Tensor<4>) {
    check([&q, &k, &v], [&g, &beta]);
    let ([rows, _, heads, value_dim], [.., key_dim]) = (v.dims(), k.dims());
    assert_eq!(state.dims(), [rows, heads, key_dim, value_dim], "delta_rule: the state is that of other heads");
    let (o, state) = <Dispatch as DeltaRuleOps>::delta_rule_after(
        q.into_dispatch(),
        k.into_dispatch(),
        v.into_dispatch(),
        g.into_dispatch(),
        beta.into_dispatch(),
        state.into_dispatch(),
    );
    (Tensor::from_dispatch(o), Tensor::from_dispatch(state))
}

fn check([q, k, v]: [&Tensor<4>; 3], factors: [&Tensor<3>; 2]) {
    let ([rows, len, key_heads, _], [value_rows, value_len, value_heads, _]) = (k.dims(), v.dims());
    assert_eq!(q.dims(), k.dims(), "delta_rule: queries and keys differ in shape");
    assert!((rows, len) == (value_rows, value_len), "delta_rule: k is {:?}, v {:?}", k.dims(), v.dims());
    let grouped = key_heads > 0 && value_heads.is_multiple_of(key_heads);
    assert!(grouped, "delta_rule: {value_heads} heads of values, {key_heads} of keys");
    assert!(q.dtype() == k.dtype() && k.dtype() == v.dtype(), "delta_rule: q, k and v must have one dtype");
    for factor in factors {
        assert_eq!(factor.dims(), [rows, len, value_heads], "delta_rule: one factor for each token and head");
        assert_eq!(factor.dtype(), DType::F32, "delta_rule: the factors are f32");
    }
}
