//! The ranks that have met, and what they do together.

use std::ffi::c_void;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use burn::tensor::{DType, Device, Int, Tensor};
use burn_cubecl::tensor::CubeTensor;
use cubecl::client::Client;
use cubecl::cuda::CudaRuntime;
use cubecl::server::Handle;
use cubecl_runtime::runtime::Runtime;
use cubecl_runtime::server::ServerStorage;
use cubecl_runtime::storage::{ComputeStorage, ManagedResource};
use host_copies::{DeviceError, client_of, from_buffer, from_cube, int_from_cube, into_cube};

use crate::error::CollectiveError;
use crate::nccl::{Comm, Element, Nccl};
use crate::side_stream::SideStream;

/// How long an abort waits for a call that queues operations.
const QUEUEING: Duration = Duration::from_secs(5);

/// A communicator that goes from the thread that makes it to the one that uses it.
struct Made(Comm);

// SAFETY: NCCL takes a communicator from any thread, one at a time.
unsafe impl Send for Made {}

/// A buffer whose address is in use: CubeCL leaves it where it is as long as this lives.
struct Place {
    resource: ManagedResource<GpuResource>,
    _buffer: Handle,
}

impl Place {
    fn address(&self) -> u64 {
        self.resource.resource().ptr
    }
}

/// The memory of CubeCL's CUDA runtime.
type Storage = <<CudaRuntime as Runtime>::Server as ServerStorage>::Storage;
type GpuResource = <Storage as ComputeStorage>::Resource;

/// How a [wait](Collectives::wait) ended, on the device.
#[derive(Debug)]
pub struct Waited {
    /// 0, or NaN where the operations were broken off: `[1]`, f32.
    pub broken: Tensor<1>,
    /// Seconds that the device waited: `[1]`, f32.
    pub seconds: Tensor<1>,
}

/// Collective operations of a process's device with those of other processes: all queue the same ones in the same order.
pub struct Collectives {
    nccl: Nccl,
    device: Device,
    client: Client,
    world_size: usize,
    side: SideStream,
    /// Null once it is aborted.
    communicator: AtomicPtr<c_void>,
    /// Held while the communicator is used. An abort takes it away from whoever holds this for too long.
    using: Mutex<()>,
    /// What operations may work on: CubeCL neither gives its memory to others nor moves it before they are waited for. The last field,
    /// so that it goes after the stream.
    under_way: Mutex<Vec<Place>>,
}

impl std::fmt::Debug for Collectives {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Collectives")
            .field("nccl", &self.nccl)
            .field("world_size", &self.world_size)
            .finish_non_exhaustive()
    }
}

/// A device that is ready to join others: what it lacks is known before anybody waits for it.
pub struct Endpoint {
    nccl: Nccl,
    device: Device,
    client: Client,
    side: SideStream,
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint").field("nccl", &self.nccl).field("device", &self.device).finish_non_exhaustive()
    }
}

impl Endpoint {
    /// Of a device.
    ///
    /// # Errors
    /// The device is none of CUDA's, or its driver refuses a stream.
    pub fn new(nccl: Nccl, device: &Device) -> Result<Self, CollectiveError> {
        let client = client_of(device).ok_or(CollectiveError::NotCuda)?;
        let side = SideStream::new(&client)?;
        Ok(Self { nccl, device: device.clone(), client, side })
    }

    /// NCCL's version, which all ranks need to share.
    pub fn version(&self) -> String {
        self.nccl.version()
    }

    /// What one rank makes and all [join](Self::join) by.
    ///
    /// # Errors
    /// The host has no network interface for it.
    pub fn unique_id(&self) -> Result<Vec<u8>, CollectiveError> {
        self.nccl.unique_id()
    }

