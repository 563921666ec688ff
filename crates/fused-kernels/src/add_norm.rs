//! A residual connection and the normalisation behind it: `sum = x + delta`, rounded to the format of x, and
//! [`rms_norm`](crate::rms_norm) of it.
//!
//! In generation a row is one token, and a launch costs as much as the work. The results are those of the two operations
//! by themselves, bit for bit. There is no gradient: training keeps the sum and recomputes the rest.

use cubecl::CubeDim;
use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::KernelError;
use crate::elementwise::{Matrix, Reduction, Rows, UNITS, buffer, check_format, cube_count, reduce_row, vector_size};
use crate::rms_norm::{Constants, Norm, WEIGHTS, factors};

const OPERATION: &str = "add_norm";

/// Buffers of [`add_norm`].
#[derive(Clone, Copy, Debug)]
pub struct Buffers<'a> {
    /// `[rows, width]`.
    pub x: &'a Handle,
    /// As `x`.
    pub delta: &'a Handle,
    /// f32 `[width]`.
    pub weight: &'a Handle,
    /// `x + delta`, as `x`, which this writes.
    pub sum: &'a Handle,
    /// The normalised sum, as `x`, which this writes.
    pub out: &'a Handle,
}

/// Adds, and normalises the sum, whose shape is `rows`.
///
/// # Shapes
/// [`Buffers`] has them.
///
/// # Errors
/// [`KernelError::Format`], and the variants about sizes when a buffer does not hold its shape.
pub fn add_norm(client: &Client, buffers: Buffers<'_>, rows: Matrix, norm: Norm) -> Result<(), KernelError> {
    check_format(client, OPERATION, rows.format)?;
    let vector = vector_size(client, rows.format, &[rows.width]);
    let argument = |name, handle| buffer(name, handle, rows.elements(), rows.format.size(), vector);
    let (x, delta) = (argument("x", buffers.x)?, argument("delta", buffers.delta)?);
    let (sum, out) = (argument("sum", buffers.sum)?, argument("out", buffers.out)?);
    let wide = vector.min(WEIGHTS);
    let weight = buffer("weight", buffers.weight, rows.width, 4, wide)?;
    if rows.elements() == 0 {
        return Ok(());
    }
    // SAFETY: the buffers' sizes are checked, and the kernel stays within rows and width.
    unsafe {
        add_norm_kernel::launch_unchecked(
            client,
            cube_count(client, rows.cubes()),
            CubeDim::new_1d(UNITS as u32),
            vector,
            wide,
            x,
            delta,
            weight,
            sum,
            out,
            rows.launch(),
            norm.launch(),
            rows.format.elem_type(),
        );
    }
    Ok(())
}

#[cube(launch_unchecked)]
fn add_norm_kernel<F: Float, N: Size, W: Size>(
    x: &[Vector<F, N>],
    delta: &[Vector<F, N>],
    weight: &[Vector<f32, W>],
    sum: &mut [Vector<F, N>],
    out: &mut [Vector<F, N>],
    matrix: &Rows,
    norm: &Constants,
    #[define(F)] _format: ElemType,
) {
    let vector = N::value().comptime();
    let (rows, width) = (matrix.rows, matrix.width);
    let (eps, offset) = (norm.eps, norm.offset);
    let units = comptime!(matrix.units);
    let mut shared = Shared::<[f32]>::new_slice(UNITS);
    let unit = UNIT_POS as usize;
    let row = CUBE_POS * comptime!(UNITS / units) + unit / units;
    let (lane, vectors) = (unit % units, width / vector);
    let first = row * vectors;

    let mut square = 0.0f32;
    if row < rows {
        let mut v = lane;
        while v < vectors {
            let (own, other) = (x[first + v], delta[first + v]);
            let mut both = Vector::<F, N>::empty();
            #[unroll]
            for i in 0..vector {
                let rounded = F::cast_from(f32::cast_from(own.extract(i)) + f32::cast_from(other.extract(i)));
                let value = f32::cast_from(rounded);
                square += value * value;
                both.insert(i, rounded);
            }
            sum[first + v] = both;
            v += units;
        }
    }
    let mean = reduce_row(square, &mut shared, units, Reduction::Sum) / f32::cast_from(width as u32);
    let scale = 1.0f32 / (mean + eps).sqrt();
    if row < rows {
        let mut v = lane;
        while v < vectors {
            // What this unit wrote.
            let values = sum[first + v];
            let weights = factors::<W>(weight, v, offset, vector);
            let mut y = Vector::<F, N>::empty();
            #[unroll]
            for i in 0..vector {
                y.insert(i, F::cast_from(f32::cast_from(values.extract(i)) * scale * weights[i]));
            }
            out[first + v] = y;
            v += units;
        }
    }
}
