//! Quantize: floats in, codes and statistics out.
//!
//! Idea: a cube takes whole blocks (2048 elements, or one block of 4096), each unit one word of eight
//! consecutive elements (two of a block of 4096) that it reads once, in vectors of up to 16 bytes, and
//! keeps in registers. The units of a block find its absmax by a tree over shared memory; then each
//! unit encodes its values and writes one word.
//!
//! Encoding must cost less than memory, and a tree of four compares with the selects between them would not. So NF4's
//! thresholds lie in a table of cells, 1/16 wide, no cell with more than one: an addition gives the
//! cell's number, and two lookups in shared memory, where 33 cells hardly ever collide, its threshold and the
//! code below it. FP4 needs three compares and has no table.
//!
//! Magnitudes are compared as the integers that their bits are: the same order, and a NaN or infinity
//! comes out on top instead of being lost as in a float maximum.
//!
//! Double quantization takes three more small kernels over 1/64 of the elements: two for the offset (see
//! [`super::offset`]) and one for the 8-bit codes, one cube per nested block. Nothing waits for the host.
//!
//! Bytes per element, blocksize 64, bf16: 2 read, 0.5 + 4/64 written.
//!
//! Measured on an H100 (device copy: 3.02 TB/s), bf16, blocksize 64, double quantization: 0.290 ms or 2.04 TB/s for
//! 28672 x 8192, 0.033 ms for 4096 x 4096. `docs/src/kernels/matmul.md` has the version before.

use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::weight::check_len;
use super::{
    CELLS, CELLS_START, DeviceAbsmax, DeviceWeight, RECIPROCALS_START, TABLE_LEN, THRESHOLDS_START, UNITS, buffer,
    check_size, check_supported, cube_count, elem_type, offset, read, tables, vector_size,
};
use crate::codebook::{FP4_ORDER_NIBBLES, FP4_THRESHOLDS};
use crate::reciprocal::{MAX_EXPONENT, ONE};
use crate::{Element, FloatFormat, NestedAbsmax, QuantConfig, QuantError, QuantType};

/// The bits of the smallest normal f32: magnitudes below it count as zero.
const MIN_NORMAL: u32 = 0x0080_0000;

/// Quantizes a weight that lies on the device, and waits for it: [`queue_quantize`] and
/// [`Quantizing::finish`].
///
/// # Errors
///
/// As those two.
pub fn quantize(
    client: &Client,
    input: Handle,
    format: FloatFormat,
    num_elements: usize,
    config: &QuantConfig,
) -> Result<DeviceWeight, QuantError> {
    queue_quantize(client, input, format, num_elements, config)?.finish(client)
}

/// A weight whose quantization is queued.
#[derive(Debug)]
pub struct Quantizing {
    weight: DeviceWeight,
    /// f32, one per block.
    absmax: Handle,
    /// Not finite where an element is not, or where the sum of absmax overflows.
    mean: Handle,
    input: Handle,
    format: FloatFormat,
}

/// Queues the kernels that quantize a weight on the device.
///
/// # Shapes
///
/// `input` holds at least `num_elements` elements of `format`, contiguous.
///
/// # Errors
///
/// [`QuantError::Blocksize`], [`QuantError::Empty`], [`QuantError::TooLarge`],
/// [`QuantError::BufferSize`] for `input`, [`QuantError::UnsupportedFormat`].
pub fn queue_quantize(
    client: &Client,
    input: Handle,
    format: FloatFormat,
    num_elements: usize,
    config: &QuantConfig,
) -> Result<Quantizing, QuantError> {
    config.validate()?;
    check_len(num_elements)?;
    check_supported(client, format)?;
    check_size("input", &input, num_elements * format.size())?;

    let QuantConfig { quant_type, blocksize, double_quant } = *config;
    let blocks = num_elements.div_ceil(blocksize);
    let (codes, absmax) = (client.empty(4 * num_elements.div_ceil(8)), client.empty(4 * blocks));
    launch(client, &input, format, num_elements, config, &codes, &absmax);
    let mean = offset::mean(client, &absmax, blocks);
    let statistics = match double_quant {
        true => quantize_nested(client, &absmax, blocks, &mean),
        false => DeviceAbsmax::Plain(absmax.clone()),
    };
    let weight = DeviceWeight { codes, absmax: statistics, quant_type, blocksize, num_elements };
    Ok(Quantizing { weight, absmax, mean, input, format })
}

