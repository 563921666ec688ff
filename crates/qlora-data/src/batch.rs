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
use std::ops::{AddAssign, Range};

use chat_text::{MASKED_LABEL, Tokenizer};
use serde::{Deserialize, Serialize};

use crate::config::DataConfig;
use crate::dataset::SourceWeight;
use crate::error::DataError;
use crate::example::Example;
use crate::judged::{self, Judged, JudgedRows};
use crate::packing::{Packed, Packing, best_fit};
use crate::shuffle::{Purpose, permutation};

/// With `group_by_length`, rows are sorted within this many batches.
const GROUP: usize = 50;

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
    pub fn new<'a>(examples: impl IntoIterator<Item = &'a Example>, pad_id: u32) -> Self {
        let examples: Vec<_> = examples.into_iter().collect();
        let lengths: Vec<_> = examples.iter().map(|e| e.input_ids.len()).collect();
        let (rows, cols) = (examples.len(), lengths.iter().copied().max().unwrap_or(0));
        let mut input_ids = Vec::with_capacity(rows * cols);
        let mut labels = Vec::with_capacity(rows * cols);
        for (index, example) in examples.iter().enumerate() {
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
    pub fn end_to_end<'a>(examples: impl IntoIterator<Item = &'a Example>) -> Self {
        let (mut input_ids, mut labels, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
        for example in examples {
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

/// Where a run stands in the data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Passes over the rows that are finished.
    pub epoch: usize,
    /// Batches of the current pass that are finished.
    pub batch: usize,
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

/// Which rows go into which batch.
#[derive(Clone, Debug)]
pub struct BatchOrder {
    lengths: Vec<usize>,
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
    pub fn new(examples: &[Example], config: &DataConfig, batch_size: usize, seed: u64, pad_id: u32) -> Self {
        Self {
            shuffle: config.shuffle,
            group_by_length: config.group_by_length,
            seed,
            ..Self::for_evaluation(examples, config, batch_size, pad_id)
        }
    }

    /// The rows as they come, packed where the configuration asks for it: sequences in the order of their first rows.
    pub fn for_evaluation(examples: &[Example], config: &DataConfig, batch_size: usize, pad_id: u32) -> Self {
        let order = Self::in_file_order(examples, batch_size, pad_id);
        let packed = Packed::of(config.packing, &order.lengths, config.max_length);
        Self { packed, ..order }
    }

    /// The rows as they come, none of them packed.
    pub fn in_file_order(examples: &[Example], batch_size: usize, pad_id: u32) -> Self {
        Self {
            lengths: examples.iter().map(|e| e.input_ids.len()).collect(),
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
    /// other sequences.
    pub fn weighted(self, weights: &[SourceWeight]) -> Result<Self, DataError> {
        let packed = self.packed;
        let order = Self { weights: weights.to_vec(), ..self };
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
        let lengths: Vec<usize> = visited.iter().map(|row| order.lengths[*row]).collect();
        Ok(Self { packed: Packed::of(Packing::Auto, &lengths, capacity), ..order })
    }

    /// Rows that one epoch visits.
    pub fn rows_per_epoch(&self) -> usize {
        match self.weights.as_slice() {
            [] => self.lengths.len(),
            weights => weights.iter().map(|source| source.visits()).sum(),
        }
    }

    /// How rows are packed, where they are.
    pub fn packed(&self) -> Option<Packed> {
        self.packed
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
    fn visited(&self, epoch: usize) -> Option<Vec<usize>> {
        if self.weights.is_empty() {
            return None;
        }
        let mut visited = Vec::with_capacity(self.rows_per_epoch());
        let mut first = 0;
        for (number, source) in self.weights.iter().enumerate() {
            let rows = source.rows;
            let visits = source.visits();
            // A fraction of the rows goes through all of them in turn, in an order that is drawn once.
            let mut times = vec![visits / rows.max(1); rows];
            let some = visits % rows.max(1);
            if some > 0 {
                let order = permutation(rows, self.seed, Purpose::Weights, number as u64);
                let begin = epoch % rows * some % rows;
                (begin..begin + some).for_each(|at| times[order[at % rows]] += 1);
            }
            visited.extend(times.iter().enumerate().flat_map(|(row, times)| std::iter::repeat_n(first + row, *times)));
            first += rows;
        }
        Some(visited)
    }

    /// What an epoch's batches hold. The last batch of an epoch is not filled up with rows.
    pub fn padding(&self, epoch: usize) -> Padding {
        if let Some(Packed { tokens, .. }) = self.packed {
            return Padding { tokens, cells: tokens };
        }
        let mut padding = Padding::default();
        for batch in self.rows(epoch) {
            let lengths = || batch.iter().map(|row| self.lengths[*row] as u64);
            padding.tokens += lengths().sum::<u64>();
            padding.cells += lengths().max().unwrap_or(0) * batch.len() as u64;
        }
        padding
    }

    /// Indices of the rows of each batch of an epoch.
    pub fn rows(&self, epoch: usize) -> Vec<Vec<usize>> {
        let count = self.rows_per_epoch();
        let mut order = match self.shuffle {
            true => permutation(count, self.seed, Purpose::Rows, epoch as u64),
            false => (0..count).collect(),
        };
        if let Some(visited) = self.visited(epoch) {
            order.iter_mut().for_each(|at| *at = visited[*at]);
        }
        if let Some(Packed { capacity, .. }) = self.packed {
            return self.sequences_of(order, capacity, epoch).chunks(self.batch_size).map(<[_]>::concat).collect();
        }
        if !self.group_by_length {
            return order.chunks(self.batch_size).map(<[_]>::to_vec).collect();
        }
        // Sorted within groups, so that batches hold rows of similar length and still change
        // from epoch to epoch; the sort is stable, so equal lengths keep the random order.
        for group in order.chunks_mut(self.batch_size * GROUP) {
            group.sort_by_key(|row| Reverse(self.lengths[*row]));
        }
        let mut batches: Vec<_> = order.chunks(self.batch_size).map(<[_]>::to_vec).collect();
        if self.shuffle {
            let order = permutation(batches.len(), self.seed, Purpose::Batches, epoch as u64);
            batches = order.iter().map(|&i| batches[i].clone()).collect();
        }
        // A batch that does not fit in memory should fail at the start.
        let longest = |batch: &Vec<usize>| batch.iter().map(|row| self.lengths[*row]).max();
        if epoch == 0
            && let Some((index, _)) =
                batches.iter().enumerate().max_by_key(|(index, batch)| (longest(batch), Reverse(*index)))
        {
            batches[..=index].rotate_right(1);
        }
        batches
    }

    /// The rows of each sequence of an epoch.
    fn sequences_of(&self, order: Vec<usize>, capacity: usize, epoch: usize) -> Vec<Vec<usize>> {
        let mut sequences = best_fit(&self.lengths, order, capacity);
        match self.shuffle {
            true => {
                let drawn = permutation(sequences.len(), self.seed, Purpose::Batches, epoch as u64);
                drawn.into_iter().map(|sequence| std::mem::take(&mut sequences[sequence])).collect()
            }
            false => {
                sequences.iter_mut().for_each(|rows| rows.sort_unstable());
                sequences.sort_unstable();
                sequences
            }
        }
    }

    /// The batches of one epoch, made from the rows this order was created for when they are asked for.
    pub fn epoch<'a>(&'a self, examples: &'a [Example], epoch: usize) -> impl ExactSizeIterator<Item = Batch> + 'a {
        self.rows(epoch).into_iter().map(|rows| self.batch(examples, &rows))
    }

    /// The batches from a position on, epoch after epoch; endless unless there are no rows.
    pub fn batches_from<'a>(&'a self, examples: &'a [Example], position: Position) -> Batches<'a> {
        Batches { order: self, examples, rows: self.rows(position.epoch), position }
    }

    /// Some of the rows side by side, whether or not they are packed otherwise.
    pub fn padded(&self, examples: &[Example], rows: &[usize]) -> Batch {
        Batch::new(rows.iter().filter_map(|row| examples.get(*row)), self.pad_id)
    }

    fn batch(&self, examples: &[Example], rows: &[usize]) -> Batch {
        if !self.judged.is_empty() {
            return self.batch_of_judged(examples, rows);
        }
        match self.packed {
            Some(_) => Batch::end_to_end(rows.iter().filter_map(|row| examples.get(*row))),
            None => self.padded(examples, rows),
        }
    }
}

impl BatchOrder {
    /// Rows end to end, a pair as two.
    fn batch_of_judged(&self, examples: &[Example], rows: &[usize]) -> Batch {
        let mut judged = JudgedRows { paired: true, ..JudgedRows::default() };
        let mut all = Vec::new();
        for &row in rows {
            let (Some(example), Some(of_row)) = (examples.get(row), self.judged.get(row)) else { continue };
            judged.paired &= matches!(of_row, Judged::Pair { .. });
            for (number, (side, tokens)) in of_row.sides(example.input_ids.len()).into_iter().enumerate() {
                let here = judged::side(example, tokens);
                if let Some(max_length) = self.mismatched {
                    let before = (row + examples.len() - 1) % examples.len();
                    let other = self.judged[before].sides(examples[before].input_ids.len()).swap_remove(0).1;
                    let other = judged::side(&examples[before], other);
                    judged.mismatched.push(judged::mismatched(&here, &other, max_length));
                }
                judged.sides.push(side);
                judged.origins.push((row, number));
                all.push(here);
            }
        }
        Batch { judged: Some(Box::new(judged)), ..Batch::end_to_end(&all) }
    }
}

/// Batches one after the other; see [`BatchOrder::batches_from`].
#[derive(Clone, Debug)]
pub struct Batches<'a> {
    order: &'a BatchOrder,
    examples: &'a [Example],
    rows: Vec<Vec<usize>>,
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
        while step.len() < count && self.position.batch < self.rows.len() {
            step.extend(self.next());
        }
        step
    }
}

impl Iterator for Batches<'_> {
    type Item = Batch;

    fn next(&mut self) -> Option<Batch> {
        if self.rows.is_empty() {
            return None;
        }
        // A position may lie at the end of an epoch, or, after the batch size grew, beyond it.
        if self.position.batch >= self.rows.len() {
            self.position = Position { epoch: self.position.epoch + 1, batch: 0 };
            self.rows = self.order.rows(self.position.epoch);
        }
        let batch = self.order.batch(self.examples, &self.rows[self.position.batch]);
        self.position.batch += 1;
        Some(batch)
    }
}
