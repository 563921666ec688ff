//! Which files of a folder or of a data set of the hub are read.
//!
//! A data set says it in its README (`configs`, with `data_files` for each split), or by the names of its files, as in Hugging Face
//! `datasets`: `train` is a word of the path. What the names leave open is asked for and not guessed.

use std::collections::{BTreeMap, BTreeSet};

use glob::{MatchOptions, Pattern};
use serde_json::Value as Json;

use crate::words::list;

/// Words of a path that name a split, as in `datasets/data_files.py`.
const SPLITS: [(&str, &[&str]); 3] = [
    ("train", &["train", "training"]),
    ("validation", &["validation", "valid", "dev", "val"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
];

/// What rows are for, which decides on the split that is read where none is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Train,
    Eval,
}

/// What of a folder or data set is wanted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    pub role: Role,
    pub subset: Option<&'a str>,
    /// Whether the subset is said of all sources, some of which may be files.
    pub subset_is_of_all: bool,
    /// The name of a split.
    pub split: Option<&'a str>,
    /// A glob, relative to it.
    pub files: Option<&'a str>,
    pub revision: Option<&'a str>,
}

impl Wanted<'_> {
    /// Refuses what has no meaning beside a file of its own.
    pub fn of_a_file(&self, what: &str) -> Result<(), String> {
        self.without_revision(what)?;
        let own_subset = self.subset.filter(|_| !self.subset_is_of_all);
        for (name, value) in [("subset", own_subset), ("files", self.files)] {
            if let Some(value) = value {
                return Err(format!(
                    "{name} = {value:?} chooses among the files of a folder or hub id, and this is {what}"
                ));
            }
        }
        match self.split {
            Some(split) if split != "train" => Err(format!(
                "split = {split:?} chooses among the files of a folder or hub id, and this is {what}; a part of it is \"[:5%]\""
            )),
            _ => Ok(()),
        }
    }

    pub fn without_revision(&self, what: &str) -> Result<(), String> {
        match self.revision {
            Some(revision) => Err(format!("revision = {revision:?} is for data sets of the hub, and this is {what}")),
            None => Ok(()),
        }
    }
}

/// The files that are read.
#[derive(Debug, PartialEq)]
pub(super) struct Chosen {
    pub files: Vec<String>,
    /// What a user should know of them.
    pub notes: Vec<String>,
}

impl From<Vec<String>> for Chosen {
    fn from(files: Vec<String>) -> Self {
        Self { files, notes: Vec::new() }
    }
}

/// Whether a file holds rows, by its name.
pub(super) fn is_rows(name: &str) -> bool {
    kind(name).is_some()
}

/// Names of files that hold rows in JSON by their names, and are about others.
const ABOUT: [&str; 6] =
    ["dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "package.json", "data_info.json"];

/// Which kind of file a name says it is.
fn kind(path: &str) -> Option<&'static str> {
    let name = path.rsplit('/').next().unwrap_or(path).to_ascii_lowercase();
    if ABOUT.contains(&name.as_str()) || name.starts_with('.') {
        return None;
    }
    let packed = name.strip_suffix(".gz").or(name.strip_suffix(".zst"));
    match packed.unwrap_or(&name).rsplit_once('.')?.1 {
        "jsonl" | "ndjson" | "json" => Some("JSON"),
        "csv" => Some("CSV"),
        "tsv" => Some("TSV"),
        "parquet" if packed.is_none() => Some("Parquet"),
        _ => None,
    }
}

/// Refuses files of several kinds.
pub(super) fn one_kind(names: &[String]) -> Result<(), String> {
    let mut kinds: BTreeMap<&str, &str> = BTreeMap::new();
    for name in names {
        kinds.entry(kind(name).unwrap_or("other files")).or_insert(name);
    }
    if kinds.len() < 2 || kinds.keys().all(|kind| *kind == "JSON" || *kind == "other files") {
        return Ok(());
    }
    let kinds: Vec<_> = kinds.into_iter().map(|(kind, example)| format!("{kind} ({example})")).collect();
    Err(format!(
        "holds {}, which may be the same rows twice; say which with a glob, such as {{ path = \"..\", files = \"**/*.jsonl\" }}, or \
         list the files",
        kinds.join(" and ")
    ))
}

