//! Training and generation see the same tokens where an answer begins.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use chat_text::{
    ChatInput, ChatTemplate, Labelled, MASKED_LABEL, Message, Prompt, PromptSettings, Prompting, Tokenizer,
};
use proptest::prelude::*;
use serde_json::{Value as Json, json};

/// A byte-level vocabulary that joins a blank with `blue`, and line breaks with each other.
fn byte_level() -> Json {
    let mut vocab = serde_json::Map::new();
    let mut alphabet: Vec<char> = tokenizers_alphabet();
    alphabet.sort_unstable();
    for c in alphabet {
        vocab.insert(c.to_string(), vocab.len().into());
    }
    let merges =
        [["Ġ", "b"], ["l", "u"], ["Ġb", "lu"], ["Ġblu", "e"], ["b", "lu"], ["blu", "e"], ["Ċ", "Ċ"], [":", "Ġ"]];
    for pair in merges {
        vocab.insert(pair.concat(), vocab.len().into());
    }
    let end = vocab.len();
    json!({
        "version": "1.0",
        "added_tokens": [
            {"id": end, "content": "<|end|>", "special": true, "normalized": false, "lstrip": false, "rstrip": false, "single_word": false},
            {"id": end + 1, "content": "<s>", "special": true, "normalized": false, "lstrip": false, "rstrip": false, "single_word": false},
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|end|>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                "<s>": {"id": "<s>", "ids": [end + 1], "tokens": ["<s>"]},
                "<|end|>": {"id": "<|end|>", "ids": [end], "tokens": ["<|end|>"]},
            }},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": false},
    })
}

/// GPT-2's letters for the 256 bytes.
fn tokenizers_alphabet() -> Vec<char> {
    let printable = |b: u32| (0x21..=0x7e).contains(&b) || (0xa1..=0xac).contains(&b) || (0xae..=0xff).contains(&b);
    let mut next = 0x100;
    (0..=255)
        .filter_map(|b| {
            let c = if printable(b) { b } else { next };
            next += u32::from(!printable(b));
            char::from_u32(c)
        })
        .collect()
}

/// SentencePiece's way: a blank is put before each text, and blanks belong to the word that follows.
fn sentence_piece() -> Json {
    let mut vocab = json!({"<unk>": 0, "<s>": 1});
    for piece in ["▁", "\n", ":", "a", "b", "e", "l", "o", "s", "t", "u", ".", "lu", "blu", "blue", "▁blue"] {
        let id = vocab.as_object().unwrap().len();
        vocab[piece] = id.into();
    }
    json!({
        "version": "1.0",
        "added_tokens": [{"id": 1, "content": "<s>", "special": true, "normalized": false, "lstrip": false, "rstrip": false, "single_word": false}],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "vocab": vocab, "unk_token": "<unk>", "merges": [["l", "u"], ["b", "lu"], ["blu", "e"], ["▁", "blue"]]},
    })
}

fn tokenizer(json: &Json) -> Tokenizer {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), r#"{"bos_token": "<s>", "eos_token": "<|end|>"}"#)
        .unwrap();
    Tokenizer::from_dir(dir.path()).unwrap()
}

fn learned(tokenizer: &Tokenizer, labelled: &Labelled) -> String {
    let ids: Vec<u32> = labelled.labels.iter().filter(|l| **l != MASKED_LABEL).map(|l| *l as u32).collect();
    tokenizer.decode(&ids, false).unwrap()
}

#[test]
fn a_blank_before_the_answer_stays_with_the_prompt() {
    for json in [byte_level(), sentence_piece()] {
        let tokenizer = tokenizer(&json);
        let text = "a: blue\na: blue\n";
        let spans = [3..8, 11..16];
        let labelled = tokenizer.encode_labelled(text, &spans, false).unwrap();
        assert_eq!(tokenizer.decode(&labelled.ids, false).unwrap(), text);
        let prompt = tokenizer.encode(&text[..3], false).unwrap().ids;
        assert_eq!(labelled.ids[..prompt.len()], prompt);
        assert_eq!(labelled.labels[..prompt.len()], vec![MASKED_LABEL; prompt.len()]);
        assert_eq!(learned(&tokenizer, &labelled), "blue\nblue\n");
        // `blue` is one token, as it is within a text.
        assert_eq!(labelled.labels.iter().filter(|l| **l != MASKED_LABEL).count(), 4);
    }
}

