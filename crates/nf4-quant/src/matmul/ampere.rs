//! The product with `mma.sync`, from compute capability 8.0 on, and with f16 from 7.5 on: for all tensor cores without `wgmma`.
//!
//! Two kernels, of cubes of four warps that compute tiles of 128 features:
//!
//! **Many tokens, and dense weights** (`ampere_wide.cu`): tiles of 128 tokens (64 or 16 where there are fewer), two cubes on
//! a multiprocessor. A warp computes 64 x 64, the largest tile whose sums fit in its registers.
//!
//! - Both operands pass through shared memory in steps of 32 columns, in 48 KB, so that two cubes fit in the 100 KB of
//!   compute capability 8.6 and 8.9. `cp.async` keeps activations, and a dense weight, two steps ahead.
//! - A weight in 4 bits is decoded by all threads, each code once for a tile, while the step before is multiplied. A thread
//!   has the 16 values that a code of its block can mean (codebook times absmax in f32, rounded) in eight registers, low bytes
//!   apart from high bytes: byte permutations look up four codes at a time.
//!
//! **A few tokens, 4 bits** (`ampere.cu`): the transposed tile Yᵀ\[features, tokens\] = A Xᵀ, as [`mod@super::hopper`] has it,
//! so that each thread decodes just the fragments that it feeds to the tensor cores, in registers.
//!
//! - A thread takes eight neighbouring columns of each 32 and four neighbouring rows of A. So X comes out of shared
//!   memory in 16-byte loads that serve two instructions and never conflict, a word of codes is a row's share, and
//!   results leave in 8 bytes or more.
//! - `cp.async` keeps X three steps of 32 columns ahead, in a ring of four stages, and codes four.
//! - While a step is multiplied the next one is decoded: codebook values come out of shared memory, are multiplied by absmax
//!   in f32 and rounded. Forward, lookups are tied to products by bits that are always 0, because the assembler would
//!   otherwise move the decoding behind all products of a step, where nothing covers its loads.
//!
//! In both, LoRA's product comes first, as more columns of both operands; its factor is read as it is and rounded on the way.
//! Tiles that would not fill the last round are split along the depth. The cube that finishes last adds all parts in their
//! order: the same operands give the same bits, and no cube waits for another.
//!
//! From [`MMA_TRANSIENT_TOKENS`](super::MMA_TRANSIENT_TOKENS) tokens on the dense kernel runs on a weight that was dequantized
//! before it.
//!
//! **Bound**, per 32 columns of two cubes on one multiprocessor: `mma` takes 1,024 cycles on an A100 and 4,096 on GeForce, whose
//! tensor cores have a quarter of that rate with f32 sums; shared memory is busy for 768, with codes for 700.
//!
//! **Today**: on an H100, whose tensor cores reach 612 TFLOP/s with `mma` out of registers, the dense kernel has 430 at 8192 x
//! 11008 x 4096, and with a weight that is decoded 290. No card of 7.5 or 8.x was at hand. `docs/src/kernels/matmul.md` has
//! the versions that lost.

use cubecl::client::Client;
use cubecl::server::Handle;
use cuda_source::{Arguments, CudaDevice, Source};

use super::schedule::{Params, Schedule, arrivals};
use super::{Direction, Operands, Problem, Weight, check_alignment, refused};
use crate::kernels::tables;
use crate::{FloatFormat, QuantError};

/// For a few tokens and a weight in 4 bits.
const TEXT: &str = concat!(
    cuda_source::prelude!(),
    cuda_source::tensor_cores!(),
    cuda_source::dropout!(),
    include_str!("common.cu"),
    include_str!("ampere_share.cu"),
    include_str!("ampere.cu")
);
/// For [`WIDE_TOKENS`], and for dense weights.
const WIDE_TEXT: &str = concat!(
    cuda_source::prelude!(),
    cuda_source::tensor_cores!(),
    cuda_source::dropout!(),
    include_str!("common.cu"),
    include_str!("ampere_share.cu"),
    include_str!("ampere_wide.cu")
);
/// Tokens of the widest tile.
const WIDE_TOKENS: usize = 128;
/// Rows of A per tile.
pub(super) const FEATURES: usize = 128;
const THREADS: u32 = 128;
/// Columns whose absmax is the same, and two steps.
const DEPTH: usize = 64;

/// A variant of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Tokens per tile: 16, 64 or 128.
    pub tokens: usize,
}

impl Tile {
    /// Cubes that share a multiprocessor, which registers allow.
    fn cubes(self) -> usize {
        match self.tokens {
            ..=16 => 4,
            17..=64 => 3,
            _ => 2,
        }
    }
}

