//! The products of LoRA that have one narrow side, rank wide (Hu et al., 2021, arXiv 2106.09685, section 4.1).
//!
//! For `y = x Wᵀ + scaling · x Aᵀ Bᵀ` with `A` [rank, in] and `B` [out, rank], and 16-bit activations:
//!
//! | product | call |
//! |---|---|
//! | `U = x Aᵀ` [tokens, rank] | [`project`] of `x` by `A`, [`FactorLayout::RankFirst`] |
//! | `V = scaling · dy B` [tokens, rank] | [`project`] of `dy` by `B`, [`FactorLayout::FeaturesFirst`] |
//! | `dA = Vᵀ x` [rank, in] | [`gradient`] of `x` and `V`, [`FactorLayout::RankFirst`] |
//! | `dB = dyᵀ (scaling · U)` [out, rank] | [`gradient`] of `dy` and scaled `U`, [`FactorLayout::FeaturesFirst`] |
//!
//! [`stacked`] has the first two products of generation, where tokens have different adapters.
//!
//! Each reads one large matrix, `[tokens, features]`, and computes 2 · rank operations per element of it: at rank
//! 64 and an H200's 4.3 TB/s that is 275 TFLOP/s, so memory should be the bound as long as tensor cores do the sums
//! and nothing but that matrix takes part in the traffic.
//!
//! # How
//!
//! - The large matrix goes from memory to registers, once, with 16-byte loads several panels ahead; it never sees
//!   shared memory. The order of a contraction is free as long as both operands keep it, so each lane's contiguous
//!   bytes are taken as that lane's part of `mma`'s fragment. A gradient contracts over tokens, whose values lie in
//!   different rows: it pairs them with byte permutations.
//! - The narrow operand goes through two stages of shared memory. A factor is first rounded and put in fragment
//!   order by a small kernel ([`pack`]); the result serves every projection until the factor changes.
//! - Where one tile per cube would leave multiprocessors idle, several cubes share a tile's contraction and add
//!   their sums in the order of the cubes: the same bits on every run. Either they are one cluster, of up to eight,
//!   and add through distributed shared memory, or up to sixteen write to scratch memory, and one more launch adds, or for few
//!   tokens the last one of a tile. GPUs before Hopper have no clusters.
//! - Dropout is applied to the registers, so no masked copy of `x` exists and none is kept for the backward.
//!
//! Sums are f32 (in tensor cores), rounded once. Relative error (Frobenius) against f64 of the same operands, as
//! predicted: below 2e-5 for f32 results, that of one rounding for 16-bit ones. `tests/low_rank.rs` checks elements.
//!
//! # Measured
//!
//! One H200, bf16, 8192 x 11008: ms (TB/s), and the same of `torch.matmul` in the same run. At ranks 128 and 256 memory
//! is not the bound. `docs/src/kernels/low-rank.md` has all shapes, how the tilings were chosen, and what was not
//! tried.
//!
//! | rank | [`project`] | torch | [`gradient`] | torch |
//! |---|---|---|---|---|
//! | 16 | 0.0441 (4.11) | 0.0471 (3.85) | 0.0482 (3.76) | 0.0472 (3.84) |
//! | 64 | 0.0490 (3.76) | 0.0500 (3.69) | 0.0522 (3.53) | 0.0449 (4.10) |
//! | 128 | 0.0858 (2.19) | 0.0481 (3.91) | 0.1139 (1.65) | 0.0460 (4.09) |
//! | 256 | 0.1525 (1.28) | 0.0678 (2.89) | 0.2189 (0.89) | 0.0693 (2.83) |
//!
//! Rows that are not aligned (features not a multiple of 8) are loaded element by element: right, several times slower.

pub mod oracle;
mod plan;
pub mod stacked;

use bytemuck::{Pod, Zeroable};
use cubecl::client::Client;
use cubecl::server::Handle;
use cuda_source::Arguments;

