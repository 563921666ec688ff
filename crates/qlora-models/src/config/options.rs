//! What a user may say about how `config.json` is read.

use std::collections::BTreeSet;

/// How [`ModelConfig::from_dir_with`](super::ModelConfig::from_dir_with) reads a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConfigOptions {
    /// Keys that are passed over where they are not known, although they may change what a model computes. Dots lie between
    /// levels: `rope_parameters.alpha`.
    pub accept_keys: BTreeSet<String>,
}

impl ConfigOptions {
    /// Options that accept these keys.
    pub fn accepting(keys: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { accept_keys: keys.into_iter().map(Into::into).collect() }
    }
}
