//! Replacing a file or a folder as a whole: a reader sees the old content or the new, never a part.
//!
//! A file is written under a temporary name in its own folder (a rename across file systems would
//! copy), flushed to the disk with fsync, renamed over the old one, and the folder is fsynced so that
//! the rename survives a power cut. A folder changes places with the old one in one step, where the
//! file system can do that (Linux, macOS).
//!
//! A temporary file or folder is removed when anything fails. A process that is killed can't do that:
//! what it left is removed by the next one that writes the same output. Each holds a lock on what it is
//! building, which ends with the process, so that nobody's work in progress is taken for a leftover.
//! [`clean_leftovers`] does the same for a whole folder, and [`remove_dir_of`] removes a folder such that a kill
//! leaves nothing that these don't know.

mod leftovers;

pub use leftovers::{check_dir_of, clean_leftovers, remove_dir_of};

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tempfile::{Builder, NamedTempFile, TempDir};

use crate::error::FormatError;

/// The letters that tempfile puts at the end of a name.
const RANDOM_LETTERS: usize = 6;

/// What this process is building, for [`abandon_all`]. A temporary file or folder is made, and put in its place, under
/// this lock: whoever holds it sees none that is half there.
static BUILDING: Mutex<Building> = Mutex::new(Building { paths: BTreeMap::new(), abandoned: false });

#[derive(Debug)]
struct Building {
    /// Temporary paths, and whether what stands there is only the old output, which the new one has replaced.
    paths: BTreeMap<PathBuf, bool>,
    abandoned: bool,
}

/// # Errors
/// After [`abandon_all`].
fn building() -> io::Result<MutexGuard<'static, Building>> {
    let building = BUILDING.lock().unwrap_or_else(PoisonError::into_inner);
    match building.abandoned {
        true => Err(io::Error::new(io::ErrorKind::Interrupted, "the program was interrupted and is ending")),
        false => Ok(building),
    }
}

