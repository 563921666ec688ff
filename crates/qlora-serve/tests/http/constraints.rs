//! JSON of a schema and forced calls: an engine that takes any token that is allowed always ends with what was asked for.

use std::collections::HashMap;

use qlora_serve::text::{Grammars, Vocabulary};
use qlora_serve::{Constraint, Event, FinishReason, Finished, Limits, Reply, Request, Token, Usage};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use super::support::{
    LIMITS, Script, ask, chat, completion, config, refused, run, server, server_with, tokenizer, tokenizer_with,
};

const PATH: &str = "/v1/chat/completions";

/// Takes a random token of those that the constraint allows, until it is complete or an end token comes.
fn random_engine(seed: u64) -> Script {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    Box::new(move |mut request: Request, reply: Reply| {
        let mut constraint = request.constraint.take().expect("the request has no constraint");
        let mut count = 0;
        let reason = loop {
            if count == request.max_tokens {
                break FinishReason::Length;
            }
            let bits = match constraint.allowed() {
                Ok(bits) => bits.expect("everything is allowed"),
                Err(error) => {
                    reply.send(Event::Failed(error));
                    return;
                }
            };
            let all = 0..bits.len() * 32;
            let allowed: Vec<u32> = all.filter(|id| bits[id / 32] >> (id % 32) & 1 == 1).map(|id| id as u32).collect();
            assert!(allowed.iter().all(|&id| id < 4098), "ids beyond the vocabulary are allowed");
            assert!(!allowed.is_empty(), "nothing is allowed");
            let id = allowed[random.random_range(0..allowed.len())];
            count += 1;
            reply.send(Event::Token(Token { id, logprobs: None }));
            if request.stop_ids.contains(&id) {
                break FinishReason::Stop;
            }
            constraint.accept(id).unwrap();
            if constraint.is_complete() {
                break FinishReason::Stop;
            }
        };
        let usage = Usage { prompt_tokens: request.prompt.len(), cached_tokens: 0, completion_tokens: count };
        reply.send(Event::Finished(Finished { reason, usage }));
    })
}

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": { "type": "string", "maxLength": 6 },
            "kind": { "enum": ["cat", "größer", "🙂"] },
            "age": { "type": "integer", "minimum": 0, "maximum": 120 },
            "tags": { "type": "array", "items": { "type": "boolean" }, "maxItems": 3 },
            "inner": { "$ref": "#/$defs/inner" },
        },
        "required": ["name", "kind", "age", "tags", "inner"],
        "additionalProperties": false,
        "$defs": { "inner": { "type": "object", "properties": { "x": { "type": "null" } }, "required": ["x"], "additionalProperties": false } },
    })
}

fn check(json: &Value) {
    let fields = json.as_object().unwrap();
    assert_eq!(fields.keys().collect::<Vec<_>>(), ["name", "kind", "age", "tags", "inner"]);
    assert!(json["name"].as_str().unwrap().chars().count() <= 6);
    assert!(["cat", "größer", "🙂"].contains(&json["kind"].as_str().unwrap()));
    assert!(json["age"].as_u64().unwrap() <= 120);
    let tags = json["tags"].as_array().unwrap();
    assert!(tags.len() <= 3 && tags.iter().all(Value::is_boolean));
    assert_eq!(json["inner"], json!({ "x": null }));
}

#[test]
fn random_tokens_make_json_of_the_schema() {
    run(async {
        let state = server(tokenizer(), config(), random_engine(1));
        let format =
            json!({ "type": "json_schema", "json_schema": { "name": "a", "strict": true, "schema": schema() } });
        for _ in 0..20 {
            let answer = ask(&state, PATH, chat(json!({ "response_format": format, "n": 2 }))).await;
            for choice in answer["choices"].as_array().unwrap() {
                assert_eq!(choice["finish_reason"], "stop");
                let text = choice["message"]["content"].as_str().unwrap();
                check(&serde_json::from_str(text).unwrap_or_else(|error| panic!("{text:?}: {error}")));
            }
        }
    });
}