use crate::elementwise::check_half;
use crate::error::check_size;
use crate::{Dropout, FloatFormat, KernelError};
pub use plan::MAX_RANK;
use plan::{FLAT_THREADS, Kind, Plan, Processors, Variant};

const OPERATION: &str = "low_rank";
/// The most tokens of steps whose launches are dearer than what they do. On an H100 a 7B shape's step of 512 tokens took 57 ms where
/// the last cube of a tile adds, and 67 to 73 with one more launch; one of 2,048 tokens 191, and 176 with it.
const FEW_TOKENS: usize = 512;
/// The most tokens or features: 32-bit indices with room for what the last cube overshoots.
const MAX_LENGTH: usize = 1 << 30;

/// The dimensions of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Rows of the large matrix.
    pub tokens: usize,
    /// Its columns: `in_features` for `x`, `out_features` for `dy`.
    pub features: usize,
    /// The adapter's rank.
    pub rank: usize,
}

/// How a factor, or its gradient, lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FactorLayout {
    /// `[rank, features]`, as `lora_a`.
    RankFirst,
    /// `[features, rank]`, as `lora_b`.
    FeaturesFirst,
}

impl FactorLayout {
    /// Position of an element.
    fn index(self, feature: usize, rank_index: usize, features: usize, rank: usize) -> usize {
        match self {
            Self::RankFirst => rank_index * features + feature,
            Self::FeaturesFirst => feature * rank + rank_index,
        }
    }

    fn flag(self) -> u32 {
        match self {
            Self::RankFirst => 0,
            Self::FeaturesFirst => FLAG_FEATURES_FIRST,
        }
    }
}

/// A factor on the device.
#[derive(Clone, Copy, Debug)]
pub struct Factor<'a> {
    /// f32, `[rank, features]` or `[features, rank]` as `layout` says.
    pub values: &'a Handle,
    /// `in_features` for `lora_a`, `out_features` for `lora_b`.
    pub features: usize,
    /// The adapter's rank.
    pub rank: usize,
    /// Which of the two comes first.
    pub layout: FactorLayout,
}

/// A factor, rounded and in the order of [`project`]'s tensor-core operand.
#[derive(Clone, Debug)]
pub struct PackedFactor {
    packed: Handle,
    features: usize,
    rank: usize,
    format: FloatFormat,
}

/// What a projection writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// The activations' 16-bit format.
    Half,
    /// f32.
    F32,
}

/// Operands of [`project`].
#[derive(Clone, Copy, Debug)]
pub struct Projection<'a> {
    /// `[tokens, features]` of the factor's format.
    pub x: &'a Handle,
    /// What [`pack`] made.
    pub factor: &'a PackedFactor,
    /// `[tokens, rank]` of the [`Output`], which this writes.
    pub out: &'a Handle,
}

/// Operands of [`gradient`].
#[derive(Clone, Copy, Debug)]
pub struct Gradient<'a> {
    /// `[tokens, features]`.
    pub x: &'a Handle,
    /// The product with the narrow side, `[tokens, rank]`, in the format of `x`.
    pub product: &'a Handle,
    /// f32, `[rank, features]` or `[features, rank]`, which this writes.
    pub out: &'a Handle,
}

/// `struct Params` of `kernels.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    seed: [u32; 2],
    tokens: u32,
    features: u32,
    rank: u32,
    splits: u32,
    threshold: u32,
    scale: f32,
    flags: u32,
}

const FLAG_F32_OUT: u32 = 1;
const FLAG_FEATURES_FIRST: u32 = 2;

impl Params {
    /// Dimensions were checked: they fit. Dropout's factor comes to the sums, so that kernels only leave elements out.
    fn new(shape: Shape, scale: f32, dropout: Option<Dropout>, flags: u32) -> Self {
        let dropout = dropout.unwrap_or(Dropout { seed: 0, threshold: 0, scale: 1.0 });
        Self {
            seed: [dropout.seed as u32, (dropout.seed >> 32) as u32],
            tokens: shape.tokens as u32,
            features: shape.features as u32,
            rank: shape.rank as u32,
            splits: 1,
            threshold: dropout.threshold,
            scale: scale * dropout.scale,
            flags,
        }
    }
}

