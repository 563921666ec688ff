//! Tokens at the boundary of prompt and answer.
//!
//! A tokenizer joins what stands side by side: the last blank of `assistant: ` and the first letters of the answer
//! become one token. But when the model is to answer, the prompt is tokenized by itself, and its last token is that
//! blank alone. So where the tokens of a whole text, up to the beginning of a span, are not those of the prompt
//! alone, the text is cut there and its parts are tokenized apart: the prompt's tokens are those that generation
//! sees, and the first token of the answer is learned. Where a token reaches out of the end of a span, the text is
//! cut there as well, so that the last letters of the answer are learned without what follows them.
//!
//! A prompt that holds earlier answers is tokenized as a whole by generation; there a cut of an earlier turn may
//! differ from it. Templates that begin and end each turn with a token of its own, as nearly all do, need no cut.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::error::ChatError;
use crate::mask::Labelled;
use crate::tokenizer::{Encoding, Tokenizer};

/// Bytes before a boundary that are tokenized again to see whether they become the same tokens there. Longer
/// prompts are only compared in whole if their ends differ.
const WINDOW: usize = 8 << 10;

/// Texts that a part is put behind where a tokenizer puts a blank before each text (SentencePiece). The first
/// whose end is the end of a token is taken.
const ANCHORS: [&str; 4] = ["\n", ".", "(", "\u{1}"];

impl Tokenizer {
    /// Turns a text into tokens of which those of some byte ranges are to be learned: the tokens that a model is
    /// trained on. The ranges are in order and don't overlap; their beginnings are where generation begins, so
    /// no token crosses one, and none crosses an end (see `boundary.rs`).
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_labelled(
        &self,
        text: &str,
        spans: &[Range<usize>],
        add_special_tokens: bool,
    ) -> Result<Labelled, ChatError> {
        let whole = self.encode(text, add_special_tokens)?;
        let inside = |at: &usize| 0 < *at && *at < text.len() && text.is_char_boundary(*at);
        let mut cuts = BTreeSet::new();
        for at in spans.iter().map(|span| span.start).filter(inside) {
            if !self.same_prompt(text, &whole, at)? {
                cuts.insert(at);
            }
        }
        let mut encoding = None;
        loop {
            // A part may be joined in other places than the whole was: look again after each change.
            let tokens = encoding.as_ref().unwrap_or(&whole);
            let before = cuts.len();
            let ends = spans.iter().flat_map(|span| [span.start, span.end]).filter(inside);
            cuts.extend(ends.filter(|at| crosses(tokens, *at)));
            if cuts.len() == before && (cuts.is_empty() || encoding.is_some()) {
                break;
            }
            encoding = Some(self.encode_parts(text, &Vec::from_iter(cuts.iter().copied()), &whole)?);
        }
        let encoding = encoding.unwrap_or(whole);
        let labels = encoding.labels(spans);
        Ok(Labelled { ids: encoding.ids, labels })
    }

    /// Whether the tokens before `at` are those of the text before `at` alone.
    fn same_prompt(&self, text: &str, whole: &Encoding, at: usize) -> Result<bool, ChatError> {
        let before = whole.offsets.partition_point(|&(_, end)| end <= at);
        // An added token is a boundary that nothing is joined across.
        let added = (0..before).rev().find(|&i| whole.offsets[i].0 < whole.offsets[i].1 && self.is_added(whole.ids[i]));
        let from = added.map_or(0, |i| whole.offsets[i].0);
        if at - from > WINDOW {
            let near = whole.offsets.partition_point(|&(start, _)| start < at - WINDOW);
            let start = whole.offsets.get(near).map_or(from, |&(start, _)| start);
            if start < at && self.same_tokens(text, whole, start..at, at - WINDOW / 2)? {
                return Ok(true);
            }
        }
        self.same_tokens(text, whole, from..at, from)
    }

