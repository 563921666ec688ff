//! Sinks (Xiao et al., 2024, arXiv 2309.17453): a logit of each query head that joins its softmax and has no value, so that the
//! weights of what a query sees may sum to less than 1.
//!
//! They come in at the end of a forward pass, with every kernel: the output is multiplied by `exp(lse) / (exp(lse) + exp(sink))`, and
//! the log-sum-exp that is kept counts them. The gradients of queries, keys and values out of these two are right as they are. Sinks are
//! frozen.

use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_cubecl::tensor::CubeTensor;
use host_copies::as_cube;
use std::sync::Arc;

/// The sinks of a layer, on the host and on a device.
#[derive(Clone, Debug)]
pub struct Sinks {
    values: Arc<[f32]>,
    tensor: Tensor<1>,
}

impl Sinks {
    /// One for each query head. One upload.
    pub fn new(values: &[f32], device: &Device) -> Self {
        let device = device.clone().without_autodiff();
        let tensor = Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), (&device, DType::F32));
        Self { values: values.into(), tensor }
    }

    /// Their values.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// f32, for kernels.
    ///
    /// # Panics
    /// When they were made on the host, for queries on a device.
    pub(in crate::ops) fn on_device(&self) -> CubeTensor {
        as_cube(&self.tensor).unwrap_or_else(|| panic!("attention: queries are on a device, their sinks on the host"))
    }
}

impl PartialEq for Sinks {
    fn eq(&self, other: &Self) -> bool {
        self.values == other.values
    }
}
