//! The ranks that have met, and what they do together.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use burn::backend::StreamId;
use burn::tensor::{DType, Device, Int, Tensor};
use burn_cubecl::tensor::CubeTensor;
use cubecl::client::Client;
use cuda_source::{LeftMultiprocessors, leave_multiprocessors};
use host_copies::{client_of, cube_of_int, from_buffer, from_cube, into_cube, owned};

use crate::error::CollectiveError;
use crate::memory::Place;
use crate::nccl::{Comm, Nccl};
use crate::side_stream::SideStream;
use crate::worker::{Job, Shared, Work};

/// A communicator that goes from the thread that makes it to the one that uses it.
struct Made(Comm);

// SAFETY: NCCL takes a communicator from any thread, one at a time.
unsafe impl Send for Made {}

/// Memory of a tensor that stays where it is, for operations that come again and again.
#[derive(Debug)]
pub struct Fixed {
    place: Place,
    bytes: usize,
}

/// A place among the operations that were queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(u32);

/// How a [wait](Collectives::wait) ended, on the device.
#[derive(Debug)]
pub struct Waited {
    /// 0, or NaN where the operations were broken off: `[1]`, f32.
    pub broken: Tensor<1>,
    /// Seconds that the device waited: `[1]`, f32.
    pub seconds: Tensor<1>,
}

/// Collective operations of a process's device with those of other processes: all ask for the same ones in the same order.
///
/// A thread of its own queues them.
pub struct Collectives {
    shared: Arc<Shared>,
    jobs: Sender<Job>,
    /// Marks that were given out.
    marks: AtomicU32,
    device: Device,
    world_size: usize,
    /// Multiprocessors that operations take at most, where that is known.
    cubes: u32,
    /// Those that kernels leave to them now.
    left: Mutex<Option<LeftMultiprocessors>>,
}

impl std::fmt::Debug for Collectives {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut fields = f.debug_struct("Collectives");
        fields.field("nccl", &self.shared.nccl).field("world_size", &self.world_size).finish_non_exhaustive()
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
    /// never comes keeps it waiting; `is_over`, asked now and then, ends that. Operations that are to run [beside](Collectives::beside)
    /// other kernels need `cubes`, the multiprocessors that they may take; NCCL before 2.17 takes as many as it likes.
    ///
    /// # Errors
    /// NCCL finds no way between the devices, or two ranks on one device; [`CollectiveError::Aborted`] when `is_over` said so.
    pub fn join(
        self,
        rank: usize,
        world_size: usize,
        id: &[u8],
        cubes: Option<u32>,
        is_over: impl Fn() -> bool,
    ) -> Result<Collectives, CollectiveError> {
        let Self { nccl, device, client, side } = self;
        // NCCL follows its variable whatever a program says.
        let said = std::env::var("NCCL_MAX_CTAS").ok().and_then(|count| count.parse().ok()).filter(|count| *count > 0);
        let limit = cubes.filter(|_| nccl.limits_cubes()).map_or(0, |cubes| said.unwrap_or(cubes));
        let (context, library, id) = (side.context().clone(), nccl.clone(), id.to_vec());
        let (sender, receiver) = channel();
        // On a thread of its own, because nothing but the others ends it.
        let meet = move || {
            let bound = context.bind_to_thread();
            let bound = bound.map_err(|e| CollectiveError::Driver { call: "cuCtxSetCurrent", problem: e.to_string() });
            // SAFETY: the context is current.
            let comm = bound.and_then(|()| unsafe { library.init(world_size, &id, rank, cubes) });
            // Nobody listens where it was over.
            let _ = sender.send(comm.map(Made));
        };
        spawn("nccl-init", meet)?;
        let Made(comm) = loop {
            match receiver.recv_timeout(Duration::from_millis(20)) {
                Ok(met) => break met?,
                Err(RecvTimeoutError::Timeout) if !is_over() => {}
                Err(_) => return Err(CollectiveError::Aborted),
            }
        };
        let shared = Arc::new(Shared::new(nccl, client, side, comm));
        let (jobs, receiver) = channel();
        let worker = Arc::clone(&shared);
        spawn("nccl-queue", move || worker.work(&receiver))?;
        Ok(Collectives {
            shared,
            jobs,
            marks: AtomicU32::new(0),
            device,
            world_size,
            cubes: limit,
            left: Mutex::default(),
        })
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), CollectiveError> {
    let spawned = std::thread::Builder::new().name(name.into()).spawn(work);
    spawned.map(drop).map_err(|error| CollectiveError::Driver { call: "a thread", problem: error.to_string() })
}

impl Collectives {
    /// How many ranks there are.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// NCCL's version.
    pub fn version(&self) -> String {
        self.shared.nccl.version()
    }

    /// Whether operations run beside kernels from now on, which then leave them as many multiprocessors as they may take. An operation
    /// that waits for another rank holds its multiprocessors meanwhile.
    pub fn beside(&self, kernels: bool) {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        if !kernels {
            *left = None;
        } else if left.is_none() {
            *left = leave_multiprocessors(&self.shared.client, self.cubes);
        }
    }

