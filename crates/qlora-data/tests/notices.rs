//! What is left out, cut or not learned is told: once for each kind, with count and lines.
#![allow(clippy::unwrap_used)]

mod common;

use common::{config, labelled, load_text, load_text_with, tokenizer, warnings};
use qlora_data::{DataConfig, LoadOptions, LossOn, MaskReason, NoticeKind};

#[test]
fn long_rows_are_cut_and_counted() {
    let long = "word ".repeat(40);
    let text = format!(
        "{{\"prompt\": \"a\", \"completion\": \"{long}\"}}\n{{\"prompt\": \"{long}\", \"completion\": \"b\"}}\n{{\"prompt\": \"a\", \"completion\": \" b\"}}\n"
    );
    let cut = DataConfig { max_length: 16, ..config() };
    let dataset = load_text(&text, &cut).unwrap();
    let whole = load_text(&text, &config()).unwrap();
    let report = &dataset.report;
    assert_eq!(report.rows, 2);
    assert_eq!(report.longest, 16);
    let lines: Vec<_> = report.truncated.iter().map(|row| row.line).collect();
    assert_eq!(lines, [1, 2]);
    assert_eq!(report.truncated[0].dropped, whole.examples[0].input_ids.len() - 16);
    assert_eq!(report.masked.len(), 1);
    assert_eq!((report.masked[0].line, report.masked[0].reason), (2, MaskReason::Truncated));
    assert_eq!(dataset.examples[0].input_ids, whole.examples[0].input_ids[..16]);
    let shown = report.to_string();
    assert!(shown.contains("2 rows were cut to data.max_length = 16"), "{shown}");
    assert!(shown.contains("1 row was left out") && shown.contains("(line 2)"), "{shown}");
}

#[test]
fn rows_without_labels_are_left_out_and_explained() {
    let question = r#"{"messages": [{"role": "user", "content": "a"}]}"#;
    let answer = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;
    let dataset = load_text(&format!("{question}\n{answer}\n{question}\n"), &config()).unwrap();
    assert_eq!(dataset.examples.len(), 1);
    let lines: Vec<_> = dataset.report.masked.iter().map(|row| row.line).collect();
    assert_eq!(lines, [1, 3]);
    assert!(dataset.report.masked.iter().all(|row| row.reason == MaskReason::NoAssistantTurn));

    let error = load_text(&format!("{question}\n{question}\n"), &config()).unwrap_err();
    assert!(error.contains("no row has a token to learn from"), "{error}");
    assert!(error.contains("2 with no assistant turn (lines 1, 2)"), "{error}");
    let short = DataConfig { max_length: 4, ..config() };
    let error = load_text(answer, &short).unwrap_err();
    assert!(error.contains("beyond max_length = 4") && error.contains("Raise data.max_length"), "{error}");
    let all = DataConfig { loss_on: LossOn::All, ..config() };
    assert_eq!(load_text(question, &all).unwrap().examples.len(), 1);
}
