//! Section `chat`: chat templates rendered and tokenized (`chat/templates.json`).
//!
//! Errors are counts of what differs: 1 for a text that is not the same, and the number of token ids
//! that differ. A row whose template refuses the conversation must be refused here with the same
//! message. The tokenizer is that of the folder's first unquantized model, since the
//! file names none.

use anyhow::Result;
use burn_qlora::chat_text::{ChatError, ChatTemplate, Message, Tokenizer};
use serde::Deserialize;

use crate::compare::count_different;
use crate::{Reference, Report};

const FILE: &str = "chat/templates.json";

#[derive(Deserialize)]
struct Row {
    template: String,
    name: String,
    messages: Vec<Message>,
    add_generation_prompt: bool,
    text: Option<String>,
    error: Option<String>,
    ids: Option<Vec<u32>>,
}

/// Compares every row of `chat/templates.json`.
///
/// # Errors
/// A file cannot be read.
pub fn cases(reference: &Reference, report: &mut Report) -> Result<()> {
    if reference.find(FILE).is_none() {
        report.skip("chat", format!("no {FILE}"));
        return Ok(());
    }
    let rows: Vec<Row> = reference.json(FILE)?;
    let Some(model) = reference.tokenizer()? else {
        report.skip("chat", "no model with a tokenizer");
        return Ok(());
    };
    let tokenizer = Tokenizer::from_dir(&model)?;
    for (index, row) in rows.iter().enumerate() {
        let prompt = if row.add_generation_prompt { " with generation prompt" } else { "" };
        let name = format!("chat row {index} {}{prompt}", row.name);
        let rendered = ChatTemplate::new(row.template.as_str())
            .and_then(|t| t.render(&row.messages, row.add_generation_prompt, tokenizer.special_tokens()));
        match (rendered, &row.text) {
            (Ok(ours), Some(theirs)) => {
                report.compare(format!("{name}: text"), f64::from(ours != *theirs), 0.0);
                if let Some(ids) = &row.ids {
                    let ours = tokenizer.encode(theirs, false)?.ids;
                    report.compare(format!("{name}: ids"), count_different(&ours, ids), 0.0);
                }
            }
            (Err(error), None) => {
                let message = match error {
                    ChatError::TemplateRefused { message } => message,
                    other => other.to_string(),
                };
                let expected = row.error.as_deref().unwrap_or_default();
                report.compare_noted(format!("{name}: refused"), f64::from(message != expected), 0.0, message);
            }
            (Ok(_), None) => report
                .fail(format!("{name}: refused"), "the template rendered, but should have refused the conversation"),
            (Err(error), Some(_)) => report.fail(format!("{name}: text"), &error.to_string()),
        }
    }
    Ok(())
}
