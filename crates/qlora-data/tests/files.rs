//! Files that are no JSON lines, lines that are no rows, and rows too large for a computer's memory.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use common::{config, load_text, tokenizer};
use qlora_data::{DataConfig, load_rows};

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
        (&format!("{text}\n{chat}\n"), vec!["/rows.jsonl:2: the object has `messages`", "the string `text`"]),
        (
            "{\"question\": 1, \"answer\": 2}",
            vec!["/rows.jsonl:1: the object has `question`, `answer`", "`messages`", "`instruction`"],
        ),
        ("[\n{\"text\": \"a\"}\n]", vec!["/rows.jsonl:1:", "jq -c '.[]'"]),
        ("[{\"text\": \"a\"}]", vec!["/rows.jsonl:1: a JSON array"]),
        ("3", vec!["not an object"]),
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
