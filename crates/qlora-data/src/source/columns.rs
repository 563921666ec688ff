//! Parquet.

use std::fs::File;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};

use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader as _, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use serde_json::{Number, Value as Json};

use super::packed::Progress;
use super::{Content, Object, Reading, Record};
use crate::error::DataError;
use crate::place::Unit;

/// The rows of a Parquet file, in its order, of which a page of each column is held at a time.
pub(super) struct Columns {
    path: PathBuf,
    rows: RowIter<'static>,
    read: usize,
    /// Rows that its end tells of.
    count: u64,
    progress: Progress,
}

impl Columns {
    /// # Errors
    /// The file is damaged, or cut short: what it holds is told at its end.
    pub fn new(path: &Path, file: File, progress: Progress) -> Result<Self, DataError> {
        let reader = SerializedFileReader::new(file).map_err(|error| DataError::FileKind {
            path: path.to_owned(),
            problem: format!(
                "is Parquet that is damaged or was cut short: {}; download or write it again",
                words(&error)
            ),
        })?;
        let count = u64::try_from(reader.metadata().file_metadata().num_rows()).unwrap_or(0);
        let rows = RowIter::from_file_into(Box::new(reader));
        Ok(Self { path: path.to_owned(), rows, read: 0, count, progress })
    }

    fn wrong(&self, problem: String) -> DataError {
        DataError::Row { place: Unit::Row.at(&self.path, self.read), problem }
    }
}

/// The first column that has a page that can't be read: the library does not say which it was.
fn broken_column(path: &Path) -> Option<String> {
    let find = || {
        let reader = SerializedFileReader::new(File::open(path).ok()?).ok()?;
        let groups = 0..reader.num_row_groups();
        groups.filter_map(|group| reader.get_row_group(group).ok()).find_map(|group| {
            let columns = group.metadata().columns();
            let is_broken = |column: &usize| match group.get_column_page_reader(*column) {
                Ok(mut pages) => pages.any(|page| page.is_err()),
                Err(_) => true,
            };
            let broken = (0..columns.len()).find(is_broken)?;
            Some(columns[broken].column_path().string())
        })
    };
    std::panic::catch_unwind(find).ok().flatten()
}

fn words(error: &ParquetError) -> String {
    error.to_string()
}

impl Reading for Columns {
    fn next(&mut self) -> Result<Option<Record>, DataError> {
        // The library asserts what damage can break.
        let next = std::panic::catch_unwind(AssertUnwindSafe(|| self.rows.next()));
        self.read += 1;
        let next = next.map_err(|_| self.wrong("the file is damaged: its levels contradict its schema".into()))?;
        let Some(row) = next else { return Ok(None) };
        let row = row.map_err(|error| {
            let column = broken_column(&self.path)
                .map_or_else(String::new, |column| format!("the column `{column}` is damaged: "));
            self.wrong(format!("{column}{}; download or write the file again", words(&error)))
        })?;
        self.progress.share(self.read as u64, self.count);
        let object = object(&row).map_err(|problem| self.wrong(problem))?;
        Ok(Some(Record { number: self.read, content: Content::Cells(object) }))
    }
}

/// A row's cells that are there: Parquet gives every row every column, and every group every key.
fn object(row: &Row) -> Result<Object, String> {
    let mut object = Object::new();
    for (name, field) in row.get_column_iter() {
        let value = value(field).map_err(|problem| format!("`{name}` {problem}"))?;
        if !value.is_null() {
            object.insert(name.clone(), value);
        }
    }
    Ok(object)
}

fn value(field: &Field) -> Result<Json, String> {
    let float = |value: f64| Number::from_f64(value).map(Json::Number).ok_or_else(|| format!("is {value}"));
    Ok(match field {
        Field::Null => Json::Null,
        Field::Bool(value) => (*value).into(),
        Field::Byte(value) => (*value).into(),
        Field::Short(value) => (*value).into(),
        Field::Int(value) => (*value).into(),
        Field::Long(value) => (*value).into(),
        Field::UByte(value) => (*value).into(),
        Field::UShort(value) => (*value).into(),
        Field::UInt(value) => (*value).into(),
        Field::ULong(value) => (*value).into(),
        Field::Float16(value) => float(value.to_f64())?,
        Field::Float(value) => float(f64::from(*value))?,
        Field::Double(value) => float(*value)?,
        Field::Str(value) => value.as_str().into(),
        Field::Bytes(value) => match std::str::from_utf8(value.data()) {
            Ok(text) => text.into(),
            Err(_) => return Err("holds bytes that are no UTF-8".into()),
        },
        Field::Group(row) => Json::Object(object(row)?),
        Field::ListInternal(list) => list.elements().iter().map(value).collect::<Result<_, _>>()?,
        Field::MapInternal(map) => {
            let mut object = Object::new();
            for (key, field) in map.entries() {
                let Field::Str(key) = key else { return Err("is a map whose keys are no strings".into()) };
                object.insert(key.clone(), value(field)?);
            }
            Json::Object(object)
        }
        other => other.to_string().into(),
    })
}
