//! `config.json` of a decoder-only model, as transformers 4 and 5 write it.

use crate::ModelError;
use crate::decoder::{LINEARS, linear_path};
use crate::family::Family;
use adapter_io::BnbConfig;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// Frequency scaling of rotary position embeddings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1's: low frequencies divided by `factor`, high ones kept, a smooth ramp between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` count as low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` count as high frequencies.
        high_freq_factor: f64,
        /// Context length before the extension.
        original_max_position_embeddings: f64,
    },
}

/// The shape of a model.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// The family's table entry.
    pub family: &'static Family,
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Epsilon of RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Scaling of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Whether the output head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Whether attention projections have biases.
    pub attention_bias: bool,
    /// Whether MLP projections have biases.
    pub mlp_bias: bool,
    /// The longest context the model was made for.
    pub max_position_embeddings: usize,
    /// How bitsandbytes quantized the checkpoint, if it did.
    pub bnb: Option<BnbConfig>,
    path: PathBuf,
}

/// Typed access to the fields, with errors that name file and field.
struct Fields<'a> {
    path: &'a Path,
    map: &'a Map<String, Value>,
    prefix: &'a str,
}

impl Fields<'_> {
    fn error(&self, field: &str, problem: impl Into<String>) -> ModelError {
        ModelError::Field { path: self.path.into(), field: format!("{}{field}", self.prefix), problem: problem.into() }
    }

    fn get(&self, field: &str) -> Option<&Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    fn number(&self, field: &str) -> Result<Option<f64>, ModelError> {
        let read = |value: &Value| match value.as_f64() {
            Some(number) if number.is_finite() && number > 0.0 => Ok(number),
            _ => Err(self.error(field, format!("is {value}; expected a positive number"))),
        };
        self.get(field).map(read).transpose()
    }

    fn size(&self, field: &str) -> Result<Option<usize>, ModelError> {
        let read = |value: &Value| match value.as_u64() {
            // 2^32 bounds every product of two sizes well within u64.
            Some(number) if (1..=u64::from(u32::MAX)).contains(&number) => Ok(number as usize),
            _ => Err(self.error(field, format!("is {value}; expected a positive integer"))),
        };
        self.get(field).map(read).transpose()
    }

    fn required(&self, field: &str) -> Result<usize, ModelError> {
        self.size(field)?.ok_or_else(|| self.error(field, "is missing"))
    }

    fn flag(&self, field: &str) -> Result<bool, ModelError> {
        let read = |value: &Value| {
            value.as_bool().ok_or_else(|| self.error(field, format!("is {value}; expected true or false")))
        };
        self.get(field).map_or(Ok(false), read)
    }
}

