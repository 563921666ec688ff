//! The devices that the tests run on, and their numbers.

#![allow(clippy::print_stderr, reason = "a skipped device is said")]

use burn::tensor::{Device, DeviceKind, Tensor};

/// The CPU, and every GPU runtime that answers. NF4_QUANT_RUNTIMES names those that must.
pub fn devices() -> Vec<(&'static str, Device)> {
    let required = std::env::var("NF4_QUANT_RUNTIMES").unwrap_or_default();
    let mut found = vec![("flex", Device::flex())];
    for (name, make) in
        [("wgpu", (|| Device::wgpu(DeviceKind::default())) as fn() -> Device), ("cuda", || Device::cuda(0))]
    {
        let answers = std::panic::catch_unwind(|| {
            let device = make();
            Tensor::<1>::zeros([1], &device).into_data();
            device
        });
        match answers {
            Ok(device) => found.push((name, device)),
            Err(_) if required.split(',').any(|other| other.trim() == name) => panic!("{name} is required"),
            Err(_) => eprintln!("{name}: no such device here, skipped"),
        }
    }
    found
}

/// Reproducible values in [-1, 1) of magnitudes from 1e-4 to 1.
pub fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let unit = (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
            unit * 10_f32.powi(-((state % 5) as i32))
        })
        .collect()
}
