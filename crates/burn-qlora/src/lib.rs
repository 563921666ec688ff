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
//! let mut config = TrainConfig::load("qlora.toml".as_ref())?;
//! config.set("train.learning_rate", "1e-4")?;
//! let summary = Trainer::new(config, &Resume::No, &mut ())?.run(&mut ())?;
//! assert!(summary.last_loss < summary.first_loss);
//! # Ok(())
//! # }
//! ```
//!
//! | crate | what it has |
//! |---|---|
//! | [`qlora_train`] | configuration, data, training loop, checkpoints, metrics, report |
//! | [`qlora_models`] | the decoder, streaming load, tokenizer, chat templates, generation |
//! | [`qlora_layers`] | 4-bit linear layers, LoRA, their hand-written backward passes |
//! | [`paged_optim`] | AdamW and Lion for Burn modules, 32-bit and 8-bit, with state that is paged to host memory |
//! | [`adapter_io`] | safetensors shards, bitsandbytes 4-bit weights, PEFT adapters |
//! | [`nf4_quant`] | the NF4 and FP4 codec and its kernels |

pub use adapter_io;
pub use nf4_quant;
pub use paged_optim;
pub use qlora_layers;
pub use qlora_models;
pub use qlora_train;

pub use adapter_io::{Adapter, AdapterConfig, Checkpoint};
pub use burn::tensor::Device;
pub use nf4_quant::{QuantConfig, QuantType, Quantized4bit};
pub use qlora_layers::{LoraConfig, TargetModules};
pub use qlora_models::chat_template::Message;
pub use qlora_models::tokenizer::Tokenizer;
pub use qlora_models::{
    AdapterSet, AdapterSource, Decoder, GenerateOptions, LoadOptions, ModelError, generate, select_device,
};
pub use qlora_train::report::Summary;
pub use qlora_train::{Resume, TrainConfig, TrainError, TrainEvents, Trainer};

/// README.md's example, compiled.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
pub struct ReadmeExamples;
