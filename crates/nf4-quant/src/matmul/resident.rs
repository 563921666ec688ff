//! y_i = x W_iᵀ for up to 16 tokens on Hopper, with x in registers: [`mod@super::gemv`]'s product for tokens whose rows of x are too
//! much to be read again for every tile of W.
//!
//! **Idea.** A cube has a multiprocessor to itself, and takes whole rows of W, 16 at a time. Each of its 16 warps has 256
//! columns, the same of all of them, so that its part of x is loaded once: with 16 tokens, half of its registers. What is left for a tile is
//! to bring 2 KB of codes, to look their pairs up and to multiply.
//!
//! **Layout.**
//!
//! - A lane's codes, 16 columns that lie side by side of each block of 64, are its part of `mma`'s first operand, as in
//!   [`mod@super::gemv`]. When a block is looked up, the next tile's codes come in its place.
//! - Pairs of values lie 256 bytes apart, so that one `prmt` makes the address of a byte's pair in the lane's own bank. The table has
//!   64 KB: more static memory than all toolchains take.
//! - The warps' sums of a tile go through shared memory. They are read in the midst of the next tile, when the last has long
//!   arrived: nobody waits for a barrier. They are added in a fixed order: the same operands give the same bits.
//! - What a tile is, pointers and all, is worked out once, by one thread, into a list.
//! - Of LoRA's update, parts of `u = scaling · x Aᵀ` are 8 ranks each, of whole rows: a cube that makes one has x at hand. They are
//!   dealt out from the last cube on, which has fewest tiles, and counted, as in [`mod@super::gemv`]. The second factor's fragments are
//!   loaded with a tile's codes and multiplied at its end, 16 ranks a warp, by other warps from tile to tile.
//!
//! **Rounding** is that of [`mod@super::gemv`]; sums are taken in another order.
//!
//! **Today**: `docs/src/kernels/matmul.md` has what was measured.

use cubecl::client::Client;
use cubecl::server::Handle;
use cuda_source::{Arguments, CudaDevice, Source};

use super::gemv::{self, Matrix, Params, nested_blocksize, of_factors, of_weights, outs};
use super::joined::{Joined, JoinedWeight, Spans, Stack};
use super::{Operands, Problem, Weight, check_alignment, refused};
use crate::kernels::tables;
use crate::{FloatFormat, QuantError};

const TEXT: &str = concat!(cuda_source::prelude!(), include_str!("few_tokens.cu"), include_str!("resident.cu"));
const WARPS: usize = 16;
/// Columns at most: those that a cube's warps have of x.
const COLUMNS: usize = 256 * WARPS;
/// Rows of a tile.
const TILE: usize = 16;
/// Tiles of a cube at most.
const MAX_TILES: usize = 128;
/// Ranks of a stack at most: turns are divided by them in 16 bits.
const MAX_RANK: usize = 1024;
/// Tokens from which on the kernel is faster than [`mod@gemv`].
const FROM_TOKENS: usize = 5;

/// Whether the kernel is faster than [`mod@gemv`].
pub(super) fn is_faster(problem: &Problem) -> bool {
    problem.tokens >= FROM_TOKENS
}

/// Whether the kernel takes a problem.
pub(super) fn fits(device: &CudaDevice, problem: &Problem) -> bool {
    gemv::fits(device, problem)
        && problem.rank == 0
        && problem.in_features <= COLUMNS
        && device.compute_capability == (9, 0)
        && device.takes_large_static_memory()
}

/// Whether the kernel takes a launch, of whose weights [`super::joined::supports`] knows.
pub(super) fn takes(client: &Client, joined: &Joined<'_>) -> bool {
    let tiles: usize = joined.weights.iter().map(|each| each.out_features.div_ceil(TILE)).sum();
    let small = |each: &JoinedWeight<'_>| {
        each.stack.is_none_or(|Stack { rank, .. }| rank <= MAX_RANK && each.out_features < u32::MAX as usize / MAX_RANK)
    };
    cuda_source::device(client).is_some_and(|device| {
        // Cubes that wait for each other must all be on the device.
        let together = tiles <= MAX_TILES * device.multiprocessors as usize;
        fits(&device, &joined.problem()) && (joined.spans.is_none() || (together && joined.weights.iter().all(small)))
    })
}

