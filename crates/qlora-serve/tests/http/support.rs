//! An engine that follows a script, and a client that asks the router.

use std::future::Future;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::http::{Request as HttpRequest, Response};
use chat_text::{Prompting, Tokenizer};
use qlora_serve::http::{HttpConfig, HttpState, router};
use qlora_serve::{
    AdapterInfo, Command, Event, FinishReason, Finished, Inbox, Limits, Reply, Request, ServeError, Token,
    TokenLogprobs, Usage, line,
};
use serde_json::{Value, json};
use tower::ServiceExt;

pub const TINY_LLAMA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/reference/tiny-llama");
pub const LIMITS: Limits = Limits { max_tokens: 512, vocab_size: 4096, max_waiting: 8, max_adapters: 2 };

/// Runs a test's future.
pub fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let limited = async { tokio::time::timeout(Duration::from_secs(60), test).await };
    runtime.block_on(limited).expect("a test hangs")
}

pub fn tokenizer() -> Tokenizer {
    Tokenizer::from_dir(TINY_LLAMA).unwrap()
}

/// The tiny model's tokenizer with another chat template.
pub fn tokenizer_with(template: &str) -> Tokenizer {
    let dir = tempfile::tempdir().unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"] {
        std::fs::copy(Path::new(TINY_LLAMA).join(file), dir.path().join(file)).unwrap();
    }
    std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    Tokenizer::from_dir(dir.path()).unwrap()
}

/// What an engine does with a request.
pub type Script = Box<dyn FnMut(Request, Reply) + Send>;

/// Requests that an engine got, without their constraints.
pub type Seen = Arc<Mutex<Vec<Request>>>;

pub fn config() -> HttpConfig {
    HttpConfig::new("base")
}

/// A server before an engine that follows a script.
pub fn server(tokenizer: Tokenizer, config: HttpConfig, script: Script) -> HttpState {
    server_with(tokenizer, config, LIMITS, script)
}

pub fn server_with(tokenizer: Tokenizer, config: HttpConfig, limits: Limits, script: Script) -> HttpState {
    let (handle, inbox) = line(limits);
    std::thread::spawn(move || engine(&inbox, script));
    HttpState::new(handle, tokenizer, config)
}

fn engine(inbox: &Inbox, mut script: Script) {
    let mut adapters: Vec<String> = Vec::new();
    let mut number = 0;
    while let Some(command) = inbox.next() {
        match command {
            Command::Generate(request, reply) => {
                inbox.counters().waiting.fetch_sub(1, Ordering::AcqRel);
                script(request, reply);
            }
            Command::LoadAdapter(name, dir, done) => {
                let result = match Prompting::of_adapter(&dir) {
                    Err(error) => Err(ServeError::Prompting { dir, source: Box::new(error) }),
                    Ok(_) if adapters.contains(&name) => Err(ServeError::NameTaken { name }),
                    Ok(prompting) => {
                        adapters.push(name.clone());
                        number += 1;
                        // Two tokens of its own.
                        let vocab_size = inbox.limits().vocab_size + 2;
                        let prompting = prompting.map(Arc::new);
                        inbox.announce(AdapterInfo { name, number, dir, loaded: 7, vocab_size, prompting });
                        Ok(())
                    }
                };
                done.send(result).ok();
            }
            Command::UnloadAdapter(name, done) => {
                let known = adapters.contains(&name);
                adapters.retain(|other| *other != name);
                inbox.withdraw(&name);
                done.send(if known { Ok(()) } else { Err(ServeError::UnknownAdapter { name }) }).ok();
            }
            Command::Wake if inbox.is_closed() => return,
            Command::Wake | Command::AdapterRead(..) | Command::DropAdapter(_) => {}
        }
    }
}

/// An engine that always says this, then the end token, and what it was asked.
pub fn says(text: &str) -> (Script, Seen) {
    says_tokens(tokenizer().encode(text, false).unwrap().ids)
}

/// As [`says`], in these tokens.
pub fn says_tokens(tokens: Vec<u32>) -> (Script, Seen) {
    let seen = Seen::default();
    let record = seen.clone();
    let script = move |request: Request, reply: Reply| {
        // Held until the request is there: a test that has its answer looks for it.
        let mut seen = record.lock().unwrap();
        answer(&request, &reply, &tokens);
        seen.push(request);
    };
    (Box::new(script), seen)
}

