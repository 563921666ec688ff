//! QLoRA fine-tuning on Burn: quantize a Hugging Face checkpoint to 4 bits while it loads, train LoRA
//! adapters over it, save them as PEFT does.
//!
//! This crate has no logic of its own. It re-exports the workspace's crates, and here at the top
//! the names that most programs need:
//!
//! ```no_run
//! # fn main() -> Result<(), burn_qlora::TrainError> {
//! use burn_qlora::{Resume, TrainConfig, Trainer};
//!
//! let mut config = TrainConfig::load("qlora.toml")?;
//! config.set("train.learning_rate", "1e-4")?;
//! let summary = Trainer::new(config, Resume::No, &mut ())?.run()?;
//! assert!(summary.last_loss < summary.first_loss);
//! # Ok(())
//! # }
//! ```
//!
//! | crate | what it has |
//! |---|---|
//! | [`qlora_train`] | configuration, training loop, checkpoints, metrics, report |
//! | [`qlora_data`] | rows of text to batches of tokens |
//! | [`qlora_dist`] | processes that train together: places, rendezvous, operations over TCP |
//! | [`qlora_models`] | the decoder, streaming load, generation |
//! | [`qlora_serve`] | many answers at once over one base: batching, paged cache, adapters by name, HTTP |
//! | [`chat_text`] | tokenizers, chat templates, masks |
//! | [`model_hub`] | models and adapters from the Hugging Face hub, and to it |
//! | [`qlora_layers`] | 4-bit linear layers, LoRA, their hand-written backward passes |
//! | [`paged_optim`] | AdamW and Lion for Burn modules, 32-bit and 8-bit, with state that is paged to host memory |
//! | [`adapter_io`] | safetensors shards, bitsandbytes 4-bit weights, PEFT adapters |
//! | [`nf4_quant`] | the NF4 and FP4 codec and its kernels |

// Whole crates, for what has no short name here.
pub use {
    adapter_io, chat_text, model_hub, nf4_quant, paged_optim, qlora_data, qlora_dist, qlora_layers, qlora_models,
    qlora_serve, qlora_train,
};

// Training: a configuration, a run, and what it leaves behind.
pub use paged_optim::{Budget, OptimizerKind, Paging};
pub use qlora_layers::{ActivationCheckpointing, LayerError, LoraConfig, TargetModules};
pub use qlora_train::report::Summary;
pub use qlora_train::{
    Checkpointing, Engine, Plan, Policies, Residency, Resume, Room, RowSizes, Start, StepOutput, TrainConfig,
    TrainError, TrainEvents, Trainer, calibrate, checkpoint, compute_dtype, config, metrics, profile, report,
};

// Text and data: conversations to token ids, files to batches.
pub use chat_text::{ChatError, ChatTemplate, Message, Tokenizer};
pub use qlora_data::{Batch, DataConfig, DataError, Dataset, Example, load_rows, load_splits};

// The hub: models and adapters from it, and to it.
pub use model_hub::{Hub, HubError};

// Models: on a device, with adapters, answering.
pub use burn::tensor::{Device, FloatDType};
pub use nf4_quant::{QuantConfig, QuantType, Quantized4bit};
pub use qlora_layers::Pass;
pub use qlora_models::{
    AdapterSet, AdapterSource, Decoder, KvCache, LoadOptions, LoadProgress, ModelConfig, ModelError,
    default_compute_dtype, device_memory, select_device,
};

// Answers: one, or many at once.
pub use qlora_serve::{Engine as ServingEngine, EngineConfig, Generation, Request, Sampling, ServeError, generate};

// Files: checkpoints and adapters of other programs, merged and converted.
pub use adapter_io::{
    Adapter, AdapterConfig, BnbOptions, Checkpoint, Combination, FormatError, GptqOptions, MergeBase, MergeOptions,
    MergeReport, Progress, atomic, combine, gguf, merge_checkpoint, quantize_checkpoint,
};

/// README.md's example, compiled.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
pub struct ReadmeExamples;
