//! Burn layers over frozen 4-bit weights.
//!
//! - [`ops`]: backend extensions (Flex, every CubeCL runtime, autodiff) for the 4-bit products, attention and dropout.
//! - [`Linear4bit`]: a frozen NF4 or FP4 weight; its backward yields dX and nothing else.
//! - [`LoraLinear`]: a frozen weight (4-bit or dense) with an optional low-rank adapter, [`LoraAdapter`], or a trained
//!   copy; [`LoraEmbedding`]: the same for an embedding table; [`Dora`]: magnitudes for either; [`TokenRows`]: rows of
//!   single tokens.
//! - [`ExpertStack`], [`ExpertAdapters`]: the layers of a mixture of experts in one memory, to run as one
//!   ([`ops::experts`]).
//! - [`apply_lora`]: adapters on the burn-nn linear layers of a module of your own; [`peft`]: those as PEFT's files.
//! - [`target_modules`]: which linear layers get an adapter, with PEFT's matching rules.
//! - [`streamed`]: frozen weights that wait in the host's memory, of which the device has those of a few blocks at a time.
//! - [`activation_checkpointing`]: recompute blocks in the backward pass instead of keeping what they saw, or keep it in
//!   the host's memory.
//!
//! Layers are Burn modules: trained factors are parameters that require gradients, frozen weights are parameters that do not,
//! so optimizers, visitors, records and device moves work as for any module. `forward` is for Burn's way of training, in which
//! the module's state says what is recorded (`train`, `valid`). `forward_in` is for a caller that decides for each pass, by
//! [`Pass`], what is recorded and which dropout masks are drawn: a trainer that recomputes blocks needs that.

pub mod activation_checkpointing;
pub mod candidates;
mod dora;
mod embedding;
mod error;
mod experts;
mod frozen_linear;
mod joined;
mod linear_4bit;
mod lora;
mod lora_config;
mod lora_linear;
mod lora_linear_config;
mod mixed;
mod module_lora;
mod module_paths;
mod offload;
pub mod ops;
mod params;
mod pass;
pub mod peft;
mod stacked;
pub mod streamed;
pub mod target_modules;
mod token_rows;

pub use activation_checkpointing::ActivationCheckpointing;
pub use dora::Dora;
pub use embedding::{EmbeddingAdapter, LoraEmbedding, LoraEmbeddingConfig};
pub use error::LayerError;
pub use experts::{ExpertAdapters, ExpertStack};
pub use frozen_linear::FrozenLinear;
pub use joined::{
    AdapterSpan, AdapterSpans, AdapterStack, JOINED_TOKENS, JoinedLayer, SPANS, can_join, forward_joined,
};
pub use linear_4bit::{Linear4bit, Linear4bitConfig};
pub use lora::LoraAdapter;
pub use lora_config::{Initialization, LoraConfig};
pub use lora_linear::{InputObserver, LoraLinear, WholeLinear};
pub use lora_linear_config::LoraLinearConfig;
pub use mixed::{by_part, forward_mixed};
pub use module_lora::{LoraForward, apply_lora};
pub use params::{Scaling, frozen, track, trainable};
pub use pass::{Pass, mix};
pub use stacked::{can_stack, forward_stacked};
pub use target_modules::TargetModules;
pub use token_rows::{TokenRows, with_mean_rows};
