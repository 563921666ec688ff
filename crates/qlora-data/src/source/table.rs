//! Tables of text: values separated by commas, semicolons or tabs, with the names of the columns in the first line.

use std::path::PathBuf;

use csv::{ErrorKind, Reader, ReaderBuilder, StringRecord};
use serde_json::Value as Json;

use super::{Content, Object, Reading, Record, Text, packed};
use crate::error::DataError;
use crate::mapping::Columns as Mapping;
use crate::place::Unit;

/// Columns whose cells are JSON where they look like it: what has no form of its own in a table.
const NESTED: [&str; 5] = ["messages", "conversations", "tools", "history", "chat_template_kwargs"];

/// The rows of a table.
pub(super) struct Table {
    path: PathBuf,
    is_packed: Option<&'static str>,
    reader: Reader<Text>,
    columns: Vec<String>,
    /// Of each column, whether its cells are JSON where they look like it.
    nested: Vec<bool>,
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
        let start = text.fill_buf().map_err(|source| packed::failure(&path, is_packed, source))?;
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
            Self { path, is_packed, reader, columns: Vec::new(), nested: Vec::new(), row: StringRecord::new() };
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
        table.nested = columns.iter().map(|column| NESTED.contains(&mapping.key_of(column))).collect();
        table.columns = columns;
        Ok(table)
    }

    fn failure(&self, error: csv::Error) -> DataError {
        let line = error.position().map_or(1, |position| position.line() as usize);
        let row = |problem: String| DataError::Row { place: Unit::Line.at(&self.path, line), problem };
        match error.into_kind() {
            ErrorKind::Io(source) => packed::failure(&self.path, self.is_packed, source),
            ErrorKind::UnequalLengths { expected_len, len, .. } => row(format!(
                "it has {len} cells, and the first line names {expected_len} columns; quote cells that hold the separator or a line break"
            )),
            ErrorKind::Utf8 { err, .. } => row(format!(
                "the cell in column {} is no UTF-8; `iconv -f WINDOWS-1252 -t UTF-8` writes a file that is",
                err.field() + 1
            )),
            other => row(format!("{other:?}")),
        }
    }

    /// A cell's value.
    fn value(&self, column: &str, nested: bool, cell: &str, line: usize) -> Result<Json, DataError> {
        let text = cell.trim();
        if !nested || !text.starts_with(['[', '{']) {
            return Ok(cell.into());
        }
        serde_json::from_str(text).map(|super::unique::Unique(value)| value).map_err(|error| DataError::Row {
            place: Unit::Line.at(&self.path, line),
            problem: format!("the cell in column `{column}` is not valid JSON: {error}"),
        })
    }
}

impl Reading for Table {
    fn next(&mut self) -> Result<Option<Record>, DataError> {
        let mut row = std::mem::take(&mut self.row);
        if !self.reader.read_record(&mut row).map_err(|error| self.failure(error))? {
            return Ok(None);
        }
        let number = row.position().map_or(0, |position| position.line() as usize);
        let mut object = Object::new();
        for ((column, nested), cell) in self.columns.iter().zip(&self.nested).zip(row.iter()) {
            // An empty cell of a column that holds lists is a list that is not there.
            if !(cell.is_empty() && *nested) {
                object.insert(column.clone(), self.value(column, *nested, cell, number)?);
            }
        }
        self.row = row;
        Ok(Some(Record { number, content: Content::Cells(object) }))
    }
}
