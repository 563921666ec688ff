//! Replacing a file or a folder as a whole: a reader sees the old content or the new, never a part.
//!
//! A file is written under a temporary name in its own folder (a rename across file systems would
//! copy), flushed to the disk with fsync, renamed over the old one, and the folder is fsynced so that
//! the rename survives a power cut. A temporary file is removed when anything fails.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::{Builder, NamedTempFile, TempDir};

use crate::error::FormatError;

/// Writes `path` through a temporary file beside it.
///
/// # Errors
/// [`FormatError::Write`] when the folder cannot be written, the disk is full, or `write` fails; a
/// file that was at `path` is unchanged then.
pub fn write_file(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> Result<(), FormatError> {
    let attempt = || -> io::Result<()> {
        let (file, temporary) = temporary_beside(path)?.into_parts();
        let mut writer = BufWriter::with_capacity(1 << 20, file);
        write(&mut writer)?;
        writer.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        temporary.persist(path).map_err(|e| e.error)?;
        sync_dir(parent(path))
    };
    attempt().map_err(|source| FormatError::Write { path: path.to_path_buf(), source })
}

/// [`write_file`] for content that is already in memory.
///
/// # Errors
/// As [`write_file`].
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<(), FormatError> {
    write_file(path, |writer| writer.write_all(bytes))
}

/// Builds a folder under a temporary name beside `final_dir`, then puts it in that place.
///
/// `fill` gets the temporary folder. All its files are fsynced before the swap. A folder that is
/// already there is moved aside, and removed only when the new one stands; should the process be
/// killed in between, the old one is still there as `.<name>.old-*`.
///
/// # Errors
/// Whatever `fill` returns, and [`FormatError::Write`]; what was at `final_dir` is unchanged then.
pub fn replace_dir<E: From<FormatError>>(final_dir: &Path, fill: impl FnOnce(&Path) -> Result<(), E>) -> Result<(), E> {
    let failed = |source: io::Error| FormatError::Write { path: final_dir.to_path_buf(), source };
    let folder = parent(final_dir);
    fs::create_dir_all(folder).map_err(failed)?;
    let fresh = temporary_dir(folder, &dot_name(final_dir, "new")).map_err(failed)?;
    fill(fresh.path())?;
    sync_tree(fresh.path()).map_err(failed)?;
    swap(fresh, final_dir).map_err(failed)?;
    Ok(())
}

fn swap(fresh: TempDir, final_dir: &Path) -> io::Result<()> {
    let folder = parent(final_dir);
    if final_dir.symlink_metadata().is_err() {
        fs::rename(fresh.path(), final_dir)?;
        // The folder no longer exists under its temporary name: there is nothing left to remove.
        let _ = fresh.keep();
        return sync_dir(folder);
    }
    // A rename replaces an empty folder only, so the old one steps into a fresh empty folder first.
    let aside = temporary_dir(folder, &dot_name(final_dir, "old"))?.keep();
    fs::rename(final_dir, aside.join("dir")).inspect_err(|_| drop(fs::remove_dir(&aside)))?;
    if let Err(error) = fs::rename(fresh.path(), final_dir) {
        fs::rename(aside.join("dir"), final_dir)?;
        drop(fs::remove_dir(&aside));
        return Err(error);
    }
    let _ = fresh.keep();
    sync_dir(folder)?;
    fs::remove_dir_all(&aside)
}

/// A named temporary file in the folder of `path`, with the permissions an ordinary file would get.
pub(crate) fn temporary_beside(path: &Path) -> io::Result<NamedTempFile> {
    let prefix = dot_name(path, "new");
    let mut builder = Builder::new();
    builder.prefix(&prefix);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // tempfile's own default is private to the user; the umask still applies to this.
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(parent(path))
}

fn temporary_dir(folder: &Path, prefix: &str) -> io::Result<TempDir> {
    let mut builder = Builder::new();
    builder.prefix(prefix);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(0o777));
    }
    builder.tempdir_in(folder)
}

fn dot_name(path: &Path, what: &str) -> String {
    format!(".{}.{what}-", path.file_name().unwrap_or_default().to_string_lossy())
}

/// The folder that holds `path`; a bare name lies in the current one.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if p != Path::new("") => p,
        _ => Path::new("."),
    }
}

/// Makes the renames in a folder durable.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    // Windows cannot open a folder for this and journals renames by itself.
    if cfg!(unix) {
        match File::open(dir).and_then(|d| d.sync_all()) {
            // Some network file systems know no fsync of a folder.
            Err(e) if matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => Ok(()),
            other => other,
        }
    } else {
        Ok(())
    }
}

fn sync_tree(dir: &Path) -> io::Result<()> {
    let entries: Vec<PathBuf> = fs::read_dir(dir)?.map(|e| e.map(|e| e.path())).collect::<io::Result<_>>()?;
    for path in entries {
        let kind = path.symlink_metadata()?.file_type();
        if kind.is_dir() {
            sync_tree(&path)?;
        } else if kind.is_file() {
            File::open(&path)?.sync_all()?;
        }
    }
    sync_dir(dir)
}
