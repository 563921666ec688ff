//! Backend extensions: the operations that Burn does not have.
//!
//! [`QloraOps`] is implemented for Flex, for every CubeCL runtime and, with hand-written backward
//! passes, for autodiff over either. The functions here are the tensor-level entry points.
//!
//! # What a 4-bit product saves for its backward
//!
//! For `y = x Wᵀ` with a frozen `W`, `dx = dy W` needs neither `x` nor a dense `W`: the state is the
//! packed codes and block statistics, which the model holds anyway. There is no gradient of `W`.
//! `W` is dequantized into one transient of its own size, in the dtype of `x`, and dropped after the
//! product.
//!
//! # Where values are rounded
//!
//! As in bitsandbytes 0.50.2: the forward product uses codebook times absmax rounded once, to the dtype of `x`;
//! the input gradient (and [`dequantize_4bit`]) rounds to the quantization state's dtype first. The two differ
//! only where activations are wider than that dtype, by half an ulp of it.

mod autodiff;
mod cube;
mod flex;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, TensorMetadata, backend_extension};
use burn::tensor::{DType, FloatDType, Int, Tensor};
use nf4_quant::{FloatFormat, QuantType};

/// What the packed buffers of a 4-bit weight of shape `[out_features, in_features]` mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Layout4bit {
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight.
    pub in_features: usize,
    /// The codebook.
    pub quant_type: QuantType,
    /// Elements that share one absmax; blocks run over the row-major weight and may cross rows.
    pub blocksize: usize,
    /// The quantization state's dtype, that of the weight before it was quantized.
    pub dtype: FloatFormat,
    /// Double quantization of the absmax, if any.
    pub nested: Option<NestedLayout>,
}

/// Double quantization: `absmax = map[code] * nested_absmax[block / blocksize] + offset`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NestedLayout {
    /// Absmax values that share one nested absmax.
    pub blocksize: usize,
    /// The mean that was subtracted from the absmax values before they were quantized.
    pub offset: f32,
}

/// Operations over 4-bit weights, and LoRA's dropout.
///
/// A weight travels as three integer tensors, so that no part of it can enter the autodiff graph:
/// - `codes` u32 `[ceil(out * in / 8)]`: the packed byte stream, little-endian;
/// - `absmax` u32 `[blocks]`, the bits of f32 values, or, double-quantized, u8 codes four to a word;
/// - `nested_absmax` u32 `[ceil(blocks / nested blocksize)]`, the bits of f32 values (one unused
///   element without double quantization).
#[backend_extension(Cube, Flex, Autodiff)]
pub trait QloraOps: Backend {
    /// The dense weight `[out_features, in_features]` in `dtype`.
    fn dequantize_4bit(
        codes: IntTensor<Self>,
        absmax: IntTensor<Self>,
        nested_absmax: IntTensor<Self>,
        layout: Layout4bit,
        dtype: FloatDType,
    ) -> FloatTensor<Self>;

    /// `y = x Wᵀ`, `[tokens, in_features]` to `[tokens, out_features]` in `out`, the dtype of `x` or f32;
    /// by way of one dense transient of `W` where a backend has nothing better.
    fn linear_4bit(
        x: FloatTensor<Self>,
        codes: IntTensor<Self>,
        absmax: IntTensor<Self>,
        nested_absmax: IntTensor<Self>,
        layout: Layout4bit,
        out: FloatDType,
    ) -> FloatTensor<Self> {
        let layout = Layout4bit { dtype: format_of(x.dtype()), ..layout };
        let weight = Self::dequantize_4bit(codes, absmax, nested_absmax, layout, float_dtype(x.dtype()));
        Self::matmul(x, Self::float_swap_dims(weight, 0, 1), out)
    }

