//! A stand-in for the `turso` database engine, with the names that `cubecl-environment` uses, over
//! SQLite.
//!
//! CubeCL keeps compiled kernels and autotune results in one database file. Upstream's engine is
//! large and generates bindings with libclang; SQLite reads and writes the same file format, and
//! builds with a C compiler alone. See README.md.
//!
//! Upstream's API is asynchronous. Here every call does its work when it is first polled and is
//! ready at once, which is all that its caller, who blocks on each, can tell.
#![warn(missing_docs)]

use std::fmt;
use std::io::ErrorKind;
use std::time::Duration;

use rusqlite::types::{FromSql, Value};
use rusqlite::{OpenFlags, Params, ffi};

pub mod transaction;

use transaction::{Transaction, TransactionBehavior};

/// What a call answers.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// Another connection holds the lock, and the busy timeout ran out.
    Busy(String),
    /// A reader wants to write what another connection has changed since.
    BusySnapshot(String),
    /// Reading or writing failed below the database: the kind, and what was being done.
    IoError(ErrorKind, &'static str),
    /// Anything else, in the database's words.
    Error(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Busy(message) | Self::BusySnapshot(message) | Self::Error(message) => f.write_str(message),
            Self::IoError(kind, action) => write!(f, "{action}: {kind}"),
        }
    }
}

impl std::error::Error for Error {}

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Self {
        let Some(code) = error.sqlite_error() else { return Self::Error(error.to_string()) };
        match code.code {
            _ if code.extended_code == ffi::SQLITE_BUSY_SNAPSHOT => Self::BusySnapshot(error.to_string()),
            ffi::ErrorCode::DatabaseBusy | ffi::ErrorCode::DatabaseLocked => Self::Busy(error.to_string()),
            ffi::ErrorCode::DiskFull => Self::IoError(ErrorKind::StorageFull, "writing the database"),
            ffi::ErrorCode::SystemIoFailure => Self::IoError(ErrorKind::Other, "accessing the database"),
            _ => Self::Error(error.to_string()),
        }
    }
}

/// How a database file is opened.
#[derive(Clone, Debug)]
pub struct Builder {
    database: Database,
}

impl Builder {
    /// The database in the file at `path`, made when it isn't there.
    pub fn new_local(path: &str) -> Self {
        Self { database: Database { path: path.to_owned(), read_only: false } }
    }

    /// Whether the file is only read: it must then exist, and stays as it is.
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.database.read_only = read_only;
        self
    }

    /// Several processes may share a file, asked for or not.
    pub fn experimental_multiprocess_wal(self, _on: bool) -> Self {
        self
    }

    /// `VACUUM` works, asked for or not.
    pub fn experimental_vacuum(self, _on: bool) -> Self {
        self
    }

    /// Opens the file once and looks it through, so that one that is missing, damaged or no database
    /// is an error here and not halfway through its use.
    pub async fn build(self) -> Result<Database> {
        let connection = self.database.connect()?;
        connection.busy_timeout(Duration::from_secs(5))?;
        let damage = match connection.inner.query_row("PRAGMA quick_check(1)", (), |row| row.get::<_, String>(0)) {
            Ok(answer) if answer == "ok" => return Ok(self.database),
            Ok(answer) => answer,
            Err(error) => match error.sqlite_error_code() {
                Some(ffi::ErrorCode::DatabaseCorrupt | ffi::ErrorCode::NotADatabase) => error.to_string(),
                _ => return Err(error.into()),
            },
        };
        Err(Error::Error(format!("{} is damaged, delete it: {damage}", self.database.path)))
    }
}

/// A database file. It holds nothing open: its connections do.
#[derive(Clone, Debug)]
pub struct Database {
    path: String,
    read_only: bool,
}

impl Database {
    /// A new connection, which waits for no lock until it is given a timeout.
    pub fn connect(&self) -> Result<Connection> {
        let access = if self.read_only {
            OpenFlags::SQLITE_OPEN_READ_ONLY
        } else {
            OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE
        };
        // A connection isn't `Sync`, so that SQLite needs no lock of its own around it.
        let inner = rusqlite::Connection::open_with_flags(&self.path, access | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
        inner.busy_timeout(Duration::ZERO)?;
        Ok(Connection { inner })
    }
}

/// A connection to a database file, for one thread at a time.
#[derive(Debug)]
pub struct Connection {
    inner: rusqlite::Connection,
}

impl Connection {
    /// How long a statement waits for another connection's lock before it fails with
    /// [`Error::Busy`].
    pub fn busy_timeout(&self, timeout: Duration) -> Result<()> {
        Ok(self.inner.busy_timeout(timeout)?)
    }

    /// Runs a statement that answers with no rows; the number of rows that it changed.
    pub async fn execute(&self, sql: impl AsRef<str>, params: impl Params) -> Result<u64> {
        Ok(self.inner.execute(sql.as_ref(), params)? as u64)
    }

    /// Runs a statement for its rows.
    pub async fn query(&self, sql: impl AsRef<str>, params: impl Params) -> Result<Rows> {
        self.rows(sql.as_ref(), params)
    }

    /// Runs `PRAGMA name`, where `name` may go on to an argument, and visits the rows that it
    /// answers with, if any.
    pub async fn pragma_query(&self, name: &str, mut visit: impl FnMut(&Row) -> Result<()>) -> Result<()> {
        self.rows(&format!("PRAGMA {name}"), ())?.0.try_for_each(|row| visit(&row))
    }

    /// Starts a transaction, which is rolled back unless it is committed.
    pub async fn transaction_with_behavior(&mut self, behavior: TransactionBehavior) -> Result<Transaction<'_>> {
        Transaction::begin(self, behavior)
    }

    fn rows(&self, sql: &str, params: impl Params) -> Result<Rows> {
        let mut statement = self.inner.prepare(sql)?;
        let columns = statement.column_count();
        let rows = statement
            .query_map(params, |row| (0..columns).map(|column| row.get(column)).collect::<rusqlite::Result<_>>())?
            .map(|row| row.map(Row))
            .collect::<rusqlite::Result<Vec<_>>>()?;
        Ok(Rows(rows.into_iter()))
    }
}

/// The rows of an answer. They are read before the first is handed out: a scan that its caller
/// takes slowly keeps no lock on the file.
#[derive(Debug)]
pub struct Rows(std::vec::IntoIter<Row>);

impl Rows {
    /// The next row, or `None` after the last.
    pub async fn next(&mut self) -> Result<Option<Row>> {
        Ok(self.0.next())
    }
}

/// One row of an answer.
#[derive(Clone, Debug)]
pub struct Row(Vec<Value>);

impl Row {
    /// The value in a column, counted from 0.
    pub fn get<T: FromSql>(&self, column: usize) -> Result<T> {
        let value = self.0.get(column).ok_or_else(|| Error::Error(format!("the row has no column {column}")))?;
        T::column_result(value.into()).map_err(|error| Error::Error(format!("column {column}: {error}")))
    }
}

#[cfg(test)]
mod tests;
