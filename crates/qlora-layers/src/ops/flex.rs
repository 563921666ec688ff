//! The CPU implementation, on Burn's Flex backend and the parallel host codec.

use super::{Layout4bit, Packed4bit, QloraOps, composed, dropout_hash, flex_products, noise_unit};
use burn::backend::Flex;
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{Element as BurnElement, FloatDType, TensorData};
use burn_flex::FlexTensor;
use fused_kernels::Dropout;
use half::{bf16, f16};
use nf4_quant::{Element, FloatFormat, dequantize_blocks, signed_dynamic_map};
use rayon::prelude::*;

/// Work per task of the element-wise loops: large enough to hide the hand-over between threads.
const CHUNK: usize = 1 << 14;

/// The contiguous words of a 1-D u32 tensor.
pub(crate) fn words(tensor: &FlexTensor) -> std::borrow::Cow<'_, [u32]> {
    match tensor.as_slice::<u32>() {
        Some(slice) => slice.into(),
        None => tensor.to_contiguous().storage::<u32>().to_vec().into(),
    }
}

/// The absmax of every block in f32; two roundings for double-quantized ones, as the format asks.
fn expand_absmax(absmax: &[u32], nested_absmax: &[u32], layout: Layout4bit) -> Vec<f32> {
    let blocks = layout.num_blocks();
    match layout.nested_blocksize {
        None => absmax[..blocks].iter().map(|&bits| f32::from_bits(bits)).collect(),
        Some(blocksize) => {
            let map = signed_dynamic_map();
            let offset = f32::from_bits(nested_absmax[blocks.div_ceil(blocksize)]);
            bytemuck::cast_slice::<u32, u8>(absmax)[..blocks]
                .iter()
                .enumerate()
                .map(|(i, &code)| map[usize::from(code)] * f32::from_bits(nested_absmax[i / blocksize]) + offset)
                .collect()
        }
    }
}

/// [`dequantize_blocks`] of a weight whose parts were checked when it was uploaded.
fn dequantize_checked<T: Element>(codes: &[u8], absmax: &[f32], layout: Layout4bit, out: &mut [T]) {
    // The words are padded to a multiple of four bytes; the codec takes the exact stream.
    let codes = &codes[..out.len().div_ceil(2)];
    dequantize_blocks(codes, absmax, layout.quant_type, layout.blocksize, out)
        .unwrap_or_else(|e| panic!("a weight that was valid when it was uploaded can't be dequantized: {e}"));
}

/// Dequantizes to `S`, the format of the quantization state, and converts to `T`.
fn dequantize<S: Element, T: Element + BurnElement>(codes: &[u8], absmax: &[f32], layout: Layout4bit) -> TensorData {
    let shape = [layout.out_features, layout.in_features];
    let mut stored = vec![S::from_f32(0.0); shape[0] * shape[1]];
    dequantize_checked(codes, absmax, layout, &mut stored);
    let mut out = vec![T::from_f32(0.0); stored.len()];
    out.par_chunks_mut(CHUNK).zip(stored.par_chunks(CHUNK)).for_each(|(out, stored)| {
        out.iter_mut().zip(stored).for_each(|(out, value)| *out = T::from_f32(value.to_f32()));
    });
    TensorData::new(out, shape)
}

/// Dequantizes straight to `T`; the state's format is `T`, or `T` holds every value of it and more.
fn dequantize_as<T: Element + BurnElement>(codes: &[u8], absmax: &[f32], layout: Layout4bit) -> TensorData {
    match layout.dtype {
        format if format == T::FORMAT => {
            let shape = [layout.out_features, layout.in_features];
            let mut out = vec![T::from_f32(0.0); shape[0] * shape[1]];
            dequantize_checked(codes, absmax, layout, &mut out);
            TensorData::new(out, shape)
        }
        FloatFormat::F32 => dequantize::<f32, T>(codes, absmax, layout),
        FloatFormat::BF16 => dequantize::<bf16, T>(codes, absmax, layout),
        FloatFormat::F16 => dequantize::<f16, T>(codes, absmax, layout),
    }
}

