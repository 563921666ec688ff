//! `qlora preview`: rows as a run would train on them, before it is paid for.

use std::sync::Arc;

use anyhow::Result;
use burn_qlora::qlora_data::padding_id;
use burn_qlora::qlora_data::preview::{Preview, PreviewChoice, PreviewRow};
use burn_qlora::qlora_train::{Resized, load_rows, resize, training_order};
use burn_qlora::{Dataset, ModelConfig, Tokenizer, TrainConfig, TrainEvents as _, atomic};
use serde_json::{Value, json};

use crate::args::PreviewArgs;
use crate::exit::{Code, UsageError};
use crate::hub;
use crate::output::{is_colored, print, say};
use crate::outputs;
use crate::progress::Terminal;
use crate::train::configuration;

/// Runs the command.
pub fn run(args: &PreviewArgs) -> Result<Code> {
    let config = configuration(&args.config, &args.keys, &args.set)?;
    if let Some(page) = &args.html {
        outputs::file(page, args.force)?;
    }
    let dir = hub::resolve(&config.model.path, config.model.revision.as_deref())?;
    let tokenizer = Tokenizer::from_dir(&dir)?;
    let mut events = Terminal::new(&config.train, args.json, Arc::default());
    let base = ModelConfig::from_dir_with(&dir, &config.model.config_options())?;
    let Resized { config, model, notice } = resize(&config, base, &tokenizer)?;
    model.notes.iter().chain(&notice).for_each(|note| events.on_notice(note));
    let (train, eval) = load_rows(&config, &tokenizer, &model, &mut events)?;
    let rows = if args.eval_rows { &eval } else { &train };
    if rows.examples.is_empty() {
        return Err(
            UsageError("there are no evaluation rows: data.eval and data.eval_fraction name none".into()).into()
        );
    }
    let choice = args.random.map_or(PreviewChoice::First, PreviewChoice::Random);
    let preview = of_rows(&config, &tokenizer, &model, rows, args.rows, choice)?;
    match args.json {
        true => print(&format!("{}\n", as_json(&preview)))?,
        false => print(&preview.to_terminal(color(), args.ids))?,
    }
    if let Some(page) = &args.html {
        atomic::write_bytes(page, preview.to_html().as_bytes())?;
        say!("Wrote {}", page.display());
    }
    Ok(Code::Done)
}

/// A preview of `shown` rows.
pub fn of_rows(
    config: &TrainConfig,
    tokenizer: &Tokenizer,
    model: &ModelConfig,
    rows: &Dataset,
    shown: usize,
    choice: PreviewChoice,
) -> Result<Preview> {
    let order = training_order(config, rows, padding_id(tokenizer, model.vocab_size))?;
    Ok(Preview::new(rows, &order, tokenizer, shown, choice)?)
}

/// What a preview shows, for a program.
fn as_json(Preview { rows, report, batches, padding, packed, .. }: &Preview) -> Value {
    let row = |row: &PreviewRow| {
        let tokens =
            row.tokens.iter().map(|token| json!({"id": token.id, "text": token.text, "learned": token.learned}));
        json!({"line": row.line, "place": row.place, "tokens": tokens.collect::<Vec<_>>()})
    };
    json!({
        "data": report.sources,
        "format": report.format.to_string(),
        "rows": report.rows,
        "tokens": report.tokens,
        "learned_tokens": report.label_tokens,
        "longest_row": report.longest,
        "batches": batches,
        "sequences": packed.map(|packed| packed.sequences),
        "padding": padding.waste(),
        "warnings": report.warnings(),
        "shown": rows.iter().map(row).collect::<Vec<_>>(),
    })
}

/// Whether stdout shows colours (<https://no-color.org>).
pub fn color() -> bool {
    is_colored(&std::io::stdout())
}
