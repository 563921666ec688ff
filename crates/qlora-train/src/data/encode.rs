//! A row as tokens and labels.

use std::ops::Range;
use std::path::Path;

use qlora_models::chat_template::{ChatInput, ChatTemplate};
use qlora_models::error::ModelError;
use qlora_models::tokenizer::Tokenizer;

use crate::error::TrainError;

use super::config::{DataConfig, LossOn};
use super::formats::Row;
use super::report::MaskReason;
use super::spans::{self, Rendered, SpanError};
use super::{Example, MASKED_LABEL};

/// Everything a row needs to become tokens.
pub struct RowEncoder<'a> {
    pub path: &'a Path,
    pub tokenizer: &'a Tokenizer,
    pub template: Option<&'a ChatTemplate>,
    pub config: &'a DataConfig,
}

/// A row as tokens, and what happened to it.
#[derive(Debug)]
pub struct EncodedRow {
    pub example: Example,
    /// Tokens beyond `max_length`.
    pub dropped: usize,
    /// Why the loss counts none of it.
    pub masked: Option<MaskReason>,
}

impl RowEncoder<'_> {
    /// Encodes a row.
    pub fn encode(&self, row: &Row, line: usize) -> Result<EncodedRow, TrainError> {
        let (mut example, has_answer) = match row {
            Row::Chat { messages, tools } => {
                let template = match self.template {
                    Some(template) => template,
                    None => self.tokenizer.require_chat_template()?,
                };
                let rendered = self.render(
                    template,
                    &ChatInput {
                        messages,
                        tools: tools.as_ref(),
                        add_generation_prompt: false,
                        special_tokens: self.tokenizer.special_tokens(),
                    },
                    line,
                )?;
                // The template writes `bos` itself.
                let example = self.tokens(&rendered.text, &rendered.spans, false, line)?;
                let has_answer = messages.iter().any(|message| message.role == "assistant");
                (example, has_answer)
            }
            Row::Completion { prompt, completion } => {
                let text = format!("{prompt}{completion}");
                let start = match self.config.loss_on {
                    LossOn::Assistant => prompt.len(),
                    LossOn::All => 0,
                };
                let span = start..text.len();
                let mut example = self.tokens(&text, &[span], true, line)?;
                self.end(&mut example);
                (example, true)
            }
            Row::Text(text) => {
                let span = 0..text.len();
                let mut example = self.tokens(text, &[span], true, line)?;
                self.end(&mut example);
                (example, true)
            }
        };
        let labelled_before = example.label_tokens();
        let max_length = self.config.max_length;
        let dropped = example.input_ids.len().saturating_sub(max_length);
        example.input_ids.truncate(max_length);
        example.labels.truncate(max_length);
        let masked = match example.label_tokens() {
            0 if labelled_before > 0 => Some(MaskReason::Truncated),
            0 if !has_answer => Some(MaskReason::NoAssistantTurn),
            0 => Some(MaskReason::EmptyAnswer),
            _ => None,
        };
        Ok(EncodedRow { example, dropped, masked })
    }

    fn render(&self, template: &ChatTemplate, input: &ChatInput, line: usize) -> Result<Rendered, TrainError> {
        let row_error = |problem: String| TrainError::DataRow { path: self.path.to_owned(), line, problem };
        let model_error = |error: ModelError| row_error(error.to_string());
        if self.config.loss_on == LossOn::All {
            let text = template.render_input(input).map_err(model_error)?;
            let spans = std::iter::once(0..text.len()).collect();
            return Ok(Rendered { text, spans });
        }
        spans::render(template, input).map_err(|error| match error {
            SpanError::Model(error) => model_error(error),
            SpanError::Untraceable { message } => row_error(format!(
                "it can't be told which tokens message {} became, as the chat template changes it or what \
                 stands before it once more turns follow; set `loss_on = \"all\"`, give a `chat_template` \
                 with {{% generation %}} tags around what the assistant writes, or keep one assistant turn, \
                 the last, in each row",
                message + 1
            )),
            SpanError::NotWritten { message } => row_error(format!(
                "the chat template does not write the content of message {}; it may be made for messages \
                 with images, or drop such turns: give another `chat_template`",
                message + 1
            )),
        })
    }

    /// Encodes a text and labels the tokens that lie within the spans. A token that reaches out
    /// of a span is masked: part of it belongs to the prompt.
    fn tokens(
        &self,
        text: &str,
        spans: &[Range<usize>],
        add_special_tokens: bool,
        line: usize,
    ) -> Result<Example, TrainError> {
        let encoding = self.tokenizer.encode(text, add_special_tokens)?;
        let mut spans = spans.iter().peekable();
        let mut labels = Vec::with_capacity(encoding.ids.len());
        for (&id, &(start, end)) in encoding.ids.iter().zip(&encoding.offsets) {
            // Offsets never decrease but for added tokens, whose range is empty.
            while start < end && spans.next_if(|span| span.end <= start).is_some() {}
            let inside = spans.peek().is_some_and(|span| span.start <= start && end <= span.end);
            labels.push(if inside { i64::from(id) } else { MASKED_LABEL });
        }
        Ok(Example { input_ids: encoding.ids, labels, line })
    }

    /// Ends a text that no template ended: the model has to learn when to stop.
    fn end(&self, example: &mut Example) {
        let Some(eos) = self.tokenizer.eos_token_id() else {
            return;
        };
        if example.input_ids.last() == Some(&eos) {
            // Written in the text, or added by the tokenizer with no place in the text.
            if let Some(label) = example.labels.last_mut() {
                *label = i64::from(eos);
            }
        } else {
            example.input_ids.push(eos);
            example.labels.push(i64::from(eos));
        }
    }
}
