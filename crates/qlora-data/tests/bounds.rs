//! Rows that are far larger than what a model reads of them: bounded memory, and the same tokens.
#![allow(clippy::unwrap_used)]

#[path = "../../adapter-io/tests/bounded/mod.rs"]
mod bounded;
mod common;

use bounded::bounded;
use common::{config, labelled, load_text, tokenizer};
use qlora_data::{DataConfig, LossOn, MaskReason};

const SIZE: usize = 8 << 20;

fn words(bytes: usize) -> String {
    // Words of many lengths, so that a cut falls anywhere.
    let mut text = String::with_capacity(bytes + 16);
    let mut state = 1u32;
    while text.len() < bytes {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        text.push_str(
            ["market ", "naïve ", "coins\n", "漢字", "a ", "1,234 ", "works hours "][(state >> 8) as usize % 7],
        );
    }
    text
}

fn row(layout: &str, text: &str) -> String {
    let text = serde_json::Value::from(text);
    match layout {
        "text" => serde_json::json!({"text": text}),
        "completion" => serde_json::json!({"prompt": "Say it", "completion": text}),
        "prompt" => serde_json::json!({"prompt": text, "completion": "b"}),
        _ => serde_json::json!({"messages": [{"role": "user", "content": "Say it"}, {"role": "assistant", "content": text}]}),
    }
    .to_string()
}

/// One row of this size took 120 to 190 times as much when all of it was made tokens.
#[test]
fn a_large_row_costs_a_few_times_its_size() {
    // On this thread alone, whose memory is counted.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build().unwrap();
    for (layout, text, factor) in [
        // The line, its text without escapes, twice while it is read, and the text that is put together.
        ("text", words(SIZE), 5),
        ("completion", words(SIZE), 5),
        ("completion", "a".repeat(SIZE), 5),
        ("prompt", "a".repeat(SIZE), 5),
        // The template's own copies of the message and of what it writes, with and without marks.
        ("chat", words(SIZE), 10),
        ("chat", "a".repeat(SIZE), 10),
    ] {
        let row = row(layout, &text);
        drop(text);
        let cut = DataConfig { max_length: 96, loss_on: LossOn::All, ..config() };
        let dataset = bounded(factor * SIZE, || pool.install(|| load_text(&row, &cut))).unwrap();
        assert_eq!(dataset.examples.get(0).unwrap().input_ids.len(), 96, "{layout}");
        assert!(dataset.report.files[0].truncated[0].at_least);
        let warnings = dataset.report.warnings().join("\n");
        assert!(warnings.contains("cut to data.max_length = 96, at least "), "{warnings}");
    }
}

/// Only a beginning is made tokens; those that are kept are the tokens of the whole text.
#[test]
fn a_beginning_has_the_tokens_of_the_whole() {
    for (layout, text) in
        [("text", words(300_000)), ("completion", words(300_000)), ("text", " ".repeat(300_000) + "end")]
    {
        for max_length in [96, 2048, 12_000] {
            let cut = DataConfig { max_length, ..config() };
            let dataset = load_text(&row(layout, &text), &cut).unwrap();
            let example = &dataset.examples.get(0).unwrap();
            let whole = match layout {
                "text" => tokenizer().encode(&text, true).unwrap(),
                _ => tokenizer().encode(&format!("Say it{text}"), true).unwrap(),
            };
            let kept = max_length.min(whole.ids.len());
            assert_eq!(example.input_ids[..kept], whole.ids[..kept], "{layout} {max_length}");
            let truncated = dataset.report.files[0].truncated.first();
            assert_eq!(truncated.is_some(), whole.ids.len() > max_length);
            if let Some(row) = truncated {
                let dropped = whole.ids.len() + 1 - max_length;
                assert!(if row.at_least { row.dropped < dropped } else { row.dropped == dropped }, "{row:?} {dropped}");
            }
        }
    }
}

/// An answer behind a beginning that fills the row is there, but out of reach.
#[test]
fn an_answer_far_behind_is_beyond_the_length_and_not_empty() {
    let rows = [row("prompt", &words(200_000)), row("completion", "b")].join("\n");
    let cut = DataConfig { max_length: 64, ..config() };
    let dataset = load_text(&rows, &cut).unwrap();
    assert_eq!(labelled(&dataset.examples.get(0).unwrap()).0, "b<|im_end|>");
    let masked = &dataset.report.files[0].masked[0];
    assert_eq!((masked.line, masked.reason), (1, MaskReason::Truncated));
}

/// A row of many turns under a template without tokens of its own around turns, where most boundaries are looked at.
#[test]
fn a_row_takes_time_by_its_turns() {
    let template = "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}\n\
                    {% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}";
    let given = DataConfig { chat_template: Some(template.into()), max_length: 1 << 20, ..config() };
    let seconds = |turns: usize| {
        let message = |turn: usize| {
            let role = ["user", "assistant"][turn % 2];
            format!("{{\"role\": \"{role}\", \"content\": \"turn {turn} says that {} is a number\"}}", turn * 31 % 101)
        };
        let text = format!("{{\"messages\": [{}]}}", (0..turns).map(message).collect::<Vec<_>>().join(", "));
        let once = || {
            let start = std::time::Instant::now();
            load_text(&text, &given).unwrap();
            start.elapsed().as_secs_f64()
        };
        once().min(once())
    };
    // Four times the turns take four times as long, and 16 times where each looks at all before it; a machine has other work, too.
    let (few, many) = (seconds(300), seconds(1200));
    assert!(many < 9.0 * few, "300 turns take {few:.3} s, 1,200 {many:.3} s");
}
