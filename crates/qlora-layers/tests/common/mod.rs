//! The devices of this machine, for test suites that run on every one of them.

#![allow(clippy::print_stderr, dead_code, reason = "a skipped device is said; not every suite uses every helper")]

use burn::tensor::{Device, DeviceKind, Tensor};
use qlora_layers::activation_checkpointing::{Purpose, ResidualBlock};
use qlora_layers::{LoraLinear, Pass};

/// The CPU, and every GPU runtime that answers. What is skipped is said on stderr.
pub fn devices() -> Vec<(&'static str, Device)> {
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
            Err(_) => eprintln!("{name}: no such device here, skipped"),
        }
    }
    found
}

/// Reproducible values in [-1, 1).
pub fn noise(seed: u64, len: usize) -> Vec<f32> {
    (0..len as u64)
        .map(|i| (qlora_layers::mix(seed ^ qlora_layers::mix(i)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0)
        .collect()
}

/// A block whose branches are one layer each.
pub struct Pair<'a>(pub &'a LoraLinear, pub &'a LoraLinear);

impl ResidualBlock for Pair<'_> {
    fn attention(&self, x: Tensor<2>, pass: Pass, purpose: Purpose<'_>) -> Tensor<2> {
        run(self.0, x, pass, purpose)
    }

    fn feed_forward(&self, x: Tensor<2>, pass: Pass, purpose: Purpose<'_>) -> Tensor<2> {
        run(self.1, x, pass, purpose)
    }
}

fn run(layer: &LoraLinear, x: Tensor<2>, pass: Pass, purpose: Purpose<'_>) -> Tensor<2> {
    match purpose.unread() {
        true => layer.record(x, pass),
        false => layer.forward_in(x, pass),
    }
}
