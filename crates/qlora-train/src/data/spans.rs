//! Which part of a conversation's text the assistant wrote.
//!
//! A template turns a list of messages into one text, and says nothing about which part of it came
//! from which message. But at the time the model answers, it sees
//! `render(messages[..i], add_generation_prompt)`, and what it should write then is what
//! `render(messages[..=i])` has beyond that: the answer and the tokens that end a turn. So the span
//! of turn i lies between the lengths of the two, as long as both are beginnings of the whole text.
//!
//! A template may break that, for example by leaving the reasoning out of all but the last answer.
//! Then the template's own `{% generation %}` tags are used, and without them the row is an error:
//! a guess would train on the wrong tokens without anybody noticing.

use std::ops::Range;

use qlora_models::chat_template::{ChatInput, ChatTemplate};
use qlora_models::error::ModelError;

/// A conversation as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    pub text: String,
    /// Byte ranges that assistants wrote, in order.
    pub spans: Vec<Range<usize>>,
}

/// Why a conversation has no spans.
#[derive(Debug)]
pub enum SpanError {
    Model(ModelError),
    /// The template rewrites what it wrote before, at this message.
    NotAPrefix {
        message: usize,
    },
}

impl From<ModelError> for SpanError {
    fn from(error: ModelError) -> Self {
        Self::Model(error)
    }
}

/// Writes a conversation and finds the assistant's turns in it.
pub fn render(template: &ChatTemplate, input: &ChatInput) -> Result<Rendered, SpanError> {
    let text = template.render_input(input)?;
    match by_prefixes(template, input, &text) {
        Ok(spans) => Ok(Rendered { text, spans }),
        Err(_) if template.has_generation_tags() => {
            let (text, spans) = template.render_marked(input)?;
            Ok(Rendered { text, spans })
        }
        Err(error) => Err(error),
    }
}

fn by_prefixes(template: &ChatTemplate, input: &ChatInput, text: &str) -> Result<Vec<Range<usize>>, SpanError> {
    let mut spans = Vec::new();
    for (index, message) in input.messages.iter().enumerate() {
        if message.role != "assistant" {
            continue;
        }
        let begins = |messages, add_generation_prompt| {
            let part = template.render_input(&ChatInput { messages, add_generation_prompt, ..*input })?;
            match text.starts_with(&part) {
                true => Ok(part.len()),
                false => Err(SpanError::NotAPrefix { message: index }),
            }
        };
        let start = begins(&input.messages[..index], true)?;
        let end = begins(&input.messages[..=index], false)?;
        if start > end {
            return Err(SpanError::NotAPrefix { message: index });
        }
        spans.push(start..end);
    }
    Ok(spans)
}
