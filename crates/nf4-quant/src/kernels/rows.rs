//! A weight whose rows are multiplied by factors: the same codes, other absmax.
//!
//! Where blocks do not cross rows, a row's factor is one of its blocks', so the weight itself is never touched: 4 bytes per
//! block are written, 1/32 of a weight in 16 bits, and every kernel that takes a weight takes the product. An element is
//! codebook\[code\] * (absmax * factor), rounded as any other weight's is.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::dequantize::{Absmax, absmax_args, absmax_of, offset_of};
use super::{DeviceAbsmax, DeviceWeight, TABLE_LEN, UNITS, buffer, check_size, cube_count, tables};
use crate::QuantError;

/// Queues the absmax of a weight of rows of `columns` elements, each multiplied by its factor. The result has the weight's own
/// codes, and no double quantization.
///
/// # Shapes
///
/// `factors` holds one f32 for each row.
///
/// # Errors
///
/// As [`DeviceWeight::validate`]; [`QuantError::Rows`] where blocks cross rows; [`QuantError::BufferSize`] for `factors`.
pub fn scale_rows(
    client: &Client,
    weight: &DeviceWeight,
    factors: &Handle,
    columns: usize,
) -> Result<DeviceWeight, QuantError> {
    weight.validate()?;
    let DeviceWeight { blocksize, num_elements, .. } = *weight;
    if columns == 0 || !columns.is_multiple_of(blocksize) || !num_elements.is_multiple_of(columns) {
        return Err(QuantError::Rows { columns, blocksize, num_elements });
    }
    check_size("factors", factors, 4 * (num_elements / columns))?;
    let blocks = weight.num_blocks();
    let absmax = client.empty(4 * blocks);
    // SAFETY: the buffers' sizes are checked above, and the kernel stays within `blocks`.
    unsafe {
        scale_rows_kernel::launch_unchecked(
            client,
            cube_count(client, blocks.div_ceil(UNITS)),
            CubeDim::new_1d(UNITS as u32),
            absmax_args(weight),
            buffer(&tables(client), TABLE_LEN),
            buffer(factors, num_elements / columns),
            buffer(&absmax, blocks),
            blocks,
            columns / blocksize,
        );
    }
    Ok(DeviceWeight { absmax: DeviceAbsmax::Plain(absmax), ..weight.clone() })
}

#[cube(launch_unchecked)]
fn scale_rows_kernel(
    absmax: &Absmax,
    table: &[f32],
    factors: &[f32],
    scaled: &mut [f32],
    blocks: usize,
    blocks_per_row: usize,
) {
    let block = CUBE_POS * UNITS + UNIT_POS as usize;
    if block < blocks {
        let offset = offset_of(absmax);
        scaled[block] = absmax_of(absmax, offset, table, block) * factors[block / blocks_per_row];
    }
}
