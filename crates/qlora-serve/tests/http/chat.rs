//! `/v1/chat/completions`: whole and in chunks.

use serde_json::{Value, json};

use super::support::{ask, chat, chunks, completion, config, goes_on, run, says, server, tokenizer};

const PATH: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// The text of one choice's chunks.
fn text(chunks: &[Value], choice: u64, field: &str) -> String {
    let choices = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap());
    let of_choice = choices.filter(|c| c["index"] == choice);
    of_choice.filter_map(|c| c["delta"][field].as_str()).collect()
}

#[test]
fn an_answer_in_openais_shape() {
    run(async {
        let (script, seen) = says("The sum is 5.");
        let state = server(tokenizer(), config(), script);
        let answer = ask(&state, PATH, chat(json!({ "max_tokens": 50 }))).await;
        assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
        assert_eq!(answer["object"], "chat.completion");
        assert_eq!(answer["model"], "base");
        let expected = json!([{
            "index": 0,
            "message": { "role": "assistant", "content": "The sum is 5.", "refusal": null },
            "logprobs": null,
            "finish_reason": "stop",
        }]);
        assert_eq!(answer["choices"], expected);
        let seen = seen.lock().unwrap();
        let prompt = "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(tokenizer().decode(&seen[0].prompt, false).unwrap(), prompt);
        assert_eq!(*seen[0].stop_ids, *tokenizer().eos_token_ids());
        assert_eq!(seen[0].max_tokens, 50);
        assert_eq!(seen[0].sampling.temperature, 1.0);
        let prompt_tokens = seen[0].prompt.len();
        let completion_tokens = tokenizer().encode("The sum is 5.", false).unwrap().ids.len() + 1;
        let usage = json!({
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": { "cached_tokens": 1 },
        });
        assert_eq!(answer["usage"], usage);
    });
}

#[test]
fn every_setting_reaches_the_engine() {
    run(async {
        let (script, seen) = says("x");
        let state = server(tokenizer(), config(), script);
        let fields = json!({
            "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1,
            "presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": { "17": 5, "4095": -100 },
            "seed": -3, "stop_token_ids": [9], "max_completion_tokens": 7, "max_tokens": 100, "unknown_to_all": 1,
        });
        ask(&state, PATH, chat(fields)).await;
        let seen = seen.lock().unwrap();
        let sampling = &seen[0].sampling;
        assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p), (0.5, 0.9, 40, 0.05));
        assert_eq!(
            (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty),
            (1.1, 0.5, -0.5)
        );
        assert_eq!(sampling.logit_bias, [(17, 5.0), (4095, -100.0)]);
        assert_eq!(sampling.seed, -3i64 as u64);
        assert_eq!(seen[0].max_tokens, 7);
        assert_eq!(*seen[0].stop_ids, [tokenizer().eos_token_ids(), &[9]].concat());
    });
}

#[test]
fn several_choices_have_seeds_of_their_own() {
    run(async {
        let (script, seen) = says("Yes.");
        let state = server(tokenizer(), config(), script);
        let answer = ask(&state, PATH, chat(json!({ "n": 3, "seed": 10 }))).await;
        assert_eq!(answer["choices"].as_array().unwrap().len(), 3);
        let seeds: Vec<u64> = seen.lock().unwrap().iter().map(|request| request.sampling.seed).collect();
        assert_eq!(seeds, [10, 11, 12]);
        // The prompt counts once.
        assert_eq!(answer["usage"]["prompt_tokens"], seen.lock().unwrap()[0].prompt.len());
        ask(&state, PATH, chat(json!({}))).await;
        ask(&state, PATH, chat(json!({}))).await;
        let seen = seen.lock().unwrap();
        assert_ne!(seen[3].sampling.seed, seen[4].sampling.seed, "without a seed each answer is another");
    });
}

