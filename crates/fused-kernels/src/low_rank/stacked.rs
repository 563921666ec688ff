//! Low-rank updates of tokens that have different adapters, in two launches for up to three weights of one input.
//!
//! A layer's adapters lie in a [`Stack`] of slots, and spans say which tokens have which slot. They are read on the device, so
//! that a recorded launch serves other tokens and other adapters when it is replayed.
//!
//! | product | call |
//! |---|---|
//! | `u = scaling · x Aᵀ` `[tokens, ranks]` of all weights | [`project`] |
//! | `y = s + u Bᵀ + bias` for the sums `s = x Wᵀ` of each weight | [`update`] |
//!
//! # How
//!
//! - Tiles of tokens are fixed. A cube looks through the spans for those that reach into its tile, and multiplies each slot's
//!   factor with the tokens of its span, where the others are zero. All go into the same sums, because a token is in one span. So a factor is read
//!   for the tiles that have its tokens, whether a span is one token or a whole prompt.
//! - Operands go from memory to `mma`'s fragments without shared memory, 16 or 8 bytes of a lane at a time: the order of a
//!   contraction is free, and so is that of the rows of a result.
//! - [`project`] splits the columns over cubes, enough for a few tokens to reach every multiprocessor. The cube that is last adds the parts up, in
//!   their order: the same operands give the same bits.
//! - [`update`] begins its sums with those of the base, in f32, and rounds once. `u` is rounded to 16 bits, as in training.
//!
//! **Bound.** Memory: the factors of all slots that have tokens, once, beside f32 sums, four bytes of each result written and read.
//!
//! **Today**: `docs/src/kernels/low-rank.md` has what was measured.

use bytemuck::{Pod, Zeroable};
use cubecl::client::Client;
use cubecl::server::Handle;
use cuda_source::{Arguments, Source};

use super::{MAX_LENGTH, check_buffer, offset, supports, unsupported};
use crate::elementwise::check_half;
use crate::error::check_size;
use crate::{FloatFormat, KernelError};

const OPERATION: &str = "stacked low_rank";
const TEXT: &str = concat!(cuda_source::prelude!(), cuda_source::tensor_cores!(), include_str!("stacked.cu"));
/// The most weights of a launch.
pub const WEIGHTS: usize = 3;
/// Ranks of a cube of [`project`].
const CUBE_RANKS: usize = 64;
/// What chunks of columns are made of: a step of the four warps that share ranks.
const STEP: usize = 128;
/// Chunks at most.
const MAX_CHUNKS: usize = 16;
/// Counters of a launch at most; with more tiles, columns are not split.
const COUNTERS: usize = 4096;
/// Rows of a warp of [`update`].
const WARP_ROWS: usize = 32;
/// Tokens up to which tiles are small: a pass over one token of each row.
const FEW_TOKENS: usize = 128;

/// Adapters of one layer, each in a slot.
#[derive(Clone, Copy, Debug)]
pub struct Stack<'a> {
    /// `[slots, rank, in_features]` in the format of x.
    pub lora_a: &'a Handle,
    /// `[slots, out_features, rank]` in the format of x.
    pub lora_b: &'a Handle,
    /// f32 `[slots]`: the factor of each update.
    pub scalings: &'a Handle,
    /// Ranks of a slot, a multiple of 16.
    pub rank: usize,
    /// Slots.
    pub slots: usize,
    /// Rows of the layer's weight, a multiple of 8.
    pub out_features: usize,
}

/// What all layers of a launch share.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// `[tokens, in_features]`, contiguous.
    pub x: &'a Handle,
    /// u32: the number of spans, then of each its first token, the one behind its last, and its slot. No token is in two of them;
    /// tokens of none have no adapter. What lies outside tokens or slots reads memory that is not the caller's.
    pub spans: &'a Handle,
    /// Rows of x.
    pub tokens: usize,
    /// Columns of x, a multiple of 8.
    pub in_features: usize,
    /// Format of x, factors, biases and results: f16 or bf16.
    pub format: FloatFormat,
}

