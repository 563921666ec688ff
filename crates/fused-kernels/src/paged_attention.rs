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
//! `window` ([`Options`], as in [`crate::attention`]).
//!
//! # A token's result is its own
//!
//! It depends on no other token of the batch, nor on how a prompt was cut into chunks, in a single bit: positions are
//! summed in tiles of 32 and splits of 256 whose borders are multiples of these, tiles by the online softmax, splits
//! joined in order, and within a tile by a tree that depends on the shape of a head alone. What a token does not see
//! is never added, not even as a zero times a value.
//!
//! # How
//!
//! A cube of 256 units takes the query heads that share a key head, of one token in decoding and of some in a
//! prompt's chunk, and goes through the positions tile by tile: scores (four units a key), their maximum and
//! exponentials, then sums of values (a unit a few columns, and of these every few positions). Where that gives too few
//! cubes to fill a device, each split of 256 positions gets its own, and a second launch joins them; the bits are the
//! same. There are no matrix instructions: in decoding each key serves few queries, and memory is the bound; a long
//! prompt's first pass would gain from them.
//!
//! Softmax and all sums are f32; the result is rounded once. It runs wherever CubeCL does.

mod kernel;
pub mod oracle;

use cubecl::CubeDim;
use cubecl::client::Client;
use cubecl::server::Handle;
use cuda_source::FloatFormat;

use crate::KernelError;
pub use crate::attention::Options;
use crate::elementwise::{UNITS, buffer, check_format, cube_count, vector_size};
use kernel::{Plan, SPLIT};

const OPERATION: &str = "paged_attention";
/// The widest head.
pub const MAX_HEAD_DIM: usize = 256;
/// Bytes of partial results that splits may take.
const MAX_PARTIAL: usize = 64 << 20;
/// Cubes that fill a device: with as many, splits stay in one cube.
const ENOUGH_CUBES: usize = 1024;

/// A sequence of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row<'a> {
    /// Blocks of the cache, in the order of its tokens.
    pub blocks: &'a [u32],
    /// Its tokens, the new ones included.
    pub len: usize,
    /// How many of the last tokens are new: those of this batch.
    pub new: usize,
}

/// What the rows of a batch look at. Built on the host once a pass, for all layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    block_tokens: usize,
    max_blocks: usize,
    /// `[rows, max_blocks]`; unused entries are 0.
    tables: Vec<u32>,
    /// `[rows + 1]`.
    starts: Vec<u32>,
    /// `[rows]`.
    lens: Vec<u32>,
    /// `[tokens]`.
    slots: Vec<u32>,
    /// Slots that a cache must have.
    reach: usize,
    /// What launches are planned for, at least the largest length.
    max_len: usize,
}

