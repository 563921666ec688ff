//! The output folder of a run: who holds it, what it holds, and what gives way to what.
//!
//! | in the folder | content |
//! |---|---|
//! | `run.lock` | held while a run is under way; names the process that holds it |
//! | `metrics.jsonl` | the log |
//! | `checkpoint-<step>` | training checkpoints |
//! | `adapter` | the finished adapter |
//! | `adapter-<step>` | an adapter that was finished before the run went on; never touched again |
//! | `tensorboard`, `mlflow.json`, `trackio.json` | what trackers were told, and where |
//! | `summary.md`, `summary.json`, `loss.svg` | the report |
//!
//! A fresh run wants a folder without a run in it. Adapter, log and report always belong to the same step: when a finished run goes
//! on, its adapter is set aside and its report removed; when a run goes back to an earlier checkpoint, the later checkpoints are
//! removed too.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

use adapter_io::{FormatError, atomic};

use crate::checkpoint;
use crate::error::TrainError;
use crate::metrics::METRICS_FILE;
use crate::trackers::{MLFLOW_FILE, TRACKIO_FILE, remove_events};

/// Folder of the finished adapter.
pub(crate) const ADAPTER_DIR: &str = "adapter";
/// The report's data.
pub(crate) const SUMMARY_FILE: &str = "summary.json";
const REPORT_FILES: [&str; 3] = [SUMMARY_FILE, "summary.md", "loss.svg"];
const LOCK_FILE: &str = "run.lock";

/// An output folder that this process holds until the value is dropped.
#[derive(Debug)]
pub(crate) struct RunFolder {
    path: PathBuf,
    lock: Lock,
    /// Whether the folder was made for this run.
    is_new: bool,
}

#[derive(Debug)]
enum Lock {
    Held {
        _file: File,
    },
    /// The file system knows no locks.
    Unsupported,
}

/// What of a run lies in a folder.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    checkpoints: Vec<(usize, PathBuf)>,
    adapter: bool,
    log: bool,
    report: bool,
}

impl Contents {
    /// What of a run lies in `path`, which need not exist.
    ///
    /// # Errors
    /// The folder can't be read.
    pub(crate) fn of(path: &Path) -> Result<Self, TrainError> {
        let has = |name: &str| path.join(name).symlink_metadata().is_ok();
        Ok(Self {
            checkpoints: checkpoint::list(path)?,
            adapter: has(ADAPTER_DIR),
            log: std::fs::metadata(path.join(METRICS_FILE)).is_ok_and(|file| file.len() > 0),
            report: REPORT_FILES.into_iter().any(has),
        })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.checkpoints.is_empty() && !self.has_results() && !self.log
    }

    /// Whether a run was finished here.
    pub(crate) fn has_results(&self) -> bool {
        self.adapter || self.report
    }

    /// Whether a run began here and left nothing that it could go on from.
    pub(crate) fn is_log_alone(&self) -> bool {
        self.log && !self.has_results() && self.checkpoints.is_empty()
    }

    /// The folders of a run in `path`.
    fn folders(&self, path: &Path) -> Vec<PathBuf> {
        let checkpoints = self.checkpoints.iter().map(|(_, path)| path.clone());
        checkpoints.chain(self.adapter.then(|| path.join(ADAPTER_DIR))).collect()
    }

    /// In words, such as `an adapter, a checkpoint of step 12 and a log`.
    pub(crate) fn describe(&self) -> String {
        let mut parts = Vec::new();
        if self.adapter {
            parts.push("an adapter".to_string());
        }
        match self.checkpoints.as_slice() {
            [] => {}
            [(step, _)] => parts.push(format!("a checkpoint of step {step}")),
            [.., (step, _)] => parts.push(format!("{} checkpoints, the last of step {step}", self.checkpoints.len())),
        }
        if self.report {
            parts.push("a report".into());
        }
        if self.log {
            parts.push(format!("a log ({METRICS_FILE})"));
        }
        match parts.split_last() {
            Some((last, [])) => last.clone(),
            Some((last, before)) => format!("{} and {last}", before.join(", ")),
            None => "nothing of a run".into(),
        }
    }
}

