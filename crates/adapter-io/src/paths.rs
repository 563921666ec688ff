//! Which files a checkpoint may name: those inside its own folder, and nothing else.
//!
//! A shard index is data from a stranger. `../../etc/passwd`, an absolute name or a symbolic link out
//! of the folder would make us map, and perhaps upload again as a "merged model", files of the user's.
//! The one layout with links that is in wide use is the hub's cache, where
//! `models--org--name/snapshots/<commit>/file` links to `../../blobs/<hash>`: those are allowed.

use std::path::{Component, Path, PathBuf};

use crate::error::FormatError;

/// Turns `entry`, a file name found in `source_file`, into a path inside `dir`.
///
/// Returns `Ok(None)` when there is no such file.
///
/// # Errors
/// [`FormatError::UnsafePath`] when the name leads out of `dir`; [`FormatError::Read`].
pub(crate) fn resolve_inside(dir: &Path, entry: &str, source_file: &Path) -> Result<Option<PathBuf>, FormatError> {
    let refuse = |reason: &str| FormatError::UnsafePath {
        source_file: source_file.to_path_buf(),
        entry: entry.to_string(),
        reason: reason.to_string(),
    };
    let relative = Path::new(entry);
    // A backslash or a drive letter is an ordinary character here, but not where the file goes next.
    if relative.is_absolute() || relative.has_root() || entry.contains('\\') || entry.contains(':') {
        return Err(refuse("is not a plain relative name"));
    }
    if entry.is_empty() || entry.contains('\0') {
        return Err(refuse("is not a file name"));
    }
    if !relative.components().all(|c| matches!(c, Component::Normal(_))) {
        return Err(refuse("points outside the folder"));
    }
    let path = dir.join(relative);
    let real = match path.canonicalize() {
        Ok(real) => real,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(FormatError::Read { path, source }),
    };
    let read = |source| FormatError::Read { path: dir.to_path_buf(), source };
    let real_dir = dir.canonicalize().map_err(read)?;
    if real.starts_with(&real_dir) || hub_blobs(&real_dir).is_some_and(|blobs| real.starts_with(blobs)) {
        Ok(Some(path))
    } else {
        Err(refuse(&format!("is a link that leads out of the folder, to {}", real.display())))
    }
}

/// The `blobs` folder that belongs to a snapshot in the hub's cache.
fn hub_blobs(real_dir: &Path) -> Option<PathBuf> {
    let snapshots = real_dir.ancestors().find(|a| a.file_name().is_some_and(|n| n == "snapshots"))?;
    let repo = snapshots.parent()?;
    let name = repo.file_name()?.to_str()?;
    name.starts_with("models--").then(|| repo.join("blobs"))
}
