//! From byte ranges of a text to a label for each of its tokens.
//!
//! What the model should learn is decided on the text and carried to the tokens by their offsets.
//! A token that reaches out of a range is masked: part of it belongs to the prompt. `boundary.rs` sees to it that
//! there is none in training data.

use std::ops::Range;

use crate::tokenizer::Encoding;

/// The label of a token that the loss does not count, as in PyTorch and transformers.
pub const MASKED_LABEL: i64 = -100;

impl Encoding {
    /// For each token its id where it lies within one of the ranges, [`MASKED_LABEL`] elsewhere.
    /// The ranges are in order and don't overlap.
    pub fn labels(&self, spans: &[Range<usize>]) -> Vec<i64> {
        let mut spans = spans.iter().peekable();
        let mut labels = Vec::with_capacity(self.ids.len());
        for (&id, &(start, end)) in self.ids.iter().zip(&self.offsets) {
            while spans.next_if(|span| span.end <= start).is_some() {}
            let inside = spans.peek().is_some_and(|span| span.start <= start && end <= span.end);
            labels.push(if inside { i64::from(id) } else { MASKED_LABEL });
        }
        labels
    }
}

/// A text as tokens, with what the loss counts of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Labelled {
    /// Token ids.
    pub ids: Vec<u32>,
    /// For each token its id where it is to be learned, [`MASKED_LABEL`] elsewhere.
    pub labels: Vec<i64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tokens_within_a_range_are_labelled() {
        // An added token without text, then `ab`, `cd`, `ef`, `g`.
        let encoding = Encoding { ids: vec![9, 1, 2, 3, 4], offsets: vec![(0, 0), (0, 2), (2, 4), (4, 6), (6, 7)] };
        let masked = MASKED_LABEL;
        assert_eq!(encoding.labels(&[2..4, 6..7]), [masked, masked, 2, masked, 4]);
        // `cd` and `ef` reach out of 3..5.
        assert_eq!(encoding.labels(std::slice::from_ref(&(3..5))), [masked; 5]);
        assert_eq!(encoding.labels(&[]), [masked; 5]);
    }
}
