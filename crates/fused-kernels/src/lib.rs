//! Training kernels of a decoder: hand-written CUDA C++ on CubeCL's stream and memory, one module per operation.
//!
//! - [`attention`]: causal attention whose scores never reach memory
//! - [`low_rank`]: the products of LoRA with a narrow side
//!
//! Each module has `supports`, its oracle, and launch functions on CubeCL handles. Where a device is not
//! supported (other runtimes than CUDA, GPUs before Ampere) callers compose the operation from stock ones.

pub mod attention;
mod dropout;
mod error;
pub mod low_rank;

pub use dropout::{Dropout, dropout_hash};
pub use error::KernelError;

/// The 16-bit dtype of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HalfFormat {
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}
