//! How a loaded model holds its weights.

use burn::tensor::FloatDType;
use nf4_quant::{FloatFormat, QuantConfig};

/// How weights are held.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// 4-bit quantization of the linear layers; `None` keeps them dense in the compute dtype.
    /// A checkpoint that is already in 4 bits keeps its own quantization, and is expanded for `None`.
    pub quantization: Option<QuantConfig>,
    /// Dtype of activations and of everything that stays dense.
    pub dtype: FloatDType,
}

impl LoadOptions {
    /// The dtype of a quantization state: that of the weight as the model would hold it unquantized.
    pub(super) fn state_dtype(&self) -> FloatFormat {
        match self.dtype {
            FloatDType::BF16 => FloatFormat::BF16,
            FloatDType::F16 => FloatFormat::F16,
            _ => FloatFormat::F32,
        }
    }
}
