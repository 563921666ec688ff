//! Which variant of a kernel runs a shape: how warps tile the output, and how many cubes share a tile.

use cuda_source::Source;

use super::Shape;
use crate::FloatFormat;

/// The text of all kernels.
const KERNELS: &str =
    concat!(cuda_source::prelude!(), cuda_source::tensor_cores!(), cuda_source::dropout!(), include_str!("kernels.cu"));
/// Threads of the kernels that are not tiled.
pub(super) const FLAT_THREADS: usize = 256;

/// The kernels of `kernels.cu`, by its `KIND`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Pack,
    Project,
    Gradient,
    Sum { project: bool },
}

/// How a cube's warps divide a tile of the output; the macros of `kernels.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Tiling {
    /// Tiles of ranks per warp.
    pub nt: usize,
    /// Tiles of rows per warp.
    pub mt: usize,
    pub warps_m: usize,
    pub warps_n: usize,
    pub warps_k: usize,
    pub depth: usize,
    pub min_cubes: usize,
}

const fn tiling(
    nt: usize,
    mt: usize,
    [warps_m, warps_n, warps_k]: [usize; 3],
    depth: usize,
    min_cubes: usize,
) -> Tiling {
    Tiling { nt, mt, warps_m, warps_n, warps_k, depth, min_cubes }
}

/// Everything that a kernel's text depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Variant {
    pub kind: Kind,
    pub tiling: Tiling,
    /// Cubes of a cluster; 0 where splits go through scratch.
    pub cluster: usize,
    /// Whether the last cube of a tile adds what went through scratch.
    pub last_adds: bool,
    pub dropout: bool,
    /// Rows of the large operand start at multiples of 16 bytes.
    pub aligned: bool,
    /// Rows of the gradient's small operand do.
    pub small_aligned: bool,
    pub format: FloatFormat,
}

/// The most ranks there is a kernel for.
pub const MAX_RANK: usize = 256;

