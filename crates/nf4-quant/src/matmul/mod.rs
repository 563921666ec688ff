//! y = x op(W) on tensor cores, with the frozen weight W in 4 bits or dense, and LoRA's update in the
//! same launch.
//!
//! | | rows of A | A | X | result |
//! |---|---|---|---|---|
//! | forward | out_features | W | x `[tokens, in_features]` | y = x Wᵀ (+ u Bᵀ) (+ bias) |
//! | input gradient | in_features | Wᵀ | dy `[tokens, out_features]` | dx = dy W (+ v A) |
//!
//! No dequantized weight exists outside registers. Sums are f32 and rounded once, after the low-rank
//! product and the bias have been added; weights are codebook\[code\] * absmax in f32, rounded once to the
//! activations' format, as [`crate::kernels::dequantize`] rounds them. So the result differs from
//! dequantizing and multiplying only in the order of an f32 sum.
//!
//! [`path`] says which kernel takes a problem, from what the device is: one place, for every caller. There
//! is a kernel for Hopper ([`mod@hopper`]); where `path` has no answer the caller dequantizes into a transient.

mod arrange;
pub mod hopper;
mod reference;

use std::collections::HashSet;
use std::sync::{LazyLock, Mutex, OnceLock, PoisonError};

use cubecl::client::Client;
use cubecl::server::Handle;
use cuda_source::{CudaDevice, LaunchError};

use crate::kernels::{DeviceAbsmax, DeviceWeight, check_size};
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

/// The kernel that takes a problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Path {
    /// wgmma, compute capability 9.0.
    Hopper(hopper::Tile),
}

/// The kernel for a problem on a client's device, or `None` where dequantizing first is the way: other
/// runtimes and older cards, f32 activations, and shapes that TMA can't address.
///
/// The environment variable `NF4_QUANT_MATMUL` forces a choice: `dequantize` (no fused kernel) or
/// `small-tiles` (as on drivers before CUDA 13, which limit static shared memory to 48 KB).
pub fn path(client: &Client, problem: &Problem) -> Option<Path> {
    static FORCED: OnceLock<Option<String>> = OnceLock::new();
    let forced = FORCED.get_or_init(|| std::env::var("NF4_QUANT_MATMUL").ok());
    let device = cuda_source::device(client)?;
    let path = choose(&device, problem, forced.as_deref());
    log(problem, path);
    path
}

/// Says once for each kind of problem what takes it.
fn log(problem: &Problem, path: Option<Path>) {
    type Kinds = HashSet<(Problem, Option<Path>)>;
    static SAID: LazyLock<Mutex<Kinds>> = LazyLock::new(Mutex::default);
    if !tracing::enabled!(tracing::Level::DEBUG) {
        return;
    }
    // A kind is a problem without its tokens, which change from batch to batch.
    let kind = (Problem { tokens: 0, ..*problem }, path);
    if SAID.lock().unwrap_or_else(PoisonError::into_inner).insert(kind) {
        match path {
            Some(path) => tracing::debug!(?problem, ?path, "product on tensor cores"),
            None => tracing::debug!(?problem, "product by way of a dequantized transient"),
        }
    }
}

fn choose(device: &CudaDevice, problem: &Problem, forced: Option<&str>) -> Option<Path> {
    if forced == Some("dequantize") {
        return None;
    }
    hopper::tile(device, problem, forced == Some("small-tiles")).map(Path::Hopper)
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
        Path::Hopper(tile) => hopper::launch(client, tile, problem, operands, out),
    }
    .map_err(|error: LaunchError| QuantError::Matmul(error.to_string()))
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
        (Some(LowRank { product, factor }), 1..) => {
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
mod tests {
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

    #[test]
    fn the_device_and_the_shape_decide() {
        let tile = |device: &CudaDevice, problem: &Problem, forced| {
            choose(device, problem, forced).map(|Path::Hopper(tile)| tile.tokens)
        };
        assert_eq!(tile(&H200, &LINEAR, None), Some(256));
        assert_eq!(tile(&H200, &LINEAR, Some("small-tiles")), Some(96));
        assert_eq!(tile(&H200, &LINEAR, Some("dequantize")), None);
        assert_eq!(tile(&H200, &Problem { tokens: 17, ..LINEAR }, None), Some(64));
        assert_eq!(tile(&CudaDevice { driver: (12, 8), ..H200 }, &LINEAR, None), Some(96));
        for device in [(8, 0), (10, 0), (12, 0)] {
            assert_eq!(tile(&CudaDevice { compute_capability: device, ..H200 }, &LINEAR, None), None, "{device:?}");
        }
        for problem in [
            Problem { format: FloatFormat::F32, out: FloatFormat::F32, ..LINEAR },
            Problem { in_features: 4090, ..LINEAR },
            Problem { blocksize: Some(32), ..LINEAR },
            Problem { rank: 4, ..LINEAR },
            Problem { out_features: 11007, ..LINEAR },
        ] {
            assert_eq!(tile(&H200, &problem, None), None, "{problem:?}");
        }
    }
}
