//! Rows as they are trained, to be seen: marks beneath, colours, pages, and nothing of the data that acts.
#![allow(clippy::unwrap_used)]

mod common;

use common::{config, labelled, load_text, repository, tokenizer};
use qlora_data::{BatchOrder, DataConfig, Dataset, Packing, Preview, PreviewChoice, PreviewRow, load_rows};

fn preview(dataset: &Dataset, rows: usize, choice: PreviewChoice) -> Preview {
    preview_as(dataset, &config(), rows, choice)
}

fn preview_as(dataset: &Dataset, config: &DataConfig, rows: usize, choice: PreviewChoice) -> Preview {
    let order = BatchOrder::new(&dataset.examples, config, 4, 1, tokenizer().padding_id());
    Preview::new(dataset, &order, tokenizer(), rows, choice).unwrap()
}

fn row(text: &str) -> PreviewRow {
    PreviewRow::new(&load_text(text, &config()).unwrap().examples.get(0).unwrap(), tokenizer()).unwrap()
}

const CHAT: &str = r#"{"messages": [{"role": "user", "content": "Color of sky?"}, {"role": "assistant", "content": "blue\nand 漢字"}]}"#;

#[test]
fn learned_tokens_have_marks_beneath() {
    assert_eq!(
        row(CHAT).to_terminal(false, false),
        "\
line 1: 30 tokens, 14 learned
<|im_start|>user↵
Color of sky?<|im_end|>↵
<|im_start|>assistant↵
blue↵
^^^^^
and 漢字<|im_end|>↵
^^^^^^^^^^^^^^^^^^^
"
    );
}

#[test]
fn colours_say_the_same_as_marks() {
    let shown = row(CHAT).to_terminal(true, false);
    let (green, bold, both, reset) = ("\x1b[38;5;28m", "\x1b[1m", "\x1b[1;38;5;28m", "\x1b[0m");
    let lines: Vec<_> = shown.lines().skip(1).collect();
    assert_eq!(
        lines,
        [
            format!("{bold}<|im_start|>{reset}user↵"),
            format!("Color of sky?{bold}<|im_end|>{reset}↵"),
            format!("{bold}<|im_start|>{reset}assistant↵"),
            format!("{green}blue↵{reset}"),
            format!("{green}and 漢字{reset}{both}<|im_end|>{reset}{green}↵{reset}"),
        ]
    );
}

