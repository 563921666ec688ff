//! A stream beside CubeCL's, and the order between both.
//!
//! Numbers count up: the n-th time that CubeCL's stream is to tell where it is, a kernel on it writes n to one word of the device's
//! memory, and the side stream waits for a number that is not smaller; the other way round likewise with another word.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use cubecl::client::Client;
use cubecl::server::Handle;
use cuda_source::{Arguments, Source};
use cudarc::driver::result::{free_host, free_sync, malloc_host, malloc_sync, memset_d8_sync, stream};
use cudarc::driver::sys::{self, CUdeviceptr, CUstream};
use cudarc::driver::{CudaContext, DriverError};
use host_copies::{DeviceError, is_cuda};

use crate::error::CollectiveError;

const TELL: &str = include_str!("tell.cu");
const AWAIT: &str = include_str!("await.cu");
/// The words do not share a line of the cache.
const WORDS_APART: u64 = 128;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Params {
    flag: u64,
    broken: u64,
    value: u32,
    pad: u32,
}

/// The stream.
pub(crate) struct SideStream {
    client: Client,
    context: Arc<CudaContext>,
    stream: CUstream,
    /// Two words.
    flags: CUdeviceptr,
    /// A word in the host's memory, which the device reads.
    broken: *mut u32,
    /// How often CubeCL's stream was asked to tell.
    told_so_far: AtomicU32,
    /// What the telling kernel writes: whether it ran can be asked of it.
    told: Handle,
    tell: Source,
    wait: Source,
}

impl std::fmt::Debug for SideStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SideStream").field("told", &self.told_so_far).finish_non_exhaustive()
    }
}

// SAFETY: the stream and the addresses are the driver's, which takes them from any thread; the word in the host's memory is read and
// written with atomic accesses by the host, and only read by the device.
unsafe impl Send for SideStream {}
// SAFETY: as above.
unsafe impl Sync for SideStream {}

fn driver(call: &'static str) -> impl Fn(DriverError) -> CollectiveError {
    move |error| CollectiveError::Driver { call, problem: error.to_string() }
}

impl SideStream {
    /// A stream on a client's device, with the device's highest priority: its few blocks don't wait behind those of large kernels.
    pub(crate) fn new(client: &Client) -> Result<Self, CollectiveError> {
        if !is_cuda(client) || cuda_source::device(client).is_none() {
            return Err(CollectiveError::NotCuda);
        }
        let index = usize::from(client.service_id().device.index_id);
        // CubeCL has a client on it, so the driver is loaded. The primary context is the one it uses.
        let context = CudaContext::new(index).map_err(driver("cuDevicePrimaryCtxRetain"))?;
        context.bind_to_thread().map_err(driver("cuCtxSetCurrent"))?;
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: the call writes two numbers.
        let range = unsafe { sys::cuCtxGetStreamPriorityRange(&mut least, &mut greatest) };
        range.result().map_err(driver("cuCtxGetStreamPriorityRange"))?;
        let mut stream: CUstream = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the context is current; the call writes a stream.
        let made = unsafe { sys::cuStreamCreateWithPriority(&mut stream, flags, greatest) };
        made.result().map_err(driver("cuStreamCreateWithPriority"))?;
        // SAFETY: the context is current. What is allocated is freed when the stream is dropped.
        let (flags, broken) = unsafe {
            let flags = malloc_sync(2 * WORDS_APART as usize).map_err(driver("cuMemAlloc"))?;
            memset_d8_sync(flags, 0, 2 * WORDS_APART as usize).map_err(driver("cuMemsetD8"))?;
            let portable = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
            let broken = malloc_host(WORDS_APART as usize, portable).map_err(driver("cuMemHostAlloc"))?.cast::<u32>();
            broken.write(0);
            (flags, broken)
        };
        let told = client.empty(4);
        Ok(Self {
            client: client.clone(),
            context,
            stream,
            flags,
            broken,
            told_so_far: AtomicU32::new(0),
            told,
            tell: Source::new("tell_side_stream", 32, TELL),
            wait: Source::new("await_side_stream", 32, AWAIT),
        })
    }

