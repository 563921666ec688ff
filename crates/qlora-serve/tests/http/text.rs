//! `/tokenize`, `/detokenize`, `/metrics`, `/health`.

use serde_json::{Value, json};

use super::support::{ask, chat, config, run, says, send, server, tokenizer};

#[test]
fn text_to_tokens_and_back() {
    run(async {
        let (script, _) = says("x");
        let state = server(tokenizer(), config(), script);
        let ids = tokenizer().encode("Grüße", true).unwrap().ids;
        let answer = ask(&state, "/tokenize", json!({ "prompt": "Grüße", "return_token_strs": true })).await;
        assert_eq!((&answer["tokens"], &answer["count"]), (&json!(ids), &json!(ids.len())));
        assert_eq!(answer["max_model_len"], 512);
        assert_eq!(answer["token_strs"].as_array().unwrap().len(), ids.len());
        let answer = ask(&state, "/detokenize", json!({ "model": "base", "tokens": ids })).await;
        assert_eq!(answer, json!({ "prompt": "Grüße" }));
        let messages = json!([{ "role": "user", "content": "Hi" }]);
        let answer = ask(&state, "/tokenize", json!({ "messages": messages, "add_generation_prompt": false })).await;
        let ids: Vec<u32> = answer["tokens"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
        assert_eq!(tokenizer().decode(&ids, false).unwrap(), "<|im_start|>user\nHi<|im_end|>\n");
        assert_eq!(answer["token_strs"], Value::Null);
    });
}

#[test]
fn metrics_count() {
    run(async {
        let (script, _) = says("one two");
        let state = server(tokenizer(), config(), script);
        ask(&state, "/v1/chat/completions", chat(json!({ "n": 2 }))).await;
        send(&state, "GET", "/nothing", None).await;
        let (status, text) = send(&state, "GET", "/metrics", None).await;
        assert_eq!(status, 200);
        let value = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.unwrap_or_else(|| panic!("{name} is missing in {text}")).parse::<f64>().unwrap()
        };
        assert_eq!(value("qlora_requests_total"), 2.0);
        assert_eq!(value("qlora_time_to_first_token_seconds_count"), 2.0);
        assert_eq!(value("qlora_time_to_first_token_seconds_bucket{le=\"+Inf\"}"), 2.0);
        assert_eq!(value("qlora_request_seconds_count"), 2.0);
        assert!(value("qlora_time_between_tokens_seconds_count") >= 2.0);
        assert_eq!(value("qlora_http_responses_total{status=\"200\"}"), 1.0);
        assert_eq!(value("qlora_http_responses_total{status=\"404\"}"), 1.0);
        // Each metric is described once, and every line is one of three kinds.
        let types: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
        let mut names: Vec<&str> = types.iter().map(|line| line.split(' ').next().unwrap()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), types.len());
        assert!(text.lines().all(|line| line.starts_with("# ") || line.starts_with("qlora_")));
    });
}
