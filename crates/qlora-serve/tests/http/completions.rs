//! `/v1/completions`: prompts of every kind, echo and log probabilities as evaluations need them.

use serde_json::{Value, json};

use super::support::{ask, chunks, completion, config, run, says, says_tokens, server, tokenizer};

const PATH: &str = "/v1/completions";

#[test]
fn prompts_are_texts_or_tokens() {
    run(async {
        let (script, seen) = says(" a time");
        let state = server(tokenizer(), config(), script);
        let once = tokenizer().encode("Once upon", true).unwrap().ids;
        let cases = [
            (json!("Once upon"), vec![once.clone()]),
            (json!(["Once upon", "Once upon"]), vec![once.clone(), once.clone()]),
            (json!(once), vec![once.clone()]),
            (json!([once, [5, 6]]), vec![once.clone(), vec![5, 6]]),
        ];
        for (prompt, expected) in cases {
            let answer = ask(&state, PATH, completion(json!({ "prompt": prompt }))).await;
            assert_eq!(answer["object"], "text_completion");
            let choices = answer["choices"].as_array().unwrap();
            assert_eq!(choices.len(), expected.len());
            for (index, choice) in choices.iter().enumerate() {
                let whole = json!({ "index": index, "text": " a time", "logprobs": null, "finish_reason": "stop" });
                assert_eq!(*choice, whole);
            }
            let prompts: Vec<Vec<u32>> =
                seen.lock().unwrap().drain(..).map(|request| request.prompt.to_vec()).collect();
            assert_eq!(prompts, expected);
            assert_eq!(answer["usage"]["prompt_tokens"], expected.iter().map(Vec::len).sum::<usize>());
        }
    });
}

#[test]
fn several_answers_to_each_of_several_prompts() {
    run(async {
        let (script, seen) = says("x");
        let state = server(tokenizer(), config(), script);
        let answer =
            ask(&state, PATH, completion(json!({ "prompt": ["a", "b"], "n": 2, "best_of": 2, "seed": 1 }))).await;
        let indices: Vec<u64> =
            answer["choices"].as_array().unwrap().iter().map(|choice| choice["index"].as_u64().unwrap()).collect();
        assert_eq!(indices, [0, 1, 2, 3]);
        let seen = seen.lock().unwrap();
        assert_eq!(seen.iter().map(|request| request.sampling.seed).collect::<Vec<_>>(), [1, 2, 1, 2]);
        assert_eq!(seen[0].prompt, seen[1].prompt);
        assert_ne!(seen[1].prompt, seen[2].prompt);
        assert_eq!(seen[0].max_tokens, 16);
    });
}

/// What lm-eval's `local-completions` sends for a log likelihood, and how it reads the answer.
#[test]
fn log_likelihoods_as_lm_eval_asks_for_them() {
    run(async {
        // The token after the prompt is the end token: it has to be there all the same.
        let (script, seen) = says_tokens(vec![]);
        let state = server(tokenizer(), config(), script);
        let context = tokenizer().encode("Once upon", false).unwrap().ids;
        let continuation = tokenizer().encode(" a time", false).unwrap().ids;
        let prompt = [context.clone(), continuation.clone()].concat();
        let request = json!({
            "model": "base", "prompt": [prompt], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234,
            "echo": true,
        });
        let answer = ask(&state, PATH, request).await;
        assert!(seen.lock().unwrap()[0].prompt_logprobs);
        let logprobs = &answer["choices"][0]["logprobs"];
        let values = logprobs["token_logprobs"].as_array().unwrap();
        assert_eq!(values.len(), prompt.len() + 1);
        assert_eq!(values[0], Value::Null);
        let scored = context.len()..values.len() - 1;
        let sum: f64 = values[scored.clone()].iter().map(|value| value.as_f64().unwrap()).sum();
        let expected: f64 = continuation.iter().map(|&id| f64::from(-(id as f32) / 1000.0)).sum();
        // The values are f32 in the shortest form that gives them back: 1e-6 is a few of their last bits.
        assert!((sum - expected).abs() < 1e-6 * expected.abs(), "{sum} {expected}");
        for index in scored {
            let top = logprobs["top_logprobs"][index].as_object().unwrap();
            let best = top.values().map(|value| value.as_f64().unwrap()).fold(f64::NEG_INFINITY, f64::max);
            assert_eq!(best, values[index].as_f64().unwrap(), "the likeliest token is the token itself");
        }
    });
}