#[test]
fn line_breaks_are_split_as_the_prompt_has_them() {
    let tokenizer = tokenizer(&byte_level());
    // GPT-2's pattern leaves the last of two line breaks to what follows, and no token crosses the boundary.
    let text = "a:\n\nblue";
    assert_eq!(tokenizer.encode(text, false).unwrap().ids.len(), 5);
    let labelled = tokenizer.encode_labelled(text, std::slice::from_ref(&(4..8)), false).unwrap();
    let prompt = tokenizer.encode("a:\n\n", false).unwrap().ids;
    assert_eq!(prompt.len(), 3);
    assert_eq!(labelled.ids[..3], prompt);
    assert_eq!(learned(&tokenizer, &labelled), "blue");
}

#[test]
fn a_token_over_the_end_of_an_answer_is_cut() {
    let tokenizer = tokenizer(&byte_level());
    let text = "a:blue\n\n";
    let labelled = tokenizer.encode_labelled(text, std::slice::from_ref(&(2..7)), false).unwrap();
    assert_eq!(learned(&tokenizer, &labelled), "blue\n");
    assert_eq!(tokenizer.decode(&labelled.ids, false).unwrap(), text);
}

#[test]
fn a_text_has_one_bos_and_cuts_keep_what_is_put_around_it() {
    let tokenizer = tokenizer(&byte_level());
    let around = |text: &str| {
        let labelled =
            tokenizer.encode_labelled(text, std::slice::from_ref(&(text.len() - 4..text.len())), true).unwrap();
        tokenizer.decode(&labelled.ids, false).unwrap()
    };
    assert_eq!(around("a:blue"), "<s>a:blue<|end|>");
    assert_eq!(around("a: blue"), "<s>a: blue<|end|>");
    assert_eq!(around("<s>a: blue"), "<s>a: blue<|end|>");
    let prompt = tokenizer.encode("<s>a: ", true).unwrap();
    assert_eq!(prompt.ids.iter().filter(|id| Some(**id) == tokenizer.bos_token_id()).count(), 1);
}

#[test]
fn an_end_far_from_the_last_added_token_is_compared_nearby() {
    let tokenizer = tokenizer(&byte_level());
    let text = format!("{}a: blue", "blue a: \n".repeat(3000));
    let at = text.len() - 4;
    let labelled = tokenizer.encode_labelled(&text, std::slice::from_ref(&(at..text.len())), false).unwrap();
    assert_eq!(learned(&tokenizer, &labelled), "blue");
    assert_eq!(tokenizer.encode(&text[..at], false).unwrap().ids, labelled.ids[..labelled.ids.len() - 1]);
}

/// A conversation as an adapter is prompted with it.
fn prompt(tokenizer: &Tokenizer, template: &str, cut_at_answers: bool, messages: &[Message]) -> Prompt {
    let prompting = Prompting {
        settings: PromptSettings { cut_at_answers, ..PromptSettings::default() },
        template: Some(ChatTemplate::new(template).unwrap()),
    };
    let input = ChatInput {
        messages,
        tools: None,
        add_generation_prompt: true,
        special_tokens: tokenizer.special_tokens(),
        template_kwargs: None,
    };
    prompting.conversation(tokenizer, &input).unwrap()
}

#[test]
fn a_prompt_is_cut_at_the_answers_in_it_as_a_row_is() {
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";
    let silent = Message { learn: false, ..Message::assistant("") };
    let messages = [
        Message::user("a"),
        Message::assistant("blue"),
        Message::user("b"),
        silent,
        Message::user("a"),
        Message::assistant("blue"),
        Message::user("a"),
        Message::assistant("blue"),
    ];
    for tokenizer in joining() {
        let input = ChatInput {
            messages: &messages,
            tools: None,
            add_generation_prompt: false,
            special_tokens: tokenizer.special_tokens(),
            template_kwargs: None,
        };
        let rendered = ChatTemplate::new(template).unwrap().render_answers(&input).unwrap();
        let row = tokenizer.encode_labelled(&rendered.text, &rendered.spans, false).unwrap();
        for asked in [1, 5, 7] {
            let cut = prompt(tokenizer, template, true, &messages[..asked]);
            assert!(rendered.text.starts_with(&cut.text));
            assert!(row.ids.starts_with(&cut.ids), "{asked}: {:?}, {:?}", row.ids, cut.ids);
            assert_ne!(row.labels[cut.ids.len()], MASKED_LABEL);
            let whole = prompt(tokenizer, template, false, &messages[..asked]);
            assert_eq!(whole.ids, tokenizer.encode(&whole.text, false).unwrap().ids);
            assert_eq!(whole.ids == cut.ids, asked == 1, "a blank and `blue` are one token");
        }
    }
}

