//! ggml's tensor types, and its block quantizers bit for bit (`quantize_row_*_ref` of `ggml-quants.c`).
//!
//! Blocks of 32 elements along a row. Q8_0: an f16 scale d = amax/127 and 32 signed bytes round(x/d). Q4_0
//! and Q5_0: the scale is the element of largest magnitude over -8 (-16), so that this element is exact, and
//! the codes are biased by 8 (16). Q4_1: scale and minimum. The first half of a block is in the low nibbles,
//! the second in the high ones. The codes are computed with the f32 scale, before its rounding to f16.

use half::{bf16, f16};
use rayon::prelude::*;

/// Elements per block.
const BLOCK: usize = 32;

/// A tensor type that is read and written here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GgmlType {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
    /// 8 bits and a scale.
    Q8_0,
    /// 4 bits and a scale.
    Q4_0,
    /// 4 bits, a scale and a minimum.
    Q4_1,
    /// 5 bits and a scale.
    Q5_0,
}

impl GgmlType {
    /// All of them.
    pub const ALL: [Self; 7] = [Self::F32, Self::F16, Self::BF16, Self::Q8_0, Self::Q4_0, Self::Q4_1, Self::Q5_0];

    /// ggml's number, as in a file.
    pub fn id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q8_0 => 8,
            Self::BF16 => 30,
        }
    }

    /// The type of a number.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.id() == id)
    }

    /// The number of `general.file_type` for a file that is mostly of this type.
    pub fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q8_0 => 7,
            Self::Q5_0 => 8,
            Self::BF16 => 32,
        }
    }

    /// ggml's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
        }
    }

    /// Elements per block, and bytes.
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::BF16 => (1, 2),
            Self::Q8_0 => (BLOCK, 2 + BLOCK),
            Self::Q4_0 => (BLOCK, 2 + BLOCK / 2),
            Self::Q4_1 => (BLOCK, 4 + BLOCK / 2),
            Self::Q5_0 => (BLOCK, 6 + BLOCK / 2),
        }
    }

    /// The bytes of a tensor, or `None` when rows are no whole blocks or a size overflows.
    ///
    /// # Shapes
    /// `shape` is row-major, the last dimension the row.
    pub fn num_bytes(self, shape: &[usize]) -> Option<usize> {
        let (elements, bytes) = self.block();
        let total = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d))?;
        let row = shape.last().copied().unwrap_or(1);
        row.is_multiple_of(elements).then_some(())?;
        (total / elements).checked_mul(bytes)
    }

    /// From this magnitude on an element, or the scale of its block, rounds to infinity.
    fn overflow(self) -> f32 {
        // Halfway between the largest f16 and the next power of two.
        const F16: f32 = 65_520.0;
        match self {
            Self::F32 => f32::INFINITY,
            // The same of bf16.
            Self::BF16 => f32::from_bits(0x7f7f_8000),
            Self::F16 | Self::Q4_1 => F16,
            Self::Q8_0 => F16 * 127.0,
            Self::Q4_0 => F16 * 8.0,
            Self::Q5_0 => F16 * 16.0,
        }
    }

    /// The element of largest magnitude, if it is beyond what this type holds.
    pub(crate) fn beyond(self, values: &[f32]) -> Option<f32> {
        let larger = |a: f32, b: f32| if b.abs() > a.abs() { b } else { a };
        let largest = values.par_iter().copied().reduce(|| 0.0, larger);
        (largest.abs() >= self.overflow()).then_some(largest)
    }

    /// Encodes whole blocks.
    pub fn encode(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => bytemuck::cast_slice(values).to_vec(),
            Self::F16 => values.par_iter().flat_map_iter(|x| f16::from_f32(*x).to_le_bytes()).collect(),
            Self::BF16 => values.par_iter().flat_map_iter(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
            _ => {
                let (elements, bytes) = self.block();
                let mut out = vec![0; values.len() / elements * bytes];
                out.par_chunks_exact_mut(bytes).zip(values.par_chunks_exact(elements)).for_each(
                    |(out, x)| match self {
                        Self::Q8_0 => q8_0(x, out),
                        Self::Q4_1 => q4_1(x, out),
                        Self::Q5_0 => q5_0(x, out),
                        _ => q4_0(x, out),
                    },
                );
                out
            }
        }
    }

    /// Decodes whole blocks.
    pub fn decode(self, data: &[u8]) -> Vec<f32> {
        let half = |b: &[u8]| f16::from_le_bytes([b[0], b[1]]).to_f32();
        match self {
            Self::F32 => bytemuck::pod_collect_to_vec(&data[..data.len() / 4 * 4]),
            Self::F16 => data.chunks_exact(2).map(half).collect(),
            Self::BF16 => data.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            _ => {
                let (elements, bytes) = self.block();
                let mut out = vec![0.0; data.len() / bytes * elements];
                out.par_chunks_exact_mut(elements).zip(data.par_chunks_exact(bytes)).for_each(|(out, block)| {
                    let d = half(block);
                    let (low, high) = (|b: u8| b & 15, |b: u8| b >> 4);
                    for (i, x) in out.iter_mut().enumerate() {
                        let nibble = |codes: &[u8]| if i < 16 { low(codes[i]) } else { high(codes[i - 16]) };
                        *x = match self {
                            Self::Q8_0 => f32::from(block[2 + i] as i8) * d,
                            Self::Q4_1 => f32::from(nibble(&block[4..])) * d + half(&block[2..]),
                            Self::Q5_0 => {
                                let fifth = (block[2 + i / 8] >> (i % 8) & 1) << 4;
                                f32::from((nibble(&block[6..]) | fifth) as i8 - 16) * d
                            }
                            _ => f32::from(nibble(&block[2..]) as i8 - 8) * d,
                        };
                    }
                });
                out
            }
        }
    }
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// The first element of the largest magnitude.
fn signed_max(x: &[f32]) -> f32 {
    let (mut amax, mut max) = (0.0f32, 0.0f32);
    for &v in x {
        if amax < v.abs() {
            (amax, max) = (v.abs(), v);
        }
    }
    max
}

