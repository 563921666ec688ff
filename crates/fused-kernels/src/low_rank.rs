//! The products of LoRA that have one narrow side, rank wide (Hu et al., 2021, arXiv 2106.09685, section 4.1).
//!
//! For `y = x Wᵀ + scaling · x Aᵀ Bᵀ` with `A` [rank, in] and `B` [out, rank], and 16-bit activations:
//!
//! | product | call |
//! |---|---|
//! | `U = x Aᵀ` [tokens, rank] | [`project`] of `x` by `A`, [`FactorLayout::RankFirst`] |
//! | `V = scaling · dy B` [tokens, rank] | [`project`] of `dy` by `B`, [`FactorLayout::FeaturesFirst`] |
//! | `dA = Vᵀ x` [rank, in] | [`gradient`] of `x` and `V`, [`FactorLayout::RankFirst`] |
//! | `dB = scaling · dyᵀ U` [out, rank] | [`gradient`] of `dy` and `U`, [`FactorLayout::FeaturesFirst`] |
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
//! - Where one tile per block would leave multiprocessors idle, several blocks share a tile's contraction, and add
//!   their sums in the order of the blocks: the same bits on every run. Either they are one cluster, of up to eight,
//!   and add through distributed shared memory, or up to sixteen write to scratch memory and one more launch adds.
//!   At rank 64 the best variant with scratch was up to 1.5 times as fast as the best cluster (a projection of
//!   512 x 28672: 17 µs against 25). GPUs before Hopper have no clusters.
//! - Dropout is applied to the registers, so no masked copy of `x` exists and none is kept for the backward.
//!
//! Sums are f32 (in tensor cores), rounded once. Relative error (Frobenius) against f64 of the same operands, as
//! predicted: below 2e-5 for f32 results, that of one rounding for 16-bit ones. `tests/low_rank.rs` checks elements.
//!
//! # Measured
//!
//! One H200, bf16: the median of three replays of a graph of 16 launches, which rotate over copies of `x` of 64 MiB or
//! more together, in ms (TB/s of one read of `x`, 4 bytes per element of the factor and 2 of the narrow matrix), beside
//! `torch.matmul` in the same run. The kernels ran from a harness, not through this module, with the tilings and
//! splits that `plan.rs` picks, which were chosen by these figures. A projection is without its [`pack`], which runs
//! once per factor; a gradient of ours is f32, torch's bf16.
//!
//! | rank | tokens x features | `project` | torch | `gradient` | torch |
//! |---|---|---|---|---|---|
//! | 16 | 512 x 4096 | 0.0059 (0.76) | 0.0065 (0.69) | 0.0055 (0.81) | 0.0043 (1.05) |
//! | 16 | 2048 x 4096 | 0.0083 (2.06) | 0.0087 (1.97) | 0.0112 (1.53) | 0.0075 (2.28) |
//! | 16 | 8192 x 4096 | 0.0182 (3.72) | 0.0190 (3.56) | 0.0269 (2.51) | 0.0218 (3.10) |
//! | 16 | 8192 x 11008 | 0.0441 (4.11) | 0.0471 (3.85) | 0.0482 (3.76) | 0.0472 (3.84) |
//! | 16 | 8192 x 28672 | 0.1089 (4.33) | 0.1170 (4.03) | 0.1192 (3.96) | 0.1113 (4.24) |
//! | 64 | 512 x 4096 | 0.0073 (0.72) | 0.0067 (0.79) | 0.0073 (0.73) | 0.0044 (1.21) |
//! | 64 | 2048 x 4096 | 0.0106 (1.70) | 0.0092 (1.98) | 0.0117 (1.55) | 0.0079 (2.28) |
//! | 64 | 8192 x 4096 | 0.0221 (3.13) | 0.0204 (3.39) | 0.0241 (2.87) | 0.0219 (3.15) |
//! | 64 | 8192 x 11008 | 0.0490 (3.76) | 0.0500 (3.69) | 0.0522 (3.53) | 0.0449 (4.10) |
//! | 64 | 8192 x 28672 | 0.1176 (4.06) | 0.1276 (3.75) | 0.1339 (3.57) | 0.1129 (4.23) |
//! | 128 | 512 x 4096 | 0.0120 (0.54) | 0.0069 (0.93) | 0.0115 (0.56) | 0.0043 (1.48) |
//! | 128 | 2048 x 4096 | 0.0187 (1.04) | 0.0106 (1.83) | 0.0227 (0.86) | 0.0073 (2.67) |
//! | 128 | 8192 x 4096 | 0.0354 (2.01) | 0.0208 (3.43) | 0.0637 (1.12) | 0.0203 (3.51) |
//! | 128 | 8192 x 11008 | 0.0858 (2.19) | 0.0481 (3.91) | 0.1139 (1.65) | 0.0460 (4.09) |
//! | 128 | 8192 x 28672 | 0.2138 (2.28) | 0.1242 (3.92) | 0.2476 (1.97) | 0.1822 (2.67) |
//! | 256 | 512 x 4096 | 0.0156 (0.56) | 0.0076 (1.13) | 0.0139 (0.62) | 0.0050 (1.73) |
//! | 256 | 2048 x 4096 | 0.0343 (0.64) | 0.0110 (1.99) | 0.0358 (0.62) | 0.0096 (2.30) |
//! | 256 | 8192 x 4096 | 0.0622 (1.21) | 0.0266 (2.84) | 0.1178 (0.64) | 0.0291 (2.59) |
//! | 256 | 8192 x 11008 | 0.1525 (1.28) | 0.0678 (2.89) | 0.2189 (0.89) | 0.0693 (2.83) |
//! | 256 | 8192 x 28672 | 0.3856 (1.31) | 0.1761 (2.86) | 0.5177 (0.97) | 0.1761 (2.86) |
//!
//! Over all twelve shapes (512, 2048 and 8192 tokens by 4096, 8192, 11008 and 28672 features), speed as a multiple of
//! torch's: 0.83 to 1.11 for projections and 0.67 to 1.22 for gradients at ranks 8 and 16; 0.70 to 1.08 and 0.60 to
//! 0.91 at rank 64, least with 512 tokens; 0.29 to 0.59 and 0.32 to 0.74 at rank 128; 0.24 to 0.49 and 0.25 to 0.38
//! at rank 256, where the most is 312 TFLOP/s and torch reaches 683 on the same shape: memory is not the bound there.
//!
//! Dropout at 8192 x 4096 and rank 64 took 0.057 ms (project) and 0.066 (gradient) with the fastest of the variants
//! that were tried, clusters of two. Its hash, some 20 integer operations per element, is estimated at 0.045 ms.
//!
//! Predicted, not measured: the splits through scratch that `plan.rs` picks with dropout; rank 32; features of a few
//! hundred; anything but bf16 on an H200; launches from CubeCL's stream rather than a graph, where the second launch of
//! scratch may cost some microseconds more.
//!
//! # What was not done
//!
//! - wgmma. `mma` should reach some 60 % of a Hopper's tensor throughput; the most measured here is about half of that,
//!   so at ranks 128 and 256 something else comes first.
//! - Scratch instead of clusters at other ranks than 64, where it was not measured; 128 and 256 should gain most.
//! - One pass over `dy` for both `V` and `dB`: `dB` contracts over tokens and would have to keep `[out, rank]` sums
//!   per block.
//! - Unaligned rows (features not a multiple of 8) load element by element: right, several times slower.