/// Whether this device runs the kernels for a format: CUDA, compute capability 8.0 or later, and 7.5 for f16.
pub fn supports(client: &Client, format: FloatFormat) -> bool {
    cuda_source::device(client).is_some_and(|device| device.multiplies(format))
}

/// Rounds a factor to `format`, of 16 bits, and puts it in the order of [`project`].
///
/// # Errors
/// [`KernelError::Unsupported`], [`KernelError::Format`], and the variants about sizes when the factor does not hold
/// its shape.
pub fn pack(client: &Client, factor: Factor<'_>, format: FloatFormat) -> Result<PackedFactor, KernelError> {
    let Factor { values, features, rank, layout } = factor;
    let shape = Shape { tokens: 0, features, rank };
    check(client, shape, format)?;
    check_buffer("factor", values, features * rank, 4)?;
    let tiling = plan::pack(rank);
    let elements = features.div_ceil(32) * 32 * tiling.padded_rank(Kind::Pack);
    let packed = client.empty(elements * 2);
    let variant = Variant {
        kind: Kind::Pack,
        tiling,
        cluster: 1,
        last_adds: false,
        dropout: false,
        aligned: true,
        small_aligned: true,
        format,
    };
    let params = Params::new(shape, 1.0, None, layout.flag());
    let cubes = (elements / 8).div_ceil(FLAT_THREADS);
    launch(client, variant, cubes, Arguments::new().read(values).write(&packed), params)?;
    Ok(PackedFactor { packed, features, rank, format })
}

/// `out = scaling · dropout(x) factorᵀ`.
///
/// # Shapes
/// [`Projection`] has them.
///
/// # Errors
/// [`KernelError::Unsupported`], and the variants about sizes when a buffer does not hold its shape.
pub fn project(
    client: &Client,
    operands: Projection<'_>,
    tokens: usize,
    output: Output,
    scaling: f32,
    dropout: Option<Dropout>,
) -> Result<(), KernelError> {
    let Projection { x, factor, out } = operands;
    let shape = Shape { tokens, features: factor.features, rank: factor.rank };
    check(client, shape, factor.format)?;
    check_buffer("x", x, tokens * shape.features, 2)?;
    check_buffer("out", out, tokens * shape.rank, if output == Output::F32 { 4 } else { 2 })?;
    let params = Params::new(shape, scaling, dropout, if output == Output::F32 { FLAG_F32_OUT } else { 0 });
    let operands = Operands { x, small: &factor.packed, out, small_aligned: true, format: factor.format };
    product(client, Kind::Project, shape, operands, dropout, params)
}

/// `out = productᵀ dropout(x)`, or that transposed, as `layout` says.
///
/// # Shapes
/// [`Gradient`] has them; `x` and `product` are of `format`, which has 16 bits.
///
/// # Errors
/// As [`pack`].
pub fn gradient(
    client: &Client,
    operands: Gradient<'_>,
    shape: Shape,
    layout: FactorLayout,
    dropout: Option<Dropout>,
    format: FloatFormat,
) -> Result<(), KernelError> {
    let Gradient { x, product: small, out } = operands;
    check(client, shape, format)?;
    check_buffer("x", x, shape.tokens * shape.features, 2)?;
    check_buffer("product", small, shape.tokens * shape.rank, 2)?;
    check_buffer("out", out, shape.features * shape.rank, 4)?;
    let small_aligned = shape.rank.is_multiple_of(8) && offset(small).is_multiple_of(16);
    let operands = Operands { x, small, out, small_aligned, format };
    product(client, Kind::Gradient, shape, operands, dropout, Params::new(shape, 1.0, dropout, layout.flag()))
}

struct Operands<'a> {
    x: &'a Handle,
    small: &'a Handle,
    out: &'a Handle,
    small_aligned: bool,
    format: FloatFormat,
}

