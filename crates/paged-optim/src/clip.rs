//! Clipping by global norm (Pascanu et al., 2013, arXiv 1211.5063, algorithm 1), as `torch.nn.utils.clip_grad_norm_` does it.
//!
//! The factor is folded into the update: no pass over the gradients applies it, and the norm stays on the device.

use burn::backend::DispatchDevice;
use burn::tensor::{DType, Tensor};

use crate::{OptimError, device};

/// The norm of all gradients together, and what it is scaled down to.
#[derive(Clone, Debug)]
pub struct Clip {
    /// [`global_norm`]. Where it is infinite or NaN, the update changes nothing.
    pub norm: Tensor<1>,
    /// The largest norm that is left as it is, of gradients without `loss_scale`; 0 turns clipping off.
    pub max_norm: f32,
    /// What the loss, and so gradients and norm, were multiplied by: 1, or what kept small gradients from vanishing in
    /// f16 (Micikevicius et al., 2018, arXiv 1710.03740, section 3.2). The update divides by it.
    pub loss_scale: f32,
}

impl Clip {
    /// Of gradients as they are.
    pub fn new(norm: Tensor<1>, max_norm: f32) -> Self {
        Self { norm, max_norm, loss_scale: 1.0 }
    }
}

/// The Euclidean norm of all gradients together, in f32, as a tensor of one element on their device; the same bits at
/// every call with the same gradients.
///
/// # Shapes
/// `[1]`.
///
/// # Errors
/// There are no gradients, one is not f32, or they are on different devices.
pub fn global_norm<'a, const D: usize>(
    grads: impl IntoIterator<Item = &'a Tensor<D>>,
) -> Result<Tensor<1>, OptimError> {
    let flat = |(index, grad): (usize, &Tensor<D>)| match grad.dtype() {
        DType::F32 => Ok(grad.clone().reshape([grad.shape().num_elements()])),
        found => Err(OptimError::Dtype { parameter: index.to_string(), tensor: "gradient", found }),
    };
    let grads = grads.into_iter().enumerate().map(flat).collect::<Result<Vec<Tensor<1>>, _>>()?;
    let device = grads.first().ok_or(OptimError::NoGradients)?.device();
    let on_gpu = |grad: &Tensor<1>| matches!(grad.device().as_dispatch(), DispatchDevice::Cube(_));
    let other_device = |index: usize| OptimError::OtherDevice {
        parameter: index.to_string(),
        tensor: "gradient",
        device: format!("{device:?}"),
    };
    if let Some(index) = grads.iter().position(|grad| on_gpu(grad) != on_gpu(&grads[0])) {
        return Err(other_device(index));
    }
    let composed = |grads: Vec<Tensor<1>>| {
        let squares = grads.into_iter().map(|grad| grad.square().sum()).collect();
        Tensor::cat(squares, 0).sum().sqrt()
    };
    match on_gpu(&grads[0]) {
        // Two GPUs: which gradient is on the other one is not told here.
        true => device::global_norm(grads).ok_or_else(|| other_device(0)),
        false => Ok(composed(grads)),
    }
}

/// The factor that brings gradients of norm `norm` to at most `max_norm`: `min(1, max_norm / (norm + 1e-6))`.
/// A `max_norm` of zero or less turns clipping off.
pub fn clip_factor(norm: f32, max_norm: f32) -> f32 {
    match max_norm > 0.0 {
        true => (max_norm / (norm + 1e-6)).min(1.0),
        false => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn the_norm_spans_all_tensors() {
        let device = Device::flex();
        let a = Tensor::<2>::from_floats([[3.0, 0.0]], &device);
        let b = Tensor::<2>::from_floats([[0.0], [4.0], [12.0]], &device);
        let norm = global_norm([&a, &b]).expect("f32 gradients").into_data().iter::<f32>().next().expect("one element");
        // 3, 4, 12, 13: every intermediate is exact in f32.
        assert_eq!(norm, 13.0);
    }

    #[test]
    fn only_long_gradients_are_scaled() {
        assert_eq!(clip_factor(0.1, 0.3), 1.0);
        assert_eq!(clip_factor(10.0, 0.0), 1.0);
        assert!((clip_factor(3.0, 0.3) * 3.0 - 0.3).abs() < 1e-6, "1e-6 in the denominator moves it by 1e-7");
    }
}
