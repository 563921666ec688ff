//! Products of many groups of rows, each with a weight of its own, in one launch: the experts of a block.
//!
//! Rows of `x` are sorted by group. The weights of all groups, of one shape, lie one behind the other, as if they were one
//! weight of `groups * out_features` rows, and so do the low-rank factors. Which rows a group has is known on the device
//! alone: a table there lists tiles, each some rows of one group, and the launch has as many cubes as the table could need at
//! most ([`max_tiles`]). Those without rows end at once, so that a group without rows costs nothing.
//!
//! The kernels are those of [`mod@super::hopper`], which is preferred where it takes a problem, and [`mod@super::ampere`]. Tiles are not
//! split along the depth: experts come in numbers that fill a card, and a row's sums are taken in an order that depends on no other
//! row.

use cubecl::client::Client;
use cubecl::server::Handle;
use cuda_source::{Choices, CudaDevice, Source};

use super::schedule::{Params, Schedule};
use super::{LowRank, Operands, Problem, Weight, ampere, check_alignment, hopper, refused};
use crate::QuantError;
use crate::kernels::{DeviceAbsmax, DeviceWeight, check_size};

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

/// The kernel of a product of groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GroupedPath {
    /// wgmma, compute capability 9.0; 4-bit weights, tiles of 64 or 128 rows.
    Hopper(hopper::Tile),
    /// mma.sync, compute capability 8.0 or later.
    Ampere(ampere::Tile),
}

/// The kernel for a problem of `groups` groups in tiles of `tile_rows` rows on a client's device, or `None` where there is
/// none: [`Problem`] says the shapes of one group, and the rows of all. `NF4_QUANT_MATMUL` forces `hopper` or `ampere` where it takes
/// the problem.
pub fn path(client: &Client, problem: &Problem, groups: usize, tile_rows: usize) -> Option<GroupedPath> {
    static CHOICES: Choices<()> = Choices::new("NF4_QUANT_MATMUL");
    let candidates: Vec<_> = candidates(&cuda_source::device(client)?, problem, groups, tile_rows).collect();
    // What is forced may be a kernel for one weight, or for 4-bit weights alone, while the factors' products are dense.
    let forced = CHOICES.forced().filter(|forced| candidates.iter().any(|(name, _)| name == forced));
    cuda_source::choose(candidates, forced)
}

/// Every kernel that takes a problem, the one that [`path`] prefers first.
pub fn paths(client: &Client, problem: &Problem, groups: usize, tile_rows: usize) -> Vec<GroupedPath> {
    let device = cuda_source::device(client);
    device
        .map_or_else(Vec::new, |device| candidates(&device, problem, groups, tile_rows).map(|(_, path)| path).collect())
}

pub(super) fn candidates(
    device: &CudaDevice,
    problem: &Problem,
    groups: usize,
    tile_rows: usize,
) -> impl Iterator<Item = (&'static str, GroupedPath)> + use<> {
    let fits = fits(problem, groups);
    let hopper = hopper::grouped_tile(device, problem, tile_rows).map(GroupedPath::Hopper);
    let known = [16, 64, 128].contains(&tile_rows) && ampere::tile(device, problem).is_some();
    let ampere = known.then_some(GroupedPath::Ampere(ampere::Tile { tokens: tile_rows }));
    let all = [("hopper", hopper), ("ampere", ampere)];
    all.into_iter().filter_map(move |(name, path)| Some((name, path.filter(|_| fits)?)))
}

/// Whether positions over all groups count in 32 bits, and blocks don't cross groups.
fn fits(problem: &Problem, groups: usize) -> bool {
    let elements = problem.out_features * problem.in_features;
    let all = |len: usize| len.saturating_mul(groups) < u32::MAX as usize;
    groups > 0
        && all(elements)
        && all(problem.features() * problem.rank)
        && problem.blocksize.is_none_or(|blocksize| elements.is_multiple_of(blocksize))
}