#[test]
fn chunks_join_to_the_answer() {
    run(async {
        // Characters that the tiny vocabulary has in parts only.
        let said = "Grüße 🙂 an alle, 東京.";
        let (script, _) = says(said);
        let state = server(tokenizer(), config(), script);
        let chunks = chunks(&state, PATH, chat(json!({ "n": 2, "stream_options": { "include_usage": true } }))).await;
        for choice in 0..2 {
            assert_eq!(text(&chunks, choice, "content"), said);
        }
        let all = || chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap());
        assert!(all().all(|choice| !choice["delta"]["content"].as_str().unwrap_or("").contains('\u{FFFD}')));
        assert_eq!(all().filter(|choice| choice["finish_reason"] == "stop").count(), 2);
        assert_eq!(all().filter(|choice| choice["delta"]["role"] == "assistant").count(), 2);
        let (usage, others) = chunks.split_last().unwrap();
        assert_eq!(usage["choices"], json!([]));
        assert!(usage["usage"]["completion_tokens"].as_u64().unwrap() > 0);
        assert!(others.iter().all(|chunk| chunk["usage"].is_null() && chunk.get("usage").is_some()));
        assert!(
            chunks.iter().all(|chunk| chunk["object"] == "chat.completion.chunk" && chunk["id"] == chunks[0]["id"])
        );
    });
}

#[test]
fn log_probabilities_of_the_answers_tokens() {
    run(async {
        let (script, _) = says("Yes é");
        let state = server(tokenizer(), config(), script);
        let request = chat(json!({ "logprobs": true, "top_logprobs": 2 }));
        let answer = ask(&state, PATH, request.clone()).await;
        let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
        // The end token is no part of the content.
        let bytes: Vec<u8> = content
            .iter()
            .flat_map(|token| token["bytes"].as_array().unwrap())
            .map(|byte| byte.as_u64().unwrap() as u8)
            .collect();
        assert_eq!(String::from_utf8(bytes).unwrap(), "Yes é");
        let id = tokenizer().encode("Yes é", false).unwrap().ids[0];
        assert_eq!(content[0]["logprob"].as_f64().unwrap() as f32, -(id as f32) / 1000.0);
        assert_eq!(content[0]["top_logprobs"].as_array().unwrap().len(), 2);
        let streamed = chunks(&state, PATH, request).await;
        let choices = streamed.iter().map(|chunk| &chunk["choices"][0]);
        let tokens = choices.filter_map(|choice| choice["logprobs"]["content"].as_array()).flatten();
        assert_eq!(tokens.cloned().collect::<Vec<_>>(), content);
    });
}

#[test]
fn a_stop_string_ends_the_answer_across_tokens() {
    run(async {
        let (script, _) = says("one two three four five");
        let state = server(tokenizer(), config(), script);
        for stop in [json!("hree f"), json!(["never", "hree f"])] {
            let answer = ask(&state, PATH, chat(json!({ "stop": stop, "logprobs": true }))).await;
            assert_eq!(answer["choices"][0]["message"]["content"], "one two t");
            assert_eq!(answer["choices"][0]["finish_reason"], "stop");
            let chunks = chunks(&state, PATH, chat(json!({ "stop": stop }))).await;
            assert_eq!(text(&chunks, 0, "content"), "one two t");
        }
        let answer = ask(&state, PATH, chat(json!({ "stop": "absent", "max_tokens": 2 }))).await;
        assert_eq!(answer["choices"][0]["finish_reason"], "length");
    });
}