/// Chooses the files of a subset and split among those that there are.
pub(super) fn choose(names: &[String], card: &Json, wanted: &Wanted<'_>) -> Result<Chosen, String> {
    let chosen = match wanted.files {
        Some(pattern) => Chosen::from(matching(names, pattern)?),
        None => match configurations(card) {
            configs if !configs.is_empty() => by_card(names, &configs, wanted)?,
            _ => by_names(names, wanted)?,
        },
    };
    if let Some(file) = chosen.files.iter().find(|file| !is_rows(file)) {
        return Err(format!("{file} is neither JSON, JSON lines, CSV, TSV nor Parquet by its name"));
    }
    one_kind(&chosen.files)?;
    Ok(chosen)
}

/// The files that a glob finds; `*` stays within a folder, `**` does not.
fn matching(names: &[String], pattern: &str) -> Result<Vec<String>, String> {
    let options = MatchOptions { require_literal_separator: true, ..MatchOptions::default() };
    let compiled = Pattern::new(pattern.trim_start_matches("./"));
    let compiled = compiled.map_err(|error| format!("files = {pattern:?} is no glob: {}", error.msg))?;
    let found: Vec<_> = names.iter().filter(|name| compiled.matches_with(name, options)).cloned().collect();
    match found.is_empty() {
        true => Err(format!("no file of it is {pattern:?}; it has {}", list(names))),
        false => Ok(found),
    }
}

/// The configurations that a README names and that say which files are theirs.
fn configurations(card: &Json) -> Vec<&Json> {
    let configs = card.get("configs").and_then(Json::as_array).into_iter().flatten();
    configs.filter(|config| config.get("data_files").is_some() || config.get("data_dir").is_some()).collect()
}

fn by_card(names: &[String], configs: &[&Json], wanted: &Wanted<'_>) -> Result<Chosen, String> {
    fn name(config: &Json) -> &str {
        config.get("config_name").and_then(Json::as_str).unwrap_or("default")
    }
    let known = || list(&configs.iter().map(|config| name(config).to_owned()).collect::<Vec<_>>());
    let config = match (wanted.subset, configs) {
        (Some(subset), _) => configs
            .iter()
            .find(|config| name(config) == subset)
            .ok_or_else(|| format!("has no subset {subset:?}; it has {}", known()))?,
        (None, [only]) => only,
        (None, several) => several
            .iter()
            .find(|config| config.get("default").and_then(Json::as_bool) == Some(true) || name(config) == "default")
            .ok_or_else(|| format!("has several subsets: {}; say which with data.subset = \"..\"", known()))?,
    };
    let dir = config.get("data_dir").and_then(Json::as_str).map(|dir| dir.trim_matches('/')).unwrap_or_default();
    let Some(files) = config.get("data_files") else {
        let inside: Vec<_> = names.iter().filter(|file| file.starts_with(&format!("{dir}/"))).cloned().collect();
        return by_names(&inside, &Wanted { subset: None, ..*wanted });
    };
    let mut splits: Vec<(String, Vec<String>)> = Vec::new();
    match files {
        Json::Object(by_split) => {
            for (split, patterns) in by_split {
                splits.push((split.clone(), texts(patterns)));
            }
        }
        Json::Array(entries) if entries.iter().any(Json::is_object) => {
            for entry in entries {
                let split = entry.get("split").and_then(Json::as_str).unwrap_or("train");
                splits.push((split.to_owned(), entry.get("path").map(texts).unwrap_or_default()));
            }
        }
        patterns => splits.push(("train".into(), texts(patterns))),
    }
    let named: Vec<_> = splits.iter().map(|(split, _)| split.as_str()).collect();
    let split = split(&named, wanted)?;
    let patterns = splits.iter().filter(|(name, _)| *name == split).flat_map(|(_, patterns)| patterns);
    let mut found = Vec::new();
    for pattern in patterns {
        let pattern = if dir.is_empty() { pattern.clone() } else { format!("{dir}/{pattern}") };
        found.extend(matching(names, &pattern)?);
    }
    match found.is_empty() {
        true => Err(format!("its README names no file for the split {split}")),
        false => Ok(found.into()),
    }
}

/// A text, or a list of texts.
fn texts(value: &Json) -> Vec<String> {
    match value {
        Json::String(text) => vec![text.clone()],
        Json::Array(list) => list.iter().filter_map(Json::as_str).map(str::to_owned).collect(),
        _ => Vec::new(),
    }
}

