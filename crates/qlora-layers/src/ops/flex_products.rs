//! Products of few tokens on the CPU, where reading the weight is the work.
//!
//! A token's result has the same bits whatever other tokens are in the product, up to [`FEW_TOKENS`]; beyond, Burn's
//! matrix product adds in orders of its own.

use super::flex::words;
use super::{Packed4bit, float_dtype};
use burn::backend::DispatchTensorKind;
use burn::backend::Flex;
use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, Element as BurnElement, FloatDType, Tensor, TensorData};
use burn_flex::FlexTensor;
use half::{bf16, f16};
use nf4_quant::Element;
use nf4_quant::host_product::{AbsmaxView, WeightView, dense_product, product};
use rayon::prelude::*;

/// The most tokens of a product that the CPU takes row by row of its weight, from the codes of a 4-bit one.
///
/// With so many, a product from codes took as long as dequantizing and Burn's product on a quiet machine; a dense one takes
/// longer from 32 on, and goes row by row all the same, so that tokens of chunks and steps have the same bits.
pub const FEW_TOKENS: usize = 128;

/// Elements per task of [`in_bf16`].
const NARROWED: usize = 1 << 14;

/// An element of a tensor that a product takes.
trait ProductElement: Element + BurnElement + bytemuck::Pod {}

impl<T: Element + BurnElement + bytemuck::Pod> ProductElement for T {}

/// `y = x Wᵀ` of few tokens, or none where there are more.
pub(super) fn linear_4bit(x: &FlexTensor, weight: &Packed4bit<Flex>, out: FloatDType) -> Option<FlexTensor> {
    if x.layout().shape()[0] > FEW_TOKENS {
        return None;
    }
    Some(match float_dtype(x.dtype()) {
        FloatDType::BF16 => from_codes::<bf16>(x, weight, out),
        FloatDType::F16 => from_codes::<f16>(x, weight, out),
        _ => from_codes::<f32>(x, weight, out),
    })
}

fn from_codes<T: ProductElement>(x: &FlexTensor, weight: &Packed4bit<Flex>, out: FloatDType) -> FlexTensor {
    let Packed4bit { codes, absmax, nested_absmax, layout } = weight;
    let (codes, absmax, nested) = (words(codes), words(absmax), words(nested_absmax));
    let blocks = layout.num_blocks();
    let absmax = match layout.nested_blocksize {
        None => AbsmaxView::Plain(&bytemuck::cast_slice(&absmax)[..blocks]),
        Some(blocksize) => {
            // The last word is the offset.
            let (nested, offset) = nested.split_at(blocks.div_ceil(blocksize));
            let codes = &bytemuck::cast_slice(&absmax)[..blocks];
            AbsmaxView::Nested {
                codes,
                absmax: bytemuck::cast_slice(nested),
                offset: f32::from_bits(offset[0]),
                blocksize,
            }
        }
    };
    let view = WeightView {
        // The words are padded to a multiple of four bytes.
        codes: &bytemuck::cast_slice(&codes)[..layout.num_elements().div_ceil(2)],
        absmax,
        quant_type: layout.quant_type,
        blocksize: layout.blocksize,
        out_features: layout.out_features,
        in_features: layout.in_features,
    };
    let x = x.to_contiguous();
    let shape = [x.layout().shape()[0], layout.out_features];
    let mut y = vec![0.0; shape[0] * shape[1]];
    product(x.storage::<T>(), &view, &mut y)
        .unwrap_or_else(|e| panic!("a weight that was valid when it was uploaded can't be multiplied: {e}"));
    result(y, shape, out)
}

/// `y = x Wᵀ` of few tokens with a contiguous dense weight in the dtype of `x`, or in bf16 beside f32; or none otherwise.
pub(super) fn frozen_linear(x: &FlexTensor, weight: &FlexTensor, out: FloatDType) -> Option<FlexTensor> {
    if x.layout().shape()[0] > FEW_TOKENS {
        return None;
    }
    match (float_dtype(x.dtype()), float_dtype(weight.dtype())) {
        (FloatDType::F32, FloatDType::BF16) => from_dense::<f32, bf16>(x, weight, out),
        (FloatDType::F32, FloatDType::F32) => from_dense::<f32, f32>(x, weight, out),
        (FloatDType::BF16, FloatDType::BF16) => from_dense::<bf16, bf16>(x, weight, out),
        (FloatDType::F16, FloatDType::F16) => from_dense::<f16, f16>(x, weight, out),
        _ => None,
    }
}

/// `lhs rhs` for few rows of `lhs` and a `rhs` that is the transpose of a contiguous matrix, as of a linear layer's weight,
/// or none otherwise.
pub(super) fn matmul(lhs: &FlexTensor, rhs: &FlexTensor, out: FloatDType) -> Option<FlexTensor> {
    if lhs.layout().num_dims() != 2 || lhs.dtype() != rhs.dtype() {
        return None;
    }
    frozen_linear(lhs, &rhs.transpose(0, 1), out)
}

/// A float tensor in bf16, where it is f32 on the host and has the same values in bf16.
pub fn in_bf16<const D: usize>(tensor: &Tensor<D>) -> Option<Tensor<D>> {
    let DispatchTensorKind::Flex(flex) = tensor.clone().without_autodiff().into_dispatch().kind else { return None };
    let flex = flex.float();
    if float_dtype(flex.dtype()) != FloatDType::F32 {
        return None;
    }
    let flex = flex.to_contiguous();
    let narrow = flex.storage::<f32>().par_iter().with_min_len(NARROWED).map(|&value| {
        let narrow = <bf16 as Element>::from_f32(value);
        (narrow.to_f32().to_bits() == value.to_bits()).then_some(narrow)
    });
    let narrow: Vec<bf16> = narrow.collect::<Option<_>>()?;
    Some(Tensor::from_data(TensorData::new(narrow, tensor.dims()), (&tensor.device(), DType::BF16)))
}

fn from_dense<X: ProductElement, W: ProductElement>(
    x: &FlexTensor,
    weight: &FlexTensor,
    out: FloatDType,
) -> Option<FlexTensor> {
    let values = weight.as_slice::<W>()?;
    let (x, shape) = (x.to_contiguous(), weight.layout().shape());
    let (weight_shape, shape) = ([shape[0], shape[1]], [x.layout().shape()[0], shape[0]]);
    let mut y = vec![0.0; shape[0] * shape[1]];
    dense_product(x.storage::<X>(), values, weight_shape, &mut y)
        .unwrap_or_else(|e| panic!("tensors that Burn holds were refused: {e}"));
    Some(result(y, shape, out))
}

/// Sums in f32, rounded once to `out`.
fn result(y: Vec<f32>, shape: [usize; 2], out: FloatDType) -> FlexTensor {
    let y = FlexTensor::from_data(TensorData::new(y, shape));
    if out == FloatDType::F32 { y } else { Flex::float_cast(y, out) }
}
