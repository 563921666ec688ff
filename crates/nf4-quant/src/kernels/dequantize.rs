//! Dequantize: codes and statistics in, floats out.
//!
//! Idea: one word of eight codes is one unit's work; its eight values lie in one block (blocksizes are
//! multiples of eight) and leave in vectors of up to 16 bytes. The codebook sits in shared memory,
//! where sixteen neighbouring words never collide, and the block's absmax is decoded on the fly, so
//! double quantization costs no second pass. A unit does four words, a cube apart, so that neighbouring
//! units touch neighbouring memory and filling the codebook is shared by four.
//!
//! Bytes per element, blocksize 64, double quantization, bf16: 0.5 + 1/64 + 4/(64 * 256) read, 2
//! written; nothing is computed but one product per element.
//!
//! Measured on an H100 (device copy: 3.02 TB/s), bf16, blocksize 64, double quantization: 0.208 ms or 2.84 TB/s for
//! 28672 x 8192, 0.019 ms or 2.20 TB/s for 4096 x 4096.
//!
//! Codebook and blocksize are run-time values, so a program compiles this kernel once per output format
//! and vector width, for all weights.
//!
//! A range that does not start on a word takes the same kernel with a lookup per element.

use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::{
    DeviceAbsmax, DeviceWeight, MAP_START, TABLE_LEN, UNITS, buffer, check_size, check_supported, codebook_start,
    cube_count, elem_type, tables, vector_size,
};
use crate::{FloatFormat, QuantError};

/// Words per unit.
const WORDS: usize = 4;

/// Dequantizes a whole weight: codebook\[code\] * absmax in f32, rounded once to `format`.
///
/// # Shapes
///
/// `out` holds at least `weight.num_elements` elements of `format`, contiguous.
///
/// # Errors
///
/// As [`DeviceWeight::validate`], [`QuantError::BufferSize`] for `out` and
/// [`QuantError::UnsupportedFormat`]. Kernels run asynchronously: a device's own failure shows when a
/// result is read.
pub fn dequantize(client: &Client, weight: &DeviceWeight, out: Handle, format: FloatFormat) -> Result<(), QuantError> {
    dequantize_range(client, weight, 0..weight.num_elements, out, format)
}

/// Dequantizes the elements of a range, say some rows of a matrix.
///
/// # Shapes
///
/// `out` holds at least as many elements of `format` as the range, contiguous; the range's first
/// element goes to its start. Ranges that start at a multiple of eight are fast.
///
/// # Errors
///
/// As [`dequantize`], and [`QuantError::Range`].
pub fn dequantize_range(
    client: &Client,
    weight: &DeviceWeight,
    range: std::ops::Range<usize>,
    out: Handle,
    format: FloatFormat,
) -> Result<(), QuantError> {
    weight.validate()?;
    check_supported(client, format)?;
    let (start, end, num_elements) = (range.start, range.end, weight.num_elements);
    if start > end || end > num_elements {
        return Err(QuantError::Range { start, end, num_elements });
    }
    let elements = end - start;
    check_size("out", &out, elements * format.size())?;
    if elements == 0 {
        return Ok(());
    }

    let aligned = start.is_multiple_of(8);
    let vector = vector_size(client, format, elements);
    let cubes = elements.div_ceil(8 * WORDS * UNITS);
    // SAFETY: the buffers' sizes are checked above, and the kernel stays within `elements`.
    unsafe {
        dequantize_kernel::launch_unchecked(
            client,
            cube_count(client, cubes),
            CubeDim::new_1d(UNITS as u32),
            vector,
            buffer(&weight.codes, num_elements.div_ceil(8)),
            absmax_args(weight),
            buffer(&tables(client), TABLE_LEN),
            buffer(&out, elements / vector),
            PartLaunch::new(start, elements, codebook_start(weight.quant_type), weight.blocksize.ilog2(), aligned),
            elem_type(format),
        );
    }
    Ok(())
}

