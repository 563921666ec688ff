//! What is timed: a batch under a policy.

use std::fmt;
use std::str::FromStr;

use burn_qlora::qlora_data::{
    Batch, BatchOrder, DataConfig, Example, Examples, JudgedRows, MASKED_LABEL, Packing, Side,
};
use burn_qlora::qlora_layers::mix;
use serde::{Deserialize, Serialize};

/// Rows and tokens of a micro-batch, written `4x2048`; `4x2048-packed` are that many sequences of short rows, and
/// `48x2048-padded` so many short rows side by side. `4x1024-pairs` are so many pairs of answers, two rows of that length each, half of it their
/// prompt, of which DPO learns beside the base; of `4x1024-pairs-ahead` the reference is known ahead.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Case {
    pub rows: usize,
    pub len: usize,
    #[serde(default)]
    pub fill: Fill,
}

/// What rows of a batch are filled with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Fill {
    /// As many tokens as there are places.
    #[default]
    Full,
    /// Short rows end to end, as `data.packing = "auto"` packs them.
    Packed,
    /// A short row each, and padding.
    Padded,
    /// Two rows for each, end to end.
    Pairs,
    /// The same, with the reference's log-probabilities.
    PairsAhead,
}

impl Fill {
    fn suffix(self) -> &'static str {
        match self {
            Self::Full => "",
            Self::Packed => "-packed",
            Self::Padded => "-padded",
            Self::Pairs => "-pairs",
            Self::PairsAhead => "-pairs-ahead",
        }
    }

    /// Whether answers are compared.
    pub(crate) fn is_pairs(self) -> bool {
        matches!(self, Self::Pairs | Self::PairsAhead)
    }
}

/// Lengths of short rows: log-normal about this median, as those of questions with worked answers are (grade-school arithmetic, a
/// hundred tokens of question and as many of answer), of a spread that has one row in a hundred beyond the ends, where it is cut.
const MEDIAN: f64 = 150.0;
const SPREAD: f64 = 0.4;
const SHORTEST: f64 = 50.0;
const LONGEST: f64 = 400.0;

