//! y = x op(W) on tensor cores, with the frozen weight W in 4 bits or dense, and LoRA's update in the
//! same launch.
//!
//! | | rows of A | A | X | result |
//! |---|---|---|---|---|
//! | forward | out_features | W | x `[tokens, in_features]` | y = x Wᵀ (+ u Bᵀ) (+ bias) |
//! | input gradient | in_features | Wᵀ | dy `[tokens, out_features]` | dx = dy W (+ v A) |
//!
//! Up to some thousand tokens no dequantized weight exists outside registers. Beyond, one transient of the weight costs
//! less than decoding every tile again for each panel of tokens: see [`TRANSIENT_TOKENS`].
//!
//! Sums are f32 and rounded once, after the low-rank product and the bias have been added. Weights are the codebook's value
//! times absmax in f32, rounded once to the activations' format, as [`crate::kernels::dequantize`] rounds them. So the
//! result differs from dequantizing and multiplying only in the order of an f32 sum; [`mod@gemv`] and [`mod@resident`], for up to
//! 16 tokens, round less.
//!
//! | kernel | for |
//! |---|---|
//! | [`mod@gemv`] | up to 16 tokens forward, compute capability 8.0 or later |
//! | [`mod@resident`] | the same on 9.0: faster from five tokens on, where W has at most 4,096 columns |
//! | [`mod@hopper`] | wgmma: compute capability 9.0 |
//! | [`mod@ampere`] | mma.sync: compute capability 8.0 or later, and 7.5 for f16 |
//! | transient | the dense form of the latter two, on a weight that was dequantized before it |
//!
//! [`mod@grouped`] multiplies groups of rows by a weight each, in one launch.
//!
//! [`path`] is the one place that chooses the kernel for a problem on a device. Where it returns `None` the caller
//! dequantizes into a transient.

pub mod ampere;
mod arrange;
pub mod gemv;
pub mod grouped;
pub mod hopper;
pub mod joined;
mod reference;
pub mod resident;
mod schedule;

use cubecl::client::Client;
use cubecl::server::Handle;
use cuda_source::{Choices, CudaDevice, LaunchError};

use crate::kernels::{DeviceAbsmax, DeviceWeight, check_size, dequantize};
use crate::{FloatFormat, QuantError};

pub use reference::reference;

/// Which product of a weight `[out_features, in_features]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// y = x Wᵀ.
    Forward,
    /// dx = dy W.
    InputGradient,
}

/// A product's dimensions and formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Problem {
    /// Rows of x.
    pub tokens: usize,
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight.
    pub in_features: usize,
    /// Which product.
    pub direction: Direction,
    /// Columns of the low-rank operand; 0 without one.
    pub rank: usize,
    /// Format of x (and of a dense weight).
    pub format: FloatFormat,
    /// Format of the result: `format`, or f32.
    pub out: FloatFormat,
    /// Elements per block of a 4-bit weight; `None` for a dense one.
    pub blocksize: Option<usize>,
}

impl Problem {
    /// Features of the result: rows of the left operand of the tile that is computed.
    pub fn features(&self) -> usize {
        match self.direction {
            Direction::Forward => self.out_features,
            Direction::InputGradient => self.in_features,
        }
    }

    /// Length of the sums.
    pub fn depth(&self) -> usize {
        match self.direction {
            Direction::Forward => self.in_features,
            Direction::InputGradient => self.out_features,
        }
    }
}

/// The weight of a product.
#[derive(Debug, Clone, Copy)]
pub enum Weight<'a> {
    /// 4-bit.
    FourBit(&'a DeviceWeight),
    /// Dense, row-major, in the format of x.
    Dense(&'a Handle),
}

/// LoRA's update, added to the sums before they are rounded.
#[derive(Debug, Clone, Copy)]
pub struct LowRank<'a> {
    /// `[tokens, rank]` in the format of x: u = scaling * x Aᵀ forward, v = scaling * dy B for the gradient.
    pub product: &'a Handle,
    /// f32: `lora_b` `[out_features, rank]` forward, `lora_a` `[rank, in_features]` for the gradient. Rounded
    /// to the format of x, as under PEFT's autocast.
    pub factor: &'a Handle,
    /// Dropout of the update, before it is added; for gradients alone.
    pub mask: Option<Mask>,
}

/// A dropout mask over the result: `fused_kernels::Dropout`, whose text is [`cuda_source::dropout!`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mask {
    /// Picks the mask.
    pub seed: u64,
    /// Elements whose 16 bits are below are zero.
    pub threshold: u32,
    /// Factor of the others.
    pub scale: f32,
}

/// What a product multiplies.
#[derive(Debug, Clone, Copy)]
pub struct Operands<'a> {
    /// `[tokens, depth]`, contiguous.
    pub x: &'a Handle,
    /// The frozen weight.
    pub weight: Weight<'a>,
    /// LoRA's update, when [`Problem::rank`] is not 0.
    pub low_rank: Option<LowRank<'a>>,
    /// f32 `[features]`.
    pub bias: Option<&'a Handle>,
}

