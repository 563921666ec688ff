//! Tensors that wait in the host's memory while the device computes.
//!
//! On CUDA both ways are copies on a stream of their own, to and from pinned memory (`cuMemAllocHost`, from CubeCL's
//! pool). CubeCL makes that stream wait for the one on which a buffer was made, up to the moment of the call; a tensor
//! that goes out was just computed there, so its values are in. A buffer stays reserved until its copy is done. The host
//! queues work far ahead of the device: [`InFlight`] makes it wait when two copies are on their way, so that no more
//! than two tensors hold device memory. Other runtimes have one queue for everything and wait for each copy out (with
//! WGSL, nothing else may be queued while a buffer is being read); on the CPU, a tensor is where it should be.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use burn::backend::{BackendTensor, DispatchTensor, DispatchTensorKind, StreamId};
use burn::tensor::{DType, Shape, Tensor};
use burn_cubecl::CubeDevice;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::bytes::Bytes;
use cubecl::client::Client;
use cubecl::server::{Handle, ServerError};

/// The runtime whose copies run beside its kernels.
const CUDA: &str = "cuda";

type Download = Pin<Box<dyn Future<Output = Result<Vec<Bytes>, ServerError>> + Send>>;

/// A tensor that left the device.
#[derive(Debug)]
pub(crate) struct Offloaded(Place);

#[expect(clippy::large_enum_variant, reason = "one for each block, and they stay where they are")]
enum Place {
    /// It never left: the CPU's tensors, and what came back.
    Here(Tensor<2>),
    /// On its way, or in the host's memory.
    Away { copy: Arc<Mutex<Copy>>, device: CubeDevice, shape: Shape, dtype: DType },
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Here(tensor) => f.debug_tuple("Here").field(&tensor.dims()).finish(),
            Self::Away { shape, dtype, .. } => {
                f.debug_struct("Away").field("shape", shape).field("dtype", dtype).finish()
            }
        }
    }
}

/// A copy to the host.
enum Copy {
    /// Not done yet. The buffer is held until it is.
    Leaving(Handle, Download),
    Arrived(Bytes),
    Taken,
}

impl Copy {
    /// Waits until the values are in the host's memory.
    fn finish(&mut self) -> Result<(), String> {
        if let Self::Leaving(..) = self {
            let Self::Leaving(buffer, download) = std::mem::replace(self, Self::Taken) else { return Ok(()) };
            let mut read = cubecl::future::block_on(download).map_err(|e| e.to_string())?;
            *self = Self::Arrived(read.pop().ok_or("the device sent nothing")?);
            drop(buffer);
        }
        Ok(())
    }

    /// Makes the values the host's own: what was read may be a view of a buffer that the device can't use meanwhile.
    fn detach(&mut self) {
        if let Self::Arrived(bytes) = self {
            *bytes = Bytes::from_bytes_vec(bytes.to_vec());
        }
    }

    fn take(&mut self) -> Result<Bytes, String> {
        self.finish()?;
        match std::mem::replace(self, Self::Taken) {
            Self::Arrived(bytes) => Ok(bytes),
            _ => Err("a tensor was brought back twice".into()),
        }
    }
}

/// The last copies in either direction, at most two.
#[derive(Default)]
pub(crate) struct InFlight {
    leaving: VecDeque<Arc<Mutex<Copy>>>,
    marks: VecDeque<Download>,
}

impl InFlight {
    /// Starts bringing a tensor to the host.
    ///
    /// # Errors
    /// The device's message, where an earlier copy failed.
    pub(crate) fn send(&mut self, tensor: Tensor<2>) -> Result<Offloaded, String> {
        let Some(tensor) = on_device(&tensor) else { return Ok(Offloaded(Place::Here(tensor))) };
        if self.leaving.len() == 2
            && let Some(earlier) = self.leaving.pop_front()
        {
            lock(&earlier).finish()?;
        }
        let (client, shape, dtype) = (lasting(&tensor.client), tensor.meta.shape().clone(), tensor.dtype);
        let handle = tensor.handle.clone();
        let download: Download = on_copies(client, || Box::pin(client.read_async(vec![handle.clone()])) as Download);
        let mut copy = Copy::Leaving(handle, download);
        if client.name() != CUDA {
            copy.finish()?;
            copy.detach();
        }
        let copy = Arc::new(Mutex::new(copy));
        self.leaving.push_back(copy.clone());
        Ok(Offloaded(Place::Away { copy, device: tensor.device, shape, dtype }))
    }

    /// Waits for all that [`send`](Self::send) started.
    ///
    /// # Errors
    /// The device's message, where a copy failed.
    pub(crate) fn wait(&mut self) -> Result<(), String> {
        self.leaving.drain(..).try_for_each(|copy| lock(&copy).finish())
    }

    /// Starts bringing a tensor back, ahead of its use.
    ///
    /// # Errors
    /// The device's message, where its way out failed.
    pub(crate) fn fetch(&mut self, offloaded: &mut Offloaded) -> Result<(), String> {
        let Place::Away { copy, device, shape, dtype } = &offloaded.0 else { return Ok(()) };
        let bytes = lock(copy).take()?;
        let client = device.client();
        let handle = on_copies(&client, || client.create(bytes));
        let tensor = CubeTensor::new_contiguous(client, device.clone(), shape.clone(), handle, *dtype);
        offloaded.0 = Place::Here(from_device(tensor));
        Ok(())
    }

    /// The tensor, on the device.
    ///
    /// # Errors
    /// The device's message, where its way out, or an earlier use, failed.
    pub(crate) fn receive(&mut self, mut offloaded: Offloaded) -> Result<Tensor<2>, String> {
        self.fetch(&mut offloaded)?;
        let Place::Here(tensor) = offloaded.0 else { return Err("a tensor did not come back".into()) };
        self.mark(&tensor)?;
        Ok(tensor)
    }

    /// Lets the host run no further ahead than two tensors: waits until the device has come to where the one before
    /// the last was received.
    fn mark(&mut self, tensor: &Tensor<2>) -> Result<(), String> {
        let Some(tensor) = on_device(tensor).filter(|tensor| tensor.client.name() == CUDA) else { return Ok(()) };
        if self.marks.len() == 2
            && let Some(earlier) = self.marks.pop_front()
        {
            cubecl::future::block_on(earlier).map_err(|e| e.to_string())?;
        }
        // On the stream of the kernels, behind everything that was queued.
        let client = lasting(&tensor.client);
        let mark = client.create_from_slice(&[0; 4]);
        self.marks.push_back(Box::pin(client.read_async(vec![mark])));
        Ok(())
    }
}

fn lock(copy: &Mutex<Copy>) -> MutexGuard<'_, Copy> {
    copy.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The tensor behind Burn's dispatch, contiguous; `None` where it is in the host's memory already.
fn on_device(tensor: &Tensor<2>) -> Option<CubeTensor> {
    match tensor.clone().without_autodiff().into_dispatch().kind {
        DispatchTensorKind::Cube(tensor) => Some(into_contiguous(tensor.float())),
        _ => None,
    }
}

fn from_device(tensor: CubeTensor) -> Tensor<2> {
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
