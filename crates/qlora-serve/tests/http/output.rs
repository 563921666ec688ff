//! Answers from tokens: whatever the tokens, the text that comes out is the text that was said.

use std::sync::Arc;

use chat_text::Tokenizer;
use proptest::prelude::*;
use qlora_serve::text::{Call, Delta, Output, OutputOptions, ToolFormat};

use super::support::tokenizer;

/// What comes of an answer in these tokens: reasoning, content, calls, and whether it ended before them.
fn read(tokenizer: &Arc<Tokenizer>, ids: &[u32], options: &OutputOptions) -> (String, String, Vec<Call>, bool) {
    let mut output = Output::new(tokenizer, &[], options);
    let mut deltas = Vec::new();
    for &id in ids {
        deltas.extend(output.push(id).unwrap());
        if output.stopped() {
            break;
        }
    }
    deltas.extend(output.finish().unwrap());
    let (mut reasoning, mut content, mut calls) = (String::new(), String::new(), Vec::new());
    for delta in deltas {
        match delta {
            Delta::Reasoning(text) => reasoning += &text,
            Delta::Content(text) => content += &text,
            Delta::Call(call) => calls.push(call),
        }
    }
    (reasoning, content, calls, output.stopped())
}

/// A text in tokens that its tokenizer would not choose: cut into pieces first.
fn cut(tokenizer: &Tokenizer, text: &str, cuts: &[usize]) -> Vec<u32> {
    let mut at: Vec<usize> =
        cuts.iter().map(|cut| cut % (text.len() + 1)).filter(|&at| text.is_char_boundary(at)).collect();
    at.extend([0, text.len()]);
    at.sort_unstable();
    at.windows(2).flat_map(|ends| tokenizer.encode(&text[ends[0]..ends[1]], false).unwrap().ids).collect()
}

proptest! {
    #[test]
    fn the_choice_of_tokens_does_not_matter(
        pieces in prop::collection::vec(
            r#"(<think>|</think>|<tool_call>|</tool_call>|\{"name": "f", "arguments": \{"é": "🙂"\}\}|STOP|ST|[aé🙂 \n]){1,3}"#,
            1..6,
        ),
        cuts in prop::collection::vec(any::<usize>(), 0..12),
        opened: bool,
        one_call: bool,
    ) {
        let text = pieces.concat();
        let tokenizer = Arc::new(tokenizer());
        let options = OutputOptions {
            stops: vec!["STOP".into(), "é🙂".into()],
            reasoning: Some(opened),
            tools: Some((ToolFormat::Tagged, vec!["f".into()])),
            one_call,
            special_tokens: false,
        };
        let plain = tokenizer.encode(&text, false).unwrap().ids;
        let expected = read(&tokenizer, &plain, &options);
        prop_assert_eq!(&read(&tokenizer, &cut(&tokenizer, &text, &cuts), &options), &expected);
        prop_assert!(!expected.1.contains("STOP"));
        // Nothing is lost where nothing is looked for.
        let all = OutputOptions::default();
        prop_assert_eq!(read(&tokenizer, &plain, &all), (String::new(), text, Vec::new(), false));
    }
}