impl Operands<'_> {
    /// The mask of the low-rank part.
    fn mask(&self) -> Option<Mask> {
        self.low_rank.and_then(|low_rank| low_rank.mask)
    }
}

/// Tokens from which on a 4-bit product on Hopper dequantizes the weight into a transient first.
///
/// On a card at its power limit, 8192 tokens x 11008 x 4096 run at 618 TFLOP/s forward and 590 for the gradient with
/// the weight decoded in registers, which is repeated for every 256 tokens, and at 708 and 753 in the dense kernel. To
/// dequantize an element into the transient costs 0.9 ps. So the transient is faster from some 2,100 tokens (forward)
/// and 1,200 (gradient) on; below 4,096, saving its memory is worth more.
pub const TRANSIENT_TOKENS: usize = 4096;

/// The same for `mma.sync`, whose decoding kernel is further from its dense one.
///
/// On an H100, 8192 tokens x 11008 x 4096 run at 290 TFLOP/s with the weight decoded and at 430 in the dense kernel. So the
/// transient is faster from some 500 tokens on; below 1,024, saving its memory is worth more.
pub const MMA_TRANSIENT_TOKENS: usize = 1024;

/// The kernel of a dense product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dense {
    /// wgmma, compute capability 9.0.
    Hopper(hopper::Tile),
    /// mma.sync, compute capability 8.0 or later, and 7.5 for f16.
    Ampere(ampere::Tile),
}

/// The kernel that takes a problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Path {
    /// A few tokens, bound by reading the codes.
    Gemv,
    /// A few tokens, which stay in registers, compute capability 9.0.
    Resident,
    /// wgmma, compute capability 9.0.
    Hopper(hopper::Tile),
    /// mma.sync, compute capability 8.0 or later, and 7.5 for f16.
    Ampere(ampere::Tile),
    /// The weight is dequantized into a transient of its own size, which a dense product multiplies.
    Transient(Dense),
}

/// The kernel for a problem on a client's device, or `None` where dequantizing first is the way: other
/// runtimes and older cards, f32 activations, and shapes whose rows don't start at multiples of 16 bytes.
///
/// The environment variable `NF4_QUANT_MATMUL` forces a choice: `gemv`, `resident`, `hopper`, `small-tiles` (hopper, as on drivers
/// before CUDA 13, which limit static shared memory to 48 KB), `ampere`, `transient`, or `dequantize` (no kernel). A
/// problem that the forced kernel does not take has none.
pub fn path(client: &Client, problem: &Problem) -> Option<Path> {
    static CHOICES: Choices<(Problem, Option<Path>)> = Choices::new("NF4_QUANT_MATMUL");
    let path = choose(&cuda_source::device(client)?, problem, CHOICES.forced());
    // A kind is a problem without its tokens, which change from batch to batch.
    let kind = || (Problem { tokens: 0, ..*problem }, path);
    if tracing::enabled!(tracing::Level::DEBUG) && CHOICES.is_new(kind()) {
        match path {
            Some(path) => tracing::debug!(?problem, ?path, "product on tensor cores"),
            None => tracing::debug!(?problem, "product by way of a dequantized transient"),
        }
    }
    path
}

/// Every kernel that takes a problem on a client's device, the one that [`path`] prefers first.
pub fn paths(client: &Client, problem: &Problem) -> Vec<Path> {
    cuda_source::device(client)
        .map_or_else(Vec::new, |device| candidates(&device, problem).map(|(_, path)| path).collect())
}

fn choose(device: &CudaDevice, problem: &Problem, forced: Option<&str>) -> Option<Path> {
    cuda_source::choose(candidates(device, problem), forced)
}

/// The kernels that can take a problem, by preference, with the names that force them.
fn candidates(device: &CudaDevice, problem: &Problem) -> impl Iterator<Item = (&'static str, Path)> + use<> {
    let hopper = |small| hopper::tile(device, problem, small).map(Path::Hopper);
    let transient = problem.blocksize.and_then(|_| {
        let dense = Problem { blocksize: None, ..*problem };
        let hopper = hopper::tile(device, &dense, false).map(Dense::Hopper);
        hopper.or_else(|| ampere::tile(device, &dense).map(Dense::Ampere))
    });
    let many = |dense: &Dense| match dense {
        Dense::Hopper(_) => problem.tokens >= TRANSIENT_TOKENS,
        // `wgmma` that decodes is faster than `mma` that need not.
        Dense::Ampere(_) => problem.tokens >= MMA_TRANSIENT_TOKENS && hopper(false).is_none(),
    };
    let resident = |preferred: bool| {
        let is_here = resident::fits(device, problem) && resident::is_faster(problem) == preferred;
        is_here.then_some(Path::Resident)
    };
    let known = [
        ("resident", resident(true)),
        ("gemv", gemv::fits(device, problem).then_some(Path::Gemv)),
        ("resident", resident(false)),
        ("transient", transient.filter(many).map(Path::Transient)),
        ("hopper", hopper(false)),
        ("small-tiles", hopper(true)),
        ("ampere", ampere::tile(device, problem).map(Path::Ampere)),
        // Blocks that the others don't take.
        ("transient", transient.filter(|dense| !many(dense)).map(Path::Transient)),
    ];
    known.into_iter().filter_map(|(name, path)| Some((name, path?)))
}

