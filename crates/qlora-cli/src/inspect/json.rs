//! What a folder or a file is, for a program.

use std::path::Path;

use anyhow::Result;
use burn_qlora::adapter_io::listing::{ListedTensor, Listing};
use burn_qlora::gguf::GgufListing;
use burn_qlora::metrics::METRICS_FILE;
use burn_qlora::qlora_train::run_holder;
use burn_qlora::{Adapter, Checkpoint, checkpoint};
use serde_json::{Value, json};

use super::gguf;
use crate::exit::UsageError;

/// One object, whose `kind` says what the path is.
pub fn of(path: &Path) -> Result<Value> {
    let place = path.display().to_string();
    let has = |name: &str| path.join(name).is_file();
    let file =
        |name: &str| -> Result<Value> { if has(name) { Ok(super::json(&path.join(name))?) } else { Ok(Value::Null) } };
    Ok(if gguf::is_gguf(path) {
        let GgufListing { metadata, tensors } = GgufListing::open(path)?;
        let text = |value: &burn_qlora::gguf::Value| value.as_str().map(Value::from);
        let of = |value: &burn_qlora::gguf::Value| text(value).or_else(|| value.as_u64().map(Value::from));
        let known = metadata.iter().filter_map(|(key, value)| Some((key.clone(), of(value)?)));
        json!({"kind": "gguf", "path": place, "metadata": Value::Object(known.collect()), "tensors": listed(&tensors)})
    } else if path.is_file() {
        let listing = Listing::new(&Checkpoint::open_file(path)?);
        json!({"kind": "safetensors", "path": place, "tensors": listed(&listing)})
    } else if !path.is_dir() {
        return Err(UsageError(format!("{}: no such file or folder", path.display())).into());
    } else if has("training_state.json") {
        let found = checkpoint::load(path)?;
        json!({"kind": "training_checkpoint", "path": place, "state": found.state, "adapter": adapter(&found.adapter)?})
    } else if has("adapter_config.json") {
        json!({"kind": "adapter", "path": place, "adapter": adapter(&Adapter::load(path)?)?})
    } else if has("config.json") || has("model.safetensors") || has("model.safetensors.index.json") {
        let listing = Listing::new(&Checkpoint::open(path)?);
        json!({"kind": "model", "path": place, "config": file("config.json")?, "tensors": listed(&listing)})
    } else {
        let checkpoints = checkpoint::list(path)?;
        let holder = run_holder(path)?;
        if !has("summary.json") && !has(METRICS_FILE) && holder.is_none() && checkpoints.is_empty() {
            return Err(UsageError(format!("{}: no model, adapter or training run", path.display())).into());
        }
        let of = |(step, path): &(usize, std::path::PathBuf)| json!({"step": step, "path": path.display().to_string()});
        let checkpoints: Vec<Value> = checkpoints.iter().map(of).collect();
        json!({"kind": "run", "path": place, "summary": file("summary.json")?, "under_way": holder, "checkpoints": checkpoints})
    })
}

fn adapter(adapter: &Adapter) -> Result<Value> {
    let parameters: usize = adapter.tensors.values().map(|tensor| tensor.data.len()).sum();
    Ok(
        json!({"config": serde_json::from_str::<Value>(&adapter.config.to_json())?, "modules": adapter.modules(), "parameters": parameters,
        "missing": adapter.missing_targets()}),
    )
}

fn listed(listing: &Listing) -> Value {
    let tensor = |tensor: &ListedTensor| {
        let ListedTensor { name, dtype, shape, bytes } = tensor;
        json!({"name": name, "dtype": dtype, "shape": shape, "bytes": bytes})
    };
    let all: Vec<Value> = listing.tensors().iter().map(tensor).collect();
    json!({"parameters": listing.parameters(), "bytes": listing.bytes(), "all": all})
}
