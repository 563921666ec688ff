//! Causal attention over a paged key-value cache, for generation: queries of many sequences in one launch, each over
//! the blocks that its sequence owns.
//!
//! A cache is `[slots, kv_heads, head_dim]`: blocks of `block_tokens` slots, which sequences own in any order (Kwon et
//! al., 2023, arXiv 2309.06180). A [`Batch`] says which: of each row, its blocks, its length and how many of its last
//! tokens are new. [`write()`] puts the new tokens' keys or values into their slots, and [`attend`] computes
//!
//! `o = softmax(scale · q kᵀ) v`, scores by way of `cap · tanh(s / cap)` where there is a cap,
//!
//! for each new token over the tokens of its sequence that it sees: itself and what came before, or of that the last
//! `window` ([`Options`] and sinks, as in [`crate::attention`]).
//!
//! # A token's result is its own
//!
//! It depends on no other token of the batch, nor on how a prompt was cut into chunks, in a single bit: positions are
//! summed in tiles and splits whose borders are multiples of their lengths, and what is summed in which order depends
//! on the shape of a head alone. That shape and its format also choose the kernel ([`Path`]).
//!
//! # How
//!
//! - [`Path::Mma`], CUDA C++ for formats of 16 bits and heads of a multiple of 8 up to 256: `mma.rs` describes it.
//! - [`Path::Portable`] runs wherever CubeCL does. A cube of 256 units takes the query heads that share a key head, of
//!   one token in decoding and of some in a prompt's chunk, and goes through the positions in tiles of 32: scores (four
//!   units a key), their maximum and exponentials, then sums of values (a unit a few columns, and of these every few
//!   positions). Splits of 256 positions are joined in order. Where that gives too few cubes to fill a device, each split
//!   gets its own, and a second launch joins them; the bits are the same. What a token does not see is never added, not
//!   even as a zero times a value.
//!
//! Softmax and all sums are f32; the result is rounded once. `FUSED_KERNELS_PAGED_ATTENTION` forces a path, `mma` or
//! `portable`, where it can be taken.

mod batch;
mod kernel;
mod mma;
pub mod oracle;
mod portable;
mod write;

use cubecl::client::Client;
use cubecl::server::Handle;
use cuda_source::{Choices, FloatFormat};

use crate::KernelError;
pub use crate::attention::Options;
use crate::elementwise::{buffer, check_format, vector_size};
pub use batch::{Batch, Row, slot};

const OPERATION: &str = "paged_attention";
/// The widest head: that of latent attention is the latent vector with what is rotated behind it, 576 in DeepSeek V3.
pub const MAX_HEAD_DIM: usize = 1024;
/// Bytes of partial results that splits may take.
const MAX_PARTIAL: usize = 64 << 20;

/// The dimensions of one attention beside those of its batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads, a divisor of `heads`.
    pub kv_heads: usize,
    /// Dimensions of a head, up to [`MAX_HEAD_DIM`].
    pub head_dim: usize,
    /// Slots of the cache.
    pub slots: usize,
    /// Format of queries, cache and result.
    pub format: FloatFormat,
}

/// Buffers of [`write()`].
#[derive(Clone, Copy, Debug)]
pub struct Write<'a> {
    /// `[tokens, width]`: the keys or the values of the new tokens.
    pub new: &'a Handle,
    /// `[slots, width]`, which this writes, where the batch says so.
    pub cache: &'a Handle,
    /// [`Batch::words`] on the device.
    pub words: &'a Handle,
}

/// Puts new tokens' keys or values, `width` elements each, into a cache of `slots` slots.
///
/// # Errors
/// [`KernelError::Format`], and the variants about sizes when a buffer does not hold its shape, or the batch names
/// slots that the cache does not have.
pub fn write(
    client: &Client,
    buffers: Write<'_>,
    batch: &Batch,
    slots: usize,
    width: usize,
    format: FloatFormat,
) -> Result<(), KernelError> {
    check_format(client, OPERATION, format)?;
    check_reach(batch, slots)?;
    let vector = vector_size(client, format, &[width]);
    let argument =
        |name, handle, tokens: usize| buffer(name, handle, tokens.saturating_mul(width), format.size(), vector);
    let (new, cache) = (argument("new", buffers.new, batch.tokens())?, argument("cache", buffers.cache, slots)?);
    let words = buffer("words", buffers.words, batch.num_words(), 4, 1)?;
    let items = batch.tokens() * width / vector;
    if items == 0 {
        return Ok(());
    }
    write::write(client, vector, new, cache, words, items, width / vector, format);
    Ok(())
}

