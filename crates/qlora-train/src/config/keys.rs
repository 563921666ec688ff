//! Keys of the configuration: which exist, where an unknown one stands, and what was meant.
//!
//! The names come from the structs: serde hands a struct's field names to the deserializer, and
//! [`field_names`] is a deserializer that only takes note of them. So a new field is a known key,
//! without a list to keep in step.

use std::path::Path;

use qlora_layers::LoraConfig;
use serde::de::{DeserializeOwned, Deserializer, Error as _, Visitor};
use toml::de::{DeTable, DeValue};

use super::{
    BaseModelConfig, DistributedConfig, EvalConfig, PreferenceConfig, QuantizationConfig, RunConfig, ServeConfig,
    TrainConfig,
};
use crate::error::TrainError;
use qlora_data::DataConfig;

/// What other trainers call a key of ours; the nearest spelling wouldn't find these.
const SYNONYMS: &[(&str, &str)] = &[
    ("lr", "train.learning_rate"),
    ("lr_scheduler", "train.schedule"),
    ("lr_scheduler_type", "train.schedule"),
    ("min_lr_ratio", "train.min_learning_rate_ratio"),
    ("min_lr_rate", "train.min_learning_rate_ratio"),
    ("cosine_min_lr_ratio", "train.min_learning_rate_ratio"),
    ("num_cycles", "train.cycles"),
    ("loraplus_lr_ratio", "train.lora_plus_ratio"),
    ("loraplus_lr_embedding", "train.embedding_learning_rate"),
    ("neftune_noise_alpha", "train.neftune_alpha"),
    ("num_train_epochs", "train.epochs"),
    ("num_epochs", "train.epochs"),
    ("steps", "train.max_steps"),
    ("micro_batch_size", "train.batch_size"),
    ("per_device_train_batch_size", "train.batch_size"),
    ("grad_accum", "train.gradient_accumulation_steps"),
    ("gradient_accumulation", "train.gradient_accumulation_steps"),
    ("ddp_backend", "distributed.transport"),
    ("gradient_checkpointing", "train.activation_checkpointing"),
    ("optim", "train.optimizer"),
    ("adam_beta1", "train.betas"),
    ("adam_beta2", "train.betas"),
    ("adam_epsilon", "train.eps"),
    ("eval_steps", "train.eval_every"),
    ("save_steps", "train.save_every"),
    ("report_to", "train.log_to"),
    ("logging_steps", "train.log_every"),
    ("save_total_limit", "train.save_limit"),
    ("r", "lora.rank"),
    ("lora_r", "lora.rank"),
    ("lora_alpha", "lora.alpha"),
    ("lora_dropout", "lora.dropout"),
    ("lora_target_modules", "lora.target_modules"),
    ("init_lora_weights", "lora.init"),
    ("loftq_iter", "lora.loftq_iterations"),
    ("use_lora_bias", "lora.lora_bias"),
    ("base_model", "model.path"),
    ("model_name_or_path", "model.path"),
    ("name", "model.path"),
    ("load_in_4bit", "quantization.quant_type"),
    ("bnb_4bit_quant_type", "quantization.quant_type"),
    ("bnb_4bit_use_double_quant", "quantization.double_quant"),
    ("bnb_4bit_compute_dtype", "quantization.compute_dtype"),
    ("fp16", "quantization.compute_dtype"),
    ("bf16", "quantization.compute_dtype"),
    ("initial_scale_power", "train.loss_scale"),
    ("dataset", "data.train"),
    ("max_seq_length", "data.max_length"),
    ("max_seq_len", "data.max_length"),
    ("sequence_len", "data.max_length"),
    ("train_on_inputs", "data.loss_on"),
    ("val_set_size", "data.eval_fraction"),
    ("sample_packing", "data.packing"),
    ("eval_packing", "data.packing"),
    ("padding_free", "data.packing"),
    ("neat_packing", "data.packing"),
    ("datasets", "data.train"),
    ("test_datasets", "data.eval"),
    ("data_files", "data.train"),
    ("rl", "train.objective"),
    ("loss_type", "train.objective"),
    ("rl_beta", "preference.beta"),
    ("dpo_beta", "preference.beta"),
    ("pref_beta", "preference.beta"),
    ("dpo_label_smoothing", "preference.label_smoothing"),
    ("rpo_alpha", "train.objective"),
    ("kto_desirable_weight", "preference.desirable_weight"),
    ("kto_undesirable_weight", "preference.undesirable_weight"),
    ("precompute_ref_log_probs", "preference.precompute_reference"),
    ("ref_model", "preference.reference"),
];

