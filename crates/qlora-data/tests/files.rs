//! Files that are no JSON lines, lines that are no rows, and rows too large for a computer's memory.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{config, load_file, load_text, load_text_with, tokenizer, warnings};
use qlora_data::{DataConfig, LoadOptions, load_rows};

#[test]
fn bad_files_are_reported_with_line_and_expectation() {
    let chat = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;
    let text = r#"{"text": "plain"}"#;
    for (content, expected) in [
        ("", vec!["/rows.jsonl: no rows"]),
        ("\n \n", vec!["/rows.jsonl: no rows"]),
        ("{\"text\": \"a\"\n", vec!["/rows.jsonl:1: not valid JSON", "column"]),
        (
            &format!("{chat}\n\n{{\"messages\": \n"),
            vec!["/rows.jsonl:3: not valid JSON", "expected an object with `messages`"],
        ),
        (
            &format!("{chat}\n{text}\n"),
            vec!["/rows.jsonl:2: the object has `text`", "expected an object with `messages`"],
        ),
        (
            &format!("{text}\n{chat}\n"),
            vec!["/rows.jsonl:2: `text` is missing: the object has `messages`", "the string `text`"],
        ),
        (
            "{\"question\": 1, \"answer\": 2}",
            vec!["/rows.jsonl:1: the object has `question`, `answer`", "`messages`", "`instruction`"],
        ),
        ("3", vec!["not an object"]),
        ("{\"text\": \"a\", \"text\": \"b\"}", vec!["/rows.jsonl:1: not valid JSON: the key `text` stands twice"]),
        ("{\"messages\": [{\"role\": \"user\", \"role\": \"user\"}]}", vec!["the key `role` stands twice"]),
        ("{}", vec!["the object is empty"]),
        ("{\"text\": null}", vec!["`text` is not a string"]),
        ("{\"messages\": []}", vec!["no messages"]),
        ("{\"messages\": [{\"role\": \"user\"}]}", vec!["`messages[0]`", "no `content`"]),
        ("{\"messages\": \"hi\"}", vec!["`messages` is not a list"]),
        ("{\"conversations\": [{\"from\": \"alien\", \"value\": \"x\"}]}", vec!["\"alien\"", "human"]),
        ("{\"conversations\": [{\"from\": \"human\"}]}", vec!["`value`"]),
        ("{\"prompt\": \"a\", \"completion\": 3}", vec!["`completion` is not a string"]),
        ("{\"prompt\": \"a\", \"completion\": []}", vec!["`completion` is not a string"]),
    ] {
        let error = load_text(content, &config()).unwrap_err();
        for part in expected {
            assert!(error.contains(part), "{content:?}: {error}");
        }
    }
    let error = load_rows(Path::new("/nowhere/rows.jsonl"), &config(), tokenizer()).unwrap_err();
    assert!(error.to_string().starts_with("/nowhere/rows.jsonl: "));
    let refusing =
        DataConfig { chat_template: Some("{{ raise_exception('roles must alternate') }}".into()), ..config() };
    let error = load_text(&format!("\n{chat}"), &refusing).unwrap_err();
    assert!(error.starts_with("/rows.jsonl:2: ") && error.contains("roles must alternate"), "{error}");
    assert!(load_text("{\"text\": \"\u{0}\"}", &config()).is_err());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    std::fs::write(&path, b"{\"text\": \"\xff\"}").unwrap();
    assert!(load_rows(&path, &config(), tokenizer()).is_err());
}

/// What a file is that is no JSONL, and what turns it into one.
#[test]
fn other_kinds_of_files_are_named_with_the_command_that_helps() {
    let cases: [(&str, &[u8], &[&str]); 11] = [
        ("data.bz2", b"BZh91AY", &["is bzip2"]),
        ("data.xz", b"\xfd7zXZ\x00", &["is xz"]),
        ("data.zip", b"PK\x03\x04", &["is a zip archive"]),
        ("data.arrow", b"ARROW1\0\0", &["is Arrow", "pandas.read_feather", "/data.parquet`"]),
        ("data.jsonl", b"\xff\xfe{\0\"\0", &["is UTF-16", "iconv"]),
        (
            "data.jsonl",
            b"prompt,completion\na,b\n",
            &["/data.jsonl:1: the file looks like CSV", "`mv /data.jsonl /data.csv`", "expected an object"],
        ),
        ("data", b"prompt\tcompletion\na\tb\n", &["tab-separated values", "/data.tsv`"]),
        (
            "axolotl.yml",
            b"base_model: a/b\n",
            &["/axolotl.yml:1: is a configuration in YAML", "`qlora init --from /axolotl.yml qlora.toml` writes"],
        ),
        ("config", b"datasets:\n  - path: a, b\n", &["/config:1: is a configuration in YAML"]),
        ("qlora.toml", b"[data]\n", &["is a configuration, and data.train names"]),
        ("adapter_config.json", b"{\n", &["is the configuration of a PEFT adapter", "qlora init --from"]),
    ];
    for (name, bytes, parts) in cases {
        let error = load_file(name, bytes, &config(), &LoadOptions::default()).unwrap_err();
        for part in parts {
            assert!(error.contains(part), "{name}: {error}");
        }
    }
    let spread = load_text("{\n  \"text\": \"a\"\n}\n", &config()).unwrap_err();
    assert!(spread.contains("/rows.jsonl:1: not valid JSON") && spread.contains("`jq -c . "), "{spread}");
    // Further down, one broken line is one broken line.
    let later = load_text("{\"text\": \"a\"}\na,b\n", &config()).unwrap_err();
    assert!(later.contains("/rows.jsonl:2: not valid JSON") && !later.contains("CSV"), "{later}");
    let template = DataConfig { chat_template: Some("chatml".into()), ..config() };
    let row = r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}"#;
    let error = load_text(row, &template).unwrap_err();
    assert!(error.contains("\"chatml\" is no chat template: names are not known"), "{error}");
    assert!(error.contains("data.chat_template"), "{error}");
}

