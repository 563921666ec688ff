//! Rows of tokens for their experts, and back.
//!
//! Computed in f32 and rounded once. With 16 bits, 2,048 tokens of 2,048 features and 8 experts each, [`gather`] writes 67 MB and
//! [`combine`] reads as many: memory is the bound.

use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::{OPERATION, Places, Routing, matrices};
use crate::elementwise::{Matrix, Reduction, Rows, UNITS, buffer, check_format, cube_count, reduce_row};
use crate::gated::{Activation, activate, slope};
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
    let form = Form { weighted: buffers.weights.is_some(), two: buffers.more.is_some() };
    // SAFETY: as in `gather`.
    unsafe {
        combine_kernel::launch_unchecked(
            client,
            cubes,
            dim,
            vector,
            rows,
            more,
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
}

/// Buffers of [`gated_backward`] beside the words.
#[derive(Clone, Copy, Debug)]
pub struct GatedBackward<'a> {
    /// `[rows, width]`: the gradient of the product that follows, as if every weight were 1.
    pub dy: &'a Handle,
    /// As the activation had it.
    pub gate: &'a Handle,
    /// As the activation had it.
    pub up: &'a Handle,
    /// f32 `[tokens, per_token]`: the weights of the rows.
    pub weights: &'a Handle,
    /// The gradient of `gate`, which this writes.
    pub dgate: &'a Handle,
    /// The gradient of `up`, which this writes.
    pub dup: &'a Handle,
    /// The activation's result again, which this writes.
    pub result: &'a Handle,
    /// f32 `[tokens, per_token]`: the gradient of the weights, which this writes.
    pub dweights: &'a Handle,
}

/// The gradients of `y = w · W (activation(gate) · up)` behind `W`.
///
/// With `h = activation(gate) · up` and `g = Wᵀ dy`: the gradient of the row's weight is `dy · W h = g · h`, so that `W h`
/// need not be known, and that of `h` is `w g`.
///
/// # Shapes
/// Matrices are `[rows, width]` of `format`.
///
/// # Errors
/// As [`gather`].
pub fn gated_backward(
    client: &Client,
    buffers: GatedBackward<'_>,
    words: &Handle,
    routing: &Routing,
    width: usize,
    activation: Activation,
    format: FloatFormat,
) -> Result<(), KernelError> {
    check_format(client, OPERATION, format)?;
    let (vector, matrix) = matrices(client, format, width);
    let rows = routing.rows();
    let (dy, gate, up) =
        (matrix("dy", buffers.dy, rows)?, matrix("gate", buffers.gate, rows)?, matrix("up", buffers.up, rows)?);
    let (dgate, dup) = (matrix("dgate", buffers.dgate, rows)?, matrix("dup", buffers.dup, rows)?);
    let result = matrix("result", buffers.result, rows)?;
    let weights = buffer("weights", buffers.weights, rows, 4, 1)?;
    let dweights = buffer("dweights", buffers.dweights, rows, 4, 1)?;
    let words = routing.words_argument(words)?;
    if rows * width == 0 {
        return Ok(());
    }
    let shape = Matrix { rows, width, format };
    // SAFETY: as in `gather`.
    unsafe {
        gated_kernel::launch_unchecked(
            client,
            cube_count(client, shape.cubes()),
            CubeDim::new_1d(UNITS as u32),
            vector,
            dy,
            gate,
            up,
            weights,
            words,
            dgate,
            dup,
            result,
            dweights,
            routing.launch(),
            shape.launch(),
            activation,
            format.elem_type(),
        );
    }
    Ok(())
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

/// Some units a row.
#[cube(launch_unchecked)]
fn gated_kernel<F: Float, N: Size>(
    dy: &[Vector<F, N>],
    gate: &[Vector<F, N>],
    up: &[Vector<F, N>],
    weights: &[f32],
    words: &[u32],
    dgate: &mut [Vector<F, N>],
    dup: &mut [Vector<F, N>],
    result: &mut [Vector<F, N>],
    dweights: &mut [f32],
    places: &Places,
    shape: &Rows,
    #[comptime] activation: Activation,
    #[define(F)] _format: ElemType,
) {
    let width = N::value().comptime();
    let units = comptime!(shape.units);
    let mut shared = Shared::<[f32]>::new_slice(UNITS);
    let unit = UNIT_POS as usize;
    let row = CUBE_POS * comptime!(UNITS / units) + unit / units;
    let (lane, vectors) = (unit % units, shape.width / width);
    let mut entry = 0usize;
    let mut product = 0.0f32;
    if row < places.rows {
        entry = words[places.entries + row] as usize;
        let weight = weights[entry];
        let mut v = lane;
        while v < vectors {
            let at = row * vectors + v;
            let (d, g, u) = (dy[at], gate[at], up[at]);
            let mut dg = Vector::<F, N>::empty();
            let mut du = Vector::<F, N>::empty();
            let mut h = Vector::<F, N>::empty();
            #[unroll]
            for i in 0..width {
                let (d, x, u) =
                    (f32::cast_from(d.extract(i)), f32::cast_from(g.extract(i)), f32::cast_from(u.extract(i)));
                let active = activate(x, activation);
                let rounded = F::cast_from(active * u);
                product += d * f32::cast_from(rounded);
                h.insert(i, rounded);
                dg.insert(i, F::cast_from(weight * d * u * slope(x, activation)));
                du.insert(i, F::cast_from(weight * d * active));
            }
            dgate[at] = dg;
            dup[at] = du;
            result[at] = h;
            v += units;
        }
    }
    let whole = reduce_row(product, &mut shared, units, Reduction::Sum);
    if row < places.rows && lane == 0 {
        dweights[entry] = whole;
    }
}
