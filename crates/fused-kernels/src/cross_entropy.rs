//! Cross-entropy of rows of logits against one target each: `loss = log Σ exp(x) - x[target]`.
//!
//! Forward reads the logits once: each unit keeps the largest of its values and the sum of exponentials relative to it,
//! rescaled when a larger one comes (Milakov and Gimelshein, 2018, arXiv 1805.02867), and the units of a row join
//! theirs in a fixed order. It writes the loss and the log-sum-exp, two f32 a row. The backward pass needs these and
//! the logits, and writes the gradient over them:
//!
//! ```text
//! dx = dloss · (exp(x - log_sum_exp) - [x is the target])
//! ```
//!
//! Bytes per logit of 16 bits: 2 forward, 4 backward; memory is the bound. Composed of stock operations, the f32 copy
//! of the logits, the log-softmax and its gradient would each be twice the logits' size: with 128 thousand words that
//! is what fills the device. Callers keep the logits themselves small by passing some tokens at a time.

use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::KernelError;
use crate::elementwise::{Matrix, Reduction, Rows, UNITS, buffer, check_format, cube_count, reduce_row, vector_size};

const OPERATION: &str = "cross_entropy";
/// Smaller than any logit, and still a number: a difference of two of them is none.
const LOWEST: f32 = -3.0e38;

/// Buffers of [`forward`].
#[derive(Clone, Copy, Debug)]
pub struct Forward<'a> {
    /// `[rows, width]`.
    pub logits: &'a Handle,
    /// i32 `[rows]`, each from 0 to `width - 1`.
    pub targets: &'a Handle,
    /// f32 `[rows]`, which this writes.
    pub losses: &'a Handle,
    /// f32 `[rows]`, which this writes.
    pub log_sum_exp: &'a Handle,
}

/// Buffers of [`backward`].
#[derive(Clone, Copy, Debug)]
pub struct Backward<'a> {
    /// The gradient of the losses: f32 `[rows]`.
    pub dloss: &'a Handle,
    /// As in [`forward`]; this writes their gradient in their place.
    pub logits: &'a Handle,
    /// As in [`forward`].
    pub targets: &'a Handle,
    /// As [`forward`] left it.
    pub log_sum_exp: &'a Handle,
}

/// Loss and log-sum-exp of each row of `logits`.
///
/// # Shapes
/// [`Forward`] has them.
///
/// # Errors
/// [`KernelError::Format`], and the variants about sizes when a buffer does not hold its shape.
pub fn forward(client: &Client, buffers: Forward<'_>, logits: Matrix) -> Result<(), KernelError> {
    let vector = check(client, logits)?;
    let of_logits = buffer("logits", buffers.logits, logits.elements(), logits.format.size(), vector)?;
    let of_rows = |name, handle| buffer(name, handle, logits.rows, 4, 1);
    let targets = of_rows("targets", buffers.targets)?;
    let log_sum_exp = of_rows("log_sum_exp", buffers.log_sum_exp)?;
    let losses = of_rows("losses", buffers.losses)?;
    if logits.elements() == 0 {
        return Ok(());
    }
    // SAFETY: the buffers' sizes are checked, and the kernel stays within rows and width; it reads a logit by its
    // target only where the target is below the width.
    unsafe {
        forward_kernel::launch_unchecked(
            client,
            cube_count(client, logits.cubes()),
            CubeDim::new_1d(UNITS as u32),
            vector,
            of_logits,
            targets,
            losses,
            log_sum_exp,
            logits.launch(),
            logits.format.elem_type(),
        );
    }
    Ok(())
}

/// The gradient of the logits, in their place.
///
/// # Shapes
/// [`Backward`] has them.
///
/// # Errors
/// As [`forward`].
pub fn backward(client: &Client, buffers: Backward<'_>, logits: Matrix) -> Result<(), KernelError> {
    let vector = check(client, logits)?;
    let of_logits = buffer("logits", buffers.logits, logits.elements(), logits.format.size(), vector)?;
    let of_rows = |name, handle| buffer(name, handle, logits.rows, 4, 1);
    let targets = of_rows("targets", buffers.targets)?;
    let log_sum_exp = of_rows("log_sum_exp", buffers.log_sum_exp)?;
    let dloss = of_rows("dloss", buffers.dloss)?;
    if logits.elements() == 0 {
        return Ok(());
    }
    // SAFETY: as in `forward`.
    unsafe {
        backward_kernel::launch_unchecked(
            client,
            cube_count(client, logits.cubes()),
            CubeDim::new_1d(UNITS as u32),
            vector,
            dloss,
            of_logits,
            targets,
            log_sum_exp,
            logits.launch(),
            logits.format.elem_type(),
        );
    }
    Ok(())
}

