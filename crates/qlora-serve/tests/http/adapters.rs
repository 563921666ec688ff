//! Adapters: loaded, listed, asked, prompted as they learned, unloaded.

use chat_text::ChatTemplate;
use serde_json::{Value, json};

use super::support::{ask, chat, config, refused, run, says, send, server, tokenizer};

const CHAT: &str = "/v1/chat/completions";
const LOAD: &str = "/v1/load_lora_adapter";

async fn models(state: &qlora_serve::http::HttpState) -> Vec<Value> {
    let (status, text) = send(state, "GET", "/v1/models", None).await;
    assert_eq!(status, 200);
    let list: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(list["object"], "list");
    list["data"].as_array().unwrap().clone()
}

#[test]
fn the_life_of_an_adapter() {
    run(async {
        let (script, seen) = says("x");
        let state = server(tokenizer(), config(), script);
        let dir = tempfile::tempdir().unwrap();
        let settings = json!({ "layout": "alpaca", "end_token": "<|endoftext|>", "system_prompt": "Be kind." });
        std::fs::write(dir.path().join("prompt_settings.json"), settings.to_string()).unwrap();

        let load = json!({ "lora_name": "team/kind", "lora_path": dir.path() });
        ask(&state, LOAD, load.clone()).await;
        let (status, error) = refused(&state, LOAD, load).await;
        assert_eq!((status, &error["param"]), (400, &json!("lora_name")));
        let listed = models(&state).await;
        assert_eq!(listed.iter().map(|model| &model["id"]).collect::<Vec<_>>(), ["base", "team/kind"]);
        assert_eq!((&listed[0]["parent"], &listed[1]["parent"]), (&Value::Null, &json!("base")));
        let (status, text) = send(&state, "GET", "/v1/models/team/kind", None).await;
        assert_eq!((status, serde_json::from_str::<Value>(&text).unwrap()), (200, listed[1].clone()));

        let answer = ask(&state, CHAT, chat(json!({ "model": "team/kind" }))).await;
        assert_eq!(answer["model"], "team/kind");
        ask(&state, CHAT, chat(json!({}))).await;
        {
            let seen = seen.lock().unwrap();
            let name = |index: usize| seen[index].adapter.as_ref().map(|adapter| adapter.info().name.as_str());
            assert_eq!((name(0), name(1)), (Some("team/kind"), None));
            let prompt = tokenizer().decode(&seen[0].prompt, false).unwrap();
            assert_eq!(prompt, "Be kind.\n\n### Instruction:\nWhat is 2 + 3?\n\n### Response:\n");
            assert!(seen[0].stop_ids.contains(&tokenizer().token_to_id("<|endoftext|>").unwrap()));
            assert!(tokenizer().decode(&seen[1].prompt, false).unwrap().starts_with("<|im_start|>user"));
        }

        ask(&state, "/v1/unload_lora_adapter", json!({ "lora_name": "team/kind" })).await;
        assert_eq!(models(&state).await.len(), 1);
        let (status, _) = refused(&state, CHAT, chat(json!({ "model": "team/kind" }))).await;
        assert_eq!(status, 404);
        let (status, error) = refused(&state, "/v1/unload_lora_adapter", json!({ "lora_name": "team/kind" })).await;
        assert_eq!((status, &error["param"]), (404, &json!("lora_name")));
        let (status, error) = refused(&state, "/v1/unload_lora_adapter", json!({ "lora_name": "base" })).await;
        assert_eq!((status, &error["param"]), (400, &json!("lora_name")));
        assert!(error["message"].as_str().unwrap().contains("is the base model"), "{error}");
        assert_eq!(models(&state).await.len(), 1);
    });
}

#[test]
fn the_servers_template_goes_before_every_other() {
    run(async {
        let (script, seen) = says("x");
        let mut config = config();
        config.chat_template = Some(ChatTemplate::new("served {{ messages[-1].content }}").unwrap());
        let state = server(tokenizer(), config, script);
        let dir = tempfile::tempdir().unwrap();
        let settings = json!({ "layout": "alpaca", "system_prompt": "Be kind." });
        std::fs::write(dir.path().join("prompt_settings.json"), settings.to_string()).unwrap();
        ask(&state, LOAD, json!({ "lora_name": "a", "lora_path": dir.path() })).await;
        for model in ["base", "a"] {
            ask(&state, CHAT, chat(json!({ "model": model }))).await;
        }
        let seen = seen.lock().unwrap();
        let prompts: Vec<String> =
            seen.iter().map(|request| tokenizer().decode(&request.prompt, false).unwrap()).collect();
        assert_eq!(prompts, ["served What is 2 + 3?"; 2]);
    });
}

#[test]
fn an_adapter_under_an_old_name_is_prompted_as_itself() {
    run(async {
        let (script, seen) = says("x");
        let state = server(tokenizer(), config(), script);
        for template in ["first {{ messages[-1].content }}", "second {{ messages[-1].content }}"] {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
            ask(&state, LOAD, json!({ "lora_name": "a", "lora_path": dir.path() })).await;
            ask(&state, CHAT, chat(json!({ "model": "a" }))).await;
            ask(&state, "/v1/unload_lora_adapter", json!({ "lora_name": "a" })).await;
        }
        let seen = seen.lock().unwrap();
        let prompts: Vec<String> =
            seen.iter().map(|request| tokenizer().decode(&request.prompt, false).unwrap()).collect();
        assert_eq!(prompts, ["first What is 2 + 3?", "second What is 2 + 3?"]);
    });
}

