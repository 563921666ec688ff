//! CubeCL kernels for quantizing and dequantizing on any runtime.
//!
//! They work on a CubeCL client and plain 1-D buffers, so the same code serves handles created by hand
//! and handles taken out of a tensor library. WGSL knows no integers but 32-bit ones, so codes travel
//! as u32 words on every runtime: eight 4-bit codes, or four 8-bit ones, of the little-endian byte
//! stream.
//!
//! Every kernel gives the bits of [`mod@crate::reference`]; the offset of double quantization, a mean,
//! may differ in its last bit. Two things could break that and are dealt with:
//!
//! - Compilers fuse a * b + c into one operation with one rounding. Where two roundings are meant the
//!   kernels write (a * b) * one + c with a `one` passed at run time: fused, that is
//!   round(round(a * b) * 1 + c), the wanted result.
//! - 1 / absmax must be the oracle's. Where absmax is a bf16 value (every bf16 weight) it comes out of a
//!   table and is exact everywhere. Other values are divided, and must be correctly rounded: CUDA's
//!   division is; Vulkan allows 2.5 units in the last place, which can move an element that lies that
//!   close to a threshold by one code. Mesa's software device divides exactly.
//!
//! Vulkan also leaves the rounding of f32 to f16 to the device; Mesa's and CUDA's round to nearest.
//!
//! Weights below 2^-117 in magnitude may be read as zero by devices that flush subnormals.

mod dequantize;
mod offset;
mod quantize;
mod rows;
mod streamed;
mod weight;

pub use dequantize::{dequantize, dequantize_range};
pub use quantize::{Quantizing, quantize, queue_quantize};
pub use rows::scale_rows;
pub use streamed::StreamedQuantize;
pub use weight::{DeviceAbsmax, DeviceWeight};

use std::any::TypeId;
use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};

use cubecl::client::Client;
use cubecl::device::DeviceId;
use cubecl::features::TypeUsage;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::{CubeCountSelection, Handle};

use crate::codebook::{NF4_THRESHOLDS, signed_dynamic_thresholds};
use crate::reciprocal::RECIPROCALS;
use crate::{FloatFormat, QuantError, QuantType, signed_dynamic_map};

/// Units per cube of every kernel.
const UNITS: usize = 256;
/// The most elements the kernels index: 32 bits, less what the last cubes may overshoot.
const MAX_ELEMENTS: usize = u32::MAX as usize - (1 << 20);

/// Whether a runtime can read and write buffers of a format. WGSL has no bfloat16, and float16 only
/// where the device offers it.
pub fn supports(client: &Client, format: FloatFormat) -> bool {
    client.features().type_usage(elem_type(format)).is_superset(TypeUsage::Buffer | TypeUsage::Conversion)
}

fn check_supported(client: &Client, format: FloatFormat) -> Result<(), QuantError> {
    match supports(client, format) {
        true => Ok(()),
        false => Err(QuantError::UnsupportedFormat { runtime: client.name().to_owned(), format }),
    }
}

fn elem_type(format: FloatFormat) -> ElemType {
    cuda_source::FloatFormat::from(format).elem_type()
}

/// The widest vector of a format, at most 16 bytes and eight elements, that divides `elements`.
fn vector_size(client: &Client, format: FloatFormat, elements: usize) -> usize {
    let fits = |n: &usize| *n <= 8 && n * format.size() <= 16 && elements.is_multiple_of(*n);
    client.io_optimized_vector_sizes(format.size()).find(fits).unwrap_or(1)
}

fn cube_count(client: &Client, cubes: usize) -> CubeCount {
    CubeCountSelection::new(client, cubes as u32).cube_count()
}

pub(crate) fn check_size(name: &'static str, handle: &Handle, bytes: usize) -> Result<(), QuantError> {
    match handle.size_in_used() as usize {
        actual if actual >= bytes => Ok(()),
        actual => Err(QuantError::BufferSize { name, expected: bytes, actual }),
    }
}

