//! `qlora push` to a hub on this machine.

#[path = "../../model-hub/tests/hub_server/mod.rs"]
mod hub_server;

mod common;

use common::{Bench, Run, reference};
use hub_server::{Rules, Server, TOKEN};

fn push(bench: &Bench, server: &Server, token: &str, args: &[&str]) -> Run {
    let mut command = bench.command(&[&["push"], args].concat());
    command.env("HF_ENDPOINT", &server.endpoint).env("HF_HOME", bench.path("hf")).env_remove("HF_HUB_OFFLINE");
    let output = command.env("HF_TOKEN", token).output().expect("the program starts");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Run { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

#[test]
fn a_trained_adapter_is_pushed_with_a_card() {
    let bench = Bench::new();
    bench.ok(&["train", "qlora.toml", "--set", "data.eval_fraction=0.2"]);
    // The card is small, the weights are large.
    let server = Server::start(&[], Rules { lfs_from: 100_000, ..Rules::default() });
    // Its base is a folder of this machine.
    let run = push(&bench, &server, TOKEN, &["run/adapter", "me/coins"]);
    assert_eq!(run.code, Some(2), "{}", run.stderr);
    assert!(run.stderr.contains("--base-model"), "{}", run.stderr);
    assert!(server.lines().is_empty());

    let args = ["run/adapter", "me/coins", "--base-model", "org/tiny-llama", "--private"];
    let shown = push(&bench, &server, TOKEN, &[&args[..], &["--dry-run"]].concat());
    assert!(server.lines().is_empty() && shown.stdout.contains("adapter_model.safetensors"), "{}", shown.stdout);
    for word in [
        "base_model: org/tiny-llama",
        "library_name: peft",
        "- qlora",
        "rows.jsonl: 10 rows",
        "2 more for evaluation",
        "1e-3",
        "Rank, alpha, dropout",
        "| 4, 16, 0 |",
        "Training loss",
        "Evaluation loss",
    ] {
        assert!(shown.stdout.contains(word), "{word}: {}", shown.stdout);
    }
    // Nothing of this machine's folders.
    let here = reference("tiny-llama").display().to_string();
    assert!(!shown.stdout.contains(&here), "{}", shown.stdout);

    let run = push(&bench, &server, TOKEN, &args);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    assert!(run.stdout.contains("Pushed   6 files to me/coins"), "{}", run.stdout);
    {
        let state = server.state();
        assert_eq!(state.repos.get("me/coins"), Some(&true));
        let paths: Vec<_> = state.commits[0][1..].iter().map(|line| line["value"]["path"].clone()).collect();
        let expected = [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "chat_template.jinja",
            "prompt_settings.json",
            "tokenizer_config.json",
        ];
        assert_eq!(paths, expected, "what prompts the adapter as its rows were written comes along");
        let object = state.objects.values().next().expect("the weights");
        assert!(*object == bench.read("run/adapter/adapter_model.safetensors"));
    }
    // A training checkpoint keeps its optimizer and configuration here.
    let run = push(&bench, &server, TOKEN, &["run/checkpoint-000004", "coins", "--base-model", "org/tiny-llama"]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    assert!(run.stdout.contains("to me/coins, the large ones known"), "{}", run.stdout);
    let state = server.state();
    assert!(state.commits[1].iter().all(|line| !line.to_string().contains("optimizer")));
}

#[test]
fn what_cannot_be_pushed_is_refused() {
    let bench = Bench::new();
    let server = Server::start(&[], Rules::default());
    let refused = |token: &str, args: &[&str], code: i32, words: &[&str]| {
        let run = push(&bench, &server, token, args);
        assert_eq!(run.code, Some(code), "{}", run.stderr);
        words.iter().for_each(|word| assert!(run.stderr.contains(word), "{word}: {}", run.stderr));
    };
    bench.copy("adapters/plain", "adapter");
    let base = ["--base-model", "org/tiny"];
    let with = |args: &[&'static str]| [args, &base].concat();
    refused("", &with(&["adapter", "me/x"]), 3, &["HF_TOKEN"]);
    refused("wrong", &with(&["adapter", "me/x"]), 3, &["token is not valid"]);
    refused(TOKEN, &["adapter", "me/x", "--base-model", "./here"], 2, &["./here", "org/name"]);
    refused(TOKEN, &["absent", "me/x"], 2, &["absent: no such folder"]);
    refused(TOKEN, &[".", "me/x"], 2, &["neither an adapter nor a checkpoint"]);
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("/etc/hostname", bench.path("adapter/notes.txt")).expect("a link");
        refused(TOKEN, &with(&["adapter", "me/x"]), 2, &["notes.txt is a link"]);
        std::fs::remove_file(bench.path("adapter/notes.txt")).expect("removed");
    }
    assert!(server.state().commits.is_empty());
    // Somebody's own card stays.
    bench.write("adapter/README.md", "# mine");
    let run = push(&bench, &server, TOKEN, &with(&["adapter", "me/x"]));
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    assert!(server.state().commits[0].iter().any(|line| line["value"]["content"] == "IyBtaW5l"));
}