/// A tiling with the bounds on how many cubes share one of its tiles.
#[derive(Clone, Copy, Debug)]
struct Choice {
    tiling: Tiling,
    /// How splits add up on GPUs that have clusters.
    route: Route,
    /// Cubes to aim for, in tenths of the multiprocessors.
    tenths: usize,
    most_splits: usize,
    /// The least length of the contraction (features of a projection, tokens of a gradient) per split.
    least: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route {
    /// As one cluster, a power of two.
    Cluster,
    /// Through scratch memory, any number.
    Scratch,
}
use Route::{Cluster, Scratch};

const fn choice(tiling: Tiling, route: Route, tenths: usize, most_splits: usize, least: usize) -> Choice {
    Choice { tiling, route, tenths, most_splits, least }
}

/// Padded ranks of projections, each with its choices in the order in which [`plan`] tries them.
///
/// Fitted to measurements on an H200: all but five of 120 measured points are within 5 % of the fastest variant
/// measured there. Rank 32 was not measured and follows 64. `docs/src/kernels/low-rank.md` has the figures.
const PROJECT: &[(usize, &[Choice])] = &[
    (
        16,
        &[
            choice(tiling(1, 4, [2, 1, 4], 4, 2), Cluster, 10, 2, 256),
            choice(tiling(1, 4, [4, 1, 1], 4, 4), Cluster, 10, 8, 256),
            choice(tiling(1, 4, [2, 1, 4], 4, 2), Cluster, 10, 8, 256),
        ],
    ),
    (
        32,
        &[
            choice(tiling(2, 4, [4, 1, 2], 4, 2), Scratch, 20, 16, 256),
            choice(tiling(2, 4, [2, 1, 4], 2, 2), Scratch, 20, 16, 256),
        ],
    ),
    (
        64,
        &[
            choice(tiling(4, 4, [4, 1, 1], 4, 3), Scratch, 20, 16, 256),
            choice(tiling(4, 2, [4, 1, 2], 2, 3), Scratch, 20, 16, 256),
        ],
    ),
    (
        128,
        &[
            choice(tiling(8, 2, [8, 1, 1], 2, 2), Cluster, 10, 2, 256),
            choice(tiling(4, 4, [4, 2, 1], 2, 2), Cluster, 10, 8, 256),
            choice(tiling(8, 2, [4, 1, 2], 1, 2), Cluster, 10, 8, 256),
        ],
    ),
    (256, &[choice(tiling(4, 4, [2, 4, 1], 1, 2), Cluster, 20, 8, 256)]),
];

/// The same for gradients. At ranks that clusters serve, long contractions were faster with more cubes than fit at
/// once, short ones slower.
const GRADIENT: &[(usize, &[Choice])] = &[
    (
        8,
        &[
            choice(tiling(1, 4, [2, 1, 4], 4, 2), Cluster, 14, 8, 1024),
            choice(tiling(1, 4, [2, 1, 4], 4, 2), Cluster, 10, 8, 256),
        ],
    ),
    (
        16,
        &[
            choice(tiling(2, 4, [2, 1, 4], 4, 2), Cluster, 14, 8, 1024),
            choice(tiling(2, 4, [2, 1, 4], 4, 2), Cluster, 10, 8, 256),
        ],
    ),
    (
        32,
        &[
            choice(tiling(4, 2, [4, 1, 2], 4, 2), Scratch, 20, 16, 256),
            choice(tiling(4, 2, [2, 1, 4], 4, 2), Scratch, 20, 16, 512),
        ],
    ),
    (
        64,
        &[
            choice(tiling(8, 2, [4, 1, 2], 4, 2), Scratch, 20, 16, 256),
            choice(tiling(8, 2, [2, 1, 4], 2, 2), Scratch, 20, 16, 512),
        ],
    ),
    (
        128,
        &[
            choice(tiling(16, 2, [4, 1, 2], 2, 1), Cluster, 10, 2, 1024),
            choice(tiling(8, 2, [4, 2, 1], 4, 2), Cluster, 27, 8, 1024),
            choice(tiling(8, 2, [4, 2, 1], 4, 2), Cluster, 14, 8, 128),
        ],
    ),
    (
        256,
        &[
            choice(tiling(8, 2, [2, 4, 1], 2, 2), Cluster, 20, 2, 256),
            choice(tiling(8, 2, [2, 4, 1], 2, 2), Cluster, 54, 8, 1024),
            choice(tiling(8, 2, [2, 4, 1], 2, 2), Cluster, 10, 8, 256),
        ],
    ),
];

/// A tiling and its splits for one launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub tiling: Tiling,
    pub tiles: usize,
    pub splits: usize,
    /// Splits go through scratch memory.
    pub scratch: bool,
}

impl Kind {
    fn is_project(self) -> bool {
        matches!(self, Kind::Pack | Kind::Project | Kind::Sum { project: true })
    }

    /// The kernel's name in `kernels.cu`.
    pub fn entry_point(self) -> &'static str {
        match self {
            Kind::Pack => "low_rank_pack",
            Kind::Project | Kind::Gradient => "low_rank_product",
            Kind::Sum { .. } => "low_rank_sum",
        }
    }
}

impl Tiling {
    /// Rows of the output (tokens, or features of a gradient) per cube.
    pub fn rows(&self, kind: Kind) -> usize {
        self.warps_m * self.mt * if kind.is_project() { 8 } else { 16 }
    }

    /// The rank, zero-padded.
    pub fn padded_rank(&self, kind: Kind) -> usize {
        self.warps_n * self.nt * if kind.is_project() { 16 } else { 8 }
    }

    pub fn threads(&self) -> usize {
        32 * self.warps_m * self.warps_n * self.warps_k
    }
}

/// The choices for a rank from 1 to [`MAX_RANK`].
fn choices(kind: Kind, rank: usize) -> &'static [Choice] {
    let table = if kind.is_project() { PROJECT } else { GRADIENT };
    table.iter().find(|(padded, _)| rank <= *padded).map_or(table[table.len() - 1].1, |(_, choices)| choices)
}

/// The tiling that packs a factor; the packed order depends on the padded rank alone.
pub(super) fn pack(rank: usize) -> Tiling {
    choices(Kind::Project, rank)[0].tiling
}

/// The device's part in a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Processors {
    pub count: usize,
    pub clusters: bool,
}

