//! `qlora serve` as a process: HTTP over plain TCP, and its end.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use common::{Bench, reference};
use serde_json::{Value, json};

/// Longer than anything takes here on a machine with much else to do.
const PATIENCE: Duration = Duration::from_secs(120);

/// A server that runs.
struct Server {
    child: Child,
    address: String,
}

impl Server {
    /// Starts one with an adapter called `plain`.
    fn start(bench: &Bench) -> Self {
        let model = reference("tiny-llama").display().to_string();
        let adapter = format!("plain={}", reference("adapters/plain").display());
        let args = ["serve", "--device", "cpu", "--model", &model, "--adapter", &adapter, "--port", "0"];
        let mut command = bench.command(&[&args[..], &["--cache-gib", "0.05"]].concat());
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().expect("the program starts");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines().map_while(Result::ok);
        let line = lines.find(|line| line.contains("http://")).expect("the server says where it listens");
        assert!(line.starts_with("tiny-llama, plain at "), "{line}");
        let address =
            line.split("http://").nth(1).and_then(|rest| rest.split(',').next()).expect("an address").to_string();
        // What else it says must find a reader.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, address }
    }

    /// Sends a request and returns the connection, from which the answer comes.
    fn send(&self, method: &str, path: &str, body: Option<&Value>) -> BufReader<TcpStream> {
        let mut stream = TcpStream::connect(&self.address).expect("the server listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let body = body.map(Value::to_string).unwrap_or_default();
        let head = format!("{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n", self.address);
        let content = format!("Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        stream.write_all((head + &content).as_bytes()).expect("the server reads");
        BufReader::new(stream)
    }

    /// The status and the body.
    fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, String) {
        let mut text = String::new();
        self.send(method, path, body).read_to_string(&mut text).expect("an answer in UTF-8");
        let (head, body) = text.split_once("\r\n\r\n").expect("a head");
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
        (status, body.to_string())
    }

    /// Waits for the end.
    fn end(mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "the server does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Of a test that failed; one that ended is gone already.
        drop(self.child.kill());
    }
}

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
    let signal = Command::new("kill").args(["-TERM", &server.child.id().to_string()]).status();
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
