//! What is mutated, how, and the commands that read it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::json::{self, Node};
use super::parts::{ADAPTER as ADAPTER_PARTS, CONFIG, INDEX, SETTINGS, TOKENIZER};
use super::{bytes, container, text};
use crate::random::Dice;

/// How a file is mutated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// JSON; the values mean something in it.
    Json(&'static [&'static str]),
    /// One JSON document a line.
    Rows,
    Safetensors,
    Template,
    Toml,
}

/// A kind of input. In commands `{case}` is the folder with the mutated file, `{seeds}` the one with all valid inputs,
/// `{out}` a folder to write to.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) name: &'static str,
    /// How often it is drawn.
    weight: usize,
    /// Folders that it is in, one of which is drawn; `*` stands for each folder there is.
    folders: &'static [&'static str],
    /// The file, or the files one of which is drawn.
    files: &'static [&'static str],
    kind: Kind,
    commands: &'static [&'static str],
}

const GENERATE: &str = "generate --model {case} --prompt Hi --max-new-tokens 1 --device cpu";
const DRY_RUN: &str = "train {seeds}/qlora.toml --dry-run --model {case}";
const CONVERT: &str = "convert --model {case} --type q8_0 --output {out}/x.gguf --force";
const CONVERT_BARE: &str = "convert --model {case} --without-tokenizer --output {out}/x.gguf --force";
const QUANTIZE: &str = "quantize --model {case} --format bnb-4bit --output {out}/q --force";
const MERGE_BASE: &str = "merge --model {case} --adapter {seeds}/adapter-plain --output {out}/m --force";
const INSPECT: &str = "inspect {case}";
const INSPECT_TENSORS: &str = "inspect {case} --tensors";
const MERGE: &str = "merge --model {seeds}/model --adapter {case} --output {out}/m --force";
const GENERATE_WITH: &str =
    "generate --model {seeds}/model --adapter {case} --prompt Hi --max-new-tokens 1 --device cpu";
const COMBINE: &str = "combine --adapter {case} --adapter {seeds}/adapter-plain --combine svd --output {out}/a --force";
const CONVERT_ADAPTER: &str =
    "convert --model {seeds}/model --adapter {case} --adapter-only --output {out}/a.gguf --force";
/// A checkpoint of a run of two steps goes on for one.
const RESUME: &str =
    "train {seeds}/qlora.toml --set lora.trainable_token_indices=[] --resume {case} --output-dir {out}/run";

/// Families that can be written as GGUF as they are in testdata.
const GGUF_FAMILIES: &[&str] =
    &["archs/llama3", "archs/llama_yarn", "archs/mistral", "archs/mixtral", "archs/phi3", "archs/qwen3"];

