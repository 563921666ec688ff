//! The product with `mma.sync`, from compute capability 8.0 on: for all tensor cores without `wgmma`.
//!
//! **Idea.** That of [`mod@super::hopper`]: compute the transposed tile Yᵀ\[features, tokens\] = A Xᵀ, A = W or Wᵀ, so
//! that the 4-bit operand is the one that instructions take from registers, and let each thread decode just the
//! fragments that it feeds to them.
//!
//! **Layout.** A cube computes 128 features x 128 tokens with four warps of 32 x 128: a decoded fragment serves 16
//! instructions. Two cubes share a multiprocessor.
//!
//! - A thread takes eight neighbouring columns of each 32 and four neighbouring rows of A. So X comes out of shared
//!   memory in 16-byte loads that serve two instructions and never conflict, a word of codes is a row's share, and
//!   results leave in 8 bytes or more.
//! - `cp.async` keeps X three steps of 32 columns ahead, in a ring of four stages, and codes four. Steps are
//!   synchronised by one barrier each.
//! - While a step is multiplied the next one is decoded: codebook values come out of shared memory (16 values never
//!   conflict, and an address is one byte permutation), are multiplied by absmax in f32 and rounded. Forward a row
//!   has one absmax per 64 columns, which lanes exchange; for the gradient, where every row of W has its own, they go
//!   through shared memory.
//! - LoRA's product comes first, as more columns of A and X; its factor is read as it is and rounded on the way.
//! - Tiles that would not fill the last round are split along the depth. The cube that finishes last adds all parts in
//!   their order: the same operands give the same bits, and no cube waits for another.
//! - A dense weight takes the same kernel, its fragments straight from memory.
//!
//! **Bound**, per 32 columns of two cubes on one multiprocessor: instructions for the tensor cores take 1,024
//! cycles on an A100 and 4,096 on GeForce, whose tensor cores have a quarter of that rate with f32 sums; shared
//! memory is busy for about 930 (512 X, 256 lookups, 160 copies and absmax) forward and 1,000 for the gradient.
//! So GeForce is bound by its tensor cores alone, an A100 by both.
//!
//! Registers are scarce: 128 of 255 are sums. Positions are computed when they are needed, and the tile's place a
//! second time after the loop. Forward, lookups are tied to products by bits that are always 0, because the assembler
//! would otherwise move the decoding behind all products of a step, where nothing covers its loads.
//!
//! **Today**: not measured on such cards yet. `docs/src/kernels/matmul.md` says what their machine code shows.

use cubecl::client::Client;
use cubecl::server::Handle;
use cuda_source::{Arguments, CudaDevice, Source};

use super::schedule::{Params, Schedule, arrivals};
use super::{Direction, Operands, Problem, Weight, check_alignment, refused};
use crate::kernels::tables;
use crate::{FloatFormat, QuantError};

const TEXT: &str =
    concat!(cuda_source::prelude!(), cuda_source::dropout!(), include_str!("common.cu"), include_str!("ampere.cu"));
/// Rows of A per tile.
pub(super) const FEATURES: usize = 128;
const THREADS: u32 = 128;
/// Steps of 32 columns in shared memory; even.
const STAGES: i64 = 4;
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
    let fits = device.compute_capability >= (8, 0)
        && format != FloatFormat::F32
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
    let defines = [
        ("TRANSPOSED", i64::from(problem.direction == Direction::InputGradient)),
        ("DENSE", i64::from(problem.blocksize.is_none())),
        cuda_source::FloatFormat::from(problem.format).define(),
        ("OUT_F32", i64::from(problem.out == FloatFormat::F32)),
        ("BN", tile.tokens as i64),
        ("STAGES", STAGES),
        ("MIN_CUBES", tile.cubes() as i64),
        ("GROUPED", grouped.into()),
        ("DROPOUT", masked.into()),
    ];
    Source::with_defines(TEXT, "matmul", THREADS, &defines)
}