#[test]
fn echo_without_new_tokens() {
    run(async {
        let (script, seen) = says("never said");
        let state = server(tokenizer(), config(), script);
        let request = completion(json!({ "max_tokens": 0, "echo": true, "logprobs": 0 }));
        let answer = ask(&state, PATH, request.clone()).await;
        assert_eq!(answer["choices"][0]["text"], "Once upon");
        assert_eq!(answer["choices"][0]["finish_reason"], "length");
        let count = seen.lock().unwrap()[0].prompt.len();
        let logprobs = &answer["choices"][0]["logprobs"];
        for field in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            assert_eq!(logprobs[field].as_array().unwrap().len(), count, "{field}");
        }
        let streamed = chunks(&state, PATH, request).await;
        let texts = streamed.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap());
        assert_eq!(texts.collect::<String>(), "Once upon");
    });
}

#[test]
fn offsets_count_characters_of_the_whole_text() {
    run(async {
        let (script, _) = says(" né 🙂 b");
        let state = server(tokenizer(), config(), script);
        let answer = ask(&state, PATH, completion(json!({ "prompt": "Ü a", "echo": true, "logprobs": 2 }))).await;
        let text: Vec<char> = answer["choices"][0]["text"].as_str().unwrap().chars().collect();
        assert_eq!(text.iter().collect::<String>(), "Ü a né 🙂 b");
        let logprobs = &answer["choices"][0]["logprobs"];
        let tokens = logprobs["tokens"].as_array().unwrap();
        let mut in_parts = 0;
        for (token, offset) in tokens.iter().zip(logprobs["text_offset"].as_array().unwrap()) {
            let (token, offset) = (token.as_str().unwrap(), offset.as_u64().unwrap() as usize);
            if token.starts_with("bytes:") {
                in_parts += 1;
            } else if token != "<|im_end|>" {
                assert!(text[offset..].iter().collect::<String>().starts_with(token), "{token:?} at {offset}");
            }
        }
        assert!(in_parts > 0, "the tiny vocabulary has parts of characters");
    });
}

#[test]
fn chunks_join_to_the_answer() {
    run(async {
        let (script, _) = says(" a time, né?");
        let state = server(tokenizer(), config(), script);
        let request = completion(json!({ "prompt": ["a", "b"], "logprobs": 1, "echo": true }));
        let whole = ask(&state, PATH, request.clone()).await;
        let mut streaming = request;
        streaming["stream_options"] = json!({ "include_usage": true });
        let streamed = chunks(&state, PATH, streaming).await;
        for index in 0..2 {
            let of_choice = || {
                let choices = streamed.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap());
                choices.filter(|choice| choice["index"] == index)
            };
            let choice = &whole["choices"][index];
            let text: String = of_choice().map(|choice| choice["text"].as_str().unwrap()).collect();
            assert_eq!(text, choice["text"].as_str().unwrap());
            for field in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
                let joined = of_choice().flat_map(|choice| choice["logprobs"][field].as_array().unwrap()).cloned();
                assert_eq!(joined.collect::<Vec<_>>(), *choice["logprobs"][field].as_array().unwrap(), "{field}");
            }
            let ends: Vec<&Value> =
                of_choice().map(|choice| &choice["finish_reason"]).filter(|r| !r.is_null()).collect();
            assert_eq!(ends, [&choice["finish_reason"]]);
        }
        assert_eq!(streamed.last().unwrap()["usage"], whole["usage"]);
    });
}

#[test]
fn special_tokens_are_written_on_request() {
    run(async {
        let start = tokenizer().token_to_id("<|im_start|>").unwrap();
        let (script, _) = says_tokens([vec![start], tokenizer().encode("user", false).unwrap().ids].concat());
        let state = server(tokenizer(), config(), script);
        let answer = ask(&state, PATH, completion(json!({}))).await;
        assert_eq!(answer["choices"][0]["text"], "user");
        let answer = ask(&state, PATH, completion(json!({ "skip_special_tokens": false }))).await;
        assert_eq!(answer["choices"][0]["text"], "<|im_start|>user");
    });
}

#[test]
fn the_end_is_ignored_on_request() {
    run(async {
        let (script, seen) = says("x");
        let state = server(tokenizer(), config(), script);
        ask(&state, PATH, completion(json!({ "ignore_eos": true, "stop_token_ids": [77] }))).await;
        assert_eq!(*seen.lock().unwrap()[0].stop_ids, [77]);
    });
}