#[test]
fn completions_are_constrained_too() {
    run(async {
        let state = server(tokenizer(), config(), random_engine(7));
        let format = json!({ "type": "json_schema", "json_schema": { "name": "a", "schema": schema() } });
        let request = completion(json!({ "response_format": format, "max_tokens": 400 }));
        let answer = ask(&state, "/v1/completions", request).await;
        check(&serde_json::from_str(answer["choices"][0]["text"].as_str().unwrap()).unwrap());
    });
}

#[test]
fn json_objects_are_objects() {
    run(async {
        let state = server(tokenizer(), config(), random_engine(2));
        let mut whole = 0;
        for _ in 0..20 {
            let answer = ask(&state, PATH, chat(json!({ "response_format": { "type": "json_object" } }))).await;
            let choice = &answer["choices"][0];
            let text = choice["message"]["content"].as_str().unwrap();
            assert!(text.trim_start().starts_with('{'));
            // Strings may go on for as long as there is room.
            if choice["finish_reason"] == "stop" {
                whole += 1;
                // A number may be larger than any that is read.
                let read = serde_json::from_str::<HashMap<String, IgnoredAny>>(text);
                assert!(read.is_ok(), "{text}: {read:?}");
            }
        }
        assert!(whole > 0);
    });
}

#[test]
fn forced_calls_are_calls_of_the_tools() {
    let templates = [
        "{% if tools %}<tool_call>{% endif %}{{ messages[-1].content }}",
        "{% if tools %}<|python_tag|>{% endif %}{{ messages[-1].content }}",
        "{% if tools %}[TOOL_CALLS]{% endif %}{{ messages[-1].content }}",
    ];
    let tools = json!([
        { "type": "function", "function": { "name": "create", "parameters": schema() } },
        { "type": "function", "function": { "name": "stop" } },
    ]);
    let named = json!({ "type": "function", "function": { "name": "create" } });
    run(async {
        for (index, template) in templates.into_iter().enumerate() {
            let state = server(tokenizer_with(template), config(), random_engine(3 + index as u64));
            for (choice, parallel) in [(json!("required"), true), (json!("required"), false), (named.clone(), true)] {
                let mut calls = 0;
                for _ in 0..6 {
                    let fields = json!({ "tools": tools, "tool_choice": choice, "parallel_tool_calls": parallel });
                    let answer = ask(&state, PATH, chat(fields)).await;
                    let answered = &answer["choices"][0];
                    // A chain of calls may reach the end of the context.
                    if answered["finish_reason"] == "length" {
                        continue;
                    }
                    assert_eq!(answered["finish_reason"], "tool_calls", "{template}: {answered}");
                    assert_eq!(answered["message"]["content"], Value::Null, "{template}: {answered}");
                    let made = answered["message"]["tool_calls"].as_array().unwrap();
                    assert!(made.len() == 1 || (parallel && choice == "required"), "{answered}");
                    for call in made {
                        calls += 1;
                        let function = &call["function"];
                        let arguments = serde_json::from_str(function["arguments"].as_str().unwrap()).unwrap();
                        match function["name"].as_str().unwrap() {
                            "create" => check(&arguments),
                            name => assert_eq!((name, choice.is_string()), ("stop", true)),
                        }
                    }
                }
                assert!(calls > 0, "{template}");
            }
        }
    });
}

/// The tiny model's tokenizer with further tokens from id 4096 on.
fn with_tokens(tokens: &[(&str, bool)], template: &str) -> chat_text::Tokenizer {
    let dir = tempfile::tempdir().unwrap();
    let source = std::path::Path::new(super::support::TINY_LLAMA);
    let text = std::fs::read_to_string(source.join("tokenizer.json")).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    let added = json["added_tokens"].as_array_mut().unwrap();
    added.extend(tokens.iter().enumerate().map(|(index, (token, special))| {
        json!({
            "id": 4096 + index, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": special,
        })
    }));
    std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
    std::fs::copy(source.join("tokenizer_config.json"), dir.path().join("tokenizer_config.json")).unwrap();
    std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    chat_text::Tokenizer::from_dir(dir.path()).unwrap()
}

