//! The middle of the experts' gated MLPs, where their projections may have biases.
//!
//! A bias belongs to an expert, so its rows are told apart here: what a product of all experts gave is taken without the bias, which
//! comes in where it is read next. No pass over memory is spent on it: the activation adds those of gate and up, [`combine`] that
//! of the down projection.
//!
//! With `g = W_gate x + b_gate`, `u = W_up x + b_up`, `h = activation(g) · u`, the row's weight `w` and `y = w (W h + b)`: the gradient
//! of the weight is `dy · (W h + b) = (Wᵀ dy) · h + dy · b`, so that `W h` need not be known, and that of `h` is `w Wᵀ dy`. Biases are
//! frozen.
//!
//! [`combine`]: super::combine

use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::{OPERATION, Places, Routing, matrices};
use crate::elementwise::{Matrix, Reduction, Rows, UNITS, buffer, check_format, cube_count, reduce_row, vector_size};
use crate::gated::{Activation, activate, factor, factor_slope, slope};
use crate::{FloatFormat, KernelError};

/// Buffers of [`gated`] beside the words.
#[derive(Clone, Copy, Debug)]
pub struct Gated<'a> {
    /// `[rows, width]`: the gate without its bias.
    pub gate: &'a Handle,
    /// `[rows, width]`: what the activation's value is multiplied with, without its bias.
    pub up: &'a Handle,
    /// `[experts, width]`: the biases of gate and up.
    pub biases: [&'a Handle; 2],
    /// `[rows, width]`, which this writes.
    pub out: &'a Handle,
}

/// Writes `activation(gate + b) · (up + b)` of each row, with its expert's biases.
///
/// # Errors
/// [`KernelError::Format`], and the variants about sizes when a buffer does not hold its shape.
pub fn gated(
    client: &Client,
    buffers: Gated<'_>,
    words: &Handle,
    routing: &Routing,
    width: usize,
    activation: Activation,
    format: FloatFormat,
) -> Result<(), KernelError> {
    check_format(client, OPERATION, format)?;
    let (vector, matrix) = matrices(client, format, width);
    let rows = routing.rows();
    let (gate, up) = (matrix("gate", buffers.gate, rows)?, matrix("up", buffers.up, rows)?);
    let [gate_bias, up_bias] = buffers.biases;
    let gate_bias = matrix("gate bias", gate_bias, routing.experts)?;
    let up_bias = matrix("up bias", up_bias, routing.experts)?;
    let out = matrix("out", buffers.out, rows)?;
    let words = routing.words_argument(words)?;
    let vectors = width / vector;
    if rows * vectors == 0 {
        return Ok(());
    }
    let (cubes, dim) = (cube_count(client, (rows * vectors).div_ceil(UNITS)), CubeDim::new_1d(UNITS as u32));
    // SAFETY: the buffers' sizes are checked, and the words name entries and experts within them.
    unsafe {
        gated_kernel::launch_unchecked(
            client,
            cubes,
            dim,
            vector,
            gate,
            up,
            gate_bias,
            up_bias,
            words,
            out,
            routing.launch(),
            vectors,
            activation,
            format.elem_type(),
        );
    }
    Ok(())
}

/// What [`gated_backward`] reads where projections have biases.
#[derive(Clone, Copy, Debug)]
pub struct Biased<'a> {
    /// `[experts, width]`: the biases of gate and up.
    pub inner: [&'a Handle; 2],
    /// `[experts, hidden]`: that of the down projection.
    pub down: &'a Handle,
    /// `[rows, hidden]`: the gradient of what the down projection gave, as if every weight were 1.
    pub dy: &'a Handle,
    /// The width of those two.
    pub hidden: usize,
}

/// Buffers of [`gated_backward`] beside the words.
#[derive(Clone, Copy, Debug)]
pub struct GatedBackward<'a> {
    /// `[rows, width]`: the gradient of the activation's result, as if every weight were 1.
    pub dy: &'a Handle,
    /// As the activation had it.
    pub gate: &'a Handle,
    /// As the activation had it.
    pub up: &'a Handle,
    /// Biases, if there are any.
    pub biased: Option<Biased<'a>>,
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

