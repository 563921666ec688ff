//! The layouts of rows: what is read of each, and what of it is learned.
#![allow(clippy::unwrap_used)]

mod common;

use common::{config, labelled, load_text};
use qlora_data::{DataConfig, Format, LossOn};

#[test]
fn every_format_is_detected_and_labelled() {
    let cases = [
        (
            r#"{"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}, {"role": "assistant", "content": " e "}]}"#,
            Format::Chat,
            "c<|im_end|>\ne<|im_end|>\n",
            "<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n<|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\ne<|im_end|>\n",
        ),
        (
            r#"{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}"#,
            Format::Chat,
            "b<|im_end|>\n",
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
        ),
        (
            r#"{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}"#,
            Format::Chat,
            "b<|im_end|>\n",
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
        ),
        (
            r#"{"prompt": "2 + 2 =", "completion": " 4"}"#,
            Format::PromptCompletion,
            " 4<|im_end|>",
            "2 + 2 = 4<|im_end|>",
        ),
        (
            r#"{"instruction": "Add.", "input": "2, 2", "output": "4"}"#,
            Format::Alpaca,
            "4<|im_end|>",
            "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n2, 2\n\n### Response:\n4<|im_end|>",
        ),
        (
            r#"{"instruction": "Greet.", "input": "", "output": "Hi"}"#,
            Format::Alpaca,
            "Hi<|im_end|>",
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\nGreet.\n\n### Response:\nHi<|im_end|>",
        ),
        (r#"{"text": "naïve 漢字 🙂"}"#, Format::Text, "naïve 漢字 🙂<|im_end|>", "naïve 漢字 🙂<|im_end|>"),
    ];
    for (row, format, answer, whole) in cases {
        for named in [Format::Auto, format] {
            let given = DataConfig { format: named, ..config() };
            let dataset = load_text(&format!("\u{feff}\n{row}\r\n\n"), &given).unwrap();
            assert_eq!(dataset.report.format, format);
            assert_eq!(dataset.examples.get(0).unwrap().line, 2);
            let (counted, all) = labelled(&dataset.examples.get(0).unwrap());
            assert_eq!((counted.as_str(), all.as_str()), (answer, whole));
        }
        let all = DataConfig { loss_on: LossOn::All, ..config() };
        let dataset = load_text(row, &all).unwrap();
        assert_eq!(labelled(&dataset.examples.get(0).unwrap()), (whole.to_owned(), whole.to_owned()));
    }
}

#[test]
fn system_prompt_and_template_are_taken_from_the_configuration() {
    let row = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;
    let given = DataConfig {
        system_prompt: Some("Be brief.".into()),
        chat_template: Some(
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}".into(),
        ),
        ..config()
    };
    let dataset = load_text(row, &given).unwrap();
    let (counted, all) = labelled(&dataset.examples.get(0).unwrap());
    assert_eq!((counted.as_str(), all.as_str()), ("b", "[system]Be brief.[user]a[assistant]b"));

    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("template.jinja");
    std::fs::write(&file, given.chat_template.as_deref().unwrap()).unwrap();
    let from_file = DataConfig { chat_template: Some(file.display().to_string()), ..given.clone() };
    assert_eq!(load_text(row, &from_file).unwrap().examples, dataset.examples);

    let alpaca = r#"{"instruction": "Greet.", "output": "Hi"}"#;
    let system = DataConfig { system_prompt: Some("Do it.".into()), ..config() };
    let dataset = load_text(alpaca, &system).unwrap();
    assert!(labelled(&dataset.examples.get(0).unwrap()).1.starts_with("Do it.\n\n### Instruction:\nGreet."));
    let error = load_text(r#"{"text": "x y"}"#, &system).unwrap_err();
    assert!(error.contains("data.system_prompt has no place in text rows"), "{error}");
    let broken = DataConfig { chat_template: Some("{% if".into()), ..config() };
    assert!(load_text(row, &broken).unwrap_err().contains("syntax error"));
}

#[test]
fn turns_that_cannot_be_traced_are_refused_with_advice() {
    let row = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "c"}, {"role": "assistant", "content": "y"}]}"#;
    let given = |template: &str, loss_on| DataConfig { chat_template: Some(template.into()), loss_on, ..config() };
    // The header counts all turns and the length of the answer stands before it.
    let counting = "{{ messages | length }}{% for m in messages %}<{{ m.role }} {{ m.content | length }}>{{ m.content }}{% endfor %}";
    let error = load_text(row, &given(counting, LossOn::Assistant)).unwrap_err();
    assert!(error.starts_with("/rows.jsonl:1: it can't be told which tokens message 2 became"), "{error}");
    assert!(error.contains("loss_on") && error.contains("{% generation %}"), "{error}");
    let all = load_text(row, &given(counting, LossOn::All)).unwrap();
    assert_eq!(labelled(&all.examples.get(0).unwrap()).0, "4<user 1>a<assistant 1>x<user 1>c<assistant 1>y");

    let tagged = counting.replace("{{ m.content }}", "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}");
    let dataset = load_text(row, &given(&tagged, LossOn::Assistant)).unwrap();
    let (counted, _) = labelled(&dataset.examples.get(0).unwrap());
    assert_eq!(counted, "x<|im_end|>y<|im_end|>");

    let silent = "{% for m in messages %}<{{ m.role }}>{% endfor %}";
    let error = load_text(row, &given(silent, LossOn::Assistant)).unwrap_err();
    assert!(error.contains("does not write the content of message 2"), "{error}");
}

