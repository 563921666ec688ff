//! A server that notes the requests that it gets.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

use serde_json::Value;

/// A request.
#[derive(Clone, Debug)]
pub(in crate::trackers) struct Request {
    /// Path and query, without the slash at the beginning.
    pub path: String,
    /// The header that names who asks.
    pub asks: String,
    pub body: Value,
}

pub(in crate::trackers) type Requests = Arc<Mutex<Vec<Request>>>;

/// A server with a status and a body for each request, and what it was asked.
pub(in crate::trackers) fn server(
    answer: impl Fn(&Request) -> (&'static str, Value) + Send + 'static,
) -> (String, Requests) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let requests = Requests::default();
    let noted = Arc::clone(&requests);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            let path = line.split(' ').nth(1).unwrap_or_default().trim_start_matches('/').to_string();
            let (mut length, mut asks) = (0, String::new());
            loop {
                let mut header = String::new();
                reader.read_line(&mut header).unwrap();
                let Some((name, value)) = header.split_once(": ") else { break };
                match name.to_lowercase().as_str() {
                    "content-length" => length = value.trim().parse().unwrap(),
                    "authorization" | "x-trackio-write-token" => asks = value.trim().to_string(),
                    _ => {}
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            let request = Request { path, asks, body: serde_json::from_slice(&body).unwrap_or_default() };
            let (status, answer) = answer(&request);
            noted.lock().unwrap().push(request);
            let answer = answer.to_string();
            let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", answer.len());
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(answer.as_bytes()));
        }
    });
    (address, requests)
}