/// Buffers of [`attend`].
#[derive(Clone, Copy, Debug)]
pub struct Attend<'a> {
    /// `[tokens, heads, head_dim]`.
    pub q: &'a Handle,
    /// `[slots, kv_heads, head_dim]`, the new tokens' keys in it.
    pub keys: &'a Handle,
    /// As the keys.
    pub values: &'a Handle,
    /// [`Batch::words`] on the device.
    pub words: &'a Handle,
    /// f32 `[heads]`: the sink of each query head, if they have some.
    pub sinks: Option<&'a Handle>,
    /// The result, as `q`, which this writes.
    pub out: &'a Handle,
}

/// The kernels that attend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Path {
    /// CubeCL, on every runtime.
    Portable,
    /// CUDA C++ on tensor cores, from compute capability 8.0 on: formats of 16 bits, heads of a multiple of 8 up to 256.
    Mma,
}

/// The kernels that can take a shape on a client's device, by preference.
pub fn paths(client: &Client, shape: &Shape) -> Vec<Path> {
    let mma = mma::takes(client, shape).then_some(Path::Mma);
    mma.into_iter().chain([Path::Portable]).collect()
}

/// The path of a shape. It depends on nothing else, so that a token's bits don't.
fn path(client: &Client, shape: &Shape) -> Path {
    static CHOICES: Choices<(Path, Shape)> = Choices::new("FUSED_KERNELS_PAGED_ATTENTION");
    let path = choose(mma::takes(client, shape), CHOICES.forced());
    if tracing::enabled!(tracing::Level::DEBUG) && CHOICES.is_new((path, *shape)) {
        let &Shape { heads, kv_heads, head_dim, format, .. } = shape;
        tracing::debug!(heads, kv_heads, head_dim, ?format, ?path, "attention over a paged cache");
    }
    path
}

fn choose(takes_mma: bool, forced: Option<&str>) -> Path {
    let candidates = || takes_mma.then_some(("mma", Path::Mma)).into_iter().chain([("portable", Path::Portable)]);
    // A forced kernel that does not take the shape leaves the choice to the rule.
    let chosen = cuda_source::choose(candidates(), forced).or_else(|| cuda_source::choose(candidates(), None));
    chosen.unwrap_or(Path::Portable)
}

/// The attention of each new token over its sequence.
///
/// # Errors
/// [`KernelError::Format`]; [`KernelError::Shape`] for a head wider than [`MAX_HEAD_DIM`]; [`KernelError::Heads`];
/// [`KernelError::Attention`] for options out of range; [`KernelError::Alignment`] for a buffer of [`Path::Mma`] that
/// does not start at a multiple of 16 bytes; and the variants about sizes.
pub fn attend(
    client: &Client,
    buffers: Attend<'_>,
    batch: &Batch,
    shape: &Shape,
    options: Options,
) -> Result<(), KernelError> {
    attend_on(client, path(client, shape), buffers, batch, shape, options)
}

/// As [`attend`], by a kernel of the caller's choice among [`paths`].
///
/// # Errors
/// As [`attend`]; [`KernelError::Unsupported`] or [`KernelError::HeadDim`] where the kernel does not take the shape.
pub fn attend_on(
    client: &Client,
    path: Path,
    buffers: Attend<'_>,
    batch: &Batch,
    shape: &Shape,
    options: Options,
) -> Result<(), KernelError> {
    check(client, shape, options)?;
    let call = Call { client, buffers, batch, shape, options };
    match path {
        Path::Portable => portable::attend(&call, None),
        Path::Mma => mma::attend(&call, None),
    }
}

