//! The scalar oracle: one element at a time, written to be checked by reading.
//!
//! The host codec and the kernels must give the same bits; their tests compare them with this file,
//! and this file with bitsandbytes' outputs.

use crate::codebook::{FP4_ORDER, FP4_THRESHOLDS};
use crate::reciprocal::reciprocal;
use crate::{QuantType, signed_dynamic_map};

/// The largest magnitude of a block; a subnormal one counts as zero, as on GPUs that flush them.
pub fn absmax(block: &[f32]) -> f32 {
    let absmax = block.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    if absmax < f32::MIN_POSITIVE { 0.0 } else { absmax }
}

/// The 4-bit code of one element of a block with the given absmax.
///
/// A block of zeros has code 0 everywhere, which is bitsandbytes' answer on blocks of 64: NF4 decodes
/// it to -0, or to minus what double quantization makes of an absmax of 0.
pub fn encode(value: f32, absmax: f32, quant_type: QuantType) -> u8 {
    if absmax == 0.0 {
        return 0;
    }
    let scaled = value * reciprocal(absmax);
    match quant_type {
        QuantType::Nf4 => {
            let gaps = quant_type.codebook().windows(2);
            gaps.filter(|w| scaled > (w[0] + w[1]) * 0.5).count() as u8
        }
        QuantType::Fp4 => {
            let above = FP4_THRESHOLDS.iter().filter(|t| scaled.abs() > **t).count();
            FP4_ORDER[above] | if value < 0.0 { 8 } else { 0 }
        }
    }
}

/// The value of a 4-bit code, in f32; the caller rounds it once to the weight's own dtype.
pub fn decode(code: u8, absmax: f32, quant_type: QuantType) -> f32 {
    quant_type.codebook()[usize::from(code & 15)] * absmax
}

/// Packed codes and absmax of a flattened weight.
pub fn quantize(weight: &[f32], quant_type: QuantType, blocksize: usize) -> (Vec<u8>, Vec<f32>) {
    let mut codes = vec![0; weight.len().div_ceil(2)];
    let mut statistics = Vec::new();
    for (b, block) in weight.chunks(blocksize).enumerate() {
        let absmax = absmax(block);
        statistics.push(absmax);
        for (i, value) in block.iter().enumerate() {
            let element = b * blocksize + i;
            let shift = if element.is_multiple_of(2) { 4 } else { 0 };
            codes[element / 2] |= encode(*value, absmax, quant_type) << shift;
        }
    }
    // The unused half of an odd tensor's last byte is the code of a zero element.
    if let (1, Some(last), Some(absmax)) = (weight.len() % 2, codes.last_mut(), statistics.last()) {
        *last |= encode(0.0, *absmax, quant_type);
    }
    (codes, statistics)
}

/// The inverse of [`quantize`], in f32.
pub fn dequantize(
    codes: &[u8],
    absmax: &[f32],
    quant_type: QuantType,
    blocksize: usize,
    num_elements: usize,
) -> Vec<f32> {
    let code = |i: usize| {
        if i.is_multiple_of(2) { codes[i / 2] >> 4 } else { codes[i / 2] & 15 }
    };
    (0..num_elements).map(|i| decode(code(i), absmax[i / blocksize], quant_type)).collect()
}

/// The 8-bit code of one absmax, less the offset, in a nested block with the given nested absmax.
pub fn encode_nested(value: f32, nested_absmax: f32) -> u8 {
    if nested_absmax == 0.0 {
        return 0;
    }
    let scaled = value * (1.0 / nested_absmax);
    let above = |(low, gap): (usize, &[f32])| {
        let midpoint = (gap[0] + gap[1]) * 0.5;
        // Ties take the even code: the lower neighbour's when that is even.
        scaled > midpoint || (scaled == midpoint && low % 2 == 1)
    };
    signed_dynamic_map().windows(2).enumerate().filter(|gap| above(*gap)).count() as u8
}

/// 8-bit codes and nested absmax of the absmax, given the offset.
pub fn quantize_nested(absmax: &[f32], offset: f32, blocksize: usize) -> (Vec<u8>, Vec<f32>) {
    let (mut codes, mut statistics) = (Vec::new(), Vec::new());
    for block in absmax.chunks(blocksize) {
        let centred: Vec<f32> = block.iter().map(|a| a - offset).collect();
        let nested_absmax = self::absmax(&centred);
        statistics.push(nested_absmax);
        codes.extend(centred.iter().map(|v| encode_nested(*v, nested_absmax)));
    }
    (codes, statistics)
}

/// The absmax that an 8-bit code stands for: the product and the sum are rounded one after the other.
pub fn decode_nested(code: u8, nested_absmax: f32, offset: f32) -> f32 {
    signed_dynamic_map()[usize::from(code)] * nested_absmax + offset
}
