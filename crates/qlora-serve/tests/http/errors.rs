//! Every error in OpenAI's shape, naming the field.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::http::Request as HttpRequest;
use qlora_serve::http::router;
use qlora_serve::{Event, Limits, Reply, Request, ServeError};
use serde_json::{Value, json};
use tower::ServiceExt;

use super::support::{
    LIMITS, answer, ask, chat, chunks, completion, config, refused, response, run, says, send, server, server_with,
    tokenizer,
};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

#[test]
fn fields_with_values_that_cannot_be() {
    let cases = [
        (CHAT, chat(json!({ "temperature": 3 })), "temperature"),
        (CHAT, chat(json!({ "temperature": "warm" })), "temperature"),
        (CHAT, chat(json!({ "top_p": 0 })), "top_p"),
        (CHAT, chat(json!({ "top_k": -2 })), "top_k"),
        (CHAT, chat(json!({ "min_p": 1.5 })), "min_p"),
        (CHAT, chat(json!({ "repetition_penalty": 0 })), "repetition_penalty"),
        (CHAT, chat(json!({ "repetition_penalty": 1e-38 })), "repetition_penalty"),
        (CHAT, chat(json!({ "stop_token_ids": vec![5; 1025] })), "stop_token_ids"),
        (COMPLETIONS, completion(json!({ "prompt": vec![5; 600_000], "n": 256 })), "prompt"),
        (CHAT, chat(json!({ "presence_penalty": -2.5 })), "presence_penalty"),
        (CHAT, chat(json!({ "logit_bias": { "x": 1 } })), "logit_bias"),
        (CHAT, chat(json!({ "logit_bias": { "4096": 1 } })), "logit_bias"),
        (CHAT, chat(json!({ "logit_bias": { "1": 101 } })), "logit_bias"),
        (CHAT, chat(json!({ "n": 0 })), "n"),
        (CHAT, chat(json!({ "n": 257 })), "n"),
        (CHAT, chat(json!({ "max_tokens": 0 })), "max_tokens"),
        (CHAT, chat(json!({ "max_tokens": -1 })), "max_tokens"),
        (CHAT, chat(json!({ "stop": 5 })), "stop"),
        (CHAT, chat(json!({ "stop": vec!["a"; 17] })), "stop"),
        (CHAT, chat(json!({ "stop": "" })), "stop"),
        (CHAT, chat(json!({ "stop_token_ids": [4096] })), "stop_token_ids"),
        (CHAT, chat(json!({ "top_logprobs": 2 })), "top_logprobs"),
        (CHAT, chat(json!({ "logprobs": true, "top_logprobs": 21 })), "top_logprobs"),
        (CHAT, chat(json!({ "stream_options": {} })), "stream_options"),
        (CHAT, json!({ "model": "base" }), "messages"),
        (COMPLETIONS, json!({ "model": "base" }), "prompt"),
        (CHAT, chat(json!({ "response_format": {} })), "response_format.type"),
        (CHAT, chat(json!({ "messages": [] })), "messages"),
        (CHAT, chat(json!({ "messages": [{ "role": "user" }] })), "messages[0]"),
        (CHAT, chat(json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url" }] }] })), "messages[0]"),
        (CHAT, chat(json!({ "messages": [{ "role": "user", "content": "word ".repeat(600) }] })), "messages"),
        (CHAT, chat(json!({ "response_format": { "type": "xml" } })), "response_format.type"),
        (CHAT, chat(json!({ "response_format": { "type": "json_schema" } })), "response_format.json_schema"),
        (CHAT, chat(json!({ "tool_choice": "required" })), "tool_choice"),
        (CHAT, chat(json!({ "tool_choice": "any" })), "tool_choice"),
        (CHAT, chat(json!({ "tools": [{ "type": "function", "function": { "name": "f" } }] })), "tools"),
        (
            CHAT,
            chat(json!({ "tools": [{ "type": "function", "function": { "name": "a b" } }] })),
            "tools[0].function.name",
        ),
        (CHAT, chat(json!({ "tools": [{ "type": "web_search" }] })), "tools[0]"),
        (COMPLETIONS, completion(json!({ "prompt": 5 })), "prompt"),
        (COMPLETIONS, completion(json!({ "prompt": [] })), "prompt"),
        (COMPLETIONS, completion(json!({ "prompt": [[]] })), "prompt"),
        (COMPLETIONS, completion(json!({ "prompt": ["a", 5] })), "prompt[1]"),
        (COMPLETIONS, completion(json!({ "prompt": [4096] })), "prompt"),
        (COMPLETIONS, completion(json!({ "prompt": [-1] })), "prompt[0]"),
        (COMPLETIONS, completion(json!({ "prompt": vec![5; 512] })), "prompt"),
        (COMPLETIONS, completion(json!({ "prompt": vec!["a"; 300] })), "prompt"),
        (COMPLETIONS, completion(json!({ "logprobs": 21 })), "logprobs"),
        (COMPLETIONS, completion(json!({ "logprobs": true })), "logprobs"),
        (COMPLETIONS, completion(json!({ "best_of": 2 })), "best_of"),
        // Known, and not done here.
        (COMPLETIONS, completion(json!({ "suffix": "end" })), "suffix"),
        (COMPLETIONS, completion(json!({ "use_beam_search": true })), "use_beam_search"),
        (COMPLETIONS, completion(json!({ "tools": [{}] })), "tools"),
        (COMPLETIONS, completion(json!({ "top_logprobs": 2 })), "top_logprobs"),
        (CHAT, chat(json!({ "echo": true })), "echo"),
        (CHAT, chat(json!({ "best_of": 2 })), "best_of"),
        (CHAT, chat(json!({ "modalities": ["text", "audio"] })), "modalities"),
        (CHAT, chat(json!({ "functions": [{ "name": "f" }] })), "functions"),
        (CHAT, chat(json!({ "guided_regex": "a+" })), "guided_regex"),
        (CHAT, chat(json!({ "min_tokens": 5 })), "min_tokens"),
        ("/tokenize", json!({}), "prompt"),
        ("/tokenize", json!({ "prompt": "a", "messages": [] }), "prompt"),
        ("/detokenize", json!({ "tokens": [4096] }), "tokens"),
        ("/v1/load_lora_adapter", json!({ "lora_name": "base", "lora_path": "/x" }), "lora_name"),
        ("/v1/load_lora_adapter", json!({ "lora_name": "", "lora_path": "/x" }), "lora_name"),
    ];
    run(async {
        let (script, seen) = says("x");
        let state = server(tokenizer(), config(), script);
        for (path, body, param) in cases {
            let (status, error) = refused(&state, path, body.clone()).await;
            assert_eq!((status, error["param"].as_str()), (400, Some(param)), "{body} {error}");
            assert_eq!(error["type"], "invalid_request_error");
            assert!(error["code"].is_string());
            let message = error["message"].as_str().unwrap();
            assert!(message.contains(param.split(['.', '[']).next().unwrap()) || param == "messages", "{message}");
        }
        assert!(seen.lock().unwrap().is_empty(), "nothing of it reached the engine");
        // Values that change nothing are no reason to refuse.
        let neutral = json!({
            "suffix": null, "min_tokens": 0, "length_penalty": 1, "modalities": ["text"], "best_of": null,
            "function_call": "none", "bad_words": [],
        });
        assert_eq!(send(&state, "POST", CHAT, Some(chat(neutral))).await.0, 200);
    });
}

/// Messages speak of JSON, not of the server's types.
#[test]
fn what_a_message_says() {
    let cases = [
        (CHAT, chat(json!({ "max_tokens": "5" })), "max_tokens: must be a whole number, 0 or more, not \"5\""),
        (CHAT, chat(json!({ "max_tokens": -1 })), "max_tokens: must be a whole number, 0 or more, not -1"),
        (CHAT, chat(json!({ "seed": 1.5 })), "seed: must be a whole number, not 1.5"),
        (CHAT, chat(json!({ "temperature": true })), "temperature: must be a number, not true"),
        (CHAT, chat(json!({ "stream": 1 })), "stream: must be true or false, not 1"),
        (CHAT, chat(json!({ "response_format": "json" })), "response_format: must be an object, not \"json\""),
        (CHAT, chat(json!({ "messages": {} })), "messages: must be a list, not an object"),
        (CHAT, chat(json!({ "logit_bias": [] })), "logit_bias: must be an object, not a list"),
        (CHAT, chat(json!({ "stop": 5 })), "stop: must be a string or a list of strings, not 5"),
        (
            COMPLETIONS,
            completion(json!({ "prompt": [99999] })),
            "prompt: 99999 is no token: the vocabulary ends at 4096",
        ),
        (
            COMPLETIONS,
            completion(json!({ "prompt": vec!["a"; 300], "n": 1 })),
            "prompt: 300 prompts with 1 answer each are more than 256 answers",
        ),
        (
            CHAT,
            chat(json!({ "tools": [{ "type": "function", "function": { "name": "f" } }] })),
            "tools: the chat template of base writes no tools in a form that is known; the server's --chat-template gives another one",
        ),
    ];
    run(async {
        let (script, _) = says("x");
        let state = server(tokenizer(), config(), script);
        for (path, body, message) in cases {
            let (status, error) = refused(&state, path, body).await;
            assert_eq!((status, error["message"].as_str()), (400, Some(message)));
        }
        let long = "é".repeat(1000);
        let (_, error) = refused(&state, CHAT, chat(json!({ "max_tokens": long }))).await;
        let message = error["message"].as_str().unwrap();
        assert!(message.ends_with("é…") && message.chars().count() < 130, "{message}");
    });
    assert_eq!(
        ServeError::TooManyAdapters { max_adapters: 1 }.to_string(),
        "1 adapter is loaded, as many as the server takes: unload one first"
    );
    assert_eq!(ServeError::Busy { waiting: 1 }.to_string(), "1 request waits already: try again later");
    assert_eq!(ServeError::Busy { waiting: 2 }.to_string(), "2 requests wait already: try again later");
}

#[test]
fn bodies_that_are_no_requests() {
    run(async {
        let (script, _) = says("x");
        let mut config = config();
        config.max_body_bytes = 1000;
        let state = server(tokenizer(), config, script);
        let post = |kind: &'static str, body: String| {
            let request = HttpRequest::post(CHAT).header("content-type", kind).body(Body::from(body)).unwrap();
            let router = router(state.clone());
            async move {
                let response = router.oneshot(request).await.unwrap();
                let status = response.status().as_u16();
                let bytes = to_bytes(response.into_body(), 1 << 20).await.unwrap();
                let json: Value = serde_json::from_slice(&bytes).unwrap();
                (status, json["error"]["code"].as_str().unwrap().to_owned())
            }
        };
        assert_eq!(post("application/json", "{\"model\": ".into()).await, (400, "invalid_json".into()));
        assert_eq!(post("application/json", "[1]".into()).await, (400, "invalid_json".into()));
        assert_eq!(post("application/json", chat(json!({})).to_string() + "}").await, (400, "invalid_json".into()));
        assert_eq!(post("text/plain", chat(json!({})).to_string()).await, (415, "not_json".into()));
        let long = chat(json!({ "user": "x".repeat(1000) })).to_string();
        assert_eq!(post("application/json; charset=utf-8", long).await, (413, "body_too_large".into()));
    });
}

#[test]
fn paths_methods_and_models_that_are_not() {
    run(async {
        let (script, _) = says("x");
        let state = server(tokenizer(), config(), script);
        let error = |text: String| serde_json::from_str::<Value>(&text).unwrap()["error"].clone();
        let (status, text) = send(&state, "GET", "/v1/nothing", None).await;
        assert_eq!((status, &error(text)["code"]), (404, &json!("unknown_path")));
        let (status, text) = send(&state, "GET", CHAT, None).await;
        assert_eq!((status, &error(text)["code"]), (405, &json!("wrong_method")));
        let (status, text) = send(&state, "GET", "/v1/models/other", None).await;
        assert_eq!((status, &error(text)["code"]), (404, &json!("model_not_found")));
        for (path, body) in
            [(CHAT, chat(json!({ "model": "other" }))), (COMPLETIONS, completion(json!({ "model": "other" })))]
        {
            let (status, error) = refused(&state, path, body).await;
            assert_eq!(status, 404);
            assert_eq!((&error["code"], &error["param"]), (&json!("model_not_found"), &json!("model")));
        }
    });
}

#[test]
fn the_key_opens_all_but_page_and_health() {
    run(async {
        let (script, _) = says("x");
        let mut config = config();
        config.api_key = Some("secret".into());
        let state = server(tokenizer(), config, script);
        let status = |path: &'static str, key: Option<&'static str>| {
            let state = state.clone();
            async move {
                let headers: Vec<(&str, &str)> = key.into_iter().map(|key| ("authorization", key)).collect();
                let response = response(&state, "GET", path, None, &headers).await;
                (response.status().as_u16(), response.headers().contains_key("www-authenticate"))
            }
        };
        for key in
            [None, Some("secret"), Some("Bearer wrong"), Some("Bearer secre"), Some("Bearer secrets"), Some("Bearer ")]
        {
            assert_eq!(status("/v1/models", key).await, (401, true), "{key:?}");
        }
        assert_eq!(status("/v1/models", Some("Bearer secret")).await, (200, false));
        assert_eq!(status("/v1/models", Some("bearer secret")).await, (200, false));
        assert_eq!(status("/metrics", None).await, (401, true));
        assert_eq!(status("/nothing", None).await, (401, true));
        assert_eq!(status("/health", None).await, (200, false));
        assert_eq!(status("/", None).await, (200, false));
    });
}

#[test]
fn a_full_queue_asks_to_come_again() {
    run(async {
        // The engine is busy with its first request until the test is over.
        let held: Arc<Mutex<Vec<Reply>>> = Arc::default();
        let replies = held.clone();
        let (release, wait) = std::sync::mpsc::channel::<()>();
        let script = Box::new(move |_, reply| {
            replies.lock().unwrap().push(reply);
            wait.recv().ok();
        });
        let state = server_with(tokenizer(), config(), Limits { max_waiting: 1, ..LIMITS }, script);
        let mut first = Box::pin(send(&state, "POST", CHAT, Some(chat(json!({})))));
        let mut second = Box::pin(send(&state, "POST", CHAT, Some(chat(json!({})))));
        let wait = Duration::from_millis(200);
        assert!(tokio::time::timeout(wait, &mut first).await.is_err());
        assert_eq!(held.lock().unwrap().len(), 1, "the first runs");
        assert!(tokio::time::timeout(wait, &mut second).await.is_err(), "the second waits");
        let response = response(&state, "POST", CHAT, Some(chat(json!({}))), &[]).await;
        assert_eq!(response.status(), 429);
        assert_eq!(response.headers()["retry-after"], "1");
        drop((first, second));
        assert!(held.lock().unwrap()[0].is_cancelled(), "who goes away cancels");
        drop(release);
    });
}

#[test]
fn more_answers_than_places_take_turns() {
    run(async {
        // Each request waits in the queue for a while.
        let script = Box::new(|request: Request, reply: Reply| {
            std::thread::sleep(Duration::from_millis(5));
            answer(&request, &reply, &[request.prompt[0]]);
        });
        let state = server_with(tokenizer(), config(), Limits { max_waiting: 2, ..LIMITS }, script);
        let prompts: Vec<Vec<u32>> = (10..30).map(|id| vec![id]).collect();
        let request = completion(json!({ "prompt": prompts, "n": 2, "skip_special_tokens": false }));
        let (first, second) =
            tokio::join!(ask(&state, COMPLETIONS, request.clone()), chunks(&state, COMPLETIONS, request.clone()),);
        let expected: Vec<String> = (10..30).map(|id| tokenizer().decode(&[id], false).unwrap()).collect();
        let choices = first["choices"].as_array().unwrap();
        assert_eq!(choices.len(), 40);
        for (index, choice) in choices.iter().enumerate() {
            assert_eq!(choice["text"], expected[index / 2], "{index}");
        }
        let ended = second.iter().filter(|chunk| !chunk["choices"][0]["finish_reason"].is_null()).count();
        assert_eq!(ended, 40);
        // What can't be answered is told before anything runs.
        let (status, error) =
            refused(&state, COMPLETIONS, completion(json!({ "prompt": vec![vec![5], vec![4096]] }))).await;
        assert_eq!((status, &error["code"]), (400, &json!("unknown_token")));
        assert_eq!(state.handle().counters().waiting.load(Ordering::Relaxed), 0);
    });
}

#[test]
fn failures_of_the_engine() {
    run(async {
        let fail = |_, reply: Reply| {
            reply.send(Event::Failed("out of memory".into()));
        };
        let state = server(tokenizer(), config(), Box::new(fail));
        let (status, error) = refused(&state, CHAT, chat(json!({}))).await;
        assert_eq!((status, &error["message"], &error["type"]), (500, &json!("out of memory"), &json!("server_error")));
        // In a stream the error is an event.
        let events = chunks(&state, CHAT, chat(json!({}))).await;
        assert_eq!(events.last().unwrap()["error"]["message"], "out of memory");

        let state = server(tokenizer(), config(), Box::new(|_, reply| drop(reply)));
        // An answer that breaks off while the engine is not closing.
        assert_eq!(refused(&state, CHAT, chat(json!({}))).await.0, 500);
        state.handle().close();
        let (status, error) = refused(&state, CHAT, chat(json!({}))).await;
        assert_eq!((status, &error["code"]), (503, &json!("shutting_down")));
        assert_eq!(send(&state, "GET", "/health", None).await.0, 503);
    });
}

#[test]
fn an_answer_that_takes_too_long() {
    run(async {
        let held: Arc<Mutex<Vec<Reply>>> = Arc::default();
        let replies = held.clone();
        let mut config = config();
        config.request_timeout = Duration::from_millis(50);
        let state = server(tokenizer(), config, Box::new(move |_, reply| replies.lock().unwrap().push(reply)));
        let (status, error) = refused(&state, CHAT, chat(json!({}))).await;
        assert_eq!((status, &error["code"]), (504, &json!("timeout")));
        let events = chunks(&state, CHAT, chat(json!({}))).await;
        assert_eq!(events.last().unwrap()["error"]["code"], "timeout");
        assert!(held.lock().unwrap().iter().all(Reply::is_cancelled));
    });
}

/// An engine that fails is told apart from one that closes.
#[test]
fn a_failed_engine() {
    run(async {
        let script = Box::new(|_: Request, _: Reply| panic!("as a test wants it"));
        let state = server(tokenizer(), config(), script);
        let (status, error) = refused(&state, CHAT, chat(json!({}))).await;
        assert_eq!((status, &error["code"]), (500, &json!("internal_error")), "{error}");
        assert!(state.handle().ended().await);
        let (status, error) = refused(&state, CHAT, chat(json!({}))).await;
        assert_eq!((status, &error["code"]), (500, &json!("internal_error")), "{error}");
        assert_eq!(send(&state, "GET", "/health", None).await.0, 500);
        let (script, _) = says("x");
        let state = server(tokenizer(), config(), script);
        state.handle().close();
        assert!(!state.handle().ended().await);
        let (status, error) = refused(&state, CHAT, chat(json!({}))).await;
        assert_eq!((status, &error["code"]), (503, &json!("shutting_down")), "{error}");
    });
}

#[test]
fn what_is_before_the_body_is_bounded_and_checked() {
    run(async {
        let (script, _) = says("x");
        let state = server(tokenizer(), config(), script);
        for (size, status) in [(60_000, 200), (70_000, 431)] {
            let response = response(&state, "GET", "/v1/models", None, &[("x-long", &"a".repeat(size))]).await;
            assert_eq!(response.status().as_u16(), status);
        }
        let (status, text) = send(&state, "GET", "/v1/models/%ff", None).await;
        let error: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((status, &error["error"]["param"]), (400, &json!("model")), "{text}");
    });
}
