//! Buffers of CubeCL whose addresses others use.

use cubecl::client::Client;
use cubecl::cuda::CudaRuntime;
use cubecl::server::Handle;
use cubecl_runtime::runtime::Runtime;
use cubecl_runtime::server::ServerStorage;
use cubecl_runtime::storage::{ComputeStorage, ManagedResource};
use host_copies::DeviceError;

use crate::error::CollectiveError;

/// CubeCL's CUDA runtime, and its memory.
type Server = <CudaRuntime as Runtime>::Server;
type Resource = <<Server as ServerStorage>::Storage as ComputeStorage>::Resource;

/// A buffer whose address is in use: CubeCL leaves it where it is as long as this lives.
pub(crate) struct Place {
    resource: ManagedResource<Resource>,
    _buffer: Handle,
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Place").field(&self.address()).finish()
    }
}

impl Place {
    /// Of a buffer, once all is queued that was asked for before.
    ///
    /// # Errors
    /// What was to be written to the buffer was not, for want of memory for example.
    pub(crate) fn of(client: &Client, buffer: &Handle) -> Result<Self, CollectiveError> {
        let resource = client.get_resource::<Server>(buffer.clone()).map_err(DeviceError::from)?;
        Ok(Self { resource, _buffer: buffer.clone() })
    }

    /// Where it begins.
    pub(crate) fn address(&self) -> u64 {
        self.resource.resource().ptr
    }
}
