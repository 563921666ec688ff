//! Looking up 4-bit codes in a table of their 16 values.
//!
//! Values of 16 bits are two tables of bytes, which is what x86's byte shuffle looks up for 16 codes at a time
//! (SSSE3): a weight then takes less than a cycle, and storing it is what takes the time. Elsewhere, and for f32, it is
//! a load and a store for each.

use bytemuck::Pod;
use nf4_quant::Element;

/// The values (code - zero) * scale of all codes.
pub(super) fn table<E: Element + Pod>(values: &[f32; 16], zero: f32, scale: f32) -> [E; 16] {
    let values: [f32; 16] = std::array::from_fn(|code| (values[code] - zero) * scale);
    let mut table = [E::zeroed(); 16];
    E::narrow(&values, &mut table);
    table
}

/// Looks up two codes of each byte, the one in the low bits first. `to` has two elements for each byte.
pub(super) fn pairs<E: Element + Pod>(codes: &[u8], table: &[E; 16], to: &mut [E]) {
    #[cfg(target_arch = "x86_64")]
    if let Some(wide) = x86::Table::of(table) {
        // SAFETY: a table is made where the processor has SSSE3 only.
        let done = unsafe { wide.pairs(codes, bytemuck::cast_slice_mut(to)) };
        return scalar_pairs(&codes[done..], table, &mut to[2 * done..]);
    }
    scalar_pairs(codes, table, to);
}

/// Looks up the code in the low bits of each byte.
pub(super) fn singles<E: Element + Pod>(codes: &[u8], table: &[E; 16], to: &mut [E]) {
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if let Some(wide) = x86::Table::of(table) {
        // SAFETY: a table is made where the processor has SSSE3 only.
        done = unsafe { wide.singles(codes, bytemuck::cast_slice_mut(to)) };
    }
    for (to, code) in to[done..].iter_mut().zip(&codes[done..]) {
        *to = table[usize::from(code & 15)];
    }
}