/// An engine that says this and does not end, after 48 tokens of the prompt came from its cache; and where it answers.
pub fn goes_on(text: &str) -> (Script, Arc<Mutex<Vec<Reply>>>) {
    let tokens = tokenizer().encode(text, false).unwrap().ids;
    let replies = Arc::new(Mutex::new(Vec::new()));
    let keep = replies.clone();
    let script = move |_: Request, reply: Reply| {
        reply.send(Event::Started { cached_tokens: 48 });
        tokens.iter().for_each(|&id| {
            reply.send(Event::Token(Token { id, logprobs: None }));
        });
        keep.lock().unwrap().push(reply);
    };
    (Box::new(script), replies)
}

/// Log probabilities that a test can tell: minus the id, over a thousand.
pub fn logprobs(id: u32, top: usize) -> TokenLogprobs {
    let logprob = |id: u32| -(id as f32) / 1000.0;
    TokenLogprobs { logprob: logprob(id), top: (0..top as u32).map(|k| (id + k, logprob(id + k))).collect() }
}

/// Answers with these tokens and the first stop id, as far as the request lets it.
pub fn answer(request: &Request, reply: &Reply, tokens: &[u32]) {
    reply.send(Event::Started { cached_tokens: 1 });
    if request.prompt_logprobs {
        let top = request.logprobs.unwrap();
        let rest = request.prompt[1..].iter().map(|&id| Some(logprobs(id, top)));
        reply.send(Event::Prompt(std::iter::once(None).chain(rest).collect()));
    }
    let end = request.stop_ids.first().copied();
    let all: Vec<u32> = tokens.iter().copied().chain(end).take(request.max_tokens).collect();
    let mut reason = FinishReason::Length;
    let mut completion_tokens = 0;
    for id in all {
        completion_tokens += 1;
        reply.send(Event::Token(Token { id, logprobs: request.logprobs.map(|top| logprobs(id, top)) }));
        if request.stop_ids.contains(&id) {
            reason = FinishReason::Stop;
            break;
        }
    }
    let usage = Usage { prompt_tokens: request.prompt.len(), cached_tokens: 1, completion_tokens };
    reply.send(Event::Finished(Finished { reason, usage }));
}

/// Asks, and gives status and body.
pub async fn send(state: &HttpState, method: &str, path: &str, body: Option<Value>) -> (u16, String) {
    let response = response(state, method, path, body, &[]).await;
    let status = response.status().as_u16();
    let bytes = to_bytes(response.into_body(), 1 << 24).await.unwrap();
    (status, String::from_utf8(bytes.to_vec()).unwrap())
}

pub async fn response(
    state: &HttpState,
    method: &str,
    path: &str,
    body: Option<Value>,
    headers: &[(&str, &str)],
) -> Response<Body> {
    let mut request = HttpRequest::builder().method(method).uri(path);
    if body.is_some() {
        request = request.header("content-type", "application/json");
    }
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let body = body.map_or_else(Body::empty, |body| Body::from(body.to_string()));
    router(state.clone()).oneshot(request.body(body).unwrap()).await.unwrap()
}

/// The JSON that a request is answered with; its status must be 200.
pub async fn ask(state: &HttpState, path: &str, body: Value) -> Value {
    let (status, text) = send(state, "POST", path, Some(body)).await;
    assert_eq!(status, 200, "{text}");
    serde_json::from_str(&text).unwrap()
}

/// The status and the error that a request is answered with.
pub async fn refused(state: &HttpState, path: &str, body: Value) -> (u16, Value) {
    let (status, text) = send(state, "POST", path, Some(body)).await;
    let json: Value = serde_json::from_str(&text).unwrap();
    (status, json["error"].clone())
}

/// The chunks that a request is answered with. The last event must be `[DONE]`.
pub async fn chunks(state: &HttpState, path: &str, mut body: Value) -> Vec<Value> {
    body["stream"] = true.into();
    let (status, text) = send(state, "POST", path, Some(body)).await;
    assert_eq!(status, 200, "{text}");
    let mut events: Vec<&str> =
        text.split_terminator("\n\n").map(|event| event.strip_prefix("data: ").unwrap()).collect();
    assert_eq!(events.pop(), Some("[DONE]"));
    events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
}

/// A chat request with one message.
pub fn chat(fields: Value) -> Value {
    let mut body = json!({ "model": "base", "messages": [{ "role": "user", "content": "What is 2 + 3?" }] });
    merge(&mut body, fields);
    body
}

/// A completion request.
pub fn completion(fields: Value) -> Value {
    let mut body = json!({ "model": "base", "prompt": "Once upon" });
    merge(&mut body, fields);
    body
}

fn merge(body: &mut Value, fields: Value) {
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
}
