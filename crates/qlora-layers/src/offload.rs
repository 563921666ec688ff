//! Tensors that wait in the host's memory while the device computes.
//!
//! On CUDA both ways are copies on a stream of their own, to and from pinned memory (`cuMemAllocHost`, from CubeCL's
//! pool). CubeCL makes that stream wait for the one on which a buffer was made, up to the moment of the call; a tensor
//! that goes out was just computed there, so its values are in. A buffer stays reserved until its copy is done. The host
//! queues work far ahead of the device: callers [settle](Parked::settle) the copies before the last ones on
//! the way out, and keep [`Pace`] on the way back, so that no more than two blocks' tensors hold device memory. Other
//! runtimes have one queue for everything and wait for each copy out (with WGSL, nothing else may be queued while a
//! buffer is being read); on the CPU, a tensor is where it should be.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{LazyLock, Mutex, PoisonError};

use burn::backend::{BackendTensor, DispatchTensor, DispatchTensorKind, StreamId};
use burn::tensor::{DType, Shape, Tensor};
use burn_cubecl::CubeDevice;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::bytes::Bytes;
use cubecl::client::Client;
use cubecl::server::{Handle, ServerError};

/// The runtime whose copies run beside its kernels.
pub(crate) const CUDA: &str = "cuda";

/// A copy to the host that was started.
pub(crate) struct Download {
    /// Held until the copy is done.
    _buffer: Handle,
    read: Pin<Box<dyn Future<Output = Result<Vec<Bytes>, ServerError>> + Send>>,
}

impl Download {
    /// Starts copying a buffer, on the stream that this is called on.
    pub(crate) fn start(client: &'static Client, buffer: Handle) -> Self {
        Self { read: Box::pin(client.read_async(vec![buffer.clone()])), _buffer: buffer }
    }

    /// The bytes, once they are in the host's memory; to be called once.
    ///
    /// # Errors
    /// The device's message, where the copy or what it copies failed.
    pub(crate) fn wait(&mut self) -> Result<Bytes, String> {
        let mut read = cubecl::future::block_on(self.read.as_mut()).map_err(|e| e.to_string())?;
        read.pop().ok_or_else(|| "the device sent nothing".into())
    }
}

/// A tensor that waits for its use.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a few for each block, and they stay where they are")]
pub(crate) enum Parked<const D: usize> {
    /// Where it was made.
    Here(Tensor<D>),
    /// In the host's memory.
    Away(Offloaded),
}

impl<const D: usize> Parked<D> {
    /// Starts bringing a tensor to the host, unless it is there already.
    ///
    /// # Errors
    /// The device's message, where the copy failed.
    pub(crate) fn away(tensor: Tensor<D>) -> Result<Self, String> {
        Ok(match on_device(&tensor) {
            Some(on_device) => Self::Away(Offloaded::send(on_device)?),
            None => Self::Here(tensor),
        })
    }

    /// Waits until the tensor is where it is to wait.
    ///
    /// # Errors
    /// The device's message, where the copy failed.
    pub(crate) fn settle(&mut self) -> Result<(), String> {
        match self {
            Self::Here(_) => Ok(()),
            Self::Away(tensor) => tensor.settle(),
        }
    }

    /// On its way to where it was made.
    ///
    /// # Errors
    /// The device's message, where its way out failed.
    pub(crate) fn begun(self) -> Result<Self, String> {
        self.here().map(Self::Here)
    }

    /// The tensor where it was made, or on its way there: whatever uses it waits for it.
    ///
    /// # Errors
    /// The device's message, where its way out failed.
    pub(crate) fn here(self) -> Result<Tensor<D>, String> {
        match self {
            Self::Here(tensor) => Ok(tensor),
            Self::Away(tensor) => tensor.fetch().map(from_device),
        }
    }
}

/// A tensor that left the device.
pub(crate) struct Offloaded {
    copy: Copy,
    device: CubeDevice,
    shape: Shape,
    dtype: DType,
}

