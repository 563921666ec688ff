//! Rows counted, whole and divided.

use super::FileReport;
use crate::examples::{Examples, Row};

/// What rows have, counted.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub rows: usize,
    pub tokens: u64,
    pub label_tokens: u64,
    pub longest: usize,
}

impl Counts {
    /// Counts a row of so many tokens, so many of them learned.
    pub fn add(&mut self, tokens: usize, label_tokens: usize) {
        self.rows += 1;
        self.tokens += tokens as u64;
        self.label_tokens += label_tokens as u64;
        self.longest = self.longest.max(tokens);
    }
}

/// A file's rows, divided.
#[derive(Default)]
pub(super) struct Parts {
    /// Those that stay, and those that are taken.
    pub counts: [Counts; 2],
    /// Lines that are taken, of a file that has rows that were cut.
    pub taken: Vec<usize>,
}

/// What each file has in both parts of the rows.
pub(super) fn parts(files: &[FileReport], examples: &Examples, taken: &[bool]) -> Vec<Parts> {
    let mut parts: Vec<Parts> = files.iter().map(|_| Parts::default()).collect();
    let (mut file, mut left) = (0, files.first().map_or(0, |file| file.rows));
    examples.walk(|number, row: Row<'_>| {
        while left == 0 && file + 1 < files.len() {
            file += 1;
            left = files[file].rows;
        }
        left -= left.min(1);
        let (Some(of), Some(taken)) = (parts.get_mut(file), taken.get(number)) else { return };
        of.counts[usize::from(*taken)].add(row.len(), row.label_tokens());
        if *taken && !files[file].truncated.is_empty() {
            of.taken.push(row.line());
        }
    });
    parts
}
