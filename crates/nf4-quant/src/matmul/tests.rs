//! The choice of a kernel, and the texts of all of them.

use std::collections::HashSet;
use std::fmt::Write as _;

use cuda_source::Source;

use super::grouped::GroupedPath;
use super::*;

const H200: CudaDevice = CudaDevice {
    compute_capability: (9, 0),
    multiprocessors: 132,
    l2_bytes: 50 << 20,
    toolkit: (13, 0),
    driver: (13, 0),
};
const LINEAR: Problem = Problem {
    tokens: 2048,
    out_features: 11008,
    in_features: 4096,
    direction: Direction::Forward,
    rank: 64,
    format: FloatFormat::BF16,
    out: FloatFormat::BF16,
    blocksize: Some(64),
};

fn hopper(tokens: usize, stages: usize) -> Option<Path> {
    Some(Path::Hopper(hopper::Tile { tokens, stages }))
}

fn transient(tokens: usize) -> Option<Path> {
    Some(Path::Transient(Dense::Hopper(hopper::Tile { tokens, stages: if tokens == 128 { 5 } else { 4 } })))
}

fn mma_transient() -> Option<Path> {
    Some(Path::Transient(Dense::Ampere(ampere::Tile { tokens: 128 })))
}

fn ampere(tokens: usize) -> Option<Path> {
    Some(Path::Ampere(ampere::Tile { tokens }))
}

#[test]
fn the_device_decides() {
    assert_eq!(choose(&H200, &LINEAR, None), hopper(256, 5));
    assert_eq!(choose(&CudaDevice { driver: (12, 8), ..H200 }, &LINEAR, None), hopper(96, 2));
    for compute_capability in [(8, 0), (8, 9), (10, 0), (12, 0)] {
        let device = CudaDevice { compute_capability, ..H200 };
        let some = Problem { tokens: MMA_TRANSIENT_TOKENS - 1, ..LINEAR };
        assert_eq!(choose(&device, &some, None), ampere(128), "{compute_capability:?}");
        assert_eq!(choose(&device, &LINEAR, None), mma_transient(), "{compute_capability:?}");
        assert_eq!(choose(&device, &Problem { tokens: 16, rank: 0, ..LINEAR }, None), Some(Path::Gemv));
    }
    let turing = CudaDevice { compute_capability: (7, 5), ..H200 };
    assert_eq!(choose(&turing, &LINEAR, None), None);
    let half = Problem { format: FloatFormat::F16, out: FloatFormat::F16, ..LINEAR };
    assert_eq!(choose(&turing, &half, None), mma_transient());
    assert_eq!(choose(&turing, &Problem { tokens: 1, ..half }, None), ampere(16));
    assert_eq!(choose(&CudaDevice { compute_capability: (7, 0), ..H200 }, &half, None), None);
}

#[test]
fn groups_have_kernels_of_their_own() {
    let problem = Problem { tokens: 16_384, out_features: 768, in_features: 2048, rank: 16, ..LINEAR };
    let all = |device: &CudaDevice, problem: &Problem, rows| -> Vec<GroupedPath> {
        grouped::candidates(device, problem, 128, rows).map(|(_, path)| path).collect()
    };
    let hopper = |tokens, stages| GroupedPath::Hopper(hopper::Tile { tokens, stages });
    let ampere = |tokens| GroupedPath::Ampere(ampere::Tile { tokens });
    assert_eq!(all(&H200, &problem, 64), [hopper(64, 6), ampere(64)]);
    assert_eq!(all(&H200, &problem, 128), [hopper(128, 5), ampere(128)]);
    assert_eq!(all(&H200, &problem, 16), [ampere(16)]);
    assert_eq!(all(&H200, &problem, 32), []);
    assert_eq!(all(&CudaDevice { driver: (12, 8), ..H200 }, &problem, 64), [ampere(64)]);
    assert_eq!(all(&CudaDevice { compute_capability: (8, 6), ..H200 }, &problem, 128), [ampere(128)]);
    // Low-rank factors in the place of weights; a factor whose tiles cross groups.
    let factor = Problem { rank: 0, blocksize: None, out_features: 16, ..problem };
    assert_eq!(all(&H200, &factor, 64), [ampere(64)]);
    assert_eq!(all(&H200, &Problem { out_features: 760, ..problem }, 64), [ampere(64)]);
    for problem in [
        Problem { rank: 5, ..problem },
        Problem { out_features: 1 << 20, ..problem },
        Problem { format: FloatFormat::F32, ..problem },
    ] {
        assert_eq!(all(&H200, &problem, 64), [], "{problem:?}");
    }
}

