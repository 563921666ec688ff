//! The table of what differs between model types, and access to a model's configuration.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::convert::ModelConfigFile;
use crate::error::FormatError;

/// `architectures.json`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Table {
    /// Modules to GGUF names; those inside a block without the block's path.
    pub names: BTreeMap<String, String>,
    /// Weights of experts, without the expert's number, to the name of their stack.
    pub experts: BTreeMap<String, String>,
    model_types: BTreeMap<String, ModelType>,
    /// Rotary scalings by transformers' names to the arithmetic they mean.
    pub rope_scalings: BTreeMap<String, String>,
    /// `tokenizer.ggml.model` of the two kinds.
    pub tokenizer_models: BTreeMap<String, String>,
    /// Regular expressions of pre-tokenizers to llama.cpp's names.
    pub pre_tokenizers: BTreeMap<String, String>,
}

/// One model type.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct ModelType {
    /// `general.architecture`.
    pub architecture: String,
    /// Whether llama.cpp rotates adjacent pairs, so that rows of queries and keys change places.
    pub permute_rotary: bool,
    /// What is added to the weights of norms.
    pub norm_shift: f32,
    /// Whether the output head is always the embedding.
    pub skip_head: bool,
    /// `tokenizer.ggml.add_space_prefix`, where it is not the default.
    pub space_prefix: Option<bool>,
    /// Metadata beyond the common one.
    pub keys: Vec<String>,
    /// The number of layers of the one model whose queries are scaled by the width over the heads, and not by the
    /// width of a head.
    pub layers_scaled_by_width: Option<u32>,
    /// Names in place of the common ones.
    pub names: BTreeMap<String, String>,
    /// Configuration that llama.cpp takes for granted: a key, where it is there and not null, has one of
    /// these values.
    pub require: BTreeMap<String, Vec<Value>>,
    /// Rotary scalings that the architecture knows, where not all.
    pub rope_types: Option<Vec<String>>,
    /// What transformers takes when a key is absent, where llama.cpp takes something else.
    pub defaults: Map<String, Value>,
    /// Why it can't be written.
    pub refused: Option<String>,
}

impl ModelType {
    pub fn has(&self, key: &str) -> bool {
        self.keys.iter().any(|k| k == key)
    }
}

pub(super) fn table() -> &'static Table {
    static TABLE: OnceLock<Table> = OnceLock::new();
    // The table is part of the program; a test reads it.
    TABLE.get_or_init(|| serde_json::from_str(include_str!("architectures.json")).unwrap_or_default())
}

/// A model's configuration with its model type.
pub(super) struct Model {
    pub config: ModelConfigFile,
    pub kind: &'static ModelType,
}

impl Model {
    pub fn read(dir: &Path) -> Result<Self, FormatError> {
        let config = ModelConfigFile::read(dir)?;
        let model_type = config.map.get("model_type").and_then(Value::as_str).unwrap_or_default();
        let Some(kind) = table().model_types.get(model_type) else {
            let known = table().model_types.iter().filter(|(_, kind)| kind.refused.is_none());
            let known: Vec<&str> = known.map(|(name, _)| name.as_str()).collect();
            let reason = format!("`{model_type}` cannot be written as GGUF; supported: {}", known.join(", "));
            return Err(field(&config.path, "model_type", reason));
        };
        if let Some(reason) = &kind.refused {
            let reason = format!("`{model_type}` cannot be written as GGUF: {reason}");
            return Err(field(&config.path, "model_type", reason));
        }
        for (key, allowed) in &kind.require {
            if let Some(value) = config.map.get(key).filter(|v| !v.is_null() && !allowed.contains(v)) {
                let reason = format!("it is {value}, which readers of GGUF do not compute for `{model_type}`");
                return Err(field(&config.path, key, reason));
            }
        }
        Ok(Self { config, kind })
    }

    pub fn fail(&self, key: &str, reason: impl Into<String>) -> FormatError {
        field(&self.config.path, key, reason.into())
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.config.map.get(key).filter(|v| !v.is_null()).or_else(|| self.kind.defaults.get(key))
    }

    /// A whole number that fits 32 bits.
    pub fn size(&self, key: &str) -> Result<Option<u32>, FormatError> {
        let read = |v: &Value| {
            let number = v.as_u64().and_then(|n| u32::try_from(n).ok());
            number.ok_or_else(|| self.fail(key, format!("it is {v}, expected a whole number")))
        };
        self.get(key).map(read).transpose()
    }

