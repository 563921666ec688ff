//! Burn layers over frozen 4-bit weights.
//!
//! - [`ops`]: backend extensions (Flex, every CubeCL runtime, autodiff) for the 4-bit products, attention and dropout.
//! - [`Linear4bit`]: a frozen NF4 or FP4 weight; its backward yields dX and nothing else.
//! - [`LoraLinear`]: a frozen weight (4-bit or dense) with an optional low-rank adapter, [`LoraAdapter`], or a trained
//!   copy; [`LoraEmbedding`]: the same for an embedding table; [`Dora`]: magnitudes for either.
//! - [`target_modules`]: which linear layers get an adapter, with PEFT's matching rules.
//! - [`activation_checkpointing`]: recompute blocks in the backward pass instead of keeping what they saw, or keep it in
//!   the host's memory.
//!
//! Layers are plain structs of tensors. Frozen weights never enter the autodiff graph: they are held
//! without autodiff, and Burn treats such operands as constants. Whether a pass records a graph is
//! decided by [`Pass`], so training, evaluation and generation run the same `forward`.

pub mod activation_checkpointing;
mod dora;
mod embedding;
mod error;
mod linear_4bit;
mod lora;
mod lora_config;
mod lora_linear;
mod offload;
pub mod ops;
mod pass;
pub mod target_modules;
mod trained;

pub use activation_checkpointing::ActivationCheckpointing;
pub use dora::Dora;
pub use embedding::LoraEmbedding;
pub use error::LayerError;
pub use linear_4bit::{FrozenLinear, Linear4bit};
pub use lora::LoraAdapter;
pub use lora_config::{Initialization, LoraConfig};
pub use lora_linear::{InputObserver, LoraLinear, WholeLinear};
pub use pass::{Pass, mix};
pub use target_modules::TargetModules;
pub use trained::track;
