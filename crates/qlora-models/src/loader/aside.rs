//! Tensors that are left aside: what encodes images or sound, and blocks that predict more than the next token.

use crate::config::ModelConfig;
use crate::family::Root;
use adapter_io::Checkpoint;
use std::collections::BTreeMap;

/// Whether a tensor belongs to blocks that predict tokens beyond the next one: a path of their own, or blocks behind the last one.
/// Their loss is not computed.
pub(super) fn predicts_further(config: &ModelConfig, root: &Root, tensor: &str) -> bool {
    if config.multi_token_layers == 0 {
        return false;
    }
    let Some(rest) = tensor.strip_prefix(&root.below(".")) else { return false };
    let index = rest.strip_prefix("layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
    let behind = config.num_hidden_layers..config.num_hidden_layers + config.multi_token_layers;
    rest.starts_with("mtp") || index.is_some_and(|index| behind.contains(&index))
}

/// What of a checkpoint is not loaded, in words; `None` where that is nothing.
pub(super) fn note(checkpoint: &Checkpoint, config: &ModelConfig, root: &Root) -> Option<String> {
    let mut parts: BTreeMap<String, (usize, u64)> = BTreeMap::new();
    for name in checkpoint.names() {
        let further = predicts_further(config, root, name);
        if root.has(name) && !further {
            continue;
        }
        let depth = if further { 3 } else { 2 };
        let module = name.strip_prefix("model.").map_or_else(
            || name.split('.').next().unwrap_or(name).to_string(),
            |_| name.split('.').take(depth).collect::<Vec<_>>().join("."),
        );
        let bytes = checkpoint.get(name).map_or(0, |view| view.data.len() as u64);
        let part = parts.entry(module).or_default();
        *part = (part.0 + 1, part.1 + bytes);
    }
    if parts.is_empty() {
        return None;
    }
    let part = |(module, (count, bytes)): (String, (usize, u64))| {
        format!("{module} ({count} tensors, {:.1} MiB)", bytes as f64 / 1024.0 / 1024.0)
    };
    let parts: Vec<String> = parts.into_iter().map(part).collect();
    Some(format!("left aside, since the language model is all that is computed: {}", parts.join(", ")))
}
