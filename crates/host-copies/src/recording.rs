//! Passes that are recorded once and replayed: the host queues a whole pass with one call.
//!
//! A recording is a sequence of launches with the buffers that they had. What a pass reads from the host must lie in
//! tensors that were made before and are [overwritten](overwrite) between replays; what it gives lies where it lay when it
//! was recorded. CubeCL keeps the memory of everything between.

use std::fmt;

use burn::tensor::{Device, Int, Tensor};
use cubecl::bytes::Bytes;
use cubecl::client::{Client, Graph};
use cubecl::server::Handle;

use crate::{DeviceError, as_cube, client_of, cube_of_int};

/// A recorded pass.
pub struct Recording {
    graph: Graph,
}

impl fmt::Debug for Recording {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recording").finish_non_exhaustive()
    }
}

impl Recording {
    /// Runs `pass` twice, the second time into the record, and returns the record with what the second call returned; it is
    /// valid after a [replay](Self::replay). The first run compiles kernels and makes the memory that the second one
    /// uses. `None` where the device records nothing.
    ///
    /// `pass` must queue the same launches both times, on this thread, and neither read a result, nor bring a tensor to the
    /// device, nor change its inputs so that a second run gives something else.
    ///
    /// # Errors
    /// The device refuses the record, for a reason that CubeCL gives: work is queued as before, and can be run without a
    /// record.
    pub fn record<T>(device: &Device, mut pass: impl FnMut() -> T) -> Result<Option<(Self, T)>, DeviceError> {
        let Some(client) = client_of(device) else { return Ok(None) };
        if client.graph_prepare().is_err() {
            return Ok(None);
        }
        drop(pass());
        let started = client.start_capture().map_err(|e| DeviceError::Failed(e.to_string()));
        if let Err(e) = started {
            // What was prepared ends with the attempt to close it.
            client.stop_capture().ok();
            return Err(e);
        }
        let output = pass();
        let graph = client.stop_capture().map_err(|e| DeviceError::Failed(e.to_string()))?;
        Ok(Some((Self { graph }, output)))
    }

    /// Queues the recorded pass.
    ///
    /// # Safety
    /// Every tensor that the pass read or gave must still be alive, nothing else may use them until the pass is done, and
    /// the call must come from the thread that recorded it, or one that stands for the same stream.
    ///
    /// # Errors
    /// The device refuses.
    pub unsafe fn replay(&self) -> Result<(), DeviceError> {
        // SAFETY: promised by the caller.
        unsafe { self.graph.replay() }.map_err(|e| DeviceError::Failed(e.to_string()))
    }
}

/// Writes values over a vector of as many, in the same memory, behind what this thread has queued. `false`, and nothing
/// done, where the vector lies in the host's memory. (Only vectors: devices may hold the rows of a matrix at distances.)
pub fn overwrite(vector: &Tensor<1>, values: &[f32]) -> bool {
    vector.dims() == [values.len()]
        && as_cube(vector).is_some_and(|cube| write(&cube.client, &cube.handle, bytemuck::cast_slice(values)))
}

/// [`overwrite`] for a vector of 32-bit integers, given as their bits.
pub fn overwrite_int(vector: &Tensor<1, Int>, values: &[u32]) -> bool {
    vector.dims() == [values.len()]
        && cube_of_int(vector.clone())
            .is_some_and(|cube| write(&cube.client, &cube.handle, bytemuck::cast_slice(values)))
}

fn write(client: &Client, handle: &Handle, bytes: &[u8]) -> bool {
    // Devices may round the size of a buffer up.
    if handle.size_in_used() < bytes.len() as u64 {
        return false;
    }
    client.write(handle, Bytes::from_bytes_vec(bytes.to_vec()));
    true
}
