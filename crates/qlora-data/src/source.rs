//! Where rows come from: a file's records as JSON objects, each with its place in the file.
//!
//! A file is read in pieces of whole records, so that what is held of it is bounded by a piece and by its largest record. What
//! kind a file is follows from its first bytes and, of tables of text, from its name. What a record means is the business of `formats`. A source says
//! where a record stands and, when it can't be read, what is wrong with it in words.

mod array;
mod columns;
mod kind;
mod lines;
mod packed;
mod table;
mod unique;

use std::io::BufRead;
use std::path::Path;

use serde_json::{Map, Value as Json};

use crate::error::DataError;
use crate::mapping::Columns as Mapping;
use crate::place::Unit;
use array::Elements;
use columns::Columns;
use lines::Lines;
use packed::Stream;
use table::Table;

/// A JSON object, its keys in the file's order.
pub(crate) type Object = Map<String, Json>;

/// A record of a file.
#[derive(Debug)]
pub(crate) struct Record {
    /// Its number in the file, from 1.
    pub number: usize,
    pub content: Content,
}

/// What a record is, as it comes from its file.
#[derive(Debug)]
pub(crate) enum Content {
    /// JSON, without surrounding whitespace.
    Json(Vec<u8>),
    /// Cells under the names of their columns.
    Cells(Object),
}

impl Record {
    /// Looks at a copy of it as an [object](object()), which it holds from then on. It is its file's first record.
    pub fn look<T>(&mut self, path: &Path, look: impl FnOnce(Object) -> Result<T, String>) -> Result<T, String> {
        let content = std::mem::replace(&mut self.content, Content::Cells(Object::new()));
        let object = object(path, content, true)?;
        let seen = look(object.clone());
        self.content = Content::Cells(object);
        seen
    }

    /// Bytes that it holds, about.
    fn size(&self) -> usize {
        fn of(value: &Json) -> usize {
            match value {
                Json::String(text) => text.len(),
                Json::Array(list) => list.iter().map(of).sum(),
                Json::Object(object) => object.values().map(of).sum(),
                _ => 8,
            }
        }
        match &self.content {
            Content::Json(bytes) => bytes.len(),
            Content::Cells(object) => object.values().map(of).sum(),
        }
    }
}

/// A file that gives one record after the other.
trait Reading {
    /// The next record; `None` at the end of the file.
    fn next(&mut self) -> Result<Option<Record>, DataError>;

    /// Passes over the next record; `false` at the end of the file.
    fn skip(&mut self) -> Result<bool, DataError> {
        Ok(self.next()?.is_some())
    }
}

/// The records of a file.
pub(crate) struct Records {
    reading: Box<dyn Reading>,
    progress: packed::Progress,
    /// What their numbers count.
    pub unit: Unit,
}

impl Records {
    /// Opens a file. One that holds no rows by its first bytes is refused with what it is and what to do.
    pub fn open(path: &Path, columns: &Mapping) -> Result<Self, DataError> {
        let Stream { mut reader, file, is_packed, progress } = Stream::open(path)?;
        let fail = |source| packed::failure(path, is_packed, (Unit::Line, 0), source);
        let start = reader.fill_buf().map_err(fail)?;
        if start.starts_with(b"PAR1") {
            if is_packed.is_some() {
                let problem = "is Parquet in a packed file; unpack it: Parquet is read from its end".into();
                return Err(DataError::FileKind { path: path.to_owned(), problem });
            }
            drop(reader);
            let reading = Box::new(Columns::new(path, file, progress.by_rows())?);
            return Ok(Self { reading, progress, unit: Unit::Row });
        }
        if let Some(problem) = kind::by_first_bytes(path, start) {
            return Err(DataError::FileKind { path: path.to_owned(), problem });
        }
        if start.starts_with(kind::BYTE_ORDER_MARK) {
            reader.consume(kind::BYTE_ORDER_MARK.len());
        }
        let first = reader.fill_buf().map_err(fail)?.trim_ascii_start().first().copied();
        let name = path.to_owned();
        let (reading, unit): (Box<dyn Reading>, Unit) = match kind::separator(path) {
            Some(separator) => (Box::new(Table::new(name, is_packed, reader, separator, columns)?), Unit::Line),
            None if first == Some(b'[') => (Box::new(Elements::new(name, is_packed, reader)), Unit::Row),
            None => (Box::new(Lines::new(name, is_packed, reader)), Unit::Line),
        };
        Ok(Self { reading, progress, unit })
    }

    /// Bytes of the file that were read; of Parquet, which is read from several places, the share of its rows.
    pub fn bytes(&self) -> u64 {
        self.progress.bytes()
    }

    /// Bytes of the file; 0 where nothing is known of them.
    pub fn total_bytes(&self) -> u64 {
        self.progress.total
    }

    /// Passes over records, as many as there are.
    pub fn skip(&mut self, records: usize) -> Result<usize, DataError> {
        for skipped in 0..records {
            if !self.reading.skip()? {
                return Ok(skipped);
            }
        }
        Ok(records)
    }

    /// The next records, as many as begin within `bytes`; none at the end of the file.
    pub fn next_piece(&mut self, bytes: usize) -> Result<Vec<Record>, DataError> {
        let (mut records, mut held) = (Vec::new(), 0);
        while held < bytes {
            let Some(record) = self.reading.next()? else { break };
            held += record.size();
            records.push(record);
        }
        Ok(records)
    }
}

/// Counts the records of a file.
///
/// # Errors
/// It can't be read.
pub(crate) fn count(path: &Path) -> Result<usize, DataError> {
    let mut records = Records::open(path, &Mapping::default())?;
    let mut count = 0;
    loop {
        match records.reading.skip()? {
            true => count += 1,
            false => return Ok(count),
        }
    }
}

/// A reader of a file's text.
type Text = Box<dyn BufRead>;

/// Reads a record as a JSON object; the error says what it is instead. `first` is whether no record stands
/// before it: then the file as a whole may be something else.
pub(crate) fn object(path: &Path, content: Content, first: bool) -> Result<Object, String> {
    let text = match content {
        Content::Cells(object) => return Ok(object),
        Content::Json(text) => text,
    };
    let hint = || if first { kind::by_first_line(path, &text) } else { None };
    match serde_json::from_slice(&text).map(|unique::Unique(value)| value) {
        Ok(Json::Object(object)) => Ok(object),
        Ok(Json::Array(_)) => Err(hint().unwrap_or_else(|| "a JSON array, where an object must be".into())),
        Ok(_) => Err(hint().unwrap_or_else(|| "a JSON value that is not an object".into())),
        Err(error) => Err(hint().unwrap_or_else(|| {
            // The parser counts lines within what it was given.
            let message = error.to_string();
            let message = message.split(" at line ").next().unwrap_or_default();
            let place = match error.line() {
                1 => format!("column {}", error.column()),
                line => format!("line {line} of it, column {}", error.column()),
            };
            let more = match first && error.is_eof() {
                true => format!("; if the object goes on in the next lines, {}", kind::one_line_each(path)),
                false => String::new(),
            };
            format!("not valid JSON: {message} at {place}{more}")
        })),
    }
}
