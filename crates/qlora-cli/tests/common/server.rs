//! `qlora serve` as a process, and HTTP over plain TCP.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Bench, reference};

/// Longer than anything takes here on a machine with much else to do.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A server that runs.
pub struct Server {
    child: Child,
    /// Where it listens.
    pub address: String,
    /// What it says before.
    pub notes: Vec<String>,
    /// Who answers, as it says when it starts.
    pub names: String,
}

impl Server {
    /// Starts one with an adapter called `plain`.
    pub fn start(bench: &Bench) -> Self {
        let model = reference("tiny-llama").display().to_string();
        let adapter = format!("plain={}", reference("adapters/plain").display());
        let server = Self::with(bench, &["--device", "cpu", "--model", &model, "--adapter", &adapter]);
        assert_eq!(server.names, "tiny-llama, plain");
        server
    }

    /// Starts one with these flags.
    pub fn with(bench: &Bench, flags: &[&str]) -> Self {
        let mut command = bench.command(&[&["serve", "--port", "0", "--cache-gib", "0.05"], flags].concat());
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().expect("the program starts");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines().map_while(Result::ok);
        let mut notes = Vec::new();
        let line = loop {
            let line = lines.next().expect("the server says where it listens");
            if line.contains("http://") {
                break line;
            }
            notes.push(line);
        };
        let (names, rest) = line.split_once(" at http://").expect("names and an address");
        let (names, address) = (names.to_string(), rest.split(',').next().expect("an address").to_string());
        // What else it says must find a reader.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, address, notes, names }
    }

    /// Sends a request and returns the connection, from which the answer comes.
    pub fn send(&self, method: &str, path: &str, body: Option<&Value>) -> BufReader<TcpStream> {
        let mut stream = TcpStream::connect(&self.address).expect("the server listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let body = body.map(Value::to_string).unwrap_or_default();
        let head = format!("{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n", self.address);
        let content = format!("Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        stream.write_all((head + &content).as_bytes()).expect("the server reads");
        BufReader::new(stream)
    }

    /// The status and the body.
    pub fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, String) {
        let mut text = String::new();
        self.send(method, path, body).read_to_string(&mut text).expect("an answer in UTF-8");
        let (head, body) = text.split_once("\r\n\r\n").expect("a head");
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
        (status, body.to_string())
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the end.
    pub fn end(mut self) -> ExitStatus {
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
