//! The element types of unquantized weights.

use std::fmt;
use std::str::FromStr;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use crate::QuantError;

/// The dtype of a weight before quantization, by PyTorch's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FloatFormat {
    /// IEEE single precision.
    #[serde(rename = "float32")]
    F32,
    /// IEEE half precision.
    #[serde(rename = "float16")]
    F16,
    /// The upper half of an f32.
    #[serde(rename = "bfloat16")]
    BF16,
}

impl FloatFormat {
    /// Every format.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::BF16];

    /// PyTorch's name, as in bitsandbytes' quant_state.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
        }
    }

    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }
}

/// The same format in a buffer on a device.
#[cfg(feature = "kernels")]
impl From<FloatFormat> for cuda_source::FloatFormat {
    fn from(format: FloatFormat) -> Self {
        match format {
            FloatFormat::F32 => Self::F32,
            FloatFormat::F16 => Self::F16,
            FloatFormat::BF16 => Self::BF16,
        }
    }
}

impl fmt::Display for FloatFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for FloatFormat {
    type Err = QuantError;

    fn from_str(s: &str) -> Result<Self, QuantError> {
        let name = s.strip_prefix("torch.").unwrap_or(s);
        Self::ALL.into_iter().find(|format| format.name() == name).ok_or_else(|| QuantError::UnknownDtype(s.to_owned()))
    }
}

/// A float that weights are stored in: `f32`, [`half::f16`] or [`half::bf16`].
pub trait Element: Copy + Send + Sync + 'static {
    /// This type's format.
    const FORMAT: FloatFormat;

    /// Widens, exactly.
    fn to_f32(self) -> f32;

    /// Rounds to nearest, ties to even.
    fn from_f32(value: f32) -> Self;

    /// Widens a slice; `from` and `to` have the same length.
    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = from.to_f32();
        }
    }

    /// Rounds a slice; `from` and `to` have the same length.
    #[inline(always)]
    fn narrow(from: &[f32], to: &mut [Self]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = Self::from_f32(*from);
        }
    }

    /// The largest magnitude of a slice, NaN or infinite where an element is.
    #[inline(always)]
    fn largest(slice: &[Self]) -> f32 {
        // Magnitudes order as their bits do, and a NaN or infinity comes out on top.
        f32::from_bits(slice.iter().fold(0, |max, v| u32::max(max, v.to_f32().to_bits() & 0x7fff_ffff)))
    }

    /// The slice as f32, where it is one.
    #[inline(always)]
    fn as_f32(_slice: &[Self]) -> Option<&[f32]> {
        None
    }

    /// The slice as bf16, where it is one.
    #[inline(always)]
    fn as_bf16(_slice: &[Self]) -> Option<&[bf16]> {
        None
    }
}

impl Element for f32 {
    const FORMAT: FloatFormat = FloatFormat::F32;

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn as_f32(slice: &[Self]) -> Option<&[f32]> {
        Some(slice)
    }
}

impl Element for bf16 {
    const FORMAT: FloatFormat = FloatFormat::BF16;

    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    // Without a branch, so that it vectorises.
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
        // Rounding could carry a NaN's payload away: keep it, and make it quiet.
        let bits = if value.is_nan() { bits | 0x40_0000 } else { rounded };
        Self::from_bits((bits >> 16) as u16)
    }

    #[inline(always)]
    fn largest(slice: &[Self]) -> f32 {
        Self::from_bits(slice.iter().fold(0, |max, v| u16::max(max, v.to_bits() & 0x7fff))).to_f32()
    }

    #[inline(always)]
    fn as_bf16(slice: &[Self]) -> Option<&[bf16]> {
        Some(slice)
    }
}

impl Element for f16 {
    const FORMAT: FloatFormat = FloatFormat::F16;

    #[inline]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }

    #[inline]
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }

    #[inline(always)]
    fn largest(slice: &[Self]) -> f32 {
        Self::from_bits(slice.iter().fold(0, |max, v| u16::max(max, v.to_bits() & 0x7fff))).to_f32()
    }

    // By slice, `half` uses the processor's conversion instructions.
    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }

    #[inline(always)]
    fn narrow(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_as_half_does() {
        // Every upper half, with lower halves around the tie and at the ends.
        for upper in 0..=u16::MAX {
            for lower in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits(u32::from(upper) << 16 | lower);
                let (ours, theirs) = (<bf16 as Element>::from_f32(value), bf16::from_f32(value));
                assert_eq!(ours.to_bits(), theirs.to_bits(), "{value:?}");
            }
        }
    }

    #[test]
    fn names_parse_back() {
        for format in FloatFormat::ALL {
            assert_eq!(format.to_string().parse(), Ok(format));
            assert_eq!(format!("torch.{format}").parse(), Ok(format));
        }
        assert!("int8".parse::<FloatFormat>().is_err());
    }
}
