//! The data pipeline against batches that PEFT was trained on, on every format, and on bad input.
#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use chat_text::Tokenizer;
use proptest::prelude::*;
use qlora_data::{DataConfig, Dataset, Example, Format, LossOn, MASKED_LABEL, MaskReason, load_rows, load_splits};
use safetensors::SafeTensors;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn tokenizer() -> &'static Tokenizer {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(|| Tokenizer::from_dir(repository().join("testdata/reference/tiny-llama")).unwrap())
}

fn load_text(text: &str, config: &DataConfig) -> Result<Dataset, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    std::fs::write(&path, text).unwrap();
    load_rows(&path, config, tokenizer()).map_err(|e| {
        let message = e.to_string();
        message.replace(&dir.path().display().to_string(), "")
    })
}

/// The text of the tokens that the loss counts, and of all tokens.
fn labelled(example: &Example) -> (String, String) {
    assert_eq!(example.input_ids.len(), example.labels.len());
    let counted: Vec<u32> = example
        .labels
        .iter()
        .zip(&example.input_ids)
        .filter(|(label, _)| **label != MASKED_LABEL)
        .map(|(label, id)| {
            assert_eq!(*label, i64::from(*id));
            *id
        })
        .collect();
    let decode = |ids: &[u32]| tokenizer().decode(ids, false).unwrap();
    (decode(&counted), decode(&example.input_ids))
}

fn config() -> DataConfig {
    DataConfig::default()
}

#[test]
fn the_reference_batches_are_among_our_examples() {
    let bytes = std::fs::read(repository().join("testdata/reference/qlora/batches.safetensors"));
    let bytes = bytes.unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let read = |name: &str| -> (Vec<usize>, Vec<i64>) {
        let tensor = file.tensor(name).unwrap();
        let values = tensor.data().chunks_exact(8);
        let values = values.map(|b| i64::from_le_bytes(b.try_into().unwrap()));
        (tensor.shape().to_vec(), values.collect())
    };
    let (shape, ids) = read("input_ids");
    let (_, labels) = read("labels");
    let cols = shape[2];
    let path = repository().join("examples/quickstart/word_problems.jsonl");
    let config = DataConfig { max_length: cols, ..config() };
    let dataset = load_rows(&path, &config, tokenizer()).unwrap();
    let ours: HashSet<(Vec<i64>, Vec<i64>)> = dataset
        .examples
        .iter()
        .map(|e| (e.input_ids.iter().map(|id| i64::from(*id)).collect(), e.labels.clone()))
        .collect();
    let mut rows = 0;
    for (ids, labels) in ids.chunks(cols).zip(labels.chunks(cols)) {
        // The reference pads with token 3, which no row contains.
        let length = ids.iter().position(|id| *id == 3).unwrap_or(cols);
        let row = (ids[..length].to_vec(), labels[..length].to_vec());
        assert!(ours.contains(&row), "row {rows} of the reference is not among ours");
        rows += 1;
    }
    assert_eq!(rows, 80);
}

#[test]
fn the_quickstart_is_read_whole() {
    let path = repository().join("examples/quickstart/word_problems.jsonl");
    let dataset = load_rows(&path, &config(), tokenizer()).unwrap();
    let report = &dataset.report;
    assert_eq!((report.rows, report.format), (2000, Format::Chat));
    assert!(report.warnings().is_empty());
    let tokens: usize = dataset.examples.iter().map(|e| e.input_ids.len()).sum();
    assert_eq!(report.tokens, tokens as u64);
    let lines: Vec<usize> = dataset.examples.iter().map(|e| e.line).collect();
    assert_eq!(lines, (1..=2000).collect::<Vec<_>>());
}

