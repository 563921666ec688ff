//! The hub, and a bar that shows how far a download or an upload is.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use burn_qlora::Hub;
use burn_qlora::model_hub::{Direction, OnProgress, Progress, is_hub_id};
use indicatif::{ProgressBar, ProgressStyle};

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

/// What draws the bar. It hides itself where stderr is no terminal, and goes with the last file.
pub fn bar() -> OnProgress {
    let shown = Shown(Mutex::new(None));
    Arc::new(move |progress| shown.update(progress))
}

/// The bar, and the file that it is about.
struct Shown(Mutex<Option<(String, ProgressBar)>>);

impl Shown {
    fn update(&self, progress: &Progress<'_>) {
        let mut shown = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_upload = progress.direction == Direction::Upload;
        // An upload's numbers are of all files.
        let is_new = shown.as_ref().is_none_or(|(file, _)| !is_upload && file != progress.file);
        if is_new {
            if let Some((_, bar)) = shown.take() {
                bar.finish_and_clear();
            }
            *shown = Some((progress.file.to_owned(), new_bar(progress)));
        }
        if let Some((_, bar)) = shown.as_ref() {
            bar.set_position(progress.done_bytes);
            bar.set_message(progress.file.to_owned());
            if progress.total_bytes == Some(progress.done_bytes) {
                bar.finish_and_clear();
            }
        }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        let shown = self.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, bar)) = shown {
            bar.finish_and_clear();
        }
    }
}

fn new_bar(progress: &Progress<'_>) -> ProgressBar {
    let bar = ProgressBar::new(progress.total_bytes.unwrap_or(0));
    let template = match progress.direction {
        Direction::Download => {
            "{msg} {bar:16.cyan/black} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}"
        }
        Direction::Upload => "Uploading {bar:16.cyan/black} {binary_bytes}/{binary_total_bytes} {wide_msg:.dim}",
    };
    bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}
