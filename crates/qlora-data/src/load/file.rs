//! One file's rows to examples.

use std::borrow::Cow;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use chat_text::{ChatTemplate, Tokenizer};
use rayon::prelude::*;

use super::{LoadOptions, LoadProgress, Loading, check_keys};
use crate::config::{DataConfig, Format, LossOn};
use crate::encode::{EncodedRow, EndTokens, RowEncoder};
use crate::error::DataError;
use crate::judged::Judged;
use crate::mapping::Renaming;
use crate::notice::{NoticeFacts, Notices};
use crate::place::{Place, Unit};
use crate::report::{Counts, FileReport, MaskedRow};
use crate::source::{self, Record, Records};
use crate::sources::Sources;
use crate::visible;

/// Bytes of a piece for each thread: some tenth of a second of tokenizing.
const PIECE: usize = 256 << 10;

/// What is the same for all files.
pub(super) struct FileLoader<'a> {
    pub config: &'a DataConfig,
    pub tokenizer: &'a Tokenizer,
    pub options: &'a LoadOptions<'a>,
    /// The template that the configuration gives.
    pub given: Option<ChatTemplate>,
    pub end: EndTokens,
    /// The length that the model was made for, and who names it.
    pub positions: Option<(usize, Cow<'static, str>)>,
    /// Bytes of all files.
    pub total_bytes: u64,
    /// Whether there is one file, which may be a pipe and is looked at while it is read.
    pub is_alone: bool,
}

/// What is the same for all files of a source.
pub(super) struct OfSource<'a> {
    /// Its number in the list.
    pub number: usize,
    pub format: Format,
    pub renaming: &'a Renaming<'a>,
}

/// Files that are done.
pub(super) struct Done {
    pub rows: usize,
    pub bytes: u64,
}

/// What was read of a file.
pub(super) struct ReadRows {
    /// Records before the part that is wanted.
    pub skipped: usize,
    pub rows: usize,
}

impl FileLoader<'_> {
    /// Reads a file's rows into a data set, but for the first `part.0` records, and `part.1` at most.
    pub fn load(
        &self,
        path: &Path,
        of: &OfSource<'_>,
        (skip, most): (usize, usize),
        done: &mut Done,
        data: &mut Loading,
    ) -> Result<ReadRows, DataError> {
        let OfSource { number: source, format, renaming } = *of;
        let Self { config, tokenizer, options, .. } = *self;
        let mut records = Records::open(path, renaming.columns())?;
        let skipped = records.skip(skip)?;
        let unit = records.unit;
        let piece_bytes = PIECE * rayon::current_num_threads();
        let mut piece = records.next_piece(piece_bytes)?;
        let Some(first) = piece.first_mut() else {
            return match skipped {
                0 => Err(DataError::Empty { path: path.to_owned() }),
                skipped => Ok(ReadRows { skipped, rows: 0 }),
            };
        };
        let first_row = first.number;
        let format = detect(path, unit, first, format, renaming)?;
        if self.is_alone {
            check_keys(config, &[format], &Sources::from(path))?;
        }
        let template = match (&self.given, format) {
            (Some(template), _) => Some(template),
            (None, Format::Chat) => Some(tokenizer.require_chat_template()?),
            (None, _) => None,
        };
        let facts = NoticeFacts { end_tokens: self.end.texts(), positions: self.positions.clone(), unit };
        let encoder = RowEncoder {
            path,
            tokenizer,
            template,
            config,
            end: &self.end,
            embedding_rows: options.embedding_rows,
            facts,
        };
        let reader = RecordReader { path, unit, format, first_row, renaming };

        let max_length = config.max_length;
        let mut report = FileReport { path: path.to_owned(), source, format, max_length, ..FileReport::default() };
        let (mut counts, mut notices, mut rows) = (Counts::default(), Notices::default(), 0);
        piece.truncate(most);
        while !piece.is_empty() {
            rows += piece.len();
            for row in encode_piece(piece, &reader, &encoder, options)? {
                let EncodedRow { line, example, judged, truncated, notices: of_row } = row;
                report.truncated.extend(truncated);
                match example {
                    Ok(example) => {
                        self.check_judged(data, judged, || unit.at(path, line))?;
                        counts.add(example.input_ids.len(), example.label_tokens());
                        data.rows.push(&example)?;
                        data.judged.extend(judged);
                    }
                    Err(reason) => report.masked.push(MaskedRow { line, reason }),
                }
                for (kind, subject) in of_row {
                    notices.add(kind, subject, line);
                }
            }
            let (of_all, bytes) = (done.rows + rows, done.bytes + records.bytes());
            (options.progress)(LoadProgress { path, rows: of_all, bytes, total_bytes: self.total_bytes });
            piece = if rows < most { records.next_piece(piece_bytes)? } else { Vec::new() };
            piece.truncate(most - rows);
        }
        report.notices = notices.finish();
        report.facts = encoder.facts;
        data.report.add(report, counts);
        done.rows += rows;
        done.bytes += records.total_bytes();
        Ok(ReadRows { skipped, rows })
    }
}

