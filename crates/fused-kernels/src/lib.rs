//! Kernels of a decoder on CubeCL's stream and memory, one module per operation.
//!
//! | module | operation | written in |
//! |---|---|---|
//! | [`adapted_norms`] | norms of a weight's rows with a low-rank update, as DoRA's | CubeCL |
//! | [`add_norm`] | a residual connection and the normalisation behind it | CubeCL |
//! | [`attention`] | causal attention whose scores never reach memory | CUDA C++ |
//! | [`candidates`] | the largest logits of each row, to draw from | CubeCL |
//! | [`causal_conv`] | the short convolution of linear attention | CubeCL |
//! | [`columns`] | a factor for each output feature, as DoRA's | CubeCL |
//! | [`cross_entropy`] | the loss of next-token prediction, its gradient written over the logits | CubeCL |
//! | [`delta_rule`] | linear attention with the gated delta rule | CUDA C++ |
//! | [`likeliest`] | the likeliest token of each row of logits | CubeCL |
//! | [`low_rank`] | the products of LoRA with a narrow side | CUDA C++ |
//! | [`paged_attention`] | attention of generation over a paged cache | CubeCL, CUDA C++ |
//! | [`rms_norm`] | root mean square normalisation | CubeCL |
//! | [`rope`] | rotary position embeddings | CubeCL |
//! | [`rotate_into_cache`] | rotary embeddings of new tokens, and their keys and values into a paged cache | CubeCL |
//! | [`gated`] | SwiGLU, GeGLU and their kin | CubeCL |
//!
//! Each module has its oracle, and launch functions on CubeCL handles. A launch takes its buffers in one struct with a
//! named field for each (`Forward`, `Backward` and their like), so that no two can be mistaken for each other.
//!
//! Modules in CUDA C++ have `supports` too: where a device is not supported (other runtimes than CUDA, GPUs before
//! Ampere) callers compose the operation from stock ones. Modules in CubeCL run wherever CubeCL does.

pub mod adapted_norms;
pub mod add_norm;
pub mod attention;
pub mod candidates;
pub mod causal_conv;
pub mod columns;
pub mod cross_entropy;
pub mod delta_rule;
mod dropout;
mod elementwise;
mod error;
pub mod experts;
pub mod gated;
pub mod likeliest;
pub mod low_rank;
pub mod paged_attention;
pub mod rms_norm;
pub mod rope;
pub mod rotate_into_cache;

pub use cuda_source::FloatFormat;
pub use dropout::{Dropout, dropout_hash, noise_unit};
pub use elementwise::{Matrix, supports};
pub use error::KernelError;
