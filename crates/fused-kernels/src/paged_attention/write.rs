//! The kernel that puts new tokens' keys or values into their slots.

use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cuda_source::FloatFormat;

use crate::elementwise::{UNITS, cube_count};

#[cube(launch_unchecked)]
fn write_kernel<F: Float, N: Size>(
    new: &[Vector<F, N>],
    cache: &mut [Vector<F, N>],
    words: &[u32],
    items: usize,
    width: usize,
    #[define(F)] _format: ElemType,
) {
    let item = ABSOLUTE_POS;
    if item < items {
        cache[words[item / width] as usize * width + item % width] = new[item];
    }
}

/// Launches the kernel that fills slots: `items` vectors, `width` of them a token.
#[allow(clippy::too_many_arguments)]
pub(super) fn write(
    client: &Client,
    vector: usize,
    new: BufferArg,
    cache: BufferArg,
    words: BufferArg,
    items: usize,
    width: usize,
    format: FloatFormat,
) {
    let (count, dim) = (cube_count(client, items.div_ceil(UNITS)), CubeDim::new_1d(UNITS as u32));
    // SAFETY: the caller checked the buffers' sizes, and that every slot lies within the cache.
    unsafe {
        write_kernel::launch_unchecked(client, count, dim, vector, new, cache, words, items, width, format.elem_type());
    }
}
