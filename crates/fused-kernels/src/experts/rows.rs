//! Rows of tokens for their experts, and back.
//!
//! Computed in f32 and rounded once. With 16 bits, 2,048 tokens of 2,048 features and 8 experts each, [`gather`] writes 67 MB and
//! [`combine`] reads as many: memory is the bound.

use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::{OPERATION, Places, Routing, matrices};
use crate::elementwise::{UNITS, buffer, check_format, cube_count};
use crate::{FloatFormat, KernelError};

/// Writes the rows of all experts: each is its token's row of `x`.
///
/// # Shapes
/// `x` is `[tokens, width]`, `out` `[rows, width]`, both of `format`.
///
/// # Errors
/// [`KernelError::Format`], and the variants about sizes when a buffer does not hold its shape.
pub fn gather(
    client: &Client,
    x: &Handle,
    words: &Handle,
    out: &Handle,
    routing: &Routing,
    width: usize,
    format: FloatFormat,
) -> Result<(), KernelError> {
    check_format(client, OPERATION, format)?;
    let (vector, matrix) = matrices(client, format, width);
    let (x, out) = (matrix("x", x, routing.tokens)?, matrix("out", out, routing.rows())?);
    let words = routing.words_argument(words)?;
    let vectors = width / vector;
    if routing.rows() * vectors == 0 {
        return Ok(());
    }
    let (cubes, dim) = (cube_count(client, (routing.rows() * vectors).div_ceil(UNITS)), CubeDim::new_1d(UNITS as u32));
    // SAFETY: the buffers' sizes are checked, and the words name tokens and rows within them.
    unsafe {
        gather_kernel::launch_unchecked(
            client,
            cubes,
            dim,
            vector,
            x,
            words,
            out,
            routing.launch(),
            vectors,
            format.elem_type(),
        );
    }
    Ok(())
}

/// Buffers of [`combine`] beside the words.
#[derive(Clone, Copy, Debug)]
pub struct Combine<'a> {
    /// `[rows, width]`.
    pub rows: &'a Handle,
    /// Further rows, which are added to the first ones.
    pub more: Option<&'a Handle>,
    /// `[experts, width]`: added to each of an expert's rows.
    pub bias: Option<&'a Handle>,
    /// f32 `[tokens, per_token]`: factors of a token's rows; 1 without them.
    pub weights: Option<&'a Handle>,
    /// `[tokens, width]`, which this writes.
    pub out: &'a Handle,
}

/// Writes each token's sum of its rows, in the order of its experts.
///
/// # Errors
/// As [`gather`].
pub fn combine(
    client: &Client,
    buffers: Combine<'_>,
    words: &Handle,
    routing: &Routing,
    width: usize,
    format: FloatFormat,
) -> Result<(), KernelError> {
    check_format(client, OPERATION, format)?;
    let (vector, matrix) = matrices(client, format, width);
    let rows = matrix("rows", buffers.rows, routing.rows())?;
    let more = matrix("more", buffers.more.unwrap_or(buffers.rows), routing.rows())?;
    let bias = match buffers.bias {
        Some(bias) => matrix("bias", bias, routing.experts)?,
        None => matrix("rows", buffers.rows, 0)?,
    };
    let out = matrix("out", buffers.out, routing.tokens)?;
    let words_argument = routing.words_argument(words)?;
    // Any buffer will do where there are none.
    let weights = match buffers.weights {
        Some(weights) => buffer("weights", weights, routing.rows(), 4, 1)?,
        None => buffer("words", words, routing.rows(), 4, 1)?,
    };
    let vectors = width / vector;
    if routing.tokens * vectors == 0 {
        return Ok(());
    }
    let (cubes, dim) = (cube_count(client, (routing.tokens * vectors).div_ceil(UNITS)), CubeDim::new_1d(UNITS as u32));
    let form =
        Form { weighted: buffers.weights.is_some(), two: buffers.more.is_some(), biased: buffers.bias.is_some() };
    // SAFETY: as in `gather`.
    unsafe {
        combine_kernel::launch_unchecked(
            client,
            cubes,
            dim,
            vector,
            rows,
            more,
            bias,
            weights,
            words_argument,
            out,
            routing.launch(),
            vectors,
            form,
            format.elem_type(),
        );
    }
    Ok(())
}

/// Which operands [`combine`] has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Form {
    weighted: bool,
    two: bool,
    biased: bool,
}

/// A vector a unit.
#[cube(launch_unchecked)]
fn gather_kernel<F: Float, N: Size>(
    x: &[Vector<F, N>],
    words: &[u32],
    out: &mut [Vector<F, N>],
    places: &Places,
    vectors: usize,
    #[define(F)] _format: ElemType,
) {
    let row = ABSOLUTE_POS / vectors;
    if row < places.rows {
        let token = words[places.entries + row] as usize / comptime!(places.per_token);
        out[ABSOLUTE_POS] = x[token * vectors + ABSOLUTE_POS % vectors];
    }
}

/// A vector a unit.
#[cube(launch_unchecked)]
fn combine_kernel<F: Float, N: Size>(
    rows: &[Vector<F, N>],
    more: &[Vector<F, N>],
    bias: &[Vector<F, N>],
    weights: &[f32],
    words: &[u32],
    out: &mut [Vector<F, N>],
    places: &Places,
    vectors: usize,
    #[comptime] form: Form,
    #[define(F)] _format: ElemType,
) {
    let per_token = comptime!(places.per_token);
    let token = ABSOLUTE_POS / vectors;
    if token < places.tokens {
        let column = ABSOLUTE_POS % vectors;
        let mut sums = Array::<f32>::new(N::value().comptime());
        #[unroll]
        for i in 0..N::value().comptime() {
            sums[i] = 0.0f32;
        }
        for place in 0..per_token {
            let entry = token * per_token + place;
            let at = words[places.slots + entry] as usize * vectors + column;
            let row = rows[at];
            let expert = words[entry] as usize;
            let mut weight = 1.0f32;
            if form.weighted {
                weight = weights[entry];
            }
            #[unroll]
            for i in 0..N::value().comptime() {
                let mut value = f32::cast_from(row.extract(i));
                if form.two {
                    value += f32::cast_from(more[at].extract(i));
                }
                if form.biased {
                    value += f32::cast_from(bias[expert * vectors + column].extract(i));
                }
                sums[i] += weight * value;
            }
        }
        let mut y = Vector::<F, N>::empty();
        #[unroll]
        for i in 0..N::value().comptime() {
            y.insert(i, F::cast_from(sums[i]));
        }
        out[ABSOLUTE_POS] = y;
    }
}
