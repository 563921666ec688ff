//! Several sources, folders, globs, columns of other names, splits and weights.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::{config, tokenizer};
use qlora_data::{
    BatchOrder, Columns, DataConfig, Dataset, Format, LoadOptions, LoadProgress, Preview, PreviewChoice, RowCache,
    Source, Sources, load_sources, load_splits,
};
use tempfile::TempDir;

/// A folder with files.
fn folder(files: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, content) in files {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
    dir
}

fn rows(letters: &str) -> String {
    letters.chars().map(|letter| format!("{{\"text\": \"{letter}\"}}\n")).collect()
}

fn load(sources: impl Into<Sources>, config: &DataConfig) -> Result<Dataset, String> {
    load_sources(&sources.into(), config, tokenizer(), &LoadOptions::default()).map_err(|error| error.to_string())
}

/// The rows' texts, side by side.
fn texts(dataset: &Dataset) -> String {
    let ends = tokenizer().eos_token_ids();
    let text = |row: &qlora_data::Example| {
        let ids: Vec<u32> = row.input_ids.iter().copied().filter(|id| !ends.contains(id)).collect();
        tokenizer().decode(&ids, true).unwrap().trim().to_owned()
    };
    dataset.examples.iter().map(|row| text(&row)).collect()
}

fn columns(pairs: &[(&str, &str)]) -> Columns {
    Columns(pairs.iter().map(|(ours, theirs)| ((*ours).to_owned(), (*theirs).to_owned())).collect::<BTreeMap<_, _>>())
}

#[test]
fn sources_are_read_one_after_the_other() {
    let dir = folder(&[
        ("a.jsonl", &rows("ab")),
        ("b/2.jsonl", &rows("cd")),
        ("b/1.jsonl", &rows("e")),
        ("c.csv", "text\nf\n"),
    ]);
    let at = |name: &str| dir.path().join(name);
    let several = Sources(["a.jsonl", "b", "c.csv"].map(|name| Source::new(at(name))).into());
    let dataset = load(several, &config()).unwrap();
    assert_eq!(texts(&dataset), "abecdf");
    let of_files: Vec<_> = dataset.report.files.iter().map(|file| (file.source, file.rows)).collect();
    assert_eq!(of_files, [(0, 2), (1, 1), (1, 2), (2, 1)]);
    // Where each row stands, with the numbers of its own file.
    let places: Vec<String> = (dataset.examples.iter().enumerate())
        .map(|(number, row)| dataset.report.place(number, row.line).unwrap().to_string())
        .map(|place| place.replace(&format!("{}/", dir.path().display()), ""))
        .collect();
    assert_eq!(places, ["a.jsonl:1", "a.jsonl:2", "b/1.jsonl:1", "b/2.jsonl:1", "b/2.jsonl:2", "c.csv:2"]);
    assert_eq!(texts(&load(at("b/*.jsonl"), &config()).unwrap()), "ecd");
    assert_eq!(texts(&load(at("**/*.jsonl"), &config()).unwrap()), "abecd");
    assert_eq!(texts(&load(at("[ab].jsonl"), &config()).unwrap()), "ab");

    let order = BatchOrder::in_file_order(&dataset.examples, 2, 0);
    let preview = Preview::new(&dataset, &order, tokenizer(), 6, PreviewChoice::First).unwrap();
    assert!(preview.rows[5].place.ends_with("c.csv, line 2"), "{}", preview.rows[5].place);
    assert_eq!(preview.lengths.bins.iter().map(|bin| bin.rows).sum::<usize>(), 6);
}

