//! A row as tokens and labels.

use std::ops::Range;
use std::path::Path;

use chat_text::{ChatError, ChatInput, ChatTemplate, Rendered, Tokenizer};

use crate::config::{DataConfig, LossOn};
use crate::error::DataError;
use crate::example::Example;
use crate::formats::Row;
use crate::report::MaskReason;

/// Everything a row needs to become tokens.
pub(crate) struct RowEncoder<'a> {
    pub path: &'a Path,
    pub tokenizer: &'a Tokenizer,
    pub template: Option<&'a ChatTemplate>,
    pub config: &'a DataConfig,
}

/// A row as tokens, and what happened to it.
#[derive(Debug)]
pub(crate) struct EncodedRow {
    pub example: Example,
    /// Tokens beyond `max_length`.
    pub dropped: usize,
    /// Why the loss counts none of it.
    pub masked: Option<MaskReason>,
}

impl RowEncoder<'_> {
    /// Encodes a row.
    pub fn encode(&self, row: &Row, line: usize) -> Result<EncodedRow, DataError> {
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
                        template_kwargs: None,
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

    fn render(&self, template: &ChatTemplate, input: &ChatInput, line: usize) -> Result<Rendered, DataError> {
        let rendered = match self.config.loss_on {
            LossOn::Assistant => template.render_answers(input),
            LossOn::All => template.render_all(input),
        };
        rendered.map_err(|error: ChatError| DataError::Row {
            path: self.path.to_owned(),
            line,
            problem: error.to_string(),
        })
    }

    /// Encodes a text and labels the tokens that lie within the spans.
    fn tokens(
        &self,
        text: &str,
        spans: &[Range<usize>],
        add_special_tokens: bool,
        line: usize,
    ) -> Result<Example, DataError> {
        let labelled = self.tokenizer.encode_labelled(text, spans, add_special_tokens)?;
        Ok(Example { input_ids: labelled.ids, labels: labelled.labels, line })
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