impl RunFolder {
    /// Takes a folder, which is made where it does not exist, and removes what killed processes left half-written in it.
    ///
    /// # Errors
    /// [`TrainError::Held`] names the process that holds it; the folder can't be made or written.
    pub(crate) fn take(path: &Path) -> Result<Self, TrainError> {
        let is_new = !path.exists();
        std::fs::create_dir_all(path).map_err(|source| FormatError::Write { path: path.to_owned(), source })?;
        let lock = match lock(path) {
            Ok(lock) => lock,
            Err(error) => {
                if is_new {
                    let _ = std::fs::remove_dir(path);
                }
                return Err(error);
            }
        };
        let folder = Self { path: path.to_owned(), lock, is_new };
        atomic::clean_leftovers(path)?;
        Ok(folder)
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether nothing keeps another process from the folder, as its file system has no locks.
    pub(crate) fn is_unprotected(&self) -> bool {
        matches!(self.lock, Lock::Unsupported)
    }

    /// Checks that a fresh run may have the folder. Nothing is changed yet.
    ///
    /// # Errors
    /// [`TrainError::Occupied`] when the folder holds a run and `overwrite` is false; a folder that would have to go holds files that
    /// no run writes.
    pub(crate) fn check(&self, overwrite: bool) -> Result<(), TrainError> {
        let contents = Contents::of(&self.path)?;
        if !contents.is_empty() && !overwrite {
            let (path, resumable) = (self.path.clone(), !contents.checkpoints.is_empty());
            return Err(TrainError::Occupied { path, holds: contents.describe(), resumable });
        }
        let folders = contents.folders(&self.path);
        Ok(folders.iter().try_for_each(|folder| atomic::check_dir_of(folder, checkpoint::FILES))?)
    }

    /// Removes the run that lies in the folder, after [`check`](Self::check) allowed it.
    ///
    /// # Errors
    /// Something can't be removed.
    pub(crate) fn clear(&self) -> Result<(), TrainError> {
        for folder in Contents::of(&self.path)?.folders(&self.path) {
            atomic::remove_dir_of(&folder, checkpoint::FILES)?;
        }
        remove_events(&self.path).map_err(|(path, source)| FormatError::Write { path, source })?;
        REPORT_FILES
            .into_iter()
            .chain([METRICS_FILE, MLFLOW_FILE, TRACKIO_FILE])
            .try_for_each(|name| self.remove_file(name))
    }

    /// Prepares the folder for a run that goes on after `step`: what came later gives way. Returns what was done, a sentence each.
    ///
    /// # Errors
    /// Something can't be moved or removed.
    pub(crate) fn go_on_after(&self, step: usize) -> Result<Vec<String>, TrainError> {
        let mut done = Vec::new();
        let adapter = self.path.join(ADAPTER_DIR);
        if adapter.symlink_metadata().is_ok() {
            let aside = self.place_for(finished_step(&self.path));
            std::fs::rename(&adapter, &aside).map_err(|source| FormatError::Write { path: adapter, source })?;
            done.push(format!("the adapter that was finished here before is now {}", aside.display()));
        }
        for name in REPORT_FILES {
            self.remove_file(name)?;
        }
        let mut later = checkpoint::list(&self.path)?;
        later.retain(|(at, _)| *at > step);
        for (_, path) in later.iter().rev() {
            atomic::remove_dir_of(path, checkpoint::FILES)?;
        }
        match later.as_slice() {
            [] => {}
            [(only, _)] => {
                done.push(format!("the run goes back to step {step}: the checkpoint of step {only} is removed"))
            }
            [(first, _), .., (last, _)] => {
                done.push(format!(
                    "the run goes back to step {step}: the checkpoints of steps {first} to {last} are removed"
                ));
            }
        }
        Ok(done)
    }

    /// A name that is free, for the adapter of a step.
    fn place_for(&self, step: Option<usize>) -> PathBuf {
        let name = step.map_or(format!("{ADAPTER_DIR}-before"), |step| format!("{ADAPTER_DIR}-{step:06}"));
        let numbered = (2..).map(|n| self.path.join(format!("{name}-{n}")));
        let mut places = std::iter::once(self.path.join(&name)).chain(numbered);
        places.find(|place| place.symlink_metadata().is_err()).unwrap_or_else(|| self.path.join(name))
    }

    fn remove_file(&self, name: &str) -> Result<(), TrainError> {
        let path = self.path.join(name);
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(FormatError::Write { path, source }.into())
            }
            _ => Ok(()),
        }
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        if let Lock::Held { .. } = self.lock {
            // While the lock is held: whoever waits for this file sees that its name is gone, and makes another.
            let _ = std::fs::remove_file(self.path.join(LOCK_FILE));
        }
        if self.is_new {
            // Only succeeds where nothing was written.
            let _ = std::fs::remove_dir(&self.path);
        }
    }
}