impl Batch {
    /// The rows of a batch over a cache of blocks of `block_tokens` tokens. The new tokens of all rows lie one after the
    /// other in the batch. Rows may share blocks that they only read.
    ///
    /// # Errors
    /// [`KernelError::Attention`] when a row has fewer tokens than new ones, fewer blocks than its tokens fill, or
    /// blocks hold no token; [`KernelError::TooLarge`] when slots exceed 32 bits.
    pub fn new(rows: &[Row<'_>], block_tokens: usize) -> Result<Self, KernelError> {
        Self::with_room(rows, block_tokens, 0)
    }

    /// [`new`](Self::new) with room for sequences of `max_len` tokens: batches of as many rows and new tokens of each have
    /// [words](Self::words) of one layout, and the same launches, up to that length. A recorded pass is replayed so.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_room(rows: &[Row<'_>], block_tokens: usize, max_len: usize) -> Result<Self, KernelError> {
        let wrong = |name, value: String, reason| Err(KernelError::Attention { name, value, reason });
        if block_tokens == 0 {
            return wrong("block_tokens", "0".to_owned(), "a block holds at least one token");
        }
        let max_len = rows.iter().map(|row| row.len).max().unwrap_or(0).max(max_len);
        let max_blocks = max_len.div_ceil(block_tokens);
        let mut batch = Self {
            block_tokens,
            max_blocks,
            tables: vec![0; rows.len() * max_blocks],
            starts: vec![0],
            lens: Vec::with_capacity(rows.len()),
            slots: Vec::new(),
            reach: 0,
            max_len,
        };
        for (number, &Row { blocks, len, new }) in rows.iter().enumerate() {
            let used = len.div_ceil(block_tokens);
            if new > len {
                return wrong("row", format!("{new} new tokens of {len}"), "the new tokens are among all of them");
            }
            if used > blocks.len() {
                let value = format!("{len} tokens in {} blocks of {block_tokens}", blocks.len());
                return wrong("row", value, "its blocks hold all of its tokens");
            }
            let blocks = &blocks[..used];
            let reach = blocks.iter().max().map_or(0, |block| (*block as usize + 1).saturating_mul(block_tokens));
            batch.reach = batch.reach.max(reach);
            check_limit("slots", batch.reach, i32::MAX as usize)?;
            check_limit("tokens of a row", len, i32::MAX as usize)?;
            batch.tables[number * max_blocks..][..used].copy_from_slice(blocks);
            batch.lens.push(len as u32);
            batch.slots.extend((len - new..len).map(|position| slot(blocks, position, block_tokens) as u32));
            batch.starts.push(batch.slots.len() as u32);
        }
        check_limit("tables", batch.tables.len(), i32::MAX as usize)?;
        Ok(batch)
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.lens.len()
    }

    /// New tokens of all rows.
    pub fn tokens(&self) -> usize {
        self.slots.len()
    }

    /// Tokens of a block.
    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// `[rows, max_blocks]`: the blocks of each row; unused entries are 0.
    pub fn tables(&self) -> &[u32] {
        &self.tables
    }

    /// The blocks of one row.
    pub fn table(&self, row: usize) -> &[u32] {
        &self.tables[row * self.max_blocks..][..self.max_blocks]
    }

    /// `[rows + 1]`: where the new tokens of each row begin in the batch, and their number.
    pub fn starts(&self) -> &[u32] {
        &self.starts
    }

    /// `[rows]`: tokens of each row's sequence, the new ones included.
    pub fn lens(&self) -> &[u32] {
        &self.lens
    }

    /// `[tokens]`: where the key and value of each new token go.
    pub fn slots(&self) -> &[u32] {
        &self.slots
    }

    /// The largest number of new tokens of a row.
    pub fn max_new(&self) -> usize {
        self.starts.windows(2).map(|pair| (pair[1] - pair[0]) as usize).max().unwrap_or(0)
    }

    /// The largest length of a row, or the one that there is room for.
    pub fn max_len(&self) -> usize {
        self.max_len
    }

    /// Slots that a cache must have to hold every block that is named.
    pub fn reach(&self) -> usize {
        self.reach
    }

    /// What kernels read: slots, starts, lengths and tables in one buffer, so that a pass uploads once.
    pub fn words(&self) -> Vec<u32> {
        [&self.slots[..], &self.starts, &self.lens, &self.tables].concat()
    }

    /// The number of words.
    pub fn num_words(&self) -> usize {
        self.slots.len() + self.starts.len() + self.lens.len() + self.tables.len()
    }
}

/// Where the token at `position` of a sequence with these blocks lies in the cache.
#[inline]
pub fn slot(blocks: &[u32], position: usize, block_tokens: usize) -> usize {
    blocks[position / block_tokens] as usize * block_tokens + position % block_tokens
}

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
    kernel::write(client, vector, new, cache, words, items, width / vector, format);
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
    /// The result, as `q`, which this writes.
    pub out: &'a Handle,
}

/// The attention of each new token over its sequence: one launch, or two where positions are split among cubes.
///
/// # Errors
/// [`KernelError::Format`]; [`KernelError::Shape`] for a head wider than [`MAX_HEAD_DIM`]; [`KernelError::Heads`];
/// [`KernelError::Attention`] for options out of range; and the variants about sizes.
pub fn attend(
    client: &Client,
    buffers: Attend<'_>,
    batch: &Batch,
    shape: &Shape,
    options: Options,
) -> Result<(), KernelError> {
    let plan = Plan::new(client, batch, shape, options)?;
    let split = plan.splits_among_cubes(batch, shape);
    launch(client, buffers, batch, shape, options, plan, split)
}

