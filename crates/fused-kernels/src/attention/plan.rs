//! Which kernels run a shape, and which variant of those for `mma`: everything that its text depends on.
//!
//! Tiles are the fastest measured on an H100 of those that fit 48 KB of shared memory, the limit of static memory on cards
//! before Hopper, and the registers. A test asks the assembler for 7.5, 8.0 and 8.6 what they take.

use cubecl::client::Client;
use cuda_source::{Choices, CudaDevice, Source};

use super::{Operand, Shape, hopper};
use crate::FloatFormat;

/// The kernels that take an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Path {
    /// `mma.sync`, compute capability 8.0 or later, and 7.5 for f16.
    Mma,
    /// wgmma and TMA, compute capability 9.0.
    Hopper,
}

/// The kernels that can take a shape on a client's device.
pub fn paths(client: &Client, shape: &Shape) -> Vec<Path> {
    let device = cuda_source::device(client);
    device.map_or_else(Vec::new, |device| candidates(&device, shape).collect())
}

fn candidates(device: &CudaDevice, shape: &Shape) -> impl Iterator<Item = Path> + use<> {
    let hopper = hopper::takes(device, shape.head_dim).then_some(Path::Hopper);
    hopper.into_iter().chain(device.multiplies(shape.format).then_some(Path::Mma))
}

/// The kernels that take a shape: those that suit it best, or those that `FUSED_KERNELS_ATTENTION` names, if they can.
pub(super) fn path(client: &Client, shape: &Shape, operands: &[Operand<'_>]) -> Path {
    static CHOICES: Choices<(Path, usize, usize, usize, FloatFormat)> = Choices::new("FUSED_KERNELS_ATTENTION");
    let path = choose(&paths(client, shape), hopper::suits(shape, operands), CHOICES.forced());
    let &Shape { heads, kv_heads, head_dim, format, .. } = shape;
    if tracing::enabled!(tracing::Level::DEBUG) && CHOICES.is_new((path, heads, kv_heads, head_dim, format)) {
        tracing::debug!(heads, kv_heads, head_dim, ?format, ?path, "attention on tensor cores");
    }
    path
}

fn choose(available: &[Path], hopper_suits: bool, forced: Option<&str>) -> Path {
    let hopper = available.contains(&Path::Hopper).then_some(("hopper", Path::Hopper));
    let candidates = || {
        let (first, last) = if hopper_suits { (hopper, None) } else { (None, hopper) };
        first.into_iter().chain([("mma", Path::Mma)]).chain(last)
    };
    // A forced kernel that does not take the shape leaves the choice to the rule.
    let chosen = cuda_source::choose(candidates(), forced).or_else(|| cuda_source::choose(candidates(), None));
    chosen.unwrap_or(Path::Mma)
}

/// Warps of a cube.
const WARPS: usize = 4;
/// Threads of a cube.
pub(super) const THREADS: usize = 32 * WARPS;

static FORWARD: &str = concat!(
    cuda_source::prelude!(),
    cuda_source::tensor_cores!(),
    include_str!("primitives.cu"),
    include_str!("shape.cu"),
    include_str!("tiles.cu"),
    include_str!("forward.cu")
);
static BACKWARD: &str = concat!(
    cuda_source::prelude!(),
    cuda_source::tensor_cores!(),
    include_str!("primitives.cu"),
    include_str!("shape.cu"),
    include_str!("tiles.cu"),
    include_str!("backward.cu")
);

/// The kernels; but for the first, by the `KIND` of `backward.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Forward,
    /// `rowsum(dO * O)`.
    Delta,
    /// dK and dV.
    Keys,
    /// dQ.
    Queries,
}

/// A kernel with its macros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Variant {
    pub kind: Kind,
    /// head_dim, padded: 64, 96, 128, 192 or 256.
    pub dim: usize,
    pub softcap: bool,
    pub format: FloatFormat,
}

