//! Rows as a batch of tokens, side by side or end to end.

use std::borrow::Borrow;
use std::ops::{AddAssign, Range};

use chat_text::{MASKED_LABEL, Tokenizer};

use crate::example::Example;
use crate::judged::JudgedRows;

/// A token to pad rows with: the tokenizer's choice, or 0 where the model's embedding has no row for that one. The
/// loss counts no padding and attention does not see it, so any token will do.
pub fn padding_id(tokenizer: &Tokenizer, embedding_rows: usize) -> u32 {
    let chosen = tokenizer.padding_id();
    if (chosen as usize) < embedding_rows { chosen } else { 0 }
}

/// Rows padded to the same length, or packed end to end.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// Token ids, row after row, padded on the right unless they are packed.
    pub input_ids: Vec<u32>,
    /// Labels, row after row, padded with [`MASKED_LABEL`] unless they are packed.
    pub labels: Vec<i64>,
    /// Number of rows.
    pub rows: usize,
    /// Tokens of the longest row.
    pub cols: usize,
    /// Tokens of each row, without padding.
    pub lengths: Vec<usize>,
    /// Whether rows lie end to end: each has positions from 0 on and sees itself alone.
    pub packed: bool,
    /// What is said of the answers of its rows, where something is.
    pub judged: Option<Box<JudgedRows>>,
}

impl Batch {
    /// Puts rows side by side.
    ///
    /// # Shapes
    /// `input_ids` and `labels` are `[rows, cols]`, row-major.
    pub fn new(examples: impl IntoIterator<Item: Borrow<Example>>, pad_id: u32) -> Self {
        let examples: Vec<_> = examples.into_iter().collect();
        let examples = || examples.iter().map(Borrow::borrow);
        let lengths: Vec<_> = examples().map(|e: &Example| e.input_ids.len()).collect();
        let (rows, cols) = (lengths.len(), lengths.iter().copied().max().unwrap_or(0));
        let mut input_ids = Vec::with_capacity(rows * cols);
        let mut labels = Vec::with_capacity(rows * cols);
        for (index, example) in examples().enumerate() {
            input_ids.extend_from_slice(&example.input_ids);
            input_ids.resize((index + 1) * cols, pad_id);
            labels.extend_from_slice(&example.labels);
            labels.resize((index + 1) * cols, MASKED_LABEL);
        }
        Self { input_ids, labels, rows, cols, lengths, packed: false, judged: None }
    }

    /// Lays rows end to end.
    ///
    /// # Shapes
    /// `input_ids` and `labels` are `[tokens]`, those of all rows.
    pub fn end_to_end(examples: impl IntoIterator<Item: Borrow<Example>>) -> Self {
        let (mut input_ids, mut labels, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
        for example in examples {
            let example: &Example = example.borrow();
            input_ids.extend_from_slice(&example.input_ids);
            labels.extend_from_slice(&example.labels);
            lengths.push(example.input_ids.len());
        }
        let (rows, cols) = (lengths.len(), lengths.iter().copied().max().unwrap_or(0));
        Self { input_ids, labels, rows, cols, lengths, packed: true, judged: None }
    }

    /// Where each row lies in `input_ids` and `labels`, with the padding behind it.
    pub fn spans(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        let mut end = 0;
        self.lengths.iter().map(move |length| {
            let start = end;
            end += if self.packed { *length } else { self.cols };
            start..end
        })
    }

    /// Tokens of its rows, and the places that they are computed in, padding among them.
    pub fn padding(&self) -> Padding {
        Padding { tokens: self.lengths.iter().map(|len| *len as u64).sum(), cells: self.input_ids.len() as u64 }
    }

    /// Tokens that the loss counts: labels but the first of each row, as the model predicts the
    /// next token.
    pub fn label_tokens(&self) -> usize {
        self.spans().flat_map(|row| self.labels[row].iter().skip(1)).filter(|label| **label != MASKED_LABEL).count()
    }
}

/// Places for tokens in batches, and how many of them are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Padding {
    /// Tokens of rows.
    pub tokens: u64,
    /// Places, padded ones included.
    pub cells: u64,
}

impl Padding {
    /// The fraction of places that hold padding, from 0 to below 1.
    pub fn waste(self) -> f64 {
        match self.cells {
            0 => 0.0,
            cells => (cells - self.tokens) as f64 / cells as f64,
        }
    }
}

impl AddAssign for Padding {
    fn add_assign(&mut self, other: Self) {
        self.tokens += other.tokens;
        self.cells += other.cells;
    }
}
