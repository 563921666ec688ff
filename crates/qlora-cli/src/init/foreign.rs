//! Configurations of other trainers, said as ours.
//!
//! What a key says is translated by a table of names (`tables.rs`); data sets and what several keys say together are translated here. Defaults that are others
//! than ours are written out. Every value is tried on the configuration, so that none comes out that `qlora train` would refuse by its form. What has no
//! counterpart is listed, with the reason where there is one.

use std::path::Path;

use anyhow::Result;
use burn_qlora::TrainConfig;
use burn_qlora::adapter_io::printable::printable;
use serde_json::{Map, Value as Json};

use super::fill::fill;
use super::tables::{AXOLOTL, FACTORY, How, PEFT, Row, SHARED};
use crate::exit::InputError;

/// A configuration of ours that says what another one says.
#[derive(Debug)]
pub struct Translated {
    /// The configuration, with its comments.
    pub text: String,
    /// What was not translated, and what is to be known of what was.
    pub notes: Vec<String>,
    /// Keys that must be filled in.
    pub missing: Vec<&'static str>,
    whose: &'static str,
    taken: usize,
}

impl Translated {
    /// What was done, in words.
    pub fn summary(&self) -> String {
        let Self { whose, taken, notes, .. } = self;
        let end = if notes.is_empty() { "." } else { ":" };
        format!("{whose}; {taken} of its keys are said here as well, and {} things are to be known{end}", notes.len())
    }
}

/// Whose a configuration is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Whose {
    Axolotl,
    Factory,
    Peft,
}

