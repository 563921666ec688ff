//! The GPU implementation, for every CubeCL runtime.
//!
//! Products with a frozen weight and LoRA's take tensor-core kernels where the device has them (see
//! [`super::cube_products`]). Elsewhere a 4-bit product dequantizes the weight into one transient and runs Burn's
//! matmul on it; the transient goes back to CubeCL's memory pool at once, so one layer's worth exists at a time.

use super::cube_products::{self, Update};
use super::cube_tensors::{device_weight, dtype_of, empty, grid};
use super::{LoraDropout, LoraFactor, Packed4bit, QloraOps, composed, float_dtype};
use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, FloatDType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::matmul::{MatmulStrategy, init_matmul_output, matmul};
use burn_cubecl::kernel::{cast, into_contiguous, slice};
use burn_cubecl::tensor::CubeTensor;
use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems};
use cubek::matmul::launch::launch_ref;
use cubek::matmul::multi_level;
use cubek::matmul::strategy::Strategy;
use cubek::std::InputBinding;
use fused_kernels::Dropout;
use fused_kernels::low_rank::MAX_RANK;
use nf4_quant::FloatFormat;
use nf4_quant::kernels::{dequantize, supports};
use nf4_quant::matmul::Direction;
use std::ops::Range;

/// Which dimension of a factor, and of its gradient, the ranks are.
fn ranks_of(which: LoraFactor) -> usize {
    match which {
        LoraFactor::A => 0,
        LoraFactor::B => 1,
    }
}

/// The part of a matrix's dimension.
fn narrow(matrix: &CubeTensor, dim: usize, part: Range<usize>) -> CubeTensor {
    let [rows, columns]: [usize; 2] = matrix.meta.shape().dims();
    let mut parts = [0..rows, 0..columns];
    parts[dim] = part;
    slice(matrix.clone(), &parts)
}

/// What the low-rank kernels make of more ranks than they take at a time, side by side along `dim`. No sum goes over ranks.
fn in_parts(rank: usize, dim: usize, of: impl Fn(Range<usize>) -> CubeTensor) -> CubeTensor {
    let starts = (0..rank).step_by(MAX_RANK);
    CubeBackend::float_cat(starts.map(|start| of(start..rank.min(start + MAX_RANK))).collect(), dim)
}

impl QloraOps for CubeBackend {
    fn dequantize_4bit(weight: Packed4bit<Self>, dtype: FloatDType) -> FloatTensor<Self> {
        let (client, device, layout) = (weight.codes.client.clone(), weight.codes.device.clone(), weight.layout);
        let weight = device_weight(&weight);
        let shape = Shape::new([layout.out_features, layout.in_features]);
        // Some runtimes (WGSL) have no bf16 buffers: f32 ones, rounded to bf16, hold the same values.
        let (format, round) = match layout.dtype {
            FloatFormat::BF16 if !supports(&client, FloatFormat::BF16) => (FloatFormat::F32, true),
            format => (format, false),
        };
        let out = empty(&client, &device, shape, dtype_of(format));
        dequantize(&client, &weight, out.handle.clone(), format)
            .unwrap_or_else(|e| panic!("a weight that was valid when it was uploaded can't be dequantized: {e}"));
        if round {
            let elements = out.meta.shape().num_elements();
            let (cube_count, cube_dim) = grid(elements);
            kernels::round_to_bf16::launch(&client, cube_count, cube_dim, out.clone().into_buffer_arg());
        }
        cast(out, dtype.into())
    }

    fn linear_4bit(x: FloatTensor<Self>, weight: Packed4bit<Self>, out: FloatDType) -> FloatTensor<Self> {
        cube_products::product_4bit(&x, &weight, Direction::Forward, None, out.into())
            .unwrap_or_else(|| composed::linear_4bit::<Self>(x, weight, out))
    }

    fn linear_4bit_input_grad(dy: FloatTensor<Self>, weight: Packed4bit<Self>) -> FloatTensor<Self> {
        cube_products::product_4bit(&dy, &weight, Direction::InputGradient, None, dy.dtype)
            .unwrap_or_else(|| composed::linear_4bit_input_grad::<Self>(dy, weight))
    }

