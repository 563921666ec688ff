//! The product on Hopper: `wgmma`, with the weight dequantized in registers.
//!
//! **Idea.** `wgmma` can take its left operand from registers. So the kernel computes the transposed tile Yᵀ\[features,
//! tokens\] = A Xᵀ with A = W or Wᵀ, and each thread turns 4-bit codes into just the fragment of A that it feeds to the
//! tensor cores. Shared memory holds activations and codes, and codes are a quarter of the bytes of a 16-bit weight. A
//! dense weight takes the same kernel with A in shared memory.
//!
//! **Layout.** One persistent cube per multiprocessor computes tiles of 128 features x 256 tokens, in steps of 64
//! columns:
//!
//! - Two cubes with neighbouring features form a cluster and share their X: each loads half of a tile for both, by TMA
//!   multicast. A stage of the ring is free again when both have read it.
//! - In a cube, one thread loads. Three warps make tables: for each block of the weight the 16 values that a code can
//!   mean, times absmax and rounded. Forward, they also bring the bytes of the codes into fragment order. Two warp
//!   groups compute.
//! - Forward, a thread's codes come from two blocks. The thread holds both tables in registers, low bytes apart from
//!   high bytes, and one byte permutation looks up four codes. A fragment is made two rounds of 16 columns ahead.
//! - For the gradient every row of W has its own absmax. Values come from shared memory, three rounds ahead, by lookups
//!   that never meet in a bank; the address of one is a byte permutation.
//! - LoRA's product comes first, as more columns of A and X, into the same sums. Dropout of the update, in a gradient, is
//!   applied to the sums before those of the weight are added.
//! - 16-bit results leave through shared memory, by TMA, while the next tile is computed.
//! - Tiles that would not fill the last round are split along the depth, and partial sums are added in a fixed order:
//!   the same operands give the same bits.
//!
//! **Bound.** Power: at 700 W the clock of an H100 falls from 1,980 to some 1,450 MHz. Waiting less only lowers the
//! clock further, so what counts is what a product costs beside its `wgmma`: instructions, and bytes on their way from
//! L2.
//!
//! **Today**, on an H100 at its power limit: 8192 x 11008 x 4096 runs at 654 TFLOP/s forward and 600 for the gradient,
//! with a dense weight at 714 and 729; cuBLAS has 705 to 718 for the dense product. `docs/src/kernels/matmul.md` has
//! the versions on the way here, the counters, and what to try next.
//!
//! An earlier version did not always give the same bits, and the cause is not known: `docs/src/known-issues.md`.

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
    cuda_source::dropout!(),
    include_str!("common.cu"),
    cuda_source::tma_barriers!(),
    include_str!("hopper_instructions.cu"),
    include_str!("hopper_stages.cu"),
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

/// The variant for groups, each with a 4-bit weight, in tiles of so many rows; `None` where this kernel does not apply.
pub(super) fn grouped_tile(device: &CudaDevice, problem: &Problem, tile_rows: usize) -> Option<Tile> {
    let fits = device.takes_large_static_memory()
        && tile(device, problem, false).is_some()
        && problem.blocksize.is_some()
        // The tiles of a low-rank factor are arranged for all groups at once.
        && (problem.rank == 0 || problem.features().is_multiple_of(FEATURES));
    let stages = match tile_rows {
        64 => 6,
        128 => 5,
        _ => return None,
    };
    fits.then_some(Tile { tokens: tile_rows, stages })
}

/// The buffers and tensor maps of a product of groups, up to those that every kernel has.
pub(super) fn grouped_arguments(
    client: &Client,
    tile: Tile,
    problem: &Problem,
    groups: usize,
    operands: &Operands<'_>,
) -> Result<Arguments, QuantError> {
    let Weight::FourBit(weight) = operands.weight else {
        return Err(QuantError::Matmul("groups of dense weights have no kernel with wgmma".into()));
    };
    let element = cuda_source::FloatFormat::from(problem.format).tensor_element();
    let rows_of_x = |handle: &Handle, cols| TensorMap2d {
        handle: handle.clone(),
        rows: problem.tokens,
        cols,
        row_stride: cols,
        box_rows: tile.tokens,
        box_cols: DEPTH,
        swizzle: Swizzle::B128,
        element,
    };
    let x_map = rows_of_x(operands.x, problem.depth());
    // All groups, as if they were one weight.
    let all = match problem.direction {
        Direction::Forward => Problem { out_features: groups * problem.out_features, ..*problem },
        Direction::InputGradient => Problem { rank: groups * problem.rank, ..*problem },
    };
    let (product, factor) = match operands.low_rank {
        None => (x_map.clone(), x_map.clone()),
        Some(low_rank) => {
            let Arranged { handle, rows, cols } = arrange(client, &all, low_rank.factor).map_err(refused)?;
            let box_rows = if problem.direction == Direction::Forward { FEATURES } else { DEPTH };
            let factor = TensorMap2d { handle, rows, cols, row_stride: cols, box_rows, ..x_map.clone() };
            (rows_of_x(low_rank.product, problem.rank), factor)
        }
    };
    let tables = tables(client);
    let (absmax, nested) = weight.absmax.buffers(&tables);
    let codes = codes_map(&Problem { out_features: groups * problem.out_features, ..*problem }, weight);
    let arguments = Arguments::new().tensor_map(x_map).tensor_map(product).tensor_map(factor).tensor_map(codes);
    Ok(arguments.read(absmax).read(nested).read(&tables))
}

/// Cubes that run at once.
pub(super) fn workers(client: &Client) -> usize {
    cuda_source::device(client).map_or(1, |device| device.multiprocessors as usize)
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
    cuda_source::launch(client, &source(tile, problem, operands.mask().is_some()), (cubes, 1, 1), arguments)
        .map_err(refused)
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
pub(super) fn source(tile: Tile, problem: &Problem, masked: bool) -> Source {
    source_of(tile, problem, false, masked)
}

/// The kernel for one weight, or for groups that have a weight each; with dropout of the low-rank part or without.
pub(super) fn source_of(tile: Tile, problem: &Problem, grouped: bool, masked: bool) -> Source {
    type Key = (Tile, Direction, bool, FloatFormat, FloatFormat, [bool; 2]);
    static SOURCES: LazyLock<Mutex<HashMap<Key, Source>>> = LazyLock::new(Mutex::default);
    let dense = problem.blocksize.is_none();
    let key = (tile, problem.direction, dense, problem.format, problem.out, [grouped, masked]);
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
            // A tile of a group ends where its tokens do, which TMA does not know.
            ("STORE_TOKENS", if grouped { 0 } else { tile.store_tokens(problem) }),
            ("GROUPED", grouped.into()),
            ("DROPOUT", masked.into()),
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