#[test]
fn ids_stand_in_a_line_for_each_token() {
    let dataset = load_text(r#"{"prompt": "2 + 2 =", "completion": " 4"}"#, &config()).unwrap();
    let row = PreviewRow::new(&dataset.examples.get(0).unwrap(), tokenizer()).unwrap();
    let shown = row.to_terminal(false, true);
    let lines: Vec<_> = shown.lines().collect();
    let ids = &dataset.examples.get(0).unwrap().input_ids;
    assert_eq!(lines.len(), 1 + ids.len());
    for (position, (line, id)) in lines[1..].iter().zip(ids).enumerate() {
        let fields: Vec<_> = line.split_whitespace().collect();
        assert_eq!(fields[..2], [position.to_string(), id.to_string()]);
        assert_eq!(line.as_bytes()[16] == b'^', row.tokens[position].learned, "{line}");
    }
    assert!(lines.last().unwrap().ends_with("^ <|im_end|>"), "{shown}");
}

#[test]
fn nothing_of_the_data_acts_on_a_terminal_or_a_page() {
    let text = "a\u{1b}[2J\u{1b}]0;x\u{7}\u{9b}31m\u{202e}<script>alert('&\"')</script>\r\tb";
    let data = serde_json::json!({"text": text, "\u{1b}[31m<b>key": 1}).to_string();
    let dataset = load_text(&data, &config()).unwrap();
    assert_eq!(labelled(&dataset.examples.get(0).unwrap()).1, format!("{text}<|im_end|>"));
    let preview = preview(&dataset, 1, PreviewChoice::First);
    for shown in [preview.to_terminal(false, false), preview.to_terminal(false, true), preview.to_html()] {
        let acts = |c: &char| c.is_control() && *c != '\n' || *c == '\u{202e}';
        assert_eq!(shown.chars().find(acts), None, "{shown}");
        assert!(shown.contains('␛') && shown.contains("\\u{9b}") && shown.contains("\\u{202e}"), "{shown}");
    }
    let page = preview.to_html();
    let tags: String =
        page.split('<').skip(1).map(|tag| format!("<{}", tag.split(['>', ' ']).next().unwrap())).collect();
    assert!(!tags.contains("script") && !page.contains("<b>"), "{tags}");
    assert!(page.contains("&lt;") && page.contains("&#39;") && page.contains("&quot;") && page.contains("&amp;"));
}

#[test]
fn long_lines_are_broken_so_that_marks_stay_beneath() {
    let answer = "漢字 word ".repeat(40);
    let text = serde_json::json!({"prompt": "a", "completion": answer}).to_string();
    let shown = row(&text).to_terminal(false, false);
    let mut learned = 0;
    for pair in shown.lines().skip(1).collect::<Vec<_>>().chunks(2) {
        let width: usize = pair[0].chars().map(|c| if c.is_ascii() { 1 } else { 2 }).sum();
        assert!(width <= 100, "{width} columns");
        assert!(pair[1].chars().all(|c| c == '^' || c == ' ') && pair[1].len() <= width, "{pair:?}");
        learned += pair[1].matches('^').count();
    }
    // Columns of what is learned: the completion and the end token, of which some blanks may end a line.
    let columns = 40 * "____ word ".len() + "<|im_end|>".len();
    assert_eq!(learned, columns);
}

#[test]
fn an_epoch_of_packed_rows_is_summed_up() {
    let words = |count: usize| serde_json::json!({"prompt": "a", "completion": " word".repeat(count)}).to_string();
    let rows: Vec<_> = (1..=40).map(words).collect();
    let packing = DataConfig { max_length: 64, packing: Packing::Auto, ..config() };
    let dataset = load_text(&rows.join("\n"), &packing).unwrap();
    let preview = preview_as(&dataset, &packing, 0, PreviewChoice::First);
    let packed = preview.packed.unwrap();
    assert_eq!((packed.capacity, packed.tokens, preview.padding.waste()), (64, dataset.report.tokens, 0.0));
    assert_eq!(preview.batches, packed.sequences.div_ceil(4));
    assert!(packed.fill() > 0.9, "{packed:?}");
    let line = format!(
        "{} batches an epoch, of {} sequences of up to 64 tokens: rows lie end to end, and fill {:.1} % of them\n",
        preview.batches,
        packed.sequences,
        100.0 * packed.fill()
    );
    let shown = preview.to_terminal(false, false);
    assert!(shown.contains(&line), "{line}{shown}");
}

#[test]
fn an_epoch_is_summed_up() {
    let words = |count: usize| serde_json::json!({"prompt": "a", "completion": " word".repeat(count)}).to_string();
    let mut rows: Vec<_> = (1..=40).map(words).collect();
    rows.push(words(500));
    rows.push(r#"{"prompt": "a", "completion": ""}"#.into());
    rows.push(r#"{"prompt": "a", "completion": " b", "id": 1}"#.into());
    let cut = DataConfig { max_length: 64, ..config() };
    let dataset = load_text(&rows.join("\n"), &cut).unwrap();
    let preview = preview(&dataset, 0, PreviewChoice::First);
    let Preview { lengths, padding, batches, .. } = &preview;
    assert_eq!((lengths.bins.len(), lengths.cut, *batches), (16, 1, 11));
    assert_eq!(lengths.bins.iter().map(|bin| bin.rows).sum::<usize>(), 41);
    assert_eq!((lengths.bins[0].from, lengths.bins[15].to), (1, 64));
    for (bin, next) in lengths.bins.iter().zip(&lengths.bins[1..]) {
        assert_eq!((bin.to + 1, bin.to - bin.from), (next.from, 3));
    }
    for bin in &lengths.bins {
        let within = |example: &qlora_data::Example| (bin.from..=bin.to).contains(&example.input_ids.len());
        let cut = |example: &qlora_data::Example| example.line != 41;
        assert_eq!(dataset.examples.iter().filter(cut).filter(within).count(), bin.rows);
    }
    assert_eq!(padding.tokens, dataset.report.tokens);
    assert!(padding.waste() > 0.0);
    let shown = preview.to_terminal(false, false);
    for part in [
        "42 rows (prompt_completion)",
        "11 batches an epoch; ",
        "% of their places are padding",
        "1 row was left out, with nothing to learn from:\n  1 with an empty answer (line 42)",
        "keys of rows that are not read: `id` in 1 row (line 43)",
        "61 to 64",
        "-------- data.max_length = 64\n    longer ██████████ 1, cut",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let page = preview.to_html();
    for part in ["<!DOCTYPE html>", "data.max_length = 64", "1 with an empty answer (line 42)", "61 to 64"] {
        assert!(page.contains(part), "{part}: {page}");
    }
}

#[test]
fn rows_are_the_first_or_drawn_by_a_seed() {
    let path = repository().join("examples/quickstart/word_problems.jsonl");
    let dataset = load_rows(&path, &config(), tokenizer()).unwrap();
    let lines = |rows, choice| preview(&dataset, rows, choice).rows.iter().map(|row| row.line).collect::<Vec<_>>();
    assert_eq!(lines(3, PreviewChoice::First), [1, 2, 3]);
    let drawn = lines(5, PreviewChoice::Random(7));
    assert_eq!(drawn, lines(5, PreviewChoice::Random(7)));
    assert_ne!(drawn, lines(5, PreviewChoice::Random(8)));
    assert!(drawn.len() == 5 && drawn.is_sorted() && drawn != [1, 2, 3, 4, 5], "{drawn:?}");
    assert_eq!(lines(5000, PreviewChoice::First).len(), 2000);
    // What is shown is what is trained: every token, its text and whether it is learned.
    for row in preview(&dataset, 20, PreviewChoice::Random(1)).rows {
        let example = dataset.examples.iter().find(|example| example.line == row.line).unwrap();
        let (learned, all) = labelled(&example);
        let text = |only_learned: bool| -> String {
            let tokens = row.tokens.iter().filter(|token| token.learned || !only_learned);
            tokens.map(|token| token.text.as_str()).collect()
        };
        assert_eq!((text(false), text(true)), (all, learned));
        assert_eq!(row.learned(), example.label_tokens());
    }
}
