//! What is timed: a batch under a policy.

use std::fmt;
use std::str::FromStr;

use burn_qlora::qlora_data::{Batch, Example};
use burn_qlora::qlora_layers::mix;
use serde::{Deserialize, Serialize};

/// Rows and tokens of a micro-batch, written `4x2048`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Case {
    pub rows: usize,
    pub len: usize,
}

impl FromStr for Case {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('x').and_then(|(rows, len)| Some((rows.parse().ok()?, len.parse().ok()?)));
        match parsed {
            Some((rows, len)) if rows > 0 && len > 1 => Ok(Self { rows, len }),
            _ => Err("write ROWSxTOKENS, such as 4x2048, with two tokens or more".into()),
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}x{}", self.rows, self.len))
    }
}

impl Case {
    /// Random tokens, all of them labelled; other ones for another seed.
    pub(crate) fn batch(self, vocab: usize, seed: u64) -> Batch {
        let row = |row: usize| {
            let start = mix(seed ^ mix(row as u64));
            let id = |i: usize| (mix(start.wrapping_add(i as u64)) % vocab as u64) as u32;
            let input_ids: Vec<u32> = (0..self.len).map(id).collect();
            let labels = input_ids.iter().map(|&id| i64::from(id)).collect();
            Example { input_ids, labels, line: row + 1 }
        };
        let examples: Vec<Example> = (0..self.rows).map(row).collect();
        Batch::new(&examples, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_rows_by_tokens() {
        assert_eq!("4x2048".parse(), Ok(Case { rows: 4, len: 2048 }));
        assert_eq!(Case { rows: 1, len: 512 }.to_string(), "1x512");
        for text in ["4", "0x8", "1x1", "x", "4x-1", "4x8x2"] {
            assert!(text.parse::<Case>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_batch_is_full_and_within_the_vocabulary() {
        let case = Case { rows: 3, len: 50 };
        let batch = case.batch(70, 1);
        assert_eq!((batch.rows, batch.cols, batch.label_tokens()), (3, 50, 3 * 49));
        assert!(batch.input_ids.iter().all(|&id| id < 70));
        assert_ne!(batch, case.batch(70, 2));
    }
}