/// Queues the kernel that encodes elements and finds the absmax of their blocks. The buffers' sizes are checked, and so is
/// the format.
pub(super) fn launch(
    client: &Client,
    input: &Handle,
    format: FloatFormat,
    num_elements: usize,
    config: &QuantConfig,
    codes: &Handle,
    absmax: &Handle,
) {
    let QuantConfig { quant_type, blocksize, .. } = *config;
    let (words, blocks) = (num_elements.div_ceil(8), num_elements.div_ceil(blocksize));
    let vector = vector_size(client, format, num_elements);
    let words_per_unit = blocksize.div_ceil(8 * UNITS);
    let cubes = words.div_ceil(words_per_unit * UNITS);
    // SAFETY: the callers checked the input's size and made the others to fit, and the kernel stays within
    // `num_elements`.
    unsafe {
        quantize_kernel::launch_unchecked(
            client,
            cube_count(client, cubes),
            CubeDim::new_1d(UNITS as u32),
            vector,
            buffer(input, num_elements / vector),
            buffer(&tables(client), TABLE_LEN),
            buffer(codes, words),
            buffer(absmax, blocks),
            BlocksLaunch::new(num_elements, quant_type, blocksize, words_per_unit),
            elem_type(format),
        );
    }
}

impl Quantizing {
    /// The weight, for kernels that are queued behind its own.
    pub fn weight(&self) -> &DeviceWeight {
        &self.weight
    }

    /// Waits for the kernels and checks that every element was finite.
    ///
    /// # Errors
    ///
    /// [`QuantError::NonFinite`] naming the first NaN or infinite element; [`QuantError::Device`] when the
    /// device fails.
    pub fn finish(self, client: &Client) -> Result<DeviceWeight, QuantError> {
        let Self { mut weight, absmax, mean, input, format } = self;
        let floats = |handle: Handle, len: usize| {
            Ok::<_, QuantError>(bytemuck::pod_collect_to_vec::<u8, f32>(&read(client, handle)?[..4 * len]))
        };
        if floats(mean, 1)?[0].is_finite() {
            return Ok(weight);
        }
        // Not finite, or finite values near the largest f32 whose sum overflowed.
        let blocks = weight.num_blocks();
        let values = floats(absmax.clone(), blocks)?;
        if values.iter().any(|a| !a.is_finite()) {
            return Err(non_finite(client, input, format, weight.num_elements)?);
        }
        if matches!(weight.absmax, DeviceAbsmax::Nested { .. }) {
            let mean = client.create_from_slice(&NestedAbsmax::mean(&values).to_ne_bytes());
            weight.absmax = quantize_nested(client, &absmax, blocks, &mean);
        }
        Ok(weight)
    }
}

/// The error that names the first NaN or infinite element, which takes reading the input back.
fn non_finite(client: &Client, input: Handle, format: FloatFormat, len: usize) -> Result<QuantError, QuantError> {
    fn find<E: Element + bytemuck::Pod>(bytes: &[u8]) -> Option<(usize, f32)> {
        let values = bytemuck::pod_collect_to_vec::<u8, E>(bytes).into_iter().map(Element::to_f32);
        values.enumerate().find(|(_, v)| !v.is_finite())
    }
    let bytes = read(client, input)?;
    let bytes = &bytes[..len * format.size()];
    let found = match format {
        FloatFormat::F32 => find::<f32>(bytes),
        FloatFormat::F16 => find::<half::f16>(bytes),
        FloatFormat::BF16 => find::<half::bf16>(bytes),
    };
    Ok(match found {
        Some((index, value)) => QuantError::NonFinite { index, value },
        None => QuantError::Device {
            runtime: client.name().to_owned(),
            message: "the kernel found a NaN or infinity that its input does not hold".to_owned(),
        },
    })
}

pub(super) fn quantize_nested(client: &Client, absmax: &Handle, blocks: usize, mean: &Handle) -> DeviceAbsmax {
    let blocksize = NestedAbsmax::DEFAULT_BLOCKSIZE;
    let nested_blocks = blocks.div_ceil(blocksize);
    let codes = client.empty(4 * blocks.div_ceil(4));
    let nested_absmax = client.empty(4 * (nested_blocks + 1));
    // SAFETY: every buffer is made to fit `blocks`, and the kernel stays within it.
    unsafe {
        quantize_nested_kernel::launch_unchecked(
            client,
            cube_count(client, nested_blocks),
            CubeDim::new_1d(UNITS as u32),
            buffer(absmax, blocks),
            buffer(&tables(client), TABLE_LEN),
            buffer(&codes, blocks.div_ceil(4)),
            buffer(&nested_absmax, nested_blocks + 1),
            buffer(mean, 1),
            blocks,
            nested_blocks,
        );
    }
    DeviceAbsmax::Nested { codes, absmax: nested_absmax, blocksize }
}

