//! The largest logits of each row, with what is needed to draw from the row as if all of it were there: a draw looks at some tens of
//! a hundred thousand tokens, and these are 2 KB instead of the row.
//!
//! A row's candidates are all logits above a threshold, at most [`MOST`]. Of the others the sum of weights is given,
//! `Σ exp((logit - highest) / temperature)`, in f32: a caller knows how much probability they have together, and that none of them is
//! likelier than the threshold. Values are the logits themselves, exact in f32.
//!
//! **How.** A cube takes a row. The threshold is found by bisection of the `SPAN` below the largest logit, `ROUNDS` times, each a
//! count over the row, which stays in the second-level cache. It does not have to be the best one: where candidates can't decide, the
//! caller has the row.

use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::elementwise::{
    Reduction, Rows, RowsLaunch, UNITS, buffer, check_format, cube_count, reduce_row, vector_size,
};
use crate::{KernelError, Matrix};

const OPERATION: &str = "candidates";

/// The most candidates of a row.
pub const MOST: usize = 256;
/// Words of a row's answer: ids, values as bits, then [`Summary`].
pub const WORDS: usize = 2 * MOST + SUMMARY;
const SUMMARY: usize = 4;
/// How far below the largest logit the threshold is looked for.
const SPAN: f32 = 64.0;
const ROUNDS: usize = 12;

/// A row's answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Answer<'a> {
    /// Ids of the candidates, in no order.
    pub ids: &'a [u32],
    /// Their logits, as the bits of f32.
    pub values: &'a [u32],
    /// What is not in the candidates.
    pub rest: Summary,
}

/// The largest logit of a row, and what is known of logits that are no candidates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// The largest logit of the row.
    pub highest: f32,
    /// No other logit is larger.
    pub threshold: f32,
    /// The sum of their weights, within a thousandth of itself; weights that f32 is too small for count nothing.
    pub weight: f32,
}

impl<'a> Answer<'a> {
    /// Out of the [`WORDS`] of a row. `None` where they are no answer.
    pub fn new(words: &'a [u32]) -> Option<Self> {
        let (ids, rest) = words.split_at_checked(MOST)?;
        let (values, summary) = rest.split_at_checked(MOST)?;
        let &[count, highest, threshold, weight] = summary else { return None };
        let [highest, threshold, weight] = [highest, threshold, weight].map(f32::from_bits);
        let count = count as usize;
        Some(Self {
            ids: ids.get(..count)?,
            values: values.get(..count)?,
            rest: Summary { highest, threshold, weight },
        })
    }
}

/// Writes each row's answer to `out`, u32 `[rows, WORDS]`.
///
/// # Shapes
/// `logits` has the shape of `matrix`; `temperatures`, f32 `[rows]`, are above 0.
///
/// # Errors
/// [`KernelError::Format`], and the variants about sizes when a buffer does not hold its shape.
pub fn candidates(
    client: &Client,
    logits: &Handle,
    temperatures: &Handle,
    out: &Handle,
    matrix: Matrix,
) -> Result<(), KernelError> {
    check_format(client, OPERATION, matrix.format)?;
    let vector = vector_size(client, matrix.format, &[matrix.width]);
    let logits = buffer("logits", logits, matrix.elements(), matrix.format.size(), vector)?;
    let temperatures = buffer("temperatures", temperatures, matrix.rows, 4, 1)?;
    let out = buffer("out", out, matrix.rows * WORDS, 4, 1)?;
    if matrix.elements() == 0 {
        return Ok(());
    }
    // SAFETY: the buffers' sizes are checked, and units stay within the matrix.
    unsafe {
        kernel::launch_unchecked(
            client,
            cube_count(client, matrix.rows),
            CubeDim::new_1d(UNITS as u32),
            vector,
            logits,
            temperatures,
            out,
            RowsLaunch::new(matrix.rows, matrix.width, UNITS),
            matrix.format.elem_type(),
        );
    }
    Ok(())
}

