//! `qlora eval`: the figures against those of training and generation, and what it writes.

mod common;

use common::{Bench, reference};
use serde_json::Value;

fn eval<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&["eval", "--device", "cpu", "--max-length", "96"], more].concat()
}

fn json(bench: &Bench, name: &str) -> Value {
    serde_json::from_slice(&bench.read(name)).expect("JSON")
}

fn lines(bench: &Bench, name: &str) -> Vec<Value> {
    let text = String::from_utf8(bench.read(name)).expect("text");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

/// Of a run's last evaluation: the loss, the accuracy and the tokens.
fn last_evaluation(bench: &Bench) -> [f64; 3] {
    let lines = lines(bench, "run/metrics.jsonl");
    let last = lines.iter().rfind(|line| line.get("eval_loss").is_some()).expect("an evaluation");
    ["eval_loss", "eval_accuracy", "eval_tokens"].map(|key| last[key].as_f64().expect("a number"))
}

#[test]
fn the_loss_is_that_of_the_training_run() {
    let bench = Bench::new();
    let rows = String::from_utf8(bench.read("rows.jsonl")).expect("text");
    // The second row is cut to max_length, as in training.
    let long = rows.lines().next().expect("a row").replace("Answer:", &"and so on, ".repeat(40));
    bench.write("eval.jsonl", &format!("{}\n{long}\n", rows.lines().skip(7).collect::<Vec<_>>().join("\n")));
    let system = "data.system_prompt=\"Count well.\"";
    bench.ok(&["train", "qlora.toml", "--eval", "eval.jsonl", "--set", "train.eval_every=2", "--set", system]);
    let [loss, accuracy, tokens] = last_evaluation(&bench);
    let plain = format!("other={}", reference("adapters/plain").display());
    let ask = ["--adapter", "trained=run/adapter", "--adapter", &plain, "--data", "eval.jsonl"];
    let run = bench.ok(&eval(&[&ask[..], &["--json", "eval.json", "--output", "rows.out"]].concat()));
    for word in ["base", "trained", "other", "perplexity", "token accuracy", "+-"] {
        assert!(run.stdout.contains(word), "{word}: {}", run.stdout);
    }
    let report = json(&bench, "eval.json");
    let [base, trained, other] = [0, 1, 2].map(|column| &report["columns"][column]);
    let value = |column: &Value, figure: &str| column[figure]["value"].as_f64().expect("a number");
    // Both are f32 on this CPU; the passes differ in the order of their sums.
    assert!((value(trained, "loss") - loss).abs() < 1e-5, "{trained}: {loss}");
    assert!((value(trained, "token_accuracy") - accuracy).abs() < 1e-9, "{trained}: {accuracy}");
    assert_eq!(trained["loss"]["count"].as_f64(), Some(tokens));
    assert!((value(trained, "perplexity") - loss.exp()).abs() < 1e-3 * loss.exp());
    assert!(value(base, "loss") > loss, "{base}");
    // Of the same rows there is a difference; on rows of its own, an adapter has none.
    let difference = &trained["loss_less_first"];
    assert!(
        (value(trained, "loss") - value(base, "loss") - difference["value"].as_f64().expect("a number")).abs() < 1e-9
    );
    assert!(other.get("loss_less_first").is_none() && run.stdout.contains("less base's"), "{other}");
    // The base gets the rows of the first adapter; one that was made elsewhere knows nothing of its system prompt.
    assert_eq!(base["rows_sha256"], trained["rows_sha256"]);
    assert_ne!(other["rows_sha256"], trained["rows_sha256"]);
    assert_eq!(trained["written_with"]["system_prompt"], "Count well.");

    // The rows' losses, weighed by their tokens, are the column's.
    let rows = lines(&bench, "rows.out");
    assert_eq!(rows.len(), 3 * 6);
    let of_trained: Vec<_> = rows.iter().filter(|row| row["column"] == "trained").collect();
    let tokens = |row: &Value| row["tokens"].as_f64().expect("a number");
    let sum: f64 = of_trained.iter().map(|row| row["loss"].as_f64().expect("a number") * tokens(row)).sum();
    let count: f64 = of_trained.iter().map(|row| tokens(row)).sum();
    assert!((sum / count - value(trained, "loss")).abs() < 1e-9);
    assert_eq!(of_trained[5]["line"], 6);

    // Nothing is replaced unasked, and a part is a part.
    let again = [&ask[..], &["--json", "eval.json", "--limit", "2", "--no-base", "--max-batch", "1"]].concat();
    bench.fails(&eval(&again), 2, &["eval.json exists", "--force"]);
    bench.ok(&eval(&[&again[..], &["--force"]].concat()));
    let part = json(&bench, "eval.json");
    assert_eq!(part["columns"].as_array().map(Vec::len), Some(2));
    let first: f64 = of_trained[..2].iter().map(|row| tokens(row)).sum();
    assert_eq!(part["columns"][0]["loss"]["count"].as_f64(), Some(first));
}

#[test]
fn what_was_learned_by_heart_is_answered_exactly() {
    let bench = Bench::new();
    let row = |prompt: &str, completion: &str| serde_json::json!({ "prompt": prompt, "completion": completion });
    let learned = [row("The number of cats is", " 1,024."), row("The number of dogs is", " 12 dogs")];
    let text = |rows: &[Value]| rows.iter().map(|row| format!("{row}\n")).collect::<String>();
    bench.write("learned.jsonl", &text(&learned));
    let train = ["train", "qlora.toml", "--data", "learned.jsonl", "--max-steps", "60", "--learning-rate", "5e-3"];
    bench.ok(&[&train[..], &["--set", "train.save_every=0"]].concat());
    // The third row is asked as the first is, and another answer is expected, of which the number is the same.
    let asked = [&learned[..], &[row("The number of cats is", "1024 cats"), row("The number of cats is", "none")]];
    bench.write("asked.jsonl", &text(&asked.concat()));
    let ask =
        eval(&["--adapter", "a=run/adapter", "--data", "asked.jsonl", "--metric", "exact,regex", "--json", "out.json"]);
    let more = ["--regex", r"(\d[\d,.]*)", "--output", "out.jsonl", "--max-new-tokens", "12"];
    let run = bench.ok(&[&ask[..], &more].concat());
    assert!(run.stderr.contains("a: 1 of 4 rows have an answer in which --regex finds nothing"), "{}", run.stderr);
    let report = json(&bench, "out.json");
    let [base, adapter] = [0, 1].map(|column| &report["columns"][column]);
    assert!(base["exact"]["value"] == 0.0 && adapter["loss"].is_null(), "{report}");
    assert_eq!(
        adapter["exact"],
        serde_json::json!({ "value": 0.5, "standard_error": 0.28867513459481287, "count": 4 })
    );
    assert_eq!(adapter["regex"], serde_json::json!({ "value": 1.0, "standard_error": 0.0, "count": 3 }));
    assert_eq!((&report["pattern"], &report["quant_type"]), (&more[1].into(), &"nf4".into()));
    let rows = lines(&bench, "out.jsonl");
    let answers: Vec<_> = rows.iter().filter(|row| row["column"] == "a").map(|row| &row["answer"]).collect();
    assert_eq!(answers, ["1,024.", "12 dogs", "1,024.", "1,024."]);
    // As generate answers.
    let generate = ["generate", "--device", "cpu", "--adapter", "run/adapter", "--prompt", "The number of dogs is"];
    assert_eq!(bench.ok(&generate).stdout.trim(), "12 dogs");
    assert_eq!(
        (&rows[5]["reference"], &rows[5]["exact"], &rows[5]["regex"]),
        (&"12 dogs".into(), &true.into(), &true.into())
    );
}

#[test]
fn rows_that_are_not_measured_are_told() {
    let bench = Bench::new();
    let model = reference("tiny-llama").display().to_string();
    let rows = [
        serde_json::json!({ "prompt": "One", "completion": " two" }),
        serde_json::json!({ "prompt": "One ".repeat(600), "completion": " two" }),
        serde_json::json!({ "prompt": "One", "completion": " two".repeat(1100) }),
    ];
    bench.write("rows.jsonl", &rows.iter().map(|row| format!("{row}\n")).collect::<String>());
    let ask = ["eval", "--device", "cpu", "--model", &model, "--data", "rows.jsonl", "--max-new-tokens", "2"];
    let told = |more: &[&str], words: &[&str]| {
        let run = bench.ok(&[&ask[..], &["--metric", "loss,exact"], more].concat());
        for word in words {
            assert!(run.stderr.contains(word), "{word}: {}", run.stderr);
        }
    };
    told(&["--max-length", "100"], &["1 row was left out", "base: 1 of 2 rows were cut to --max-length"]);
    told(&["--max-length", "100"], &["2 rows were cut to --max-length 100,"]);
    // Of the rows behind the first ones nothing is said.
    let first = bench.ok(&[&ask[..], &["--metric", "loss,exact", "--max-length", "100", "--limit", "1"]].concat());
    assert!(!first.stderr.contains("left out") && !first.stderr.contains("cut to"), "{}", first.stderr);
    bench.write("long.jsonl", &format!("{}\n", rows[1]).repeat(3));
    let long = ["eval", "--device", "cpu", "--model", &model, "--data", "long.jsonl", "--max-length", "100"];
    let none = bench.fails(
        &[&long[..], &["--limit", "2"]].concat(),
        3,
        &[
            "no row has a token to learn from: 2 with the answer beyond max_length = 100 (lines 1, 2)",
            "Raise --max-length",
        ],
    );
    assert!(!none.stderr.contains("data."), "{}", none.stderr);
    let plain = reference("adapters/plain").display().to_string();
    bench.copy("adapters/plain", "adapter");
    bench.write("adapter/prompt_settings.json", r#"{"layout": "alpaca", "system_prompt": "Answer."}"#);
    told(
        &["--adapter", "a=adapter", "--no-base"],
        &["a has a system prompt that has no place in the rows of rows.jsonl"],
    );
    told(&["--adapter", &plain], &["rows are too long"]);
    // The model has 1,024 positions.
    told(&[], &["base: 2 of 3 rows are too long: prompt and answer may have 1024 tokens"]);
}

#[test]
fn mistakes() {
    let bench = Bench::new();
    let model = reference("tiny-llama").display().to_string();
    let ask = |more: &[&str], code: i32, words: &[&str]| {
        bench.fails(&[&["eval", "--device", "cpu", "--model", &model], more].concat(), code, words);
    };
    ask(&[], 2, &["--data"]);
    ask(&["--data", "absent.jsonl"], 3, &["absent.jsonl"]);
    ask(&["--data", "rows.jsonl", "--adapter", "absent"], 3, &["absent"]);
    ask(&["--data", "rows.jsonl", "--regex", "("], 2, &["--regex (", "unclosed group"]);
    ask(&["--data", "rows.jsonl", "--regex", r"((\w{100}){100}){100}"], 2, &["--regex", "size limit"]);
    ask(&["--data", "rows.jsonl", "--metric", "regex"], 2, &["needs --regex"]);
    ask(&["--data", "rows.jsonl", "--metric", "exact", "--regex", "x"], 2, &["--regex belongs to"]);
    ask(&["--data", "rows.jsonl", "--metric", "bleu"], 2, &["bleu", "exact"]);
    ask(&["--data", "rows.jsonl", "--temperature", "1"], 2, &["belong to --metric exact"]);
    ask(&["--data", "rows.jsonl", "--format", "csv"], 2, &["--format", "csv"]);
    ask(&["--data", "rows.jsonl", "--loss-on", "user"], 2, &["--loss-on", "user"]);
    ask(&["--data", "rows.jsonl", "--format", "alpaca"], 3, &["rows.jsonl:1", "instruction"]);
    ask(&["--data", "rows.jsonl", "--no-base"], 2, &["--adapter"]);
    ask(&["--data", "rows.jsonl", "--json", "out", "--output", "out"], 2, &["name one file"]);
    bench.write("broken.jsonl", "{\"text\": \"a text\"}\n{\"text\": \n");
    ask(&["--data", "broken.jsonl"], 3, &["broken.jsonl:2"]);
    // Plain text has loss, and nothing to ask.
    bench.write("text.jsonl", "{\"text\": \"a text\"}\n");
    ask(&["--data", "text.jsonl", "--metric", "exact"], 3, &["text.jsonl", "no row has an answer"]);
    bench.ok(&["eval", "--device", "cpu", "--model", &model, "--data", "text.jsonl"]);
    ask(&["--data", "rows.jsonl", "--json", "no/such/folder.json"], 1, &["folder.json"]);
}
