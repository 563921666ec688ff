//! A factor for each column of a matrix, and the gradients of both: DoRA's magnitudes over their norms (Liu et al., 2024,
//! arXiv 2402.09353, equation 5), which scale the output features of a linear layer.
//!
//! `out = x · scale`, `dx = dy · scale`, `dscale = Σ_rows dy · x`. Forward and backward are one pass over the activations each;
//! composed of stock operations, in f32 as DoRA wants them, they are two and five.
//!
//! Where a weight takes the factors into itself there is nothing to scale, and what is left is [`gain_gradient`]: the gradient of
//! the factors from the product as it came out. It reads both tensors once and writes next to nothing.

use cubecl::CubeDim;
use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::elementwise::{Matrix, UNITS, buffer, check_format, vector_size};
use crate::rms_norm::{WEIGHTS, factors};
use crate::{FloatFormat, KernelError};

const OPERATION: &str = "columns";

/// Parts of the rows, whose columns are summed apart: enough cubes for a large GPU at the narrowest of layers.
const SLICES: usize = 64;

/// Buffers of [`forward`].
#[derive(Clone, Copy, Debug)]
pub struct Forward<'a> {
    /// `[rows, width]`.
    pub x: &'a Handle,
    /// f32 `[width]`.
    pub scale: &'a Handle,
    /// `[rows, width]`, which this writes.
    pub out: &'a Handle,
}

/// Buffers of [`backward`].
#[derive(Clone, Copy, Debug)]
pub struct Backward<'a> {
    /// The gradient of the result, as `x`.
    pub dy: &'a Handle,
    /// As in [`forward`].
    pub x: &'a Handle,
    /// As in [`forward`].
    pub scale: &'a Handle,
    /// The gradient of `x`, as `x`, which this writes.
    pub dx: &'a Handle,
    /// The gradient of `scale`, f32 `[width]`, which this writes.
    pub dscale: &'a Handle,
}

/// `out = x · scale`, computed in f32 and rounded once to `format`, the one of `x` or f32.
///
/// # Shapes
/// [`Forward`] has them.
///
/// # Errors
/// [`KernelError::Format`], and the variants about sizes when a buffer does not hold its shape.
pub fn forward(client: &Client, buffers: Forward<'_>, rows: Matrix, format: FloatFormat) -> Result<(), KernelError> {
    check_format(client, OPERATION, rows.format)?;
    check_format(client, OPERATION, format)?;
    let vector = vector_size(client, rows.format, &[rows.width]).min(vector_size(client, format, &[rows.width]));
    let x = buffer("x", buffers.x, rows.elements(), rows.format.size(), vector)?;
    let out = buffer("out", buffers.out, rows.elements(), format.size(), vector)?;
    let wide = vector.min(WEIGHTS);
    let scale = buffer("scale", buffers.scale, rows.width, 4, wide)?;
    if rows.elements() == 0 {
        return Ok(());
    }
    let slices = SLICES.min(rows.rows);
    // SAFETY: the buffers' sizes are checked, and the kernel stays within rows and width.
    unsafe {
        forward_kernel::launch_unchecked(
            client,
            cubes(rows, vector, slices),
            CubeDim::new_1d(UNITS as u32),
            vector,
            wide,
            x,
            scale,
            out,
            rows.rows,
            rows.width,
            rows.format.elem_type(),
            format.elem_type(),
        );
    }
    Ok(())
}

/// The gradients of `x` and of `scale`; the same bits at every call.
///
/// # Shapes
/// [`Backward`] has them.
///
/// # Errors
/// As [`forward`].
pub fn backward(client: &Client, buffers: Backward<'_>, rows: Matrix) -> Result<(), KernelError> {
    check_format(client, OPERATION, rows.format)?;
    let vector = vector_size(client, rows.format, &[rows.width]);
    let argument = |name, handle| buffer(name, handle, rows.elements(), rows.format.size(), vector);
    let (dy, x, dx) = (argument("dy", buffers.dy)?, argument("x", buffers.x)?, argument("dx", buffers.dx)?);
    let wide = vector.min(WEIGHTS);
    let scale = buffer("scale", buffers.scale, rows.width, 4, wide)?;
    let dscale = buffer("dscale", buffers.dscale, rows.width, 4, 1)?;
    if rows.width == 0 {
        return Ok(());
    }
    let slices = SLICES.min(rows.rows.max(1));
    let partial = client.empty(slices * rows.width * 4);
    // SAFETY: as in `forward`; the scratch buffer was just made as large as the kernels index.
    unsafe {
        backward_kernel::launch_unchecked(
            client,
            cubes(rows, vector, slices),
            CubeDim::new_1d(UNITS as u32),
            vector,
            wide,
            dy,
            x,
            scale,
            dx,
            BufferArg::from_raw_parts(partial.clone(), slices * rows.width),
            rows.rows,
            rows.width,
            rows.format.elem_type(),
        );
        sum_kernel::launch_unchecked(
            client,
            CubeCount::Static(rows.width.div_ceil(UNITS) as u32, 1, 1),
            CubeDim::new_1d(UNITS as u32),
            BufferArg::from_raw_parts(partial, slices * rows.width),
            dscale,
            rows.width,
            slices,
        );
    }
    Ok(())
}

