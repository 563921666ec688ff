//! y_i = x W_iᵀ for up to three 4-bit weights of one input and up to 16 tokens, each token with its own adapter, in one
//! launch: the projections of attention, or of a gated MLP, in generation.
//!
//! A layer's adapters lie in a [`Stack`] of slots. [`Spans`] say which tokens have which slot; they are read on the device,
//! so that a recorded launch serves other tokens and other adapters when it is replayed.
//!
//! The kernel is that of [`mod@super::gemv`] or of [`mod@super::resident`]. As in a training product, `scaling · x Aᵀ` is rounded to the format of x; the
//! rest is summed in f32 and rounded once.

use cubecl::client::Client;
use cubecl::server::Handle;

use super::{Direction, Path, Problem, gemv, path, resident};
use crate::kernels::{DeviceAbsmax, DeviceWeight, check_size};
use crate::{FloatFormat, QuantError};

/// The most tokens of a launch.
pub const TOKENS: usize = gemv::TOKENS;
/// The most weights of a launch.
pub const WEIGHTS: usize = gemv::MATRICES;
/// The most spans of a launch.
pub const SPANS: usize = TOKENS;

/// Adapters of one layer, each in a slot.
#[derive(Debug, Clone, Copy)]
pub struct Stack<'a> {
    /// `[slots, rank, in_features]` in the format of x.
    pub lora_a: &'a Handle,
    /// `[slots, out_features, rank]` in the format of x.
    pub lora_b: &'a Handle,
    /// f32 `[slots]`: the factor of each update.
    pub scalings: &'a Handle,
    /// Ranks of a slot, a multiple of 16. An adapter of less has zeros in the others.
    pub rank: usize,
    /// Slots.
    pub slots: usize,
}

/// Which tokens have which slot.
#[derive(Debug, Clone, Copy)]
pub struct Spans<'a> {
    /// u32: the number of spans, at most [`SPANS`], then of each its first token, the one behind its last, and its slot.
    /// Tokens of no span have no adapter. What lies outside tokens or slots reads memory that is not the caller's.
    pub words: &'a Handle,
}

/// One weight of a launch.
#[derive(Debug, Clone, Copy)]
pub struct JoinedWeight<'a> {
    /// `[out_features, in_features]`, codebook and blocks as those of the others.
    pub weight: &'a DeviceWeight,
    /// Rows of the weight.
    pub out_features: usize,
    /// `[out_features]`, in the format of x.
    pub bias: Option<&'a Handle>,
    /// The layer's adapters.
    pub stack: Option<Stack<'a>>,
    /// `[tokens, out_features]` in the format of the result.
    pub out: &'a Handle,
}

/// A launch.
#[derive(Debug, Clone, Copy)]
pub struct Joined<'a> {
    /// `[tokens, in_features]`, contiguous.
    pub x: &'a Handle,
    /// Rows of x, 1 to [`TOKENS`].
    pub tokens: usize,
    /// Columns of x.
    pub in_features: usize,
    /// Format of x: f16 or bf16.
    pub format: FloatFormat,
    /// Format of the results: `format`, or f32.
    pub out: FloatFormat,
    /// 1 to [`WEIGHTS`].
    pub weights: &'a [JoinedWeight<'a>],
    /// The tokens' adapters; without, no stack is looked at.
    pub spans: Option<Spans<'a>>,
}

impl Joined<'_> {
    /// The product with the first weight.
    pub(super) fn problem(&self) -> Problem {
        let first = self.weights.first();
        Problem {
            tokens: self.tokens,
            out_features: first.map_or(0, |first| first.out_features),
            in_features: self.in_features,
            direction: Direction::Forward,
            rank: 0,
            format: self.format,
            out: self.out,
            blocksize: first.map(|first| first.weight.blocksize),
        }
    }
}

