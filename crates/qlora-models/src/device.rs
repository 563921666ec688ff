//! Which device to run on, and what its memory holds.

use crate::{ModelError, kernel_cache};
use burn::tensor::{Device, DeviceKind, FloatDType};
use host_copies::{DeviceMemory, client_of, limit_memory, parse_size};
use std::panic::catch_unwind;
use std::sync::{Mutex, PoisonError};

/// The device named by `cpu`, `cuda`, `cuda:<index>`, `vulkan`, `metal` or `auto` (CUDA when there is one, else the CPU).
///
/// The first call for a GPU also says where CubeCL keeps compiled kernels: in
/// `$XDG_CACHE_HOME/burn-qlora/kernels` (`~/.cache` without that variable), or where
/// `BURN_QLORA_KERNEL_CACHE` says (a folder, or `off`), as far as the user's `cubecl.toml` leaves it open.
///
/// `BURN_QLORA_DEVICE_MEMORY=15GiB` makes a CUDA device behave as one of that size: see [`host_copies::limit_memory`].
///
/// # Errors
/// The name is unknown, no such device answers, or its memory can't be limited as the environment asks.
pub fn select_device(name: &str) -> Result<Device, ModelError> {
    let device = find_device(name)?;
    if let Some(limit) = std::env::var_os(MEMORY_VARIABLE) {
        limit_to(&device, &limit.to_string_lossy())?;
    }
    Ok(device)
}

/// What a device's memory is limited to.
const MEMORY_VARIABLE: &str = "BURN_QLORA_DEVICE_MEMORY";

fn limit_to(device: &Device, value: &str) -> Result<(), ModelError> {
    let fail = |problem: String| ModelError::MemoryLimit { variable: MEMORY_VARIABLE, value: value.into(), problem };
    let bytes = parse_size(value).filter(|bytes| *bytes > 0);
    let bytes = bytes.ok_or_else(|| fail("write a size such as 15GiB or 500MiB".into()))?;
    // Once for each size: what is free by now was not free when the limit was set.
    static LIMITED: Mutex<Vec<(Device, u64)>> = Mutex::new(Vec::new());
    let mut limited = LIMITED.lock().unwrap_or_else(PoisonError::into_inner);
    if !limited.contains(&(device.clone(), bytes)) {
        let total = limit_memory(device, bytes).map_err(|error| fail(error.to_string()))?;
        tracing::info!(total, "the device's memory is limited by {MEMORY_VARIABLE}");
        limited.retain(|(known, _)| known != device);
        limited.push((device.clone(), bytes));
    }
    Ok(())
}

fn find_device(name: &str) -> Result<Device, ModelError> {
    let unusable = |reason: &str| ModelError::NoDevice { device: name.into(), reason: reason.into() };
    if name != "cpu" {
        kernel_cache::enable();
    }
    match name {
        "cpu" => Ok(Device::flex()),
        "auto" => Ok(probe(|| Device::cuda(0)).unwrap_or_else(Device::flex)),
        "vulkan" | "metal" => {
            let right_system = (name == "metal") == cfg!(target_os = "macos");
            if !right_system {
                return Err(unusable(if name == "metal" {
                    "Metal is on macOS only"
                } else {
                    "on macOS the GPU is reached as `metal`"
                }));
            }
            probe(|| Device::wgpu(DeviceKind::default()))
                .ok_or_else(|| unusable("no GPU adapter answers; is its driver installed?"))
        }
        _ => {
            let index = match name.strip_prefix("cuda") {
                Some("") => Some(0),
                Some(rest) => rest.strip_prefix(':').and_then(|index| index.parse::<usize>().ok()),
                None => None,
            };
            let index = index.ok_or_else(|| unusable("known devices: auto, cpu, cuda, cuda:<index>, vulkan, metal"))?;
            probe(|| Device::cuda(index))
                .ok_or_else(|| unusable("no CUDA device answers; is the NVIDIA driver installed and the index right?"))
        }
    }
}

/// Makes a device and waits for it. Runtimes panic when their driver is missing: that is an answer too.
fn probe(device: impl FnOnce() -> Device + std::panic::UnwindSafe) -> Option<Device> {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found = catch_unwind(|| {
        let device = device();
        let ready = burn::tensor::Tensor::<1>::zeros([1], &device).try_into_data().is_ok();
        ready.then_some(device)
    });
    std::panic::set_hook(hook);
    found.ok().flatten()
}

/// The compute dtype for `auto`: bf16 on GPUs that have it, f16 on CUDA devices without it that have tensor cores (compute
/// capability 7.0 and 7.5), f32 elsewhere.
pub fn default_compute_dtype(device: &Device) -> FloatDType {
    Floats::of(device).default_dtype()
}

/// Checks that a device computes in `dtype`.
///
/// # Errors
/// [`ModelError::ComputeDtype`] when it does not, with what it computes in.
pub fn check_compute_dtype(device: &Device, dtype: FloatDType) -> Result<(), ModelError> {
    Floats::of(device).check(dtype)
}

/// What decides in which formats a device computes.
#[derive(Clone, Copy, Debug)]
struct Floats {
    on_cpu: bool,
    /// Of CUDA devices. CubeCL says that all of them have all formats, because its code for older ones emulates them.
    compute_capability: Option<(u32, u32)>,
    /// Whether Burn's backend has the formats.
    bf16: bool,
    f16: bool,
}

