//! The rule token by token, on every runtime: for generation, whose rows go on from a state by one token or a few.
//!
//! A cube has a head of a row, a unit some columns of its state, which stays where it is: each token reads it twice and writes it
//! once. Memory is the bound, with `12 · key_dim · value_dim` bytes for a token and head.

use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::OPERATION;
use crate::elementwise::{buffer, check_format, cube_count};
use crate::{FloatFormat, KernelError};

const UNITS: usize = 128;

/// The dimensions of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Rows.
    pub rows: usize,
    /// Tokens of each.
    pub len: usize,
    /// Heads of queries and keys.
    pub key_heads: usize,
    /// Heads of values, a multiple of `key_heads`.
    pub value_heads: usize,
    /// Dimensions of a query or key.
    pub key_dim: usize,
    /// Dimensions of a value.
    pub value_dim: usize,
    /// Format of queries, keys, values and outputs.
    pub format: FloatFormat,
}

/// Buffers of [`recurrent`], all contiguous.
#[derive(Clone, Copy, Debug)]
pub struct Recurrent<'a> {
    /// `[rows, len, key_heads, key_dim]`.
    pub q: &'a Handle,
    /// `[rows, len, key_heads, key_dim]`.
    pub k: &'a Handle,
    /// `[rows, len, value_heads, value_dim]`.
    pub v: &'a Handle,
    /// f32 `[rows, len, value_heads]`.
    pub g: &'a Handle,
    /// f32 `[rows, len, value_heads]`.
    pub beta: &'a Handle,
    /// f32 `[rows, value_heads, key_dim, value_dim]`: the states, which go on.
    pub state: &'a Handle,
    /// The outputs, as `v`, which this writes.
    pub out: &'a Handle,
}

/// Outputs of rows that go on from their states, which become those behind the rows.
///
/// # Shapes
/// [`Recurrent`] has them.
///
/// # Errors
/// [`KernelError::Format`], [`KernelError::Heads`], and the variants about sizes when a buffer does not hold its shape.
pub fn recurrent(client: &Client, buffers: Recurrent<'_>, sizes: Sizes) -> Result<(), KernelError> {
    let Sizes { rows, len, key_heads, value_heads, key_dim, value_dim, format } = sizes;
    check_format(client, OPERATION, format)?;
    if key_heads == 0 || !value_heads.is_multiple_of(key_heads) {
        return Err(KernelError::Heads { heads: value_heads, kv_heads: key_heads });
    }
    let tokens = rows * len;
    let narrow = |name, handle, elements| buffer(name, handle, elements, format.size(), 1);
    let wide = |name, handle, elements| buffer(name, handle, elements, 4, 1);
    let q = narrow("q", buffers.q, tokens * key_heads * key_dim)?;
    let k = narrow("k", buffers.k, tokens * key_heads * key_dim)?;
    let v = narrow("v", buffers.v, tokens * value_heads * value_dim)?;
    let out = narrow("out", buffers.out, tokens * value_heads * value_dim)?;
    let g = wide("g", buffers.g, tokens * value_heads)?;
    let beta = wide("beta", buffers.beta, tokens * value_heads)?;
    let state = wide("state", buffers.state, rows * value_heads * key_dim * value_dim)?;
    if tokens * value_heads == 0 {
        return Ok(());
    }
    // SAFETY: the buffers' sizes are checked, and the kernel stays within them.
    unsafe {
        recurrent_kernel::launch_unchecked(
            client,
            cube_count(client, rows * value_heads),
            CubeDim::new_1d(UNITS as u32),
            q,
            k,
            v,
            g,
            beta,
            state,
            out,
            WorkLaunch::new(rows, len, key_heads, value_heads, key_dim, value_dim),
            format.elem_type(),
        );
    }
    Ok(())
}

/// What the kernel does, a head of a row a cube.
#[derive(CubeType, CubeLaunch)]
struct Work {
    rows: usize,
    len: usize,
    key_heads: usize,
    heads: usize,
    key_dim: usize,
    value_dim: usize,
}

#[cube(launch_unchecked)]
fn recurrent_kernel<F: Float>(
    q: &[F],
    k: &[F],
    v: &[F],
    g: &[f32],
    beta: &[f32],
    state: &mut [f32],
    out: &mut [F],
    work: &Work,
    #[define(F)] _format: ElemType,
) {
    let cube = CUBE_POS;
    if cube < work.rows * work.heads {
        let (row, head) = (cube / work.heads, cube % work.heads);
        let key_head = head / (work.heads / work.key_heads);
        let matrix = cube * work.key_dim * work.value_dim;
        let mut column = UNIT_POS as usize;
        while column < work.value_dim {
            for position in 0..work.len {
                let token = row * work.len + position;
                let at = token * work.heads + head;
                let keys = (token * work.key_heads + key_head) * work.key_dim;
                let decay = g[at].exp();
                let mut known = 0.0f32;
                for i in 0..work.key_dim {
                    known += decay * state[matrix + i * work.value_dim + column] * f32::cast_from(k[keys + i]);
                }
                let value = at * work.value_dim + column;
                let update = beta[at] * (f32::cast_from(v[value]) - known);
                let mut sum = 0.0f32;
                for i in 0..work.key_dim {
                    let place = matrix + i * work.value_dim + column;
                    let after = decay * state[place] + f32::cast_from(k[keys + i]) * update;
                    state[place] = after;
                    sum += after * f32::cast_from(q[keys + i]);
                }
                out[value] = F::cast_from(sum);
            }
            column += UNITS;
        }
    }
}