/// The width of the kernels' vectors, where the format is supported.
fn check(client: &Client, logits: Matrix) -> Result<usize, KernelError> {
    check_format(client, OPERATION, logits.format)?;
    Ok(vector_size(client, logits.format, &[logits.width]))
}

#[cube(launch_unchecked)]
fn forward_kernel<F: Float, N: Size>(
    logits: &[Vector<F, N>],
    targets: &[i32],
    losses: &mut [f32],
    log_sum_exp: &mut [f32],
    matrix: &Rows,
    #[define(F)] _format: ElemType,
) {
    let vector = N::value().comptime();
    let (rows, width) = (matrix.rows, matrix.width);
    let units = comptime!(matrix.units);
    let mut shared = Shared::<[f32]>::new_slice(UNITS);
    let unit = UNIT_POS as usize;
    let row = CUBE_POS * comptime!(UNITS / units) + unit / units;
    let (lane, vectors) = (unit % units, width / vector);
    let first = row * vectors;

    let mut largest = LOWEST.runtime();
    let mut sum = 0.0f32;
    // The target's logit, in the one unit that meets it.
    let mut chosen = 0.0f32;
    if row < rows {
        let target = targets[row] as usize;
        let mut v = lane;
        while v < vectors {
            let values = logits[first + v];
            let mut top = largest;
            #[unroll]
            for i in 0..vector {
                top = max(top, f32::cast_from(values.extract(i)));
            }
            sum *= (largest - top).exp();
            #[unroll]
            for i in 0..vector {
                let value = f32::cast_from(values.extract(i));
                sum += (value - top).exp();
                if v * vector + i == target {
                    chosen = value;
                }
            }
            largest = top;
            v += units;
        }
    }
    let top = reduce_row(largest, &mut shared, units, Reduction::Maximum);
    let sum = reduce_row(sum * (largest - top).exp(), &mut shared, units, Reduction::Sum);
    let chosen = reduce_row(chosen, &mut shared, units, Reduction::Sum);
    if row < rows && lane == 0 {
        let whole = top + sum.ln();
        log_sum_exp[row] = whole;
        losses[row] = whole - chosen;
    }
}

#[cube(launch_unchecked)]
fn backward_kernel<F: Float, N: Size>(
    dloss: &[f32],
    logits: &mut [Vector<F, N>],
    targets: &[i32],
    log_sum_exp: &[f32],
    matrix: &Rows,
    #[define(F)] _format: ElemType,
) {
    let vector = N::value().comptime();
    let (rows, width) = (matrix.rows, matrix.width);
    let units = comptime!(matrix.units);
    let unit = UNIT_POS as usize;
    let row = CUBE_POS * comptime!(UNITS / units) + unit / units;
    let (lane, vectors) = (unit % units, width / vector);
    if row < rows {
        let (target, whole, factor) = (targets[row] as usize, log_sum_exp[row], dloss[row]);
        let first = row * vectors;
        let mut v = lane;
        while v < vectors {
            let values = logits[first + v];
            let mut grads = Vector::<F, N>::empty();
            #[unroll]
            for i in 0..vector {
                let probability = (f32::cast_from(values.extract(i)) - whole).exp();
                let hit = select(v * vector + i == target, 1.0f32, 0.0f32);
                grads.insert(i, F::cast_from(factor * (probability - hit)));
            }
            logits[first + v] = grads;
            v += units;
        }
    }
}

/// The scalar oracle, in f64.
pub mod oracle {
    /// `log Σ exp(x)` of a row.
    pub fn log_sum_exp(row: &[f64]) -> f64 {
        let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        top + row.iter().map(|x| (x - top).exp()).sum::<f64>().ln()
    }

    /// The loss of a row.
    pub fn forward(row: &[f64], target: usize) -> f64 {
        log_sum_exp(row) - row[target]
    }

    /// The gradient of a row whose loss has the gradient `dloss`.
    pub fn backward(dloss: f64, row: &[f64], target: usize) -> Vec<f64> {
        let whole = log_sum_exp(row);
        let grad = |(i, x): (usize, &f64)| dloss * ((x - whole).exp() - f64::from(u8::from(i == target)));
        row.iter().enumerate().map(grad).collect()
    }
}