/// Whether a client's device has the kernel for weights of these rows, which are to be of one codebook and blocksize.
pub fn supports(client: &Client, problem: &Problem, out_features: &[usize]) -> bool {
    let Some(device) = cuda_source::device(client) else { return false };
    (1..=WEIGHTS).contains(&out_features.len())
        && out_features.iter().all(|&out_features| gemv::fits(&device, &Problem { out_features, ..*problem }))
}

/// Launches the products on the path that [`super::path`] gives for the first weight, or by [`Path::Gemv`].
///
/// # Errors
/// As [`launch_on`].
pub fn launch(client: &Client, joined: &Joined<'_>) -> Result<(), QuantError> {
    match path(client, &joined.problem()) {
        Some(Path::Resident) if resident::takes(client, joined) => launch_on(client, Path::Resident, joined),
        _ => launch_on(client, Path::Gemv, joined),
    }
}

/// Launches the products on [`Path::Gemv`] or [`Path::Resident`].
///
/// # Errors
/// [`QuantError::BufferSize`] for the buffer that is too small, [`QuantError::Matmul`] for operands that the kernel does
/// not take together. Kernels run asynchronously: a device's own failure shows when a result is read.
pub fn launch_on(client: &Client, path: Path, joined: &Joined<'_>) -> Result<(), QuantError> {
    let Joined { x, tokens, in_features, format, out, weights, spans } = *joined;
    let wrong = |reason: String| Err(QuantError::Matmul(reason));
    let rows: Vec<usize> = weights.iter().map(|each| each.out_features).collect();
    if !supports(client, &joined.problem(), &rows) {
        return wrong(format!("{tokens} tokens by weights of {rows:?} x {in_features} have no joined product here"));
    }
    check_size("x", x, tokens * in_features * format.size())?;
    if let Some(spans) = spans {
        check_size("spans", spans.words, 4)?;
    }
    let kind = |weight: &DeviceWeight| {
        let nested = match &weight.absmax {
            DeviceAbsmax::Plain(_) => None,
            DeviceAbsmax::Nested { blocksize, .. } => Some(*blocksize),
        };
        (weight.quant_type, weight.blocksize, nested)
    };
    for each in weights {
        each.weight.validate()?;
        if kind(each.weight) != kind(weights[0].weight) {
            return wrong("weights of different codebooks or blocks have no joined product".into());
        }
        if each.weight.num_elements != each.out_features * in_features {
            let elements = each.weight.num_elements;
            return wrong(format!(
                "a weight of {elements} elements, which is not {} x {in_features}",
                each.out_features
            ));
        }
        check_size("out", each.out, tokens * each.out_features * out.size())?;
        if let Some(bias) = each.bias {
            check_size("bias", bias, each.out_features * format.size())?;
        }
        if let Some(stack) = each.stack {
            check_stack(&stack, in_features, each.out_features, format)?;
        }
    }
    if let (_, _, Some(nested)) = kind(weights[0].weight)
        && !nested.is_power_of_two()
    {
        return wrong(format!("nested blocksize {nested} is no power of two"));
    }
    match path {
        Path::Gemv => gemv::launch_joined(client, joined),
        Path::Resident if resident::takes(client, joined) => resident::launch_joined(client, joined),
        _ => wrong(format!("{tokens} tokens by weights of {rows:?} x {in_features} are not taken by {path:?}")),
    }
}

fn check_stack(
    stack: &Stack<'_>,
    in_features: usize,
    out_features: usize,
    format: FloatFormat,
) -> Result<(), QuantError> {
    let Stack { lora_a, lora_b, scalings, rank, slots } = *stack;
    if !rank.is_multiple_of(16) || rank == 0 {
        return Err(QuantError::Matmul(format!("a stack of rank {rank}, which is no multiple of 16")));
    }
    check_size("lora_a", lora_a, slots * rank * in_features * format.size())?;
    check_size("lora_b", lora_b, slots * rank * out_features * format.size())?;
    check_size("scalings", scalings, slots * 4)
}
