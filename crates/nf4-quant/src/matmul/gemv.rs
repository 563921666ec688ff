//! y = x Wᵀ for 1 to 16 tokens, as in generation: bound by reading the codes once.
//!
//! **Idea.** Multiplying is free on tensor cores, decoding is not. So a byte of codes, two weights, becomes a pair of
//! 16-bit values with one lookup, and absmax is applied to sums instead of weights: blocks have 64 columns or more, so
//! the sums of 64 columns are multiplied by it, in f32.
//!
//! **Layout.**
//!
//! - A warp takes 16 rows of W and 256 columns at a time. A lane reads 16-byte pieces of a row's codes straight from
//!   memory, two steps ahead. Shared memory holds the 256 pairs once for each lane, in that lane's own bank. The pairs
//!   are fragments of `mma.sync` as they are.
//! - The order of columns within a sum is free as long as W and x keep the same one, so a lane's 32 consecutive codes
//!   are its part of the fragments. One instruction then has columns of two blocks of W, whose sums must stay apart. So
//!   x fills the eight columns of its fragment like this:
//!
//!   ```text
//!   lanes of a row    columns 0 to 3 of x     columns 4 to 7 of x
//!   0 and 1           tokens 0 to 3           zero                  first block of W
//!   2 and 3           zero                    tokens 0 to 3         second block of W
//!   ```
//!
//! - LoRA's product is one more `mma` for each 16 ranks, from the factor as it lies in memory, into the same sums.
//! - The warps of a cube take other rows, or other columns of the same rows, whichever leaves fewest multiprocessors
//!   idle (`Shape`). Their sums are added in a fixed order: the same operands give the same bits.
//!
//! **Rounding** differs from the other kernels, which round each weight to 16 bits. Here the codebook's 16 values are
//! rounded instead, scaled by the factor that minimises their error (`book`). The mean error of a weight is 0.38 (bf16)
//! or 0.32 (f16) of what rounding each product leaves, and FP4's values are exact.
//!
//! **Bound.** Memory: 0.5 bytes per element of W and 1/64 of statistics. A lookup per byte of codes lets shared memory
//! serve 32 bytes of codes per cycle and multiprocessor; about 340 instructions (counted in the machine code) for the 2
//! KB that a warp takes at once let the schedulers serve 24. An H200's memory delivers 19.
//!
//! **Today**, on an H100 (device copy: 3.02 TB/s), bf16, double quantization: 50.7 µs or 2.39 TB/s for one token by
//! 28672 x 8192. `docs/src/kernels/matmul.md` has more tokens and what was not tried.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};

use cubecl::client::Client;
use cubecl::server::Handle;
use cuda_source::{Arguments, CudaDevice, Source};
use half::{bf16, f16};

use super::{Direction, Operands, Problem, Weight, check_alignment, refused};
use crate::kernels::{DeviceAbsmax, MAP_START, tables};
use crate::{FloatFormat, QuantError, QuantType};

const TEXT: &str = concat!(cuda_source::prelude!(), include_str!("gemv.cu"));
/// The most tokens.
const TOKENS: usize = 16;
/// Rows of W that a warp takes.
const ROWS: usize = 16;
/// Columns that a warp takes at once.
const STEP: usize = 256;
const WARPS: usize = 8;

/// Whether the kernel takes a problem.
pub(super) fn fits(device: &CudaDevice, problem: &Problem) -> bool {
    let Problem { tokens, out_features, in_features, direction, rank, format, out, blocksize } = *problem;
    let small = |rows: usize, cols: usize| (rows as u64).saturating_mul(cols as u64) < u64::from(u32::MAX);
    device.compute_capability >= (8, 0)
        && direction == Direction::Forward
        && (1..=TOKENS).contains(&tokens)
        && format != FloatFormat::F32
        && (out == format || out == FloatFormat::F32)
        // 64 columns share one absmax.
        && blocksize.is_some_and(|blocksize| blocksize >= 64)
        && in_features.is_multiple_of(64)
        && out_features > 0
        && in_features > 0
        && small(out_features, in_features)
        && small(out_features, rank)
}

/// How cubes share a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    /// Warps of a cube that take different rows; the others share them and take different columns.
    row_warps: usize,
    cubes: usize,
}