    fn linear_4bit_low_rank(
        x: FloatTensor<Self>,
        weight: Packed4bit<Self>,
        u: FloatTensor<Self>,
        lora_b: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let low_rank = Some(Update { product: &u, factor: &lora_b, dropout: None });
        cube_products::product_4bit(&x, &weight, Direction::Forward, low_rank, x.dtype)
            .unwrap_or_else(|| composed::linear::<Self>(x, weight, u, lora_b))
    }

    fn linear_4bit_low_rank_input_grad(
        dy: FloatTensor<Self>,
        weight: Packed4bit<Self>,
        v: FloatTensor<Self>,
        lora_a: FloatTensor<Self>,
        dropout: Option<LoraDropout>,
    ) -> FloatTensor<Self> {
        let low_rank = Some(Update { product: &v, factor: &lora_a, dropout });
        cube_products::product_4bit(&dy, &weight, Direction::InputGradient, low_rank, dy.dtype)
            .unwrap_or_else(|| composed::input_grad::<Self>(dy, weight, v, lora_a, dropout))
    }

    fn frozen_linear(x: FloatTensor<Self>, weight: FloatTensor<Self>, out: FloatDType) -> FloatTensor<Self> {
        cube_products::product_dense(&x, &weight, Direction::Forward, out.into())
            .unwrap_or_else(|| composed::frozen_linear::<Self>(x, weight, out))
    }

    fn frozen_linear_input_grad(dy: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let dtype = float_dtype(dy.dtype);
        cube_products::product_dense(&dy, &weight, Direction::InputGradient, dtype.into())
            .unwrap_or_else(|| Self::matmul(dy, weight, dtype))
    }

    fn low_rank_project(
        x: FloatTensor<Self>,
        factor: FloatTensor<Self>,
        which: LoraFactor,
        scaling: f32,
        dropout: Option<LoraDropout>,
    ) -> FloatTensor<Self> {
        let ranks_of_factor = ranks_of(which);
        let rank = factor.meta.shape()[ranks_of_factor];
        if rank > MAX_RANK && x.dtype != DType::F32 {
            return in_parts(rank, 1, |part| {
                let factor = narrow(&factor, ranks_of_factor, part);
                Self::low_rank_project(x.clone(), factor, which, scaling, dropout)
            });
        }
        cube_products::project(&x, &factor, which, scaling, dropout)
            .unwrap_or_else(|| composed::project::<Self>(x, factor, which, scaling, dropout))
    }

    fn low_rank_gradient(
        x: FloatTensor<Self>,
        product: FloatTensor<Self>,
        which: LoraFactor,
        dropout: Option<LoraDropout>,
    ) -> FloatTensor<Self> {
        let rank = product.meta.shape()[1];
        if rank > MAX_RANK && x.dtype != DType::F32 {
            return in_parts(rank, ranks_of(which), |part| {
                Self::low_rank_gradient(x.clone(), narrow(&product, 1, part), which, dropout)
            });
        }
        cube_products::gradient(&x, &product, which, dropout)
            .unwrap_or_else(|| composed::gradient::<Self>(x, product, which, dropout))
    }

    fn matmul(lhs: FloatTensor<Self>, rhs: FloatTensor<Self>, out: FloatDType) -> FloatTensor<Self> {
        if lhs.dtype != DType::F32 {
            return matmul(lhs, rhs, None, MatmulStrategy::default(), out.into())
                .unwrap_or_else(|e| panic!("no kernel for a product with tensor cores: {e:?}"));
        }
        let out = init_matmul_output(&lhs, &rhs, DType::F32);
        let elem = dtype_to_storage_type(DType::F32);
        let mut dtypes = MatmulElems::from_globals(&MatmulGlobalElems { lhs: elem, rhs: elem, out: elem });
        // Plain multiply-adds: the strategies for tensor cores would take f32 as TF32.
        let strategy = Strategy::MultiLevel(multi_level::Strategy::SimpleUnit(Default::default()));
        let client = out.client.clone();
        let (lhs, rhs) = (InputBinding::new(lhs.binding(), elem), InputBinding::new(rhs.binding(), elem));
        launch_ref(&strategy, &client, lhs, rhs, out.clone().binding(), &mut dtypes)
            .unwrap_or_else(|e| panic!("no kernel for an f32 product: {e:?}"));
        out
    }

