//! Files to data sets.
//!
//! A file is read piece by piece. The rows of a piece are encoded in parallel, and a piece is begun
//! when the one before is done: what is held beyond the tokens is bounded by the largest row, a broken
//! row is reported when it is met, and of several the first in the file is.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use chat_text::{ChatTemplate, Tokenizer};
use rayon::prelude::*;

use crate::config::{DataConfig, Format};
use crate::dataset::Dataset;
use crate::encode::{EncodedRow, EndTokens, RowEncoder};
use crate::error::DataError;
use crate::notice::{NoticeFacts, Notices};
use crate::place::Unit;
use crate::report::{DataReport, MaskedRow};
use crate::source::{self, Record, Records};
use crate::visible;

/// Bytes of a piece for each thread: some tenth of a second of tokenizing.
const PIECE: usize = 256 << 10;

/// How far the reading of a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress<'a> {
    /// The file.
    pub path: &'a Path,
    /// Rows read.
    pub rows: usize,
    /// Bytes read.
    pub bytes: u64,
    /// Bytes of the file; 0 if it is a pipe.
    pub total_bytes: u64,
}

/// What a caller knows of the model, and wants to know while rows are read.
#[derive(Clone, Copy)]
pub struct LoadOptions<'a> {
    /// Positions that the model was made for (`max_position_embeddings`). Rows that are longer than these, or than
    /// the tokenizer's `model_max_length`, are told.
    pub max_positions: Option<usize>,
    /// Rows of the model's embedding: a token beyond them is an error.
    pub embedding_rows: Option<usize>,
    /// Rows of a file that are read, from its first one on, 1 or more; `None` for all.
    pub max_rows: Option<usize>,
    /// Asked before every row, from several threads: whether to stop with [`DataError::Interrupted`].
    pub should_stop: &'a (dyn Fn() -> bool + Sync),
    /// Told after every piece of a file.
    pub progress: &'a (dyn Fn(LoadProgress<'_>) + Sync),
}

impl Default for LoadOptions<'_> {
    fn default() -> Self {
        Self { max_positions: None, embedding_rows: None, max_rows: None, should_stop: &|| false, progress: &|_| {} }
    }
}

impl std::fmt::Debug for LoadOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut fields = f.debug_struct("LoadOptions");
        fields.field("max_positions", &self.max_positions).field("embedding_rows", &self.embedding_rows);
        fields.field("max_rows", &self.max_rows);
        fields.finish_non_exhaustive()
    }
}

/// Reads a file of rows.
///
/// # Errors
/// As [`load_rows_with`].
pub fn load_rows(path: &Path, config: &DataConfig, tokenizer: &Tokenizer) -> Result<Dataset, DataError> {
    load_rows_with(path, config, tokenizer, &LoadOptions::default())
}

/// Reads a file of rows, with what is known of the model.
///
/// # Errors
/// [`DataError::Read`], [`DataError::FileKind`] and [`DataError::Empty`] name the file,
/// [`DataError::Line`], [`DataError::Row`], [`DataError::OutsideEmbedding`] and [`DataError::Strict`] the first row
/// at fault and what was expected; [`DataError::AllMasked`] says why no row has anything to learn from.
/// A conversation without a usable chat template is [`DataError::Chat`]. [`DataError::Interrupted`] if the caller
/// asked to stop.
pub fn load_rows_with(
    path: &Path,
    config: &DataConfig,
    tokenizer: &Tokenizer,
    options: &LoadOptions<'_>,
) -> Result<Dataset, DataError> {
    let mut records = Records::open(path)?;
    let unit = records.unit;
    let piece_bytes = PIECE * rayon::current_num_threads();
    let mut piece = records.next_piece(piece_bytes)?;
    let Some(first) = piece.first_mut() else {
        return Err(DataError::Empty { path: path.to_owned() });
    };
    let first_row = first.number;
    let reader = |format: Format| RecordReader { path, unit, format, first_row };
    let format = match config.format {
        Format::Auto => {
            let detected = first.look(path, Format::of_object);
            detected.map_err(|problem| reader(Format::Auto).wrong(first_row, problem))?
        }
        given => given,
    };
    let given = chat_template(config, format, path)?;
    let template = match (&given, format) {
        (Some(template), _) => Some(template),
        (None, Format::Chat) => Some(tokenizer.require_chat_template()?),
        (None, _) => None,
    };
    let end = EndTokens::new(config, tokenizer)?;
    let facts = NoticeFacts { end_tokens: end.texts(), positions: positions(options, tokenizer), unit };
    let embedding_rows = options.embedding_rows;
    let encoder = RowEncoder { path, tokenizer, template, config, end, embedding_rows, facts };
    let reader = reader(format);

    let mut report = DataReport::new(path, format, config.max_length);
    let (mut examples, mut notices, mut rows) = (Vec::new(), Notices::default(), 0);
    let max_rows = options.max_rows.unwrap_or(usize::MAX);
    piece.truncate(max_rows);
    while !piece.is_empty() {
        rows += piece.len();
        for row in encode_piece(piece, &reader, &encoder, options)? {
            let EncodedRow { line, example, truncated, notices: of_row } = row;
            report.truncated.extend(truncated);
            match example {
                Ok(example) => examples.push(example),
                Err(reason) => report.masked.push(MaskedRow { line, reason }),
            }
            for (kind, subject) in of_row {
                notices.add(kind, subject, line);
            }
        }
        (options.progress)(LoadProgress { path, rows, bytes: records.bytes(), total_bytes: records.total_bytes() });
        piece = if rows < max_rows { records.next_piece(piece_bytes)? } else { Vec::new() };
        piece.truncate(max_rows - rows);
    }
    report.notices = notices.finish();
    report.facts = encoder.facts;
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
/// As [`load_splits_with`].
pub fn load_splits(config: &DataConfig, tokenizer: &Tokenizer, seed: u64) -> Result<(Dataset, Dataset), DataError> {
    load_splits_with(config, tokenizer, seed, &LoadOptions::default())
}

/// Reads the training rows and the evaluation rows, with what is known of the model.
///
/// # Errors
/// As [`load_rows_with`] and [`DataConfig::validate`].
pub fn load_splits_with(
    config: &DataConfig,
    tokenizer: &Tokenizer,
    seed: u64,
    options: &LoadOptions<'_>,
) -> Result<(Dataset, Dataset), DataError> {
    config.validate()?;
    let train = load_rows_with(&config.train, config, tokenizer, options)?;
    match &config.eval {
        Some(path) => Ok((train, load_rows_with(path, config, tokenizer, options)?)),
        None if config.eval_fraction > 0.0 => train.split(config.eval_fraction, seed),
        None => Ok((train, Dataset::default())),
    }
}

/// Reads records of one layout as objects.
struct RecordReader<'a> {
    path: &'a Path,
    unit: Unit,
    format: Format,
    first_row: usize,
}

