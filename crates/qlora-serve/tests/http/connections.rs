//! Real connections: timeouts, clients that go away, shutdown.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use qlora_serve::http::{HttpConfig, HttpState, serve};
use qlora_serve::{Event, Reply, Request, Token};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::support::{Script, answer, chat, config, run, says, server, tokenizer};

struct Server {
    address: std::net::SocketAddr,
    state: HttpState,
    stop: oneshot::Sender<()>,
    done: JoinHandle<std::io::Result<()>>,
}

async fn start(config: HttpConfig, script: Script) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let state = server(tokenizer(), config, script);
    let (stop, stopped) = oneshot::channel::<()>();
    let done = tokio::spawn(serve(listener, state.clone(), async {
        stopped.await.ok();
    }));
    Server { address, state, stop, done }
}

fn post(body: &serde_json::Value) -> String {
    let body = body.to_string();
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

async fn read_until(stream: &mut TcpStream, text: &str) -> String {
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let count = stream.read(&mut buffer).await.unwrap();
        assert!(count > 0, "the connection ended before {text:?}: {}", String::from_utf8_lossy(&all));
        all.extend(&buffer[..count]);
        let so_far = String::from_utf8_lossy(&all);
        if so_far.contains(text) {
            return so_far.into_owned();
        }
    }
}

/// What comes until the server closes.
async fn read_to_end(stream: &mut TcpStream) -> String {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).await.unwrap();
    String::from_utf8_lossy(&all).into_owned()
}

/// What an engine was asked.
type Held = Arc<Mutex<Vec<(Request, Reply)>>>;

/// An engine that keeps what it is asked, and answers when a test does.
fn holding() -> (Script, Held) {
    let held = Held::default();
    let keep = held.clone();
    (Box::new(move |request, reply| keep.lock().unwrap().push((request, reply))), held)
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..500 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what} did not come to be");
}

#[test]
fn requests_follow_each_other_on_a_connection() {
    run(async {
        let (script, _) = says("Yes.");
        let server = start(config(), script).await;
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        for _ in 0..3 {
            stream.write_all(post(&chat(json!({}))).as_bytes()).await.unwrap();
            let answer = read_until(&mut stream, "\"usage\"").await;
            assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("Yes."), "{answer}");
        }
    });
}

#[test]
fn who_goes_away_cancels_the_answer() {
    run(async {
        for stream_answer in [false, true] {
            let (script, held) = holding();
            let server = start(config(), script).await;
            let mut stream = TcpStream::connect(server.address).await.unwrap();
            stream.write_all(post(&chat(json!({ "stream": stream_answer }))).as_bytes()).await.unwrap();
            if stream_answer {
                read_until(&mut stream, "assistant").await;
            }
            until("the request", || !held.lock().unwrap().is_empty()).await;
            assert!(!held.lock().unwrap()[0].1.is_cancelled());
            drop(stream);
            until("the cancellation", || held.lock().unwrap()[0].1.is_cancelled()).await;
        }
    });
}

#[test]
fn chunks_are_sent_when_they_are_there() {
    run(async {
        let (script, held) = holding();
        let server = start(config(), script).await;
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(post(&chat(json!({ "stream": true }))).as_bytes()).await.unwrap();
        read_until(&mut stream, "assistant").await;
        until("the request", || !held.lock().unwrap().is_empty()).await;
        for word in ["one", " two"] {
            for id in tokenizer().encode(word, false).unwrap().ids {
                held.lock().unwrap()[0].1.send(Event::Token(Token { id, logprobs: None }));
            }
            read_until(&mut stream, word.trim()).await;
        }
    });
}

#[test]
fn shutdown_finishes_what_runs() {
    run(async {
        let (script, held) = holding();
        let server = start(config(), script).await;
        let mut idle = TcpStream::connect(server.address).await.unwrap();
        let mut busy = TcpStream::connect(server.address).await.unwrap();
        busy.write_all(post(&chat(json!({ "stream": true }))).as_bytes()).await.unwrap();
        read_until(&mut busy, "assistant").await;
        until("the request", || !held.lock().unwrap().is_empty()).await;

        server.stop.send(()).unwrap();
        // An idle connection is closed, and no other is taken.
        assert_eq!(read_to_end(&mut idle).await, "");
        assert!(TcpStream::connect(server.address).await.is_err());
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!server.done.is_finished());

        let ids = tokenizer().encode("The end.", false).unwrap().ids;
        let (request, reply) = held.lock().unwrap().pop().unwrap();
        answer(&request, &reply, &ids);
        let rest = read_to_end(&mut busy).await;
        assert!(rest.contains("[DONE]") && rest.contains("\"finish_reason\":\"stop\""), "{rest}");
        server.done.await.unwrap().unwrap();
        assert!(!server.state.handle().is_closed());
    });
}

