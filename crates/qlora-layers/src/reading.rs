//! Numbers that the host wants while the device goes on.

use std::fmt;

use burn::tensor::{DType, Tensor};

use crate::offload::{CUDA, Download, lasting, on_device};

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
    /// Starts bringing `tensor` to the host, behind what was given to the device before. On CUDA nothing waits;
    /// other runtimes wait for the device here.
    ///
    /// # Shapes
    /// `[len]`, f32.
    ///
    /// # Errors
    /// The device's message, when a kernel that the tensor depends on was not launched: for want of memory, say.
    /// What shows only while kernels run, [`wait`](Self::wait) tells.
    pub fn start(tensor: Tensor<1>) -> Result<Self, String> {
        assert_eq!(tensor.dtype(), DType::F32, "Reading: numbers are f32");
        let Some(on_device) = on_device(&tensor).filter(|tensor| tensor.client.name() == CUDA) else {
            return tensor.try_into_vec_as().map(|values| Self(State::Arrived(values))).map_err(|e| e.to_string());
        };
        let (client, buffer) = (lasting(&on_device.client), on_device.handle);
        client.check([&buffer]).map_err(|e| e.to_string())?;
        Ok(Self(State::Leaving(Download::start(client, buffer), tensor.dims()[0])))
    }

    /// The numbers, once they are there.
    ///
    /// # Errors
    /// The device's message.
    pub fn wait(self) -> Result<Vec<f32>, String> {
        match self.0 {
            State::Arrived(values) => Ok(values),
            State::Leaving(mut download, len) => {
                let bytes = download.wait()?;
                let numbers = bytes.get(..4 * len).ok_or("the device sent too little")?;
                Ok(bytemuck::pod_collect_to_vec(numbers))
            }
        }
    }
}
