//! What a decoder computes beside its products: RMSNorm, rotary embeddings, gated activations, the loss, and factors of
//! output features.
//!
//! Each is one operation with a hand-written backward, which keeps its inputs and little else. Composed of stock
//! operations they would be four to ten passes over the activations, keep an f32 copy at most of them for the
//! backward pass, and cost a launch and an autodiff node each. All compute in f32 and round once.
//!
//! On CubeCL they are the kernels of `fused_kernels`; on Flex, loops over rows on all threads.

mod autodiff;
mod cube;
mod flex;
mod loops;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, backend_extension};
use burn::tensor::{DType, FloatDType, Int, Tensor};
use host_copies::{as_cube, from_cube};

pub use fused_kernels::causal_conv::{Conv, MAX_TAPS};
pub use fused_kernels::columns::LEAST_GAIN;
pub use fused_kernels::gated::Activation;
pub use fused_kernels::rms_norm::Norm;
pub use fused_kernels::rope::Rotation;

/// The operations; the functions of this module say what they compute.
#[backend_extension(Cube, Flex, Autodiff)]
pub trait FusedOps: Backend {
    /// See [`rms_norm`].
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, norm: Norm) -> FloatTensor<Self>;

    /// See [`gated`].
    fn gated(gate: FloatTensor<Self>, up: FloatTensor<Self>, activation: Activation) -> FloatTensor<Self>;

    /// See [`rotate`].
    fn rotate(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        rotation: Rotation,
    ) -> FloatTensor<Self>;

    /// See [`causal_conv`].
    fn causal_conv(x: FloatTensor<Self>, weight: FloatTensor<Self>, conv: Conv) -> FloatTensor<Self>;

    /// See [`reorder_columns`].
    fn reorder_columns(x: FloatTensor<Self>, order: IntTensor<Self>, _inverse: IntTensor<Self>) -> FloatTensor<Self> {
        Self::float_select(x, 1, order)
    }

    /// See [`scale_columns`].
    fn scale_columns(x: FloatTensor<Self>, scale: FloatTensor<Self>, out: FloatDType) -> FloatTensor<Self>;

    /// See [`gained`].
    fn gained(y: FloatTensor<Self>, gain: FloatTensor<Self>) -> FloatTensor<Self>;

    /// See [`cross_entropy`].
    fn cross_entropy(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self>;
}

/// Their gradients, which autodiff asks of the backend below it.
pub trait FusedGradients: FusedOps {
    /// The gradient of [`rms_norm`]'s `x`, in its dtype.
    fn rms_norm_input_grad(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        norm: Norm,
    ) -> FloatTensor<Self>;

    /// The gradient of [`rms_norm`]'s weight, f32.
    fn rms_norm_weight_grad(dy: FloatTensor<Self>, x: FloatTensor<Self>, norm: Norm) -> FloatTensor<Self>;

    /// The gradients of [`gated`]'s `gate` and `up`.
    fn gated_grads(
        dy: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        activation: Activation,
    ) -> [FloatTensor<Self>; 2];

    /// The gradient of [`causal_conv`]'s `x`, in its dtype.
    fn causal_conv_grad(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        conv: Conv,
    ) -> FloatTensor<Self>;

    /// The gradients of [`scale_columns`]' `x`, in its dtype, and `scale`, f32.
    fn scale_columns_grads(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        scale: FloatTensor<Self>,
    ) -> [FloatTensor<Self>; 2];

    /// The gradient of [`gained`]'s `gain`, f32.
    fn gain_gradient(dy: FloatTensor<Self>, y: FloatTensor<Self>, gain: FloatTensor<Self>) -> FloatTensor<Self>;