/// Applies the dropout mask to a contiguous tensor of `T`.
fn dropout<T: Element + BurnElement + bytemuck::Pod>(mut x: FlexTensor, seed: u64, p: f32) -> FlexTensor {
    let Dropout { threshold, scale, .. } = Dropout::new(seed, p);
    x.storage_mut::<T>().par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, values)| {
        for (i, value) in values.iter_mut().enumerate() {
            let keep = dropout_hash((chunk * CHUNK + i) as u32, seed) >= threshold;
            *value = T::from_f32(if keep { value.to_f32() * scale } else { 0.0 });
        }
    });
    x
}

/// Noise of `T` whose rows have these magnitudes.
fn noise<T: Element + BurnElement>(magnitudes: &FlexTensor, width: usize, seed: u64) -> FlexTensor {
    let magnitudes = magnitudes.to_contiguous();
    let magnitudes = magnitudes.storage::<f32>();
    let mut values = vec![T::from_f32(0.0); magnitudes.len() * width];
    values.par_chunks_mut(width.max(1)).zip(magnitudes).enumerate().for_each(|(row, (values, magnitude))| {
        for (i, value) in values.iter_mut().enumerate() {
            *value = T::from_f32(magnitude * noise_unit((row * width + i) as u32, seed));
        }
    });
    FlexTensor::from_data(TensorData::new(values, [magnitudes.len(), width]))
}

impl QloraOps for Flex {
    fn dequantize_4bit(weight: Packed4bit<Self>, dtype: FloatDType) -> FloatTensor<Self> {
        let Packed4bit { codes, absmax, nested_absmax, layout } = weight;
        let codes = words(&codes);
        let bytes = bytemuck::cast_slice::<u32, u8>(&codes);
        let absmax = expand_absmax(&words(&absmax), &words(&nested_absmax), layout);
        FlexTensor::from_data(match dtype {
            FloatDType::BF16 => dequantize_as::<bf16>(bytes, &absmax, layout),
            FloatDType::F16 => dequantize_as::<f16>(bytes, &absmax, layout),
            _ => dequantize_as::<f32>(bytes, &absmax, layout),
        })
    }

    fn linear_4bit(x: FloatTensor<Self>, weight: Packed4bit<Self>, out: FloatDType) -> FloatTensor<Self> {
        flex_products::linear_4bit(&x, &weight, out).unwrap_or_else(|| composed::linear_4bit::<Self>(x, weight, out))
    }

    fn frozen_linear(x: FloatTensor<Self>, weight: FloatTensor<Self>, out: FloatDType) -> FloatTensor<Self> {
        flex_products::frozen_linear(&x, &weight, out).unwrap_or_else(|| {
            let weight = Self::float_cast(weight, x.dtype().into());
            composed::frozen_linear::<Self>(x, weight, out)
        })
    }

    fn frozen_linear_input_grad(dy: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let dtype = FloatDType::from(dy.dtype());
        Self::matmul(dy, Self::float_cast(weight, dtype), dtype)
    }

    fn matmul(lhs: FloatTensor<Self>, rhs: FloatTensor<Self>, out: FloatDType) -> FloatTensor<Self> {
        if let Some(product) = flex_products::matmul(&lhs, &rhs, out) {
            return product;
        }
        match FloatDType::from(lhs.dtype()) == out {
            true => Self::float_matmul(lhs, rhs),
            false => Self::float_matmul(Self::float_cast(lhs, out), Self::float_cast(rhs, out)),
        }
    }

    fn seeded_dropout(x: FloatTensor<Self>, seed: u64, p: f32) -> FloatTensor<Self> {
        let x = x.to_contiguous();
        match FloatDType::from(x.dtype()) {
            FloatDType::BF16 => dropout::<bf16>(x, seed, p),
            FloatDType::F16 => dropout::<f16>(x, seed, p),
            _ => dropout::<f32>(x, seed, p),
        }
    }

    fn seeded_noise(magnitudes: FloatTensor<Self>, width: usize, seed: u64, out: FloatDType) -> FloatTensor<Self> {
        match out {
            FloatDType::BF16 => noise::<bf16>(&magnitudes, width, seed),
            FloatDType::F16 => noise::<f16>(&magnitudes, width, seed),
            _ => noise::<f32>(&magnitudes, width, seed),
        }
    }
}