impl FileLoader<'_> {
    /// Refuses a row whose answers are judged in another way than those before.
    fn check_judged(
        &self,
        data: &Loading,
        judged: Option<Judged>,
        place: impl FnOnce() -> Place,
    ) -> Result<(), DataError> {
        let kind = |judged: Option<&Judged>| match judged {
            None => "one answer to learn",
            Some(Judged::Pair { .. }) => "two answers, `chosen` and `rejected`",
            Some(Judged::Desirable | Judged::Undesirable) => "an answer with a `label`",
        };
        let (here, before) = (kind(judged.as_ref()), kind(data.judged.first()));
        if data.rows.len() > 0 && here != before {
            let problem =
                format!("it has {here}, and rows before it have {before}; rows of one run must be alike in this");
            return Err(DataError::Row { place: place(), problem });
        }
        if judged.is_some() && self.config.loss_on == LossOn::All {
            let problem = format!(
                "= \"all\" has no answers to compare, and rows of {} have {here}; leave it out",
                data.report.sources
            );
            return Err(DataError::Config { key: "loss_on", problem });
        }
        Ok(())
    }
}

/// The layout of a file by its first row, if it is not given.
///
/// # Errors
/// The file can't be read, has no rows, or a first row of no layout.
pub(super) fn format_of(path: &Path, format: Format, renaming: &Renaming<'_>) -> Result<Format, DataError> {
    if format != Format::Auto {
        return Ok(format);
    }
    let mut records = Records::open(path, renaming.columns())?;
    let unit = records.unit;
    let mut piece = records.next_piece(1)?;
    let first = piece.first_mut().ok_or_else(|| DataError::Empty { path: path.to_owned() })?;
    detect(path, unit, first, format, renaming)
}

fn detect(
    path: &Path,
    unit: Unit,
    first: &mut Record,
    format: Format,
    renaming: &Renaming<'_>,
) -> Result<Format, DataError> {
    if format != Format::Auto {
        return Ok(format);
    }
    let number = first.number;
    let detected = first.look(path, |mut object| {
        let renamed = renaming.apply(&mut object);
        Format::of_object(&object).map_err(|problem| with_missing(problem, &renamed.missing))
    });
    let reader = RecordReader { path, unit, format, first_row: number, renaming };
    detected.map_err(|problem| reader.wrong(number, problem))
}

/// Says which columns are missing that were asked for.
fn with_missing(problem: String, missing: &[String]) -> String {
    std::iter::once(&problem).chain(missing).map(String::as_str).collect::<Vec<_>>().join("; ")
}

/// Reads records of one layout as objects.
struct RecordReader<'a> {
    path: &'a Path,
    unit: Unit,
    format: Format,
    first_row: usize,
    renaming: &'a Renaming<'a>,
}

impl RecordReader<'_> {
    fn wrong(&self, row: usize, problem: String) -> DataError {
        let expected = self.format.expected().to_owned();
        DataError::Line { place: self.unit.at(self.path, row), problem: visible::lines(&problem), expected }
    }

    /// Reads and encodes a record, whose text is given back as soon as it is read.
    fn encode(&self, record: Record, encoder: &RowEncoder<'_>) -> Result<EncodedRow, DataError> {
        let Record { number, content } = record;
        let read = source::object(self.path, content, number == self.first_row).and_then(|mut object| {
            let renamed = self.renaming.apply(&mut object);
            let read = self.format.read(object, encoder.config.system_prompt.as_deref());
            let mut read = read.map_err(|problem| with_missing(problem, &renamed.missing))?;
            read.unread.extend(renamed.unread);
            Ok(read)
        });
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
