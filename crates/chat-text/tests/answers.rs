//! What of a conversation is learned, with templates that do what published ones do.
#![allow(clippy::unwrap_used)]

use chat_text::{ChatError, ChatInput, ChatTemplate, Message, Rendered, SpecialTokens, Untraceable, UnwrittenPart};
use serde_json::{Value as Json, json};

fn render_with(source: &str, messages: Json, tools: Option<Json>, kwargs: Json) -> Result<Rendered, ChatError> {
    let messages: Vec<Message> = serde_json::from_value(messages).unwrap();
    let input = ChatInput {
        messages: &messages,
        tools: tools.as_ref(),
        add_generation_prompt: false,
        special_tokens: &SpecialTokens::default(),
        template_kwargs: kwargs.as_object(),
    };
    ChatTemplate::new(source).unwrap().render_answers(&input)
}

fn render(source: &str, messages: Json) -> Result<Rendered, ChatError> {
    render_with(source, messages, None, json!({}))
}

fn learned(source: &str, messages: Json) -> Vec<String> {
    let rendered = render(source, messages).unwrap();
    rendered.spans.iter().map(|span| rendered.text[span.clone()].to_owned()).collect()
}

fn unwritten(rendered: &Rendered) -> Vec<(usize, String)> {
    rendered.unwritten.iter().map(|u| (u.message, u.part.to_string())).collect()
}

fn calling(content: &str, arguments: Json) -> Json {
    json!([
        {"role": "user", "content": "Weather in Oslo?"},
        {"role": "assistant", "content": content, "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": arguments}}]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ])
}

const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// An empty reasoning before the last answer only, as Qwen3 writes it.
const QWEN3: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Calls before the text, another end of the last turn, and a prompt that is not the beginning of a turn.
const CALL_FIRST: &str = "{% for m in messages %}<{{ m.role }}>{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}{{ m.content }}{% if not loop.last or add_generation_prompt %}<|im_end|>{% else %}<|endoftext|>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant><plan>{% endif %}";

const CALL: &str = r#"<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>"#;

#[test]
fn calls_without_text_are_learned() {
    assert_eq!(
        learned(QWEN3, calling("", json!({"city": "Oslo"}))),
        [format!("{CALL}<|im_end|>\n"), "<think>\n\n</think>\n\nIt rains.<|im_end|>\n".into()]
    );
}

#[test]
fn calls_before_text_are_learned() {
    let call = CALL.replace("tool_call", "call");
    assert_eq!(
        learned(CALL_FIRST, calling("I look it up.", json!({"city": "Oslo"}))),
        [format!("{call}I look it up."), "It rains.<|endoftext|>".into()]
    );
    // Nothing of the call can be marked but its name: what closes it is learned all the same.
    let turns = learned(QWEN3, calling("", json!({"days": 3})));
    assert_eq!(turns[0], "<tool_call>{\"name\": \"weather\", \"arguments\": {\"days\": 3}}</tool_call><|im_end|>\n");
}

#[test]
fn arguments_given_as_text_are_parsed_where_the_template_writes_json() {
    let text = json!("{\"city\": \"Oslo\"}");
    assert_eq!(learned(CHATML, calling("", text.clone()))[0], format!("{CALL}<|im_end|>\n"));
    // Templates that put the text between others want it as text, also where the data has an object.
    for plus in [" + c.function.arguments + ", " ~ c.function.arguments ~ "] {
        let source = CHATML.replace("c.function | tojson", &format!("c.function.name ~ '[' {plus} ']'"));
        for arguments in [text.clone(), json!({"city": "Oslo"})] {
            let turns = learned(&source, calling("", arguments));
            assert_eq!(turns[0], "<tool_call>weather[{\"city\": \"Oslo\"}]</tool_call><|im_end|>\n");
        }
    }
}

#[test]
fn calls_that_are_not_written_are_told() {
    let plain = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let error = render(plain, calling("", json!({"city": "Oslo"}))).unwrap_err();
    assert!(matches!(&error, ChatError::NotWritten { message: 2, part: UnwrittenPart::ToolCalls }), "{error}");
    assert!(error.to_string().contains("does not write the tool calls of message 2"), "{error}");
    let tools = json!([{"type": "function", "function": {"name": "weather"}}]);
    let rendered = render_with(plain, calling("I look.", json!({"city": "Oslo"})), Some(tools), json!({})).unwrap();
    assert_eq!(unwritten(&rendered), [(2, "tool calls".to_owned()), (0, "tool definitions".to_owned())]);
}

#[test]
fn reasoning_is_learned_or_told() {
    let thinking = json!([
        {"role": "user", "content": "Six times seven?"},
        {"role": "assistant", "content": "<think>\nsix sevens\n</think>\n\n42"},
    ]);
    // The generation prompt closes the reasoning unless it is turned on: the data has one, so it is learned.
    let closing = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}";
    assert_eq!(learned(closing, thinking.clone()), ["<think>\nsix sevens\n</think>\n\n42<|im_end|>\n"]);
    // The prompt opens it, and the template cuts it off.
    let cutting = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}";
    let rendered = render(cutting, thinking).unwrap();
    assert_eq!(unwritten(&rendered), [(2, "reasoning".to_owned())]);
    assert_eq!(rendered.text[rendered.spans[0].clone()], *"\n\n42<|im_end|>\n");

    let beside = |key: &str| json!([{"role": "user", "content": "?"}, {"role": "assistant", "content": "42", key: "six sevens"}]);
    let other = "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    for key in ["reasoning_content", "thinking", "reasoning"] {
        assert_eq!(learned(other, beside(key)), ["<think>six sevens</think>42</s>"]);
        assert_eq!(
            learned(&other.replace("reasoning_content", "thinking"), beside(key)),
            ["<think>six sevens</think>42</s>"]
        );
        assert_eq!(unwritten(&render(CHATML, beside(key)).unwrap()), [(2, "reasoning".to_owned())]);
    }
}

