//! Whether a run that was stopped again and again left what an unbroken one leaves.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

/// Keys of a line in `metrics.jsonl` that tell of time and memory.
const VOLATILE: [&str; 7] = [
    "tokens_per_second",
    "memory_bytes",
    "memory_in_use_bytes",
    "memory_reserved_bytes",
    "paging",
    "elapsed_seconds",
    "eval_seconds",
];
const METRICS: &str = "metrics.jsonl";
const STATE: &str = "training_state.json";
const PREFIX: &str = "checkpoint-";
/// Files whose bytes do not depend on when a run was stopped.
const SAME_BYTES: [&str; 2] = ["adapter_model.safetensors", "optimizer.safetensors"];

/// The first difference between two runs, in words.
pub(crate) type Difference = Result<(), String>;

/// How many checkpoints may be there, and which.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kept {
    /// `train.save_limit`; 0 keeps all.
    pub(crate) limit: usize,
    /// Whether they are those of the unbroken run: a stop by a signal saves at its own step.
    pub(crate) same: bool,
}

/// Compares the output folder of a run with that of the unbroken one.
pub(crate) fn compare(unbroken: &Path, run: &Path, kept: Kept) -> Result<Difference> {
    let result = metrics(unbroken, run)?.and(adapter(unbroken, run)?);
    Ok(match result {
        Ok(()) => leftovers(unbroken, run, kept)?,
        different => different,
    })
}

/// The newest checkpoint of an output folder that a run can go on from.
pub(crate) fn newest(output: &Path) -> Option<usize> {
    let entries = fs::read_dir(output).ok()?.flatten();
    entries.filter(|entry| entry.path().join(STATE).is_file()).filter_map(|entry| step_of(&entry.path())).max()
}

/// The last step that the log holds as a whole line; 0 where there is none.
pub(crate) fn last_step(output: &Path) -> usize {
    let text = fs::read_to_string(output.join(METRICS)).unwrap_or_default();
    let steps = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let steps = steps.filter(|line| line.get("loss").is_some());
    steps.filter_map(|line| line.get("step")?.as_u64()).max().unwrap_or(0) as usize
}

fn step_of(path: &Path) -> Option<usize> {
    path.file_name()?.to_str()?.strip_prefix(PREFIX)?.parse().ok()
}

/// The lines of both logs, but for times and memory.
fn metrics(unbroken: &Path, run: &Path) -> Result<Difference> {
    let (expected, got) = (lines(unbroken)?, lines(run)?);
    for (number, (expected, got)) in expected.iter().zip(&got).enumerate() {
        if expected != got {
            return Ok(Err(format!("{METRICS}:{}: expected {expected}, got {got}", number + 1)));
        }
    }
    Ok(match (expected.len(), got.len()) {
        (expected, got) if expected == got => Ok(()),
        (expected, got) => Err(format!("{METRICS}: expected {expected} lines, got {got}")),
    })
}

fn lines(output: &Path) -> Result<Vec<Value>> {
    let path = output.join(METRICS);
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let parse = |(number, line): (usize, &str)| {
        let mut line: Value =
            serde_json::from_str(line).with_context(|| format!("{}:{}", path.display(), number + 1))?;
        if let Some(line) = line.as_object_mut() {
            line.retain(|key, _| !VOLATILE.contains(&key.as_str()));
        }
        Ok(line)
    };
    text.lines().enumerate().map(parse).collect()
}

/// The final adapter: the same files, and the same bytes of its weights.
fn adapter(unbroken: &Path, run: &Path) -> Result<Difference> {
    same_files(&unbroken.join("adapter"), &run.join("adapter"))
}

fn same_files(expected: &Path, got: &Path) -> Result<Difference> {
    if !got.is_dir() {
        return Ok(Err(format!("there is no {}", got.display())));
    }
    let (names, found) = (names(expected)?, names(got)?);
    if names != found {
        return Ok(Err(format!("{}: expected the files {names:?}, got {found:?}", got.display())));
    }
    for name in SAME_BYTES.iter().filter(|name| names.contains_key(**name)) {
        let (a, b) = (hash(&expected.join(name))?, hash(&got.join(name))?);
        if a != b {
            return Ok(Err(format!("{}: expected sha256 {a}, got {b}", got.join(name).display())));
        }
    }
    Ok(Ok(()))
}

