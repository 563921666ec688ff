//! The bytes of tokens: those of a text's tokens, joined, are the text.

#![allow(clippy::unwrap_used)]

use chat_text::Tokenizer;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

const TINY_LLAMA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/reference/tiny-llama");

/// A tokenizer as SentencePiece's are converted: spaces as U+2581, bytes that have no token as `<0xAB>`.
fn sentencepiece() -> Tokenizer {
    let mut vocab = Map::new();
    let bytes = (0..=255u8).map(|byte| format!("<0x{byte:02X}>"));
    let tokens = ["<unk>", "<s>", "</s>"].map(String::from).into_iter().chain(bytes);
    for token in tokens.chain(["\u{2581}", "t", "h", "e", "th", "\u{2581}th", "\u{2581}the"].map(String::from)) {
        let id = vocab.len();
        vocab.insert(token, id.into());
    }
    let special = |id: u32, content: &str| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true,
        })
    };
    let json: Value = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": { "type": "Replace", "pattern": { "String": " " }, "content": "\u{2581}" },
        "pre_tokenizer": null, "post_processor": null,
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "\u{2581}" }, "content": " " },
            { "type": "ByteFallback" }, { "type": "Fuse" },
            { "type": "Strip", "content": " ", "start": 1, "stop": 0 },
        ] },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false, "vocab": vocab,
            "merges": [["t", "h"], ["\u{2581}", "th"], ["\u{2581}th", "e"]],
        },
    });
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
    Tokenizer::from_dir(dir.path()).unwrap()
}

fn joined(tokenizer: &Tokenizer, text: &str) -> String {
    let bytes = tokenizer.token_bytes();
    let ids = tokenizer.encode(text, false).unwrap().ids;
    String::from_utf8(ids.iter().flat_map(|&id| bytes[id as usize].clone()).collect()).unwrap()
}

#[test]
fn special_tokens_have_the_bytes_of_their_names() {
    let tokenizer = Tokenizer::from_dir(TINY_LLAMA).unwrap();
    let end = tokenizer.token_to_id("<|im_end|>").unwrap();
    assert_eq!(tokenizer.token_bytes()[end as usize], b"<|im_end|>");
    assert_eq!(tokenizer.special_token_ids(), [0, 1, 2, 3]);
    assert_eq!(sentencepiece().special_token_ids(), [0, 1, 2]);
}

#[test]
fn a_decoder_that_owns_its_tokenizer_gives_the_same_text() {
    let tokenizer = std::sync::Arc::new(Tokenizer::from_dir(TINY_LLAMA).unwrap());
    let ids = tokenizer.encode("Grüße 🙂", false).unwrap().ids;
    let mut decoder = chat_text::StreamDecoder::new(tokenizer, &[], true);
    let mut text: String = ids.iter().map(|&id| decoder.push(id).unwrap()).collect();
    text += &decoder.finish().unwrap();
    assert_eq!(text, "Grüße 🙂");
}

proptest! {
    #[test]
    fn the_bytes_of_a_texts_tokens_are_the_text(text in r"(the| |\n|é|🙂|[a-z]|\PC){0,20}") {
        prop_assert_eq!(joined(&Tokenizer::from_dir(TINY_LLAMA).unwrap(), &text), text.clone());
        prop_assert_eq!(joined(&sentencepiece(), &text), text);
    }
}
