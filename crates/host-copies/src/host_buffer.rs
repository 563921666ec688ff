//! Words that wait in the host's memory for a device.

use std::fmt;
use std::mem::MaybeUninit;
use std::sync::Arc;

use burn::tensor::Device;
use cubecl::bytes::{AccessError, AccessPolicy, AllocationController, AllocationProperty, Bytes};
use cudarc::driver::CudaContext;
use cudarc::driver::sys::{cuMemHostRegister_v2, cuMemHostUnregister};
use memmap2::MmapMut;
use rayon::prelude::*;

use crate::{DeviceError, client_of, is_cuda};

/// So many words of the host's memory, from which a device copies: pinned where the device is a CUDA device, which then
/// fetches them without the processor; ordinary memory elsewhere.
///
/// The memory is allocated once and is no part of CubeCL's pool.
pub struct HostBuffer(Arc<Memory>);

impl fmt::Debug for HostBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostBuffer").field("words", &self.words().len()).finish_non_exhaustive()
    }
}

impl HostBuffer {
    /// Room for `words` words for a device; what they hold is unspecified.
    ///
    /// # Errors
    /// [`DeviceError::Failed`]: the driver pins no more memory.
    pub fn new(device: &Device, words: usize) -> Result<Self, DeviceError> {
        let client = client_of(device).filter(is_cuda);
        let memory = match client {
            Some(client) => {
                // CubeCL has a client on it, so the driver is loaded. The primary context is the one it uses.
                let context = CudaContext::new(usize::from(client.service_id().device.index_id));
                Memory::pinned(&context.map_err(|error| unpinned(words, &error))?, words)?
            }
            None => Memory::ordinary(words),
        };
        Ok(Self(Arc::new(memory)))
    }

    /// The words.
    pub fn words(&self) -> &[u32] {
        self.0.words()
    }

    /// The words, to be changed; `None` while copies from them may be under way.
    pub fn words_mut(&mut self) -> Option<&mut [u32]> {
        Arc::get_mut(&mut self.0).map(Memory::words_mut)
    }

    /// Puts `words` in the place of those from `start` on. Where copies may be under way, they go on with the former words,
    /// and the buffer gets memory of its own.
    ///
    /// # Errors
    /// [`DeviceError::Failed`]: the words don't fit, or the driver pins no more memory.
    pub fn write(&mut self, start: usize, words: &[u32]) -> Result<(), DeviceError> {
        let room = self.words().len();
        if start + words.len() > room {
            return Err(DeviceError::Failed(format!("{} words don't fit from {start} on into {room}", words.len())));
        }
        if self.words_mut().is_none() {
            let mut copy = match &self.0.backing {
                Backing::Pinned { context, .. } => Memory::pinned(context, room)?,
                Backing::Boxed => Memory::ordinary(room),
            };
            copy.words_mut().copy_from_slice(self.words());
            self.0 = Arc::new(copy);
        }
        if let Some(all) = self.words_mut() {
            all[start..start + words.len()].copy_from_slice(words);
        }
        Ok(())
    }

    /// The words as CubeCL takes them; the memory stays until it has been copied from.
    pub(crate) fn bytes(&self) -> Bytes {
        let len = 4 * self.words().len();
        // SAFETY: all `len` bytes are initialised.
        unsafe { Bytes::from_controller(Box::new(View(Arc::clone(&self.0))), len) }
    }
}

fn unpinned(words: usize, error: &dyn fmt::Display) -> DeviceError {
    DeviceError::Failed(format!("{} MiB of the host's memory could not be pinned: {error}", (4 * words) >> 20))
}

/// Memory of the host that is given back when it is dropped.
pub(crate) struct Memory {
    at: *mut u32,
    words: usize,
    backing: Backing,
}

enum Backing {
    /// A boxed slice.
    Boxed,
    /// Pages that were registered with a context.
    Pinned { _pages: MmapMut, context: Arc<CudaContext> },
}

