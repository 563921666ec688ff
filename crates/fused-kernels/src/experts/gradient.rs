//! The gradients of the low-rank factors of all experts: `dA = Vᵀ X` and `dB = dYᵀ U`, summed over each expert's rows.
//!
//! Sums are f32, in the order of the rows. An expert without rows has zeros.
//!
//! Two kernels. On CUDA, from compute capability 8.0 on, `gradient.cu` reads the large matrix once for 64 ranks and multiplies on
//! tensor cores; it takes 16-bit formats, and features and ranks that are multiples of 8, and rounds weighted rows of the
//! narrow matrix to the format. Memory is its bound: with 2,048 tokens of 2,048 features and 8 experts each, 67 MB.
//!
//! Elsewhere a cube computes 16 ranks of 256 features of one expert, each of its units 4 by 8 of them. It takes the expert's
//! rows 16 at a time through shared memory, where units that differ in their features read neighbours, and those that differ
//! in their ranks the same.

use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;
use cuda_source::{Arguments, Source};

use super::{OPERATION, Places, Routing};
use crate::elementwise::{buffer, check_format};
use crate::low_rank::FactorLayout;
use crate::{FloatFormat, KernelError};

/// Units of a cube.
const CUBE: usize = 128;
/// Features of a cube; a unit has every 32nd.
const FEATURES: usize = 256;
const FEATURES_OF_UNIT: usize = FEATURES / LANES;
/// Units that have the same ranks.
const LANES: usize = 32;
/// Ranks of a cube, of a unit.
const RANKS: usize = 16;
const RANKS_OF_UNIT: usize = RANKS / (CUBE / LANES);
/// Rows at a time.
const ROWS: usize = 16;

/// Operands of [`gradient`] beside the words.
#[derive(Clone, Copy, Debug)]
pub struct FactorGradient<'a> {
    /// `[rows, features]`: the input for A, the gradient of the output for B.
    pub x: &'a Handle,
    /// `[rows, rank]`: `V` for A, `U` for B.
    pub product: &'a Handle,
    /// f32 `[tokens, per_token]`: factors of the rows; 1 without them.
    pub weights: Option<&'a Handle>,
    /// f32, which this writes: `[experts, rank, features]`, or `[experts, features, rank]`.
    pub out: &'a Handle,
    /// Columns of `x`.
    pub features: usize,
    /// Columns of `product`.
    pub rank: usize,
    /// How `out` lies in memory.
    pub layout: FactorLayout,
}

/// Writes the gradients of a factor of all experts.
///
/// # Errors
/// [`KernelError::Format`], and the variants about sizes when a buffer does not hold its shape.
pub fn gradient(
    client: &Client,
    operands: FactorGradient<'_>,
    words: &Handle,
    routing: &Routing,
    format: FloatFormat,
) -> Result<(), KernelError> {
    check_format(client, OPERATION, format)?;
    let FactorGradient { features, rank, .. } = operands;
    let rows = routing.rows();
    let sized =
        |name, handle, rows: usize, columns| buffer(name, handle, rows.saturating_mul(columns), format.size(), 1);
    let (x, product) = (sized("x", operands.x, rows, features)?, sized("product", operands.product, rows, rank)?);
    let out = buffer("out", operands.out, routing.experts.saturating_mul(features).saturating_mul(rank), 4, 1)?;
    let words_argument = routing.words_argument(words)?;
    // Any buffer will do where there are none.
    let weights = match operands.weights {
        Some(weights) => buffer("weights", weights, rows, 4, 1)?,
        None => buffer("words", words, rows, 4, 1)?,
    };
    if features == 0 || rank == 0 {
        return Ok(());
    }
    if fits_tensor_cores(client, &operands, format) {
        return on_tensor_cores(client, &operands, words, routing, format);
    }
    let cubes = (features.div_ceil(FEATURES) as u32, rank.div_ceil(RANKS) as u32, routing.experts as u32);
    let form = Form { weighted: operands.weights.is_some(), rank_first: operands.layout == FactorLayout::RankFirst };
    // SAFETY: the buffers' sizes are checked; offsets and entries are within the rows.
    unsafe {
        kernel::launch_unchecked(
            client,
            CubeCount::Static(cubes.0, cubes.1, cubes.2),
            CubeDim::new_1d(CUBE as u32),
            x,
            product,
            weights,
            words_argument,
            out,
            routing.launch(),
            features,
            rank,
            form,
            format.elem_type(),
        );
    }
    Ok(())
}

fn fits_tensor_cores(client: &Client, operands: &FactorGradient<'_>, format: FloatFormat) -> bool {
    let FactorGradient { x, product, features, rank, .. } = operands;
    let aligned = |handle: &Handle| handle.offset_start.unwrap_or(0).is_multiple_of(16);
    cuda_source::device(client).is_some_and(|device| device.multiplies(format))
        && features.is_multiple_of(8)
        && rank.is_multiple_of(8)
        && aligned(x)
        && aligned(product)
}

/// `struct Params` of gradient.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    features: u32,
    rank: u32,
    entries: u32,
    offsets: u32,
}

