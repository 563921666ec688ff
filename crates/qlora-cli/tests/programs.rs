//! What other programs get: JSON on stdout, quiet runs, completions and manual pages; and runs' folders in the place of adapters.

mod common;

use common::{Bench, Run, reference};
use serde_json::Value;

/// Evaluations with a prompt, and rows of which none is cut, which would be a warning.
const EVAL: [&str; 8] = [
    "--max-length",
    "128",
    "--set",
    "data.eval_fraction=0.2",
    "--set",
    "eval.prompts=[\"What is 2 + 3?\"]",
    "--set",
    "eval.max_new_tokens=3",
];

/// Every line of stdout as an object.
fn objects(run: &Run) -> Vec<Value> {
    let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
    run.stdout.lines().map(parse).collect()
}

#[test]
fn a_run_in_json_tells_everything_on_stdout() {
    let bench = Bench::new();
    let run = bench.ok(&[&["train", "qlora.toml", "--json"][..], &EVAL].concat());
    assert_eq!(run.stderr, "");
    let lines = objects(&run);
    let events: Vec<&str> = lines.iter().map(|line| line["event"].as_str().expect("an event")).collect();
    assert_eq!((events[0], events[events.len() - 1]), ("start", "end"));
    let of = |name: &str| lines.iter().filter(|line| line["event"] == name).collect::<Vec<_>>();
    assert_eq!((of("step").len(), of("eval").len(), of("saved").len()), (4, 2, 2), "{events:?}");
    // What is told is what is logged.
    let metrics = String::from_utf8(bench.read("run/metrics.jsonl")).expect("text");
    let logged: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let told = lines.iter().filter(|line| ["step", "eval"].iter().any(|name| line["event"] == *name));
    assert!(
        told.zip(&logged).all(|(told, logged)| told["loss"] == logged["loss"] && told["answers"] == logged["answers"])
    );
    assert_eq!(of("eval")[1]["answers"][0]["prompt"], "What is 2 + 3?");
    assert_eq!((&of("end")[0]["steps"], &of("end")[0]["outcome"]), (&4.into(), &"finished".into()));
    // A folder that holds a run is an error as ever.
    bench.fails(&["train", "qlora.toml", "--json"], 3, &["run", "--overwrite"]);
    bench.fails(&["train", "qlora.toml", "--json", "--quiet"], 2, &["--quiet"]);
}

#[test]
fn a_quiet_run_warns_and_tells_what_came_of_it() {
    let bench = Bench::new();
    let run =
        bench
            .ok(&[&["train", "qlora.toml", "--quiet", "--set", "train.embedding_learning_rate=1e-5"][..], &EVAL]
                .concat());
    let warning = "warning: train.embedding_learning_rate does nothing";
    assert!(run.stderr.starts_with(warning) && run.stderr.lines().count() == 1, "{}", run.stderr);
    assert!(run.stdout.contains("Adapter  run/adapter"), "{}", run.stdout);
}

#[test]
fn commands_take_a_runs_folder_and_give_objects() {
    let bench = Bench::new();
    bench.ok(&["train", "qlora.toml", "--quiet"]);
    let object = |args: &[&str]| {
        let lines = objects(&bench.ok(args));
        assert_eq!(lines.len(), 1, "{args:?}");
        lines.into_iter().next().expect("a line")
    };
    let merged = object(&["merge", "--adapter", "run", "--output", "merged", "--json"]);
    assert_eq!((&merged["output"], &merged["changed_weights"]), (&"merged".into(), &42.into()));
    assert_eq!(merged["layers"].as_array().map(Vec::len), Some(6));
    let converted = object(&["convert", "--adapter", "run", "--output", "run.gguf", "--type", "q8_0", "--json"]);
    assert_eq!((&converted["what"], &converted["type"]), (&"GGUF, merged".into(), &"q8_0".into()));
    let preview = object(&["preview", "qlora.toml", "--rows", "2", "--json"]);
    assert_eq!((&preview["rows"], preview["shown"].as_array().map(Vec::len)), (&12.into(), Some(2)));
    for (path, kind) in [
        ("run", "run"),
        ("run/adapter", "adapter"),
        ("run/checkpoint-000004", "training_checkpoint"),
        ("merged", "model"),
        ("merged/model.safetensors", "safetensors"),
        ("run.gguf", "gguf"),
    ] {
        assert_eq!(object(&["inspect", path, "--json"])["kind"], kind, "{path}");
    }
    let gguf = object(&["inspect", "run.gguf", "--json"]);
    assert_eq!(gguf["metadata"]["general.architecture"], "llama");
    assert_eq!(gguf["tensors"]["parameters"], object(&["inspect", "merged", "--json"])["tensors"]["parameters"]);
    let text = bench.ok(&["inspect", "run.gguf"]).stdout;
    for word in ["GGUF, ", "general.architecture", "blk.*.attn_q.weight", "Q8_0"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    let ask = ["generate", "--device", "cpu", "--prompt", "Hello", "--max-new-tokens", "4", "--adapter"];
    let answer = bench.ok(&[&ask[..], &["run"]].concat()).stdout;
    assert_eq!(bench.ok(&[&ask[..], &["run/adapter"]].concat()).stdout, answer);
    // Without an adapter the newest checkpoint stands for the run.
    std::fs::remove_dir_all(bench.path("run/adapter")).expect("removed");
    let run = bench.ok(&[&ask[..], &["run"]].concat());
    assert!(run.stdout == answer && run.stderr.contains("its checkpoint of step 4 is taken"), "{}", run.stderr);
}

#[test]
fn a_gguf_file_that_is_cut_short_is_refused() {
    let bench = Bench::new();
    let model = reference("tiny-llama").display().to_string();
    bench.ok(&["convert", "--model", &model, "--output", "whole.gguf"]);
    let bytes = bench.read("whole.gguf");
    std::fs::write(bench.path("cut.gguf"), &bytes[..bytes.len() - 64]).expect("written");
    bench.fails(&["inspect", "cut.gguf"], 3, &["cut.gguf", "cut short"]);
}

#[test]
fn shells_and_man_get_every_command() {
    let bench = Bench::new();
    for (shell, word) in [("bash", "_qlora()"), ("zsh", "#compdef qlora"), ("fish", "complete -c qlora")] {
        let script = bench.ok(&["completions", shell]).stdout;
        assert!(script.contains(word) && script.contains("preview") && script.contains("accept-changes"), "{shell}");
    }
    let page = bench.ok(&["man"]).stdout;
    assert!(page.contains(".TH qlora 1") && page.contains("Exit codes"), "{page}");
    bench.ok(&["man", "--output", "man"]);
    let page = String::from_utf8(bench.read("man/qlora-train.1")).expect("text");
    assert!(page.contains(".TH qlora-train 1") && page.contains("overwrite"), "{page}");
}
