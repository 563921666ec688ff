//! Conversations: through the chat template, and what of them is to be learned.

use chat_text::{ChatError, ChatInput, Message, Rendered};
use serde_json::{Map, Value as Json};

use super::prefix::Kept;
use super::{Draft, RowEncoder};
use crate::config::LossOn;
use crate::notice::NoticeKind;
use crate::report::MaskReason;
use crate::visible;

impl RowEncoder<'_> {
    /// Writes a conversation. `Err` says why there is nothing to learn.
    pub(super) fn chat(
        &self,
        mut messages: Vec<Message>,
        tools: Option<Json>,
        of_row: Map<String, Json>,
        kept: Kept,
    ) -> Result<Result<Draft, MaskReason>, ChatError> {
        let mut notices = Vec::new();
        let silenced = silence_empty_answers(&mut messages);
        let answers = || messages.iter().filter(|message| is_answer(message));
        if self.config.loss_on == LossOn::Assistant && !answers().any(|message| message.learn) {
            return Ok(Err(match answers().next() {
                None => MaskReason::NoAssistantTurn,
                Some(_) if silenced => MaskReason::EmptyAnswer,
                Some(_) => MaskReason::NotToBeLearned,
            }));
        }
        if silenced {
            notices.push((NoticeKind::EmptyAnswer, String::new()));
        }
        let template = match self.template {
            Some(template) => template,
            None => self.tokenizer.require_chat_template()?,
        };
        let merged;
        let template_kwargs = if of_row.is_empty() {
            &self.config.template_kwargs
        } else {
            merged = self.config.template_kwargs.iter().map(|(k, v)| (k.clone(), v.clone())).chain(of_row).collect();
            &merged
        };
        let input = ChatInput {
            messages: &messages,
            tools: tools.as_ref(),
            add_generation_prompt: false,
            special_tokens: self.tokenizer.special_tokens(),
            template_kwargs: Some(template_kwargs),
        };
        let mut rendered = match self.config.loss_on {
            LossOn::Assistant => template.render_answers(&input)?,
            LossOn::All => template.render_all(&input)?,
        };
        notices.extend(
            rendered
                .unwritten
                .iter()
                .map(|left_out| (NoticeKind::Unwritten, visible::text(&left_out.part.to_string()))),
        );
        let last =
            answers().next_back().filter(|message| message.learn).map(|message| message.content.trim().to_owned());
        drop(messages);
        let ends = match last {
            // Nothing is learned of how the last answer ends.
            None => true,
            Some(answer) => self.end_text(&mut rendered, &answer),
        };
        // The template writes `bos` itself.
        let tokens = self.tokens(&rendered.text, &rendered.spans, false, kept)?;
        let ends = match self.config.loss_on {
            LossOn::Assistant => ends && (tokens.is_prefix || self.end.is_learned_last(&tokens)),
            LossOn::All => ends,
        };
        if !ends {
            let instead = self.end.other_end(&tokens, self.tokenizer)?;
            notices.push((NoticeKind::NoEndToken, instead.map(|token| format!("{token} instead")).unwrap_or_default()));
        }
        Ok(Ok(Draft { tokens, notices }))
    }

    /// Sees to it that an end token follows the last answer: the template's, or `data.end_token`.
    /// Returns whether one does.
    fn end_text(&self, rendered: &mut Rendered, answer: &str) -> bool {
        let Rendered { text, spans, .. } = rendered;
        let Some(span) = spans.last_mut() else {
            return true;
        };
        // A span begins with its answer; the whole text may say the same earlier. A short answer may be a part of the
        // end token's own text.
        let written = &text[span.clone()];
        let at = match self.config.loss_on {
            LossOn::Assistant => written.find(answer),
            LossOn::All => written.rfind(answer),
        };
        let after = at.filter(|_| !answer.is_empty()).map_or(0, |at| at + answer.len());
        if self.end.is_in(&written[after..]) || self.end.ends(written) {
            return true;
        }
        let Some(end) = self.end.mend() else {
            return false;
        };
        // The template may write it where it does not count it as the answer's.
        let blanks = text[span.end..].len() - text[span.end..].trim_start().len();
        if text[span.end + blanks..].starts_with(end) {
            span.end += blanks + end.len();
            return true;
        }
        // Before a line break of the template: what follows an end token is never asked for.
        let at = span.start + text[span.clone()].trim_end().len();
        text.insert_str(at, end);
        match self.config.loss_on {
            LossOn::Assistant => span.end = at + end.len(),
            LossOn::All => span.end += end.len(),
        }
        true
    }
}

fn is_answer(message: &Message) -> bool {
    message.role == "assistant"
}

/// Takes answers that say nothing out of what is learned. Returns whether there are any.
fn silence_empty_answers(messages: &mut [Message]) -> bool {
    let mut silenced = false;
    for message in messages.iter_mut().filter(|message| is_answer(message) && message.learn) {
        if !message.speaks() {
            message.learn = false;
            silenced = true;
        }
    }
    silenced
}
