//! Where pages and parameters are: behind a CubeCL client, or in host memory.
//!
//! Burn's `backend_extension` would route a call by its tensors, but supports neither lists of tensors nor buffers that
//! are changed in place and outlive the call; so tensors are taken out of Burn's dispatch by hand here.

mod cube;
mod flex;
mod kernels;
mod norm;

use burn::backend::DispatchDevice;
use burn::tensor::{Device, Int, Tensor};

use crate::Scalars;
use crate::config::Rule;
use crate::layout::PageLayout;
use crate::pager::Memory;

pub(crate) use cube::{CubeDevice, global_norm};
pub(crate) use flex::FlexDevice;

/// A parameter that is updated: its value, its gradient, and the scalars of its update.
#[derive(Clone, Debug)]
pub(crate) struct Operands<T> {
    pub(crate) param: T,
    pub(crate) grad: T,
    pub(crate) scalars: Scalars,
}

/// A device that updates parameters.
pub(crate) trait Backend: Memory {
    /// A tensor of Burn's.
    type Tensor;

    /// A tensor to read; `None` if it is on another device.
    fn open(&self, tensor: Tensor<1>) -> Option<Self::Tensor>;
    /// A tensor to change in place, copied where something else holds its buffer; `None` if it is on another device.
    fn open_mut(&self, tensor: Tensor<1>) -> Option<Self::Tensor>;
    /// Back to Burn.
    fn close(tensor: Self::Tensor) -> Tensor<1>;

    /// Updates the parts of parameters whose state is in `page`. `operands` are by position of the parameter.
    fn update(
        &mut self,
        rule: Rule,
        layout: &PageLayout,
        page: &mut Self::Page,
        operands: &mut [Option<Operands<Self::Tensor>>],
        norm: &Self::Tensor,
    );
}

/// Updates one parameter whose state, a page of its own, is a tensor of words. Gradients are taken as they are.
/// Returns the state and the parameter; `None` where the tensors are on different devices.
///
/// # Shapes
/// `words` is `[layout.words]`, u32; it and the parameter are changed in place where nothing else holds their buffers.
pub(crate) fn update_alone(
    device: &Device,
    rule: Rule,
    layout: &PageLayout,
    words: Tensor<1, Int>,
    operands: Operands<Tensor<1>>,
) -> Option<(Tensor<1, Int>, Tensor<1>)> {
    match device.as_dispatch() {
        DispatchDevice::Cube(cube) => CubeDevice::new(cube.clone()).update_alone(rule, layout, words, operands),
        _ => FlexDevice.update_alone(rule, layout, words, operands),
    }
}
