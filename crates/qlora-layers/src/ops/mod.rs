//! Backend extensions: the operations that Burn does not have.
//!
//! [`QloraOps`] is implemented for Flex, for every CubeCL runtime and, with hand-written backward
//! passes, for autodiff over either. The functions here are the tensor-level entry points.
//!
//! # What a 4-bit product saves for its backward
//!
//! For `y = x Wᵀ` with a frozen `W`, `dx = dy W` needs neither `x` nor a dense `W`: the state is the
//! packed codes and block statistics, which the model holds anyway. There is no gradient of `W`.
//! Where a runtime has no fused kernel, `W` is dequantized into one transient of its own size, in the dtype of
//! `x`, and dropped after the product.
//!
//! # What LoRA saves
//!
//! `y = x Wᵀ + s·dropout(x) Aᵀ Bᵀ` is one operation, [`lora_linear_4bit`], with one backward. With
//! `u = s·dropout(x) Aᵀ` and `v = s·dy B`, both `[tokens, rank]`, the gradients are `dA = vᵀ dropout(x)`, `dB = dyᵀ u`
//! and `dx = dy W + dropout(v A)`: it keeps `x` and `u`, draws the mask again, and sums `dA` and `dB` in f32.
//!
//! # Where values are rounded
//!
//! As in bitsandbytes 0.50.2: the forward product uses codebook times absmax rounded once, to the dtype of `x`;
//! the input gradient (and [`dequantize_4bit`]) rounds to the quantization state's dtype first. The two differ
//! only where activations are wider than that dtype, by half an ulp of it.

mod attention;
mod autodiff;
mod composed;
mod cube;
mod cube_products;
pub(crate) mod cube_tensors;
mod delta_rule;
pub mod experts;
mod exponential;
mod flex;
mod flex_products;
pub mod fused;
mod packed;
mod paged;
mod seed;
mod vectors;

pub use attention::{
    AttentionOps, AttentionOptions, AttentionResult, MAX_SCORES, Options, Sinks, attention, attention_again,
    attention_keeping, attention_kernel, takes_head_dim,
};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, TensorMetadata, backend_extension};
use burn::tensor::{DType, FloatDType, Tensor};
pub use delta_rule::{DeltaRows, DeltaRuleOps, delta_rule, delta_rule_after};
pub(crate) use flex::words;
pub use flex_products::{FEW_TOKENS, in_bf16};
pub use fused_kernels::{dropout_hash, noise_unit};
use host_copies::client_of;
use nf4_quant::FloatFormat;
pub use packed::{Layout4bit, Packed4bit};
pub use paged::{
    NewTokens, PagedBatch, PagedOperand, PagedOps, PagedRow, likeliest, paged_attention, paged_slot, paged_write,
    rotate_into_cache,
};
pub use seed::{SeedOps, backward_from, backward_from_all};

/// One of LoRA's two factors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoraFactor {
    /// `lora_a`, `[rank, in_features]`.
    A,
    /// `lora_b`, `[out_features, rank]`.
    B,
}

/// Dropout of an adapter's input: [`QloraOps::seeded_dropout`] with this seed and probability.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraDropout {
    /// Picks the mask.
    pub seed: u64,
    /// Probability of zeroing an element.
    pub p: f32,
}

/// How [`QloraOps::lora_linear_4bit`] runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraTerms {
    /// Factor of the update.
    pub scaling: f32,
    /// Dropout of the update's input.
    pub dropout: Option<LoraDropout>,
    /// Only gradients are needed. The forward product, which they do not depend on, is skipped; the returned tensor is
    /// then uninitialised. Without autodiff there are no gradients and the product is computed all the same.
    pub gradients_only: bool,
}

