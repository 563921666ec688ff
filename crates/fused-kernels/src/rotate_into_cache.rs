//! What lies between the projections of attention and attention over a paged cache: queries and new keys are rotated
//! ([`rope`](crate::rope)), and keys and values are written into their slots ([`paged_attention::write`]).
//!
//! In generation each of these four is a launch for one token of each row. Here they are one, with the same results, bit for bit.

use cubecl::CubeDim;
use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;
use cuda_source::FloatFormat;

use crate::KernelError;
use crate::elementwise::{UNITS, buffer, check_format, cube_count, vector_size};
use crate::paged_attention::{self, Batch};

const OPERATION: &str = "rotate_into_cache";

/// The heads of new tokens and of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads of a token.
    pub heads: usize,
    /// Key heads of a token, and value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Elements of a head that are rotated, the first ones; even, and not 0.
    pub rotary: usize,
    /// Slots of the cache.
    pub slots: usize,
    /// Format of everything but the tables.
    pub format: FloatFormat,
}

/// Buffers of [`rotate_into_cache`].
#[derive(Clone, Copy, Debug)]
pub struct Buffers<'a> {
    /// `[tokens, heads, head_dim]`.
    pub q: &'a Handle,
    /// `[tokens, kv_heads, head_dim]`.
    pub k: &'a Handle,
    /// As `k`.
    pub v: &'a Handle,
    /// f32 `[tokens, rotary / 2]`.
    pub cos: &'a Handle,
    /// As `cos`.
    pub sin: &'a Handle,
    /// [`Batch::words`] on the device.
    pub words: &'a Handle,
    /// The rotated queries, as `q`, which this writes.
    pub out: &'a Handle,
    /// `[slots, kv_heads, head_dim]`, of which this writes the new tokens' slots.
    pub keys: &'a Handle,
    /// As `keys`.
    pub values: &'a Handle,
}

/// Rotates the queries and keys of a batch's new tokens, and writes keys and values into the cache.
///
/// # Errors
/// [`KernelError::Format`]; [`KernelError::Shape`] for a `rotary` that is odd, 0 or too large; the variants about sizes when a
/// buffer does not hold its shape, or the batch names slots that the cache does not have.
pub fn rotate_into_cache(
    client: &Client,
    buffers: Buffers<'_>,
    batch: &Batch,
    shape: &Heads,
) -> Result<(), KernelError> {
    let Heads { heads, kv_heads, head_dim, rotary, slots, format } = *shape;
    check_format(client, OPERATION, format)?;
    paged_attention::check_reach(batch, slots)?;
    if rotary == 0 || !rotary.is_multiple_of(2) || rotary > head_dim {
        let reason = format!("{rotary} of {head_dim} elements of a head can't be paired");
        return Err(KernelError::Shape { operation: OPERATION, reason });
    }
    let tokens = batch.tokens();
    let vector = vector_size(client, format, &[rotary / 2, head_dim]);
    let argument = |name, handle, rows: usize, heads: usize| {
        buffer(name, handle, rows.saturating_mul(heads * head_dim), format.size(), vector)
    };
    let (q, out) = (argument("q", buffers.q, tokens, heads)?, argument("out", buffers.out, tokens, heads)?);
    let (k, v) = (argument("k", buffers.k, tokens, kv_heads)?, argument("v", buffers.v, tokens, kv_heads)?);
    let keys = argument("keys", buffers.keys, slots, kv_heads)?;
    let values = argument("values", buffers.values, slots, kv_heads)?;
    let table = |name, handle| buffer(name, handle, tokens * rotary / 2, 4, 1);
    let (cos, sin) = (table("cos", buffers.cos)?, table("sin", buffers.sin)?);
    let words = buffer("words", buffers.words, batch.num_words(), 4, 1)?;
    // Of each query and key head, in vectors: pairs, then what is not rotated.
    let turned = tokens * (heads + kv_heads) * ((head_dim - rotary / 2) / vector);
    let items = turned + tokens * kv_heads * (head_dim / vector);
    if items == 0 {
        return Ok(());
    }
    // SAFETY: the buffers' sizes are checked, every slot lies within the cache, and the kernel stays within `items`.
    unsafe {
        kernel::launch_unchecked(
            client,
            cube_count(client, items.div_ceil(UNITS)),
            CubeDim::new_1d(UNITS as u32),
            vector,
            q,
            k,
            v,
            cos,
            sin,
            words,
            out,
            keys,
            values,
            WorkLaunch::new(items, turned, heads, kv_heads, head_dim / vector, rotary / 2 / vector),
            format.elem_type(),
        );
    }
    Ok(())
}

/// What the kernel does: a pair of vectors, a vector that is not rotated, or a vector of values, a unit. Lengths of heads are
/// in vectors.
#[derive(CubeType, CubeLaunch)]
struct Work {
    items: usize,
    turned: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    half: usize,
}

#[cube(launch_unchecked)]
fn kernel<F: Float, N: Size>(
    q: &[Vector<F, N>],
    k: &[Vector<F, N>],
    v: &[Vector<F, N>],
    cos: &[f32],
    sin: &[f32],
    words: &[u32],
    out: &mut [Vector<F, N>],
    keys: &mut [Vector<F, N>],
    values: &mut [Vector<F, N>],
    work: &Work,
    #[define(F)] _format: ElemType,
) {
    let vector = N::value().comptime();
    let item = ABSOLUTE_POS;
    let (head_dim, half, heads, kv_heads) = (work.head_dim, work.half, work.heads, work.kv_heads);
    if item < work.turned {
        let per_head = head_dim - half;
        let (index, i) = (item / per_head, item % per_head);
        let (token, head) = (index / (heads + kv_heads), index % (heads + kv_heads));
        let angle = (token * half + i) * vector;
        if head < heads {
            let at = (token * heads + head) * head_dim + i;
            if i < half {
                out[at] = turned::<F, N>(q[at], q[at + half], cos, sin, angle, true);
                out[at + half] = turned::<F, N>(q[at], q[at + half], cos, sin, angle, false);
            } else {
                out[at + half] = q[at + half];
            }
        } else {
            let from = (token * kv_heads + head - heads) * head_dim + i;
            let to = (words[token] as usize * kv_heads + head - heads) * head_dim + i;
            if i < half {
                keys[to] = turned::<F, N>(k[from], k[from + half], cos, sin, angle, true);
                keys[to + half] = turned::<F, N>(k[from], k[from + half], cos, sin, angle, false);
            } else {
                keys[to + half] = k[from + half];
            }
        }
    } else if item < work.items {
        let width = kv_heads * head_dim;
        let index = item - work.turned;
        values[words[index / width] as usize * width + index % width] = v[index];
    }
}

/// The first or the second vector of a pair, rotated.
#[cube]
fn turned<F: Float, N: Size>(
    left: Vector<F, N>,
    right: Vector<F, N>,
    cos: &[f32],
    sin: &[f32],
    angle: usize,
    #[comptime] is_first: bool,
) -> Vector<F, N> {
    let mut turned = Vector::<F, N>::empty();
    #[unroll]
    for j in 0..N::value().comptime() {
        let (c, s) = (cos[angle + j], sin[angle + j]);
        let (a, b) = (f32::cast_from(left.extract(j)), f32::cast_from(right.extract(j)));
        if is_first {
            turned.insert(j, F::cast_from(a * c - b * s));
        } else {
            turned.insert(j, F::cast_from(b * c + a * s));
        }
    }
    turned
}
