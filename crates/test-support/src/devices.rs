//! The devices of this machine.

use std::sync::OnceLock;

use cubecl::client::Client;
use cubecl::device::{Device, WgpuDeviceKind};

use crate::named::{GPUS, VARIABLE, missing, required, say, wanted};

/// The GPU devices to test on, by name.
///
/// # Panics
/// If a device that must be there is missing.
pub fn clients() -> Vec<(&'static str, &'static Client)> {
    GPUS.into_iter().filter_map(|name| Some((name, client(name)?))).collect()
}

/// A GPU device's client, if the device is among those to test on. The first call of a program says if it is not.
///
/// # Panics
/// If the device must be there and is missing.
pub fn client(name: &str) -> Option<&'static Client> {
    static CLIENTS: [OnceLock<Option<Client>>; GPUS.len()] = [const { OnceLock::new() }; GPUS.len()];
    let number = GPUS.iter().position(|gpu| *gpu == name)?;
    CLIENTS[number].get_or_init(|| open(name)).as_ref()
}

fn open(name: &str) -> Option<Client> {
    if !wanted(name) {
        say(format_args!("skipped: every test on {name}: {VARIABLE} does not name it"));
        return None;
    }
    let device = match name {
        "cuda" => Device::cuda(0),
        _ => Device::wgpu(WgpuDeviceKind::default()),
    };
    match device {
        Ok(device) => Some(device.client()),
        Err(error) => {
            let reason = error.to_string();
            let reason = reason.lines().next().unwrap_or("no such device here");
            assert!(!required(name), "{VARIABLE} names {name}: {reason}");
            say(format_args!("skipped: every test on {name}: {reason}"));
            None
        }
    }
}

/// The CUDA device's client for a suite of hand-written kernels. `supports` says whether the device runs them.
///
/// # Panics
/// If the device must be there and is missing, or does not run the suite's kernels.
#[track_caller]
pub fn cuda(supports: impl FnOnce(&Client) -> bool) -> Option<&'static Client> {
    let client = client("cuda")?;
    if supports(client) {
        return Some(client);
    }
    missing("cuda", format_args!("{} has no kernel of this suite", client.properties().identity.name));
    None
}

/// The CPU, and every GPU device to test on, for Burn.
///
/// # Panics
/// If a device that must be there is missing, or one that answers does not compute.
#[cfg(feature = "burn")]
pub fn devices() -> Vec<(&'static str, burn::tensor::Device)> {
    use burn::tensor::{Device, DeviceKind};

    let gpus = clients().into_iter().map(|(name, _)| match name {
        "cuda" => (name, Device::cuda(0)),
        _ => (name, Device::wgpu(DeviceKind::default())),
    });
    std::iter::once(("flex", Device::flex())).chain(gpus).collect()
}

/// What tensors of a device that [`devices`] names are tested in: f32, and on CUDA the 16-bit format of training.
#[cfg(feature = "burn")]
pub fn dtypes(device_name: &str) -> Vec<burn::tensor::FloatDType> {
    use burn::tensor::FloatDType;

    match device_name {
        "cuda" => vec![FloatDType::F32, FloatDType::BF16],
        _ => vec![FloatDType::F32],
    }
}