/// Operations over 4-bit weights, and LoRA's dropout.
///
/// A frozen weight comes as [`Packed4bit`] or as a dense tensor; neither gets a gradient.
#[backend_extension(Cube, Flex, Autodiff)]
pub trait QloraOps: Backend {
    /// The dense weight `[out_features, in_features]` in `dtype`.
    fn dequantize_4bit(#[extension_type] weight: Packed4bit<Self>, dtype: FloatDType) -> FloatTensor<Self>;

    /// `y = x Wᵀ`, `[tokens, in_features]` to `[tokens, out_features]` in `out`, the dtype of `x` or f32;
    /// by way of one dense transient of `W` where a backend has nothing better.
    fn linear_4bit(
        x: FloatTensor<Self>,
        #[extension_type] weight: Packed4bit<Self>,
        out: FloatDType,
    ) -> FloatTensor<Self> {
        composed::linear_4bit::<Self>(x, weight, out)
    }

    /// `dx = dy W`, `[tokens, out_features]` to `[tokens, in_features]`, in the dtype of `dy`; by way of one
    /// dense transient of `W` where a backend has nothing better.
    fn linear_4bit_input_grad(dy: FloatTensor<Self>, #[extension_type] weight: Packed4bit<Self>) -> FloatTensor<Self> {
        composed::linear_4bit_input_grad::<Self>(dy, weight)
    }

    /// `y = x Wᵀ` with a frozen dense `W` `[out_features, in_features]` in the dtype of `x`, into `out`, the dtype of
    /// `x` or f32. There is no gradient of `W`.
    fn frozen_linear(x: FloatTensor<Self>, weight: FloatTensor<Self>, out: FloatDType) -> FloatTensor<Self> {
        composed::frozen_linear::<Self>(x, weight, out)
    }

    /// `dx = dy W` with a frozen dense `W`, in the dtype of `dy`.
    fn frozen_linear_input_grad(dy: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let dtype = float_dtype(dy.dtype());
        Self::matmul(dy, weight, dtype)
    }

    /// `y = x Wᵀ + scaling·dropout(x) lora_aᵀ lora_bᵀ` in the dtype of `x`, summed in f32 and rounded once. The
    /// factors are f32, `[rank, in_features]` and `[out_features, rank]`, and take part in the dtype of `x`.
    fn lora_linear_4bit(
        x: FloatTensor<Self>,
        #[extension_type] weight: Packed4bit<Self>,
        lora_a: FloatTensor<Self>,
        lora_b: FloatTensor<Self>,
        terms: LoraTerms,
    ) -> FloatTensor<Self> {
        let u = Self::low_rank_project(x.clone(), lora_a, LoraFactor::A, terms.scaling, terms.dropout);
        Self::linear_4bit_low_rank(x, weight, u, lora_b)
    }

    /// Base and update in one sum: `x Wᵀ + u Bᵀ` with `u` `[tokens, rank]` in the dtype of `x`, and f32 `lora_b`.
    /// A part of [`lora_linear_4bit`](Self::lora_linear_4bit), as are the three that follow: autodiff does not track them.
    fn linear_4bit_low_rank(
        x: FloatTensor<Self>,
        #[extension_type] weight: Packed4bit<Self>,
        u: FloatTensor<Self>,
        lora_b: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        composed::linear::<Self>(x, weight, u, lora_b)
    }

    /// `dx = dy W + dropout(v A)` with `v` `[tokens, rank]` in the dtype of `dy`, and f32 `lora_a`.
    fn linear_4bit_low_rank_input_grad(
        dy: FloatTensor<Self>,
        #[extension_type] weight: Packed4bit<Self>,
        v: FloatTensor<Self>,
        lora_a: FloatTensor<Self>,
        dropout: Option<LoraDropout>,
    ) -> FloatTensor<Self> {
        composed::input_grad::<Self>(dy, weight, v, lora_a, dropout)
    }

    /// `scaling·dropout(x) Aᵀ` or `scaling·dropout(x) B`, `[tokens, rank]` in the dtype of `x`; the factor is f32.
    fn low_rank_project(
        x: FloatTensor<Self>,
        factor: FloatTensor<Self>,
        which: LoraFactor,
        scaling: f32,
        dropout: Option<LoraDropout>,
    ) -> FloatTensor<Self> {
        composed::project::<Self>(x, factor, which, scaling, dropout)
    }

    /// The gradient of a factor, in f32: `productᵀ dropout(x)` `[rank, in_features]` for A, `xᵀ product`
    /// `[out_features, rank]` for B, with `product` `[tokens, rank]` in the dtype of `x`.
    fn low_rank_gradient(
        x: FloatTensor<Self>,
        product: FloatTensor<Self>,
        which: LoraFactor,
        dropout: Option<LoraDropout>,
    ) -> FloatTensor<Self> {
        composed::gradient::<Self>(x, product, which, dropout)
    }

    /// `lhs rhs` for matrices or equal batches of them, in `out`, the dtype of the operands or f32; f32
    /// operands are multiplied in full precision.
    ///
    /// Burn's own product rounds f32 operands to TF32's 11 bits on GPUs with tensor cores, which costs
    /// three digits of every logit. Narrower dtypes go to Burn's product.
    fn matmul(lhs: FloatTensor<Self>, rhs: FloatTensor<Self>, out: FloatDType) -> FloatTensor<Self>;

    /// Zeroes each element with probability `p`, in steps of 2^-16, and scales the others by `1 / (1 - p)`.
    ///
    /// Element `i` in row-major order is dropped when [`dropout_hash`]`(i, seed) < p * 2^16`: the same mask
    /// on every runtime, and nothing to save for the backward.
    fn seeded_dropout(x: FloatTensor<Self>, seed: u64, p: f32) -> FloatTensor<Self>;

    /// Uniform noise `[rows, width]` in `out`, each row between minus and plus its magnitude, f32 `[rows]`.
    ///
    /// Element `i` in row-major order is its row's magnitude times `(2 h + 1) / 2^16 - 1` with `h =` [`dropout_hash`]`(i, seed)`: the
    /// same noise on every runtime.
    fn seeded_noise(magnitudes: FloatTensor<Self>, width: usize, seed: u64, out: FloatDType) -> FloatTensor<Self>;
}

/// `y = x Wᵀ` for a frozen 4-bit weight.
///
/// # Shapes
/// - `x`: `[tokens, in_features]`, f32, bf16 or f16
/// - output: `[tokens, out_features]` in `out`, the dtype of `x` or f32
///
/// # Panics
/// When `x` has another number of features than the weight.
pub fn linear_4bit(x: Tensor<2>, weight: Packed4bit<Dispatch>, out: FloatDType) -> Tensor<2> {
    check_features("linear_4bit", &x, &weight);
    Tensor::from_dispatch(<Dispatch as QloraOps>::linear_4bit(x.into_dispatch(), weight, out))
}

/// `y = x Wᵀ + scaling·dropout(x) lora_aᵀ lora_bᵀ` over a frozen 4-bit weight.
///
/// # Shapes
/// - `x`: `[tokens, in_features]`, f32, bf16 or f16
/// - `lora_a`: `[rank, in_features]`, `lora_b`: `[out_features, rank]`, f32
/// - output: `[tokens, out_features]`, dtype of `x`
///
/// # Panics
/// When `x` has another number of features than the weight, or the factors are not f32.
pub fn lora_linear_4bit(
    x: Tensor<2>,
    weight: Packed4bit<Dispatch>,
    lora_a: Tensor<2>,
    lora_b: Tensor<2>,
    terms: LoraTerms,
) -> Tensor<2> {
    check_features("lora_linear_4bit", &x, &weight);
    assert!(lora_a.dtype() == DType::F32 && lora_b.dtype() == DType::F32, "lora_linear_4bit: factors are f32");
    Tensor::from_dispatch(<Dispatch as QloraOps>::lora_linear_4bit(
        x.into_dispatch(),
        weight,
        lora_a.into_dispatch(),
        lora_b.into_dispatch(),
        terms,
    ))
}

fn check_features(operation: &str, x: &Tensor<2>, weight: &Packed4bit<Dispatch>) {
    let ([_, features], expected) = (x.dims(), weight.layout.in_features);
    assert_eq!(features, expected, "{operation}: x has {features} features, the weight {expected}");
}

/// `y = x Wᵀ` for a frozen dense weight `[out_features, in_features]` in the dtype of `x`; on the host in any that `x`'s
/// dtype holds all values of.
///
/// # Shapes
/// - `x`: `[tokens, in_features]`
/// - output: `[tokens, out_features]` in `out`, the dtype of `x` or f32
pub fn frozen_linear(x: Tensor<2>, weight: Tensor<2>, out: FloatDType) -> Tensor<2> {
    let one_dtype = x.dtype() == weight.dtype() || client_of(&x.device()).is_none();
    assert!(one_dtype, "frozen_linear: both operands must have one dtype on this device");
    Tensor::from_dispatch(<Dispatch as QloraOps>::frozen_linear(x.into_dispatch(), weight.into_dispatch(), out))
}

/// The dense weight `[out_features, in_features]`, without autodiff.
pub fn dequantize_4bit(weight: Packed4bit<Dispatch>, dtype: FloatDType) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as QloraOps>::dequantize_4bit(weight, dtype))
}

