//! y = x Wᵀ for 1 to 16 tokens, as in generation: bound by reading the codes once. Up to three weights that share x take
//! one launch, with LoRA's updates of tokens that have different adapters ([`super::joined`]).
//!
//! **Idea.** Multiplying is free on tensor cores, decoding is not. So a byte of codes, two weights, becomes a pair of
//! 16-bit values with one lookup, and absmax is applied to sums instead of weights: blocks have 64 columns or more, so
//! the sums of 64 columns are multiplied by it, in f32.
//!
//! **Layout.**
//!
//! - A warp takes 16 rows of W (32 from nine tokens on) and 256 columns at a time. A lane reads pieces of a row's codes
//!   straight from memory, two steps ahead. Shared memory holds the 256 pairs once for each lane, in that lane's own bank.
//!   The pairs are fragments of `mma.sync` as they are.
//! - The order of columns within a sum is free as long as W and x keep the same one, so a lane's consecutive codes are its
//!   part of the fragments. From five tokens on these are 16 of each block, and the eight columns of a fragment of x are
//!   eight tokens. Up to four, a lane reads 32 codes at once. One instruction then has columns of two blocks of W, whose
//!   sums must stay apart, and x fills its columns like this:
//!
//!   ```text
//!   lanes of a row    columns 0 to 3 of x     columns 4 to 7 of x
//!   0 and 1           tokens 0 to 3           zero                  first block of W
//!   2 and 3           zero                    tokens 0 to 3         second block of W
//!   ```
//!
//! - LoRA's product is one more `mma` for each 16 ranks, from the factor as it lies in memory, into the same sums. Where
//!   tokens have adapters of a stack, the cubes compute `x Aᵀ` first, a part each, while their first codes are on the way; a
//!   counter tells when all parts are there. What a part reads goes before all codes but the first, because everything waits for it in
//!   the end. The second factor comes with a tile's codes. All cubes fit on the device at once, so none waits for one that can't start.
//! - The warps of a cube take other rows, or other columns of the same rows, whichever leaves fewest multiprocessors
//!   idle (`Shape`). Their sums are added in a fixed order: the same operands give the same bits.
//!
//! **Rounding** differs from the other kernels, which round each weight to 16 bits. Here the codebook's 16 values are
//! rounded instead, scaled by the factor that minimises their error (`book`). The mean error of a weight is 0.38 (bf16)
//! or 0.32 (f16) of what rounding each product leaves, and FP4's values are exact.
//!
//! **Bound.** Memory: 0.5 bytes per element of W and 1/64 of statistics. A lookup per byte of codes lets shared memory
//! serve 32 bytes of codes per cycle and multiprocessor; about 350 instructions (counted by Nsight Compute) for the 2
//! KB that a warp takes at once let the schedulers serve 23. An H200's memory delivers 19.
//!
//! **Today**: `docs/src/kernels/matmul.md` has the table, and what was tried and is slower.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};

use cubecl::client::Client;
use cubecl::server::Handle;
use cuda_source::{Arguments, CudaDevice, Source};
use half::{bf16, f16};

use super::joined::{Joined, JoinedWeight, Spans};
use super::{Direction, Operands, Problem, Weight, check_alignment, refused};
use crate::kernels::{DeviceAbsmax, DeviceWeight, MAP_START, tables};
use crate::{FloatFormat, QuantError, QuantType};

const TEXT: &str = concat!(cuda_source::prelude!(), include_str!("few_tokens.cu"), include_str!("gemv.cu"));
/// The most tokens.
pub(super) const TOKENS: usize = 16;
/// Weights of a launch.
pub(super) const MATRICES: usize = 3;
/// Columns of one part of `x Aᵀ`.
const CHUNK: usize = 1024;
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

/// How cubes share weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    /// Warps of a cube that take different rows; the others share them and take different columns.
    row_warps: usize,
    cubes: usize,
}

