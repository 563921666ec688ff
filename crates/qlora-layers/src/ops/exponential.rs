//! An exponential that the compiler turns into vector code; the standard library's is a call for each element.

/// `1.5 * 2^23`: added to a small number, it leaves the nearest integer in the last bits.
const ROUNDER: f32 = 12_582_912.0;
/// ln 2 in two parts, the first short enough that its products with exponents are exact.
const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
/// Below it, the result is less than the smallest normal number, and taken as 0.
const LOWEST: f32 = -87.0;

/// `exp(x)` for `x` up to 88, within 2 units in the last place, exactly 1 for 0, and no number for none.
///
/// Cephes' polynomial (Moshier, 1992) on the remainder of a multiple of ln 2. Multiplies and adds are not fused, so that
/// every processor gives the same bits.
#[inline(always)]
#[allow(clippy::excessive_precision)]
pub(super) fn exponential(x: f32) -> f32 {
    // No `max`, which makes a number of none.
    let bounded = if x < LOWEST { LOWEST } else { x };
    let shifted = bounded * std::f32::consts::LOG2_E + ROUNDER;
    let power = shifted - ROUNDER;
    let r = bounded - power * LN_2[0] - power * LN_2[1];
    let mut y = 1.987_569_15e-4;
    for coefficient in [1.398_199_95e-3, 8.333_451_9e-3, 4.166_579_6e-2, 1.666_666_55e-1, 5.000_000_1e-1] {
        y = y * r + coefficient;
    }
    let y = y * (r * r) + r + 1.0;
    let exponent = shifted.to_bits().wrapping_sub(ROUNDER.to_bits()).wrapping_add(127) << 23;
    if x < LOWEST { 0.0 } else { y * f32::from_bits(exponent) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_exponential() {
        assert_eq!(exponential(0.0), 1.0);
        assert_eq!(exponential(f32::NEG_INFINITY), 0.0);
        assert_eq!(exponential(-1e30), 0.0);
        assert!(exponential(f32::NAN).is_nan());
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let (found, expected) = (f64::from(exponential(x)), f64::from(x).exp());
            // Two units in the last place.
            assert!((found - expected).abs() <= 2.4e-7 * expected, "exp({x}) is {found}, should be {expected}");
        }
    }
}
