//! `y = x Wᵀ` on the host for few tokens, straight from the 4-bit codes, or of a dense `W`.
//!
//! One token's product reads every weight once: memory is the bound of a dense one, and codes are an eighth of f32. The
//! sixteen values of a block, codebook times absmax, fit one AVX-512 register or two of AVX2, and a permutation looks up
//! as many weights as a register holds; nothing dequantized is written to memory. For more than four tokens (two without
//! AVX-512), some rows are dequantized into the second-level cache, and multiplied by that many tokens at a time.
//!
//! # How
//!
//! Weights are taken in groups of 32, 16 bytes of codes. A byte's high nibble is an even element, its low one the odd
//! one after it, so a group's even elements come first and its odd ones after them; `x` is put into that order once.
//! The values of a block are scaled once for each two of its groups, where rows are of an even number of them. Dense
//! weights in bf16 are widened in registers for few tokens, and a panel at a time for more. Rows are divided among all threads. Rows whose length is no multiple of 32 are dequantized element by element, since
//! their groups would cross blocks.
//!
//! # Numerics
//!
//! As [`dequantize_blocks`](crate::dequantize_blocks) to the type of `x`, followed by a product: weights are rounded once,
//! to that type; products and sums are f32. The sum of an output is taken in an order that depends on the row's length and
//! the processor alone: the same token gives the same bits, whatever other tokens are in `x`.
//!
//! # Measured
//!
//! One core of an AMD EPYC with AVX-512, one token, weights in turns so that they come from memory, in µs: 45 for
//! 576 x 1536 in NF4, 91 in bf16 and 204 in f32. `docs/src/kernels/host-products.md` has more.
//!
//! # Not done
//!
//! NEON and SVE: aarch64 takes the portable path, whose table look-ups the compiler leaves scalar. Products in bf16 or of
//! quantized `x`, which some processors have instructions for, would round `x`.

mod lanes;
mod nested;
mod rows;
#[cfg(target_arch = "x86_64")]
mod x86;

use rayon::prelude::*;

use crate::blocks::check_blocksize;
use crate::{Absmax, Element, QuantError, QuantType, Quantized4bit};
use lanes::{GROUP, Group};
use rows::{Columns, Source, Task};

/// Weights per parallel task, at least: some microseconds of work.
const TASK: usize = 1 << 16;
/// Rows that are dequantized together.
const PANEL: usize = 16;

/// Statistics of blocks, borrowed.
#[derive(Debug, Clone, Copy)]
pub enum AbsmaxView<'a> {
    /// One f32 per block.
    Plain(&'a [f32]),
    /// Double quantization, as in [`NestedAbsmax`](crate::NestedAbsmax).
    Nested {
        /// One per block.
        codes: &'a [u8],
        /// One per `blocksize` codes.
        absmax: &'a [f32],
        /// What is added to all.
        offset: f32,
        /// Codes per nested block.
        blocksize: usize,
    },
}

impl AbsmaxView<'_> {
    /// Of the blocks from `first` on, one for each element of `out`.
    fn read(self, first: usize, out: &mut [f32]) {
        match self {
            Self::Plain(absmax) => out.copy_from_slice(&absmax[first..first + out.len()]),
            Self::Nested { codes, absmax, offset, blocksize } => {
                let (mut first, mut out) = (first, out);
                while !out.is_empty() {
                    let (block, of_block) = (first / blocksize, out.len().min(blocksize - first % blocksize));
                    let (now, later) = out.split_at_mut(of_block);
                    nested::look_up(&codes[first..first + of_block], absmax[block], offset, now);
                    (first, out) = (first + of_block, later);
                }
            }
        }
    }

    fn check(self, blocks: usize) -> Result<(), QuantError> {
        let length = |name, expected, actual| match expected == actual {
            true => Ok(()),
            false => Err(QuantError::Length { name, expected, actual }),
        };
        match self {
            Self::Plain(absmax) => length("absmax", blocks, absmax.len()),
            Self::Nested { blocksize: 0, .. } => Err(QuantError::NestedBlocksize),
            Self::Nested { codes, absmax, blocksize, .. } => {
                length("absmax", blocks, codes.len())?;
                length("nested_absmax", blocks.div_ceil(blocksize), absmax.len())
            }
        }
    }
}

