//! Products out of other operations, for backends without fused kernels.

use super::{Layout4bit, LoraDropout, LoraFactor, Packed4bit, QloraOps, float_dtype, format_of};
use burn::backend::TensorMetadata;
use burn::backend::tensor::FloatTensor;
use burn::tensor::FloatDType;

fn dropped<B: QloraOps>(x: FloatTensor<B>, dropout: Option<LoraDropout>) -> FloatTensor<B> {
    match dropout {
        Some(LoraDropout { seed, p }) => B::seeded_dropout(x, seed, p),
        None => x,
    }
}

/// `B::linear_4bit`, by way of one dense transient of `W`.
pub(super) fn linear_4bit<B: QloraOps>(x: FloatTensor<B>, weight: Packed4bit<B>, out: FloatDType) -> FloatTensor<B> {
    let layout = Layout4bit { dtype: format_of(x.dtype()), ..weight.layout };
    let weight = B::dequantize_4bit(Packed4bit { layout, ..weight }, float_dtype(x.dtype()));
    frozen_linear::<B>(x, weight, out)
}

/// `B::linear_4bit_input_grad`, by way of one dense transient of `W`.
pub(super) fn linear_4bit_input_grad<B: QloraOps>(dy: FloatTensor<B>, weight: Packed4bit<B>) -> FloatTensor<B> {
    let dtype = float_dtype(dy.dtype());
    let weight = B::dequantize_4bit(weight, dtype);
    B::matmul(dy, weight, dtype)
}

/// `B::frozen_linear`.
pub(super) fn frozen_linear<B: QloraOps>(x: FloatTensor<B>, weight: FloatTensor<B>, out: FloatDType) -> FloatTensor<B> {
    B::matmul(x, B::float_swap_dims(weight, 0, 1), out)
}

/// `B::low_rank_project`.
pub(super) fn project<B: QloraOps>(
    x: FloatTensor<B>,
    factor: FloatTensor<B>,
    which: LoraFactor,
    scaling: f32,
    dropout: Option<LoraDropout>,
) -> FloatTensor<B> {
    let dtype = float_dtype(x.dtype());
    let factor = B::float_cast(factor, dtype);
    let factor = match which {
        LoraFactor::A => B::float_swap_dims(factor, 0, 1),
        LoraFactor::B => factor,
    };
    let product = B::matmul(dropped::<B>(x, dropout), factor, FloatDType::F32);
    B::float_cast(B::float_mul_scalar(product, scaling.into()), dtype)
}

/// `B::low_rank_gradient`.
pub(super) fn gradient<B: QloraOps>(
    x: FloatTensor<B>,
    product: FloatTensor<B>,
    which: LoraFactor,
    dropout: Option<LoraDropout>,
) -> FloatTensor<B> {
    let x = dropped::<B>(x, dropout);
    match which {
        LoraFactor::A => B::matmul(B::float_swap_dims(product, 0, 1), x, FloatDType::F32),
        LoraFactor::B => B::matmul(B::float_swap_dims(x, 0, 1), product, FloatDType::F32),
    }
}

/// `B::linear_4bit_low_rank`.
pub(super) fn linear<B: QloraOps>(
    x: FloatTensor<B>,
    weight: Packed4bit<B>,
    u: FloatTensor<B>,
    lora_b: FloatTensor<B>,
) -> FloatTensor<B> {
    let dtype = float_dtype(x.dtype());
    let base = B::linear_4bit(x, weight, FloatDType::F32);
    let factor = B::float_swap_dims(B::float_cast(lora_b, dtype), 0, 1);
    B::float_cast(B::float_add(base, B::matmul(u, factor, FloatDType::F32)), dtype)
}

/// `B::linear_4bit_low_rank_input_grad`; the base's part is rounded before the update is added.
pub(super) fn input_grad<B: QloraOps>(
    dy: FloatTensor<B>,
    weight: Packed4bit<B>,
    v: FloatTensor<B>,
    lora_a: FloatTensor<B>,
    dropout: Option<LoraDropout>,
) -> FloatTensor<B> {
    let dtype = float_dtype(dy.dtype());
    let base = B::float_cast(B::linear_4bit_input_grad(dy, weight), FloatDType::F32);
    let update = dropped::<B>(B::matmul(v, B::float_cast(lora_a, dtype), FloatDType::F32), dropout);
    B::float_cast(B::float_add(base, update), dtype)
}
