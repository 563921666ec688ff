//! The product on Hopper: wgmma with the weight dequantized in registers.
//!
//! Idea: wgmma takes its left operand from registers, so compute the transposed tile
//! Yᵀ\[features, tokens\] = A Xᵀ with A = W or Wᵀ, and let each thread turn 4-bit codes into just the fragment
//! that it feeds to the tensor cores. Shared memory holds activations (TMA, 128-byte swizzle, a ring of five
//! stages) and codes, a quarter of the bytes of a 16-bit weight. A dense weight takes the same kernel with A
//! in shared memory.
//!
//! One persistent cube per multiprocessor computes tiles of 128 features x 256 tokens:
//! - two cubes with neighbouring features share their X: each loads half of a tile, for both (a cluster, TMA
//!   multicast). A stage of the ring is free when both have read it;
//! - one thread loads, three warps make tables of the 16 values that a code of a block can mean, times absmax and
//!   rounded (and, forward, bring the bytes of the codes into fragment order), two warp groups compute;
//! - forward, a thread's codes come from two blocks. It holds both tables in registers, low bytes apart from high
//!   ones, and a byte permutation looks up four codes at once; a fragment is made two steps of 16 columns ahead;
//! - for the gradient, where every row of W has its own absmax, values come from shared memory, three steps ahead, by
//!   lookups that never conflict; an address is one byte permutation;
//! - LoRA's product comes first, as more columns of A and X, into the same sums;
//! - 16-bit results leave through shared memory, by TMA, while the next tile is computed;
//! - tiles that don't fill a last round are split along the depth; partial sums are added in a fixed order, so
//!   the same inputs give the same bits.
//!
//! What bounds it: power. At 700 W the clock of an H100 falls from 1,980 to 1,400 to 1,480 MHz, where the tensor cores
//! are busy for 79 % of the time (82 % with byte permutations; 95 % with a dense weight). Waiting less then only
//! lowers the clock: without any stores the dense product had 708 TFLOP/s at 1,333 MHz, with them 708 at 1,448. What
//! counts is what a product costs beside its wgmma: instructions, and bytes on their way from L2. ncu (first version
//! of the second table, 1.06 ms): 6.1 TB/s from L2 to the multiprocessors, 69 % of what L2 can, as each cube loaded
//! its own X; shared memory's pipe busy for 79 % (68 % with byte permutations forward, 81 % for the gradient), DRAM
//! for 14 %.
//!
//! Measured on an H200, 8192 x 11008 x 4096, TFLOP/s, while cuBLAS had 760 to 800 for the dense product:
//!
//! | version | forward | gradient |
//! |---|---|---|
//! | codes through L1 into registers, one step ahead | 633 | |
//! | whole blocks of 64 columns decoded ahead: wgmma with a register operand holds its warp | 612 | 611 |
//! | forward codebook in f32 by byte permutations: more ALU work than it saves | 552 | |
//! | codes by TMA, absmax and byte order by two warps: those two became the bottleneck | 635 | 642 |
//! | three decoding warps, lookups a step before their use, fragments two steps ahead | 700 | 639 |
//! | the gradient's tables | 680 | 672 |
//!
//! On an H100 at its power limit, where cuBLAS had 705 to 718 in the same runs. Between runs the card differs by more
//! than the versions, so a row names the version before it in its own run:
//!
//! | version | forward | gradient | dense forward | dense gradient |
//! |---|---|---|---|---|
//! | bands of four tiles of tokens, not eight (16: 585 where 8 had 617) | 605 to 617 | | | |
//! | clusters of two; `.release.cluster` at every release is a fence over the device | 617 to 469 | 590 to 479 | 708 to 521 | 753 to 525 |
//! | the same without it | 617 to 632 | 595 to 617 | 659 to 682 | 709 to 729 |
//! | byte permutations: 32 values take a thread 140 instructions, not 187 | 617 to 636 | | | |
//! | results by TMA (not for the dense gradient: with clusters 717 to 700) | 632 to 634 | 617 to 621 | 682 to 711 | |
//! | four stages instead of five, to store whole tiles | 654 to 632 | 600 to 603 | | |
//! | the warp groups two steps apart, to hide each other's stores | 617 to 618 | | | |
//! | all that stayed | 616 to 654 | 585 to 600 | 680 to 714 | 709 to 729 |
//! | the same, 2048 x 11008 x 4096 | 580 to 620 | 607 to 636 | | |
//! | the same, 2048 x 28672 x 8192 | 610 to 658 | 596 to 626 | | |
//! | the same, 8192 tokens with rank 64 | 626 to 626 | | | |
//!
//! The same bits every time: the version before these (single cubes, part 0 of a split tile adds the others) broke
//! that. Its gradient of 1,030 tokens x 4096 x 4096 with rank 64 differed in 13 % to 38 % of launches, by up to 0.1 in a
//! tile or half of one, as if a few of the tables of values had been another block's: only with rank, split tiles and
//! tables together, and in cubes whose next share began with the low-rank product. Since then the last part adds, and
//! at the stages of the low-rank product a whole decoding warp waits, where its first lane waited for all. A version
//! with the first of the two still differed in 6 of 12,000 launches, forward and gradient, when four processes shared
//! the card; with both, none of 5,600 did, and none of 250 alone. Which instruction went wrong is not known: a
//! simulation of the barriers finds no order that breaks them, and no register of a wgmma in flight is written.
//! `tests/matmul.rs` repeats that product.
//!
//! Ceilings, with wrong results: no X loaded 656 forward and 696 for the gradient (from 617 and 590), no stores 632 and
//! 630. Next to try: two cubes that share a weight tile and decode half of it each, into both shared memories.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::{LazyLock, Mutex, PoisonError};