/// How a cube's warps divide their work: the macros of `forward.cu` and `backward.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tiling {
    /// Rows of a tile in shared memory.
    rows: usize,
    /// Rows of a tile that a warp takes at once.
    step: usize,
    stages: usize,
    /// Sets of 16 rows that a warp owns.
    sets: usize,
    /// Warps that share their rows.
    slices: usize,
    min_cubes: usize,
}

impl Variant {
    /// # Panics
    /// Never: the caller checked that `head_dim` is at most 256.
    pub(super) fn new(kind: Kind, head_dim: usize, softcap: bool, format: FloatFormat) -> Self {
        let dim = [64, 96, 128, 192].into_iter().find(|dim| head_dim <= *dim).unwrap_or(256);
        Self { kind, dim, softcap, format }
    }

    fn tiling(self) -> Tiling {
        let of = |[rows, step, stages]: [usize; 3], sets, slices, min_cubes| Tiling {
            rows,
            step,
            stages,
            sets,
            slices,
            min_cubes,
        };
        match (self.kind, self.dim) {
            (Kind::Forward, 64) => of([64, 64, 3], 2, 1, 2),
            (Kind::Forward, 96 | 128) => of([64, 64, 3], 1, 1, 3),
            (Kind::Forward, _) => of([32, 32, 3], 1, 1, 2),
            (Kind::Delta, _) => of([16, 16, 1], 1, 1, 1),
            (Kind::Keys, 64) => of([64, 16, 2], 1, 1, 3),
            (Kind::Keys, 96 | 128) => of([32, 32, 2], 1, 1, 2),
            (Kind::Queries, 64) => of([64, 32, 2], 1, 1, 3),
            (Kind::Queries, 96 | 128) => of([32, 32, 3], 1, 1, 2),
            (Kind::Keys, 192) => of([16, 16, 3], 1, 2, 2),
            (Kind::Queries, 192) => of([16, 16, 3], 1, 1, 2),
            (Kind::Keys, _) => of([16, 16, 2], 1, 2, 2),
            (Kind::Queries, _) => of([16, 16, 3], 1, 2, 2),
        }
    }

    /// Whether the forward kernel's keys and values come together, not by turns.
    fn is_paired(self) -> bool {
        self.kind == Kind::Forward && self.dim == 64
    }

    /// Whether the kernel of dK and dV keeps values in shared memory.
    fn shares_values(self) -> bool {
        self.kind == Kind::Keys && self.dim == 256
    }

    /// Rows of queries, or keys, that a cube computes.
    pub(super) fn cube_rows(self) -> usize {
        let Tiling { sets, slices, .. } = self.tiling();
        16 * WARPS * sets / slices
    }

    /// (token, head) pairs of a cube of [`Kind::Delta`].
    pub(super) fn pairs(self) -> usize {
        THREADS / (self.dim / 8).next_power_of_two()
    }