/// Everything that is mutated. The commands of a target take its files as they are before that.
pub(crate) const ALL: &[Target] = &[
    Target {
        name: "config.json",
        weight: 4,
        folders: &["model"],
        files: &["config.json"],
        kind: Kind::Json(CONFIG),
        commands: &[INSPECT, DRY_RUN, GENERATE, CONVERT, QUANTIZE, MERGE_BASE],
    },
    Target {
        name: "config.json of 4 bits",
        weight: 1,
        folders: &["model-4bit"],
        files: &["config.json"],
        kind: Kind::Json(CONFIG),
        commands: &[INSPECT, DRY_RUN, GENERATE, CONVERT],
    },
    Target {
        name: "config.json of each family",
        weight: 2,
        folders: &["archs/*"],
        files: &["config.json"],
        kind: Kind::Json(CONFIG),
        commands: &[INSPECT, QUANTIZE],
    },
    Target {
        name: "config.json for GGUF",
        weight: 2,
        folders: GGUF_FAMILIES,
        files: &["config.json"],
        kind: Kind::Json(CONFIG),
        commands: &[CONVERT_BARE],
    },
    Target {
        name: "tokenizer.json",
        weight: 5,
        folders: &["model"],
        files: &["tokenizer.json"],
        kind: Kind::Json(TOKENIZER),
        commands: &[DRY_RUN, DRY_RUN, GENERATE, CONVERT],
    },
    Target {
        name: "tokenizer's settings",
        weight: 2,
        folders: &["model"],
        files: &["tokenizer_config.json", "generation_config.json"],
        kind: Kind::Json(SETTINGS),
        commands: &[DRY_RUN, GENERATE, CONVERT],
    },
    Target {
        name: "chat template",
        weight: 4,
        folders: &["model"],
        files: &["chat_template.jinja"],
        kind: Kind::Template,
        commands: &[DRY_RUN, GENERATE],
    },
    Target {
        name: "other chat templates",
        weight: 2,
        folders: &["templates"],
        files: &["*"],
        kind: Kind::Template,
        commands: &["train {seeds}/qlora.toml --dry-run --data {seeds}/turns.jsonl --set data.chat_template={file}"],
    },
    Target {
        name: "adapter_config.json",
        weight: 3,
        folders: &["adapter-plain"],
        files: &["adapter_config.json"],
        kind: Kind::Json(ADAPTER_PARTS),
        commands: &[INSPECT, MERGE, GENERATE_WITH, COMBINE, CONVERT_ADAPTER],
    },
    Target {
        name: "adapter_config.json, other kinds",
        weight: 2,
        folders: &["adapter-dora", "adapter-saved"],
        files: &["adapter_config.json"],
        kind: Kind::Json(ADAPTER_PARTS),
        commands: &[INSPECT, MERGE, GENERATE_WITH],
    },
    Target {
        name: "adapter's weights",
        weight: 3,
        folders: &["adapter-plain"],
        files: &["adapter_model.safetensors"],
        kind: Kind::Safetensors,
        commands: &[INSPECT, MERGE, GENERATE_WITH, COMBINE, CONVERT_ADAPTER],
    },
    Target {
        name: "adapter's weights, other kinds",
        weight: 2,
        folders: &["adapter-dora", "adapter-saved"],
        files: &["adapter_model.safetensors"],
        kind: Kind::Safetensors,
        commands: &[INSPECT, MERGE, GENERATE_WITH],
    },
    Target {
        name: "model's weights",
        weight: 4,
        folders: &["model"],
        files: &["model.safetensors"],
        kind: Kind::Safetensors,
        commands: &[INSPECT, INSPECT_TENSORS, GENERATE, CONVERT, QUANTIZE, MERGE_BASE],
    },
    Target {
        name: "model's weights of 4 bits",
        weight: 2,
        folders: &["model-4bit"],
        files: &["model.safetensors"],
        kind: Kind::Safetensors,
        commands: &[INSPECT, INSPECT_TENSORS, GENERATE, CONVERT],
    },
    Target {
        name: "weights of each family",
        weight: 2,
        folders: &["archs/*"],
        files: &["model.safetensors"],
        kind: Kind::Safetensors,
        commands: &[INSPECT, INSPECT_TENSORS, QUANTIZE],
    },
    Target {
        name: "weights for GGUF",
        weight: 1,
        folders: GGUF_FAMILIES,
        files: &["model.safetensors"],
        kind: Kind::Safetensors,
        commands: &[CONVERT_BARE],
    },
    Target {
        name: "index",
        weight: 2,
        folders: &["archs/qwen3_moe"],
        files: &["model.safetensors.index.json"],
        kind: Kind::Json(INDEX),
        commands: &[INSPECT, INSPECT_TENSORS, QUANTIZE],
    },
    Target {
        name: "configuration",
        weight: 5,
        folders: &["."],
        files: &["qlora.toml"],
        kind: Kind::Toml,
        commands: &["train {file} --dry-run"],
    },
    Target {
        name: "configuration, one step",
        weight: 2,
        folders: &["."],
        files: &["qlora.toml"],
        kind: Kind::Toml,
        commands: &["train {file} --max-steps 1 --output-dir {out}/run"],
    },
    Target {
        name: "rows",
        weight: 5,
        folders: &["."],
        files: &["chat.jsonl", "prompt.jsonl", "alpaca.jsonl", "text.jsonl", "share.jsonl", "tools.jsonl"],
        kind: Kind::Rows,
        commands: &["train {seeds}/qlora.toml --dry-run --data {file}"],
    },
    Target {
        name: "training state",
        weight: 2,
        folders: &["checkpoint"],
        files: &["training_state.json", "training_state.json", "training_state.json", "checksums.json"],
        kind: Kind::Json(&[]),
        commands: &[INSPECT, RESUME],
    },
    Target {
        name: "optimizer's state",
        weight: 1,
        folders: &["checkpoint"],
        files: &["optimizer.safetensors"],
        kind: Kind::Safetensors,
        commands: &[RESUME],
    },
];

/// What stands for the weights of a family whose checkpoint has several files.
const SHARD: &str = "model-00002-of-00003.safetensors";

/// A file is at most this long: the bounds of time and memory are for small inputs.
const MAX_BYTES: usize = 8 << 20;

/// A mutation: the file that it replaces, its bytes, and the command that reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mutation {
    /// Its target's place in [`ALL`].
    pub(crate) target: usize,
    /// The folder, below that of the seeds.
    pub(crate) folder: PathBuf,
    pub(crate) file: String,
    pub(crate) bytes: Vec<u8>,
    /// With its placeholders.
    pub(crate) command: &'static str,
    /// What was done, step by step.
    pub(crate) what: Vec<String>,
}

