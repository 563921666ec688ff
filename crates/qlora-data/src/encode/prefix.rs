//! Text to tokens, of which no more is tokenized than a row can hold.
//!
//! A tokenizer takes more than a hundred bytes of memory for each byte of text, and a row is cut to
//! `max_length` tokens all the same. So of a text that is far longer only a beginning is encoded, cut
//! at a blank where there is one, and a longer one where that gives too few tokens. A cut can change
//! the tokens next to it, which lie beyond those that are kept by [`SAFE_TOKENS`].

use std::ops::Range;

use chat_text::{ChatError, Labelled, MASKED_LABEL};

use super::RowEncoder;

/// Bytes of text to begin with for each token that is kept: twice what English text has.
const BYTES_PER_TOKEN: usize = 8;

/// A text up to this length is always encoded whole.
const SHORT_TEXT: usize = 64 << 10;

/// How far back from a cut a blank is looked for, in bytes.
const LOOK_BACK: usize = 4 << 10;

/// Tokens next to a cut that are not relied on.
const SAFE_TOKENS: usize = 256;

/// Which part of a text stays where it is longer than a row can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kept {
    /// Its beginning.
    Beginning,
    /// Its end, with the answer: what goes is the beginning of the prompt.
    End,
}

/// Tokens of a text or of its beginning.
#[derive(Debug, Default)]
pub(super) struct Tokens {
    pub ids: Vec<u32>,
    pub labels: Vec<i64>,
    /// Whether these are the tokens of a beginning, more than a row can hold.
    pub is_prefix: bool,
    /// Whether there is something to learn beyond that beginning.
    pub learned_beyond: bool,
}

impl Tokens {
    /// Tokens that the loss counts.
    pub fn label_tokens(&self) -> usize {
        self.labels.iter().skip(1).filter(|label| **label != MASKED_LABEL).count()
    }
}

impl RowEncoder<'_> {
    /// Encodes a text and labels the tokens of the spans.
    pub(super) fn tokens(
        &self,
        text: &str,
        spans: &[Range<usize>],
        add_special_tokens: bool,
        kept: Kept,
    ) -> Result<Tokens, ChatError> {
        let bos = self.tokenizer.bos_token_id().filter(|_| add_special_tokens);
        let encode = |text: &str, spans: &[Range<usize>]| -> Result<Labelled, ChatError> {
            let mut labelled = self.tokenizer.encode_labelled(text, spans, add_special_tokens)?;
            // A text that begins with the token already doesn't get a second.
            if bos.is_some_and(|bos| labelled.ids.starts_with(&[bos, bos])) {
                labelled.ids.remove(0);
                labelled.labels.remove(0);
            }
            Ok(labelled)
        };
        let max_length = self.config.max_length;
        let mut bytes = max_length.saturating_mul(BYTES_PER_TOKEN).max(SHORT_TEXT);
        while kept == Kept::Beginning && bytes < text.len() {
            let cut = cut_before(text, bytes);
            let before: Vec<_> =
                spans.iter().filter(|span| span.start < cut).map(|span| span.start..span.end.min(cut)).collect();
            let Labelled { ids, labels } = encode(&text[..cut], &before)?;
            if ids.len() >= max_length.saturating_add(SAFE_TOKENS) {
                let learned_beyond = spans.last().is_some_and(|span| span.end > cut);
                return Ok(Tokens { ids, labels, is_prefix: true, learned_beyond });
            }
            bytes = bytes.saturating_mul(2);
        }
        let Labelled { ids, labels } = encode(text, spans)?;
        Ok(Tokens { ids, labels, is_prefix: false, learned_beyond: false })
    }
}

/// Where to cut a longer text so that at most `bytes` remain: before a blank, as words begin with
/// theirs, or else between two characters.
fn cut_before(text: &str, bytes: usize) -> usize {
    let end = text.floor_char_boundary(bytes);
    let from = text.floor_char_boundary(end.saturating_sub(LOOK_BACK));
    let blank = text[from..end].char_indices().rev().find(|(_, c)| c.is_whitespace());
    match blank {
        Some((at, _)) if from + at > 0 => from + at,
        _ => end,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_at_a_blank_or_between_characters() {
        assert_eq!(cut_before("one two three", 9), 7);
        assert_eq!(cut_before("oneword", 4), 4);
        // `é` has two bytes.
        assert_eq!(cut_before("aéé", 2), 1);
        assert_eq!(cut_before(" abc", 3), 3);
    }
}
