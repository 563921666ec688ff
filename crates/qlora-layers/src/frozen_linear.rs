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

    /// Takes the values of another weight, as [`Linear4bit::become_equal`] does.
    ///
    /// # Errors
    /// As there.
    pub fn become_equal(&mut self, other: Self) -> Result<(), LayerError> {
        match (self, other) {
            (Self::Quantized(own), Self::Quantized(other)) => own.become_equal(other),
            (own, other) => {
                *own = other;
                Ok(())
            }
        }
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

    /// [`project`](Self::project) for sums that go with activations in `dtype`: with 16 bits, over a 4-bit weight, `a` is split
    /// into what the format holds of it and what it holds of the rest, so that the product is the layers' own.
    pub(crate) fn project_near(&self, a: Tensor<2>, dtype: FloatDType) -> Tensor<2> {
        match self {
            Self::Quantized(weight) if dtype != FloatDType::F32 => {
                let rows = a.dims()[0];
                let both = weight.forward_into(ops::fused::split(a, dtype), FloatDType::F32);
                both.clone().narrow(0, 0, rows) + both.narrow(0, rows, rows)
            }
            _ => self.project(a),
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use burn::tensor::{DType, Device, TensorData};
    use test_support::noise;

    /// Two roundings leave next to nothing of the rows out, which one would not.
    #[test]
    fn rows_in_two_parts_are_the_rows() {
        const SHAPE: [usize; 2] = [24, 256];
        let device = Device::flex();
        let matrix = |seed, shape: [usize; 2]| {
            Tensor::<2>::from_data(TensorData::new(noise(seed, shape[0] * shape[1]), shape), (&device, DType::F32))
        };
        let rows = matrix(2, [4, SHAPE[1]]);
        for (dtype, error) in [(FloatDType::BF16, 2.0_f64.powi(-16)), (FloatDType::F16, 2.0_f64.powi(-20))] {
            let base = FrozenLinear::from_weight(matrix(1, SHAPE).cast(dtype), Some(&QuantConfig::default())).unwrap();
            let values =
                |tensor: Tensor<2>| -> Vec<f64> { tensor.into_data_as::<f32>().iter::<f32>().map(f64::from).collect() };
            let (a, w) = (values(rows.clone()), values(base.to_dense(dtype).cast(FloatDType::F32)));
            let found = values(base.project_near(rows.clone(), dtype));
            let once = values(base.project(rows.clone().cast(dtype).cast(FloatDType::F32)));
            let mut worst = [0.0_f64; 2];
            for (i, (found, once)) in found.iter().zip(once).enumerate() {
                let (row, feature) = (i / SHAPE[0], i % SHAPE[0]);
                let terms = |k: usize| a[row * SHAPE[1] + k] * w[feature * SHAPE[1] + k];
                let expected: f64 = (0..SHAPE[1]).map(terms).sum();
                let size: f64 = (0..SHAPE[1]).map(|k| terms(k).abs()).sum();
                worst[0] = worst[0].max((found - expected).abs() / size);
                worst[1] = worst[1].max((once - expected).abs() / size);
            }
            // Relative to the terms' size; f32 sums of 256 terms add some 1e-7.
            assert!(worst[0] < error && worst[1] > 2.0 * worst[0], "{dtype:?}: {worst:?}");
        }
    }
}
