//! Files to data sets: read, encoded, counted, split.

use std::path::Path;

use chat_text::{ChatTemplate, Tokenizer};
use rayon::prelude::*;

use crate::config::{DataConfig, Format};
use crate::encode::RowEncoder;
use crate::error::DataError;
use crate::example::Example;
use crate::report::{DataReport, MaskedRow, TruncatedRow};
use crate::shuffle::{Purpose, permutation};
use crate::source::{self, JsonLines};

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
    /// [`DataError::Config`] if there are not two rows to share.
    pub fn split(self, fraction: f64, seed: u64) -> Result<(Self, Self), DataError> {
        let rows = self.examples.len();
        if rows < 2 {
            return Err(DataError::Config {
                key: "eval_fraction",
                problem: format!(
                    "= {fraction} can't divide {rows} row of {}; give more rows, or 0",
                    self.report.path.display()
                ),
            });
        }
        let taken = ((rows as f64 * fraction).round() as usize).clamp(1, rows - 1);
        let mut is_taken = vec![false; rows];
        for &row in &permutation(rows, seed, Purpose::Split, 0)[..taken] {
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

    /// Rows chosen by the seed: of the first count, and others of the second, as far as there are any.
    pub fn choose(&self, counts: [usize; 2], seed: u64) -> [Vec<Example>; 2] {
        let order = permutation(self.examples.len(), seed, Purpose::Split, 0);
        let mut order = order.into_iter().map(|row| self.examples[row].clone());
        counts.map(|count| order.by_ref().take(count).collect())
    }
}

/// Reads a file of rows.
///
/// # Errors
/// [`DataError::Read`] and [`DataError::Empty`] name the file,
/// [`DataError::Line`] and [`DataError::Row`] the line and what was expected;
/// [`DataError::AllMasked`] says why no row has anything to learn from. A conversation without
/// a usable chat template is [`DataError::Chat`].
pub fn load_rows(path: &Path, config: &DataConfig, tokenizer: &Tokenizer) -> Result<Dataset, DataError> {
    let bytes = std::fs::read(path).map_err(|source| DataError::Read { path: path.to_owned(), source })?;
    let lines = JsonLines::new(path, &bytes)?;
    let wrong = |format: Format, line: usize, problem: String| DataError::Line {
        path: path.to_owned(),
        line,
        problem,
        expected: format.expected().to_owned(),
    };
    let format = match config.format {
        Format::Auto => {
            let (line, bytes) = lines.rows[0];
            let detected = source::object(bytes).and_then(|object| Format::of_object(&object));
            detected.map_err(|problem| wrong(Format::Auto, line, problem))?
        }
        given => given,
    };
    let given = chat_template(config)?;
    for (key, is_given, used) in [
        ("chat_template", given.is_some(), format == Format::Chat),
        ("system_prompt", config.system_prompt.is_some(), matches!(format, Format::Chat | Format::Alpaca)),
    ] {
        if is_given && !used {
            return Err(DataError::Config {
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
    let encode = |&(line, bytes): &(usize, &[u8])| {
        let row = source::object(bytes).and_then(|object| format.read(object, config.system_prompt.as_deref()));
        encoder.encode(&row.map_err(|problem| wrong(format, line, problem))?, line)
    };
    // Parallel, but the first error in the file is the one that is reported.
    let rows: Vec<_> = lines.rows.par_iter().map(encode).collect();
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
        return Err(DataError::AllMasked { path: path.to_owned(), reasons: report.masked_reasons() });
    }
    Ok(Dataset { examples, report })
}

/// Reads the training rows and the evaluation rows; the latter from their own file, or held out
/// from the training rows, or none.
///
/// # Errors
/// As [`load_rows`] and [`DataConfig::validate`].
pub fn load_splits(config: &DataConfig, tokenizer: &Tokenizer, seed: u64) -> Result<(Dataset, Dataset), DataError> {
    config.validate()?;
    let train = load_rows(&config.train, config, tokenizer)?;
    match &config.eval {
        Some(path) => Ok((train, load_rows(path, config, tokenizer)?)),
        None if config.eval_fraction > 0.0 => train.split(config.eval_fraction, seed),
        None => Ok((train, Dataset::default())),
    }
}

/// The template that `[data]` gives in place of the tokenizer's.
fn chat_template(config: &DataConfig) -> Result<Option<ChatTemplate>, DataError> {
    let Some(given) = &config.chat_template else {
        return Ok(None);
    };
    let is_file = !given.contains('{') && (given.ends_with(".jinja") || given.ends_with(".j2"));
    let source = if is_file {
        std::fs::read_to_string(given).map_err(|source| DataError::Read { path: given.into(), source })?
    } else {
        given.clone()
    };
    Ok(Some(ChatTemplate::new(source)?))
}
