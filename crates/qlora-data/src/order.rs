//! Rows into batches, in an order that can be found again.
//!
//! The order of an epoch is a function of the seed and the epoch's number: nothing is carried from
//! one epoch to the next, so a run that stopped continues at any batch of any epoch without going
//! through those before. The generator is ChaCha8 and the shuffle is written out here, so the order
//! stays the same on every machine and with every version of a library.
//!
//! Where rows are packed ([`Packing`]), every epoch packs them anew, and draws the order of the sequences. A batch
//! holds `batch_size` sequences instead of rows, all of them end to end, so that no place is padding.

use std::cmp::Reverse;

use serde::{Deserialize, Serialize};

use crate::batch::{Batch, Padding};
use crate::config::DataConfig;
use crate::dataset::SourceWeight;
use crate::error::DataError;
use crate::example::Example;
use crate::examples::Examples;
use crate::judged::{self, Judged, JudgedRows};
use crate::packing::{Packed, Packing, best_fit};
use crate::shuffle::{Purpose, permutation};

/// With `group_by_length`, rows are sorted within this many batches.
const GROUP: usize = 50;

/// Where a run stands in the data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Passes over the rows that are finished.
    pub epoch: usize,
    /// Batches of the current pass that are finished.
    pub batch: usize,
}

/// Which rows go into which batch.
#[derive(Clone, Debug)]
pub struct BatchOrder {
    lengths: Vec<u32>,
    packed: Option<Packed>,
    batch_size: usize,
    seed: u64,
    pad_id: u32,
    shuffle: bool,
    group_by_length: bool,
    /// Sources whose rows are not visited once an epoch.
    weights: Vec<SourceWeight>,
    /// What rows say of their answers, where they do.
    judged: Vec<Judged>,
    /// The longest row with the answer of another, where batches have such rows.
    mismatched: Option<usize>,
}

impl BatchOrder {
    /// The order that a configuration asks for. A `batch_size` of 0 is taken as 1.
    pub fn new(examples: &Examples, config: &DataConfig, batch_size: usize, seed: u64, pad_id: u32) -> Self {
        Self {
            shuffle: config.shuffle,
            group_by_length: config.group_by_length,
            seed,
            ..Self::for_evaluation(examples, config, batch_size, pad_id)
        }
    }

    /// The rows as they come, packed where the configuration asks for it: sequences in the order of their first rows.
    pub fn for_evaluation(examples: &Examples, config: &DataConfig, batch_size: usize, pad_id: u32) -> Self {
        let order = Self::in_file_order(examples, batch_size, pad_id);
        let packed = Packed::of(config.packing, &order.lengths, config.max_length);
        Self { packed, ..order }
    }

    /// The rows as they come, none of them packed.
    pub fn in_file_order(examples: &Examples, batch_size: usize, pad_id: u32) -> Self {
        Self {
            // `data.max_length` is no greater than that.
            lengths: examples.lengths().map(|length| length as u32).collect(),
            packed: None,
            batch_size: batch_size.max(1),
            seed: 0,
            pad_id,
            shuffle: false,
            group_by_length: false,
            weights: Vec::new(),
            judged: Vec::new(),
            mismatched: None,
        }
    }

    /// The order of rows whose answers are judged, as each of them says. They lie end to end in their batches whether or not they are packed,
    /// and where they are packed a sequence has room for two rows of `max_length` tokens.
    ///
    /// With `mismatches` batches hold each prompt with the answer of the row before, too.
    #[must_use]
    pub fn judged(self, judged: &[Judged], config: &DataConfig, mismatches: bool) -> Self {
        let pairs = matches!(judged.first(), Some(Judged::Pair { .. }));
        let capacity = if pairs { config.max_length.saturating_mul(2) } else { config.max_length };
        let packed = Packed::of(config.packing, &self.lengths, capacity);
        let mismatched = mismatches.then_some(config.max_length);
        Self { packed, judged: judged.to_vec(), mismatched, ..self }
    }

