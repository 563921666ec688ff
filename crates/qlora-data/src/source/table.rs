//! Tables of text: values separated by commas, semicolons or tabs, with the names of the columns in the first line.

use std::path::PathBuf;

use csv::{ErrorKind, Reader, ReaderBuilder, StringRecord};
use serde_json::Value as Json;

use super::{Content, Object, Reading, Record, Text, packed};
use crate::error::DataError;
use crate::mapping::Columns as Mapping;
use crate::place::Unit;
use crate::words::count;

/// Columns whose cells are JSON where they look like it: what has no form of its own in a table.
const NESTED: [&str; 5] = ["messages", "conversations", "tools", "history", "chat_template_kwargs"];

/// Columns whose cells are texts, or lists of messages: as JSON, in which each has a role.
const TEXTS_OR_MESSAGES: [&str; 2] = ["prompt", "completion"];

/// What the cells of a column are.
#[derive(Clone, Copy, PartialEq)]
enum Cells {
    Texts,
    Nested,
    TextsOrMessages,
}

/// The rows of a table.
pub(super) struct Table {
    path: PathBuf,
    is_packed: Option<&'static str>,
    reader: Reader<Text>,
    columns: Vec<String>,
    /// What the cells of each column are.
    cells: Vec<Cells>,
    row: StringRecord,
}

impl Table {
    /// # Errors
    /// The first line is no list of names.
    pub fn new(
        path: PathBuf,
        is_packed: Option<&'static str>,
        mut text: Text,
        separator: u8,
        mapping: &Mapping,
    ) -> Result<Self, DataError> {
        let start = text.fill_buf().map_err(|source| packed::failure(&path, is_packed, (Unit::Line, 0), source))?;
        let header = start.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let has = |byte: u8| header.contains(&byte);
        // Spreadsheets of many countries write semicolons into files that are called .csv.
        let separator = match [separator, b';', b'\t'].into_iter().find(|byte| has(*byte)) {
            Some(found) => found,
            None => separator,
        };
        let mut reader = ReaderBuilder::new().delimiter(separator).from_reader(text);
        let names = reader.headers().cloned();
        let mut table =
            Self { path, is_packed, reader, columns: Vec::new(), cells: Vec::new(), row: StringRecord::new() };
        let names = names.map_err(|error| table.failure(error))?;
        let mut columns: Vec<String> = Vec::new();
        for (index, name) in names.iter().enumerate() {
            let name = name.trim();
            let problem = match name {
                "" => format!("column {} has no name; the first line must name the columns", index + 1),
                name if columns.iter().any(|other| other == name) => format!("two columns are called `{name}`"),
                _ => {
                    columns.push(name.into());
                    continue;
                }
            };
            return Err(DataError::Row { place: Unit::Line.at(&table.path, 1), problem });
        }
        let cells = |column: &String| match mapping.key_of(column) {
            key if NESTED.contains(&key) => Cells::Nested,
            key if TEXTS_OR_MESSAGES.contains(&key) => Cells::TextsOrMessages,
            _ => Cells::Texts,
        };
        table.cells = columns.iter().map(cells).collect();
        table.columns = columns;
        Ok(table)
    }

    fn failure(&self, error: csv::Error) -> DataError {
        let line = error.position().map_or(1, |position| position.line() as usize);
        let row = |problem: String| DataError::Row { place: Unit::Line.at(&self.path, line), problem };
        match error.into_kind() {
            ErrorKind::Io(source) => {
                let last = self.reader.position().line().saturating_sub(1) as usize;
                packed::failure(&self.path, self.is_packed, (Unit::Line, last), source)
            }
            ErrorKind::UnequalLengths { expected_len, len, .. } => row(format!(
                "it has {}, and the first line names {expected_len} columns: {}; quote cells that hold the separator or a line break",
                count(len, "cell", "cells"),
                match self.columns.get(len as usize..) {
                    Some([first, ..]) => format!("from `{first}` on there is none"),
                    _ => format!("nothing names cell {}", expected_len + 1),
                }
            )),
            ErrorKind::Utf8 { err, .. } => row(format!(
                "the cell in column {} is no UTF-8; `iconv -f WINDOWS-1252 -t UTF-8` writes a file that is",
                err.field() + 1
            )),
            other => row(format!("{other:?}")),
        }
    }

    /// A cell's value.
    fn value(&self, column: &str, cells: Cells, cell: &str, line: usize) -> Result<Json, DataError> {
        let text = cell.trim();
        if cells == Cells::TextsOrMessages && text.starts_with('[') {
            return Ok(messages(text).unwrap_or_else(|| cell.into()));
        }
        if cells != Cells::Nested || !text.starts_with(['[', '{']) {
            return Ok(cell.into());
        }
        serde_json::from_str(text).map(|super::unique::Unique(value)| value).map_err(|error| DataError::Row {
            place: Unit::Line.at(&self.path, line),
            problem: format!("the cell in column `{column}` is not valid JSON: {error}"),
        })
    }
}

/// A list of messages, if a text is one as JSON.
fn messages(text: &str) -> Option<Json> {
    let super::unique::Unique(list) = serde_json::from_str(text).ok()?;
    let messages = list.as_array().filter(|messages| !messages.is_empty())?;
    messages.iter().all(|message| message.get("role").is_some()).then_some(list)
}

impl Reading for Table {
    fn next(&mut self) -> Result<Option<Record>, DataError> {
        let mut row = std::mem::take(&mut self.row);
        if !self.reader.read_record(&mut row).map_err(|error| self.failure(error))? {
            return Ok(None);
        }
        let number = row.position().map_or(0, |position| position.line() as usize);
        let mut object = Object::new();
        for ((column, cells), cell) in self.columns.iter().zip(&self.cells).zip(row.iter()) {
            // An empty cell of a column that holds lists is a list that is not there.
            if !(cell.is_empty() && *cells == Cells::Nested) {
                object.insert(column.clone(), self.value(column, *cells, cell, number)?);
            }
        }
        self.row = row;
        Ok(Some(Record { number, content: Content::Cells(object) }))
    }
}
