//! Rows that judge answers: two of which one is preferred, or one that is wanted or not.
//!
//! The tokens of a pair are those of two rows, each the prompt with one of the answers: the preferred one comes first. So a pair is
//! shuffled, packed and split as one row, and lies in a batch as two.

use std::ops::Range;

use chat_text::MASKED_LABEL;
use serde::{Deserialize, Serialize};

use crate::example::Example;

/// What a row says of its answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Judged {
    /// Of two answers the first is preferred.
    Pair {
        /// Where the tokens of the prompt with the other answer begin.
        rejected_at: usize,
    },
    /// The answer is wanted.
    Desirable,
    /// The answer is not wanted.
    Undesirable,
}

impl Judged {
    /// A number for it: 0 and 1 of an answer that is not wanted and of one that is, else where the other answer's row begins.
    pub(crate) fn code(self) -> u64 {
        match self {
            Self::Undesirable => 0,
            Self::Desirable => 1,
            Self::Pair { rejected_at } => rejected_at as u64,
        }
    }

    /// Of such a number. A row of a pair has two tokens at least.
    pub(crate) fn of_code(code: u64) -> Self {
        match code {
            0 => Self::Undesirable,
            1 => Self::Desirable,
            at => Self::Pair { rejected_at: at as usize },
        }
    }

    /// What each row of a batch that an example of so many tokens becomes says of its answer, and its tokens.
    pub fn sides(self, tokens: usize) -> Vec<(Side, Range<usize>)> {
        match self {
            Self::Pair { rejected_at } => {
                vec![(Side::Chosen, 0..rejected_at), (Side::Rejected, rejected_at..tokens)]
            }
            Self::Desirable => vec![(Side::Chosen, 0..tokens)],
            Self::Undesirable => vec![(Side::Rejected, 0..tokens)],
        }
    }
}

/// What is thought of the answer of a batch's row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// It is preferred to the row's that follows, or wanted.
    Chosen,
    /// The row's before is preferred to it, or it is not wanted.
    Rejected,
}

/// What a batch of judged rows has beside its tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct JudgedRows {
    /// Of each row of the batch what is thought of its answer.
    pub sides: Vec<Side>,
    /// Whether rows are pairs: an even one is preferred to the one that follows.
    pub paired: bool,
    /// For each row of the batch the number of its example, and of which side of it.
    pub origins: Vec<(usize, usize)>,
    /// The prompt of each row of the batch with the answer of another example, which it does not fit: for an estimate of how far a policy is
    /// from its reference. Empty where nothing asks for it.
    pub mismatched: Vec<Example>,
    /// Of each row of the batch the log-probability of its answer by a reference, in nats; empty where it is not known ahead.
    pub reference: Vec<f32>,
}

impl JudgedRows {
    /// Pairs of the batch; 0 where rows are no pairs.
    pub fn pairs(&self) -> usize {
        if self.paired { self.sides.len() / 2 } else { 0 }
    }
}

/// The tokens of one side of an example as a row of its own.
pub(crate) fn side(example: &Example, tokens: Range<usize>) -> Example {
    Example {
        input_ids: example.input_ids[tokens.clone()].to_vec(),
        labels: example.labels[tokens].to_vec(),
        line: example.line,
    }
}

/// Where the answer of a row begins.
pub(crate) fn answer_at(row: &Example) -> usize {
    let learned = |(at, label): (usize, &i64)| at > 0 && *label != MASKED_LABEL;
    row.labels.iter().enumerate().position(learned).unwrap_or(row.labels.len())
}

/// The prompt of one row with the answer of another, without the prompt's beginning where both are longer than `max_length`.
pub(crate) fn mismatched(prompt: &Example, answer: &Example, max_length: usize) -> Example {
    let (until, from) = (answer_at(prompt), answer_at(answer));
    let to = answer.input_ids.len().min(from + max_length.saturating_sub(1));
    let skip = (until + to - from).saturating_sub(max_length).min(until.saturating_sub(1));
    Example {
        input_ids: [&prompt.input_ids[skip..until], &answer.input_ids[from..to]].concat(),
        labels: [&prompt.labels[skip..until], &answer.labels[from..to]].concat(),
        line: prompt.line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(prompt: &[u32], answer: &[u32]) -> Example {
        let masked = prompt.iter().map(|_| MASKED_LABEL);
        Example {
            input_ids: [prompt, answer].concat(),
            labels: masked.chain(answer.iter().map(|id| i64::from(*id))).collect(),
            line: 3,
        }
    }

    #[test]
    fn an_answer_goes_behind_another_prompt() {
        let (first, second) = (row(&[1, 2, 3], &[4, 5]), row(&[6], &[7, 8, 9]));
        assert_eq!(mismatched(&first, &second, 64), row(&[1, 2, 3], &[7, 8, 9]));
        assert_eq!(mismatched(&first, &second, 4), row(&[3], &[7, 8, 9]));
        assert_eq!(mismatched(&second, &first, 64), row(&[6], &[4, 5]));
        // Of an answer that fills the row by itself the beginning stays, behind one token of the prompt.
        assert_eq!(mismatched(&first, &second, 3), row(&[3], &[7, 8]));
    }

    #[test]
    fn a_pair_is_two_rows() {
        assert_eq!(Judged::Pair { rejected_at: 5 }.sides(9), [(Side::Chosen, 0..5), (Side::Rejected, 5..9)]);
        assert_eq!(Judged::Undesirable.sides(9), [(Side::Rejected, 0..9)]);
    }
}
