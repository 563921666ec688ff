//! Rows whose answers are judged: what they become, what of them is left out, and their batches.
#![allow(clippy::unwrap_used)]

mod common;

use common::{config, load_text, tokenizer};
use proptest::prelude::*;
use qlora_data::{BatchOrder, DataConfig, Dataset, Format, Judged, LossOn, MASKED_LABEL, MaskReason, Packing, Side};

fn load(text: &str) -> Dataset {
    load_text(text, &config()).unwrap()
}

/// The texts of a pair's two rows, and those of what is compared.
fn texts(data: &Dataset, row: usize) -> [[String; 2]; 2] {
    let example = data.examples.get(row).unwrap();
    let sides = data.judged[row].sides(example.input_ids.len());
    let text = |ids: Vec<u32>| tokenizer().decode(&ids, false).unwrap();
    let of = |side: usize| {
        let tokens = sides[side].1.clone();
        let learned = |at: &usize| example.labels[*at] != MASKED_LABEL;
        [
            text(example.input_ids[tokens.clone()].to_vec()),
            text(tokens.filter(learned).map(|at| example.input_ids[at]).collect()),
        ]
    };
    [of(0), of(1)]
}

#[test]
fn both_answers_follow_the_same_prompt_and_nothing_else_is_compared() {
    let data = load(
        r#"{"chosen": [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "1"}, {"role": "user", "content": "On."}, {"role": "assistant", "content": "2"}],
            "rejected": [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "1"}, {"role": "user", "content": "On."}, {"role": "assistant", "content": "7"}]}"#
            .replace('\n', " ")
            .as_str(),
    );
    assert_eq!((data.report.format, data.are_pairs()), (Format::Chat, Some(true)));
    let [[chosen, learned], [rejected, other]] = texts(&data, 0);
    assert_eq!(learned, "2<|im_end|>\n");
    assert_eq!(other, "7<|im_end|>\n");
    assert_eq!(chosen.replace("2<|im_end|>", "7<|im_end|>"), rejected);
    assert!(chosen.contains("assistant\n1<|im_end|>"), "{chosen}");

    let data = load(r#"{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}"#);
    let [[chosen, learned], [_, other]] = texts(&data, 0);
    assert!(chosen.contains("2 + 2 = 4"), "{chosen}");
    assert!(learned.contains('4') && other.contains('5') && !learned.contains('2'), "{learned} {other}");
    assert_eq!(data.report.format, Format::PromptCompletion);
}

#[test]
fn a_label_judges_the_last_answer() {
    let row = |label: &str| {
        format!(
            r#"{{"messages": [{{"role": "user", "content": "a"}}, {{"role": "assistant", "content": "first"}}, {{"role": "user", "content": "b"}}, {{"role": "assistant", "content": "last"}}], "label": {label}}}"#
        )
    };
    let data = load(&format!("{}\n{}", row("true"), row("0")));
    assert_eq!(data.judged, [Judged::Desirable, Judged::Undesirable]);
    assert_eq!(data.are_pairs(), Some(false));
    assert_eq!(data.examples.get(0).unwrap().input_ids, data.examples.get(1).unwrap().input_ids);
    let learned: Vec<u32> =
        data.examples.get(0).unwrap().labels.iter().filter_map(|label| u32::try_from(*label).ok()).collect();
    assert_eq!(tokenizer().decode(&learned, false).unwrap(), "last<|im_end|>\n");
    // What rows say of their answers is part of what a run stands on.
    assert_ne!(load(&row("true")).fingerprint(), load(&row("false")).fingerprint());
}

