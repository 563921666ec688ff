//! Models and adapters from the hub's cache, and from a hub on this machine.

#[path = "../../model-hub/tests/hub_server/mod.rs"]
mod hub_server;

mod common;

use std::path::Path;

use common::{Bench, Run, reference};
use hub_server::{Rules, Server};

const COMMIT: &str = "1111111111111111111111111111111111111111";

/// Puts a recorded folder into a cache, as the only state of a repository.
fn cached(bench: &Bench, from: &str, cache: &str, repo: &str) -> std::path::PathBuf {
    let folder = format!("{cache}/models--{}", repo.replace('/', "--"));
    std::fs::create_dir_all(bench.path(&folder).join("refs")).expect("a folder");
    std::fs::write(bench.path(&folder).join("refs/main"), COMMIT).expect("written");
    bench.copy(from, &format!("{folder}/snapshots/{COMMIT}"))
}

fn run(bench: &Bench, args: &[&str], variables: &[(&str, &str)]) -> Run {
    let mut command = bench.command(args);
    command.envs(variables.iter().copied());
    Run::new(command.output().expect("the program starts"))
}

fn answer(model: &[&'static str]) -> Vec<&'static str> {
    let rest = ["--prompt", "Hello", "--device", "cpu", "--no-chat-template", "--max-new-tokens", "2"];
    [&["generate"], model, &rest].concat()
}

#[test]
fn an_adapter_and_the_base_that_it_names_are_found_in_the_cache() {
    let bench = Bench::new();
    cached(&bench, "tiny-llama", "home/hub", "org/base");
    let adapter = cached(&bench, "adapters/plain", "home/hub", "org/adapter");
    let path = adapter.join("adapter_config.json");
    let text = std::fs::read_to_string(&path).expect("text");
    let mut config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    config["base_model_name_or_path"] = "org/base".into();
    std::fs::write(&path, config.to_string()).expect("written");
    // The base's configuration beside it, as some trainers leave it.
    std::fs::copy(reference("tiny-llama").join("config.json"), adapter.join("config.json")).expect("a copy");
    let home = bench.path("home").display().to_string();
    let vars = [("HF_HOME", home.as_str())];
    let by_id = run(&bench, &answer(&["--adapter", "org/adapter"]), &vars);
    assert_eq!(by_id.code, Some(0), "{}", by_id.stderr);
    let weighted = run(&bench, &answer(&["--adapter", "mine=org/adapter:1.0"]), &vars);
    assert_eq!((weighted.code, weighted.stdout), (Some(0), by_id.stdout));
    let merged = run(&bench, &["merge", "--adapter", "org/adapter", "--output", "out"], &vars);
    assert_eq!(merged.code, Some(0), "{}", merged.stderr);
}

#[test]
fn the_cache_is_where_pythons_variables_put_it() {
    let bench = Bench::new();
    cached(&bench, "tiny-llama", ".cache/hf/hub", "org/base");
    let here = bench.path("").display().to_string();
    let hub = bench.path(".cache/hf/hub").display().to_string();
    for vars in [
        [("HOME", here.as_str()), ("HF_HOME", "~/.cache/hf")],
        [("HOME", here.as_str()), ("HF_HUB_CACHE", "$HOME/.cache/${PART}/hub")],
        [("HOME", "/nowhere"), ("HUGGINGFACE_HUB_CACHE", hub.as_str())],
    ] {
        let vars = [&vars[..], &[("PART", "hf")]].concat();
        let answered = run(&bench, &answer(&["--model", "org/base"]), &vars);
        assert_eq!(answered.code, Some(0), "{vars:?}: {}", answered.stderr);
    }
}

/// A hub on this machine that holds a recorded model.
fn server(rules: Rules) -> Server {
    let files = std::fs::read_dir(reference("tiny-llama")).expect("a recorded folder");
    let files: Vec<(String, Vec<u8>)> = files
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| path.is_file())
        .map(|path| (name_of(&path), std::fs::read(&path).expect("a readable file")))
        .collect();
    let files: Vec<(&str, &[u8])> = files.iter().map(|(name, content)| (name.as_str(), &content[..])).collect();
    Server::start(&files, rules)
}

fn name_of(path: &Path) -> String {
    path.file_name().expect("a name").to_string_lossy().into_owned()
}

#[test]
fn a_model_comes_through_a_proxy() {
    let bench = Bench::new();
    let server = server(Rules { lfs_from: usize::MAX, ..Rules::default() });
    let home = bench.path("home").display().to_string();
    let vars = [
        ("HF_HOME", home.as_str()),
        ("HF_HUB_OFFLINE", "0"),
        ("HF_ENDPOINT", "http://hub.invalid"),
        ("HTTP_PROXY", &server.endpoint),
        ("http_proxy", &server.endpoint),
        ("NO_PROXY", ""),
        ("no_proxy", ""),
    ];
    let answered = run(&bench, &answer(&["--model", "org/tiny"]), &vars);
    assert_eq!(answered.code, Some(0), "{}", answered.stderr);
    assert!(server.lines().iter().all(|line| line.contains(" http://hub.invalid/")), "{:?}", server.lines());
}

/// Ranks of a host share its cache: the first that comes loads a file, the others wait for it.
#[test]
fn ranks_of_a_host_download_once() {
    let bench = Bench::new();
    let server = server(Rules { lfs_from: usize::MAX, ..Rules::default() });
    let home = bench.path("home").display().to_string();
    let vars = [("HF_HOME", home.as_str()), ("HF_HUB_OFFLINE", "0"), ("HF_ENDPOINT", &server.endpoint)];
    let trained =
        run(&bench, &["train", "qlora.toml", "--model", "org/tiny", "--gpus", "4", "--max-steps", "1"], &vars);
    assert_eq!(trained.code, Some(0), "{}", trained.stderr);
    let lines = server.lines();
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        let path = format!("/resolve/{}/{file}", hub_server::SHA);
        let loads = lines.iter().filter(|line| line.starts_with("GET ") && line.contains(&path)).count();
        assert_eq!(loads, 1, "{file}: {lines:#?}");
    }
}

/// A hub that does not answer is one line, without the addresses of storage.
#[test]
fn a_hub_out_of_reach_is_said_once() {
    let bench = Bench::new();
    let server = server(Rules { refuse: Some((503, "")), ..Rules::default() });
    let home = bench.path("home").display().to_string();
    let vars = [("HF_HOME", home.as_str()), ("HF_HUB_OFFLINE", "0"), ("HF_ENDPOINT", &server.endpoint)];
    let answered = run(&bench, &answer(&["--model", "org/tiny"]), &vars);
    assert_eq!(answered.code, Some(3), "{}", answered.stderr);
    assert_eq!(answered.stderr.trim().lines().count(), 1, "{}", answered.stderr);
    assert!(
        answered.stderr.contains("org/tiny (revision main)") && answered.stderr.contains("503"),
        "{}",
        answered.stderr
    );
}