    /// Whether a part of the text becomes the same tokens alone, from `compared` on.
    fn same_tokens(
        &self,
        text: &str,
        whole: &Encoding,
        part: Range<usize>,
        compared: usize,
    ) -> Result<bool, ChatError> {
        let alone = self.encode(&text[part.clone()], false)?;
        let alone =
            alone.ids.iter().zip(alone.offsets.iter().map(|(start, end)| (part.start + start, part.start + end)));
        let of_whole = whole.ids.iter().zip(whole.offsets.iter().copied());
        // A token without text, such as an added `bos`, is not part of the comparison.
        let wanted = |&(_, (start, end)): &(&u32, (usize, usize))| start >= compared && start < end && end <= part.end;
        Ok(alone.filter(wanted).eq(of_whole.filter(wanted)))
    }

    /// The parts of a text tokenized apart, with what the tokenizer puts around the whole.
    fn encode_parts(&self, text: &str, cuts: &[usize], whole: &Encoding) -> Result<Encoding, ChatError> {
        let textless = |(start, end): &(usize, usize)| start == end;
        let count = whole.ids.len();
        let leading = whole.offsets.iter().take_while(|range| textless(range)).count();
        let trailing = whole.offsets.iter().rev().take_while(|range| textless(range)).count().min(count - leading);
        let first = self.encode(&text[..cuts[0]], false)?;
        // Tokens without text may be the text's own (a blank that SentencePiece puts before it); what the first
        // part has of them is not given twice.
        let own = first.offsets.iter().take_while(|range| textless(range)).count().min(leading);
        let mut parts = Encoding::default();
        parts.extend(whole, 0..leading - own, 0);
        parts.extend(&first, 0..first.ids.len(), 0);
        for (index, &from) in cuts.iter().enumerate() {
            let to = cuts.get(index + 1).copied().unwrap_or(text.len());
            let (part, skipped, shift) = self.encode_behind(&text[from..to])?;
            for i in skipped..part.ids.len() {
                let (start, end) = part.offsets[i];
                parts.push(part.ids[i], (from + start.max(shift) - shift, from + end.max(shift) - shift));
            }
        }
        parts.extend(whole, count - trailing..count, 0);
        Ok(parts)
    }

    /// Tokenizes a text that stands behind another one, so that nothing is put before it. Gives the encoding, how
    /// many of its tokens are not the text's, and how many bytes they take.
    fn encode_behind(&self, text: &str) -> Result<(Encoding, usize, usize), ChatError> {
        if self.begins_with_a_blank()? {
            for anchor in ANCHORS {
                let alone = self.encode(anchor, false)?;
                let both = self.encode(&format!("{anchor}{text}"), false)?;
                let skipped = alone.ids.len();
                let boundary = both.offsets.get(skipped).is_none_or(|&(start, _)| start >= anchor.len());
                if boundary
                    && both.ids.starts_with(&alone.ids)
                    && both.offsets[..skipped].iter().all(|o| o.1 <= anchor.len())
                {
                    return Ok((both, skipped, anchor.len()));
                }
            }
        }
        Ok((self.encode(text, false)?, 0, 0))
    }

    /// Whether the tokenizer puts a blank before a text: then a letter becomes another token at the beginning of
    /// a text than it does within.
    fn begins_with_a_blank(&self) -> Result<bool, ChatError> {
        for letter in ["a", "o"] {
            let alone = self.encode(letter, false)?.ids;
            if !self.encode(&format!("\n{letter}"), false)?.ids.ends_with(&alone) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Whether a token holds text from both sides.
fn crosses(encoding: &Encoding, at: usize) -> bool {
    // Offsets never decrease but for tokens without text.
    let from = encoding.offsets.partition_point(|&(_, end)| end <= at);
    encoding.offsets.get(from).is_some_and(|&(start, _)| start < at)
}

impl Encoding {
    fn push(&mut self, id: u32, range: (usize, usize)) {
        self.ids.push(id);
        self.offsets.push(range);
    }

    fn extend(&mut self, other: &Encoding, tokens: Range<usize>, shift: usize) {
        self.ids.extend_from_slice(&other.ids[tokens.clone()]);
        self.offsets.extend(other.offsets[tokens].iter().map(|(start, end)| (start + shift, end + shift)));
    }
}
