//! The layouts that Axolotl, LLaMA-Factory and TRL document, in every kind of file: previewed and trained, alike from all of them.

use std::io::Write as _;
use std::path::Path;

use crate::common::{adapter, config, losses, root, run};
use chat_text::Tokenizer;
use flate2::Compression;
use flate2::write::GzEncoder;
use qlora_data::{BatchOrder, Format, Preview, PreviewChoice, load_splits};
use qlora_train::{Resume, TrainConfig};
use serde_json::{Map, Value};

/// A layout's rows.
type Objects = [Map<String, Value>];

fn lines(rows: &Objects) -> Vec<u8> {
    rows.iter().map(|row| format!("{}\n", Value::from(row.clone()))).collect::<String>().into_bytes()
}

/// Rows as a table, in which lists are JSON and every cell is quoted.
fn table(rows: &Objects, separator: &str) -> Vec<u8> {
    let line = |cells: Vec<String>| {
        let cells: Vec<_> = cells.iter().map(|cell| format!("\"{}\"", cell.replace('"', "\"\""))).collect();
        format!("{}\n", cells.join(separator))
    };
    let cell = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let names = line(rows[0].keys().cloned().collect());
    let rows = rows.iter().map(|row| line(row.values().map(cell).collect()));
    std::iter::once(names).chain(rows).collect::<String>().into_bytes()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// The same rows in every kind of file.
fn kinds(layout: &str, rows: &Objects) -> Vec<(&'static str, Vec<u8>)> {
    let zstandard = |bytes: &[u8]| zstd::encode_all(bytes, 1).unwrap();
    let array = Value::from(rows.to_vec()).to_string().into_bytes();
    let parquet = root().join(format!("testdata/rows/{layout}.parquet"));
    vec![
        ("rows.jsonl", lines(rows)),
        ("rows.jsonl.gz", gzip(&lines(rows))),
        ("rows.jsonl.zst", zstandard(&lines(rows))),
        ("rows.json", array.clone()),
        ("rows.json.gz", gzip(&array)),
        ("rows.csv", table(rows, ",")),
        ("rows.csv.zst", zstandard(&table(rows, ","))),
        ("rows.tsv", table(rows, "\t")),
        ("rows.parquet", std::fs::read(parquet).unwrap()),
    ]
}

/// Files that are trained, too: each kind once, and each way of packing.
const TRAINED: [&str; 5] = ["rows.jsonl", "rows.json.gz", "rows.csv.zst", "rows.tsv", "rows.parquet"];

/// Shows the rows of a file: their hash, and their tokens.
fn shown(config: &TrainConfig, format: Format) -> (String, String) {
    let tokenizer = Tokenizer::from_dir(&config.model.path).unwrap();
    let (train, _) = load_splits(&config.data, &tokenizer, config.train.seed).unwrap();
    assert_eq!((train.report.format, train.examples.len()), (format, 4));
    assert_eq!(train.report.warnings(), [""; 0]);
    let order = BatchOrder::new(&train.examples, &config.data, 2, config.train.seed, 0);
    let preview = Preview::new(&train, &order, &tokenizer, 4, PreviewChoice::First).unwrap();
    let tokens = preview.rows.iter().map(|row| format!("{:?}\n", row.tokens)).collect();
    assert!(preview.rows.iter().all(|row| row.learned() > 0) && preview.to_terminal(false, false).contains("4 rows"));
    (train.fingerprint(), tokens)
}

/// Trains the rows of a file: losses, and the adapter's bytes.
fn trained(config: TrainConfig) -> (Vec<(usize, u64, u64)>, Vec<u8>) {
    let folder = config.train.output_dir.clone();
    let summary = run(config, Resume::No, &mut ()).unwrap();
    assert_eq!((summary.run.train_rows, summary.steps), (4, 2));
    (losses(&folder), adapter(&folder))
}

#[test]
fn documented_layouts_are_trained_alike_from_every_kind_of_file() {
    let file = std::fs::read(root().join("testdata/rows/layouts.json")).unwrap();
    let layouts: Map<String, Value> = serde_json::from_slice(&file).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let run_of = |path: &Path, output: &str| {
        let mut config = config(&dir.path().join(output));
        config.data.train = path.to_owned().into();
        config.data.eval_fraction = 0.0;
        config.data.max_length = 512;
        config.train.max_steps = Some(2);
        config.train.gradient_accumulation_steps = 1;
        config.train.save_every = 0;
        config
    };
    let mut hashes = Vec::new();
    for (layout, format) in [
        ("alpaca", Format::Alpaca),
        ("sharegpt", Format::Chat),
        ("messages", Format::Chat),
        ("prompt_completion", Format::PromptCompletion),
        ("messages_completion", Format::Chat),
        ("text", Format::Text),
    ] {
        let rows: Vec<Map<String, Value>> = serde_json::from_value(layouts[layout].clone()).unwrap();
        let (mut first, mut learned) = (None, None);
        for (name, bytes) in kinds(layout, &rows) {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            let config = run_of(&path, &format!("{layout}-{name}"));
            let found = shown(&config, format);
            let expected = first.get_or_insert_with(|| found.clone());
            assert!(found == *expected, "{layout} from {name}: {} for {}", found.1, expected.1);
            if TRAINED.contains(&name) {
                let found = trained(config);
                let expected = learned.get_or_insert_with(|| found.clone());
                assert!(found == *expected, "{layout} from {name}: {:?} for {:?}", found.0, expected.0);
            }
        }
        hashes.extend(first.map(|(hash, _)| hash));
    }
    // Conversations with and without lists of their own for the answer are the same, and no others.
    assert_eq!(hashes[1], hashes[4]);
    hashes.sort();
    hashes.dedup();
    assert_eq!(hashes.len(), 5);
}
