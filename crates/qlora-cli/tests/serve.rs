//! `qlora serve` as a process: HTTP over plain TCP, and its end.

mod common;

use std::io::BufRead;
use std::process::Command;

use common::server::Server;
use common::{Bench, reference};
use serde_json::{Value, json};

/// A question to a model, with the likeliest tokens as its answer.
fn question(model: &str, max_tokens: usize, stream: bool) -> Value {
    let messages = json!([{ "role": "user", "content": "Hello" }]);
    json!({ "model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": stream })
}

/// The data of server-sent events in a body, chunked or not.
fn events(lines: impl Iterator<Item = String>) -> Vec<String> {
    lines.filter_map(|line| Some(line.strip_prefix("data: ")?.to_string())).collect()
}

/// The answer's text in such events.
fn content(events: &[String]) -> String {
    let texts = events.iter().filter_map(|event| {
        let event: Value = serde_json::from_str(event).ok()?;
        Some(event["choices"][0]["delta"]["content"].as_str()?.to_string())
    });
    texts.collect()
}

#[test]
fn base_and_adapter_answer_as_generate_does() {
    let bench = Bench::new();
    let server = Server::start(&bench);
    let (status, models) = server.ask("GET", "/v1/models", None);
    let models: Value = serde_json::from_str(&models).expect("JSON");
    let names: Vec<_> = models["data"].as_array().expect("a list").iter().map(|model| &model["id"]).collect();
    assert!(status == 200 && names == ["tiny-llama", "plain"], "{models}");

    let model = reference("tiny-llama").display().to_string();
    let adapter = reference("adapters/plain").display().to_string();
    let ask = ["generate", "--device", "cpu", "--model", &model, "--max-new-tokens", "8", "--prompt", "Hello"];
    for (name, more) in [("tiny-llama", &[][..]), ("plain", &["--adapter", &adapter])] {
        let expected = bench.ok(&[&ask[..], more].concat()).stdout;
        let (status, body) = server.ask("POST", "/v1/chat/completions", Some(&question(name, 8, true)));
        let events = events(body.lines().map(str::to_owned));
        assert_eq!((status, content(&events).as_str()), (200, expected.strip_suffix('\n').expect("a line")), "{body}");
        assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
    }

    let (status, body) = server.ask("POST", "/v1/chat/completions", Some(&question("nobody", 8, false)));
    let error: Value = serde_json::from_str(&body).expect("JSON");
    assert_eq!((status, &error["error"]["code"]), (404, &"model_not_found".into()), "{body}");
}

/// What a flag asks for and does not get is told, and a template that the model lacks can be given.
#[test]
fn flags_that_change_what_is_served() {
    let bench = Bench::new();
    let model = reference("tiny-llama").display().to_string();
    let plain = format!("plain={}", reference("adapters/plain").display());
    let template = "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}{{ messages[-1].content }}";
    bench.write("tools.jinja", template);
    let served = ["--device", "cpu", "--model", &model, "--adapter", &plain];
    let flags = [&served[..], &["--max-tokens", "100000", "--host", "localhost"]].concat();
    let server = Server::with(&bench, &flags);
    assert!(server.address.starts_with("127.0.0.1:"), "{}", server.address);
    let told = |server: &Server| server.notes.iter().any(|note| note.contains("room for 1024 tokens"));
    assert!(told(&server), "{:?}", server.notes);
    let tool = json!([{ "type": "function", "function": { "name": "time" } }]);
    let ask = |server: &Server, name: &str| {
        let mut ask = question(name, 400, false);
        ask["tools"] = tool.clone();
        ask["tool_choice"] = "required".into();
        ask["parallel_tool_calls"] = false.into();
        let (status, body) = server.ask("POST", "/v1/chat/completions", Some(&ask));
        (status, serde_json::from_str::<Value>(&body).expect("JSON"))
    };
    let (status, error) = ask(&server, "plain");
    let message = error["error"]["message"].as_str().expect("a text");
    assert!(status == 400 && message.contains("--chat-template"), "{error}");
    drop(server);
    let flags = [&served[..], &["--chat-template", "tools.jinja"]].concat();
    let server = Server::with(&bench, &flags);
    assert!(!told(&server), "{:?}", server.notes);
    for name in ["tiny-llama", "plain"] {
        let (status, answer) = ask(&server, name);
        assert_eq!((status, &answer["choices"][0]["finish_reason"]), (200, &"tool_calls".into()), "{answer}");
    }
    // The call ends the answer, which the metrics count as such.
    let finished = (0..100).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(50));
        server.ask("GET", "/metrics", None).1.contains("qlora_requests_finished_total 2\n")
    });
    assert!(finished, "{}", server.ask("GET", "/metrics", None).1);
    drop(server);
    bench.fails(
        &[&["serve"][..], &served[..], &["--host", "nowhere"]].concat(),
        2,
        &["--host", "localhost", "0.0.0.0"],
    );
    bench.fails(&[&["serve"][..], &served[..], &["--chat-template", "no.jinja"]].concat(), 3, &["no.jinja"]);
}

