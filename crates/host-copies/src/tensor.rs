//! The CubeCL tensor behind a Burn tensor, and back.

use burn::backend::{BackendTensor, DispatchDevice, DispatchTensor, DispatchTensorKind};
use burn::tensor::{DType, Device, Int, Shape, Tensor};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::server::Handle;

/// The CubeCL tensor that a float tensor is, contiguous; `None` where the tensor is in the host's memory. Autodiff is
/// dropped. Where nothing else holds the tensor's buffer, the result may be changed in place.
pub fn into_cube<const D: usize>(tensor: Tensor<D>) -> Option<CubeTensor> {
    match tensor.without_autodiff().into_dispatch().kind {
        DispatchTensorKind::Cube(tensor) => Some(into_contiguous(tensor.float())),
        _ => None,
    }
}

/// [`into_cube`] of a tensor that stays.
pub fn as_cube<const D: usize>(tensor: &Tensor<D>) -> Option<CubeTensor> {
    into_cube(tensor.clone())
}

/// The tensor, contiguous and with a buffer that nothing else holds: itself where it is that, else a copy. What is to be changed in
/// place is taken through this.
///
/// Whether a buffer is held is asked of CubeCL ([`Handle::can_mut`]), which says so of a buffer, too, that its thread is making
/// at this moment. So any tensor may turn out to be a copy, at any time. And [`CubeTensor::copy`] lets the rows of a matrix lie apart
/// on CUDA, as the driver likes them; this does not.
pub fn owned(tensor: CubeTensor) -> CubeTensor {
    let tensor = into_contiguous(tensor);
    if tensor.can_mut() {
        return tensor;
    }
    let (shape, elements) = (tensor.meta.shape().clone(), Shape::new([tensor.meta.num_elements()]));
    // In one dimension there are no rows.
    let flat = CubeTensor::new_contiguous(tensor.client, tensor.device, elements, tensor.handle, tensor.dtype);
    #[expect(clippy::disallowed_methods, reason = "of one dimension")]
    let copy = flat.copy();
    CubeTensor::new_contiguous(copy.client, copy.device, shape, copy.handle, copy.dtype)
}

/// The Burn tensor of a CubeCL tensor of floats, without autodiff.
///
/// # Shapes
/// The tensor has `D` dimensions.
pub fn from_cube<const D: usize>(tensor: CubeTensor) -> Tensor<D> {
    let kind = DispatchTensorKind::Cube(BackendTensor::Float(tensor));
    Tensor::from_dispatch(DispatchTensor { kind, autodiff: Default::default() })
}

/// [`into_cube`] for a tensor of integers.
pub fn cube_of_int<const D: usize>(tensor: Tensor<D, Int>) -> Option<CubeTensor> {
    match tensor.into_dispatch().kind {
        DispatchTensorKind::Cube(tensor) => Some(into_contiguous(tensor.int())),
        _ => None,
    }
}

/// [`from_cube`] for a tensor of integers.
///
/// # Shapes
/// The tensor has `D` dimensions.
pub fn int_from_cube<const D: usize>(tensor: CubeTensor) -> Tensor<D, Int> {
    let kind = DispatchTensorKind::Cube(BackendTensor::Int(tensor));
    Tensor::from_dispatch(DispatchTensor { kind, autodiff: Default::default() })
}

/// The tensor of floats that a buffer of a device's client holds, row-major; `None` where the device is the host.
///
/// # Shapes
/// The buffer has room for `shape` in `dtype`.
pub fn from_buffer<const D: usize>(
    device: &Device,
    buffer: Handle,
    shape: [usize; D],
    dtype: DType,
) -> Option<Tensor<D>> {
    Some(from_cube(cube_from_buffer(device, buffer, shape.into(), dtype)?))
}

/// [`from_buffer`] for integers.
///
/// # Shapes
/// As there.
pub fn int_from_buffer<const D: usize>(
    device: &Device,
    buffer: Handle,
    shape: [usize; D],
    dtype: DType,
) -> Option<Tensor<D, Int>> {
    Some(int_from_cube(cube_from_buffer(device, buffer, shape.into(), dtype)?))
}

fn cube_from_buffer(device: &Device, buffer: Handle, shape: Shape, dtype: DType) -> Option<CubeTensor> {
    match device.as_dispatch() {
        DispatchDevice::Cube(cube) => {
            Some(CubeTensor::new_contiguous(cube.client(), cube.clone(), shape, buffer, dtype))
        }
        _ => None,
    }
}