/// Whether a weight of groups that each have `elements` elements keeps the nested blocks of groups apart, as the kernel asks.
pub fn nested_blocks_fit(elements: usize, blocksize: usize, nested_blocksize: usize) -> bool {
    nested_blocksize.is_power_of_two() && elements.is_multiple_of(blocksize.saturating_mul(nested_blocksize))
}

/// Launches a product of groups on the path that [`path`] gave. Rows of `out` that are in no tile are not written.
///
/// # Shapes
///
/// `out` holds `[rows, features]` of [`Problem::out`].
///
/// # Errors
///
/// [`QuantError::BufferSize`] for the buffer that is too small, [`QuantError::Matmul`] for operands that do not fit the
/// problem or the path.
pub fn grouped(
    client: &Client,
    path: GroupedPath,
    problem: &Problem,
    groups: &Groups<'_>,
    operands: &GroupedOperands<'_>,
    out: &Handle,
) -> Result<(), QuantError> {
    check(path, problem, groups, operands, out)?;
    let GroupedOperands { x, weight, low_rank, scale } = *operands;
    let operands = Operands { x, weight, low_rank, bias: None };
    let tiles = problem.features().div_ceil(ampere::FEATURES) * groups.tile_count;
    let (cubes, arguments) = match path {
        GroupedPath::Hopper(tile) => {
            let arguments = hopper::grouped_arguments(client, tile, problem, groups.count, &operands)?;
            (tiles.min(hopper::workers(client)), arguments)
        }
        GroupedPath::Ampere(_) => (tiles, ampere::operand_arguments(client, &operands)?),
    };
    check_alignment("out", out)?;
    let offset = match weight {
        Weight::FourBit(DeviceWeight { absmax: DeviceAbsmax::Nested { blocksize: nested, .. }, blocksize, .. }) => {
            groups.count * problem.out_features * problem.in_features / blocksize / nested
        }
        _ => 0,
    };
    let whole = Schedule { tiles, whole: tiles, split: 1 };
    let params = Params::new(problem, &operands, whole).with_offset(offset);
    let arguments = arguments.read(groups.tiles).write(out).params(GroupedParams { params, scale, pad: 0 });
    let cubes = u32::try_from(cubes).map_err(|_| QuantError::Matmul(format!("{cubes} tiles are too many")))?;
    cuda_source::launch(client, &source(path, problem), (cubes, 1, 1), arguments).map_err(refused)
}

/// `struct GroupedParams` of common.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct GroupedParams {
    params: Params,
    scale: f32,
    pad: u32,
}

pub(super) fn source(path: GroupedPath, problem: &Problem) -> Source {
    match path {
        GroupedPath::Hopper(tile) => hopper::source_of(tile, problem, true, false),
        GroupedPath::Ampere(tile) => ampere::source_of(tile, problem, true, false),
    }
}

fn check(
    path: GroupedPath,
    problem: &Problem,
    groups: &Groups<'_>,
    operands: &GroupedOperands<'_>,
    out: &Handle,
) -> Result<(), QuantError> {
    let Problem { tokens, out_features, in_features, rank, format, blocksize, .. } = *problem;
    let tile_rows = match path {
        GroupedPath::Hopper(tile) => tile.tokens,
        GroupedPath::Ampere(tile) => tile.tokens,
    };
    if !fits(problem, groups.count) || tile_rows != groups.tile_rows {
        let (count, rows) = (groups.count, groups.tile_rows);
        return Err(QuantError::Matmul(format!("{path:?} for {problem:?} in {count} groups, {rows} rows a tile")));
    }
    let size = format.size();
    check_size("x", operands.x, tokens * problem.depth() * size)?;
    check_size("out", out, tokens * problem.features() * problem.out.size())?;
    check_size("tiles", groups.tiles, groups.tile_count * 12)?;
    match (operands.low_rank, rank) {
        (None, 0) => {}
        (Some(LowRank { mask: Some(_), .. }), _) => {
            return Err(QuantError::Matmul("products of groups have no dropout of the update".into()));
        }
        (Some(LowRank { product, factor, .. }), 1..) => {
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

/// The oracle, in f64: [`super::reference()`] for each group.
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
