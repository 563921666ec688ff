//! What a kernel author asks of the card.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};

use cubecl::client::Client;
use cubecl_cuda::compiler::CudaBackend;
use cudarc::driver::result::device::{get, get_attribute};
use cudarc::driver::sys::{CUdevice, CUdevice_attribute as Attribute, cuDriverGetVersion};

/// A CUDA device that runs hand-written kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CudaDevice {
    /// Major and minor.
    pub compute_capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of the second-level cache.
    pub l2_bytes: usize,
    /// Version of NVRTC, which compiles the text to PTX.
    pub toolkit: (u32, u32),
    /// Newest CUDA version that the driver knows, whose assembler makes machine code of the PTX.
    pub driver: (u32, u32),
}

impl CudaDevice {
    /// Whether a kernel may have more than 48 KB of static shared memory: CUDA 13's compiler and assembler take it.
    pub fn takes_large_static_memory(&self) -> bool {
        self.driver >= (13, 0) && self.toolkit >= (13, 0)
    }
}

/// Major and minor compute capability of the client's CUDA device; `None` on other runtimes.
pub fn compute_capability(client: &Client) -> Option<(u32, u32)> {
    if client.name() != "cuda" {
        return None;
    }
    // CubeCL has a client on it, so the driver is loaded and initialised.
    let device = get(i32::from(client.service_id().device.index_id)).ok()?;
    capability_of(device)
}

fn capability_of(device: CUdevice) -> Option<(u32, u32)> {
    Some((
        attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    ))
}

/// An attribute of a device that `get` returned.
fn attribute(device: CUdevice, attribute: Attribute) -> Option<u32> {
    // SAFETY: `device` is a device of this machine: `get` returned it.
    unsafe { get_attribute(device, attribute) }.ok().and_then(|value| u32::try_from(value).ok())
}

/// The client's CUDA device; `None` on other runtimes, where CubeCL compiles without NVRTC, and below compute
/// capability 7.0, where parameters don't go by value. Asks the driver once per device.
pub fn device(client: &Client) -> Option<CudaDevice> {
    if client.name() != "cuda" || CudaBackend::default() != CudaBackend::Cpp {
        return None;
    }
    static DEVICES: LazyLock<Mutex<HashMap<u16, Option<CudaDevice>>>> = LazyLock::new(Mutex::default);
    let index = client.service_id().device.index_id;
    let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    *devices.entry(index).or_insert_with(|| query(index).filter(|device| device.compute_capability >= (7, 0)))
}

fn query(index: u16) -> Option<CudaDevice> {
    // CubeCL has a client on it, so the driver is loaded and initialised.
    let device = get(i32::from(index)).ok()?;
    let mut driver = 0;
    // SAFETY: the call writes the version into `driver`, which outlives it.
    unsafe { cuDriverGetVersion(&mut driver) }.result().ok()?;
    Some(CudaDevice {
        compute_capability: capability_of(device)?,
        multiprocessors: attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        l2_bytes: attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
        toolkit: nvrtc_version()?,
        driver: version(driver)?,
    })
}

fn nvrtc_version() -> Option<(u32, u32)> {
    // SAFETY: the call only tries to load the library; without this a missing one is a panic below.
    if !unsafe { cudarc::nvrtc::sys::is_culib_present() } {
        return None;
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the call writes the version into both, which outlive it.
    unsafe { cudarc::nvrtc::sys::nvrtcVersion(&mut major, &mut minor) }.result().ok()?;
    Some((u32::try_from(major).ok()?, u32::try_from(minor).ok()?))
}

/// Major and minor from CUDA's decimal form: 12080 is 12.8.
fn version(decimal: i32) -> Option<(u32, u32)> {
    let decimal = u32::try_from(decimal).ok()?;
    Some((decimal / 1000, decimal % 1000 / 10))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuda_versions_are_decimal() {
        assert_eq!(version(12080), Some((12, 8)));
        assert_eq!(version(13000), Some((13, 0)));
        assert_eq!(version(-1), None);
    }
}