    /// Joins the other ranks, each of which has the same `id` and a device of its own. Returns when all are there. A rank that
    /// never comes keeps it waiting; `is_over`, asked now and then, ends that.
    ///
    /// # Errors
    /// NCCL finds no way between the devices, or two ranks on one device; [`CollectiveError::Aborted`] when `is_over` said so.
    pub fn join(
        self,
        rank: usize,
        world_size: usize,
        id: &[u8],
        is_over: impl Fn() -> bool,
    ) -> Result<Collectives, CollectiveError> {
        let Self { nccl, device, client, side } = self;
        let (context, library, id) = (side.context().clone(), nccl.clone(), id.to_vec());
        let (sender, receiver) = std::sync::mpsc::channel();
        // On a thread of its own, because nothing but the others ends it.
        let meet = move || {
            let bound = context.bind_to_thread();
            let bound = bound.map_err(|e| CollectiveError::Driver { call: "cuCtxSetCurrent", problem: e.to_string() });
            // SAFETY: the context is current.
            let comm = bound.and_then(|()| unsafe { library.init(world_size, &id, rank) });
            // Nobody listens where it was over.
            let _ = sender.send(comm.map(Made));
        };
        let spawned = std::thread::Builder::new().name("nccl-init".into()).spawn(meet);
        spawned.map_err(|error| CollectiveError::Driver { call: "a thread", problem: error.to_string() })?;
        let Made(comm) = loop {
            match receiver.recv_timeout(Duration::from_millis(20)) {
                Ok(met) => break met?,
                Err(RecvTimeoutError::Timeout) if !is_over() => {}
                Err(_) => return Err(CollectiveError::Aborted),
            }
        };
        let communicator = AtomicPtr::new(comm);
        let (using, under_way) = (Mutex::default(), Mutex::default());
        Ok(Collectives { nccl, device, client, world_size, side, communicator, using, under_way })
    }
}

impl Collectives {
    /// How many ranks there are.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// NCCL's version.
    pub fn version(&self) -> String {
        self.nccl.version()
    }

    /// The communicator, for as long as the guard is held.
    fn communicator(&self) -> Result<(MutexGuard<'_, ()>, Comm), CollectiveError> {
        let guard = self.using.lock().unwrap_or_else(PoisonError::into_inner);
        let comm = self.communicator.load(Ordering::SeqCst);
        if comm.is_null() { Err(CollectiveError::Aborted) } else { Ok((guard, comm)) }
    }