#[test]
fn every_format_is_detected_and_labelled() {
    let cases = [
        (
            r#"{"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}, {"role": "assistant", "content": " e "}]}"#,
            Format::Chat,
            "c<|im_end|>\ne<|im_end|>\n",
            "<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n<|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\ne<|im_end|>\n",
        ),
        (
            r#"{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}"#,
            Format::Chat,
            "b<|im_end|>\n",
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
        ),
        (
            r#"{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}"#,
            Format::Chat,
            "b<|im_end|>\n",
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
        ),
        (
            r#"{"prompt": "2 + 2 =", "completion": " 4"}"#,
            Format::PromptCompletion,
            " 4<|im_end|>",
            "2 + 2 = 4<|im_end|>",
        ),
        (
            r#"{"instruction": "Add.", "input": "2, 2", "output": "4"}"#,
            Format::Alpaca,
            "4<|im_end|>",
            "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n2, 2\n\n### Response:\n4<|im_end|>",
        ),
        (
            r#"{"instruction": "Greet.", "input": "", "output": "Hi"}"#,
            Format::Alpaca,
            "Hi<|im_end|>",
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\nGreet.\n\n### Response:\nHi<|im_end|>",
        ),
        (r#"{"text": "naïve 漢字 🙂"}"#, Format::Text, "naïve 漢字 🙂<|im_end|>", "naïve 漢字 🙂<|im_end|>"),
    ];
    for (row, format, answer, whole) in cases {
        for named in [Format::Auto, format] {
            let given = DataConfig { format: named, ..config() };
            let dataset = load_text(&format!("\u{feff}\n{row}\r\n\n"), &given).unwrap();
            assert_eq!(dataset.report.format, format);
            assert_eq!(dataset.examples[0].line, 2);
            let (counted, all) = labelled(&dataset.examples[0]);
            assert_eq!((counted.as_str(), all.as_str()), (answer, whole));
        }
        let all = DataConfig { loss_on: LossOn::All, ..config() };
        let dataset = load_text(row, &all).unwrap();
        assert_eq!(labelled(&dataset.examples[0]), (whole.to_owned(), whole.to_owned()));
    }
}

#[test]
fn system_prompt_and_template_are_taken_from_the_configuration() {
    let row = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;
    let given = DataConfig {
        system_prompt: Some("Be brief.".into()),
        chat_template: Some(
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}".into(),
        ),
        ..config()
    };
    let dataset = load_text(row, &given).unwrap();
    let (counted, all) = labelled(&dataset.examples[0]);
    assert_eq!((counted.as_str(), all.as_str()), ("b", "[system]Be brief.[user]a[assistant]b"));

    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("template.jinja");
    std::fs::write(&file, given.chat_template.as_deref().unwrap()).unwrap();
    let from_file = DataConfig { chat_template: Some(file.display().to_string()), ..given.clone() };
    assert_eq!(load_text(row, &from_file).unwrap().examples, dataset.examples);

    let alpaca = r#"{"instruction": "Greet.", "output": "Hi"}"#;
    let system = DataConfig { system_prompt: Some("Do it.".into()), ..config() };
    let dataset = load_text(alpaca, &system).unwrap();
    assert!(labelled(&dataset.examples[0]).1.starts_with("Do it.\n\n### Instruction:\nGreet."));
    let error = load_text(r#"{"text": "x y"}"#, &system).unwrap_err();
    assert!(error.contains("data.system_prompt has no place in text rows"), "{error}");
    let broken = DataConfig { chat_template: Some("{% if".into()), ..config() };
    assert!(load_text(row, &broken).unwrap_err().contains("syntax error"));
}

#[test]
fn turns_that_cannot_be_traced_are_refused_with_advice() {
    let row = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "c"}, {"role": "assistant", "content": "y"}]}"#;
    let given = |template: &str, loss_on| DataConfig { chat_template: Some(template.into()), loss_on, ..config() };
    // The header counts all turns and the length of the answer stands before it.
    let counting = "{{ messages | length }}{% for m in messages %}<{{ m.role }} {{ m.content | length }}>{{ m.content }}{% endfor %}";
    let error = load_text(row, &given(counting, LossOn::Assistant)).unwrap_err();
    assert!(error.starts_with("/rows.jsonl:1: it can't be told which tokens message 2 became"), "{error}");
    assert!(error.contains("loss_on") && error.contains("{% generation %}"), "{error}");
    let all = load_text(row, &given(counting, LossOn::All)).unwrap();
    assert_eq!(labelled(&all.examples[0]).0, "4<user 1>a<assistant 1>x<user 1>c<assistant 1>y");

    let tagged = counting.replace("{{ m.content }}", "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}");
    let dataset = load_text(row, &given(&tagged, LossOn::Assistant)).unwrap();
    let (counted, _) = labelled(&dataset.examples[0]);
    // A letter may share a token with the header before it, and is masked then.
    assert_eq!(counted.replace(['x', 'y'], ""), "<|im_end|><|im_end|>");

    let silent = "{% for m in messages %}<{{ m.role }}>{% endfor %}";
    let error = load_text(row, &given(silent, LossOn::Assistant)).unwrap_err();
    assert!(error.contains("does not write the content of message 2"), "{error}");
}

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

