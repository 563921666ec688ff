//! Keys that a user accepts by name.

use std::collections::BTreeSet;
use std::sync::{PoisonError, RwLock};

static ACCEPTED: RwLock<BTreeSet<String>> = RwLock::new(BTreeSet::new());

/// From now on in this program, keys of `config.json` with these names are passed over where they are not known, although they may
/// change what a model computes. Dots lie between levels: `rope_parameters.alpha`.
pub fn accept_keys(keys: impl IntoIterator<Item = String>) {
    ACCEPTED.write().unwrap_or_else(PoisonError::into_inner).extend(keys);
}

/// Whether a key was accepted.
pub(super) fn is_accepted(key: &str) -> bool {
    ACCEPTED.read().unwrap_or_else(PoisonError::into_inner).contains(key)
}