impl Shape {
    /// The one with the fewest steps of its busiest warp, for weights of `rows` rows of which a warp takes `warp_rows`.
    fn new(rows: &[usize], columns: usize, warp_rows: usize, workers: usize) -> Self {
        let steps = columns.div_ceil(STEP);
        let tiles = |row_warps: usize| rows.iter().map(|rows| rows.div_ceil(row_warps * warp_rows)).sum::<usize>();
        let cost = |row_warps: usize| {
            let rounds = tiles(row_warps).div_ceil(workers);
            // A tile's end, where warps add up their sums, is taken for half a step.
            rounds * (2 * steps.div_ceil(WARPS / row_warps) + 1)
        };
        let row_warps = [1, 2, 4, 8].into_iter().min_by_key(|n| cost(*n)).unwrap_or(1);
        Self { row_warps, cubes: tiles(row_warps).min(workers) }
    }
}

/// `struct Matrix` of gemv.cu.
#[repr(C)]
#[derive(Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
struct MatrixParams {
    rows: u32,
    offset: u32,
    rank: u32,
    first_rank: u32,
}

/// `struct Params` of gemv.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Params {
    columns: u32,
    tokens: u32,
    log2_blocksize: u32,
    log2_nested: u32,
    map: u32,
    log2_row_warps: u32,
    biases: u32,
    pub ranks: u32,
    scale: f32,
    unscale: f32,
    codebook: [u32; 8],
    matrices: [MatrixParams; MATRICES],
}

impl Params {
    /// For weights that are alike; what they share is taken from the first.
    pub fn new(problem: &Problem, matrices: &[Matrix<'_>]) -> Self {
        let weight = matrices[0].weight;
        let Book { words, scale } = book(weight.quant_type, problem.format);
        let nested = nested_blocksize(weight);
        let mut ranks = 0;
        let mut params = [MatrixParams::default(); MATRICES];
        for (i, params) in params.iter_mut().enumerate() {
            *params = MatrixParams { first_rank: ranks, ..MatrixParams::default() };
            let Some(Matrix { weight, rows, low_rank, .. }) = matrices.get(i) else { continue };
            params.rows = *rows as u32;
            params.offset = nested.map_or(0, |blocksize| weight.num_blocks().div_ceil(blocksize)) as u32;
            params.rank = low_rank.as_ref().map_or(0, |factors| factors.rank) as u32;
            ranks += params.rank;
        }
        Self {
            columns: problem.in_features as u32,
            tokens: problem.tokens as u32,
            log2_blocksize: weight.blocksize.ilog2(),
            log2_nested: nested.map_or(0, usize::ilog2),
            map: MAP_START as u32,
            log2_row_warps: 0,
            biases: matrices.iter().enumerate().map(|(i, matrix)| u32::from(matrix.bias.is_some()) << i).sum(),
            ranks,
            scale,
            unscale: 1.0 / scale,
            codebook: words,
            matrices: params,
        }
    }
}

/// Blocks of absmax that share one, under double quantization.
pub(super) fn nested_blocksize(weight: &DeviceWeight) -> Option<usize> {
    match &weight.absmax {
        DeviceAbsmax::Plain(_) => None,
        DeviceAbsmax::Nested { blocksize, .. } => Some(*blocksize),
    }
}

/// How the kernel is made for a number of tokens.
#[derive(Clone, Copy)]
struct Variant {
    /// Tokens of a tile.
    tile: usize,
    token_tiles: usize,
    /// 16 rows each, of a warp.
    row_tiles: usize,
    /// Per multiprocessor, which registers allow.
    cubes: usize,
}

fn variant(tokens: usize) -> Variant {
    let [tile, token_tiles, row_tiles, cubes] = match tokens {
        ..=4 => [4, 1, 1, 2],
        5..=8 => [8, 1, 1, 2],
        _ => [8, 2, 2, 1],
    };
    Variant { tile, token_tiles, row_tiles, cubes }
}

/// Where low-rank updates come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Updates {
    None,
    /// The product with x is given.
    Given,
    /// Each token has one of a stack, or none.
    Stacked,
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
    let matrix = Matrix {
        weight,
        rows: problem.out_features,
        bias: operands.bias,
        out,
        low_rank: operands.low_rank.map(|low_rank| Factors {
            rank: problem.rank,
            lora_a: None,
            lora_b: low_rank.factor,
            scalings: None,
        }),
    };
    let call = Call {
        updates: if problem.rank > 0 { Updates::Given } else { Updates::None },
        x: operands.x,
        product: operands.low_rank.map(|low_rank| low_rank.product),
        spans: None,
        half_bias: false,
        matrices: &[matrix],
    };
    run(client, problem, &call)
}

