//! The reciprocal of absmax that scales a block, as bitsandbytes computes it on CUDA.
//!
//! bitsandbytes multiplies by CUDA's approximate reciprocal (PTX `rcp.approx.ftz.f32`) where this crate
//! would divide. The two differ by at most one unit in the last place, enough to move an element that
//! lies on a threshold by one code: 1 to 3 elements of a bf16 tensor with FP4. The difference depends on
//! the mantissa alone, and an absmax that is a bf16 value (that of every bf16 weight) has one of 128
//! mantissas, so a table of 20 exceptions gives bitsandbytes' codes without its hardware.
//!
//! Source: measured on an NVIDIA H200 (compute capability 9.0), the approximate against the correctly
//! rounded reciprocal. For other absmax this crate rounds correctly, while CUDA's may be one unit off:
//! for 1,108,522 of the 8,388,608 mantissas of f32 (13 %) and 130 of the 1024 of f16.
//!
//! The table holds for quantizing weights. Double quantization scales by the reciprocal of a difference,
//! which is hardly ever a bf16 value, and rounds correctly.

/// bf16 mantissas (its low seven bits) whose approximate reciprocal is not the correctly rounded one,
/// and the difference in units in the last place of the f32 result.
const MEASURED: [(usize, i8); 20] = [
    (4, -1),
    (6, 1),
    (11, -1),
    (13, 1),
    (20, -1),
    (22, -1),
    (37, 1),
    (38, 1),
    (51, 1),
    (61, 1),
    (65, 1),
    (66, 1),
    (81, 1),
    (91, 1),
    (109, 1),
    (115, 1),
    (116, 1),
    (118, 1),
    (121, 1),
    (127, -1),
];

/// The reciprocals of the 128 bf16 values from 1 to 2. Those of all others are these times a power of
/// two, so that neither host nor kernels divide.
pub(crate) const RECIPROCALS: [f32; 128] = {
    let mut reciprocals = [0.0; 128];
    let mut i = 0;
    while i < reciprocals.len() {
        reciprocals[i] = 1.0 / (1.0 + i as f32 / 128.0);
        i += 1;
    }
    let mut i = 0;
    while i < MEASURED.len() {
        let (mantissa, difference) = MEASURED[i];
        let bits = reciprocals[mantissa].to_bits();
        reciprocals[mantissa] = f32::from_bits(bits.wrapping_add_signed(difference as i32));
        i += 1;
    }
    reciprocals
};

/// The bits of 1: the exponent's bias, in place.
pub(crate) const ONE: u32 = 0x3f80_0000;
/// Biased exponents up to this one have a normal reciprocal, whatever the mantissa.
pub(crate) const MAX_EXPONENT: u32 = 252;

/// 1 / absmax: CUDA's approximate reciprocal for bf16 values, correctly rounded for others.
///
/// From 2^126 on, where results are subnormal, it is the correctly rounded one (CUDA's is 0).
#[inline(always)]
pub(crate) fn reciprocal(absmax: f32) -> f32 {
    let bits = absmax.to_bits();
    let exponent = bits >> 23;
    if bits & 0xffff == 0 && exponent <= MAX_EXPONENT {
        // 1 / (m * 2^e) = (1 / m) * 2^-e: e leaves the exponent of the mantissa's reciprocal.
        let mantissa = RECIPROCALS[(bits >> 16 & 127) as usize];
        f32::from_bits(mantissa.to_bits() + ONE - (exponent << 23))
    } else {
        1.0 / absmax
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_values_differ_by_the_table_at_every_exponent() {
        for high in 0x0080..0x7f80_u32 {
            let absmax = f32::from_bits(high << 16);
            let (exact, ours) = (1.0 / absmax, reciprocal(absmax));
            let listed = MEASURED.iter().find(|(mantissa, _)| *mantissa as u32 == high & 127);
            // Subnormal results have another unit in the last place, and stay as they are.
            let expected = if absmax > 2_f32.powi(126) { 0 } else { listed.map_or(0, |(_, ulp)| i64::from(*ulp)) };
            assert_eq!(i64::from(ours.to_bits()) - i64::from(exact.to_bits()), expected, "{absmax:e}");
        }
    }

    #[test]
    fn other_values_are_correctly_rounded() {
        for mantissa in (0x1_0001..0x80_0000_u32).step_by(0x1_0001).filter(|m| m & 0xffff != 0) {
            for exponent in [1, 100, 127, 200, 254] {
                let absmax = f32::from_bits(exponent << 23 | mantissa);
                assert_eq!(reciprocal(absmax).to_bits(), (1.0 / absmax).to_bits(), "{absmax:e}");
            }
        }
    }
}