/// Tags of calls that are special tokens, which decoders leave out of the text, and which no text is.
#[test]
fn tags_may_be_special_tokens() {
    let cases = [
        (&[("<tool_call>", true), ("</tool_call>", true)][..], "<tool_call>"),
        (&[("<tool_call>", false), ("</tool_call>", false)][..], "<tool_call>"),
        (&[("[TOOL_CALLS]", true), ("[ARGS]", true)][..], "[TOOL_CALLS]"),
    ];
    let tools = json!([{ "type": "function", "function": { "name": "create", "parameters": schema() } }]);
    run(async {
        for (seed, (tokens, tag)) in cases.into_iter().enumerate() {
            let template = format!("{{% if tools %}}{tag}{{% endif %}}x");
            let limits = Limits { vocab_size: 4098, ..LIMITS };
            let engine = random_engine(seed as u64);
            let state = server_with(with_tokens(tokens, &template), config(), limits, engine);
            for _ in 0..5 {
                let fields = json!({ "tools": tools, "tool_choice": "required", "parallel_tool_calls": false });
                let answer = ask(&state, PATH, chat(fields)).await;
                let message = &answer["choices"][0]["message"];
                let call = &message["tool_calls"][0]["function"];
                assert_eq!((&message["content"], &call["name"]), (&Value::Null, &json!("create")), "{answer}");
                check(&serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap());
            }
        }
    });
}

#[test]
fn schemas_that_cannot_be_enforced_are_refused() {
    run(async {
        let state = server(tokenizer(), config(), random_engine(9));
        let cases = [
            json!({ "type": "object", "properties": { "a": { "type": "unknown" } } }),
            json!({ "type": "array", "uniqueItems": true }),
            json!({ "type": "string", "pattern": "(" }),
            json!([1]),
        ];
        for schema in cases {
            let format = json!({ "type": "json_schema", "json_schema": { "name": "a", "schema": schema } });
            let (status, error) = refused(&state, PATH, chat(json!({ "response_format": format }))).await;
            assert_eq!((status, &error["param"]), (400, &json!("response_format.json_schema.schema")), "{error}");
            assert_eq!(error["code"], "unsupported_schema");
        }
        let format = json!({ "type": "json_object" });
        let tools = json!([{ "type": "function", "function": { "name": "f" } }]);
        let state = server(tokenizer_with("{% if tools %}<tool_call>{% endif %}x"), config(), random_engine(9));
        let (status, error) = refused(&state, PATH, chat(json!({ "response_format": format, "tools": tools }))).await;
        assert_eq!((status, &error["param"]), (400, &json!("response_format")));
        let tools = json!([{ "type": "function", "function": { "name": "f", "parameters": { "type": "unknown" } } }]);
        let (status, error) = refused(&state, PATH, chat(json!({ "tools": tools, "tool_choice": "required" }))).await;
        assert_eq!((status, &error["param"]), (400, &json!("tools")));
        assert!(error["message"].as_str().unwrap().contains("f: "), "{error}");
    });
}

/// A model that likes blanks could go on with them until its tokens are used up.
#[test]
fn white_space_is_a_space_or_an_indented_line() {
    let vocabulary = Vocabulary::new(&tokenizer());
    let grammars = Grammars::new(&vocabulary, 4096, tokenizer().eos_token_ids()).unwrap();
    let properties = json!({ "a": { "type": "integer" }, "b": { "type": "integer" } });
    let schema = json!({ "type": "object", "properties": properties, "required": ["a", "b"] });
    let grammar = grammars.json(&schema).unwrap();
    let takes = |text: &str| {
        let mut grammar = grammar.clone();
        let ids = tokenizer().encode(text, false).unwrap().ids;
        ids.iter().all(|&id| {
            let allowed = grammar.allowed().unwrap().unwrap()[id as usize / 32] >> (id % 32) & 1 == 1;
            allowed && grammar.accept(id).is_ok()
        })
    };
    let indented = |indent: &str| format!("{{\n{indent}\"a\": 1,\n{indent}\"b\": 2\n}}");
    for text in ["{\"a\":1,\"b\":2}", "{\"a\": 1, \"b\": 2}", "{ \"a\" : 1 , \"b\" : 2 }"] {
        assert!(takes(text), "{text}");
    }
    for indent in ["", "  ", "\t", &" ".repeat(20)] {
        assert!(takes(&indented(indent)), "{indent:?}");
    }
    for text in [&indented(&" ".repeat(21)), "{\n\n\"a\": 1", "{  \"a\": 1", "{\"a\": 14\n  \n      ,"] {
        assert!(!takes(text), "{text}");
    }
}

