//! The offset of double quantization: the mean of the absmax.
//!
//! f32 alone can't hold the sum of millions of values to its last bit, and no runtime but CUDA has f64.
//! So every addition keeps what it rounded away (Knuth's two-sum, "The Art of Computer Programming",
//! volume 2, 4.2.2, theorem B), in a second f32, and the host adds up the few hundred partial sums in
//! f64. The result is the oracle's mean within one unit in the last place, whatever the order.
//!
//! Two-sum looks like (a + b) - a - b, which a compiler that reasons in real numbers turns into 0. The
//! products with a `one` that it can't see through prevent that.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::{UNITS, buffer, read};
use crate::NestedAbsmax;
use crate::QuantError;

/// The most cubes: enough to fill a large GPU, few enough to finish on the host.
const MAX_CUBES: usize = 256;

/// The mean, or none when an absmax is NaN or infinite.
pub(super) fn mean(client: &Client, absmax: &Handle, blocks: usize) -> Result<Option<f32>, QuantError> {
    let cubes = blocks.div_ceil(4 * UNITS).clamp(1, MAX_CUBES);
    let sums = client.empty(8 * cubes);
    // SAFETY: `sums` holds two floats per cube and `absmax` holds `blocks`.
    unsafe {
        sum_kernel::launch_unchecked(
            client,
            CubeCount::Static(cubes as u32, 1, 1),
            CubeDim::new_1d(UNITS as u32),
            buffer(absmax, blocks),
            buffer(&sums, 2 * cubes),
            blocks,
            cubes * UNITS,
            1.0,
        );
    }
    let bytes = read(client, sums)?;
    let sum: f64 = bytemuck::pod_collect_to_vec::<u8, f32>(&bytes).iter().map(|s| f64::from(*s)).sum();
    if sum.is_finite() {
        return Ok(Some((sum / blocks as f64) as f32));
    }
    // Not finite, or finite values near the largest f32 whose sum overflowed.
    let absmax = bytemuck::pod_collect_to_vec::<u8, f32>(&read(client, absmax.clone())?[..4 * blocks]);
    Ok(absmax.iter().all(|a| a.is_finite()).then(|| NestedAbsmax::mean(&absmax)))
}

/// Adds up a strided share per unit, then a tree over the cube.
#[cube(launch_unchecked)]
fn sum_kernel(absmax: &[f32], sums: &mut [f32], blocks: usize, stride: usize, one: f32) {
    let unit = UNIT_POS as usize;
    let mut sum = 0.0f32;
    let mut rest = 0.0f32;
    let mut i = CUBE_POS * UNITS + unit;
    while i < blocks {
        let value = absmax[i];
        let next = sum + value;
        rest += lost(sum, value, next, one);
        sum = next;
        i += stride;
    }

    let mut shared_sum = Shared::<[f32]>::new_slice(UNITS);
    let mut shared_rest = Shared::<[f32]>::new_slice(UNITS);
    shared_sum[unit] = sum;
    shared_rest[unit] = rest;
    sync_cube();
    #[unroll]
    for level in 0..comptime!(UNITS.ilog2()) {
        let half = comptime!(UNITS >> (level as usize + 1));
        if unit < half {
            let a = shared_sum[unit];
            let b = shared_sum[unit + half];
            let next = a + b;
            shared_rest[unit] = shared_rest[unit] + shared_rest[unit + half] + lost(a, b, next, one);
            shared_sum[unit] = next;
        }
        sync_cube();
    }
    if unit == 0 {
        sums[2 * CUBE_POS] = shared_sum[0];
        sums[2 * CUBE_POS + 1] = shared_rest[0];
    }
}

/// What rounding took from sum = a + b, exactly.
#[cube]
fn lost(a: f32, b: f32, sum: f32, one: f32) -> f32 {
    let b_seen = sum * one - a;
    let a_seen = sum * one - b_seen;
    (a - a_seen * one) + (b - b_seen * one)
}