/// The statistics of a valid weight as kernels take them.
pub(super) fn absmax_args(weight: &DeviceWeight) -> AbsmaxArgs {
    let blocks = weight.num_blocks();
    match &weight.absmax {
        DeviceAbsmax::Plain(absmax) => AbsmaxArgs::Plain(buffer(absmax, blocks)),
        DeviceAbsmax::Nested { codes, absmax, blocksize } => AbsmaxArgs::Nested(NestedLaunch::new(
            buffer(codes, blocks.div_ceil(4)),
            buffer(absmax, blocks.div_ceil(*blocksize) + 1),
            blocks.div_ceil(*blocksize),
            1.0,
            *blocksize,
        )),
    }
}

/// Which part of which weight.
#[derive(CubeType, CubeLaunch)]
struct Part {
    /// First element.
    start: usize,
    elements: usize,
    /// Position of the codebook in the table.
    codebook_start: usize,
    log2_blocksize: u32,
    /// Whether the part starts on a word.
    #[cube(comptime)]
    aligned: bool,
}

/// The blocks' absmax, either way.
#[derive(CubeType, CubeLaunch)]
#[expect(dead_code, reason = "kernels match on it; only the derived launch arguments are constructed")]
pub(super) enum Absmax {
    Plain(Box<[f32]>),
    Nested(Nested),
}

/// Double quantization.
#[derive(CubeType, CubeLaunch)]
pub(super) struct Nested {
    codes: Box<[u32]>,
    absmax: Box<[f32]>,
    /// Position of the offset in `absmax`.
    offset: usize,
    /// 1, unknown to the compiler: keeps the product's own rounding.
    one: f32,
    #[cube(comptime)]
    blocksize: usize,
}

#[cube]
pub(super) fn offset_of(absmax: &Absmax) -> f32 {
    match absmax {
        Absmax::Plain(_) => 0.0f32.runtime(),
        Absmax::Nested(nested) => nested.absmax[nested.offset],
    }
}

#[cube]
pub(super) fn absmax_of(absmax: &Absmax, offset: f32, table: &[f32], block: usize) -> f32 {
    match absmax {
        Absmax::Plain(absmax) => absmax[block],
        Absmax::Nested(nested) => {
            let code = (nested.codes[block / 4] >> ((block % 4) * 8) as u32) & 255;
            let scaled = table[MAP_START + code as usize] * nested.absmax[block / nested.blocksize];
            scaled * nested.one + offset
        }
    }
}

#[cube(launch_unchecked)]
fn dequantize_kernel<F: Float, N: Size>(
    codes: &[u32],
    absmax: &Absmax,
    table: &[f32],
    out: &mut [Vector<F, N>],
    part: &Part,
    #[define(F)] _format: ElemType,
) {
    let (start, elements) = (part.start, part.elements);
    let log2_blocksize = part.log2_blocksize;
    let aligned = comptime!(part.aligned);
    let mut codebook = Shared::<[f32]>::new_slice(16usize);
    let unit = UNIT_POS as usize;
    let offset = offset_of(absmax);
    if unit < 16 {
        codebook[unit] = table[part.codebook_start + unit];
    }
    sync_cube();

    let vector = N::value().comptime();
    let cube_start = CUBE_POS * (comptime!(WORDS * UNITS));
    #[unroll]
    for w in 0..WORDS {
        // Elements are counted from the range's start, words and blocks from the weight's.
        let first = (cube_start + w * UNITS + unit) * 8;
        if first < elements {
            let mut word = codes[(start + first) / 8];
            let mut block_absmax = absmax_of(absmax, offset, table, (start + first) >> log2_blocksize as usize);
            #[unroll]
            for v in 0..comptime!(8 / vector) {
                if first + v * vector < elements {
                    let mut values = Vector::<F, N>::empty();
                    #[unroll]
                    for i in 0..vector {
                        let position = comptime!(v * vector + i);
                        // Even elements are in the high nibble of their byte.
                        let mut shift = u32::new(comptime!((position as i64 / 2) * 8 + 4 - (position as i64 % 2) * 4));
                        if comptime!(!aligned) {
                            let element = start + first + position;
                            word = codes[element / 8];
                            block_absmax = absmax_of(absmax, offset, table, element >> log2_blocksize as usize);
                            let within = (element % 8) as u32;
                            shift = (within / 2) * 8 + 4 - (within % 2) * 4;
                        }
                        let code = (word >> shift) & 15;
                        values.insert(i, F::cast_from(codebook[code as usize] * block_absmax));
                    }
                    out[first / vector + v] = values;
                }
            }
        }
    }
}