/// Where a layer's update goes.
#[derive(Clone, Copy, Debug)]
pub struct Update<'a> {
    /// f32 `[tokens, out_features]`: the product with the frozen weight.
    pub sums: &'a Handle,
    /// `[out_features]`, in the format of x.
    pub bias: Option<&'a Handle>,
    /// `[tokens, out_features]`, in the format of x, which this writes.
    pub out: &'a Handle,
}

/// `struct Matrix` of stacked.cu.
#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
struct Matrix {
    rows: u32,
    rank: u32,
    first_rank: u32,
    first_tile: u32,
}

/// `struct Params` of stacked.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    tokens: u32,
    columns: u32,
    ranks: u32,
    chunk: u32,
    chunks: u32,
    tiles: u32,
    biases: u32,
    padding: u32,
    matrices: [Matrix; WEIGHTS],
}

impl Params {
    /// Dimensions were checked: they fit.
    fn new(input: &Input<'_>, stacks: &[Stack<'_>]) -> Self {
        let mut matrices = [Matrix::default(); WEIGHTS];
        let (mut ranks, mut tiles) = (0, 0);
        for (i, matrix) in matrices.iter_mut().enumerate() {
            (matrix.first_rank, matrix.first_tile) = (ranks, tiles);
            let Some(stack) = stacks.get(i) else { continue };
            (matrix.rows, matrix.rank) = (stack.out_features as u32, stack.rank as u32);
            ranks += stack.rank as u32;
            tiles += stack.out_features.div_ceil(WARP_ROWS) as u32;
        }
        let (tokens, columns) = (input.tokens as u32, input.in_features as u32);
        Self { tokens, columns, ranks, chunk: columns, chunks: 1, tiles, biases: 0, padding: 0, matrices }
    }
}

/// Whether a device has the kernels for 16-bit activations, of either format, and a weight `[out_features, in_features]`.
pub fn supports_weight(client: &Client, out_features: usize, in_features: usize) -> bool {
    let is_aligned = |features: usize| features > 0 && features.is_multiple_of(8) && features <= MAX_LENGTH;
    supports(client, FloatFormat::BF16) && is_aligned(out_features) && is_aligned(in_features)
}

/// The products of each token with its adapters' first factors, times their scalings: `[tokens, ranks]` in the format of x, those
/// of the first stack first, zero where a token has no adapter.
///
/// # Errors
/// [`KernelError::Unsupported`], [`KernelError::Shape`] for what the kernels don't take, and the variants about sizes when a buffer
/// does not hold its shape.
pub fn project(client: &Client, input: &Input<'_>, stacks: &[Stack<'_>]) -> Result<Handle, KernelError> {
    check(client, input, stacks)?;
    let Input { x, spans, tokens, in_features, format } = *input;
    let mut params = Params::new(input, stacks);
    let out = client.empty((tokens * params.ranks as usize * 2).max(4));
    if tokens == 0 {
        return Ok(out);
    }
    let token_tiles = if tokens <= FEW_TOKENS { 2 } else { 4 };
    let tiles = [(params.ranks as usize).div_ceil(CUBE_RANKS), tokens.div_ceil(8 * token_tiles)];
    let multiprocessors = cuda_source::device(client).map_or(1, |device| device.multiprocessors as usize);
    let chunks = chunks(in_features, tiles[0] * tiles[1], multiprocessors);
    params.chunk = (in_features.div_ceil(chunks).next_multiple_of(STEP)) as u32;
    params.chunks = in_features.div_ceil(params.chunk as usize) as u32;
    let parts = client.empty((params.chunks as usize * tokens * params.ranks as usize * 4).max(4));
    let mut arguments = Arguments::new();
    for pick in [|stack: &Stack<'_>| stack.lora_a.clone(), |stack: &Stack<'_>| stack.scalings.clone()] {
        arguments = of_each(arguments, |i| pick(stacks.get(i).unwrap_or(&stacks[0])));
    }
    let arguments = arguments.read(x).read(spans).write(&parts);
    let arguments = arguments.counters(&cuda_source::counters(client, &parts, COUNTERS)).write(&out);
    let defines = [format.define(), ("KIND", 0), ("TOKEN_TILES", token_tiles as i64)];
    let source = Source::with_defines(TEXT, "stacked_project", 256, &defines);
    let grid = (params.chunks, tiles[0] as u32, tiles[1] as u32);
    cuda_source::launch(client, &source, grid, arguments.params(params)).map_err(refused)?;
    Ok(out)
}