impl Shape {
    /// The one with the fewest steps of its busiest warp.
    fn new(problem: &Problem, workers: usize) -> Self {
        let steps = problem.in_features.div_ceil(STEP);
        let tiles = |row_warps: usize| problem.out_features.div_ceil(row_warps * ROWS);
        let cost = |row_warps: usize| {
            let rounds = tiles(row_warps).div_ceil(workers);
            // A tile's end, where warps add up their sums, is taken for half a step.
            rounds * (2 * steps.div_ceil(WARPS / row_warps) + 1)
        };
        let row_warps = [1, 2, 4, 8].into_iter().min_by_key(|n| cost(*n)).unwrap_or(1);
        Self { row_warps, cubes: tiles(row_warps).min(workers) }
    }
}

/// `struct Params` of gemv.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    rows: u32,
    columns: u32,
    tokens: u32,
    log2_blocksize: u32,
    log2_nested: u32,
    offset: u32,
    map: u32,
    log2_row_warps: u32,
    has_bias: u32,
    rank: u32,
    scale: f32,
    unscale: f32,
    codebook: [u32; 8],
}

/// A variant of the kernel: fours of tokens, and cubes per multiprocessor, which registers allow.
fn variant(tokens: usize) -> (usize, usize) {
    match tokens {
        ..=4 => (1, 2),
        5..=8 => (2, 2),
        _ => (4, 1),
    }
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
    check_alignment("x", operands.x)?;
    check_alignment("codes", &weight.codes)?;
    let multiprocessors = cuda_source::device(client).map_or(1, |device| device.multiprocessors as usize);
    let (_, cubes) = variant(problem.tokens);
    let shape = Shape::new(problem, multiprocessors * cubes);
    let Book { words, scale } = book(weight.quant_type, problem.format);
    let (log2_nested, offset) = match &weight.absmax {
        DeviceAbsmax::Plain(_) => (0, 0),
        DeviceAbsmax::Nested { blocksize, .. } => (blocksize.ilog2(), weight.num_blocks().div_ceil(*blocksize)),
    };
    let params = Params {
        rows: problem.out_features as u32,
        columns: problem.in_features as u32,
        tokens: problem.tokens as u32,
        log2_blocksize: weight.blocksize.ilog2(),
        log2_nested,
        offset: offset as u32,
        map: MAP_START as u32,
        log2_row_warps: shape.row_warps.ilog2(),
        has_bias: operands.bias.is_some().into(),
        rank: problem.rank as u32,
        scale,
        unscale: 1.0 / scale,
        codebook: words,
    };
    let tables = tables(client);
    let (absmax, nested) = weight.absmax.buffers(&tables);
    // Without a low-rank product its operands are never read.
    let (product, factor) =
        operands.low_rank.map_or((operands.x, &tables), |low_rank| (low_rank.product, low_rank.factor));
    let arguments = Arguments::new()
        .read(&weight.codes)
        .read(absmax)
        .read(nested)
        .read(&tables)
        .read(operands.x)
        .read(product)
        .read(factor)
        .read(operands.bias.unwrap_or(&tables))
        .write(out)
        .params(params);
    let nested = matches!(weight.absmax, DeviceAbsmax::Nested { .. });
    cuda_source::launch(client, &source(problem, nested), (shape.cubes as u32, 1, 1), arguments).map_err(refused)
}

pub(super) fn source(problem: &Problem, nested: bool) -> Source {
    let (token_tiles, cubes) = variant(problem.tokens);
    let defines = [
        cuda_source::FloatFormat::from(problem.format).define(),
        ("OUT_F32", i64::from(problem.out == FloatFormat::F32)),
        ("NESTED", nested.into()),
        ("TAIL", i64::from(!problem.in_features.is_multiple_of(STEP))),
        ("TOKEN_TILES", token_tiles as i64),
        ("ROW_TILES", 1),
        ("WARPS", WARPS as i64),
        ("CUBES", cubes as i64),
    ];
    Source::with_defines(TEXT, "gemv", 32 * WARPS as u32, &defines)
}

/// A codebook in 16 bits.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Book {
    /// Pairs of entries, the first in the low half.
    words: [u32; 8],
    /// What the entries were multiplied by.
    scale: f32,
}

