//! `qlora inspect`: what a folder or a safetensors file is.

mod gguf;
mod json;
mod tensors;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use burn_qlora::adapter_io::TargetModules;
use burn_qlora::adapter_io::listing::Listing;
use burn_qlora::adapter_io::printable::{printable, printable_lines, shortened};
use burn_qlora::metrics::{History, METRICS_FILE};
use burn_qlora::qlora_train::run_holder;
use burn_qlora::report::{count, memory};
use burn_qlora::{Adapter, Checkpoint, FormatError, Summary, checkpoint};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::args::InspectArgs;
use crate::exit::{Code, UsageError};
use crate::output::{Table, print};

pub use burn_qlora::adapter_io::listing::group_name;

/// The characters that a value of a file is shown with at most.
const WIDEST: usize = 400;

/// Runs the command.
pub fn run(args: &InspectArgs) -> Result<Code> {
    let path = &args.path;
    let has = |name: &str| path.join(name).is_file();
    let is_gguf = gguf::is_gguf(path);
    if args.json {
        print(&format!("{}\n", json::of(path)?))?;
        return check(path, is_gguf);
    }
    let text = if is_gguf {
        gguf::describe(path, args.tensors)?
    } else if path.is_file() {
        file(path, args.tensors)?
    } else if !path.is_dir() {
        return Err(UsageError(format!("{}: no such file or folder", path.display())).into());
    } else if has("training_state.json") {
        training_checkpoint(path)?
    } else if has("adapter_config.json") {
        adapter(path)?
    } else if has("config.json") || has("model.safetensors") || has("model.safetensors.index.json") {
        model(path, args.tensors)?
    } else if ["summary.json", METRICS_FILE].into_iter().any(has)
        || run_holder(path)?.is_some()
        || !checkpoint::list(path)?.is_empty()
    {
        run_folder(path)?
    } else {
        let what =
            "neither a checkpoint (config.json), an adapter (adapter_config.json) nor a training run (summary.json)";
        return Err(UsageError(format!("{}: {what}", path.display())).into());
    };
    // Names and values of strangers; a terminal must not obey them.
    print(&printable_lines(&text))?;
    check(path, is_gguf)
}

/// Looks for values that are not finite. Last, because it reads all of the file. An adapter was checked while it was loaded.
fn check(path: &Path, is_gguf: bool) -> Result<Code> {
    let has = |name: &str| path.join(name).is_file();
    if is_gguf {
        // Values of most of its types are not read here.
    } else if path.is_file() {
        Checkpoint::open_file(path)?.check_finite()?;
    } else if !has("adapter_config.json") && (has("model.safetensors") || has("model.safetensors.index.json")) {
        Checkpoint::open(path)?.check_finite()?;
    }
    Ok(Code::Done)
}

fn file(path: &Path, all: bool) -> Result<String> {
    let listing = Listing::new(&Checkpoint::open_file(path)?);
    let (totals, table) = (tensors::totals(&listing), tensors::table(&listing, all));
    Ok(format!("{}: safetensors, {totals}\n\n{table}", path.display()))
}

