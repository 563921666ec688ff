//! Errors of this crate.

/// What can be wrong with a LoRA configuration or the tensors given to a layer.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
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
}