    /// Asks for the sum of each tensor over all ranks, as one operation, in place where nothing else holds the tensor's memory. It
    /// begins when what the calling thread has queued is done; [`wait`](Self::wait) before the sums are used.
    ///
    /// # Shapes
    /// f32, the same shapes on all ranks.
    ///
    /// # Errors
    /// An earlier operation could not be queued: a tensor's memory is not usable, for want of memory for example, NCCL refused,
    /// or the operations were aborted. None that came after it is queued then, nor is this one; [`summed`](Self::summed) says how many
    /// are.
    pub fn sum(&self, tensors: Vec<Tensor<2>>) -> Result<Vec<Tensor<2>>, CollectiveError> {
        let cubes = tensors.into_iter().map(|tensor| self.own(tensor)).collect::<Result<Vec<_>, _>>()?;
        let buffers = cubes.iter().map(|cube| (cube.handle.clone(), cube.meta.num_elements())).collect();
        self.ask(|told| Job { told, work: Work::Sum { buffers, stream: StreamId::current() } })?;
        Ok(cubes.into_iter().map(from_cube).collect())
    }

    fn ask(&self, job: impl FnOnce(u32) -> Job) -> Result<(), CollectiveError> {
        let told = self.shared.side.tell()?;
        self.shared.asked()?;
        // Its thread ends before this only where it panics, and has given up everything then.
        self.jobs.send(job(told)).map_err(|_| CollectiveError::Aborted)
    }

    /// Sums that are queued since the last [wait](Self::wait) that succeeded.
    pub fn summed(&self) -> usize {
        self.shared.sums()
    }

    /// Has a tensor's memory stay where it is.
    ///
    /// # Shapes
    /// `[n]`, integers.
    ///
    /// # Errors
    /// The tensor's memory is not usable, or it is on another device.
    pub fn fix(&self, tensor: &Tensor<1, Int>) -> Result<Fixed, CollectiveError> {
        let cube = cube_of_int(tensor.clone()).ok_or(CollectiveError::NotCuda)?;
        let bytes = self.checked(&cube)?;
        Ok(Fixed { place: Place::of(&self.shared.client, &cube.handle)?, bytes })
    }

    /// Asks for a gather of all of every rank's `from`, in the order of ranks, to the beginning of `to`, byte for byte. It begins when
    /// what the calling thread has queued is done; [`wait_for`](Self::wait_for) the result before `to` is used. Both stay until
    /// then.
    ///
    /// # Errors
    /// `to` has no room; as [`sum`](Self::sum).
    pub fn gather(&self, from: &Fixed, to: &Fixed) -> Result<Mark, CollectiveError> {
        if from.bytes * self.world_size > to.bytes {
            return Err(CollectiveError::Layout { bytes: to.bytes, problem: "it has no room for what is gathered" });
        }
        let mark = self.next_mark();
        let (from, to, bytes) = (from.place.address(), to.place.address(), from.bytes);
        self.ask(|told| Job { told, work: Work::Gather { from, to, bytes, mark: mark.0 } })?;
        Ok(mark)
    }

    fn next_mark(&self) -> Mark {
        Mark(self.marks.fetch_add(1, Ordering::Relaxed).wrapping_add(1))
    }

    /// Has what the calling thread queues from now on begin when all operations so far are done.
    ///
    /// # Errors
    /// An operation could not be queued, as in [`sum`](Self::sum).
    pub fn wait(&self) -> Result<Waited, CollectiveError> {
        self.shared.flush()?;
        let mark = self.next_mark();
        self.shared.side.mark(mark.0)?;
        let waited = self.wait_for(mark)?;
        self.shared.waited();
        Ok(waited)
    }

    /// Has what the calling thread queues from now on begin when the operations before a mark are done.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn wait_for(&self, mark: Mark) -> Result<Waited, CollectiveError> {
        // Nothing waits on the device for what is not queued there.
        self.shared.flush()?;
        let result = self.shared.side.lead(mark.0)?;
        let both = from_buffer::<1>(&self.device, result, [2], DType::F32).ok_or(CollectiveError::NotCuda)?;
        Ok(Waited { broken: both.clone().narrow(0, 0, 1), seconds: both.narrow(0, 1, 1) })
    }

    /// What NCCL has met with by itself, such as a network that is gone; the operations do not end then. Nothing is
    /// told while operations are being queued, or after an [abort](Self::abort).
    pub fn problem(&self) -> Option<CollectiveError> {
        self.shared.problem()
    }

    /// Ends all operations, because another rank is gone: those that are under way, and all later ones.
    pub fn abort(&self) {
        self.shared.abort();
    }

    /// A tensor's CubeCL tensor whose memory nothing else holds.
    fn own(&self, tensor: Tensor<2>) -> Result<CubeTensor, CollectiveError> {
        let cube = into_cube(tensor).ok_or(CollectiveError::NotCuda)?;
        let bytes = self.checked(&cube)?;
        if cube.dtype != DType::F32 {
            return Err(CollectiveError::Layout { bytes, problem: "its elements are not f32" });
        }
        Ok(owned(cube))
    }

    /// Bytes of a tensor that lies on the device as NCCL takes it.
    fn checked(&self, cube: &CubeTensor) -> Result<usize, CollectiveError> {
        let bytes = cube.meta.num_elements() * cube.dtype.size();
        let problem = match () {
            () if cube.client.service_id() != self.shared.client.service_id() => "it lies on another device",
            () if !cube.is_contiguous() => "its rows lie apart",
            () if cube.handle.size_in_used() < bytes as u64 => "its buffer is smaller",
            () => return Ok(bytes),
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
