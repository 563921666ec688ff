//! What a run stands on, and what of it changed between stop and resume.

use std::collections::BTreeMap;

use adapter_io::TokenIndices;
use qlora_layers::LoraConfig;
use serde::{Deserialize, Serialize};

use super::TrainingCheckpoint;
use crate::config::TrainConfig;
use crate::error::TrainError;

/// Identities of everything outside the configuration that decides a run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Basis {
    /// Version of the program.
    pub program: String,
    /// The base's weights: [`adapter_io::checksum::fingerprint`].
    pub base: String,
    /// Tokens and labels of the training rows, in their order: [`qlora_data::Dataset::fingerprint`].
    pub train_rows: String,
    /// Those of the evaluation rows.
    pub eval_rows: String,
    /// SHA-256 of the chat template's text, where the rows were written with one.
    pub template: Option<String>,
    /// The adapters that the run began with and compares with, where there are any: hashes of their weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapters: Option<String>,
}

/// What differs between a checkpoint and the run that is to go on from it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    /// Would make the adapter or the optimizer's state meaningless.
    pub impossible: Vec<String>,
    /// Make it another run, which may be what is wanted.
    pub serious: Vec<String>,
    /// Worth a word.
    pub harmless: Vec<String>,
}

/// Keys whose change a run does not notice in its arithmetic, or that are there to be changed. What the rows of `data.train` and the
/// weights at `model.path` hold is compared itself, wherever it lies.
const FREE: &[&str] = &[
    "device",
    "model.path",
    "model.revision",
    "model.residency",
    "model.device_budget",
    "data.train",
    "data.eval",
    "data.columns",
    "data.subset",
    "data.split",
    "data.cache",
    "data.strict",
    "train.output_dir",
    "train.epochs",
    "train.max_steps",
    "train.optimizer_budget",
    "train.activation_checkpointing",
    "train.memory_budget",
    "train.eval_every",
    "train.save_every",
    "train.save_limit",
    "train.keep_best",
    "train.final_adapter",
    "train.early_stopping_patience",
    "train.early_stopping_threshold",
    "train.log_every",
    "train.log_to",
    "eval.prompts",
    "eval.max_new_tokens",
    "distributed.transport",
    "distributed.shard_base",
];

/// Keys that the adapter's and the optimizer's tensors depend on.
fn decides_tensors(key: &str) -> bool {
    let of_adapter = key.starts_with("lora.") && key != "lora.dropout";
    let of_base = key.starts_with("quantization.") && key != "quantization.compute_dtype";
    of_adapter || of_base || ["train.optimizer", "model.resize_embeddings"].contains(&key)
}

impl TrainingCheckpoint {
    /// What differs between this checkpoint's configuration and `config`.
    ///
    /// # Errors
    /// The configuration in the checkpoint is damaged.
    pub(crate) fn config_changes(&self, config: &TrainConfig) -> Result<Changes, TrainError> {
        let fail = |problem: String| TrainError::Checkpoint { path: self.path.clone(), problem };
        let table =
            |text: &str| text.parse::<toml::Table>().map_err(|e| fail(format!("its configuration is damaged: {e}")));
        let (saved, now) = (table(&self.state.config)?, table(&config.to_toml()?)?);
        let mut changes = Changes::default();
        for (key, words) in differences(&saved, &now) {
            if decides_tensors(&key) {
                changes.impossible.push(words);
            } else if !FREE.contains(&key_of(key.as_str())) && !key.starts_with("serve.") {
                changes.serious.push(words);
            }
        }
        Ok(changes)
    }

    /// Refuses to go on with rows of other tokens than those whose moments were saved.
    ///
    /// # Errors
    /// The tokenizer has other tokens that the model has no rows for.
    pub(crate) fn check_trained_tokens(&self, lora: &LoraConfig) -> Result<(), TrainError> {
        let some = |tokens: &Option<TokenIndices>| tokens.clone().filter(|tokens| !tokens.is_empty());
        if some(&self.adapter.config.trainable_token_indices) == some(&lora.trainable_token_indices) {
            return Ok(());
        }
        let problem = "it has rows for other tokens (trainable_token_indices in its adapter_config.json) than the tokenizer's new ones: \
                       restore the tokenizer, or start afresh in another train.output_dir";
        Err(TrainError::Checkpoint { path: self.path.clone(), problem: problem.into() })
    }