    /// [`cross_entropy`]'s losses, and the log-sum-exp of each row, f32.
    fn losses(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> [FloatTensor<Self>; 2];

    /// The gradient of [`cross_entropy`]'s logits, in their dtype; in their place if no other tensor shares their
    /// memory.
    fn logit_grads(
        dloss: FloatTensor<Self>,
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        log_sum_exp: FloatTensor<Self>,
    ) -> FloatTensor<Self>;
}

/// `x / sqrt(mean(x²) + eps) · (weight + offset)`, row by row (Zhang and Sennrich, 2019, arXiv 1910.07467).
///
/// # Shapes
/// - `x`: `[rows, width]`; output the same, dtype kept
/// - `weight`: `[width]`, f32
///
/// # Panics
/// When the shapes or dtypes are others.
pub fn rms_norm(x: Tensor<2>, weight: Tensor<1>, norm: Norm) -> Tensor<2> {
    assert_eq!(x.dims()[1], weight.dims()[0], "rms_norm: one weight for each column");
    assert_eq!(weight.dtype(), DType::F32, "rms_norm: the weight is f32");
    Tensor::from_dispatch(<Dispatch as FusedOps>::rms_norm(x.into_dispatch(), weight.into_dispatch(), norm))
}

/// `x + delta`, and [`rms_norm`] of it: on CubeCL devices one launch, with the results of the two operations bit for bit. For
/// inference: neither has a gradient.
///
/// # Shapes
/// - `x`, `delta`: `[rows, width]`, one dtype; both outputs the same
/// - `weight`: `[width]`, f32
///
/// # Panics
/// When the shapes or dtypes are others.
pub fn add_norm(x: Tensor<2>, delta: Tensor<2>, weight: Tensor<1>, norm: Norm) -> [Tensor<2>; 2] {
    assert_eq!((x.dims(), x.dtype()), (delta.dims(), delta.dtype()), "add_norm: x and delta are alike");
    assert_eq!(x.dims()[1], weight.dims()[0], "add_norm: one weight for each column");
    assert_eq!(weight.dtype(), DType::F32, "add_norm: the weight is f32");
    let on_device = (as_cube(&x), as_cube(&delta), as_cube(&weight));
    if let (Some(x), Some(delta), Some(weight)) = on_device {
        return cube::add_norm(&x, &delta, &weight, norm).map(from_cube);
    }
    let sum = x + delta;
    [sum.clone(), rms_norm(sum, weight, norm)]
}

/// `activation(gate) · up` (Shazeer, 2020, arXiv 2002.05202).
///
/// # Shapes
/// All `[tokens, width]`, one dtype.
///
/// # Panics
/// When they are not.
pub fn gated(gate: Tensor<2>, up: Tensor<2>, activation: Activation) -> Tensor<2> {
    assert_eq!((gate.dims(), gate.dtype()), (up.dims(), up.dtype()), "gated: gate and up are alike");
    Tensor::from_dispatch(<Dispatch as FusedOps>::gated(gate.into_dispatch(), up.into_dispatch(), activation))
}

/// The short convolution of linear attention, with SiLU behind it where `conv` says so: each channel by itself, over the token and those before it
/// in its row. The weight has no gradient.
///
/// # Shapes
/// - `x`: `[tokens, channels]`, tokens in whole rows of `conv.len`, or in those that `conv.packed` bounds; output the same,
///   dtype kept
/// - `weight`: `[taps, channels]`, f32; the last tap is the token's own
///
/// # Panics
/// When the shapes or dtypes are others.
pub fn causal_conv(x: Tensor<2>, weight: Tensor<2>, conv: Conv) -> Tensor<2> {
    assert_eq!(weight.dims(), [conv.taps, x.dims()[1]], "causal_conv: a tap for each channel");
    assert_eq!(weight.dtype(), DType::F32, "causal_conv: the weight is f32");
    if let Some(bounds) = &conv.packed {
        let tokens = x.dims()[0];
        assert!(
            bounds.first() == Some(&0) && bounds.last() == Some(&(tokens as u32)) && bounds.is_sorted(),
            "causal_conv: row bounds {bounds:?} don't cover {tokens} tokens"
        );
    }
    Tensor::from_dispatch(<Dispatch as FusedOps>::causal_conv(x.into_dispatch(), weight.into_dispatch(), conv))
}

/// The columns of `x` in another order: column `i` of the output is column `order[i]`. The gradient goes the way back, so that
/// nothing is added up.
///
/// # Shapes
/// - `x`: `[rows, width]`; output the same, dtype kept
/// - `order`, `inverse`: i32 `[width]`, a permutation and its inverse
///
/// # Panics
/// When the shapes or dtypes are others.
pub fn reorder_columns(x: Tensor<2>, order: Tensor<1, Int>, inverse: Tensor<1, Int>) -> Tensor<2> {
    for order in [&order, &inverse] {
        assert_eq!(
            (order.dims(), order.dtype()),
            ([x.dims()[1]], DType::I32),
            "reorder_columns: a place for each column"
        );
    }
    Tensor::from_dispatch(<Dispatch as FusedOps>::reorder_columns(
        x.into_dispatch(),
        order.into_dispatch(),
        inverse.into_dispatch(),
    ))
}

/// Rotates each pair of a head's elements by the angle of its position (Su et al., 2021, arXiv 2104.09864), in the
/// half-split layout of Hugging Face checkpoints.
///
/// # Shapes
/// - `x`: `[tokens, heads * head_dim]`, tokens in whole sequences; output the same, dtype kept
/// - `cos`, `sin`: `[len, rotary / 2]`, f32, constants
///
/// # Panics
/// When the shapes or dtypes are others.
pub fn rotate(x: Tensor<2>, cos: Tensor<2>, sin: Tensor<2>, rotation: Rotation) -> Tensor<2> {
    let Rotation { len, head_dim, rotary, .. } = rotation;
    let [tokens, features] = x.dims();
    assert!(tokens.is_multiple_of(len) && features.is_multiple_of(head_dim), "rotate: whole sequences and heads");
    for table in [&cos, &sin] {
        assert_eq!((table.dims(), table.dtype()), ([len, rotary / 2], DType::F32), "rotate: the tables");
    }
    let (cos, sin) = (cos.without_autodiff(), sin.without_autodiff());
    Tensor::from_dispatch(<Dispatch as FusedOps>::rotate(
        x.into_dispatch(),
        cos.into_dispatch(),
        sin.into_dispatch(),
        rotation,
    ))
}

/// `x · scale`, a factor for each column, rounded once.
///
/// # Shapes
/// - `x`: `[rows, width]`
/// - `scale`: `[1, width]`, f32
/// - output: `[rows, width]` in `out`, the dtype of `x` or f32
///
/// # Panics
/// When the shapes or dtypes are others.
pub fn scale_columns(x: Tensor<2>, scale: Tensor<2>, out: FloatDType) -> Tensor<2> {
    assert_eq!([1, x.dims()[1]], scale.dims(), "scale_columns: one factor for each column");
    assert_eq!(scale.dtype(), DType::F32, "scale_columns: the factors are f32");
    Tensor::from_dispatch(<Dispatch as FusedOps>::scale_columns(x.into_dispatch(), scale.into_dispatch(), out))
}

/// `y` as it is, whose columns were multiplied by `gain` plus [`LEAST_GAIN`] before: so `gain` gets its gradient,
/// `Σ_rows dy · y / gain`, where the product that made `y` had it in its weight.
///
/// # Shapes
/// - `y`: `[rows, width]`; output the same
/// - `gain`: `[1, width]`, f32
///
/// # Panics
/// When the shapes or dtypes are others.
pub fn gained(y: Tensor<2>, gain: Tensor<2>) -> Tensor<2> {
    assert_eq!([1, y.dims()[1]], gain.dims(), "gained: one gain for each column");
    assert_eq!(gain.dtype(), DType::F32, "gained: gains are f32");
    Tensor::from_dispatch(<Dispatch as FusedOps>::gained(y.into_dispatch(), gain.into_dispatch()))
}

/// f32 as what `dtype`, of 16 bits, holds of it, and below that what it holds of the rest, without autodiff.
///
/// # Shapes
/// `[rows, width]` to `[2 · rows, width]`
pub(crate) fn split(x: Tensor<2>, dtype: FloatDType) -> Tensor<2> {
    if let Some(x) = as_cube(&x) {
        return from_cube(cube::split(&x, dtype));
    }
    let high = x.clone().cast(dtype);
    let low = (x - high.clone().cast(FloatDType::F32)).cast(dtype);
    Tensor::cat(vec![high, low], 0)
}

/// `‖w_i + scaling · b_i A‖` for each row of a weight, `[1, out_features]`, in f32 without autodiff; `None` where no kernel
/// takes the tensors, which are those of [`fused_kernels::adapted_norms::Buffers`].
///
/// # Shapes
/// - `weight_squares`: `[1, out_features]`, `a_w`: `[rank, out_features]`
/// - `lora_a`: `[rank, in_features]`, `lora_b`: `[out_features, rank]`
pub(crate) fn adapted_norms(
    weight_squares: &Tensor<2>,
    a_w: &Tensor<2>,
    lora_a: &Tensor<2>,
    lora_b: &Tensor<2>,
    scaling: f32,
) -> Option<Tensor<2>> {
    let [squares, a_w, lora_a, lora_b] = [weight_squares, a_w, lora_a, lora_b].map(as_cube);
    cube::adapted_norms(&squares?, &a_w?, &lora_a?, &lora_b?, scaling).map(from_cube)
}

/// `-log softmax(logits)[target]` of each row, in f32. Its gradient is written over the logits, so that nothing of
/// their size exists beside them.
///
/// # Shapes
/// - `logits`: `[tokens, vocab]`
/// - `targets`: i32 `[tokens]`, each below `vocab`
/// - output: `[tokens]`, f32
///
/// # Panics
/// When the shapes or dtypes are others.
pub fn cross_entropy(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    assert_eq!(logits.dims()[0], targets.dims()[0], "cross_entropy: one target for each row");
    assert_eq!(targets.dtype(), DType::I32, "cross_entropy: targets are i32");
    Tensor::from_dispatch(<Dispatch as FusedOps>::cross_entropy(logits.into_dispatch(), targets.into_dispatch()))
}
