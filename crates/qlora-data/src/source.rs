//! Where rows come from: a file's records as JSON objects, each with its place in the file.
//!
//! A file is read in pieces of whole lines, so that what is held of it is bounded by a piece and by its
//! longest line. What a record means is the business of `formats`. A source says where a record stands
//! and, when it can't be read, what is wrong with it in words.

mod kind;
mod unique;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json};

use crate::error::DataError;

/// A JSON object, its keys in the file's order.
pub(crate) type Object = Map<String, Json>;

/// Bytes read at a time.
const BUFFER: usize = 64 << 10;

/// A line that is not blank.
#[derive(Debug)]
pub(crate) struct Line {
    /// Its number, from 1.
    pub number: usize,
    /// Its text, without surrounding whitespace.
    pub bytes: Vec<u8>,
}

/// The lines of a JSONL file that are not blank.
#[derive(Debug)]
pub(crate) struct JsonLines {
    path: PathBuf,
    reader: BufReader<File>,
    /// Lines read so far, blank ones included.
    read: usize,
    /// Bytes read so far.
    pub bytes: u64,
    /// Bytes of the file; 0 for a pipe.
    pub total_bytes: u64,
}

impl JsonLines {
    /// Opens a file. One that is no JSONL by its first bytes is refused with what it is and what to do.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let fail = |source| DataError::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(fail)?;
        let total_bytes = file.metadata().map_err(fail)?.len();
        let mut reader = BufReader::with_capacity(BUFFER, file);
        let start = reader.fill_buf().map_err(fail)?;
        if let Some(problem) = kind::by_first_bytes(path, start) {
            return Err(DataError::FileKind { path: path.to_owned(), problem });
        }
        let mark = if start.starts_with(kind::BYTE_ORDER_MARK) { kind::BYTE_ORDER_MARK.len() } else { 0 };
        reader.consume(mark);
        Ok(Self { path: path.to_owned(), reader, read: 0, bytes: mark as u64, total_bytes })
    }

    /// The next lines, as many as begin within `bytes`; none at the end of the file.
    pub fn next_piece(&mut self, bytes: usize) -> Result<Vec<Line>, DataError> {
        let mut lines = Vec::new();
        let mut held = 0;
        while held < bytes {
            let mut line = Vec::new();
            let length = self
                .reader
                .read_until(b'\n', &mut line)
                .map_err(|source| DataError::Read { path: self.path.clone(), source })?;
            if length == 0 {
                break;
            }
            self.read += 1;
            self.bytes += length as u64;
            let before = line.len() - line.trim_ascii_start().len();
            line.truncate(line.trim_ascii_end().len());
            if line.len() <= before {
                continue;
            }
            line.drain(..before);
            held += line.len();
            lines.push(Line { number: self.read, bytes: line });
        }
        Ok(lines)
    }
}

/// Reads a line as a JSON object; the error says what it is instead. `first` is whether no row stands
/// before it: then the file as a whole may be something else.
pub(crate) fn object(path: &Path, line: &[u8], first: bool) -> Result<Object, String> {
    let hint = || if first { kind::by_first_line(path, line) } else { None };
    match serde_json::from_slice(line).map(|unique::Unique(value)| value) {
        Ok(Json::Object(object)) => Ok(object),
        Ok(Json::Array(_)) => Err(hint().unwrap_or_else(|| "a JSON array, where each line must be an object".into())),
        Ok(_) => Err(hint().unwrap_or_else(|| "a JSON value that is not an object".into())),
        Err(error) => Err(hint().unwrap_or_else(|| {
            // The parser counts lines within what it was given, which is one line.
            let message = error.to_string();
            let message = message.split(" at line ").next().unwrap_or_default();
            let more = match first && error.is_eof() {
                true => format!("; if the object goes on in the next lines, {}", kind::one_line_each(path)),
                false => String::new(),
            };
            format!("not valid JSON: {message} at column {}{more}", error.column())
        })),
    }
}
