//! The offset of double quantization: the mean of the absmax.
//!
//! f32 alone can't hold the sum of millions of values to its last bit, and no runtime but CUDA has f64.
//! So every addition keeps what it rounded away (Knuth's two-sum, "The Art of Computer Programming",
//! volume 2, 4.2.2, theorem B), in a second f32: a strided share per unit, a tree over each cube, and one
//! more cube for the cubes' sums. The quotient is corrected by what it leaves over. The result is the
//! oracle's mean within one unit in the last place, whatever the order, and never leaves the device:
//! nothing waits for it.
//!
//! Two-sum looks like (a + b) - a - b, which a compiler that reasons in real numbers turns into 0. The
//! products with a `one` that it can't see through prevent that.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::{UNITS, buffer};

/// The most cubes: enough to fill a large GPU, few enough for one cube to finish.
const MAX_CUBES: usize = 4 * UNITS;

/// Queues the mean, one f32; NaN or infinite when an absmax is, or when their sum overflows.
pub(super) fn mean(client: &Client, absmax: &Handle, blocks: usize) -> Handle {
    let cubes = blocks.div_ceil(4 * UNITS).clamp(1, MAX_CUBES);
    let (sums, mean) = (client.empty(8 * cubes), client.empty(4));
    let units = CubeDim::new_1d(UNITS as u32);
    // SAFETY: `sums` holds two floats per cube, `absmax` holds `blocks`, and the kernels stay within them.
    unsafe {
        sum_kernel::launch_unchecked(
            client,
            CubeCount::Static(cubes as u32, 1, 1),
            units,
            buffer(absmax, blocks),
            buffer(&sums, 2 * cubes),
            blocks,
            cubes * UNITS,
            1.0,
        );
        mean_kernel::launch_unchecked(
            client,
            CubeCount::Static(1, 1, 1),
            units,
            buffer(&sums, 2 * cubes),
            buffer(&mean, 1),
            cubes,
            blocks as u32,
            1.0,
        );
    }
    mean
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

    let (sum, rest) = tree(sum, rest, one);
    if unit == 0 {
        sums[2 * CUBE_POS] = sum;
        sums[2 * CUBE_POS + 1] = rest;
    }
}

/// Adds up the cubes' sums and divides.
#[cube(launch_unchecked)]
fn mean_kernel(sums: &[f32], mean: &mut [f32], cubes: usize, blocks: u32, one: f32) {
    let unit = UNIT_POS as usize;
    let mut sum = 0.0f32;
    let mut rest = 0.0f32;
    let mut i = unit;
    while i < cubes {
        let value = sums[2 * i];
        let next = sum + value;
        rest += sums[2 * i + 1] + lost(sum, value, next, one);
        sum = next;
        i += UNITS;
    }
    let (sum, rest) = tree(sum, rest, one);
    if unit == 0 {
        mean[0] = quotient(sum, rest, blocks);
    }
}

/// Adds up the units' pairs; the first unit has the result.
#[cube]
fn tree(sum: f32, rest: f32, one: f32) -> (f32, f32) {
    let unit = UNIT_POS as usize;
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
    (shared_sum[0], shared_rest[0])
}

/// (sum + rest) / n: the quotient of what has 24 bits, and that of what it leaves over.
#[cube]
fn quotient(sum: f32, rest: f32, n: u32) -> f32 {
    let first = sum / f32::cast_from(n);
    // Products of 12 bits with 12 are exact, so that fusing them with a subtraction changes nothing.
    let high = f32::reinterpret(u32::reinterpret(first) & 0xffff_f000u32);
    let low = first - high;
    let top = f32::cast_from(n & 0xff00_0000u32);
    let middle = f32::cast_from(n & 0x00ff_f000u32);
    let bottom = f32::cast_from(n & 0x0000_0fffu32);
    let left = sum - high * top - high * middle - high * bottom - low * top - low * middle - low * bottom;
    first + (left + rest) / f32::cast_from(n)
}

/// What rounding took from sum = a + b, exactly.
#[cube]
fn lost(a: f32, b: f32, sum: f32, one: f32) -> f32 {
    let b_seen = sum * one - a;
    let a_seen = sum * one - b_seen;
    (a - a_seen * one) + (b - b_seen * one)
}
