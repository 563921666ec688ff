//! The file formats of others: Hugging Face checkpoints, bitsandbytes 4-bit weights, PEFT adapters.
//!
//! Everything here works on host memory and streams: a checkpoint is memory-mapped and read tensor
//! by tensor, a sharded one is written tensor by tensor. No tensor library and no GPU is involved.
//!
//! | module | format |
//! |---|---|
//! | [`checkpoint`] | `model.safetensors`, or shards with `model.safetensors.index.json` |
//! | [`sources`] | FP8, MXFP4, NVFP4, GPTQ and AWQ weights inside such a checkpoint, decoded while they are read |
//! | [`bnb`], [`mod@quantize_checkpoint`] | bitsandbytes 4-bit weights inside such a checkpoint, read and written |
//! | [`adapter_config`], [`adapter`] | PEFT's `adapter_config.json` and `adapter_model.safetensors` |
//! | [`lora_module`], [`mod@combine`] | what an adapter holds for one module; several adapters in one |
//! | [`token_rows`] | rows of an embedding or a head that an adapter replaces |
//! | [`low_rank`] | parts of a weight that adapters start from |
//! | [`mod@merge_checkpoint`] | a base checkpoint and an adapter in one |
//! | [`gguf`] | GGUF files of llama.cpp: models and LoRA adapters written, both read |
//! | [`gptq`], [`mod@gptq_checkpoint`] | GPTQ: the algorithm given a layer's Hessian, and what engines load |
//! | [`shard_writer`] | writing a checkpoint as transformers lays it out |
//! | [`checksum`] | SHA-256 of a folder's files, and a cheap identity of a checkpoint's weights |
//! | [`finite`] | NaN and infinities in weights |
//! | [`listing`], [`mod@printable`] | what a checkpoint holds, in words that are fit for a terminal |
//! | [`atomic`] | replacing files and folders without ever leaving a half-written one |
//!
//! Files are untrusted input: sizes are checked before memory is taken, names that lead out of a
//! folder are refused, and every error names the file and the tensor or field at fault.

#[cfg(target_endian = "big")]
compile_error!("safetensors data is little-endian and is read in place; big-endian hosts are not supported");

pub mod adapter;
pub mod adapter_config;
mod adapter_names;
pub mod atomic;
pub mod bnb;
pub mod checkpoint;
pub mod checksum;
mod cholesky;
pub mod combine;
mod config_field;
pub mod convert;
mod eigen;
mod error;
pub mod experts;
pub mod finite;
pub mod gguf;
pub mod gptq;
pub mod gptq_checkpoint;
mod header;
mod host_tensor;
mod json;
mod linalg;
pub mod listing;
pub mod lora_module;
pub mod low_rank;
mod mapped;
pub mod merge_checkpoint;
mod merge_plan;
mod paths;
mod pattern;
pub mod printable;
mod products;
pub mod quantize_checkpoint;
pub mod shard_writer;
pub mod sources;
pub mod token_rows;

pub use adapter::Adapter;
pub use adapter_config::{
    AdapterConfig, InitLoraWeights, ModuleScaling, OneOrMany, Pattern, TargetModules, TokenIndices,
};
pub use bnb::BnbConfig;
pub use checkpoint::Checkpoint;
pub use combine::{Combination, combine};
pub use convert::{OnProgress, Progress};
pub use error::FormatError;
pub use gptq::{GptqOptions, GptqWeight};
pub use gptq_checkpoint::{GptqCheckpoint, GptqReport, gptq_checkpoint};
pub use header::TensorSpec;
pub use host_tensor::HostTensor;
pub use lora_module::{LoraModule, ModuleKind, WeightChange};
pub use mapped::{Floats, TensorView};
pub use merge_checkpoint::{
    LayerReport, MergeOptions, MergeReport, TensorReport, merge_checkpoint, merge_checkpoint_checked,
};
pub use merge_plan::MergeBase;
pub use quantize_checkpoint::{BnbOptions, QuantizeReport, quantize_checkpoint};
pub use shard_writer::ShardedWriter;
pub use sources::DenseTensor;
pub use token_rows::TokenRows;

pub use safetensors::Dtype;