// SAFETY: the memory is this value's alone and valid from every thread. It is changed through `&mut` only, or by a `Slot`,
// which says how it keeps readers out.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    pub(crate) fn ordinary(words: usize) -> Self {
        let memory = Box::into_raw(vec![0_u32; words].into_boxed_slice());
        Self { at: memory.cast(), words, backing: Backing::Boxed }
    }

    /// Pages are made by all processor cores and registered then, large ones where the system has such: ten times as fast as
    /// `cuMemAllocHost`, which makes them one by one (on an H100's host 28 ms instead of 250 for 440 MiB).
    fn pinned(context: &Arc<CudaContext>, words: usize) -> Result<Self, DeviceError> {
        const CHUNK: usize = 2 << 20;
        const PAGE: usize = 4096;
        let len = (4 * words).max(PAGE);
        let mut pages = MmapMut::map_anon(len).map_err(|error| unpinned(words, &error))?;
        // A wish, which nothing depends on.
        #[cfg(target_os = "linux")]
        let _ = pages.advise(memmap2::Advice::HugePage);
        pages.par_chunks_mut(CHUNK).for_each(|chunk| chunk.iter_mut().step_by(PAGE).for_each(|byte| *byte = 0));
        let at = pages.as_mut_ptr();
        context.bind_to_thread().map_err(|error| unpinned(words, &error))?;
        // SAFETY: the context is bound to this thread, and the pages stay mapped until they are unregistered.
        unsafe { cuMemHostRegister_v2(at.cast(), len, 0) }.result().map_err(|error| unpinned(words, &error))?;
        Ok(Self { at: at.cast(), words, backing: Backing::Pinned { _pages: pages, context: Arc::clone(context) } })
    }

    pub(crate) fn words(&self) -> &[u32] {
        // SAFETY: `at` is valid for as many words, which any bits are. Nothing writes meanwhile, see `Slot`.
        unsafe { std::slice::from_raw_parts(self.at, self.words) }
    }

    fn words_mut(&mut self) -> &mut [u32] {
        // SAFETY: as above, and the borrow is the only one.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.words) }
    }

    /// Writes over the words.
    ///
    /// # Safety
    /// No borrow of [`words`](Self::words) may live, in whatever thread.
    pub(crate) unsafe fn overwrite(&self, words: &[u32]) {
        let len = words.len().min(self.words);
        // SAFETY: both are valid for `len` words, and are memory of two values.
        unsafe { std::ptr::copy_nonoverlapping(words.as_ptr(), self.at, len) };
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        match &self.backing {
            Backing::Boxed => {
                // SAFETY: the memory came from a boxed slice of this length.
                drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(self.at, self.words)) });
            }
            Backing::Pinned { context, .. } => {
                // A context that is gone knows nothing of the pages any more. They are unmapped next.
                if context.bind_to_thread().is_ok() {
                    // SAFETY: the pages were registered in this context, and copies from them held the value.
                    let _ = unsafe { cuMemHostUnregister(self.at.cast()) };
                }
            }
        }
    }
}

/// The memory as CubeCL's bytes: read, never written to or detached.
pub(crate) struct View(pub(crate) Arc<Memory>);

impl AllocationController for View {
    fn alloc_align(&self) -> usize {
        align_of::<u32>()
    }

    fn property(&self) -> AllocationProperty {
        match self.0.backing {
            Backing::Pinned { .. } => AllocationProperty::Pinned,
            Backing::Boxed => AllocationProperty::Native,
        }
    }

    unsafe fn memory_mut(&mut self, _: AccessPolicy) -> Result<&mut [MaybeUninit<u8>], AccessError> {
        Err(AccessError::WouldCopy)
    }

    fn memory(&self, _: AccessPolicy) -> Result<&[MaybeUninit<u8>], AccessError> {
        let words = self.0.words();
        // SAFETY: the same bytes; `MaybeUninit<u8>` has the layout of `u8`.
        Ok(unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), size_of_val(words)) })
    }
}