#[test]
fn tokens_decide() {
    let tokens = |tokens| choose(&H200, &Problem { tokens, ..LINEAR }, None);
    assert_eq!(tokens(0), None);
    assert_eq!((tokens(1), tokens(16)), (Some(Path::Gemv), Some(Path::Gemv)));
    let bare = |tokens, in_features| choose(&H200, &Problem { tokens, in_features, rank: 0, ..LINEAR }, None);
    assert_eq!(
        (bare(4, 4096), bare(5, 4096), bare(16, 4096)),
        (Some(Path::Gemv), Some(Path::Resident), Some(Path::Resident))
    );
    assert_eq!(bare(16, 4160), Some(Path::Gemv));
    let old = CudaDevice { driver: (12, 8), ..H200 };
    assert_eq!(choose(&old, &Problem { tokens: 16, rank: 0, ..LINEAR }, None), Some(Path::Gemv));
    assert_eq!((tokens(17), tokens(128), tokens(129)), (hopper(64, 6), hopper(128, 5), hopper(256, 5)));
    assert_eq!((tokens(TRANSIENT_TOKENS - 1), tokens(TRANSIENT_TOKENS)), (hopper(256, 5), transient(256)));
    // Where Hopper's dense kernel is not to be had, its other one decodes codes in registers whatever the tokens are.
    let many = Problem { tokens: 8192, ..LINEAR };
    assert_eq!(choose(&CudaDevice { driver: (12, 8), ..H200 }, &many, None), hopper(96, 2));
    assert_eq!(choose(&CudaDevice { compute_capability: (8, 0), ..H200 }, &many, None), mma_transient());
    let gradient = Problem { tokens: 1, direction: Direction::InputGradient, ..LINEAR };
    assert_eq!(choose(&H200, &gradient, None), hopper(64, 6));
    let dense = Problem { tokens: 1, blocksize: None, ..LINEAR };
    assert_eq!(choose(&H200, &dense, None), hopper(64, 6));
}

#[test]
fn a_choice_can_be_forced() {
    let forced = |name, problem: &Problem| choose(&H200, problem, Some(name));
    let few = Problem { tokens: 5, ..LINEAR };
    assert_eq!((forced("gemv", &few), forced("gemv", &LINEAR)), (Some(Path::Gemv), None));
    let bare = Problem { tokens: 1, rank: 0, ..LINEAR };
    assert_eq!((forced("resident", &bare), forced("resident", &few)), (Some(Path::Resident), None));
    assert_eq!((forced("hopper", &few), forced("hopper", &LINEAR)), (hopper(64, 6), hopper(256, 5)));
    assert_eq!((forced("small-tiles", &few), forced("small-tiles", &LINEAR)), (hopper(96, 2), hopper(96, 2)));
    assert_eq!((forced("ampere", &few), forced("ampere", &LINEAR)), (ampere(16), ampere(128)));
    assert_eq!(
        (forced("transient", &LINEAR), forced("hopper", &Problem { tokens: 8192, ..LINEAR })),
        (transient(256), hopper(256, 5))
    );
    assert_eq!((forced("dequantize", &few), forced("dequantize", &LINEAR)), (None, None));
}

#[test]
fn some_shapes_have_no_kernel() {
    for problem in [
        Problem { format: FloatFormat::F32, out: FloatFormat::F32, ..LINEAR },
        Problem { in_features: 4090, ..LINEAR },
        Problem { rank: 4, ..LINEAR },
        Problem { out_features: 11007, ..LINEAR },
    ] {
        assert_eq!(choose(&H200, &problem, None), None, "{problem:?}");
    }
    // Blocks that no kernel decodes.
    assert_eq!(choose(&H200, &Problem { blocksize: Some(32), ..LINEAR }, None), transient(256));
    // A few tokens ask for less: no whole tiles of rows or ranks.
    let few = Problem { tokens: 1, rank: 5, out_features: 11007, ..LINEAR };
    assert_eq!(choose(&H200, &few, None), Some(Path::Gemv));
}

