//! Absmax of double-quantized blocks: the dynamic map's value of each code, times a scale, plus an offset.
//!
//! The map's 256 values do not fit the permutations of AVX-512F. Those of AVX-512VBMI look up bytes in 128 of them: the map
//! is held as four planes of a byte each, and 64 codes take two look-ups in every plane.

use crate::signed_dynamic_map;

/// `map[code] * absmax + offset` for each code: a product and a sum, rounded apart.
pub(super) fn look_up(codes: &[u8], absmax: f32, offset: f32, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if x86::is_here() {
        // SAFETY: the processor has what the function is compiled for.
        return unsafe { x86::look_up(codes, absmax, offset, out) };
    }
    portable(codes, absmax, offset, out);
}

fn portable(codes: &[u8], absmax: f32, offset: f32, out: &mut [f32]) {
    let map = signed_dynamic_map();
    for (out, code) in out.iter_mut().zip(codes) {
        *out = map[usize::from(*code)] * absmax + offset;
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::sync::LazyLock;

    use crate::signed_dynamic_map;

    /// Codes at a time.
    const CODES: usize = 64;

    /// Byte `i` of each of the map's values, lowest first.
    static PLANES: LazyLock<[[u8; 256]; 4]> = LazyLock::new(|| {
        let map = signed_dynamic_map();
        std::array::from_fn(|byte| std::array::from_fn(|code| map[code].to_le_bytes()[byte]))
    });

    /// Where each code is taken from, so that values come in order: bytes are put together within 128 bits, four values
    /// of each of the four sixteens of codes at once.
    static ORDER: [u8; CODES] = {
        let (mut order, mut i) = ([0; CODES], 0);
        while i < CODES {
            let (sixteen, four, value) = (i / 16, i / 4 % 4, i % 4);
            order[i] = (16 * four + 4 * sixteen + value) as u8;
            i += 1;
        }
        order
    };

    pub(super) fn is_here() -> bool {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vbmi")
    }

    /// As [`super::look_up`].
    ///
    /// # Safety
    ///
    /// [`is_here`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    pub(super) unsafe fn look_up(codes: &[u8], absmax: f32, offset: f32, out: &mut [f32]) {
        let planes = &*PLANES;
        // SAFETY: a plane has four times 64 bytes.
        let quarter =
            |plane: usize, i: usize| unsafe { _mm512_loadu_si512(planes[plane][CODES * i..].as_ptr().cast()) };
        let tables: [[__m512i; 4]; 4] = std::array::from_fn(|plane| std::array::from_fn(|i| quarter(plane, i)));
        // SAFETY: the array has 64 bytes.
        let order = unsafe { _mm512_loadu_si512(ORDER.as_ptr().cast()) };
        let (absmax, offset) = (_mm512_set1_ps(absmax), _mm512_set1_ps(offset));
        for (codes, out) in codes.chunks(CODES).zip(out.chunks_mut(CODES)) {
            let count = codes.len().min(out.len());
            let mask = u64::MAX >> (CODES - count);
            // SAFETY: the mask has a bit for each code that is there.
            let codes = unsafe { _mm512_maskz_loadu_epi8(mask, codes.as_ptr().cast()) };
            let codes = _mm512_permutexvar_epi8(order, codes);
            // A look-up takes seven bits; the eighth chooses between two.
            let upper = _mm512_movepi8_mask(codes);
            let bytes: [__m512i; 4] = std::array::from_fn(|plane| {
                let [a, b, c, d] = tables[plane];
                let (low, high) = (_mm512_permutex2var_epi8(a, codes, b), _mm512_permutex2var_epi8(c, codes, d));
                _mm512_mask_blend_epi8(upper, low, high)
            });
            let low = (_mm512_unpacklo_epi8(bytes[0], bytes[1]), _mm512_unpackhi_epi8(bytes[0], bytes[1]));
            let high = (_mm512_unpacklo_epi8(bytes[2], bytes[3]), _mm512_unpackhi_epi8(bytes[2], bytes[3]));
            let values = [
                _mm512_unpacklo_epi16(low.0, high.0),
                _mm512_unpackhi_epi16(low.0, high.0),
                _mm512_unpacklo_epi16(low.1, high.1),
                _mm512_unpackhi_epi16(low.1, high.1),
            ];
            for (i, values) in values.into_iter().enumerate() {
                let values = _mm512_add_ps(_mm512_mul_ps(_mm512_castsi512_ps(values), absmax), offset);
                let mask = (mask >> (16 * i)) as __mmask16;
                // SAFETY: the mask has a bit for each value that there is room for; none is written behind the end.
                unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr().wrapping_add(16 * i), mask, values) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_and_every_length_has_the_bits_of_one_by_one() {
        let all: Vec<u8> = (0..=255).chain((0..=255).map(|i: u8| i.wrapping_mul(37))).collect();
        for start in [0, 1, 63, 100] {
            for count in (0..=70).chain([127, 128, 129, 256, 300]) {
                let codes = &all[start..start + count];
                let [mut ours, mut one_by_one] = [vec![7.0; count + 1], vec![7.0; count + 1]];
                look_up(codes, 0.3171, 1.7e-2, &mut ours[..count]);
                portable(codes, 0.3171, 1.7e-2, &mut one_by_one[..count]);
                assert_eq!(ours, one_by_one, "{count} codes from {start} on");
            }
        }
    }
}
