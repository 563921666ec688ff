//! The norms of a weight's rows with a low-rank update in them: what DoRA divides by (Liu et al., 2024, arXiv 2402.09353,
//! equation 5).
//!
//! With `w_i` the row of output feature `i`, `b_i` its row of B and `G = A Aᵀ`,
//!
//! ```text
//! ‖w_i + s·b_i A‖² = ‖w_i‖² + Σ_j b_ij (2s · (A w_i)_j + s² · (b_i G)_j)
//! ```
//!
//! Two launches behind the product `A Wᵀ`, for which [`split`] is one before it. `G` is narrow in both dimensions, so a cube has a tile of 4 x 4 of it, and its units share the sum over the
//! features. Then a few rows of B lie in a cube's shared memory, and units share the ranks of a row. All in f32. Composed of stock
//! operations these are some twenty launches, and a product of f32 whose result is one tile keeps one multiprocessor busy.

use cubecl::CubeDim;
use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::elementwise::{UNITS, buffer, check_format};
use crate::{FloatFormat, KernelError};

/// Rows and columns of a tile of `G`.
const TILE: usize = 4;
/// Units that share a tile.
const TILE_UNITS: usize = 128;
/// The largest rank: rows of B lie in shared memory.
pub const MAX_RANK: usize = 512;

/// Buffers of [`adapted_norms`], all f32.
#[derive(Clone, Copy, Debug)]
pub struct Buffers<'a> {
    /// `‖w_i‖²`, `[out_features]`.
    pub weight_squares: &'a Handle,
    /// `A Wᵀ`, `[rank, out_features]`.
    pub a_w: &'a Handle,
    /// `[rank, in_features]`.
    pub lora_a: &'a Handle,
    /// `[out_features, rank]`.
    pub lora_b: &'a Handle,
    /// `[out_features]`, which this writes.
    pub norms: &'a Handle,
}

/// Sizes of [`adapted_norms`].
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight.
    pub in_features: usize,
    /// Rank of the update, at most [`MAX_RANK`].
    pub rank: usize,
}

/// `‖w_i + scaling · b_i A‖` for each row; what cancels to nothing is the root of the smallest normal f32.
///
/// # Shapes
/// [`Buffers`] has them.
///
/// # Errors
/// [`KernelError::Rank`], and the variants about sizes when a buffer does not hold its shape.
pub fn adapted_norms(client: &Client, buffers: Buffers<'_>, sizes: Sizes, scaling: f32) -> Result<(), KernelError> {
    let Sizes { out_features, in_features, rank } = sizes;
    if rank == 0 || rank > MAX_RANK {
        return Err(KernelError::Rank(rank));
    }
    let weight_squares = buffer("weight_squares", buffers.weight_squares, out_features, 4, 1)?;
    let a_w = buffer("a_w", buffers.a_w, rank * out_features, 4, 1)?;
    let lora_a = buffer("lora_a", buffers.lora_a, rank * in_features, 4, 1)?;
    let lora_b = buffer("lora_b", buffers.lora_b, out_features * rank, 4, 1)?;
    let norms = buffer("norms", buffers.norms, out_features, 4, 1)?;
    if out_features == 0 {
        return Ok(());
    }
    let gram = client.empty(4 * rank * rank);
    let tiles = rank.div_ceil(TILE) as u32;
    // At most 8 KiB of B in shared memory, of which WebGPU has 16.
    let rows = if rank <= 128 { 16 } else { 4 };
    // SAFETY: the buffers' sizes are checked, the scratch buffer was just made, and the kernels stay within them.
    unsafe {
        gram_kernel::launch_unchecked(
            client,
            CubeCount::Static(tiles, tiles, 1),
            CubeDim::new_1d(TILE_UNITS as u32),
            lora_a,
            BufferArg::from_raw_parts(gram.clone(), rank * rank),
            rank,
            in_features,
        );
        norms_kernel::launch_unchecked(
            client,
            CubeCount::Static(out_features.div_ceil(rows) as u32, 1, 1),
            CubeDim::new_1d(UNITS as u32),
            weight_squares,
            a_w,
            lora_b,
            BufferArg::from_raw_parts(gram, rank * rank),
            norms,
            out_features,
            2.0 * scaling,
            scaling * scaling,
            rank,
            rows,
        );
    }
    Ok(())
}

/// Buffers of [`split`].
#[derive(Clone, Copy, Debug)]
pub struct Split<'a> {
    /// f32 `[elements]`.
    pub x: &'a Handle,
    /// `[2 · elements]`, which this writes: what the format holds of each element, and behind all of them what it holds of the
    /// rest.
    pub parts: &'a Handle,
}

/// f32 as the sum of two numbers of 16 bits each, for a product with `A` whose sums are f32.
///
/// # Shapes
/// [`Split`] has them.
///
/// # Errors
/// [`KernelError::Format`], and the variants about sizes when a buffer does not hold its shape.
pub fn split(client: &Client, buffers: Split<'_>, elements: usize, format: FloatFormat) -> Result<(), KernelError> {
    check_format(client, "split", format)?;
    let x = buffer("x", buffers.x, elements, 4, 1)?;
    let parts = buffer("parts", buffers.parts, 2 * elements, format.size(), 1)?;
    if elements == 0 {
        return Ok(());
    }
    let cubes = elements.div_ceil(UNITS);
    let across = cubes.min(MAX_CUBES);
    // SAFETY: the buffers' sizes are checked, and the kernel stays within `elements`.
    unsafe {
        split_kernel::launch_unchecked(
            client,
            CubeCount::Static(across as u32, cubes.div_ceil(across) as u32, 1),
            CubeDim::new_1d(UNITS as u32),
            x,
            parts,
            elements,
            format.elem_type(),
        );
    }
    Ok(())
}