/// Picks the first choice whose cubes, split as often as its bounds allow, come to between seven tenths and all of
/// what it aims for; the last one takes what is left. There is at least one row.
pub(super) fn plan(kind: Kind, shape: Shape, processors: Processors) -> Plan {
    let (rows, length) = match kind.is_project() {
        true => (shape.tokens, shape.features),
        false => (shape.features, shape.tokens),
    };
    let choices = choices(kind, shape.rank);
    let with = |choice: &Choice| {
        let tiles = rows.div_ceil(choice.tiling.rows(kind));
        let aim = (processors.count * choice.tenths / 10).max(1);
        let splits = (aim / tiles).min(choice.most_splits).min(length / choice.least).max(1);
        let splits = if choice.route == Cluster { 1 << splits.ilog2() } else { splits };
        let scratch = splits > 1 && (choice.route == Scratch || !processors.clusters);
        let fits = (7 * aim..=10 * aim).contains(&(10 * tiles * splits));
        (Plan { tiling: choice.tiling, tiles, splits, scratch }, fits)
    };
    let last = with(&choices[choices.len() - 1]).0;
    choices.iter().map(with).find(|(_, fits)| *fits).map_or(last, |(plan, _)| plan)
}

impl Variant {
    /// The kernel's text.
    pub fn source(&self) -> Source {
        let Tiling { nt, mt, warps_m, warps_n, warps_k, depth, min_cubes } = self.tiling;
        // Masking and element-wise loads need registers of their own.
        let plain = self.aligned && self.small_aligned;
        let depth = if self.dropout || !self.aligned { (depth / 2).max(1) } else { depth };
        let (kind, project) = match self.kind {
            Kind::Pack => (0, true),
            Kind::Project => (1, true),
            Kind::Gradient => (2, false),
            Kind::Sum { project } => (3, project),
        };
        let macros = [
            ("KIND", kind),
            ("PROJECT", i64::from(project)),
            self.format.define(),
            ("NT", nt as i64),
            ("MT", mt as i64),
            ("WARPS_M", warps_m as i64),
            ("WARPS_N", warps_n as i64),
            ("WARPS_K", warps_k as i64),
            ("DEPTH", depth as i64),
            ("SPLITS", self.cluster as i64),
            ("LAST_ADDS", self.last_adds.into()),
            ("DROPOUT", i64::from(self.dropout)),
            ("ALIGNED", i64::from(self.aligned)),
            ("SMALL_ALIGNED", i64::from(self.small_aligned)),
            ("MIN_CUBES", if plain { min_cubes as i64 } else { 1 }),
        ];
        let threads = match self.kind {
            Kind::Pack | Kind::Sum { .. } => FLAT_THREADS,
            Kind::Project | Kind::Gradient => self.tiling.threads(),
        };
        let entry_point = if self.last_adds { "low_rank_product_and_sum" } else { self.kind.entry_point() };
        Source::with_defines(KERNELS, entry_point, threads as u32, &macros)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const H200: Processors = Processors { count: 132, clusters: true };

    fn of(kind: Kind, tokens: usize, features: usize, rank: usize) -> Plan {
        plan(kind, Shape { tokens, features, rank }, H200)
    }

    #[test]
    fn every_tiling_fits_static_shared_memory_and_its_padded_rank() {
        for (kind, table, panel) in [(Kind::Project, PROJECT, 32), (Kind::Gradient, GRADIENT, 16)] {
            for (padded, choices) in table {
                for Choice { tiling, .. } in *choices {
                    assert_eq!(tiling.padded_rank(kind), *padded, "{tiling:?}");
                    let stage = tiling.warps_k * tiling.depth * panel * padded * 2;
                    assert!(2 * stage <= 48 * 1024, "{tiling:?}: two stages are {} bytes", 2 * stage);
                    assert!(tiling.threads() <= 256, "{tiling:?}");
                }
            }
        }
    }

    /// Without NVRTC there is nothing to see.
    #[test]
    fn kernels_assemble_for_cards_without_clusters() {
        for (capability, format) in [((7, 5), FloatFormat::F16), ((8, 6), FloatFormat::BF16)] {
            for (kind, table) in [(Kind::Project, PROJECT), (Kind::Gradient, GRADIENT)] {
                for (Choice { tiling, .. }, dropout) in
                    table.iter().flat_map(|(_, choices)| [(&choices[0], false), (&choices[0], true)])
                {
                    let variant = Variant {
                        kind,
                        tiling: *tiling,
                        cluster: 0,
                        last_adds: true,
                        dropout,
                        aligned: true,
                        small_aligned: true,
                        format,
                    };
                    let source = if capability < (8, 0) { variant.source().for_turing() } else { variant.source() };
                    let Some(resources) = cuda_source::assemble(&source, capability).unwrap() else { return };
                    assert!(
                        resources.cubes(source.cube_dim(), 64 << 10) >= 1,
                        "{capability:?} {variant:?}: {resources:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn plans_cover_every_row_within_their_bounds() {
        let devices = [H200, Processors { count: 108, clusters: false }, Processors { count: 1, clusters: false }];
        for kind in [Kind::Project, Kind::Gradient] {
            for processors in devices {
                for rank in [1, 4, 8, 16, 20, 64, 65, 128, 256] {
                    for (tokens, features) in [(1, 1), (1, 64), (1, 4096), (63, 28672), (2048, 512), (100_000, 11008)] {
                        let shape = Shape { tokens, features, rank };
                        let plan = plan(kind, shape, processors);
                        let (rows, length) =
                            if kind == Kind::Project { (tokens, features) } else { (features, tokens) };
                        assert!(plan.tiles * plan.tiling.rows(kind) >= rows, "{shape:?} {plan:?}");
                        assert!(plan.tiling.padded_rank(kind) >= rank, "{shape:?} {plan:?}");
                        assert!(plan.splits == 1 || plan.splits * 128 <= length, "{shape:?} {plan:?}");
                        assert!(plan.splits <= 16 && (plan.splits > 1 || !plan.scratch), "{shape:?} {plan:?}");
                        let cluster = plan.splits > 1 && !plan.scratch;
                        assert!(!cluster || processors.clusters, "{shape:?} {plan:?}");
                        assert!(!cluster || plan.splits <= 8 && plan.splits.is_power_of_two(), "{shape:?} {plan:?}");
                    }
                }
            }
        }
    }

    /// One row per case that the rule tells apart; the fastest variant measured, or within 4 % of it.
    #[test]
    fn measured_shapes_get_what_was_fast() {
        let cases = [
            (Kind::Project, 8192, 4096, 16, (128, 1, false)),
            (Kind::Project, 2048, 4096, 16, (16, 8, false)),
            (Kind::Project, 512, 28672, 16, (8, 8, false)),
            (Kind::Project, 8192, 11008, 64, (64, 4, true)),
            (Kind::Project, 512, 4096, 64, (8, 16, true)),
            (Kind::Project, 8192, 8192, 128, (64, 2, false)),
            (Kind::Project, 2048, 8192, 128, (16, 8, false)),
            (Kind::Project, 512, 8192, 128, (8, 8, false)),
            (Kind::Project, 8192, 8192, 256, (128, 2, false)),
            (Kind::Gradient, 8192, 11008, 16, (86, 2, false)),
            (Kind::Gradient, 512, 11008, 16, (86, 1, false)),
            (Kind::Gradient, 8192, 4096, 64, (32, 8, true)),
            (Kind::Gradient, 8192, 11008, 64, (86, 3, true)),
            (Kind::Gradient, 8192, 28672, 64, (224, 1, false)),
            (Kind::Gradient, 512, 4096, 64, (64, 1, false)),
            (Kind::Gradient, 8192, 8192, 128, (64, 2, false)),
            (Kind::Gradient, 8192, 4096, 128, (32, 8, false)),
            (Kind::Gradient, 2048, 4096, 128, (32, 4, false)),
            (Kind::Gradient, 8192, 8192, 256, (128, 2, false)),
            (Kind::Gradient, 8192, 11008, 256, (172, 4, false)),
            (Kind::Gradient, 2048, 11008, 256, (172, 1, false)),
        ];
        for (kind, tokens, features, rank, expected) in cases {
            let plan = of(kind, tokens, features, rank);
            assert_eq!((plan.tiles, plan.splits, plan.scratch), expected, "{kind:?} {tokens}x{features} rank {rank}");
        }
    }
}