impl RecordReader<'_> {
    fn wrong(&self, row: usize, problem: String) -> DataError {
        let expected = self.format.expected().to_owned();
        DataError::Line { place: self.unit.at(self.path, row), problem: visible::lines(&problem), expected }
    }

    /// Reads and encodes a record, whose text is given back as soon as it is read.
    fn encode(&self, record: Record, encoder: &RowEncoder<'_>) -> Result<EncodedRow, DataError> {
        let Record { number, content } = record;
        let object = source::object(self.path, content, number == self.first_row);
        let read = object.and_then(|object| self.format.read(object, encoder.config.system_prompt.as_deref()));
        encoder.encode(read.map_err(|problem| self.wrong(number, problem))?, number)
    }
}

/// Encodes the records of a piece in parallel. The first error in the file is the one that is reported: after it no
/// record behind it is begun.
fn encode_piece(
    piece: Vec<Record>,
    reader: &RecordReader<'_>,
    encoder: &RowEncoder<'_>,
    options: &LoadOptions<'_>,
) -> Result<Vec<EncodedRow>, DataError> {
    let first_failed = AtomicUsize::new(usize::MAX);
    let rows: Vec<_> = piece
        .into_par_iter()
        .map(|record| {
            let number = record.number;
            if number > first_failed.load(Ordering::Relaxed) {
                return None;
            }
            let row = match (options.should_stop)() {
                true => Err(DataError::Interrupted { path: reader.path.to_owned() }),
                false => reader.encode(record, encoder),
            };
            if row.is_err() {
                first_failed.fetch_min(number, Ordering::Relaxed);
            }
            Some(row)
        })
        .collect();
    // What was not begun stands behind an error.
    rows.into_iter().flatten().collect()
}

/// The template that `[data]` gives in place of the tokenizer's. Keys that have no place in rows of this layout are
/// refused.
fn chat_template(config: &DataConfig, format: Format, path: &Path) -> Result<Option<ChatTemplate>, DataError> {
    for (key, is_given, used) in [
        ("chat_template", config.chat_template.is_some(), format == Format::Chat),
        ("template_kwargs", !config.template_kwargs.is_empty(), format == Format::Chat),
        ("system_prompt", config.system_prompt.is_some(), matches!(format, Format::Chat | Format::Alpaca)),
    ] {
        if is_given && !used {
            return Err(DataError::Config {
                key,
                problem: format!("has no place in {format} rows, which {} holds; leave it out", path.display()),
            });
        }
    }
    let template = config.chat_template.as_deref().map(ChatTemplate::from_setting);
    template.transpose().map_err(|error| match error {
        // The template was compiled before a row was read: the key is what is at fault.
        error @ chat_text::ChatError::NotATemplate { .. } => {
            DataError::Config { key: "chat_template", problem: format!("= {error}") }
        }
        error => error.into(),
    })
}

/// The smaller of the lengths that model and tokenizer name, and who names it.
fn positions(options: &LoadOptions<'_>, tokenizer: &Tokenizer) -> Option<(usize, &'static str)> {
    let of_model = options.max_positions.map(|positions| (positions, "max_position_embeddings of its config.json"));
    let of_tokenizer =
        tokenizer.model_max_length().map(|length| (length, "model_max_length of its tokenizer_config.json"));
    of_model.into_iter().chain(of_tokenizer).min_by_key(|(positions, _)| *positions)
}
