//! From rows of text to batches of tokens.
//!
//! [`load`] reads a JSONL file, writes each row as one text (a conversation through the chat
//! template), turns it into tokens and gives every token a label: its own id where the loss counts
//! it, [`MASKED_LABEL`] where it does not. Which tokens count is decided on the text, by byte
//! ranges, and carried to the tokens by their offsets; see `spans`. [`BatchOrder`] then puts the
//! rows into batches, in an order that depends on the seed and the epoch alone.
//!
//! What is left out or cut is never silent: [`DataReport`] counts it and names the lines.

mod batch;
mod config;
mod encode;
mod formats;
mod report;
mod spans;

use std::path::Path;

use qlora_models::chat_template::ChatTemplate;
use qlora_models::tokenizer::Tokenizer;
use rayon::prelude::*;

use crate::error::TrainError;

pub use batch::{Batch, BatchOrder, Batches, Position};
pub use config::{DataConfig, Format, LossOn};
pub use report::{DataReport, MaskReason, MaskedRow, TruncatedRow};

use encode::RowEncoder;
use formats::Lines;

/// The label of a token that the loss does not count, as in PyTorch and transformers.
pub const MASKED_LABEL: i64 = -100;

/// A row as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// Token ids.
    pub input_ids: Vec<u32>,
    /// For each token its id, or [`MASKED_LABEL`]. Not shifted: the label at position t is what
    /// the model should predict at t - 1, so the first one is never used.
    pub labels: Vec<i64>,
    /// Line of the file, from 1.
    pub line: usize,
}

impl Example {
    /// Tokens that the loss counts.
    pub fn label_tokens(&self) -> usize {
        let labels = self.labels.iter().skip(1);
        labels.filter(|label| **label != MASKED_LABEL).count()
    }
}

/// The rows of a file that have something to learn from, in the file's order.
#[derive(Clone, Debug, Default)]
pub struct Dataset {
    /// The rows.
    pub examples: Vec<Example>,
    /// What was read, cut and left out.
    pub report: DataReport,
}

impl Dataset {
    /// Takes a part of the rows out, chosen by the seed; both sides keep the file's order.
    /// Returns what stays and what was taken.
    ///
    /// # Errors
    /// [`TrainError::DataConfig`] if there are not two rows to share.
    pub fn split(self, fraction: f64, seed: u64) -> Result<(Self, Self), TrainError> {
        let rows = self.examples.len();
        if rows < 2 {
            return Err(TrainError::DataConfig {
                key: "eval_fraction",
                problem: format!(
                    "= {fraction} can't divide {rows} row of {}; give more rows, or 0",
                    self.report.path.display()
                ),
            });
        }
        let taken = ((rows as f64 * fraction).round() as usize).clamp(1, rows - 1);
        let mut is_taken = vec![false; rows];
        for &row in &batch::permutation(rows, seed, batch::Purpose::Split, 0)[..taken] {
            is_taken[row] = true;
        }
        let mut parts = [Vec::new(), Vec::new()];
        for (example, taken) in self.examples.into_iter().zip(is_taken) {
            parts[taken as usize].push(example);
        }
        let [kept, taken] = parts;
        let (kept_report, taken_report) = self.report.split(&kept, &taken);
        Ok((Self { examples: kept, report: kept_report }, Self { examples: taken, report: taken_report }))
    }
}

impl Dataset {
    /// Rows chosen by the seed: of the first count, and others of the second, as far as there are any.
    pub fn choose(&self, counts: [usize; 2], seed: u64) -> [Vec<Example>; 2] {
        let order = batch::permutation(self.examples.len(), seed, batch::Purpose::Split, 0);
        let mut order = order.into_iter().map(|row| self.examples[row].clone());
        counts.map(|count| order.by_ref().take(count).collect())
    }
}

/// Reads a file of rows.
///
/// # Errors
/// [`TrainError::DataRead`] and [`TrainError::DataEmpty`] name the file,
/// [`TrainError::DataLine`] and [`TrainError::DataRow`] the line and what was expected;
/// [`TrainError::DataAllMasked`] says why no row has anything to learn from. A conversation without
/// a usable chat template is [`TrainError::Model`].
pub fn load(path: &Path, config: &DataConfig, tokenizer: &Tokenizer) -> Result<Dataset, TrainError> {
    let bytes = std::fs::read(path).map_err(|source| TrainError::DataRead { path: path.to_owned(), source })?;
    let lines = Lines::new(path, &bytes)?;
    let format = lines.format(config.format)?;
    let given = chat_template(config)?;
    for (key, is_given, used) in [
        ("chat_template", given.is_some(), format == Format::Chat),
        ("system_prompt", config.system_prompt.is_some(), matches!(format, Format::Chat | Format::Alpaca)),
    ] {
        if is_given && !used {
            return Err(TrainError::DataConfig {
                key,
                problem: format!("has no place in {format} rows, which {} holds; leave it out", path.display()),
            });
        }
    }
    let template = match (&given, format) {
        (Some(template), _) => Some(template),
        (None, Format::Chat) => Some(tokenizer.require_chat_template()?),
        (None, _) => None,
    };
    let encoder = RowEncoder { path, tokenizer, template, config };
    // Parallel, but the first error in the file is the one that is reported.
    let rows: Vec<_> = lines
        .rows
        .par_iter()
        .map(|&(line, bytes)| encoder.encode(&lines.parse(format, line, bytes, config)?, line))
        .collect();
    let mut examples = Vec::with_capacity(rows.len());
    let mut report = DataReport::new(path, format, config.max_length);
    for row in rows {
        let row = row?;
        let line = row.example.line;
        if row.dropped > 0 {
            let dropped = row.dropped;
            report.truncated.push(TruncatedRow { line, dropped });
        }
        match row.masked {
            Some(reason) => report.masked.push(MaskedRow { line, reason }),
            None => examples.push(row.example),
        }
    }
    report.count(&examples);
    if examples.is_empty() {
        return Err(TrainError::DataAllMasked { path: path.to_owned(), reasons: report.masked_reasons() });
    }
    Ok(Dataset { examples, report })
}

/// Reads the training rows and the evaluation rows; the latter from their own file, or held out
/// from the training rows, or none.
///
/// # Errors
/// As [`load`] and [`DataConfig::validate`].
pub fn load_splits(config: &DataConfig, tokenizer: &Tokenizer, seed: u64) -> Result<(Dataset, Dataset), TrainError> {
    config.validate()?;
    let train = load(&config.train, config, tokenizer)?;
    match &config.eval {
        Some(path) => Ok((train, load(path, config, tokenizer)?)),
        None if config.eval_fraction > 0.0 => train.split(config.eval_fraction, seed),
        None => Ok((train, Dataset::default())),
    }
}

/// The template that `[data]` gives in place of the tokenizer's.
fn chat_template(config: &DataConfig) -> Result<Option<ChatTemplate>, TrainError> {
    let Some(given) = &config.chat_template else {
        return Ok(None);
    };
    let is_file = !given.contains('{') && (given.ends_with(".jinja") || given.ends_with(".j2"));
    let source = if is_file {
        std::fs::read_to_string(given).map_err(|source| TrainError::DataRead { path: given.into(), source })?
    } else {
        given.clone()
    };
    Ok(Some(ChatTemplate::new(source)?))
}