    /// Visits the rows of sources as often as their [weights](crate::Dataset::weights) say: rows of a source with weight 2 stand in an epoch
    /// twice, and of one with weight 0.25 an epoch holds a fourth, in turn.
    ///
    /// # Errors
    /// [`DataError::Config`]: rows are packed, and a weight is no whole number. An epoch has other rows than the next one then, and would have
    /// other sequences. Or an epoch has more rows than there are numbers for.
    pub fn weighted(self, weights: &[SourceWeight]) -> Result<Self, DataError> {
        let packed = self.packed;
        let order = Self { weights: weights.to_vec(), ..self };
        let rows = order.rows_per_epoch();
        if u32::try_from(rows).is_err() {
            let problem =
                format!("has {rows} rows an epoch by its weights, and at most {} can be; give smaller ones", u32::MAX);
            return Err(DataError::Config { key: "train", problem });
        }
        let (Some(Packed { capacity, .. }), Some(visited)) = (packed, order.visited(0)) else { return Ok(order) };
        if let Some(source) = weights.iter().find(|source| source.rows > 0 && source.visits() % source.rows > 0) {
            return Err(DataError::Config {
                key: "packing",
                problem: format!(
                    "= \"auto\": a source of {} rows has the weight {}, so that each epoch has other rows and would have other sequences; give \
                     sources weights that are whole numbers, or set data.packing = \"off\"",
                    source.rows, source.weight
                ),
            });
        }
        let lengths: Vec<u32> = visited.iter().map(|row| order.lengths[*row as usize]).collect();
        Ok(Self { packed: Packed::of(Packing::Auto, &lengths, capacity), ..order })
    }

    /// Rows that one epoch visits.
    pub fn rows_per_epoch(&self) -> usize {
        match self.weights.as_slice() {
            [] => self.lengths.len(),
            weights => weights.iter().fold(0, |rows, source| rows.saturating_add(source.visits())),
        }
    }

    /// How rows are packed, where they are.
    pub fn packed(&self) -> Option<Packed> {
        self.packed
    }

    /// Tokens of the longest row, or of the fullest sequence, where rows are packed.
    pub fn longest(&self) -> usize {
        let of_rows = || self.lengths.iter().copied().max().unwrap_or(0) as usize;
        self.packed.map_or_else(of_rows, |packed| packed.fullest)
    }

    /// What `batch_size` counts in one epoch: rows, or sequences where they are packed. The same in every epoch.
    pub fn sequences(&self) -> usize {
        self.packed.map_or_else(|| self.rows_per_epoch(), |packed| packed.sequences)
    }

    /// Batches in one epoch; the last one may hold fewer rows.
    pub fn batches_per_epoch(&self) -> usize {
        self.sequences().div_ceil(self.batch_size)
    }

    /// The rows that an epoch visits, in the file's order; `None` for each of them once.
    fn visited(&self, epoch: usize) -> Option<Vec<u32>> {
        if self.weights.is_empty() {
            return None;
        }
        let mut visited = Vec::with_capacity(self.rows_per_epoch());
        let mut first = 0_u32;
        for (number, source) in self.weights.iter().enumerate() {
            let rows = source.rows;
            let visits = source.visits();
            // A fraction of the rows goes through all of them in turn, in an order that is drawn once.
            let mut times = vec![(visits / rows.max(1)) as u32; rows];
            let some = visits % rows.max(1);
            if some > 0 {
                let order = permutation(rows, self.seed, Purpose::Weights, number as u64);
                let begin = epoch % rows * some % rows;
                (begin..begin + some).for_each(|at| times[order[at % rows] as usize] += 1);
            }
            let rows = times.iter().zip(first..);
            visited.extend(rows.flat_map(|(times, row)| std::iter::repeat_n(row, *times as usize)));
            first += times.len() as u32;
        }
        Some(visited)
    }