impl Floats {
    fn of(device: &Device) -> Self {
        Self {
            on_cpu: *device == Device::flex(),
            compute_capability: client_of(device).and_then(|client| cuda_source::compute_capability(&client)),
            bf16: device.supports_dtype(FloatDType::BF16),
            f16: device.supports_dtype(FloatDType::F16),
        }
    }

    fn has(&self, dtype: FloatDType) -> bool {
        let from = |least: (u32, u32)| self.compute_capability.is_none_or(|capability| capability >= least);
        match dtype {
            FloatDType::BF16 => self.bf16 && from((8, 0)),
            FloatDType::F16 => self.f16 && from((5, 3)),
            _ => true,
        }
    }

    fn default_dtype(&self) -> FloatDType {
        let tensor_cores = self.compute_capability.is_some_and(|capability| capability >= (7, 0));
        if self.on_cpu {
            FloatDType::F32
        } else if self.has(FloatDType::BF16) {
            FloatDType::BF16
        } else if tensor_cores && self.has(FloatDType::F16) {
            FloatDType::F16
        } else {
            FloatDType::F32
        }
    }

    fn check(&self, dtype: FloatDType) -> Result<(), ModelError> {
        if self.has(dtype) {
            return Ok(());
        }
        let device = match self.compute_capability {
            Some((major, minor)) => format!("a CUDA device of compute capability {major}.{minor}"),
            None => "this device".into(),
        };
        let others = [(FloatDType::F16, "\"f16\", with loss scaling,"), (FloatDType::BF16, "\"bf16\"")];
        let other = others.into_iter().find(|(other, _)| *other != dtype && self.has(*other));
        let instead = other.map_or("\"f32\"".into(), |(_, name)| format!("{name} or \"f32\""));
        Err(ModelError::ComputeDtype { dtype: format!("{dtype:?}").to_lowercase(), device, instead })
    }
}

/// Bytes of a CUDA device that the program holds back, so that it behaves as a smaller one: `BURN_QLORA_DEVICE_MEMORY`.
pub fn held_memory(device: &Device) -> u64 {
    DeviceMemory::of(device).map_or(0, |memory| memory.held())
}

/// The most bytes in use so far: reserved by the device's allocator, which rarely gives memory back, as far as this is called after
/// each step; on the CPU, resident of the whole process, as the system counts it (Linux; elsewhere what is resident now).
pub fn peak_memory(device: &Device) -> Option<u64> {
    let (_, now) = device_memory(device)?;
    let of_process = || {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
        let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
        Some(kib * 1024)
    };
    let on_cpu = device.memory_pool_usage().is_none();
    Some(if on_cpu { of_process().unwrap_or(now).max(now) } else { now })
}

/// Bytes in use: of the device's allocator (in use, reserved), or of the process on the CPU (resident, twice).
pub fn device_memory(device: &Device) -> Option<(u64, u64)> {
    match device.memory_pool_usage() {
        Some(usage) => Some((usage.bytes_in_use, usage.bytes_reserved)),
        None => memory_stats::memory_stats().map(|stats| (stats.physical_mem as u64, stats.physical_mem as u64)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use FloatDType::{BF16, F16, F32};

    #[test]
    fn every_device_has_its_formats() {
        let cuda = |capability| Floats { on_cpu: false, compute_capability: Some(capability), bf16: true, f16: true };
        let other = |bf16, f16| Floats { on_cpu: false, compute_capability: None, bf16, f16 };
        let cpu = Floats { on_cpu: true, ..other(true, true) };
        for (floats, default, refused) in [
            (cuda((9, 0)), BF16, &[][..]),
            (cuda((8, 0)), BF16, &[]),
            (cuda((7, 5)), F16, &[BF16]),
            (cuda((7, 0)), F16, &[BF16]),
            (cuda((6, 1)), F32, &[BF16]),
            (cuda((5, 2)), F32, &[BF16, F16]),
            // WGSL has f16, and no bf16.
            (other(false, true), F32, &[BF16]),
            (other(false, false), F32, &[BF16, F16]),
            (cpu, F32, &[]),
        ] {
            assert_eq!(floats.default_dtype(), default, "{floats:?}");
            for dtype in [F32, F16, BF16] {
                assert_eq!(floats.check(dtype).is_err(), refused.contains(&dtype), "{floats:?} {dtype:?}");
            }
        }
        let message = cuda((7, 5)).check(BF16).unwrap_err().to_string();
        assert!(message.contains("bf16") && message.contains("7.5") && message.contains("\"f16\""), "{message}");
        let message = other(false, false).check(F16).unwrap_err().to_string();
        assert!(message.contains("f16") && message.contains("use \"f32\""), "{message}");
    }
    #[test]
    fn a_limit_that_can_not_be_kept_is_an_error() {
        let message = limit_to(&Device::flex(), "15 gigabytes").unwrap_err().to_string();
        assert!(message.contains("BURN_QLORA_DEVICE_MEMORY=15 gigabytes") && message.contains("15GiB"), "{message}");
        let message = limit_to(&Device::flex(), "15GiB").unwrap_err().to_string();
        assert!(message.contains("only the memory of CUDA devices"), "{message}");
    }
}
