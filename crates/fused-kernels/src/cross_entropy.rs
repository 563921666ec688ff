//! Cross-entropy of rows of logits against one target each: `loss = log Σ exp(x) - x[target]`.
//!
//! Forward reads the logits once: each unit keeps the largest of its values and the sum of exponentials relative to
//! it, rescaled when a larger one comes (Milakov and Gimelshein, 2018, arXiv 1805.02867), and the units of a row join
//! theirs in a fixed order. It writes the loss and the log-sum-exp, two f32 a row. The backward pass needs these and the
//! logits, and writes the gradient over them:
//!
//! ```text
//! dx = dloss · (exp(x - log_sum_exp) - [x is the target])
//! ```
//!
//! Bytes per logit of 16 bits: 2 forward, 4 backward; memory is the bound. Composed of stock operations, the f32 copy of
//! the logits, the log-softmax and its gradient would each be twice the logits' size: with 128 thousand words that is
//! what fills the device. Callers keep the logits themselves small by passing some tokens at a time.

use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::elementwise::{Reduction, UNITS, buffer, check_format, cube_count, reduce_row, units_per_row, vector_size};
use crate::{Format, KernelError};

const OPERATION: &str = "cross_entropy";
/// Smaller than any logit, and still a number: a difference of two of them is none.
const LOWEST: f32 = -3.0e38;

/// What both passes are launched with.
struct Common {
    vector: usize,
    units: usize,
    logits: BufferArg,
    targets: BufferArg,
    log_sum_exp: BufferArg,
}

impl Common {
    /// Fails where the format is not supported, or a buffer does not hold its shape.
    fn new(
        client: &Client,
        logits: &Handle,
        targets: &Handle,
        log_sum_exp: &Handle,
        rows: usize,
        width: usize,
        format: Format,
    ) -> Result<Self, KernelError> {
        check_format(client, OPERATION, format)?;
        let vector = vector_size(client, format, &[width]);
        let of_rows = |name, handle| buffer(name, handle, rows, 4, 1);
        Ok(Self {
            vector,
            units: units_per_row(width),
            logits: buffer("logits", logits, rows * width, format.size(), vector)?,
            targets: of_rows("targets", targets)?,
            log_sum_exp: of_rows("log_sum_exp", log_sum_exp)?,
        })
    }
}

/// Loss and log-sum-exp of each row.
///
/// # Shapes
/// - `logits`: `[rows, width]` of `format`, contiguous
/// - `targets`: i32 `[rows]`, each from 0 to `width - 1`
/// - `losses`, `log_sum_exp`: f32 `[rows]`
///
/// # Errors
/// [`KernelError::Format`], and the variants about sizes when a buffer does not hold its shape.
#[allow(clippy::too_many_arguments)]
pub fn forward(
    client: &Client,
    logits: &Handle,
    targets: &Handle,
    losses: &Handle,
    log_sum_exp: &Handle,
    rows: usize,
    width: usize,
    format: Format,
) -> Result<(), KernelError> {
    let Common { vector, units, logits, targets, log_sum_exp } =
        Common::new(client, logits, targets, log_sum_exp, rows, width, format)?;
    let losses = buffer("losses", losses, rows, 4, 1)?;
    if rows * width == 0 {
        return Ok(());
    }
    // SAFETY: the buffers' sizes are checked, and the kernel stays within rows and width; it reads a logit by its target
    // only where the target is below the width.
    unsafe {
        forward_kernel::launch_unchecked(
            client,
            cube_count(client, rows.div_ceil(UNITS / units)),
            CubeDim::new_1d(UNITS as u32),
            vector,
            logits,
            targets,
            losses,
            log_sum_exp,
            rows,
            width,
            units,
            format.elem_type(),
        );
    }
    Ok(())
}

/// The gradient of the logits, in their place.
///
/// # Shapes
/// - `dloss`: f32 `[rows]`
/// - the others as in [`forward`]; `logits` takes the gradient
///
/// # Errors
/// As [`forward`].
#[allow(clippy::too_many_arguments)]
pub fn backward(
    client: &Client,
    dloss: &Handle,
    logits: &Handle,
    targets: &Handle,
    log_sum_exp: &Handle,
    rows: usize,
    width: usize,
    format: Format,
) -> Result<(), KernelError> {
    let Common { vector, units, logits, targets, log_sum_exp } =
        Common::new(client, logits, targets, log_sum_exp, rows, width, format)?;
    let dloss = buffer("dloss", dloss, rows, 4, 1)?;
    if rows * width == 0 {
        return Ok(());
    }
    // SAFETY: as in `forward`.
    unsafe {
        backward_kernel::launch_unchecked(
            client,
            cube_count(client, rows.div_ceil(UNITS / units)),
            CubeDim::new_1d(UNITS as u32),
            vector,
            dloss,
            logits,
            targets,
            log_sum_exp,
            rows,
            width,
            units,
            format.elem_type(),
        );
    }
    Ok(())
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn forward_kernel<F: Float, N: Size>(
    logits: &[Vector<F, N>],
    targets: &[i32],
    losses: &mut [f32],
    log_sum_exp: &mut [f32],
    rows: usize,
    width: usize,
    #[comptime] units: usize,
    #[define(F)] _format: ElemType,
) {
    let vector = N::value().comptime();
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
#[allow(clippy::too_many_arguments)]
fn backward_kernel<F: Float, N: Size>(
    dloss: &[f32],
    logits: &mut [Vector<F, N>],
    targets: &[i32],
    log_sum_exp: &[f32],
    rows: usize,
    width: usize,
    #[comptime] units: usize,
    #[define(F)] _format: ElemType,
) {
    let vector = N::value().comptime();
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
