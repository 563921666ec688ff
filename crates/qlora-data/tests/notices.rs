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
    let lines: Vec<_> = report.files[0].truncated.iter().map(|row| row.line).collect();
    assert_eq!(lines, [1, 2]);
    assert_eq!(report.files[0].truncated[0].dropped, whole.examples.get(0).unwrap().input_ids.len() - 16);
    assert_eq!(report.files[0].masked.len(), 1);
    assert_eq!((report.files[0].masked[0].line, report.files[0].masked[0].reason), (2, MaskReason::Truncated));
    assert_eq!(dataset.examples.get(0).unwrap().input_ids, whole.examples.get(0).unwrap().input_ids[..16]);
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
    let lines: Vec<_> = dataset.report.files[0].masked.iter().map(|row| row.line).collect();
    assert_eq!(lines, [1, 3]);
    assert!(dataset.report.files[0].masked.iter().all(|row| row.reason == MaskReason::NoAssistantTurn));

    let error = load_text(&format!("{question}\n{question}\n"), &config()).unwrap_err();
    assert!(error.contains("no row has a token to learn from"), "{error}");
    assert!(error.contains("2 with no assistant turn (lines 1, 2)"), "{error}");
    let short = DataConfig { max_length: 4, ..config() };
    let error = load_text(answer, &short).unwrap_err();
    assert!(error.contains("beyond max_length = 4") && error.contains("Raise data.max_length"), "{error}");
    let all = DataConfig { loss_on: LossOn::All, ..config() };
    assert_eq!(load_text(question, &all).unwrap().examples.len(), 1);
}

fn chat(turns: &[(&str, &str)]) -> String {
    let messages: Vec<_> =
        turns.iter().map(|(role, content)| serde_json::json!({"role": role, "content": content})).collect();
    serde_json::json!({"messages": messages}).to_string()
}

