//! The stream of a device's copies, and copies to the host that were started.
//!
//! On CUDA, copies run on a stream of their own beside the kernels. CubeCL orders them by buffer: before a stream uses a
//! buffer, it waits for the stream on which the buffer was *made*, up to the moment of the call. CubeCL doesn't know
//! which stream wrote to a buffer later. So an upload may run on the stream of the copies, because its buffer is
//! made there, and the download of a result just computed may too. The download of a buffer that kernels changed in
//! place has to run on the stream of those kernels.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{LazyLock, Mutex, PoisonError};

use burn::backend::{DispatchDevice, StreamId};
use burn::tensor::Device;
use cubecl::bytes::Bytes;
use cubecl::client::Client;
use cubecl::server::{Handle, ServerError};

use crate::DeviceError;

/// The client of a device; `None` where the device is the host.
pub fn client_of(device: &Device) -> Option<Client> {
    match device.as_dispatch() {
        DispatchDevice::Cube(cube) => Some(cube.client()),
        _ => None,
    }
}

/// Runs `make` on an input. What it allocates on the device gets memory of its own, beside the pools that passes take theirs
/// from: for tensors that stay, such as weights.
///
/// At every allocation CubeCL walks over what lies in a pool, so a thousand weights there cost each launch some 10 µs of the
/// host. Memory of its own goes back to the driver when [`Device::memory_cleanup`] is called after the tensor is dropped,
/// and before that only to tensors of the same size that are made here.
pub fn persistent<I: Send, T: Send>(device: &Device, input: I, make: impl Fn(I) -> T + Send) -> T {
    device.memory_persistent_allocations(input, make)
}

/// Whether a client's runtime is CUDA, whose copies run beside its kernels. Burn's and CubeCL's other runtimes have one
/// queue for everything.
pub fn is_cuda(client: &Client) -> bool {
    client.name() == "cuda"
}

/// How one device copies to and from the host.
#[derive(Clone, Copy)]
pub struct Copies {
    client: &'static Client,
    stream: Option<StreamId>,
}

impl fmt::Debug for Copies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Copies").field("device", &self.client.service_id()).finish_non_exhaustive()
    }
}

impl Copies {
    /// The copies of a client's device. All callers share one stream, since every stream has memory pools of its own.
    pub fn of(client: &Client) -> Self {
        static STREAM: LazyLock<StreamId> = LazyLock::new(StreamId::allocate);
        Self { client: lasting(client), stream: is_cuda(client).then(|| *STREAM) }
    }

    /// The device's client, which is never dropped.
    pub fn client(&self) -> &'static Client {
        self.client
    }

    /// Whether copies run beside the device's kernels. Where they don't, a copy to the host has to be waited for before
    /// anything else is queued.
    pub fn run_beside_kernels(&self) -> bool {
        self.stream.is_some()
    }

    /// Runs `work` on the stream of the copies, where there is one.
    pub fn on_stream<T>(&self, work: impl FnOnce() -> T) -> T {
        match self.stream {
            Some(stream) => stream.executes(work),
            None => work(),
        }
    }

    /// Starts copying bytes to a new buffer on the device, beside the kernels; a kernel that uses the buffer waits for
    /// it. Bytes in pinned memory are copied straight from there.
    pub fn upload(&self, bytes: Bytes) -> Handle {
        self.on_stream(|| self.client.create(bytes))
    }

    /// Starts copying a buffer to the host beside the kernels. Only the work that made the buffer is waited for, so no
    /// kernel may have changed it since.
    pub fn download(&self, buffer: Handle) -> Download {
        self.on_stream(|| Download::start(self.client, buffer))
    }

    /// Starts copying a buffer to the host behind everything that the calling thread has queued.
    pub fn download_behind_kernels(&self, buffer: Handle) -> Download {
        Download::start(self.client, buffer)
    }

    /// Gives the memory that buffers made by copies have left back to the driver. CubeCL refuses while a stream records
    /// a graph; then the next call gives it back.
    pub fn give_back_memory(&self) {
        let _ = self.on_stream(|| self.client.memory_cleanup());
    }
}

/// A read that CubeCL was asked for.
type Read = dyn Future<Output = Result<Vec<Bytes>, ServerError>> + Send;

/// A copy to the host that was started.
pub struct Download {
    /// The buffer's room must not be used again before the copy is done.
    _buffer: Handle,
    /// In a mutex for the sake of `Sync`.
    read: Mutex<Pin<Box<Read>>>,
}

impl fmt::Debug for Download {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Download").finish_non_exhaustive()
    }
}

impl Download {
    /// Starts copying a buffer, on the stream that this is called on.
    fn start(client: &'static Client, buffer: Handle) -> Self {
        let read = Box::pin(client.read_async(vec![buffer.clone()]));
        Self { _buffer: buffer, read: Mutex::new(read) }
    }

    /// The bytes, once they are in the host's memory.
    ///
    /// # Errors
    /// The copy failed, or the work whose result it copies did.
    pub fn wait(self) -> Result<Bytes, DeviceError> {
        let read = self.read.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut read = cubecl::future::block_on(read)?;
        read.pop().ok_or_else(|| DeviceError::Failed("it sent nothing".into()))
    }
}

/// A client that is never dropped, one per device of the process: a download borrows its client, and outlives the call
/// that starts it.
fn lasting(client: &Client) -> &'static Client {
    static CLIENTS: Mutex<Vec<&'static Client>> = Mutex::new(Vec::new());
    let mut clients = CLIENTS.lock().unwrap_or_else(PoisonError::into_inner);
    match clients.iter().find(|known| known.service_id() == client.service_id()) {
        Some(known) => known,
        None => {
            let client = Box::leak(Box::new(client.clone()));
            clients.push(client);
            client
        }
    }
}