/// Launches a product whose sizes were checked.
fn product(
    client: &Client,
    kind: Kind,
    shape: Shape,
    operands: Operands<'_>,
    dropout: Option<Dropout>,
    mut params: Params,
) -> Result<(), KernelError> {
    let Operands { x, small, out, small_aligned, format } = operands;
    let rows = if kind == Kind::Project { shape.tokens } else { shape.features };
    if rows == 0 {
        return Ok(());
    }
    let device = cuda_source::device(client).ok_or_else(|| unsupported(client))?;
    // No dropout at all is the variant without it.
    let dropout = dropout.is_some_and(|dropout| dropout.threshold > 0 || dropout.scale != 1.0);
    let processors =
        Processors { count: device.multiprocessors as usize, clusters: device.compute_capability >= (9, 0) };
    let Plan { tiling, tiles, splits, scratch } = plan::plan(kind, shape, processors);
    params.splits = splits as u32;
    let aligned = shape.features.is_multiple_of(8) && offset(x).is_multiple_of(16);
    let cluster = if scratch { 0 } else { splits };
    let last_adds = scratch && shape.tokens <= FEW_TOKENS;
    let variant = Variant { kind, tiling, cluster, last_adds, dropout, aligned, small_aligned, format };
    let inputs = Arguments::new().read(x).read(small);
    if !scratch {
        return launch(client, variant, tiles * splits, inputs.write(out), params);
    }
    let sums = tiles * tiling.rows(kind) * tiling.padded_rank(kind);
    let partial = client.empty(sums * splits * 4);
    if last_adds {
        // A few lengths serve all plans.
        let counters = cuda_source::counters(client, &partial, tiles.next_power_of_two().max(256));
        return launch(client, variant, tiles * splits, inputs.write(out).write(&partial).counters(&counters), params);
    }
    launch(client, variant, tiles * splits, inputs.write(&partial), params)?;
    let kind = Kind::Sum { project: kind == Kind::Project };
    let variant = Variant { kind, dropout: false, aligned: true, small_aligned: true, ..variant };
    let cubes = (sums / 4).div_ceil(FLAT_THREADS);
    launch(client, variant, cubes, Arguments::new().read(&partial).write(out), params)
}

/// The operands in the order of the kernels' parameters.
fn launch(
    client: &Client,
    variant: Variant,
    cubes: usize,
    operands: Arguments,
    params: Params,
) -> Result<(), KernelError> {
    let grid = (cubes as u32, 1, 1);
    cuda_source::launch(client, &variant.source(), grid, operands.params(params))
        .map_err(|e| KernelError::Launch { operation: OPERATION, message: e.to_string() })
}

fn unsupported(client: &Client) -> KernelError {
    KernelError::Unsupported { runtime: client.name().to_owned(), operation: OPERATION }
}

fn check(client: &Client, shape: Shape, format: FloatFormat) -> Result<(), KernelError> {
    check_half(client, OPERATION, format)?;
    if !supports(client, format) {
        return Err(unsupported(client));
    }
    if !(1..=MAX_RANK).contains(&shape.rank) {
        return Err(KernelError::Rank(shape.rank));
    }
    for (name, value) in [("tokens", shape.tokens), ("features", shape.features)] {
        if value > MAX_LENGTH {
            return Err(KernelError::TooLarge { name, value, limit: MAX_LENGTH });
        }
    }
    Ok(())
}

fn offset(handle: &Handle) -> usize {
    handle.offset_start.unwrap_or(0) as usize
}

fn check_buffer(name: &'static str, handle: &Handle, elements: usize, size: usize) -> Result<(), KernelError> {
    check_size(name, handle, elements * size)?;
    match offset(handle) {
        // Outputs and factors are written and read in pairs of elements.
        offset if !offset.is_multiple_of(size * if name == "out" { 2 } else { 1 }) => {
            Err(KernelError::Alignment { name, offset, size })
        }
        _ => Ok(()),
    }
}
