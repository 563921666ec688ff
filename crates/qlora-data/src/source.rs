//! Where rows come from: a file's records as JSON objects, each with its place in the file.
//!
//! What a record means is the business of `formats`. A source says where a record stands and, when it
//! can't be read, what is wrong with it in words.

use std::path::Path;

use serde_json::{Map, Value as Json};

use crate::error::DataError;

/// A JSON object, its keys in the file's order.
pub(crate) type Object = Map<String, Json>;

/// The lines of a JSONL file that are not blank.
pub(crate) struct JsonLines<'a> {
    /// Line number, from 1, and text. There is at least one.
    pub rows: Vec<(usize, &'a [u8])>,
}

impl<'a> JsonLines<'a> {
    /// Splits a file's content into lines. `path` is for the error of a file without rows.
    pub fn new(path: &Path, bytes: &'a [u8]) -> Result<Self, DataError> {
        let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
        let rows: Vec<_> = bytes
            .split(|b| *b == b'\n')
            .enumerate()
            .map(|(index, line)| (index + 1, line.trim_ascii()))
            .filter(|(_, line)| !line.is_empty())
            .collect();
        match rows.is_empty() {
            true => Err(DataError::Empty { path: path.to_owned() }),
            false => Ok(Self { rows }),
        }
    }
}

/// Reads a line as a JSON object; the error says what it is instead.
pub(crate) fn object(line: &[u8]) -> Result<Object, String> {
    match serde_json::from_slice(line) {
        Ok(Json::Object(object)) => Ok(object),
        Ok(Json::Array(_)) => Err("a JSON array, where each line must be an object".into()),
        Ok(_) => Err("a JSON value that is not an object".into()),
        Err(_) if line.first() == Some(&b'[') => {
            Err("the file seems to be one JSON array, which `jq -c '.[]'` turns into lines".into())
        }
        Err(e) => {
            // The parser counts lines within what it was given, which is one line.
            let message = e.to_string();
            let message = message.split(" at line ").next().unwrap_or_default();
            Err(format!("not valid JSON: {message} at column {}", e.column()))
        }
    }
}