/// [`super::joined::launch_on`], its operands checked.
pub(super) fn launch_joined(client: &Client, joined: &Joined<'_>) -> Result<(), QuantError> {
    let matrices = matrices(joined);
    let adapted = matrices.iter().any(|matrix| matrix.low_rank.is_some());
    let call = Call {
        updates: if adapted { Updates::Stacked } else { Updates::None },
        x: joined.x,
        product: None,
        spans: joined.spans,
        half_bias: true,
        matrices: &matrices,
    };
    run(client, &joined.problem(), &call)
}

/// The weights of a joined launch, with their stacks where there are tokens with adapters.
pub(super) fn matrices<'a>(joined: &Joined<'a>) -> Vec<Matrix<'a>> {
    let matrix = |each: &JoinedWeight<'a>| Matrix {
        weight: each.weight,
        rows: each.out_features,
        bias: each.bias,
        out: each.out,
        low_rank: joined.spans.and(each.stack).map(|stack| Factors {
            rank: stack.rank,
            lora_a: Some(stack.lora_a),
            lora_b: stack.lora_b,
            scalings: Some(stack.scalings),
        }),
    };
    joined.weights.iter().map(matrix).collect()
}

/// One weight of a launch.
pub(super) struct Matrix<'a> {
    pub weight: &'a DeviceWeight,
    pub rows: usize,
    pub bias: Option<&'a Handle>,
    pub out: &'a Handle,
    pub low_rank: Option<Factors<'a>>,
}

/// A weight's low-rank update.
pub(super) struct Factors<'a> {
    pub rank: usize,
    pub lora_a: Option<&'a Handle>,
    pub lora_b: &'a Handle,
    pub scalings: Option<&'a Handle>,
}

/// A launch.
struct Call<'a> {
    updates: Updates,
    x: &'a Handle,
    /// The low-rank product, where it is given.
    product: Option<&'a Handle>,
    spans: Option<Spans<'a>>,
    /// Whether biases are in the format of x.
    half_bias: bool,
    matrices: &'a [Matrix<'a>],
}

fn run(client: &Client, problem: &Problem, call: &Call<'_>) -> Result<(), QuantError> {
    let &Call { updates, x, product, spans, half_bias, matrices } = call;
    let [Matrix { weight, .. }, ..] = matrices else { return Ok(()) };
    check_alignment("x", x)?;
    for matrix in matrices {
        check_alignment("codes", &matrix.weight.codes)?;
    }
    let multiprocessors = cuda_source::device(client).map_or(1, |device| device.multiprocessors as usize);
    let Variant { row_tiles, cubes, .. } = variant(problem.tokens);
    let rows: Vec<usize> = matrices.iter().map(|matrix| matrix.rows).collect();
    let shape = Shape::new(&rows, problem.in_features, 16 * row_tiles, multiprocessors * cubes);
    let params = Params { log2_row_warps: shape.row_warps.ilog2(), ..Params::new(problem, matrices) };
    let ranks = params.ranks;
    let tables = tables(client);
    let mut arguments = of_factors(of_weights(Arguments::new(), matrices, &tables), matrices, &tables);
    let stacked = updates == Updates::Stacked;
    let parts = match stacked {
        true => client.empty(problem.in_features.div_ceil(CHUNK) * problem.tokens * ranks as usize * 4),
        false => tables.clone(),
    };
    arguments =
        arguments.read(&tables).read(x).read(product.unwrap_or(x)).read(spans.map_or(&tables, |spans| spans.words));
    arguments = match stacked {
        true => arguments.write(&parts).counters(&cuda_source::counters(client, &parts, 2)),
        false => arguments.read(&parts).read(&parts),
    };
    let nested = nested_blocksize(weight).is_some();
    let (source, arguments) = (source(problem, nested, updates, half_bias), outs(arguments, matrices));
    cuda_source::launch(client, &source, (shape.cubes as u32, 1, 1), arguments.params(params)).map_err(refused)
}

