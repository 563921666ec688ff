//! Where pages and parameters are: behind a CubeCL client, or in host memory.
//!
//! Burn's `backend_extension` would route a call by its tensors, but knows neither lists of tensors nor buffers that
//! are changed in place and outlive the call; so tensors are taken out of Burn's dispatch by hand here.

mod cube;
mod flex;
mod kernels;
mod norm;

use burn::tensor::Tensor;

use crate::Scalars;
use crate::config::Rule;
use crate::layout::PageLayout;
use crate::pager::Memory;

pub(crate) use cube::{CubeDevice, global_norm};
pub(crate) use flex::FlexDevice;

/// A device that updates parameters.
pub(crate) trait Backend: Memory {
    /// A tensor of Burn's.
    type Tensor;

    /// A tensor to read.
    fn open(tensor: Tensor<1>) -> Self::Tensor;
    /// A tensor to change in place, copied where something else holds its buffer.
    fn open_mut(tensor: Tensor<1>) -> Self::Tensor;
    /// Back to Burn.
    fn close(tensor: Self::Tensor) -> Tensor<1>;

    /// Updates the parts of parameters whose state is in `page`. `tensors` holds parameter and gradient, by position.
    fn update(
        &mut self,
        rule: Rule,
        layout: &PageLayout,
        page: &mut Self::Page,
        tensors: &mut [Option<(Self::Tensor, Self::Tensor)>],
        norm: &Self::Tensor,
        scalars: &Scalars,
    );
}