#[test]
fn a_tokenizer_without_template_is_enough_for_plain_rows() {
    let dir = tempfile::tempdir().unwrap();
    let from = repository().join("testdata/reference/tiny-llama");
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(from.join(file), dir.path().join(file)).unwrap();
    }
    let bare = Tokenizer::from_dir(dir.path()).unwrap();
    let rows = dir.path().join("rows.jsonl");
    std::fs::write(&rows, r#"{"prompt": "a", "completion": " b"}"#).unwrap();
    assert_eq!(load_rows(&rows, &config(), &bare).unwrap().examples.len(), 1);
    std::fs::write(&rows, r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#)
        .unwrap();
    let error = load_rows(&rows, &config(), &bare).unwrap_err().to_string();
    assert!(error.contains("no chat template") && error.contains("`chat_template`"), "{error}");
}

#[test]
fn configurations_out_of_range_name_the_key() {
    let valid = DataConfig { train: "x".into(), ..config() };
    valid.validate().unwrap();
    for (config, key) in [
        (config(), "data.train"),
        (DataConfig { max_length: 1, ..valid.clone() }, "data.max_length"),
        (DataConfig { eval_fraction: 1.0, ..valid.clone() }, "data.eval_fraction"),
        (DataConfig { eval_fraction: f64::NAN, ..valid.clone() }, "data.eval_fraction"),
    ] {
        let error = config.validate().unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
    }
    let parsed: DataConfig =
        toml::from_str("train = \"a\"\nformat = \"prompt_completion\"\nloss_on = \"all\"").unwrap();
    assert_eq!((parsed.format, parsed.loss_on), (Format::PromptCompletion, LossOn::All));
    assert!(toml::from_str::<DataConfig>("trian = \"a\"").is_err());
    let written = toml::to_string(&config()).unwrap();
    assert_eq!(toml::from_str::<DataConfig>(&written).unwrap(), config());
}

#[test]
fn rows_are_held_out_by_the_seed() {
    let path = repository().join("examples/quickstart/word_problems.jsonl");
    let config = DataConfig { train: path.clone(), eval_fraction: 0.05, ..config() };
    let (train, eval) = load_splits(&config, tokenizer(), 7).unwrap();
    assert_eq!((train.examples.len(), eval.examples.len()), (1900, 100));
    assert_eq!((train.report.rows, eval.report.rows), (1900, 100));
    let whole = load_rows(&path, &config, tokenizer()).unwrap();
    let mut both: Vec<_> = train.examples.iter().chain(&eval.examples).collect();
    both.sort_by_key(|e| e.line);
    assert_eq!(both, whole.examples.iter().collect::<Vec<_>>());
    assert_eq!(train.report.tokens + eval.report.tokens, whole.report.tokens);
    let (_, again) = load_splits(&config, tokenizer(), 7).unwrap();
    assert_eq!(again.examples, eval.examples);
    let (_, other) = load_splits(&config, tokenizer(), 8).unwrap();
    assert_ne!(other.examples, eval.examples);
    let own = DataConfig { eval: Some(path), ..config };
    assert_eq!(load_splits(&own, tokenizer(), 7).unwrap().1.examples.len(), 2000);
    assert!(load_text(r#"{"text": "a b"}"#, &own).unwrap().split(0.5, 0).is_err());
}

fn any_json() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        Just("null".to_owned()),
        Just("3".to_owned()),
        "\"[a-z<|>_ ]{0,8}\"",
        Just("\"user\"".to_owned()),
        Just("\"assistant\"".to_owned()),
        Just("\"<|im_end|>\"".to_owned()),
        Just("\"\\ud83d\\ude42é\"".to_owned()),
    ];
    leaf.prop_recursive(4, 32, 6, |inner| {
        let key = prop::sample::select(vec![
            "messages",
            "conversations",
            "role",
            "content",
            "from",
            "value",
            "prompt",
            "completion",
            "instruction",
            "input",
            "output",
            "text",
            "tools",
            "tool_calls",
            "x",
        ]);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(|v| format!("[{}]", v.join(","))),
            prop::collection::vec((key, inner), 0..4).prop_map(|pairs| {
                let pairs: Vec<_> = pairs.iter().map(|(k, v)| format!("\"{k}\":{v}")).collect();
                format!("{{{}}}", pairs.join(","))
            }),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_lines_are_read_or_refused(
        lines in prop::collection::vec(prop_oneof![any_json(), any_json(), "\\PC{0,20}"], 0..4),
        max_length in 2usize..40,
        all in any::<bool>(),
    ) {
        let config = DataConfig {
            max_length,
            loss_on: if all { LossOn::All } else { LossOn::Assistant },
            ..config()
        };
        if let Ok(dataset) = load_text(&lines.join("\n"), &config) {
            for example in &dataset.examples {
                labelled(example);
                prop_assert!(example.input_ids.len() <= max_length);
                prop_assert!(example.label_tokens() > 0);
            }
        }
    }

    #[test]
    fn a_prompt_is_never_labelled(
        turns in prop::collection::vec(("[a-z \\n.é🙂]{0,12}", "[a-z \\n.é🙂]{0,12}"), 1..4),
        template in prop::sample::select(vec![
            None,
            // Without special tokens around the turns, tokens may cross their borders.
            Some("{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"),
        ]),
    ) {
        let mut messages = Vec::new();
        for (question, answer) in &turns {
            messages.push(serde_json::json!({"role": "user", "content": question}));
            messages.push(serde_json::json!({"role": "assistant", "content": answer}));
        }
        let row = serde_json::json!({"messages": messages}).to_string();
        let given = DataConfig { chat_template: template.map(str::to_owned), ..config() };
        let Ok(dataset) = load_text(&row, &given) else { return Ok(()) };
        let (counted, _) = labelled(&dataset.examples[0]);
        let (answers, rest): (String, _) = match template {
            None => (turns.iter().map(|(_, a)| format!("{}<|im_end|>\n", a.trim())).collect(), ""),
            Some(_) => (turns.iter().map(|(_, a)| format!("{a}\n")).collect(), ":"),
        };
        if template.is_none() {
            prop_assert_eq!(counted, answers);
        } else {
            // Part of the answers at most, in order, and nothing of the prompts.
            let mut from = answers.chars();
            let mut valid = counted.chars().filter(|c| *c != char::REPLACEMENT_CHARACTER);
            prop_assert!(valid.all(|c| from.any(|a| a == c)));
            prop_assert!(!counted.contains(rest));
        }
    }
}