/// The product of two matrices, or of equal batches of them; f32 operands in full precision on every runtime.
///
/// # Shapes
/// `[.., m, k]` and `[.., k, n]` to `[.., m, n]`; the leading dimensions are equal.
///
/// # Panics
/// When the dtypes differ: Burn would read one as the other.
pub fn matmul<const D: usize>(lhs: Tensor<D>, rhs: Tensor<D>) -> Tensor<D> {
    let out = float_dtype(lhs.dtype());
    matmul_into(lhs, rhs, out)
}

/// [`matmul`] with the sums kept in `out`, the dtype of the operands or f32.
///
/// # Panics
/// When the dtypes differ: Burn would read one as the other.
pub fn matmul_into<const D: usize>(lhs: Tensor<D>, rhs: Tensor<D>, out: FloatDType) -> Tensor<D> {
    assert_eq!(lhs.dtype(), rhs.dtype(), "matmul: both operands must have one dtype");
    Tensor::from_dispatch(<Dispatch as QloraOps>::matmul(lhs.into_dispatch(), rhs.into_dispatch(), out))
}

/// `scaling · x lora_aᵀ lora_bᵀ`, summed in f32, without a graph: the update that [`lora_linear_4bit`] adds, by itself.
///
/// # Shapes
/// - `x`: `[tokens, in_features]`, f32, bf16 or f16
/// - `lora_a`: `[rank, in_features]`, `lora_b`: `[out_features, rank]`, f32; they take part in the dtype of `x`
/// - output: `[tokens, out_features]`, f32
pub fn low_rank_update(x: Tensor<2>, lora_a: Tensor<2>, lora_b: Tensor<2>, scaling: f32) -> Tensor<2> {
    let dtype = float_dtype(x.dtype());
    let (x, lora_a) = (x.into_dispatch(), lora_a.into_dispatch());
    let u = <Dispatch as QloraOps>::low_rank_project(x, lora_a, LoraFactor::A, scaling, None);
    matmul_into(Tensor::from_dispatch(u), lora_b.cast(dtype).transpose(), FloatDType::F32)
}