/// Who trains into an output folder right now, as that process says; `None` where nobody does.
///
/// # Errors
/// The lock is there and can't be read.
pub fn run_holder(folder: &Path) -> Result<Option<String>, TrainError> {
    let path = folder.join(LOCK_FILE);
    let read = |source| FormatError::Read { path: path.clone(), source };
    let mut file = match File::open(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(read)?,
    };
    Ok(match file.try_lock_shared() {
        Err(TryLockError::WouldBlock) => Some(holder_of(&mut file)),
        // The process that wrote it is gone.
        _ => None,
    })
}

/// What of a run lies in a folder, in words; `None` where a fresh run may have it.
///
/// # Errors
/// The folder can't be read.
pub fn run_in(folder: &Path) -> Result<Option<String>, TrainError> {
    let contents = Contents::of(folder)?;
    Ok((!contents.is_empty()).then(|| contents.describe()))
}

/// Who holds a lock, as its file says.
fn holder_of(file: &mut File) -> String {
    let mut holder = String::new();
    let _ = file.read_to_string(&mut holder);
    match holder.trim() {
        "" => "another process".to_string(),
        holder => holder.chars().filter(|c| !c.is_control()).take(200).collect(),
    }
}

/// The step after which the adapter of a folder was finished, as its report says.
fn finished_step(path: &Path) -> Option<usize> {
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(path.join(SUMMARY_FILE)).ok()?).ok()?;
    usize::try_from(report.get("steps")?.as_u64()?).ok()
}

fn lock(folder: &Path) -> Result<Lock, TrainError> {
    let path = folder.join(LOCK_FILE);
    let failed = |source| FormatError::Write { path: path.clone(), source };
    loop {
        let options = OpenOptions::new().read(true).write(true).create(true).truncate(false).to_owned();
        let mut file = options.open(&path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(TrainError::Held { path: folder.to_owned(), holder: holder_of(&mut file) });
            }
            Err(TryLockError::Error(error)) if error.kind() == std::io::ErrorKind::Unsupported => {
                return Ok(Lock::Unsupported);
            }
            Err(TryLockError::Error(source)) => return Err(failed(source).into()),
        }
        // The process that held it may have removed its name between opening and locking.
        if !is_at(&file, &path) {
            continue;
        }
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", this_process()))
            .map_err(failed)?;
        return Ok(Lock::Held { _file: file });
    }
}

#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let of = |metadata: std::io::Result<std::fs::Metadata>| metadata.map(|found| (found.dev(), found.ino())).ok();
    let here = of(file.metadata());
    here.is_some() && here == of(std::fs::metadata(path))
}

#[cfg(not(unix))]
fn is_at(_: &File, _: &Path) -> bool {
    // An open file can't be removed there.
    true
}

