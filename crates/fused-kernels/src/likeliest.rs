//! The likeliest token of each row of logits: what greedy generation needs of them, four bytes instead of the row.
//!
//! The first of equal logits is taken. A row that holds a value that is no number has none: its answer is [`NONE`].
//! Comparisons round nothing, so kernel and oracle agree exactly.

use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::elementwise::{Rows, UNITS, buffer, check_format, cube_count, vector_size};
use crate::{KernelError, Matrix};

const OPERATION: &str = "likeliest";

/// The answer for a row that holds a value that is no number.
pub const NONE: u32 = u32::MAX;

/// Writes the index of each row's first largest value, or [`NONE`], to `out`, u32 `[rows]`.
///
/// # Errors
/// [`KernelError::Format`], and the variants about sizes when a buffer does not hold its shape.
pub fn likeliest(client: &Client, logits: &Handle, out: &Handle, matrix: Matrix) -> Result<(), KernelError> {
    check_format(client, OPERATION, matrix.format)?;
    let vector = vector_size(client, matrix.format, &[matrix.width]);
    let logits = buffer("logits", logits, matrix.elements(), matrix.format.size(), vector)?;
    let out = buffer("out", out, matrix.rows, 4, 1)?;
    if matrix.elements() == 0 {
        return Ok(());
    }
    // SAFETY: the buffers' sizes are checked, and units stay within the matrix.
    unsafe {
        kernel::launch_unchecked(
            client,
            cube_count(client, matrix.cubes()),
            CubeDim::new_1d(UNITS as u32),
            vector,
            logits,
            out,
            matrix.launch(),
            matrix.format.elem_type(),
        );
    }
    Ok(())
}

#[cube(launch_unchecked)]
fn kernel<F: Float, N: Size>(logits: &[Vector<F, N>], out: &mut [u32], matrix: &Rows, #[define(F)] _format: ElemType) {
    let vector = N::value().comptime();
    let (rows, width) = (matrix.rows, matrix.width);
    let units = comptime!(matrix.units);
    let mut values = Shared::<[f32]>::new_slice(UNITS);
    let mut indices = Shared::<[u32]>::new_slice(UNITS);
    let unit = UNIT_POS as usize;
    let row = CUBE_POS * comptime!(UNITS / units) + unit / units;
    let (lane, vectors) = (unit % units, width / vector);
    let first = row * vectors;

    let mut best = 0.0f32;
    let mut index = 0u32;
    let mut seen = false;
    let mut broken = false;
    if row < rows {
        let mut v = lane;
        while v < vectors {
            let pack = logits[first + v];
            #[unroll]
            for i in 0..vector {
                let value = f32::cast_from(pack.extract(i));
                // By its bits: compilers may take every value for a number.
                if (u32::reinterpret(value) & 0x7FFF_FFFFu32) > 0x7F80_0000u32 {
                    broken = true;
                }
                if !seen || value > best {
                    best = value;
                    index = (v * vector + i) as u32;
                    seen = true;
                }
            }
            v += units;
        }
    }
    // Units that saw nothing have an index behind every other one; what is no number wins against all.
    values[unit] = best;
    indices[unit] = select(broken, NONE.runtime(), select(seen, index, (NONE - 1).runtime()));
    let mut step = comptime!(units / 2).runtime();
    while step > 0 {
        sync_cube();
        if lane < step {
            let (own, other) = (indices[unit], indices[unit + step]);
            if own != NONE.runtime() {
                let (mine, theirs) = (values[unit], values[unit + step]);
                let unseen = other == (NONE - 1).runtime();
                let larger = theirs > mine || (theirs == mine && other < own) || own == (NONE - 1).runtime();
                if other == NONE.runtime() || (larger && !unseen) {
                    values[unit] = theirs;
                    indices[unit] = other;
                }
            }
        }
        step /= 2;
    }
    if row < rows && lane == 0 {
        out[row] = indices[unit];
    }
}

/// The scalar oracle.
pub mod oracle {
    /// The index of the first largest value; [`NONE`](super::NONE) where one is no number.
    pub fn likeliest(row: &[f64]) -> u32 {
        if row.iter().any(|value| value.is_nan()) {
            return super::NONE;
        }
        (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best }) as u32
    }
}