fn scalar_pairs<E: Element>(codes: &[u8], table: &[E; 16], to: &mut [E]) {
    for ([low, high], code) in to.as_chunks_mut::<2>().0.iter_mut().zip(codes) {
        *low = table[usize::from(code & 15)];
        *high = table[usize::from(code >> 4)];
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! By SSSE3's byte shuffle.

    use std::arch::x86_64::{
        __m128i, _mm_and_si128, _mm_loadu_si128, _mm_set1_epi8, _mm_shuffle_epi8, _mm_srli_epi16, _mm_storeu_si128,
        _mm_unpackhi_epi8, _mm_unpackhi_epi16, _mm_unpacklo_epi8, _mm_unpacklo_epi16,
    };

    use bytemuck::Pod;

    /// The low and the high bytes of 16 values.
    #[derive(Clone, Copy)]
    pub(super) struct Table {
        low: [u8; 16],
        high: [u8; 16],
    }

    impl Table {
        /// `None` where values have another size or the processor has no shuffle.
        #[inline]
        pub(super) fn of<E: Pod>(table: &[E; 16]) -> Option<Self> {
            if size_of::<E>() != 2 || !is_x86_feature_detected!("ssse3") {
                return None;
            }
            let bytes: &[u8] = bytemuck::cast_slice(table);
            Some(Self { low: std::array::from_fn(|i| bytes[2 * i]), high: std::array::from_fn(|i| bytes[2 * i + 1]) })
        }

        /// The bytes that were looked up, a multiple of 16.
        ///
        /// # Safety
        /// The processor has SSSE3.
        #[target_feature(enable = "ssse3")]
        pub(super) unsafe fn pairs(&self, codes: &[u8], to: &mut [u16]) -> usize {
            let (codes, to) = (codes.as_chunks::<16>().0, to.as_chunks_mut::<32>().0);
            // SAFETY: loads and stores are of whole arrays, and may be unaligned.
            unsafe {
                let (low, high) = (load(&self.low), load(&self.high));
                let mask = _mm_set1_epi8(15);
                for (codes, to) in codes.iter().zip(to.iter_mut()) {
                    let codes = load(codes);
                    let (even, odd) = (_mm_and_si128(codes, mask), _mm_and_si128(_mm_srli_epi16::<4>(codes), mask));
                    let [e0, e1] = values(low, high, even);
                    let [o0, o1] = values(low, high, odd);
                    let to = to.as_mut_ptr().cast::<__m128i>();
                    _mm_storeu_si128(to, _mm_unpacklo_epi16(e0, o0));
                    _mm_storeu_si128(to.add(1), _mm_unpackhi_epi16(e0, o0));
                    _mm_storeu_si128(to.add(2), _mm_unpacklo_epi16(e1, o1));
                    _mm_storeu_si128(to.add(3), _mm_unpackhi_epi16(e1, o1));
                }
            }
            16 * codes.len().min(to.len())
        }

        /// As [`Self::pairs`], with a code in each byte.
        ///
        /// # Safety
        /// The processor has SSSE3.
        #[target_feature(enable = "ssse3")]
        pub(super) unsafe fn singles(&self, codes: &[u8], to: &mut [u16]) -> usize {
            let (codes, to) = (codes.as_chunks::<16>().0, to.as_chunks_mut::<16>().0);
            // SAFETY: loads and stores are of whole arrays, and may be unaligned.
            unsafe {
                let (low, high) = (load(&self.low), load(&self.high));
                let mask = _mm_set1_epi8(15);
                for (codes, to) in codes.iter().zip(to.iter_mut()) {
                    let [first, second] = values(low, high, _mm_and_si128(load(codes), mask));
                    let to = to.as_mut_ptr().cast::<__m128i>();
                    _mm_storeu_si128(to, first);
                    _mm_storeu_si128(to.add(1), second);
                }
            }
            16 * codes.len().min(to.len())
        }
    }

    #[target_feature(enable = "ssse3")]
    unsafe fn load(bytes: &[u8; 16]) -> __m128i {
        // SAFETY: 16 bytes are there.
        unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
    }

    /// The values of 16 codes.
    #[target_feature(enable = "ssse3")]
    unsafe fn values(low: __m128i, high: __m128i, codes: __m128i) -> [__m128i; 2] {
        let (low, high) = (_mm_shuffle_epi8(low, codes), _mm_shuffle_epi8(high, codes));
        [_mm_unpacklo_epi8(low, high), _mm_unpackhi_epi8(low, high)]
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    #[test]
    fn every_way_looks_up_the_same() {
        let table: [f16; 16] = std::array::from_fn(|code| f16::from_bits(0x1234_u16.wrapping_mul(code as u16 + 1)));
        let wide = table.map(|value| value.to_bits() as f32);
        let codes: Vec<u8> = (0..=255).cycle().take(1000).map(|i: u8| i.wrapping_mul(37)).collect();
        for len in [0, 1, 15, 16, 17, 33, 1000] {
            let codes = &codes[..len];
            let (mut by_bytes, mut by_floats) = (vec![f16::ZERO; 2 * len], vec![0.0_f32; 2 * len]);
            pairs(codes, &table, &mut by_bytes);
            pairs(codes, &wide, &mut by_floats);
            let expected =
                codes.iter().flat_map(|code| [code & 15, code >> 4]).map(|code| table[usize::from(code)].to_bits());
            let expected: Vec<u16> = expected.collect();
            assert!(by_bytes.iter().map(|x| x.to_bits()).eq(expected.iter().copied()), "{len}");
            assert!(by_floats.iter().map(|x| *x as u16).eq(expected), "{len}");
            let mut one = vec![f16::ZERO; len];
            singles(codes, &table, &mut one);
            assert!(one.iter().zip(codes).all(|(x, code)| x.to_bits() == table[usize::from(code & 15)].to_bits()));
        }
    }
}