fn model(path: &Path, all: bool) -> Result<String> {
    let checkpoint = Checkpoint::open(path)?;
    let listing = Listing::new(&checkpoint);
    let mut text = format!("{}: ", path.display());
    let file = path.join("config.json");
    let config = match file.is_file() {
        true => json(&file)?,
        false => Value::Null,
    };
    let quantized = config.get("quantization_config").filter(|value| !value.is_null());
    // What the tensors are, whatever the configuration says.
    let storages = checkpoint.storages();
    match (checkpoint.quantized_modules().is_empty(), storages.is_empty()) {
        (false, _) => writeln!(text, "a model checkpoint, quantized to 4 bits by bitsandbytes\n")?,
        (true, false) => writeln!(text, "a model checkpoint, with weights in {}\n", storages.join(", "))?,
        (true, true) => writeln!(text, "a model checkpoint\n")?,
    }
    // The language model of a larger one has a section of its own.
    let section = config.get("text_config").filter(|section| section.is_object());
    let mut describe = |label: &str, key: &str| {
        let of_section = section.and_then(|section| section.get(key));
        let value = config.get(key).or(of_section).filter(|value| !value.is_null());
        value.map_or(Ok(()), |value| writeln!(text, "{label:<24} {}", plain(value)))
    };
    describe("model type", "model_type")?;
    describe("architecture", "architectures")?;
    describe("layers", "num_hidden_layers")?;
    describe("hidden size", "hidden_size")?;
    describe("intermediate size", "intermediate_size")?;
    describe("heads", "num_attention_heads")?;
    describe("key and value heads", "num_key_value_heads")?;
    describe("head size", "head_dim")?;
    describe("rank of queries", "q_lora_rank")?;
    describe("rank of keys and values", "kv_lora_rank")?;
    describe("window", "sliding_window")?;
    describe("experts", "num_local_experts")?;
    describe("experts", "num_experts")?;
    describe("experts", "n_routed_experts")?;
    describe("experts of a token", "num_experts_per_tok")?;
    describe("experts of all tokens", "n_shared_experts")?;
    describe("expert size", "moe_intermediate_size")?;
    describe("layers without experts", "first_k_dense_replace")?;
    describe("vocabulary", "vocab_size")?;
    describe("context", "max_position_embeddings")?;
    describe("tied embeddings", "tie_word_embeddings")?;
    if let Some(Value::Object(keys)) = quantized {
        for (key, value) in keys.iter().filter(|(key, _)| key.starts_with("bnb_4bit_")) {
            writeln!(text, "{:<24} {}", one_line(key), plain(value))?;
        }
    }
    let files = checkpoint.files().count();
    writeln!(text, "{:<24} {files}, {}", if files == 1 { "file" } else { "files" }, tensors::totals(&listing))?;
    let tokenizer = ["tokenizer.json", "chat_template.jinja"].map(|name| path.join(name).is_file());
    let template = tokenizer[1]
        || std::fs::read_to_string(path.join("tokenizer_config.json"))
            .is_ok_and(|text| text.contains("\"chat_template\""));
    let words = match (tokenizer[0], template) {
        (false, _) => "none",
        (true, false) => "without chat template",
        (true, true) => "with chat template",
    };
    writeln!(text, "{:<24} {words}\n", "tokenizer")?;
    Ok(text + &tensors::table(&listing, all).to_string())
}

/// A text of a file on one line.
fn one_line(text: &str) -> String {
    shortened(&printable(text), WIDEST).into_owned()
}

/// What a JSON file holds.
fn json<T: DeserializeOwned>(path: &Path) -> Result<T, FormatError> {
    let bytes = std::fs::read(path).map_err(|source| FormatError::Read { path: path.to_owned(), source })?;
    serde_json::from_slice(&bytes).map_err(|e| FormatError::Json { path: path.to_owned(), reason: e.to_string() })
}

/// A JSON value as people write it.
fn plain(value: &Value) -> String {
    one_line(&words(value))
}

fn words(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().map(words).collect::<Vec<_>>().join(", "),
        Value::Bool(true) => "yes".into(),
        Value::Bool(false) => "no".into(),
        other => other.to_string(),
    }
}

fn adapter(path: &Path) -> Result<String> {
    let adapter = Adapter::load(path)?;
    let file = path.join("adapter_model.safetensors");
    let size = std::fs::metadata(&file).map_or(0, |meta| meta.len());
    Ok(format!("{}: a PEFT adapter\n\n{}", path.display(), adapter_words(&adapter, size)?))
}

