//! A row as tokens and labels.

mod chat;
mod end;
mod judged;
mod prefix;

use std::path::Path;

use chat_text::{ChatError, ChatTemplate, Tokenizer};

use crate::config::{DataConfig, LossOn};
use crate::error::DataError;
use crate::example::Example;
use crate::examples::MAX_IDS;
use crate::formats::{Answers, Read, Row, Turn};
use crate::judged::Judged;
use crate::notice::{NoticeFacts, NoticeKind};
use crate::report::{MaskReason, TruncatedRow};
use crate::visible;

pub(crate) use end::EndTokens;
use prefix::{Kept, Tokens};

/// Everything a row needs to become tokens.
pub(crate) struct RowEncoder<'a> {
    pub path: &'a Path,
    pub tokenizer: &'a Tokenizer,
    pub template: Option<&'a ChatTemplate>,
    pub config: &'a DataConfig,
    pub end: &'a EndTokens,
    /// Rows of the model's embedding, if it is known.
    pub embedding_rows: Option<usize>,
    /// What the words of notices need, among it the length that the model was made for.
    pub facts: NoticeFacts,
}

/// A row as tokens, and what happened to it.
#[derive(Debug)]
pub(crate) struct EncodedRow {
    pub line: usize,
    /// The row, or why the loss counts none of it.
    pub example: Result<Example, MaskReason>,
    /// What it says of its answers, where it says something.
    pub judged: Option<Judged>,
    pub truncated: Option<TruncatedRow>,
    /// What is to be known of a row that is there.
    pub notices: Vec<(NoticeKind, String)>,
}

/// A row's tokens before they are cut, and what is to be known of it.
#[derive(Default)]
struct Draft {
    tokens: Tokens,
    notices: Vec<(NoticeKind, String)>,
}

impl EncodedRow {
    fn left_out(line: usize, reason: MaskReason) -> Self {
        Self { line, example: Err(reason), judged: None, truncated: None, notices: Vec::new() }
    }
}