/// The codebook times that number of 4,096 from 1 to 2 for which rounding to 16 bits leaves the least mean square
/// error. Codes are taken as equally frequent, which NF4 is made for; FP4's values come out exact.
fn book(quant_type: QuantType, format: FloatFormat) -> Book {
    static BOOKS: LazyLock<Mutex<HashMap<(QuantType, FloatFormat), Book>>> = LazyLock::new(Mutex::default);
    let mut books = BOOKS.lock().unwrap_or_else(PoisonError::into_inner);
    *books.entry((quant_type, format)).or_insert_with(|| {
        let narrow = |value: f32| match format {
            FloatFormat::F16 => (f16::from_f32(value).to_bits(), f16::from_f32(value).to_f32()),
            _ => (bf16::from_f32(value).to_bits(), bf16::from_f32(value).to_f32()),
        };
        let codebook = quant_type.codebook();
        let error = |scale: f32| {
            let one = |value: f32| (f64::from(narrow(value * scale).1) / f64::from(scale) - f64::from(value)).powi(2);
            codebook.iter().map(|value| one(*value)).sum::<f64>()
        };
        let scales = (0..4096).map(|i| 1.0 + i as f32 / 4096.0);
        let scale = scales.min_by(|a, b| error(*a).total_cmp(&error(*b))).unwrap_or(1.0);
        let bits = |i: usize| u32::from(narrow(codebook[i] * scale).0);
        Book { words: std::array::from_fn(|i| bits(2 * i) | bits(2 * i + 1) << 16), scale }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The mean square error of the 16 values, and that of rounding products with random absmax.
    fn errors(quant_type: QuantType, format: FloatFormat) -> (f64, f64) {
        let wide = |bits: u32| match format {
            FloatFormat::F16 => f16::from_bits(bits as u16).to_f64(),
            _ => bf16::from_bits(bits as u16).to_f64(),
        };
        let round = |value: f64| match format {
            FloatFormat::F16 => f16::from_f64(value).to_f64(),
            _ => bf16::from_f64(value).to_f64(),
        };
        let Book { words, scale } = book(quant_type, format);
        let entry = |code: usize| wide(words[code / 2] >> (code % 2 * 16) & 0xffff) / f64::from(scale);
        let codebook = quant_type.codebook().iter().map(|v| f64::from(*v)).enumerate();
        let ours = codebook.clone().map(|(code, value)| (entry(code) - value).powi(2)).sum::<f64>() / 16.0;
        let absmax = (0..1000).map(|i| 2.0_f64.powf(f64::from(i) / 1000.0));
        let products = absmax.flat_map(|a| codebook.clone().map(move |(_, value)| (a, a * value)));
        let theirs = products.map(|(a, product)| ((round(product) - product) / a).powi(2)).sum::<f64>() / 16_000.0;
        (ours.sqrt(), theirs.sqrt())
    }

    #[test]
    fn a_rounded_codebook_is_better_than_rounded_products() {
        for format in [FloatFormat::BF16, FloatFormat::F16] {
            let (ours, theirs) = errors(QuantType::Nf4, format);
            assert!(ours < 0.4 * theirs, "{format}: {ours:.2e} of {theirs:.2e}");
            // f32 has 2/3 and its like to 2^-25, and the smallest value to its own last bit.
            let (ours, theirs) = errors(QuantType::Fp4, format);
            assert!(ours < 1e-6 && theirs > 1e-5, "{format}: {ours:.2e} of {theirs:.2e}");
        }
    }

    #[test]
    fn warps_are_kept_busy() {
        let shape = |out_features, in_features| {
            let problem = Problem {
                tokens: 1,
                out_features,
                in_features,
                direction: Direction::Forward,
                rank: 0,
                format: FloatFormat::BF16,
                out: FloatFormat::BF16,
                blocksize: Some(64),
            };
            Shape::new(&problem, 264)
        };
        // 1,792 tiles of 16 rows are 6.8 rounds of 264 cubes.
        assert_eq!(shape(28672, 8192), Shape { row_warps: 1, cubes: 264 });
        // One round, each warp two steps.
        assert_eq!(shape(4096, 4096), Shape { row_warps: 1, cubes: 256 });
        // Too few columns for eight warps.
        assert!(shape(100_000, 256).row_warps == 8);
        assert_eq!(shape(8, 64).cubes, 1);
    }
}
