//! Where a row stands.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// What a file counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unit {
    /// Lines, from 1.
    #[default]
    Line,
    /// Rows, from 1: elements of an array, rows of a Parquet file.
    Row,
}

impl Unit {
    /// Its name, of one or several.
    pub(crate) fn name(self, count: usize) -> &'static str {
        match (self, count) {
            (Self::Line, 1) => "line",
            (Self::Line, _) => "lines",
            (Self::Row, 1) => "row",
            (Self::Row, _) => "rows",
        }
    }

    /// A place by its number.
    pub(crate) fn at(self, path: &Path, number: usize) -> Place {
        Place { path: path.to_owned(), unit: self, number }
    }
}

/// A place in a file, as `rows.jsonl:12` or `rows.parquet, row 12`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub path: PathBuf,
    /// What its number counts.
    pub unit: Unit,
    /// Its number, from 1.
    pub number: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, unit, number } = self;
        match unit {
            Unit::Line => write!(f, "{}:{number}", path.display()),
            Unit::Row => write!(f, "{}, row {number}", path.display()),
        }
    }
}