impl ModelConfig {
    /// Reads `dir/config.json`.
    ///
    /// # Errors
    /// The file is missing or no JSON, the model type is unknown, or a field is missing, has a
    /// wrong type, or asks for arithmetic that the family's table does not cover.
    pub fn from_dir(dir: &Path) -> Result<Self, ModelError> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|source| ModelError::Read { path: path.clone(), source })?;
        let value: Value =
            serde_json::from_str(&text).map_err(|source| ModelError::Json { path: path.clone(), source })?;
        Self::from_json(&value, &path)
    }

    /// Reads a parsed `config.json`; `path` names it in errors.
    ///
    /// # Errors
    /// As [`from_dir`](Self::from_dir).
    pub fn from_json(value: &Value, path: &Path) -> Result<Self, ModelError> {
        let not_an_object =
            || ModelError::Field { path: path.into(), field: "config".into(), problem: "is not a JSON object".into() };
        let map = value.as_object().ok_or_else(not_an_object)?;
        let fields = Fields { path, map, prefix: "" };
        let model_type =
            fields.get("model_type").and_then(Value::as_str).ok_or_else(|| fields.error("model_type", "is missing"))?;
        let family = Family::find(model_type).ok_or_else(|| {
            fields.error(
                "model_type",
                format!("is \"{model_type}\", which is not supported; supported: {}", Family::supported()),
            )
        })?;
        for (field, covered) in family.fixed {
            if let Some(value) = fields.get(field).filter(|value| value.as_str() != Some(covered)) {
                return Err(
                    fields.error(field, format!("is {value}; only \"{covered}\" is supported for {model_type}"))
                );
            }
        }
        let hidden_size = fields.required("hidden_size")?;
        let num_attention_heads = fields.required("num_attention_heads")?;
        let num_key_value_heads = fields.size("num_key_value_heads")?.unwrap_or(num_attention_heads);
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            return Err(fields.error(
                "num_key_value_heads",
                format!("is {num_key_value_heads}, which does not divide the {num_attention_heads} attention heads"),
            ));
        }
        let head_dim = match fields.size("head_dim")? {
            Some(head_dim) => head_dim,
            None if hidden_size.is_multiple_of(num_attention_heads) => hidden_size / num_attention_heads,
            None => {
                return Err(
                    fields.error("head_dim", "is missing, and hidden_size is no multiple of num_attention_heads")
                );
            }
        };
        if !head_dim.is_multiple_of(2) {
            return Err(fields.error("head_dim", format!("is {head_dim}; rotary embeddings need an even one")));
        }
        let (rope_theta, rope_scaling) = rope(&fields)?;
        Ok(Self {
            family,
            vocab_size: fields.required("vocab_size")?,
            hidden_size,
            intermediate_size: fields.required("intermediate_size")?,
            num_hidden_layers: fields.required("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            rms_norm_eps: fields.number("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            tie_word_embeddings: fields.flag("tie_word_embeddings")?,
            attention_bias: fields.flag("attention_bias")?,
            mlp_bias: fields.flag("mlp_bias")?,
            max_position_embeddings: fields.size("max_position_embeddings")?.unwrap_or(2048),
            bnb: BnbConfig::from_config(value, path)?,
            path: path.into(),
        })
    }

    /// Shapes `[out_features, in_features]` of a block's linear layers, and whether each has a bias, in the
    /// order of the decoder's table of names.
    pub(crate) fn block_shapes(&self) -> [([usize; 2], bool); 7] {
        let (hidden, intermediate) = (self.hidden_size, self.intermediate_size);
        let (queries, keys) = (self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim);
        [
            ([queries, hidden], self.attention_bias),
            ([keys, hidden], self.attention_bias),
            ([keys, hidden], self.attention_bias),
            ([hidden, queries], self.attention_bias),
            ([intermediate, hidden], self.mlp_bias),
            ([intermediate, hidden], self.mlp_bias),
            ([hidden, intermediate], self.mlp_bias),
        ]
    }

    /// Every linear layer's path and shape `[out_features, in_features]`, in the order of
    /// [`Decoder::linears`](crate::Decoder::linears).
    pub fn linears(&self) -> Vec<(String, [usize; 2])> {
        let block = |index| {
            LINEARS.iter().zip(self.block_shapes()).map(move |(name, (shape, _))| (linear_path(index, name), shape))
        };
        let head = (!self.tie_word_embeddings).then(|| ("lm_head".to_string(), [self.vocab_size, self.hidden_size]));
        (0..self.num_hidden_layers).flat_map(block).chain(head).collect()
    }

    /// Where the configuration was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before).
fn rope(fields: &Fields) -> Result<(f64, RopeScaling), ModelError> {
    let nested =
        ["rope_parameters", "rope_scaling"].into_iter().find_map(|key| fields.get(key).map(|value| (key, value)));
    let default_theta = fields.number("rope_theta")?;
    let Some((key, value)) = nested else {
        return Ok((default_theta.unwrap_or(10_000.0), RopeScaling::Default));
    };
    let map = value.as_object().ok_or_else(|| fields.error(key, "is not a JSON object"))?;
    let prefix = format!("{key}.");
    let inner = Fields { path: fields.path, map, prefix: &prefix };
    let theta = inner.number("rope_theta")?.or(default_theta).unwrap_or(10_000.0);
    let need = |field: &str| inner.number(field)?.ok_or_else(|| inner.error(field, "is missing"));
    let kind = inner.get("rope_type").or_else(|| inner.get("type")).and_then(Value::as_str).unwrap_or("default");
    let scaling = match kind {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: need("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: need("factor")?,
            low_freq_factor: need("low_freq_factor")?,
            high_freq_factor: need("high_freq_factor")?,
            original_max_position_embeddings: need("original_max_position_embeddings")?,
        },
        other => return Err(inner.error("rope_type", format!("is \"{other}\"; supported: default, linear, llama3"))),
    };
    Ok((theta, scaling))
}