/// Who this is, for whoever finds the lock.
fn this_process() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").ok().or_else(|| std::env::var("HOSTNAME").ok());
    let host = host.map_or(String::new(), |host| format!(" on {}", host.trim()));
    format!("process {}{host}, since {}", std::process::id(), chrono::Local::now().format("%Y-%m-%d %H:%M:%S"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn write(path: &Path, text: &str) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    #[test]
    fn a_second_run_is_refused_by_the_first_ones_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run");
        let held = RunFolder::take(&path).unwrap();
        let refused = RunFolder::take(&path).unwrap_err().to_string();
        assert!(refused.contains(&format!("process {}", std::process::id())), "{refused}");
        drop(held);
        assert!(!path.exists(), "a folder that was made for nothing goes again");
        // What a killed process left is no obstacle.
        write(&path.join(LOCK_FILE), "process 1, since yesterday");
        drop(RunFolder::take(&path).unwrap());
        assert_eq!(path.read_dir().unwrap().count(), 0);
    }

    #[test]
    fn anything_of_a_run_keeps_a_fresh_one_away() {
        for (file, words) in [
            ("adapter/adapter_config.json", "an adapter"),
            ("summary.json", "a report"),
            (METRICS_FILE, "a log"),
            ("checkpoint-000004/training_state.json", "a checkpoint of step 4"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            write(&dir.path().join(file), "{}");
            write(&dir.path().join("notes.txt"), "the user's own");
            let folder = RunFolder::take(dir.path()).unwrap();
            let refused = folder.check(false).unwrap_err().to_string();
            assert!(refused.contains(words) && refused.contains("--overwrite"), "{refused}");
            assert_eq!(refused.contains("--resume"), file.starts_with("checkpoint"), "{refused}");
            folder.check(true).unwrap();
            folder.clear().unwrap();
            assert!(Contents::of(dir.path()).unwrap().is_empty(), "{file}");
            assert!(dir.path().join("notes.txt").is_file());
        }
    }

    #[test]
    fn a_folder_with_foreign_files_is_never_removed() {
        let dir = tempfile::tempdir().unwrap();
        let thesis = dir.path().join("adapter/thesis.txt");
        write(&thesis, "years of work");
        write(&dir.path().join(METRICS_FILE), "{}");
        let refused = RunFolder::take(dir.path()).unwrap().check(true).unwrap_err().to_string();
        assert!(refused.contains("thesis.txt"), "{refused}");
        assert!(thesis.is_file() && dir.path().join(METRICS_FILE).is_file());
    }

    #[test]
    fn what_came_later_gives_way_and_what_was_finished_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        for step in [4, 6, 8] {
            write(&dir.path().join(format!("checkpoint-{step:06}/training_state.json")), "{}");
        }
        write(&dir.path().join("adapter/adapter_config.json"), "finished");
        write(&dir.path().join(SUMMARY_FILE), r#"{"steps": 8}"#);
        let folder = RunFolder::take(dir.path()).unwrap();
        let done = folder.go_on_after(4).unwrap();
        assert!(done[0].contains("adapter-000008") && done[1].contains("steps 6 to 8"), "{done:?}");
        let kept = std::fs::read_to_string(dir.path().join("adapter-000008/adapter_config.json")).unwrap();
        assert_eq!(kept, "finished");
        assert_eq!(checkpoint::list(dir.path()).unwrap().len(), 1);
        assert!(!dir.path().join(SUMMARY_FILE).exists());
        // The next one that is set aside takes no name that is in use.
        write(&dir.path().join("adapter/adapter_config.json"), "again");
        write(&dir.path().join(SUMMARY_FILE), r#"{"steps": 8}"#);
        assert!(folder.go_on_after(4).unwrap()[0].contains("adapter-000008-2"));
        assert!(folder.go_on_after(4).unwrap().is_empty());
    }
}
