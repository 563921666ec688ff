//! The gradients of the low-rank factors of all experts: `dA = Vᵀ X` and `dB = dYᵀ U`, summed over each expert's rows.
//!
//! A cube computes 16 ranks of 256 features of one expert, each of its units 4 by 8 of them. It takes the expert's rows 16 at a
//! time through shared memory, where units that differ in their features read neighbours, and those that differ in their
//! ranks the same. Sums are f32, in the order of the rows. An expert without rows has zeros.
//!
//! Without tensor cores: 2 · rank operations per element of the large matrix, which are few at the ranks that are usual
//! for experts.

use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

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
            let mut value = 0.0f32;
            if row < end && feature < features {
                value = f32::cast_from(x[row * features + feature]);
            }
            columns[at] = value;
        }
        #[unroll]
        for i in 0..comptime!(ROWS * RANKS / CUBE) {
            let at = i * CUBE + unit;
            let (row, k) = (first + at / RANKS, first_rank + at % RANKS);
            let mut value = 0.0f32;
            if row < end && k < rank {
                value = f32::cast_from(product[row * rank + k]);
                if form.weighted {
                    value *= weights[words[places.entries + row] as usize];
                }
            }
            factors[at] = value;
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