/// A 4-bit weight `[out_features, in_features]`, borrowed.
#[derive(Debug, Clone, Copy)]
pub struct WeightView<'a> {
    /// Two codes per byte, the first (even) element in the high nibble: ceil(elements / 2) bytes.
    pub codes: &'a [u8],
    /// Statistics of the blocks.
    pub absmax: AbsmaxView<'a>,
    /// Codebook.
    pub quant_type: QuantType,
    /// Elements per block; blocks run over the row-major weight and may cross rows.
    pub blocksize: usize,
    /// Rows.
    pub out_features: usize,
    /// Columns.
    pub in_features: usize,
}

impl<'a> WeightView<'a> {
    /// A quantized weight of two dimensions.
    ///
    /// # Errors
    ///
    /// [`QuantError::Matmul`] when it has another number of dimensions.
    pub fn new(weight: &'a Quantized4bit) -> Result<Self, QuantError> {
        let state = &weight.state;
        let [out_features, in_features] = state.shape[..] else {
            return Err(QuantError::Matmul(format!("a weight has two dimensions, this one's are {:?}", state.shape)));
        };
        let absmax = match &state.absmax {
            Absmax::Plain(absmax) => AbsmaxView::Plain(absmax),
            Absmax::Nested(nested) => AbsmaxView::Nested {
                codes: &nested.codes,
                absmax: &nested.absmax,
                offset: nested.offset,
                blocksize: nested.blocksize,
            },
        };
        let (quant_type, blocksize) = (state.quant_type, state.blocksize);
        Ok(Self { codes: &weight.codes, absmax, quant_type, blocksize, out_features, in_features })
    }

    fn check(&self) -> Result<(), QuantError> {
        check_blocksize(self.blocksize)?;
        let elements = self.out_features.saturating_mul(self.in_features);
        let (expected, actual) = (elements.div_ceil(2), self.codes.len());
        if expected != actual {
            return Err(QuantError::Length { name: "codes", expected, actual });
        }
        self.absmax.check(elements.div_ceil(self.blocksize))
    }
}

/// The instructions that a product uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Processor {
    /// AVX-512.
    Avx512,
    /// AVX2 with fused multiply-adds.
    Avx2,
    /// What the program is compiled for.
    Portable,
}

impl Processor {
    /// What this machine has, the fastest first.
    pub fn available() -> Vec<Self> {
        let mut all = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
            all.insert(0, Self::Avx2);
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                all.insert(0, Self::Avx512);
            }
        }
        all
    }

    /// The fastest that this machine has.
    pub fn best() -> Self {
        static BEST: std::sync::OnceLock<Processor> = std::sync::OnceLock::new();
        *BEST.get_or_init(|| Self::available()[0])
    }
}

/// `y = x Wᵀ` with a 4-bit `W`, in parallel.
///
/// # Shapes
///
/// `x`: `[tokens, in_features]`; `y`: `[tokens, out_features]`.
///
/// # Errors
///
/// [`QuantError::Blocksize`]; [`QuantError::NestedBlocksize`]; [`QuantError::Length`] naming the buffer.
pub fn product<E: Element>(x: &[E], weight: &WeightView<'_>, y: &mut [f32]) -> Result<(), QuantError> {
    product_on(Processor::best(), x, weight, y)
}

/// As [`product`], with the instructions of the caller's choice.
///
/// # Errors
///
/// As [`product`]; [`QuantError::Matmul`] where this machine does not have them.
pub fn product_on<E: Element>(
    processor: Processor,
    x: &[E],
    weight: &WeightView<'_>,
    y: &mut [f32],
) -> Result<(), QuantError> {
    weight.check()?;
    let shape = [weight.out_features, weight.in_features];
    run(processor, x, Source::<E>::Codes(weight), shape, y)
}

