//! What tests of kernels in CUDA C++ share: numbers of 16 bits as bytes, and a format that the device multiplies.

use cubecl::client::Client;
use fused_kernels::FloatFormat;
use fused_kernels::low_rank;
use half::{bf16, f16};

pub fn half_bytes(values: &[f32], format: FloatFormat) -> Vec<u8> {
    let bits = values.iter().map(|&v| match format {
        FloatFormat::F16 => f16::from_f32(v).to_bits(),
        _ => bf16::from_f32(v).to_bits(),
    });
    bits.flat_map(u16::to_le_bytes).collect()
}

pub fn halves(bytes: &[u8], format: FloatFormat) -> Vec<f32> {
    let bits = bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    match format {
        FloatFormat::F16 => bits.map(|b| f16::from_bits(b).to_f32()).collect(),
        _ => bits.map(|b| bf16::from_bits(b).to_f32()).collect(),
    }
}

/// The format, or f16 where the device multiplies no bf16.
pub fn on_device(client: &Client, format: FloatFormat) -> FloatFormat {
    if low_rank::supports(client, format) { format } else { FloatFormat::F16 }
}