fn by_names(names: &[String], wanted: &Wanted<'_>) -> Result<Chosen, String> {
    let mut rows: Vec<&String> = names.iter().filter(|name| is_rows(name)).collect();
    if rows.is_empty() {
        let script = names.iter().any(|name| name.ends_with(".py"));
        return Err(match script {
            true => "its rows come out of a Python script, which is not run; the hub may have them as Parquet under \
                     revision = \"refs/convert/parquet\""
                .into(),
            false => {
                format!("holds no JSON, JSON lines, CSV, TSV or Parquet by the names of its files: {}", list(names))
            }
        });
    }
    if let Some(subset) = wanted.subset {
        let folders: BTreeSet<String> =
            rows.iter().filter_map(|name| name.split_once('/')).map(|(folder, _)| folder.to_owned()).collect();
        rows.retain(|name| name.starts_with(&format!("{subset}/")));
        if rows.is_empty() {
            let folders = list(&folders.into_iter().collect::<Vec<_>>());
            return Err(format!(
                "has no subset {subset:?}: neither in its README nor as a folder; its folders are {folders}"
            ));
        }
    }
    let splits: Vec<_> = rows.iter().map(|name| split_of(name)).collect();
    let named: Vec<_> = splits.iter().flatten().map(String::as_str).collect();
    if named.is_empty() {
        return match wanted.split {
            Some(split) if split != "train" => {
                Err(format!("no file of it is of a split {split:?}: {}", owned_list(&rows)))
            }
            _ => Ok(rows.into_iter().cloned().collect::<Vec<_>>().into()),
        };
    }
    let split = split(&named, wanted)?;
    let of = |wanted: Option<&str>| -> Vec<String> {
        let files = rows.iter().zip(&splits).filter(|(_, split)| split.as_deref() == wanted);
        files.map(|(name, _)| (*name).clone()).collect()
    };
    let others = of(None);
    let notes = match others.is_empty() {
        true => Vec::new(),
        false => vec![format!("not read, as no split is in their names: {}", list(&others))],
    };
    Ok(Chosen { files: of(Some(&split)), notes })
}

fn owned_list(names: &[&String]) -> String {
    list(&names.iter().map(|name| (*name).clone()).collect::<Vec<_>>())
}

/// The split that a file is of by its path.
fn split_of(path: &str) -> Option<String> {
    let stem = path.rsplit_once('/').map_or(path, |(_, name)| name);
    let stem = stem.split('.').next().unwrap_or(stem);
    // `NAME-00000-of-00001`: any name.
    if let Some((name, rest)) = stem.split_once('-')
        && rest.split_once("-of-").is_some_and(|(part, of)| [part, of].iter().all(|n| n.parse::<u32>().is_ok()))
        && path.starts_with("data/")
    {
        return Some(canonical(name).unwrap_or(name).to_owned());
    }
    // Folders go before the file's own name, as the innermost one.
    let folders = path.rsplit('/').skip(1);
    let mut parts = folders.chain([stem]);
    parts.find_map(|part| part.split(|c: char| !c.is_alphabetic()).find_map(canonical)).map(str::to_owned)
}

/// The split that a word names.
fn canonical(word: &str) -> Option<&'static str> {
    let word = word.to_ascii_lowercase();
    SPLITS.iter().find(|(_, words)| words.contains(&word.as_str())).map(|(split, _)| *split)
}