/// The gradients of `y = w · (W (activation(gate) · up) + b)` behind `W`; see the module above.
///
/// # Shapes
/// Matrices are `[rows, width]` of `format`.
///
/// # Errors
/// As [`gated`].
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
    // One width of vectors for both widths of rows.
    let hidden = buffers.biased.map_or(0, |biased| biased.hidden);
    let vector = vector_size(client, format, &[width, hidden]);
    let matrix = |name, handle: &Handle, rows: usize, width: usize| {
        buffer(name, handle, rows.saturating_mul(width), format.size(), vector)
    };
    let rows = routing.rows();
    let of_rows = |name, handle| matrix(name, handle, rows, width);
    let (dy, gate, up) = (of_rows("dy", buffers.dy)?, of_rows("gate", buffers.gate)?, of_rows("up", buffers.up)?);
    let (dgate, dup) = (of_rows("dgate", buffers.dgate)?, of_rows("dup", buffers.dup)?);
    let result = of_rows("result", buffers.result)?;
    // Any buffer will do where there are none.
    let nothing = || matrix("dy", buffers.dy, 0, width);
    let (inner, down, dy_out) = match buffers.biased {
        Some(Biased { inner: [of_gate, of_up], down, dy, hidden }) => (
            [matrix("gate bias", of_gate, routing.experts, width)?, matrix("up bias", of_up, routing.experts, width)?],
            matrix("down bias", down, routing.experts, hidden)?,
            matrix("dy of the down projection", dy, rows, hidden)?,
        ),
        None => ([nothing()?, nothing()?], nothing()?, nothing()?),
    };
    let [gate_bias, up_bias] = inner;
    let weights = buffer("weights", buffers.weights, rows, 4, 1)?;
    let dweights = buffer("dweights", buffers.dweights, rows, 4, 1)?;
    let words = routing.words_argument(words)?;
    if rows * width == 0 {
        return Ok(());
    }
    let shape = Matrix { rows, width, format };
    // SAFETY: as in `gated`.
    unsafe {
        backward_kernel::launch_unchecked(
            client,
            cube_count(client, shape.cubes()),
            CubeDim::new_1d(UNITS as u32),
            vector,
            dy,
            gate,
            up,
            gate_bias,
            up_bias,
            down,
            dy_out,
            weights,
            words,
            dgate,
            dup,
            result,
            dweights,
            routing.launch(),
            shape.launch(),
            hidden,
            buffers.biased.is_some(),
            activation,
            format.elem_type(),
        );
    }
    Ok(())
}

/// A vector a unit.
#[cube(launch_unchecked)]
fn gated_kernel<F: Float, N: Size>(
    gate: &[Vector<F, N>],
    up: &[Vector<F, N>],
    gate_bias: &[Vector<F, N>],
    up_bias: &[Vector<F, N>],
    words: &[u32],
    out: &mut [Vector<F, N>],
    places: &Places,
    vectors: usize,
    #[comptime] activation: Activation,
    #[define(F)] _format: ElemType,
) {
    let row = ABSOLUTE_POS / vectors;
    if row < places.rows {
        // The expert of the row's entry.
        let expert = words[words[places.entries + row] as usize] as usize;
        let of_expert = expert * vectors + ABSOLUTE_POS % vectors;
        let (g, u) = (gate[ABSOLUTE_POS], up[ABSOLUTE_POS]);
        let (of_gate, of_up) = (gate_bias[of_expert], up_bias[of_expert]);
        let mut y = Vector::<F, N>::empty();
        #[unroll]
        for i in 0..N::value().comptime() {
            let g = f32::cast_from(g.extract(i)) + f32::cast_from(of_gate.extract(i));
            let u = f32::cast_from(u.extract(i)) + f32::cast_from(of_up.extract(i));
            y.insert(i, F::cast_from(activate(g, activation) * factor(u, activation)));
        }
        out[ABSOLUTE_POS] = y;
    }
}

/// Some units a row.
#[cube(launch_unchecked)]
fn backward_kernel<F: Float, N: Size>(
    dy: &[Vector<F, N>],
    gate: &[Vector<F, N>],
    up: &[Vector<F, N>],
    gate_bias: &[Vector<F, N>],
    up_bias: &[Vector<F, N>],
    down_bias: &[Vector<F, N>],
    dy_out: &[Vector<F, N>],
    weights: &[f32],
    words: &[u32],
    dgate: &mut [Vector<F, N>],
    dup: &mut [Vector<F, N>],
    result: &mut [Vector<F, N>],
    dweights: &mut [f32],
    places: &Places,
    shape: &Rows,
    hidden: usize,
    #[comptime] biased: bool,
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
        let expert = words[entry] as usize;
        let mut v = lane;
        while v < vectors {
            let at = row * vectors + v;
            let (d, g, u) = (dy[at], gate[at], up[at]);
            let mut dg = Vector::<F, N>::empty();
            let mut du = Vector::<F, N>::empty();
            let mut h = Vector::<F, N>::empty();
            #[unroll]
            for i in 0..width {
                let d = f32::cast_from(d.extract(i));
                let mut x = f32::cast_from(g.extract(i));
                let mut u = f32::cast_from(u.extract(i));
                if biased {
                    x += f32::cast_from(gate_bias[expert * vectors + v].extract(i));
                    u += f32::cast_from(up_bias[expert * vectors + v].extract(i));
                }
                let active = activate(x, activation);
                let by = factor(u, activation);
                let rounded = F::cast_from(active * by);
                product += d * f32::cast_from(rounded);
                h.insert(i, rounded);
                dg.insert(i, F::cast_from(weight * d * by * slope(x, activation)));
                du.insert(i, F::cast_from(weight * d * active * factor_slope(u, activation)));
            }
            dgate[at] = dg;
            dup[at] = du;
            result[at] = h;
            v += units;
        }
        if biased {
            let vectors = hidden / width;
            let mut v = lane;
            while v < vectors {
                let (d, b) = (dy_out[row * vectors + v], down_bias[expert * vectors + v]);
                #[unroll]
                for i in 0..width {
                    product += f32::cast_from(d.extract(i)) * f32::cast_from(b.extract(i));
                }
                v += units;
            }
        }
    }
    let whole = reduce_row(product, &mut shared, units, Reduction::Sum);
    if row < places.rows && lane == 0 {
        dweights[entry] = whole;
    }
}