    /// What an epoch's batches hold. The last batch of an epoch is not filled up with rows.
    pub fn padding(&self, epoch: usize) -> Padding {
        if let Some(Packed { tokens, .. }) = self.packed {
            return Padding { tokens, cells: tokens };
        }
        let (mut padding, batches) = (Padding::default(), self.batches(epoch));
        for batch in (0..batches.len()).map(|batch| batches.rows(batch)) {
            let lengths = || batch.iter().map(|row| u64::from(self.lengths[*row as usize]));
            padding.tokens += lengths().sum::<u64>();
            padding.cells += lengths().max().unwrap_or(0) * batch.len() as u64;
        }
        padding
    }

    /// Indices of the rows of each batch of an epoch.
    pub fn rows(&self, epoch: usize) -> impl ExactSizeIterator<Item = Vec<usize>> + use<> {
        let batches = self.batches(epoch);
        (0..batches.len()).map(move |batch| batches.rows(batch).iter().map(|row| *row as usize).collect())
    }

    fn batches(&self, epoch: usize) -> BatchRows {
        let count = self.rows_per_epoch();
        let mut order = match self.shuffle {
            true => permutation(count, self.seed, Purpose::Rows, epoch as u64),
            false => (0..count as u32).collect(),
        };
        if let Some(visited) = self.visited(epoch) {
            order.iter_mut().for_each(|at| *at = visited[*at as usize]);
        }
        if let Some(Packed { capacity, .. }) = self.packed {
            let sequences = self.sequences_of(order, capacity, epoch);
            return BatchRows::joined(sequences.chunks(self.batch_size).map(|batch| batch.iter().flatten().copied()));
        }
        if !self.group_by_length {
            return BatchRows::joined(order.chunks(self.batch_size).map(|batch| batch.iter().copied()));
        }
        // Sorted within groups, so that batches hold rows of similar length and still change
        // from epoch to epoch; the sort is stable, so equal lengths keep the random order.
        for group in order.chunks_mut(self.batch_size * GROUP) {
            group.sort_by_key(|row| Reverse(self.lengths[*row as usize]));
        }
        let mut batches: Vec<&[u32]> = order.chunks(self.batch_size).collect();
        if self.shuffle {
            let order = permutation(batches.len(), self.seed, Purpose::Batches, epoch as u64);
            batches = order.iter().map(|batch| batches[*batch as usize]).collect();
        }
        // A batch that does not fit in memory should fail at the start.
        let longest = |batch: &&[u32]| batch.iter().map(|row| self.lengths[*row as usize]).max();
        if epoch == 0
            && let Some((index, _)) =
                batches.iter().enumerate().max_by_key(|(index, batch)| (longest(batch), Reverse(*index)))
        {
            batches[..=index].rotate_right(1);
        }
        BatchRows::joined(batches.into_iter().map(|batch| batch.iter().copied()))
    }

    /// The rows of each sequence of an epoch.
    fn sequences_of(&self, order: Vec<u32>, capacity: usize, epoch: usize) -> Vec<Vec<u32>> {
        let mut sequences = best_fit(&self.lengths, order, capacity);
        match self.shuffle {
            true => {
                let drawn = permutation(sequences.len(), self.seed, Purpose::Batches, epoch as u64);
                drawn.into_iter().map(|sequence| std::mem::take(&mut sequences[sequence as usize])).collect()
            }
            false => {
                sequences.iter_mut().for_each(|rows| rows.sort_unstable());
                sequences.sort_unstable();
                sequences
            }
        }
    }

    /// The batches of one epoch, made from the rows this order was created for when they are asked for.
    pub fn epoch<'a>(&'a self, examples: &'a Examples, epoch: usize) -> impl ExactSizeIterator<Item = Batch> + 'a {
        let batches = self.batches(epoch);
        (0..batches.len()).map(move |batch| self.batch(examples, batches.rows(batch)))
    }

    /// The batches from a position on, epoch after epoch; endless unless there are no rows.
    pub fn batches_from<'a>(&'a self, examples: &'a Examples, position: Position) -> Batches<'a> {
        Batches { order: self, examples, batches: self.batches(position.epoch), position }
    }

    /// Some of the rows side by side, whether or not they are packed otherwise.
    pub fn padded(&self, examples: &Examples, rows: &[usize]) -> Batch {
        Batch::new(rows.iter().filter_map(|row| examples.get(*row)), self.pad_id)
    }

