//! What killed processes leave in a folder, and how a folder of ours is removed.
//!
//! Removing a folder takes many steps, and a kill between them leaves a folder that has lost some of its files. So
//! it is moved into a hidden folder first, `.<name>.removed-*`, whose name says that its content is nobody's any more.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::{dot_name, is_abandoned, is_random, locked, parent, sync_dir, temporary_dir};
use crate::error::FormatError;

/// What the middle of a temporary name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// An output that is being built.
    New,
    /// An output that was moved aside for a new one.
    Old,
    /// What [`remove_dir_of`] was removing.
    Removed,
}

/// Removes what killed saves and removals left directly in `dir`, and puts back what one had moved aside. Returns
/// what was removed, sorted.
///
/// Only the names that this module makes are touched, and of those only what nobody is working on. A folder that
/// is not there holds nothing.
///
/// # Errors
/// [`FormatError::Read`] when `dir` cannot be listed; [`FormatError::Remove`] for the first leftover that cannot be
/// removed, after all others have been.
pub fn clean_leftovers(dir: &Path) -> Result<Vec<PathBuf>, FormatError> {
    let read = |source| FormatError::Read { path: dir.to_path_buf(), source };
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(read)?,
    };
    let mut leftovers = Vec::new();
    for entry in entries {
        let entry = entry.map_err(read)?;
        if let Some((name, kind)) = entry.file_name().to_str().and_then(temporary_name) {
            leftovers.push((entry.path(), dir.join(name), kind));
        }
    }
    leftovers.sort_by(|a, b| a.0.cmp(&b.0));
    let (mut removed, mut failed) = (Vec::new(), None);
    for (path, output, kind) in leftovers {
        // Where there are no locks, what is to be removed can be: two that remove it are not in each other's way.
        let goes_anyway = kind == Kind::Removed && !cfg!(unix);
        if !goes_anyway && !is_abandoned(&path) {
            continue;
        }
        if kind == Kind::Old && fs::exists(&output).is_ok_and(|there| !there) {
            drop(fs::rename(path.join("dir"), &output));
        }
        match remove_all(&path) {
            Ok(()) => removed.push(path),
            Err(source) => failed = failed.or(Some(FormatError::Remove { path, source })),
        }
    }
    failed.map_or(Ok(removed), Err)
}

/// Checks that [`remove_dir_of`] would not refuse to remove `dir`.
///
/// # Errors
/// [`FormatError::Foreign`] when `dir` holds a folder, a link or a file of another name; [`FormatError::Read`].
pub fn check_dir_of(dir: &Path, known: &[&str]) -> Result<(), FormatError> {
    match foreign(dir, known) {
        Ok(None) => Ok(()),
        Ok(Some(entry)) => Err(FormatError::Foreign { dir: dir.to_path_buf(), entry }),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(source) => Err(FormatError::Read { path: dir.to_path_buf(), source }),
    }
}

/// Removes the folder `dir`, which holds files of these names at most, and what killed writes of them left.
///
/// It is moved away first: killed at any moment, the folder is there whole, or gone but for a hidden one that
/// [`clean_leftovers`] knows. A folder that is not there is no error.
///
/// # Errors
/// [`FormatError::Foreign`] when `dir` holds a folder, a link or a file of another name, and
/// [`FormatError::Remove`] when `dir` is no folder or cannot be moved; nothing has been removed then.
/// [`FormatError::Remove`], too, when it could be moved, but not removed.
pub fn remove_dir_of(dir: &Path, known: &[&str]) -> Result<(), FormatError> {
    let fail = |source| FormatError::Remove { path: dir.to_path_buf(), source };
    let refuse = |entry| Err(FormatError::Foreign { dir: dir.to_path_buf(), entry });
    match dir.symlink_metadata() {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(fail(e)),
        Ok(meta) if !meta.is_dir() => return Err(fail(ErrorKind::NotADirectory.into())),
        Ok(_) => {}
    }
    if let Some(entry) = foreign(dir, known).map_err(fail)? {
        return refuse(entry);
    }
    let folder = parent(dir);
    let (away, _lock) = locked(|| temporary_dir(folder, &dot_name(dir, "removed")), TempDir::path).map_err(fail)?;
    let away = away.keep();
    let moved = away.join("dir");
    if let Err(error) = fs::rename(dir, &moved) {
        drop(fs::remove_dir(&away));
        return Err(fail(error));
    }
    // Whoever knew the folder by its name can't add to it any more; this is what came before that.
    match foreign(&moved, known) {
        Ok(None) => {}
        other => {
            fs::rename(&moved, dir).map_err(fail)?;
            drop(fs::remove_dir(&away));
            return match other {
                Ok(Some(entry)) => refuse(entry),
                Ok(None) => Ok(()),
                Err(error) => Err(fail(error)),
            };
        }
    }
    sync_dir(folder).map_err(fail)?;
    remove_all(&away).map_err(|source| FormatError::Remove { path: away, source })
}

/// The first entry of a folder that is not a file of a known name, and no leftover of one.
fn foreign(dir: &Path, known: &[&str]) -> io::Result<Option<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let ours = name.to_str().is_some_and(|name| {
            known.contains(&name) || temporary_name(name).is_some_and(|(of, _)| known.contains(&of))
        });
        if !ours || !entry.file_type()?.is_file() {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    Ok(names.into_iter().min())
}

/// The output whose temporary name this is, and of which kind.
fn temporary_name(name: &str) -> Option<(&str, Kind)> {
    let (head, random) = name.strip_prefix('.')?.rsplit_once('-')?;
    let (output, kind) = head.rsplit_once('.')?;
    let kind = match kind {
        "new" => Kind::New,
        "old" => Kind::Old,
        "removed" => Kind::Removed,
        _ => return None,
    };
    (is_random(random) && !output.is_empty()).then_some((output, kind))
}

/// Removes a file or a folder; one that is gone is no error.
fn remove_all(path: &Path) -> io::Result<()> {
    let gone = |result: io::Result<()>| match result {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    };
    match path.symlink_metadata() {
        Ok(meta) if meta.is_dir() => gone(fs::remove_dir_all(path)),
        Ok(_) => gone(fs::remove_file(path)),
        Err(e) => gone(Err(e)),
    }
}