#[test]
fn copies_of_a_grammar_go_their_own_ways() {
    let vocabulary = Vocabulary::new(&tokenizer());
    let grammars = Grammars::new(&vocabulary, 4096, tokenizer().eos_token_ids()).unwrap();
    let mut first = grammars.json(&json!({ "enum": ["ab", "cd"] })).unwrap();
    let mut second = first.clone();
    let id = |text: &str| tokenizer().encode(text, false).unwrap().ids[0];
    first.accept(id("\"")).unwrap();
    let allows = |grammar: &mut dyn Constraint, id: u32| {
        grammar.allowed().unwrap().unwrap()[id as usize / 32] >> (id % 32) & 1 == 1
    };
    assert!(allows(&mut first, id("a")) && !allows(&mut second, id("a")));
    assert!(allows(&mut second, id("\"")) && !allows(&mut first, id("x")));
    assert!(!allows(&mut second, tokenizer().eos_token_id().unwrap()));
    assert!(second.accept(id("x")).is_err());
}

#[test]
fn a_reasoning_comes_before_the_constraint() {
    // The end of the reasoning is a token of its own in models that reason.
    let tokenizer = with_tokens(&[("</think>", false)], "{{ messages[0].content }}<think>\n");
    let thoughts = tokenizer.encode("so it is\n</think>", false).unwrap().ids;
    assert_eq!(thoughts.last(), Some(&4096));
    let script = move |mut request: Request, reply: Reply| {
        let mut constraint = request.constraint.take().unwrap();
        let mut send = |id: u32, free: bool| {
            assert_eq!(constraint.allowed().unwrap().is_none(), free);
            constraint.accept(id).unwrap();
            reply.send(Event::Token(Token { id, logprobs: None }));
            constraint.is_complete()
        };
        for &id in &thoughts {
            assert!(!send(id, true));
        }
        let content = super::support::tokenizer().encode("{}", false).unwrap().ids;
        let complete: Vec<bool> = content.iter().map(|&id| send(id, false)).collect();
        assert_eq!(complete.last(), Some(&true));
        reply.send(Event::Finished(Finished { reason: FinishReason::Stop, usage: Usage::default() }));
    };
    run(async {
        let limits = Limits { vocab_size: 4097, ..LIMITS };
        let state = server_with(tokenizer, config(), limits, Box::new(script));
        let schema = json!({ "type": "object", "additionalProperties": false });
        let format = json!({ "type": "json_schema", "json_schema": { "name": "a", "schema": schema } });
        let answer = ask(&state, PATH, chat(json!({ "response_format": format }))).await;
        let message = &answer["choices"][0]["message"];
        assert_eq!((&message["reasoning_content"], &message["content"]), (&json!("so it is"), &json!("{}")));
    });
}

/// A chain of `links` definitions, the last one an integer. `link` makes one that leads to the next.
fn chain(links: usize, link: impl Fn(Value) -> Value) -> Value {
    let next = |index: usize| json!({ "$ref": format!("#/$defs/a{index}") });
    let mut defs: serde_json::Map<String, Value> =
        (0..links).map(|index| (format!("a{index}"), link(next(index + 1)))).collect();
    defs.insert(format!("a{links}"), json!({ "type": "integer" }));
    json!({ "$defs": defs, "type": "object", "properties": { "r": next(0) }, "required": ["r"] })
}

