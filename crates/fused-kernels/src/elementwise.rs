//! What the CubeCL kernels share: formats, vector widths, grids, checks.

use cubecl::client::Client;
use cubecl::features::TypeUsage;
use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;
use cubecl::server::{CubeCountSelection, Handle};

use crate::KernelError;
use crate::error::check_size;

/// Units per cube.
pub(crate) const UNITS: usize = 256;
/// The most elements of a tensor: 32-bit indices with room for what the last cube overshoots.
const MAX_ELEMENTS: usize = u32::MAX as usize - (1 << 20);

/// The dtype of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl Format {
    /// Every format.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    pub(crate) fn elem_type(self) -> ElemType {
        ElemType::Float(match self {
            Self::F32 => FloatKind::F32,
            Self::F16 => FloatKind::F16,
            Self::Bf16 => FloatKind::BF16,
        })
    }
}

/// Whether a runtime has buffers of a format. WGSL has no bfloat16, and float16 where the device offers it.
pub fn supports(client: &Client, format: Format) -> bool {
    client.features().type_usage(format.elem_type()).is_superset(TypeUsage::Buffer | TypeUsage::Conversion)
}

/// Fails where `format` is not [supported](supports).
pub(crate) fn check_format(client: &Client, operation: &'static str, format: Format) -> Result<(), KernelError> {
    match supports(client, format) {
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
pub(crate) fn vector_size(client: &Client, format: Format, lengths: &[usize]) -> usize {
    let fits = |n: &usize| *n <= 8 && n * format.size() <= 16 && lengths.iter().all(|length| length.is_multiple_of(*n));
    client.io_optimized_vector_sizes(format.size()).find(fits).unwrap_or(1)
}

/// A grid of at least `cubes` cubes.
pub(crate) fn cube_count(client: &Client, cubes: usize) -> CubeCount {
    CubeCountSelection::new(client, cubes as u32).cube_count()
}

/// Units that share a row of `width` elements: one for each eight elements, 32 to 256.
pub(crate) fn units_per_row(width: usize) -> usize {
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
