//! Frozen linear layers: 4-bit or dense.

use crate::LayerError;
use crate::ops::{self, Buffers4bit, Layout4bit, LoraTerms, NestedLayout};
use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData};
use nf4_quant::{Absmax, Quantized4bit};

/// A frozen 4-bit weight of shape `[out_features, in_features]` on a device.
///
/// It holds 4 bits per weight and its block statistics, double-quantized ones in their 8-bit form.
/// Nothing dense of the weight's size outlives one product; see [`ops`].
#[derive(Clone, Debug)]
pub struct Linear4bit {
    buffers: Buffers4bit,
    layout: Layout4bit,
}

impl Linear4bit {
    /// Uploads a quantized weight.
    ///
    /// # Errors
    /// [`LayerError::Weight`] when the weight is no matrix, or its parts do not fit together.
    pub fn from_quantized(weight: &Quantized4bit, device: &Device) -> Result<Self, LayerError> {
        weight.validate().map_err(|e| LayerError::Weight(e.to_string()))?;
        let state = &weight.state;
        let &[out_features, in_features] = state.shape.as_slice() else {
            return Err(LayerError::Weight(format!("expected a matrix, found shape {:?}", state.shape)));
        };
        let f32_bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        let (absmax, nested_absmax, nested) = match &state.absmax {
            Absmax::Plain(absmax) => (f32_bits(absmax), vec![0], None),
            Absmax::Nested(nested) => (
                pack_words(&nested.codes),
                f32_bits(&[&nested.absmax[..], &[nested.offset]].concat()),
                Some(NestedLayout { blocksize: nested.blocksize, offset: nested.offset }),
            ),
        };
        Ok(Self {
            buffers: Buffers4bit {
                codes: upload(pack_words(&weight.codes), device),
                absmax: upload(absmax, device),
                nested_absmax: upload(nested_absmax, device),
            },
            layout: Layout4bit {
                out_features,
                in_features,
                quant_type: state.quant_type,
                blocksize: state.blocksize,
                dtype: state.dtype,
                nested,
            },
        })
    }

    /// `y = x Wᵀ`.
    ///
    /// # Shapes
    /// - `x`: `[tokens, in_features]`
    /// - output: `[tokens, out_features]`, dtype of `x`
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let out = x.dtype().into();
        self.forward_into(x, out)
    }

    /// [`forward`](Self::forward) with the sums kept in `out`, the dtype of `x` or f32.
    pub fn forward_into(&self, x: Tensor<2>, out: FloatDType) -> Tensor<2> {
        ops::linear_4bit(x, &self.buffers, self.layout, out)
    }

    /// `y = x Wᵀ + scaling·dropout(x) lora_aᵀ lora_bᵀ`, one operation with one backward.
    ///
    /// # Shapes
    /// - `x`: `[tokens, in_features]`
    /// - `lora_a`: `[rank, in_features]`, `lora_b`: `[out_features, rank]`, f32
    /// - output: `[tokens, out_features]`, dtype of `x`
    pub fn lora_forward(&self, x: Tensor<2>, lora_a: Tensor<2>, lora_b: Tensor<2>, terms: LoraTerms) -> Tensor<2> {
        ops::lora_linear_4bit(x, &self.buffers, self.layout, lora_a, lora_b, terms)
    }

    /// The dense weight `[out_features, in_features]` in `dtype`, without autodiff.
    pub fn dequantize(&self, dtype: FloatDType) -> Tensor<2> {
        ops::dequantize_4bit(&self.buffers, self.layout, dtype)
    }

    /// Codebook, blocks and shape.
    pub fn layout(&self) -> &Layout4bit {
        &self.layout
    }

    /// Bytes that codes and statistics take on the device.
    pub fn device_bytes(&self) -> usize {
        let Buffers4bit { codes, absmax, nested_absmax } = &self.buffers;
        4 * (codes.dims()[0] + absmax.dims()[0] + nested_absmax.dims()[0])
    }
}

/// A byte stream as little-endian words, zero-padded to a multiple of four.
fn pack_words(bytes: &[u8]) -> Vec<u32> {
    let (chunks, tail) = bytes.as_chunks::<4>();
    let mut words: Vec<u32> = chunks.iter().map(|&chunk| u32::from_le_bytes(chunk)).collect();
    if !tail.is_empty() {
        let mut last = [0; 4];
        last[..tail.len()].copy_from_slice(tail);
        words.push(u32::from_le_bytes(last));
    }
    words
}

fn upload(words: Vec<u32>, device: &Device) -> Tensor<1, Int> {
    let len = words.len();
    Tensor::from_data(TensorData::new(words, [len]), (device, DType::U32))
}

/// A frozen linear map in the form its checkpoint or configuration asks for.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "a model has a few hundred, and they stay where they are")]
pub enum FrozenLinear {
    /// 4-bit codes.
    Quantized(Linear4bit),
    /// A dense weight `[out_features, in_features]` in the compute dtype.
    Dense(Tensor<2>),
}

impl FrozenLinear {
    /// `y = x Wᵀ`.
    ///
    /// # Shapes
    /// - `x`: `[tokens, in_features]`
    /// - output: `[tokens, out_features]`, dtype of `x`
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let out = x.dtype().into();
        self.forward_into(x, out)
    }

    /// [`forward`](Self::forward) with the sums kept in `out`, the dtype of `x` or f32.
    pub fn forward_into(&self, x: Tensor<2>, out: FloatDType) -> Tensor<2> {
        match self {
            Self::Quantized(weight) => weight.forward_into(x, out),
            Self::Dense(weight) => ops::frozen_linear(x, weight.clone(), out),
        }
    }

    /// `[out_features, in_features]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::Quantized(weight) => [weight.layout.out_features, weight.layout.in_features],
            Self::Dense(weight) => weight.dims(),
        }
    }

    /// The dense weight in `dtype`, without autodiff.
    pub fn to_dense(&self, dtype: FloatDType) -> Tensor<2> {
        match self {
            Self::Quantized(weight) => weight.dequantize(dtype),
            Self::Dense(weight) => weight.clone().cast(dtype),
        }
    }

    /// `‖w_i‖²` of each output feature's weights, `[1, out_features]`, in f32.
    pub fn row_squares(&self) -> Tensor<2> {
        let [out_features, _] = self.shape();
        self.to_dense(FloatDType::F32).square().sum_dim(1).reshape([1, out_features])
    }

    /// `a Wᵀ` in f32 for a few rows `a` `[rows, in_features]` of f32, whatever the weight is held in.
    pub fn project(&self, a: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Quantized(weight) => weight.forward_into(a, FloatDType::F32),
            Self::Dense(weight) => ops::matmul(a, weight.clone().cast(FloatDType::F32).transpose()),
        }
    }

    /// Bytes on the device.
    pub fn device_bytes(&self) -> usize {
        match self {
            Self::Quantized(weight) => weight.device_bytes(),
            Self::Dense(weight) => weight.shape().num_elements() * weight.dtype().size(),
        }
    }
}
