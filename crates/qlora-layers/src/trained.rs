//! Trained tensors: f32 matrices that are leaves of the autodiff graph while training. Vectors are rows `[1, n]`,
//! so that an optimizer and a checkpoint know one kind of parameter.

use crate::Pass;
use burn::tensor::Tensor;

/// The tensor as a pass asks for it: recorded, or as a constant.
pub(crate) fn seen_by(parameter: &Tensor<2>, pass: Pass) -> Tensor<2> {
    match pass.tracked {
        true => parameter.clone(),
        false => parameter.clone().without_autodiff(),
    }
}

/// A leaf of the autodiff graph with the same values.
pub fn track(parameter: &mut Tensor<2>) {
    *parameter = parameter.clone().without_autodiff().autodiff().require_grad();
}
