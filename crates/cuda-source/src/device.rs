//! What a kernel author asks of the card.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};

use cubecl::client::Client;
use cubecl_cuda::compiler::CudaBackend;
use cudarc::driver::result::device::{get, get_attribute};
use cudarc::driver::sys::{CUdevice, CUdevice_attribute as Attribute, cuDriverGetVersion};

use crate::FloatFormat;

/// A CUDA device that runs hand-written kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CudaDevice {
    /// Major and minor, or less: see [`compute_capability()`].
    pub compute_capability: (u32, u32),
    /// Streaming multiprocessors, but for those that are [left](leave_multiprocessors) to others.
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

    /// Whether [`tensor_cores!`](crate::tensor_cores!) multiplies matrices of a format on it: of f16 from compute capability
    /// 7.5 on, of bf16 from 8.0 on.
    pub fn multiplies(&self, format: FloatFormat) -> bool {
        match format {
            FloatFormat::F32 => false,
            FloatFormat::F16 => self.compute_capability >= (7, 5),
            FloatFormat::BF16 => self.compute_capability >= (8, 0),
        }
    }
}

/// Major and minor compute capability of the client's CUDA device; `None` on other runtimes.
///
/// The environment variable `CUDA_SOURCE_CAPABILITY`, as in `8.6`, is a limit for it: kernels are then those for such a card,
/// which use its features alone. What is no version leaves the card as it is.
pub fn compute_capability(client: &Client) -> Option<(u32, u32)> {
    if client.name() != "cuda" {
        return None;
    }
    // CubeCL has a client on it, so the driver is loaded and initialised.
    let device = get(i32::from(client.service_id().device.index_id)).ok()?;
    capability_of(device)
}

fn capability_of(device: CUdevice) -> Option<(u32, u32)> {
    static LIMIT: LazyLock<Option<(u32, u32)>> = LazyLock::new(|| {
        let value = std::env::var("CUDA_SOURCE_CAPABILITY").ok()?;
        let limit = limit(&value);
        if limit.is_none() {
            tracing::warn!(value, "CUDA_SOURCE_CAPABILITY is no compute capability, as 8.6 is: it limits nothing");
        }
        limit
    });
    let capability = (
        attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    Some(LIMIT.map_or(capability, |limit| limit.min(capability)))
}

/// Major and minor of a version.
fn limit(value: &str) -> Option<(u32, u32)> {
    let (major, minor) = value.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
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
    known(client, |(device, left)| {
        device
            .map(|device| CudaDevice { multiprocessors: device.multiprocessors.saturating_sub(*left).max(1), ..device })
    })
}

/// Has kernels that are launched from now on leave so many multiprocessors of the client's CUDA device to what runs beside them.
///
/// A kernel of one cube for each multiprocessor, whose cubes divide the work up front, takes up to twice as long where something
/// else holds a single one: the cube that finds no place runs when the others are done. Nothing changes on other runtimes.
pub fn leave_multiprocessors(client: &Client, count: u32) {
    if client.name() == "cuda" && CudaBackend::default() == CudaBackend::Cpp {
        known(client, |(_, left)| *left = count);
    }
}

/// A device as it is, and the multiprocessors that are left to others.
type Known = (Option<CudaDevice>, u32);

/// Looks at a CUDA device, which is asked once.
fn known<T>(client: &Client, look: impl FnOnce(&mut Known) -> T) -> T {
    static DEVICES: LazyLock<Mutex<HashMap<u16, Known>>> = LazyLock::new(Mutex::default);
    let index = client.service_id().device.index_id;
    let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    let ask = || (query(index).filter(|device| device.compute_capability >= (7, 0)), 0);
    look(devices.entry(index).or_insert_with(ask))
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
    fn a_limit_is_a_version() {
        assert_eq!(limit("8.6"), Some((8, 6)));
        assert_eq!(["86", "8", "sm_86", "8.x", ""].map(limit), [None; 5]);
    }

    #[test]
    fn cards_before_ampere_multiply_f16_alone() {
        let formats = |compute_capability| {
            let card = CudaDevice {
                compute_capability,
                multiprocessors: 40,
                l2_bytes: 4 << 20,
                toolkit: (13, 0),
                driver: (13, 0),
            };
            [FloatFormat::F32, FloatFormat::F16, FloatFormat::BF16].map(|format| card.multiplies(format))
        };
        assert_eq!(formats((7, 0)), [false; 3]);
        assert_eq!(formats((7, 5)), [false, true, false]);
        assert_eq!(formats((8, 0)), [false, true, true]);
    }

    #[test]
    fn cuda_versions_are_decimal() {
        assert_eq!(version(12080), Some((12, 8)));
        assert_eq!(version(13000), Some((13, 0)));
        assert_eq!(version(-1), None);
    }
}