use cubecl::client::Client;
use cubecl::server::Handle;
use cuda_source::{Arguments, CudaDevice, Source, Swizzle, TensorElement, TensorMap2d};

use super::arrange::{Arranged, arrange};
use super::schedule::{Params, Schedule, arrivals};
use super::{Direction, Operands, Problem, Weight, refused};
use crate::kernels::{DeviceWeight, tables};
use crate::{FloatFormat, QuantError};

const TEXT: &str = concat!(
    cuda_source::prelude!(),
    include_str!("common.cu"),
    cuda_source::tma_barriers!(),
    include_str!("hopper_instructions.cu"),
    include_str!("hopper_decode.cu"),
    include_str!("hopper.cu")
);
/// Rows of A per tile.
const FEATURES: usize = 128;
/// Columns of A per step of the ring.
const DEPTH: usize = 64;
const THREADS: u32 = 384;
/// Threads that hold accumulators.
const CONSUMERS: usize = 256;

/// A variant of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Tokens per tile.
    pub tokens: usize,
    /// Stages of the ring in shared memory.
    pub stages: usize,
}

impl Tile {
    /// Cubes that share X. With few tokens the weight's bytes count, and every cube is needed for itself.
    fn cluster(self) -> usize {
        if self.tokens == 256 { 2 } else { 1 }
    }

    /// Tokens that leave through shared memory at a time, as many as the ring leaves room for; 0: results leave
    /// from registers.
    fn store_tokens(self, problem: &Problem) -> usize {
        if self.tokens < 256 || problem.out == FloatFormat::F32 {
            return 0;
        }
        match (problem.blocksize, problem.direction) {
            (Some(_), _) => 64,
            (None, Direction::Forward) => 128,
            // A head's gradient sums over the vocabulary: results are rare.
            (None, Direction::InputGradient) => 0,
        }
    }
}

/// The variant for a problem, or `None` where this kernel does not apply.
pub(super) fn tile(device: &CudaDevice, problem: &Problem, small: bool) -> Option<Tile> {
    let Problem { tokens, out_features, in_features, rank, format, out, blocksize, .. } = *problem;
    // wgmma and its register operand exist on 9.0 alone.
    let fits = device.compute_capability == (9, 0)
        && format != FloatFormat::F32
        && (out == format || out == FloatFormat::F32)
        // TMA rows start at multiples of 16 bytes; results leave in pairs.
        && out_features.is_multiple_of(8)
        && in_features.is_multiple_of(8)
        && rank.is_multiple_of(8)
        // 64 columns share one absmax.
        && blocksize.is_none_or(|blocksize| blocksize >= DEPTH && in_features.is_multiple_of(DEPTH))
        && tokens > 0
        && [tokens, out_features, in_features].iter().all(|n| u32::try_from(*n).is_ok());
    let roomy = !small && device.takes_large_static_memory();
    match (fits, roomy, blocksize) {
        (false, _, _) | (true, false, None) => None,
        (true, false, Some(_)) => Some(Tile { tokens: 96, stages: 2 }),
        (true, true, _) => Some(match tokens {
            ..=64 => Tile { tokens: 64, stages: 6 },
            65..=128 => Tile { tokens: 128, stages: 5 },
            _ => Tile { tokens: 256, stages: if blocksize.is_some() { 5 } else { 4 } },
        }),
    }
}