/// An answer of nothing teaches a model to end its turn at once.
#[test]
fn empty_answers_are_left_out_in_every_layout() {
    let good = chat(&[("user", "a"), ("assistant", "b")]);
    for (empty, good) in [
        (chat(&[("user", "Hi"), ("assistant", "")]), good.as_str()),
        (chat(&[("user", "Hi"), ("assistant", "  \n")]), &good),
        (r#"{"prompt": "a", "completion": " "}"#.into(), r#"{"prompt": "a", "completion": " b"}"#),
        (r#"{"instruction": "a", "output": ""}"#.into(), r#"{"instruction": "a", "output": "b"}"#),
        (r#"{"text": " \n"}"#.into(), r#"{"text": "b c"}"#),
    ] {
        let dataset = load_text(&format!("{empty}\n{empty}\n{good}"), &config()).unwrap();
        assert_eq!(dataset.examples.len(), 1);
        let warnings = dataset.report.warnings().join("\n");
        assert!(
            warnings.contains("left out, with nothing to learn from: 2 with an empty answer (lines 1, 2)"),
            "{warnings}"
        );
    }
}

#[test]
fn an_empty_answer_among_others_is_not_learned() {
    let row = chat(&[("user", "a"), ("assistant", ""), ("user", "c"), ("assistant", "d")]);
    let dataset = load_text(&row, &config()).unwrap();
    assert_eq!(labelled(&dataset.examples.get(0).unwrap()).0, "d<|im_end|>\n");
    assert_eq!(
        warnings(&row, &config()),
        [
            "empty answers among others: 1 row (line 1); only data.loss_on = \"all\" learns them: fill them in, or leave \
          the turns out"
        ]
    );
    // The last of several turns says nothing: neither it nor its end is learned.
    let row = r#"{"instruction": "b", "output": "", "history": [["a", "x"]]}"#;
    let dataset = load_text(row, &config()).unwrap();
    assert_eq!(labelled(&dataset.examples.get(0).unwrap()).0, "x<|im_end|>");
    assert_eq!(dataset.report.files[0].notices[0].kind, NoticeKind::EmptyAnswer);
}

#[test]
fn answers_that_are_not_to_be_learned_are_context() {
    let row = |first: &str, second: &str| {
        format!(
            r#"{{"messages": [{{"role": "user", "content": "Hi"}}, {{"role": "assistant", "content": "Bad.", {first}}}, {{"role": "user", "content": "Hm"}}, {{"role": "assistant", "content": "Good.", {second}}}]}}"#
        )
    };
    for (first, second) in [
        ("\"weight\": 0", "\"weight\": 1"),
        ("\"train\": false", "\"train\": true"),
        ("\"loss\": false", "\"loss\": true"),
    ] {
        let dataset = load_text(&row(first, second), &config()).unwrap();
        let (counted, all) = labelled(&dataset.examples.get(0).unwrap());
        assert_eq!(counted, "Good.<|im_end|>\n");
        assert!(all.contains("Bad.<|im_end|>"), "{all}");
        assert_eq!(dataset.report.files[0].notices, []);
    }
    let error = load_text(&row("\"weight\": 0", "\"weight\": 0"), &config()).unwrap_err();
    assert!(error.contains("1 with answers that are not to be learned (line 1). One answer"), "{error}");
}

#[test]
fn keys_that_are_not_read_are_named() {
    let rows = [
        r#"{"prompt": "a", "completion": " b", "id": 1}"#,
        r#"{"prompt": "a", "completion": " b", "id": 2, "score": 0.5, "meta": null, "tags": []}"#,
    ]
    .join("\n");
    assert_eq!(
        warnings(&rows, &config()),
        ["keys of rows that are not read: `id` in 2 rows (lines 1, 2), `score` in 1 row (line 2); \
          rename them to what data.format knows, or leave them out"]
    );
    let row = r#"{"system": "A", "messages": [{"role": "system", "content": "B"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;
    assert!(warnings(row, &config())[0].contains("`system` beside a system message in 1 row (line 1)"));
}

/// The reference template knows no tool calls.
#[test]
fn what_the_template_leaves_out_is_told_or_refused() {
    let row = r#"{"messages": [{"role": "user", "content": "Weather in Oslo?"}, {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]}, {"role": "tool", "content": "rain"}, {"role": "assistant", "content": "It rains."}]}"#;
    let told = match load_text(row, &config()) {
        Ok(dataset) => dataset.report.warnings().join("\n"),
        Err(error) => error,
    };
    assert!(told.contains("the chat template does not write") && told.contains("tool calls"), "{told}");
}

#[test]
fn fields_and_roles_that_the_template_does_not_read_are_told() {
    let row =
        r#"{"messages": [{"role": "user", "content": "Hi", "timestamp": 3}, {"role": "assistant", "content": "Yo"}]}"#;
    let told = warnings(&format!("{row}\n{row}"), &config());
    assert_eq!(
        told,
        ["the chat template does not write: field `timestamp` in 2 rows (lines 1, 2); give a data.chat_template that \
          does, or rows without it"]
    );
    let deaf = "{% for m in messages %}{% if m.role != 'developer' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let deaf = DataConfig { chat_template: Some(deaf.into()), ..config() };
    let row = chat(&[("developer", "Be brief."), ("user", "Hi"), ("assistant", "Yo")]);
    let told = warnings(&row, &deaf).join("\n");
    assert!(
        told.contains("the chat template does not write: whole text of role `developer` in 1 row (line 1)"),
        "{told}"
    );
    let strict = DataConfig { strict: true, ..deaf };
    let error = load_text(&row, &strict).unwrap_err();
    assert!(error.starts_with("/rows.jsonl:1: the chat template does not write: whole text of role"), "{error}");
}

const ENDLESS: &str = "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}";

#[test]
fn a_template_without_end_is_told_and_mended() {
    let row = chat(&[("user", "Color of sky?"), ("assistant", "blue")]);
    let endless = DataConfig { chat_template: Some(ENDLESS.into()), ..config() };
    assert_eq!(
        warnings(&row, &endless),
        ["no end token (<|im_end|>) after the last answer, so the model does not learn to stop: 1 row (line 1); \
          data.end_token = \"<|im_end|>\" appends one, and may name another that the template writes"]
    );
    let mended = DataConfig { end_token: Some("<|im_end|>".into()), ..endless.clone() };
    let dataset = load_text(&row, &mended).unwrap();
    assert_eq!(dataset.report.files[0].notices, []);
    let (counted, all) = labelled(&dataset.examples.get(0).unwrap());
    assert_eq!(all, "user:\nColor of sky?\nassistant:\nblue<|im_end|>\n");
    assert_eq!(counted, "blue<|im_end|>");
    let whole = DataConfig { loss_on: LossOn::All, ..mended.clone() };
    assert_eq!(labelled(&load_text(&row, &whole).unwrap().examples.get(0).unwrap()).0, all);
    let whole = DataConfig { loss_on: LossOn::All, ..endless.clone() };
    assert_eq!(load_text(&row, &whole).unwrap().report.files[0].notices[0].kind, NoticeKind::NoEndToken);

    // Another special token ends the turns: it is named, and can be what generation stops at.
    let other =
        DataConfig { chat_template: Some(ENDLESS.replace("content }}", "content }}<|endoftext|>")), ..endless.clone() };
    let told = warnings(&row, &other).join("\n");
    assert!(told.contains("does not learn to stop: <|endoftext|> instead in 1 row (line 1)"), "{told}");
    let named = DataConfig { end_token: Some("<|endoftext|>".into()), ..other.clone() };
    let dataset = load_text(&row, &named).unwrap();
    assert_eq!(dataset.report.files[0].notices, []);
    assert_eq!(dataset.examples, load_text(&row, &other).unwrap().examples);

    // A template that ends its turns is left as it is.
    let given = DataConfig { end_token: Some("<|im_end|>".into()), ..config() };
    assert_eq!(load_text(&row, &given).unwrap().examples, load_text(&row, &config()).unwrap().examples);
    // Marks that leave the end token out are widened.
    let marked = "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}";
    let marked = DataConfig { chat_template: Some(marked.into()), ..given.clone() };
    if let Ok(dataset) = load_text(&row, &marked) {
        let (counted, all) = labelled(&dataset.examples.get(0).unwrap());
        assert_eq!(all, "user:Color of sky?<|im_end|>\nassistant:blue<|im_end|>\n");
        assert!(counted.ends_with("blue<|im_end|>") || counted.ends_with("blue<|im_end|>\n"), "{counted}");
        assert_eq!(dataset.report.files[0].notices, []);
    }

    let unknown = DataConfig { end_token: Some("<stop>".into()), ..endless };
    let error = load_text(&row, &unknown).unwrap_err();
    assert!(error.starts_with("data.end_token = \"<stop>\" is not one token of"), "{error}");
    assert!(error.ends_with("such as \"<|im_end|>\""), "{error}");
}

#[test]
fn other_rows_end_with_the_token_that_is_given() {
    let given = DataConfig { end_token: Some("<|endoftext|>".into()), ..config() };
    let row = r#"{"instruction": "b", "output": "y", "history": [["a", "x"]]}"#;
    assert_eq!(labelled(&load_text(row, &given).unwrap().examples.get(0).unwrap()).0, "x<|endoftext|>y<|endoftext|>");
}

#[test]
fn rows_longer_than_the_model_was_made_for_are_told() {
    // The reference's tokenizer says 1024.
    let row = format!("{{\"text\": \"{}\"}}\n{{\"text\": \"short\"}}", "word ".repeat(3000));
    let told = warnings(&row, &config());
    assert_eq!(
        told[0],
        "longer than the 1024 tokens that the model was made for (model_max_length of its tokenizer_config.json): \
         1 row (line 1); set data.max_length = 1024"
    );
    assert!(told[1].starts_with("1 row was cut to data.max_length = 2048"), "{told:?}");
    let options = LoadOptions { max_positions: Some(16), ..LoadOptions::default() };
    let dataset = load_text_with(&row, &config(), &options).unwrap();
    let told = dataset.report.warnings().join("\n");
    assert!(told.contains("longer than the 16 tokens") && told.contains("max_position_embeddings"), "{told}");
    let cut = DataConfig { max_length: 16, ..config() };
    let dataset = load_text_with(&row, &cut, &options).unwrap();
    assert_eq!(dataset.report.files[0].notices, []);
}

#[test]
fn a_token_outside_the_embedding_is_an_error_with_its_first_line() {
    let rows = "{\"text\": \"a\"}\n{\"text\": \"b <|im_start|>\"}\n{\"text\": \"c <|im_start|>\"}";
    let id = tokenizer().token_to_id("<|im_start|>").unwrap();
    let end = tokenizer().eos_token_id().unwrap();
    let largest = tokenizer().vocab_size();
    let with = |embedding_rows| LoadOptions { embedding_rows: Some(embedding_rows), ..LoadOptions::default() };
    load_text_with(rows, &config(), &with(largest)).unwrap();
    let error = load_text_with(rows, &config(), &with(end.min(id) as usize)).unwrap_err();
    assert!(error.starts_with("/rows.jsonl:1: the token "), "{error}");
    for part in ["has the id", "embedding has", "rows: set model.resize_embeddings = true", "give the tokenizer"] {
        assert!(error.contains(part), "{error}");
    }
}

/// `data.strict` names the first row of which there is something to know.
#[test]
fn strict_makes_the_first_warning_an_error() {
    let strict = DataConfig { strict: true, ..config() };
    let good = chat(&[("user", "a"), ("assistant", "b")]);
    load_text(&good, &strict).unwrap();
    let with_key = good.replacen('{', "{\"id\": 3, ", 1);
    let empty = chat(&[("user", "a"), ("assistant", "")]);
    let long = chat(&[("user", "a"), ("assistant", &"word ".repeat(40))]);
    for (row, config, parts) in [
        (&with_key, strict.clone(), ["keys of rows that are not read: `id`", "leave them out"]),
        (&empty, strict.clone(), ["nothing to learn from, with an empty answer", "Fill in the answers"]),
        (&long, DataConfig { max_length: 16, ..strict.clone() }, ["longer than data.max_length = 16 by", "raise it"]),
        (
            &good,
            DataConfig { chat_template: Some(ENDLESS.into()), ..strict.clone() },
            ["no end token", "data.end_token = \"<|im_end|>\""],
        ),
    ] {
        let rows = format!("{good}\n{row}\n{row}");
        let line = if *row == good { 1 } else { 2 };
        let error = load_text(&rows, &config).unwrap_err();
        assert!(error.starts_with(&format!("/rows.jsonl:{line}: ")), "{error}");
        for part in parts.into_iter().chain(["data.strict"]) {
            assert!(error.contains(part), "{error}");
        }
    }
}

/// Rows of the evaluation file are told as those of the training file are.
#[test]
fn evaluation_rows_have_a_report_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let [train, eval] = ["train.jsonl", "eval.jsonl"].map(|name| dir.path().join(name));
    let good = chat(&[("user", "a"), ("assistant", "b")]);
    std::fs::write(&train, &good).unwrap();
    std::fs::write(&eval, format!("{good}\n{}", chat(&[("user", &"word ".repeat(70)), ("assistant", "b")]))).unwrap();
    let given = DataConfig { train: train.into(), eval: Some(eval.into()), max_length: 64, ..config() };
    let (train, eval) = qlora_data::load_splits(&given, tokenizer(), 1).unwrap();
    assert_eq!(train.report.warnings(), Vec::<String>::new());
    let told = eval.report.warnings().join("\n");
    assert!(told.contains("eval.jsonl: 1 row was left out, with nothing to learn from"), "{told}");
}