    /// The stream, for calls that queue on it. The device's context is current then.
    pub(crate) fn stream(&self) -> Result<CUstream, CollectiveError> {
        self.context.bind_to_thread().map_err(driver("cuCtxSetCurrent"))?;
        Ok(self.stream)
    }

    /// The device's context, for another thread.
    pub(crate) fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// Has CubeCL's stream tell this one when all is done that the calling thread has queued; by which number.
    pub(crate) fn tell(&self) -> Result<u32, CollectiveError> {
        let value = self.told_so_far.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        let params = Params { flag: self.flags, broken: self.broken as u64, value, pad: 0 };
        cuda_source::launch(&self.client, &self.tell, (1, 1, 1), Arguments::new().write(&self.told).params(params))?;
        Ok(value)
    }

    /// This stream, for calls that queue on it. What is queued from now on begins when a number was [told](Self::tell), by a launch that
    /// the driver has by now: any answer of CubeCL's that was asked for later proves it.
    pub(crate) fn after(&self, told: u32) -> Result<CUstream, CollectiveError> {
        // Of gathers nothing else is asked.
        self.client.check([&self.told]).map_err(DeviceError::from)?;
        let stream = self.stream()?;
        let at_least = sys::CUstreamWaitValue_flags::CU_STREAM_WAIT_VALUE_GEQ as u32;
        // SAFETY: the word lies in the device's memory as long as the stream lives.
        let waits = unsafe { sys::cuStreamWaitValue32_v2(stream, self.flags, told, at_least) };
        waits.result().map_err(driver("cuStreamWaitValue32"))?;
        Ok(stream)
    }

    /// Marks the end of what is queued on this stream by a number larger than those before.
    pub(crate) fn mark(&self, number: u32) -> Result<(), CollectiveError> {
        let stream = self.stream()?;
        let plain = sys::CUstreamWriteValue_flags::CU_STREAM_WRITE_VALUE_DEFAULT as u32;
        // SAFETY: as in `after`.
        let writes = unsafe { sys::cuStreamWriteValue32_v2(stream, self.flags + WORDS_APART, number, plain) };
        writes.result().map_err(driver("cuStreamWriteValue32"))
    }

    /// What the calling thread queues on CubeCL's stream from now on begins when all is done that was queued on this one before a
    /// [mark](Self::mark). Two f32 tell how that ended: 0, or NaN if operations were [broken off](Self::break_off); the seconds that
    /// were waited.
    pub(crate) fn lead(&self, mark: u32) -> Result<Handle, CollectiveError> {
        let result = self.client.empty(8);
        let params = Params { flag: self.flags + WORDS_APART, broken: self.broken as u64, value: mark, pad: 0 };
        cuda_source::launch(&self.client, &self.wait, (1, 1, 1), Arguments::new().write(&result).params(params))?;
        self.client.check([&result]).map_err(DeviceError::from)?;
        Ok(result)
    }

    /// Has the results of [`lead`](Self::lead) be NaN from now on.
    pub(crate) fn break_off(&self) {
        // SAFETY: the word lies in memory that stays as long as the stream lives.
        unsafe { self.broken.write_volatile(1) };
        std::sync::atomic::fence(Ordering::SeqCst);
    }
}

impl Drop for SideStream {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_err() {
            return;
        }
        // A kernel of CubeCL's stream may still wait for a word, or read one: all that was asked for is with the driver when CubeCL
        // answers, and done when the context is.
        let _ = self.client.check([&self.told]);
        let _ = self.context.synchronize();
        // SAFETY: nothing is queued any more that uses them.
        unsafe {
            let _ = stream::destroy(self.stream);
            let _ = free_sync(self.flags);
            let _ = free_host(self.broken.cast());
        }
    }
}