impl RowEncoder<'_> {
    /// Encodes a row.
    ///
    /// # Errors
    /// The row can't be written or traced, it has a token outside the embedding, or, with `data.strict`,
    /// there is something to know of it.
    pub fn encode(&self, read: Read, line: usize) -> Result<EncodedRow, DataError> {
        let unread = read.unread.into_iter().map(|key| (NoticeKind::UnreadKey, key));
        let row = match read.answers {
            Answers::One(row) => self.row(row, line, unread.collect())?,
            Answers::Judged(row, wanted) => self.judged(vec![row], wanted, line, unread.collect())?,
            Answers::Pair(chosen, rejected) => self.judged(vec![chosen, rejected], true, line, unread.collect())?,
        };
        self.finish(row)
    }

    /// Writes a row and makes it tokens, which are not cut yet but for the part of a far longer text that is not kept.
    fn draft(&self, row: Row, line: usize, kept: Kept) -> Result<Result<Draft, MaskReason>, DataError> {
        let draft = match row {
            Row::Chat { messages, tools, template_kwargs } => self.chat(messages, tools, template_kwargs, kept),
            Row::Completion(turns) => self.completion(turns, kept),
            Row::Text(text) => self.text(&text),
        };
        draft.map_err(|error| DataError::Row {
            place: self.facts.unit.at(self.path, line),
            problem: visible::lines(&error.to_string()),
        })
    }

    /// A row of which one answer, or several, are to be learned.
    fn row(&self, row: Row, line: usize, unread: Vec<(NoticeKind, String)>) -> Result<EncodedRow, DataError> {
        let Draft { tokens, mut notices } = match self.draft(row, line, Kept::Beginning)? {
            Ok(draft) => draft,
            Err(reason) => return Ok(EncodedRow::left_out(line, reason)),
        };
        notices.extend(unread);
        let max_length = self.config.max_length;
        let dropped = tokens.ids.len().saturating_sub(max_length);
        let was_learned = tokens.learned_beyond || tokens.label_tokens() > 0;
        let mut example = Example { input_ids: tokens.ids, labels: tokens.labels, line };
        example.input_ids.truncate(max_length);
        example.labels.truncate(max_length);
        example.input_ids.shrink_to_fit();
        example.labels.shrink_to_fit();
        let truncated = (dropped > 0).then_some(TruncatedRow { line, dropped, at_least: tokens.is_prefix });
        let example = match example.label_tokens() {
            0 if was_learned => Err(MaskReason::Truncated),
            0 => Err(MaskReason::EmptyAnswer),
            _ => Ok(example),
        };
        if let Ok(example) = &example {
            self.check_ids(example)?;
            if self.is_too_long(example.input_ids.len()) {
                notices.push((NoticeKind::LongerThanModel, String::new()));
            }
        } else {
            notices.clear();
        }
        Ok(EncodedRow { line, example, judged: None, truncated, notices })
    }

    /// Whether a row has more tokens than the model was made for.
    fn is_too_long(&self, tokens: usize) -> bool {
        self.facts.positions.as_ref().is_some_and(|(positions, _)| tokens > *positions)
    }

    /// A prompt and what should follow it, turn after turn. `Err` says why there is nothing to learn.
    fn completion(&self, turns: Vec<Turn>, kept: Kept) -> Result<Result<Draft, MaskReason>, ChatError> {
        let answers_only = self.config.loss_on == LossOn::Assistant;
        let (mut text, mut spans, mut notices) = (String::new(), Vec::new(), Vec::new());
        let last = turns.len() - 1;
        let mut ends_learned = true;
        for (index, Turn { prompt, completion }) in turns.into_iter().enumerate() {
            // The text of a single turn may be large: it grows in place.
            if text.is_empty() {
                text = prompt;
            } else {
                text.push_str(&prompt);
            }
            let start = text.len();
            text.push_str(&completion);
            if index < last {
                text.push_str(self.end.text_of_appended());
            }
            let is_empty = completion.trim().is_empty();
            if kept == Kept::End {
                // The last answer alone is judged.
                spans.clear();
                notices.clear();
            }
            if is_empty {
                notices.push((NoticeKind::EmptyAnswer, String::new()));
            } else {
                spans.push(start..text.len());
            }
            ends_learned = !is_empty;
        }
        if answers_only && spans.is_empty() {
            return Ok(Err(MaskReason::EmptyAnswer));
        }
        if !answers_only {
            spans = std::iter::once(0..text.len()).collect();
        }
        let mut tokens = self.tokens(&text, &spans, true, kept)?;
        if !self.end.append(&mut tokens, ends_learned || !answers_only) {
            notices.push((NoticeKind::NoEndToken, String::new()));
        }
        Ok(Ok(Draft { tokens, notices }))
    }

    /// A text to learn whole.
    fn text(&self, text: &str) -> Result<Result<Draft, MaskReason>, ChatError> {
        if text.trim().is_empty() {
            return Ok(Err(MaskReason::EmptyAnswer));
        }
        let whole = 0..text.len();
        let tokens = self.tokens(text, std::slice::from_ref(&whole), true, Kept::Beginning)?;
        let mut draft = Draft { tokens, ..Draft::default() };
        if !self.end.append(&mut draft.tokens, true) {
            draft.notices.push((NoticeKind::NoEndToken, String::new()));
        }
        Ok(Ok(draft))
    }

    /// Refuses a token that the model has no row for.
    fn check_ids(&self, example: &Example) -> Result<(), DataError> {
        let embedding_rows = self.embedding_rows.map_or(MAX_IDS, |rows| rows.min(MAX_IDS));
        match example.input_ids.iter().find(|id| **id as usize >= embedding_rows) {
            None => Ok(()),
            Some(&id) => Err(DataError::OutsideEmbedding {
                place: self.facts.unit.at(self.path, example.line),
                token: self.tokenizer.id_to_token(id).unwrap_or_default(),
                id,
                embedding_rows,
            }),
        }
    }

    /// With `data.strict`, refuses a row of which there is something to know.
    fn finish(&self, row: EncodedRow) -> Result<EncodedRow, DataError> {
        if !self.config.strict {
            return Ok(row);
        }
        let max_length = self.config.max_length;
        let problem = if let Some((kind, subject)) = row.notices.first() {
            let (what, cure) = kind.words(&self.facts);
            let subject = if subject.is_empty() { String::new() } else { format!(": {subject}") };
            format!("{what}{subject}; {cure}")
        } else if let Err(reason) = row.example {
            format!("nothing to learn from, with {}. {}", reason.describe(max_length), reason.cure())
        } else if let Some(TruncatedRow { dropped, at_least, .. }) = row.truncated {
            let at_least = if at_least { "at least " } else { "" };
            format!(
                "longer than data.max_length = {max_length} by {at_least}{dropped} tokens; raise it, or split the row"
            )
        } else {
            return Ok(row);
        };
        Err(DataError::Strict { place: self.facts.unit.at(self.path, row.line), problem })
    }
}