/// The mutation number `number` of a seed.
pub(crate) fn draw(seeds: &Path, seed: u64, number: u64) -> Result<Mutation> {
    let mut dice = Dice::new(seed, number);
    let sum: usize = ALL.iter().map(|target| target.weight).sum();
    let mut at = dice.below(sum);
    let target = ALL.iter().position(|target| {
        let here = at < target.weight;
        at = at.wrapping_sub(target.weight);
        here
    });
    let target = target.context("weights")?;
    let Target { folders, files, kind, commands, .. } = &ALL[target];
    let folder = match dice.pick(folders).strip_suffix("/*") {
        Some(parent) => Path::new(parent).join(dice.pick(&names(&seeds.join(parent))?)),
        None => PathBuf::from(dice.pick(folders)),
    };
    let mut file = (*dice.pick(files)).to_owned();
    if file == "*" {
        file = dice.pick(&names(&seeds.join(&folder))?).clone();
    }
    let path = seeds.join(&folder).join(&file);
    // A sharded checkpoint: one of its files.
    let path = if path.is_file() {
        path
    } else {
        file = SHARD.to_owned();
        seeds.join(&folder).join(&file)
    };
    let mut bytes = fs::read(&path).with_context(|| path.display().to_string())?;
    let steps = if dice.once_in(3) { 2 + dice.below(3) } else { 1 };
    let mut what = Vec::new();
    for _ in 0..steps {
        what.push(mutate(&mut dice, *kind, &mut bytes));
        // Steps multiply what is long already.
        if bytes.len() > MAX_BYTES {
            bytes.truncate(MAX_BYTES);
            what.push(format!("cut at byte {MAX_BYTES}"));
            break;
        }
    }
    Ok(Mutation { target, folder, file, bytes, command: dice.pick::<&'static str>(commands), what })
}

fn names(folder: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut names: Vec<String> =
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect::<Result<_>>()?;
    names.sort();
    Ok(names)
}

fn mutate(dice: &mut Dice, kind: Kind, data: &mut Vec<u8>) -> String {
    match kind {
        Kind::Safetensors => container::mutate(dice, data),
        Kind::Template => text::mutate_template(dice, data),
        Kind::Toml => text::mutate_toml(dice, data),
        Kind::Json(_) | Kind::Rows if dice.once_in(6) => bytes::mutate(dice, data),
        Kind::Json(grafts) => mutate_document(dice, data, grafts),
        Kind::Rows => {
            let mut lines: Vec<Vec<u8>> = data.split(|&byte| byte == b'\n').map(<[u8]>::to_vec).collect();
            let at = dice.below(lines.len().saturating_sub(1));
            let what = mutate_document(
                dice,
                &mut lines[at],
                &[
                    "\"user\"",
                    "\"assistant\"",
                    "\"tool\"",
                    "\"system\"",
                    "\"messages\"",
                    "\"<|im_start|>assistant\\n\"",
                ],
            );
            *data = lines.join(&b'\n');
            format!("row {}: {what}", at + 1)
        }
    }
}

fn mutate_document(dice: &mut Dice, data: &mut Vec<u8>, grafts: &[&str]) -> String {
    match Node::parse(data) {
        Some(mut tree) => {
            let what = json::mutate(dice, &mut tree, grafts);
            *data = tree.to_string().into_bytes();
            what
        }
        // An earlier step made it no JSON.
        None => bytes::mutate(dice, data),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// Seeds of the right names; what they hold matters little here.
    fn seeds(dir: &Path) {
        for target in ALL {
            for folder in target.folders {
                let folder = dir.join(folder.replace('*', "one"));
                fs::create_dir_all(&folder).unwrap();
                for file in target.files.iter().chain(&["config.json", SHARD]) {
                    fs::write(folder.join(file.replace('*', "0.jinja")), "{\"a\": 1}\n{\"b\": [2]}\n").unwrap();
                }
            }
        }
    }

    #[test]
    fn a_number_gives_one_mutation_and_all_targets_come() {
        let dir = tempfile::tempdir().unwrap();
        seeds(dir.path());
        let all: Vec<Mutation> = (0..600).map(|number| draw(dir.path(), 1, number).unwrap()).collect();
        assert_eq!(all[17], draw(dir.path(), 1, 17).unwrap());
        assert_ne!(all[17].what, draw(dir.path(), 2, 17).unwrap().what);
        for (number, target) in ALL.iter().enumerate() {
            assert!(all.iter().any(|mutation| mutation.target == number), "{}", target.name);
            for command in target.commands {
                assert!(command.contains("{case}") || command.contains("{file}"), "{command} does not read it");
            }
        }
    }
}