/// A template that writes every message, with its tool calls, and the row's tools.
const WITH_TOOLS: &str = "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

fn with_tools() -> DataConfig {
    DataConfig { chat_template: Some(WITH_TOOLS.into()), ..config() }
}

#[test]
fn sharegpt_rows_bring_a_system_message_tools_and_calls() {
    let row = r#"{"system": "Be a pirate.", "tools": "[{\"name\": \"weather\"}]", "conversations": [{"from": "human", "value": "Rain?"}, {"from": "function_call", "value": "{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}}"}, {"from": "observation", "value": "wet"}, {"from": "gpt", "value": "Arr", "weight": 0}, {"from": "human", "value": "So?"}, {"from": "gpt", "value": "Aye"}]}"#;
    let dataset = load_text(row, &with_tools()).unwrap();
    assert_eq!(dataset.report.files[0].notices, []);
    let (counted, all) = labelled(&dataset.examples.get(0).unwrap());
    let call = r#"{"name": "weather", "arguments": {"city": "Oslo"}}<|im_end|>"#;
    assert_eq!(
        all,
        format!(
            "<tools>[{{\"name\": \"weather\"}}]</tools><|im_start|>system\nBe a pirate.<|im_end|>\n<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\n{call}\n<|im_start|>tool\nwet<|im_end|>\n<|im_start|>assistant\nArr<|im_end|>\n<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\nAye<|im_end|>\n"
        )
    );
    assert_eq!(counted, format!("{call}\nAye<|im_end|>\n"));

    for (value, expected) in [
        ("weather()", "`conversations[0]`: `value` of function_call is not valid JSON"),
        ("{}", "has a call without a name"),
        ("[]", "has no call"),
    ] {
        let row = serde_json::json!({"conversations": [{"from": "function_call", "value": value}]}).to_string();
        let error = load_text(&row, &with_tools()).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_system_of_the_row_goes_before_the_configurations() {
    let given = DataConfig { system_prompt: Some("Be brief.".into()), ..config() };
    let row = |system: &str, first: &str| {
        format!(
            r#"{{"system": {system}, "messages": [{first}{{"role": "user", "content": "a"}}, {{"role": "assistant", "content": "b"}}]}}"#
        )
    };
    for (row, expected) in [
        (row("\"Be rude.\"", ""), "<|im_start|>system\nBe rude.<|im_end|>\n<|im_start|>user"),
        (row("\"\"", ""), "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user"),
        (row("null", ""), "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user"),
        (
            row("null", r#"{"role": "system", "content": "Be."}, "#),
            "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user",
        ),
    ] {
        let (_, all) = labelled(&load_text(&row, &given).unwrap().examples.get(0).unwrap());
        assert!(all.starts_with(expected), "{all}");
    }
}

/// Of a conversation in two parts only the second is what the model should write.
#[test]
fn of_message_lists_only_the_completion_is_learned() {
    let row = r#"{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}], "completion": [{"role": "assistant", "content": "d"}]}"#;
    let (counted, all) = labelled(&load_text(row, &config()).unwrap().examples.get(0).unwrap());
    assert_eq!(counted, "d<|im_end|>\n");
    assert!(all.contains("assistant\nb<|im_end|>"), "{all}");
}

#[test]
fn alpaca_rows_bring_a_system_and_earlier_turns() {
    let row = r#"{"instruction": "Add.", "input": "2, 2", "output": "4", "system": "Count.", "history": [["One?", "1"], ["Two?", "2"]]}"#;
    let given = DataConfig { system_prompt: Some("Be brief.".into()), ..config() };
    let (counted, all) = labelled(&load_text(row, &given).unwrap().examples.get(0).unwrap());
    assert_eq!(
        all,
        "Count.\n\n### Instruction:\nOne?\n\n### Response:\n1<|im_end|>\n\n### Instruction:\nTwo?\n\n### Response:\n2<|im_end|>\n\n### Instruction:\nAdd.\n\n### Input:\n2, 2\n\n### Response:\n4<|im_end|>"
    );
    assert_eq!(counted, "1<|im_end|>2<|im_end|>4<|im_end|>");
    for history in ["3", r#"[["a"]]"#, r#"[["a", 1]]"#, r#"[{"a": "b"}]"#] {
        let row = format!(r#"{{"instruction": "Add.", "output": "4", "history": {history}}}"#);
        let error = load_text(&row, &config()).unwrap_err();
        assert!(error.contains("`history") && error.contains("[instruction, output]"), "{error}");
    }
}

#[test]
fn template_variables_come_from_the_configuration_and_the_row() {
    let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let given: DataConfig = toml::from_str(&format!(
        "chat_template = '''{{{{ date }}}} {{{{ mode }}}}{template}'''\n[template_kwargs]\ndate = 2024-07-26\nmode = \"a\"",
    ))
    .unwrap();
    assert_eq!(toml::from_str::<DataConfig>(&toml::to_string(&given).unwrap()).unwrap(), given);
    let messages = r#""messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]"#;
    for (row, expected) in [
        (format!("{{{messages}}}"), "2024-07-26 a<|im_start|>"),
        (format!("{{{messages}, \"chat_template_kwargs\": {{\"mode\": \"b\"}}}}"), "2024-07-26 b<|im_start|>"),
        (
            format!("{{{messages}, \"chat_template_kwargs\": \"{{\\\"mode\\\": \\\"c\\\"}}\"}}"),
            "2024-07-26 c<|im_start|>",
        ),
    ] {
        let dataset = load_text(&row, &given).unwrap();
        assert_eq!(dataset.report.files[0].notices, []);
        let (_, all) = labelled(&dataset.examples.get(0).unwrap());
        assert!(all.starts_with(expected), "{all}");
    }
    let error = load_text(r#"{"text": "a b"}"#, &DataConfig { chat_template: None, ..given }).unwrap_err();
    assert!(error.contains("data.template_kwargs has no place in text rows"), "{error}");
}

/// A tokenizer joins a prompt's last blank with the first letters of an answer, where generation sees the blank alone.
#[test]
fn an_answer_is_learned_from_its_first_letter_behind_a_blank() {
    for answer in ["blue", "green", "white", "black"] {
        let pair = format!(r#"{{"prompt": "Color of it: ", "completion": "{answer}"}}"#);
        let (counted, all) = labelled(&load_text(&pair, &config()).unwrap().examples.get(0).unwrap());
        assert_eq!((counted, all), (format!("{answer}<|im_end|>"), format!("Color of it: {answer}<|im_end|>")));

        let header = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";
        let chat = format!(
            r#"{{"messages": [{{"role": "user", "content": "Color?"}}, {{"role": "assistant", "content": "{answer}"}}]}}"#
        );
        let given = DataConfig { chat_template: Some(header.into()), ..config() };
        let dataset = load_text(&chat, &given).unwrap();
        assert_eq!(labelled(&dataset.examples.get(0).unwrap()).0, format!("{answer}<|im_end|>\n"));
        // As many as behind a header without a blank.
        let bare = DataConfig { chat_template: Some(header.replace(": ", ":")), ..config() };
        let same = load_text(&chat, &bare).unwrap().examples.get(0).unwrap().label_tokens();
        assert_eq!(dataset.examples.get(0).unwrap().label_tokens(), same);
    }
}