#[test]
fn a_conversation_in_layouts_that_are_none() {
    run(async {
        let (script, seen) = says("x");
        let state = server(tokenizer(), config(), script);
        let messages = json!([
            { "role": "user", "content": "One" }, { "role": "assistant", "content": "Two" }, { "role": "user", "content": "Three" },
        ]);
        for layout in ["alpaca", "plain"] {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("prompt_settings.json"), json!({ "layout": layout }).to_string()).unwrap();
            ask(&state, LOAD, json!({ "lora_name": layout, "lora_path": dir.path() })).await;
            ask(&state, CHAT, chat(json!({ "model": layout, "messages": messages }))).await;
        }
        let seen = seen.lock().unwrap();
        let prompt = |index: usize| tokenizer().decode(&seen[index].prompt, false).unwrap();
        // An answer of before ends as it does in a row with a history.
        let end = "### Instruction:\nOne\n\n### Response:\nTwo<|im_end|>\n\n### Instruction:\nThree\n\n### Response:\n";
        assert!(prompt(0).ends_with(end), "{}", prompt(0));
        assert_eq!(prompt(1), "One\n\nTwo\n\nThree");
    });
}

#[test]
fn what_cannot_be_loaded() {
    run(async {
        let (script, _) = says("x");
        let mut fixed = config();
        fixed.adapter_updates = false;
        let state = server(tokenizer(), fixed, script);
        let (status, error) = refused(&state, LOAD, json!({ "lora_name": "a", "lora_path": "/x" })).await;
        assert_eq!((status, &error["type"]), (403, &json!("permission_error")));

        let (script, _) = says("x");
        let state = server(tokenizer(), config(), script);
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("chat_template.jinja"), "{% if %}").unwrap();
        let (status, error) = refused(&state, LOAD, json!({ "lora_name": "a", "lora_path": dir.path() })).await;
        assert_eq!((status, &error["param"]), (400, &json!("lora_path")));
        let run = tempfile::tempdir().unwrap();
        std::fs::create_dir(run.path().join("adapter")).unwrap();
        std::fs::write(run.path().join("adapter/adapter_config.json"), "{}").unwrap();
        let (status, error) = refused(&state, LOAD, json!({ "lora_name": "a", "lora_path": run.path() })).await;
        assert_eq!((status, &error["param"]), (400, &json!("lora_path")));
        let inner = run.path().join("adapter").display().to_string();
        assert!(error["message"].as_str().unwrap().ends_with(&inner), "{error}");
        assert_eq!(models(&state).await.len(), 1);
    });
}

/// What lay beside an adapter when it was loaded is what it is asked with, as its weights are those of then.
#[test]
fn an_adapter_is_prompted_as_it_was_loaded() {
    run(async {
        let (script, _) = says("x");
        let state = server(tokenizer(), config(), script);
        let dir = tempfile::tempdir().unwrap();
        let template = dir.path().join("chat_template.jinja");
        std::fs::write(&template, "old {{ messages[-1].content }}").unwrap();
        ask(&state, LOAD, json!({ "lora_name": "a", "lora_path": dir.path() })).await;
        let prompt = || async {
            let messages = json!([{ "role": "user", "content": "hi" }]);
            let tokens = ask(&state, "/tokenize", json!({ "model": "a", "messages": messages })).await;
            ask(&state, "/detokenize", json!({ "model": "a", "tokens": tokens["tokens"] })).await["prompt"].clone()
        };
        for other in ["new {{ messages[-1].content }}", "{% if"] {
            std::fs::write(&template, other).unwrap();
            assert_eq!(prompt().await, "old hi");
        }
        drop(dir);
        assert_eq!(prompt().await, "old hi");
    });
}

/// An adapter's own tokens are tokens wherever it is named.
#[test]
fn tokens_of_an_adapter() {
    run(async {
        let (script, _) = says("x");
        let state = server(tokenizer(), config(), script);
        let dir = tempfile::tempdir().unwrap();
        ask(&state, LOAD, json!({ "lora_name": "a", "lora_path": dir.path() })).await;
        let fields = json!({ "model": "a", "prompt": [4097], "logit_bias": { "4097": 1 }, "stop_token_ids": [4096] });
        ask(&state, "/v1/completions", fields.clone()).await;
        ask(&state, "/detokenize", json!({ "model": "a", "tokens": [4097] })).await;
        for (field, value) in
            [("prompt", json!([4097])), ("logit_bias", json!({ "4097": 1 })), ("stop_token_ids", json!([4097]))]
        {
            let mut body = json!({ "prompt": "x" });
            body[field] = value;
            let (status, error) = refused(&state, "/v1/completions", body).await;
            assert_eq!((status, &error["param"]), (400, &json!(field)));
        }
        let (status, _) = refused(&state, "/detokenize", json!({ "tokens": [4097] })).await;
        assert_eq!(status, 400);
    });
}
