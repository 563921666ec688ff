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

/// Absmax that one thread adds up.
const SUMMED: usize = 1 << 14;

/// Whether f64 holds the sum of any of these numbers exactly: all are multiples of one power of two, and their sum has at
/// most 53 bits above it. `false` for numbers that are not finite.
fn sums_are_exact(absmax: &[f32]) -> bool {
    let span = |absmax: &[f32]| {
        absmax.iter().fold((0, u32::MAX, 0), |(largest, smallest, mantissas), a| {
            let bits = a.to_bits() & 0x7fff_ffff;
            let nonzero = if bits == 0 { u32::MAX } else { bits };
            (u32::max(largest, bits), u32::min(smallest, nonzero), mantissas | bits & 0x7f_ffff)
        })
    };
    let join = |a: (u32, u32, u32), b: (u32, u32, u32)| (a.0.max(b.0), a.1.min(b.1), a.2 | b.2);
    let (largest, smallest, mantissas) = absmax.par_chunks(SUMMED).map(span).reduce(|| (0, u32::MAX, 0), join);
    if smallest == u32::MAX {
        return true;
    }
    // The smallest one's exponent, less the bits of a mantissa that are in use: 23 or fewer.
    let unit = (smallest >> 23).max(1) as i32 - 150 + mantissas.trailing_zeros().min(23) as i32;
    f64::from(f32::from_bits(largest)) * absmax.len() as f64 <= 2.0_f64.powi(53 + unit)
}

impl NestedAbsmax {
    /// The nested blocksize that bitsandbytes uses.
    pub const DEFAULT_BLOCKSIZE: usize = 256;

    /// The offset: the mean, summed in f64 in the order of the blocks and rounded once.
    ///
    /// Where f64 holds every sum of these numbers exactly, as it does for nearly every weight in 16 bits, the order is of
    /// no account, and all processor cores add.
    ///
    /// bitsandbytes sums in f32 on the GPU; the two differ by at most one unit in the last place.
    pub fn mean(absmax: &[f32]) -> f32 {
        let add = |absmax: &[f32]| absmax.iter().map(|a| f64::from(*a)).sum::<f64>();
        let sum = match absmax.len() > SUMMED && sums_are_exact(absmax) {
            true => absmax.par_chunks(SUMMED).map(add).sum(),
            false => add(absmax),
        };
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

#[cfg(test)]
mod tests {
    use super::*;

    fn in_order(absmax: &[f32]) -> f32 {
        let sum: f64 = absmax.iter().map(|a| f64::from(*a)).sum();
        (sum / absmax.len() as f64) as f32
    }

    /// Of each kind of number, whether f64 sums them exactly, and the mean in the order of the blocks either way.
    #[test]
    fn all_cores_give_the_mean_that_one_gives() {
        let mut state = 1_u64;
        let mut random = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 24) as f32
        };
        let len = 5 * SUMMED + 77;
        let bf16 = |x: f32| f32::from_bits(x.to_bits() & 0xffff_0000);
        let usual: Vec<f32> = (0..len).map(|i| if i % 50 == 0 { 0.0 } else { bf16(0.01 + 0.05 * random()) }).collect();
        let spread: Vec<f32> = (0..len).map(|i| bf16(random()) * 2.0_f32.powi(i as i32 % 40)).collect();
        let full: Vec<f32> = (0..len).map(|i| (0.5 + random()) * 10.0_f32.powi(i as i32 % 7 - 3)).collect();
        let overflowing = vec![f32::MAX; len];
        let zeros = vec![0.0; len];
        for (absmax, exact) in [(usual, true), (spread, false), (full, false), (overflowing, true), (zeros, true)] {
            assert_eq!(sums_are_exact(&absmax), exact, "{}", absmax[1]);
            assert_eq!(NestedAbsmax::mean(&absmax).to_bits(), in_order(&absmax).to_bits(), "{}", absmax[1]);
        }
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(!sums_are_exact(&[1.0, bad, 2.0]));
            assert!(!NestedAbsmax::mean(&vec![bad; len]).is_finite());
        }
        // Multiples of 2^-149, and sums of them that take 53 bits and 54.
        let least = f32::from_bits(1);
        assert!(sums_are_exact(&[least, 2.0_f32.powi(-98)]));
        assert!(!sums_are_exact(&[least, 2.0_f32.powi(-96)]));
    }
}