/// What a stack, or memory, would overflow with is refused, and what is below the bounds is not.
#[test]
fn chains_of_references_are_bounded() {
    type Link = fn(Value) -> Value;
    let object: Link = |next| json!({ "type": "object", "properties": { "x": next }, "required": ["x"] });
    let bare: Link = |next| next;
    let merged: Link = |next| json!({ "allOf": [next, { "minimum": 1 }] });
    let list: Link = |next| json!({ "type": "array", "items": { "anyOf": [next, { "type": "null" }] } });
    let doubled: Link = |next| {
        let again = json!({ "$ref": next["$ref"], "type": "object" });
        json!({ "type": "object", "properties": { "x": again, "y": again } })
    };
    // Links that are taken, and that are not; a level of an object is three of JSON.
    let cases = [(object, 500, 700), (object, 500, 50_000), (bare, 2000, 2100), (list, 400, 520), (doubled, 8, 40)];
    let cases = cases.into_iter().chain([(merged, 50, 700)]);
    run(async {
        let state = server(tokenizer(), config(), random_engine(11));
        let tools_state = server(tokenizer_with("{% if tools %}<tool_call>{% endif %}x"), config(), random_engine(11));
        for (index, (link, taken, refused_at)) in cases.enumerate() {
            let format =
                |links| json!({ "type": "json_schema", "json_schema": { "name": "a", "schema": chain(links, link) } });
            let body = chat(json!({ "response_format": format(taken), "max_tokens": 2 }));
            ask(&state, PATH, body).await;
            let (status, error) = refused(&state, PATH, chat(json!({ "response_format": format(refused_at) }))).await;
            assert_eq!((status, &error["code"]), (400, &json!("unsupported_schema")), "{index}: {error}");
            let tools =
                json!([{ "type": "function", "function": { "name": "f", "parameters": chain(refused_at, link) } }]);
            let (status, error) =
                refused(&tools_state, PATH, chat(json!({ "tools": tools, "tool_choice": "required" }))).await;
            assert_eq!((status, &error["param"]), (400, &json!("tools")), "{index}: {error}");
        }
    });
}

/// What would fail at an answer's first token is refused before there is one.
#[test]
fn schemas_that_no_answer_begins_are_refused() {
    let optional = |count: usize| {
        let fields: serde_json::Map<String, Value> =
            (0..count).map(|index| (format!("k{index}"), json!({ "type": "integer" }))).collect();
        json!({ "type": "object", "properties": fields, "additionalProperties": false })
    };
    let pattern = format!("^{}z$", "(a|b|cd)?(e.|f)*".repeat(200));
    let cases = [json!({ "$ref": "#" }), optional(600), json!({ "type": "string", "pattern": pattern })];
    run(async {
        let state = server(tokenizer(), config(), random_engine(12));
        let format =
            |schema: &Value| json!({ "type": "json_schema", "json_schema": { "name": "a", "schema": schema } });
        for schema in cases {
            let (status, error) = refused(&state, PATH, chat(json!({ "response_format": format(&schema) }))).await;
            assert_eq!((status, &error["code"]), (400, &json!("unsupported_schema")), "{error}");
        }
        ask(&state, PATH, chat(json!({ "response_format": format(&optional(400)), "max_tokens": 2 }))).await;
    });
}

/// A constraint begins behind a token; a reasoning that ends in several can't be told from its outside.
#[test]
fn a_reasoning_without_a_token_at_its_end_has_no_constraint_behind_it() {
    run(async {
        let state = server(tokenizer_with("{{ messages[0].content }}<think>\n"), config(), random_engine(13));
        let format = json!({ "type": "json_object" });
        let (status, error) = refused(&state, PATH, chat(json!({ "response_format": format }))).await;
        assert_eq!((status, &error["param"]), (400, &json!("response_format")), "{error}");
    });
}
