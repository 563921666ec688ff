//! Rotary position embeddings (Su et al., 2021, arXiv 2104.09864, equation 34) in the half-split layout of
//! Hugging Face checkpoints: of each head, element i and element i + rotary/2 are a pair and are rotated by one angle.
//!
//! ```text
//! y[i]            = x[i] cos − x[i + rotary/2] sin
//! y[i + rotary/2] = x[i + rotary/2] cos + x[i] sin
//! ```
//!
//! In f32, rounded once. Elements beyond `rotary` pass unchanged. The backward pass is the rotation by the
//! opposite angle: the same kernel with [`Rotation::inverse`].
//!
//! The tensor is token-major, `[tokens, heads, head_dim]`, as projections write it, so no transposition is needed
//! before or after. A unit does one pair. Bytes per element of 16 bits: 4, and the tables once per token.

use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::KernelError;
use crate::elementwise::{Matrix, UNITS, buffer, check_format, cube_count, vector_size};

const OPERATION: &str = "rope";

/// Which elements a rotation pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotation {
    /// Tokens of a sequence: rows of the tables.
    pub len: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Elements of a head that are rotated, the first ones; even.
    pub rotary: usize,
    /// Rotates by the opposite angles: the backward pass of a rotation.
    pub inverse: bool,
}

/// Buffers of [`rotate`].
#[derive(Clone, Copy, Debug)]
pub struct Buffers<'a> {
    /// `[tokens, heads * head_dim]`, sequences one after the other.
    pub x: &'a Handle,
    /// f32 `[len, rotary / 2]`.
    pub cos: &'a Handle,
    /// f32 `[len, rotary / 2]`.
    pub sin: &'a Handle,
    /// The rotated tensor, as `x`, which this writes.
    pub out: &'a Handle,
}

/// Rotates each pair by its angle. `tokens` is the shape of `x`: a row has the heads of one token.
///
/// # Shapes
/// [`Buffers`] has them.
///
/// # Errors
/// [`KernelError::Format`], [`KernelError::Shape`] for an odd or too large `rotary`, tokens that are no whole sequences
/// or rows that are no whole heads, and the variants about sizes when a buffer does not hold its shape.
pub fn rotate(client: &Client, buffers: Buffers<'_>, tokens: Matrix, rotation: Rotation) -> Result<(), KernelError> {
    let Matrix { rows, width, format } = tokens;
    check_format(client, OPERATION, format)?;
    let Rotation { len, head_dim, rotary, inverse } = rotation;
    let wrong = |reason| Err(KernelError::Shape { operation: OPERATION, reason });
    if !rotary.is_multiple_of(2) || rotary > head_dim {
        return wrong(format!("{rotary} of {head_dim} elements of a head can't be paired"));
    }
    if len == 0 || !rows.is_multiple_of(len) {
        return wrong(format!("{rows} tokens are no whole sequences of {len}"));
    }
    if head_dim == 0 || !width.is_multiple_of(head_dim) {
        return wrong(format!("{width} elements of a token are no whole heads of {head_dim}"));
    }
    let elements = tokens.elements();
    let vector = vector_size(client, format, &[rotary / 2, head_dim]);
    let argument = |name, handle| buffer(name, handle, elements, format.size(), vector);
    let (x, out) = (argument("x", buffers.x)?, argument("out", buffers.out)?);
    let table = |name, handle| buffer(name, handle, len * rotary / 2, 4, 1);
    let (cos, sin) = (table("cos", buffers.cos)?, table("sin", buffers.sin)?);
    if elements == 0 {
        return Ok(());
    }
    let heads = width / head_dim;
    // Of each head, in vectors: pairs, then what is not rotated.
    let items = rows * heads * ((head_dim - rotary / 2) / vector);
    let sign = if inverse { -1.0 } else { 1.0 };
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
            WorkLaunch::new(items, len, heads, head_dim / vector, rotary / 2 / vector, sign),
            format.elem_type(),
        );
    }
    Ok(())
}

/// What the kernel does, a pair of vectors, or a vector that is not rotated, a unit. Lengths of heads are in vectors.
#[derive(CubeType, CubeLaunch)]
struct Work {
    items: usize,
    len: usize,
    heads: usize,
    head_dim: usize,
    half: usize,
    /// Of the angles.
    sign: f32,
}

#[cube(launch_unchecked)]
fn rotate_kernel<F: Float, N: Size>(
    x: &[Vector<F, N>],
    cos: &[f32],
    sin: &[f32],
    out: &mut [Vector<F, N>],
    work: &Work,
    #[define(F)] _format: ElemType,
) {
    let vector = N::value().comptime();
    let item = ABSOLUTE_POS;
    if item < work.items {
        let (head_dim, half) = (work.head_dim, work.half);
        let per_head = head_dim - half;
        let (head, i) = (item / per_head, item % per_head);
        let first = head * head_dim + i;
        if i < half {
            let angle = ((head / work.heads % work.len) * half + i) * vector;
            let (left, right) = (x[first], x[first + half]);
            let mut turned_left = Vector::<F, N>::empty();
            let mut turned_right = Vector::<F, N>::empty();
            #[unroll]
            for j in 0..vector {
                let (c, s) = (cos[angle + j], sin[angle + j] * work.sign);
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

/// The scalar oracle, in f64, of `x` `[tokens, heads * head_dim]`.
///
/// # Shapes
/// As [`rotate`]'s.
pub fn oracle(x: &[f64], cos: &[f64], sin: &[f64], heads: usize, rotation: Rotation) -> Vec<f64> {
    let Rotation { len, head_dim, rotary, inverse } = rotation;
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