/// Dropout whose mask is a pure function of `seed` and the element's index.
///
/// # Shapes
/// `[tokens, features]`, same dtype; the mask has a period of 2^32 elements.
pub fn seeded_dropout(x: Tensor<2>, seed: u64, p: f32) -> Tensor<2> {
    if p == 0.0 {
        return x;
    }
    Tensor::from_dispatch(<Dispatch as QloraOps>::seeded_dropout(x.into_dispatch(), seed, p))
}

/// Uniform noise that is a pure function of `seed`; see [`QloraOps::seeded_noise`].
///
/// # Shapes
/// `magnitudes` f32 `[rows]` to `[rows, width]` in `out`; the noise has a period of 2^32 elements.
pub fn seeded_noise(magnitudes: Tensor<1>, width: usize, seed: u64, out: FloatDType) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as QloraOps>::seeded_noise(magnitudes.into_dispatch(), width, seed, out))
}

/// The format of a float dtype.
pub(crate) fn format_of(dtype: DType) -> FloatFormat {
    match dtype {
        DType::BF16 => FloatFormat::BF16,
        DType::F16 => FloatFormat::F16,
        _ => FloatFormat::F32,
    }
}

/// The float dtype behind a general one.
///
/// # Panics
/// On a dtype that is no float: callers pass the dtype of a float tensor.
pub(crate) fn float_dtype(dtype: DType) -> FloatDType {
    dtype.into()
}