/// The variant for a problem, or `None` where this kernel does not apply.
pub(super) fn tile(device: &CudaDevice, problem: &Problem) -> Option<Tile> {
    let Problem { tokens, out_features, in_features, rank, format, out, blocksize, .. } = *problem;
    // Positions count in 32 bits: elements of the weight and the factor, 16-byte chunks of the activations, whose
    // last tile reaches beyond the end.
    let small = |rows: usize, cols: usize, limit: u64| (rows as u64).saturating_mul(cols as u64) < limit;
    let elements = u64::from(u32::MAX);
    let fits = device.multiplies(format.into())
        && (out == format || out == FloatFormat::F32)
        // Rows are copied in 16 bytes.
        && out_features.is_multiple_of(8)
        && in_features.is_multiple_of(8)
        && rank.is_multiple_of(8)
        // 64 columns share one absmax.
        && blocksize.is_none_or(|blocksize| blocksize >= DEPTH && in_features.is_multiple_of(DEPTH))
        && tokens > 0
        && small(out_features, in_features, elements)
        && small(problem.features(), rank, elements)
        && small(tokens + FEATURES, problem.depth().max(rank), elements * 8);
    fits.then_some(Tile {
        tokens: match tokens {
            ..=16 => 16,
            17..=64 => 64,
            _ => 128,
        },
    })
}

pub(super) fn launch(
    client: &Client,
    tile: Tile,
    problem: &Problem,
    operands: &Operands<'_>,
    out: &Handle,
) -> Result<(), QuantError> {
    let (features, depth) = (problem.features(), problem.depth());
    let multiprocessors = cuda_source::device(client).map_or(1, |device| device.multiprocessors as usize);
    let tiles = features.div_ceil(FEATURES) * problem.tokens.div_ceil(tile.tokens);
    let schedule = Schedule::new(tiles, depth.div_ceil(DEPTH), multiprocessors * tile.cubes());
    let parts = if schedule.split > 1 { schedule.slots() * schedule.split } else { 0 };
    let partial = client.empty((parts * FEATURES * tile.tokens * 4).max(4));
    let arguments = operand_arguments(client, operands)?;
    let bias = operands.bias.cloned().unwrap_or_else(|| tables(client));
    check_alignment("bias", &bias)?;
    check_alignment("out", out)?;
    let arguments = arguments
        .read(&bias)
        .read_write(&partial)
        .counters(&arrivals(client, &partial, multiprocessors))
        .write(out)
        .params(Params::new(problem, operands, schedule));
    cuda_source::launch(
        client,
        &source(tile, problem, operands.mask().is_some()),
        (schedule.items() as u32, 1, 1),
        arguments,
    )
    .map_err(refused)
}

/// What the kernel reads first, for one weight or for groups: x, the low-rank operands, and the weight.
pub(super) fn operand_arguments(client: &Client, operands: &Operands<'_>) -> Result<Arguments, QuantError> {
    let tables = tables(client);
    // Without a low-rank product its operands are never read.
    let (product, factor) =
        operands.low_rank.map_or((operands.x, &tables), |low_rank| (low_rank.product, low_rank.factor));

    let mut arguments = Arguments::new();
    let mut read = |name, handle: &Handle| {
        arguments = std::mem::take(&mut arguments).read(handle);
        check_alignment(name, handle)
    };
    read("x", operands.x)?;
    read("low-rank product", product)?;
    read("low-rank factor", factor)?;
    match operands.weight {
        Weight::Dense(weight) => read("weight", weight)?,
        Weight::FourBit(weight) => {
            read("codes", &weight.codes)?;
            let (absmax, nested) = weight.absmax.buffers(&tables);
            read("absmax", absmax)?;
            read("nested_absmax", nested)?;
            read("tables", &tables)?;
        }
    }
    Ok(arguments)
}

pub(super) fn source(tile: Tile, problem: &Problem, masked: bool) -> Source {
    source_of(tile, problem, false, masked)
}

/// The kernel for one weight, or for groups that have a weight each; with dropout of the low-rank part or without.
pub(super) fn source_of(tile: Tile, problem: &Problem, grouped: bool, masked: bool) -> Source {
    let dense = problem.blocksize.is_none();
    let shared = [
        ("TRANSPOSED", i64::from(problem.direction == Direction::InputGradient)),
        cuda_source::FloatFormat::from(problem.format).define(),
        ("OUT_F32", i64::from(problem.out == FloatFormat::F32)),
        ("MIN_CUBES", tile.cubes() as i64),
        ("GROUPED", grouped.into()),
        ("DROPOUT", masked.into()),
    ];
    let tokens = tile.tokens as i64;
    // Stages are as many as fit 48 KB.
    let (text, own) = match tile.tokens {
        WIDE_TOKENS => (WIDE_TEXT, [("DENSE", dense.into()), ("BT", tokens), ("STAGES", 3), ("WARPS_T", 2)].to_vec()),
        _ if dense => (WIDE_TEXT, [("DENSE", 1), ("BT", tokens), ("STAGES", 4), ("WARPS_T", 1)].to_vec()),
        _ => (TEXT, [("BN", tokens), ("STAGES", 4)].to_vec()),
    };
    Source::with_defines(text, "matmul", THREADS, &[&shared[..], &own].concat())
}
