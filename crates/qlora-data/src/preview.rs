//! Rows as they are trained: which tokens, which of them are learned, and what an epoch holds.
//!
//! Only text is made here, for a terminal or a page; nothing is printed. What stands in the data is shown
//! and never obeyed: control characters and escape sequences come out as visible pictures.

mod html;
mod lengths;
mod terminal;

use std::collections::HashMap;

use chat_text::{MASKED_LABEL, Tokenizer};

use crate::batch::Padding;
use crate::dataset::Dataset;
use crate::error::DataError;
use crate::example::Example;
use crate::order::BatchOrder;
use crate::packing::Packed;
use crate::report::DataReport;
use crate::shuffle::{Purpose, permutation};
use crate::words::{count, grouped};

pub use lengths::{LengthBin, Lengths};

/// Which rows are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PreviewChoice {
    /// The first ones of the file.
    First,
    /// Some that this seed draws, in the file's order.
    Random(u64),
}

/// A token of a row that is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreviewToken {
    /// Its id.
    pub id: u32,
    /// The text that is complete with it: empty for the first tokens of a character that has several.
    pub text: String,
    /// Whether the loss counts it.
    pub learned: bool,
    /// Whether it is a special token.
    pub special: bool,
}

/// A row that is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreviewRow {
    /// Line or row of its file, from 1.
    pub line: usize,
    /// Where it stands, in words: its line or row, of several files with its file.
    pub place: String,
    /// Its tokens; their texts joined are the row's text.
    pub tokens: Vec<PreviewToken>,
}

impl PreviewRow {
    /// Decodes a row token by token.
    ///
    /// # Errors
    /// [`DataError::Chat`] if the tokenizer's decoder fails.
    pub fn new(example: &Example, tokenizer: &Tokenizer) -> Result<Self, DataError> {
        let mut decoder = tokenizer.stream_decoder(&[], false);
        let mut specials = HashMap::new();
        let mut tokens = Vec::with_capacity(example.input_ids.len());
        for (position, (&id, &label)) in example.input_ids.iter().zip(&example.labels).enumerate() {
            let special = match specials.get(&id) {
                Some(special) => *special,
                None => {
                    let special =
                        tokenizer.decode(&[id], true)?.is_empty() && !tokenizer.decode(&[id], false)?.is_empty();
                    specials.insert(id, special);
                    special
                }
            };
            // Nothing predicts the first token.
            let learned = position > 0 && label != MASKED_LABEL;
            tokens.push(PreviewToken { id, text: decoder.push(id)?, learned, special });
        }
        let rest = decoder.finish()?;
        if let Some(last) = tokens.last_mut() {
            last.text.push_str(&rest);
        }
        Ok(Self { line: example.line, place: format!("line {}", example.line), tokens })
    }

    /// Tokens that the loss counts.
    pub fn learned(&self) -> usize {
        self.tokens.iter().filter(|token| token.learned).count()
    }

    /// Where the row stands and what it holds, in words.
    fn title(&self) -> String {
        format!("{}: {}, {} learned", self.place, count(self.tokens.len() as u64, "token", "tokens"), self.learned())
    }
}

/// What a run would train on.
#[derive(Clone, Debug, PartialEq)]
pub struct Preview {
    /// Rows, as they are trained.
    pub rows: Vec<PreviewRow>,
    /// What was read, cut and left out; tokens of an epoch, and those that are learned.
    pub report: DataReport,
    /// How long the rows are.
    pub lengths: Lengths,
    /// Batches of an epoch.
    pub batches: usize,
    /// What they hold in the first epoch.
    pub padding: Padding,
    /// How rows are packed, where they are.
    pub packed: Option<Packed>,
}

impl Preview {
    /// Looks at the rows of a data set in the order of a run.
    ///
    /// # Errors
    /// As [`PreviewRow::new`].
    pub fn new(
        dataset: &Dataset,
        order: &BatchOrder,
        tokenizer: &Tokenizer,
        rows: usize,
        choice: PreviewChoice,
    ) -> Result<Self, DataError> {
        let examples = &dataset.examples;
        let chosen: Vec<usize> = match choice {
            PreviewChoice::First => (0..examples.len().min(rows)).collect(),
            PreviewChoice::Random(seed) => {
                let mut drawn = permutation(examples.len(), seed, Purpose::Split, 0);
                drawn.truncate(rows);
                drawn.sort_unstable();
                drawn.into_iter().map(|row| row as usize).collect()
            }
        };
        let report = &dataset.report;
        let row = |(row, example): (usize, Example)| {
            let shown = PreviewRow::new(&example, tokenizer)?;
            let place = report.place(row, example.line).map(|place| match report.files.len() {
                1 => format!("{} {}", place.unit.name(1), place.number),
                _ => format!("{}, {} {}", place.path.display(), place.unit.name(1), place.number),
            });
            Ok::<_, DataError>(PreviewRow { place: place.unwrap_or(shown.place), ..shown })
        };
        let chosen = chosen.into_iter().filter_map(|row| Some((row, examples.get(row)?)));
        Ok(Self {
            rows: chosen.map(row).collect::<Result<_, _>>()?,
            report: dataset.report.clone(),
            lengths: Lengths::new(dataset),
            batches: order.batches_per_epoch(),
            padding: order.padding(0),
            packed: order.packed(),
        })
    }

    /// The numbers of an epoch, one line each.
    fn summary(&self) -> Vec<String> {
        let report = &self.report;
        let learned = 100.0 * report.label_tokens as f64 / report.tokens.max(1) as f64;
        let of_epoch = match self.padding.tokens == report.tokens {
            true => format!("{} an epoch", count(report.tokens, "token", "tokens")),
            false => format!(
                "{}, by weights {} an epoch",
                count(report.tokens, "token", "tokens"),
                grouped(self.padding.tokens)
            ),
        };
        let mut lines = vec![
            format!("{}: {} ({})", report.sources, count(report.rows as u64, "row", "rows"), report.format),
            format!("{of_epoch}, {} of them learned ({learned:.1} %)", grouped(report.label_tokens)),
            match self.packed {
                None => format!(
                    "{} an epoch; {:.1} % of their places are padding",
                    count(self.batches as u64, "batch", "batches"),
                    100.0 * self.padding.waste()
                ),
                Some(packed) => format!(
                    "{} an epoch, of {} of up to {} tokens: rows lie end to end, and fill {:.1} % of them",
                    count(self.batches as u64, "batch", "batches"),
                    count(packed.sequences as u64, "sequence", "sequences"),
                    grouped(packed.capacity as u64),
                    100.0 * packed.fill()
                ),
            },
        ];
        match report.masked().count() {
            0 => lines.push("no row was left out".into()),
            n => {
                lines
                    .push(format!("{} left out, with nothing to learn from:", count(n as u64, "row was", "rows were")));
                lines.extend(report.masked_by_reason().into_iter().map(|reason| format!("  {reason}")));
            }
        }
        lines
    }
}