    /// `dx = dy W`, `[tokens, out_features]` to `[tokens, in_features]`, in the dtype of `dy`; by way of one
    /// dense transient of `W` where a backend has nothing better.
    fn linear_4bit_input_grad(
        dy: FloatTensor<Self>,
        codes: IntTensor<Self>,
        absmax: IntTensor<Self>,
        nested_absmax: IntTensor<Self>,
        layout: Layout4bit,
    ) -> FloatTensor<Self> {
        let dtype = float_dtype(dy.dtype());
        let weight = Self::dequantize_4bit(codes, absmax, nested_absmax, layout, dtype);
        Self::matmul(dy, weight, dtype)
    }

    /// `lhs rhs` for matrices or equal batches of them, in `out`, the dtype of the operands or f32; f32
    /// operands are multiplied in full precision.
    ///
    /// Burn's own product rounds f32 operands to TF32's 11 bits on GPUs with tensor cores, which costs
    /// three digits of every logit. Narrower dtypes go to Burn's product.
    fn matmul(lhs: FloatTensor<Self>, rhs: FloatTensor<Self>, out: FloatDType) -> FloatTensor<Self>;

    /// Zeroes each element with probability `p` and scales the others by `1 / (1 - p)`.
    ///
    /// Element `i` in row-major order is dropped when [`dropout_hash`]`(i, seed) < p * 2^32`: the same mask
    /// on every runtime, and nothing to save for the backward.
    fn seeded_dropout(x: FloatTensor<Self>, seed: u64, p: f32) -> FloatTensor<Self>;
}

/// A uniform u32 from an element's index and a seed: two rounds of MurmurHash3's 32-bit finalizer.
pub fn dropout_hash(index: u32, seed: u64) -> u32 {
    let round = |mut h: u32| {
        h = (h ^ (h >> 16)).wrapping_mul(0x85EB_CA6B);
        h = (h ^ (h >> 13)).wrapping_mul(0xC2B2_AE35);
        h ^ (h >> 16)
    };
    round(round(index ^ seed as u32) ^ (seed >> 32) as u32)
}

/// The threshold below which [`dropout_hash`] drops an element.
fn dropout_threshold(p: f32) -> u32 {
    (f64::from(p) * 4_294_967_296.0) as u32
}

/// The packed buffers of one weight on a device; see [`QloraOps`] for their layout.
#[derive(Clone, Debug)]
pub struct Buffers4bit {
    /// Packed codes.
    pub codes: Tensor<1, Int>,
    /// Bits of absmax values, or packed 8-bit codes.
    pub absmax: Tensor<1, Int>,
    /// Bits of nested absmax values.
    pub nested_absmax: Tensor<1, Int>,
}

/// `y = x Wᵀ` for a frozen 4-bit weight.
///
/// # Shapes
/// - `x`: `[tokens, in_features]`, f32, bf16 or f16
/// - output: `[tokens, out_features]` in `out`, the dtype of `x` or f32
pub fn linear_4bit(x: Tensor<2>, weight: &Buffers4bit, layout: Layout4bit, out: FloatDType) -> Tensor<2> {
    let [_, features] = x.dims();
    assert_eq!(
        features, layout.in_features,
        "linear_4bit: x has {features} features, the weight {}",
        layout.in_features
    );
    let Buffers4bit { codes, absmax, nested_absmax } = weight.clone();
    Tensor::from_dispatch(<Dispatch as QloraOps>::linear_4bit(
        x.into_dispatch(),
        codes.into_dispatch(),
        absmax.into_dispatch(),
        nested_absmax.into_dispatch(),
        layout,
        out,
    ))
}

/// The dense weight `[out_features, in_features]`, without autodiff.
pub fn dequantize_4bit(weight: &Buffers4bit, layout: Layout4bit, dtype: FloatDType) -> Tensor<2> {
    let Buffers4bit { codes, absmax, nested_absmax } = weight.clone();
    Tensor::from_dispatch(<Dispatch as QloraOps>::dequantize_4bit(
        codes.into_dispatch(),
        absmax.into_dispatch(),
        nested_absmax.into_dispatch(),
        layout,
        dtype,
    ))
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
