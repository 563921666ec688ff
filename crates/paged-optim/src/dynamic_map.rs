//! The dynamic 8-bit maps and the nearest entry of them.
//!
//! Dettmers, "8-bit approximations for parallelism in deep learning", arXiv 1511.04561 (dynamic tree data type);
//! bitsandbytes' `create_dynamic_map`. For each exponent e from 0 to 6 a map holds the midpoints of n equal parts of
//! 0.1 to 1, times 10^(e-6), where n is 2^e in the signed map, which has them with both signs, and 2^(e+1) in the
//! unsigned one; then 0 and 1. That is 256 entries each.
//!
//! A value exactly between two entries takes the even code, as in bitsandbytes' search.

use std::sync::LazyLock;

/// A map, ascending, and the thresholds between its entries.
#[derive(Debug)]
pub struct DynamicMap {
    values: [f32; 256],
    /// A value's code is the number of thresholds below it.
    thresholds: [f32; 255],
}

/// The map of moments that have a sign.
pub fn signed() -> &'static DynamicMap {
    static MAP: LazyLock<DynamicMap> = LazyLock::new(|| DynamicMap::new(true));
    &MAP
}

/// The map of moments that have none.
pub fn unsigned() -> &'static DynamicMap {
    static MAP: LazyLock<DynamicMap> = LazyLock::new(|| DynamicMap::new(false));
    &MAP
}

/// The signed map's code of 0.
pub(crate) const SIGNED_ZERO: u8 = 127;

impl DynamicMap {
    fn new(signed: bool) -> Self {
        let mut values = Vec::with_capacity(256);
        for exponent in 0..7 {
            let parts = 1_usize << (exponent + usize::from(!signed));
            // Rounded to f32 where PyTorch's linspace and multiplication round.
            let step = (1.0_f32 - 0.1) / parts as f32;
            let boundary = |i: usize| {
                // linspace works from its nearer end; the product is not rounded (fused).
                if i < parts.div_ceil(2) {
                    (f64::from(0.1_f32) + f64::from(step) * i as f64) as f32
                } else {
                    (1.0 - f64::from(step) * (parts - i) as f64) as f32
                }
            };
            let scale = 10_f64.powi(exponent as i32 - 6) as f32;
            for i in 0..parts {
                let value = scale * ((boundary(i) + boundary(i + 1)) * 0.5);
                values.push(value);
                if signed {
                    values.push(-value);
                }
            }
        }
        values.extend([0.0, 1.0]);
        values.sort_by(f32::total_cmp);
        let values: [f32; 256] = std::array::from_fn(|i| values[i]);
        let thresholds = std::array::from_fn(|i| {
            let midpoint = (values[i] + values[i + 1]) * 0.5;
            // "above" already excludes the tie; "at or above" is "above the next smaller float".
            if i % 2 == 0 { midpoint } else { midpoint.next_down() }
        });
        Self { values, thresholds }
    }

    /// What each code stands for, relative to the block's absmax.
    pub fn values(&self) -> &[f32; 256] {
        &self.values
    }

    pub(crate) fn thresholds(&self) -> &[f32; 255] {
        &self.thresholds
    }

    /// The code of the entry nearest to `x`.
    pub fn nearest(&self, x: f32) -> u8 {
        let mut code = 0_usize;
        // Eight halvings without a branch.
        for step in [128, 64, 32, 16, 8, 4, 2, 1] {
            code += usize::from(x > self.thresholds[code + step - 1]) * step;
        }
        code as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_maps_are_sorted_and_hold_zero_and_one() {
        for map in [signed(), unsigned()] {
            assert!(map.values.windows(2).all(|w| w[0] < w[1]));
            assert_eq!(map.values[255], 1.0);
        }
        assert_eq!(signed().values[usize::from(SIGNED_ZERO)], 0.0);
        assert_eq!(unsigned().values[0], 0.0);
        for i in 0..127 {
            assert_eq!(signed().values[i], -signed().values[254 - i]);
        }
    }

    #[test]
    fn the_nearest_entry_is_the_nearest() {
        for map in [signed(), unsigned()] {
            for i in -1100..=1100 {
                let x = i as f32 / 1000.0;
                let distance = |code: usize| (map.values[code] - x).abs();
                let best = (0..256).map(distance).fold(f32::INFINITY, f32::min);
                let found = distance(usize::from(map.nearest(x)));
                // A midpoint in f32 is off by half an ulp of 1 at most.
                assert!(found - best <= f32::EPSILON, "{x}: {found} against {best}");
            }
            for code in 0..=255_u8 {
                assert_eq!(map.nearest(map.values[usize::from(code)]), code);
            }
        }
    }

    #[test]
    fn ties_take_the_even_code() {
        // 0 and the smallest positive entry: their midpoint is exact.
        let map = unsigned();
        assert_eq!(map.nearest(map.values[1] * 0.5), 0);
        let map = signed();
        assert_eq!(map.nearest(map.values[128] * 0.5), 128);
        assert_eq!(map.nearest(map.values[126] * 0.5), 126);
    }
}
