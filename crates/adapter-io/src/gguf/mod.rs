//! GGUF, the files of llama.cpp: read with every check, written as its own converter writes them.
//!
//! Format (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>), version 3, little-endian: magic
//! `GGUF`, version, counts of tensors and of metadata entries, the entries, the tensors' names, sizes (the
//! fastest dimension first), types and offsets, then the data, each tensor aligned to 32 bytes.
//!
//! | module | |
//! |---|---|
//! | [`value`] | metadata values |
//! | [`blocks`] | ggml's block quantizers, bit for bit its reference |
//! | [`file`](mod@file) | reading |
//! | [`export`] | a checkpoint as GGUF, an adapter as LoRA GGUF |
//!
//! What differs between model types (tensor names, norms shifted by one, rotary layouts) is in
//! `architectures.json`, a table and not code, checked against `conversion/` of llama.cpp as packed in
//! llama-cpp-python 0.3.36.

mod agreement;
mod architecture;
pub mod blocks;
pub mod export;
pub mod file;
mod listed;
mod metadata;
mod sentencepiece;
mod tensors;
mod tokenizer;
pub mod value;
mod writer;

pub use blocks::GgmlType;
pub use export::{ExportReport, GgufOptions, export_gguf, export_lora_gguf};
pub use file::{GgufFile, GgufTensor};
pub use listed::GgufListing;
pub use value::{Array, Value};