/// What `pick` takes of each weight that there may be. What a launch does not use is never read.
fn of_each(mut arguments: Arguments, matrices: &[Matrix<'_>], pick: impl Fn(&Matrix<'_>) -> Handle) -> Arguments {
    for i in 0..MATRICES {
        arguments = arguments.read(&pick(matrices.get(i).unwrap_or(&matrices[0])));
    }
    arguments
}

/// Codes, statistics and biases.
pub(super) fn of_weights(arguments: Arguments, matrices: &[Matrix<'_>], tables: &Handle) -> Arguments {
    let arguments = of_each(arguments, matrices, |matrix| matrix.weight.codes.clone());
    let arguments = of_each(arguments, matrices, |matrix| matrix.weight.absmax.buffers(tables).0.clone());
    let arguments = of_each(arguments, matrices, |matrix| matrix.weight.absmax.buffers(tables).1.clone());
    of_each(arguments, matrices, |matrix| matrix.bias.unwrap_or(tables).clone())
}

/// First factors, second factors and scalings.
pub(super) fn of_factors(mut arguments: Arguments, matrices: &[Matrix<'_>], tables: &Handle) -> Arguments {
    let picks: [fn(&Factors<'_>) -> Option<Handle>; 3] = [
        |factors| factors.lora_a.cloned(),
        |factors| Some(factors.lora_b.clone()),
        |factors| factors.scalings.cloned(),
    ];
    for pick in picks {
        let factor = |matrix: &Matrix<'_>| matrix.low_rank.as_ref().and_then(pick).unwrap_or_else(|| tables.clone());
        arguments = of_each(arguments, matrices, factor);
    }
    arguments
}

/// Results.
pub(super) fn outs(mut arguments: Arguments, matrices: &[Matrix<'_>]) -> Arguments {
    for i in 0..MATRICES {
        arguments = arguments.write(matrices.get(i).unwrap_or(&matrices[0]).out);
    }
    arguments
}

pub(super) fn source(problem: &Problem, nested: bool, updates: Updates, half_bias: bool) -> Source {
    let Variant { tile, token_tiles, row_tiles, cubes } = variant(problem.tokens);
    let defines = [
        cuda_source::FloatFormat::from(problem.format).define(),
        ("OUT_F32", i64::from(problem.out == FloatFormat::F32)),
        ("NESTED", nested.into()),
        ("TAIL", i64::from(!problem.in_features.is_multiple_of(STEP))),
        ("HALF_BIAS", half_bias.into()),
        ("ADAPTERS", updates as i64),
        ("TILE", tile as i64),
        ("TOKEN_TILES", token_tiles as i64),
        ("ROW_TILES", row_tiles as i64),
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
        let shape = |rows: &[usize], columns| Shape::new(rows, columns, 16, 264);
        // 1,792 tiles of 16 rows are 6.8 rounds of 264 cubes.
        assert_eq!(shape(&[28672], 8192), Shape { row_warps: 1, cubes: 264 });
        // One round, each warp two steps.
        assert_eq!(shape(&[4096], 4096), Shape { row_warps: 1, cubes: 256 });
        // Three such are 2.9 rounds.
        assert_eq!(shape(&[4096; 3], 4096), Shape { row_warps: 1, cubes: 264 });
        // Too few columns for eight warps.
        assert!(shape(&[100_000], 256).row_warps == 8);
        assert_eq!(shape(&[8], 64).cubes, 1);
    }
}
