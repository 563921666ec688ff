//! Products of many groups of rows, each with a weight of its own, in one launch: the experts of a block.
//!
//! Rows of `x` are sorted by group. The weights of all groups, of one shape, lie one behind the other, as if they were one
//! weight of `groups * out_features` rows, and so do the low-rank factors. Which rows a group has is known on the device
//! alone: a table there lists tiles, each some rows of one group, and the launch has as many cubes as the table could need at
//! most ([`max_tiles`]). Those without rows end at once, so that a group without rows costs nothing.
//!
//! The kernel is [`mod@super::ampere`]'s, on every card. Tiles are not split along the depth: experts come in numbers that
//! fill a card, and a row's sums are taken in an order that depends on no other row.

use cubecl::client::Client;
use cubecl::server::Handle;
use cuda_source::{Arguments, Source};

use super::schedule::{Params, Schedule};
use super::{LowRank, Operands, Problem, Weight, ampere, check_alignment, refused};
use crate::QuantError;
use crate::kernels::{DeviceAbsmax, DeviceWeight, check_size, tables};

/// The rows of every group.
#[derive(Debug, Clone, Copy)]
pub struct Groups<'a> {
    /// Number of groups.
    pub count: usize,
    /// u32 `[tiles, 3]`: a tile's group, its first row, and the row behind its last, at most `tile_rows` further. A tile
    /// without rows is left out.
    pub tiles: &'a Handle,
    /// Tiles in the table.
    pub tile_count: usize,
    /// The most rows of a tile: what [`tile_rows`] gave for the problem.
    pub tile_rows: usize,
}

/// What a product of groups multiplies. A [`Problem`] says the shapes of one group, and the rows of all.
#[derive(Debug, Clone, Copy)]
pub struct GroupedOperands<'a> {
    /// `[rows, depth]`, sorted by group.
    pub x: &'a Handle,
    /// The weights of all groups, one behind the other. A 4-bit one is one [`DeviceWeight`] of them all, but for the
    /// offset of double quantization: behind the nested absmax of all groups lie the offsets of all.
    pub weight: Weight<'a>,
    /// LoRA's update, when [`Problem::rank`] is not 0; the factors of all groups lie one behind the other.
    pub low_rank: Option<LowRank<'a>>,
    /// Factor of the sums, before they are rounded.
    pub scale: f32,
}

/// Rows of a tile for products of `rows` rows in `groups` groups.
///
/// A group's last tile is part empty, half of it on average, and costs as much as a full one; a decoded weight serves the
/// rows of a tile.
pub fn tile_rows(rows: usize, groups: usize) -> usize {
    match rows / groups.max(1) {
        ..=16 => 16,
        17..=192 => 64,
        _ => 128,
    }
}

/// The most tiles that groups of `rows` rows in all can have.
pub fn max_tiles(rows: usize, groups: usize, tile_rows: usize) -> usize {
    // Each group that has rows fills all of its tiles but one.
    rows / tile_rows + groups.min(rows)
}

/// Whether a client's device has a kernel for a problem of `groups` groups: [`Problem`] says the shapes of one group, and the
/// rows of all.
pub fn supports(client: &Client, problem: &Problem, groups: usize) -> bool {
    let Problem { out_features, in_features, rank, blocksize, .. } = *problem;
    let elements = out_features * in_features;
    // Positions count in 32 bits, over all groups.
    let all = |len: usize| len.saturating_mul(groups) < u32::MAX as usize;
    let device = cuda_source::device(client);
    device.is_some_and(|device| ampere::tile(&device, problem).is_some())
        && groups > 0
        && all(elements)
        && all(problem.features() * rank)
        // Blocks don't cross groups.
        && blocksize.is_none_or(|blocksize| elements.is_multiple_of(blocksize))
}

/// Whether a weight of groups that each have `elements` elements keeps the nested blocks of groups apart, as the kernel asks.
pub fn nested_blocks_fit(elements: usize, blocksize: usize, nested_blocksize: usize) -> bool {
    nested_blocksize.is_power_of_two() && elements.is_multiple_of(blocksize.saturating_mul(nested_blocksize))
}

