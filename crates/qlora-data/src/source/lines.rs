//! JSON lines.

use std::path::PathBuf;

use super::{Content, Reading, Record, Text, packed};
use crate::error::DataError;
use crate::place::Unit;

/// The lines of a file that are not blank.
pub(super) struct Lines {
    path: PathBuf,
    is_packed: Option<&'static str>,
    reader: Text,
    /// Lines read so far, blank ones included.
    read: usize,
}

impl Lines {
    pub fn new(path: PathBuf, is_packed: Option<&'static str>, reader: Text) -> Self {
        Self { path, is_packed, reader, read: 0 }
    }
}

impl Reading for Lines {
    fn next(&mut self) -> Result<Option<Record>, DataError> {
        loop {
            let mut line = Vec::new();
            let length = self.reader.read_until(b'\n', &mut line);
            if length.map_err(|source| packed::failure(&self.path, self.is_packed, (Unit::Line, self.read), source))?
                == 0
            {
                return Ok(None);
            }
            self.read += 1;
            let before = line.len() - line.trim_ascii_start().len();
            line.truncate(line.trim_ascii_end().len());
            if line.len() <= before {
                continue;
            }
            line.drain(..before);
            return Ok(Some(Record { number: self.read, content: Content::Json(line) }));
        }
    }
}