/// How many chunks the columns are cut into: as many cubes as run at once, two on a multiprocessor. Measured with 1,024 tokens,
/// where 288 and 320 cubes on 132 multiprocessors took up to 1.4 times as long as 160 to 192.
fn chunks(columns: usize, tiles: usize, multiprocessors: usize) -> usize {
    match tiles {
        ..=COUNTERS => (2 * multiprocessors / tiles).min(columns.div_ceil(2 * STEP)).clamp(1, MAX_CHUNKS),
        _ => 1,
    }
}

/// Adds each token's update to the product with the frozen weight, for the `product` that [`project`] gave for these stacks.
///
/// # Errors
/// As [`project`].
pub fn update(
    client: &Client,
    input: &Input<'_>,
    stacks: &[Stack<'_>],
    product: &Handle,
    updates: &[Update<'_>],
) -> Result<(), KernelError> {
    check(client, input, stacks)?;
    let Input { spans, tokens, format, .. } = *input;
    if updates.len() != stacks.len() {
        let reason = format!("{} stacks with {} updates", stacks.len(), updates.len());
        return Err(KernelError::Shape { operation: OPERATION, reason });
    }
    let mut params = Params::new(input, stacks);
    check_buffer("product", product, tokens * params.ranks as usize, 2)?;
    for (i, (stack, update)) in stacks.iter().zip(updates).enumerate() {
        check_aligned("sums", update.sums, tokens * stack.out_features * 4)?;
        check_aligned("out", update.out, tokens * stack.out_features * 2)?;
        if let Some(bias) = update.bias {
            check_aligned("bias", bias, stack.out_features * 2)?;
            params.biases |= 1 << i;
        }
    }
    if tokens == 0 {
        return Ok(());
    }
    let stack_of = |i: usize| stacks.get(i).unwrap_or(&stacks[0]);
    let update_of = |i: usize| updates.get(i).unwrap_or(&updates[0]);
    let arguments = of_each(Arguments::new(), |i| stack_of(i).lora_b.clone());
    let arguments = of_each(arguments, |i| update_of(i).sums.clone());
    // What a launch does not use is never read.
    let arguments = of_each(arguments, |i| update_of(i).bias.unwrap_or(product).clone());
    let mut arguments = arguments.read(product).read(spans);
    for i in 0..WEIGHTS {
        arguments = arguments.write(update_of(i).out);
    }
    let token_tiles = if tokens <= FEW_TOKENS { 1 } else { 2 };
    let defines = [format.define(), ("KIND", 1), ("TOKEN_TILES", token_tiles as i64)];
    let source = Source::with_defines(TEXT, "stacked_update", 128, &defines);
    let grid = (params.tiles.div_ceil(4), tokens.div_ceil(16 * token_tiles) as u32, 1);
    cuda_source::launch(client, &source, grid, arguments.params(params)).map_err(refused)
}

/// A buffer of each weight that there may be.
fn of_each(mut arguments: Arguments, pick: impl Fn(usize) -> Handle) -> Arguments {
    for i in 0..WEIGHTS {
        arguments = arguments.read(&pick(i));
    }
    arguments
}

fn refused(error: cuda_source::LaunchError) -> KernelError {
    KernelError::Launch { operation: OPERATION, message: error.to_string() }
}

fn check(client: &Client, input: &Input<'_>, stacks: &[Stack<'_>]) -> Result<(), KernelError> {
    let Input { x, spans, tokens, in_features, format } = *input;
    check_half(client, OPERATION, format)?;
    if !supports(client, format) {
        return Err(unsupported(client));
    }
    let wrong = |reason: String| Err(KernelError::Shape { operation: OPERATION, reason });
    if !(1..=WEIGHTS).contains(&stacks.len()) {
        return wrong(format!("{} stacks, which should be 1 to {WEIGHTS}", stacks.len()));
    }
    // Tiles of tokens are the grid's last dimension.
    if tokens > 16 * 65_535 {
        return Err(KernelError::TooLarge { name: "tokens", value: tokens, limit: 16 * 65_535 });
    }
    check_aligned("x", x, tokens * in_features * 2)?;
    check_size("spans", spans, 4)?;
    for &Stack { lora_a, lora_b, scalings, rank, slots, out_features } in stacks {
        if !supports_weight(client, out_features, in_features) {
            return wrong(format!("a weight of {out_features} x {in_features}: both must be multiples of 8"));
        }
        if rank == 0 || !rank.is_multiple_of(16) || rank > MAX_LENGTH {
            return wrong(format!("rank {rank}, which is no multiple of 16"));
        }
        check_aligned("lora_a", lora_a, slots * rank * in_features * 2)?;
        check_aligned("lora_b", lora_b, slots * rank * out_features * 2)?;
        check_size("scalings", scalings, slots * 4)?;
    }
    Ok(())
}

/// For what is moved 16 bytes at a time.
fn check_aligned(name: &'static str, handle: &Handle, bytes: usize) -> Result<(), KernelError> {
    check_size(name, handle, bytes)?;
    match offset(handle) {
        at if at.is_multiple_of(16) => Ok(()),
        offset => Err(KernelError::Alignment { name, offset, size: 16 }),
    }
}

/// The scalar oracle.
pub mod oracle {
    /// One token's `u` of one weight, not rounded: `scaling · A x` for its adapter's factor `[rank, in_features]`.
    pub fn project(x: &[f32], lora_a: &[f32], scaling: f32) -> Vec<f64> {
        let dot = |row: &[f32]| x.iter().zip(row).map(|(x, a)| f64::from(*x) * f64::from(*a)).sum::<f64>();
        lora_a.chunks(x.len()).map(|row| f64::from(scaling) * dot(row)).collect()
    }

    /// One token's results, not rounded: `sums + B u + bias` for its adapter's factor `[out_features, rank]`.
    pub fn update(sums: &[f32], u: &[f32], lora_b: &[f32], bias: Option<&[f32]>) -> Vec<f64> {
        let dot = |row: usize| {
            let factor = &lora_b[row * u.len()..][..u.len()];
            u.iter().zip(factor).map(|(u, b)| f64::from(*u) * f64::from(*b)).sum::<f64>()
        };
        let bias = |row: usize| bias.map_or(0.0, |bias| f64::from(bias[row]));
        sums.iter().enumerate().map(|(row, sum)| f64::from(*sum) + dot(row) + bias(row)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_cut_for_every_multiprocessor() {
        // 64 tokens are four tiles; of ranks of 64, three weights have three.
        assert_eq!(chunks(4096, 12, 132), 16);
        assert_eq!(chunks(11008, 4, 132), 16);
        // 1,024 tokens.
        assert_eq!(chunks(4096, 96, 132), 2);
        assert_eq!(chunks(4096, 1000, 132), 1);
        // As many as there are columns for.
        assert_eq!(chunks(300, 1, 132), 2);
        assert_eq!(chunks(4096, COUNTERS + 1, 132), 1);
    }

    #[test]
    fn products_by_hand() {
        assert_eq!(oracle::project(&[1.0, 2.0], &[1.0, 10.0, 3.0, 0.5], 2.0), [42.0, 8.0]);
        let updated = oracle::update(&[1.0, 2.0], &[10.0], &[0.5, 1.0], Some(&[0.25, 0.0]));
        assert_eq!(updated, [6.25, 12.0]);
    }
}
