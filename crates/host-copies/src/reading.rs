//! Numbers that the host wants while the device goes on.

use std::fmt;

use burn::tensor::{DType, Tensor};

use crate::{Copies, DeviceError, Download, as_cube};

/// A vector of f32 on its way to the host.
pub struct Reading(State);

enum State {
    /// So many numbers.
    Leaving(Download, usize),
    Arrived(Vec<f32>),
}

impl fmt::Debug for Reading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            State::Leaving(_, len) => f.debug_tuple("Leaving").field(len).finish(),
            State::Arrived(values) => f.debug_tuple("Arrived").field(values).finish(),
        }
    }
}

impl Reading {
    /// Starts bringing `tensor` to the host, behind what the calling thread has queued. On CUDA nothing waits; other
    /// runtimes wait for the device here.
    ///
    /// # Shapes
    /// `[len]`, f32.
    ///
    /// # Errors
    /// A kernel that the tensor depends on was not launched, for want of memory for example. Failures that show only
    /// while kernels run are reported by [`wait`](Self::wait).
    pub fn start(tensor: Tensor<1>) -> Result<Self, DeviceError> {
        if tensor.dtype() != DType::F32 {
            return Err(DeviceError::Failed(format!("numbers to read are f32, these are {:?}", tensor.dtype())));
        }
        let on_device = as_cube(&tensor).map(|cube| (Copies::of(&cube.client), cube));
        let Some((copies, cube)) = on_device.filter(|(copies, _)| copies.run_beside_kernels()) else {
            return Ok(Self(State::Arrived(tensor.try_into_vec_as()?)));
        };
        copies.client().check([&cube.handle])?;
        Ok(Self(State::Leaving(copies.download_behind_kernels(cube.handle), tensor.dims()[0])))
    }

    /// The numbers, once they are there.
    ///
    /// # Errors
    /// The copy failed, or the work whose result it copies did.
    pub fn wait(self) -> Result<Vec<f32>, DeviceError> {
        match self.0 {
            State::Arrived(values) => Ok(values),
            State::Leaving(download, len) => {
                let bytes = download.wait()?;
                let sent = bytes.len();
                let numbers = bytes
                    .get(..4 * len)
                    .ok_or_else(|| DeviceError::Failed(format!("it sent {sent} bytes instead of {}", 4 * len)))?;
                Ok(bytemuck::pod_collect_to_vec(numbers))
            }
        }
    }
}