#[test]
fn variables_reach_the_template_but_not_those_it_has() {
    let source = "{{ mode }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    let messages = json!([{"role": "user", "content": "?"}, {"role": "assistant", "content": "42"}]);
    let rendered = render_with(source, messages.clone(), None, json!({"mode": "x"})).unwrap();
    assert!(rendered.text.starts_with("x<user>"));
    for name in ["messages", "tools", "add_generation_prompt"] {
        let error = render_with(source, messages.clone(), None, json!({name: 1})).unwrap_err();
        assert!(matches!(error, ChatError::ReservedVariable { .. }), "{error}");
    }
}

#[test]
fn results_within_a_turn_are_not_learned() {
    // The result goes into the assistant's turn, as Gemma 4 has it.
    let source = "{% for m in messages %}{% if m.role == 'tool' %}<result>{{ m.content }}</result>{% else %}{% if not loop.previtem or loop.previtem.role != 'tool' %}<{{ m.role }}>{% endif %}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}{{ m.content }}{% if not m.tool_calls %}</s>{% endif %}{% endif %}{% endfor %}{% if add_generation_prompt and messages[-1].role != 'tool' %}<assistant>{% endif %}";
    let call = CALL.replace("tool_call", "call");
    assert_eq!(learned(source, calling("", json!({"city": "Oslo"}))), [call, "It rains.</s>".into()]);
    // The text after the result of its own call: whose the words around the result are can't be told.
    let inside = "{% for m in messages %}{% if m.role != 'tool' %}<{{ m.role }}>{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{{ messages[2].content if messages | length > 2 }}{% endfor %}{{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    let error = render(inside, calling("I look.", json!({"city": "Oslo"}))).unwrap_err();
    assert!(matches!(error, ChatError::Untraceable { message: 2, reason: Untraceable::Interrupted }), "{error}");
}

#[test]
fn generation_tags_decide_where_a_template_has_them() {
    let source = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}</s>{% endfor %}";
    let turns = |learn: bool| json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": learn}, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]);
    assert_eq!(learned(source, turns(true)), ["b", "d"]);
    assert_eq!(learned(source, turns(false)), ["d"]);
}

#[test]
fn messages_say_whether_they_are_learned() {
    let turns = |key: &str, value: Json| json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Bad.", key: value}, {"role": "user", "content": "Hm"}, {"role": "assistant", "content": "Good.", key: 1}]);
    for (key, value) in [
        ("weight", json!(0)),
        ("weight", json!(0.0)),
        ("train", json!(false)),
        ("trainable", json!(0)),
        ("loss", json!(false)),
        ("training", json!(false)),
    ] {
        let rendered = render(&CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m | length }}"), turns(key, value));
        let rendered = rendered.unwrap();
        // The template sees role and content only.
        assert_eq!(rendered.text[rendered.spans[0].clone()], *"Good.2<|im_end|>\n");
        assert_eq!(rendered.spans.len(), 1);
    }
    for (key, value, expected) in
        [("weight", json!(0.5), "must be 0 (not learned) or 1"), ("train", json!("no"), "must be true or false")]
    {
        let error =
            serde_json::from_value::<Message>(json!({"role": "assistant", "content": "x", key: value})).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn what_is_not_written_is_told() {
    let source = "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}<{{ m.role }}>{{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    let rendered = render(source, json!([{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi", "mood": "good"}, {"role": "assistant", "content": "Yo"}])).unwrap();
    assert_eq!(
        unwritten(&rendered),
        [(1, "whole text of role `developer`".to_owned()), (2, "field `mood`".to_owned())]
    );
    assert_eq!(rendered.unwritten[1].to_string(), "the chat template does not write the field `mood` of message 2");
    let error = render(
        &source.replace("['user', 'assistant']", "['user']"),
        json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]),
    )
    .unwrap_err();
    assert!(matches!(error, ChatError::NotWritten { message: 2, part: UnwrittenPart::Content }), "{error}");
}

#[test]
fn missing_content_is_empty_only_where_the_template_needs_it() {
    let messages = json!([{"role": "user", "content": "?"}, {"role": "assistant", "content": null, "tool_calls": [{"name": "f"}]}]);
    let test = "{% for m in messages %}<{{ m.role }}>{{ m.content if m.content is defined else 'none' }}{{ m.tool_calls | tojson if m.tool_calls }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    assert_eq!(learned(test, messages.clone()), ["none[{\"name\": \"f\"}]</s>"]);
    let plus = test.replace("m.content if m.content is defined else 'none'", "m.content + ''");
    assert_eq!(learned(&plus, messages), ["[{\"name\": \"f\"}]</s>"]);
}

#[test]
fn turns_are_ended_by_what_ends_them_when_they_are_last() {
    // gpt-oss: history has another end than what the model is to write.
    let turns = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]);
    let history = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ '<return>' if loop.last and m.role == 'assistant' else '<end>' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    assert_eq!(learned(history, turns.clone()), ["b", "d<return>"]);
    // Apriel: only turns that are followed by others are ended.
    let unended = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ '<end>' if not loop.last }}{% endfor %}{% if add_generation_prompt %}<end><assistant>{% endif %}";
    assert_eq!(learned(unended, turns), ["b<end>", "d"]);
}
