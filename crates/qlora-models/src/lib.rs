//! Decoder-only language models, built from a Hugging Face `config.json` and loaded straight into 4 bits.
//!
//! - [`ModelConfig`] reads `config.json`; `family` is the table of what families differ in.
//! - [`Decoder`] is the one decoder that serves every family; [`Decoder::load`] streams a checkpoint
//!   into it tensor by tensor.
//! - [`adapters`]: attach, load, switch, combine, export and merge adapters of every kind that PEFT writes.
//! - [`KvCache`]: one sequence, token by token; [`PagedCache`]: many of any length, with different adapters.
//!
//! A model takes and gives token ids; `chat-text` makes them of text.

pub mod adapters;
mod beside;
mod block;
mod config;
mod decoder;
mod delta_net;
mod device;
mod embedding;
mod error;
mod family;
mod held;
mod host_memory;
mod kernel_cache;
mod kv_cache;
mod latent;
mod layer_inputs;
mod loader;
mod mlp;
mod moe;
mod named;
mod norm;
mod paged;
mod passed;
mod probe;
mod recorded;
mod rope;
mod router;
mod sequence;
mod shared_expert;
mod short_conv;
mod stacks;
mod streamed;

pub use adapters::{AdapterSet, AdapterSource, CalibrationBatch, ParameterKind, TrainedTokens};
pub use block::{Block, BlockInPass};
pub use config::{
    AttentionKind, ConfigOptions, ExpertsConfig, GroupedScores, LatentConfig, LayerInputsConfig, LinearAttentionConfig,
    LinearRole, LinearSpec, ModelConfig,
};
pub use decoder::Decoder;
pub use device::{check_compute_dtype, default_compute_dtype, device_memory, held_memory, peak_memory, select_device};
pub use error::ModelError;
pub use held::HeldWeights;
pub use host_memory::host_memory;
pub use kernel_cache::kernel_cache_folder;
pub use kv_cache::KvCache;
pub use loader::{LoadOptions, LoadProgress};
pub use norm::RmsNorm;
pub use paged::{CachedRow, PagedCache, Part, RowLogits};
pub use probe::{MergeProbe, Probed, probe_merge};
pub use qlora_layers::candidates::{Candidates, CandidatesRest, RowCandidates};
pub use qlora_layers::ops::fused::Activation;
pub use recorded::Step;
pub use rope::{Pairs, QueryGrowth, Rope, RopeScaling};
pub use sequence::Sequence;
pub use streamed::{Placement, Streams};
