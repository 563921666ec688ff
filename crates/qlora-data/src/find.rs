//! From sources to files.
//!
//! A file is itself. A folder and a data set of the hub hold several, of which those of one split are read (`find/repository.rs`). A path
//! with `*`, `?` or `[` is a glob where there is no file of that name; what it finds is read in the order of the names.

mod repository;

use std::path::{Path, PathBuf};

use model_hub::{Hub, is_hub_id};
use serde_json::Value as Json;

use crate::error::DataError;
use crate::sources::Source;
use crate::words::list;

use repository::{Chosen, choose, is_rows};
pub(crate) use repository::{Role, Wanted};

/// The files of a source.
#[derive(Debug)]
pub(crate) struct Found {
    pub files: Vec<PathBuf>,
    /// Whether they are chosen among those of a folder or data set.
    pub are_chosen: bool,
    /// What a user should know of them.
    pub notes: Vec<String>,
}

/// Finds the files of a source.
///
/// # Errors
/// There are none, or it is not clear which; what there is, and what to say.
pub(crate) fn files(source: &Source, wanted: &Wanted<'_>, hub: Option<&Hub>) -> Result<Found, DataError> {
    let path = source.path.as_path();
    let fail = |problem: String| DataError::Source { path: path.to_owned(), problem };
    let is_local = path.exists();
    if path.is_dir() {
        wanted.without_revision("a folder").map_err(fail)?;
        return folder(path, wanted).map_err(fail);
    }
    if is_local {
        wanted.of_a_file("a file").map_err(fail)?;
        return Ok(Found { files: vec![path.to_owned()], are_chosen: false, notes: Vec::new() });
    }
    let Some(text) = path.to_str() else { return Err(fail("there is no such file".into())) };
    if text.contains(['*', '?', '[']) {
        wanted.of_a_file("a glob").map_err(fail)?;
        return globbed(text).map_err(fail);
    }
    // What has the name of a file is no data set.
    if !is_hub_id(text) || is_rows(text) || !text.contains('/') {
        let source = std::io::Error::from(std::io::ErrorKind::NotFound);
        return Err(match neighbours(path) {
            Some(problem) => fail(problem),
            None => DataError::Read { path: path.to_owned(), source },
        });
    }
    let of_env;
    let hub = match hub {
        Some(hub) => hub,
        None => {
            of_env = Hub::from_env();
            &of_env
        }
    };
    let data_set = hub.data_set(text, wanted.revision)?;
    let Chosen { files, notes } = choose(data_set.files(), data_set.card(), wanted).map_err(fail)?;
    let folder = data_set.fetch(&files.iter().map(String::as_str).collect::<Vec<_>>())?;
    Ok(Found { files: files.iter().map(|file| folder.join(file)).collect(), are_chosen: true, notes })
}

/// The rows that a folder holds.
fn folder(path: &Path, wanted: &Wanted<'_>) -> Result<Found, String> {
    let mut names = Vec::new();
    walk(path, "", &mut names).map_err(|error| error.to_string())?;
    names.sort();
    if names.iter().any(|name| name.ends_with(".arrow")) && !names.iter().any(|name| is_rows(name)) {
        return Err(format!(
            "holds Arrow files, as `save_to_disk` writes them: `python3 -c \"import datasets, sys; \
             datasets.load_from_disk(sys.argv[1]).to_parquet(sys.argv[2])\" {0} {0}.parquet` writes its rows as Parquet",
            path.display()
        ));
    }
    let card = std::fs::read_to_string(path.join("README.md")).map_or(Json::Null, |text| card(&text));
    let Chosen { files, notes } = choose(&names, &card, wanted)?;
    Ok(Found { files: files.iter().map(|file| path.join(file)).collect(), are_chosen: true, notes })
}

/// Paths of all files below a folder but hidden ones, written with `/`.
fn walk(folder: &Path, prefix: &str, names: &mut Vec<String>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with('.') {
            continue;
        }
        let path = entry.path();
        // Folders behind links are not entered: they may lead back.
        match path.is_dir() {
            true if entry.file_type()?.is_symlink() => {}
            true => walk(&path, &format!("{prefix}{name}/"), names)?,
            false => names.push(format!("{prefix}{name}")),
        }
    }
    Ok(())
}

/// What stands between the lines `---` at the beginning of a README; null if there is nothing that can be read.
fn card(text: &str) -> Json {
    let text = text.strip_prefix("---").and_then(|rest| rest.split_once("\n---"));
    text.and_then(|(card, _)| serde_yaml_ng::from_str(card).ok()).unwrap_or_default()
}

fn globbed(pattern: &str) -> Result<Found, String> {
    let paths =
        glob::glob(pattern).map_err(|error| format!("is no glob: {} at character {}", error.msg, error.pos + 1))?;
    let mut files = Vec::new();
    for path in paths {
        let path = path.map_err(|error| error.to_string())?;
        if path.is_file() {
            files.push(path);
        }
    }
    match files.is_empty() {
        true => Err("no file has such a name; relative paths start at the current directory".into()),
        false => {
            one_kind(files.iter().map(|path| path.to_string_lossy().into_owned()))?;
            Ok(Found { files, are_chosen: false, notes: Vec::new() })
        }
    }
}

/// Refuses files of several kinds: they are likely the same rows twice.
fn one_kind(names: impl Iterator<Item = String>) -> Result<(), String> {
    repository::one_kind(&names.collect::<Vec<_>>())
}

/// What is in the folder that a file would be in.
fn neighbours(path: &Path) -> Option<String> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty() && parent.is_dir())?;
    let entries = std::fs::read_dir(parent).ok()?.flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.retain(|name| is_rows(name));
    names.sort();
    Some(format!("there is no such file; of files with rows {} has {}", parent.display(), list(&names)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_stands_at_the_beginning_of_a_readme() {
        let read = card("---\nconfigs:\n- config_name: main\n  data_files: \"*.parquet\"\n---\n# Rows\n---\n");
        assert_eq!(read["configs"][0]["config_name"], "main");
        for text in ["# Rows", "---\nno: [end", "", "---\n: :\n---\n"] {
            assert!(card(text).get("configs").is_none(), "{text}");
        }
    }
}
