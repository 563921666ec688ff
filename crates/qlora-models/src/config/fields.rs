//! Typed access to an object of `config.json`, with errors that name file and key, and a record of the keys
//! that were read: a key that is not read may change the arithmetic.

use crate::ModelError;
use crate::family::{Only, Switch};
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;

/// Keys that change nothing about what a model computes from tokens: names, identifiers, training-time
/// initialisation, what the Python classes return, defaults of generation, which transformers keeps in
/// `generation_config.json` today, and what other programs read and transformers does not (`attn_factor`,
/// `dual_chunk_attention_config`).
const HARMLESS: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_commit_hash",
    "_experts_implementation",
    "_flash_attn_2_enabled",
    "_name_or_path",
    "architectures",
    "attn_factor",
    "attn_implementation",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "cache_implementation",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "dual_chunk_attention_config",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "eos_token_id",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "finetuned",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "id2label",
    "initializer_range",
    "internal_version",
    "is_decoder",
    "label2id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "model_max_length",
    "model_type",
    "name_or_path",
    "no_repeat_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "num_beam_groups",
    "num_beams",
    "num_labels",
    "num_return_sequences",
    "original_max_position_embeddings",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "penalty_alpha",
    "prefix",
    "problem_type",
    "pruned_heads",
    "quantization_config",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "typical_p",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
];

/// Keys that every family knows, with the only value that is covered. The dropouts do nothing at
/// inference but would change training, so any value but 0 is refused.
const FIXED: &[(&str, Only)] = &[
    ("add_cross_attention", Only::Flag(false)),
    ("attention_dropout", Only::Number(0.0)),
    ("chunk_size_feed_forward", Only::Number(0.0)),
    ("hidden_dropout", Only::Number(0.0)),
    ("is_encoder_decoder", Only::Flag(false)),
];

/// An object of `config.json`.
pub(super) struct Fields<'a> {
    path: &'a Path,
    map: &'a Map<String, Value>,
    prefix: String,
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Fields<'a> {
    /// `prefix` goes before keys in messages.
    pub fn new(path: &'a Path, map: &'a Map<String, Value>, prefix: impl Into<String>) -> Self {
        Self { path, map, prefix: prefix.into(), read: RefCell::default() }
    }

    /// The object under `key`.
    pub fn object(&self, key: &str) -> Result<Option<Fields<'a>>, ModelError> {
        let open = |value: &'a Value| match value.as_object() {
            Some(map) => Ok(Fields::new(self.path, map, format!("{}{key}.", self.prefix))),
            None => Err(self.error(key, "is not a JSON object")),
        };
        self.get(key).map(open).transpose()
    }

    pub fn error(&self, key: &str, problem: impl Into<String>) -> ModelError {
        ModelError::Field { path: self.path.into(), field: format!("{}{key}", self.prefix), problem: problem.into() }
    }

    /// The value of `key`; `null` counts as absent.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.read.borrow_mut().insert(key.into());
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Whether `key` is there with the value `null`, which may mean something else than its absence.
    pub fn is_null(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(Value::is_null)
    }

    /// The keys.
    pub fn keys(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.map.keys().map(String::as_str)
    }

    pub fn number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        let read = |value: &Value| match value.as_f64() {
            Some(number) if number.is_finite() && number > 0.0 => Ok(number),
            _ => Err(self.error(key, format!("is {value}; expected a positive number"))),
        };
        self.get(key).map(read).transpose()
    }

    pub fn need(&self, key: &str) -> Result<f64, ModelError> {
        self.number(key)?.ok_or_else(|| self.error(key, "is missing"))
    }

    pub fn size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        let read = |value: &Value| match value.as_u64() {
            // 2^32 bounds every product of two sizes well within u64.
            Some(number) if (1..=u64::from(u32::MAX)).contains(&number) => Ok(number as usize),
            _ => Err(self.error(key, format!("is {value}; expected a positive integer"))),
        };
        self.get(key).map(read).transpose()
    }

    /// A size that has to be there unless there is a default.
    pub fn required(&self, key: &str, default: Option<usize>) -> Result<usize, ModelError> {
        self.size(key)?.or(default).ok_or_else(|| self.error(key, "is missing"))
    }

    /// A number of modules, which is looked at before anything is allocated for each.
    pub fn bounded(&self, key: &str, number: usize, most: usize) -> Result<usize, ModelError> {
        match number <= most {
            true => Ok(number),
            false => Err(self.error(key, format!("is {number}; at most {most} are supported"))),
        }
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        let read = |value: &Value| {
            value.as_bool().ok_or_else(|| self.error(key, format!("is {value}; expected true or false")))
        };
        self.get(key).map(read).transpose()
    }

    pub fn switch(&self, switch: Switch) -> Result<bool, ModelError> {
        match switch {
            Switch::On => Ok(true),
            Switch::Off => Ok(false),
            Switch::Key(key) => Ok(self.flag(key)?.unwrap_or(false)),
        }
    }

    pub fn text(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        let read =
            |value: &'a Value| value.as_str().ok_or_else(|| self.error(key, format!("is {value}; expected text")));
        self.get(key).map(read).transpose()
    }

    /// A list whose entries `read` takes.
    pub fn list<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>, ModelError> {
        let wrong = |value: &Value| self.error(key, format!("is {value}; expected a list of {expected}"));
        let entries = |value: &'a Value| {
            let list = value.as_array().ok_or_else(|| wrong(value))?;
            list.iter().map(|entry| read(entry).ok_or_else(|| wrong(entry))).collect()
        };
        self.get(key).map(entries).transpose()
    }

    /// Checks keys of which one value is covered.
    pub fn fixed(&self, keys: &[(&str, Only)]) -> Result<(), ModelError> {
        for (key, only) in FIXED.iter().chain(keys) {
            let Some(value) = self.get(key) else { continue };
            let (fits, expected) = match only {
                Only::Flag(flag) => (value.as_bool() == Some(*flag), flag.to_string()),
                Only::Number(number) => (value.as_f64() == Some(*number), number.to_string()),
                Only::Null => (false, "null".into()),
            };
            if !fits {
                return Err(self.error(key, format!("is {value}; only {expected} is supported")));
            }
        }
        Ok(())
    }

    /// Refuses a key that was not read and is in no list of harmless ones.
    pub fn nothing_left(&self, harmless: &[&str]) -> Result<(), ModelError> {
        let read = self.read.borrow();
        let known = |key: &str| read.contains(key) || HARMLESS.contains(&key) || harmless.contains(&key);
        match self.map.iter().find(|(key, value)| !value.is_null() && !known(key)) {
            None => Ok(()),
            Some((key, value)) => Err(self.error(
                key,
                format!(
                    "is {value}; this key is not known for this model type, and it may change what the model computes. \
                     If it does not, remove it"
                ),
            )),
        }
    }
}
