//! The scales of blocks and groups, and what codes of 4 and 8 bits stand for.

use std::sync::LazyLock;

use half::{bf16, f16};
use safetensors::Dtype;

/// The values of OCP's 8-bit floats with 4 bits of exponent: bias 7, no infinities, NaN where all bits are ones.
pub(super) static E4M3: LazyLock<[f32; 256]> = LazyLock::new(|| {
    std::array::from_fn(|bits| match bits & 0x7f {
        0x7f => f32::NAN,
        _ => float(bits, 3, 7),
    })
});
/// Those with 5 bits of exponent: bias 15, infinities and NaN as in IEEE's.
pub(super) static E5M2: LazyLock<[f32; 256]> = LazyLock::new(|| {
    std::array::from_fn(|bits| match bits & 0x7f {
        0x7c => f32::INFINITY * if bits & 0x80 == 0 { 1.0 } else { -1.0 },
        0x7d.. => f32::NAN,
        _ => float(bits, 2, 15),
    })
});
/// Those of 4 bits with 2 bits of exponent (MXFP4, NVFP4).
pub(super) const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Sign, exponent and `mantissa` bits of an 8-bit float.
fn float(bits: usize, mantissa: u32, bias: i32) -> f32 {
    let fraction = (bits & ((1 << mantissa) - 1)) as f32 / (1 << mantissa) as f32;
    let exponent = ((bits & 0x7f) >> mantissa) as i32;
    let magnitude = match exponent {
        0 => fraction * 2f32.powi(1 - bias),
        _ => (1.0 + fraction) * 2f32.powi(exponent - bias),
    };
    if bits & 0x80 == 0 { magnitude } else { -magnitude }
}

/// Scales as they lie in a file, and what all of them are divided by.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scales<'a> {
    pub dtype: Dtype,
    pub data: &'a [u8],
    pub divisor: Option<f32>,
}

impl Scales<'_> {
    /// Whether scales may be of a type.
    pub(super) fn supports(dtype: Dtype) -> bool {
        use Dtype::{BF16, F8_E4M3, F8_E8M0, F16, F32, U8};
        [F32, F16, BF16, F8_E4M3, F8_E8M0, U8].contains(&dtype)
    }

    /// Scale `i`; a byte is an exponent (E8M0), and NaN where all its bits are ones.
    pub(super) fn at(&self, i: usize) -> f32 {
        let scale = match self.dtype {
            Dtype::F32 => word(self.data, i).map_or(f32::NAN, f32::from_le_bytes),
            Dtype::F16 => word(self.data, i).map_or(f32::NAN, |x| f16::from_le_bytes(x).to_f32()),
            Dtype::BF16 => word(self.data, i).map_or(f32::NAN, |x| bf16::from_le_bytes(x).to_f32()),
            _ => return self.data.get(i).map_or(f32::NAN, |code| self.of_code(*code)),
        };
        self.divided(scale)
    }

    /// The code of scale `i`, where scales have 8 bits.
    pub(super) fn code(&self, i: usize) -> Option<u8> {
        self.data.get(i).copied().filter(|_| self.dtype.bitsize() == 8)
    }

    /// What a scale of 8 bits stands for.
    pub(super) fn of_code(&self, code: u8) -> f32 {
        self.divided(match self.dtype {
            Dtype::F8_E4M3 => E4M3[usize::from(code)],
            _ => power_of_two(code),
        })
    }

    fn divided(&self, scale: f32) -> f32 {
        match self.divisor {
            None => scale,
            Some(divisor) => scale / divisor,
        }
    }
}

/// 2^(bits - 127).
fn power_of_two(bits: u8) -> f32 {
    match bits {
        // Below the normal numbers of f32.
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(bits) << 23),
    }
}

/// Element `i` of N bytes.
pub(super) fn word<const N: usize>(data: &[u8], i: usize) -> Option<[u8; N]> {
    data.as_chunks::<N>().0.get(i).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_bits_are_what_the_standard_says() {
        assert_eq!(
            (E4M3[0x7e], E4M3[1], E4M3[0x08], E4M3[0x38], E4M3[0xb8]),
            (448.0, 2f32.powi(-9), 2f32.powi(-6), 1.0, -1.0)
        );
        assert_eq!((E5M2[0x7b], E5M2[1], E5M2[0x3c], E5M2[0xfc]), (57344.0, 2f32.powi(-16), 1.0, f32::NEG_INFINITY));
        assert_eq!([&*E4M3, &*E5M2].map(|values| values.iter().filter(|x| x.is_nan()).count()), [2, 6]);
        assert!((0..255).map(power_of_two).all(|x| x > 0.0));
        assert_eq!((power_of_two(0), power_of_two(1), power_of_two(127)), (2f32.powi(-127), f32::MIN_POSITIVE, 1.0));
    }
}
