//! What a repository must hold to be a model or an adapter, and which of its files are read.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Deserialize;

use crate::HubError;

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
/// The index of weights that lie in several files.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
const ADAPTER_CONFIG: &str = "adapter_config.json";
const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";

/// Files beside the weights that are read here, or go along when a model is merged or converted.
const SETTINGS: [&str; 15] = [
    CONFIG,
    ADAPTER_CONFIG,
    "generation_config.json",
    "quantize_config.json",
    "quant_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
];

/// `model.safetensors.index.json`: tensor name to file.
#[derive(Debug, Deserialize)]
struct WeightIndex {
    weight_map: BTreeMap<String, String>,
}

/// The files to read of a repository that holds `files`: its settings, and whole weights, the index of several, or
/// an adapter's weights. An error lists the weights of other kinds.
pub(crate) fn wanted(files: &BTreeSet<&str>) -> Result<Vec<&'static str>, String> {
    let pairs = [(CONFIG, WEIGHTS), (CONFIG, INDEX), (ADAPTER_CONFIG, ADAPTER_WEIGHTS)];
    let found = pairs.into_iter().find(|(config, weights)| files.contains(config) && files.contains(weights));
    if let Some((_, weights)) = found {
        return Ok(SETTINGS.into_iter().filter(|file| files.contains(file)).chain([weights]).collect());
    }
    let is_weights = |file: &&&str| [".bin", ".pth", ".gguf", ".safetensors"].iter().any(|end| file.ends_with(end));
    let others: Vec<&str> = files.iter().filter(is_weights).take(4).copied().collect();
    Err(if others.is_empty() { "no weights at all".into() } else { others.join(", ") })
}

/// The file that a snapshot lacks to be a model or an adapter.
pub(crate) fn missing_file(dir: &Path) -> Option<String> {
    let lacks = |file: &str| !dir.join(file).exists();
    // Trainers save the base's config.json beside an adapter: only weights make it a model.
    let is_adapter = !lacks(ADAPTER_CONFIG) && (lacks(CONFIG) || (lacks(WEIGHTS) && lacks(INDEX)));
    if is_adapter {
        return lacks(ADAPTER_WEIGHTS).then(|| ADAPTER_WEIGHTS.to_owned());
    }
    if lacks(CONFIG) {
        return Some(CONFIG.to_owned());
    }
    if !lacks(WEIGHTS) {
        return None;
    }
    if lacks(INDEX) {
        return Some(WEIGHTS.to_owned());
    }
    match shards(&dir.join(INDEX)) {
        Ok(shards) => shards.into_iter().find(|shard| lacks(shard)),
        Err(_) => Some(INDEX.to_owned()),
    }
}

/// The files that an index names.
pub(crate) fn shards(index: &Path) -> Result<BTreeSet<String>, HubError> {
    let bytes = std::fs::read(index).map_err(|source| HubError::Read { path: index.to_owned(), source })?;
    let json = |source| HubError::Json { path: index.to_owned(), source };
    let parsed: WeightIndex = serde_json::from_slice(&bytes).map_err(json)?;
    let files: BTreeSet<String> = parsed.weight_map.into_values().collect();
    // Names from the network become paths.
    match files.iter().find(|file| file.contains(['/', '\\']) || file.starts_with('.')) {
        None => Ok(files),
        Some(file) => Err(HubError::Index { path: index.to_owned(), file: file.clone() }),
    }
}