/// The split that is read of those that there are.
fn split(named: &[&str], wanted: &Wanted<'_>) -> Result<String, String> {
    let known: BTreeSet<&str> = named.iter().copied().collect();
    let names = || list(&known.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
    let has = |split: &str| known.contains(split).then(|| split.to_owned());
    let only = || known.first().filter(|_| known.len() == 1).map(|only| (*only).to_owned());
    match (wanted.split, wanted.role) {
        (Some(split), _) => has(split).ok_or_else(|| format!("has no split {split:?}; it has {}", names())),
        (None, Role::Train) => has("train")
            .or_else(only)
            .ok_or_else(|| format!("has no split `train`, but {}; say which with data.split = \"..\"", names())),
        (None, Role::Eval) => only().ok_or_else(|| {
            format!(
                "has the splits {}; say which to evaluate on: data.eval = {{ path = \"..\", split = \"..\" }}",
                names()
            )
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const TRAIN: Wanted<'static> =
        Wanted { role: Role::Train, subset: None, subset_is_of_all: false, split: None, files: None, revision: None };

    fn chosen(names: &[&str], card: Json, wanted: Wanted<'_>) -> Result<Vec<String>, String> {
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        choose(&names, &card, &wanted).map(|chosen| chosen.files)
    }

    #[test]
    fn a_readme_names_the_files_of_each_split() {
        // As openai/gsm8k's.
        let names = ["README.md", "main/test-0.parquet", "main/train-0.parquet", "socratic/train-0.parquet"];
        let card = json!({"configs": [
            {"config_name": "main", "data_files": [
                {"split": "train", "path": "main/train-*"}, {"split": "test", "path": ["main/test-*"]}]},
            {"config_name": "socratic", "data_files": "socratic/*"},
        ]});
        let main = Wanted { subset: Some("main"), ..TRAIN };
        assert_eq!(chosen(&names, card.clone(), main).unwrap(), ["main/train-0.parquet"]);
        let test = Wanted { split: Some("test"), ..main };
        assert_eq!(chosen(&names, card.clone(), test).unwrap(), ["main/test-0.parquet"]);
        let socratic = Wanted { subset: Some("socratic"), ..TRAIN };
        assert_eq!(chosen(&names, card.clone(), socratic).unwrap(), ["socratic/train-0.parquet"]);
        for (wanted, expected) in [
            (TRAIN, "several subsets: main and socratic; say which with data.subset"),
            (Wanted { subset: Some("other"), ..TRAIN }, "no subset \"other\"; it has main and socratic"),
            (Wanted { split: Some("dev"), ..main }, "no split \"dev\"; it has test and train"),
            (Wanted { role: Role::Eval, ..main }, "has the splits test and train; say which"),
        ] {
            let error = chosen(&names, card.clone(), wanted).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        // A default among several, and a folder.
        let card = json!({"configs": [{"config_name": "a", "data_dir": "main", "default": true}, {"data_dir": "b"}]});
        assert_eq!(chosen(&names, card, TRAIN).unwrap(), ["main/train-0.parquet"]);
    }

    #[test]
    fn names_say_the_split() {
        for (name, split) in [
            ("train.jsonl", Some("train")),
            ("my_train_file_00001.csv", Some("train")),
            ("data/train-00000-of-00002.parquet", Some("train")),
            ("data/train_sft-00000-of-00002.parquet", Some("train_sft")),
            ("en/dev/a.jsonl", Some("validation")),
            ("test/training.jsonl", Some("test")),
            ("alpaca_data.json", None),
            ("pretraining.jsonl", None),
            ("latest.jsonl", None),
        ] {
            assert_eq!(split_of(name).as_deref(), split, "{name}");
        }
        let both = ["train.jsonl", "test.jsonl"];
        assert_eq!(chosen(&both, Json::Null, TRAIN).unwrap(), ["train.jsonl"]);
        let plain = ["b.jsonl", "a.json.gz", "README.md", "dataset_infos.json"];
        assert_eq!(chosen(&plain, Json::Null, TRAIN).unwrap(), ["b.jsonl", "a.json.gz"]);
        let sft = ["data/train_sft-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet"];
        let error = chosen(&sft, Json::Null, TRAIN).unwrap_err();
        assert!(error.contains("no split `train`, but test_sft and train_sft; say which with data.split"), "{error}");
        assert_eq!(chosen(&sft, Json::Null, Wanted { split: Some("train_sft"), ..TRAIN }).unwrap(), sft[..1]);
        let names = ["train.jsonl", "more.jsonl"].map(str::to_owned);
        let chosen = choose(&names, &Json::Null, &TRAIN).unwrap();
        assert_eq!(chosen.notes, ["not read, as no split is in their names: more.jsonl"]);
    }

    #[test]
    fn what_is_not_clear_is_an_error() {
        for (names, wanted, expected) in [
            (
                &["a.jsonl", "a.csv"][..],
                TRAIN,
                "holds CSV (a.csv) and JSON (a.jsonl), which may be the same rows twice",
            ),
            (&["a.py", "README.md"], TRAIN, "refs/convert/parquet"),
            (&["a.txt"], TRAIN, "no JSON, JSON lines, CSV, TSV or Parquet by the names of its files: a.txt"),
            (&["a/x.jsonl"], Wanted { subset: Some("b"), ..TRAIN }, "its folders are a"),
            (&["a.jsonl"], Wanted { files: Some("*.csv"), ..TRAIN }, "no file of it is \"*.csv\"; it has a.jsonl"),
            (&["a.txt"], Wanted { files: Some("*.txt"), ..TRAIN }, "a.txt is neither JSON"),
            (&["a.jsonl"], Wanted { split: Some("test"), ..TRAIN }, "no file of it is of a split \"test\""),
        ] {
            let error = chosen(names, Json::Null, wanted).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        let files = Wanted { files: Some("**/*.csv"), ..TRAIN };
        assert_eq!(chosen(&["a.jsonl", "b/a.csv", "c.csv"], Json::Null, files).unwrap(), ["b/a.csv", "c.csv"]);
    }
}
