//! The crate's error type.

use cubecl::server::Handle;

use crate::FloatFormat;

/// Why a kernel was not launched.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// The device can't run the kernels.
    #[error("{runtime} can't run {operation}: it needs CUDA and a GPU of compute capability 8.0 or later")]
    Unsupported {
        /// The client's runtime.
        runtime: String,
        /// The module.
        operation: &'static str,
    },
    /// The device has no buffers of this format, or there is no kernel for it.
    #[error("{runtime} can't run {operation} on {format:?}")]
    Format {
        /// The client's runtime.
        runtime: String,
        /// The module.
        operation: &'static str,
        /// The format.
        format: FloatFormat,
    },
    /// A dimension that must not be odd, or must divide another.
    #[error("{operation}: {reason}")]
    Shape {
        /// The module.
        operation: &'static str,
        /// What does not fit.
        reason: String,
    },
    /// A rank that no kernel was made for.
    #[error("rank {0} is not supported: the low-rank kernels take 1 to 256")]
    Rank(usize),
    /// A dimension beyond what 32-bit indices reach.
    #[error("`{name}` is {value}: the kernels take up to {limit}")]
    TooLarge {
        /// The dimension: `tokens`, `features`.
        name: &'static str,
        /// Its value.
        value: usize,
        /// The largest possible one.
        limit: usize,
    },
    /// A buffer that is too short for the shapes.
    #[error("`{name}` holds {actual} bytes where {expected} are needed")]
    BufferSize {
        /// The buffer, by the parameter's name.
        name: &'static str,
        /// Bytes that the shapes ask for.
        expected: usize,
        /// Bytes that the handle has.
        actual: usize,
    },
    /// A buffer whose start is not a multiple of its elements' size.
    #[error("`{name}` starts at byte {offset} of its allocation, which is no multiple of {size}")]
    Alignment {
        /// The buffer, by the parameter's name.
        name: &'static str,
        /// Where it starts.
        offset: usize,
        /// The size of its elements.
        size: usize,
    },
    /// A head that no attention kernel was made for.
    #[error("head_dim {0} is not supported: the attention kernels take multiples of 8 up to 256")]
    HeadDim(usize),
    /// Query heads that can't share the key heads evenly.
    #[error("{heads} query heads can't share {kv_heads} key heads evenly")]
    Heads {
        /// Query heads.
        heads: usize,
        /// Key and value heads.
        kv_heads: usize,
    },
    /// An attention option out of its range.
    #[error("attention's {name} is {value}: {reason}")]
    Attention {
        /// The option, or part of the shape.
        name: &'static str,
        /// Its value.
        value: String,
        /// The range.
        reason: &'static str,
    },
    /// CUDA refused.
    #[error("{operation}: {message}")]
    Launch {
        /// The module.
        operation: &'static str,
        /// What the driver or compiler said.
        message: String,
    },
}

/// Fails where a buffer holds fewer than `expected` bytes.
pub(crate) fn check_size(name: &'static str, handle: &Handle, expected: usize) -> Result<(), KernelError> {
    match handle.size_in_used() as usize {
        actual if actual < expected => Err(KernelError::BufferSize { name, expected, actual }),
        _ => Ok(()),
    }
}
