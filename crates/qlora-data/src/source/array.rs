//! One JSON array, element by element.

use std::path::PathBuf;

use super::{Content, Reading, Record, Text, packed};
use crate::error::DataError;
use crate::place::Unit;

/// The elements of an array.
pub(super) struct Elements {
    path: PathBuf,
    is_packed: Option<&'static str>,
    reader: Text,
    /// Elements read so far.
    read: usize,
    at: At,
}

/// Where in the array the reader is.
#[derive(Clone, Copy, PartialEq)]
enum At {
    /// Before its bracket.
    Outside,
    /// Where an element may begin, or the array may end.
    Begin,
    /// Where an element must begin.
    Next,
    /// Behind an element.
    Behind,
    /// Behind its bracket.
    Closed,
}

impl Elements {
    pub fn new(path: PathBuf, is_packed: Option<&'static str>, reader: Text) -> Self {
        Self { path, is_packed, reader, read: 0, at: At::Outside }
    }

    fn peek(&mut self) -> Result<Option<u8>, DataError> {
        let start = self.reader.fill_buf();
        Ok(start
            .map_err(|source| packed::failure(&self.path, self.is_packed, (Unit::Row, self.read), source))?
            .first()
            .copied())
    }

    fn wrong(&self, problem: &str) -> DataError {
        DataError::Row { place: Unit::Row.at(&self.path, self.read + 1), problem: problem.into() }
    }

    /// An element's bytes, to the comma or bracket behind it.
    fn element(&mut self) -> Result<Vec<u8>, DataError> {
        let (mut element, mut depth, mut in_text, mut escaped) = (Vec::new(), 0_usize, false, false);
        loop {
            let source = self.reader.fill_buf();
            let bytes =
                source.map_err(|source| packed::failure(&self.path, self.is_packed, (Unit::Row, self.read), source))?;
            if bytes.is_empty() {
                return Err(self.wrong("the array ends in the midst of it; the file was cut short"));
            }
            let mut end = None;
            for (index, &byte) in bytes.iter().enumerate() {
                match byte {
                    _ if in_text => {
                        in_text = escaped || byte != b'"';
                        escaped = !escaped && byte == b'\\';
                    }
                    b'"' => in_text = true,
                    b'{' | b'[' => depth += 1,
                    b',' | b']' if depth == 0 => {
                        end = Some(index);
                        break;
                    }
                    b'}' | b']' => depth = depth.saturating_sub(1),
                    _ => {}
                }
            }
            let len = end.unwrap_or(bytes.len());
            element.extend_from_slice(&bytes[..len]);
            self.reader.consume(len);
            if end.is_some() {
                element.truncate(element.trim_ascii_end().len());
                return Ok(element);
            }
        }
    }
}

impl Reading for Elements {
    fn next(&mut self) -> Result<Option<Record>, DataError> {
        loop {
            let byte = self.peek()?;
            if byte.is_some_and(|byte| byte.is_ascii_whitespace()) {
                self.reader.consume(1);
                continue;
            }
            self.at = match (self.at, byte) {
                (At::Outside, Some(b'[')) => At::Begin,
                (At::Begin | At::Behind, Some(b']')) => At::Closed,
                (At::Behind, Some(b',')) => At::Next,
                (At::Closed, None) => return Ok(None),
                (At::Closed, Some(_)) => {
                    return Err(self.wrong("the array was closed before it; a file holds one array"));
                }
                (_, None) => return Err(self.wrong("the array is not closed; the file was cut short")),
                (At::Next, Some(b',' | b']')) => return Err(self.wrong("a comma without an element behind it")),
                (At::Begin | At::Next, Some(_)) => {
                    let content = Content::Json(self.element()?);
                    self.at = At::Behind;
                    self.read += 1;
                    return Ok(Some(Record { number: self.read, content }));
                }
                (At::Outside | At::Behind, Some(_)) => return Err(self.wrong("a comma is missing before it")),
            };
            self.reader.consume(1);
        }
    }
}
