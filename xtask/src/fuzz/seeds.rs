//! The valid inputs that are mutated: small, and most of them written by the program itself.
//!
//! The tokenizer is testdata's, cut to 300 tokens, and the model has its vocabulary: a mutation of a small file hits
//! something that matters, and a process is done in a few hundredths of a second.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::checkpoint::{Shape, write};
use crate::program::{Bounds, End, Program};

/// Tokens of the model.
const VOCABULARY: u64 = 300;

/// Adapters: the folder's name and the keys that they are trained with.
const ADAPTERS: &[(&str, &[&str])] = &[
    ("adapter-plain", &["lora.trainable_token_indices=[]"]),
    ("adapter-dora", &["lora.use_dora=true", "lora.rank_pattern={ q_proj = 2 }", "lora.use_rslora=true"]),
    (
        "adapter-saved",
        &[
            "lora.modules_to_save=[\"norm\", \"lm_head\"]",
            "lora.target_modules=[\"q_proj\", \"embed_tokens\"]",
            // A module that is adapted or trained in full has no rows of its own.
            "lora.trainable_token_indices=[]",
        ],
    ),
];

/// Layouts of rows.
const ROWS: &[(&str, &str)] = &[
    (
        "chat.jsonl",
        "{\"messages\": [{\"role\": \"system\", \"content\": \"Be short.\"}, {\"role\": \"user\", \"content\": \"Say a\"}, {\"role\": \"assistant\", \"content\": \"a\"}]}",
    ),
    (
        "turns.jsonl",
        "{\"messages\": [{\"role\": \"user\", \"content\": \"Say a\"}, {\"role\": \"assistant\", \"content\": \"a\"}]}",
    ),
    ("prompt.jsonl", "{\"prompt\": \"Say a\", \"completion\": \"a\"}"),
    ("alpaca.jsonl", "{\"instruction\": \"Say\", \"input\": \"a\", \"output\": \"a\"}"),
    ("text.jsonl", "{\"text\": \"a b c\"}"),
    (
        "share.jsonl",
        "{\"conversations\": [{\"from\": \"human\", \"value\": \"Say a\"}, {\"from\": \"gpt\", \"value\": \"a\"}], \"system\": \"Be short.\"}",
    ),
    (
        "tools.jsonl",
        "{\"tools\": [{\"type\": \"function\", \"function\": {\"name\": \"f\", \"parameters\": {\"type\": \"object\", \"properties\": {\"a\": {\"type\": \"integer\"}}}}}], \"messages\": [{\"role\": \"user\", \"content\": \"Go\"}, {\"role\": \"assistant\", \"content\": \"I call it\", \"tool_calls\": [{\"type\": \"function\", \"function\": {\"name\": \"f\", \"arguments\": {\"a\": 1}}}]}, {\"role\": \"tool\", \"content\": \"2\", \"name\": \"f\"}, {\"role\": \"assistant\", \"content\": \"Two\"}]}",
    ),
];