/// Buffers of [`gain_gradient`].
#[derive(Clone, Copy, Debug)]
pub struct Gain<'a> {
    /// The gradient of `y`, as `y`.
    pub dy: &'a Handle,
    /// `[rows, width]`, whose columns were multiplied by `gain`.
    pub y: &'a Handle,
    /// f32 `[width]`.
    pub gain: &'a Handle,
    /// The gradient of `gain`, f32 `[width]`, which this writes.
    pub dgain: &'a Handle,
}

/// Cubes that keep a large GPU's memory busy.
const BUSY: usize = 1024;
/// Columns of a cube that adds up the slices.
const SUMMED: usize = 32;

/// What is added to a gain before it multiplies anything, so that [`gain_gradient`] can divide by it: 2⁻⁸⁰, which leaves
/// every gain of more than 2⁻⁵⁶ what it is.
pub const LEAST_GAIN: f32 = f32::from_bits((127 - 80) << 23);

/// `dgain = Σ_rows dy · y / g`, for a `y` whose columns were multiplied by `g = gain + `[`LEAST_GAIN`]; the same bits at every
/// call.
///
/// # Shapes
/// [`Gain`] has them.
///
/// # Errors
/// As [`forward`].
pub fn gain_gradient(client: &Client, buffers: Gain<'_>, rows: Matrix) -> Result<(), KernelError> {
    check_format(client, OPERATION, rows.format)?;
    let vector = vector_size(client, rows.format, &[rows.width]);
    let argument = |name, handle| buffer(name, handle, rows.elements(), rows.format.size(), vector);
    let (dy, y) = (argument("dy", buffers.dy)?, argument("y", buffers.y)?);
    let gain = buffer("gain", buffers.gain, rows.width, 4, 1)?;
    let dgain = buffer("dgain", buffers.dgain, rows.width, 4, 1)?;
    if rows.width == 0 {
        return Ok(());
    }
    let across = (rows.width / vector).div_ceil(UNITS);
    let slices = (BUSY / across).clamp(SLICES, 4 * SLICES).min(rows.rows.max(1));
    let partial = client.empty(slices * rows.width * 4);
    // SAFETY: the buffers' sizes are checked, the scratch buffer was just made as large as the kernels index, and they stay
    // within rows, slices and width.
    unsafe {
        dots_kernel::launch_unchecked(
            client,
            cubes(rows, vector, slices),
            CubeDim::new_1d(UNITS as u32),
            vector,
            dy,
            y,
            BufferArg::from_raw_parts(partial.clone(), slices * rows.width),
            rows.rows,
            rows.width,
            rows.format.elem_type(),
        );
        gain_kernel::launch_unchecked(
            client,
            CubeCount::Static(rows.width.div_ceil(SUMMED) as u32, 1, 1),
            CubeDim::new_1d(UNITS as u32),
            BufferArg::from_raw_parts(partial, slices * rows.width),
            gain,
            dgain,
            rows.width,
            slices,
        );
    }
    Ok(())
}

/// A unit for each vector of a row, in each of the slices.
fn cubes(rows: Matrix, vector: usize, slices: usize) -> CubeCount {
    CubeCount::Static((rows.width / vector).div_ceil(UNITS) as u32, slices as u32, 1)
}

/// A unit scales one vector of every `CUBE_COUNT_Y`th row.
#[cube(launch_unchecked)]
fn forward_kernel<F: Float, O: Float, N: Size, W: Size>(
    x: &[Vector<F, N>],
    scale: &[Vector<f32, W>],
    out: &mut [Vector<O, N>],
    rows: usize,
    width: usize,
    #[define(F)] _format: ElemType,
    #[define(O)] _out_format: ElemType,
) {
    let vector = N::value().comptime();
    let column = CUBE_POS_X as usize * UNITS + UNIT_POS as usize;
    let vectors = width / vector;
    if column < vectors {
        let scales = factors::<W>(scale, column, 0.0f32, vector);
        let mut row = CUBE_POS_Y as usize;
        while row < rows {
            let values = x[row * vectors + column];
            let mut scaled = Vector::<O, N>::empty();
            #[unroll]
            for i in 0..vector {
                scaled.insert(i, O::cast_from(f32::cast_from(values.extract(i)) * scales[i]));
            }
            out[row * vectors + column] = scaled;
            row += CUBE_COUNT_Y as usize;
        }
    }
}