/// Writes `path` through a temporary file beside it.
///
/// # Errors
/// [`FormatError::Write`] when the folder cannot be written, the disk is full, or `write` fails; a
/// file that was at `path` is unchanged then.
pub fn write_file(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> Result<(), FormatError> {
    let attempt = || -> io::Result<()> {
        sweep(path);
        let (temporary, _lock, _listed) = listed(|| temporary_beside(path), NamedTempFile::path)?;
        let (file, temporary) = temporary.into_parts();
        let mut writer = BufWriter::with_capacity(1 << 20, file);
        write(&mut writer)?;
        writer.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        put_in_place(|building| {
            let at = listed_path(&temporary);
            temporary.persist(path).map_err(|e| e.error)?;
            building.paths.remove(&at);
            Ok(())
        })?;
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
/// already there is removed when the new one stands. Where the file system cannot exchange two folders in
/// one step the old one is moved aside first; should the process be killed right then, it is still there as
/// `.<name>.old-*`, and the next call puts it back before it starts.
///
/// # Errors
/// Whatever `fill` returns, and [`FormatError::Write`]; what was at `final_dir` is unchanged then.
pub fn replace_dir<E: From<FormatError>>(final_dir: &Path, fill: impl FnOnce(&Path) -> Result<(), E>) -> Result<(), E> {
    let failed = |source: io::Error| FormatError::Write { path: final_dir.to_path_buf(), source };
    let fresh = Scratch::beside(final_dir)?;
    fill(fresh.path())?;
    sync_tree(fresh.path()).map_err(failed)?;
    swap(fresh, final_dir).map_err(failed)?;
    Ok(())
}

/// A folder for work in progress; removed when it is dropped, and when the process is killed, by the next one
/// that writes the same output.
#[derive(Debug)]
pub struct Scratch {
    dir: TempDir,
    _lock: Option<File>,
    _listed: Listed,
}

impl Scratch {
    /// Makes a folder beside `output`, in the same file system.
    ///
    /// # Errors
    /// [`FormatError::Write`].
    pub fn beside(output: &Path) -> Result<Self, FormatError> {
        let folder = parent(output);
        let make = || -> io::Result<Self> {
            fs::create_dir_all(folder)?;
            sweep(output);
            let (dir, _lock, _listed) = listed(|| temporary_dir(folder, &dot_name(output, "new")), TempDir::path)?;
            Ok(Self { dir, _lock, _listed })
        };
        make().map_err(|source| FormatError::Write { path: output.to_path_buf(), source })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// Removes what this process is building, for a program that is about to end at once. Returns whether there was
/// anything: an output that is as it was because of this.
///
/// Whoever is writing, or begins to, sees errors from now on.
pub fn abandon_all() -> bool {
    let mut building = BUILDING.lock().unwrap_or_else(PoisonError::into_inner);
    building.abandoned = true;
    for path in building.paths.keys() {
        // A file that is just being made keeps its folder from going: the next try takes it too.
        for _ in 0..10 {
            remove(path);
            if path.symlink_metadata().is_err() {
                break;
            }
        }
    }
    building.paths.values().any(|replaced| !replaced)
}

/// An entry of [`BUILDING`].
#[derive(Debug)]
struct Listed(PathBuf);

impl Drop for Listed {
    fn drop(&mut self) {
        BUILDING.lock().unwrap_or_else(PoisonError::into_inner).paths.remove(&self.0);
    }
}

/// As [`BUILDING`] has it: where the program's working directory is by then must not matter.
fn listed_path(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf())
}

/// Makes a temporary file or folder, [locked] and listed.
fn listed<T>(make: impl Fn() -> io::Result<T>, path: impl Fn(&T) -> &Path) -> io::Result<(T, Option<File>, Listed)> {
    let mut building = building()?;
    let (made, lock) = locked(make, &path)?;
    let listed = listed_path(path(&made));
    building.paths.insert(listed.clone(), false);
    Ok((made, lock, Listed(listed)))
}

/// Does the renames that make a new output stand.
fn put_in_place(rename: impl FnOnce(&mut Building) -> io::Result<()>) -> io::Result<()> {
    rename(&mut *building()?)
}

fn swap(fresh: Scratch, final_dir: &Path) -> io::Result<()> {
    let folder = parent(final_dir);
    let at = listed_path(fresh.path());
    let mut old = None;
    put_in_place(|building| {
        if final_dir.symlink_metadata().is_err() {
            fs::rename(fresh.path(), final_dir)?;
            building.paths.remove(&at);
        } else if exchange(fresh.path(), final_dir)? {
            // What carries the temporary name is the old one now, and may be a file or a link.
            building.paths.insert(at, true);
            old = Some(fresh.path().to_path_buf());
        } else {
            // A rename replaces an empty folder only, so the old one steps into a fresh empty folder first.
            let (aside, _lock) = locked(|| temporary_dir(folder, &dot_name(final_dir, "old")), TempDir::path)?;
            let aside = aside.keep();
            fs::rename(final_dir, aside.join("dir")).inspect_err(|_| drop(fs::remove_dir(&aside)))?;
            if let Err(error) = fs::rename(fresh.path(), final_dir) {
                fs::rename(aside.join("dir"), final_dir)?;
                drop(fs::remove_dir(&aside));
                return Err(error);
            }
            building.paths.remove(&at);
            building.paths.insert(listed_path(&aside), true);
            old = Some(aside);
        }
        Ok(())
    })?;
    // The folder no longer exists under its temporary name, or is the old one: there is nothing for `fresh` to remove.
    let Scratch { dir, _lock, _listed } = fresh;
    let _ = dir.keep();
    sync_dir(folder)?;
    if let Some(old) = old {
        remove(&old);
        BUILDING.lock().unwrap_or_else(PoisonError::into_inner).paths.remove(&listed_path(&old));
    }
    Ok(())
}

/// Lets two paths change places in one step; `false` where that is not to be had.
#[cfg(any(target_os = "linux", target_os = "macos"))]
fn exchange(one: &Path, other: &Path) -> io::Result<bool> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    use rustix::io::Errno;
    match renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(true),
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
fn exchange(_: &Path, _: &Path) -> io::Result<bool> {
    Ok(false)
}

/// Removes what killed processes left beside `output`, and puts back what one had moved aside. What can't
/// be read or removed stays: it is not in the way.
fn sweep(output: &Path) {
    let Ok(entries) = fs::read_dir(parent(output)) else { return };
    let (fresh, aside) = (dot_name(output, "new"), dot_name(output, "old"));
    for entry in entries.flatten() {
        let (name, path) = (entry.file_name(), entry.path());
        let Some(name) = name.to_str() else { continue };
        let is_aside = name.strip_prefix(&aside).is_some_and(is_random);
        if !(is_aside || name.strip_prefix(&fresh).is_some_and(is_random)) || !is_abandoned(&path) {
            continue;
        }
        // The old output, unless a new one stands.
        if is_aside && fs::exists(output).is_ok_and(|there| !there) {
            drop(fs::rename(path.join("dir"), output));
        }
        remove(&path);
    }
}

/// What tempfile puts at the end of a name.
fn is_random(rest: &str) -> bool {
    rest.len() == RANDOM_LETTERS && rest.bytes().all(|b| b.is_ascii_alphanumeric())
}

/// Nobody holds its lock. Where there are no locks, nothing is taken to be abandoned.
fn is_abandoned(path: &Path) -> bool {
    cfg!(unix)
        && path.symlink_metadata().is_ok_and(|meta| meta.is_dir() || meta.is_file())
        && File::open(path).is_ok_and(|file| file.try_lock().is_ok())
}

fn remove(path: &Path) {
    let is_dir = path.symlink_metadata().is_ok_and(|meta| meta.is_dir());
    drop(if is_dir { fs::remove_dir_all(path) } else { fs::remove_file(path) });
}

/// Makes a temporary file or folder and takes its lock. Between the two a sweep may have removed it.
fn locked<T>(make: impl Fn() -> io::Result<T>, path: impl Fn(&T) -> &Path) -> io::Result<(T, Option<File>)> {
    loop {
        let made = make()?;
        if !cfg!(unix) {
            return Ok((made, None));
        }
        let lock = File::open(path(&made)).ok();
        match lock.as_ref().map(File::try_lock) {
            // Some network file systems know no locks: then nothing there is ever swept.
            None | Some(Ok(()) | Err(TryLockError::Error(_))) if path(&made).exists() => return Ok((made, lock)),
            _ => {}
        }
    }
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
