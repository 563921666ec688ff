//! What the CubeCL kernels share: formats, vector widths, grids, checks.

use cubecl::client::Client;
use cubecl::features::TypeUsage;
use cubecl::prelude::*;
use cubecl::server::{CubeCountSelection, Handle};
use cuda_source::FloatFormat;

use crate::KernelError;
use crate::error::check_size;

/// Units per cube.
pub(crate) const UNITS: usize = 256;
/// The most elements of a tensor: 32-bit indices with room for what the last cube overshoots.
const MAX_ELEMENTS: usize = u32::MAX as usize - (1 << 20);

/// Rows of one tensor, contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// Rows.
    pub rows: usize,
    /// Elements of a row.
    pub width: usize,
    /// Their format.
    pub format: FloatFormat,
}

impl Matrix {
    /// Elements of all rows.
    pub(crate) fn elements(self) -> usize {
        self.rows.saturating_mul(self.width)
    }

    /// Units that share a row.
    pub(crate) fn units(self) -> usize {
        units_per_row(self.width)
    }

    /// Cubes for all rows.
    pub(crate) fn cubes(self) -> usize {
        self.rows.div_ceil(UNITS / self.units())
    }

    /// The rows as kernels know them.
    pub(crate) fn launch(self) -> RowsLaunch {
        RowsLaunch::new(self.rows, self.width, self.units())
    }
}

/// What kernels know of a [`Matrix`].
#[derive(CubeType, CubeLaunch)]
pub(crate) struct Rows {
    pub rows: usize,
    pub width: usize,
    /// Units that share a row.
    #[cube(comptime)]
    pub units: usize,
}

/// Whether a runtime has buffers of a format. WGSL has no bfloat16, and float16 where the device offers it.
pub fn supports(client: &Client, format: FloatFormat) -> bool {
    client.features().type_usage(format.elem_type()).is_superset(TypeUsage::Buffer | TypeUsage::Conversion)
}

/// Fails where `format` is not [supported](supports).
pub(crate) fn check_format(client: &Client, operation: &'static str, format: FloatFormat) -> Result<(), KernelError> {
    match supports(client, format) {
        true => Ok(()),
        false => Err(KernelError::Format { runtime: client.name().to_owned(), operation, format }),
    }
}

/// Fails where `format` has not 16 bits, for the kernels on tensor cores.
pub(crate) fn check_half(client: &Client, operation: &'static str, format: FloatFormat) -> Result<(), KernelError> {
    match format.is_half() {
        true => Ok(()),
        false => Err(KernelError::Format { runtime: client.name().to_owned(), operation, format }),
    }
}

/// The buffer of `elements` elements of `size` bytes, in vectors of `vector`.
pub(crate) fn buffer(
    name: &'static str,
    handle: &Handle,
    elements: usize,
    size: usize,
    vector: usize,
) -> Result<BufferArg, KernelError> {
    if elements > MAX_ELEMENTS {
        return Err(KernelError::TooLarge { name, value: elements, limit: MAX_ELEMENTS });
    }
    check_size(name, handle, elements * size)?;
    // SAFETY: the handle was just seen to hold that many elements.
    Ok(unsafe { BufferArg::from_raw_parts(handle.clone(), elements / vector) })
}

/// The widest vector of `format`, at most 16 bytes, that divides each of `lengths`.
pub(crate) fn vector_size(client: &Client, format: FloatFormat, lengths: &[usize]) -> usize {
    let fits = |n: &usize| *n <= 8 && n * format.size() <= 16 && lengths.iter().all(|length| length.is_multiple_of(*n));
    client.io_optimized_vector_sizes(format.size()).find(fits).unwrap_or(1)
}

/// A grid of at least `cubes` cubes.
pub(crate) fn cube_count(client: &Client, cubes: usize) -> CubeCount {
    CubeCountSelection::new(client, cubes as u32).cube_count()
}

/// Units that share a row of `width` elements: one for each eight elements, 32 to 256.
fn units_per_row(width: usize) -> usize {
    (width / 8).next_power_of_two().clamp(32, UNITS)
}

/// How `reduce_row` joins two values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Reduction {
    Sum,
    Maximum,
}

/// Joins the values of the `units` units that share a row, in a fixed order; all of them get the result.
#[cube]
pub(crate) fn reduce_row(
    value: f32,
    shared: &mut Shared<[f32]>,
    #[comptime] units: usize,
    #[comptime] reduction: Reduction,
) -> f32 {
    let unit = UNIT_POS as usize;
    shared[unit] = value;
    sync_cube();
    // Four at a time; two in the last round where the power of two is odd. Every round costs a barrier.
    let rounds = comptime!(units.ilog2().div_ceil(2));
    #[unroll]
    for round in 0..rounds {
        let stride = comptime!(units >> (2 * (round + 1)).min(units.ilog2()));
        if unit % units < stride {
            let mut joined = shared[unit];
            #[unroll]
            for part in 1..comptime!((units >> (2 * round)) / stride) {
                let other = shared[unit + part * stride];
                match reduction {
                    Reduction::Sum => joined += other,
                    Reduction::Maximum => joined = max(joined, other),
                }
            }
            shared[unit] = joined;
        }
        sync_cube();
    }
    let joined = shared[unit - unit % units];
    // Everyone has read before the next values are written.
    sync_cube();
    joined
}