/// As [`forward_kernel()`] over `dy`; the products with `x` are summed in the order of the rows.
#[cube(launch_unchecked)]
fn backward_kernel<F: Float, N: Size, W: Size>(
    dy: &[Vector<F, N>],
    x: &[Vector<F, N>],
    scale: &[Vector<f32, W>],
    dx: &mut [Vector<F, N>],
    partial: &mut [f32],
    rows: usize,
    width: usize,
    #[define(F)] _format: ElemType,
) {
    let vector = N::value().comptime();
    let column = CUBE_POS_X as usize * UNITS + UNIT_POS as usize;
    let vectors = width / vector;
    if column < vectors {
        let scales = factors::<W>(scale, column, 0.0f32, vector);
        let mut sums = Array::<f32>::new(vector);
        #[unroll]
        for i in 0..vector {
            sums[i] = 0.0f32;
        }
        let slice = CUBE_POS_Y as usize;
        let mut row = slice;
        while row < rows {
            let (grads, values) = (dy[row * vectors + column], x[row * vectors + column]);
            let mut scaled = Vector::<F, N>::empty();
            #[unroll]
            for i in 0..vector {
                let grad = f32::cast_from(grads.extract(i));
                sums[i] += grad * f32::cast_from(values.extract(i));
                scaled.insert(i, F::cast_from(grad * scales[i]));
            }
            dx[row * vectors + column] = scaled;
            row += CUBE_COUNT_Y as usize;
        }
        #[unroll]
        for i in 0..vector {
            partial[slice * width + column * vector + i] = sums[i];
        }
    }
}

#[cube(launch_unchecked)]
fn sum_kernel(partial: &[f32], sums: &mut [f32], width: usize, slices: usize) {
    let column = CUBE_POS_X as usize * UNITS + UNIT_POS as usize;
    if column < width {
        let mut sum = 0.0f32;
        for slice in 0..slices {
            sum += partial[slice * width + column];
        }
        sums[column] = sum;
    }
}

/// The sums of [`backward_kernel()`] alone.
#[cube(launch_unchecked)]
fn dots_kernel<F: Float, N: Size>(
    dy: &[Vector<F, N>],
    y: &[Vector<F, N>],
    partial: &mut [f32],
    rows: usize,
    width: usize,
    #[define(F)] _format: ElemType,
) {
    let vector = N::value().comptime();
    let column = CUBE_POS_X as usize * UNITS + UNIT_POS as usize;
    let vectors = width / vector;
    if column < vectors {
        let mut sums = Array::<f32>::new(vector);
        #[unroll]
        for i in 0..vector {
            sums[i] = 0.0f32;
        }
        let slice = CUBE_POS_Y as usize;
        let mut row = slice;
        while row < rows {
            let (grads, values) = (dy[row * vectors + column], y[row * vectors + column]);
            #[unroll]
            for i in 0..vector {
                sums[i] += f32::cast_from(grads.extract(i)) * f32::cast_from(values.extract(i));
            }
            row += CUBE_COUNT_Y as usize;
        }
        #[unroll]
        for i in 0..vector {
            partial[slice * width + column * vector + i] = sums[i];
        }
    }
}

/// A cube adds up the slices of some columns: its units every so many of them, then one unit for each column the units' sums.
#[cube(launch_unchecked)]
fn gain_kernel(partial: &[f32], gain: &[f32], dgain: &mut [f32], width: usize, slices: usize) {
    let unit = UNIT_POS as usize;
    let column = CUBE_POS_X as usize * SUMMED + unit % SUMMED;
    let mut sum = 0.0f32;
    if column < width {
        let mut slice = unit / SUMMED;
        while slice < slices {
            sum += partial[slice * width + column];
            slice += comptime!(UNITS / SUMMED);
        }
    }
    let mut shared = Shared::<[f32]>::new_slice(UNITS);
    shared[unit] = sum;
    sync_cube();
    if unit < SUMMED && column < width {
        let mut whole = 0.0f32;
        #[unroll]
        for part in 0..comptime!(UNITS / SUMMED) {
            whole += shared[part * SUMMED + unit];
        }
        dgain[column] = whole / (gain[column] + LEAST_GAIN);
    }
}

/// The scalar oracle, in f64.
pub mod oracle {
    /// The gradient of `gain`, each plus [`LEAST_GAIN`](super::LEAST_GAIN).
    ///
    /// # Shapes
    /// `dy`, `y`: `[rows, width]`, `gain`: `[width]`.
    pub fn gain_gradient(dy: &[f64], y: &[f64], gain: &[f64]) -> Vec<f64> {
        let (_, dots) = backward(dy, y, gain);
        dots.iter().zip(gain).map(|(dot, gain)| dot / (gain + f64::from(super::LEAST_GAIN))).collect()
    }

    /// `x · scale`.
    ///
    /// # Shapes
    /// `x`: `[rows, width]`, `scale`: `[width]`.
    pub fn forward(x: &[f64], scale: &[f64]) -> Vec<f64> {
        x.chunks(scale.len()).flat_map(|row| row.iter().zip(scale).map(|(x, s)| x * s)).collect()
    }

    /// The gradients of `x` and of `scale`.
    ///
    /// # Shapes
    /// `dy`, `x`: `[rows, width]`, `scale`: `[width]`.
    pub fn backward(dy: &[f64], x: &[f64], scale: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let mut dscale = vec![0.0; scale.len()];
        for (dy, x) in dy.chunks(scale.len()).zip(x.chunks(scale.len())) {
            dscale.iter_mut().zip(dy.iter().zip(x)).for_each(|(sum, (dy, x))| *sum += dy * x);
        }
        (forward(dy, scale), dscale)
    }
}
