//! What killed processes leave, and the removal of folders.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use adapter_io::atomic::{self, clean_leftovers, remove_dir_of};
use adapter_io::{Dtype, FormatError, ShardedWriter, TensorSpec};

const KNOWN: &[&str] = &["adapter_config.json", "state.json"];

/// The names in a folder, sorted.
fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn folder_with(path: &Path, files: &[&str]) {
    fs::create_dir_all(path).unwrap();
    for file in files {
        fs::write(path.join(file), "content").unwrap();
    }
}

#[test]
#[cfg(unix)]
fn leftovers_of_every_kind_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    folder_with(&at(".checkpoint-000003.new-aB3dE6"), KNOWN);
    folder_with(&at(".checkpoint-000002.removed-000000/dir"), &["state.json"]);
    folder_with(&at(".checkpoint-000001.removed-zzzzzz"), &[]);
    folder_with(&at(".adapter.old-abcdef/dir"), KNOWN);
    folder_with(&at("adapter"), KNOWN);
    fs::write(at(".metrics.jsonl.new-123456"), "half").unwrap();
    let removed = clean_leftovers(dir.path()).unwrap();
    let removed: Vec<_> = removed.iter().map(|p| p.file_name().unwrap().to_str().unwrap()).collect();
    let expected = [
        ".adapter.old-abcdef",
        ".checkpoint-000001.removed-zzzzzz",
        ".checkpoint-000002.removed-000000",
        ".checkpoint-000003.new-aB3dE6",
        ".metrics.jsonl.new-123456",
    ];
    assert_eq!(removed, expected);
    assert_eq!(names(dir.path()), ["adapter"]);
    assert_eq!(clean_leftovers(dir.path()).unwrap(), Vec::<std::path::PathBuf>::new());
    assert_eq!(clean_leftovers(&at("nowhere")).unwrap(), Vec::<std::path::PathBuf>::new());
}

#[test]
fn nothing_of_others_is_touched() {
    let dir = tempfile::tempdir().unwrap();
    let theirs = [
        ".gitignore",
        ".x.new-12345",
        ".x.new-1234567",
        ".x.new-12-456",
        ".x.newer-123456",
        ".new-123456",
        "..new-123456",
        "x.new-123456",
        "thesis.old-123456",
    ];
    folder_with(dir.path(), &theirs);
    folder_with(&dir.path().join(".git"), &["HEAD"]);
    let before = names(dir.path());
    assert_eq!(clean_leftovers(dir.path()).unwrap(), Vec::<std::path::PathBuf>::new());
    assert_eq!(names(dir.path()), before);
}

#[test]
#[cfg(unix)]
fn a_link_with_such_a_name_is_left_alone() {
    let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    folder_with(elsewhere.path(), KNOWN);
    std::os::unix::fs::symlink(elsewhere.path(), dir.path().join(".x.new-123456")).unwrap();
    assert_eq!(clean_leftovers(dir.path()).unwrap(), Vec::<std::path::PathBuf>::new());
    assert_eq!(names(elsewhere.path()), KNOWN);
}

#[test]
#[cfg(unix)]
fn work_in_progress_is_no_leftover() {
    let dir = tempfile::tempdir().unwrap();
    let scratch = atomic::Scratch::beside(&dir.path().join("out")).unwrap();
    let specs = vec![TensorSpec::new("a", Dtype::U8, &[4])];
    let mut writer = ShardedWriter::create(dir.path(), specs, 1 << 20).unwrap();
    assert_eq!(clean_leftovers(dir.path()).unwrap(), Vec::<std::path::PathBuf>::new());
    writer.write("a", &[1, 2, 3, 4]).unwrap();
    writer.finish().unwrap();
    drop(scratch);
    atomic::replace_dir::<FormatError>(&dir.path().join("out"), |_| {
        assert_eq!(clean_leftovers(dir.path())?, Vec::<std::path::PathBuf>::new());
        Ok(())
    })
    .unwrap();
    assert_eq!(names(dir.path()), ["model.safetensors", "out"]);
}

#[test]
#[cfg(unix)]
fn what_was_moved_aside_for_nothing_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    folder_with(&dir.path().join(".checkpoint-000004.old-abcdef/dir"), KNOWN);
    clean_leftovers(dir.path()).unwrap();
    assert_eq!(names(dir.path()), ["checkpoint-000004"]);
    assert_eq!(names(&dir.path().join("checkpoint-000004")), KNOWN);
}

#[test]
fn a_folder_of_known_files_goes_and_one_with_others_stays() {
    let dir = tempfile::tempdir().unwrap();
    let old = dir.path().join("checkpoint-000001");
    folder_with(&old, &["adapter_config.json", ".state.json.new-a1b2c3"]);
    remove_dir_of(&old, KNOWN).unwrap();
    assert_eq!(names(dir.path()), Vec::<String>::new());
    remove_dir_of(&old, KNOWN).unwrap();

    folder_with(&old, &["state.json", "thesis.txt"]);
    let message = remove_dir_of(&old, KNOWN).unwrap_err().to_string();
    assert!(message.contains("thesis.txt") && message.contains("checkpoint-000001"), "{message}");
    fs::remove_file(old.join("thesis.txt")).unwrap();
    // A folder is not the file that its name says.
    fs::create_dir(old.join("adapter_config.json")).unwrap();
    assert!(remove_dir_of(&old, KNOWN).unwrap_err().to_string().contains("adapter_config.json"));
    assert_eq!(names(dir.path()), ["checkpoint-000001"]);
    assert_eq!(names(&old), KNOWN);
}

#[test]
#[cfg(unix)]
fn links_are_not_followed() {
    let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    folder_with(elsewhere.path(), KNOWN);
    let link = dir.path().join("checkpoint-000001");
    std::os::unix::fs::symlink(elsewhere.path(), &link).unwrap();
    assert!(matches!(remove_dir_of(&link, KNOWN), Err(FormatError::Remove { .. })));
    assert_eq!(names(elsewhere.path()), KNOWN);
    assert_eq!(names(dir.path()), ["checkpoint-000001"]);
}