    /// The kernel's text.
    pub(super) fn source(self) -> Source {
        let Tiling { rows, step, stages, sets, slices, min_cubes } = self.tiling();
        let shared = [
            self.format.define(),
            ("D", self.dim as i64),
            // It takes no part in delta, which has one text then.
            ("SOFTCAP", i64::from(self.softcap && self.kind != Kind::Delta)),
            ("WARPS", WARPS as i64),
            ("ROWS", rows as i64),
            ("STEP", step as i64),
            ("STAGES", stages as i64),
            ("MIN_CUBES", min_cubes as i64),
        ];
        let (file, name, kind) = match self.kind {
            Kind::Forward => (FORWARD, "attention_forward", 0),
            Kind::Delta => (BACKWARD, "attention_delta", 1),
            Kind::Keys => (BACKWARD, "attention_keys", 2),
            Kind::Queries => (BACKWARD, "attention_queries", 3),
        };
        let own: &[(&'static str, i64)] = match self.kind {
            Kind::Forward => &[("SETS", sets as i64), ("PAIRED", self.is_paired().into())],
            _ => &[
                ("KIND", kind),
                ("SLICES", slices as i64),
                ("VALUES_SHARED", self.shares_values().into()),
                // Values leave no room for them.
                ("STATISTICS_SHARED", (!self.shares_values()).into()),
            ],
        };
        Source::with_defines(file, name, THREADS as u32, &[&shared[..], own].concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [Kind; 4] = [Kind::Forward, Kind::Delta, Kind::Keys, Kind::Queries];

    #[test]
    fn a_forced_choice_is_taken_where_it_can_be() {
        let both = [Path::Hopper, Path::Mma];
        assert_eq!([true, false].map(|suits| choose(&both, suits, None)), both);
        assert_eq!(choose(&both, true, Some("mma")), Path::Mma);
        assert_eq!(choose(&both, false, Some("hopper")), Path::Hopper);
        assert_eq!(choose(&[Path::Mma], true, Some("hopper")), Path::Mma);
    }

    #[test]
    fn heads_are_padded_to_the_next_kernel() {
        for (head_dim, dim) in [(8, 64), (64, 64), (72, 96), (96, 96), (128, 128), (160, 192), (200, 256), (256, 256)] {
            assert_eq!(Variant::new(Kind::Keys, head_dim, false, FloatFormat::BF16).dim, dim);
        }
    }

    #[test]
    fn tiles_fit_in_shared_memory_and_load_evenly() {
        for dim in [64, 96, 128, 192, 256] {
            for kind in KINDS {
                let variant = Variant::new(kind, dim, false, FloatFormat::BF16);
                let Tiling { rows, step, stages, slices, .. } = variant.tiling();
                let tiles = match kind {
                    Kind::Delta => 0,
                    Kind::Forward if !variant.is_paired() => stages,
                    _ => 2 * stages,
                };
                let values = if variant.shares_values() { variant.cube_rows() } else { 0 };
                let statistics = if kind == Kind::Keys && values == 0 { 8 * stages * rows } else { 0 };
                assert!((tiles * rows + values) * dim * 2 + statistics <= 48 << 10, "{variant:?}");
                if kind != Kind::Delta {
                    assert_eq!(rows * dim / 8 % THREADS, 0, "{variant:?}: threads copy equal shares");
                    assert!(stages >= 2 && rows.is_multiple_of(step) && 2 * rows <= THREADS, "{variant:?}");
                }
                assert_eq!(WARPS % slices, 0);
            }
        }
    }

    /// The assembler refuses more than 48 KB of static shared memory and what a card lacks. Without NVRTC there is nothing
    /// to see.
    #[test]
    fn kernels_fit_cards_with_less() {
        // Of a multiprocessor's shared memory, 64 KB are cubes' on 7.5, 164 KB on 8.0, and 100 KB on 8.6 and 8.9.
        let (f16, bf16) = (FloatFormat::F16, FloatFormat::BF16);
        for (capability, format, shared, cubes) in [((7, 5), f16, 64, 1), ((8, 0), f16, 164, 3), ((8, 6), bf16, 100, 2)]
        {
            for (kind, dim) in KINDS.into_iter().flat_map(|kind| [64, 96, 128, 192, 256].map(|dim| (kind, dim))) {
                let variant = Variant::new(kind, dim, true, format);
                let source = if capability < (8, 0) { variant.source().for_turing() } else { variant.source() };
                let Some(resources) = cuda_source::assemble(&source, capability).unwrap() else { return };
                let cubes = variant.tiling().min_cubes.min(cubes);
                let what = format!("{capability:?} {variant:?}: {resources:?}");
                assert!(resources.cubes(THREADS as u32, shared << 10) >= cubes as u32, "{what}");
                assert!(resources.spilled_bytes <= 128, "{what}");
            }
        }
    }

    #[test]
    fn signatures_are_plain() {
        for (kind, parameters) in [(Kind::Forward, 8), (Kind::Delta, 5), (Kind::Keys, 10), (Kind::Queries, 9)] {
            let source = Variant::new(kind, 128, true, FloatFormat::F16).source();
            let at = source.text().find(&format!("{}(", source.name())).unwrap();
            let list = source.text()[at..].split(')').next().unwrap();
            assert_eq!(list.matches(',').count() + 1, parameters, "{kind:?}");
        }
    }
}