/// What stands in a file is quoted in messages, and never obeyed by a terminal.
#[test]
fn messages_hold_no_escape_sequences_of_the_data() {
    let escape = "\\u001b[31m";
    for (text, expected) in [
        (format!(r#"{{"{escape}": 1}}"#), "the object has `␛[31m`"),
        (format!(r#"{{"conversations": [{{"from": "{escape}", "value": "a"}}]}}"#), "`from` is"),
        (format!(r#"{{"messages": [{{"role": "{escape}"}}]}}"#), "␛[31m"),
        (format!(r#"{{"text": "a", "{escape}": 1, "{escape}": 1}}"#), "␛[31m"),
    ] {
        let error = load_text(&text, &config()).unwrap_err();
        assert!(error.contains(expected) && !error.contains('\u{1b}'), "{error:?}");
    }
    let told = warnings(&format!(r#"{{"text": "a b", "{escape}": 1}}"#), &config()).join("\n");
    assert!(told.contains("`␛[31m` in 1 row"), "{told:?}");
}

/// Several rows are broken, and the pieces of the file are encoded in parallel: the first line is reported.
#[test]
fn the_first_broken_row_is_reported_and_none_behind_it_is_begun() {
    let good = format!("{{\"text\": \"{}\"}}\n", "word ".repeat(20));
    let mut text = good.repeat(1000);
    for line in [400, 401, 900] {
        text = text
            .lines()
            .enumerate()
            .map(|(i, l)| if i + 1 == line { "{\n".into() } else { format!("{l}\n") })
            .collect();
    }
    let begun = AtomicUsize::new(0);
    let options = LoadOptions {
        should_stop: &|| {
            begun.fetch_add(1, Ordering::Relaxed);
            false
        },
        ..LoadOptions::default()
    };
    let text = text + &good.repeat(100_000);
    let error = load_text_with(&text, &config(), &options).unwrap_err();
    assert!(error.starts_with("/rows.jsonl:400: not valid JSON"), "{error}");
    // A piece of the file, of which there are some: far from all of 101,000.
    let begun = begun.into_inner();
    assert!(begun < 50_000, "{begun} rows were begun");
}

#[test]
fn reading_stops_when_asked_and_tells_how_far_it_is() {
    let good = format!("{{\"text\": \"{}\"}}\n", "word ".repeat(20));
    let text = good.repeat(20_000);
    let (asked, told) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let options = LoadOptions {
        should_stop: &|| asked.fetch_add(1, Ordering::Relaxed) >= 15_000,
        progress: &|progress| told.lock().unwrap().push((progress.rows, progress.bytes, progress.total_bytes)),
        ..LoadOptions::default()
    };
    let error = load_text_with(&text, &config(), &options).unwrap_err();
    assert_eq!(error, "stopped while /rows.jsonl was read");
    let whole = LoadOptions { should_stop: &|| false, ..options };
    told.lock().unwrap().clear();
    load_text_with(&text, &config(), &whole).unwrap();
    let told = told.into_inner().unwrap();
    let size = text.len() as u64;
    assert!(told.len() > 1 && told.windows(2).all(|pair| pair[0] < pair[1]), "{told:?}");
    assert_eq!(told.last(), Some(&(20_000, size, size)));
}

/// What stands behind the first rows is neither read nor told.
#[test]
fn the_first_rows_are_read() {
    let good = format!("{{\"text\": \"{}\"}}\n", "word ".repeat(20));
    let text = good.repeat(3) + "{\n";
    for (max_rows, rows) in [(1, 1), (3, 3)] {
        let options = LoadOptions { max_rows: Some(max_rows), ..LoadOptions::default() };
        assert_eq!(load_text_with(&text, &config(), &options).unwrap().examples.len(), rows);
    }
    let options = LoadOptions { max_rows: Some(4), ..LoadOptions::default() };
    assert!(load_text_with(&text, &config(), &options).unwrap_err().starts_with("/rows.jsonl:4: not valid JSON"));
}
