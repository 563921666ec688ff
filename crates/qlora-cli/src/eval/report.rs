//! What was measured, as a table, as JSON and row by row.

use burn_qlora::qlora_serve::eval::Estimate;
use serde_json::{Map, Value, json};

use super::measure::{Figure, Measured};
use super::{Asked, Column};
use crate::adapters::NamedAdapter;
use crate::args::EvalArgs;
use crate::output::Table;

/// What was run, beside the flags.
pub struct Ran<'a> {
    /// The base's name.
    pub model: &'a str,
    /// How its linear layers were kept.
    pub quant_type: &'static str,
    /// Where it was.
    pub device: String,
    /// What it was computed in.
    pub compute_dtype: String,
    /// The adapters.
    pub adapters: &'a [NamedAdapter],
}

/// The table: a column for the base and each adapter. Below each figure stands its difference to the first column,
/// where both are of the same rows.
pub fn table(asked: &Asked, columns: &[Column], measured: &[Measured]) -> Table {
    let mut table = Table::new(std::iter::once("").chain(columns.iter().map(|column| column.voice.name.as_str())));
    let mut row = |name: &str, cell: &dyn Fn(usize) -> String| {
        table.row(std::iter::once(name.to_string()).chain((0..measured.len()).map(cell)));
    };
    let comparable: Vec<bool> = (0..columns.len()).map(|at| is_comparable(columns, at)).collect();
    let minus = columns.first().map_or_else(String::new, |first| format!("  less {}'s", first.voice.name));
    row("rows", &|at| measured[at].rows.len().to_string());
    for figure in asked.figures() {
        let (name, written): (_, fn(Estimate) -> String) = match figure {
            Figure::Loss => ("loss", number),
            Figure::Accuracy => ("token accuracy, %", percent),
            Figure::Exact => ("exact match, %", percent),
            Figure::Regex => ("regex match, %", percent),
        };
        let counted = match figure {
            Figure::Loss => Some("learned tokens"),
            Figure::Exact | Figure::Regex => Some("answers"),
            Figure::Accuracy => None,
        };
        if let Some(counted) = counted {
            row(counted, &|at| measured[at].estimate(figure).count.to_string());
        }
        row(name, &|at| written(measured[at].estimate(figure)));
        if comparable.contains(&true) {
            let difference = |at: usize| written(measured[at].difference(&measured[0], figure));
            row(&minus, &|at| if comparable[at] { difference(at) } else { String::new() });
        }
        if figure == Figure::Loss {
            row("perplexity", &|at| number(measured[at].estimate(figure).exp()));
        }
    }
    table
}

/// Whether a column is of the same rows as the first one, and not the first one itself.
fn is_comparable(columns: &[Column], at: usize) -> bool {
    at > 0 && columns[at].rows.fingerprint == columns[0].rows.fingerprint
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
pub fn json(args: &EvalArgs, asked: &Asked, ran: &Ran<'_>, columns: &[Column], measured: &[Measured]) -> Value {
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
    let of_columns = columns.iter().zip(measured).enumerate().map(|(at, (column, of_column))| {
        let name = &column.voice.name;
        let adapter = ran.adapters.iter().find(|adapter| column.voice.adapter.as_ref() == Some(&adapter.name));
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
        object.insert("rows".into(), of_column.rows.len().into());
        object.insert("rows_sha256".into(), column.rows.fingerprint.as_str().into());
        object.insert("rows_too_long".into(), of_column.too_long().into());
        if asked.answers() {
            object.insert("rows_not_asked".into(), of_column.unasked().into());
            object.insert("answers_unfinished".into(), of_column.unfinished().into());
        }
        for figure in asked.figures() {
            let value = of_column.estimate(figure);
            object.insert(figure.key().into(), estimate(value));
            if is_comparable(columns, at) {
                let difference = of_column.difference(&measured[0], figure);
                object.insert(format!("{}_less_first", figure.key()), estimate(difference));
            }
            if figure == Figure::Loss {
                object.insert("perplexity".into(), estimate(value.exp()));
            }
        }
        Value::Object(object)
    });
    let of_columns: Vec<Value> = of_columns.collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model": ran.model,
        "revision": args.base.revision,
        "device": ran.device,
        "quant_type": ran.quant_type,
        "compute_dtype": ran.compute_dtype,
        "data": args.data.display().to_string(),
        "subset": args.subset,
        "split": args.split,
        "limit": args.limit,
        "loss_on": args.loss_on,
        "max_length": args.max_length,
        "metrics": metrics,
        "pattern": args.regex,
        "max_batch": args.max_batch,
        "sampling": sampling,
        "columns": of_columns,
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
            if let (true, Some(file)) = (column.rows.report.files.len() > 1, column.rows.report.files.get(row.file)) {
                object.insert("file".into(), file.path.display().to_string().into());
            }
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