/// How a weight is cut into blocks.
#[derive(CubeType, CubeLaunch)]
struct Blocks {
    elements: usize,
    #[cube(comptime)]
    quant_type: QuantType,
    #[cube(comptime)]
    blocksize: usize,
    #[cube(comptime)]
    words_per_unit: usize,
}

#[cube(launch_unchecked)]
fn quantize_kernel<F: Float, N: Size>(
    input: &[Vector<F, N>],
    table: &[f32],
    codes: &mut [u32],
    absmax: &mut [f32],
    of: &Blocks,
    #[define(F)] _format: ElemType,
) {
    let elements = of.elements;
    let quant_type = comptime!(of.quant_type);
    let blocksize = comptime!(of.blocksize);
    let words_per_unit = comptime!(of.words_per_unit);
    let vector = N::value().comptime();
    let per_unit = comptime!(8 * words_per_unit);
    let unit = UNIT_POS as usize;
    let first = (CUBE_POS * UNITS + unit) * per_unit;

    let mut values = Array::<f32>::new(per_unit);
    let mut max = 0u32;
    #[unroll]
    for v in 0..comptime!(per_unit / vector) {
        if first + v * vector < elements {
            let loaded = input[first / vector + v];
            #[unroll]
            for i in 0..vector {
                let value = f32::cast_from(loaded.extract(i));
                values[v * vector + i] = value;
                max = larger(max, magnitude(value));
            }
        } else {
            #[unroll]
            for i in 0..vector {
                values[v * vector + i] = 0.0f32;
            }
        }
    }

    // A tree over the units of each block.
    let units_per_block = comptime!(blocksize / per_unit);
    let mut shared = Shared::<[u32]>::new_slice(UNITS);
    shared[unit] = max;
    let mut thresholds = Shared::<[f32]>::new_slice(CELLS);
    let mut below = Shared::<[u32]>::new_slice(CELLS);
    if comptime!(quant_type == QuantType::Nf4) && unit < CELLS {
        thresholds[unit] = table[CELLS_START + unit];
        below[unit] = u32::cast_from(table[CELLS_START + CELLS + unit]);
    }
    sync_cube();
    #[unroll]
    for level in 0..comptime!(units_per_block.ilog2()) {
        let stride = comptime!(units_per_block >> (level as usize + 1));
        if unit % units_per_block < stride {
            shared[unit] = larger(shared[unit], shared[unit + stride]);
        }
        sync_cube();
    }
    let leader = unit - unit % units_per_block;
    let max = normal_or_zero(shared[leader]);

    if first < elements {
        let block_absmax = f32::reinterpret(max);
        if unit == leader {
            absmax[first / blocksize] = block_absmax;
        }
        let inverse = reciprocal(max, table);
        #[unroll]
        for w in 0..words_per_unit {
            if first + w * 8 < elements {
                let mut word = 0u32;
                #[unroll]
                for i in 0..8usize {
                    let code = encode(values[w * 8 + i], inverse, &thresholds, &below, quant_type);
                    // Even elements are in the high nibble of their byte.
                    let shift = comptime!((i as u32 / 2) * 8 + 4 - (i as u32 % 2) * 4);
                    word |= code << shift;
                }
                // Beyond an odd tensor's end, the last byte's other half is the code of zero and further bytes
                // are padding.
                let left = elements - (first + w * 8);
                if left < 7 {
                    // The bits of the bytes that hold them.
                    let bits = ((left + 1) * 4) as u32 & 24;
                    word &= (1u32 << bits) - 1u32;
                }
                // A block of zeros has code 0, whatever 0 * (1 / 0) may be here.
                codes[first / 8 + w] = select(max == 0, 0u32, word);
            }
        }
    }
}

