//! What the suites of the CUDA kernels share.

#![allow(clippy::print_stderr, reason = "a skipped device is said")]

use cubecl::client::Client;
use cubecl::device::Device;

/// The CUDA device, if it runs the kernels; with `FUSED_KERNELS_CUDA` set one must be there.
pub fn client(supports: impl Fn(&Client) -> bool) -> Option<Client> {
    let client = Device::cuda(0).ok().map(|device| device.client()).filter(supports);
    if client.is_none() {
        assert!(std::env::var_os("FUSED_KERNELS_CUDA").is_none(), "FUSED_KERNELS_CUDA is set, but there is no device");
        eprintln!("skipped: no CUDA device of compute capability 8.0 or later");
    }
    client
}

/// Uniform in (-1, 1): splitmix64, so that the suites repeat everywhere.
pub struct Random(pub u64);

impl Random {
    pub fn value(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / 8_388_608.0 - 1.0
    }
}
