//! The codebooks and the thresholds between their entries.
//!
//! NF4 and its values: Dettmers et al., "QLoRA", arXiv 2305.14314, section 3 and appendix E. FP4 is
//! bitsandbytes' E2M1-like format. The 8-bit map of double quantization: Dettmers, "8-bit
//! approximations for parallelism in deep learning", arXiv 1511.04561 (dynamic tree data type).

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use crate::QuantError;

/// Which 4-bit codebook a weight is quantized with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QuantType {
    /// Quantiles of the normal distribution with an exact zero.
    #[default]
    Nf4,
    /// Sign and three bits of a small float.
    Fp4,
}

/// NF4's 16 values, ascending.
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// FP4's magnitudes by the low three bits of the code, times 12.
const FP4_TWELFTHS: [f32; 8] = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0];

/// FP4's codebook: bit 3 is the sign, of zero too.
const FP4: [f32; 16] = {
    let mut map = [0.0; 16];
    let mut code = 0;
    while code < 8 {
        map[code] = FP4_TWELFTHS[code] / 12.0;
        map[code + 8] = -map[code];
        code += 1;
    }
    map
};

/// FP4's codebook as bitsandbytes writes it to checkpoints: its Python side has no negative zero.
const FP4_QUANT_MAP: [f32; 16] = {
    let mut map = FP4;
    map[8] = 0.0;
    map
};

/// Midpoints between neighbours of [`NF4`]: a scaled value's code is the number of them below it.
pub(crate) const NF4_THRESHOLDS: [f32; 15] = {
    let mut thresholds = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        thresholds[i] = (NF4[i] + NF4[i + 1]) * 0.5;
        i += 1;
    }
    thresholds
};

/// Thresholds on FP4's magnitude: the number of them below it indexes [`FP4_ORDER`]. They are
/// bitsandbytes' decimals, which are not always the nearest f32 to the exact midpoints.
#[allow(clippy::excessive_precision)]
pub(crate) const FP4_THRESHOLDS: [f32; 7] =
    [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333];

/// FP4 codes without sign, by ascending magnitude.
pub(crate) const FP4_ORDER: [u8; 8] = [0, 1, 6, 7, 4, 5, 2, 3];

/// [`FP4_ORDER`] as eight nibbles of one word.
pub(crate) const FP4_ORDER_NIBBLES: u32 = {
    let mut word = 0;
    let mut i = 0;
    while i < 8 {
        word |= (FP4_ORDER[i] as u32) << (4 * i);
        i += 1;
    }
    word
};

impl QuantType {
    /// Every codebook.
    pub const ALL: [Self; 2] = [Self::Nf4, Self::Fp4];

    /// The value that each code decodes to, relative to the block's absmax.
    pub fn codebook(self) -> &'static [f32; 16] {
        match self {
            Self::Nf4 => &NF4,
            Self::Fp4 => &FP4,
        }
    }

    /// The codebook as it stands in checkpoints (`X.weight.quant_map`): [`QuantType::codebook`], except
    /// that FP4's code 8 is 0 there while bitsandbytes' kernels decode it to -0.
    pub fn quant_map(self) -> &'static [f32; 16] {
        match self {
            Self::Nf4 => &NF4,
            Self::Fp4 => &FP4_QUANT_MAP,
        }
    }

    /// The name in bitsandbytes' quant_state.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        }
    }
}

impl fmt::Display for QuantType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for QuantType {
    type Err = QuantError;

    fn from_str(s: &str) -> Result<Self, QuantError> {
        Self::ALL
            .into_iter()
            .find(|t| t.name().eq_ignore_ascii_case(s))
            .ok_or_else(|| QuantError::UnknownQuantType(s.to_owned()))
    }
}

/// The signed dynamic 8-bit map of double quantization (bitsandbytes' `nested_quant_map`), ascending.
///
/// For each exponent e from 0 to 6 it holds the 2^e midpoints of 2^e equal parts of 0.1 to 1, times
/// 10^(e-6), with both signs; then 0 and 1.
pub fn signed_dynamic_map() -> &'static [f32; 256] {
    static MAP: OnceLock<[f32; 256]> = OnceLock::new();
    MAP.get_or_init(|| {
        // Rounded to f32 where PyTorch's linspace and multiplication round.
        let mut map = [0.0; 256];
        let mut positive = 128;
        for exponent in 0..7 {
            let parts = 1_usize << exponent;
            let step = (1.0_f32 - 0.1) / parts as f32;
            let boundary = |i: usize| {
                // linspace works from its nearer end; the product is not rounded (fused).
                if i < parts.div_ceil(2) {
                    (f64::from(0.1_f32) + f64::from(step) * i as f64) as f32
                } else {
                    (1.0 - f64::from(step) * (parts - i) as f64) as f32
                }
            };
            let scale = 10_f64.powi(exponent - 6) as f32;
            for i in 0..parts {
                let value = scale * ((boundary(i) + boundary(i + 1)) * 0.5);
                map[positive] = value;
                map[254 - positive] = -value;
                positive += 1;
            }
        }
        map[255] = 1.0;
        map
    })
}

/// Thresholds between neighbours of [`signed_dynamic_map`]: a scaled value's code is the number of them
/// below it. A value exactly between two entries takes the one with the even code.
pub(crate) fn signed_dynamic_thresholds() -> &'static [f32; 255] {
    static THRESHOLDS: OnceLock<[f32; 255]> = OnceLock::new();
    THRESHOLDS.get_or_init(|| {
        let map = signed_dynamic_map();
        std::array::from_fn(|i| {
            let midpoint = (map[i] + map[i + 1]) * 0.5;
            // "above" already excludes the tie; "at or above" is "above the next smaller float".
            if i % 2 == 0 { midpoint } else { midpoint.next_down() }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dynamic_map_is_sorted_and_odd_but_for_one() {
        let map = signed_dynamic_map();
        assert!(map.windows(2).all(|w| w[0] < w[1]));
        assert_eq!((map[127], map[255]), (0.0, 1.0));
        for i in 0..127 {
            assert_eq!(map[i], -map[254 - i]);
        }
    }

    #[test]
    fn names_parse_back() {
        for quant_type in QuantType::ALL {
            assert_eq!(quant_type.to_string().parse(), Ok(quant_type));
        }
        let error = "int4".parse::<QuantType>().map_err(|e| e.to_string());
        assert_eq!(error, Err("quant_type `int4` is unknown: use `nf4` or `fp4`".into()));
    }

    #[test]
    fn fp4_order_sorts_the_magnitudes() {
        let sorted = FP4_ORDER.map(|code| FP4[code as usize]);
        assert!(sorted.windows(2).all(|w| w[0] < w[1]));
        assert_eq!(FP4_ORDER_NIBBLES, 0x3254_7610);
        assert!(FP4[8].is_sign_negative() && FP4_QUANT_MAP[8].is_sign_positive());
    }
}
