//! Tokenized rows, in memory or in a file that is mapped.
//!
//! A row is a run of little-endian words of 32 bits: two for its line, and one for each token, whose highest bit says whether it is
//! learned. Rows lie one after the other, and beside them the word that each ends before. A file of the [cache](crate::cache) has the
//! same form, so that rows that are there are read where they lie: the system holds what of them is in use and lets it go when memory is
//! wanted elsewhere.

mod mapped;
mod writer;

use std::fmt;
use std::sync::Arc;

use chat_text::MASKED_LABEL;

use crate::example::Example;
pub(crate) use mapped::{Mapped, UNFINISHED, Unfinished};
pub(crate) use writer::Writer;

/// The bit of a token that is learned.
const LEARNED: u32 = 1 << 31;

/// Token ids are below this.
pub(crate) const MAX_IDS: usize = LEARNED as usize;

/// Words of a row before its tokens.
const OF_LINE: usize = 2;

/// Words that are passed before what was mapped of them is let go: 64 MiB.
const PASSED: usize = 16 << 20;

/// A word of a row, little-endian.
pub(crate) type Word = [u8; 4];

/// Where a row ends, in words; little-endian.
pub(crate) type End = [u8; 8];

/// Rows as tokens, in their order. A clone shares them.
#[derive(Clone, Default)]
pub struct Examples {
    stored: Arc<Stored>,
    /// Which of the stored rows these are; `None` for all of them.
    chosen: Option<Arc<[u32]>>,
}

/// Where rows are.
#[derive(Debug)]
pub(crate) enum Stored {
    Held { words: Vec<Word>, ends: Vec<End> },
    Mapped(Mapped),
}

impl Default for Stored {
    fn default() -> Self {
        Self::Held { words: Vec::new(), ends: Vec::new() }
    }
}

impl Stored {
    fn parts(&self) -> (&[Word], &[End]) {
        match self {
            Self::Held { words, ends } => (words, ends),
            Self::Mapped(mapped) => mapped.parts(),
        }
    }
}

/// A row where it lies.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Row<'a> {
    line: [Word; OF_LINE],
    tokens: &'a [Word],
}

impl<'a> Row<'a> {
    pub fn line(self) -> usize {
        let [low, high] = self.line.map(|word| u64::from(u32::from_le_bytes(word)));
        (low | high << 32) as usize
    }

    pub fn len(self) -> usize {
        self.tokens.len()
    }

    pub fn ids(self) -> impl Iterator<Item = u32> + 'a {
        self.tokens.iter().map(|word| u32::from_le_bytes(*word) & !LEARNED)
    }

    pub fn labels(self) -> impl Iterator<Item = i64> + 'a {
        self.tokens.iter().map(|word| match u32::from_le_bytes(*word) {
            word if word & LEARNED == 0 => MASKED_LABEL,
            word => i64::from(word & !LEARNED),
        })
    }

    /// Tokens that the loss counts: nothing predicts the first one.
    pub fn label_tokens(self) -> usize {
        self.tokens.iter().skip(1).filter(|word| u32::from_le_bytes(**word) & LEARNED != 0).count()
    }

    fn to_example(self) -> Example {
        Example { input_ids: self.ids().collect(), labels: self.labels().collect(), line: self.line() }
    }
}

impl Examples {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.chosen.as_ref().map_or_else(|| self.stored.parts().1.len(), |chosen| chosen.len())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A row, read from where it lies.
    pub fn get(&self, row: usize) -> Option<Example> {
        Some(self.row(row)?.to_example())
    }

    /// All rows, one after the other.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Example> + '_ {
        (0..self.len()).map(|row| self.get(row).unwrap_or_default())
    }

    /// The tokens of each row.
    pub fn lengths(&self) -> impl ExactSizeIterator<Item = usize> + '_ {
        (0..self.len()).map(|row| self.span(row).map_or(0, |(start, end)| end - start - OF_LINE))
    }

    /// Bytes that they take of this process's own memory: those of mapped rows are the system's, which lets them go when others want
    /// memory.
    pub fn held_bytes(&self) -> u64 {
        let of_rows = match &*self.stored {
            Stored::Held { words, ends } => size_of_val(&words[..]) + size_of_val(&ends[..]),
            Stored::Mapped(_) => 0,
        };
        (of_rows + self.chosen.as_deref().map_or(0, size_of_val)) as u64
    }

    /// The first and the last word of a row, the latter not its own.
    fn span(&self, row: usize) -> Option<(usize, usize)> {
        let row = match &self.chosen {
            Some(chosen) => *chosen.get(row)? as usize,
            None => row,
        };
        let (_, ends) = self.stored.parts();
        let end = |row: usize| Some(u64::from_le_bytes(*ends.get(row)?) as usize);
        Some((row.checked_sub(1).map_or(Some(0), end)?, end(row)?))
    }

    pub(crate) fn row(&self, row: usize) -> Option<Row<'_>> {
        let (start, end) = self.span(row)?;
        let (line, tokens) = self.stored.parts().0.get(start..end)?.split_first_chunk()?;
        Some(Row { line: *line, tokens })
    }

    /// Shows all rows in their order. What of a mapped file was read for that does not stay mapped.
    pub(crate) fn walk<'a>(&'a self, mut see: impl FnMut(usize, Row<'a>)) {
        let mut passed = 0;
        for number in 0..self.len() {
            let Some(row) = self.row(number) else { break };
            see(number, row);
            passed += row.len() + OF_LINE;
            if passed >= PASSED {
                passed = 0;
                self.release();
            }
        }
        self.release();
    }

    fn release(&self) {
        if let Stored::Mapped(mapped) = &*self.stored {
            mapped.release();
        }
    }

    /// Some of the rows, which they share with these.
    pub(crate) fn chosen(&self, rows: Vec<u32>) -> Self {
        let rows = match &self.chosen {
            Some(chosen) => rows.into_iter().map(|row| chosen[row as usize]).collect(),
            None => rows.into(),
        };
        Self { stored: Arc::clone(&self.stored), chosen: Some(rows) }
    }
}

impl FromIterator<Example> for Examples {
    /// Holds rows in memory.
    fn from_iter<I: IntoIterator<Item = Example>>(rows: I) -> Self {
        let (mut words, mut ends) = (Vec::new(), Vec::new());
        for row in rows {
            writer::append(&mut words, &row);
            ends.push((words.len() as u64).to_le_bytes());
        }
        Self { stored: Arc::new(Stored::Held { words, ends }), chosen: None }
    }
}

impl From<Vec<Example>> for Examples {
    fn from(rows: Vec<Example>) -> Self {
        rows.into_iter().collect()
    }
}

impl PartialEq for Examples {
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len() && (0..self.len()).all(|row| self.row(row) == other.row(row))
    }
}

impl Eq for Examples {}

impl fmt::Debug for Examples {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}