fn adapter_words(adapter: &Adapter, size: u64) -> Result<String> {
    let config = &adapter.config;
    let modules = adapter.modules();
    let mut text = String::new();
    let mut line = |label: &str, value: &str| writeln!(text, "{label:<24} {}", one_line(value));
    line("base model", config.base_model_name_or_path.as_deref().unwrap_or("not named"))?;
    line("rank, alpha, dropout", &format!("{}, {}, {}", config.r, config.lora_alpha, config.lora_dropout))?;
    line("scaling", if config.use_rslora { "alpha / sqrt(rank) (rsLoRA)" } else { "alpha / rank" })?;
    let targets = match config.target_modules_or_default() {
        TargetModules::List(names) => names.join(", "),
        TargetModules::Pattern(pattern) => format!("regular expression {pattern}"),
    };
    line("target modules", &targets)?;
    let missing = adapter.missing_targets();
    if !missing.is_empty() {
        line("no weights for", &format!("{}: the configuration names them, the file lost them", missing.join(", ")))?;
    }
    for rows in adapter.token_rows()? {
        let tokens: Vec<String> = rows.tokens.iter().map(u32::to_string).collect();
        let label = format!("rows of {}", rows.module.rsplit('.').next().unwrap_or_default());
        line(&label, &format!("{} tokens: {}", tokens.len(), tokens.join(", ")))?;
    }
    if !config.beyond_plain_lora().is_empty() {
        line("beyond plain LoRA", &config.beyond_plain_lora().join(", "))?;
    }
    let parameters: usize = adapter.tensors.values().map(|tensor| tensor.data.len()).sum();
    line("parameters", &format!("{} on {} modules", count(parameters as u64), modules.len()))?;
    line("size", &memory(size))?;

    let mut table = Table::new(["module", "layers", "rank", "scaling", "lora_a", "lora_b"]);
    let mut groups: Vec<([String; 5], usize)> = Vec::new();
    let mut known: HashMap<[String; 5], usize> = HashMap::new();
    for (module, configured) in modules.iter().zip(config.scalings(&modules)?) {
        let Some((lora_a, lora_b)) = adapter.lora(module) else { continue };
        let rank = lora_a.shape.first().map_or(String::new(), usize::to_string);
        let scaling = format!("{:.4}", configured.scaling);
        let key = [group_name(module), rank, scaling, format!("{:?}", lora_a.shape), format!("{:?}", lora_b.shape)];
        let at = *known.entry(key).or_insert_with_key(|key| {
            groups.push((key.clone(), 0));
            groups.len() - 1
        });
        groups[at].1 += 1;
    }
    for ([name, rank, scaling, lora_a, lora_b], layers) in groups {
        table.row([name, layers.to_string(), rank, scaling, lora_a, lora_b]);
    }
    write!(text, "\n{table}")?;
    let others: Vec<&str> = adapter.other_keys().collect();
    if !others.is_empty() {
        writeln!(text, "\n{} tensors beyond lora_a and lora_b, the first is {}", others.len(), one_line(others[0]))?;
    }
    Ok(text)
}

fn training_checkpoint(path: &Path) -> Result<String> {
    let checkpoint = checkpoint::load(path)?;
    let state = &checkpoint.state;
    let mut text = format!("{}: a training checkpoint, which is a PEFT adapter too\n\n", path.display());
    writeln!(text, "{:<24} {}", "steps done", state.step)?;
    writeln!(text, "{:<24} pass {}, micro-batch {} of it", "position in the data", state.epoch + 1, state.position)?;
    writeln!(text, "{:<24} {} rows, {} tokens", "data", state.train_rows, count(state.train_tokens))?;
    let size = std::fs::metadata(path.join("adapter_model.safetensors")).map_or(0, |meta| meta.len());
    text += &adapter_words(&checkpoint.adapter, size)?;
    write!(
        text,
        "\nGo on from it with `qlora train CONFIG.toml --resume {}`; its configuration:\n\n{}",
        path.display(),
        state.config
    )?;
    Ok(text)
}

fn run_folder(path: &Path) -> Result<String> {
    let mut text = format!("{}: the output of a training run\n\n", path.display());
    let summary = path.join("summary.json");
    if summary.is_file() {
        let summary: Summary = json(&summary)?;
        writeln!(text, "{}\n", summary.sentence())?;
        writeln!(text, "{:<24} {}", "adapter", summary.adapter.display())?;
    } else {
        let log = path.join(METRICS_FILE);
        let history = if log.is_file() { History::read(&log)? } else { History::default() };
        match history.steps.last() {
            Some(step) => writeln!(text, "{:<24} {}, loss {:.4}", "steps done", step.step, step.loss)?,
            None => writeln!(text, "{:<24} 0", "steps done")?,
        }
        if let Some(eval) = history.evals.last() {
            writeln!(text, "{:<24} {:.4} at step {}", "evaluation loss", eval.eval_loss, eval.step)?;
        }
        match run_holder(path)? {
            Some(holder) => writeln!(text, "{:<24} under way: {holder}\n", "state")?,
            None if checkpoint::list(path)?.is_empty() => {
                writeln!(text, "{:<24} ended before its first checkpoint: --overwrite starts over\n", "state")?;
            }
            None => writeln!(text, "{:<24} not finished: `qlora train CONFIG.toml --resume` goes on\n", "state")?,
        }
    }
    for (step, checkpoint) in checkpoint::list(path)? {
        writeln!(text, "{:<24} {} (step {step})", "checkpoint", checkpoint.display())?;
    }
    Ok(text)
}