/// The engine does not know of it: it is told, and what it said of the prompt is in the usage.
#[test]
fn an_answer_that_the_server_ends_is_finished_and_counted() {
    const HERMES: &str = "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}{{ messages[-1].content }}";
    let time = json!([{ "type": "function", "function": { "name": "time" } }]);
    let named = json!({ "type": "function", "function": { "name": "time" } });
    let call = "<tool_call>\n{\"name\": \"time\", \"arguments\": {}}\n</tool_call> and on";
    let cases = [
        (PATH, "one two three", chat(json!({ "stop": "e t" }))),
        (COMPLETIONS, "one two three", completion(json!({ "stop": ["never", "e t"] }))),
        (PATH, call, chat(json!({ "tools": time, "tool_choice": named }))),
        (PATH, call, chat(json!({ "tools": time, "tool_choice": "required", "parallel_tool_calls": false }))),
    ];
    run(async {
        for (path, said, body) in cases {
            let (script, replies) = goes_on(said);
            let state = server(super::support::tokenizer_with(HERMES), config(), script);
            let answer = ask(&state, path, body.clone()).await;
            assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 48, "{body}");
            let mut streaming = body;
            streaming["stream_options"] = json!({ "include_usage": true });
            let last = chunks(&state, path, streaming).await.pop().unwrap();
            assert_eq!(last["usage"], answer["usage"]);
            let replies = replies.lock().unwrap();
            assert_eq!(replies.len(), 2);
            assert!(replies.iter().all(|reply| reply.is_cancelled() && reply.is_finished()), "{said}");
        }
    });
}

#[test]
fn a_reasoning_is_split_off() {
    const OPENING: &str = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}{# </think> #}";
    const PLAIN: &str = "{% for m in messages %}{{ m.content }}{% endfor %}{# </think> #}";
    run(async {
        for (template, said) in
            [(OPENING, "2 and 3\n</think>\n\nFive."), (PLAIN, "<think>\n2 and 3\n</think>\n\nFive.")]
        {
            let (script, _) = says(said);
            let state = server(super::support::tokenizer_with(template), config(), script);
            let answer = ask(&state, PATH, chat(json!({}))).await;
            let message = &answer["choices"][0]["message"];
            assert_eq!((&message["reasoning_content"], &message["content"]), (&json!("2 and 3"), &json!("Five.")));
            let chunks = chunks(&state, PATH, chat(json!({}))).await;
            assert_eq!(text(&chunks, 0, "reasoning_content"), "2 and 3");
            assert_eq!(text(&chunks, 0, "content"), "Five.");
        }
        // A model that knows no reasoning may write about the tag.
        let (script, _) = says("<think>x</think>y");
        let state = server(tokenizer(), config(), script);
        let answer = ask(&state, PATH, chat(json!({}))).await;
        assert_eq!(answer["choices"][0]["message"]["content"], "<think>x</think>y");
    });
}

#[test]
fn variables_reach_the_template() {
    run(async {
        let (script, seen) = says("x");
        let template = "{{ messages[0].content }}|{{ enable_thinking }}|{{ reasoning_effort }}";
        let state = server(super::support::tokenizer_with(template), config(), script);
        let fields = json!({ "chat_template_kwargs": { "enable_thinking": false }, "reasoning_effort": "low" });
        ask(&state, PATH, chat(fields)).await;
        let prompt = tokenizer().decode(&seen.lock().unwrap()[0].prompt, false).unwrap();
        assert_eq!(prompt, "What is 2 + 3?|False|low");
    });
}

#[test]
fn contents_in_parts_nulls_and_developers_are_taken() {
    run(async {
        let (script, seen) = says("x");
        let state = server(tokenizer(), config(), script);
        let messages = json!([
            { "role": "developer", "content": "Be brief." },
            { "role": "user", "content": [{ "type": "text", "text": "Hello " }, { "type": "text", "text": "there" }] },
            { "role": "assistant", "content": "Hi", "tool_calls": null, "refusal": null },
            { "role": "user", "content": "And?" },
        ]);
        ask(&state, PATH, json!({ "messages": messages, "model": "base", "user": "somebody", "store": true })).await;
        let prompt = tokenizer().decode(&seen.lock().unwrap()[0].prompt, false).unwrap();
        let expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello there<|im_end|>\n\
            <|im_start|>assistant\nHi<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(prompt, expected);
    });
}
