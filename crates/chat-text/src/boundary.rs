//! Tokens at the boundary of prompt and answer.
//!
//! A tokenizer joins what stands side by side: the last blank of `assistant: ` and the first letters of the answer
//! become one token. But when the model is to answer, the prompt is tokenized by itself, and its last token is that
//! blank alone. So where the tokens of a whole text, up to the beginning of a span, are not those of the prompt
//! alone, the text is cut there and its parts are tokenized apart: the prompt's tokens are those that generation
//! sees, and the first token of the answer is learned. Where a token reaches out of the end of a span, the text is
//! cut there as well, so that the last letters of the answer are learned without what follows them.
//!
//! A prompt that holds earlier answers is cut at them in the same way (`Prompting`), so that a later answer begins
//! behind the tokens that it was trained behind. Templates that begin and end each turn with a token of its own, as
//! nearly all do, need no cut.

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
        let mut encoding = None;
        loop {
            // A part may be joined in other places than the whole was: look again after each change.
            let tokens = encoding.as_ref().unwrap_or(&whole);
            let mut further = Vec::new();
            for at in spans.iter().map(|span| span.start).filter(inside).filter(|at| !cuts.contains(at)) {
                let cut = cuts.range(..at).next_back().copied();
                if !self.same_prompt(text, tokens, cut, at)? {
                    further.push(at);
                }
            }
            let ends = spans.iter().flat_map(|span| [span.start, span.end]).filter(inside);
            further.extend(ends.filter(|at| crosses(tokens, *at)));
            let before = cuts.len();
            cuts.extend(further);
            if cuts.len() == before {
                break;
            }
            encoding = Some(self.encode_parts(text, &Vec::from_iter(cuts.iter().copied()), &whole)?);
        }
        let encoding = encoding.unwrap_or(whole);
        let labels = encoding.labels(spans);
        Ok(Labelled { ids: encoding.ids, labels })
    }

    /// Whether the tokens before `at`, from the last cut on, are those of the text before `at` alone.
    fn same_prompt(&self, text: &str, tokens: &Encoding, cut: Option<usize>, at: usize) -> Result<bool, ChatError> {
        let before = tokens.offsets.partition_point(|&(_, end)| end <= at);
        let first = cut.map_or(0, |cut| tokens.offsets.partition_point(|&(_, end)| end <= cut));
        // An added token is a boundary that nothing is joined across.
        let added =
            (first..before).rev().find(|&i| tokens.offsets[i].0 < tokens.offsets[i].1 && self.is_added(tokens.ids[i]));
        let from = added.map_or(cut.unwrap_or(0), |i| tokens.offsets[i].0);
        let is_cut = added.is_none() && cut.is_some();
        if at - from > WINDOW {
            let near = tokens.offsets.partition_point(|&(start, _)| start < at - WINDOW);
            let start = tokens.offsets.get(near).map_or(from, |&(start, _)| start);
            if start < at && same(tokens, &self.encode(&text[start..at], false)?, start..at, at - WINDOW / 2) {
                return Ok(true);
            }
        }
        let alone = &text[from..at];
        let alone = if is_cut { self.encode_behind(alone)? } else { self.encode(alone, false)? };
        Ok(same(tokens, &alone, from..at, from))
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
            let part = self.encode_behind(&text[from..to])?;
            parts.extend(&part, 0..part.ids.len(), from);
        }
        parts.extend(whole, count - trailing..count, 0);
        Ok(parts)
    }

    /// Tokenizes a text that stands behind another one, so that nothing is put before it.
    fn encode_behind(&self, text: &str) -> Result<Encoding, ChatError> {
        if self.begins_with_a_blank()? {
            for anchor in ANCHORS {
                let alone = self.encode(anchor, false)?;
                let mut both = self.encode(&format!("{anchor}{text}"), false)?;
                let (skipped, shift) = (alone.ids.len(), anchor.len());
                let boundary = both.offsets.get(skipped).is_none_or(|&(start, _)| start >= shift);
                if boundary
                    && both.ids.starts_with(&alone.ids)
                    && both.offsets[..skipped].iter().all(|range| range.1 <= shift)
                {
                    both.ids.drain(..skipped);
                    both.offsets.drain(..skipped);
                    let within = |at: usize| at.max(shift) - shift;
                    both.offsets.iter_mut().for_each(|range| *range = (within(range.0), within(range.1)));
                    return Ok(both);
                }
            }
        }
        self.encode(text, false)
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

/// Whether a part of a text has the tokens that it has alone, from `compared` on.
fn same(tokens: &Encoding, alone: &Encoding, part: Range<usize>, compared: usize) -> bool {
    let offsets = alone.offsets.iter().map(|(start, end)| (part.start + start, part.start + end));
    let alone = alone.ids.iter().zip(offsets);
    let all = tokens.ids.iter().zip(tokens.offsets.iter().copied());
    // A token without text, such as an added `bos`, is not part of the comparison.
    let wanted = |&(_, (start, end)): &(&u32, (usize, usize))| start >= compared && start < end && end <= part.end;
    alone.filter(wanted).eq(all.filter(wanted))
}

/// Whether a token holds text from both sides.
fn crosses(encoding: &Encoding, at: usize) -> bool {
    // Offsets never decrease but for tokens without text.
    let from = encoding.offsets.partition_point(|&(_, end)| end <= at);
    encoding.offsets.get(from).is_some_and(|&(start, _)| start < at)
}

impl Encoding {
    fn extend(&mut self, other: &Encoding, tokens: Range<usize>, shift: usize) {
        self.ids.extend_from_slice(&other.ids[tokens.clone()]);
        self.offsets.extend(other.offsets[tokens].iter().map(|(start, end)| (start + shift, end + shift)));
    }
}