/// C's `MIN(top, (int8_t)(x))`: truncation towards zero.
fn code(x: f32, top: u8) -> u8 {
    (x as i8).clamp(0, top as i8) as u8
}

fn nibbles(codes: impl Fn(usize) -> u8, out: &mut [u8]) {
    out.iter_mut().enumerate().for_each(|(j, o)| *o = (codes(j) & 15) | (codes(j + 16) & 15) << 4);
}

fn q8_0(x: &[f32], out: &mut [u8]) {
    let amax = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let d = amax / 127.0;
    let id = inverse(d);
    out[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    out[2..].iter_mut().zip(x).for_each(|(o, v)| *o = (v * id).round() as i8 as u8);
}

fn q4_0(x: &[f32], out: &mut [u8]) {
    let d = signed_max(x) / -8.0;
    let id = inverse(d);
    out[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    nibbles(|j| code(x[j] * id + 8.5, 15), &mut out[2..]);
}

fn q4_1(x: &[f32], out: &mut [u8]) {
    let min = x.iter().fold(f32::MAX, |m, v| if *v < m { *v } else { m });
    let max = x.iter().fold(-f32::MAX, |m, v| if *v > m { *v } else { m });
    let d = (max - min) / 15.0;
    let id = inverse(d);
    out[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    out[2..4].copy_from_slice(&f16::from_f32(min).to_le_bytes());
    nibbles(|j| code((x[j] - min) * id + 0.5, 15), &mut out[4..]);
}

fn q5_0(x: &[f32], out: &mut [u8]) {
    let d = signed_max(x) / -16.0;
    let id = inverse(d);
    out[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    let code = |j: usize| code(x[j] * id + 16.5, 31);
    let fifth = (0..BLOCK).fold(0u32, |bits, j| bits | u32::from(code(j) >> 4) << j);
    out[2..6].copy_from_slice(&fifth.to_le_bytes());
    nibbles(code, &mut out[6..]);
}
