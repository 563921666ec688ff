//! How long rows are: a histogram.

use std::collections::HashSet;

use crate::dataset::Dataset;

/// Bins at most.
const BINS: usize = 16;

/// Rows of similar length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LengthBin {
    /// The smallest length, in tokens.
    pub from: usize,
    /// The largest length.
    pub to: usize,
    /// Rows with such a length.
    pub rows: usize,
}

/// The lengths of rows in tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lengths {
    /// Bins of one width, a power of two, from the shortest row to the longest that was not cut, or to `max_length` if
    /// any was. At most 17.
    pub bins: Vec<LengthBin>,
    /// Rows that were cut to `max_length`; some may have been left out then.
    pub cut: usize,
    /// The length rows were cut to.
    pub max_length: usize,
}

impl Lengths {
    /// Counts the rows of a data set.
    pub fn new(dataset: &Dataset) -> Self {
        let report = &dataset.report;
        let max_length = report.max_length;
        let cut: HashSet<(usize, usize)> = (report.files.iter().enumerate())
            .flat_map(|(file, of_file)| of_file.truncated.iter().map(move |row| (file, row.line)))
            .collect();
        let file_of_rows =
            report.files.iter().enumerate().flat_map(|(file, of_file)| std::iter::repeat_n(file, of_file.rows));
        let file_of_rows: Vec<usize> = file_of_rows.collect();
        let whole = || {
            let rows = file_of_rows.iter().zip(&dataset.examples);
            rows.filter(|(file, example)| !cut.contains(&(**file, example.line))).map(|(_, example)| example)
        };
        let lengths = || whole().map(|example| example.input_ids.len());
        let longest = if cut.is_empty() { lengths().max().unwrap_or(0) } else { max_length };
        let shortest = lengths().min().unwrap_or(longest).max(1);
        let width = (longest + 1).saturating_sub(shortest).div_ceil(BINS).next_power_of_two();
        let first = (shortest - 1) / width;
        let mut bins: Vec<_> = (first..longest.div_ceil(width))
            .map(|bin| LengthBin { from: bin * width + 1, to: ((bin + 1) * width).min(max_length), rows: 0 })
            .collect();
        for length in lengths() {
            if let Some(bin) = bins.get_mut(length.saturating_sub(1) / width - first) {
                bin.rows += 1;
            }
        }
        Self { bins, cut: cut.len(), max_length }
    }

    /// The largest number of rows in a bin, or of those that were cut.
    pub(super) fn largest(&self) -> usize {
        self.bins.iter().map(|bin| bin.rows).chain([self.cut]).max().unwrap_or(0)
    }
}