/// How the work is divided among cubes, and whose. It changes no bit of a kernel's result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Division {
    /// Of [`Path::Portable`].
    Portable {
        /// Whether each split of a context has a cube of its own.
        splits_apart: bool,
        /// How many tokens of a row share a cube.
        tokens: usize,
    },
    /// Of [`Path::Mma`].
    Mma {
        /// Whether a share is of whole sections of 16 splits, instead of single ones.
        whole_sections: bool,
        /// How many eights of queries share a cube: 1, or 2 where a head is at most 128 wide.
        query_tiles: usize,
        /// Cubes of a launch.
        cubes: usize,
    },
}

/// As [`attend`], divided as the caller wants it.
///
/// # Errors
/// As [`attend_on`]; [`KernelError::Attention`] for a division that the kernel can't have.
pub fn attend_by(
    client: &Client,
    buffers: Attend<'_>,
    batch: &Batch,
    shape: &Shape,
    options: Options,
    division: Division,
) -> Result<(), KernelError> {
    check(client, shape, options)?;
    let call = Call { client, buffers, batch, shape, options };
    match division {
        Division::Portable { splits_apart, tokens } => portable::attend(&call, Some((splits_apart, tokens))),
        Division::Mma { whole_sections, query_tiles, cubes } => {
            mma::attend(&call, Some(mma::Division { whole_sections, query_tiles, cubes }))
        }
    }
}

/// An attention whose shape and options were checked.
struct Call<'a> {
    client: &'a Client,
    buffers: Attend<'a>,
    batch: &'a Batch,
    shape: &'a Shape,
    options: Options,
}

impl Call<'_> {
    /// The sinks, or some buffer in their place that kernels don't look at.
    fn sinks(&self) -> Result<cubecl::prelude::BufferArg, KernelError> {
        match self.buffers.sinks {
            Some(sinks) => buffer("sinks", sinks, self.shape.heads, 4, 1),
            None => buffer("words", self.buffers.words, 0, 4, 1),
        }
    }
}

fn check_limit(name: &'static str, value: usize, limit: usize) -> Result<(), KernelError> {
    if value > limit { Err(KernelError::TooLarge { name, value, limit }) } else { Ok(()) }
}

pub(crate) fn check_reach(batch: &Batch, slots: usize) -> Result<(), KernelError> {
    check_limit("slots of the batch's blocks", batch.reach(), slots)
}

/// Fails on heads and options that no kernel takes.
fn check(client: &Client, shape: &Shape, options: Options) -> Result<(), KernelError> {
    check_format(client, OPERATION, shape.format)?;
    let &Shape { heads, kv_heads, head_dim, .. } = shape;
    if head_dim == 0 || head_dim > MAX_HEAD_DIM {
        let reason = format!("head_dim is {head_dim}: the kernel takes 1 to {MAX_HEAD_DIM}");
        return Err(KernelError::Shape { operation: OPERATION, reason });
    }
    if kv_heads == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) {
        return Err(KernelError::Heads { heads, kv_heads });
    }
    let wrong = |name, value: f32| {
        Err(KernelError::Attention { name, value: value.to_string(), reason: "it must be positive and finite" })
    };
    let positive = |x: f32| x.is_finite() && x > 0.0;
    match options {
        Options { scale, .. } if !positive(scale) => wrong("scale", scale),
        Options { softcap: Some(cap), .. } if !positive(cap) => wrong("softcap", cap),
        Options { window: Some(0), .. } => Err(KernelError::Attention {
            name: "window",
            value: "0".to_owned(),
            reason: "a query sees itself at least",
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forced_choice_is_taken_where_it_can_be() {
        assert_eq!([true, false].map(|takes| choose(takes, None)), [Path::Mma, Path::Portable]);
        assert_eq!(choose(true, Some("portable")), Path::Portable);
        assert_eq!([true, false].map(|takes| choose(takes, Some("mma"))), [Path::Mma, Path::Portable]);
    }
}
