//! The tensor-core products of `nf4_quant::matmul` and `fused_kernels::low_rank` on Burn's tensors.
//!
//! Every function answers `None` where the device or the shape has no kernel; its caller then composes the
//! result from other operations.

use super::cube_tensors::{device_weight, empty};
use super::{LoraDropout, LoraFactor, Packed4bit, format_of};
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use fused_kernels::low_rank::{self, Factor, FactorLayout, Gradient, Output, Projection};
use fused_kernels::{Dropout, KernelError};
use nf4_quant::FloatFormat;
use nf4_quant::matmul::{Direction, LowRank, Mask, Operands, Path, Problem, Weight, matmul, path};

/// The low-rank part of a product.
#[derive(Clone, Copy)]
pub(super) struct Update<'a> {
    /// `[tokens, rank]` in the dtype of `x`.
    pub product: &'a CubeTensor,
    /// f32.
    pub factor: &'a CubeTensor,
    /// Of the part, in a gradient.
    pub dropout: Option<LoraDropout>,
}

/// `x Wᵀ` or `x W`, with an optional low-rank part.
pub(super) fn product_4bit(
    x: &CubeTensor,
    weight: &Packed4bit<CubeBackend>,
    direction: Direction,
    low_rank: Option<Update<'_>>,
    out: DType,
) -> Option<CubeTensor> {
    let layout = weight.layout;
    let format = format_of(x.dtype);
    // The gradient rounds to the dtype of the quantization state first, which a fused product does not.
    if direction == Direction::InputGradient && ![FloatFormat::F32, format].contains(&layout.dtype) {
        return None;
    }
    let features = [layout.out_features, layout.in_features];
    let problem = problem(x, features, direction, low_rank, Some(layout.blocksize), out);
    let path = path(&x.client, &problem)?;
    // The kernel for a few tokens has no dropout.
    if path == Path::Gemv && low_rank.is_some_and(|update| update.dropout.is_some()) {
        return None;
    }
    let weight = device_weight(weight);
    Some(launch(path, x, &problem, Weight::FourBit(&weight), low_rank))
}

/// `x Wᵀ` or `x W` for a dense `W` `[out_features, in_features]` in the dtype of `x`.
pub(super) fn product_dense(
    x: &CubeTensor,
    weight: &CubeTensor,
    direction: Direction,
    out: DType,
) -> Option<CubeTensor> {
    let [out_features, in_features] = weight.meta.shape().dims();
    let problem = problem(x, [out_features, in_features], direction, None, None, out);
    let path = path(&x.client, &problem)?;
    let weight = into_contiguous(weight.clone());
    Some(launch(path, x, &problem, Weight::Dense(&weight.handle), None))
}

fn problem(
    x: &CubeTensor,
    [out_features, in_features]: [usize; 2],
    direction: Direction,
    low_rank: Option<Update<'_>>,
    blocksize: Option<usize>,
    out: DType,
) -> Problem {
    Problem {
        tokens: x.meta.shape()[0],
        out_features,
        in_features,
        direction,
        rank: low_rank.map_or(0, |update| update.product.meta.shape()[1]),
        format: format_of(x.dtype),
        out: format_of(out),
        blocksize,
    }
}

fn launch(
    path: Path,
    x: &CubeTensor,
    problem: &Problem,
    weight: Weight<'_>,
    low_rank: Option<Update<'_>>,
) -> CubeTensor {
    let x = into_contiguous(x.clone());
    let mask = low_rank.and_then(|update| dropout(update.dropout));
    let mask = mask.map(|Dropout { seed, threshold, scale }| Mask { seed, threshold, scale });
    let low_rank = low_rank.map(|Update { product, factor, .. }| [product, factor].map(|x| into_contiguous(x.clone())));
    let operands = Operands {
        x: &x.handle,
        weight,
        low_rank: low_rank.as_ref().map(|[product, factor]| LowRank {
            product: &product.handle,
            factor: &factor.handle,
            mask,
        }),
        bias: None,
    };
    let dtype = if problem.out == FloatFormat::F32 { DType::F32 } else { x.dtype };
    let out = empty(&x.client, &x.device, Shape::new([problem.tokens, problem.features()]), dtype);
    matmul(&x.client, path, problem, &operands, &out.handle)
        .unwrap_or_else(|e| panic!("operands that fitted when the path was chosen were refused: {e}"));
    out
}

/// The 16-bit format of `x`, where its device runs the low-rank kernels.
fn half_format(x: &CubeTensor) -> Option<fused_kernels::FloatFormat> {
    let format = match x.dtype {
        DType::BF16 => fused_kernels::FloatFormat::BF16,
        DType::F16 => fused_kernels::FloatFormat::F16,
        _ => return None,
    };
    low_rank::supports(&x.client, format).then_some(format)
}

fn factor_layout(which: LoraFactor) -> FactorLayout {
    match which {
        LoraFactor::A => FactorLayout::RankFirst,
        LoraFactor::B => FactorLayout::FeaturesFirst,
    }
}

fn dropout(dropout: Option<LoraDropout>) -> Option<Dropout> {
    dropout.map(|LoraDropout { seed, p }| Dropout::new(seed, p))
}

fn accepted(result: Result<(), KernelError>) -> Option<()> {
    match result {
        Ok(()) => Some(()),
        // A rank beyond the kernels' is composed from other operations.
        Err(KernelError::Rank(_)) => None,
        Err(e) => panic!("low-rank operands that Burn holds were refused: {e}"),
    }
}

/// `QloraOps::low_rank_project`.
pub(super) fn project(
    x: &CubeTensor,
    factor: &CubeTensor,
    which: LoraFactor,
    scaling: f32,
    mask: Option<LoraDropout>,
) -> Option<CubeTensor> {
    let format = half_format(x)?;
    let [tokens, features]: [usize; 2] = x.meta.shape().dims();
    let rank = factor.meta.shape().num_elements() / features;
    let (x, factor) = (into_contiguous(x.clone()), into_contiguous(factor.clone()));
    let values = Factor { values: &factor.handle, features, rank, layout: factor_layout(which) };
    let packed = match low_rank::pack(&x.client, values, format) {
        Ok(packed) => packed,
        Err(e) => return accepted(Err(e)).and(None),
    };
    let out = empty(&x.client, &x.device, Shape::new([tokens, rank]), x.dtype);
    let operands = Projection { x: &x.handle, factor: &packed, out: &out.handle };
    accepted(low_rank::project(&x.client, operands, tokens, Output::Half, scaling, dropout(mask)))?;
    Some(out)
}

/// `QloraOps::low_rank_gradient`.
pub(super) fn gradient(
    x: &CubeTensor,
    product: &CubeTensor,
    which: LoraFactor,
    mask: Option<LoraDropout>,
) -> Option<CubeTensor> {
    let format = half_format(x)?;
    let [tokens, features]: [usize; 2] = x.meta.shape().dims();
    let rank = product.meta.shape()[1];
    let (x, product) = (into_contiguous(x.clone()), into_contiguous(product.clone()));
    let shape = match which {
        LoraFactor::A => [rank, features],
        LoraFactor::B => [features, rank],
    };
    let out = empty(&x.client, &x.device, Shape::new(shape), DType::F32);
    let operands = Gradient { x: &x.handle, product: &product.handle, out: &out.handle };
    let shape = low_rank::Shape { tokens, features, rank };
    accepted(low_rank::gradient(&x.client, operands, shape, factor_layout(which), dropout(mask), format))?;
    Some(out)
}