/// Writes all of them into `folder`.
pub(crate) fn make(program: &Program, folder: &Path) -> Result<()> {
    let testdata = crate::root().join("testdata/reference");
    let config: Value = serde_json::from_slice(&fs::read(testdata.join("tiny-llama/config.json"))?)?;
    let model = folder.join("model");
    write(&Shape::of("model", small(config))?, &model, 1 << 30, 0)?;
    let tokenizer: Value = serde_json::from_slice(&fs::read(testdata.join("tiny-llama/tokenizer.json"))?)?;
    fs::write(model.join("tokenizer.json"), serde_json::to_vec_pretty(&cut(tokenizer)?)?)?;
    fs::copy(testdata.join("tiny-llama/generation_config.json"), model.join("generation_config.json"))?;
    copy_tree(&testdata.join("archs"), &folder.join("archs"), false)?;
    for (name, row) in ROWS {
        fs::write(folder.join(name), format!("{row}\n").repeat(4))?;
    }
    let templates: Value = serde_json::from_slice(&fs::read(testdata.join("chat/templates.json"))?)?;
    let templates = templates.as_array().into_iter().flatten().filter_map(|case| case["template"].as_str());
    let mut templates: Vec<&str> = templates.collect();
    templates.dedup();
    for (number, template) in templates.iter().enumerate() {
        fs::create_dir_all(folder.join("templates"))?;
        fs::write(folder.join(format!("templates/{number}.jinja")), template)?;
    }
    fs::write(folder.join("qlora.toml"), configuration(program, folder)?)?;
    for (name, keys) in ADAPTERS {
        let out = folder.join(format!("run-{name}"));
        let mut args = ["train", "qlora.toml", "--max-steps", "1", "--output-dir"].map(str::to_owned).to_vec();
        args.push(out.display().to_string());
        args.extend(keys.iter().flat_map(|key| ["--set".to_owned(), (*key).to_owned()]));
        run(program, &args, folder)?;
        fs::rename(out.join("adapter"), folder.join(name))?;
        if *name == "adapter-plain" {
            fs::rename(out.join("checkpoint-000001"), folder.join("checkpoint"))?;
        }
        fs::remove_dir_all(out)?;
    }
    run(
        program,
        &["quantize", "--model", "model", "--format", "bnb-4bit", "--output", "model-4bit"].map(str::to_owned),
        folder,
    )
}

fn run(program: &Program, args: &[String], folder: &Path) -> Result<()> {
    let bounds = Bounds { time: Duration::from_secs(120), memory: 4 << 30 };
    let ended = program.start(args, folder, folder)?.wait(bounds)?;
    match ended.end {
        End::Exit(0) => Ok(()),
        _ => bail!("making the inputs: `qlora {}`: {}", args.join(" "), ended.describe()),
    }
}

/// A configuration that has every key, those that are left out by default included.
fn configuration(program: &Program, folder: &Path) -> Result<String> {
    let ended = {
        let bounds = Bounds { time: Duration::from_secs(60), memory: 4 << 30 };
        program.start(&["init".into(), "-".into()], folder, folder)?.wait(bounds)?
    };
    let template = String::from_utf8(ended.stdout).context("qlora init -")?;
    let path = |name: &str| format!("\"{}\"", folder.join(name).display());
    Ok(every_key(
        &template,
        &[
            ("device", "\"cpu\"".to_owned()),
            ("path", path("model")),
            ("train", path("chat.jsonl")),
            ("rank", "4".to_owned()),
            ("max_length", "256".to_owned()),
            ("max_steps", "2".to_owned()),
            ("batch_size", "1".to_owned()),
            ("gradient_accumulation_steps", "1".to_owned()),
            ("eval_fraction", "0.25".to_owned()),
        ],
    ))
}

/// Keys that would change what the others mean when they are set.
const LEFT_OUT: [&str; 7] =
    ["revision", "eval", "chat_template", "exclude_modules", "layers_to_transform", "layers_pattern", "system_prompt"];

/// The keys and sections of `qlora init`'s file without its comments, with some values replaced. A key that stands
/// after a single `#` is set, unless it is one of [`LEFT_OUT`].
fn every_key(template: &str, values: &[(&str, String)]) -> String {
    let mut text = String::new();
    for line in template.lines() {
        let bare = line.strip_prefix("# ").unwrap_or(line);
        let key = bare.split_once(" = ").map(|(key, _)| key);
        match key {
            _ if line.starts_with('[') => text += line,
            Some(key) if key.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_' || byte.is_ascii_digit()) => {
                if line.starts_with('#') && LEFT_OUT.contains(&key) {
                    continue;
                }
                match values.iter().find(|(name, _)| *name == key) {
                    Some((_, value)) => text += &format!("{key} = {value}"),
                    None => text += bare,
                }
            }
            _ => continue,
        }
        text.push('\n');
    }
    text
}

