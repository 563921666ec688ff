//! Rows end to end: which of them share a sequence.
//!
//! Best fit decreasing (Johnson, 1973, near-optimal bin packing algorithms): the longest row first, each into the fullest
//! sequence that it still fits into. How full sequences become, and so their number, depends on the lengths alone, not on the
//! order of rows that are equally long; the bound is 11/9 of the fewest sequences that there can be, and short rows come within
//! one of it.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Whether rows share sequences.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Packing {
    /// Rows are laid end to end, in sequences of up to `max_length` tokens, where any two of them fit into one.
    Auto,
    /// Rows are padded to the longest of their batch.
    #[default]
    Off,
}

impl Packing {
    pub(crate) fn is_off(&self) -> bool {
        *self == Self::Off
    }
}

/// How rows are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packed {
    /// Sequences of an epoch, the same in each.
    pub sequences: usize,
    /// Tokens of a sequence at most: `data.max_length`.
    pub capacity: usize,
    /// Tokens of the fullest.
    pub fullest: usize,
    /// Tokens of all.
    pub tokens: u64,
}

impl Packed {
    /// How rows of these lengths are packed; `None` where they are not, since no two of them fit into one sequence.
    pub(crate) fn of(packing: Packing, lengths: &[u32], capacity: usize) -> Option<Self> {
        if packing.is_off() {
            return None;
        }
        let sequences = best_fit(lengths, (0..lengths.len() as u32).collect(), capacity);
        let tokens = |rows: &Vec<u32>| rows.iter().map(|row| lengths[*row as usize] as usize).sum::<usize>();
        let packed = Self {
            sequences: sequences.len(),
            capacity,
            fullest: sequences.iter().map(tokens).max().unwrap_or(0),
            tokens: lengths.iter().map(|len| u64::from(*len)).sum(),
        };
        (packed.sequences < lengths.len()).then_some(packed)
    }

    /// The part of the sequences that holds tokens, from 0 to 1.
    pub fn fill(&self) -> f64 {
        self.tokens as f64 / (self.sequences * self.capacity).max(1) as f64
    }
}

/// The rows of each sequence, the longest first. Of rows that are equally long, those that come first in `order` are placed first. A row
/// beyond the capacity has a sequence to itself.
pub(crate) fn best_fit(lengths: &[u32], mut order: Vec<u32>, capacity: usize) -> Vec<Vec<u32>> {
    let of = |row: &u32| lengths[*row as usize] as usize;
    // A stable sort, so that the order of equal rows stays.
    order.sort_by_key(|row| Reverse(of(row)));
    let shortest = order.last().map_or(0, of);
    let mut sequences: Vec<Vec<u32>> = Vec::new();
    // Sequences that have room for the shortest row at least, by their free places.
    let mut open: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for row in order {
        let length = of(&row);
        let found =
            open.range_mut(length..).next().and_then(|(free, those)| Some((*free, those.pop()?, those.is_empty())));
        let (free, sequence) = match found {
            Some((free, sequence, was_last)) => {
                if was_last {
                    open.remove(&free);
                }
                sequences[sequence].push(row);
                (free, sequence)
            }
            None => {
                sequences.push(vec![row]);
                (capacity, sequences.len() - 1)
            }
        };
        let left = free.saturating_sub(length);
        if left >= shortest.max(1) {
            open.entry(left).or_default().push(sequence);
        }
    }
    sequences
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn packed(lengths: &[u32], capacity: usize) -> Vec<Vec<u32>> {
        best_fit(lengths, (0..lengths.len() as u32).collect(), capacity)
    }

    #[test]
    fn a_row_goes_where_the_least_room_is_left() {
        // 7 and 5 begin sequences; 3 fills the first, 2 the second with 2 left, and 2 fills it.
        assert_eq!(packed(&[5, 2, 7, 3, 2], 10), [[2, 3].to_vec(), [0, 1, 4].to_vec()]);
        // First fit would put the 2 into the first sequence, which has more room.
        assert_eq!(packed(&[12, 9, 9, 2], 20), [[0].to_vec(), [1, 2, 3].to_vec()]);
        assert_eq!(packed(&[12, 3, 10], 10), [[0].to_vec(), [2].to_vec(), [1].to_vec()]);
        assert_eq!(packed(&[], 10), [[0_u32; 0]; 0]);
    }

    #[test]
    fn rows_that_fit_nowhere_together_are_not_packed() {
        assert_eq!(Packed::of(Packing::Auto, &[6, 7, 8], 10), None);
        assert_eq!(Packed::of(Packing::Auto, &[], 10), None);
        assert_eq!(Packed::of(Packing::Off, &[1, 1], 10), None);
        let packed = Packed::of(Packing::Auto, &[6, 7, 3], 10).unwrap();
        assert_eq!(packed, Packed { sequences: 2, capacity: 10, fullest: 10, tokens: 16 });
        assert_eq!(packed.fill(), 0.8);
    }

    /// The straightforward form: of all sequences with room the fullest.
    fn oracle(lengths: &[u32], capacity: usize) -> Vec<usize> {
        let mut sorted: Vec<usize> = lengths.iter().map(|length| *length as usize).collect();
        sorted.sort_by_key(|length| Reverse(*length));
        let mut filled: Vec<usize> = Vec::new();
        for length in sorted {
            match filled.iter_mut().filter(|tokens| **tokens + length <= capacity).max_by_key(|tokens| **tokens) {
                Some(tokens) => *tokens += length,
                None => filled.push(length),
            }
        }
        filled.sort_unstable();
        filled
    }

    proptest! {
        #[test]
        fn sequences_are_those_of_the_oracle(
            lengths in prop::collection::vec(1u32..30, 0..80),
            capacity in 1usize..40,
            seed in any::<u64>(),
        ) {
            let order = crate::shuffle::permutation(lengths.len(), seed, crate::shuffle::Purpose::Rows, 0);
            let sequences = best_fit(&lengths, order, capacity);
            let mut rows = sequences.concat();
            rows.sort_unstable();
            prop_assert_eq!(rows, (0..lengths.len() as u32).collect::<Vec<_>>());
            let tokens = |rows: &Vec<u32>| rows.iter().map(|row| lengths[*row as usize] as usize).sum::<usize>();
            let mut filled: Vec<usize> = sequences.iter().map(tokens).collect();
            filled.sort_unstable();
            prop_assert_eq!(filled, oracle(&lengths, capacity));
            let within = |rows: &Vec<u32>| tokens(rows) <= capacity || rows.len() == 1;
            prop_assert!(sequences.iter().all(within), "{:?}", sequences);
        }
    }
}
