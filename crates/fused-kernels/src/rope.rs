//! Rotary position embeddings (Su et al., 2021, arXiv 2104.09864, equation 34) in the half-split layout of
//! Hugging Face checkpoints: of each head, element i and element i + rotary/2 are a pair and turn by one angle.
//!
//! ```text
//! y[i]            = x[i] cos − x[i + rotary/2] sin
//! y[i + rotary/2] = x[i + rotary/2] cos + x[i] sin
//! ```
//!
//! In f32, rounded once. Elements beyond `rotary` pass unchanged. The backward pass is the turn by the opposite
//! angle: the same kernel with `inverse`.
//!
//! The tensor is token-major, `[tokens, heads, head_dim]`, as projections write it, so no transposition is needed
//! before or after. A unit does one pair. Bytes per element of 16 bits: 4, and the tables once per token.

use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::elementwise::{UNITS, buffer, check_format, cube_count, vector_size};
use crate::{Format, KernelError};

const OPERATION: &str = "rope";

/// The dimensions of a rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rope {
    /// Rows of the tensor: sequences of `len` tokens, one after the other.
    pub tokens: usize,
    /// Tokens of a sequence: rows of the tables.
    pub len: usize,
    /// Heads of a token.
    pub heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Elements of a head that turn, the first ones; even.
    pub rotary: usize,
}

/// Turns each pair by its angle, or back.
///
/// # Shapes
/// - `x`, `out`: `[tokens, heads, head_dim]` of `format`, contiguous
/// - `cos`, `sin`: f32 `[len, rotary / 2]`
///
/// # Errors
/// [`KernelError::Format`], [`KernelError::Shape`] for an odd or too large `rotary` or tokens that are no whole
/// sequences, and the variants about sizes when a buffer does not hold its shape.
#[allow(clippy::too_many_arguments)]
pub fn rotate(
    client: &Client,
    x: &Handle,
    cos: &Handle,
    sin: &Handle,
    out: &Handle,
    rope: Rope,
    inverse: bool,
    format: Format,
) -> Result<(), KernelError> {
    check_format(client, OPERATION, format)?;
    let Rope { tokens, len, heads, head_dim, rotary } = rope;
    if !rotary.is_multiple_of(2) || rotary > head_dim {
        let reason = format!("{rotary} of {head_dim} elements of a head can't be paired");
        return Err(KernelError::Shape { operation: OPERATION, reason });
    }
    if len == 0 || !tokens.is_multiple_of(len) {
        let reason = format!("{tokens} tokens are no whole sequences of {len}");
        return Err(KernelError::Shape { operation: OPERATION, reason });
    }
    let elements = tokens.saturating_mul(heads * head_dim);
    let vector = vector_size(client, format, &[rotary / 2, head_dim]);
    let argument = |name, handle| buffer(name, handle, elements, format.size(), vector);
    let (x, out) = (argument("x", x)?, argument("out", out)?);
    let (cos, sin) = (buffer("cos", cos, len * rotary / 2, 4, 1)?, buffer("sin", sin, len * rotary / 2, 4, 1)?);
    if elements == 0 {
        return Ok(());
    }
    // Of each head, in vectors: pairs, then what does not turn.
    let items = tokens * heads * ((head_dim - rotary / 2) / vector);
    // SAFETY: the buffers' sizes are checked, and the kernel stays within `items`.
    unsafe {
        rotate_kernel::launch_unchecked(
            client,
            cube_count(client, items.div_ceil(UNITS)),
            CubeDim::new_1d(UNITS as u32),
            vector,
            x,
            cos,
            sin,
            out,
            items,
            len,
            heads,
            head_dim / vector,
            rotary / 2 / vector,
            if inverse { -1.0 } else { 1.0 },
            format.elem_type(),
        );
    }
    Ok(())
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn rotate_kernel<F: Float, N: Size>(
    x: &[Vector<F, N>],
    cos: &[f32],
    sin: &[f32],
    out: &mut [Vector<F, N>],
    items: usize,
    len: usize,
    heads: usize,
    head_dim: usize,
    half: usize,
    sign: f32,
    #[define(F)] _format: ElemType,
) {
    // Lengths of heads are in vectors.
    let vector = N::value().comptime();
    let item = ABSOLUTE_POS;
    if item < items {
        let per_head = head_dim - half;
        let (head, i) = (item / per_head, item % per_head);
        let first = head * head_dim + i;
        if i < half {
            let angle = ((head / heads % len) * half + i) * vector;
            let (left, right) = (x[first], x[first + half]);
            let mut turned_left = Vector::<F, N>::empty();
            let mut turned_right = Vector::<F, N>::empty();
            #[unroll]
            for j in 0..vector {
                let (c, s) = (cos[angle + j], sin[angle + j] * sign);
                let (a, b) = (f32::cast_from(left.extract(j)), f32::cast_from(right.extract(j)));
                turned_left.insert(j, F::cast_from(a * c - b * s));
                turned_right.insert(j, F::cast_from(b * c + a * s));
            }
            out[first] = turned_left;
            out[first + half] = turned_right;
        } else {
            out[first + half] = x[first + half];
        }
    }
}

/// The scalar oracle, in f64.
///
/// # Shapes
/// As [`rotate`]'s.
pub fn oracle(x: &[f64], cos: &[f64], sin: &[f64], rope: Rope, inverse: bool) -> Vec<f64> {
    let Rope { len, heads, head_dim, rotary, .. } = rope;
    let half = rotary / 2;
    let mut out = x.to_vec();
    for (index, head) in out.chunks_mut(head_dim).enumerate() {
        let position = index / heads % len;
        for i in 0..half {
            let (c, s) = (cos[position * half + i], sin[position * half + i] * if inverse { -1.0 } else { 1.0 });
            let (a, b) = (head[i], head[i + half]);
            (head[i], head[i + half]) = (a * c - b * s, b * c + a * s);
        }
    }
    out
}