fn read(client: &Client, handle: Handle) -> Result<cubecl::bytes::Bytes, QuantError> {
    let runtime = client.name().to_owned();
    client.read_one(handle).map_err(|e| QuantError::Device { runtime, message: e.to_string() })
}

/// A kernel argument over a whole buffer.
fn buffer(handle: &Handle, elements: usize) -> BufferArg {
    // SAFETY: callers checked with `check_size` that the buffer holds that many elements.
    unsafe { BufferArg::from_raw_parts(handle.clone(), elements) }
}

/// Position of a codebook in the table buffer.
pub(crate) const fn codebook_start(quant_type: QuantType) -> usize {
    match quant_type {
        QuantType::Nf4 => 0,
        QuantType::Fp4 => 16,
    }
}
/// Position of the 8-bit map in the table buffer.
pub(crate) const MAP_START: usize = 32;
/// Position of the 8-bit map's thresholds in the table buffer.
const THRESHOLDS_START: usize = MAP_START + 256;
/// Position of the reciprocals of bf16 mantissas in the table buffer.
const RECIPROCALS_START: usize = THRESHOLDS_START + 255;
/// Position of NF4's cells in the table buffer: the threshold in each, then the code below it.
const CELLS_START: usize = RECIPROCALS_START + 128;
/// Cells, with those that only a NaN reaches.
const CELLS: usize = 64;
/// Floats in the table buffer.
const TABLE_LEN: usize = CELLS_START + 2 * CELLS;

/// Both codebooks, the 8-bit map and its thresholds, and the reciprocals of bf16 mantissas in one small
/// buffer, made once per device: kernels index them at run time, which constants in the source can't do
/// on every runtime.
pub(crate) fn tables(client: &Client) -> Handle {
    static TABLES: LazyLock<Mutex<HashMap<(DeviceId, TypeId), Handle>>> = LazyLock::new(Mutex::default);
    let service = client.service_id();
    let mut tables = TABLES.lock().unwrap_or_else(PoisonError::into_inner);
    let handle = tables.entry((service.device, service.service)).or_insert_with(|| {
        let mut values = Vec::with_capacity(TABLE_LEN);
        values.extend_from_slice(QuantType::Nf4.codebook());
        values.extend_from_slice(QuantType::Fp4.codebook());
        values.extend_from_slice(signed_dynamic_map());
        values.extend_from_slice(signed_dynamic_thresholds());
        values.extend_from_slice(&RECIPROCALS);
        values.extend(nf4_cells().iter().map(|(threshold, _)| *threshold));
        values.extend(nf4_cells().iter().map(|(_, below)| f32::from(*below)));
        client.create_from_slice(bytemuck::cast_slice(&values))
    });
    handle.clone()
}

/// The threshold in each cell of [-1, 1], cell i being what lies within 1/32 of i/16 - 1, and the code below
/// it. A cell without one has the next, which nothing in the cell exceeds.
fn nf4_cells() -> [(f32, u8); CELLS] {
    std::array::from_fn(|cell| {
        let start = cell as f32 / 16.0 - 1.0 - 1.0 / 32.0;
        let below = NF4_THRESHOLDS.iter().filter(|t| **t < start).count();
        (NF4_THRESHOLDS.get(below).copied().unwrap_or(f32::MAX), below as u8)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_has_at_most_one_threshold_and_none_at_its_edge() {
        for (i, threshold) in NF4_THRESHOLDS.iter().enumerate() {
            let position = threshold * 16.0 + 16.0;
            // The kernel's number of a cell is exact; the margin is for the rounding of this position.
            assert!((position - position.round()).abs() < 0.5 - 1e-4, "{threshold} lies between two cells");
            assert_eq!(nf4_cells()[position.round() as usize], (*threshold, i as u8), "two thresholds in a cell");
        }
    }
}
