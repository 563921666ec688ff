//! `qlora convert`: a checkpoint, with or without an adapter, or an adapter alone, for llama.cpp.

use std::path::{Path, PathBuf};

use anyhow::Result;
use burn_qlora::adapter_io::merge_checkpoint_checked;
use burn_qlora::gguf::{ExportReport, GgmlType, GgufOptions, export_gguf, export_lora_gguf};
use burn_qlora::report::memory;
use burn_qlora::{Adapter, MergeOptions, atomic};
use serde_json::json;

use crate::args::{ConvertArgs, Format};
use crate::exit::{Code, UsageError};
use crate::output::print;
use crate::outputs::{self, ConvertBar};
use crate::sources;
use crate::verify;

/// Runs the command.
pub fn run(args: &ConvertArgs) -> Result<Code> {
    let Format::Gguf = args.format;
    let kind = kind(&args.kind)?;
    outputs::file(&args.output, args.force)?;
    let (adapter, companions) = args.adapters.as_deref().map(sources::load).transpose()?.unzip();
    let base = sources::base(args.model.as_deref(), args.revision.as_deref(), adapter.as_ref())?;
    let (what, report) = match &adapter {
        Some(adapter) if args.adapter_only => ("LoRA GGUF", export_lora_gguf(adapter, &base, &args.output, kind)?),
        Some(adapter) => ("GGUF, merged", merged(args, &base, adapter, companions.unwrap_or_default(), kind)?),
        None => ("GGUF", model(args, &base, None, kind)?),
    };
    if args.json {
        let object = json!({
            "output": args.output.display().to_string(),
            "what": what,
            "tensors": report.tensors,
            "bytes": report.total_bytes,
            "type": kind.name().to_ascii_lowercase(),
            "in_f16": report.fallbacks,
        });
        print(&format!("{object}\n"))?;
        return Ok(Code::Done);
    }
    let mut text = String::new();
    if !report.fallbacks.is_empty() {
        text += &format!(
            "{} matrices are in f16, their rows are no whole blocks of {}; the first is {}\n",
            report.fallbacks.len(),
            kind.name(),
            report.fallbacks[0]
        );
    }
    text += &format!(
        "{what:<12} {}: {} tensors, {} ({})\n",
        args.output.display(),
        report.tensors,
        memory(report.total_bytes),
        kind.name().to_ascii_lowercase()
    );
    print(&text)?;
    Ok(Code::Done)
}

fn kind(name: &str) -> Result<GgmlType, UsageError> {
    let names: Vec<String> = GgmlType::ALL.iter().map(|kind| kind.name().to_ascii_lowercase()).collect();
    GgmlType::ALL
        .into_iter()
        .find(|kind| kind.name().eq_ignore_ascii_case(name))
        .ok_or_else(|| UsageError(format!("--type {name}: must be one of {}", names.join(", "))))
}

/// Merges into a temporary checkpoint beside the output, and writes that.
fn merged(
    args: &ConvertArgs,
    base: &Path,
    adapter: &Adapter,
    companions: Vec<PathBuf>,
    kind: GgmlType,
) -> Result<ExportReport> {
    let scratch = atomic::Scratch::beside(&args.output)?;
    let dir = scratch.path().join("merged");
    let mut bar = ConvertBar::new("Merging");
    let options = MergeOptions { companions, ..MergeOptions::default() };
    let check = |merged: &Path| if args.no_verify { Ok(()) } else { verify::merged(base, adapter, merged, None) };
    merge_checkpoint_checked(base, adapter, &dir, &options, &mut |progress| bar.update(progress), check)?;
    bar.finish();
    // The temporary folder's name is nobody's name for a model.
    let own = base.canonicalize().ok().and_then(|dir| Some(dir.file_name()?.to_string_lossy().into_owned()));
    model(args, &dir, own, kind)
}

fn model(args: &ConvertArgs, dir: &Path, name: Option<String>, kind: GgmlType) -> Result<ExportReport> {
    let options = GgufOptions {
        kind,
        name: args.name.clone().or(name),
        pre_tokenizer: args.pre_tokenizer.clone(),
        without_tokenizer: args.without_tokenizer,
    };
    let mut bar = ConvertBar::new("Writing");
    let report = export_gguf(dir, &args.output, &options, &mut |progress| bar.update(progress))?;
    bar.finish();
    Ok(report)
}