/// Cubes in one dimension, as WebGPU has them.
const MAX_CUBES: usize = 65_535;

#[cube(launch_unchecked)]
fn split_kernel<F: Float>(x: &[f32], parts: &mut [F], elements: usize, #[define(F)] _format: ElemType) {
    let i = CUBE_POS * UNITS + UNIT_POS as usize;
    if i < elements {
        let high = F::cast_from(x[i]);
        parts[i] = high;
        parts[elements + i] = F::cast_from(x[i] - f32::cast_from(high));
    }
}

/// A tile of `A Aᵀ`; rows beyond the last are the last again.
#[cube(launch_unchecked)]
fn gram_kernel(a: &[f32], gram: &mut [f32], rank: usize, width: usize) {
    let unit = UNIT_POS as usize;
    let (first_row, first_column) = (CUBE_POS_X as usize * TILE, CUBE_POS_Y as usize * TILE);
    let mut sums = Array::<f32>::new(comptime!(TILE * TILE));
    #[unroll]
    for i in 0..comptime!(TILE * TILE) {
        sums[i] = 0.0f32;
    }
    let mut k = unit;
    while k < width {
        let mut right = Array::<f32>::new(TILE);
        #[unroll]
        for j in 0..TILE {
            right[j] = a[usize::min(first_column + j, rank - 1) * width + k];
        }
        #[unroll]
        for i in 0..TILE {
            let left = a[usize::min(first_row + i, rank - 1) * width + k];
            #[unroll]
            for j in 0..TILE {
                sums[i * TILE + j] += left * right[j];
            }
        }
        k += TILE_UNITS;
    }
    // Each sum's shares lie behind one another; a few units add up some of them, and one unit what those have.
    let mut shared = Shared::<[f32]>::new_slice(comptime!(TILE * TILE * TILE_UNITS));
    #[unroll]
    for i in 0..comptime!(TILE * TILE) {
        shared[i * TILE_UNITS + unit] = sums[i];
    }
    sync_cube();
    let adders = comptime!(TILE_UNITS / (TILE * TILE));
    let (sum, part) = (unit / adders, unit % adders);
    let mut some = 0.0f32;
    for i in 0..comptime!(TILE * TILE) {
        some += shared[sum * TILE_UNITS + i * adders + part];
    }
    sync_cube();
    shared[unit] = some;
    sync_cube();
    if unit < comptime!(TILE * TILE) {
        let mut whole = 0.0f32;
        for i in 0..adders {
            whole += shared[unit * adders + i];
        }
        let (row, column) = (first_row + unit / TILE, first_column + unit % TILE);
        if row < rank && column < rank {
            gram[row * rank + column] = whole;
        }
    }
}

#[cube(launch_unchecked)]
fn norms_kernel(
    weight_squares: &[f32],
    a_w: &[f32],
    lora_b: &[f32],
    gram: &[f32],
    norms: &mut [f32],
    out_features: usize,
    cross_factor: f32,
    square_factor: f32,
    #[comptime] rank: usize,
    #[comptime] rows: usize,
) {
    let unit = UNIT_POS as usize;
    let lanes = comptime!(UNITS / rows);
    let first = CUBE_POS_X as usize * rows;
    let mut shared = Shared::<[f32]>::new_slice(comptime!(rows * rank));
    let mut i = unit;
    while i < rows * rank {
        let at = first * rank + i;
        let mut value = 0.0f32;
        if at < out_features * rank {
            value = lora_b[at];
        }
        shared[i] = value;
        i += UNITS;
    }
    sync_cube();

    let (row, lane) = (unit / lanes, unit % lanes);
    let feature = first + row;
    let mut sum = 0.0f32;
    if feature < out_features {
        let mut j = lane;
        while j < rank {
            let mut through = 0.0f32;
            for i in 0..rank {
                through += shared[row * rank + i] * gram[i * rank + j];
            }
            sum += shared[row * rank + j] * (cross_factor * a_w[j * out_features + feature] + square_factor * through);
            j += lanes;
        }
    }
    let mut shares = Shared::<[f32]>::new_slice(UNITS);
    shares[unit] = sum;
    sync_cube();
    if lane == 0 && feature < out_features {
        let mut square = weight_squares[feature];
        for i in 0..lanes {
            square += shares[unit + i];
        }
        // Only a weight that the update cancels to rounding could be below.
        norms[feature] = f32::sqrt(f32::max(square, f32::MIN_POSITIVE));
    }
}

/// The scalar oracle, in f64.
pub mod oracle {
    use super::Sizes;

    /// `‖w_i + scaling · b_i A‖`.
    ///
    /// # Shapes
    /// `weight`: `[out_features, in_features]`, `lora_a`: `[rank, in_features]`, `lora_b`: `[out_features, rank]`.
    pub fn adapted_norms(weight: &[f64], lora_a: &[f64], lora_b: &[f64], sizes: Sizes, scaling: f64) -> Vec<f64> {
        let Sizes { in_features, rank, .. } = sizes;
        let norm = |(w, b): (&[f64], &[f64])| {
            let element = |k: usize| {
                let update: f64 = (0..rank).map(|j| b[j] * lora_a[j * in_features + k]).sum();
                (w[k] + scaling * update).powi(2)
            };
            (0..in_features).map(element).sum::<f64>().sqrt()
        };
        weight.chunks(in_features).zip(lora_b.chunks(rank)).map(norm).collect()
    }
}