    fn batch(&self, examples: &Examples, rows: &[u32]) -> Batch {
        if !self.judged.is_empty() {
            return self.batch_of_judged(examples, rows);
        }
        let rows = rows.iter().filter_map(|row| examples.get(*row as usize));
        match self.packed {
            Some(_) => Batch::end_to_end(rows),
            None => Batch::new(rows, self.pad_id),
        }
    }
}

impl BatchOrder {
    /// Rows end to end, a pair as two.
    fn batch_of_judged(&self, examples: &Examples, rows: &[u32]) -> Batch {
        let mut judged = JudgedRows { paired: true, ..JudgedRows::default() };
        let mut all = Vec::new();
        for row in rows.iter().map(|row| *row as usize) {
            let (Some(example), Some(of_row)) = (examples.get(row), self.judged.get(row)) else { continue };
            judged.paired &= matches!(of_row, Judged::Pair { .. });
            let other = self.mismatched.and_then(|max_length| Some((max_length, self.first_side(examples, row)?)));
            for (number, (side, tokens)) in of_row.sides(example.input_ids.len()).into_iter().enumerate() {
                let here = judged::side(&example, tokens);
                if let Some((max_length, other)) = &other {
                    judged.mismatched.push(judged::mismatched(&here, other, *max_length));
                }
                judged.sides.push(side);
                judged.origins.push((row, number));
                all.push(here);
            }
        }
        Batch { judged: Some(Box::new(judged)), ..Batch::end_to_end(&all) }
    }

    /// The first row that the row before one becomes; before the first stands the last.
    fn first_side(&self, examples: &Examples, row: usize) -> Option<Example> {
        let before = (row + examples.len() - 1) % examples.len();
        let example = examples.get(before)?;
        let (_, tokens) = self.judged.get(before)?.sides(example.input_ids.len()).swap_remove(0);
        Some(judged::side(&example, tokens))
    }
}

/// The rows of batches, one after the other: of millions of batches a list each would take more than the rows.
#[derive(Clone, Debug, Default)]
struct BatchRows {
    rows: Vec<u32>,
    ends: Vec<u32>,
}

impl BatchRows {
    fn joined(batches: impl IntoIterator<Item: IntoIterator<Item = u32>>) -> Self {
        let mut joined = Self::default();
        for batch in batches {
            joined.rows.extend(batch);
            joined.ends.push(joined.rows.len() as u32);
        }
        joined
    }

    fn len(&self) -> usize {
        self.ends.len()
    }

    fn rows(&self, batch: usize) -> &[u32] {
        let begin = batch.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.rows[begin as usize..self.ends[batch] as usize]
    }
}

/// Batches one after the other; see [`BatchOrder::batches_from`].
#[derive(Clone, Debug)]
pub struct Batches<'a> {
    order: &'a BatchOrder,
    examples: &'a Examples,
    batches: BatchRows,
    position: Position,
}

impl Batches<'_> {
    /// Where the next batch stands: what a training checkpoint has to keep.
    pub fn next_position(&self) -> Position {
        self.position
    }

    /// The micro-batches of the next optimizer step: `count`, or fewer where the epoch ends, as no step
    /// reaches over its end.
    pub fn next_step(&mut self, count: usize) -> Vec<Batch> {
        let mut step: Vec<Batch> = self.next().into_iter().collect();
        while step.len() < count && self.position.batch < self.batches.len() {
            step.extend(self.next());
        }
        step
    }
}

impl Iterator for Batches<'_> {
    type Item = Batch;

    fn next(&mut self) -> Option<Batch> {
        if self.batches.len() == 0 {
            return None;
        }
        // A position may lie at the end of an epoch, or, after the batch size grew, beyond it.
        if self.position.batch >= self.batches.len() {
            self.position = Position { epoch: self.position.epoch + 1, batch: 0 };
            self.batches = self.order.batches(self.position.epoch);
        }
        let batch = self.order.batch(self.examples, self.batches.rows(self.position.batch));
        self.position.batch += 1;
        Some(batch)
    }
}