/// How the work is divided among cubes. It changes no bit of the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Division {
    /// Whether each split of a context has a cube of its own.
    pub splits_apart: bool,
    /// How many tokens of a row share a cube.
    pub tokens: usize,
}

/// As [`attend`], divided as the caller wants it.
///
/// # Errors
/// As [`attend`]; [`KernelError::Attention`] for more tokens than a cube of the device holds.
pub fn attend_by(
    client: &Client,
    buffers: Attend<'_>,
    batch: &Batch,
    shape: &Shape,
    options: Options,
    division: Division,
) -> Result<(), KernelError> {
    let plan = Plan::new(client, batch, shape, options)?.with_tokens(division.tokens);
    if division.tokens == 0 || !plan.fits(client) {
        let value = division.tokens.to_string();
        let reason = "as many as shared memory holds the queries of, and at least one";
        return Err(KernelError::Attention { name: "tokens of a cube", value, reason });
    }
    launch(client, buffers, batch, shape, options, plan, division.splits_apart)
}

fn launch(
    client: &Client,
    buffers: Attend<'_>,
    batch: &Batch,
    shape: &Shape,
    options: Options,
    plan: Plan,
    split: bool,
) -> Result<(), KernelError> {
    let &Shape { heads, kv_heads, head_dim, slots, format } = shape;
    check_reach(batch, slots)?;
    let argument = |name, handle, tokens: usize, heads: usize, vector| {
        buffer(name, handle, tokens.saturating_mul(heads * head_dim), format.size(), vector)
    };
    let tokens = batch.tokens();
    let (wide, narrow) = plan.vectors();
    let q = argument("q", buffers.q, tokens, heads, 1)?;
    let out = || argument("out", buffers.out, tokens, heads, 1);
    let keys = argument("keys", buffers.keys, slots, kv_heads, wide)?;
    let values = argument("values", buffers.values, slots, kv_heads, narrow)?;
    let words = || buffer("words", buffers.words, batch.num_words(), 4, 1);
    if tokens == 0 {
        return Ok(());
    }
    let splits = if split { batch.max_len().div_ceil(SPLIT) } else { 1 };
    let cubes = plan.cubes(batch, shape).saturating_mul(splits);
    check_limit("cubes", cubes, i32::MAX as usize)?;
    let partial_len = if split { splits.saturating_mul(tokens * heads * (head_dim + 2)) } else { 1 };
    let partial_handle = client.empty(4 * partial_len);
    let partial = || buffer("partial", &partial_handle, partial_len, 4, 1);
    let work = plan.work(batch, shape, options, splits, split);
    // SAFETY: the buffers' sizes are checked; tables and slots stay below `reach`, which is within the cache, and the
    // kernel stays within the batch's tokens and lengths.
    unsafe {
        kernel::attention::launch_unchecked(
            client,
            cube_count(client, cubes),
            CubeDim::new_1d(UNITS as u32),
            wide,
            narrow,
            q,
            keys,
            values,
            words()?,
            out()?,
            partial()?,
            work,
            format.elem_type(),
        );
        if split {
            kernel::join::launch_unchecked(
                client,
                cube_count(client, (tokens * heads * head_dim).div_ceil(UNITS)),
                CubeDim::new_1d(UNITS as u32),
                partial()?,
                words()?,
                out()?,
                plan.work(batch, shape, options, splits, split),
                format.elem_type(),
            );
        }
    }
    Ok(())
}

fn check_limit(name: &'static str, value: usize, limit: usize) -> Result<(), KernelError> {
    if value > limit { Err(KernelError::TooLarge { name, value, limit }) } else { Ok(()) }
}

pub(crate) fn check_reach(batch: &Batch, slots: usize) -> Result<(), KernelError> {
    check_limit("slots of the batch's blocks", batch.reach, slots)
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