/// The sections and the keys of each.
fn sections() -> [(&'static str, &'static [&'static str]); 9] {
    [
        ("model", field_names::<BaseModelConfig>()),
        ("quantization", field_names::<QuantizationConfig>()),
        ("lora", field_names::<LoraConfig>()),
        ("data", field_names::<DataConfig>()),
        ("train", field_names::<RunConfig>()),
        ("preference", field_names::<PreferenceConfig>()),
        ("eval", field_names::<EvalConfig>()),
        ("distributed", field_names::<DistributedConfig>()),
        ("serve", field_names::<ServeConfig>()),
    ]
}

/// Every key of the configuration, written `section.key`, and `device`.
pub fn known_keys() -> Vec<String> {
    let sections = sections();
    let is_section = |name: &str| sections.iter().any(|(section, _)| *section == name);
    let mut keys: Vec<String> =
        field_names::<TrainConfig>().iter().filter(|name| !is_section(name)).map(|name| (*name).to_string()).collect();
    for (section, fields) in &sections {
        keys.extend(fields.iter().map(|field| format!("{section}.{field}")));
    }
    keys
}

/// See [`TrainConfig::parse`].
pub(super) fn parse(text: &str, file: &str) -> Result<TrainConfig, TrainError> {
    let place = |offset: usize| format!("{file}:{}", line_of(text, offset));
    let root = DeTable::parse(text).map_err(|e| TrainError::ConfigSyntax {
        place: place(e.span().map_or(0, |span| span.start)),
        message: e.message().to_string(),
    })?;
    let root = root.get_ref();
    let known = known_keys();
    for (key, value) in root {
        let name = key.get_ref().as_ref();
        let is_section = sections().iter().any(|(section, _)| *section == name);
        let unknown = match value.get_ref() {
            DeValue::Table(table) if is_section => table
                .keys()
                .map(|key| (format!("{name}.{}", key.get_ref()), key.span().start))
                .find(|(key, _)| !known.contains(key)),
            _ if is_section => {
                return Err(TrainError::ConfigSyntax {
                    place: place(key.span().start),
                    message: format!("`{name}` is a section: write [{name}] and its keys below"),
                });
            }
            _ => (!known.iter().any(|key| key == name)).then(|| (name.to_string(), key.span().start)),
        };
        if let Some((key, offset)) = unknown {
            return Err(unknown_key(place(offset), &key));
        }
    }
    let mut config: TrainConfig = toml::from_str(text).map_err(|e| {
        let offset = e.span().map_or(0, |span| span.start);
        let key = key_at(root, offset).map_or(String::new(), |key| format!("{key}: "));
        TrainError::ConfigSyntax { place: place(offset), message: format!("{key}{}", e.message()) }
    })?;
    let lora = root.get("lora").and_then(|lora| lora.get_ref().as_table());
    let order = |key| lora.map_or(Vec::new(), |lora| keys_in_order(lora, key));
    reorder(&mut config.lora.rank_pattern, &order("rank_pattern"));
    reorder(&mut config.lora.alpha_pattern, &order("alpha_pattern"));
    Ok(config)
}

/// What a file is that is no TOML, if other trainers write such files.
pub(super) fn foreign(path: &Path, text: &str) -> Option<&'static str> {
    let mut lines = text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#'));
    let first = lines.next().unwrap_or_default();
    let is_key = |key: &str| !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    let begins_as_yaml = first == "---"
        || first.split_once(':').is_some_and(|(key, rest)| is_key(key) && (rest.is_empty() || rest.starts_with(' ')));
    let is_named = |extension: &str| path.extension().is_some_and(|found| found == extension);
    match () {
        () if text.contains("\"peft_type\"") && first.starts_with('{') => Some("a PEFT adapter's configuration"),
        () if begins_as_yaml || is_named("yml") || is_named("yaml") => Some("YAML"),
        () => None,
    }
}

/// See [`TrainConfig::set`].
pub(super) fn with_override(config: &TrainConfig, key: &str, value: &str) -> Result<TrainConfig, TrainError> {
    let place = || format!("override {key}={value}");
    let wrong = |e: &dyn std::fmt::Display| TrainError::ConfigSyntax { place: place(), message: e.to_string() };
    if !known_keys().iter().any(|known| known == key) {
        return Err(unknown_key(place(), key));
    }
    let base = toml::Table::try_from(config).map_err(|e| wrong(&e))?;
    let assign = |value: toml::Value| -> Result<TrainConfig, toml::de::Error> {
        let mut root = base.clone();
        let (table, leaf) = match key.split_once('.') {
            Some((section, leaf)) => (root.get_mut(section).and_then(|v| v.as_table_mut()), leaf),
            None => (Some(&mut root), key),
        };
        let table = table.ok_or_else(|| toml::de::Error::custom("no such section"))?;
        table.insert(leaf.to_string(), value);
        root.try_into()
    };
    let text = toml::Value::String(value.to_string());
    let mut changed = match value.parse::<toml::Value>() {
        // What reads as a number may be meant as text, e.g. an output folder named 7.
        Ok(typed) => assign(typed).or_else(|e| assign(text).map_err(|_| wrong(&e.message())))?,
        Err(_) => assign(text).map_err(|e| wrong(&e.message()))?,
    };
    let order = |name: &str, old: Vec<String>| match key.ends_with(name) {
        true => DeTable::parse(&format!("{name} = {value}")).map_or(old, |root| keys_in_order(root.get_ref(), name)),
        false => old,
    };
    let ranks = order("rank_pattern", names(&config.lora.rank_pattern));
    let alphas = order("alpha_pattern", names(&config.lora.alpha_pattern));
    reorder(&mut changed.lora.rank_pattern, &ranks);
    reorder(&mut changed.lora.alpha_pattern, &alphas);
    Ok(changed)
}

/// The keys of the table named `name`, as they stand in the text. A parsed table is sorted, but of
/// the rank and alpha patterns the first that matches counts.
fn keys_in_order(table: &DeTable<'_>, name: &str) -> Vec<String> {
    let inner = table.get(name).and_then(|value| value.get_ref().as_table());
    let mut keys: Vec<_> = inner.iter().flat_map(|inner| inner.keys()).collect();
    keys.sort_by_key(|key| key.span().start);
    keys.iter().map(|key| key.get_ref().to_string()).collect()
}

fn names<T>(entries: &[(String, T)]) -> Vec<String> {
    entries.iter().map(|(name, _)| name.clone()).collect()
}

fn reorder<T>(entries: &mut [(String, T)], order: &[String]) {
    entries.sort_by_key(|(name, _)| order.iter().position(|other| other == name));
}

/// The line (from 1) of a byte offset.
fn line_of(text: &str, offset: usize) -> usize {
    let head = text.as_bytes().iter().take(offset);
    1 + head.filter(|byte| **byte == b'\n').count()
}

/// The key whose value holds a byte offset, as `section.key`.
fn key_at(table: &DeTable<'_>, offset: usize) -> Option<String> {
    table.iter().find_map(|(key, value)| {
        let name = key.get_ref();
        let inner = match value.get_ref() {
            DeValue::Table(inner) => key_at(inner, offset),
            _ => None,
        };
        match inner {
            Some(rest) => Some(format!("{name}.{rest}")),
            None => value.span().contains(&offset).then(|| name.to_string()),
        }
    })
}

fn unknown_key(place: String, key: &str) -> TrainError {
    let hint = match nearest(key) {
        _ if key == "serve.api_key" => {
            "give it as --api-key or QLORA_API_KEY: a configuration is copied into checkpoints".to_string()
        }
        Some(known) => match (key.split_once('.'), known.split_once('.')) {
            (Some((section, _)), Some((there, leaf))) if section == there => {
                format!("did you mean `{leaf}`?")
            }
            (_, Some((section, ""))) => format!("did you mean the section [{section}]?"),
            (_, Some((section, leaf))) => format!("did you mean `{leaf}` in [{section}]?"),
            (_, None) => format!("did you mean `{known}`, above all sections?"),
        },
        None => "`qlora init` writes a file with every key".to_string(),
    };
    TrainError::UnknownKey { place, key: key.to_string(), hint }
}

/// The known key (or section, written `section.`) that was most likely meant.
fn nearest(key: &str) -> Option<String> {
    let (section, leaf) = key.split_once('.').unwrap_or(("", key));
    let lower = leaf.to_lowercase();
    if let Some((_, meant)) = SYNONYMS.iter().find(|(name, _)| *name == lower) {
        return Some((*meant).to_string());
    }
    let mut candidates = known_keys();
    candidates.extend(sections().iter().map(|(section, _)| format!("{section}.")));
    let distance = |candidate: &String| {
        let (there, name) = match candidate.split_once('.') {
            Some((section, "")) => ("", section),
            Some((section, name)) => (section, name),
            None => ("", candidate.as_str()),
        };
        // A key of the same section wins over an equally near one elsewhere.
        let elsewhere = usize::from(there != section);
        2 * strsim::damerau_levenshtein(&lower, name) + elsewhere
    };
    let (best, found) = candidates
        .into_iter()
        .map(|candidate| (distance(&candidate), candidate))
        .min_by_key(|(distance, _)| *distance)?;
    // One typing mistake in three letters is still a typing mistake.
    (best / 2 <= leaf.len().div_ceil(3)).then_some(found)
}

/// The names of `T`'s fields as they stand in a file; empty if `T` isn't a struct.
fn field_names<T: DeserializeOwned>() -> &'static [&'static str] {
    struct Names<'a>(&'a mut &'static [&'static str]);

    impl<'de> Deserializer<'de> for Names<'_> {
        type Error = serde::de::value::Error;

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
            Err(Self::Error::custom("only the names are asked for"))
        }

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            visitor: V,
        ) -> Result<V::Value, Self::Error> {
            *self.0 = fields;
            self.deserialize_any(visitor)
        }

        serde::forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf
            option unit unit_struct newtype_struct seq tuple tuple_struct map enum identifier
            ignored_any
        }
    }

    let mut names: &'static [&'static str] = &[];
    // This deserializer always answers with an error, after it has noted the names.
    let _ = T::deserialize(Names(&mut names));
    names
}
