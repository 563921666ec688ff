//! `qlora push`: a folder to the hub, with a model card.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use burn_qlora::model_hub::{Content, PushOptions, Upload, is_hub_id};
use burn_qlora::report::{Card, memory};
use burn_qlora::{AdapterConfig, Summary, TrainConfig, checkpoint};

use crate::args::PushArgs;
use crate::exit::{Code, UsageError};
use crate::hub;
use crate::output::{Table, print};

const CARD: &str = "README.md";
const ADAPTER_CONFIG: &str = "adapter_config.json";
/// What resumes a run: of no use elsewhere, and with the paths of this machine inside.
const PRIVATE: [&str; 3] = ["checksums.json", "optimizer.safetensors", "training_state.json"];
/// Folders whose files belong to a model.
const FOLDERS: [&str; 1] = ["additional_chat_templates"];

/// Runs the command.
pub fn run(args: &PushArgs) -> Result<Code> {
    let files = files(args)?;
    if args.dry_run {
        print(&listing(args, &files)?)?;
        return Ok(Code::Done);
    }
    let options = PushOptions { revision: args.revision.clone(), private: args.private, summary: args.message.clone() };
    let pushed = hub::hub().push(&args.repo, &files, &options)?;
    let known = match (pushed.large_bytes, pushed.sent_bytes) {
        (0, _) => String::new(),
        (_, 0) => ", the large ones known to the hub already".into(),
        (large, sent) => format!(", {} sent of {}", memory(sent), memory(large)),
    };
    print(&format!("Pushed   {} files to {}{known}\nCommit   {}\n", files.len(), pushed.repo, pushed.url))?;
    Ok(Code::Done)
}

/// What is uploaded.
fn files(args: &PushArgs) -> Result<Vec<Upload>> {
    let dir = &args.dir;
    let usage = |text: String| Err(UsageError(text).into());
    if !dir.is_dir() {
        return usage(format!("{}: no such folder", dir.display()));
    }
    let is_adapter = dir.join(ADAPTER_CONFIG).is_file();
    if !is_adapter && !dir.join("config.json").is_file() {
        let inner = dir.join("adapter");
        let hint = if inner.is_dir() { format!("; give {}", inner.display()) } else { String::new() };
        return usage(format!("{}: neither an adapter nor a checkpoint{hint}", dir.display()));
    }
    let mut files = Vec::new();
    collect(dir, "", &mut files)?;
    if is_adapter {
        let mut config = AdapterConfig::load(dir)?;
        let base = base_model(args, &config)?;
        if config.base_model_name_or_path.as_ref() != Some(&base) {
            config.base_model_name_or_path = Some(base.clone());
            let content = Content::Bytes(config.to_json().into_bytes());
            files.retain(|file| file.path != ADAPTER_CONFIG);
            files.push(Upload { path: ADAPTER_CONFIG.into(), content });
        }
        if !files.iter().any(|file| file.path == CARD) {
            files.push(Upload { path: CARD.into(), content: Content::Bytes(card(args, &base, &config)?.into_bytes()) });
        }
    } else if args.base_model.is_some() {
        return usage("--base-model belongs to an adapter".into());
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

fn collect(dir: &Path, below: &str, files: &mut Vec<Upload>) -> Result<()> {
    let reading = || format!("can't read {}", dir.display());
    for entry in std::fs::read_dir(dir).with_context(reading)? {
        let entry = entry.with_context(reading)?;
        let name = entry.file_name();
        let path = entry.path();
        let Some(name) = name.to_str() else {
            return Err(UsageError(format!("{}: the hub takes names in UTF-8 only", path.display())).into());
        };
        let kind = entry.file_type().with_context(reading)?;
        if name.starts_with('.') || PRIVATE.contains(&name) {
            continue;
        }
        if kind.is_symlink() {
            let text = "is a link, and what it leads to may not be meant for others; copy the file, or remove the link";
            return Err(UsageError(format!("{} {text}", path.display())).into());
        }
        if kind.is_file() {
            files.push(Upload { path: format!("{below}{name}"), content: Content::File(path) });
        } else if kind.is_dir() && below.is_empty() && FOLDERS.contains(&name) {
            collect(&path, &format!("{name}/"), files)?;
        }
    }
    Ok(())
}

/// The base's hub id: a folder of this machine tells others nothing.
fn base_model(args: &PushArgs, config: &AdapterConfig) -> Result<String, UsageError> {
    let named = config.base_model_name_or_path.as_deref().unwrap_or_default();
    let chosen = args.base_model.as_deref().unwrap_or(named);
    let is_id = is_hub_id(chosen) && !Path::new(chosen).exists();
    match (is_id, &args.base_model) {
        (true, _) => Ok(chosen.to_owned()),
        (false, Some(id)) => Err(UsageError(format!("--base-model {id}: a hub id looks like `org/name`"))),
        (false, None) if named.is_empty() => {
            Err(UsageError("the adapter names no base model: --base-model gives its hub id".into()))
        }
        (false, None) => Err(UsageError(format!(
            "the adapter names its base model by a folder, {named}, which others don't have: --base-model gives its hub id"
        ))),
    }
}

/// The card, with what the run's folder around the adapter tells.
fn card(args: &PushArgs, base: &str, config: &AdapterConfig) -> Result<String> {
    let dir = std::path::absolute(&args.dir).unwrap_or_else(|_| args.dir.clone());
    let run = dir.parent().unwrap_or(&dir);
    let summary: Option<Summary> = match std::fs::read(run.join("summary.json")) {
        Ok(bytes) => Some(
            serde_json::from_slice(&bytes)
                .with_context(|| format!("{}: not a summary", run.join("summary.json").display()))?,
        ),
        Err(_) => None,
    };
    // The run whose adapter this is, not a neighbour of another run's summary.
    let summary = summary.filter(|summary| summary.adapter.file_name() == dir.file_name());
    let state = match dir.join("training_state.json").is_file() {
        true => Some(checkpoint::load(&dir)?.state),
        false if summary.is_some() => match checkpoint::list(run)?.pop() {
            Some((_, path)) => Some(checkpoint::load(&path)?.state),
            None => None,
        },
        false => None,
    };
    let training = state.map(|state| TrainConfig::parse(&state.config, "training_state.json")).transpose()?;
    let name = args.repo.rsplit('/').next().unwrap_or(&args.repo);
    let card = Card { name, base_model: base, adapter: config, summary: summary.as_ref(), config: training.as_ref() };
    Ok(card.to_markdown())
}

fn listing(args: &PushArgs, files: &[Upload]) -> Result<String> {
    let mut table = Table::new(["file", "size"]);
    let mut text = String::new();
    for file in files {
        let size = match &file.content {
            Content::Bytes(bytes) => bytes.len() as u64,
            Content::File(path) => std::fs::metadata(path).map_or(0, |meta| meta.len()),
        };
        table.row([file.path.clone(), memory(size)]);
    }
    writeln!(text, "To {}, branch {}:\n\n{table}", args.repo, args.revision)?;
    for file in files {
        if let (CARD, Content::Bytes(bytes)) = (file.path.as_str(), &file.content) {
            writeln!(text, "{CARD}:\n\n{}", String::from_utf8_lossy(bytes))?;
        }
    }
    Ok(text)
}
