//! AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101) over Burn tensors.
//!
//! The update is PyTorch's, operation by operation, with decoupled weight decay:
//!
//! ```text
//! p ← p − lr · weight_decay · p
//! m ← β₁ m + (1 − β₁) g
//! v ← β₂ v + (1 − β₂) g²
//! p ← p − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
//! ```
//!
//! Parameters are known by their position. Moments are f32 and can be taken out and put back bit
//! for bit, so a training run can stop and go on as if it had not. Burn's own AdamW differs in its
//! default ε (1e-5) and ties its state to module records, hence this one.

mod adamw;
mod clip;

pub use adamw::{AdamW, AdamWConfig, Moments, OptimError};
pub use clip::{clip_factor, global_norm};
