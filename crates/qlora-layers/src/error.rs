//! Errors of this crate.

use host_copies::DeviceError;

/// What can be wrong with a LoRA configuration or the tensors given to a layer.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The layers of a mixture of experts that can't run as one.
    #[error("experts can't run as one product: {reason}")]
    Experts {
        /// What keeps them apart, and what to do.
        reason: String,
    },
    /// A LoRA setting is out of range.
    #[error("lora.{field} = {value}: {reason}")]
    Config {
        /// The setting.
        field: &'static str,
        /// Its value as given.
        value: String,
        /// The allowed range.
        reason: &'static str,
    },
    /// A regular expression does not compile.
    #[error("lora.{field}: `{pattern}` is not a valid regular expression: {source}")]
    Pattern {
        /// The setting.
        field: &'static str,
        /// The expression as given.
        pattern: String,
        /// What the regex engine said.
        source: Box<fancy_regex::Error>,
    },
    /// `target_modules` matches no module of the model.
    #[error("lora.target_modules = {given} matches no layer that can have an adapter; this model has: {candidates}")]
    NoTarget {
        /// The setting as given.
        given: String,
        /// The names it could have matched.
        candidates: String,
    },
    /// An entry of `modules_to_save` names no module of the model.
    #[error("lora.modules_to_save: `{given}` names no module of this model; it has: {candidates}")]
    NoSavedModule {
        /// The entry as given.
        given: String,
        /// The names it could have matched.
        candidates: String,
    },
    /// A tensor does not fit the layer it is meant for.
    #[error("{what}: expected shape {expected:?}, found {found:?}")]
    Shape {
        /// The tensor.
        what: String,
        /// The shape that fits.
        expected: Vec<usize>,
        /// The shape that came.
        found: Vec<usize>,
    },
    /// A quantized weight is not a matrix or its parts disagree.
    #[error("4-bit weight: {0}")]
    Weight(String),
    /// A layer that is to get an adapter has one already.
    #[error("{path} has an adapter already: load the module again to put another one on")]
    Adapted {
        /// The layer.
        path: String,
    },
    /// The configuration that an adapter is to be saved with is not that of the adapters that are there.
    #[error(
        "{path}: the given LoRA configuration asks for rank {expected}, the module has rank {found} (0 is no adapter): \
             pass the configuration that the adapters were made with"
    )]
    OtherAdapters {
        /// The layer.
        path: String,
        /// The configuration's rank.
        expected: usize,
        /// The module's rank.
        found: usize,
    },
    /// The configuration that an adapter is to be saved with scales updates in another way than the adapters that are there.
    #[error(
        "{path}: the given LoRA configuration scales updates by {expected}, the module's adapter by {found}: pass the alpha and \
             use_rslora that the adapters were made with"
    )]
    OtherScaling {
        /// The layer.
        path: String,
        /// The configuration's factor.
        expected: f32,
        /// The module's factor.
        found: f32,
    },
    /// An adapter's file names a module that is not there.
    #[error("the adapter holds {path}, which this module does not have; it has: {known}")]
    NoSuchModule {
        /// The module or tensor in the file.
        path: String,
        /// The modules there are.
        known: String,
    },
    /// A module with adapters lacks a part that an adapter's file has.
    #[error(
        "the adapter holds {name}, and the module's own adapters have no such part: load it onto the module without adapters, or make \
             them with the same use_dora and lora_bias"
    )]
    NotInModule {
        /// The tensor in the file.
        name: String,
    },
    /// An adapter's file lacks a part that a module with adapters has.
    #[error(
        "the module has adapters with {name}, which the adapter's file does not hold: load it onto the module without adapters, or \
             make them with the same target_modules, use_dora and lora_bias"
    )]
    NotInFile {
        /// The part, by its name in PEFT's files.
        name: String,
    },
    /// An adapter's file uses what is not implemented for Burn modules.
    #[error("the adapter's configuration sets {feature}, which is not implemented for Burn modules")]
    AdapterFeature {
        /// The key.
        feature: String,
    },
    /// A tensor's values do not come from its device.
    #[error("{what} can't be read: {source}")]
    Read {
        /// The tensor.
        what: String,
        /// What the device said.
        source: DeviceError,
    },
    /// An adapter's files.
    #[error(transparent)]
    File(#[from] adapter_io::FormatError),
}