/// Writes the text of every variant to the folder that `NF4_QUANT_TEXTS` names, for compilers on machines without a
/// GPU to look at.
#[test]
fn texts_are_written_where_they_are_asked_for() {
    let Some(folder) = std::env::var_os("NF4_QUANT_TEXTS") else { return };
    let folder = std::path::PathBuf::from(folder);
    fn masks(problem: &Problem) -> &'static [bool] {
        if problem.direction == Direction::InputGradient { &[false, true] } else { &[false] }
    }
    let mut texts = HashSet::new();
    let mut write_all = |name: &str, sources: Vec<Source>| {
        for source in sources {
            let defines = source.text().lines().map_while(|line| line.strip_prefix("#define ")?.split_once(' '));
            let file = defines.filter(|(key, _)| !key.contains('(')).fold(name.to_owned(), |mut file, (key, value)| {
                let _ = write!(file, "-{key}{value}");
                file
            });
            std::fs::write(folder.join(format!("{file}.cu")), source.text()).unwrap();
            texts.insert(file);
        }
    };
    for direction in [Direction::Forward, Direction::InputGradient] {
        for (blocksize, tile_rows) in [16, 64, 128].into_iter().flat_map(|rows| [(Some(64), rows), (None, rows)]) {
            let problem = Problem { tokens: 300, in_features: 2048, out_features: 768, direction, blocksize, ..LINEAR };
            for (name, path) in grouped::candidates(&H200, &problem, 128, tile_rows) {
                write_all(name, vec![grouped::source(path, &problem)]);
            }
        }
    }
    let write = |name: &str, problem: &Problem, path: Path, write_all: &mut dyn FnMut(&str, Vec<Source>)| {
        let sources = match path {
            Path::Gemv => {
                let updates = [gemv::Updates::None, gemv::Updates::Given, gemv::Updates::Stacked];
                let both = |updates| [false, true].map(|nested| gemv::source(problem, nested, updates, !nested));
                updates.into_iter().flat_map(both).collect()
            }
            Path::Resident => {
                let both = |updates| [false, true].map(|nested| resident::source(problem, nested, updates, !nested));
                [false, true].into_iter().flat_map(both).collect()
            }
            Path::Hopper(tile) => masks(problem).iter().map(|masked| hopper::source(tile, problem, *masked)).collect(),
            Path::Ampere(tile) => masks(problem).iter().map(|masked| ampere::source(tile, problem, *masked)).collect(),
            // The texts of dense products, which are written by themselves.
            Path::Transient(_) => Vec::new(),
        };
        write_all(name, sources);
    };
    for direction in [Direction::Forward, Direction::InputGradient] {
        for blocksize in [Some(64), None] {
            for format in [FloatFormat::BF16, FloatFormat::F16] {
                for out in [format, FloatFormat::F32] {
                    for (tokens, in_features) in
                        [(1, 4096), (1, 64), (5, 4096), (5, 64), (9, 4096), (9, 64), (17, 64), (65, 64), (129, 64)]
                    {
                        let problem = Problem { tokens, in_features, direction, blocksize, format, out, ..LINEAR };
                        for problem in [problem, Problem { rank: 0, ..problem }] {
                            for (name, path) in candidates(&H200, &problem) {
                                write(name, &problem, path, &mut write_all);
                            }
                        }
                    }
                }
            }
        }
    }
    assert!(texts.len() > 100, "{} texts", texts.len());
}

/// The assembler refuses more than 48 KB of static shared memory and what a card lacks. Without NVRTC there is nothing to see.
#[test]
fn mma_kernels_fit_cards_with_less() {
    // Of a multiprocessor's shared memory, 64 KB are cubes' on 7.5, and 100 KB on 8.6 and 8.9.
    for (capability, format, shared) in [
        ((7, 5), FloatFormat::F16, 64 << 10),
        ((8, 6), FloatFormat::BF16, 100 << 10),
        ((8, 9), FloatFormat::F16, 100 << 10),
    ] {
        for (direction, blocksize) in
            [Direction::Forward, Direction::InputGradient].into_iter().flat_map(|d| [(d, None), (d, Some(64))])
        {
            let problem = Problem { direction, blocksize, format, out: format, ..LINEAR };
            for (tokens, grouped, masked) in [(16, false, false), (64, true, false), (128, false, true)] {
                let source = ampere::source_of(ampere::Tile { tokens }, &problem, grouped, masked);
                let source = if capability < (8, 0) { source.for_turing() } else { source };
                let Some(resources) = cuda_source::assemble(&source, capability).unwrap() else { return };
                let cubes = if capability < (8, 0) { 1 } else { 2 };
                assert!(resources.cubes(source.cube_dim(), shared) >= cubes, "{capability:?} {tokens}: {resources:?}");
                assert!(resources.spilled_bytes <= 128, "{capability:?} {problem:?} {tokens}: {resources:?}");
            }
        }
    }
}