/// SIGTERM ends the server, and lets the answer that is under way come to its end first.
#[cfg(unix)]
#[test]
fn a_signal_lets_answers_finish() {
    let server = Server::start(&Bench::new());
    let tokens = 400;
    let mut ask = question("plain", tokens, true);
    ask["ignore_eos"] = true.into();
    ask["stream_options"] = json!({ "include_usage": true });
    let mut lines = server.send("POST", "/v1/chat/completions", Some(&ask)).lines().map_while(Result::ok);
    let begun = lines.find(|line| line.contains("\"content\":\""));
    assert!(begun.is_some(), "the answer begins");
    let signal = Command::new("kill").args(["-TERM", &server.id().to_string()]).status();
    assert!(signal.is_ok_and(|status| status.success()));
    let events = events(lines);
    let usage = events.iter().rev().find_map(|event| {
        let event: Value = serde_json::from_str(event).ok()?;
        event["usage"]["completion_tokens"].as_u64()
    });
    assert_eq!(usage, Some(tokens as u64), "{events:?}");
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
    assert_eq!(server.end().code(), Some(0));
}

/// A configuration is what was trained and what is served; flags go before it.
#[test]
fn a_configuration_is_served() {
    let bench = Bench::new();
    let config = String::from_utf8(bench.read("qlora.toml")).expect("text");
    bench.fails(&["serve", "--config", "qlora.toml"], 2, &["run/adapter is not there", "adapters = []"]);
    bench.write("served.toml", &format!("{config}[serve]\nmax_tokens = 50\n"));
    bench.ok(&["train", "served.toml", "--max-steps", "2"]);
    // What a server is told is nothing that a run goes on with.
    bench.write("served.toml", &format!("{config}[serve]\nmax_tokens = 40\n"));
    let resumed = bench.ok(&["train", "served.toml", "--resume"]);
    assert!(!resumed.stderr.contains("max_tokens"), "{}", resumed.stderr);

    let limit = |server: &Server| {
        let (status, body) = server.ask("POST", "/tokenize", Some(&json!({ "prompt": "Hello" })));
        let body: Value = serde_json::from_str(&body).expect("JSON");
        assert_eq!(status, 200, "{body}");
        body["max_model_len"].as_u64()
    };
    let server = Server::with(&bench, &["--config", "served.toml"]);
    assert_eq!((server.names.as_str(), limit(&server)), ("tiny-llama, run", Some(40)));
    let (status, body) = server.ask("POST", "/v1/chat/completions", Some(&question("run", 4, false)));
    assert_eq!(status, 200, "{body}");
    drop(server);
    let flags =
        ["--config", "served.toml", "--max-tokens", "30", "--served-name", "base", "--adapter", "one=run/adapter"];
    let server = Server::with(&bench, &flags);
    assert_eq!((server.names.as_str(), limit(&server)), ("base, one", Some(30)));
    drop(server);
    bench.write("served.toml", &format!("{config}[serve]\nadapters = []\n"));
    assert_eq!(Server::with(&bench, &["--config", "served.toml"]).names, "tiny-llama");

    for (serve, words) in [
        ("prot = 1", &["served.toml:17: unknown key `serve.prot`", "did you mean `port`?"][..]),
        ("port = 70000", &["served.toml:17: serve.port"]),
        ("host = \"nowhere\"", &["served.toml:17: serve.host", "localhost", "0.0.0.0"]),
        ("api_key = \"x\"", &["served.toml:17: unknown key `serve.api_key`", "QLORA_API_KEY"]),
        ("max_batch = 0", &["serve.max_batch = 0: must be 1 or more"]),
    ] {
        bench.write("served.toml", &format!("{config}[serve]\n{serve}\n"));
        bench.fails(&["serve", "--config", "served.toml", "--model", "x", "--adapter", "y"], 2, words);
        bench.fails(&["train", "served.toml", "--dry-run"], 2, words);
    }
    bench.fails(&["serve"], 2, &["give --model"]);
    bench.fails(&["serve", "--model", "x", "--api-key", ""], 2, &["--api-key"]);
}
