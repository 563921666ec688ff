//! The hub, and a bar that shows how far a download or an upload is.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use burn_qlora::Hub;
use burn_qlora::model_hub::{Direction, OnProgress, Progress, is_hub_id};

use crate::bars::{Bar, Counts, Figure};
use crate::exit::InputError;

/// The hub of the environment.
pub fn hub() -> Hub {
    Hub { progress: Some(bar()), ..Hub::from_env() }
}

/// Finds the folder of a model or adapter.
pub fn resolve(model: &str, revision: Option<&str>) -> Result<PathBuf> {
    hub().resolve(model, revision).map_err(|error| match neighbours(model) {
        Some(told) if !is_hub_id(model) => InputError(told).into(),
        // What the hub says of it comes second: a folder was meant, or nearly.
        Some(told) => anyhow::Error::from(error).context(told),
        None => error.into(),
    })
}

/// Folders named where one is not.
const NAMED: usize = 8;

/// What is in the folder that `model` would be in, where that is there and `model` is not.
fn neighbours(model: &str) -> Option<String> {
    let path = Path::new(model);
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty() && parent.is_dir())?;
    if path.exists() {
        return None;
    }
    let folders = std::fs::read_dir(parent).ok()?.flatten().filter(|entry| entry.path().is_dir());
    let mut names: Vec<String> = folders.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    let more = if names.len() > NAMED { ", .." } else { "" };
    names.truncate(NAMED);
    let there = if names.is_empty() { "no folders".into() } else { names.join(", ") + more };
    Some(format!("{model}: there is no such folder; {} has {there}", parent.display()))
}

/// What draws the bar. It goes with the last file.
pub fn bar() -> OnProgress {
    let shown = Mutex::new(None);
    Arc::new(move |progress| update(&mut shown.lock().unwrap_or_else(PoisonError::into_inner), progress))
}

/// Renews the bar, which is shown with the file that it is about.
fn update(shown: &mut Option<(String, Bar)>, progress: &Progress<'_>) {
    let is_upload = progress.direction == Direction::Upload;
    // An upload's numbers are of all files.
    if shown.as_ref().is_none_or(|(file, _)| !is_upload && file != progress.file) {
        // The old one first: the new one would be drawn below it.
        *shown = None;
        let what = if is_upload { "Uploading" } else { "Downloading" };
        let bar = Bar::new(what, progress.total_bytes.unwrap_or(0), Counts::Bytes);
        *shown = Some((progress.file.to_owned(), bar));
    }
    if let Some((_, bar)) = shown {
        bar.at(progress.done_bytes);
        bar.show(vec![Figure::name(progress.file)]);
    }
    if progress.total_bytes == Some(progress.done_bytes) {
        *shown = None;
    }
}