/// The operands' sizes are checked.
fn on_tensor_cores(
    client: &Client,
    operands: &FactorGradient<'_>,
    words: &Handle,
    routing: &Routing,
    format: FloatFormat,
) -> Result<(), KernelError> {
    const TEXT: &str = concat!(cuda_source::prelude!(), cuda_source::tensor_cores!(), include_str!("gradient.cu"));
    let FactorGradient { x, product, weights, out, features, rank, layout } = *operands;
    let tiles = rank.div_ceil(16).next_power_of_two().min(4);
    let defines = [
        format.define(),
        ("TILES", tiles as i64),
        ("WEIGHTED", weights.is_some().into()),
        ("RANK_FIRST", (layout == FactorLayout::RankFirst).into()),
    ];
    let source = Source::with_defines(TEXT, "expert_gradient", 128, &defines);
    let params = Params {
        features: features as u32,
        rank: rank as u32,
        entries: routing.entries().start as u32,
        offsets: routing.offsets().start as u32,
    };
    let arguments =
        Arguments::new().read(x).read(product).read(weights.unwrap_or(words)).read(words).write(out).params(params);
    let cubes = (features.div_ceil(128) as u32, rank.div_ceil(16 * tiles) as u32, routing.experts as u32);
    cuda_source::launch(client, &source, cubes, arguments)
        .map_err(|e| KernelError::Launch { operation: OPERATION, message: e.to_string() })
}

/// What a variant of the kernel reads and writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Form {
    weighted: bool,
    rank_first: bool,
}

#[cube(launch_unchecked)]
fn kernel<F: Float>(
    x: &[F],
    product: &[F],
    weights: &[f32],
    words: &[u32],
    out: &mut [f32],
    places: &Places,
    features: usize,
    rank: usize,
    #[comptime] form: Form,
    #[define(F)] _format: ElemType,
) {
    let mut columns = Shared::<[f32]>::new_slice(comptime!(ROWS * FEATURES));
    let mut factors = Shared::<[f32]>::new_slice(comptime!(ROWS * RANKS));
    let unit = UNIT_POS as usize;
    let (lane, group) = (unit % LANES, unit / LANES);
    let expert = CUBE_POS_Z as usize;
    let first_feature = CUBE_POS_X as usize * FEATURES;
    let first_rank = CUBE_POS_Y as usize * RANKS;
    let start = words[places.offsets + expert] as usize;
    let end = words[places.offsets + expert + 1] as usize;
    let mut sums = Array::<f32>::new(comptime!(FEATURES_OF_UNIT * RANKS_OF_UNIT));
    #[unroll]
    for i in 0..comptime!(FEATURES_OF_UNIT * RANKS_OF_UNIT) {
        sums[i] = 0.0f32;
    }
    let mut first = start;
    while first < end {
        // Both go by row, then column.
        #[unroll]
        for i in 0..comptime!(ROWS * FEATURES / CUBE) {
            let at = i * CUBE + unit;
            let (row, feature) = (first + at / FEATURES, first_feature + at % FEATURES);
            // Without a branch, so that the loads of all turns run at once.
            let value = f32::cast_from(x[min(row, end - 1) * features + min(feature, features - 1)]);
            columns[at] = select(row < end && feature < features, value, 0.0f32);
        }
        #[unroll]
        for i in 0..comptime!(ROWS * RANKS / CUBE) {
            let at = i * CUBE + unit;
            let (row, k) = (first + at / RANKS, first_rank + at % RANKS);
            let last = min(row, end - 1);
            let mut value = f32::cast_from(product[last * rank + min(k, rank - 1)]);
            if form.weighted {
                value *= weights[words[places.entries + last] as usize];
            }
            factors[at] = select(row < end && k < rank, value, 0.0f32);
        }
        sync_cube();
        #[unroll]
        for row in 0..ROWS {
            let mut own = Array::<f32>::new(RANKS_OF_UNIT);
            #[unroll]
            for k in 0..RANKS_OF_UNIT {
                own[k] = factors[row * RANKS + group * RANKS_OF_UNIT + k];
            }
            #[unroll]
            for i in 0..FEATURES_OF_UNIT {
                let value = columns[row * FEATURES + i * LANES + lane];
                #[unroll]
                for k in 0..RANKS_OF_UNIT {
                    sums[i * RANKS_OF_UNIT + k] += value * own[k];
                }
            }
        }
        sync_cube();
        first += ROWS;
    }
    let of_expert = expert * features * rank;
    #[unroll]
    for i in 0..FEATURES_OF_UNIT {
        let feature = first_feature + i * LANES + lane;
        #[unroll]
        for j in 0..RANKS_OF_UNIT {
            let k = first_rank + group * RANKS_OF_UNIT + j;
            if feature < features && k < rank {
                if form.rank_first {
                    out[of_expert + k * features + feature] = sums[i * RANKS_OF_UNIT + j];
                } else {
                    out[of_expert + feature * rank + k] = sums[i * RANKS_OF_UNIT + j];
                }
            }
        }
    }
}
