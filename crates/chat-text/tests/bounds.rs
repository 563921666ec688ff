//! Templates and tokenizer files that are broken or hostile end in an error that names them, within bounds.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::time::{Duration, Instant};

use chat_text::{ChatError, ChatTemplate, Message, SpecialTokens, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value as Json, json};

#[path = "../../adapter-io/tests/bounded/mod.rs"]
mod bounded;

use bounded::bounded;

/// What a template may hold at once.
const BOUND: usize = 256 << 20;

/// The small reference tokenizer with one part replaced by this text.
fn with_part(part: &str, json: &str) -> Result<Tokenizer, ChatError> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/reference/tiny-llama/tokenizer.json");
    let mut file: Json = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    file[part] = "HERE".into();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), file.to_string().replace("\"HERE\"", json)).unwrap();
    Tokenizer::from_dir(dir.path())
}

#[test]
fn broken_tokenizer_files_are_named() {
    let precompiled = |map: &str| json!({"type": "Precompiled", "precompiled_charsmap": map}).to_string();
    let replace = |kind: &str, pattern: &str| {
        json!({"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {kind: pattern}, "content": "x"}]})
            .to_string()
    };
    for (part, json, expected) in [
        ("decoder", r#"{"type": 1e999}"#.to_owned(), "not valid JSON: number out of range"),
        ("normalizer", replace("String", ""), "`normalizer`: `pattern` of Replace is empty"),
        ("normalizer", replace("Regex", "x*"), "matches the empty text"),
        ("normalizer", replace("Regex", "("), "`pattern` \"(\" of Replace"),
        ("pre_tokenizer", r#"{"type": "FixedLength", "length": 0}"#.to_owned(), "`length` of FixedLength is 0"),
        ("normalizer", precompiled("AAAA"), "can't be read"),
        ("normalizer", precompiled("!"), "can't be read"),
        ("normalizer", precompiled("AAAAAA=="), "is broken"),
        // A trie of one unit: the first letter of any text is looked for behind it.
        ("normalizer", precompiled("BAAAAAAAAAA="), "is broken"),
    ] {
        let error = with_part(part, &json).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json") && error.contains(expected), "{json}: {error}");
    }
    assert!(with_part("normalizer", &replace("Regex", " {2,}")).is_ok());
}

/// SentencePiece's map: the trie's length in bytes, the trie, the texts.
fn charsmap(trie: &[u32], texts: &[u8]) -> String {
    let units = std::iter::once(trie.len() as u32 * 4).chain(trie.iter().copied());
    let bytes: Vec<u8> = units.flat_map(u32::to_le_bytes).chain(texts.iter().copied()).collect();
    let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let bits = group.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
        for digit in 0..4 {
            let letter = char::from(alphabet[(bits >> (18 - 6 * digit) & 63) as usize]);
            text.push(if digit <= group.len() { letter } else { '=' });
        }
    }
    json!({"type": "Precompiled", "precompiled_charsmap": text}).to_string()
}

/// A trie that replaces `a` by the text at 0: its root at 0, the node of `a` at 97, its value at 97 ^ 256.
fn one_letter() -> Vec<u32> {
    let mut trie = vec![0; 512];
    trie[97] = 97 | 1 << 8 | 256 << 10;
    trie
}

#[test]
fn a_whole_character_map_is_taken() {
    let tokenizer = with_part("normalizer", &charsmap(&one_letter(), b"b\0")).unwrap();
    let ids = tokenizer.encode("ab", false).unwrap().ids;
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), "bb");
    // The value points behind the texts.
    let mut trie = one_letter();
    trie[97 ^ 256] = 9;
    assert!(with_part("normalizer", &charsmap(&trie, b"b\0")).is_err());
}

#[test]
fn endless_templates_are_told_apart_in_time_and_memory() {
    let doubling =
        "{% set ns = namespace(s='x') %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}";
    for source in [
        "{{ '{:>1000000000}'.format('x') }}",
        "{{ '{:>{}}'.format('x', 1000000000) }}",
        "{{ '%999999999d'|format(1) }}",
        "{{ '%.999999999f'|format(1) }}",
        "{{ '%*d'|format(999999999, 1) }}",
        doubling,
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x'.ljust(999999999) }}",
        "{{ 'x'.zfill(999999999) }}",
        "{{ 'x'|center(999999999) }}",
        "{{ 'x\ny'|indent(999999999) }}",
        "{{ 'x' * 999999999 }}",
        "{{ [1]|batch(999999999, 'x')|list }}",
        "{{ [1]|slice(999999999)|list }}",
        "{{ range(99999)|map('string')|join('x' * 99999) }}",
    ] {
        let template = ChatTemplate::new(source).unwrap();
        let start = Instant::now();
        let result = bounded(BOUND, || template.render(&[Message::user("Hi")], false, &SpecialTokens::default()));
        assert!(matches!(result, Err(ChatError::TemplateEndless)), "{source}: {:?}", result.map(|text| text.len()));
        // About a second in the test profile.
        assert!(start.elapsed() < Duration::from_secs(20), "{source}: {:?}", start.elapsed());
    }
    assert_eq!(ChatError::TemplateEndless.to_string().matches("it takes too long or writes too much").count(), 1);
}

#[test]
fn large_conversations_have_what_they_need() {
    let source = "{% for m in messages %}{% for n in messages %}{% if n.role == 'none' %}x{% endif %}{% endfor %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}";
    let template = ChatTemplate::new(source).unwrap();
    let many: Vec<_> = (0..600).flat_map(|i| [Message::user(format!("{i}?")), Message::assistant("yes")]).collect();
    let long = [Message::user("x".repeat(20 << 20)), Message::assistant("yes")];
    for messages in [&many[..], &long] {
        template.render(messages, false, &SpecialTokens::default()).unwrap();
    }
}

#[test]
fn a_setting_is_a_template_or_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.jinja");
    std::fs::write(&path, "{{ messages[0].content }}").unwrap();
    assert_eq!(ChatTemplate::from_setting(path.to_str().unwrap()).unwrap().source(), "{{ messages[0].content }}");
    assert!(ChatTemplate::from_setting("{{ messages }}").is_ok());
    let error = ChatTemplate::from_setting("chatml").unwrap_err().to_string();
    assert!(error.contains("\"chatml\" is no chat template: names are not known"), "{error}");
    assert!(matches!(ChatTemplate::from_setting("missing.jinja"), Err(ChatError::Read { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 40, ..ProptestConfig::default() })]

    /// Any trie is refused when the file is read, or any text can be put through it.
    #[test]
    fn character_maps_never_fail_later(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u32>()), 0..4), cut in 0usize..3, text in "[a-c é漢]{0,8}") {
        let mut trie = one_letter();
        for (at, unit) in changes {
            let at = at.index(trie.len());
            trie[at] = unit;
        }
        trie.truncate(trie.len() - cut * 200);
        if let Ok(tokenizer) = with_part("normalizer", &charsmap(&trie, "b\0é\0".as_bytes())) {
            prop_assert!(tokenizer.encode(&text, false).is_ok());
        }
    }
}

/// The engine has a fault there; what it costs is this template, and not the program.
#[test]
fn a_template_that_the_engine_fails_on_is_an_error() {
    let message = [Message::user("a")];
    for end in ["continue", "break"] {
        let source = format!("{{% for m in messages %}}{{% with a = 1 %}}{{% {end} %}}{{% endwith %}}{{% endfor %}}");
        let rendered = ChatTemplate::new(source).unwrap().render(&message, false, &SpecialTokens::default());
        let error = rendered.unwrap_err().to_string();
        assert!(error.contains("inside `with`") || end == "break" && error.contains("too long"), "{error}");
    }
}
