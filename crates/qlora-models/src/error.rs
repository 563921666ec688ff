//! Errors of this crate. Each names the file, field or tensor at fault and what to do.

use std::path::PathBuf;

use host_copies::DeviceError;

/// What can go wrong while a model is found, read or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A file can't be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not valid JSON.
    #[error("{}: not valid JSON: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A field of a JSON file has a value that can't be used.
    #[error("{}: `{field}` {problem}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The field, dots between levels.
        field: String,
        /// What is wrong with it and what is expected.
        problem: String,
    },
    /// The device's memory can't be limited.
    #[error("{variable}={value}: {problem}; unset it to use the device as it is")]
    MemoryLimit {
        /// The environment's variable.
        variable: &'static str,
        /// Its value.
        value: String,
        /// Why.
        problem: String,
    },
    /// The environment names no way of loading.
    #[error("{variable}={value}: write \"host\" to have weights quantized by the processor, or unset it")]
    Loading {
        /// The environment's variable.
        variable: &'static str,
        /// Its value.
        value: String,
    },
    /// A format that the device does not compute in.
    #[error(
        "quantization.compute_dtype = \"{dtype}\": {device} does not compute in {dtype}: use {instead}, or \"auto\""
    )]
    ComputeDtype {
        /// The format.
        dtype: String,
        /// The device, as far as that matters.
        device: String,
        /// What it computes in.
        instead: String,
    },
    /// A checkpoint or adapter file.
    #[error(transparent)]
    Format(#[from] adapter_io::FormatError),
    /// A LoRA setting or a layer's tensor.
    #[error(transparent)]
    Layer(#[from] qlora_layers::LayerError),
    /// Dense weights were to be streamed.
    #[error(
        "model.residency: only 4-bit weights can wait in the host's memory: set quantization.quant_type to \"nf4\" or \"fp4\", or model.residency to \"device\""
    )]
    Streamed,
    /// Blocks that are streamed can't be had: the device has no room for two at a time, or whatever else has a part in them failed.
    #[error(
        "model.residency: blocks that wait elsewhere, two of which need room on the device, can't be had: {source}"
    )]
    Slots {
        /// What it said.
        source: DeviceError,
    },
    /// A quantization setting.
    #[error("quantization: {0}")]
    Quantization(#[from] nf4_quant::QuantError),
    /// A weight can't be quantized.
    #[error("{module}.weight can't be quantized: {source}")]
    Quantize {
        /// The module.
        module: String,
        /// Why.
        source: nf4_quant::QuantError,
    },
    /// A 4-bit weight or an adapter's factor has another shape than the model asks for.
    #[error("{module}: expected shape {expected:?}, found {found:?}; do config.json and the weights belong together?")]
    WeightShape {
        /// The module.
        module: String,
        /// The shape that `config.json` asks for.
        expected: Vec<usize>,
        /// The shape that came.
        found: Vec<usize>,
    },
    /// A checkpoint has a tensor of the language model that its model type has no place for.
    #[error(
        "{}: `{tensor}` has no place in a model of type {model_type} with this config.json; \
         without it the model would compute something else",
        dir.display()
    )]
    UnexpectedTensor {
        /// The checkpoint's folder.
        dir: PathBuf,
        /// The tensor.
        tensor: String,
        /// The model type.
        model_type: &'static str,
    },
    /// An adapter uses something that would change its output if it were ignored.
    #[error("adapter_config.json: `{feature}` is set, and adapters with it are not supported")]
    AdapterFeature {
        /// The key in `adapter_config.json`.
        feature: String,
    },
    /// An adapter was initialised from its base's weights, which it needs changed.
    #[error("adapter_config.json: init_lora_weights is \"{method}\": {problem}")]
    AdapterInit {
        /// The method.
        method: String,
        /// Why it can't be used so, and what would do.
        problem: String,
    },
    /// A module would be adapted and trained in full.
    #[error("{module} is named by both lora.target_modules and lora.modules_to_save: leave it out of one")]
    AdapterClash {
        /// The module.
        module: String,
    },
    /// Rows of single tokens can't be trained, or not so.
    #[error("trainable_token_indices: {problem}")]
    TrainedTokens {
        /// What is wrong and what to do.
        problem: String,
    },
    /// A module that is to be left unquantized is not there.
    #[error(
        "quantization.skip_modules: `{name}` is in the path of no linear layer of the model: give whole parts of one"
    )]
    SkippedModule {
        /// The name.
        name: String,
    },
    /// Tables can't grow while an adapter is on them.
    #[error("the embeddings can't be resized while an adapter is on the model: unload it first")]
    ResizeAdapted,
    /// The base's weights are not the checkpoint's any more.
    #[error(
        "attaching this adapter changed the base weight of {module} (initialisation by PiSSA, OLoRA or LoftQ); \
         reload the model before attaching another"
    )]
    BaseChanged {
        /// The module.
        module: String,
    },
    /// An initialisation does not fit the model or the data.
    #[error("lora.init = \"{init}\"{}: {problem}", module.as_ref().map(|m| format!(" on {m}")).unwrap_or_default())]
    Initialization {
        /// The initialisation.
        init: String,
        /// The module at fault, if it is one.
        module: Option<String>,
        /// What does not fit and what would.
        problem: String,
    },
    /// There is no adapter to export.
    #[error("the model has no adapter: attach or load one first")]
    NoAdapter,
    /// A name in a set of adapters.
    #[error("adapter `{name}`: {problem}")]
    AdapterName {
        /// The name.
        name: String,
        /// What is wrong with it, and which names there are.
        problem: String,
    },
    /// An adapter has weights for a module that the model lacks.
    #[error(
        "the adapter has weights for `{module}`, which this model does not have: it was made for another base model"
    )]
    AdapterModule {
        /// The module.
        module: String,
    },
    /// Merging into 4 bits.
    #[error("{module} is quantized: merge the adapter into the full-precision base (load it with quantization off)")]
    MergeQuantized {
        /// The module.
        module: String,
    },
    /// A device is unknown or does not answer.
    #[error("device `{device}`: {reason}")]
    NoDevice {
        /// The device as given.
        device: String,
        /// What is known or what to check.
        reason: String,
    },
    /// The device does not compute in the dtype asked for.
    #[error("{device} does not support {dtype}; choose another quantization.compute_dtype, such as f32")]
    Dtype {
        /// The dtype.
        dtype: String,
        /// The device.
        device: String,
    },
    /// Work on the device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The model gives no numbers.
    #[error(
        "the model's logits are not numbers (NaN): its activations overflow in this compute dtype; try bf16 or f32"
    )]
    NotANumber,
}