/// `y = x Wᵀ` with a dense `W`, in parallel. Weights of another type than `x` are widened on the way, exactly: bf16 ones give
/// the bits of the same values in f32.
///
/// # Shapes
///
/// `x`: `[tokens, in_features]`; `weight`: `shape` = `[out_features, in_features]`; `y`: `[tokens, out_features]`.
///
/// # Errors
///
/// [`QuantError::Length`] naming the buffer.
pub fn dense_product<X: Element, W: Element>(
    x: &[X],
    weight: &[W],
    shape: [usize; 2],
    y: &mut [f32],
) -> Result<(), QuantError> {
    dense_product_on(Processor::best(), x, weight, shape, y)
}

/// As [`dense_product`], with the instructions of the caller's choice.
///
/// # Errors
///
/// As [`dense_product`]; [`QuantError::Matmul`] where this machine does not have them.
pub fn dense_product_on<X: Element, W: Element>(
    processor: Processor,
    x: &[X],
    weight: &[W],
    shape: [usize; 2],
    y: &mut [f32],
) -> Result<(), QuantError> {
    match shape[0].saturating_mul(shape[1]) {
        expected if expected != weight.len() => {
            Err(QuantError::Length { name: "weight", expected, actual: weight.len() })
        }
        _ => run(processor, x, Source::Dense(weight), shape, y),
    }
}

/// `W` is what weights are rounded to, or held in.
fn run<X: Element, W: Element>(
    processor: Processor,
    x: &[X],
    source: Source<'_, W>,
    [rows, columns]: [usize; 2],
    y: &mut [f32],
) -> Result<(), QuantError> {
    if processor != Processor::best() && !Processor::available().contains(&processor) {
        return Err(QuantError::Matmul(format!("this machine has no {processor:?}")));
    }
    if rows == 0 || columns == 0 {
        y.fill(0.0);
        return Ok(());
    }
    let tokens = x.len() / columns;
    for (name, expected, actual) in [("x", tokens * columns, x.len()), ("y", tokens * rows, y.len())] {
        if expected != actual {
            return Err(QuantError::Length { name, expected, actual });
        }
    }
    let groups = columns.div_ceil(GROUP);
    let x = match source {
        Source::Codes(_) => grouped(x, columns, groups, |x, out| {
            for (i, pair) in x.chunks(2).enumerate() {
                pair.iter().enumerate().for_each(|(odd, x)| out[i + odd * GROUP / 2] = x.to_f32());
            }
        }),
        Source::Dense(_) => grouped(x, columns, groups, |x, out| X::widen(x, &mut out[..x.len()])),
    };
    let y = Columns::new(y, rows);
    let step = (TASK / columns).max(1).next_multiple_of(PANEL);
    (0..rows.div_ceil(step)).into_par_iter().for_each(|task| {
        let rows = task * step..rows.min((task + 1) * step);
        let task = Task { source, x: &x, groups, columns, tokens, rows };
        // SAFETY: this machine has the instructions, and tasks have different rows, which are columns of `y`.
        rows::SCRATCH.with_borrow_mut(|scratch| unsafe { rows::run(processor, &task, scratch, y) });
    });
    Ok(())
}

/// Where an element of a group of 32 stands: even ones first.
#[inline(always)]
fn place(element: usize) -> usize {
    element / 2 + element % 2 * (GROUP / 2)
}

/// Each token's elements in groups, the last one filled up with zeros; `arrange` puts elements into their group.
fn grouped<E: Element>(
    x: &[E],
    columns: usize,
    groups: usize,
    arrange: impl Fn(&[E], &mut Group) + Sync,
) -> Vec<Group> {
    let mut out = vec![[0.0; GROUP]; x.len() / columns * groups];
    let one = |(out, x): (&mut [Group], &[E])| out.iter_mut().zip(x.chunks(GROUP)).for_each(|(out, x)| arrange(x, out));
    match x.len() > TASK {
        true => out.par_chunks_mut(groups).zip(x.par_chunks(columns)).for_each(one),
        false => out.chunks_mut(groups).zip(x.chunks(columns)).for_each(one),
    }
    out
}
