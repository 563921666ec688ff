//! Event files of TensorBoard. Each start of a run writes one; TensorBoard reads all files of a folder as one run.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::tfevents::{self, Value};
use super::{Beginning, Sink, texts};
use crate::answers::Answer;
use crate::report::Outcome;

/// The folder in a run's output folder.
const FOLDER: &str = "tensorboard";
/// How names of event files begin.
const PREFIX: &str = "events.out.tfevents.";

/// A file of events.
pub(super) struct EventFile {
    file: File,
    path: PathBuf,
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

impl EventFile {
    /// A new file in a run's folder, which takes the place of what earlier ones have behind the steps that are done.
    pub(super) fn create(Beginning { folder, settings, step }: Beginning<'_>) -> Result<Self, String> {
        let folder = folder.join(FOLDER);
        std::fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        let name = |number: usize| format!("{PREFIX}{:010}.{}.{number}", now() as u64, std::process::id());
        let names = (0..1000).map(|number| folder.join(name(number)));
        let mut opened = Err(format!("{}: no name is free for an event file", folder.display()));
        for path in names {
            match File::create_new(&path) {
                Ok(file) => {
                    opened = Ok(Self { file, path });
                    break;
                }
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(format!("{}: {error}", path.display())),
            }
        }
        let mut events = opened?;
        events.write(&tfevents::version(now()))?;
        if step > 0 {
            events.write(&tfevents::restart(now(), step as u64 + 1))?;
        }
        let rows: String =
            settings.iter().map(|(key, value)| format!("| {key} | {} |\n", cell(&value.to_string()))).collect();
        let text = format!("| key | value |\n|---|---|\n{rows}");
        events.texts(step, [("configuration".into(), text)])?;
        Ok(events)
    }

    fn texts(&mut self, step: usize, texts: impl IntoIterator<Item = (String, String)>) -> Result<(), String> {
        let texts: Vec<_> = texts.into_iter().collect();
        let values: Vec<_> = texts.iter().map(|(tag, text)| (tag.as_str(), Value::Text(text))).collect();
        self.write(&tfevents::values(now(), step as u64, &values))
    }

    fn write(&mut self, record: &[u8]) -> Result<(), String> {
        self.file.write_all(record).map_err(|error| format!("{}: {error}", self.path.display()))
    }
}

/// What a table of Markdown can hold.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

impl Sink for EventFile {
    fn scalars(&mut self, step: usize, values: &[(&'static str, f64)]) -> Result<(), String> {
        let values: Vec<_> = values.iter().map(|(tag, value)| (*tag, Value::Scalar(*value as f32))).collect();
        self.write(&tfevents::values(now(), step as u64, &values))
    }

    fn answers(&mut self, step: usize, answers: &[Answer]) -> Result<(), String> {
        self.texts(step, texts(answers))
    }

    fn finish(&mut self, _: Option<Outcome>) -> Result<(), String> {
        self.file.sync_data().map_err(|error| format!("{}: {error}", self.path.display()))
    }
}

/// Removes the event files of the run in a folder, and their own folder where nothing else is in it.
///
/// # Errors
/// A file can't be removed, with its path.
pub(crate) fn remove_events(folder: &Path) -> Result<(), (PathBuf, std::io::Error)> {
    let folder = folder.join(FOLDER);
    let Ok(entries) = std::fs::read_dir(&folder) else { return Ok(()) };
    for entry in entries {
        let path = entry.map_err(|error| (folder.clone(), error))?.path();
        if path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(PREFIX)) {
            std::fs::remove_file(&path).map_err(|error| (path, error))?;
        }
    }
    // Only succeeds where nothing else lies in it.
    let _ = std::fs::remove_dir(&folder);
    Ok(())
}
