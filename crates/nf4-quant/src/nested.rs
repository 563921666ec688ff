//! Double quantization: the absmax themselves as 8-bit codes.

use rayon::prelude::*;

use crate::codebook::signed_dynamic_thresholds;
use crate::{QuantError, signed_dynamic_map};

/// Absmax quantized to 8 bits (double quantization, arXiv 2305.14314 section 3).
///
/// Their mean, `offset`, is subtracted; the rest is quantized in blocks with the signed dynamic map:
/// absmax\[i\] = map\[codes\[i\]\] * nested_absmax\[i / blocksize\] + offset.
///
/// At the default sizes this costs 8/64 + 32/(64 * 256) = 0.127 bit per weight instead of 0.5.
#[derive(Debug, Clone, PartialEq)]
pub struct NestedAbsmax {
    /// One code per block of the weight (bitsandbytes' `absmax` tensor).
    pub codes: Vec<u8>,
    /// One per `blocksize` codes (bitsandbytes' `nested_absmax`).
    pub absmax: Vec<f32>,
    /// The mean of the unquantized absmax (bitsandbytes' `nested_offset`).
    pub offset: f32,
    /// Codes per nested block (bitsandbytes' `nested_blocksize`).
    pub blocksize: usize,
}

impl NestedAbsmax {
    /// The nested blocksize that bitsandbytes uses.
    pub const DEFAULT_BLOCKSIZE: usize = 256;

    /// The offset: the mean, summed in f64 and rounded once.
    ///
    /// bitsandbytes sums in f32 on the GPU; the two differ by at most one unit in the last place.
    pub fn mean(absmax: &[f32]) -> f32 {
        let sum: f64 = absmax.iter().map(|a| f64::from(*a)).sum();
        (sum / absmax.len().max(1) as f64) as f32
    }

    /// Quantizes absmax with their own mean as offset and the default nested blocksize.
    pub fn quantize(absmax: &[f32]) -> Self {
        let offset = Self::mean(absmax);
        Self::quantize_blocks(absmax, offset, Self::DEFAULT_BLOCKSIZE)
    }

    /// Quantizes absmax with a given offset.
    ///
    /// # Errors
    ///
    /// [`QuantError::NestedBlocksize`] when `blocksize` is 0.
    pub fn quantize_with(absmax: &[f32], offset: f32, blocksize: usize) -> Result<Self, QuantError> {
        match blocksize {
            0 => Err(QuantError::NestedBlocksize),
            _ => Ok(Self::quantize_blocks(absmax, offset, blocksize)),
        }
    }

    fn quantize_blocks(absmax: &[f32], offset: f32, blocksize: usize) -> Self {
        let mut codes = vec![0; absmax.len()];
        let mut nested = vec![0.0; absmax.len().div_ceil(blocksize)];
        let thresholds = signed_dynamic_thresholds();
        codes
            .par_chunks_mut(blocksize)
            .zip(absmax.par_chunks(blocksize))
            .zip(nested.par_iter_mut())
            .with_min_len(64)
            .for_each(|((codes, block), nested)| {
                let max = block.iter().fold(0.0_f32, |m, a| m.max((a - offset).abs()));
                if max < f32::MIN_POSITIVE {
                    return;
                }
                *nested = max;
                let inverse = 1.0 / max;
                for (code, absmax) in codes.iter_mut().zip(block) {
                    *code = count_below(thresholds, (absmax - offset) * inverse);
                }
            });
        Self { codes, absmax: nested, offset, blocksize }
    }

    /// The absmax that the codes stand for.
    ///
    /// Fields that don't fit each other ([`NestedAbsmax::validate`]) give zeros where statistics are
    /// missing.
    pub fn dequantize(&self) -> Vec<f32> {
        let map = signed_dynamic_map();
        let blocksize = self.blocksize.max(1);
        let mut out = vec![0.0; self.codes.len()];
        out.par_chunks_mut(blocksize)
            .zip(self.codes.par_chunks(blocksize))
            .zip(&self.absmax)
            .with_min_len(64)
            .for_each(|((out, codes), absmax)| {
                for (out, code) in out.iter_mut().zip(codes) {
                    *out = map[usize::from(*code)] * absmax + self.offset;
                }
            });
        out
    }

    /// Checks that there is one nested absmax per nested block.
    ///
    /// # Errors
    ///
    /// [`QuantError::NestedBlocksize`] or [`QuantError::Length`].
    pub fn validate(&self) -> Result<(), QuantError> {
        if self.blocksize == 0 {
            return Err(QuantError::NestedBlocksize);
        }
        let expected = self.codes.len().div_ceil(self.blocksize);
        match self.absmax.len() {
            actual if actual == expected => Ok(()),
            actual => Err(QuantError::Length { name: "nested_absmax", expected, actual }),
        }
    }
}

/// How many of the ascending thresholds lie below `x`: eight halvings without a branch (a product with
/// the comparison, since the compiler makes a branch of a conditional and takes twice the time).
#[inline]
fn count_below(thresholds: &[f32; 255], x: f32) -> u8 {
    let mut count = 0_usize;
    for step in [128, 64, 32, 16, 8, 4, 2, 1] {
        count += usize::from(x > thresholds[count + step - 1]) * step;
    }
    count as u8
}