/// The length of a short row.
fn short(seed: u64) -> usize {
    let uniform = |i: u64| ((mix(seed ^ mix(i)) >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
    // Box and Muller, 1958.
    let normal = (-2.0 * uniform(1).ln()).sqrt() * (std::f64::consts::TAU * uniform(2)).cos();
    (MEDIAN * (SPREAD * normal).exp()).clamp(SHORTEST, LONGEST).round() as usize
}

impl FromStr for Case {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fills = [Fill::Packed, Fill::Padded, Fill::Pairs, Fill::PairsAhead];
        let fill = fills.into_iter().find(|fill| text.ends_with(fill.suffix()));
        let fill = fill.unwrap_or_default();
        let size = text.strip_suffix(fill.suffix()).unwrap_or(text);
        let parsed = size.split_once('x').and_then(|(rows, len)| Some((rows.parse().ok()?, len.parse().ok()?)));
        match parsed {
            Some((rows, len)) if rows > 0 && len > 1 => Ok(Self { rows, len, fill }),
            _ => {
                Err("write ROWSxTOKENS, such as 4x2048, with two tokens or more, or 4x2048-packed, -padded, -pairs or \
                      -pairs-ahead"
                    .into())
            }
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}x{}{}", self.rows, self.len, self.fill.suffix()))
    }
}

impl Case {
    /// Rows that are full.
    pub(crate) const fn full(rows: usize, len: usize) -> Self {
        Self { rows, len, fill: Fill::Full }
    }

    /// The lengths of the rows of a batch: those of short rows are drawn, and so many are packed that an epoch would have eight such
    /// batches.
    pub(crate) fn lengths(self, seed: u64) -> Vec<usize> {
        let drawn =
            |count: usize| (0..count).map(|row| short(mix(seed ^ row as u64)).min(self.len)).collect::<Vec<_>>();
        match self.fill {
            Fill::Full => vec![self.len; self.rows],
            Fill::Pairs | Fill::PairsAhead => vec![self.len; 2 * self.rows],
            Fill::Padded => drawn(self.rows),
            Fill::Packed => {
                let lengths = drawn((8 * self.rows * self.len).div_ceil(MEDIAN as usize).max(2));
                let rows: Examples = lengths.iter().map(|len| row_of(*len, 0, 1)).collect();
                let config = DataConfig { packing: Packing::Auto, max_length: self.len, ..DataConfig::default() };
                let order = BatchOrder::new(&rows, &config, self.rows, seed, 0);
                let first = order.rows(0).next().unwrap_or_default();
                first.into_iter().map(|row| lengths[row]).collect()
            }
        }
    }

    /// Random tokens, all of them labelled; other ones for another seed.
    pub(crate) fn batch(self, vocab: usize, seed: u64) -> Batch {
        let lengths = self.lengths(seed).into_iter().enumerate();
        let rows: Vec<Example> = lengths.map(|(row, len)| row_of(len, mix(seed ^ mix(row as u64)), vocab)).collect();
        match self.fill {
            Fill::Packed => Batch::end_to_end(&rows),
            Fill::Pairs | Fill::PairsAhead => self.pairs(rows),
            Fill::Full | Fill::Padded => Batch::new(&rows, 0),
        }
    }
}

impl Case {
    /// Rows as pairs of answers to prompts of half their length.
    fn pairs(self, mut rows: Vec<Example>) -> Batch {
        for at in (0..rows.len()).step_by(2) {
            let prompt = self.len / 2;
            let (first, second) = rows.split_at_mut(at + 1);
            second[0].input_ids[..prompt].copy_from_slice(&first[at].input_ids[..prompt]);
            [&mut first[at], &mut second[0]].into_iter().for_each(|row| row.labels[..prompt].fill(MASKED_LABEL));
        }
        let reference = if self.fill == Fill::PairsAhead { vec![-1.0; rows.len()] } else { Vec::new() };
        let judged = JudgedRows {
            sides: [Side::Chosen, Side::Rejected].repeat(self.rows),
            paired: true,
            origins: (0..rows.len()).map(|row| (row / 2, row % 2)).collect(),
            reference,
            ..JudgedRows::default()
        };
        Batch { judged: Some(Box::new(judged)), ..Batch::end_to_end(&rows) }
    }
}

fn row_of(len: usize, start: u64, vocab: usize) -> Example {
    let id = |i: usize| (mix(start.wrapping_add(i as u64)) % vocab as u64) as u32;
    let input_ids: Vec<u32> = (0..len).map(id).collect();
    let labels = input_ids.iter().map(|&id| i64::from(id)).collect();
    Example { input_ids, labels, line: 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_rows_by_tokens() {
        assert_eq!("4x2048".parse(), Ok(Case::full(4, 2048)));
        assert_eq!("4x2048-packed".parse(), Ok(Case { fill: Fill::Packed, ..Case::full(4, 2048) }));
        assert_eq!("48x512-padded".parse(), Ok(Case { fill: Fill::Padded, ..Case::full(48, 512) }));
        for text in ["1x512", "4x2048-packed", "48x512-padded"] {
            assert_eq!(text.parse::<Case>().map(|case| case.to_string()), Ok(text.into()));
        }
        for text in ["4", "0x8", "1x1", "x", "4x-1", "4x8x2", "4x8-full", "-packed"] {
            assert!(text.parse::<Case>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_batch_is_full_and_within_the_vocabulary() {
        let case = Case::full(3, 50);
        let batch = case.batch(70, 1);
        assert_eq!((batch.rows, batch.cols, batch.label_tokens()), (3, 50, 3 * 49));
        assert!(batch.input_ids.iter().all(|&id| id < 70));
        assert_ne!(batch, case.batch(70, 2));
    }

    #[test]
    fn short_rows_have_the_lengths_that_they_are_said_to_have() {
        let mut lengths: Vec<usize> = (0..10_000).map(|row| short(mix(row))).collect();
        lengths.sort_unstable();
        assert_eq!((lengths[0], lengths[9999]), (50, 400));
        // The median of ten thousand is within 1 % of that of the distribution, four times its standard error.
        assert!(lengths[5000].abs_diff(150) <= 2, "{}", lengths[5000]);
        let cut = lengths.iter().filter(|len| [50, 400].contains(*len)).count();
        assert!((20..180).contains(&cut), "{cut}");
    }

    #[test]
    fn packed_rows_fill_their_sequences() {
        let case = Case { fill: Fill::Packed, ..Case::full(4, 2048) };
        let batch = case.batch(70, 1);
        // Hardly any place of four sequences is left.
        assert!(batch.packed && (4 * 2020..=4 * 2048).contains(&batch.input_ids.len()), "{}", batch.input_ids.len());
        assert!((40..70).contains(&batch.rows), "{}", batch.rows);
        let padded = Case { fill: Fill::Padded, ..Case::full(48, 2048) }.batch(70, 1);
        assert!(!padded.packed && padded.rows == 48 && padded.cols <= 400);
        assert!((0.2..0.7).contains(&padded.padding().waste()), "{}", padded.padding().waste());
    }
}
