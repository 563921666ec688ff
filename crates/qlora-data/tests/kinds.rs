//! The same rows from every kind of file, and files that are damaged.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

mod common;

use std::io::Write;

use common::{config, load_file, load_text, repository, tokenizer};
use flate2::Compression;
use flate2::write::GzEncoder;
use qlora_data::{Dataset, LoadOptions, load_rows};

const CHAT: &str = concat!(
    r#"{"id": 1, "messages": [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]}"#,
    "\n",
    r#"{"id": 2, "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Höhe in m?"}, "#,
    r#"{"role": "assistant", "content": "2962"}]}"#,
    "\n",
);

fn load(name: &str, bytes: &[u8]) -> Result<Dataset, String> {
    load_file(name, bytes, &config(), &LoadOptions::default())
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstandard(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

/// What separates the cells of the same two conversations, whose lists are JSON within quotes.
fn table(separator: char) -> String {
    let row = |line: &str| {
        let object: serde_json::Value = serde_json::from_str(line).unwrap();
        format!("{}{separator}\"{}\"\r\n", object["id"], object["messages"].to_string().replace('"', "\"\""))
    };
    format!("id{separator}messages\r\n{}", CHAT.lines().map(row).collect::<String>())
}

fn array() -> String {
    format!("\u{feff} [\n{}\n]\n", CHAT.trim_end().replace("\n{", ",\n\n {"))
}

#[test]
fn every_kind_gives_the_same_rows() {
    let expected = load_text(CHAT, &config()).unwrap();
    assert_eq!(expected.examples.len(), 2);
    let csv = table(',');
    let mut kinds = vec![
        ("rows.jsonl.gz", gzip(CHAT.as_bytes())),
        ("rows.jsonl.zst", zstandard(CHAT.as_bytes())),
        // Two members behind each other are one text, as of logs that were packed piece by piece.
        ("rows", [gzip(&CHAT.as_bytes()[..50]), gzip(&CHAT.as_bytes()[50..])].concat()),
        ("rows.json", array().into_bytes()),
        ("rows.json.gz", gzip(array().as_bytes())),
        ("rows.csv", csv.clone().into_bytes()),
        ("rows.CSV", table(';').into_bytes()),
        ("rows.csv.zst", zstandard(csv.as_bytes())),
        ("rows.tsv", table('\t').into_bytes()),
        ("bom.csv", ["\u{feff}", &csv].concat().into_bytes()),
    ];
    let file = |name: &str| std::fs::read(repository().join("testdata/rows").join(name)).unwrap();
    for name in ["none", "snappy", "gzip", "zstd", "lz4", "brotli"] {
        kinds.push((name, file(&format!("{name}.parquet"))));
    }
    for (name, bytes) in kinds {
        let found = load(name, &bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(found.fingerprint(), expected.fingerprint(), "{name}");
        assert_eq!(found.report.warnings().len(), expected.report.warnings().len(), "{name}");
    }
    // Keys of a group that a message has not are no nulls.
    let named = load("names.parquet", &file("names.parquet")).unwrap();
    assert_eq!(named.examples.get(1).unwrap(), expected.examples.get(1).unwrap());
    let places: Vec<_> = expected.examples.iter().map(|example| example.line).collect();
    assert_eq!(places, [1, 2]);
}

#[test]
fn places_are_counted_as_the_file_counts_them() {
    let prompts = "prompt,completion,note\n\"a\nb\",c,\nd,e,x\nf,g,x\n";
    let found = load("rows.csv", prompts.as_bytes()).unwrap();
    let lines: Vec<_> = found.examples.iter().map(|example| example.line).collect();
    assert_eq!(lines, [2, 4, 5], "a cell may go on in the next line");
    let warnings = found.report.warnings().join("\n");
    assert!(warnings.contains("`note` in 2 rows (lines 4, 5)"), "{warnings}");
    let array = r#"[{"text": "a"}, {"text": "b", "note": 1}]"#;
    let warnings = load("rows.json", array.as_bytes()).unwrap().report.warnings().join("\n");
    assert!(warnings.contains("`note` in 1 row (row 2)"), "{warnings}");
}

/// Lines that do not pack well, so that most of them are there before the file breaks off.
fn noise(lines: u64) -> String {
    (0..lines).map(|line| format!("{:016x}\n", line.wrapping_mul(0x9E37_79B9_7F4A_7C15))).collect()
}

#[test]
fn damaged_files_are_told_with_the_place() {
    let parquet = std::fs::read(repository().join("testdata/rows/snappy.parquet")).unwrap();
    let packed = gzip(CHAT.repeat(99).as_bytes());
    let mut damaged = packed.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 0x55;
    let packed_table = gzip(format!("text\n{}", noise(5000)).as_bytes());
    let cases: [(&str, Vec<u8>, &[&str]); 21] = [
        (
            "rows.jsonl.gz",
            packed[..packed.len() / 2].to_vec(),
            &["/rows.jsonl.gz: gzip can't unpack it", "cut short", "pack it again"],
        ),
        ("rows.jsonl.gz", damaged, &["gzip can't unpack it"]),
        ("rows.zst", zstandard(CHAT.as_bytes())[..40].to_vec(), &["/rows.zst: Zstandard can't unpack it", "cut short"]),
        ("rows.json", b"[".to_vec(), &["/rows.json, row 1: the array is not closed"]),
        ("rows.json", b"[]".to_vec(), &["/rows.json: no rows"]),
        (
            "rows.json",
            br#"[{"text": "a"}, {"text": "b"#.to_vec(),
            &["/rows.json, row 2: the array ends in the midst of it"],
        ),
        ("rows.json", br#"[{"text": "a"} {"text": "b"}]"#.to_vec(), &["/rows.json, row 1: not valid JSON"]),
        ("rows.json", br#"[{"text": "a"}, ]"#.to_vec(), &["row 2: a comma without an element behind it"]),
        ("rows.json", br#"[{"text": "a"}] {}"#.to_vec(), &["row 2: the array was closed before it"]),
        ("rows.json", br#"[{"text": "a"}, 3]"#.to_vec(), &["/rows.json, row 2: a JSON value that is not an object"]),
        (
            "rows.csv",
            b"text,note\na,b\nc\n".to_vec(),
            &["/rows.csv:3: it has 1 cell, and", "names 2 columns: from `note` on there is none"],
        ),
        ("rows.csv", b"text,note\na,b,c\n".to_vec(), &["/rows.csv:2: it has 3 cells", "nothing names cell 3"]),
        (
            "rows.csv",
            b"prompt,answer\na,b\n".to_vec(),
            &["/rows.csv:2: the object has `prompt`, `answer`", "data.columns"],
        ),
        (
            "rows.csv.gz",
            packed_table[..packed_table.len() - 20].to_vec(),
            &["/rows.csv.gz: gzip can't unpack it behind line ", "download or pack it again"],
        ),
        ("rows.csv", b"text,text\na,b\n".to_vec(), &["/rows.csv:1: two columns are called `text`"]),
        ("rows.csv", b"text,\na,b\n".to_vec(), &["/rows.csv:1: column 2 has no name"]),
        ("rows.csv", b"text\n\xff\n".to_vec(), &["/rows.csv:2: the cell in column 1 is no UTF-8"]),
        ("rows.csv", b"text\n".to_vec(), &["/rows.csv: no rows"]),
        (
            "rows.csv",
            b"messages\n\"[{\"\"role\"\"\"\n".to_vec(),
            &["/rows.csv:2: the cell in column `messages` is not valid JSON"],
        ),
        ("rows.parquet", parquet[..parquet.len() - 9].to_vec(), &["/rows.parquet: is Parquet that is damaged"]),
        ("rows.parquet.gz", gzip(&parquet), &["/rows.parquet.gz: is Parquet in a packed file"]),
    ];
    for (name, bytes, parts) in cases {
        let error = load(name, &bytes).unwrap_err();
        for part in parts {
            assert!(error.contains(part), "{name}: {part}: {error}");
        }
    }
}

/// Damage of any kind is an error, or goes unseen where a format has no checksum; it never stops the program.
#[test]
fn no_damage_of_a_parquet_file_is_a_panic() {
    let whole = std::fs::read(repository().join("testdata/rows/snappy.parquet")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.parquet");
    let mut with_column = 0;
    for at in 0..whole.len() {
        for change in [0x01, 0xff] {
            let mut bytes = whole.clone();
            bytes[at] ^= change;
            std::fs::write(&path, &bytes).unwrap();
            let Err(error) = load_rows(&path, &config(), tokenizer()) else { continue };
            let error = error.to_string();
            assert!(error.contains("rows.parquet"), "{error}");
            with_column += usize::from(error.contains("rows.parquet, row ") && error.contains("the column `"));
        }
    }
    // Pages that do not unpack are most of what can break behind an intact end.
    assert!(with_column > 20, "{with_column}");
}
