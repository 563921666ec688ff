//! Words that wait in the host's memory for a device.

use std::fmt;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use burn::tensor::Device;
use cubecl::bytes::{AccessError, AccessPolicy, AllocationController, AllocationProperty, Bytes};
use cudarc::driver::CudaContext;
use cudarc::driver::sys::{cuMemHostRegister_v2, cuMemHostUnregister};
use memmap2::MmapMut;
use rayon::prelude::*;

use crate::{DeviceError, SharedPages, client_of, is_cuda};

/// The least page of a system that CUDA runs on.
const PAGE: usize = 4096;

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
        let memory = match context_of(device, words)? {
            Some(context) => Memory::pinned(&context, words)?,
            None => Memory::ordinary(words),
        };
        Ok(Self(Arc::new(memory)))
    }

    /// The next `words` words of memory that other processes see, for a device of this one. One of the processes writes to them and
    /// [says so](Self::publish); the others read them [after that](Self::is_published).
    ///
    /// # Errors
    /// [`DeviceError::Host`]: the host has no more memory; [`DeviceError::Failed`]: the driver pins no more.
    pub fn shared(device: &Device, pages: &mut SharedPages, words: usize) -> Result<Self, DeviceError> {
        let context = context_of(device, words)?;
        let pages = pages.next(4 * (words + 1)).map_err(|error| {
            let mib = (4 * words).div_ceil(1 << 20);
            DeviceError::Host(format!("{mib} MiB more, which processes of the host were to share: {error}"))
        })?;
        Ok(Self(Arc::new(Memory::mapped(pages, words, context, true)?)))
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
    /// and the buffer gets memory of its own; so does one of memory that other processes see, which keep theirs.
    ///
    /// # Errors
    /// [`DeviceError::Failed`]: the words don't fit, or the driver pins no more memory.
    pub fn write(&mut self, start: usize, words: &[u32]) -> Result<(), DeviceError> {
        let room = self.words().len();
        if start + words.len() > room {
            return Err(DeviceError::Failed(format!("{} words don't fit from {start} on into {room}", words.len())));
        }
        let is_shared = matches!(self.0.backing, Backing::Pages { shared: true, .. });
        if is_shared || self.words_mut().is_none() {
            let mut copy = match &self.0.backing {
                Backing::Pages { context: Some(context), .. } => Memory::pinned(context, room)?,
                Backing::Pages { context: None, .. } | Backing::Boxed => Memory::ordinary(room),
            };
            copy.words_mut().copy_from_slice(self.words());
            self.0 = Arc::new(copy);
        }
        if let Some(all) = self.words_mut() {
            all[start..start + words.len()].copy_from_slice(words);
        }
        Ok(())
    }

    /// Tells the other processes that see this memory that all has been written.
    pub fn publish(&self) {
        if let Some(mark) = self.0.mark() {
            mark.store(1, Ordering::Release);
        }
    }

    /// Whether all has been written, by whichever process. Memory that no other process sees is this one's to know.
    pub fn is_published(&self) -> bool {
        self.0.mark().is_none_or(|mark| mark.load(Ordering::Acquire) != 0)
    }

    /// The words as CubeCL takes them; the memory stays until it has been copied from.
    pub(crate) fn bytes(&self) -> Bytes {
        let len = 4 * self.words().len();
        // SAFETY: all `len` bytes are initialised.
        unsafe { Bytes::from_controller(Box::new(View(Arc::clone(&self.0))), len) }
    }
}

/// The context of a CUDA device.
fn context_of(device: &Device, words: usize) -> Result<Option<Arc<CudaContext>>, DeviceError> {
    let Some(client) = client_of(device).filter(is_cuda) else { return Ok(None) };
    // CubeCL has a client on it, so the driver is loaded. The primary context is the one it uses.
    let context = CudaContext::new(usize::from(client.service_id().device.index_id));
    context.map(Some).map_err(|error| unpinned(words, &error))
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
    /// Pages, registered with a context where there is one. Other processes may see them.
    Pages { _pages: MmapMut, context: Option<Arc<CudaContext>>, shared: bool },
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

    /// Pages are large ones where the system has such.
    fn pinned(context: &Arc<CudaContext>, words: usize) -> Result<Self, DeviceError> {
        let pages = MmapMut::map_anon((4 * words).max(PAGE)).map_err(|error| unpinned(words, &error))?;
        // A wish, which nothing depends on.
        #[cfg(target_os = "linux")]
        let _ = pages.advise(memmap2::Advice::HugePage);
        Self::mapped(pages, words, Some(Arc::clone(context)), false)
    }

    /// Pages are made by all processor cores and registered then: ten times as fast as `cuMemAllocHost`, which makes them one by one (on
    /// an H100's host 28 ms instead of 250 for 440 MiB).
    fn mapped(
        mut pages: MmapMut,
        words: usize,
        context: Option<Arc<CudaContext>>,
        shared: bool,
    ) -> Result<Self, DeviceError> {
        const CHUNK: usize = 2 << 20;
        // What is written is what is there: another process may have filled the page.
        let touch = |byte: &mut u8| {
            // SAFETY: the byte is this slice's.
            let _ = unsafe { std::ptr::read_volatile(byte) };
        };
        let make = |byte: &mut u8| *byte = 0;
        let all = |act: fn(&mut u8), pages: &mut MmapMut| {
            pages.par_chunks_mut(CHUNK).for_each(|chunk| chunk.iter_mut().step_by(PAGE).for_each(act));
        };
        all(if shared { touch } else { make }, &mut pages);
        let (at, len) = (pages.as_mut_ptr(), pages.len());
        if let Some(context) = &context {
            context.bind_to_thread().map_err(|error| unpinned(words, &error))?;
            // SAFETY: the context is bound to this thread, and the pages stay mapped until they are unregistered.
            unsafe { cuMemHostRegister_v2(at.cast(), len, 0) }.result().map_err(|error| unpinned(words, &error))?;
        }
        Ok(Self { at: at.cast(), words, backing: Backing::Pages { _pages: pages, context, shared } })
    }

    /// The word behind the others, in memory that other processes see.
    fn mark(&self) -> Option<&AtomicU32> {
        match self.backing {
            // SAFETY: the pages have one word more than `words`, which nothing else is made of.
            Backing::Pages { shared: true, .. } => Some(unsafe { AtomicU32::from_ptr(self.at.add(self.words)) }),
            _ => None,
        }
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
            Backing::Pages { context: None, .. } => {}
            Backing::Pages { context: Some(context), .. } => {
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
            Backing::Pages { context: Some(_), .. } => AllocationProperty::Pinned,
            Backing::Pages { context: None, .. } | Backing::Boxed => AllocationProperty::Native,
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
