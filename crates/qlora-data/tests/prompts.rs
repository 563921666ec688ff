//! What is asked is what stands before an answer in a row.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

mod common;

use chat_text::{ChatInput, ChatTemplate, Message, PromptLayout, PromptSettings, Prompting};
use common::{load_text, tokenizer};
use qlora_data::{DataConfig, Format, MASKED_LABEL};

/// Header and answer side by side, with no token of their own between them.
const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";

/// How many tokens of the only row stand before each of its answers, and all of them.
fn row(text: &str, config: &DataConfig) -> (Vec<usize>, Vec<u32>) {
    let example = load_text(text, config).unwrap().examples.get(0).unwrap();
    let learned = |at: &usize| example.labels[*at] != MASKED_LABEL;
    let starts = (1..example.labels.len()).filter(|at| learned(at) && !learned(&(at - 1))).collect();
    (starts, example.input_ids)
}

#[test]
fn later_turns_of_a_conversation() {
    let config = DataConfig { chat_template: Some(TEMPLATE.into()), ..DataConfig::default() };
    let turns = [("user", "Two and two?"), ("assistant", "Four."), ("user", "And one?"), ("assistant", "Five.")];
    let json: Vec<_> =
        turns.iter().map(|(role, content)| serde_json::json!({"role": role, "content": content})).collect();
    let (starts, ids) = row(&serde_json::json!({ "messages": json }).to_string(), &config);
    assert_eq!(starts.len(), 2);
    let messages = turns.map(|(role, content)| Message::new(role, content));
    let prompting = Prompting {
        settings: PromptSettings { cut_at_answers: true, ..PromptSettings::default() },
        template: Some(ChatTemplate::new(TEMPLATE).unwrap()),
    };
    for (start, asked) in starts.into_iter().zip([1, 3]) {
        let input = ChatInput {
            messages: &messages[..asked],
            tools: None,
            add_generation_prompt: true,
            special_tokens: tokenizer().special_tokens(),
            template_kwargs: None,
        };
        assert_eq!(prompting.conversation(tokenizer(), &input).unwrap().ids, ids[..start]);
    }
}

#[test]
fn later_instructions() {
    let text =
        r#"{"instruction": "And one?", "output": "Five.", "system": "Count.", "history": [["Two and two?", "Four."]]}"#;
    for end_token in [None, Some("<|endoftext|>".to_string())] {
        let config = DataConfig { format: Format::Alpaca, end_token: end_token.clone(), ..DataConfig::default() };
        let (starts, ids) = row(text, &config);
        assert_eq!(starts.len(), 2);
        let settings = PromptSettings {
            layout: PromptLayout::Alpaca,
            end_token,
            cut_at_answers: true,
            ..PromptSettings::default()
        };
        let prompting = Prompting { settings, template: None };
        let messages = [
            Message::system("Count."),
            Message::user("Two and two?"),
            Message::assistant("Four."),
            Message::user("And one?"),
        ];
        for (start, asked) in starts.into_iter().zip([2, 4]) {
            assert_eq!(prompting.instructions(tokenizer(), &messages[..asked]).unwrap().ids, ids[..start]);
        }
    }
}
