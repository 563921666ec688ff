//! Rows to learn from, with what was read, cut and left out.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::DataError;
use crate::example::Example;
use crate::examples::Examples;
use crate::judged::Judged;
use crate::report::DataReport;
use crate::shuffle::{Purpose, permutation};

/// The rows of one or several sources that have something to learn from, in the order of files and of rows in them.
#[derive(Clone, Debug, Default)]
pub struct Dataset {
    /// The rows.
    pub examples: Examples,
    /// What each of them says of its answers; empty where they are to be learned, whatever they are.
    pub judged: Vec<Judged>,
    /// What was read, cut and left out.
    pub report: DataReport,
    /// How often an epoch visits the rows of each source; empty where it visits every row once.
    pub weights: Vec<SourceWeight>,
}

/// How often an epoch visits the rows of a source.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourceWeight {
    /// Its rows to learn from; they follow those of the source before.
    pub rows: usize,
    /// Visits of each in an epoch, on average.
    pub weight: f64,
}

impl SourceWeight {
    /// Visits of its rows in an epoch; at least one, if it has rows.
    pub(crate) fn visits(self) -> usize {
        match self.rows {
            0 => 0,
            rows => ((rows as f64 * self.weight).round() as usize).max(1),
        }
    }
}

impl Dataset {
    /// Takes a part of the rows out, chosen by the seed; both sides keep the file's order.
    /// Returns what stays and what was taken.
    ///
    /// # Errors
    /// [`DataError::Config`] if there are not two rows to share.
    pub fn split(self, fraction: f64, seed: u64) -> Result<(Self, Self), DataError> {
        let rows = self.examples.len();
        if rows < 2 {
            return Err(DataError::Config {
                key: "eval_fraction",
                problem: format!(
                    "= {fraction} can't divide {rows} row of {}; give more rows, or 0",
                    self.report.sources
                ),
            });
        }
        let taken = ((rows as f64 * fraction).round() as usize).clamp(1, rows - 1);
        let mut is_taken = vec![false; rows];
        for &row in &permutation(rows, seed, Purpose::Split, 0)[..taken] {
            is_taken[row as usize] = true;
        }
        let (kept_report, taken_report) = self.report.split(&self.examples, &is_taken);
        let mut from = 0;
        let mut weights = self.weights;
        for weight in &mut weights {
            let to = from + weight.rows;
            weight.rows = is_taken[from..to].iter().filter(|taken| !**taken).count();
            from = to;
        }
        let of = |part: bool| {
            let rows = is_taken.iter().zip(0..).filter(|(taken, _)| **taken == part).map(|(_, row)| row);
            self.examples.chosen(rows.collect())
        };
        let [kept, taken] = [of(false), of(true)];
        let [judged, of_taken] = parts(self.judged, &is_taken);
        let held_out = Self { examples: taken, judged: of_taken, report: taken_report, weights: Vec::new() };
        Ok((Self { examples: kept, judged, report: kept_report, weights }, held_out))
    }

    /// Whether rows are pairs of answers; `None` where answers are not judged.
    pub fn are_pairs(&self) -> Option<bool> {
        self.judged.first().map(|judged| matches!(judged, Judged::Pair { .. }))
    }

    /// What a run that goes on has to find unchanged: the SHA-256 of tokens and labels of all rows in their order, and of weights,
    /// in hexadecimal digits. Prompts of other words, another template and another order give another one.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        let mut bytes = Vec::new();
        hash.update((self.examples.len() as u64).to_le_bytes());
        self.examples.walk(|_, row| {
            bytes.clear();
            // As many ids as labels.
            let length = (row.len() as u64).to_le_bytes();
            bytes.extend([length, length].as_flattened());
            bytes.extend(row.ids().flat_map(u32::to_le_bytes));
            bytes.extend(row.labels().flat_map(i64::to_le_bytes));
            hash.update(&bytes);
        });
        self.judged.iter().for_each(|judged| hash.update(judged.code().to_le_bytes()));
        for SourceWeight { rows, weight } in &self.weights {
            hash.update((*rows as u64).to_le_bytes());
            hash.update(weight.to_le_bytes());
        }
        let mut text = String::with_capacity(64);
        for byte in hash.finalize() {
            text.extend([byte >> 4, byte & 15].map(|digit| char::from_digit(digit.into(), 16).unwrap_or_default()));
        }
        text
    }

    /// Rows chosen by the seed: of the first count, and others of the second, as far as there are any.
    pub fn choose(&self, counts: [usize; 2], seed: u64) -> [Vec<Example>; 2] {
        let order = permutation(self.examples.len(), seed, Purpose::Split, 0);
        let mut order = order.into_iter().filter_map(|row| self.examples.get(row as usize));
        counts.map(|count| order.by_ref().take(count).collect())
    }
}

/// What is not taken, and what is, both in their order.
fn parts<T>(all: Vec<T>, is_taken: &[bool]) -> [Vec<T>; 2] {
    let mut parts = [Vec::new(), Vec::new()];
    for (item, taken) in all.into_iter().zip(is_taken) {
        parts[usize::from(*taken)].push(item);
    }
    parts
}