/// How many logits of a row are above a bound.
#[cube]
fn count_above<F: Float, N: Size>(
    logits: &[Vector<F, N>],
    first: usize,
    vectors: usize,
    bound: f32,
    shared: &mut Shared<[f32]>,
) -> f32 {
    let vector = N::value().comptime();
    // Exact below 2^24, and a row that has more is not near the bound of candidates.
    let mut count = 0.0f32;
    let mut v = UNIT_POS as usize;
    while v < vectors {
        let pack = logits[first + v];
        #[unroll]
        for i in 0..vector {
            count += select(f32::cast_from(pack.extract(i)) > bound, 1.0f32, 0.0f32);
        }
        v += UNITS;
    }
    reduce_row(count, shared, UNITS, Reduction::Sum)
}

#[cube(launch_unchecked)]
fn kernel<F: Float, N: Size>(
    logits: &[Vector<F, N>],
    temperatures: &[f32],
    out: &mut [u32],
    matrix: &Rows,
    #[define(F)] _format: ElemType,
) {
    let vector = N::value().comptime();
    let (rows, width) = (matrix.rows, matrix.width);
    let mut shared = Shared::<[f32]>::new_slice(UNITS);
    let mut counts = Shared::<[u32]>::new_slice(UNITS);
    let unit = UNIT_POS as usize;
    let row = CUBE_POS;
    let vectors = width / vector;
    // A cube beyond the last row has no vectors, and comes to every barrier.
    let own = select(row < rows, vectors, 0usize);
    let first = select(row < rows, row, 0usize) * vectors;

    let mut highest = f32::cast_from(logits[first].extract(0usize));
    let mut v = unit;
    while v < own {
        let pack = logits[first + v];
        #[unroll]
        for i in 0..vector {
            highest = max(highest, f32::cast_from(pack.extract(i)));
        }
        v += UNITS;
    }
    let highest = reduce_row(highest, &mut shared, UNITS, Reduction::Maximum);

    // More than the bound are above `low`; so many that they fit are above `high`.
    let mut low = highest - SPAN;
    let mut high = highest;
    let most = comptime!(MOST as f32).runtime();
    if count_above(logits, first, own, low, &mut shared) <= most {
        high = low;
    }
    for _ in 0..ROUNDS {
        let middle = 0.5f32 * (low + high);
        if count_above(logits, first, own, middle, &mut shared) <= most {
            high = middle;
        } else {
            low = middle;
        }
    }

    let temperature = temperatures[select(row < rows, row, 0usize)];
    let mut weight = 0.0f32;
    let mut count = 0u32;
    let mut v = unit;
    while v < own {
        let pack = logits[first + v];
        #[unroll]
        for i in 0..vector {
            let value = f32::cast_from(pack.extract(i));
            if value > high {
                count += 1u32;
            } else {
                weight += ((value - highest) / temperature).exp();
            }
        }
        v += UNITS;
    }
    let weight = reduce_row(weight, &mut shared, UNITS, Reduction::Sum);
    counts[unit] = count;
    sync_cube();
    let mut before = 0u32;
    let mut all = 0u32;
    for other in 0..UNITS {
        let theirs = counts[other];
        if other < unit {
            before += theirs;
        }
        all += theirs;
    }
    let answer = row * WORDS;
    let mut place = answer + before as usize;
    let mut v = unit;
    while v < own {
        let pack = logits[first + v];
        #[unroll]
        for i in 0..vector {
            let value = f32::cast_from(pack.extract(i));
            if value > high {
                out[place] = (v * vector + i) as u32;
                out[place + MOST] = u32::reinterpret(value);
                place += 1;
            }
        }
        v += UNITS;
    }
    if row < rows && unit == 0 {
        let summary = answer + 2 * MOST;
        out[summary] = all;
        out[summary + 1] = u32::reinterpret(highest);
        out[summary + 2] = u32::reinterpret(high);
        out[summary + 3] = u32::reinterpret(weight);
    }
}

/// The scalar oracle.
pub mod oracle {
    /// The largest logit of a row, the ids of those above `threshold`, and the sum of the others' weights.
    pub fn candidates(row: &[f64], threshold: f64, temperature: f64) -> (f64, Vec<u32>, f64) {
        let highest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let above = |id: &usize| row[*id] > threshold;
        let ids = (0..row.len()).filter(above).map(|id| id as u32).collect();
        let rest = (0..row.len()).filter(|id| !above(id));
        (highest, ids, rest.map(|id| ((row[id] - highest) / temperature).exp()).sum())
    }
}