/// The configuration of a model that loads in a moment.
fn small(mut config: Value) -> Value {
    for (key, value) in [
        ("vocab_size", json!(VOCABULARY)),
        ("hidden_size", json!(64)),
        ("intermediate_size", json!(96)),
        ("head_dim", json!(16)),
        ("num_attention_heads", json!(4)),
        ("num_key_value_heads", json!(2)),
        ("num_hidden_layers", json!(2)),
        ("tie_word_embeddings", json!(false)),
    ] {
        config[key] = value;
    }
    config
}

/// A tokenizer with its first tokens and the merges among them.
fn cut(mut tokenizer: Value) -> Result<Value> {
    let vocabulary = tokenizer["model"]["vocab"].as_object_mut().context("tokenizer.json has a vocabulary")?;
    vocabulary.retain(|_, id| id.as_u64().is_some_and(|id| id < VOCABULARY));
    let vocabulary = vocabulary.clone();
    let merges = tokenizer["model"]["merges"].as_array_mut().context("tokenizer.json has merges")?;
    merges.retain(|merge| {
        let [Some(left), Some(right)] = [merge[0].as_str(), merge[1].as_str()] else { return false };
        [left, right, &format!("{left}{right}")].iter().all(|token| vocabulary.contains_key(*token))
    });
    Ok(tokenizer)
}

/// Copies a folder. With `link`, files are links where the file system has them: who writes to one must remove it first.
pub(crate) fn copy_tree(from: &Path, to: &Path, link: bool) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| from.display().to_string())? {
        let entry = entry?;
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if from.is_dir() {
            copy_tree(&from, &to, link)?;
        } else if !link || fs::hard_link(&from, &to).is_err() {
            fs::copy(&from, &to)?;
        }
    }
    Ok(())
}

/// Writes the path `to` for the path `from` wherever a file has it.
pub(crate) fn relocate(file: &Path, from: &Path, to: &Path) -> Result<()> {
    let bytes = fs::read(file).with_context(|| file.display().to_string())?;
    let (from, to) = (from.display().to_string(), to.display().to_string());
    let mut moved = Vec::with_capacity(bytes.len());
    let mut rest = bytes.as_slice();
    while let Some((&first, after)) = rest.split_first() {
        match rest.strip_prefix(from.as_bytes()) {
            Some(after) => {
                moved.extend(to.as_bytes());
                rest = after;
            }
            None => {
                moved.push(first);
                rest = after;
            }
        }
    }
    Ok(fs::write(file, moved)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_tokenizer_keeps_the_merges_that_it_can() {
        let tokenizer = json!({"model": {"vocab": {"a": 4, "b": 5, "ab": 299, "abb": 300},
            "merges": [["a", "b"], ["ab", "b"], ["c", "a"]]}});
        let cut = cut(tokenizer).unwrap();
        assert_eq!(cut["model"]["merges"], json!([["a", "b"]]));
        assert_eq!(cut["model"]["vocab"].as_object().unwrap().len(), 3);
        assert!(super::cut(json!({})).is_err());
    }

    #[test]
    fn every_key_of_the_template_is_set() {
        let template = "# Rank of the adapters = large.\n[lora]\nrank = 64\n# Only these.\n# warmup_steps = 10\n# eval = \"x\"\n\
            rank_pattern = {}\n";
        let text = every_key(template, &[("rank", "4".into())]);
        assert_eq!(text, "[lora]\nrank = 4\nwarmup_steps = 10\nrank_pattern = {}\n");
    }

    #[test]
    fn a_path_is_replaced_in_what_is_no_text_too() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("qlora.toml");
        fs::write(&file, b"path = \"/t/seeds/model\"\xff\n/t/seed /t/seeds").unwrap();
        relocate(&file, Path::new("/t/seeds"), Path::new("/u")).unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"path = \"/u/model\"\xff\n/t/seed /u");
    }

    #[test]
    fn a_tree_is_copied() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        fs::write(dir.path().join("a/b/c"), "x").unwrap();
        for link in [false, true] {
            let to = dir.path().join(format!("{link}"));
            copy_tree(&dir.path().join("a"), &to, link).unwrap();
            assert_eq!(fs::read(to.join("b/c")).unwrap(), b"x");
        }
    }
}