/// A copy in the host's memory.
enum Copy {
    Leaving(Download),
    Arrived(Bytes),
}

impl fmt::Debug for Offloaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Offloaded").field("shape", &self.shape).field("dtype", &self.dtype).finish_non_exhaustive()
    }
}

impl Offloaded {
    /// Starts bringing a tensor to the host.
    fn send(tensor: CubeTensor) -> Result<Self, String> {
        let client = lasting(&tensor.client);
        let mut download = on_copies(client, || Download::start(client, tensor.handle.clone()));
        let copy = match client.name() {
            CUDA => Copy::Leaving(download),
            // What was read may be a view of a buffer that the device can't use meanwhile.
            _ => Copy::Arrived(Bytes::from_bytes_vec(download.wait()?.to_vec())),
        };
        let (shape, dtype) = (tensor.meta.shape().clone(), tensor.dtype);
        Ok(Self { copy, device: tensor.device, shape, dtype })
    }

    /// Waits until the values are in the host's memory.
    fn settle(&mut self) -> Result<(), String> {
        if let Copy::Leaving(download) = &mut self.copy {
            self.copy = Copy::Arrived(download.wait()?);
        }
        Ok(())
    }

    /// Starts bringing the tensor back.
    fn fetch(self) -> Result<CubeTensor, String> {
        let bytes = match self.copy {
            Copy::Leaving(mut download) => download.wait()?,
            Copy::Arrived(bytes) => bytes,
        };
        let client = self.device.client();
        let handle = on_copies(&client, || client.create(bytes));
        Ok(CubeTensor::new_contiguous(client, self.device, self.shape, handle, self.dtype))
    }
}

/// Lets the host run no further ahead of the device than two of the places that it [marks](Self::mark).
#[derive(Default)]
pub(crate) struct Pace(VecDeque<Download>);

impl Pace {
    /// Marks this place in the queue of `tensor`'s device, and waits until the device has come to the mark before the
    /// last.
    ///
    /// # Errors
    /// The device's message.
    pub(crate) fn mark(&mut self, tensor: &Tensor<2>) -> Result<(), String> {
        let Some(tensor) = on_device(tensor).filter(|tensor| tensor.client.name() == CUDA) else { return Ok(()) };
        if self.0.len() == 2
            && let Some(mut earlier) = self.0.pop_front()
        {
            earlier.wait()?;
        }
        // On the stream of the kernels, behind everything that was queued.
        let client = lasting(&tensor.client);
        let mark = client.create_from_slice(&[0; 4]);
        self.0.push_back(Download::start(client, mark));
        Ok(())
    }
}

/// The tensor behind Burn's dispatch, contiguous; `None` where it is in the host's memory already.
pub(crate) fn on_device<const D: usize>(tensor: &Tensor<D>) -> Option<CubeTensor> {
    match tensor.clone().without_autodiff().into_dispatch().kind {
        DispatchTensorKind::Cube(tensor) => Some(into_contiguous(tensor.float())),
        _ => None,
    }
}

fn from_device<const D: usize>(tensor: CubeTensor) -> Tensor<D> {
    let kind = DispatchTensorKind::Cube(BackendTensor::Float(tensor));
    Tensor::from_dispatch(DispatchTensor { kind, autodiff: Default::default() })
}

/// Runs `work` on the stream of the copies, where there is one.
fn on_copies<T>(client: &Client, work: impl FnOnce() -> T) -> T {
    // One for all models: every stream has memory pools of its own.
    static COPIES: LazyLock<StreamId> = LazyLock::new(StreamId::allocate);
    match client.name() {
        CUDA => COPIES.executes(work),
        _ => work(),
    }
}

/// A client that is never dropped, one per device of the process: a download borrows its client, and outlives the call
/// that starts it.
pub(crate) fn lasting(client: &Client) -> &'static Client {
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
