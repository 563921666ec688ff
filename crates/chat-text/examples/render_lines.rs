//! Renders conversations and finds the answers in them, for `testdata/compare_templates.py`.
//!
//! Reads JSON lines `{template, messages, tools, kwargs, special}` from standard input, and writes for each a line
//! with `plain` (the text) or `plain_error`, and `text`, `spans` (bytes) and `unwritten`, or `error` and `kind`.

use std::collections::BTreeMap;
use std::io::{BufRead, Write};

use chat_text::{ChatError, ChatInput, ChatTemplate, Message, SpecialTokens};
use serde_json::{Map, Value, json};

#[derive(serde::Deserialize)]
struct Line {
    template: String,
    messages: Vec<Message>,
    tools: Option<Value>,
    kwargs: Option<Map<String, Value>>,
    special: BTreeMap<String, String>,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut out = std::io::stdout().lock();
    let mut last: Option<(String, ChatTemplate)> = None;
    for line in std::io::stdin().lock().lines() {
        let line: Line = match serde_json::from_str(&line?) {
            Ok(line) => line,
            Err(e) => {
                writeln!(out, "{}", json!({"plain": null, "error": e.to_string(), "kind": "Row"}))?;
                continue;
            }
        };
        if last.as_ref().is_none_or(|(source, _)| *source != line.template) {
            last = match ChatTemplate::new(line.template.as_str()) {
                Ok(template) => Some((line.template, template)),
                Err(e) => {
                    writeln!(out, "{}", json!({"plain": null, "error": e.to_string(), "kind": "Syntax"}))?;
                    continue;
                }
            };
        }
        let Some((_, template)) = &last else { continue };
        let special: SpecialTokens = line.special.into_iter().collect();
        let input = ChatInput {
            messages: &line.messages,
            tools: line.tools.as_ref(),
            add_generation_prompt: false,
            special_tokens: &special,
            template_kwargs: line.kwargs.as_ref(),
        };
        let mut answer = match template.render_answers(&input) {
            Ok(rendered) => {
                let unwritten = rendered.unwritten.iter();
                let unwritten = unwritten.map(|u| json!({"message": u.message, "part": u.part.to_string()}));
                json!({
                    "text": rendered.text,
                    "spans": rendered.spans.iter().map(|s| json!([s.start, s.end])).collect::<Value>(),
                    "unwritten": unwritten.collect::<Value>(),
                })
            }
            Err(e) => json!({"error": e.to_string(), "kind": kind(&e)}),
        };
        match template.render_input(&input) {
            Ok(text) => answer["plain"] = text.into(),
            Err(e) => answer["plain_error"] = e.to_string().into(),
        }
        writeln!(out, "{answer}")?;
    }
    Ok(())
}

fn kind(error: &ChatError) -> String {
    match error {
        ChatError::NotWritten { part, .. } => format!("not written: {part}"),
        ChatError::Untraceable { .. } => "can't be traced".into(),
        ChatError::TemplateRefused { .. } => "the template refuses".into(),
        _ => "the template fails".into(),
    }
}
