//! Tools: written into the prompt, read from the answer.

use serde_json::{Value, json};

use super::support::{ask, chat, chunks, config, run, says, server, tokenizer, tokenizer_with};

const PATH: &str = "/v1/chat/completions";
const HERMES: &str =
    "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}<tool_call>{% endif %}{{ messages[-1].content }}";
const LLAMA: &str = "{% if tools %}{{ tools | tojson }}<|python_tag|>{% endif %}{{ messages[-1].content }}";
const MISTRAL: &str = "{% if tools %}{{ tools | tojson }}[TOOL_CALLS]{% endif %}{{ messages[-1].content }}";

fn tools() -> Value {
    let parameters = json!({ "type": "object", "properties": { "city": { "type": "string" } }, "required": ["city"] });
    json!([
        { "type": "function", "function": { "name": "weather", "description": "Of a city", "parameters": parameters } },
        { "type": "function", "function": { "name": "time" } },
    ])
}

/// Calls as name and arguments.
fn calls(calls: &Value) -> Vec<(String, Value)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let call = |call: &Value| {
        assert_eq!(call["type"], "function");
        let function = &call["function"];
        (text(&function["name"]), serde_json::from_str(&text(&function["arguments"])).unwrap())
    };
    calls.as_array().unwrap().iter().map(call).collect()
}

#[test]
fn calls_are_read_in_every_format() {
    let paris = || ("weather".to_owned(), json!({ "city": "Paris" }));
    let time = || ("time".to_owned(), json!({}));
    let cases = [
        (
            HERMES,
            "I look.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>\n\
             <tool_call>\n{\"name\": \"time\", \"arguments\": {}}\n</tool_call>",
            json!("I look."),
            vec![paris(), time()],
        ),
        (LLAMA, "{\"name\": \"weather\", \"parameters\": {\"city\": \"Paris\"}}", Value::Null, vec![paris()]),
        (
            MISTRAL,
            "[TOOL_CALLS][{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}]",
            Value::Null,
            vec![paris()],
        ),
        (MISTRAL, "[TOOL_CALLS]weather[ARGS]{\"city\": \"Paris\"}", Value::Null, vec![paris()]),
    ];
    run(async {
        for (template, said, content, expected) in cases {
            let (script, seen) = says(said);
            let state = server(tokenizer_with(template), config(), script);
            let answer = ask(&state, PATH, chat(json!({ "tools": tools() }))).await;
            let choice = &answer["choices"][0];
            assert_eq!(choice["finish_reason"], "tool_calls", "{said}");
            assert_eq!(choice["message"]["content"], content, "{said}");
            assert_eq!(calls(&choice["message"]["tool_calls"]), expected, "{said}");
            let id = choice["message"]["tool_calls"][0]["id"].as_str().unwrap();
            assert!(if template == MISTRAL { id.len() == 9 } else { id.starts_with("call_") }, "{id}");
            let prompt = tokenizer().decode(&seen.lock().unwrap()[0].prompt, false).unwrap();
            assert!(prompt.contains("\"description\": \"Of a city\""), "{prompt}");

            let chunks = chunks(&state, PATH, chat(json!({ "tools": tools() }))).await;
            let deltas: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"][0]["delta"]).collect();
            let streamed: Vec<Value> =
                deltas.iter().filter_map(|delta| delta["tool_calls"].as_array()).flatten().cloned().collect();
            assert_eq!(calls(&json!(streamed)), expected);
            let indices: Vec<u64> = streamed.iter().map(|call| call["index"].as_u64().unwrap()).collect();
            assert_eq!(indices, (0..expected.len() as u64).collect::<Vec<_>>());
            let text: String = deltas.iter().filter_map(|delta| delta["content"].as_str()).collect();
            assert_eq!(text, content.as_str().unwrap_or(""));
            assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");

            // Without tools it is text.
            let answer = ask(&state, PATH, chat(json!({ "tools": tools(), "tool_choice": "none" }))).await;
            assert_eq!(answer["choices"][0]["message"]["content"], said);
            assert_eq!(answer["choices"][0]["finish_reason"], "stop");
            let prompt = tokenizer().decode(&seen.lock().unwrap().last().unwrap().prompt, false).unwrap();
            assert_eq!(prompt, "What is 2 + 3?");
        }
    });
}

#[test]
fn one_call_at_a_time() {
    run(async {
        let two = "<tool_call>{\"name\": \"time\"}</tool_call><tool_call>{\"name\": \"weather\"}</tool_call>";
        let (script, _) = says(two);
        let state = server(tokenizer_with(HERMES), config(), script);
        let answer = ask(&state, PATH, chat(json!({ "tools": tools(), "parallel_tool_calls": false }))).await;
        assert_eq!(calls(&answer["choices"][0]["message"]["tool_calls"]), [("time".into(), json!({}))]);
        assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls");
        let answer = ask(&state, PATH, chat(json!({ "tools": tools() }))).await;
        assert_eq!(calls(&answer["choices"][0]["message"]["tool_calls"]).len(), 2);
    });
}

#[test]
fn a_conversation_with_calls_reaches_the_template() {
    run(async {
        let (script, seen) = says("It is late.");
        let template = "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}\
            {{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %};{% endfor %}";
        let state = server(tokenizer_with(template), config(), script);
        let call =
            json!({ "id": "call_1", "type": "function", "function": { "name": "time", "arguments": "{\"zone\": 1}" } });
        let messages = json!([
            { "role": "user", "content": "Time?" },
            { "role": "assistant", "content": null, "tool_calls": [call] },
            { "role": "tool", "tool_call_id": "call_1", "content": "23:00" },
        ]);
        ask(&state, PATH, json!({ "messages": messages })).await;
        let prompt = tokenizer().decode(&seen.lock().unwrap()[0].prompt, false).unwrap();
        assert!(prompt.contains("time{\"zone\": 1};tool:23:00;"), "{prompt}");
    });
}