/// The 4-bit code of a value, given the reciprocal of its block's absmax, and NF4's cells.
#[cube]
fn encode(
    value: f32,
    inverse: f32,
    thresholds: &Shared<[f32]>,
    below: &Shared<[u32]>,
    #[comptime] quant_type: QuantType,
) -> u32 {
    let x = value * inverse;
    match quant_type {
        QuantType::Nf4 => {
            // Beyond 2^23 the last bit is one: what is added is rounded to a whole number, in the low bits. A NaN
            // stays within the table.
            let cell = (u32::reinterpret(x * 16.0f32 + 8_388_624.0f32) & 63) as usize;
            below[cell] + u32::cast_from(x > thresholds[cell])
        }
        QuantType::Fp4 => {
            let x = x.abs();
            let a = x > fp4_threshold(3usize);
            let b = x > select(a, fp4_threshold(5usize), fp4_threshold(1usize));
            let c_low = select(b, fp4_threshold(2usize), fp4_threshold(0usize));
            let c_high = select(b, fp4_threshold(6usize), fp4_threshold(4usize));
            let c = x > select(a, c_high, c_low);
            let rank = (u32::cast_from(a) << 2) | (u32::cast_from(b) << 1) | u32::cast_from(c);
            let code = (u32::new(FP4_ORDER_NIBBLES as i64) >> (rank * 4)) & 7;
            code | (u32::cast_from(value < 0.0f32) << 3)
        }
    }
}

#[cube]
fn fp4_threshold(#[comptime] i: usize) -> f32 {
    f32::new(comptime!(FP4_THRESHOLDS[i]))
}

/// 1 / absmax, given absmax's bits: see [`crate::reciprocal`].
#[cube]
fn reciprocal(bits: u32, table: &[f32]) -> f32 {
    let exponent = bits >> 23;
    if (bits & 0xffff) == 0 && exponent <= MAX_EXPONENT {
        // 1 / (m * 2^e) = (1 / m) * 2^-e: e leaves the exponent of the mantissa's reciprocal.
        let mantissa = table[RECIPROCALS_START + ((bits >> 16) & 127) as usize];
        f32::reinterpret(u32::reinterpret(mantissa) + ONE - (exponent << 23))
    } else {
        1.0f32 / f32::reinterpret(bits)
    }
}

/// A magnitude as an integer of the same order.
#[cube]
fn magnitude(value: f32) -> u32 {
    u32::reinterpret(value) & 0x7fff_ffffu32
}

#[cube]
fn larger(a: u32, b: u32) -> u32 {
    select(a > b, a, b)
}

#[cube]
fn normal_or_zero(magnitude: u32) -> u32 {
    select(magnitude < MIN_NORMAL, 0u32, magnitude)
}

/// One nested block of 256 absmax per cube, one absmax per unit.
#[cube(launch_unchecked)]
fn quantize_nested_kernel(
    absmax: &[f32],
    table: &[f32],
    codes: &mut [u32],
    nested_absmax: &mut [f32],
    mean: &[f32],
    blocks: usize,
    nested_blocks: usize,
) {
    let unit = UNIT_POS as usize;
    let block = CUBE_POS * UNITS + unit;
    let offset = mean[0];
    if CUBE_POS == 0 && unit == 0 {
        nested_absmax[nested_blocks] = offset;
    }
    let mut thresholds = Shared::<[f32]>::new_slice(255usize);
    let mut shared = Shared::<[u32]>::new_slice(UNITS);
    if unit < 255 {
        thresholds[unit] = table[THRESHOLDS_START + unit];
    }
    let mut centred = 0.0f32;
    if block < blocks {
        centred = absmax[block] - offset;
    }
    shared[unit] = magnitude(centred);
    sync_cube();
    #[unroll]
    for level in 0..comptime!(UNITS.ilog2()) {
        let stride = comptime!(UNITS >> (level as usize + 1));
        if unit < stride {
            shared[unit] = larger(shared[unit], shared[unit + stride]);
        }
        sync_cube();
    }
    let max = normal_or_zero(shared[0]);
    // Everyone has read the maximum before the buffer takes the codes.
    sync_cube();

    let inverse = 1.0f32 / f32::reinterpret(max);
    let scaled = centred * inverse;
    let mut code = 0usize;
    #[unroll]
    for level in 0..8usize {
        let step = comptime!(128usize >> level);
        if scaled > thresholds[code + step - 1] {
            code += step;
        }
    }
    if max == 0 || block >= blocks {
        code = 0usize;
    }
    shared[unit] = code as u32;
    sync_cube();

    if unit == 0 && block < blocks {
        nested_absmax[CUBE_POS] = f32::reinterpret(max);
    }
    // The first quarter of the units pack four codes each.
    let word = CUBE_POS * comptime!(UNITS / 4) + unit;
    if unit < comptime!(UNITS / 4) && word * 4 < blocks {
        codes[word] = shared[4 * unit]
            | (shared[4 * unit + 1] << 8)
            | (shared[4 * unit + 2] << 16)
            | (shared[4 * unit + 3] << 24);
    }
}