pub(super) fn launch(
    client: &Client,
    tile: Tile,
    problem: &Problem,
    operands: &Operands<'_>,
    out: &Handle,
) -> Result<(), QuantError> {
    let (features, depth, tokens) = (problem.features(), problem.depth(), problem.tokens);
    let element = cuda_source::FloatFormat::from(problem.format).tensor_element();
    let cluster = tile.cluster();
    let rows_of_x = |handle: &Handle, cols| TensorMap2d {
        handle: handle.clone(),
        rows: tokens,
        cols,
        row_stride: cols,
        box_rows: tile.tokens / cluster,
        box_cols: DEPTH,
        swizzle: Swizzle::B128,
        element,
    };
    let x_map = rows_of_x(operands.x, depth);
    // Without a low-rank product its maps are never read.
    let (product, factor) = match operands.low_rank {
        None => (x_map.clone(), x_map.clone()),
        Some(low_rank) => {
            let Arranged { handle, rows, cols } = arrange(client, problem, low_rank.factor).map_err(refused)?;
            let box_rows = if problem.direction == Direction::Forward { FEATURES } else { DEPTH };
            let factor = TensorMap2d { handle, rows, cols, row_stride: cols, box_rows, ..x_map.clone() };
            (rows_of_x(low_rank.product, problem.rank), factor)
        }
    };

    let multiprocessors = cuda_source::device(client).map_or(1, |device| device.multiprocessors as usize);
    // A share of the work is a cluster's.
    let tiles = features.div_ceil(cluster * FEATURES) * tokens.div_ceil(tile.tokens);
    let workers = (multiprocessors / cluster).max(1);
    let schedule = Schedule::new(tiles, depth.div_ceil(DEPTH), workers);
    let partial = schedule.slots() * cluster * (schedule.split - 1) * (tile.tokens / 2) * CONSUMERS * 4;
    let partial = client.empty(partial.max(4));

    let mut arguments = Arguments::new().tensor_map(x_map.clone()).tensor_map(product).tensor_map(factor);
    let tables = tables(client);
    match operands.weight {
        Weight::Dense(weight) => {
            arguments = arguments.tensor_map(dense_map(problem, weight, element));
        }
        Weight::FourBit(weight) => {
            arguments = arguments.tensor_map(codes_map(problem, weight));
            let (absmax, nested) = weight.absmax.buffers(&tables);
            arguments = arguments.read(absmax).read(nested).read(&tables);
        }
    }
    let arguments = arguments.read(operands.bias.unwrap_or(&tables)).read_write(&partial);
    let arguments = arguments.counters(&arrivals(client, &partial, multiprocessors));
    let arguments = match tile.store_tokens(problem) {
        0 => arguments.write(out),
        box_rows => arguments.tensor_map_write(TensorMap2d {
            handle: out.clone(),
            rows: tokens,
            cols: features,
            row_stride: features,
            box_rows,
            ..x_map.clone()
        }),
    };
    let arguments = arguments.params(Params::new(problem, operands, schedule));
    let cubes = (schedule.items().min(workers) * cluster) as u32;
    cuda_source::launch(client, &source(tile, problem), (cubes, 1, 1), arguments).map_err(refused)
}

fn dense_map(problem: &Problem, weight: &Handle, element: TensorElement) -> TensorMap2d {
    TensorMap2d {
        handle: weight.clone(),
        rows: problem.out_features,
        cols: problem.in_features,
        row_stride: problem.in_features,
        box_rows: if problem.direction == Direction::Forward { FEATURES } else { DEPTH },
        box_cols: 64,
        swizzle: Swizzle::B128,
        element,
    }
}