/// Launches a product of groups. Rows of `out` that are in no tile are not written.
///
/// # Shapes
///
/// `out` holds `[rows, features]` of [`Problem::out`].
///
/// # Errors
///
/// [`QuantError::BufferSize`] for the buffer that is too small, [`QuantError::Matmul`] for operands that do not fit the
/// problem or one that no kernel [takes](supports).
pub fn grouped(
    client: &Client,
    problem: &Problem,
    groups: &Groups<'_>,
    operands: &GroupedOperands<'_>,
    out: &Handle,
) -> Result<(), QuantError> {
    check(client, problem, groups, operands, out)?;
    let tile = ampere::Tile { tokens: groups.tile_rows };
    let tables = tables(client);
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
    let mut offset = 0;
    match operands.weight {
        Weight::Dense(weight) => read("weight", weight)?,
        Weight::FourBit(weight) => {
            read("codes", &weight.codes)?;
            let (absmax, nested) = weight.absmax.buffers(&tables);
            read("absmax", absmax)?;
            read("nested_absmax", nested)?;
            read("tables", &tables)?;
            if let DeviceAbsmax::Nested { blocksize, .. } = &weight.absmax {
                offset = weight.num_blocks() / blocksize;
            }
        }
    }
    check_alignment("out", out)?;
    let tiles = problem.features().div_ceil(ampere::FEATURES) * groups.tile_count;
    let whole = Schedule { tiles, whole: tiles, split: 1 };
    let like = Operands { x: operands.x, weight: operands.weight, low_rank: operands.low_rank, bias: None };
    let params = Params::new(problem, &like, whole).with_offset(offset);
    let arguments =
        arguments.read(groups.tiles).write(out).params(GroupedParams { params, scale: operands.scale, pad: 0 });
    let cubes = u32::try_from(tiles).map_err(|_| QuantError::Matmul(format!("{tiles} tiles are too many")))?;
    cuda_source::launch(client, &source(tile, problem), (cubes, 1, 1), arguments).map_err(refused)
}

/// `struct GroupedParams` of common.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct GroupedParams {
    params: Params,
    scale: f32,
    pad: u32,
}

pub(super) fn source(tile: ampere::Tile, problem: &Problem) -> Source {
    ampere::source_of(tile, problem, true)
}

fn check(
    client: &Client,
    problem: &Problem,
    groups: &Groups<'_>,
    operands: &GroupedOperands<'_>,
    out: &Handle,
) -> Result<(), QuantError> {
    let Problem { tokens, out_features, in_features, rank, format, blocksize, .. } = *problem;
    if !supports(client, problem, groups.count) || ![16, 64, 128].contains(&groups.tile_rows) {
        let (count, rows) = (groups.count, groups.tile_rows);
        return Err(QuantError::Matmul(format!("no kernel for {problem:?} in {count} groups, {rows} rows a tile")));
    }
    let size = format.size();
    check_size("x", operands.x, tokens * problem.depth() * size)?;
    check_size("out", out, tokens * problem.features() * problem.out.size())?;
    check_size("tiles", groups.tiles, groups.tile_count * 12)?;
    match (operands.low_rank, rank) {
        (None, 0) => {}
        (Some(LowRank { product, factor }), 1..) => {
            check_size("low-rank product", product, tokens * rank * size)?;
            check_size("low-rank factor", factor, groups.count * problem.features() * rank * 4)?;
        }
        (given, _) => {
            let given = if given.is_some() { "a" } else { "no" };
            return Err(QuantError::Matmul(format!("rank {rank} with {given} low-rank operand")));
        }
    }
    let elements = groups.count * out_features * in_features;
    match (operands.weight, blocksize) {
        (Weight::Dense(weight), None) => check_size("weight", weight, elements * size),
        (Weight::FourBit(weight), Some(blocksize)) => check_weight(weight, elements, blocksize, groups.count),
        (_, blocksize) => Err(QuantError::Matmul(format!("the weight is not of the problem's kind ({blocksize:?})"))),
    }
}

fn check_weight(weight: &DeviceWeight, elements: usize, blocksize: usize, groups: usize) -> Result<(), QuantError> {
    weight.validate()?;
    if weight.num_elements != elements || weight.blocksize != blocksize {
        return Err(QuantError::Matmul(format!(
            "a weight of {} elements in blocks of {} where the problem says {elements} in blocks of {blocksize}",
            weight.num_elements, weight.blocksize
        )));
    }
    match &weight.absmax {
        DeviceAbsmax::Nested { blocksize: nested, absmax, .. } => {
            if !nested_blocks_fit(elements / groups, blocksize, *nested) {
                let one = elements / groups;
                return Err(QuantError::Matmul(format!("nested blocks of {nested} cross weights of {one} elements")));
            }
            check_size("nested_absmax", absmax, 4 * (weight.num_blocks() / nested + groups))
        }
        DeviceAbsmax::Plain(_) => Ok(()),
    }
}

/// The oracle, in f64: [`super::reference`] for each group.
///
/// # Shapes
///
/// `counts` has the rows of each group; operands are those of [`GroupedOperands`], weights dense. Returns `[rows, features]`.
pub fn reference(
    problem: &Problem,
    counts: &[usize],
    x: &[f64],
    weight: &[f64],
    low_rank: Option<(&[f64], &[f64])>,
    scale: f64,
) -> Vec<f64> {
    let (depth, rank, elements) = (problem.depth(), problem.rank, problem.out_features * problem.in_features);
    let factor = problem.features() * rank;
    let (mut out, mut first) = (Vec::new(), 0);
    for (group, &count) in counts.iter().enumerate() {
        let low_rank = low_rank.map(|(u, b)| (&u[first * rank..][..count * rank], &b[group * factor..][..factor]));
        let own = Problem { tokens: count, ..*problem };
        let x = &x[first * depth..][..count * depth];
        out.extend(super::reference(&own, x, &weight[group * elements..][..elements], low_rank, None));
        first += count;
    }
    out.iter_mut().for_each(|y| *y *= scale);
    out
}