/// Launches a product on the path that [`path`] gave.
///
/// # Shapes
///
/// `out` holds `[tokens, features]` of [`Problem::out`]; see [`Operands`] for the others.
///
/// # Errors
///
/// [`QuantError::BufferSize`] for the buffer that is too small, [`QuantError::Matmul`] for operands that do
/// not fit the problem. Kernels run asynchronously: a device's own failure shows when a result is read.
pub fn matmul(
    client: &Client,
    path: Path,
    problem: &Problem,
    operands: &Operands<'_>,
    out: &Handle,
) -> Result<(), QuantError> {
    check(problem, operands, out)?;
    match path {
        Path::Gemv if operands.mask().is_some() => {
            Err(QuantError::Matmul("the kernel for a few tokens has no mask: take another path".into()))
        }
        Path::Gemv => gemv::launch(client, problem, operands, out),
        Path::Resident => resident::launch(client, problem, operands, out),
        Path::Hopper(tile) => hopper::launch(client, tile, problem, operands, out),
        Path::Ampere(tile) => ampere::launch(client, tile, problem, operands, out),
        Path::Transient(dense) => by_transient(client, dense, problem, operands, out),
    }
}

/// Dequantizes the weight and multiplies it.
fn by_transient(
    client: &Client,
    dense: Dense,
    problem: &Problem,
    operands: &Operands<'_>,
    out: &Handle,
) -> Result<(), QuantError> {
    let Weight::FourBit(weight) = operands.weight else {
        return Err(QuantError::Matmul("a dense weight needs no transient".into()));
    };
    let transient = client.empty(weight.num_elements * problem.format.size());
    dequantize(client, weight, transient.clone(), problem.format)?;
    let problem = &Problem { blocksize: None, ..*problem };
    let operands = &Operands { weight: Weight::Dense(&transient), ..*operands };
    match dense {
        Dense::Hopper(tile) => hopper::launch(client, tile, problem, operands, out),
        Dense::Ampere(tile) => ampere::launch(client, tile, problem, operands, out),
    }
}

fn refused(error: LaunchError) -> QuantError {
    QuantError::Matmul(error.to_string())
}

/// For kernels that move 16 bytes at a time.
fn check_alignment(name: &'static str, handle: &Handle) -> Result<(), QuantError> {
    match handle.offset_start.unwrap_or(0) {
        offset if offset.is_multiple_of(16) => Ok(()),
        offset => Err(QuantError::Matmul(format!("`{name}` starts at byte {offset} of its buffer, no multiple of 16"))),
    }
}

fn check(problem: &Problem, operands: &Operands<'_>, out: &Handle) -> Result<(), QuantError> {
    let Problem { tokens, out_features, in_features, rank, format, .. } = *problem;
    let size = format.size();
    check_size("x", operands.x, tokens * problem.depth() * size)?;
    check_size("out", out, tokens * problem.features() * problem.out.size())?;
    if let Some(bias) = operands.bias {
        check_size("bias", bias, problem.features() * 4)?;
    }
    match (operands.low_rank, rank) {
        (None, 0) => {}
        (Some(LowRank { mask: Some(_), .. }), _) if problem.direction == Direction::Forward => {
            return Err(QuantError::Matmul("a forward product's update has no mask: its input has".into()));
        }
        (Some(LowRank { product, factor, .. }), 1..) => {
            check_size("low-rank product", product, tokens * rank * size)?;
            check_size("low-rank factor", factor, problem.features() * rank * 4)?;
        }
        (given, _) => {
            let given = if given.is_some() { "a" } else { "no" };
            return Err(QuantError::Matmul(format!("rank {rank} with {given} low-rank operand")));
        }
    }
    match (operands.weight, problem.blocksize) {
        (Weight::Dense(weight), None) => check_size("weight", weight, out_features * in_features * size),
        (Weight::FourBit(weight), Some(blocksize)) => {
            weight.validate()?;
            if weight.num_elements != out_features * in_features || weight.blocksize != blocksize {
                return Err(QuantError::Matmul(format!(
                    "a weight of {} elements in blocks of {} where the problem says {out_features} x {in_features} in blocks of {blocksize}",
                    weight.num_elements, weight.blocksize
                )));
            }
            match &weight.absmax {
                DeviceAbsmax::Nested { blocksize, .. } if !blocksize.is_power_of_two() => {
                    Err(QuantError::Matmul(format!("nested blocksize {blocksize} is no power of two")))
                }
                _ => Ok(()),
            }
        }
        (_, blocksize) => Err(QuantError::Matmul(format!("the weight is not of the problem's kind ({blocksize:?})"))),
    }
}

#[cfg(test)]
mod tests;