    /// What differs between what this checkpoint stands on and `now`.
    pub(crate) fn basis_changes(&self, now: &Basis, config: &TrainConfig) -> Changes {
        let saved = &self.state.basis;
        let mut changes = Changes::default();
        let data = &config.data.train;
        if saved.train_rows != now.train_rows {
            changes.serious.push(format!("the rows of {data}, their order or their tokens are others"));
        }
        if saved.base != now.base {
            changes.serious.push(format!("the weights of {} are others", config.model.path));
        }
        // Where the rows are the same, the template decides how the adapter is prompted later.
        if saved.template != now.template {
            changes.serious.push("the chat template is another".into());
        }
        if saved.adapters != now.adapters {
            changes.serious.push("the adapters of train.from_adapter or preference.reference are others".into());
        }
        if saved.eval_rows != now.eval_rows {
            changes.harmless.push("the evaluation rows are others: losses before and after can't be compared".into());
        }
        if saved.program != now.program {
            let (before, now) = (&saved.program, &now.program);
            changes.harmless.push(format!("it was saved by version {before} of this program, which is {now}"));
        }
        changes
    }

    /// Refuses what can't go on, and what should not unless `accept` is set. Returns what the user should be told.
    ///
    /// # Errors
    /// Names every difference.
    pub(crate) fn judge(&self, changes: Changes, accept: bool) -> Result<Vec<String>, TrainError> {
        let Changes { impossible, serious, harmless } = changes;
        let fail = |what: &[String], cure: &str| {
            let problem = format!("the run would go on with other settings: {}; {cure}", what.join("; "));
            Err(TrainError::Checkpoint { path: self.path.clone(), problem })
        };
        if !impossible.is_empty() {
            return fail(&impossible, "restore them, or start afresh in another train.output_dir");
        }
        if !serious.is_empty() && !accept {
            return fail(
                &serious,
                "restore them, go on all the same with --accept-changes, or start afresh in another train.output_dir",
            );
        }
        Ok(serious.into_iter().chain(harmless).map(|words| format!("{}: {words}", self.path.display())).collect())
    }
}

/// Every key of a configuration with its value.
///
/// # Errors
/// A value has no form in TOML.
pub(crate) fn settings(config: &TrainConfig) -> Result<Vec<(String, toml::Value)>, TrainError> {
    let table = toml::Table::try_from(config).map_err(|e| TrainError::ConfigWrite { message: e.to_string() })?;
    Ok(flattened(&table).into_iter().map(|(key, value)| (key, value.clone())).collect())
}

/// The values of a table and of the tables in it, by `section.key`.
fn flattened(table: &toml::Table) -> BTreeMap<String, &toml::Value> {
    fn add<'a>(prefix: &str, table: &'a toml::Table, into: &mut BTreeMap<String, &'a toml::Value>) {
        for (key, value) in table {
            let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
            match value {
                toml::Value::Table(table) => add(&key, table, into),
                value => {
                    into.insert(key, value);
                }
            }
        }
    }
    let mut flat = BTreeMap::new();
    add("", table, &mut flat);
    flat
}

/// The key of the configuration that a value stands under: some keys hold tables.
pub(crate) fn key_of(value: &str) -> &str {
    let mut dots = value.match_indices('.');
    dots.nth(1).map_or(value, |(at, _)| &value[..at])
}

/// Every key that differs, with `section.key was A, now is B`.
fn differences(saved: &toml::Table, now: &toml::Table) -> Vec<(String, String)> {
    let (before, after) = (flattened(saved), flattened(now));
    let show = |value: Option<&&toml::Value>| value.map_or("absent".to_string(), |value| value.to_string());
    let keys: std::collections::BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    keys.into_iter()
        .filter(|key| before.get(*key) != after.get(*key))
        .map(|key| (key.clone(), format!("{key} was {}, now is {}", show(before.get(key)), show(after.get(key)))))
        .collect()
}
