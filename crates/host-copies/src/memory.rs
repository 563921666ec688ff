//! What a device has left, and a large device that is to behave as a smaller one.
//!
//! CubeCL's allocator has no limit of its own: it asks the driver until the driver refuses. [`limit_memory`] therefore
//! takes the difference between the device and the smaller one from the driver and holds it to the end of the program.
//! Whatever asks the driver then, CubeCL's pools, NVRTC's modules and [`free_memory`], finds what the smaller device would
//! have, and an allocation beyond that fails as it would fail there.
//!
//! What stays that of the large device: how much memory CubeCL takes it for, by which it bounds a single page (a quarter of
//! that) and decides when to move buffers before memory is short; and what other programs see of it, for which the part
//! that is held is gone.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use burn::tensor::Device;
use cudarc::driver::CudaContext;
use cudarc::driver::result::{free_sync, malloc_sync};
use cudarc::driver::sys::CUdeviceptr;

use crate::{DeviceError, client_of, is_cuda};

/// What is held of a device.
struct Held {
    at: CUdeviceptr,
    bytes: u64,
    /// Whose memory it is.
    _context: Arc<CudaContext>,
}

/// By the device's index.
static HELD: LazyLock<Mutex<HashMap<u16, Held>>> = LazyLock::new(Mutex::default);

/// The memory of a CUDA device, as its driver has it.
pub struct DeviceMemory {
    context: Arc<CudaContext>,
    index: u16,
}

impl std::fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeviceMemory").field("index", &self.index).finish_non_exhaustive()
    }
}

impl DeviceMemory {
    /// Of a device; `None` where its driver doesn't say what is free.
    pub fn of(device: &Device) -> Option<Self> {
        let client = client_of(device).filter(is_cuda)?;
        let index = client.service_id().device.index_id;
        // CubeCL has a client on it, so the driver is loaded. The primary context is the one it uses.
        let context = CudaContext::new(usize::from(index)).ok()?;
        Some(Self { context, index })
    }

    /// Bytes that could still be allocated, and bytes in all: without what [`limit_memory`] holds.
    pub fn free(&self) -> Option<(u64, u64)> {
        let (free, total) = self.context.mem_get_info().ok()?;
        Some((free as u64, (total as u64).saturating_sub(self.held())))
    }

    /// Bytes that [`limit_memory`] holds.
    pub fn held(&self) -> u64 {
        HELD.lock().unwrap_or_else(PoisonError::into_inner).get(&self.index).map_or(0, |held| held.bytes)
    }

    /// See [`limit_memory`].
    fn limit(&self, limit: u64) -> Result<u64, DeviceError> {
        let failed =
            |error: &dyn std::fmt::Display| DeviceError::Failed(format!("no memory could be held back: {error}"));
        let mut all = HELD.lock().unwrap_or_else(PoisonError::into_inner);
        self.context.bind_to_thread().map_err(|error| failed(&error))?;
        if let Some(held) = all.remove(&self.index) {
            // SAFETY: the memory was allocated below, in this context, and nothing knows its address.
            unsafe { free_sync(held.at) }.map_err(|error| failed(&error))?;
        }
        let (free, total) = self.context.mem_get_info().map_err(|error| failed(&error))?;
        let bytes = to_hold(limit, free as u64, total as u64).map_err(DeviceError::Failed)?;
        if bytes > 0 {
            // SAFETY: the context is bound to this thread; the memory is never read or written.
            let at = unsafe { malloc_sync(bytes as usize) }.map_err(|error| failed(&error))?;
            all.insert(self.index, Held { at, bytes, _context: Arc::clone(&self.context) });
        }
        Ok(total as u64 - bytes)
    }
}

/// How much of a device to hold, so that it is one of `limit` bytes. What is in use, by whomever, would be in use there too.
fn to_hold(limit: u64, free: u64, total: u64) -> Result<u64, String> {
    let bytes = total.saturating_sub(limit);
    if bytes <= free {
        return Ok(bytes);
    }
    let [used, limit, total] = [total.saturating_sub(free), limit, total].map(|bytes| bytes >> 20);
    Err(format!("{used} MiB of its {total} MiB are in use, more than a device of {limit} MiB has"))
}

/// Bytes that could still be allocated on a device, and bytes in all, as its driver says and [`limit_memory`] leaves them;
/// `None` where that is unknown.
pub fn free_memory(device: &Device) -> Option<(u64, u64)> {
    DeviceMemory::of(device)?.free()
}

/// Makes a CUDA device behave as one of `limit` bytes, to the end of the program or the next call. Returns what it then has
/// in all: `limit`, or less on a device that is smaller anyway.
///
/// # Errors
/// [`DeviceError::Failed`]: the device is not a CUDA device, or more than `limit` bytes of it are in use.
pub fn limit_memory(device: &Device, limit: u64) -> Result<u64, DeviceError> {
    let memory = DeviceMemory::of(device);
    memory.ok_or_else(|| DeviceError::Failed("only the memory of CUDA devices can be limited".into()))?.limit(limit)
}

/// Units of sizes in text.
pub const UNITS: [(&str, u64); 4] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

/// The bytes that a text such as `15GiB`, `1.5 GiB` or `512MiB` says; `None` where it says none.
pub fn parse_size(text: &str) -> Option<u64> {
    UNITS.iter().find_map(|(name, unit)| {
        let number: f64 = text.strip_suffix(name)?.trim_end().parse().ok()?;
        let bytes = number * *unit as f64;
        (bytes >= 0.0 && bytes < u64::MAX as f64).then_some(bytes as u64)
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn what_is_held_leaves_what_the_smaller_device_would_have() {
        // Of 80 GiB, half a GiB is the context's; on 15 GiB that leaves 14.5.
        let (free, total) = (80 * GIB - GIB / 2, 80 * GIB);
        let held = to_hold(15 * GIB, free, total).unwrap();
        assert_eq!((free - held, total - held), (15 * GIB - GIB / 2, 15 * GIB));
        assert_eq!(to_hold(80 * GIB, free, total), Ok(0));
        assert_eq!(to_hold(90 * GIB, free, total), Ok(0), "a smaller device stays as it is");
        let message = to_hold(15 * GIB, 60 * GIB, total).unwrap_err();
        assert!(message.contains("20480 MiB of its 81920 MiB") && message.contains("15360 MiB"), "{message}");
    }

    #[test]
    fn the_host_has_no_limit() {
        let message = limit_memory(&Device::flex(), GIB).unwrap_err().to_string();
        assert!(message.contains("only the memory of CUDA devices"), "{message}");
        assert_eq!(free_memory(&Device::flex()), None);
    }

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [
            ("15GiB", Some(15 * GIB)),
            ("1.5 GiB", Some(3 * GIB / 2)),
            ("100B", Some(100)),
            ("15", None),
            ("-1MiB", None),
        ] {
            assert_eq!(parse_size(text), bytes, "{text}");
        }
    }
}