    /// The first of these that is there.
    pub fn needed(&self, keys: &[&str]) -> Result<u32, FormatError> {
        for key in keys {
            if let Some(size) = self.size(key)? {
                return Ok(size);
            }
        }
        Err(self.fail(keys.first().unwrap_or(&""), "it is missing"))
    }

    pub fn number(&self, key: &str) -> Result<Option<f64>, FormatError> {
        let read = |v: &Value| v.as_f64().ok_or_else(|| self.fail(key, format!("it is {v}, expected a number")));
        self.get(key).map(read).transpose()
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>, FormatError> {
        let read = |v: &Value| v.as_bool().ok_or_else(|| self.fail(key, format!("it is {v}, expected true or false")));
        self.get(key).map(read).transpose()
    }

    /// The number of experts, and the key that says so.
    pub fn experts(&self) -> Result<Option<(u32, &'static str)>, FormatError> {
        for key in ["num_local_experts", "num_experts", "n_routed_experts"] {
            if let Some(number) = self.size(key)? {
                return Ok(Some((number, key)));
            }
        }
        Ok(None)
    }

    /// Blocks behind the last one that predict further tokens, which are not written.
    pub fn predicts_further(&self, block: usize) -> Result<bool, FormatError> {
        let layers = self.needed(&["num_hidden_layers"])? as usize;
        let further = ["num_nextn_predict_layers", "num_mtp_layers"].into_iter().map(|key| self.size(key));
        let further = further.collect::<Result<Vec<_>, _>>()?.into_iter().flatten().max().unwrap_or(0) as usize;
        Ok((layers..layers + further).contains(&block))
    }

    pub fn heads(&self) -> Result<(u32, u32), FormatError> {
        let heads = self.needed(&["num_attention_heads"])?;
        let kv = self.size("num_key_value_heads")?.unwrap_or(heads);
        if heads == 0 || kv == 0 {
            return Err(self.fail("num_attention_heads", "it is 0"));
        }
        Ok((heads, kv))
    }

    pub fn head_dim(&self) -> Result<u32, FormatError> {
        let dim = match self.size("head_dim")? {
            Some(dim) => dim,
            None => self.needed(&["hidden_size"])? / self.heads()?.0,
        };
        // Tables of this length are made; no model comes near.
        if dim > 1 << 16 { Err(self.fail("head_dim", format!("it is {dim}, which cannot be"))) } else { Ok(dim) }
    }

    /// Rotary parameters of global layers: transformers 5's `rope_parameters`, or `rope_scaling` before.
    pub fn rope(&self) -> Map<String, Value> {
        let nested = ["rope_parameters", "rope_scaling"].into_iter().find_map(|k| self.get(k)?.as_object());
        let mut rope = nested.cloned().unwrap_or_default();
        if let Some(full) = rope.get("full_attention").and_then(Value::as_object) {
            rope = full.clone();
        }
        for key in ["rope_theta", "original_max_position_embeddings", "partial_rotary_factor"] {
            if let (false, Some(value)) = (rope.contains_key(key), self.get(key)) {
                rope.insert(key.into(), value.clone());
            }
        }
        rope
    }

    /// The rotary base of sliding layers, where it is another.
    pub fn local_rope_theta(&self) -> Option<f64> {
        let nested = self.get("rope_parameters").and_then(|r| r.get("sliding_attention")?.get("rope_theta"));
        nested.or_else(|| self.get("rope_local_base_freq")).and_then(Value::as_f64)
    }

    /// Which layers have rotary embeddings, as `no_rope_layers` says.
    pub fn unrotated(&self, layers: usize) -> Option<Vec<bool>> {
        let rotated = |value: &Value| value.as_bool().unwrap_or_else(|| value.as_u64() != Some(0));
        Some(self.get("no_rope_layers")?.as_array()?.iter().take(layers).map(rotated).collect())
    }

    pub fn layer_types(&self) -> Option<Vec<&str>> {
        self.get("layer_types")?.as_array()?.iter().map(Value::as_str).collect()
    }
}

pub(super) fn field(path: &Path, field: &str, reason: String) -> FormatError {
    FormatError::Field { path: path.to_path_buf(), field: field.to_string(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_read() {
        let table: Table = serde_json::from_str(include_str!("architectures.json")).unwrap();
        assert_eq!(table.model_types.len(), super::table().model_types.len());
        assert!(table.model_types.values().all(|m| m.architecture.is_empty() == m.refused.is_some()));
        assert!(table.model_types.len() >= 9 && table.pre_tokenizers.len() >= 5);
    }
}