    /// Keeps what operations that were queued work on.
    fn keep(&self, places: Vec<Place>) {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner).extend(places);
    }

    /// Queues the sum of each tensor over all ranks, as one operation, in place where nothing else holds the tensor's memory. It
    /// begins when what the calling thread has queued is done; [`wait`](Self::wait) before the sums are used.
    ///
    /// # Shapes
    /// f32, the same shapes on all ranks.
    ///
    /// # Errors
    /// What a tensor depends on failed, for want of memory for example: nothing was queued then. NCCL refuses, or the operations were
    /// aborted.
    pub fn sum(&self, tensors: Vec<Tensor<2>>) -> Result<Vec<Tensor<2>>, CollectiveError> {
        let cubes = tensors.into_iter().map(|tensor| self.own(tensor)).collect::<Result<Vec<_>, _>>()?;
        let places = cubes.iter().map(|cube| self.place(cube)).collect::<Result<Vec<_>, _>>()?;
        let sums: Vec<_> = places.iter().map(Place::address).zip(cubes.iter().map(|c| c.meta.num_elements())).collect();
        let (_guard, comm) = self.communicator()?;
        self.side.follow()?;
        self.keep(places);
        let stream = self.side.stream()?;
        self.nccl.grouped(|| {
            sums.iter().try_for_each(|(at, count)| {
                // SAFETY: the tensors' memory is theirs alone and stays, because they are kept; they are used again behind `wait`.
                unsafe { self.nccl.sum(*at, *count, Element::F32, comm, stream) }
            })
        })?;
        Ok(cubes.into_iter().map(from_cube).collect())
    }

    /// Queues a gather of every rank's bytes, in the order of ranks, into `to`. It begins when what the calling thread has
    /// queued is done; [`wait`](Self::wait) before `to` is used.
    ///
    /// # Shapes
    /// `from` `[n]` and `to` `[world_size n]`, both of integers of the same size.
    ///
    /// # Errors
    /// As [`sum`](Self::sum); sizes do not fit.
    pub fn gather(&self, pairs: Vec<(Tensor<1, Int>, Tensor<1, Int>)>) -> Result<Vec<Tensor<1, Int>>, CollectiveError> {
        let (mut gathers, mut places, mut results) = (Vec::new(), Vec::new(), Vec::new());
        for (from, to) in pairs {
            let of = |tensor: Tensor<1, Int>| host_copies::cube_of_int(tensor).ok_or(CollectiveError::NotCuda);
            let (from, to) = (of(from)?, of(to)?);
            let bytes = |cube: &CubeTensor| cube.meta.num_elements() * cube.dtype.size();
            if bytes(&from) * self.world_size != bytes(&to) {
                return Err(CollectiveError::Layout { bytes: bytes(&to), problem: "a gather's sizes do not fit" });
            }
            let (source, target) = (self.place(&from)?, self.place(&to)?);
            gathers.push((source.address(), target.address(), bytes(&from)));
            places.extend([source, target]);
            results.push(to);
        }
        let (_guard, comm) = self.communicator()?;
        self.side.follow()?;
        self.keep(places);
        let stream = self.side.stream()?;
        self.nccl.grouped(|| {
            gathers.iter().try_for_each(|(from, to, count)| {
                // SAFETY: sizes were checked; the caller uses `to` behind `wait`, and both stay until then.
                unsafe { self.nccl.gather(*from, *to, *count, Element::U8, comm, stream) }
            })
        })?;
        Ok(results.into_iter().map(int_from_cube).collect())
    }

    /// Has what the calling thread queues from now on begin when all operations so far are done.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn wait(&self) -> Result<Waited, CollectiveError> {
        let result = self.side.lead()?;
        // Whatever takes their memory on CubeCL's stream from now on comes after the operations.
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner).clear();
        let both = from_buffer::<1>(&self.device, result, [2], DType::F32).ok_or(CollectiveError::NotCuda)?;
        Ok(Waited { broken: both.clone().narrow(0, 0, 1), seconds: both.narrow(0, 1, 1) })
    }

    /// What NCCL has met with by itself, such as a network that is gone; the operations do not end then. Nothing is
    /// told while operations are being queued, or after an [abort](Self::abort).
    pub fn problem(&self) -> Option<CollectiveError> {
        let _guard = self.using.try_lock().ok()?;
        let comm = Some(self.communicator.load(Ordering::SeqCst)).filter(|comm| !comm.is_null())?;
        // SAFETY: it is a communicator as long as the lock is held.
        unsafe { self.nccl.state(comm) }.err()
    }

    /// Ends all operations, because another rank is gone: those that are under way, and all later ones.
    pub fn abort(&self) {
        self.side.break_off();
        let deadline = Instant::now() + QUEUEING;
        let _guard = loop {
            match self.using.try_lock() {
                Ok(guard) => break Some(guard),
                Err(TryLockError::Poisoned(guard)) => break Some(guard.into_inner()),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5))
                }
                // A call that queues waits for the rank that is gone: NCCL ends it when it learns of the abort.
                Err(TryLockError::WouldBlock) => break None,
            }
        };
        let comm = self.communicator.swap(std::ptr::null_mut(), Ordering::SeqCst);
        if comm.is_null() || self.side.stream().is_err() {
            return;
        }
        // SAFETY: nobody has aborted it before. Whoever may use it now is ended by this.
        if let Err(error) = unsafe { self.nccl.abort(comm) } {
            tracing::warn!(%error, "NCCL's communicator does not end in order");
        }
    }

    /// A tensor's CubeCL tensor whose memory nothing else holds.
    fn own(&self, tensor: Tensor<2>) -> Result<CubeTensor, CollectiveError> {
        let cube = into_cube(tensor).ok_or(CollectiveError::NotCuda)?;
        if cube.dtype != DType::F32 {
            let bytes = cube.meta.num_elements() * cube.dtype.size();
            return Err(CollectiveError::Layout { bytes, problem: "its elements are not f32" });
        }
        Ok(if cube.handle.can_mut() { cube } else { cube.copy() })
    }

    /// Where a tensor lies.
    fn place(&self, cube: &CubeTensor) -> Result<Place, CollectiveError> {
        let bytes = cube.meta.num_elements() * cube.dtype.size();
        let problem = match () {
            () if cube.client.service_id() != self.client.service_id() => "it lies on another device",
            () if !cube.is_contiguous() => "its rows lie apart",
            () if cube.handle.size_in_used() < bytes as u64 => "its buffer is smaller",
            () => {
                let resource = self.client.get_resource::<<CudaRuntime as Runtime>::Server>(cube.handle.clone());
                let resource = resource.map_err(|error| CollectiveError::Device(DeviceError::from(error)))?;
                return Ok(Place { resource, _buffer: cube.handle.clone() });
            }
        };
        Err(CollectiveError::Layout { bytes, problem })
    }
}

impl Drop for Collectives {
    fn drop(&mut self) {
        // Ends the communicator without asking the others: whatever was queued has been waited for by now, or was given up.
        self.abort();
    }
}
