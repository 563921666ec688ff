//! What the commands that convert write: nothing that exists is replaced unasked, and nothing half-written
//! stays behind.

use std::path::Path;

use anyhow::Result;
use burn_qlora::{Progress, atomic};

use crate::bars::{Bar, Counts, Figure};
use crate::exit::{Code, UsageError};
use crate::output::say;
use crate::signals;

/// Files of which a folder must hold one to be replaced with --force.
const OURS: [&str; 2] = ["config.json", "adapter_config.json"];

/// Checks that a folder may be written, and has Ctrl-C clean up.
pub fn folder(path: &Path, force: bool) -> Result<()> {
    if path.symlink_metadata().is_ok() {
        let says = |text: &str| UsageError(format!("{} {text}", path.display()));
        if !path.is_dir() {
            return Err(says("is a file; give a folder").into());
        }
        let is_empty = path.read_dir().is_ok_and(|mut entries| entries.next().is_none());
        let is_ours = OURS.iter().any(|name| path.join(name).is_file());
        match (is_empty, force) {
            (true, _) => {}
            (false, false) => return Err(says("exists; --force replaces it").into()),
            // A whole folder goes: better not somebody's home.
            (false, true) if !is_ours => {
                return Err(says("holds neither a checkpoint nor an adapter, and is not replaced").into());
            }
            (false, true) => {}
        }
    }
    clean_up_on_interrupt()
}

/// Checks that a file may be written, and has Ctrl-C clean up.
pub fn file(path: &Path, force: bool) -> Result<()> {
    files(&[path], force)
}

/// [`file()`] for several.
pub fn files(paths: &[&Path], force: bool) -> Result<()> {
    paths.iter().try_for_each(|path| check_file(path, force))?;
    clean_up_on_interrupt()
}

fn check_file(path: &Path, force: bool) -> Result<(), UsageError> {
    if path.is_dir() {
        return Err(UsageError(format!("{} is a folder; give a file", path.display())));
    }
    if path.symlink_metadata().is_ok() && !force {
        return Err(UsageError(format!("{} exists; --force replaces it", path.display())));
    }
    Ok(())
}

fn clean_up_on_interrupt() -> Result<()> {
    signals::on_interrupt(|| {
        let nothing = if atomic::abandon_all() { "; nothing was written" } else { "" };
        say!("\nInterrupted{nothing}.");
        std::process::exit(Code::Interrupted as i32);
    })
}

/// Shows how far a conversion is.
pub struct ConvertBar {
    what: &'static str,
    bar: Option<Bar>,
}

impl ConvertBar {
    /// Nothing is shown before the first call of [`ConvertBar::update`].
    pub fn new(what: &'static str) -> Self {
        Self { what, bar: None }
    }

    /// Shows the progress.
    pub fn update(&mut self, progress: &Progress<'_>) {
        let bar = self.bar.get_or_insert_with(|| Bar::new(self.what, progress.total_bytes, Counts::Bytes));
        bar.at(progress.done_bytes);
        bar.show(vec![Figure::name(progress.tensor)]);
    }

    /// Removes the bar.
    pub fn finish(&mut self) {
        self.bar = None;
    }
}