/// The entries of both folders, and what is in the checkpoints.
fn leftovers(unbroken: &Path, run: &Path, kept: Kept) -> Result<Difference> {
    let is_checkpoint = |name: &String| name.starts_with(PREFIX);
    let (mut expected, mut got) = (names(unbroken)?, names(run)?);
    let there: Vec<String> = got.keys().filter(|name| is_checkpoint(name)).cloned().collect();
    if !kept.same {
        expected.retain(|name, _| !is_checkpoint(name));
        got.retain(|name, _| !is_checkpoint(name));
    }
    if expected != got {
        let extra: Vec<&String> = got.keys().filter(|name| !expected.contains_key(*name)).collect();
        let missing: Vec<&String> = expected.keys().filter(|name| !got.contains_key(*name)).collect();
        return Ok(Err(format!("{}: left over: {extra:?}; missing: {missing:?}", run.display())));
    }
    if kept.limit > 0 && there.len() > kept.limit {
        return Ok(Err(format!("{}: {} checkpoints, save_limit is {}", run.display(), there.len(), kept.limit)));
    }
    let last = last_checkpoint(unbroken)?;
    for name in there {
        let path = run.join(&name);
        // Each has the files of the unbroken run's; one of the same step has the same bytes, too.
        let twin = unbroken.join(&name);
        let difference = match twin.is_dir() {
            true => same_files(&twin, &path)?,
            false => match (names(&last)?, names(&path)?) {
                (expected, got) if expected == got => Ok(()),
                (expected, got) => Err(format!("{}: expected the files {expected:?}, got {got:?}", path.display())),
            },
        };
        if difference.is_err() {
            return Ok(difference);
        }
    }
    Ok(hidden(run)?.map_or(Ok(()), |path| Err(format!("left over: {}", path.display()))))
}

fn last_checkpoint(output: &Path) -> Result<PathBuf> {
    let newest = newest(output).with_context(|| format!("{}: no checkpoint", output.display()))?;
    Ok(output.join(format!("{PREFIX}{newest:06}")))
}

/// Names in a folder, and whether they are folders.
fn names(folder: &Path) -> Result<BTreeMap<String, bool>> {
    let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let name = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry?;
        Ok((entry.file_name().to_string_lossy().into_owned(), entry.path().is_dir()))
    };
    entries.map(name).collect()
}