pub mod oracle;
mod plan;

use bytemuck::{Pod, Zeroable};
use cubecl::client::Client;
use cubecl::server::Handle;
use cuda_source::Arguments;

use crate::elementwise::check_half;
use crate::error::check_size;
use crate::{Dropout, FloatFormat, KernelError};
use plan::{FLAT_THREADS, Kind, MAX_RANK, Plan, Processors, Variant};

const OPERATION: &str = "low_rank";
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
    seed: u64,
    tokens: u32,
    features: u32,
    rank: u32,
    splits: u32,
    threshold: u32,
    dropout_scale: f32,
    scale: f32,
    flags: u32,
}

const FLAG_F32_OUT: u32 = 1;
const FLAG_FEATURES_FIRST: u32 = 2;

impl Params {
    /// Dimensions were checked: they fit.
    fn new(shape: Shape, scale: f32, dropout: Option<Dropout>, flags: u32) -> Self {
        let Dropout { seed, threshold, scale: dropout_scale } =
            dropout.unwrap_or(Dropout { seed: 0, threshold: 0, scale: 1.0 });
        Self {
            seed,
            tokens: shape.tokens as u32,
            features: shape.features as u32,
            rank: shape.rank as u32,
            splits: 1,
            threshold,
            dropout_scale,
            scale,
            flags,
        }
    }
}

/// Whether this device runs the kernels: CUDA, compute capability 8.0 or later.
pub fn supports(client: &Client) -> bool {
    cuda_source::device(client).is_some_and(|device| device.compute_capability >= (8, 0))
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
    let variant =
        Variant { kind: Kind::Pack, tiling, cluster: 1, dropout: false, aligned: true, small_aligned: true, format };
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
    let Plan { tiling, tiles, splits, scratch } = plan::plan(kind, shape, processors, dropout);
    params.splits = splits as u32;
    let aligned = shape.features.is_multiple_of(8) && offset(x).is_multiple_of(16);
    let cluster = if scratch { 0 } else { splits };
    let variant = Variant { kind, tiling, cluster, dropout, aligned, small_aligned, format };
    let inputs = Arguments::new().read(x).read(small);
    if !scratch {
        return launch(client, variant, tiles * splits, inputs.write(out), params);
    }
    let sums = tiles * tiling.rows(kind) * tiling.padded_rank(kind);
    let partial = client.empty(sums * splits * 4);
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
    if !supports(client) {
        return Err(unsupported(client));
    }
    check_half(client, OPERATION, format)?;
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