#[test]
fn errors_name_the_file_of_several() {
    let dir =
        folder(&[("a.jsonl", &rows("ab")), ("b.jsonl", "{\"text\": \"c\"}\n{\"text\": 3}\n"), ("empty.jsonl", "")]);
    for (names, expected) in [
        (&["a.jsonl", "b.jsonl"][..], "b.jsonl:2: `text` is not a string"),
        (&["a.jsonl", "empty.jsonl"], "empty.jsonl: no rows"),
        (&["a.jsonl", "c.jsonl"], "c.jsonl: there is no such file; of files with rows"),
        (&["c*.jsonl"], "c*.jsonl: no file has such a name"),
    ] {
        let sources = Sources(names.iter().map(|name| Source::new(dir.path().join(name))).collect());
        let error = load(sources, &config()).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    // Two kinds in one folder are likely the same rows twice.
    let mixed = folder(&[("a.jsonl", &rows("ab")), ("a.csv", "text\na\nb\n")]);
    let error = load(mixed.path(), &config()).unwrap_err();
    assert!(error.contains("holds CSV (a.csv) and JSON (a.jsonl)"), "{error}");
    let chosen = Source { files: Some("*.csv".into()), ..Source::new(mixed.path()) };
    assert_eq!(texts(&load(Sources(vec![chosen]), &config()).unwrap()), "ab");
}

#[test]
fn a_folder_has_splits() {
    let dir = folder(&[("train.jsonl", &rows("abcd")), ("test.jsonl", &rows("ef")), ("README.md", "rows")]);
    assert_eq!(texts(&load(dir.path(), &config()).unwrap()), "abcd");
    let split = |split: &str| Sources(vec![Source { split: Some(split.into()), ..Source::new(dir.path()) }]);
    for (name, expected) in
        [("test", "ef"), ("train[:50%]", "ab"), ("train[1:3]", "bc"), ("[-1:]", "d"), ("test[1:]", "f")]
    {
        assert_eq!(texts(&load(split(name), &config()).unwrap()), expected, "{name}");
    }
    let error = load(split("dev"), &config()).unwrap_err();
    assert!(error.contains("has no split \"dev\"; it has test and train"), "{error}");
    let error = load(split("train[9:]"), &config()).unwrap_err();
    assert!(error.contains("its rows end before the split begins"), "{error}");

    // A slice goes over several files, and evaluation has a split of its own.
    let both = DataConfig {
        train: dir.path().join("t*.jsonl").into(),
        split: Some("[1:5]".into()),
        eval: Some(split("test")),
        ..config()
    };
    let (train, eval) = load_splits(&both, tokenizer(), 1).unwrap();
    assert_eq!((texts(&train), texts(&eval)), ("fabc".into(), "ef".into()));
    let unnamed = DataConfig { eval: Some(dir.path().into()), ..both };
    let error = load_splits(&unnamed, tokenizer(), 1).unwrap_err().to_string();
    assert!(error.contains("has the splits test and train; say which to evaluate on"), "{error}");
    // A subset that is said of all sources is no matter of those that are files, but of one at least.
    let subset = DataConfig { subset: Some("de".into()), ..config() };
    let nested = folder(&[("de/a.jsonl", &rows("ab")), ("en/a.jsonl", &rows("cd"))]);
    let with_file = Sources(vec![Source::new(nested.path()), Source::new(dir.path().join("test.jsonl"))]);
    assert_eq!(texts(&load(with_file, &subset).unwrap()), "abef");
    let error = load(dir.path().join("test.jsonl"), &subset).unwrap_err();
    assert!(error.contains("data.subset = \"de\" chooses among"), "{error}");
    let error = load(
        Sources(vec![Source { split: Some("test".into()), ..Source::new(dir.path().join("test.jsonl")) }]),
        &config(),
    );
    assert!(error.unwrap_err().contains("this is a file"));
}

#[test]
fn columns_have_other_names() {
    let text = "question,answer\n1 + 1?,2\n";
    let dir = folder(&[
        ("rows.csv", text),
        ("chat.csv", "dialog\n\"[{\"\"who\"\": \"\"user\"\", \"\"says\"\": \"\"a\"\"}]\"\n"),
    ]);
    let path = dir.path().join("rows.csv");
    let given = DataConfig { columns: columns(&[("prompt", "question"), ("completion", "answer")]), ..config() };
    let dataset = load(path.as_path(), &given).unwrap();
    assert_eq!((dataset.report.format, texts(&dataset)), (Format::PromptCompletion, "1 + 1?2".into()));
    assert_eq!(dataset.report.warnings(), [""; 0]);
    for (pairs, expected) in [
        (&[("prompt", "question"), ("completion", "reply")][..], "`completion` from `reply`, which it lacks; expected"),
        (&[("prompt", "question"), ("completion", "answer"), ("system", "sytem")], "reads `sytem`, which no row of"),
        (&[("question", "prompt")], "fill `question`, which no layout has"),
    ] {
        let config = DataConfig { train: path.clone().into(), columns: columns(pairs), ..config() };
        let error = load_splits(&config, tokenizer(), 1).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    // Cells that hold lists are known by what they are read as.
    let chat = DataConfig {
        columns: columns(&[("messages", "dialog"), ("messages.role", "who"), ("messages.content", "says")]),
        loss_on: qlora_data::LossOn::All,
        ..config()
    };
    let dataset = load(dir.path().join("chat.csv"), &chat).unwrap();
    assert_eq!((dataset.report.format, dataset.examples.len()), (Format::Chat, 1));
}

#[test]
fn layouts_may_differ_and_the_report_says_how_the_adapter_is_prompted() {
    let chat =
        "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n";
    let dir = folder(&[("a.jsonl", &rows("ab")), ("b.jsonl", chat)]);
    let with_system = DataConfig { system_prompt: Some("Be brief.".into()), ..config() };
    let dataset = load(dir.path(), &with_system).unwrap();
    assert_eq!(dataset.report.format, Format::Chat);
    let warnings = dataset.report.warnings();
    assert!(
        warnings[0].contains("several layouts") && warnings[0].contains("as its chat rows are written"),
        "{warnings:?}"
    );
    // A key that no file has a place for is refused.
    let error = load(dir.path().join("a*.jsonl"), &with_system).unwrap_err();
    assert!(error.contains("data.system_prompt has no place in text rows"), "{error}");
    let two = folder(&[("a.jsonl", &rows("a")), ("b.jsonl", &rows("b"))]);
    let error = load(two.path(), &with_system).unwrap_err();
    assert!(error.contains("data.system_prompt has no place in text rows"), "{error}");
}

fn weighted(dir: &Path, weights: &[(&str, f64)]) -> Sources {
    let source = |(name, weight): &(&str, f64)| Source { weight: *weight, ..Source::new(dir.join(name)) };
    Sources(weights.iter().map(source).collect())
}

#[test]
fn weights_say_how_often_an_epoch_visits_a_row() {
    let dir = folder(&[("a.jsonl", &rows("abc")), ("b.jsonl", &rows("defghijk"))]);
    let dataset = load(weighted(dir.path(), &[("a.jsonl", 2.0), ("b.jsonl", 0.25)]), &config()).unwrap();
    for shuffle in [false, true] {
        let given = DataConfig { shuffle, ..config() };
        let order = BatchOrder::new(&dataset.examples, &given, 3, 7, 0).weighted(&dataset.weights).unwrap();
        assert_eq!((order.rows_per_epoch(), order.batches_per_epoch()), (8, 3));
        let mut visits = vec![0; 11];
        for epoch in 0..4 {
            let rows: Vec<usize> = order.rows(epoch).flatten().collect();
            assert_eq!(rows.len(), 8);
            assert!(order.rows(epoch).flatten().eq(rows.iter().copied()), "an epoch can be found again");
            rows.iter().for_each(|row| visits[*row] += 1);
            assert!(rows.is_sorted() != shuffle || epoch > 0);
        }
        // Of the second file each epoch has other rows, until all of them had their turn.
        assert_eq!(visits, [8, 8, 8, 1, 1, 1, 1, 1, 1, 1, 1]);
    }
    let plain = load(weighted(dir.path(), &[("a.jsonl", 1.0), ("b.jsonl", 1.0)]), &config()).unwrap();
    assert!(plain.weights.is_empty());
    assert_ne!(plain.fingerprint(), dataset.fingerprint(), "a run over other weights is another run");
    assert_eq!(plain.fingerprint(), load(dir.path(), &config()).unwrap().fingerprint());

    // Rows that are held out have no weight, and take none along.
    let (kept, held_out) = dataset.split(0.3, 1).unwrap();
    assert_eq!((kept.weights.iter().map(|source| source.rows).sum::<usize>(), held_out.weights.len()), (8, 0));
    assert_eq!(kept.report.files.iter().map(|file| file.rows).sum::<usize>(), kept.examples.len());
}

#[test]
fn sources_that_can_not_be_meant_are_refused() {
    let train = |source: Source| DataConfig { train: Sources(vec![source]), ..config() };
    let source = || Source::new("rows.jsonl");
    for (config, expected) in [
        (train(Source { weight: 0.0, ..source() }), "data.train gives rows.jsonl the weight 0"),
        (train(Source { weight: f64::NAN, ..source() }), "the weight NaN"),
        (
            train(Source { split: Some("train[:200%]".into()), ..source() }),
            "data.train has for rows.jsonl a split that is",
        ),
        (train(Source { columns: Some(columns(&[("a", "b")])), ..source() }), "columns that fill `a`"),
        (DataConfig { split: Some("[".into()), ..train(source()) }, "data.split is \"[\"; write a name"),
        (
            DataConfig { eval: Some(Sources(vec![Source { weight: 2.0, ..source() }])), ..train(source()) },
            "data.eval gives",
        ),
        (DataConfig { train: Sources(vec![source(), Source::new("")]), ..config() }, "a source without a path"),
    ] {
        let error = config.validate().unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let elsewhere = Source { revision: Some("main".into()), ..Source::new(PathBuf::from(env!("CARGO_MANIFEST_DIR"))) };
    assert!(
        load(Sources(vec![elsewhere]), &config())
            .unwrap_err()
            .contains("for data sets of the hub, and this is a folder")
    );
}

#[test]
fn tokens_are_kept_until_something_changes() {
    let dir = folder(&[("a.jsonl", &rows("abc")), ("b.jsonl", "{\"text\": \"d\", \"id\": 7}\n")]);
    let cache = tempfile::tempdir().unwrap();
    let entries = || std::fs::read_dir(cache.path()).unwrap().count();
    let given = DataConfig { cache: RowCache::Folder(cache.path().to_owned()), ..config() };
    let sources = || weighted(dir.path(), &[("a.jsonl", 2.0), ("b.jsonl", 1.0)]);
    let first = load(sources(), &given).unwrap();
    assert_eq!(entries(), 1);
    // A start that finds them reads no row: what would stop it is not met, and all else is the same.
    let told = std::sync::atomic::AtomicUsize::new(0);
    let progress = |progress: LoadProgress<'_>| told.store(progress.rows, std::sync::atomic::Ordering::Relaxed);
    let stopped = LoadOptions { should_stop: &|| true, progress: &progress, ..LoadOptions::default() };
    let again = load_sources(&sources(), &given, tokenizer(), &stopped).unwrap();
    assert_eq!((&again.examples, &again.weights), (&first.examples, &first.weights));
    assert_eq!(again.report, first.report);
    assert!(again.report.warnings()[0].contains("`id` in 1 row"), "{:?}", again.report.warnings());
    assert_eq!(told.into_inner(), 4);
    // Other keys, other files and other contents are tokenized.
    for (number, config) in [
        DataConfig { max_length: 64, ..given.clone() },
        DataConfig { end_token: Some("<|im_end|>".into()), ..given.clone() },
        DataConfig { format: Format::Text, ..given.clone() },
    ]
    .iter()
    .enumerate()
    {
        load(sources(), config).unwrap();
        assert_eq!(entries(), 2 + number);
    }
    std::fs::write(dir.path().join("b.jsonl"), rows("e")).unwrap();
    assert_eq!(texts(&load(sources(), &given).unwrap()), "abce");
    assert_eq!(entries(), 5);
    let split = Sources(vec![Source { split: Some("[:50%]".into()), ..Source::new(dir.path()) }]);
    assert_eq!(texts(&load(split.clone(), &given).unwrap()), "ab");
    assert_eq!((texts(&load(split, &given).unwrap()), entries()), ("ab".into(), 6));
    // A folder that can't be written is told, and nothing else.
    let file = dir.path().join("a.jsonl");
    let nowhere = DataConfig { cache: RowCache::Folder(file.clone()), ..config() };
    let loaded = load(file, &nowhere).unwrap();
    assert!(loaded.report.warnings()[0].contains("data.cache names another folder"), "{:?}", loaded.report.warnings());
}