pub(super) fn launch(
    client: &Client,
    problem: &Problem,
    operands: &Operands<'_>,
    out: &Handle,
) -> Result<(), QuantError> {
    let Weight::FourBit(weight) = operands.weight else {
        return Err(QuantError::Matmul("a dense weight has no path for a few tokens".to_owned()));
    };
    if !cuda_source::device(client).is_some_and(|device| fits(&device, problem)) {
        return Err(QuantError::Matmul(format!("{problem:?} does not fit x in registers: take another path")));
    }
    let matrix = Matrix { weight, rows: problem.out_features, bias: operands.bias, out, low_rank: None };
    run(client, problem, operands.x, &[matrix], None, false)
}

/// [`super::joined::launch_on`], its operands checked.
pub(super) fn launch_joined(client: &Client, joined: &Joined<'_>) -> Result<(), QuantError> {
    let matrices = gemv::matrices(joined);
    let adapted = matrices.iter().any(|matrix| matrix.low_rank.is_some());
    run(client, &joined.problem(), joined.x, &matrices, joined.spans.filter(|_| adapted), true)
}

/// With `spans` there is a stack.
fn run(
    client: &Client,
    problem: &Problem,
    x: &Handle,
    matrices: &[Matrix<'_>],
    spans: Option<Spans<'_>>,
    half_bias: bool,
) -> Result<(), QuantError> {
    let [Matrix { weight, .. }, ..] = matrices else { return Ok(()) };
    check_alignment("x", x)?;
    for matrix in matrices {
        check_alignment("codes", &matrix.weight.codes)?;
    }
    let multiprocessors = cuda_source::device(client).map_or(1, |device| device.multiprocessors as usize);
    let tiles: usize = matrices.iter().map(|matrix| matrix.rows.div_ceil(TILE)).sum();
    let cubes = tiles.min(multiprocessors.max(tiles.div_ceil(MAX_TILES)));
    let params = Params::new(problem, matrices);
    let tables = tables(client);
    let arguments = of_factors(of_weights(Arguments::new(), matrices, &tables), matrices, &tables);
    let arguments = arguments.read(&tables).read(x).read(spans.map_or(&tables, |spans| spans.words));
    let arguments = match spans {
        Some(_) => {
            let products = client.empty(problem.tokens * params.ranks as usize * 2);
            let counters = cuda_source::counters(client, &products, 2);
            arguments.write(&products).counters(&counters)
        }
        None => arguments.read(&tables).read(&tables),
    };
    let source = source(problem, nested_blocksize(weight).is_some(), spans.is_some(), half_bias);
    let arguments = outs(arguments, matrices).params(params);
    cuda_source::launch(client, &source, (cubes as u32, 1, 1), arguments).map_err(refused)
}

/// `stacked`: tokens have adapters of a stack.
pub(super) fn source(problem: &Problem, nested: bool, stacked: bool, half_bias: bool) -> Source {
    let defines = [
        cuda_source::FloatFormat::from(problem.format).define(),
        ("OUT_F32", i64::from(problem.out == FloatFormat::F32)),
        ("NESTED", nested.into()),
        ("TAIL", i64::from(!problem.in_features.is_multiple_of(256))),
        ("HALF_BIAS", half_bias.into()),
        ("ADAPTERS", stacked.into()),
        ("TOKEN_TILES", problem.tokens.div_ceil(8) as i64),
        ("MAX_TILES", MAX_TILES as i64),
    ];
    Source::with_defines(TEXT, "resident", 32 * WARPS as u32, &defines)
}
