//! The file formats of others: Hugging Face checkpoints, bitsandbytes 4-bit weights, PEFT adapters.
//!
//! Everything here works on host memory and streams: a checkpoint is memory-mapped and read tensor
//! by tensor, a sharded one is written tensor by tensor. No tensor library and no GPU is involved.
//!
//! | module | format |
//! |---|---|
//! | [`checkpoint`] | `model.safetensors`, or shards with `model.safetensors.index.json` |
//! | [`bnb`] | bitsandbytes 4-bit weights inside such a checkpoint, and `quantization_config` |
//! | [`adapter_config`], [`adapter`] | PEFT's `adapter_config.json` and `adapter_model.safetensors` |
//! | [`merge`] | `W + scaling * B A` |
//! | [`shard_writer`] | writing a checkpoint as transformers lays it out |
//! | [`atomic`] | replacing files and folders without ever leaving a half-written one |
//!
//! Files are untrusted input: sizes are checked before memory is taken, names that lead out of a
//! folder are refused, and every error names the file and the tensor or field at fault.

#[cfg(target_endian = "big")]
compile_error!("safetensors data is little-endian and is read in place; big-endian hosts are not supported");

pub mod adapter;
pub mod adapter_config;
pub mod atomic;
pub mod bnb;
pub mod checkpoint;
mod config_field;
mod error;
mod header;
mod json;
mod mapped;
pub mod merge;
mod paths;
pub mod shard_writer;

pub use adapter::{Adapter, HostTensor};
pub use adapter_config::{AdapterConfig, InitLoraWeights, OneOrMany, Pattern, TargetModules};
pub use bnb::BnbConfig;
pub use checkpoint::Checkpoint;
pub use error::FormatError;
pub use header::TensorSpec;
pub use mapped::{Floats, TensorView};
pub use merge::{lora_delta, merge_into};
pub use shard_writer::ShardedWriter;

pub use safetensors::Dtype;