    fn seeded_dropout(x: FloatTensor<Self>, seed: u64, p: f32) -> FloatTensor<Self> {
        let x = into_contiguous(x);
        let shape = x.meta.shape().clone();
        let (cube_count, cube_dim) = grid(shape.num_elements());
        let y = empty(&x.client, &x.device, shape, x.dtype);
        let Dropout { threshold, scale, .. } = Dropout::new(seed, p);
        kernels::seeded_dropout::launch(
            &y.client,
            cube_count,
            cube_dim,
            x.clone().into_buffer_arg(),
            y.clone().into_buffer_arg(),
            seed as u32,
            (seed >> 32) as u32,
            threshold,
            scale,
            dtype_to_storage_type(x.dtype),
        );
        y
    }

    fn seeded_noise(magnitudes: FloatTensor<Self>, width: usize, seed: u64, out: FloatDType) -> FloatTensor<Self> {
        let magnitudes = into_contiguous(magnitudes);
        let shape = Shape::new([magnitudes.meta.shape().num_elements(), width]);
        let (cube_count, cube_dim) = grid(shape.num_elements());
        let y = empty(&magnitudes.client, &magnitudes.device, shape, out.into());
        kernels::seeded_noise::launch(
            &y.client,
            cube_count,
            cube_dim,
            magnitudes.into_buffer_arg(),
            y.clone().into_buffer_arg(),
            seed as u32,
            (seed >> 32) as u32,
            width as u32,
            dtype_to_storage_type(y.dtype),
        );
        y
    }
}

/// Kernels; CubeCL's prelude and Burn's `Tensor` clash, so they live in a module of their own.
mod kernels {
    use cubecl::prelude::*;

    /// MurmurHash3's 32-bit finalizer.
    #[cube]
    fn finalize(value: u32) -> u32 {
        let a = (value ^ (value >> 16u32)) * 0x85EB_CA6Bu32;
        let b = (a ^ (a >> 13u32)) * 0xC2B2_AE35u32;
        b ^ (b >> 16u32)
    }

    /// Half of a finalized hash: `ops::dropout_hash`, its oracle.
    #[cube]
    fn bits_of(index: u32, seed_low: u32, seed_high: u32) -> u32 {
        let both = finalize((index >> 1u32) * (seed_high | 1u32) + seed_low);
        (both >> ((index & 1u32) * 16u32)) & 0xFFFFu32
    }

    /// One thread per element; `ops::noise_unit` is the oracle.
    #[cube(launch)]
    pub fn seeded_noise<F: Float>(
        magnitudes: &[f32],
        y: &mut [F],
        seed_low: u32,
        seed_high: u32,
        width: u32,
        #[define(F)] _dtype: ElemType,
    ) {
        let i = ABSOLUTE_POS;
        if i >= y.len() {
            terminate!();
        }
        let bits = bits_of(i as u32, seed_low, seed_high);
        let unit = f32::cast_from(2u32 * bits + 1u32) / 65536.0f32 - 1.0f32;
        y[i] = F::cast_from(magnitudes[i / width as usize] * unit);
    }

    /// One thread per element; `ops::dropout_hash` is the oracle of the mask.
    #[cube(launch)]
    pub fn seeded_dropout<F: Float>(
        x: &[F],
        y: &mut [F],
        seed_low: u32,
        seed_high: u32,
        threshold: u32,
        scale: f32,
        #[define(F)] _dtype: ElemType,
    ) {
        let i = ABSOLUTE_POS;
        if i >= x.len() {
            terminate!();
        }
        let bits = bits_of(i as u32, seed_low, seed_high);
        if bits >= threshold {
            y[i] = F::cast_from(f32::cast_from(x[i]) * scale);
        } else {
            y[i] = F::cast_from(0.0f32);
        }
    }

    /// Rounds each f32 to the nearest bf16 value, ties to even; the values are finite.
    #[cube(launch)]
    pub fn round_to_bf16(values: &mut [f32]) {
        let i = ABSOLUTE_POS;
        if i >= values.len() {
            terminate!();
        }
        let bits = u32::reinterpret(values[i]);
        let rounded = (bits + 0x7FFFu32 + ((bits >> 16u32) & 1u32)) & 0xFFFF_0000u32;
        values[i] = f32::reinterpret(rounded);
    }
}
