//! A frozen linear layer, 4-bit or dense.

use crate::params::{constant, flattened, frozen};
use crate::{LayerError, Linear4bit, ops};
use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{FloatDType, Tensor};
use nf4_quant::QuantConfig;

/// A frozen weight in the form its checkpoint or configuration asks for.
#[derive(Module, Debug)]
#[expect(clippy::large_enum_variant, reason = "a model has a few hundred, and they stay where they are")]
pub enum FrozenLinear {
    /// 4-bit codes.
    Quantized(Linear4bit),
    /// A dense weight `[out_features, in_features]` in the compute dtype.
    Dense(Param<Tensor<2>>),
}

impl FrozenLinear {
    /// A dense weight `[out_features, in_features]` in the compute dtype.
    pub fn dense(weight: Tensor<2>) -> Self {
        Self::Dense(frozen(weight.without_autodiff()))
    }

    /// The weight of a burn-nn layer, quantized or, with `None`, as it is.
    ///
    /// # Errors
    /// As [`Linear4bit::quantize`].
    pub fn from_linear(linear: &Linear, quant: Option<&QuantConfig>) -> Result<Self, LayerError> {
        Self::from_weight(linear.weight.val().transpose(), quant)
    }

    /// A weight `[out_features, in_features]`, quantized or, with `None`, as it is; it stays on its device.
    ///
    /// # Errors
    /// As [`Linear4bit::quantize`].
    pub fn from_weight(weight: Tensor<2>, quant: Option<&QuantConfig>) -> Result<Self, LayerError> {
        let device = weight.device();
        Ok(match quant {
            Some(quant) => Self::Quantized(Linear4bit::quantize(weight, quant, &device)?),
            None => Self::dense(weight),
        })
    }

    /// `y = x Wᵀ`.
    ///
    /// # Shapes
    /// - `x`: `[.., in_features]`
    /// - output: `[.., out_features]`, dtype of `x`
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let out = x.dtype().into();
        flattened(x, |x| self.forward_into(x, out))
    }

    /// [`forward`](Self::forward) of `[tokens, in_features]` with the sums kept in `out`, the dtype of `x` or f32.
    pub fn forward_into(&self, x: Tensor<2>, out: FloatDType) -> Tensor<2> {
        match self {
            Self::Quantized(weight) => weight.forward_into(x, out),
            Self::Dense(weight) => ops::frozen_linear(x, weight.val(), out),
        }
    }

    /// `[out_features, in_features]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::Quantized(weight) => [weight.layout().out_features, weight.layout().in_features],
            Self::Dense(weight) => weight.dims(),
        }
    }

    /// The dense weight in `dtype`, without autodiff.
    pub fn to_dense(&self, dtype: FloatDType) -> Tensor<2> {
        match self {
            Self::Quantized(weight) => weight.dequantize(dtype).without_autodiff(),
            Self::Dense(weight) => constant(weight).cast(dtype),
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
            Self::Dense(weight) => ops::matmul(a, constant(weight).cast(FloatDType::F32).transpose()),
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
