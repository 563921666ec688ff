//! Which device to run on, and what its memory holds.

use crate::{ModelError, kernel_cache};
use burn::tensor::{Device, DeviceKind, FloatDType};
use std::panic::catch_unwind;

/// The device named by `cpu`, `cuda`, `cuda:<index>`, `vulkan`, `metal` or `auto` (CUDA when there is one, else the CPU).
///
/// The first call for a GPU also says where CubeCL keeps compiled kernels: in
/// `$XDG_CACHE_HOME/burn-qlora/kernels` (`~/.cache` without that variable), or where
/// `BURN_QLORA_KERNEL_CACHE` says (a folder, or `off`), as far as the user's `cubecl.toml` leaves it open.
///
/// # Errors
/// The name is unknown, or no such device answers.
pub fn select_device(name: &str) -> Result<Device, ModelError> {
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

/// The compute dtype for `auto`: bf16 on GPUs that have it, f32 elsewhere.
pub fn default_compute_dtype(device: &Device) -> FloatDType {
    match *device != Device::flex() && device.supports_dtype(FloatDType::BF16) {
        true => FloatDType::BF16,
        false => FloatDType::F32,
    }
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

/// Bytes of the host's memory that a program may still take: what the system has available, within the limit of the program's
/// control group (Linux; `None` elsewhere).
pub fn host_memory() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    // A group without a limit says "max".
    let limit = number("/sys/fs/cgroup/memory.max").map(|limit| {
        let used = number("/sys/fs/cgroup/memory.current").unwrap_or(0);
        limit.saturating_sub(used)
    });
    Some(limit.map_or(kib * 1024, |limit| limit.min(kib * 1024)))
}