/// The first hidden entry below a folder. A lock that stays with its run is none.
fn hidden(folder: &Path) -> Result<Option<PathBuf>> {
    for (name, is_dir) in names(folder)? {
        let path = folder.join(&name);
        let is_lock = name.ends_with("lock") && !is_dir;
        if name.starts_with('.') && !is_lock {
            return Ok(Some(path));
        }
        if is_dir && let Some(found) = hidden(&path)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

fn hash(path: &Path) -> Result<String> {
    let bytes = fs::read(path).with_context(|| path.display().to_string())?;
    Ok(Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const LINES: &str = "{\"step\":0,\"eval_loss\":9.5,\"elapsed_seconds\":0.1}\n\
        {\"step\":1,\"loss\":8.25,\"memory_bytes\":5,\"elapsed_seconds\":1.5}\n\
        {\"step\":2,\"loss\":7.5,\"tokens_per_second\":3.0}\n";

    /// A run of two steps, whose checkpoints are those of `steps`.
    fn run(dir: &Path, steps: &[usize]) {
        fs::create_dir_all(dir.join("adapter")).unwrap();
        fs::write(dir.join("adapter/adapter_model.safetensors"), "weights").unwrap();
        fs::write(dir.join("adapter/README.md"), "at noon").unwrap();
        fs::write(dir.join(METRICS), LINES).unwrap();
        for step in steps {
            let checkpoint = dir.join(format!("{PREFIX}{step:06}"));
            fs::create_dir_all(&checkpoint).unwrap();
            fs::write(checkpoint.join("optimizer.safetensors"), format!("moments {step}")).unwrap();
            fs::write(checkpoint.join(STATE), "{}").unwrap();
        }
    }

    /// What `change` makes of a run that was like the unbroken one.
    fn difference(kept: Kept, change: impl FnOnce(&Path)) -> Difference {
        let dir = tempfile::tempdir().unwrap();
        let (unbroken, other) = (dir.path().join("a"), dir.path().join("b"));
        run(&unbroken, &[1, 2]);
        run(&other, &[1, 2]);
        change(&other);
        compare(&unbroken, &other, kept).unwrap()
    }

    const STRICT: Kept = Kept { limit: 2, same: true };

    #[test]
    fn times_and_memory_may_differ() {
        assert_eq!(difference(STRICT, |_| ()), Ok(()));
        let later = LINES.replace("1.5", "99.5").replace("\"memory_bytes\":5", "\"memory_bytes\":6");
        assert_eq!(difference(STRICT, |dir| fs::write(dir.join(METRICS), later).unwrap()), Ok(()));
        assert_eq!(difference(STRICT, |dir| fs::write(dir.join("adapter/README.md"), "at night").unwrap()), Ok(()));
        // A lock that stays.
        let kept = Kept { limit: 2, same: true };
        let with_lock = |dir: &Path| {
            for dir in [dir, &dir.with_file_name("a")] {
                fs::write(dir.join(".lock"), "").unwrap();
            }
        };
        assert_eq!(difference(kept, with_lock), Ok(()));
    }

    #[test]
    fn every_kind_of_difference_is_found() {
        type Case = (&'static str, fn(&Path));
        let cases: [Case; 11] = [
            ("metrics.jsonl:2: ", |dir| fs::write(dir.join(METRICS), LINES.replace("8.25", "8.250001")).unwrap()),
            ("metrics.jsonl:3: ", |dir| {
                let doubled = LINES.replacen("{\"step\":2", "{\"step\":1,\"loss\":8.25}\n{\"step\":2", 1);
                fs::write(dir.join(METRICS), doubled).unwrap();
            }),
            ("expected 3 lines, got 2", |dir| {
                let two: String = LINES.split_inclusive('\n').take(2).collect();
                fs::write(dir.join(METRICS), two).unwrap();
            }),
            ("adapter_model.safetensors: expected sha256", |dir| {
                fs::write(dir.join("adapter/adapter_model.safetensors"), "weightz").unwrap();
            }),
            ("there is no ", |dir| fs::remove_dir_all(dir.join("adapter")).unwrap()),
            ("optimizer.safetensors: expected sha256", |dir| {
                fs::write(dir.join("checkpoint-000002/optimizer.safetensors"), "x").unwrap();
            }),
            ("expected the files", |dir| fs::remove_file(dir.join("checkpoint-000001").join(STATE)).unwrap()),
            ("left over: [\".checkpoint-000001.new-x\"]", |dir| {
                fs::create_dir(dir.join(".checkpoint-000001.new-x")).unwrap();
            }),
            ("left over: [\"checkpoint-000007\"]", |dir| fs::create_dir(dir.join("checkpoint-000007")).unwrap()),
            ("missing: [\"checkpoint-000001\"]", |dir| fs::remove_dir_all(dir.join("checkpoint-000001")).unwrap()),
            ("expected the files", |dir| fs::write(dir.join("adapter/.x"), "").unwrap()),
        ];
        for (message, change) in cases {
            let found = difference(STRICT, change).unwrap_err();
            assert!(found.contains(message), "{message}: {found}");
        }
    }

    #[test]
    fn a_stop_may_save_at_its_own_step_but_not_more() {
        let own = |dir: &Path| {
            fs::rename(dir.join("checkpoint-000001"), dir.join("checkpoint-000003")).unwrap();
        };
        assert!(difference(STRICT, own).is_err());
        let kept = Kept { limit: 2, same: false };
        assert_eq!(difference(kept, own), Ok(()));
        let stub = |dir: &Path| {
            own(dir);
            fs::remove_file(dir.join("checkpoint-000003").join(STATE)).unwrap();
        };
        assert!(difference(kept, stub).unwrap_err().contains("expected the files"));
        let three = |dir: &Path| run(dir, &[1, 2, 3]);
        assert!(difference(kept, three).unwrap_err().contains("3 checkpoints, save_limit is 2"));
    }

    #[test]
    fn where_a_run_stands_is_read_from_whole_lines_and_checkpoints() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!((newest(dir.path()), last_step(dir.path())), (None, 0));
        run(dir.path(), &[1, 2]);
        fs::create_dir(dir.path().join("checkpoint-000009")).unwrap();
        fs::write(dir.path().join(METRICS), format!("{LINES}{{\"step\":3,\"lo")).unwrap();
        assert_eq!((newest(dir.path()), last_step(dir.path())), (Some(2), 2));
    }
}
