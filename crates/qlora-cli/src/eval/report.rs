//! What was measured, as a table, as JSON and row by row.

use burn_qlora::qlora_serve::eval::Estimate;
use serde_json::{Map, Value, json};

use super::measure::Measured;
use super::{Asked, Column};
use crate::adapters::NamedAdapter;
use crate::args::EvalArgs;
use crate::output::Table;

/// The table: a column for the base and each adapter.
pub fn table(asked: &Asked, columns: &[Column], measured: &[Measured]) -> Table {
    let mut table = Table::new(std::iter::once("").chain(columns.iter().map(|column| column.voice.name.as_str())));
    let mut row = |name: &str, cell: &dyn Fn(&Measured) -> String| {
        table.row(std::iter::once(name.to_string()).chain(measured.iter().map(cell)));
    };
    row("rows", &|measured| measured.rows.len().to_string());
    if asked.loss {
        row("tokens", &|measured| measured.loss().count.to_string());
        row("loss", &|measured| number(measured.loss()));
        row("perplexity", &|measured| number(measured.loss().exp()));
        row("token accuracy, %", &|measured| percent(measured.accuracy()));
    }
    if asked.answers() {
        row("answers", &|measured| measured.answers().count().to_string());
    }
    if asked.exact {
        row("exact match, %", &|measured| percent(measured.exact()));
    }
    if asked.pattern.is_some() {
        row("regex match, %", &|measured| percent(measured.regex()));
    }
    table
}

fn number(estimate: Estimate) -> String {
    with_error(estimate, |value| format!("{value:.4}"))
}

fn percent(estimate: Estimate) -> String {
    with_error(estimate, |value| format!("{:.1}", 100.0 * value))
}

fn with_error(estimate: Estimate, written: impl Fn(f64) -> String) -> String {
    match estimate {
        Estimate { count: 0, .. } => "-".into(),
        Estimate { value, standard_error: Some(error), .. } => format!("{} +- {}", written(value), written(error)),
        Estimate { value, .. } => written(value),
    }
}

/// The figures, and what was run.
pub fn json(
    args: &EvalArgs,
    asked: &Asked,
    base: &str,
    adapters: &[NamedAdapter],
    columns: &[Column],
    measured: &[Measured],
) -> Value {
    let choice = &args.choice;
    let metrics = [("loss", asked.loss), ("exact", asked.exact), ("regex", asked.pattern.is_some())];
    let metrics: Vec<&str> = metrics.iter().filter(|(_, is_asked)| *is_asked).map(|(name, _)| *name).collect();
    let sampling = asked.answers().then(|| {
        json!({
            "max_new_tokens": choice.max_new_tokens,
            "temperature": choice.temperature,
            "top_k": choice.top_k,
            "top_p": choice.top_p,
            "min_p": choice.min_p,
            "repetition_penalty": choice.repetition_penalty,
            "presence_penalty": choice.presence_penalty,
            "frequency_penalty": choice.frequency_penalty,
            "stop": choice.stop,
            "seed": choice.seed,
        })
    });
    let columns = columns.iter().zip(measured).map(|(column, measured)| {
        let name = &column.voice.name;
        let adapter = adapters.iter().find(|adapter| column.voice.adapter.as_ref() == Some(&adapter.name));
        let settings = column.rows.settings();
        let mut object = Map::new();
        object.insert("name".into(), name.as_str().into());
        object.insert("adapter".into(), adapter.map(|adapter| adapter.dir.display().to_string()).into());
        object.insert(
            "written_with".into(),
            json!({
                "format": column.rows.report.format,
                "system_prompt": settings.system_prompt,
                "chat_template": settings.chat_template,
                "template_kwargs": settings.template_kwargs,
                "end_token": settings.end_token,
            }),
        );
        object.insert("rows".into(), measured.rows.len().into());
        object.insert("rows_sha256".into(), column.rows.fingerprint.as_str().into());
        object.insert("rows_too_long".into(), measured.too_long().into());
        if asked.loss {
            object.insert("loss".into(), estimate(measured.loss()));
            object.insert("perplexity".into(), estimate(measured.loss().exp()));
            object.insert("token_accuracy".into(), estimate(measured.accuracy()));
        }
        if asked.answers() {
            object.insert("rows_not_asked".into(), measured.unasked().into());
            object.insert("answers_unfinished".into(), measured.unfinished().into());
        }
        if asked.exact {
            object.insert("exact".into(), estimate(measured.exact()));
        }
        if asked.pattern.is_some() {
            object.insert("regex".into(), estimate(measured.regex()));
        }
        Value::Object(object)
    });
    let columns: Vec<Value> = columns.collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model": base,
        "revision": args.base.revision,
        "device": args.base.device,
        "quant_type": args.base.quant_type,
        "compute_dtype": args.base.compute_dtype,
        "data": args.data.display().to_string(),
        "limit": args.limit,
        "loss_on": args.loss_on,
        "max_length": args.max_length,
        "metrics": metrics,
        "pattern": args.regex,
        "max_batch": args.max_batch,
        "sampling": sampling,
        "columns": columns,
    })
}

/// What is no number, as where nothing was counted, becomes `null`.
fn estimate(estimate: Estimate) -> Value {
    let Estimate { value, standard_error, count } = estimate;
    json!({ "value": value, "standard_error": standard_error, "count": count })
}

/// A line of JSON for each row of each column.
pub fn lines(columns: &[Column], measured: &[Measured]) -> String {
    let mut text = String::new();
    for (column, measured) in columns.iter().zip(measured) {
        for (row, outcome) in column.rows.rows.iter().zip(&measured.rows) {
            let mut object = Map::new();
            object.insert("line".into(), row.line.into());
            object.insert("column".into(), column.voice.name.as_str().into());
            if let Some(score) = &outcome.score {
                object.insert("loss".into(), (score.loss / score.tokens as f64).into());
                object.insert("tokens".into(), score.tokens.into());
                object.insert("correct_tokens".into(), score.correct.into());
            }
            if let (Some(answer), Some(question)) = (&outcome.answer, &row.question) {
                object.insert("reference".into(), question.reference.as_str().into());
                object.insert("answer".into(), answer.text.as_str().into());
                object.insert("finish_reason".into(), answer.finished.reason.as_str().into());
                object.insert("exact".into(), answer.exact.into());
                if let Some(is_right) = answer.regex {
                    object.insert("regex".into(), is_right.into());
                }
            }
            text += &format!("{}\n", Value::Object(object));
        }
    }
    text
}