/// Codes as bytes: `[out_features, in_features / 2]`.
fn codes_map(problem: &Problem, weight: &DeviceWeight) -> TensorMap2d {
    let forward = problem.direction == Direction::Forward;
    TensorMap2d {
        handle: weight.codes.clone(),
        rows: problem.out_features,
        cols: problem.in_features / 2,
        row_stride: problem.in_features / 2,
        box_rows: if forward { FEATURES } else { DEPTH },
        box_cols: if forward { DEPTH / 2 } else { FEATURES / 2 },
        swizzle: if forward { Swizzle::None } else { Swizzle::B64 },
        element: TensorElement::U8,
    }
}

/// The text of a variant; each is put together once.
pub(super) fn source(tile: Tile, problem: &Problem) -> Source {
    type Key = (Tile, Direction, bool, FloatFormat, FloatFormat);
    static SOURCES: LazyLock<Mutex<HashMap<Key, Source>>> = LazyLock::new(Mutex::default);
    let dense = problem.blocksize.is_none();
    let key = (tile, problem.direction, dense, problem.format, problem.out);
    let mut sources = SOURCES.lock().unwrap_or_else(PoisonError::into_inner);
    let make = || {
        let half = problem.format == FloatFormat::F16;
        let mut text = String::new();
        for (name, value) in [
            ("TRANSPOSED", usize::from(problem.direction == Direction::InputGradient)),
            ("DENSE", dense.into()),
            ("F16", half.into()),
            ("OUT_F32", (problem.out == FloatFormat::F32).into()),
            ("BN", tile.tokens),
            ("STAGES", tile.stages),
            ("CLUSTER", tile.cluster()),
            ("STORE_TOKENS", tile.store_tokens(problem)),
        ] {
            let _ = writeln!(text, "#define {name} {value}");
        }
        text.push_str(&wgmma(tile.tokens, half));
        text.push_str(TEXT);
        Source::new("matmul", THREADS, text)
    };
    sources.entry(key).or_insert_with(make).clone()
}

/// The two macros around wgmma, whose operands are as many as the tile has accumulators.
fn wgmma(tokens: usize, half: bool) -> String {
    let count = tokens / 2;
    let list = |item: &dyn Fn(usize) -> String| (0..count).map(item).collect::<Vec<_>>().join(",");
    let registers = list(&|i| format!("%{i}"));
    let outputs = list(&|i| format!("\"+f\"(d[{i}])"));
    let format = if half { "f16" } else { "bf16" };
    let instruction = format!("wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.{format}.{format} {{{registers}}}, ");
    let predicate = |operand| format!("{{ .reg .pred p; setp.ne.b32 p, %{operand}, 0; ");
    let n = count;
    format!(
        "#define WGMMA(d, a, x, add) asm volatile(\"{}{instruction}{{%{n},%{},%{},%{}}}, %{}, p, 1, 1, 0; }}\" \
         : {outputs} : \"r\"(a[0]), \"r\"(a[1]), \"r\"(a[2]), \"r\"(a[3]), \"l\"(x), \"r\"(add))\n\
         #define WGMMA_SHARED(d, a, x, transposed, add) asm volatile(\"{}{instruction}%{n}, %{}, p, 1, 1, %{}, 0; }}\" \
         : {outputs} : \"l\"(a), \"l\"(x), \"n\"(transposed), \"r\"(add))\n",
        predicate(n + 5),
        n + 1,
        n + 2,
        n + 3,
        n + 4,
        predicate(n + 3),
        n + 1,
        n + 2,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wgmma_numbers_its_operands() {
        let text = wgmma(64, false);
        assert!(text.contains("m64n64k16.f32.bf16.bf16"));
        assert!(text.contains("setp.ne.b32 p, %37, 0; "), "{text}");
        assert!(text.contains("{%32,%33,%34,%35}, %36, p, 1, 1, 0; }"), "{text}");
        assert!(text.contains("setp.ne.b32 p, %35, 0; "), "{text}");
        assert!(text.contains("%32, %33, p, 1, 1, %34, 0; }"), "{text}");
    }
}
