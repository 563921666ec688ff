//! LoRA factors for the product's tiles: f32 to 16 bits, in the row order of the tile's fragments.
//!
//! A 4-bit fragment holds neighbouring rows where wgmma's own order has rows eight apart (see hopper.cu), so
//! a factor that reaches wgmma through shared memory has to follow. The copy is padded to whole tiles of
//! rows and to ranks of whole 16-byte rows, which TMA needs.
//!
//! Bytes: 6 per element, so 4 MB or 1 µs for a 7B model's widest layer at rank 64.

use cubecl::client::Client;
use cubecl::server::Handle;
use cuda_source::{Arguments, LaunchError, Source};

use super::{Direction, Problem};

const TEXT: &str = concat!(cuda_source::prelude!(), include_str!("arrange.cu"));
const THREADS: u32 = 256;

/// A factor in 16 bits.
pub(super) struct Arranged {
    pub handle: Handle,
    /// Rows of the row-major copy: features (forward) or ranks.
    pub rows: usize,
    /// Its columns: ranks (forward) or features.
    pub cols: usize,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    features: u32,
    rank: u32,
    padded_features: u32,
    padded_rank: u32,
    transposed: u32,
    permuted: u32,
}

/// Rounds and arranges a factor, `[features, rank]` forward and `[rank, features]` for the input gradient.
pub(super) fn arrange(client: &Client, problem: &Problem, factor: &Handle) -> Result<Arranged, LaunchError> {
    let (features, rank) = (problem.features(), problem.rank);
    let (padded_features, padded_rank) = (features.next_multiple_of(128), rank.next_multiple_of(8));
    let transposed = problem.direction == Direction::InputGradient;
    let handle = client.empty(padded_features * padded_rank * 2);
    let source =
        Source::with_defines(TEXT, "arrange", THREADS, &[cuda_source::FloatFormat::from(problem.format).define()]);
    let params = Params {
        features: features as u32,
        rank: rank as u32,
        padded_features: padded_features as u32,
        padded_rank: padded_rank as u32,
        transposed: transposed.into(),
        permuted: problem.blocksize.is_some().into(),
    };
    let cubes = (padded_features * padded_rank).div_ceil(THREADS as usize) as u32;
    cuda_source::launch(client, &source, (cubes, 1, 1), Arguments::new().read(factor).write(&handle).params(params))?;
    let (rows, cols) = match transposed {
        true => (padded_rank, padded_features),
        false => (padded_features, padded_rank),
    };
    Ok(Arranged { handle, rows, cols })
}
