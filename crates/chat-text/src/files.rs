//! Files of a model's or an adapter's folder, which others may have made.

use std::io;
use std::path::Path;

/// Reads a file as [`std::fs::read`] does, a regular one only: a pipe would be waited for without an end.
///
/// # Errors
/// As `std::fs::read`; [`io::ErrorKind::InvalidInput`] for what is no regular file.
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    match std::fs::metadata(path)?.is_file() {
        true => std::fs::read(path),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")),
    }
}

/// [`read`], as text.
///
/// # Errors
/// As [`read`]; [`io::ErrorKind::InvalidData`] for what is not UTF-8.
pub(crate) fn read_to_string(path: &Path) -> io::Result<String> {
    String::from_utf8(read(path)?).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}
