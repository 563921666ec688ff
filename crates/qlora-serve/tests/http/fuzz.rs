//! Bodies of every kind: each gets an answer or an error in OpenAI's shape, and none makes the server fail.

use std::sync::OnceLock;

use axum::body::{Body, to_bytes};
use axum::http::Request;
use proptest::prelude::*;
use qlora_serve::http::{HttpState, router};
use serde_json::{Value, json};
use tower::ServiceExt;

use super::support::{chat, completion, config, run, says, server, tokenizer_with};

const PATHS: [&str; 6] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/tokenize",
    "/detokenize",
];

/// Names of fields, some of them of no request.
const FIELDS: [&str; 40] = [
    "model",
    "messages",
    "prompt",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "n",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "logprobs",
    "top_logprobs",
    "response_format",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "chat_template_kwargs",
    "reasoning_effort",
    "add_generation_prompt",
    "echo",
    "best_of",
    "add_special_tokens",
    "suffix",
    "guided_json",
    "lora_name",
    "lora_path",
    "tokens",
    "return_token_strs",
    "x",
];

fn values() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-3i64..5000).prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (-3.0..3.0).prop_map(Value::from),
        any::<f64>().prop_map(|number| json!(number)),
        r#"(base|user|assistant|system|text|json_object|json_schema|function|auto|required|é🙂|[a-z<>"]{0,4})"#
            .prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        let names = prop_oneof![
            r"(role|content|type|function|name|parameters|json_schema|schema|properties|items|enum|tool_calls|arguments|17)",
            "[a-z]{0,3}",
        ];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((names, inner), 0..4).prop_map(|fields| fields.into_iter().collect()),
        ]
    })
}

/// One server for all cases: what one of them does must not trouble the next.
static STATE: OnceLock<HttpState> = OnceLock::new();

fn state() -> HttpState {
    let (script, _) = says("x");
    let template = "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}{{ messages[-1].content }}";
    server(tokenizer_with(template), config(), script)
}

async fn check(state: &HttpState, path: &str, body: Vec<u8>) {
    let text = String::from_utf8_lossy(&body).into_owned();
    let request = Request::post(path).header("content-type", "application/json").body(Body::from(body)).unwrap();
    let response = router(state.clone()).oneshot(request).await.unwrap();
    let status = response.status();
    let bytes = to_bytes(response.into_body(), 1 << 24).await.unwrap();
    assert!(status == 200 || status.is_client_error(), "{status} for {text} at {path}: {bytes:?}");
    if status != 200 {
        let json: Value = serde_json::from_slice(&bytes).unwrap();
        let error = &json["error"];
        assert!(error["message"].is_string() && error["type"].is_string() && error["code"].is_string(), "{error}");
        assert!(error.get("param").is_some());
    }
}

proptest! {
    #[test]
    fn fields_of_any_value(
        fields in prop::collection::vec((prop::sample::select(&FIELDS), values()), 0..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
        byte: u8,
    ) {
        run(async {
            let state = STATE.get_or_init(state);
            for path in PATHS {
                let whole = if path == "/v1/completions" { completion(json!({})) } else { chat(json!({})) };
                let mut body = whole;
                for (name, value) in &fields {
                    body[name] = value.clone();
                }
                let mut bytes = body.to_string().into_bytes();
                if let Some(cut) = cut {
                    let at = cut.index(bytes.len());
                    bytes[at] = byte;
                }
                check(state, path, bytes).await;
            }
        });
    }
}