/// Reads another trainer's configuration.
///
/// # Errors
/// The file can't be read, or is of none that are known.
pub fn translate(path: &Path) -> Result<Translated> {
    let fail = |problem: String| InputError(format!("{}: {problem}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| fail(error.to_string()))?;
    let value: Json = match text.trim_start().starts_with('{') {
        true => serde_json::from_str(&text).map_err(|error| fail(format!("not valid JSON: {error}")))?,
        false => serde_yaml_ng::from_str(&text).map_err(|error| fail(format!("not valid YAML: {error}")))?,
    };
    let Json::Object(given) = value else { return Err(fail("holds no keys".into()).into()) };
    let whose = match () {
        () if given.contains_key("peft_type") => Whose::Peft,
        () if given.contains_key("base_model") => Whose::Axolotl,
        () if given.contains_key("model_name_or_path") => Whose::Factory,
        () => {
            let problem = "is neither Axolotl's (base_model), LLaMA-Factory's (model_name_or_path) nor a PEFT adapter's \
                           (peft_type) configuration";
            return Err(fail(problem.into()).into());
        }
    };
    let mut work =
        Work { config: TrainConfig::default(), values: Vec::new(), notes: Vec::new(), taken: 0, templates: Vec::new() };
    work.run(whose, given);
    Ok(work.finish(whose))
}

/// A translation under way.
pub(super) struct Work {
    /// What values are tried on.
    config: TrainConfig,
    values: Vec<(String, String)>,
    pub notes: Vec<String>,
    pub(super) taken: usize,
    /// Templates that data sets of conversations have, where they have their own.
    pub(super) templates: Vec<Option<String>>,
}

impl Work {
    fn run(&mut self, whose: Whose, mut given: Map<String, Json>) {
        let (table, defaults): (&[Row], &[(&str, &str)]) = match whose {
            Whose::Axolotl => (
                AXOLOTL,
                &[
                    ("data.max_length", "512"),
                    ("train.batch_size", "1"),
                    ("train.gradient_accumulation_steps", "1"),
                    ("train.schedule", "\"cosine\""),
                    ("train.max_grad_norm", "1.0"),
                ],
            ),
            Whose::Factory => (
                FACTORY,
                &[
                    ("lora.rank", "8"),
                    ("train.batch_size", "8"),
                    ("train.gradient_accumulation_steps", "1"),
                    ("train.learning_rate", "5e-5"),
                    ("train.epochs", "3.0"),
                    ("train.schedule", "\"linear\""),
                    ("train.warmup_ratio", "0.0"),
                    ("train.max_grad_norm", "1.0"),
                ],
            ),
            Whose::Peft => (PEFT, &[]),
        };
        for (key, value) in defaults {
            self.values.push(((*key).to_owned(), (*value).to_owned()));
        }
        match whose {
            Whose::Axolotl => self.axolotl(&mut given),
            Whose::Factory => self.factory(&mut given),
            Whose::Peft => self
                .notes
                .push("an adapter does not say how it was trained: data and [train] are at their defaults".into()),
        }
        let shared: &[Row] = if whose == Whose::Peft { &[] } else { SHARED };
        for (key, value) in given {
            match table.iter().chain(shared).find(|(name, ..)| *name == key) {
                Some((_, ours, how)) => self.translate(&key, &value, ours, *how),
                None if says_nothing(&value) => {}
                None => self.unknown(&key),
            }
        }
    }

    fn unknown(&mut self, key: &str) {
        let reason = match key {
            key if key.starts_with("wandb")
                || key.starts_with("mlflow")
                || key.starts_with("trackio")
                || key.starts_with("comet")
                || key == "report_to" =>
            {
                ": metrics go to metrics.jsonl in train.output_dir; train.log_to tells \"tensorboard\", \"mlflow\" or \"trackio\", too"
            }
            key if key.starts_with("deepspeed") || key.starts_with("fsdp") => {
                ": `qlora train --gpus N` and [distributed] are the way to several cards"
            }
            key if key.starts_with("hub_") || key.starts_with("push_to_hub") || key.starts_with("hf_") => {
                ": `qlora push` uploads an adapter"
            }
            "rl" | "reward_model" | "process_reward_model" => {
                ": rows are trained on their answers here, not on preferences or rewards"
            }
            "pretraining_dataset" => ": rows of text are read whole before a run; put them into data.train",
            "eot_tokens" => ": what ends a turn follows from the chat template; data.end_token ends rows",
            "special_tokens" | "tokens" | "added_tokens_overrides" => {
                ": tokens are added to the tokenizer's files; data.end_token ends rows, and model.resize_embeddings trains new tokens"
            }
            _ => " has no counterpart here",
        };
        self.notes.push(format!("`{}`{reason}", printable(key)));
    }

    /// Translates a value by its row of a table.
    fn translate(&mut self, key: &str, value: &Json, ours: &str, how: How) {
        let word = match value {
            Json::String(text) => text.clone(),
            other => other.to_string(),
        };
        let told = match (how, value) {
            (_, Json::Null) => return,
            (_, Json::String(text)) if text.is_empty() => return,
            (How::Nothing(_), value) if says_nothing(value) => return,
            (How::Nothing(reason), _) => return self.notes.push(format!("`{key}` is not needed: {reason}")),
            (How::Bool(yes, _), Json::Bool(true)) => yes.to_owned(),
            (How::Bool(_, no), Json::Bool(false)) => no.to_owned(),
            // gradient_checkpointing is a word for some of its ways.
            (How::Bool(..), Json::String(text)) => format!("{text:?}"),
            (How::Words(words), _) => match words.iter().find(|(theirs, _)| *theirs == word) {
                Some((_, ours)) => (*ours).to_owned(),
                None if says_nothing(value) => return,
                None => format!("{word:?}"),
            },
            (How::Float, Json::Number(number)) => {
                number.as_f64().map_or_else(|| number.to_string(), |number| format!("{number:?}"))
            }
            (_, value) => match in_toml(value) {
                Some(text) => text,
                None => return self.notes.push(format!("`{key}` holds what has no form in TOML")),
            },
        };
        self.taken += 1;
        if !told.is_empty() {
            self.set(key, ours, told);
        }
    }

    /// Says a value, if the configuration takes it.
    pub(super) fn set(&mut self, key: &str, ours: &str, value: String) {
        if ours.is_empty() {
            self.notes.push(format!("`{key}: {}` has no counterpart here", printable(&value)));
            return;
        }
        match self.config.set(ours, &value) {
            Ok(()) => {
                self.values.retain(|(known, _)| known != ours);
                self.values.push((ours.to_owned(), value));
            }
            Err(error) => {
                let error = error.to_string();
                let why = error.split_once(": ").map_or(error.as_str(), |(_, why)| why);
                self.notes.push(format!("`{key}: {}` is not known as {ours}: {}", printable(&value), printable(why)));
            }
        }
    }

    /// Takes a key that several say together, or that this module reads itself.
    pub(super) fn take(&mut self, given: &mut Map<String, Json>, key: &str) -> Option<Json> {
        let value = given.shift_remove(key).filter(|value| !value.is_null())?;
        self.taken += 1;
        Some(value)
    }

    /// Sets the decay rates of the moments.
    pub(super) fn betas(&mut self, given: &mut Map<String, Json>) {
        let [first, second] =
            ["adam_beta1", "adam_beta2"].map(|key| self.take(given, key).and_then(|value| value.as_f64()));
        if first.is_some() || second.is_some() {
            let betas = format!("[{:?}, {:?}]", first.unwrap_or(0.9), second.unwrap_or(0.999));
            self.set("adam_beta1", "train.betas", betas);
        }
    }

    fn finish(self, whose: Whose) -> Translated {
        let has = |key: &str| self.values.iter().any(|(known, _)| known == key);
        let missing = ["model.path", "data.train"].into_iter().filter(|key| !has(key)).collect();
        let whose = match whose {
            Whose::Axolotl => "Axolotl's configuration",
            Whose::Factory => "LLaMA-Factory's configuration",
            Whose::Peft => "a PEFT adapter's configuration",
        };
        Translated { text: fill(&self.values), notes: self.notes, missing, whose, taken: self.taken }
    }
}

/// Whether a value says no more than that there is none.
pub(super) fn says_nothing(value: &Json) -> bool {
    match value {
        Json::Null | Json::Bool(false) => true,
        Json::String(text) => text.is_empty(),
        Json::Array(list) => list.is_empty(),
        Json::Object(table) => table.is_empty(),
        _ => false,
    }
}

/// A value as TOML writes it.
pub(super) fn in_toml(value: &Json) -> Option<String> {
    Some(toml::Value::try_from(value).ok()?.to_string())
}