#[test]
fn a_prompt_whose_answers_can_not_be_found_is_one_text() {
    let [tokenizer, _] = joining();
    let template =
        "{{ messages | length }}{% for m in messages %}{{ m.content[:9] }} {{ m.content | length }}{% endfor %}";
    let messages = [Message::user("a"), Message::assistant("blue"), Message::user("b")];
    let prompt = prompt(tokenizer, template, true, &messages);
    assert_eq!(prompt.text, "3a 1blue 4b 1");
    assert_eq!(prompt.ids, tokenizer.encode(&prompt.text, false).unwrap().ids);
}

fn reference() -> &'static Tokenizer {
    static TOKENIZER: std::sync::OnceLock<Tokenizer> = std::sync::OnceLock::new();
    TOKENIZER.get_or_init(|| {
        Tokenizer::from_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/reference/tiny-llama")).unwrap()
    })
}

fn joining() -> [&'static Tokenizer; 2] {
    static TOKENIZERS: std::sync::OnceLock<[Tokenizer; 2]> = std::sync::OnceLock::new();
    TOKENIZERS.get_or_init(|| [tokenizer(&byte_level()), tokenizer(&sentence_piece())]).each_ref()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Any ranges of any text: the tokens are the text's, the learned ones are the ranges' text, and the first
    /// range begins after the tokens of its prompt alone.
    #[test]
    fn learned_tokens_are_the_ranges_text(
        parts in prop::collection::vec("( |\n|[a-z]{1,4}|<\\|im_end\\|>|é|漢|🙂|[.:!]){0,6}", 1..7),
        first in any::<bool>(),
    ) {
        let tokenizer = reference();
        let text = parts.concat();
        let mut spans = Vec::new();
        let (mut at, mut answer, mut expected) = (0, first, String::new());
        for part in &parts {
            if answer {
                spans.push(at..at + part.len());
                expected.push_str(part);
            }
            at += part.len();
            answer = !answer;
        }
        let labelled = tokenizer.encode_labelled(&text, &spans, false).unwrap();
        prop_assert_eq!(labelled.ids.len(), labelled.labels.len());
        prop_assert!(labelled.ids.iter().zip(&labelled.labels).all(|(id, l)| *l == MASKED_LABEL || *l == i64::from(*id)));
        prop_assert_eq!(tokenizer.decode(&labelled.ids, false).unwrap(), &*text);
        prop_assert_eq!(learned(tokenizer, &labelled), expected);
        let prompt = tokenizer.encode(&text[..spans.first().map_or(0, |s| s.start)], false).unwrap().ids;
        prop_assert_eq!(&labelled.ids[..prompt.len()], &*prompt);
    }

    /// Any conversation: before each of its answers stand the tokens that generation sees there, where the earlier
    /// answers are cut as well.
    #[test]
    fn each_answer_begins_behind_the_tokens_of_its_prompt(
        parts in prop::collection::vec("( |\n|: |blue|[ab]|<\\|end\\|>|[.:]){0,6}", 2..8),
    ) {
        let [bytes, pieces] = joining();
        for tokenizer in [bytes, pieces, reference()] {
            let text = parts.concat();
            let (mut spans, mut at) = (Vec::new(), 0);
            for (index, part) in parts.iter().enumerate() {
                if index % 2 == 1 {
                    spans.push(at..at + part.len());
                }
                at += part.len();
            }
            let row = tokenizer.encode_labelled(&text, &spans, false).unwrap();
            for (earlier, span) in spans.iter().enumerate() {
                let prompt = tokenizer.encode_labelled(&text[..span.start], &spans[..earlier], false).unwrap();
                prop_assert!(row.ids.starts_with(&prompt.ids), "{:?} at {}: {:?}, {:?}", text, span.start, row.ids, prompt.ids);
            }
        }
    }
}
