//! Where a run starts: afresh, or at a checkpoint that it may go on from.

use std::path::{Path, PathBuf};

use crate::checkpoint::{self, TrainingCheckpoint};
use crate::error::TrainError;
use crate::run_folder::{Contents, RunFolder};

/// Where a run starts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Resume {
    /// At the beginning.
    #[default]
    No,
    /// At the newest checkpoint of the output folder.
    Auto,
    /// At the newest checkpoint of the output folder, or at the beginning when there is none: for launchers that start and restart a
    /// run with one command.
    AutoOrStart,
    /// At this checkpoint. One that lies outside the output folder begins a run of its own there.
    From(PathBuf),
}

/// How a run starts, and what it may replace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Start {
    /// Where.
    pub resume: Resume,
    /// Whether a run that lies in the output folder is removed.
    pub overwrite: bool,
    /// Whether a checkpoint is resumed although settings, rows or the base are others than those it was made with. Each
    /// difference is told either way.
    pub accept_changes: bool,
}

impl From<Resume> for Start {
    fn from(resume: Resume) -> Self {
        Self { resume, ..Self::default() }
    }
}

/// The checkpoint that a run goes on from.
pub(super) struct Resumed {
    pub checkpoint: TrainingCheckpoint,
    /// Whether it belongs to the run in the output folder.
    pub same_run: bool,
}

impl Resumed {
    /// Finds the checkpoint, and checks that the folder may be written. Nothing is changed yet.
    ///
    /// # Errors
    /// There is nothing to resume, the checkpoint is damaged, or the folder holds another run.
    pub fn find(folder: &RunFolder, start: &Start) -> Result<Option<Self>, TrainError> {
        let path = folder.path();
        let newest = || Ok::<_, TrainError>(checkpoint::list(path)?.pop().map(|(_, path)| path));
        let (from, same_run) = match &start.resume {
            Resume::No => (None, false),
            Resume::Auto => {
                let holds = Contents::of(path)?.describe();
                let nothing =
                    || TrainError::NothingToResume { path: path.to_owned(), holds: format!("it holds {holds}") };
                (Some(newest()?.ok_or_else(nothing)?), true)
            }
            Resume::AutoOrStart => (newest()?, true),
            Resume::From(from) => (Some(from.clone()), lies_in(from, path)),
        };
        match from {
            Some(from) => {
                if !same_run {
                    folder.check(start.overwrite)?;
                }
                Ok(Some(Self { checkpoint: checkpoint::load(&from)?, same_run }))
            }
            None => {
                // A log alone is what a kill before the first checkpoint leaves: a launcher starts over.
                let launcher = start.resume == Resume::AutoOrStart && Contents::of(path)?.is_log_alone();
                folder.check(start.overwrite || launcher)?;
                Ok(None)
            }
        }
    }
}

fn lies_in(checkpoint: &Path, folder: &Path) -> bool {
    let real = |path: &Path| path.canonicalize().ok();
    real(checkpoint).and_then(|path| real(path.parent()?)).is_some_and(|parent| real(folder) == Some(parent))
}
