//! Data sets against batches that PEFT was trained on, their splits, and any rows at all.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashSet;

use chat_text::Tokenizer;
use common::{config, labelled, load_text, repository, tokenizer};
use proptest::prelude::*;
use qlora_data::{DataConfig, Dataset, Example, Format, LossOn, MASKED_LABEL, load_rows, load_splits};
use safetensors::SafeTensors;

#[test]
fn the_reference_batches_are_among_our_examples() {
    let bytes = std::fs::read(repository().join("testdata/reference/qlora/batches.safetensors"));
    let bytes = bytes.unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let read = |name: &str| -> (Vec<usize>, Vec<i64>) {
        let tensor = file.tensor(name).unwrap();
        let values = tensor.data().chunks_exact(4);
        let values = values.map(|b| i64::from(i32::from_le_bytes(b.try_into().unwrap())));
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

/// A tokenizer that puts `bos` before a text, as Llama's and Gemma's do.
#[test]
fn a_text_that_begins_with_bos_does_not_get_a_second() {
    let dir = tempfile::tempdir().unwrap();
    let from = repository().join("testdata/reference/tiny-llama");
    std::fs::copy(from.join("tokenizer_config.json"), dir.path().join("tokenizer_config.json")).unwrap();
    let file = std::fs::read(from.join("tokenizer.json")).unwrap();
    let mut json: serde_json::Value = serde_json::from_slice(&file).unwrap();
    let bos = serde_json::json!({"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}});
    json["post_processor"]["single"].as_array_mut().unwrap().insert(0, bos);
    json["post_processor"]["special_tokens"] = serde_json::json!({
        "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    });
    std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
    let adding = Tokenizer::from_dir(dir.path()).unwrap();
    let load = |row: &str| {
        let path = dir.path().join("rows.jsonl");
        std::fs::write(&path, row).unwrap();
        load_rows(&path, &config(), &adding).unwrap().examples
    };
    let text = load(r#"{"text": "a b"}"#);
    assert_eq!(text.get(0).unwrap().input_ids[0], 0);
    assert_eq!(text, load(r#"{"text": "<|endoftext|>a b"}"#));
    let pair = load(r#"{"prompt": "a", "completion": " b"}"#);
    assert_eq!(pair, load(r#"{"prompt": "<|endoftext|>a", "completion": " b"}"#));
    assert_eq!(pair.get(0).unwrap().input_ids.iter().filter(|id| **id == 0).count(), 1);
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
    let config = DataConfig { train: path.clone().into(), eval_fraction: 0.05, ..config() };
    let (train, eval) = load_splits(&config, tokenizer(), 7).unwrap();
    assert_eq!((train.examples.len(), eval.examples.len()), (1900, 100));
    assert_eq!((train.report.rows, eval.report.rows), (1900, 100));
    let whole = load_rows(&path, &config, tokenizer()).unwrap();
    let mut both: Vec<_> = train.examples.iter().chain(eval.examples.iter()).collect();
    both.sort_by_key(|e| e.line);
    assert_eq!(both, whole.examples.iter().collect::<Vec<_>>());
    assert_eq!(train.report.tokens + eval.report.tokens, whole.report.tokens);
    let (_, again) = load_splits(&config, tokenizer(), 7).unwrap();
    assert_eq!(again.examples, eval.examples);
    let (_, other) = load_splits(&config, tokenizer(), 8).unwrap();
    assert_ne!(other.examples, eval.examples);
    let own = DataConfig { eval: Some(path.into()), ..config };
    assert_eq!(load_splits(&own, tokenizer(), 7).unwrap().1.examples.len(), 2000);
    assert!(load_text(r#"{"text": "a b"}"#, &own).unwrap().split(0.5, 0).is_err());
}

/// What a run that goes on compares: another order, another word and other labels are other data, also where the
/// numbers of rows and tokens are the same.
#[test]
fn a_fingerprint_tells_rows_apart() {
    let [first, second] = ["Count 0.", "Count 1."].map(|text| {
        format!(
            r#"{{"messages": [{{"role": "user", "content": "{text}"}}, {{"role": "assistant", "content": "0 0"}}]}}"#
        )
    });
    let of = |text: &str, config: &DataConfig| load_text(text, config).unwrap().fingerprint();
    let both = of(&format!("{first}\n{second}"), &config());
    assert_eq!(both, of(&format!("\n{first}\n\n{second}\n"), &config()), "blank lines are no rows");
    assert!(both.len() == 64 && both.bytes().all(|digit| digit.is_ascii_hexdigit()), "{both}");
    let all = DataConfig { loss_on: LossOn::All, ..config() };
    let others = [
        of(&format!("{second}\n{first}"), &config()),
        of(&format!("{first}\n{first}"), &config()),
        of(&format!("{first}\n{second}"), &all),
        of(&first, &config()),
    ];
    let distinct: HashSet<_> = others.iter().chain([&both]).collect();
    assert_eq!(distinct.len(), 5);
    // Written in stone: checkpoints of earlier versions hold it.
    let example = Example { input_ids: vec![1, 2], labels: vec![MASKED_LABEL, 2], line: 7 };
    let dataset = Dataset { examples: vec![example].into(), ..Dataset::default() };
    assert_eq!(dataset.fingerprint(), FINGERPRINT);
}

/// `hashlib.sha256(struct.pack("<QQQIIqq", 1, 2, 2, 1, 2, -100, 2))` of Python.
const FINGERPRINT: &str = "35d93f5e157491ec42508bd5d997cd3d288e05ab3c00cf4db5933ef6b20385b0";

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
            "system",
            "history",
            "weight",
            "chat_template_kwargs",
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
        end in any::<bool>(),
    ) {
        let config = DataConfig {
            max_length,
            loss_on: if all { LossOn::All } else { LossOn::Assistant },
            end_token: end.then(|| "<|endoftext|>".into()),
            ..config()
        };
        // What is refused in strict rows is what is told otherwise.
        let told = load_text(&lines.join("\n"), &config).map(|dataset| !dataset.report.warnings().is_empty());
        let strict = load_text(&lines.join("\n"), &DataConfig { strict: true, ..config.clone() });
        match told {
            Ok(told) => prop_assert_eq!(strict.is_err(), told),
            Err(_) => prop_assert!(strict.is_err()),
        }
        if let Ok(dataset) = load_text(&lines.join("\n"), &config) {
            for example in dataset.examples.iter() {
                labelled(&example);
                prop_assert!(example.input_ids.len() <= max_length);
                prop_assert!(example.label_tokens() > 0);
            }
        }
    }

    #[test]
    fn answers_are_learned_whole_and_prompts_never(
        turns in prop::collection::vec(("[a-z \\n.é🙂]{0,12}", "[a-z \\n.é🙂]{0,12}"), 1..4),
        template in prop::sample::select(vec![
            None,
            // Without special tokens around the turns, tokens would cross their borders.
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
        let (counted, _) = labelled(&dataset.examples.get(0).unwrap());
        // Every letter of the answers that say something, and nothing of the prompts.
        let learned = turns.iter().map(|(_, answer)| answer).filter(|answer| !answer.trim().is_empty());
        let answers: String = match template {
            None => learned.map(|answer| format!("{}<|im_end|>\n", answer.trim())).collect(),
            Some(_) => learned.map(|answer| format!("{answer}\n")).collect(),
        };
        prop_assert_eq!(counted, answers);
    }
}
