//! The runs that are stopped: what has state, between them.

use std::path::Path;

use anyhow::{Context, Result};

/// Keys that all of them have. A training step takes about a tenth of a second on a CPU.
const COMMON: &[(&str, &str)] = &[
    ("device", "\"cpu\""),
    ("data.max_length", "64"),
    ("lora.rank", "16"),
    ("train.batch_size", "2"),
    ("train.learning_rate", "2e-3"),
    ("train.max_steps", "12"),
    ("train.seed", "7"),
];

/// A configuration: its name and the keys that differ from [`COMMON`].
#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) name: &'static str,
    pub(crate) save_limit: usize,
    keys: &'static [(&'static str, &'static str)],
}

/// All of them. Rank 16 makes the factors large enough for 8-bit moments.
pub(crate) const ALL: &[Config] = &[
    Config {
        name: "plain",
        save_limit: 2,
        keys: &[
            ("train.gradient_accumulation_steps", "1"),
            ("train.save_every", "2"),
            ("train.eval_every", "0"),
            ("train.activation_checkpointing", "\"none\""),
        ],
    },
    Config {
        name: "8-bit, dropout, accumulation",
        save_limit: 1,
        keys: &[
            ("lora.dropout", "0.1"),
            ("data.eval_fraction", "0.05"),
            ("train.optimizer", "\"adamw_8bit\""),
            ("train.gradient_accumulation_steps", "3"),
            ("train.max_steps", "8"),
            ("train.schedule", "\"cosine\""),
            ("train.save_every", "1"),
            ("train.eval_every", "3"),
        ],
    },
    Config {
        name: "offload, lion, grouped",
        save_limit: 2,
        keys: &[
            ("data.group_by_length", "true"),
            ("data.eval_fraction", "0.05"),
            ("train.optimizer", "\"lion_8bit\""),
            ("train.betas", "[0.9, 0.99]"),
            ("train.gradient_accumulation_steps", "1"),
            ("train.activation_checkpointing", "\"offload\""),
            ("train.save_every", "3"),
            ("train.eval_every", "2"),
        ],
    },
    Config {
        name: "everything",
        save_limit: 3,
        keys: &[
            ("lora.dropout", "0.05"),
            ("lora.use_rslora", "true"),
            ("lora.use_dora", "true"),
            ("lora.modules_to_save", "[\"norm\"]"),
            ("data.eval_fraction", "0.05"),
            ("train.optimizer", "\"adamw_8bit\""),
            ("train.weight_decay", "0.01"),
            ("train.gradient_accumulation_steps", "2"),
            ("train.activation_checkpointing", "\"offload_selective\""),
            ("train.max_steps", "8"),
            ("train.warmup_steps", "3"),
            ("train.schedule", "\"linear\""),
            ("train.save_every", "2"),
            ("train.eval_every", "2"),
        ],
    },
    Config {
        name: "pissa, two epochs, all kept",
        save_limit: 0,
        keys: &[
            ("lora.init", "\"pissa_niter_4\""),
            ("train.gradient_accumulation_steps", "1"),
            ("train.batch_size", "8"),
            ("train.epochs", "2.0"),
            ("train.max_steps", "0"),
            ("train.save_every", "1"),
            ("train.eval_every", "0"),
        ],
    },
];

impl Config {
    /// Its TOML. A `train.max_steps` of 0 stands for none: `train.epochs` counts then.
    pub(crate) fn toml(&self, model: &Path, rows: &Path) -> Result<String> {
        let mut table = toml::Table::new();
        let limit = self.save_limit.to_string();
        let keys = COMMON.iter().chain(self.keys).copied().chain([("train.save_limit", limit.as_str())]);
        for (key, value) in keys {
            let value: toml::Table = format!("x = {value}").parse().with_context(|| format!("{key} = {value}"))?;
            let value = value.into_iter().next().context("a value")?.1;
            insert(&mut table, key, value);
        }
        for (key, path) in [("model.path", model), ("data.train", rows)] {
            insert(&mut table, key, toml::Value::String(path.display().to_string()));
        }
        if let Some(toml::Value::Table(train)) = table.get_mut("train")
            && train.get("max_steps").and_then(toml::Value::as_integer) == Some(0)
        {
            train.remove("max_steps");
        }
        Ok(toml::to_string(&table)?)
    }
}

fn insert(table: &mut toml::Table, key: &str, value: toml::Value) {
    match key.split_once('.') {
        None => {
            table.insert(key.to_owned(), value);
        }
        Some((section, key)) => {
            let section = table.entry(section).or_insert_with(|| toml::Value::Table(toml::Table::new()));
            if let toml::Value::Table(section) = section {
                section.insert(key.to_owned(), value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn later_keys_replace_earlier_ones() {
        let find = |name: &str| ALL.iter().find(|config| config.name.starts_with(name)).unwrap();
        let table = |name| find(name).toml(Path::new("m"), Path::new("d")).unwrap().parse::<toml::Table>().unwrap();
        let everything = table("everything");
        assert_eq!(everything["train"]["max_steps"].as_integer(), Some(8));
        assert_eq!(everything["train"]["save_limit"].as_integer(), Some(3));
        assert_eq!(everything["model"]["path"].as_str(), Some("m"));
        assert_eq!(everything["device"].as_str(), Some("cpu"));
        assert!(table("pissa")["train"].get("max_steps").is_none());
    }
}
