//! `qlora merge` and `qlora combine`: adapters folded into a checkpoint, or into one adapter.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use burn_qlora::adapter_io::LayerReport;
use burn_qlora::adapter_io::merge_checkpoint_checked;
use burn_qlora::adapter_io::printable::printable;
use burn_qlora::report::memory;
use burn_qlora::{MergeBase, MergeOptions, MergeReport, atomic};
use serde_json::{Value, json};

use crate::args::{CombineArgs, MergeArgs, MergeInto};
use crate::exit::{Code, UsageError};
use crate::output::{Table, print, say};
use crate::outputs::{self, ConvertBar};
use crate::sources;
use crate::verify;

/// Runs `qlora merge`.
pub fn run(args: &MergeArgs) -> Result<Code> {
    let mut options = MergeOptions {
        base: merge_base(args)?,
        max_shard_bytes: args.max_shard_size,
        tokenizer_from: args.tokenizer.clone(),
        companions: Vec::new(),
    };
    if let Some(dir) = args.tokenizer.as_deref().filter(|dir| !dir.is_dir()) {
        return Err(UsageError(format!("--tokenizer {}: no such folder", dir.display())).into());
    }
    outputs::folder(&args.output, args.force)?;
    let (adapter, companions) = sources::adapter(&args.adapters)?;
    options.companions = companions;
    let base = sources::base(args.base_model.model.as_deref(), args.base_model.revision.as_deref(), Some(&adapter))?;
    let mut bar = ConvertBar::new("Merging");
    // Modules that are left out of the rounding are so by rules of the file, not of the model.
    let rounded = match &options.base {
        MergeBase::Dequantized { config, skip_modules } => Some((*config, skip_modules.is_empty())),
        MergeBase::FullPrecision => None,
    };
    let check = |merged: &Path| -> Result<()> {
        match rounded {
            _ if args.no_verify => Ok(()),
            Some((_, false)) => {
                say!(
                    "note: the merged checkpoint was not compared with base and adapter: --skip-module leaves parts unrounded"
                );
                Ok(())
            }
            rounded => verify::merged(&base, &adapter, merged, rounded.map(|(config, _)| config)),
        }
    };
    let report =
        merge_checkpoint_checked(&base, &adapter, &args.output, &options, &mut |progress| bar.update(progress), check)?;
    bar.finish();
    match args.json {
        true => print(&format!("{}\n", as_json(args, &report)))?,
        false => print(&describe(args, &report)?)?,
    }
    Ok(Code::Done)
}

/// Runs `qlora combine`.
pub fn run_combine(args: &CombineArgs) -> Result<Code> {
    outputs::folder(&args.output, args.force)?;
    let (adapter, companions) = sources::adapter(&args.adapters)?;
    atomic::replace_dir(&args.output, |dir| -> Result<()> {
        adapter.save(dir)?;
        for path in &companions {
            std::fs::copy(path, dir.join(path.file_name().unwrap_or_default()))
                .with_context(|| format!("can't copy {}", path.display()))?;
        }
        Ok(())
    })?;
    print(&format!(
        "Combined {} adapters: rank {} on {} modules\nAdapter  {}\n",
        args.adapters.adapters.len(),
        adapter.config.r,
        adapter.modules().len(),
        args.output.display()
    ))?;
    Ok(Code::Done)
}

fn merge_base(args: &MergeArgs) -> Result<MergeBase, UsageError> {
    let config = sources::four_bit(&args.four_bit.quant_type, args.four_bit.no_double_quant)?;
    let given =
        args.four_bit.no_double_quant || !args.four_bit.skip_modules.is_empty() || args.four_bit.quant_type != "nf4";
    match args.base {
        MergeInto::Full if given => Err(UsageError(
            "--quant-type, --no-double-quant and --skip-module belong to --base dequantized-4bit".into(),
        )),
        MergeInto::Full => Ok(MergeBase::FullPrecision),
        MergeInto::Dequantized4bit => {
            Ok(MergeBase::Dequantized { config, skip_modules: args.four_bit.skip_modules.clone() })
        }
    }
}

/// What was merged, for a program.
fn as_json(args: &MergeArgs, report: &MergeReport) -> Value {
    let layer = |layer: &LayerReport| json!({"name": layer.name, "largest": layer.change.largest, "relative": layer.change.relative});
    json!({
        "output": args.output.display().to_string(),
        "files": report.files,
        "bytes": report.total_bytes,
        "changed_weights": report.tensors.len(),
        "layers": report.by_layer().iter().map(layer).collect::<Vec<_>>(),
        "missing": report.missing,
        "untied": report.untied,
        "vocabulary": report.vocabulary,
    })
}

/// The changes layer by layer, and where everything went.
fn describe(args: &MergeArgs, report: &MergeReport) -> Result<String> {
    let rounded = report.tensors.iter().any(|tensor| tensor.quantization.is_some());
    let percent = |part: f32| format!("{:.3} %", 100.0 * part);
    let mut text = String::new();
    if rounded {
        let mut table = Table::new(["layer", "largest change", "relative change", "4-bit rounding before"]);
        for layer in report.by_layer() {
            let rounding = layer.quantization.map_or(String::new(), |change| percent(change.relative));
            table.row([layer.name, format!("{:.2e}", layer.change.largest), percent(layer.change.relative), rounding]);
        }
        write!(text, "{table}")?;
    } else {
        let mut table = Table::new(["layer", "largest change", "relative change"]);
        for layer in report.by_layer() {
            table.row([layer.name, format!("{:.2e}", layer.change.largest), percent(layer.change.relative)]);
        }
        write!(text, "{table}")?;
    }
    writeln!(
        text,
        "\nRelative: |new - old| / |old| of the weight in the layer that changed most; {} weights changed.",
        report.tensors.len()
    )?;
    if rounded {
        text += "The base was rounded to 4 bits before the adapter was added: the merged model computes what the\n\
                 adapter was trained on, rounding included. Without --base dequantized-4bit that rounding is left out.\n";
    }
    if let Some(first) = report.missing.first() {
        writeln!(
            text,
            "The adapter has no weights for {} modules that its configuration names (the first is {}): they are the base's.",
            report.missing.len(),
            printable(first)
        )?;
    }
    if report.untied {
        text += "The output head was the embedding's tensor; the adapter changes one of them, so they are two now.\n";
    }
    if let Some(rows) = report.vocabulary {
        writeln!(text, "The vocabulary grew to {rows} tokens, those that the adapter has rows for.")?;
    }
    let files = match report.files.len() {
        0 | 1 => "one file".to_string(),
        // The index is one of them.
        n => format!("{} files", n - 1),
    };
    writeln!(text, "Merged   {}: {} in {files}", args.output.display(), memory(report.total_bytes))?;
    writeln!(text, "Try it   qlora generate --model {} --quant-type none --prompt \"...\"", args.output.display())?;
    Ok(text)
}
