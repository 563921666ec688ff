//! A file's bytes, unpacked where they are packed.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use flate2::bufread::MultiGzDecoder;

use super::Text;
use crate::error::DataError;
use crate::place::Unit;

/// Bytes read at a time.
const BUFFER: usize = 64 << 10;

/// How far a file is read.
pub(super) struct Progress {
    read: Arc<AtomicU64>,
    /// Bytes of the file; 0 for a pipe.
    pub total: u64,
}

impl Progress {
    pub fn bytes(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// The same, for a file that is read from several places: its reader says how far it is.
    pub fn by_rows(&self) -> Self {
        self.read.store(0, Ordering::Relaxed);
        Self { read: Arc::clone(&self.read), total: self.total }
    }

    /// So many of all rows are read.
    pub fn share(&self, rows: u64, of: u64) {
        let bytes = u128::from(self.total) * u128::from(rows.min(of)) / u128::from(of.max(1));
        self.read.store(bytes as u64, Ordering::Relaxed);
    }
}

/// Counts what is read.
struct Counted {
    file: File,
    read: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.file.read(buffer)?;
        self.read.fetch_add(len as u64, Ordering::Relaxed);
        Ok(len)
    }
}

/// A file that is open.
pub(super) struct Stream {
    /// Its bytes, unpacked.
    pub reader: Text,
    /// The file as it is, for what is not read from front to back.
    pub file: File,
    /// What it is packed with, in words.
    pub is_packed: Option<&'static str>,
    pub progress: Progress,
}

impl Stream {
    /// Opens a file, which gzip or Zstandard may have packed: its first bytes say so.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let fail = |source| DataError::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(fail)?;
        let total = file.metadata().map_err(fail)?.len();
        let read = Arc::<AtomicU64>::default();
        let counted = Counted { file: file.try_clone().map_err(fail)?, read: Arc::clone(&read) };
        let mut plain = BufReader::with_capacity(BUFFER, counted);
        let (reader, is_packed): (Text, _) = match plain.fill_buf().map_err(fail)? {
            [0x1F, 0x8B, ..] => (Box::new(BufReader::with_capacity(BUFFER, MultiGzDecoder::new(plain))), Some("gzip")),
            [0x28, 0xB5, 0x2F, 0xFD, ..] => {
                let decoder = zstd::Decoder::with_buffer(plain).map_err(fail)?;
                (Box::new(BufReader::with_capacity(BUFFER, decoder)), Some("Zstandard"))
            }
            _ => (Box::new(plain), None),
        };
        Ok(Self { reader, file, is_packed, progress: Progress { read, total } })
    }
}

/// Why a file could not be read on, behind the last line or row that was.
pub(super) fn failure(
    path: &Path,
    is_packed: Option<&'static str>,
    last: (Unit, usize),
    source: io::Error,
) -> DataError {
    let source = match is_packed {
        Some(packer) => {
            let what = match source.kind() {
                io::ErrorKind::UnexpectedEof => "it ends too early: it was cut short",
                _ => "it is damaged",
            };
            let (unit, number) = last;
            let place = if number > 0 { format!(" behind {} {number}", unit.name(1)) } else { String::new() };
            let problem = format!("{packer} can't unpack it{place}: {what} ({source}); download or pack it again");
            io::Error::new(source.kind(), problem)
        }
        None => source,
    };
    DataError::Read { path: path.to_owned(), source }
}
