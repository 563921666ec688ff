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

/// Bytes before a boundary that are tokenized again to see whether they become the same tokens there: first a few, more where those
/// don't tell, and then all. A conversation of many turns has as many boundaries, and is not tokenized as often.
const WINDOWS: [usize; 2] = [1 << 10, 8 << 10];

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
        let least = cut.unwrap_or(0);
        for window in WINDOWS.into_iter().filter(|window| at - least > *window) {
            let near = tokens.offsets.partition_point(|&(start, _)| start < at - window);
            if self.last_added(tokens, near..before).is_some() {
                break;
            }
            let Some(&(start, _)) = tokens.offsets.get(near).filter(|&&(start, _)| start < at) else { continue };
            let alone = self.encode(&text[start..at], false)?;
            // The first half of a window may differ because it begins there.
            let half = at - window / 2;
            if same(tokens, &alone, start, half..at) {
                return Ok(true);
            }
            // Where both go along with each other and part at the end, more text before them changes nothing.
            let until = at - window / 4;
            if tokens.starts_in(half..until) && same(tokens, &alone, start, half..until) {
                return Ok(false);
            }
        }
        let first = cut.map_or(0, |cut| tokens.offsets.partition_point(|&(_, end)| end <= cut));
        let added = self.last_added(tokens, first..before);
        let from = added.map_or(least, |i| tokens.offsets[i].0);
        let alone = &text[from..at];
        let alone = match added.is_none() && cut.is_some() {
            true => self.encode_behind(alone)?,
            false => self.encode(alone, false)?,
        };
        Ok(same(tokens, &alone, from, from..at))
    }

    /// The last added token with a text of its own: a boundary that nothing is joined across.
    fn last_added(&self, tokens: &Encoding, mut among: Range<usize>) -> Option<usize> {
        among.rfind(|&i| tokens.offsets[i].0 < tokens.offsets[i].1 && self.is_added(tokens.ids[i]))
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

/// Whether a text has the same tokens within a range as a part of it has alone, which begins at `start`.
fn same(tokens: &Encoding, alone: &Encoding, start: usize, range: Range<usize>) -> bool {
    // A token without text, such as an added `bos`, is not part of the comparison.
    let within = |&(_, (from, to)): &(u32, (usize, usize))| range.start <= from && from < to && to <= range.end;
    let first = tokens.offsets.partition_point(|&(from, _)| from < range.start);
    let all = tokens.ids[first..].iter().copied().zip(tokens.offsets[first..].iter().copied());
    let all = all.take_while(|&(_, (from, to))| from < range.end || from == to).filter(within);
    let alone = alone.ids.iter().copied().zip(alone.offsets.iter().map(|(from, to)| (start + from, start + to)));
    alone.filter(within).eq(all)
}

/// Whether a token holds text from both sides.
fn crosses(encoding: &Encoding, at: usize) -> bool {
    // Offsets never decrease but for tokens without text.
    let from = encoding.offsets.partition_point(|&(_, end)| end <= at);
    encoding.offsets.get(from).is_some_and(|&(start, _)| start < at)
}

impl Encoding {
    /// Whether a token begins and ends in a range.
    fn starts_in(&self, range: Range<usize>) -> bool {
        let first = self.offsets.partition_point(|&(from, _)| from < range.start);
        self.offsets.get(first).is_some_and(|&(_, to)| to <= range.end)
    }

    fn extend(&mut self, other: &Encoding, tokens: Range<usize>, shift: usize) {
        self.ids.extend_from_slice(&other.ids[tokens.clone()]);
        self.offsets.extend(other.offsets[tokens].iter().map(|(start, end)| (start + shift, end + shift)));
    }
}