#[test]
fn shutdown_does_not_wait_forever() {
    run(async {
        let (script, held) = holding();
        let mut config = config();
        config.request_timeout = Duration::from_millis(200);
        config.write_timeout = Duration::from_millis(200);
        let server = start(config, script).await;
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(post(&chat(json!({}))).as_bytes()).await.unwrap();
        until("the request", || !held.lock().unwrap().is_empty()).await;
        server.stop.send(()).unwrap();
        server.done.await.unwrap().unwrap();
        assert!(read_to_end(&mut stream).await.starts_with("HTTP/1.1 504"));
    });
}

#[test]
fn slow_requests_are_broken_off() {
    run(async {
        let (script, _) = says("x");
        let mut config = config();
        config.read_timeout = Duration::from_millis(200);
        let server = start(config, script).await;
        // A header that never ends, and a connection on which nothing comes.
        for begin in ["POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n", ""] {
            let mut stream = TcpStream::connect(server.address).await.unwrap();
            stream.write_all(begin.as_bytes()).await.unwrap();
            let rest = read_to_end(&mut stream).await;
            assert!(rest.is_empty() || rest.starts_with("HTTP/1.1 408"), "{rest}");
        }
        // A body that never ends.
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        let request = post(&chat(json!({})));
        stream.write_all(&request.as_bytes()[..request.len() - 5]).await.unwrap();
        let rest = read_to_end(&mut stream).await;
        assert!(rest.starts_with("HTTP/1.1 408") && rest.contains("body_timeout"), "{rest}");
    });
}

#[test]
fn who_does_not_read_is_dropped() {
    run(async {
        // An answer larger than the kernel's buffers, of which the client takes nothing.
        let cancelled = Arc::new(Mutex::new(false));
        let seen = cancelled.clone();
        let script = Box::new(move |_: Request, reply: Reply| {
            let seen = seen.clone();
            std::thread::spawn(move || {
                let ids = tokenizer().encode("word", false).unwrap().ids;
                for _ in 0..200_000 {
                    reply.send(Event::Token(Token { id: ids[0], logprobs: None }));
                }
                while !reply.is_cancelled() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                *seen.lock().unwrap() = true;
            });
        });
        let mut config = config();
        config.write_timeout = Duration::from_millis(300);
        let server = start(config, script).await;
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(post(&chat(json!({ "stream": true }))).as_bytes()).await.unwrap();
        for _ in 0..3000 {
            if *cancelled.lock().unwrap() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the answer goes on for a client that does not read");
    });
}

#[test]
fn connections_beyond_the_bound_wait() {
    run(async {
        let (script, _) = says("Yes.");
        let mut config = config();
        config.max_connections = 1;
        let server = start(config, script).await;
        let first = TcpStream::connect(server.address).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        let mut second = TcpStream::connect(server.address).await.unwrap();
        second.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut byte = [0];
        assert!(tokio::time::timeout(Duration::from_millis(200), second.read(&mut byte)).await.is_err());
        drop(first);
        assert!(read_until(&mut second, "\r\n\r\n").await.starts_with("HTTP/1.1 200"));
    });
}

#[test]
fn many_idle_connections_do_not_hinder_others() {
    run(async {
        let (script, _) = says("Yes.");
        let server = start(config(), script).await;
        let mut idle = Vec::new();
        // As many as usual limits of open files allow in one process: each takes two.
        for _ in 0..400 {
            idle.push(TcpStream::connect(server.address).await.unwrap());
        }
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(post(&chat(json!({}))).as_bytes()).await.unwrap();
        assert!(read_until(&mut stream, "\"usage\"").await.contains("Yes."));
    });
}