#[test]
fn an_answer_is_never_cut_and_both_prompts_are_cut_alike() {
    let long = "one two three four five six seven eight nine ten ".repeat(4);
    let text = format!(r#"{{"prompt": "{long}", "chosen": "yes yes", "rejected": "no no no no no no no"}}"#);
    let whole = load(&text);
    let [chosen, rejected] = lengths(&whole, 0);
    let max_length = rejected - 10;
    let cut = load_text(&text, &DataConfig { max_length, ..config() }).unwrap();
    assert_eq!(lengths(&cut, 0), [chosen - 10, max_length]);
    let [before, after] = [&whole, &cut].map(|data| texts(data, 0).map(|[_, learned]| learned));
    assert_eq!(before, after);
    // This tokenizer begins no text with a token of its own: what is left is the end.
    assert_eq!(
        cut.examples.get(0).unwrap().input_ids[..chosen - 10],
        whole.examples.get(0).unwrap().input_ids[10..chosen]
    );
    let truncated: Vec<_> = cut.report.truncated().map(|row| row.dropped).collect();
    assert_eq!(truncated, [10]);
    // An answer that fills a row by itself has nothing to follow.
    let error = load_text(&text, &DataConfig { max_length: 4, ..config() }).unwrap_err();
    assert!(error.contains("an answer that fills max_length = 4 by itself"), "{error}");
}

/// Tokens of both rows of a pair.
fn lengths(data: &Dataset, row: usize) -> [usize; 2] {
    let sides = data.judged[row].sides(data.examples.get(row).unwrap().input_ids.len());
    [sides[0].1.len(), sides[1].1.len()]
}

#[test]
fn pairs_that_compare_nothing_are_left_out_and_told() {
    let data = load(
        r#"{"prompt": "a", "chosen": "b", "rejected": "c"}
{"prompt": "a", "chosen": "b", "rejected": "b"}
{"prompt": "a", "chosen": "", "rejected": "c"}
{"prompt": "a", "chosen": "b", "rejected": "  "}"#,
    );
    let reasons: Vec<_> = data.report.masked().map(|row| (row.line, row.reason)).collect();
    let expected = [(2, MaskReason::EqualAnswers), (3, MaskReason::EmptyAnswer), (4, MaskReason::EmptyAnswer)];
    assert_eq!((data.examples.len(), &reasons[..]), (1, &expected[..]));
    let strict = DataConfig { strict: true, ..config() };
    let text = r#"{"prompt": "a", "chosen": "b", "rejected": "b"}"#;
    let error = load_text(text, &strict).unwrap_err();
    assert!(error.contains("two equal answers"), "{error}");
}

#[test]
fn rows_of_different_kinds_are_refused_by_line() {
    let pair = r#"{"prompt": "a", "chosen": "b", "rejected": "c"}"#;
    let plain = r#"{"prompt": "a", "completion": "b"}"#;
    let judged = r#"{"prompt": "a", "completion": "b", "label": true}"#;
    for (first, second, words) in [
        (pair, plain, "one answer to learn"),
        (plain, judged, "an answer with a `label`"),
        (judged, pair, "two answers, `chosen` and `rejected`"),
    ] {
        let error = load_text(&format!("{first}\n{second}"), &config()).unwrap_err();
        assert!(error.contains(":2") && error.contains(&format!("it has {words}")), "{error}");
    }
    let all = DataConfig { loss_on: LossOn::All, ..config() };
    let error = load_text(pair, &all).unwrap_err();
    assert!(error.contains("loss_on") && error.contains("no answers to compare"), "{error}");
    let error = load_text(r#"{"prompt": "a", "chosen": "b", "rejected": 3}"#, &config()).unwrap_err();
    assert!(error.contains(":1") && error.contains("`rejected` is not a string"), "{error}");
}

fn pairs(count: usize) -> Dataset {
    let row = |row: usize| {
        let [good, bad] = ["yes ", "no "].map(|word| word.repeat(1 + (row * 7) % 5));
        format!(r#"{{"prompt": "Question {row}?", "chosen": "{good}", "rejected": "{bad}no"}}"#)
    };
    load(&(0..count).map(row).collect::<Vec<_>>().join("\n"))
}

#[test]
fn a_pair_lies_in_a_batch_as_two_rows() {
    let data = pairs(5);
    let order = BatchOrder::new(&data.examples, &config(), 2, 3, 0).judged(&data.judged, &config(), false);
    let batches: Vec<_> = order.epoch(&data.examples, 0).collect();
    assert_eq!(batches.iter().map(|batch| batch.rows).collect::<Vec<_>>(), [4, 4, 2]);
    let mut seen = Vec::new();
    for batch in &batches {
        let judged = batch.judged.as_ref().unwrap();
        assert!(batch.packed && judged.paired && judged.mismatched.is_empty());
        assert_eq!(judged.pairs(), batch.rows / 2);
        for ((span, side), (row, which)) in batch.spans().zip(&judged.sides).zip(&judged.origins) {
            let (expected, tokens) =
                data.judged[*row].sides(data.examples.get(*row).unwrap().input_ids.len())[*which].clone();
            assert_eq!(
                (*side, &batch.input_ids[span.clone()]),
                (expected, &data.examples.get(*row).unwrap().input_ids[tokens.clone()])
            );
            assert_eq!(batch.labels[span], data.examples.get(*row).unwrap().labels[tokens]);
            seen.push((*row, *side));
        }
    }
    seen.sort_unstable_by_key(|(row, side)| (*row, *side == Side::Rejected));
    assert_eq!(seen, (0..5).flat_map(|row| [(row, Side::Chosen), (row, Side::Rejected)]).collect::<Vec<_>>());

    // With mismatches each prompt has the answer of the row before.
    let order = BatchOrder::in_file_order(&data.examples, 5, 0).judged(&data.judged, &config(), true);
    let batch = order.epoch(&data.examples, 0).next().unwrap();
    let mismatched = &batch.judged.as_ref().unwrap().mismatched;
    let text = |row: usize| tokenizer().decode(&mismatched[row].input_ids, false).unwrap();
    assert!(text(0).contains("Question 0?") && text(2).contains("Question 1?"), "{} {}", text(0), text(2));
    let learned =
        |labels: &[i64]| labels.iter().skip(1).filter(|label| **label != MASKED_LABEL).copied().collect::<Vec<_>>();
    let chosen_of = |row: usize| {
        let tokens = data.judged[row].sides(data.examples.get(row).unwrap().input_ids.len())[0].1.clone();
        learned(&data.examples.get(row).unwrap().labels[tokens])
    };
    assert_eq!(learned(&mismatched[0].labels), chosen_of(4));
    assert_eq!(learned(&mismatched[2].labels), chosen_of(0));
}

#[test]
fn packed_pairs_fill_sequences_of_two_rows() {
    let data = pairs(12);
    let longest = data.examples.lengths().max().unwrap();
    let config = DataConfig { packing: Packing::Auto, max_length: longest, ..config() };
    let order = BatchOrder::new(&data.examples, &config, 1, 3, 0).judged(&data.judged, &config, false);
    let packed = order.packed().unwrap();
    assert_eq!(packed.capacity, 2 * longest);
    assert!(packed.sequences < 12 && packed.fullest <= 2 * longest, "{packed:?}");
    let rows: usize = order.epoch(&data.examples, 0).map(|batch| batch.rows).sum();
    assert_eq!(rows, 24);
}

#[test]
fn a_split_keeps_what_is_said_of_rows() {
    let data = pairs(10);
    let all = data.clone();
    let (train, eval) = data.split(0.3, 1).unwrap();
    assert_eq!((train.judged.len(), eval.judged.len()), (7, 3));
    for part in [&train, &eval] {
        for (example, judged) in part.examples.iter().zip(&part.judged) {
            let row = all.examples.iter().position(|other| other == example).unwrap();
            assert_eq!(*judged, all.judged[row]);
        }
    }
}

proptest! {
    /// Whatever stands in the place of answers is read or refused in words.
    #[test]
    fn no_answers_break_it(
        prompt in prop_oneof![Just("\"a\""), Just("null"), Just("[]"), Just("[{\"role\":\"user\",\"content\":\"a\"}]"), Just("3")],
        chosen in prop_oneof![Just("\"b\""), Just("[]"), Just("{}"), Just("[{\"role\":\"assistant\",\"content\":\"b\"}]"), Just("[{\"from\":\"gpt\",\"value\":\"b\"}]"), Just("null"), Just("[3]")],
        rejected in prop_oneof![Just("\"c\""), Just("[]"), Just("{\"role\":\"assistant\",\"content\":\"c\"}"), Just("[{\"role\":\"user\",\"content\":\"c\"}]"), Just("[null]")],
        label in prop_oneof![Just(""), Just(", \"label\": true"), Just(", \"label\": [1]")],
    ) {
        let text = format!(r#"{{"prompt": {prompt}, "chosen": {chosen}, "rejected": {rejected}{label}}}"#);
        match load_text(&text, &config()) {
            Ok(data) => prop_assert_eq!(data.judged.len(), data.examples.len()),
            Err(error) => prop_assert!(!error.is_empty()),
        }
    }
}
