//! How long rows are: a histogram.

use crate::dataset::Dataset;
use crate::report::TruncatedRow;

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
        let cut = report.truncated().count();
        let mut first = 0;
        let of_files = report.files.iter().map(|file| {
            let rows = first..first + file.rows;
            first = rows.end;
            (rows, &file.truncated)
        });
        let of_files: Vec<_> = of_files.collect();
        // Of a file without rows that were cut no row's line is looked up.
        let is_cut = |row: usize, truncated: &[TruncatedRow]| {
            let line = || dataset.examples.row(row).map_or(0, |row| row.line());
            !truncated.is_empty() && truncated.binary_search_by_key(&line(), |row| row.line).is_ok()
        };
        let lengths = || {
            let rows = of_files.iter().flat_map(|(rows, truncated)| rows.clone().map(move |row| (row, *truncated)));
            let lengths = rows.zip(dataset.examples.lengths());
            lengths.filter(|((row, truncated), _)| !is_cut(*row, truncated)).map(|(_, length)| length)
        };
        let longest = if cut == 0 { lengths().max().unwrap_or(0) } else { max_length };
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
        Self { bins, cut, max_length }
    }

    /// The largest number of rows in a bin, or of those that were cut.
    pub(super) fn largest(&self) -> usize {
        self.bins.iter().map(|bin| bin.rows).chain([self.cut]).max().unwrap_or(0)
    }
}
